"""Frames of a data set of videos as references of images, to train on them.

A reference is what an expression describes, in one frame, with all expressions that describe it.
Frames without the object are left out: expressions describe the video, not each frame.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dcris.data.masks import encode_mask
from dcris.data.registry import OFFICIAL
from dcris.data.table import ReferenceTable
from dcris.data.video_readers.load import load_videos, video_splits
from dcris.data.video_readers.mevis import RunLengths
from dcris.data.videos import LabelImages, Truths, VideoExpression, VideoSet
from dcris.errors import DcrisError
from dcris.types import Expression, MaskArray, Reference
from dcris.utils.streams import counted
from dcris.utils.workers import cores

_Target = tuple[str, VideoExpression, dict[str, Any], tuple[int, int]]
"""A frame, an expression, its mask as run lengths, and the size of the frame."""


def load_frames(root: Path, dataset: str, step: int, splits: Sequence[str]) -> ReferenceTable:
    """Read every `step`-th frame of each video, from the first, as an image with references.

    The label images of these frames are decoded, since only they say where objects are.

    Args:
        root: folder of the data sets.
        dataset: ref_youtube_vos, ref_davis17 or mevis.
        step: 1 for all frames in the data set's lists.
        splits: names of splits; those that are not there, or have no public truth, are left out.

    Raises:
        DcrisError: anything is missing, malformed or contradictory, or no split is left.
    """
    found = video_splits(root, dataset)
    sets = [load_videos(root, dataset, split) for split in found if split in splits]
    sets = [each for each in sets if each.truths is not None]
    if not sets:
        raise DcrisError(
            f"{dataset} in {root} has no split {' or '.join(map(repr, splits))} with a public truth; its splits are "
            f"{', '.join(found)}"
        )
    references: list[Reference] = []
    notes: list[str] = []
    numbers, sentences = count(1), count(1)
    for videos in sets:
        made = list(_references(videos, step, numbers, sentences))
        frames = len({each.image_path for each in made})
        notes.append(
            f"{videos.split}: one of {step:,} frames of {counted(len(videos.videos), 'video')}, "
            f"{counted(frames, 'image')} with a target; expressions have no reference in frames without theirs"
        )
        references += made
    return ReferenceTable(dataset, OFFICIAL, root, tuple(references), tuple(notes))


def _references(videos: VideoSet, step: int, numbers: Iterator[int], sentences: Iterator[int]) -> Iterator[Reference]:
    """Yield the references of a split; they and their expressions get the next numbers."""
    assert videos.truths is not None
    images: dict[Path, int] = {}
    if isinstance(videos.truths, RunLengths):
        _ = videos.truths.masks  # read once, not in each thread
    with ThreadPoolExecutor(cores()) as pool:
        targets = pool.map(partial(_targets, videos.truths, step=step), videos.videos.values())
        for some, of_video in zip(videos.videos.values(), targets, strict=True):
            for frame, target, mask, size in of_video:
                number, path = next(numbers), videos.frame_path(target.video, frame)
                yield Reference(
                    ref_id=number,
                    ann_ids=(number,),
                    image_id=images.setdefault(path, number),
                    image_path=path,
                    image_size=size,
                    category="object",
                    split=videos.split,
                    segmentations=(mask,),
                    expressions=tuple(
                        Expression(next(sentences), each.text) for each in some if each.objects == target.objects
                    ),
                )


def _targets(truths: Truths, expressions: Sequence[VideoExpression], step: int) -> list[_Target]:
    """Return what the expressions of a video describe, frame by frame, each once."""
    first: dict[tuple[str, ...], VideoExpression] = {}
    for each in expressions:
        first.setdefault(each.objects, each)
    distinct = [*first.values()]
    size = next((size for each in distinct if (size := truths.size(each)) is not None), None)
    if size is None:
        return []
    frames = expressions[0].frames
    return [
        (frames[number], each, encode_mask(mask), size)
        for number in range(0, len(frames), step)
        for each, mask in zip(distinct, _masks(truths, distinct, number, size), strict=True)
        if mask is not None and mask.any()
    ]


def _masks(
    truths: Truths, expressions: Sequence[VideoExpression], number: int, size: tuple[int, int]
) -> Iterator[MaskArray | None]:
    """Yield the masks [H, W] of a frame. A label image is decoded once for all."""
    if isinstance(truths, LabelImages):
        labels = truths.labels(expressions[0], number, size)
        yield from (np.equal(labels, int(each.objects[0])) for each in expressions)
    else:
        yield from (truths.mask(each, number, size) for each in expressions)
