"""Standard output and error of services, of Windows, and on full disks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dcris.cli import main

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell command in which `dcris` is this package."""
    program = f'dcris() {{ "{sys.executable}" -m dcris "$@"; }}; {command}'
    return subprocess.run(["sh", "-c", program], env={**os.environ, **environment}, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_any_output_encoding(encoding: str, tmp_path: Path) -> None:
    """`dcris ... > log.txt` is written in cp1252 on Windows: a Chinese name must not cause a
    traceback."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    line = {"image": "a.jpg", "mask": [[1, 1, 9, 1, 9, 9]], "expressions": ["左边的杯子"]}
    (tmp_path / "杯子.jsonl").write_text(json.dumps(line), encoding="utf-8")
    done = shell(
        f'cd "{tmp_path}"; dcris data check 杯子.jsonl && dcris data check 没有.jsonl', PYTHONIOENCODING=encoding
    )
    assert done.returncode == 2, done.stderr
    assert "杯子".encode(encoding, "backslashreplace") in done.stdout
    assert "没有".encode(encoding, "backslashreplace") in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """Services and pythonw start programs without standard streams."""
    out = tmp_path / "scenes"
    assert shell(f'dcris data scenes "{out}" --train 2 --val 1 --test 0 {closed}').returncode == 0
    assert (out / "scenes" / "instances.json").read_text().startswith("{")  # nothing else was printed into it
    assert shell(f"dcris recipes --show nothing {closed}").returncode == 2


@needs_dev_full
@pytest.mark.parametrize(
    "words",
    [
        "completion bash",
        *(pytest.param(words, marks=pytest.mark.slow) for words in ("recipes --show dcris_b", "--help", "--version")),
    ],
)
def test_standard_output_on_a_full_disk(words: str) -> None:
    """A script that redirects the output must see from the exit code that it is incomplete."""
    done = shell(f"dcris {words} >/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"dcris: cannot write to standard output")
    assert done.stderr.count(b"\n") == 1
    assert shell("dcris recipes --show nothing 2>/dev/full").returncode == 2  # not Python's 120


@needs_dev_full
def test_results_are_kept_if_printing_fails(
    trained_run: Path,
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Result files are kept if the output cannot be printed, and results are printed if a file
    cannot be written."""
    words = ["evaluate", str(trained_run), "--data", str(scenes_root), "--split", "test", "--out"]
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([*words, str(tmp_path / "result.json")]) == 2
    assert json.loads((tmp_path / "result.json").read_text())["split"] == "test"
    capsys.readouterr()
    # The check before the work is left out, as if the path could still be written then.
    monkeypatch.setattr("dcris.utils.files.require_outputs", lambda outputs, inputs: None)
    assert main([*words, "/dev/null/result.json"]) == 2
    assert json.loads(capsys.readouterr().out)["split"] == "test"


@pytest.mark.slow
def test_too_many_open_files(trained_run: Path, scenes_root: Path) -> None:
    """Containers and old macOS allow few open files; any library may reach the limit first."""
    done = shell(f'ulimit -n 20; dcris evaluate "{trained_run}" --data "{scenes_root}" --split test')
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode in (0, 2)
