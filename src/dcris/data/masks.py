"""Masks as COCO or a picture stores them, to arrays and back.

Run lengths are decoded here in numpy and polygons by pycocotools. pycocotools is C and trusts its input: a run-length string
that claims too much, or a polygon with far corners, makes it write or ask for memory where it should not. So nothing reaches it
that was not measured first.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from dcris.data.images import MAX_PIXELS, image_size, read_mask_image
from dcris.errors import DcrisError
from dcris.types import Segmentation, SoftMask

_LONGEST_OUTLINE = 10_000_000
"""Pixels; pycocotools keeps about 80 bytes for each."""

_LONGEST_NUMBER = 7
"""Characters of one compressed run length; 5 bits each, so 35 bits: more than any mask needs, and safe in int64."""


def decode_mask(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode polygons, run lengths or a picture to [H, W] uint8 of 0 and 1 for a photograph of `size` (H, W).

    Several polygons give their union. A picture is read from its file. Raises DcrisError where the segmentation is malformed
    or belongs to another size, and where a picture has more than two values (see `read_mask_image`).
    """
    height, width = size
    validate_segmentation(segmentation, size)
    if isinstance(segmentation, Path | SoftMask):
        return _read_picture(segmentation)
    runs = _runs(segmentation, size)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)  # runs of 0 and 1 in turn, down the columns
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def mask_area(segmentation: Segmentation, size: tuple[int, int]) -> int:
    """The object's pixels in what `decode_mask` would return, mostly without making it. Raises DcrisError as that does."""
    validate_segmentation(segmentation, size)
    if isinstance(segmentation, Path | SoftMask):
        return int(np.count_nonzero(_read_picture(segmentation)))
    return int(_runs(segmentation, size)[1::2].sum())


def _read_picture(picture: Path | SoftMask) -> NDArray[np.uint8]:
    if isinstance(picture, SoftMask):
        return read_mask_image(picture.path, picture.threshold)
    return read_mask_image(picture)


def _runs(segmentation: list[list[float]] | Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths [runs] int64 of validated polygons, which are united, or run lengths."""
    if isinstance(segmentation, list):
        segmentation = coco.merge(coco.frPyObjects(segmentation, *size))
    return _run_lengths(segmentation, size)


def encode_mask(mask: NDArray[Any]) -> dict[str, Any]:
    """Compress a mask [H, W], where what is not 0 is the object, to COCO's {"size": [H, W], "counts": str}, ready for JSON.

    Raises ValueError where the mask is not a matrix.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W], but this one is {mask.shape}")
    height, width = mask.shape
    return {
        "size": [height, width],
        "counts": coco.encode(np.asfortranarray(mask != 0, np.uint8))["counts"].decode("ascii"),
    }


def mask_box(mask: NDArray[Any]) -> tuple[int, int, int, int] | None:
    """The smallest box around a mask [H, W] as x, y, width, height in pixels; None where the mask is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def validate_segmentation(segmentation: Any, size: tuple[int, int]) -> Segmentation:
    """Return a segmentation of unknown origin unchanged when it can be decoded for a photograph of `size` (H, W).

    Raises DcrisError saying what is wrong with it.
    """
    height, width = size
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise DcrisError(f"a mask of {height} x {width} pixels cannot be decoded: 1 to {MAX_PIXELS:,} pixels can")
    if isinstance(segmentation, list):
        if not segmentation:
            raise DcrisError("the segmentation is empty")
        outline = sum(_outline_length(polygon, number, size) for number, polygon in enumerate(segmentation, 1))
        if outline > _LONGEST_OUTLINE:
            raise DcrisError(
                f"the polygons' outline is {outline:,.0f} pixels long; at most {_LONGEST_OUTLINE:,} can be decoded"
            )
        return segmentation
    if isinstance(segmentation, Path | SoftMask):
        path = segmentation.path if isinstance(segmentation, SoftMask) else segmentation
        found = image_size(path)
        if found != size:
            raise DcrisError(
                f"the mask {path} is {found[0]} x {found[1]} pixels (height x width), but its photograph {height} x {width}; "
                "make it anew from that photograph"
            )
        return segmentation
    _run_lengths(segmentation, size)
    return segmentation


def _outline_length(polygon: Any, number: int, size: tuple[int, int]) -> float:
    if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
        raise DcrisError(f"polygon {number} is not a list of an even count of at least 6 numbers")
    longest = max(size)
    # A corner may lie outside the photograph, but not by more than its longer side. NaN fails the comparison too.
    if not all(type(value) in (int, float) and -longest <= value <= 2 * longest for value in polygon):
        raise DcrisError(f"polygon {number} has a corner that is not a number, or lies far outside the photograph")
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum())


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> NDArray[np.int64]:
    """The run lengths of an RLE mask, [runs] int64, which add up to H * W."""
    try:
        recorded, counts = segmentation["size"], segmentation["counts"]
    except (TypeError, KeyError, IndexError):
        raise DcrisError(
            "the segmentation is neither a list of polygons nor run lengths with 'size' and 'counts'"
        ) from None
    if type(recorded) not in (list, tuple) or tuple(recorded) != tuple(size):
        raise DcrisError(f"the run lengths are not for a photograph of {size[0]} x {size[1]} pixels (height x width)")
    if isinstance(counts, str | bytes):
        runs = _uncompress(counts)
    elif type(counts) is list and all(type(count) is int and 0 <= count <= MAX_PIXELS for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise DcrisError("the run lengths' 'counts' are neither text nor a list of whole numbers from 0 on")
    if (runs < 0).any() or runs.sum() != math.prod(size):
        raise DcrisError("the run lengths do not add up to the photograph's pixels; the text may be cut short")
    return runs


def _uncompress(text: str | bytes) -> NDArray[np.int64]:
    """COCO's run-length text: 5 bits a character from '0' on, least first, a sixth bit where the number goes on.

    The highest bit of a number's last character is its sign. From the fourth number on, each is the difference to the run two
    before.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        data = b"\xff"  # refused below, as every character outside the code is
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise DcrisError("the run lengths' text is empty, cut short, or not COCO's code")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise DcrisError("the run lengths' text holds a number that is too large")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
