"""Decode masks as COCO or an image file stores them, and encode them as COCO's run lengths.

Run lengths are decoded here in NumPy, polygons by pycocotools. pycocotools is C code that trusts
its input: a run-length string with too large a claim, or a polygon with far corners, makes it write
outside its memory or allocate without bound. So everything is validated before it gets there.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from dcris.data.images import MAX_PIXELS, image_size, read_mask_image
from dcris.data.table import shown
from dcris.errors import DcrisError
from dcris.types import Expression, MaskArray, PixelPolygons, Reference, Segmentation, SoftMask, Truth

_MAX_OUTLINE = 10_000_000
"""Pixels of all outlines of a mask; pycocotools needs about 80 bytes for each."""

_MAX_NUMBER_LENGTH = 7
"""Characters of one compressed run length, 5 bits each: 35 bits, more than any mask needs, safe in
int64."""

_BAND = 1 << 22
"""Pixels that are encoded at once."""


def decode_mask(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode polygons, run lengths or an image file to a mask [H, W] uint8 of 0 and 1.

    Args:
        segmentation: several polygons are united.
        size: height and width of the image in pixels.

    Raises:
        DcrisError: the segmentation is malformed or has another size, or the image file cannot be
            read or has more than two values (see `read_mask_image`).
    """
    height, width = size
    _require_decodable(size)
    if isinstance(segmentation, Path | SoftMask):
        return _read_file(segmentation, size)
    if isinstance(segmentation, PixelPolygons):
        return _draw_pixels(segmentation, size)
    runs = _decode_runs(segmentation, size)
    values = (np.arange(len(runs)) % 2).astype(np.uint8)  # runs alternate between 0 and 1, column by column
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def union_mask(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode the union of several objects to a mask [H, W] uint8 of 0 and 1; without objects all 0.

    Raises DcrisError as `decode_mask` does.
    """
    if not segmentations:
        _require_decodable(size)
        return np.zeros(size, np.uint8)
    mask = decode_mask(segmentations[0], size)
    for segmentation in segmentations[1:]:
        mask |= decode_mask(segmentation, size)
    return mask


def summed_mask(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> MaskArray:
    """Decode the union of several objects to a mask [H, W] bool, as code that adds the masks of an
    object's polygons and compares with 1: pixels in two polygons of one object are background. So
    they are where a mask image of CRIS records them.

    Raises DcrisError as `decode_mask` does.
    """
    _require_decodable(size)
    mask = np.zeros(size, bool)
    for segmentation in segmentations:
        if isinstance(segmentation, Path):
            mask |= _read_file(segmentation, size, once=True).astype(bool)
            continue
        parts = [[polygon] for polygon in segmentation] if isinstance(segmentation, list) else [segmentation]
        covered = np.zeros(size, np.uint8)
        for part in parts:
            covered += decode_mask(part, size)
        mask |= covered == 1
    return mask


def true_mask(
    reference: Reference,
    expression: Expression,
    rasterise: Callable[[Sequence[Segmentation], tuple[int, int]], NDArray[np.uint8] | MaskArray] = union_mask,
) -> Truth:
    """Return the true mask of one of a reference's expressions, and the pixels without a truth.

    Args:
        reference: the objects.
        expression: one of its expressions.
        rasterise: returns the union of objects as 0 and 1, on the pixels that are wanted.

    Raises:
        DcrisError: as `decode_mask`.
    """
    size = reference.image_size
    mask = rasterise(reference.targets(expression), size).astype(bool)
    if reference.ignored is None:
        return Truth(mask)
    ignored = rasterise((reference.ignored,), size).astype(bool)
    return Truth(mask & ~ignored, ignored)


def union_area(segmentations: Sequence[Segmentation], size: tuple[int, int]) -> int:
    """Return the area of the union of several objects in pixels.

    Raises DcrisError as `decode_mask` does.
    """
    if len(segmentations) == 1:
        return mask_area(segmentations[0], size)
    return int(np.count_nonzero(union_mask(segmentations, size)))


def mask_area(segmentation: Segmentation, size: tuple[int, int]) -> int:
    """Return the object's area in pixels, without decoding the mask where it is not an image file.

    Raises DcrisError as `decode_mask` does.
    """
    _require_decodable(size)
    if isinstance(segmentation, Path | SoftMask):
        return int(np.count_nonzero(_read_file(segmentation, size)))
    if isinstance(segmentation, PixelPolygons):
        return int(np.count_nonzero(_draw_pixels(segmentation, size)))
    return int(_decode_runs(segmentation, size)[1::2].sum())


def encode_mask(mask: NDArray[Any]) -> dict[str, Any]:
    """Encode a mask [H, W], nonzero for the object, as COCO's compressed run lengths.

    Returns:
        {"size": [H, W], "counts": str}, ready for JSON.

    Raises:
        ValueError: the mask does not have two dimensions.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask must be [H, W], but this one has the shape {mask.shape}")
    height, width = mask.shape
    size, runs = [height, width], _column_runs(mask)
    # Both give the same. `coco.encode` takes 6 bytes per pixel (0.6 GB for a camera's image), lists
    # take 40 bytes per run.
    if 7 * len(runs) > mask.size:
        encoded = coco.encode(np.asfortranarray(mask != 0, np.uint8))
    else:
        encoded = coco.frPyObjects({"size": size, "counts": runs.tolist()}, height, width)
    return {"size": size, "counts": encoded["counts"].decode("ascii")}


def _column_runs(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Return the lengths of the runs of background and object in turn, column by column."""
    height, width = mask.shape
    changes, inside = [np.zeros(1, np.int64)], np.False_
    columns = max(1, _BAND // max(1, height))
    for left in range(0, width if height else 0, columns):
        band = (mask[:, left : left + columns] != 0).ravel(order="F")
        before = np.concatenate(([inside], band[:-1]))
        changes.append(np.flatnonzero(band != before) + left * height)
        inside = band[-1]
    ends = np.concatenate([*changes, [height * width]])
    return np.diff(ends)


def mask_box(mask: NDArray[Any]) -> tuple[int, int, int, int] | None:
    """Return the bounding box of a mask [H, W] as x, y, width, height; None for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def validate_segmentation(segmentation: Any, size: tuple[int, int]) -> Segmentation:
    """Return a segmentation unchanged if it can be decoded for an image of `size` (H, W).

    Raises DcrisError with the problem if it cannot. Of an image file only the header is read.
    """
    _require_decodable(size)
    if isinstance(segmentation, Path | SoftMask):
        _validate_file(segmentation, size)
    elif isinstance(segmentation, PixelPolygons):
        require_polygons([polygon.ravel().tolist() for polygon in segmentation.polygons], size, fewest=2)
    elif isinstance(segmentation, list):
        require_polygons(segmentation, size)
    else:
        _read_runs(segmentation, size)
    return segmentation


def only_mask(segmentation: Any) -> Any:
    """Return the run lengths in a list of one, as RRSIS-D stores them; else the argument."""
    if type(segmentation) is list and len(segmentation) == 1 and type(segmentation[0]) is dict:
        return segmentation[0]
    return segmentation


def _require_decodable(size: tuple[int, int]) -> None:
    height, width = size
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise DcrisError(
            f"a mask of {height} x {width} pixels cannot be decoded; it must have 1 to {MAX_PIXELS:,} pixels"
        )


def _validate_file(segmentation: Path | SoftMask, size: tuple[int, int]) -> None:
    path = segmentation.path if isinstance(segmentation, SoftMask) else segmentation
    found = image_size(path)
    if found != size:
        raise DcrisError(
            f"the mask {path} is {found[0]} x {found[1]} pixels (height x width), but its image is {size[0]} x {size[1]}; "
            "create it again from that image"
        )


def _read_file(segmentation: Path | SoftMask, size: tuple[int, int], *, once: bool = False) -> NDArray[np.uint8]:
    _validate_file(segmentation, size)
    if isinstance(segmentation, SoftMask):
        return read_mask_image(segmentation.path, segmentation.threshold)
    return read_mask_image(segmentation, once=once)


def _draw_pixels(segmentation: PixelPolygons, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw polygons of pixels as Pillow does, outline and inside; they must have been validated."""
    mask = Image.new("L", size[::-1], 0)
    for polygon in segmentation.polygons:
        ImageDraw.Draw(mask).polygon(polygon.ravel().tolist(), outline=1, fill=1)
    return np.array(mask)


def _decode_runs(segmentation: Any, size: tuple[int, int]) -> NDArray[np.int64]:
    """Validate polygons or run lengths and return the run lengths [runs] int64 of their union."""
    if isinstance(segmentation, list):
        require_polygons(segmentation, size)
        segmentation = coco.merge(coco.frPyObjects(segmentation, *size))
    return _read_runs(segmentation, size)


def require_polygons(polygons: list[Any], size: tuple[int, int], fewest: int = 3) -> None:
    """Raise DcrisError unless polygons can be drawn. Each needs the `fewest` corners."""
    if not polygons:
        raise DcrisError("the segmentation is empty")
    outline = sum(_outline_length(polygon, number, size, fewest) for number, polygon in enumerate(polygons, 1))
    if outline > _MAX_OUTLINE:
        raise DcrisError(f"the outline of the polygons has {outline:,.0f} pixels; the limit is {_MAX_OUTLINE:,}")


def _outline_length(polygon: Any, number: int, size: tuple[int, int], fewest: int) -> float:
    """Validate one polygon and return the length of its outline in pixels."""
    if type(polygon) is not list or len(polygon) < 2 * fewest or len(polygon) % 2:
        raise DcrisError(f"polygon {number} is not a list of x, y pairs with at least {fewest} corners")
    longest = max(size)
    # A corner may lie outside the image by up to the longer side. NaN fails the comparison, too.
    for value in polygon:
        if not (type(value) in (int, float) and -longest <= value <= 2 * longest):
            raise DcrisError(
                f"polygon {number} has a corner that is not a number or lies far outside the image: {shown(value)}"
            )
    corners = np.array(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum())


def _read_runs(segmentation: Any, size: tuple[int, int]) -> NDArray[np.int64]:
    """Validate COCO's run lengths, which add up to H * W, and return them, [runs] int64."""
    try:
        recorded, counts = segmentation["size"], segmentation["counts"]
    except (TypeError, KeyError, IndexError):
        raise DcrisError("the segmentation is neither polygons nor run lengths with 'size' and 'counts'") from None
    if type(recorded) not in (list, tuple) or tuple(recorded) != tuple(size):
        raise DcrisError(f"the run lengths are not for an image of {size[0]} x {size[1]} pixels (height x width)")
    if isinstance(counts, str | bytes):
        runs = _uncompress(counts)
    elif type(counts) is list and all(type(count) is int and 0 <= count <= MAX_PIXELS for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise DcrisError("the 'counts' of the run lengths are neither text nor a list of non-negative integers")
    if (runs < 0).any() or runs.sum() != math.prod(size):
        raise DcrisError("the run lengths do not add up to the pixels of the image; the text may be cut short")
    return runs


def _uncompress(text: str | bytes) -> NDArray[np.int64]:
    """Decode COCO's compressed run lengths.

    Each character from '0' on holds 5 bits of a number, least significant first, and a sixth bit
    that is set if the number continues. The highest bit of a number's last character is its sign.
    From the fourth number on, each number is the difference from the run two places before.
    Source: rleFrString in cocoapi, common/maskApi.c.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        data = b"\xff"  # outside the code, so it is refused below
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise DcrisError("the text of the run lengths is empty, cut short or not COCO's encoding")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _MAX_NUMBER_LENGTH:
        raise DcrisError("the text of the run lengths contains a number that is too large")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
