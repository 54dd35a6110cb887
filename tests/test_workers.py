"""Worker processes with failing shared memory, semaphores or disks: an error message, or work
without workers; never a hang."""

import errno
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from dcris.checkpoints.checkpoint import list_checkpoints
from dcris.cli import main
from dcris.config import replace
from dcris.data import dataset
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.training.stopping import Interrupted
from dcris.training.trainer import total_steps
from dcris.utils import workers
from dcris.utils.streams import note_once
from dcris.utils.workers import load, shared_memory_left, workers_that_fit
from runs import assert_same_run, quick_config, run_training


class Unsendable:
    def __reduce__(self) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Samples:
    """A data set of four samples: `make` returns each by number."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def unsendable(number: int) -> object:
    return Unsendable() if number == 2 else number


def unreadable(number: int) -> object:
    return workers.Failure("not an image") if number == 2 else number


def stalled(number: int) -> int:
    if number == 2:
        time.sleep(1000)
    return number


def test_unsendable_batch_error() -> None:
    """Docker's 64 MB of shared memory: torch would drop the batch and wait for it forever."""
    batches = load(Samples(unsendable), 2, batch_size=1, collate_fn=list)
    assert [next(batches), next(batches)] == [[0], [1]]
    with pytest.raises(DcrisError, match=r"No space left on device.*/dev/shm.*--data\.workers"):
        next(batches)


def test_stalled_worker_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A network disk that hangs: a message after a minute, an error after ten, and the process can
    then end."""
    monkeypatch.setattr(workers, "_TIMEOUT", 0.3)
    # How long torch waits for a worker that has to end, before it kills it.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    batches = load(Samples(stalled), 1, batch_size=1, collate_fn=list)
    assert [next(batches), next(batches)] == [[0], [1]]
    with pytest.raises(DcrisError, match="no images have been read"):
        next(batches)
    assert "still waiting" in capsys.readouterr().err


def test_an_error_in_a_cycle_ends_its_workers_at_once() -> None:
    """A notebook keeps its last error: Python frees the workers' queues with it, and the next cell
    would wait five seconds for each worker."""

    def keep_error() -> None:
        try:
            list(load(Samples(unreadable), 2, batch_size=None))
        except DcrisError as error:
            kept: list[Any] = [error]
            kept.append(kept)

    keep_error()
    started = time.monotonic()
    gc.collect()
    assert time.monotonic() - started < 5


def test_without_semaphores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sandboxes without a writable /dev/shm: one message, and the work is done."""

    def missing(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    note_once.cache_clear()
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", missing)
    for _ in range(2):
        assert list(load(Samples(int), 2, batch_size=2, collate_fn=list)) == [[0, 1], [2, 3]]
    write_scenes(tmp_path / "two", train=2, val=1, test=0, workers=2)
    messages = capsys.readouterr().err
    assert messages.count("\n") == 1
    assert "continuing without" in messages
    monkeypatch.undo()
    write_scenes(tmp_path / "one", train=2, val=1, test=0)
    written = [(tmp_path / name / "scenes" / "instances.json").read_bytes() for name in ("one", "two")]
    assert written[0] == written[1]


def test_shared_memory_is_checked_first(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before weights are downloaded. Validation and evaluation use fewer workers instead."""
    monkeypatch.setattr(workers, "shared_memory_left", lambda: 6e5)
    words = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "run")]
    assert main([*words, "--train.batch_size", "4", "--data.workers", "2"]) == 2
    error_text = capsys.readouterr().err
    assert "2 workers need 1.8 MB for 5 batches" in error_text
    assert "has 0.6 MB free; use --data.workers 0," in error_text
    assert not (tmp_path / "run").exists()
    assert workers_that_fit(4, 1e5) == 2
    monkeypatch.undo()
    assert shared_memory_left() > 0


@pytest.mark.parametrize("steps", [0, 2])
def test_stop_while_waiting_for_a_batch(
    steps: int, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM writes a checkpoint although no step ends; the resumed run equals an uninterrupted
    one."""
    read = dataset.load

    def hang(*arguments: Any, **options: Any) -> Iterator[Any]:
        batches = read(*arguments, **options)
        for _ in range(steps):
            yield next(batches)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(1000)

    config = quick_config(4)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load", hang)
        with pytest.raises(Interrupted) as stop:
            run_training(config, scenes_root, tmp_path / "run")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run")] == [steps]
    run_training(config, scenes_root, tmp_path / "run", resume=True)
    run_training(config, scenes_root, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_max_steps_over_epochs(scenes_root: Path, tmp_path: Path) -> None:
    """Regression test: a recipe of one epoch with max_steps 7 trained for the 3 steps of its epoch
    only, all within the warm-up."""
    config = quick_config(7, ("train.epochs", "1"))
    assert total_steps(config.train, 12) == 7
    assert total_steps(replace(config, {"train.epochs": 2}).train, 12) == 6  # the given one counts
    run_training(config, scenes_root, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run")[-1].step == 7


def test_a_closed_connection_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """After Ctrl-C, a worker may be passing a batch to a parent that no longer listens."""
    for error in (ConnectionResetError("reset"), BrokenPipeError("pipe"), EOFError()):
        workers._report_exception(type(error), error, None)
    assert capsys.readouterr().err == ""
    workers._report_exception(ValueError, ValueError("unexpected"), None)
    assert "unexpected" in capsys.readouterr().err


def test_a_dead_worker_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may raise its error inside a callback of the interpreter, which prints a traceback."""
    printed: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    workers._report_dead_workers_once()
    workers._report_dead_workers_once()
    for message in ("DataLoader worker (pid 7) is killed by signal: Killed. ", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message)))
    assert printed == ["something else"]
