"""Convert predictions to Label Studio's pre-annotations: brush strokes to start annotating from.

Not with `label_studio_sdk`: it needs 29 further packages, older versions of numpy and OpenCV among
them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from dcris.types import MaskArray

_SIZES = np.array([3, 4, 8, 16])
"""Bit widths of run lengths; each run has the index of its width."""

_MAX_RUN = 1 << 16

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, even as character references: most control characters."""


def brush_rle(mask: MaskArray) -> list[int]:
    """Encode a mask [H, W] bool as Label Studio's `rle`, a list of bytes.

    The format is thi.ng/rle-pack of the RGBA values, which are 255 inside the mask. Header: number
    of values (32 bits), bits per value - 1 (5 bits), the four run widths - 1 (4 bits each). Each
    run: the bit 1, the index of its width (2 bits), its length - 1 (in that width), and the value
    (8 bits). The last byte is padded with zeros.
    """
    flat = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    lengths = np.diff(np.append(starts, flat.size)) * 4
    values = flat[starts].astype(np.int64) * 255
    # Split runs that are longer than 16 bits can count.
    pieces = -(-lengths // _MAX_RUN)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    counts = np.full(int(pieces.sum()), _MAX_RUN)
    counts[last] = lengths - (pieces - 1) * _MAX_RUN
    which = np.searchsorted(1 << _SIZES, counts)
    widths = 3 + _SIZES[which] + 8
    codes = (((4 + which) << _SIZES[which] | (counts - 1)) << 8) | values
    head = [(4 * flat.size, 32), (7, 5), *((int(size) - 1, 4) for size in _SIZES)]
    bits = [(value >> np.arange(width)[::-1]) & 1 for value, width in head]
    return np.packbits(np.concatenate([*bits, _bits(codes, widths)]).astype(np.uint8)).tolist()


def _bits(codes: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Concatenate numbers as bits, highest bit first, each in its own width."""
    ends = np.cumsum(widths)
    place = (
        np.repeat(ends, widths) - 1 - np.arange(int(ends[-1]))
    )  # position of each bit in its number, from the lowest
    return ((np.repeat(codes, widths) >> place) & 1).astype(np.uint8)


def label_studio_task(
    image: str, size: tuple[int, int], results: Iterable[tuple[str, float, MaskArray]], model: str
) -> dict[str, Any]:
    """Create one task with its pre-annotations.

    Args:
        image: URL of the image for Label Studio.
        size: H and W of the image, upright.
        results: phrase, score and mask of each; empty masks are omitted, because they have no
            stroke.
        model: the `model_version` of the prediction.
    """
    height, width = size
    strokes: list[Mapping[str, Any]] = []
    for number, (phrase, score, mask) in enumerate(results):
        if not mask.any():
            continue
        strokes.append(
            {
                "id": hashlib.sha256(f"{image}\0{number}\0{phrase}".encode()).hexdigest()[:10],
                "type": "brushlabels",
                "from_name": "tag",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": score,
                "value": {"format": "rle", "rle": brush_rle(mask), "brushlabels": [_label(phrase)]},
            }
        )
    scores = [stroke["score"] for stroke in strokes]
    mean = round(sum(scores) / len(scores), 6) if scores else 0.0
    prediction = {"model_version": model, "score": mean, "result": strokes}
    return {"data": {"image": image}, "predictions": [prediction]}


def label_studio_config(phrases: Sequence[str]) -> str:
    """Create the labelling interface: the semantic segmentation template with phrases as labels."""
    names = dict.fromkeys(_label(phrase) for phrase in phrases)
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
    )


def _label(phrase: str) -> str:
    """Return the label of a phrase for tasks and interface.

    Characters forbidden in XML become Python escapes (`\\x1b`).
    """
    return _NOT_IN_XML.sub(lambda match: ascii(match[0])[1:-1], phrase)
