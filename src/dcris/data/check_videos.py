"""`dcris data check` for data sets of videos: frames, truths and sizes, and each layout's traps."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dcris.data.check_report import Report
from dcris.data.images import image_size, read_image
from dcris.data.registry import VIDEO_SETS
from dcris.data.table import shown
from dcris.data.video_readers.load import load_videos, video_splits
from dcris.data.video_readers.mevis import RunLengths
from dcris.data.videos import UNKNOWN, LabelImages, Truths, VideoExpression, VideoSet, shape_of
from dcris.errors import DcrisError
from dcris.types import MaskArray
from dcris.utils.streams import counted
from dcris.utils.workers import cores


@dataclass(kw_only=True)
class VideoReport(Report):
    """Result of a check of a data set of videos."""

    frames: int = 0
    """Number of frames of all videos."""

    units = "videos"

    @property
    def total(self) -> str:
        """Number of frames, in words."""
        return counted(self.frames, "frame")

    def details(self) -> dict[str, Any]:
        """Return the number of frames."""
        return {"frames": self.frames}


@dataclass
class _Found:
    """Findings about one video."""

    problems: list[str] = field(default_factory=list)
    unlisted: int = 0
    """Frames in its folder that its list does not name."""
    unnamed: int = 0
    """Objects in its labels that no expression describes."""


def check_videos(
    root: Path, dataset: str, deep: bool = False, progress: Callable[[int], None] | None = None
) -> VideoReport:
    """Check all splits of a data set of videos that are below `root`.

    A frame or mask that is missing, unreadable or of another size than the video, an expression
    whose object is in no frame, a list of frames that is not in order and a training video that is
    also in another split are problems. A number other than the official one, frames that no list
    names and objects without an expression are warnings.

    Args:
        root: folder of the data sets.
        dataset: name of a data set of videos.
        deep: decode every frame instead of reading only its header.
        progress: receives the number of videos checked so far.

    Raises:
        DcrisError: a file of expressions cannot be used at all, so nothing else can be checked.
    """
    report = VideoReport(dataset=dataset, official_splits=VIDEO_SETS[dataset].splits)
    sets = [load_videos(root, dataset, split, report.add_error) for split in video_splits(root, dataset)]
    readable = {each.split: _can_be_read(each, report) for each in sets}
    for each in sets:
        report.splits[each.split] = len(each.videos), len(each.expressions)
        report.frames += sum(len(some[0].frames) for some in each.videos.values())
        report.notes += [f"{each.split}: {note}" for note in each.notes]
    report.compare_sizes()
    _check_shared(sets, report)
    done = 0
    with ThreadPoolExecutor(cores()) as pool:
        for each in sets:
            unlisted, unnamed = Counter[str](), Counter[str]()
            check = partial(_check_video, each, deep=deep, masks=readable[each.split])
            for video, found in zip(each.videos, pool.map(check, each.videos), strict=True):
                for problem in found.problems:
                    report.add_problem(f"{each.split}: {problem}")
                unlisted[video], unnamed[video] = found.unlisted, found.unnamed
                done += 1
                if progress is not None:
                    progress(done)
            _warn(report, each.split, +unlisted, "frames that are not in its list of frames, and are not read")
            _warn(report, each.split, +unnamed, "objects without an expression; the official evaluation counts them")
    return report


def _can_be_read(videos: VideoSet, report: VideoReport) -> bool:
    """Return whether the split has a truth that can be looked up; of MeViS, its file is read here,
    once."""
    if isinstance(videos.truths, RunLengths):
        try:
            _ = videos.truths.masks
        except DcrisError as error:
            report.add_problem(str(error))
            return False
    return videos.truths is not None


def _warn(report: VideoReport, split: str, counts: Counter[str], what: str) -> None:
    """Warn of what several videos have, by an example."""
    if counts:
        name = next(iter(counts))
        report.warnings.append(
            f"{split}: {counted(len(counts), 'video')} with {what}; the first: {shown(name)}, {counts[name]:,} of them"
        )


def _check_shared(sets: list[VideoSet], report: VideoReport) -> None:
    """Report training videos that another split has, too."""
    training = next((each.videos for each in sets if each.split == "train"), {})
    for each in sets:
        shared = [name for name in each.videos if name in training] if each.split != "train" else []
        for name in shared:
            report.add_problem(f"the video {shown(name)} is in train and {each.split}, so training sees a test video")


def _check_video(videos: VideoSet, name: str, deep: bool, masks: bool) -> _Found:
    """Check the frames and, if wanted, the true masks of one video."""
    found, expressions = _Found(), videos.videos[name]
    size = _check_frames(videos, expressions[0], found, deep)
    try:
        if size is not None:
            shape_of(expressions[0], size)
        if masks and isinstance(videos.truths, LabelImages):
            _check_labels(videos.truths, expressions, size, found)
        elif masks and videos.truths is not None:
            for each in expressions:
                _check_masks(videos.truths, each, size, found)
    except DcrisError as error:
        found.problems.append(str(error))
    return found


def _check_frames(videos: VideoSet, expression: VideoExpression, found: _Found, deep: bool) -> tuple[int, int] | None:
    """Check the frames of a video, and return their size; None if no frame can be read."""
    where, frames = f"video {shown(expression.video)}", expression.frames
    if [*frames] != sorted(frames):
        found.problems.append(
            f"the frames of {where} are not in order, which codes disagree about; sort the list and the masks with it"
        )
    folder = videos.frame_folder / expression.video
    present = {path.stem for path in folder.glob("*.jpg")}
    missing = [frame for frame in frames if frame not in present]
    found.unlisted = len(present.difference(frames))
    if missing:
        found.problems.append(
            f"{len(missing):,} of {len(frames):,} frames of {where} are missing, the first {folder / missing[0]}.jpg; "
            "unpack them again"
        )
    size: tuple[int, int] | None = None
    for frame in frames:
        if frame not in present:
            continue
        path = videos.frame_path(expression.video, frame)
        try:
            of_frame = read_image(path).shape[:2] if deep else image_size(path)
        except DcrisError as error:
            found.problems.append(str(error))
            continue
        size = size or (of_frame[0], of_frame[1])
        if of_frame != size:
            found.problems.append(
                "{} is {} x {} pixels (height x width), but the video's first frame {} x {}; unpack it again".format(
                    path, *of_frame, *size
                )
            )
    return size


def _check_labels(
    truths: LabelImages, expressions: tuple[VideoExpression, ...], size: tuple[int, int] | None, found: _Found
) -> None:
    """Check that label images fit the frames, and have the objects of the expressions."""
    first = expressions[0]
    size = size or truths.size(first)
    present = np.zeros(UNKNOWN + 1, np.bool_)
    for number in range(len(first.frames)):
        present[truths.labels(first, number, size)] = True
    named = {target for each in expressions for target in each.objects}
    for target in sorted(named, key=int):
        if not present[int(target)]:
            found.problems.append(
                f"object {target} of video {shown(first.video)}, which an expression describes, is in no frame; remove its "
                "expressions"
            )
    found.unnamed = sum(str(value) not in named for value in np.flatnonzero(present[1:UNKNOWN]) + 1)


def _check_masks(truths: Truths, expression: VideoExpression, size: tuple[int, int] | None, found: _Found) -> None:
    """Check that the masks of an expression can be decoded, fit the frames, and are not all empty
    or too many."""
    frames, where = len(expression.frames), f"expression {expression.expression_id} of video {shown(expression.video)}"
    try:
        size = size or truths.size(expression)
        # Each mask is decoded, as any of them may be malformed.
        filled = (
            0 if size is None else sum(_is_filled(truths.mask(expression, number, size)) for number in range(frames))
        )
    except DcrisError as error:
        found.problems.append(str(error))
        return
    if not filled:
        found.problems.append(f"{where} describes nothing, as all its masks are empty; remove it")
    if isinstance(truths, RunLengths) and (longest := truths.longest(expression)) > frames:
        found.problems.append(f"{where} has masks for {longest:,} frames, but the video has {frames:,}")


def _is_filled(mask: MaskArray | None) -> bool:
    return mask is not None and bool(mask.any())
