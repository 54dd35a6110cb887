"""The scripts of tools/, benchmarks/ and examples/ on the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tools", "benchmarks", "examples")
NEEDS_MORE = {"gallery", "onnx_segment", "screenshot_web"}
QUICK = {"onnx_segment", "screenshot_web"}
"""Those that import no torch."""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("*.py"))
    ],
)
def test_a_wrong_argument_is_one_sentence(script: Path, tmp_path: Path) -> None:
    """Some of them ended in a traceback, also without any argument."""
    few = [[], ["nonsense"]] if script.stem in NEEDS_MORE else []
    for words in (["--nonsense"], *few):
        ended = subprocess.run(
            [sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert ended.returncode == 2, ended.stderr
        assert "usage:" in ended.stderr and "error:" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["run_notebooks", "measure_commands"])
def test_what_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    tool = ROOT / "tools" / f"{name}.py"
    ended = subprocess.run(
        [sys.executable, tool, "nonsense"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "there is no" in ended.stderr.splitlines()[-1]
    assert "nonsense" in ended.stderr.splitlines()[-1]
