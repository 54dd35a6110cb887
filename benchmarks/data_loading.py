"""Measure seconds and memory of reading and checking data sets of the official sizes.

    python benchmarks/data_loading.py [--deep]

The data sets are generated (tests/full_size.py) in a temporary folder of about 0.2 GB. Every step
runs in a process of its own, because freed memory stays with a process. The parent imports no
libraries, because a child's peak starts at its parent's memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SETS = (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google"))

_WRITE = """
import sys
from pathlib import Path
from full_size import write_official
write_official(Path(sys.argv[1]), *sys.argv[2:], pictures=True)
"""

_MEASURE = """
import json, sys, time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from dcris.data.check import check_dataset
from dcris.data.readers.load import load_references
before, begin = getrusage(RUSAGE_SELF).ru_maxrss, time.monotonic()
result = {call}
print(json.dumps([time.monotonic() - begin, getrusage(RUSAGE_SELF).ru_maxrss, before]))
"""

_CALLS = {
    "load": "load_references(Path(sys.argv[1]), *sys.argv[2:])",
    "check": "check_dataset(Path(sys.argv[1]), *sys.argv[2:])",
    "check --deep": "check_dataset(Path(sys.argv[1]), *sys.argv[2:], deep=True)",
}


def main() -> None:
    """Measure every step and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true", help="also decode every image")
    deep = parser.parse_args().deep
    print(f"{'data set':<20}{'what':<14}{'seconds':>8}{'peak MB':>9}{'libraries MB':>14}")
    for dataset, split_by in _SETS:
        with tempfile.TemporaryDirectory() as root:
            _python(_WRITE, root, dataset, split_by)
            for what, call in _CALLS.items():
                if deep or what != "check --deep":
                    seconds, peak, before = json.loads(_python(_MEASURE.format(call=call), root, dataset, split_by))
                    row = f"{seconds:>8.1f}{peak / 1024:>9.0f}{before / 1024:>14.0f}"
                    print(f"{f'{dataset} ({split_by})':<20}{what:<14}{row}", flush=True)


def _python(program: str, *words: str) -> str:
    """Run a program that can import from tests/ and return its output."""
    tests = Path(__file__).parents[1] / "tests"
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(tests)!r})\n{program}", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
