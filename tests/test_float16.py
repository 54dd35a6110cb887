"""Training in float16 with a loss scale (`train.precision float16`)."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.training import trainer
from dcris.training.averaging import WeightAverage
from dcris.training.loggers import read_log
from dcris.training.loss_scale import LossScale
from dcris.training.muon import Muon
from dcris.training.stopping import Interrupted
from marks import slow_except
from runs import (
    CPU,
    EVERY_STEP,
    PLAIN_WORDS,
    assert_same_run,
    last_tensors,
    quick_config,
    run_training,
    small_recipe,
)
from test_distributed import torchrun, train_words
from test_train import stop_at

FLOAT16 = ("train.precision", "float16")
SMALL = ("data.image_size", "28")
"""CPUs compute in float16 slowly."""


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


def start_with_scale(monkeypatch: pytest.MonkeyPatch, scale: float, interval: int = 2000) -> None:
    """Let the loss scale start at another value, and grow after so many steps."""
    monkeypatch.setattr(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale, growth_interval=interval)
    )


def test_losses_are_those_of_float32(table: ReferenceTable, tmp_path: Path) -> None:
    """Up to the rounding of float16, which grows over the steps, and with other options."""
    settings = EVERY_STEP, SMALL, ("train.lr", "1e-4"), ("train.masking", "{}"), ("train.micro_batch", "2")
    for precision in ("float32", "float16"):
        run_training(quick_config(4, *settings, ("train.precision", precision)), table, tmp_path / precision)
    whole, half = (read_log(tmp_path / name) for name in ("float32", "float16"))
    assert "loss_scale" not in whole[0]
    assert [line["skipped_steps"] for line in half] == [0] * 4
    assert [line["loss_scale"] for line in half] == [65536] * 4
    for one, other in zip(whole, half, strict=True):
        assert 0 < abs(one["loss"] - other["loss"]) < 0.01 * one["loss"]
    optimizer = last_tensors(tmp_path / "float32", "optimizer.safetensors")
    assert not any(name.startswith("loss_scale") for name in optimizer)


def adam(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, lr=0.1, fused=True)


def muon(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return Muon, for which the first of the weights is a matrix."""
    weights = [*weights]
    return Muon([{"params": weights}], {weights[0]: (1, *weights[0].shape)}, 0.1, (0.9, 0.999), 0.0)


OPTIMIZERS = pytest.mark.parametrize("optimize", [adam, muon])


@OPTIMIZERS
@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_scaling_changes_no_step(
    clip_norm: float | None, optimize: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    """Gradients are divided by the scale before they are clipped. A scale is a power of two, so the
    steps are the same bit for bit."""
    found = []
    for dtype in (torch.float32, torch.float16):
        scale = LossScale(dtype, CPU)
        torch.manual_seed(0)
        layer = nn.Linear(5, 3)
        optimizer = optimize(layer.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss = layer(torch.rand(4, 5)).square().mean()
            scale.scale(loss).backward()
            assert scale.step(optimizer, [*layer.parameters()], loss.item(), clip_norm)
        found.append([*layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@OPTIMIZERS
@pytest.mark.parametrize(("gradient", "loss"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_that_overflows_changes_nothing(
    gradient: float, loss: float, optimize: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    """Neither weights nor moments; the scale is halved. A loss that is not finite may have finite
    gradients."""
    scale = LossScale(torch.float16, CPU)
    weights = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    optimizer = optimize(weights)

    scale.scale(torch.ones(()))

    def step(gradient: float, loss: float) -> bool:
        for weight in weights:
            weight.grad = torch.full_like(weight, 8.0)
        weights[1].grad[1] = gradient
        return scale.step(optimizer, weights, loss, 1.0)

    assert step(1.0, 1.0)
    before = copy.deepcopy((weights, optimizer.state_dict()["state"]))
    assert not step(gradient, loss)
    assert all(torch.equal(one, other) for one, other in zip(weights, before[0], strict=True))
    for slot, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], value) for name, value in before[1][slot].items())
    assert scale.report() == {"loss_scale": 32768, "skipped_steps": 1}
    assert step(1.0, 1.0)


def test_skipped_steps_are_counted_and_training_goes_on(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages leave skipped steps out; the log has the number, the last line names it."""
    start_with_scale(monkeypatch, 2.0**24)
    updates: list[int] = []
    update = WeightAverage.update
    monkeypatch.setattr(WeightAverage, "update", lambda self, step: updates.append(step) or update(self, step))
    lines: list[str] = []
    run_training(quick_config(20, FLOAT16, SMALL, EVERY_STEP, ("train.ema", "0.9")), table, tmp_path, log=lines.append)
    log = read_log(tmp_path)
    counts = [line["skipped_steps"] for line in log]
    skipped = counts[-1]
    assert 3 <= skipped <= 18
    assert counts[:3] == [1, 2, 3], "the scale is too large at first"
    assert log[-1]["loss_scale"] == 2.0 ** (24 - skipped)
    assert len(updates) == 20 - skipped
    assert updates == [step for step in range(20) if counts[step] == (counts[step - 1] if step else 0)]
    assert f"{skipped} of 20 steps were skipped because float16 overflowed" in lines


def test_a_forward_pass_that_overflows_leaves_statistics_finite(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose log showed one skipped step among good losses had NaN in its batch norms for the
    rest of the run, so every mask of its model was refused as "not finite"."""
    images, calls = trainer.Trainer._images, []

    def overflow_in_second_step(*arguments: Any) -> Any:
        calls.append(None)
        return images(*arguments) * (1e38 if len(calls) == 2 else 1)

    monkeypatch.setattr(trainer.Trainer, "_images", overflow_in_second_step)
    start_with_scale(monkeypatch, 256)
    result = run_training(quick_config(3, FLOAT16, SMALL, EVERY_STEP), table, tmp_path)
    assert [line["skipped_steps"] for line in read_log(tmp_path)] == [0, 1, 1]
    model, _ = load_checkpoint(result.last.path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("optimizer", slow_except(["adam", "muon"], "muon"))
def test_a_run_in_float16_resumes_exactly(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """While steps are skipped, before the optimizer has taken any (Muon has no state until then),
    and while the scale grows; with clipping, averages and shared images."""
    settings = (
        FLOAT16,
        SMALL,
        EVERY_STEP,
        ("train.optimizer", optimizer),
        ("train.clip_norm", "0.5"),
        ("train.ema", "0.9"),
        ("data.phrases_per_image", "3"),
    )
    start_with_scale(monkeypatch, 2.0**22, interval=3)
    run_training(quick_config(16, *settings), table, tmp_path / "whole")
    scales = [line["loss_scale"] for line in read_log(tmp_path / "whole")]
    assert any(one < other for one, other in pairwise(scales)), "it grows"
    assert any(one > other for one, other in pairwise(scales)), "it falls"
    for number, step in enumerate((1, 3, 14)):
        with pytest.raises(Interrupted):
            run_training(quick_config(16, *settings), table, tmp_path / "parts", resume=number > 0, log=stop_at(step))
    run_training(quick_config(16, *settings), table, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_loss_that_stays_infinite_ends_the_run(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one sentence, and not at the first step; the log stays JSON."""
    losses_of = trainer.training_losses
    monkeypatch.setattr(
        trainer, "training_losses", lambda *words: {name: term * math.nan for name, term in losses_of(*words).items()}
    )
    with pytest.raises(DcrisError, match=r"float16 overflowed in 25 steps in a row, .* --precision bfloat16"):
        run_training(quick_config(40, FLOAT16, SMALL, EVERY_STEP), table, tmp_path / "run")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert "NaN" not in lines[-1] and '"skipped_steps": 24' in lines[-1]
    with pytest.raises(DcrisError, match="the loss is nan at step 1"):
        run_training(quick_config(40, SMALL, EVERY_STEP), table, tmp_path / "whole")


def test_predictions_in_float16(table: ReferenceTable, scenes_root: Path, tmp_path: Path) -> None:
    """A model that was trained in float16 validates, evaluates and predicts in it; another
    precision gives nearly the same."""
    words = ["--data.image_size", "56", "--train.max_steps", "2", "--train.batch_size", "4", "--data.val_split", "test"]
    command = ["train", small_recipe(), "--data", scenes_root, "--out", tmp_path / "run", "--precision", "float16"]
    assert main([str(word) for word in (*command, *words, *PLAIN_WORDS)]) == 0
    assert load_checkpoint(tmp_path / "run")[1].train.precision == "float16"
    command = ["evaluate", tmp_path / "run", "--data", scenes_root, "--split", "test", "--out", tmp_path / "scores"]
    assert main([str(word) for word in command]) == 0
    image = torch.rand(3, 60, 80).mul(255).byte()
    found = [
        Segmenter.from_pretrained(tmp_path / "run", device="cpu", precision=precision).predict(
            image, "red circle", scores=True
        )[0]
        for precision in (None, "float32")
    ]
    one, other = (each.probabilities for each in found)
    assert 0 < abs(one - other).max() < 0.01


def test_devices_without_a_loss_scale_are_refused() -> None:
    with pytest.raises(DcrisError, match=r"float16 works on cuda and cpu, not on mps"):
        LossScale(torch.float16, torch.device("mps"))
    assert not LossScale(torch.float32, torch.device("mps")).on


@pytest.mark.slow
def test_all_processes_skip_the_same_steps(scenes_root: Path, tmp_path: Path) -> None:
    """Gradients are summed first, so that an overflow on one rank is one on all; also resumed."""
    program = (str(Path(__file__).with_name("large_loss_scale.py")),)
    words = "--precision", "float16", "--train.clip_norm", "1"
    for count in (1, 2):
        for steps in (14,) if count == 1 else (3, 14):
            more = (*words, *(("--resume",) if steps == 14 and count == 2 else ()))
            done = torchrun(count, *train_words(scenes_root, tmp_path / str(count), steps, *more), program=program)
            assert done.returncode == 0, done.stderr
    one, two = (read_log(tmp_path / name) for name in ("1", "2"))
    assert 0 < one[-1]["skipped_steps"] < 14
    assert abs(one[-1]["skipped_steps"] - two[-1]["skipped_steps"]) <= 1
    # Rounding decides whether a step at the limit overflows; until then the runs are the same.
    pairs = takewhile(lambda pair: pair[0]["skipped_steps"] == pair[1]["skipped_steps"], zip(one, two, strict=True))
    same = [(line["loss"], other["loss"]) for line, other in pairs]
    assert len(same) >= 3
    for alone, together in same:
        assert together == pytest.approx(alone, rel=0.02)
