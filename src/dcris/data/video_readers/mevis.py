"""MeViS: SPLIT/meta_expressions.json, SPLIT/JPEGImages/VIDEO/FRAME.jpg and, in train and valid_u,
SPLIT/mask_dict.json.

An expression has `anno_id`, a list of the masks that it describes, whose union is the target.
mask_dict.json has a list by `anno_id`, with COCO's run lengths or null for each frame, in order.
Source: tools/eval_mevis.py and lmpm/data/datasets/mevis.py of MeViS.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dcris.data.images import refuse_shape
from dcris.data.masks import decode_mask
from dcris.data.table import MAX_OBJECTS, OnError, bad, field, located, shown, skip_errors
from dcris.data.video_readers.meta import META, each_video, home_of, identifier, read_videos
from dcris.data.videos import VideoExpression, VideoSet
from dcris.types import MaskArray
from dcris.utils.files import read_json

_DATASET = "mevis"
_SPLITS = ("train", "valid_u", "valid")
_WITH_TRUTH = ("train", "valid_u")


def find(root: Path) -> Sequence[str]:
    """Return the splits that have a file of expressions."""
    home = home_of(root, _DATASET, f"*/{META}")
    return [] if home is None else [split for split in _SPLITS if (home / split / META).is_file()]


def load(root: Path, split: str, on_error: OnError | None = None) -> VideoSet:
    """Read a split; see VideoReader.load. The masks are read with the first truth."""
    home = home_of(root, _DATASET, f"*/{META}")
    assert home is not None
    path = home / split / META
    expressions: list[VideoExpression] = []
    for name, frames, records in each_video(path, read_videos(path), on_error):
        for key, record in records.items():
            with skip_errors(on_error):
                where = f"expression {key} of video {shown(name)}"
                targets = _targets(record, path, where) if split in _WITH_TRUTH else ()
                expressions.append(VideoExpression(name, key, record["exp"], frames, targets))
    truths = RunLengths(home / split / "mask_dict.json") if split in _WITH_TRUTH else None
    return VideoSet(_DATASET, split, home / split / "JPEGImages", tuple(expressions), truths)


def _targets(record: dict[str, Any], path: Path, where: str) -> tuple[str, ...]:
    """Return the identifiers of the masks of an expression."""
    found = field(record, "anno_id", list, path, where)
    if not 1 <= len(found) <= MAX_OBJECTS:
        raise bad(path, f"{where} has {len(found):,} 'anno_id'; 1 to {MAX_OBJECTS:,} are possible")
    return tuple(identifier(each, path, where, "anno_id") for each in found)


class RunLengths:
    """Truths in a mask_dict.json, which is read when it is first needed; see Truths."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def masks(self) -> dict[str, Any]:
        """The lists of run lengths by `anno_id`. Raises DcrisError if there is no such file."""
        masks = read_json(self.path, "the file of masks")
        if type(masks) is not dict:
            raise bad(self.path, "it is not an object with a list of masks by 'anno_id'")
        return masks

    def size(self, expression: VideoExpression) -> tuple[int, int] | None:
        """Return height and width of the first mask that is not empty."""
        for each in self._lists(expression):
            for number, runs in enumerate(each):
                if runs is not None:
                    return self._size(runs, self._where(expression, number))
        return None

    def mask(self, expression: VideoExpression, number: int, size: tuple[int, int]) -> MaskArray | None:
        """Return the union [H, W] of the masks of a frame; None if there is none."""
        union: MaskArray | None = None
        for each in self._lists(expression):
            if each[number] is None:
                continue
            with located(self.path, f"{self._where(expression, number)} cannot be decoded"):
                mask = decode_mask(each[number], size).astype(np.bool_)
            union = mask if union is None else union | mask
        return union

    def longest(self, expression: VideoExpression) -> int:
        """Return the greatest number of frames for which an expression has masks."""
        return max(map(len, self._lists(expression)))

    def _lists(self, expression: VideoExpression) -> list[list[Any]]:
        lists: list[list[Any]] = []
        for target in expression.objects:
            where = f"the masks {target} of video {shown(expression.video)}"
            each = field(self.masks, target, list, self.path, where)
            if len(each) < len(expression.frames):
                raise bad(self.path, f"{where} are {len(each):,}, but the video has {len(expression.frames):,} frames")
            lists.append(each)
        return lists

    def _size(self, runs: Any, where: str) -> tuple[int, int]:
        size = field(runs, "size", list, self.path, where)
        if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
            raise bad(self.path, f"{where} has a 'size' that is not a height and a width: {shown(size)}")
        with located(self.path, f"{where} is too large"):
            refuse_shape(*size)
        return size[0], size[1]

    @staticmethod
    def _where(expression: VideoExpression, number: int) -> str:
        return f"a mask of frame {expression.frames[number]} of video {shown(expression.video)}"
