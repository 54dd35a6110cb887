"""Predict a split of a data set of videos, and write the masks as its server or its evaluation
takes them.

    masks/                 PNG files in the official folders; see dcris.data.submissions
    submission.zip         all of them, where a server takes a zip file
    dcris-videos.json      the settings that they were predicted with

A video whose files are all there is not predicted again, so the same call continues after a kill.
"""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from dcris.data.submissions import SUBMISSIONS, Labels, palette
from dcris.data.videos import VideoExpression, VideoSet
from dcris.errors import DcrisError
from dcris.inference.batch import BatchOptions, failures, long_phrases, settings_of
from dcris.inference.prediction import Prediction
from dcris.inference.records import LOCK, Number, Settings
from dcris.inference.segmenter import FRAMES_AT_ONCE, Segmenter
from dcris.inference.smoothing import require_window
from dcris.utils.arguments import Refinement
from dcris.utils.distributed import Processes
from dcris.utils.drawing import png_bytes
from dcris.utils.files import (
    lock_folder,
    make_directory,
    read_text,
    remove_partial,
    require_replaceable,
    write_file,
)
from dcris.utils.overlap import Job, overlapped

_SETTINGS = "dcris-videos.json"
_MOST_SETTINGS = 1_000_000
_MASKS, _ZIP = "masks", "submission.zip"

_MOST_OVERLAPPED = 300_000_000
"""Bytes of the masks of a frame, with their probabilities, above which nothing is predicted while
its files are written: three frames would be in memory."""

_DATE = (1980, 1, 1, 0, 0, 0)
"""Of the members of a zip file, so that the same masks give the same file."""


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """How a data set of videos is predicted."""

    batch: int = FRAMES_AT_ONCE
    """Number of frames that are encoded at once."""
    smooth: int = 1
    """Odd number of frames over which probabilities are averaged; 1 leaves them as they are. See
    `Segmenter.predict_frames`."""
    threshold: float | None = None
    """This, the minima and the refinement as in BatchOptions."""
    min_score: float | None = None
    min_area: int = 0
    refine: Refinement | None = None
    overwrite: bool = False
    """Replace masks of other settings, and predict everything again."""


class VideoSettings(Settings):
    """Everything that the masks of a folder depend on."""

    dataset: str
    split: str
    expressions: str
    """SHA-256 of the expressions with their frames."""
    smooth: Number


@dataclass(frozen=True, slots=True)
class VideoDone:
    """A video whose masks are all on disk."""

    video: str
    expressions: int
    frames: int
    seconds: float


@dataclass(frozen=True, slots=True)
class VideoFailed:
    """A video whose frames could not be read."""

    video: str
    reason: str


@dataclass(frozen=True, slots=True)
class FrameDone:
    """A frame was predicted, for a display of progress."""


class VideoSetPredictor:
    """Predicts the videos that are not finished in the output folder.

    Several ranks share the videos if each creates the same VideoSetPredictor. No other call can
    write to the folder until `run` has ended.

    Args:
        segmenter: the model.
        videos: the split.
        out: output folder.
        options: how.
        group: the ranks that share the work and the folder.

    Raises:
        DcrisError: an option is out of range, the folder cannot be written, another process writes
            to it, or (without `overwrite`) it holds masks with other settings.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        videos: VideoSet,
        out: Path,
        options: VideoOptions | None = None,
        group: Processes | None = None,
    ) -> None:
        self.options, self.group = options or VideoOptions(), group or Processes()
        require_window(self.options.smooth)
        self.segmenter, self.videos, self.out = segmenter, videos, make_directory(out)
        self.form = SUBMISSIONS[videos.dataset]
        self.settings = self._settings()
        with ExitStack() as stack:
            if self.group.first:
                stack.enter_context(lock_folder(out, LOCK))
            left = self.group.from_first(self._prepare)
            self._lock = stack.pop_all()
        self.already = len(videos.videos) - len(left)
        """Number of videos that are finished."""
        self.left = left[self.group.rank :: self.group.count]
        """Names of this rank's share of the other videos."""
        texts = (each.text for name in left for each in videos.videos[name])
        self.notes = [*videos.notes, *long_phrases(segmenter.unread(texts, predicting=False))]

    def remaining(self) -> int:
        """Return the number of frames that this rank has to predict."""
        return sum(len(self.videos.videos[name][0].frames) for name in self.left)

    def run(self) -> Iterator[FrameDone | VideoDone | VideoFailed]:
        """Predict what is left; then, on the first rank, write the zip file.

        A video that cannot be read is skipped, and named at the end.

        Raises:
            DcrisError: at the end, if a video could not be read; there is no zip file then. At once
                if a file cannot be written.
        """
        failed: list[str] = []
        try:
            for name in self.left:
                begin = time.monotonic()
                try:
                    yield from self._predict(self.videos.videos[name])
                except _Unreadable as error:
                    failed.append(str(error))
                    yield VideoFailed(name, str(error))
                else:
                    some = self.videos.videos[name]
                    yield VideoDone(name, len(some), len(some[0].frames), time.monotonic() - begin)
            everywhere = [each for of_rank in self.group.all_gather(failed) for each in of_rank]
            if everywhere and self.group.first:
                raise DcrisError(failures(everywhere, len(self.videos.videos), "videos could not be predicted"))
            if not everywhere and self.group.first and self.form.zipped and not self.archive.is_file():
                write_file(self.archive, self._pack)
        finally:
            self._lock.close()

    @property
    def archive(self) -> Path:
        """Path of the zip file."""
        return self.out / _ZIP

    @property
    def masks(self) -> Path:
        """Folder of the masks."""
        return self.out / _MASKS

    # ---- before

    def _settings(self) -> VideoSettings:
        segmenter, videos = self.segmenter, self.videos
        model = segmenter.fingerprint
        options = self.options
        decision = BatchOptions(
            threshold=options.threshold, min_score=options.min_score, min_area=options.min_area, refine=options.refine
        )
        of_images = settings_of(model, segmenter.config, segmenter.dtype, decision)[False]
        content = [[e.video, e.expression_id, e.text, e.frames, e.annotator] for e in videos.expressions]
        return VideoSettings(
            **{**of_images.model_dump(), "formats": ()},
            dataset=videos.dataset,
            split=videos.split,
            expressions=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            smooth=options.smooth,
        )

    def _prepare(self) -> list[str]:
        """Return the names of the videos that are left, and remove what other settings made."""
        require_replaceable(self.archive)
        path = self.out / _SETTINGS
        if self.masks.is_dir() or path.is_file():
            differences = self._differences(path)
            if differences and not self.options.overwrite:
                raise DcrisError(
                    f"{self.out} holds masks made with {differences}; choose another --out, or add --overwrite to replace them"
                )
            if self.options.overwrite:
                self.archive.unlink(missing_ok=True)
                # Before the settings change. Files of other names are not ours.
                for file in self._files(self.videos.expressions):
                    (self.masks / file).unlink(missing_ok=True)
        write_file(path, self.settings.model_dump_json() + "\n")
        for folder in (self.out, *(path for path in self.masks.rglob("*") if path.is_dir())):
            remove_partial(folder)
        left = [name for name, some in self.videos.videos.items() if not self._is_done(some)]
        if left:
            self.archive.unlink(missing_ok=True)
        return left

    def _differences(self, path: Path) -> str:
        """Return what differs from the settings of the folder's masks; empty if nothing does."""
        try:
            before = VideoSettings.model_validate_json(read_text(path, _MOST_SETTINGS))
        except (OSError, ValidationError):
            return f"unknown settings, as {path.name} is missing or damaged"
        return before.differences(self.settings)

    def _is_done(self, expressions: Sequence[VideoExpression]) -> bool:
        return all((self.masks / file).is_file() for file in self._files(expressions))

    def _files(self, expressions: Sequence[VideoExpression]) -> list[str]:
        """Return the paths of the masks of expressions, each once."""
        return [*dict.fromkeys(self.form.file(each, frame) for each in expressions for frame in each.frames)]

    # ---- prediction

    def _predict(self, expressions: Sequence[VideoExpression]) -> Iterator[FrameDone]:
        """Predict and write the masks of a video, frame by frame."""
        options, settings = self.options, self.settings
        frames = expressions[0].frames
        found = self.segmenter.predict_frames(
            (self.videos.frame_path(expressions[0].video, frame) for frame in frames),
            [each.text for each in expressions],
            batch=options.batch,
            smooth=options.smooth,
            threshold=settings.threshold,
            min_score=settings.min_score,
            min_area=settings.min_area,
            refine=settings.refine,
            scores=self.form.joint,
            predicting=False,
        )
        pairs = zip(frames, _readable(found), strict=True)
        yield from overlapped(
            Job(made, partial(self._write, expressions, frame), alone=_bytes_of(made) > _MOST_OVERLAPPED)
            for frame, made in pairs
        )

    def _write(
        self, expressions: Sequence[VideoExpression], frame: str, predictions: Iterable[Prediction]
    ) -> FrameDone:
        """Write the files of a frame, while the next one is predicted."""
        for file, content in self._encoded(expressions, predictions, frame):
            write_file(self.masks / file, content)
        return FrameDone()

    def _encoded(
        self, expressions: Sequence[VideoExpression], predictions: Iterable[Prediction], frame: str
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the path and the content of each file of a frame."""
        if not self.form.joint:
            for each, prediction in zip(expressions, predictions, strict=True):
                yield self.form.file(each, frame), png_bytes(prediction.mask)
            return
        made: dict[str, Labels] = {}
        for each, prediction in zip(expressions, predictions, strict=True):
            (target,) = each.objects
            shape = prediction.mask.shape
            labels = made.setdefault(self.form.file(each, frame), Labels((shape[0], shape[1])))
            assert prediction.probabilities is not None
            labels.add(int(target), prediction.mask, prediction.probabilities)
        for file, labels in made.items():
            yield file, _indexed_png(labels.values)

    # ---- after

    def _pack(self, path: Path) -> None:
        """Write the zip file. PNG files are compressed already."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for expressions in self.videos.videos.values():
                for file in self._files(expressions):
                    member = zipfile.ZipInfo(file, _DATE)
                    member.external_attr = 0o644 << 16  # without it, unpacked files cannot be read
                    archive.writestr(member, (self.masks / file).read_bytes())


class _Unreadable(DcrisError):
    """A frame cannot be read; unlike an error in writing, it does not stop the other videos."""


def _readable(found: Iterator[list[Prediction]]) -> Iterator[list[Prediction]]:
    """Yield the predictions. Raises _Unreadable if a frame cannot be read or has another size."""
    while True:
        try:
            predictions = next(found)
        except StopIteration:
            return
        except DcrisError as error:
            raise _Unreadable(str(error)) from error
        yield predictions


def _bytes_of(predictions: Iterable[Prediction]) -> int:
    return sum(
        each.mask.nbytes + (0 if each.probabilities is None else each.probabilities.nbytes) for each in predictions
    )


def _indexed_png(labels: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(labels)
    image.putpalette(palette())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
