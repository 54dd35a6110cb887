"""Watching a training run: a bar or lines for a person, the log, and TensorBoard or Weights & Biases where they are asked for.

The log is the run's record, so one that cannot be written ends the run. Trackers are guests: one that fails is said once and
left out. None is imported unless it was asked for, and nothing here draws a random number, so that a run that is watched ends
in the same weights as one that is not.
"""

import importlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dcris.config import RunConfig
from dcris.data.dataset import Queries
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.utils.device import resident_memory
from dcris.utils.drawing import (
    PNG_UP_TO,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    cell,
    jpeg_bytes,
    mask_cell,
    overlay,
    png_bytes,
)
from dcris.utils.files import (
    MAX_TEXT,
    make_directory,
    parse_json,
    read_bytes,
    read_json,
    sync_directory,
    write_file,
    write_json,
)
from dcris.utils.streams import is_terminal

PANELS = 6
"""Validation phrases whose pictures the trackers show."""

PANEL_CELL = 320
"""Pixels on the longer side of each of a panel's three pictures."""

_GAP = 8  # pixels between them
_PACKAGES = {"tensorboard": "tensorboard>=2.20", "wandb": "wandb>=0.31"}
_VALIDATION = "val_first_"
"""How the log names scores of a validation: while training, only the first sentence of each reference is asked."""

_LINES = 20  # of a run, where there is no terminal
_SHOWN = {"miou": "mIoU", "oiou": "oIoU", "prec@0.5": "prec@0.5"}  # of a validation
_REFRESH = 1.0  # seconds between new figures on a bar
_PATIENCE = 30  # seconds that W&B may take to begin, and to send what it still has at the end


class Monitor:
    """All that watches one run. A context: leaving it closes what was opened.

    Args:
        out: the run's directory.
        config: of the run.
        steps: done before, in all, and in an epoch.
        device: where training goes on: whose memory is reported.
        say: takes lines for a person.
        speaks: False in all processes but the first; then nothing is shown, written or sent.

    Raises DcrisError where the log cannot be written.
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        steps: tuple[int, int, int],
        device: torch.device,
        say: Callable[[str], None] = print,
        speaks: bool = True,
    ) -> None:
        first, self.total, self.per_epoch = steps
        self.log_every, self.device, self.speaks, self._say = config.train.log_every, device, speaks, say
        if not speaks:
            return
        self.log = Log(out / "log.jsonl", first)
        self.trackers: dict[str, Tracker] = {}
        self.pictures = True
        for name in dict.fromkeys(config.train.trackers):
            try:
                self.trackers[name] = _TRACKERS[name](out, config, first)
            except Exception as error:  # whatever a library, a network or a disk may raise
                self._leave_out(name, error)
        # From here on time counts: a tracker may have waited for its network.
        self.progress = Progress(first, self.total, self.per_epoch, self.say)
        self.speed = self.logged = _Speed(at=time.monotonic())
        self.begin = self.speed.at

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.speaks:
            self.progress.close()
            self._each(lambda tracker: tracker.close(kind is None))

    def say(self, line: str) -> None:
        """Tell a person something, above the bar if there is one."""
        with tqdm.external_write_mode():
            self._say(line)

    def wants_iou(self, done: int) -> bool:
        """Whether a step's IoU will be written or shown, so that it is worth waiting for."""
        return self.speaks and (self._ends_line(done) or self.progress.due(done))

    def step(self, done: int, loss: float, iou: float | None, lr: float, images: int) -> None:
        """A step has ended.

        Args:
            done: how many there were so far.
            loss: its loss.
            iou: the batch's mIoU in percent, where it was wanted.
            lr: its learning rate.
            images: that it trained on, in all processes.

        Raises DcrisError where the log cannot be written.
        """
        if not self.speaks:
            return
        self.speed = self.speed.after(images)
        if self._ends_line(done):
            line = {"loss": loss, "iou": iou, "lr": lr, "seconds": round(time.monotonic() - self.begin, 2)}
            line["images_per_second"] = round(self.speed.since(self.logged), 2)
            self._write(done, line | _memory(self.device))
            self.logged = self.speed
        self.progress.advance(done, loss, iou, lr, self.speed)

    def validated(self, done: int, scores: Mapping[str, float], answers: Callable[[], Iterable[EvalResult]]) -> None:
        """The validation split was scored.

        Args:
            done: steps so far.
            scores: by name, in percent.
            answers: gives some of its answers, with masks, for pictures; asked only where somebody shows them.

        Raises DcrisError where the log cannot be written.
        """
        if not self.speaks or done in self.log.validated:  # known from before the run was broken off
            return
        self._write(done, {f"{_VALIDATION}{name}": score for name, score in scores.items()})
        self.progress.validated(done, scores)
        if self.trackers and self.pictures:
            try:
                panels = [_panel(answer) for answer in answers()]
            except Exception as error:  # no reason to end a run
                self.pictures = False
                self.say(f"predictions are not shown from here on, training goes on: {_reason(error)}")
            else:
                self._each(lambda tracker: tracker.show(done, panels))
        self.speed = self.speed.resumed()

    def _ends_line(self, done: int) -> bool:
        return done % self.log_every == 0 or done == self.total

    def _write(self, done: int, scores: Mapping[str, Any]) -> None:
        epoch = done / self.per_epoch
        self.log.add({"step": done, "epoch": epoch, **scores})
        curves = {"epoch": epoch}
        for name, score in scores.items():
            if name != "seconds":  # the trackers' own axis
                curves[name.replace("_", "/", 1) if name.startswith(_VALIDATION) else f"train/{name}"] = score
        self._each(lambda tracker: tracker.add(done, curves))

    def _each(self, act: Callable[["Tracker"], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a library, a network or a disk may raise
                del self.trackers[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self.say(f"{name} is left out from here on, training goes on: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The first line of what an error says, or else its kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True, slots=True)
class _Speed:
    """Images trained on, and the seconds that took; those of validation do not count."""

    images: int = 0
    seconds: float = 0.0
    at: float = 0.0

    def after(self, images: int) -> "_Speed":
        """After a step on so many images."""
        now = time.monotonic()
        return _Speed(self.images + images, self.seconds + now - self.at, now)

    def resumed(self) -> "_Speed":
        """After something that was not training."""
        return _Speed(self.images, self.seconds, time.monotonic())

    def since(self, before: "_Speed") -> float:
        """Images a second."""
        return (self.images - before.images) / max(self.seconds - before.seconds, 1e-9)


def _memory(device: torch.device) -> dict[str, float]:
    """The most memory in use so far, in millions of bytes: of the GPU, or of this process. Nothing where nobody knows it."""
    try:
        most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory("VmHWM")
    except ImportError:  # on Windows
        return {}
    return {"peak_memory_mb": round(most / 1e6, 1)}


# ---- the log -------------------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl: a line of JSON every so many steps. On resuming, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = [item for item in _lines(path) if item[1]["step"] <= step] if step and path.exists() else []
        self.validated = {line["step"] for _, line in lines if any(name.startswith(_VALIDATION) for name in line)}
        write_file(path, b"".join(text + b"\n" for text, _ in lines))
        sync_directory(path.parent)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line, for good: a checkpoint must not outlive the lines before it.

        Raises DcrisError where the disk is full.
        """
        try:
            with self.path.open("a", encoding="ascii") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free some space there and --resume"
            ) from error


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. Raises DcrisError where it cannot be read."""
    return [line for _, line in _lines(run / "log.jsonl")]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a log, as they are and read; what is no line of numbers (the last may be cut short) is left out."""
    try:
        texts = read_bytes(path, MAX_TEXT).splitlines()
    except OSError as error:
        raise DcrisError(f"cannot read {path}: {error.strerror or error}; move it away to go on without it") from error
    for text in texts:
        try:
            line = parse_json(text.decode())
        except ValueError:
            continue
        known = isinstance(line, dict) and type(line.get("step")) is int
        if known and all(type(value) in (int, float) and abs(value) < 1e300 for value in line.values()):
            yield text, line


# ---- for a person --------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, first: int, total: int, per_epoch: int, say: Callable[[str], None]) -> None:
        self.first, self.total, self.per_epoch, self.say = first, total, per_epoch, say
        self.every = max(1, math.ceil(total / _LINES))
        self.terminal = is_terminal()
        self.bar = tqdm(
            total=total,
            initial=first,
            disable=not self.terminal,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.begin, self.refreshed = time.monotonic(), -math.inf
        self.iou, self.rate, self.shown = 0.0, 0.0, _Speed()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def due(self, done: int) -> bool:
        """Whether new figures are to be shown with this step: on a terminal now and then, in a log with each line."""
        if self.terminal:
            return time.monotonic() - self.refreshed >= _REFRESH
        return done % self.every == 0 or done == self.total

    def advance(self, done: int, loss: float, iou: float | None, lr: float, speed: _Speed) -> None:
        """Show that so many steps are done. `iou` is in percent, and needed where new figures are due."""
        if iou is not None and self.due(done):
            self.iou, self.rate, self.shown = iou, speed.since(self.shown), speed
            self.refreshed = time.monotonic()
        epoch = f"epoch {self._epoch(done)}/{self._epoch(self.total)}"
        figures = f"loss {loss:.3f} IoU {self.iou:.1f} lr {lr:.1e} {self.rate:,.{self.rate < 10:d}f} images/s"
        if self.terminal:
            self.bar.set_description_str(epoch, refresh=False)
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(1)  # last, as it draws
        elif self.due(done):
            a_step = (time.monotonic() - self.begin) / (done - self.first)
            left = tqdm.format_interval(a_step * (self.total - done))
            self.say(f"step {done}/{self.total} {epoch} {figures} {left} left")

    def validated(self, done: int, scores: Mapping[str, float]) -> None:
        """Say how the validation split was scored."""
        shown = " ".join(f"{label} {scores[name]:.1f}" for name, label in _SHOWN.items() if name in scores)
        self.say(f"validation (first sentences) after epoch {self._epoch(done)}/{self._epoch(self.total)} {shown}")

    def _epoch(self, done: int) -> int:
        return math.ceil(done / self.per_epoch)


# ---- for those who asked for it ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """A validation phrase: the photograph, the truth and the prediction side by side."""

    phrase: str
    caption: str
    picture: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    drawn: bool
    """Whether it is of a small drawn scene rather than of a photograph."""


class Tracker(Protocol):
    """What shows a run's curves and pictures. Anything here may raise anything: Monitor leaves out what does."""

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        """Take the values of some curves after so many steps."""

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        """Take the pictures after so many steps; the same phrases each time."""

    def close(self, finished: bool) -> None:
        """Let go, of a run that is finished or else was broken off."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise DcrisError where a tracker was asked for and its package is not installed."""
    for name in names:
        try:
            # A folder of that name, such as W&B leaves where it ran, can be imported too; it has no version.
            importlib.import_module(name).__version__  # noqa: B018
        except (ImportError, AttributeError) as error:
            raise DcrisError(
                f'the tracker {name} is not installed here; run: pip install "{_PACKAGES[name]}"'
            ) from error


def panel_queries(queries: Queries) -> Queries:
    """The few whose pictures are shown: on different photographs, and spread evenly over the split."""
    apart = list({query[0].image_path: query for query in reversed(queries)}.values())[::-1]
    count = min(PANELS, len(apart))
    return [apart[number * len(apart) // count] for number in range(count)]


def _panel(answer: EvalResult) -> Panel:
    reference = answer.reference
    image = cell(read_image(reference.image_path), PANEL_CELL)
    truth = mask_cell(decode_mask(reference.segmentation, reference.image_size).astype(bool), PANEL_CELL)
    prediction = mask_cell(answer.mask(), PANEL_CELL)
    gap = np.full((len(image), _GAP, 3), 255, np.uint8)
    pictures = [image, gap, overlay(image, truth, TRUTH_COLOUR), gap, overlay(image, prediction, PREDICTION_COLOUR)]
    phrase = answer.expression.text
    return Panel(
        phrase,
        f"{phrase}: photograph, truth, prediction with IoU {100 * answer.overlap.iou:.1f}",
        np.concatenate(pictures, axis=1),
        max(reference.image_size) <= PNG_UP_TO,
    )


class _TensorBoard:
    """RUN/tensorboard: a file of events for each time that the run was started.

    Records are written here and now: torch's SummaryWriter does it in a thread, where a full disk is a traceback on the
    terminal that the run learns of later.
    """

    def __init__(self, out: Path, config: RunConfig, first: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        folder = make_directory(out / "tensorboard")
        # Readers take the files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020}.{socket.gethostname()}.{os.getpid()}"
        self.file = (folder / name).open("xb")
        self.records = RecordWriter(self.file)
        self._write(self.event(file_version="brain.Event:2"))
        # Of what was written before, points from this step on are of a run that was broken off: readers drop them.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self.event(step=first + 1, session_log=start))
        self.file.flush()

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in curves.items()]
        self._write(self.event(step=step, summary=self.summary(value=values)))
        self.file.flush()

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        for number, panel in enumerate(panels, 1):
            height, width = panel.picture.shape[:2]
            data = png_bytes(panel.picture) if panel.drawn else jpeg_bytes(panel.picture)
            value = self.summary.Value(
                tag=f"panels/{number} {panel.phrase.replace('/', ' ')}",
                image=self.summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data),
            )
            self._write(self.event(step=step, summary=self.summary(value=[value])))
        self.file.flush()

    def close(self, finished: bool) -> None:
        self.file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())


class _WeightsAndBiases:
    """A run of Weights & Biases, sent or, with WANDB_MODE=offline, kept in RUN/wandb; RUN/wandb.json says which run it is.

    What is sent is the configuration, the curves, the panels, and what W&B notes of a machine; neither code nor output.
    """

    def __init__(self, out: Path, config: RunConfig, first: int) -> None:
        import wandb

        record = out / "wandb.json"
        known = first > 0 and record.exists()
        run_id = _read_id(record) if known else uuid.uuid4().hex
        write_json(record, {"id": run_id})
        self.wandb = wandb
        self.run = wandb.init(
            # Arguments count for more than the environment, which is to have its way where somebody filled it.
            project=os.environ.get("WANDB_PROJECT") or "dcris",
            name=os.environ.get("WANDB_NAME") or out.resolve().name,
            id=run_id,
            resume="allow" if known else None,
            dir=out,
            config=config.model_dump(mode="json"),
            allow_val_change=True,  # of a run that goes on longer, say
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                init_timeout=_PATIENCE,
                finish_timeout=_PATIENCE,
            ),
        )
        # A run that was broken off takes its last steps again. They are there already, and W&B only goes forwards.
        self.begin = self.run.starting_step

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        if step >= self.begin:
            self.run.log(dict(curves), step=step)

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        if step >= self.begin:
            pictures = {
                f"panels/{number}": self.wandb.Image(panel.picture, caption=panel.caption)
                for number, panel in enumerate(panels, 1)
            }
            self.run.log(pictures, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def _read_id(record: Path) -> str:
    value = read_json(record, "the record of the run at W&B")
    if not (isinstance(value, dict) and isinstance(value.get("id"), str)):
        raise DcrisError(f"{record} does not say which run at W&B this is; move it away to start another there")
    return str(value["id"])


_TRACKERS: Mapping[str, Callable[[Path, RunConfig, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}
