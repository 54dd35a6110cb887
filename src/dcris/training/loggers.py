"""Progress of a training run: lines or a bar for a person, the log, and TensorBoard or Weights &
Biases on request.

The log is the run's record: a run whose log cannot be written ends. A tracker that fails is
reported once and left out. Trackers are imported only on request, and nothing here draws a random
number, so trackers do not change the trained weights.
"""

import importlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dcris.config import RunConfig
from dcris.data.dataset import Queries
from dcris.data.images import fit_image, read_image
from dcris.data.masks import true_mask
from dcris.errors import DcrisError, first_line
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
from dcris.utils.files import make_directory, read_json, read_json_lines, sync_directory, write_file, write_json
from dcris.utils.streams import is_terminal

LOG = "log.jsonl"

PANELS = 6
"""Number of validation queries whose predictions the trackers show."""

PANEL_CELL = 320
"""Longer side in pixels of each of the three images in a panel."""

_GAP = 8  # pixels between them
_PACKAGES = {"tensorboard": "tensorboard>=2.20", "wandb": "wandb>=0.31"}
_VALIDATION = "val_first_"
"""Prefix of validation scores in the log: validation in training uses only the first expression of
each reference."""

_LINES = 20
"""Progress lines of a run without a terminal."""

_SHOWN = {"miou": "mIoU", "oiou": "oIoU", "prec@0.5": "prec@0.5"}
"""Validation scores that are printed, and their labels."""

_REFRESH = 1.0
"""Seconds between updates of the numbers beside the bar."""

_WANDB_TIMEOUT = 30
"""Seconds that W&B may take to start, and to send its remaining data at the end."""


class Monitor:
    """Reports the progress of a run. A context: leaving it closes the bar and the trackers.

    Args:
        out: the run's directory.
        config: of the run.
        first: steps done before this start of the run.
        total: steps of the whole run.
        per_epoch: steps in an epoch.
        device: to train on; its memory is reported.
        log: receives lines of progress.
        enabled: False on all ranks but the first: then nothing is printed, written or sent.

    Raises:
        DcrisError: the log cannot be written.
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        first: int,
        total: int,
        per_epoch: int,
        device: torch.device,
        log: Callable[[str], None] = print,
        enabled: bool = True,
    ) -> None:
        self.total, self.per_epoch, self.device, self.enabled = total, per_epoch, device, enabled
        self.log_every, self._log = config.train.log_every, log
        if not enabled:
            return
        self.file = LogFile(out / LOG, first)
        self.trackers: dict[str, Tracker] = {}
        self.show_panels = True
        for name in dict.fromkeys(config.train.trackers):
            try:
                self.trackers[name] = _TRACKERS[name](out, config, first)
            except Exception as error:  # anything that a library, a network or a disk can raise
                self._report_failure(name, error)
        # After the trackers, which may have waited for a network.
        self.progress = Progress(first, total, per_epoch, self.log)
        self.speed = self.logged_speed = _Speed(at=time.monotonic())
        self.begin = self.speed.at

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.enabled:
            self.progress.close()
            self._for_each_tracker(lambda tracker: tracker.close(kind is None))

    def log(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        with tqdm.external_write_mode():
            self._log(line)

    def wants_iou(self, done: int) -> bool:
        """Return whether the IoU of a step will be used; computing it makes the CPU wait for the
        GPU."""
        return self.enabled and (self._is_logged(done) or self.progress.due(done))

    def step(
        self,
        done: int,
        losses: Mapping[str, float],
        iou: float | None,
        lr: float,
        images: int,
        further: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Report a finished step.

        Args:
            done: steps so far.
            losses: "loss", and the terms that were added to equation 6, by name.
            iou: mIoU of the batch in percent, if it was wanted.
            lr: the learning rate.
            images: number of images in the batch, over all ranks.
            further: values that are logged as they are.

        Raises:
            DcrisError: the log cannot be written.
        """
        if not self.enabled:
            return
        self.speed = self.speed.after(images)
        if self._is_logged(done):
            line: dict[str, float | None] = {
                name if name == "loss" else f"loss_{name}": value
                for name, value in losses.items()
                if math.isfinite(value)  # JSON has no others; a step of float16 may have some, and is skipped
            }
            line |= {**further, "iou": iou, "lr": lr, "seconds": round(time.monotonic() - self.begin, 2)}
            line["images_per_second"] = round(self.speed.since(self.logged_speed), 2)
            self._write(done, line | peak_memory(self.device))
            self.logged_speed = self.speed
        self.progress.advance(done, losses["loss"], iou, lr, self.speed)

    def validated(self, done: int, scores: Mapping[str, float], results: Callable[[], Iterable[EvalResult]]) -> None:
        """Report a validation.

        Args:
            done: steps so far.
            scores: by name, in percent.
            results: returns a few results with masks for the panels; called only if a tracker shows
                them.

        Raises:
            DcrisError: the log cannot be written.
        """
        if not self.enabled or done in self.file.validated:  # logged before the run was stopped
            return
        self._write(done, {f"{_VALIDATION}{name}": score for name, score in scores.items()})
        self.progress.validated(done, scores)
        if self.trackers and self.show_panels:
            try:
                panels = [make_panel(result) for result in results()]
            except Exception as error:  # panels are not worth ending a run for
                self.show_panels = False
                self.log(f"training continues without images of predictions: {first_line(error)}")
            else:
                self._for_each_tracker(lambda tracker: tracker.show(done, panels))
        self.speed = self.speed.resumed()

    def _is_logged(self, done: int) -> bool:
        return done % self.log_every == 0 or done == self.total

    def _write(self, done: int, values: Mapping[str, Any]) -> None:
        epoch = done / self.per_epoch
        self.file.add({"step": done, "epoch": epoch, **values})
        curves = {"epoch": epoch}
        for name, value in values.items():
            if name != "seconds":  # trackers have a time axis of their own
                curves[name.replace("_", "/", 1) if name.startswith(_VALIDATION) else f"train/{name}"] = value
        self._for_each_tracker(lambda tracker: tracker.add(done, curves))

    def _for_each_tracker(self, call: Callable[["Tracker"], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # anything that a library, a network or a disk can raise
                del self.trackers[name]
                self._report_failure(name, error)

    def _report_failure(self, tracker: str, error: Exception) -> None:
        self.log(f"training continues without {tracker}: {first_line(error)}")


@dataclass(frozen=True, slots=True)
class _Speed:
    """Counts images that were trained on, and the seconds this took, without validation."""

    images: int = 0
    seconds: float = 0.0
    at: float = 0.0

    def after(self, images: int) -> "_Speed":
        """Return the counts after a step on so many images."""
        now = time.monotonic()
        return _Speed(self.images + images, self.seconds + now - self.at, now)

    def resumed(self) -> "_Speed":
        """Return the counts after a time in which nothing was trained."""
        return _Speed(self.images, self.seconds, time.monotonic())

    def since(self, before: "_Speed") -> float:
        """Return the images per second since an earlier count."""
        return (self.images - before.images) / max(self.seconds - before.seconds, 1e-9)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return {"peak_memory_mb": ...} (10^6 bytes) of the GPU, or else of the process; {} if
    unknown."""
    try:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory("VmHWM")
    except ImportError:  # on Windows
        return {}
    return {"peak_memory_mb": round(peak / 1e6, 1)}


# ---- the log -----------------------------------------------------------------------------------


class LogFile:
    """Writes log.jsonl, one JSON object a line.

    On resuming, lines after the checkpoint's step are dropped.

    Args:
        path: the file.
        step: of the checkpoint; 0 starts a new file.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = [line for line in _read_lines(path) if line["step"] <= step] if step and path.exists() else []
        self.validated = {line["step"] for line in lines if any(name.startswith(_VALIDATION) for name in line)}
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
        sync_directory(path.parent)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line and sync it to disk: a checkpoint must not survive a crash that loses the
        lines before it.

        Raises:
            DcrisError: the file cannot be written, for example because the disk is full.
        """
        try:
            with self.path.open("a", encoding="ascii") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free disk space, then --resume"
            ) from error


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log. Raises DcrisError if it cannot be read."""
    return _read_lines(run / LOG)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that are objects of numbers; the last line may be incomplete."""

    def is_valid(line: Any) -> bool:
        return (
            isinstance(line, dict)
            and type(line.get("step")) is int
            and all(type(value) in (int, float) and abs(value) < 1e300 for value in line.values())
        )

    return [line for _, line in read_json_lines(path, on_error=lambda error: None) if is_valid(line)]


# ---- progress for a person ---------------------------------------------------------------------


class Progress:
    """Shows progress: a bar on a terminal, about 20 lines elsewhere.

    Args:
        first: steps done before.
        total: steps of the whole run.
        per_epoch: steps in an epoch.
        log: receives the lines.
    """

    def __init__(self, first: int, total: int, per_epoch: int, log: Callable[[str], None]) -> None:
        self.first, self.total, self.per_epoch, self.log = first, total, per_epoch, log
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
        """Return whether this step updates the numbers: about once a second on a terminal, else
        each line."""
        if self.terminal:
            return time.monotonic() - self.refreshed >= _REFRESH
        return done % self.every == 0 or done == self.total

    def advance(self, done: int, loss: float, iou: float | None, lr: float, speed: _Speed) -> None:
        """Show a finished step. `iou` is in percent, and needed if the step is due."""
        if iou is not None and self.due(done):
            self.iou, self.rate, self.shown = iou, speed.since(self.shown), speed
            self.refreshed = time.monotonic()
        epoch = f"epoch {self._epoch(done)}/{self._epoch(self.total)}"
        numbers = f"loss {loss:.3f} IoU {self.iou:.1f} lr {lr:.1e} {self.rate:,.{self.rate < 10:d}f} images/s"
        if self.terminal:
            self.bar.set_description_str(epoch, refresh=False)
            self.bar.set_postfix_str(numbers, refresh=False)
            self.bar.update(1)  # last, because it draws
        elif self.due(done):
            seconds_per_step = (time.monotonic() - self.begin) / (done - self.first)
            left = tqdm.format_interval(seconds_per_step * (self.total - done))
            self.log(f"step {done}/{self.total} {epoch} {numbers} {left} left")

    def validated(self, done: int, scores: Mapping[str, float]) -> None:
        """Print the scores of a validation."""
        shown = " ".join(f"{label} {scores[name]:.1f}" for name, label in _SHOWN.items() if name in scores)
        self.log(f"validation (first sentences) after epoch {self._epoch(done)}/{self._epoch(self.total)} {shown}")

    def _epoch(self, done: int) -> int:
        return math.ceil(done / self.per_epoch)


# ---- trackers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """A validation query: image, true mask and predicted mask side by side."""

    phrase: str
    caption: str
    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    drawn: bool
    """Whether the image is a small drawn scene and not a photograph."""


class Tracker(Protocol):
    """Shows a run's curves and panels.

    Methods may raise anything; Monitor then leaves the tracker out.
    """

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        """Record the values of curves after `step` steps."""

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        """Record panels after `step` steps; they are of the same queries each time."""

    def close(self, finished: bool) -> None:
        """Close a run that is finished or, if not `finished`, was stopped."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise DcrisError if the package of a tracker is not installed."""
    for name in names:
        try:
            # W&B leaves a folder `wandb` where it ran, which can be imported too, but has no
            # version.
            importlib.import_module(name).__version__  # noqa: B018
        except (ImportError, AttributeError) as error:
            raise DcrisError(f'the tracker {name} is not installed; run: pip install "{_PACKAGES[name]}"') from error


def panel_queries(queries: Queries) -> Queries:
    """Return up to PANELS queries, of different images and spread evenly over the split."""
    by_image = list({query[0].image_path: query for query in reversed(queries)}.values())[::-1]
    count = min(PANELS, len(by_image))
    return [by_image[number * len(by_image) // count] for number in range(count)]


def make_panel(result: EvalResult) -> Panel:
    """Return the panel of a result that has its mask."""
    reference = result.reference
    image = cell(fit_image(read_image(reference.image_path), reference), PANEL_CELL)
    truth = mask_cell(true_mask(reference, result.expression).mask, PANEL_CELL)
    prediction = mask_cell(result.mask(), PANEL_CELL)
    gap = np.full((len(image), _GAP, 3), 255, np.uint8)
    cells = [
        image,
        gap,
        overlay(image, truth, TRUTH_COLOUR),
        gap,
        overlay(image, prediction, PREDICTION_COLOUR),
    ]
    phrase = result.expression.text
    return Panel(
        phrase,
        f"{phrase}: image, truth, prediction with IoU {100 * result.overlap.iou:.1f}",
        np.concatenate(cells, axis=1),
        max(reference.image_size) <= PNG_UP_TO,
    )


class TensorBoard:
    """Writes RUN/tensorboard: one file of events for each start of the run.

    Records are written at once. torch's SummaryWriter writes in a thread, where a full disk prints
    a traceback that the run cannot prevent. It also stores panels only as PNG, 1.7 times as large
    as JPEG for photographs.
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
        # Makes readers drop the points of earlier files from this step on: the steps after the
        # checkpoint are repeated.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self.event(step=first + 1, session_log=start))
        self.file.flush()

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        """Write one value of each curve."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in curves.items()]
        self._write(self.event(step=step, summary=self.summary(value=values)))
        self.file.flush()

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        """Write the panels, scenes as PNG and photographs as JPEG."""
        for number, panel in enumerate(panels, 1):
            height, width = panel.pixels.shape[:2]
            data = png_bytes(panel.pixels) if panel.drawn else jpeg_bytes(panel.pixels)
            value = self.summary.Value(
                tag=f"panels/{number} {panel.phrase.replace('/', ' ')}",
                image=self.summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data),
            )
            self._write(self.event(step=step, summary=self.summary(value=[value])))
        self.file.flush()

    def close(self, finished: bool) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())


class WeightsAndBiases:
    """Logs to a run of Weights & Biases: sent, or kept in RUN/wandb with WANDB_MODE=offline.

    RUN/wandb.json holds its id.

    Sends the configuration, the curves, the panels and W&B's own measurements of the machine;
    neither code nor output.
    """

    def __init__(self, out: Path, config: RunConfig, first: int) -> None:
        import wandb

        record = out / "wandb.json"
        known = first > 0 and record.exists()
        run_id = _read_id(record) if known else uuid.uuid4().hex
        write_json(record, {"id": run_id})
        self.wandb = wandb
        self.run = wandb.init(
            # Arguments override the environment, so the variables have to be read here.
            project=os.environ.get("WANDB_PROJECT") or "dcris",
            name=os.environ.get("WANDB_NAME") or out.resolve().name,
            id=run_id,
            resume="allow" if known else None,
            dir=out,
            config=config.model_dump(mode="json"),
            allow_val_change=True,  # a resumed run may have more steps
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                init_timeout=_WANDB_TIMEOUT,
                finish_timeout=_WANDB_TIMEOUT,
            ),
        )
        # Steps after the checkpoint are repeated, but W&B has them already and takes no earlier
        # step again.
        self.begin = self.run.starting_step

    def add(self, step: int, curves: Mapping[str, float]) -> None:
        """Send one value of each curve."""
        if step >= self.begin:
            self.run.log(dict(curves), step=step)

    def show(self, step: int, panels: Sequence[Panel]) -> None:
        """Send the panels."""
        if step >= self.begin:
            images = {
                f"panels/{number}": self.wandb.Image(panel.pixels, caption=panel.caption)
                for number, panel in enumerate(panels, 1)
            }
            self.run.log(images, step=step)

    def close(self, finished: bool) -> None:
        """Send what is left, and mark the run as finished or failed."""
        self.run.finish(exit_code=0 if finished else 1)


def _read_id(record: Path) -> str:
    value = read_json(record, "the id of the W&B run")
    if not (isinstance(value, dict) and isinstance(value.get("id"), str)):
        raise DcrisError(f"{record} has no id of a W&B run; delete it to start a new run there")
    return str(value["id"])


_TRACKERS: Mapping[str, Callable[[Path, RunConfig, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
