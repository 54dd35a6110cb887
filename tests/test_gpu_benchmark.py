"""`benchmarks/gpu.py`, without a GPU: it runs from start to end and finds differences, and neither
a failure nor a part that hangs stops it."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dcris.evaluation.metrics import Overlap

PROGRAM = Path(__file__).parents[1] / "benchmarks/gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_runs_from_start_to_end(gpu: ModuleType, tmp_path: Path) -> None:
    """All parts and their lines run, so that the program works where a GPU is at hand at last."""
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    done = run(PROGRAM, "--device", "cpu", "--tiny", "--minutes", 20, "--json", out, "--markdown", page)
    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not found["failed"] and not found["left_out"] and not found["errors"]
    assert list(found["seconds"]) == [part.name for part in gpu.parts_of(gpu.tiny("cpu"))]
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 17
    rows = " | ".join(row["what"] for row in found["rows"])
    for measured in (
        "relative to one expression at a time",
        "peak memory, training",
        "training, batch 2",
        "8 expressions in one call",
        "largest batch",
        "in a CUDA graph",
        "image and expression, compiled",
        "training step, batch 2, compiled",
        "images of a folder",
    ):
        assert measured in rows
    assert all(row["value"] > 0 for row in found["rows"])
    assert page.read_text().strip() in done.stdout
    assert f"torch {torch.__version__}" in page.read_text() and "--tiny" in page.read_text()


PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, {folder!r})
import gpu

def fails(run):
    yield gpu.Check("towers", 0.5, 0.25)
    yield gpu.Check("no number", float("nan"), 1)

def breaks(run):
    yield gpu.Row("before the error", 1, "s")
    raise RuntimeError("CUDA error\\nand a long trace")

def dies(run):
    os._exit(9)
    yield

def hangs(run):
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield gpu.Row("process", helper.pid, "")
    time.sleep(600)

def runs_out(run):
    raise MemoryError("no memory")
    yield

def lacks(run):
    raise gpu.DcrisError("no compiler")
    yield

def works(run):
    yield gpu.Row("after all of them", 3, "s")

functions = fails, breaks, dies, hangs, runs_out, lacks, works
parts = [gpu.Part(each.__name__, each, 0.1 if each is hangs else 60) for each in functions]
gpu.parts_of = lambda run: parts
if __name__ == "__main__":
    gpu.main()
"""


@pytest.mark.slow
def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    """What was measured before an error, a crash or the time limit is kept, and the reasons are
    named."""
    program, out = tmp_path / "program.py", tmp_path / "gpu.json"
    program.write_text(PARTS.format(folder=str(PROGRAM.parent)))
    done = run(program, "--device", "cpu", "--tiny", "--json", out)
    found = json.loads(out.read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED: towers: 0.5, allowed 0.25" in done.stdout
    assert "FAILED: no number: not finite, allowed 1" in done.stdout
    assert [check["passed"] for check in found["checks"]] == [False, False]
    assert [row["what"] for row in found["rows"]] == ["before the error", "process", "after all of them"]
    helper = Path(f"/proc/{found['rows'][1]['value']}/stat")
    assert not helper.exists() or ") Z " in helper.read_text()
    assert found["errors"] == [
        {"part": "breaks", "reason": "RuntimeError: CUDA error"},
        {"part": "dies", "reason": "its process ended with exit code 9"},
    ]
    assert found["left_out"] == [
        {"part": "hangs", "reason": "it did not end within 1 s"},
        {"part": "runs_out", "reason": "MemoryError: no memory"},
        {"part": "lacks", "reason": "DcrisError: no compiler"},
    ]
    assert "Left out: hangs (it did not end within 1 s)." in done.stdout


def test_checks_that_come_too_late_are_a_failure(gpu: ModuleType) -> None:
    """A run that had no time for its checks does not look like one that passed them."""
    parts, reports = gpu.parts_of(gpu.tiny("cpu")), []
    found = gpu.measure(gpu.tiny("cpu"), parts, 0, reports.append)
    assert found["failed"] and len(reports) == len(parts)
    assert found["left_out"] == [{"part": part.name, "reason": "no time left of 0 minutes"} for part in parts]
    assert not gpu.measure(gpu.tiny("cpu"), parts[-1:], 0, reports.append)["failed"]


def test_wrong_arguments(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They end with one sentence and the code 2, before anything is measured."""
    cases = {"there is no part 'everything'; choose from \"networks\"": ["--only", "everything"]}
    if not torch.cuda.is_available():
        cases["no device cuda: this machine has 0 CUDA devices"] = []
    for expected, words in cases.items():
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_a_wrong_device_is_found(gpu: ModuleType) -> None:
    """An output that is 1% off fails in float32, and passes in bfloat16 where the CPU itself is as
    far off."""
    calls: list[torch.dtype] = []

    def outputs(device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        calls.append(dtype)
        return {"x": torch.full((4,), 1.0 if len(calls) == 1 else 1.01)}

    checks = list(gpu._compare(gpu.tiny("cpu"), outputs))
    assert [(check.passed, round(check.found, 6), round(check.allowed, 6)) for check in checks] == [
        (False, 0.01, 0.002),
        (True, 0.01, 0.02),
    ]
    assert torch.backends.cudnn.allow_tf32, "the setting of the float32 check stays in it"


def test_scores_that_depend_on_the_batch_size_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single expression that is counted differently fails."""
    real = gpu.predict_queries

    def predict(*arguments: Any, batch_size: int, **options: Any) -> Any:
        for number, result in enumerate(real(*arguments, batch_size=batch_size, **options)):
            wrong = batch_size == 1 and number == 3
            yield dataclasses.replace(result, overlap=Overlap(-1, 1)) if wrong else result

    monkeypatch.setattr(gpu, "predict_queries", predict)
    check, *_ = gpu.evaluation(gpu.tiny("cpu"))
    assert check.found == 1 and not check.passed
