"""Videos with referring expressions: Ref-YouTube-VOS, Ref-DAVIS17 and MeViS, read in the layouts of
their authors (dcris.data.video_readers) into one table.

A video is a folder of frames. An expression describes one object in all of its video's frames, in
MeViS also several.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import image_size, read_label_image
from dcris.data.masks import decode_mask
from dcris.data.table import shown
from dcris.errors import DcrisError
from dcris.types import MaskArray

UNKNOWN = 255
"""Label of pixels that have no truth in DAVIS."""

MAX_VIDEO_PIXELS = 2_000_000_000
"""Limit on the pixels of all frames of a video, each of which is a byte of its masks: a thousand
frames of 1920 x 1080 pixels."""


@dataclass(frozen=True, slots=True)
class VideoExpression:
    """An expression about a video: what one folder of predicted masks belongs to."""

    video: str
    """Name of the video, which is that of its folder."""
    expression_id: str
    """As the data set writes it: "0", "1", ...; unique in its video."""
    text: str
    frames: tuple[str, ...]
    """Names of the frames without their ending, in the order of the data set."""
    objects: tuple[str, ...] = ()
    """What it describes: the value in the label images, in MeViS identifiers of masks, or its own
    identifier where each expression has masks; empty where the truth is not public."""
    annotator: int | None = None
    """In Ref-DAVIS17, which of the four texts of an object it is: 0 and 1 by the first annotator,
    who saw the first frame and then the whole video; 2 and 3 by the second. Scores are means over
    the four."""


class Truths(Protocol):
    """The true masks of a split, in the form of its layout."""

    def size(self, expression: VideoExpression) -> tuple[int, int] | None:
        """Return height and width of the masks of an expression; None if it has no mask."""

    def mask(self, expression: VideoExpression, number: int, size: tuple[int, int]) -> MaskArray | None:
        """Return the mask [H, W] of a frame by its number, from 0; None if it is empty.

        Raises DcrisError if it is missing, malformed or not of `size`.
        """


@dataclass(frozen=True)
class VideoSet:
    """One split of a data set of videos."""

    dataset: str
    split: str
    frame_folder: Path
    """Folder with one folder of JPEG frames for each video."""
    expressions: tuple[VideoExpression, ...]
    """In the order of the files: the expressions of a video follow each other."""
    truths: Truths | None = None
    """None if the truth is not public."""
    notes: tuple[str, ...] = ()
    """What was left out, in sentences."""

    @cached_property
    def videos(self) -> dict[str, tuple[VideoExpression, ...]]:
        """The expressions of each video, in order."""
        found: dict[str, list[VideoExpression]] = {}
        for each in self.expressions:
            found.setdefault(each.video, []).append(each)
        return {name: tuple(some) for name, some in found.items()}

    def frame_path(self, video: str, frame: str) -> Path:
        """Return the path of a frame."""
        return self.frame_folder / video / f"{frame}.jpg"

    def truth(self, expression: VideoExpression) -> MaskArray | None:
        """Return the true masks of an expression, [T, H, W] bool in the order of its frames; None
        if they are not public.

        Only this expression's masks are in memory. A frame without the object has an empty mask.

        Raises:
            DcrisError: a mask is missing or cannot be read, the masks have different sizes, or they
                have more than MAX_VIDEO_PIXELS pixels.
        """
        if self.truths is None:
            return None
        size = self.truths.size(expression) or image_size(self.frame_path(expression.video, expression.frames[0]))
        masks = np.zeros(shape_of(expression, size), np.bool_)
        for number in range(len(masks)):
            mask = self.truths.mask(expression, number, size)
            if mask is not None:
                masks[number] = mask
        return masks

    def labels(self, video: str) -> NDArray[np.uint8] | None:
        """Return the labels of all objects of a video, [T, H, W] uint8: 0 is the background, and
        UNKNOWN has no truth. None if the truth is not public, and in MeViS, whose masks overlap.

        Raises DcrisError as `truth`.
        """
        if not isinstance(self.truths, LabelImages):
            return None
        expression = self.videos[video][0]
        size = self.truths.size(expression)
        labels = np.zeros(shape_of(expression, size), np.uint8)
        for number in range(len(labels)):
            labels[number] = self.truths.labels(expression, number, size)
        return labels


@dataclass(frozen=True, slots=True)
class LabelImages:
    """Truths as YouTube-VOS and DAVIS store them: VIDEO/FRAME.png, in which the value of a pixel is
    the number of its object."""

    folder: Path

    def path(self, expression: VideoExpression, number: int) -> Path:
        """Return the path of the labels of a frame by its number, from 0."""
        return self.folder / expression.video / f"{expression.frames[number]}.png"

    def size(self, expression: VideoExpression) -> tuple[int, int]:
        """Return height and width of the first frame's labels."""
        return image_size(self.path(expression, 0))

    def labels(self, expression: VideoExpression, number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the labels of a frame by its number, from 0, [H, W] uint8.

        Raises DcrisError if the file is missing, no label image, or not of `size`, which is found
        before it is decoded.
        """
        path = self.path(expression, number)
        found = image_size(path)
        if found != size:
            raise DcrisError(
                f"the labels {path} are {found[0]} x {found[1]} pixels (height x width), but those of the video's first "
                f"frame {size[0]} x {size[1]}; download them again"
            )
        return read_label_image(path)

    def mask(self, expression: VideoExpression, number: int, size: tuple[int, int]) -> MaskArray:
        """Return the mask [H, W] of the expression's object. Raises DcrisError as `labels`."""
        (target,) = expression.objects
        return np.equal(self.labels(expression, number, size), int(target))


@dataclass(frozen=True, slots=True)
class ExpressionImages:
    """Truths with an image of two values for each expression and frame, in
    VIDEO/EXPRESSION/FRAME.png."""

    folder: Path

    def path(self, expression: VideoExpression, number: int) -> Path:
        """Return the path of the mask of a frame by its number, from 0."""
        return self.folder / expression.video / expression.expression_id / f"{expression.frames[number]}.png"

    def size(self, expression: VideoExpression) -> tuple[int, int]:
        """Return height and width of the first frame's mask."""
        return image_size(self.path(expression, 0))

    def mask(self, expression: VideoExpression, number: int, size: tuple[int, int]) -> MaskArray:
        """Return the mask [H, W] of a frame. Raises DcrisError if it is missing, has more values or
        is not of `size`."""
        return decode_mask(self.path(expression, number), size).astype(np.bool_)


def shape_of(expression: VideoExpression, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape (T, H, W) of an expression's masks.

    Args:
        expression: of any video.
        size: height and width of its frames in pixels.

    Raises:
        DcrisError: they have more than MAX_VIDEO_PIXELS pixels.
    """
    shape = (len(expression.frames), *size)
    if math.prod(shape) > MAX_VIDEO_PIXELS:
        raise DcrisError(
            f"the {shape[0]:,} frames of video {shown(expression.video)} have {size[1]} x {size[0]} pixels each; the limit is "
            f"{MAX_VIDEO_PIXELS:,} pixels for all"
        )
    return shape
