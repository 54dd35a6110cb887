"""Training: resuming is exact, and a stop, a kill or a full disk loses no more than the steps since
the last checkpoint."""

import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dcris import Segmenter
from dcris.checkpoints import checkpoint as checkpoints
from dcris.checkpoints.checkpoint import _sealed, best_checkpoint, find_checkpoint, list_checkpoints, load_checkpoint
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.training import trainer
from dcris.training.loggers import read_log
from dcris.training.optimizer import learning_rate
from dcris.training.stopping import Interrupted
from dcris.training.trainer import Trainer, TrainResult, build_model
from dcris.utils import files
from launcher import Launcher
from marks import slow_except
from runs import (
    EVERY_STEP,
    PLAIN_WORDS,
    assert_same_run,
    last_tensors,
    leftovers,
    quick_config,
    run_training,
    small_recipe,
    timeless_log,
    unseal,
)

STEPS = 8


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


@pytest.fixture(scope="module")
def unbroken(table: ReferenceTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps without a stop."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run_training(quick_config(STEPS, EVERY_STEP), table, out)
    return out


@pytest.fixture
def broken(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a run that the test may damage."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def stop_at(step: int) -> Callable[[str], None]:
    """Return a log function that sends Ctrl-C as that step ends."""

    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            signal.raise_signal(signal.SIGINT)

    return log


@pytest.mark.slow
def test_overfits_eight_samples(table: ReferenceTable, tmp_path: Path) -> None:
    """Gradients reach all trainable weights, and masks belong to their expressions."""
    few = ReferenceTable(table.dataset, table.split_by, table.root, table.split("train")[:8])
    settings = {"train.batch_size": "8", "train.lr": "5e-4", "model.head.bias": "null", "model.head.layers": "1"}
    run_training(quick_config(40, EVERY_STEP, *settings.items(), recipe="dcris_tiny"), few, tmp_path / "run")
    lines = read_log(tmp_path / "run")
    assert len(lines) == 40
    assert sum(line["loss"] for line in lines[-5:]) < 0.4 * sum(line["loss"] for line in lines[:5])
    assert max(line["iou"] for line in lines[-5:]) > 20


@pytest.mark.parametrize(
    ("stops", "workers"),
    [((1,), 0), pytest.param((3,), 2, marks=pytest.mark.slow), pytest.param((2, 5), 1, marks=pytest.mark.slow)],
)
def test_stopped_run_resumes_exactly(
    table: ReferenceTable, unbroken: Path, tmp_path: Path, stops: tuple[int, ...], workers: int
) -> None:
    """Bit for bit, with any number of workers."""
    config = quick_config(STEPS, EVERY_STEP, ("data.workers", str(workers)))
    out = tmp_path / "run"
    for number, step in enumerate(stops):
        with pytest.raises(Interrupted, match=f"stopped at step {step};") as stop:
            run_training(config, table, out, resume=number > 0, log=stop_at(step))
        assert stop.value.exit_code == 130
        assert list_checkpoints(out)[-1].step == step
        load_checkpoint(out)  # it is usable
    run_training(config, table, out, resume=True)
    assert_same_run(unbroken, out)
    assert not leftovers(out)


@pytest.mark.parametrize("recipe", slow_except([None, "dcris_tiny", "lora_tiny"], None))
def test_bfloat16_run_resumes_exactly(table: ReferenceTable, tmp_path: Path, recipe: str | None) -> None:
    """In bfloat16, frozen weights are stored differently (packed on some CPUs): validation copies
    them, and a resumed run packs them again."""
    few = ReferenceTable(
        table.dataset, table.split_by, table.root, [*table.split("train")[:8], *table.split("val")[:2]]
    )
    settings = ("train.precision", "bfloat16"), ("data.val_split", "val"), EVERY_STEP
    config = quick_config(4, *settings, recipe=recipe)
    run_training(config, few, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, few, tmp_path / "halves", log=stop_at(3))
    run_training(config, few, tmp_path / "halves", resume=True)
    assert sum("val_first_miou" in line for line in read_log(tmp_path / "whole")) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_killed_run_resumes_from_last_checkpoint(
    table: ReferenceTable, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in step 6 with a half-written log line: log lines after the checkpoint are dropped."""
    out, config = tmp_path / "run", quick_config(STEPS, EVERY_STEP, ("train.save_every", "2"))
    losses = trainer.training_losses
    calls = iter(range(100))
    monkeypatch.setattr(trainer, "training_losses", lambda *args: losses(*args) if next(calls) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training(config, table, out)
    monkeypatch.undo()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert [line["step"] for line in read_log(out)] == [1, 2, 3, 4, 5]
    assert list_checkpoints(out)[-1].step == 4
    run_training(config, table, out, resume=True)
    assert_same_run(unbroken, out)


def test_seed_changes_the_run(table: ReferenceTable, unbroken: Path, tmp_path: Path) -> None:
    """Runs with different seeds have different losses."""
    run_training(quick_config(2, EVERY_STEP, ("train.seed", "1")), table, tmp_path / "run")
    assert timeless_log(tmp_path / "run")[0]["loss"] != timeless_log(unbroken)[0]["loss"]


def test_resuming_a_finished_run_changes_nothing(table: ReferenceTable, broken: Path) -> None:
    """`--resume` on a finished run changes nothing, so a job script may be restarted."""
    before, log = last_tensors(broken), (broken / "log.jsonl").read_text()
    result = run_training(quick_config(12, ("train.log_every", "2")), table, broken, resume=True)
    assert result.last.step == 12
    after = last_tensors(broken)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (broken / "log.jsonl").read_text() == log


def test_resume_without_a_run_starts_one(table: ReferenceTable, unbroken: Path, tmp_path: Path) -> None:
    """`--resume` without a run starts one, so a job script needs one command only."""
    run_training(quick_config(STEPS, EVERY_STEP), table, tmp_path / "new", resume=True)
    assert_same_run(unbroken, tmp_path / "new")


def test_existing_run_is_not_overwritten(table: ReferenceTable, broken: Path) -> None:
    """Without --resume, or with other settings, an existing run is refused and unchanged."""
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(DcrisError, match=r"already holds a run; add --resume"):
        run_training(quick_config(2), table, broken)
    with pytest.raises(DcrisError, match=r"train\.lr"):
        run_training(quick_config(12, ("train.lr", "1e-4")), table, broken, resume=True)
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


def test_resume_refuses_another_order_of_augmentations(table: ReferenceTable, tmp_path: Path) -> None:
    """They are applied in their order, so the samples would be others than before."""
    one, other = (dict.fromkeys(names, 0.5) for names in (("flip", "light"), ("light", "flip")))
    run_training(quick_config(1, ("data.augmentations", json.dumps(one))), table, tmp_path)
    run_training(quick_config(2, ("data.augmentations", json.dumps(one))), table, tmp_path, resume=True)
    with pytest.raises(DcrisError, match=r'data\.augmentations = \["flip", "light"\], not \["light", "flip"\]'):
        run_training(quick_config(3, ("data.augmentations", json.dumps(other))), table, tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_saved_model_is_not_overwritten(table: ReferenceTable, broken: Path, tmp_path: Path, resume: bool) -> None:
    """Fine-tuning a model into its own folder would replace its configuration, and every command
    would use the old weights with it."""
    folder = tmp_path / "model"
    Segmenter.from_pretrained(broken, device="cpu").save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    config = quick_config(1, ("train.start", json.dumps(str(folder))))
    with pytest.raises(DcrisError, match=r"holds a model, not a run; choose another --out"):
        run_training(config, table, folder, resume=resume)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_the_run(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Before the weights are changed: the error names the step, and the last checkpoint still
    loads."""
    losses = trainer.training_losses
    calls = iter(range(100))

    def broken_losses(*args: Any) -> dict[str, torch.Tensor]:
        factor = value if next(calls) == 4 else 1.0
        return {name: factor * loss for name, loss in losses(*args).items()}

    monkeypatch.setattr(trainer, "training_losses", broken_losses)
    out = tmp_path / "run"
    with pytest.raises(DcrisError, match=rf"the loss is {value} at step 5; .*--train.lr"):
        run_training(quick_config(STEPS, ("train.save_every", "2")), table, out)
    assert list_checkpoints(out)[-1].step == 4
    model, _ = load_checkpoint(out)
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def test_weights_that_are_not_finite_are_not_saved(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss can have gradients that are not. A checkpoint of such weights would be useless,
    and later ones would replace all that are intact."""
    losses = trainer.training_losses
    calls = iter(range(100))

    def with_broken_gradient(*args: Any) -> dict[str, torch.Tensor]:
        terms = losses(*args)
        return terms | {"broken": (0 * terms["text_to_pixel"]).sqrt()} if next(calls) == 4 else terms

    monkeypatch.setattr(trainer, "training_losses", with_broken_gradient)
    with pytest.raises(DcrisError, match=r"the weights are not finite after step 5; .*--train.lr"):
        run_training(quick_config(5, ("train.save_every", "2")), table, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run")[-1].step == 4
    model, _ = load_checkpoint(tmp_path / "run")
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def test_full_disk_keeps_the_previous_checkpoint(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error message, also where safetensors notices it, and a run that can be resumed."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", Mock(side_effect=full))
        with pytest.raises(DcrisError, match=r"cannot write .*step-0+1: No space left on device; free disk space"):
            run_training(quick_config(1), table, tmp_path / "none")
    assert not list_checkpoints(tmp_path / "none")
    out, syncs, fsync = tmp_path / "run", [], os.fsync

    def fills(handle: int) -> None:
        syncs.append(handle)
        if [*out.glob("checkpoints/.step-00000004*")]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", fills)
    with pytest.raises(DcrisError, match=r"cannot write .*step-00000004: No space left on device"):
        run_training(quick_config(6, ("train.save_every", "2")), table, out)
    monkeypatch.undo()
    assert syncs
    assert [item.step for item in list_checkpoints(out)] == [2]
    assert not leftovers(out)
    run_training(quick_config(6, ("train.save_every", "2")), table, out, resume=True)
    assert list_checkpoints(out)[-1].step == 6


def test_old_checkpoints_are_deleted_except_the_best(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep_last` limits the number of checkpoints, and never deletes the best."""
    scores = iter([10.0, 30.0, 20.0, 30.0, 5.0, 1.0])
    monkeypatch.setattr(Trainer, "compute_scores", lambda self: {"miou": next(scores)})
    few = ReferenceTable(table.dataset, table.split_by, table.root, table.split("train")[:4])
    out = tmp_path / "run"
    result = run_training(quick_config(6, ("data.val_split", "train"), ("train.keep_last", "1")), few, out)
    assert [(item.step, item.score) for item in list_checkpoints(out)] == [(4, 30.0), (6, 1.0)]  # the newest of equals
    assert (result.best.step, result.last.step) == (4, 6)
    assert find_checkpoint(out).name == "step-00000004"
    assert find_checkpoint(list_checkpoints(out)[-1].path).name == "step-00000006"
    assert [line["val_first_miou"] for line in read_log(out) if "val_first_miou" in line] == [
        10.0,
        30.0,
        20.0,
        30.0,
        5.0,
        1.0,
    ]


def test_unvalidated_checkpoint_has_no_score(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at an epoch's end skips validation; the checkpoint must not get the score of the epoch
    before."""
    monkeypatch.setattr(Trainer, "compute_scores", lambda self: {"miou": 40.0})
    few = ReferenceTable(table.dataset, table.split_by, table.root, table.split("train")[:4])
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_training(quick_config(6, ("data.val_split", "train")), few, out, log=stop_at(2))
    assert [item.score for item in list_checkpoints(out)] == [40.0, None]
    assert best_checkpoint(list_checkpoints(out)).step == 1


def test_scores_of_two_splits_are_not_compared(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint would be the one of the easier split, here of the training data.

    Validation may be switched on and off, also before another split.
    """
    few, out = ReferenceTable(table.dataset, table.split_by, table.root, table.split("train")[:4]), tmp_path / "run"
    few = ReferenceTable(few.dataset, few.split_by, few.root, (*few.references, *table.split("val")[:2]))
    scores = iter([20.0, 90.0, 30.0, 40.0])
    monkeypatch.setattr(Trainer, "compute_scores", lambda self: {"miou": next(scores)})

    def resume(steps: int, split: str) -> TrainResult:
        return run_training(quick_config(steps, ("data.val_split", split)), few, out, resume=True)

    refused = (
        r"best checkpoint by scores on the split 'train', with which scores on 'val' cannot be compared; resume it "
    )
    assert resume(1, "null").best.score is None
    assert resume(2, "train").best.score == 90.0
    with pytest.raises(DcrisError, match=refused + r"with --data\.val_split train or null"):
        resume(3, "val")
    assert resume(3, "null").best.step == 2
    with pytest.raises(DcrisError, match=refused):
        resume(4, "val")
    for checkpoint in list_checkpoints(out):  # as of runs from before the split was recorded
        state = json.loads((checkpoint.path / "state.json").read_text())
        state.pop("split", None)
        (checkpoint.path / "state.json").write_text(json.dumps(_sealed(state)))
    with pytest.raises(DcrisError, match=refused):
        resume(4, "val")
    assert resume(4, "train").best.step == 2


def test_validation_does_not_change_training(table: ReferenceTable, tmp_path: Path) -> None:
    """Weights are the same with and without validation."""
    few = ReferenceTable(table.dataset, table.split_by, table.root, (*table.split("train")[:8], *table.split("val")))
    for name, split in (("with", "val"), ("without", "null")):
        run_training(quick_config(4, ("data.val_split", split)), few, tmp_path / name)
    ours, theirs = last_tensors(tmp_path / "with"), last_tensors(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    scores = [line["val_first_miou"] for line in read_log(tmp_path / "with") if "val_first_miou" in line]
    assert len(scores) == 2
    assert all(0 <= score <= 100 for score in scores)


def test_learning_rate_schedules() -> None:
    """Section 4.2: one tenth from epoch 35. Also warm-up, and half a cosine that ends at zero."""
    paper = quick_config(1, ("train.schedule", "step"), ("train.lr", "1e-4"), ("train.warmup_steps", "0")).train
    rates = [learning_rate(paper, step, per_epoch=10, total=500) for step in (0, 349, 350, 499)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])
    cosine = quick_config(1, ("train.lr", "1.0"), ("train.warmup_steps", "4")).train
    rates = [learning_rate(cosine, step, per_epoch=10, total=12) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_a_short_run_reaches_its_learning_rate(table: ReferenceTable, tmp_path: Path) -> None:
    """A user who asks for fewer steps than a recipe's warm-up has gets a run that trains: the
    warm-up is shortened, and a line says so."""
    settings, lines = quick_config(8, ("train.warmup_steps", "40"), ("train.log_every", "1")), []
    run_training(settings, table, tmp_path / "short", log=lines.append)
    rates = [line["lr"] for line in read_log(tmp_path / "short") if "lr" in line]
    assert rates[0] == pytest.approx(settings.train.lr)
    assert any("the warm-up takes 0 steps, not 40" in line for line in lines)
    rates = [learning_rate(settings.train, step, per_epoch=10, total=79) for step in range(79)]
    assert rates[:7] == pytest.approx([settings.train.lr * (step + 1) / 7 for step in range(7)])
    assert max(rates[7:]) <= rates[6]
    # Half of a run is as it was.
    rates = [learning_rate(settings.train, step, per_epoch=10, total=80) for step in range(80)]
    assert rates[:40] == pytest.approx([settings.train.lr * (step + 1) / 40 for step in range(40)])


# ---- what a run starts from --------------------------------------------------------------------


def test_data_record(table: ReferenceTable, tmp_path: Path) -> None:
    """data.json records the data set, its splits, its notes and a checksum."""
    noted, lines = replace(table, notes=("two were left out",)), []
    run_training(quick_config(1), noted, tmp_path / "run", log=lines.append)
    record = json.loads((tmp_path / "run/data.json").read_text())
    assert record == {
        "dataset": "scenes",
        "split_by": "generated",
        "splits": {
            name: {"references": references, "expressions": expressions}
            for name, (references, expressions) in table.splits().items()
        },
        "notes": ["two were left out"],
        "sha256": table.sha256(),
    }
    assert lines[0] == "two were left out"


def test_resume_refuses_other_data(table: ReferenceTable, broken: Path) -> None:
    """Resuming on changed references is refused."""
    first = table.references[0]
    phrase = replace(first.expressions[0], text="the other one")
    changed = replace(table, references=(replace(first, expressions=(phrase,)), *table.references[1:]))
    config, before = quick_config(14, ("train.log_every", "2")), (broken / "data.json").read_text()
    with pytest.raises(DcrisError, match=r"references of scenes .* are not those that the run in .* was started on"):
        run_training(config, changed, broken, resume=True)
    assert list_checkpoints(broken)[-1].step == 12
    assert (broken / "data.json").read_text() == before
    (broken / "data.json").write_text("[]")
    with pytest.raises(DcrisError, match="are not those"):
        run_training(config, table, broken, resume=True)
    (broken / "data.json").unlink()  # as in runs without the file
    run_training(config, table, broken, resume=True)
    assert (broken / "data.json").read_text() == before


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the optimizer changes; running statistics change with the data."""
    return {name: value for name, value in last_tensors(run).items() if "running" not in name and "tracked" not in name}


@pytest.mark.parametrize("kind", ["run", "checkpoint", "bundle"])
def test_start_from_a_checkpoint(table: ReferenceTable, trained_run: Path, tmp_path: Path, kind: str) -> None:
    """`train.start`: the first step uses the adapters and head of the other run, and data.json
    records which."""
    checkpoint = list_checkpoints(trained_run)[-1].path
    start = {"run": trained_run, "checkpoint": checkpoint, "bundle": tmp_path / "model.safetensors"}[kind]
    if kind == "bundle":
        Segmenter.from_pretrained(trained_run, device="cpu").save_pretrained(start)
    settings = [("train.start", json.dumps(str(start))), ("train.lr", "1e-30")]
    run_training(quick_config(1, *settings), table, tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(trained_run)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    recorded = json.loads((tmp_path / "run/data.json").read_text())["start"]
    assert recorded["checkpoint"] == str(start if kind == "bundle" else checkpoint)
    assert len(recorded["sha256"]) == 64
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["start"] == str(start)


def test_resume_ignores_train_start(table: ReferenceTable, broken: Path, tmp_path: Path) -> None:
    """A resumed run uses its own checkpoint, even if that of `train.start` is gone."""
    config = quick_config(4, EVERY_STEP, ("train.start", json.dumps(str(broken))))
    run_training(config, table, tmp_path / "unbroken")
    with pytest.raises(Interrupted):
        run_training(config, table, tmp_path / "new", log=stop_at(2))
    record = (tmp_path / "new/data.json").read_text()
    shutil.rmtree(broken)
    run_training(config, table, tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "new")
    assert (tmp_path / "new/data.json").read_text() == record
    with pytest.raises(DcrisError, match=r"train\.start"):
        run_training(quick_config(4, EVERY_STEP), table, tmp_path / "new", resume=True)


def test_a_presence_head_is_added_or_left_out_at_the_start(
    table: ReferenceTable, trained_run: Path, tmp_path: Path
) -> None:
    """A model of RefCOCO learns what is not there, and one that knows it is trained on phrases that
    always fit; all other weights are those of the start, and the run says it."""
    presence = ("model.head.presence", "true")

    def started(origin: Path, name: str, *settings: tuple[str, str]) -> tuple[set[str], str]:
        lines: list[str] = []
        config = quick_config(1, ("train.start", json.dumps(str(origin))), ("train.lr", "1e-30"), *settings)
        run_training(config, table, tmp_path / name, log=lines.append)
        before, after = weights(origin), weights(tmp_path / name)
        assert all(torch.allclose(after[each], before[each], atol=1e-20) for each in after.keys() & before.keys())
        return after.keys() ^ before.keys(), "\n".join(lines)

    added, said = started(trained_run, "with", presence)
    assert len(added) == 11
    assert "a new one is trained" in said
    removed, said = started(tmp_path / "with", "without")
    assert removed == added
    assert "is left out" in said
    changed, said = started(tmp_path / "with", "kept", presence)
    assert not changed
    assert "presence head" not in said


def test_start_refuses_another_model(table: ReferenceTable, broken: Path, tmp_path: Path) -> None:
    """A head of another width, or other towers: one error message, before anything is written."""
    start = ("train.start", json.dumps(str(broken)))
    with pytest.raises(DcrisError, match=r"has the shape .*checkpoint of the same model"):
        run_training(quick_config(1, start, ("model.head.width", "64")), table, tmp_path / "new")
    rewritten(list_checkpoints(broken)[-1].path / MODEL, other_towers)
    with pytest.raises(DcrisError, match=r"trained on another vision encoder"):
        run_training(quick_config(1, start), table, tmp_path / "new")
    with pytest.raises(DcrisError, match=r"there is no checkpoint"):
        run_training(quick_config(1, ("train.start", "absent")), table, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_start_names_what_differs(table: ReferenceTable, broken: Path, tmp_path: Path) -> None:
    """Other settings can fit the same weights, and a run without a note would start from a network
    that was never trained. The weights of other methods are named before their frozen encoders."""
    start, lines = ("train.start", json.dumps(str(broken))), list[str]()
    same = ("model.head.presence", "true"), ("train.lr", "0.1"), ("data.word_length", "9")
    run_training(quick_config(1, start, *same), table, tmp_path / "same", log=lines.append)
    assert not any("was trained with" in line for line in lines)
    other = ("model.head.heads", "2"), ("data.std", "[1.0, 1.0, 1.0]")
    run_training(quick_config(1, start, *other), table, tmp_path / "other", log=lines.append)
    (line,) = (line for line in lines if "was trained with" in line)
    assert re.search(r"with data\.std = \[0\..*\], not \[1\.0, 1\.0, 1\.0\]; model\.head\.heads = \d, not 2$", line)
    recipe = r"here of the recipe dcris_tiny: train with .*config\.json in place of "
    with pytest.raises(DcrisError, match=rf"has no tensor vision\..*; it is for another model.*{recipe}"):
        run_training(quick_config(1, start, ("model.method", '{"name": "bitfit"}')), table, tmp_path / "new")


def test_start_refuses_a_damaged_checkpoint(table: ReferenceTable, broken: Path, tmp_path: Path) -> None:
    """A changed bit in the weights that a run starts from would change all its results unnoticed.
    The optimizer's state is not needed."""
    checkpoint = list_checkpoints(broken)[-1].path
    (checkpoint / "optimizer.safetensors").unlink()
    config = quick_config(1, ("train.start", json.dumps(str(broken))))
    run_training(config, table, tmp_path / "intact")
    content = bytearray((checkpoint / MODEL).read_bytes())
    content[-1] ^= 1
    (checkpoint / MODEL).write_bytes(content)
    with pytest.raises(DcrisError, match=r"model\.safetensors does not match its checksum"):
        run_training(config, table, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- what a checkpoint is ----------------------------------------------------------------------


def test_checkpoint_content(trained_run: Path) -> None:
    """A checkpoint contains tensors and JSON only, and no frozen weights."""
    folder = list_checkpoints(trained_run)[-1].path
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    model, config = load_checkpoint(trained_run)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stored = load_file(folder / "model.safetensors")
    assert trained <= stored.keys()
    assert all("head." in name or "_slot." in name for name in stored)
    assert json.loads(metadata["towers"])["vision"]["name"] == config.model.vision.name
    assert len(json.loads(metadata["towers"])["text"]["sha256"]) == 64
    assert not model.training
    for name, value in model.state_dict().items():
        assert name not in stored or torch.equal(value, stored[name])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Flip one bit, as a bad disk or cable does."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def unsealed(checkpoint: Path, damage: Callable[[], object]) -> None:
    """Damage a checkpoint whose state has no checksums of files."""
    unseal(checkpoint)
    damage()


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Change the tensors of a checkpoint whose state has no checksums of files."""
    unsealed(path.parent, lambda: None)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def reshape_first(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors[min(tensors)] = torch.zeros(3, 5, 7)


def first_as(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor], dict[str, str]], object]:
    return lambda tensors, metadata: tensors.update({min(tensors): tensors[min(tensors)].to(dtype)})


def other_towers(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    towers = json.loads(metadata["towers"])
    towers["vision"]["sha256"] = "0" * 64
    metadata["towers"] = json.dumps(towers)


MODEL = "model.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda at: cut(at / MODEL), r"model\.safetensors does not match its checksum: .*cut short"),
        (lambda at: flip(at / MODEL), r"model\.safetensors does not match its checksum"),
        (lambda at: flip(at / "config.json"), r"config\.json does not match its checksum"),
        (lambda at: (at / MODEL).write_bytes(b""), r"model\.safetensors does not match its checksum"),
        (lambda at: (at / MODEL).unlink(), r"no file .*model\.safetensors|no checkpoint"),
        (lambda at: (at / "config.json").unlink(), r"there is no file .*config\.json"),
        (lambda at: cut(at / "config.json"), r"config\.json does not match its checksum"),
        (lambda at: unsealed(at, (at / "config.json").unlink), r"configuration is missing: .*config\.json"),
        (lambda at: unsealed(at, lambda: cut(at / "config.json")), r"config\.json, is not valid JSON"),
        (lambda at: rewritten(at / MODEL, lambda t, m: t.pop(min(t))), r"has no tensor .*for another model"),
        (
            lambda at: rewritten(at / MODEL, lambda t, m: t.update(extra=torch.zeros(1))),
            r"tensor extra that this model",
        ),
        (lambda at: rewritten(at / MODEL, reshape_first), r"has the shape \[3, 5, 7\]"),
        (lambda at: rewritten(at / MODEL, first_as(torch.int8)), r"has int8 values, but this model needs float32"),
        (lambda at: rewritten(at / MODEL, first_as(torch.complex64)), r"has complex64 values"),
        (lambda at: rewritten(at / MODEL, other_towers), r"trained on another vision encoder than .*vision"),
        (lambda at: rewritten(at / MODEL, lambda t, m: m.clear()), r"has no record of its encoders"),
        (lambda at: rewritten(at / MODEL, lambda t, m: m.update(towers="[1]")), r"has no record of its encoders"),
        (lambda at: shutil.rmtree(at.parent), r"has no checkpoint"),
    ],
)
def test_damaged_checkpoint_error(broken: Path, damage: Callable[[Path], object], words: str) -> None:
    """Truncated, of another model, or of other towers: one error message, never a traceback or a
    wrong model."""
    damage(list_checkpoints(broken)[-1].path)
    with pytest.raises(DcrisError, match=words) as caught:
        load_checkpoint(broken)
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"x": torch.zeros(1)},
        {"1.step": torch.zeros(())},
        {"0.momentum": torch.zeros(1)},
        {"0.step": torch.zeros(()), "0.exp_avg": torch.zeros(1), "0.exp_avg_sq": torch.zeros(1)},
    ],
    ids=["none", "another name", "a part", "of another optimizer", "other shapes"],
)
def test_optimizer_state_of_another_model_error(
    table: ReferenceTable, broken: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """An optimizer state that does not fit is refused."""
    checkpoint = list_checkpoints(broken)[-1].path
    unsealed(checkpoint, lambda: save_file(tensors, checkpoint / "optimizer.safetensors"))
    with pytest.raises(DcrisError, match="is of another model"):
        run_training(quick_config(14, ("train.log_every", "2")), table, broken, resume=True)


def test_missing_checkpoint_errors(tmp_path: Path) -> None:
    """The messages for a missing and an empty folder differ."""
    with pytest.raises(DcrisError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(DcrisError, match="has no checkpoint"):
        load_checkpoint(tmp_path)


def test_unknown_weights_name_error(tmp_path: Path) -> None:
    """An unknown weights name is refused before anything is read or written, and the known names
    are listed."""
    with pytest.raises(DcrisError, match=r"no weights 'dinov5'.*dinov2-base.*tiny-vision"):
        build_model(quick_config(1, ("model.vision.name", '"dinov5"')))


# ---- signals, in a process of its own ----------------------------------------------------------


def start_training(launcher: Launcher, data: Path, out: Path, steps: int, workers: int) -> int:
    """Start or resume a run beside which its errors are stored; return the process."""
    settings = {"max_steps": steps, "epochs": 1000, "batch_size": 4, "warmup_steps": 1, "log_every": 1}
    words = [word for key, value in settings.items() for word in (f"--train.{key}", value)]
    command = ["train", small_recipe(), "--data", data, "--out", out, "--resume", "--data.image_size", 56, *PLAIN_WORDS]
    output, errors = out.with_name("output.txt"), out.with_name("errors.txt")
    return launcher.start([*command, "--data.workers", workers, *words], output, errors=errors)


def wait_for_steps(launcher: Launcher, process: int, out: Path, steps: int) -> None:
    log, patience = out / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= steps):
        assert launcher.poll(process) is None, out.with_name("errors.txt").read_text()
        assert time.monotonic() < patience
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_a_checkpoint(
    launcher: Launcher, scenes_root: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C as a terminal sends it, also to the workers; and SIGTERM as a scheduler sends it."""
    out, steps = tmp_path / "run", 400
    process = start_training(launcher, scenes_root, out, steps, workers=1)
    wait_for_steps(launcher, process, out, 2)
    (os.killpg if number == signal.SIGINT else os.kill)(process, number)
    ended, error_text = launcher.wait(process, 60), out.with_name("errors.txt").read_text()
    assert ended == code, error_text
    stopped = list_checkpoints(out)[-1].step
    assert 2 <= stopped < steps
    assert re.fullmatch(rf"dcris: stopped at step {stopped}; `--resume` continues from .*\n", error_text)
    load_checkpoint(out)
    assert not leftovers(out)
    assert timeless_log(out)[-1]["step"] == stopped


def test_resume_after_ctrl_c_is_exact(launcher: Launcher, scenes_root: Path, tmp_path: Path) -> None:
    """Through the command line."""
    out, steps = tmp_path / "run", 20
    process = start_training(launcher, scenes_root, out, steps, workers=0)
    wait_for_steps(launcher, process, out, 2)
    os.killpg(process, signal.SIGINT)
    assert launcher.wait(process, 60) == 130
    again = start_training(launcher, scenes_root, out, steps, workers=1)
    assert launcher.wait(again) == 0, out.with_name("errors.txt").read_text()
    run_training(quick_config(steps, EVERY_STEP), scenes_root, tmp_path / "unbroken")
    assert_same_run(tmp_path / "unbroken", out)
