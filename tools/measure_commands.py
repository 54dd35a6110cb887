"""Measure the CPU time and the memory of the commands of dcris, for the table in docs/cli.md.

    python tools/measure_commands.py [COMMAND ...]

runs each command once on the CPU, in a temporary folder, and prints a table. The time is that of
all cores together, so that it can be measured on a machine that is busy.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from dcris.data.photographs import example_photographs

COMMANDS = {
    "data scenes": "data scenes scenes --train 100 --val 10 --test 40",
    "data check": "data check scenes --dataset scenes --deep",
    "train": "train dcris_tiny --data scenes --out run --train.max_steps 20 --train.warmup_steps 5",
    "evaluate": "evaluate tiny --data scenes --dataset scenes --split test --answers answers.jsonl",
    "score": "score answers.jsonl --data scenes --dataset scenes --split test",
    "compare": "compare run tiny --data scenes --split test",
    "predict": 'predict photos photo.jpg -e "person" -e "left person" --out out',
    "export": "export tiny --out onnx",
    "web": "web photos --port 0",
}
"""By name, in their order: some use files of those before."""


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """Return the CPU seconds and the peak memory in MB of a command.

    `dcris web` is stopped after the answer to one request.
    """
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dcris", *words],
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        if words[0] == "web":
            _segment(folder / "output", folder / "photo.jpg")
            process.send_signal(signal.SIGINT)
        _, status, usage = os.wait4(process.pid, 0)  # of this process and its children, unlike RUSAGE_CHILDREN
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 130):
            sys.exit(f"{shlex.join(words)}: {(folder / 'output').read_text()}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def _segment(output: Path, photograph: Path) -> None:
    while not (line := output.read_text()).startswith("http"):
        if line:
            sys.exit(line)
        time.sleep(0.2)
    request = urllib.request.Request(f"{line.split()[0]}/api/segment?phrase=person", data=photograph.read_bytes())
    urllib.request.urlopen(request, timeout=600).read()


def main() -> None:
    """Run the commands and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"one of: {', '.join(COMMANDS)} (default: all)")
    chosen = parser.parse_args().commands or list(COMMANDS)
    if unknown := [name for name in chosen if name not in COMMANDS]:
        parser.error(f"there is no command {unknown[0]!r}; choose from {', '.join(COMMANDS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photo.jpg").write_bytes(example_photographs()[0][0].read_bytes())
        for command in chosen:
            seconds, megabytes = measure(shlex.split(COMMANDS[command]), folder)
            print(f"| `{COMMANDS[command]}` | {seconds:.0f} s | {megabytes:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
