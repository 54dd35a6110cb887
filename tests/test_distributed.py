"""Several processes at one task give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dcris import Segmenter
from dcris.cli import main
from dcris.engine.distributed import processes
from dcris.errors import DcrisError


def torchrun(count: int, *words: object) -> subprocess.CompletedProcess[str]:
    """`dcris` in `count` processes. One thread each: a product's rounding depends on their number."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "dcris"]
    return subprocess.run(
        [sys.executable, *command, *(str(word) for word in words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def daring(run: Path, path: Path) -> Path:
    """The model of a few steps, which finds nothing anywhere, with a bias at which it finds half of each photograph."""
    segmenter = Segmenter.from_pretrained(run, device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    (answer,) = segmenter.predict(picture, "man on the left", scores=True)
    with torch.no_grad():
        segmenter.model.head.projector.text.bias[-1] -= np.quantile(logit(answer.probabilities.astype(float)), 0.5)
    return segmenter.save_pretrained(path)


def logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability / (1 - probability))


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_size_or_processes(trained_run: Path, refer_root: Path, tmp_path: Path) -> None:
    """Else a score on eight GPUs is not that of the paper's one: samplers that pad count some expressions twice."""
    words = [
        "evaluate",
        daring(trained_run, tmp_path / "daring"),
        "--data",
        refer_root,
        "--dataset",
        "cocomini",
        "--split",
        "val",
    ]
    words += ["--device", "cpu"]
    results = {}
    for count, batch_size in ((1, 1), (1, 7), (1, 32), (2, 7), (3, 32)):
        out = tmp_path / f"{count}.{batch_size}.json"
        done = torchrun(count, *words, "--batch-size", batch_size, "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"miou"') == 1  # one process speaks
        results[count, batch_size] = json.loads(out.read_text())
    assert results[1, 1]["expressions"] == 216
    assert 1 < results[1, 1]["miou"] < 99
    assert all(result == results[1, 1] for result in results.values())


def test_a_broken_environment_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable left over in a shell would make the program wait for processes that nobody starts."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DcrisError, match="torchrun"), processes():
        pass
    assert main(["evaluate", "nothing", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
