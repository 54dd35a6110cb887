"""Progress, log.jsonl, TensorBoard and W&B: what they record, and that they neither break nor
change a run."""

import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcris.checkpoints.checkpoint import list_checkpoints
from dcris.cli import main
from dcris.data.dataset import all_queries
from dcris.data.images import read_image
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.training import loggers, trainer
from dcris.training.loggers import PANEL_CELL, PANELS, Monitor, check_trackers, panel_queries, read_log
from dcris.utils.drawing import cell
from launcher import Launcher
from runs import CPU, EVERY_STEP, assert_same_run, quick_config, run_training, small_recipe

VAL = ("data.val_split", "val")
TENSORBOARD, WANDB = ("train.trackers", '["tensorboard"]'), ("train.trackers", '["wandb"]')
BOTH = ("train.trackers", '["wandb", "tensorboard"]')
STEPS = 4


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    """Eight training references, so that an epoch is two steps, and those of three scenes for
    validation."""
    whole = load_references(scenes_root, "scenes")
    return replace(whole, references=(*whole.split("train")[:8], *whole.split("val")))


@pytest.fixture(scope="module")
def untracked(table: ReferenceTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with validation, without trackers."""
    out = tmp_path_factory.mktemp("unwatched") / "run"
    run_training(quick_config(STEPS, EVERY_STEP, VAL), table, out)
    return out


@pytest.fixture(scope="module")
def tracked(table: ReferenceTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with TensorBoard."""
    out = tmp_path_factory.mktemp("watched") / "run"
    run_training(quick_config(STEPS, EVERY_STEP, VAL, TENSORBOARD), table, out)
    return out


def events(run: Path) -> Any:
    """Read a run's events with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return reader.Reload()


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_log(run) if name in line]


def crash_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the run crash after so many steps."""
    losses, calls = trainer.training_losses, iter(range(100))
    monkeypatch.setattr(trainer, "training_losses", lambda *args: losses(*args) if next(calls) < steps else 1 / 0)


# ---- the log -----------------------------------------------------------------------------------


def test_log_keys(untracked: Path) -> None:
    """The keys of log.jsonl and their order: scripts read them."""
    steps = [line for line in read_log(untracked) if "loss" in line]
    scores = [line for line in read_log(untracked) if "loss" not in line]
    old = ["step", "epoch", "loss", "iou", "lr", "seconds"]
    assert all(list(line) == [*old, "images_per_second", "peak_memory_mb"] for line in steps)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [(line["step"], line["epoch"]) for line in scores] == [(2, 1), (4, 2)]
    precisions = [f"val_first_prec@0.{digit}" for digit in "56789"]
    assert all(list(line) == ["step", "epoch", "val_first_miou", "val_first_oiou", *precisions] for line in scores)
    assert all(50 < line["peak_memory_mb"] < 50_000 for line in steps)  # of a process that imported torch
    assert all(0 < line["images_per_second"] < 10_000 for line in steps)


def test_speed_excludes_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images in two seconds are two a second, however long validation takes."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    with Monitor(tmp_path, quick_config(3, EVERY_STEP), 0, 3, 1, CPU, len) as monitor:
        for step in (1, 2, 3):
            clock.now += 2
            monitor.step(step, {"loss": 0.5}, 10.0, 1e-3, 4)
            clock.now += 500
            monitor.validated(step, {"miou": 1.0}, list)
    assert logged(tmp_path, "images_per_second") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert [seconds for _, seconds in logged(tmp_path, "seconds")] == [2, 504, 1006]


def test_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, peak memory is torch's, not the process's."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_345_678_901)
    assert loggers.peak_memory(torch.device("cuda", 0)) == {"peak_memory_mb": 12345.7}


PEAK = """
import numpy as np, torch
from dcris.training.loggers import peak_memory
before = peak_memory(torch.device("cpu"))["peak_memory_mb"]
block = np.ones(200_000_000, np.uint8)
del block
print(peak_memory(torch.device("cpu"))["peak_memory_mb"] - before)
"""


def test_peak_memory_of_the_process(launcher: Launcher, tmp_path: Path) -> None:
    """200 MB that were allocated and freed raise it by 200 MB.

    In a process of its own: the peak never falls.
    """
    assert 120 < float(launcher.run_code(PEAK, tmp_path / "output.txt")) < 260


# ---- for a person ------------------------------------------------------------------------------


def test_progress_lines(table: ReferenceTable, tmp_path: Path) -> None:
    """Progress lines in the output of a cluster job: loss, IoU, speed and time left."""
    lines: list[str] = []
    run_training(quick_config(4, ("train.log_every", "3"), VAL), table, tmp_path / "run", log=lines.append)
    log = read_log(tmp_path / "run")
    last = next(line for line in log if line["step"] == 4 and "loss" in line)
    shown = [line for line in lines if line.startswith("step ")]
    assert len(shown) == 4
    assert shown[-1].startswith(
        f"step 4/4 epoch 2/2 loss {last['loss']:.3f} IoU {last['iou']:.1f} lr {last['lr']:.1e} "
    )
    assert shown[-1].endswith(" images/s 00:00 left")
    score = log[-1]
    assert lines[-1] == (
        f"validation (first sentences) after epoch 2/2 mIoU {score['val_first_miou']:.1f} oIoU {score['val_first_oiou']:.1f} "
        f"prec@0.5 {score['val_first_prec@0.5']:.1f}"
    )


@given(total=st.integers(1, 3000), data=st.data())
def test_number_of_progress_lines(total: int, data: st.DataObject) -> None:
    """At most twenty progress lines besides those of the epochs; the last step is among them."""
    first = data.draw(st.integers(0, total - 1))
    lines: list[str] = []
    progress = loggers.Progress(first, total, 7, lines.append)
    for done in range(first + 1, total + 1):
        progress.advance(done, 0.5, 10.0 if progress.due(done) else None, 1e-3, loggers._Speed())
    assert 1 <= len(lines) <= 20
    assert lines[-1].startswith(f"step {total}/{total} epoch {math.ceil(total / 7)}/")


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers; the IoU, which makes the CPU wait, is computed at most once a second."""
    screen, clock, lines = Terminal(), SimpleNamespace(now=100.0), []
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    asked = []
    with Monitor(tmp_path, quick_config(100, ("train.log_every", "50")), 0, 100, 10, CPU, lines.append) as monitor:
        for step in range(1, 101):
            clock.now += 0.25
            wanted = monitor.wants_iou(step)
            asked += [step] * wanted
            monitor.step(step, {"loss": 0.125}, 43.21 if wanted else None, 1e-3, 8)
            monitor.progress.bar.refresh()
        monitor.validated(100, {"miou": 56.78}, list)
    assert asked == sorted({*range(1, 101, 4), 50, 100})
    assert "epoch 10/10" in screen.getvalue()
    assert "loss 0.125 IoU 43.2 lr 1.0e-03 32 images/s]" in screen.getvalue()
    assert lines == ["validation (first sentences) after epoch 10/10 mIoU 56.8"]


def test_other_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks other than 0 print, write and send nothing."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = quick_config(2, EVERY_STEP, BOTH)
    with Monitor(tmp_path, config, 0, 2, 1, CPU, pytest.fail, enabled=False) as monitor:
        assert not monitor.wants_iou(1)
        monitor.step(1, {"loss": 0.5}, None, 1e-3, 4)
        monitor.validated(1, {"miou": 1.0}, lambda: pytest.fail("nobody looks at these"))
    assert not list(tmp_path.iterdir())


# ---- TensorBoard -------------------------------------------------------------------------------


def test_tensorboard_curves_equal_the_log(tracked: Path) -> None:
    """TensorBoard shows every number of the log at its step."""
    found = curves(tracked)
    for tag in ("loss", "iou", "lr", "images_per_second", "peak_memory_mb"):
        assert found[f"train/{tag}"] == [(step, pytest.approx(value)) for step, value in logged(tracked, tag)]
    for tag in ("miou", "oiou", "prec@0.5", "prec@0.9"):
        values = logged(tracked, f"val_first_{tag}")
        assert found[f"val/first_{tag}"] == [(step, pytest.approx(value)) for step, value in values]
    assert [step for step, _ in found["val/first_miou"]] == [2, 4]
    assert found["epoch"][-1] == (4, 2.0)


def test_panels(tracked: Path, table: ReferenceTable) -> None:
    """The same queries at each validation: image, true mask, predicted mask."""
    found, queries = events(tracked), panel_queries(all_queries(table.split("val"), first_only=True))
    assert 1 < len(queries) <= PANELS
    tags = [f"panels/{number} {expression.text}" for number, (_, expression) in enumerate(queries, 1)]
    assert found.Tags()["images"] == tags
    for tag, (reference, _) in zip(tags, queries, strict=True):
        shown = found.Images(tag)
        assert [event.step for event in shown] == [2, 4]
        scene = cell(read_image(reference.image_path), PANEL_CELL)
        height, width = scene.shape[:2]
        for event in shown:
            image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            assert image.shape == (event.height, event.width, 3) == (height, 3 * width + 16, 3)
            assert np.array_equal(image[:, :width], scene)
            changed = (image[:, width + 8 : 2 * width + 8] != scene).any(axis=2)
            truth = union_mask(reference.segmentations, reference.image_size).astype(bool)
            truth = truth.repeat(height // len(truth), 0).repeat(width // truth.shape[1], 1)
            assert changed[truth].mean() > 0.9
            assert changed[~truth].mean() < 0.2  # the contour


def test_resumed_run_has_one_curve(
    table: ReferenceTable, untracked: Path, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in step 4 with a checkpoint of step 2: the repeated step 3 is in the curve once."""
    out, config = tmp_path / "run", quick_config(STEPS, EVERY_STEP, VAL, TENSORBOARD)
    crash_after(3, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run_training(config, table, out)
    monkeypatch.undo()
    assert list_checkpoints(out)[-1].step == 2
    assert [step for step, _ in curves(out)["train/loss"]] == [1, 2, 3]
    run_training(config, table, out, resume=True)
    assert len(list((out / "tensorboard").iterdir())) == 2
    measured = {"train/images_per_second", "train/peak_memory_mb"}
    ours, theirs = curves(out), curves(tracked)
    assert {tag: points for tag, points in ours.items() if tag not in measured} == {
        tag: points for tag, points in theirs.items() if tag not in measured
    }
    found = events(out)
    assert all([event.step for event in found.Images(tag)] == [2, 4] for tag in found.Tags()["images"])
    assert_same_run(untracked, out)


def test_curves_restart_without_a_checkpoint(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As log.jsonl does."""
    out, config = tmp_path / "run", quick_config(2, EVERY_STEP, TENSORBOARD)
    crash_after(1, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run_training(config, table, out)
    monkeypatch.undo()
    run_training(config, table, out)
    assert [step for step, _ in curves(out)["train/loss"]] == [1, 2]


def test_trackers_do_not_change_the_run(untracked: Path, tracked: Path) -> None:
    """Bit for bit the same weights with and without trackers."""
    assert_same_run(untracked, tracked)


def test_panel_queries(table: ReferenceTable) -> None:
    """Panels show different images, the same ones at every start."""
    reference = table.references[0]
    many = [
        (replace(reference, image_path=Path(f"{number // 4}.jpg"), ref_id=number), expression)
        for number in range(400)
        for expression in reference.expressions[:1]
    ]
    chosen = panel_queries(many)
    assert len({query[0].image_path for query in chosen}) == len(chosen) == PANELS
    assert [query[0].ref_id for query in chosen] == [0, 64, 132, 200, 264, 332]
    assert chosen == panel_queries(many)
    assert len(panel_queries(many[:9])) == 3
    assert panel_queries([]) == []


# ---- Weights & Biases --------------------------------------------------------------------------


class FakeRun:
    """The used part of wandb.Run."""

    def __init__(self, starting_step: int) -> None:
        self.starting_step, self.exit_code = starting_step, None
        self.points: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.points.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandB(ModuleType):
    """The used part of wandb, with a server that has `known` steps of a run."""

    __version__ = "0.31.0"

    def __init__(self) -> None:
        super().__init__("wandb")
        self.known, self.calls, self.runs = 0, [], []
        self.Settings = SimpleNamespace
        self.Image = lambda pixels, caption: (pixels.shape, caption)

    def init(self, **settings: Any) -> FakeRun:
        self.calls.append(settings)
        self.runs.append(FakeRun(self.known if settings["resume"] else 0))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandB]:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield fake


def test_wandb_run(wandb: FakeWandB, table: ReferenceTable, untracked: Path, tmp_path: Path) -> None:
    """Curves, settings and captioned panels are sent; code and output are not."""
    out = tmp_path / "run"
    run_training(quick_config(STEPS, EVERY_STEP, VAL, WANDB), table, out)
    (call,), (run,) = wandb.calls, wandb.runs
    assert (call["project"], call["name"], call["dir"], call["resume"]) == ("dcris", "run", out, None)
    assert call["config"] == json.loads((out / "config.json").read_text())
    assert json.loads((out / "wandb.json").read_text()) == {"id": call["id"]}
    settings = vars(call["settings"])
    assert settings["console"] == "off"
    assert settings["disable_code"] and settings["disable_git"] and not settings["save_code"]
    assert 0 < settings["finish_timeout"] <= 60
    losses = [(step, values["train/loss"]) for step, values in run.points if "train/loss" in values]
    assert losses == logged(untracked, "loss")
    assert [(step, values["val/first_miou"]) for step, values in run.points if "val/first_miou" in values] == logged(
        untracked, "val_first_miou"
    )
    assert [step for step, _ in run.points] == sorted(step for step, _ in run.points)  # W&B drops earlier steps
    (shape, caption), *_ = next(values for _, values in run.points if "panels/1" in values).values()
    assert shape[1] == 3 * shape[0] + 16
    assert "prediction with IoU " in caption
    assert run.exit_code == 0
    assert_same_run(untracked, out)


def test_wandb_resumes_the_same_run(
    wandb: FakeWandB, table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same W&B run continues; step 3, which was repeated, is sent once."""
    out, config = tmp_path / "run", quick_config(STEPS, EVERY_STEP, WANDB, ("train.save_every", "2"))
    crash_after(3, monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with pytest.raises(ZeroDivisionError):
        run_training(config, table, out)
    assert wandb.runs[0].exit_code == 1
    assert list_checkpoints(out)[-1].step == 2
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.known = 4  # the next that W&B expects
    run_training(config, table, out, resume=True)
    first, second = wandb.calls
    assert first["project"] == "mine"
    assert (second["id"], second["resume"], second["allow_val_change"]) == (first["id"], "allow", True)
    assert [[step for step, _ in run.points] for run in wandb.runs] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("content", ["[1]", "{}", '{"id": 5}', "{"])
def test_damaged_wandb_record_is_reported(wandb: FakeWandB, tmp_path: Path, content: str) -> None:
    """A damaged wandb.json is reported, and does not start a second W&B run."""
    (tmp_path / "wandb.json").write_text(content)
    lines: list[str] = []
    with Monitor(tmp_path, quick_config(8, WANDB), 4, 8, 2, CPU, lines.append):
        assert not wandb.calls
    (messages,) = lines
    assert messages.startswith("training continues without wandb: ")
    assert str(tmp_path / "wandb.json") in messages
    assert (tmp_path / "wandb.json").read_text() == content


@pytest.mark.slow
def test_real_wandb_offline(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package accepts the calls, and WANDB_MODE=offline sends nothing."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out, lines = tmp_path / "run", []
    for steps in (1, 2):
        run_training(quick_config(steps, VAL, WANDB), table, out, resume=True, log=lines.append)
        identifier = json.loads((out / "wandb.json").read_text())["id"]
        assert len(list(out.glob(f"wandb/offline-run-*-{identifier}/run-{identifier}.wandb"))) == steps
        assert len(list(out.glob(f"wandb/offline-run-*-{identifier}/files/media/images/panels/*.png"))) == 3 * steps
    assert not [line for line in lines if "without" in line]


# ---- what goes wrong ---------------------------------------------------------------------------


def raise_network_error(*_: object, **__: object) -> Any:
    raise ConnectionError("no way to the server\nfor a long list of reasons")


def raise_disk_full(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_with_failing_tracker(table: ReferenceTable, out: Path, untracked: Path) -> list[str]:
    """Train with failing trackers; check that the run is unchanged, and return the messages."""
    lines: list[str] = []
    run_training(quick_config(STEPS, EVERY_STEP, VAL, BOTH), table, out, log=lines.append)
    assert_same_run(untracked, out)
    return [line for line in lines if line.startswith("training continues without")]


def break_start(wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", raise_network_error)


def break_points(wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "log", raise_network_error)


def break_end(wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "finish", raise_network_error)


@pytest.mark.parametrize("break_wandb", [break_start, break_points, break_end])
def test_failing_tracker_is_left_out(
    wandb: FakeWandB,
    table: ReferenceTable,
    untracked: Path,
    tracked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_wandb: Callable[[FakeWandB, pytest.MonkeyPatch], None],
) -> None:
    """A network failure at the start, in between or at the end is reported once; the run
    continues."""
    break_wandb(wandb, monkeypatch)
    messages = train_with_failing_tracker(table, tmp_path / "run", untracked)
    assert messages == ["training continues without wandb: no way to the server"]
    assert curves(tmp_path / "run")["train/loss"] == curves(tracked)["train/loss"]


def test_full_disk_leaves_tensorboard_out(
    wandb: FakeWandB, table: ReferenceTable, untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message without a traceback; the other tracker continues."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, iter(range(100))
    monkeypatch.setattr(RecordWriter, "write", lambda *args: write(*args) if next(calls) < 4 else raise_disk_full())
    messages = train_with_failing_tracker(table, tmp_path / "run", untracked)
    assert messages == ["training continues without tensorboard: [Errno 28] No space left on device"]
    assert [step for step, _ in curves(tmp_path / "run")["train/loss"]] == [1, 2]
    assert [step for step, values in wandb.runs[0].points if "train/loss" in values] == [1, 2, 3, 4]


def test_unwritable_folder_leaves_tensorboard_out(
    wandb: FakeWandB, table: ReferenceTable, untracked: Path, tmp_path: Path
) -> None:
    """Reported at the start."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").write_text("a file of somebody's")
    (messages,) = train_with_failing_tracker(table, out, untracked)
    assert messages.startswith(f"training continues without tensorboard: cannot write {out / 'tensorboard'}")


def test_failing_panels_are_left_out(
    wandb: FakeWandB, table: ReferenceTable, untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported once, not after each epoch; the curves continue."""
    monkeypatch.setattr(loggers, "overlay", raise_network_error)
    (messages,) = train_with_failing_tracker(table, tmp_path / "run", untracked)
    assert messages == "training continues without images of predictions: no way to the server"
    assert events(tmp_path / "run").Tags()["images"] == []
    assert [step for step, _ in curves(tmp_path / "run")["val/first_miou"]] == [2, 4]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("module", [None, ModuleType("a folder of that name")])
def test_missing_package_is_reported_before_training(
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    module: ModuleType | None,
) -> None:
    """One message with the pip command, also if W&B's own folder `wandb` is imported instead of the
    package."""
    monkeypatch.setitem(sys.modules, name, module)
    words = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "run"), "--tracker", name]
    assert main([*words, "--device", "cpu"]) == 2
    error_text = capsys.readouterr().err
    assert error_text.count("\n") == 1
    assert f'the tracker {name} is not installed; run: pip install "{name}>=' in error_text
    assert not (tmp_path / "run").exists()
    with pytest.raises(DcrisError, match="is not installed"):
        check_trackers([name])


# ---- nothing without being asked ---------------------------------------------------------------


def test_trackers_are_not_imported_by_default(launcher: Launcher, scenes_root: Path, tmp_path: Path) -> None:
    """Without --tracker, neither package is imported."""
    program = """if True:
        import sys
        from dcris.cli import main
        assert main({words}) == 0
        print({{'tensorboard', 'wandb', 'torch.utils.tensorboard'}} & set(sys.modules))
    """
    words = (
        f"train {small_recipe()} --data {scenes_root} --out {tmp_path / 'run'} --device cpu --train.max_steps 2".split()
    )
    words += ["--train.batch_size", "4", "--data.workers", "0", "--data.image_size", "56", "--train.warmup_steps", "1"]
    printed = launcher.run_code(program.format(words=words), tmp_path / "output.txt")
    assert printed.splitlines()[-1] == "set()"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "config.json",
        "data.json",
        "log.jsonl",
        "provenance.json",
        "training_images.bin",
    }


def test_tracker_option(wandb: FakeWandB, scenes_root: Path, tmp_path: Path) -> None:
    """--tracker can be added when a run is resumed."""
    words = f"train {small_recipe()} --data {scenes_root} --out {tmp_path / 'run'} --device cpu --train.batch_size 4".split()
    words += ["--data.workers", "0", "--data.image_size", "56", "--train.log_every", "1", "--train.schedule", "step"]
    words += ["--train.warmup_steps", "1"]
    assert main([*words, "--train.max_steps", "1"]) == 0
    assert not wandb.calls
    both = ["--tracker", "tensorboard", "--tracker", "wandb"]
    assert main([*words, "--train.max_steps", "2", "--resume", *both]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["trackers"] == ["tensorboard", "wandb"]
    assert [step for step, _ in curves(tmp_path / "run")["train/loss"]] == [2]
    assert len(wandb.calls) == 1
    assert main([*words, "--train.max_steps", "3", "--resume"]) == 0
    assert [step for step, _ in curves(tmp_path / "run")["train/loss"]] == [2]
    assert main([*words, "--tracker", "smoke"]) == 2
