"""Predictions as Label Studio imports them: masks to start annotating from, as strokes of its brush."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from dcris.types import MaskArray

_SIZES = np.array([3, 4, 8, 16])
"""Bits in which a run's length is written; each run says which of them it takes."""

_LONGEST = 1 << 16

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even as a character reference: most control characters."""


def brush_rle(mask: MaskArray) -> list[int]:
    """A mask [H, W] bool as Label Studio's `rle`: bytes, 0..255.

    The code is that of thi.ng/rle-pack over the pixels' red, green, blue and alpha, all 255 inside: how many values (32 bits),
    bits of a value less 1 (5), the four sizes less 1 (4 bits each); then for each run a 1, which size (2 bits), its length
    less 1 in that many bits, and the value (8 bits). The last byte is filled up with zeros.
    """
    flat = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    lengths = np.diff(np.append(starts, flat.size)) * 4
    values = flat[starts].astype(np.int64) * 255
    # A run that is longer than 16 bits can say becomes several.
    pieces = -(-lengths // _LONGEST)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    counts = np.full(int(pieces.sum()), _LONGEST)
    counts[last] = lengths - (pieces - 1) * _LONGEST
    which = np.searchsorted(1 << _SIZES, counts)
    widths = 3 + _SIZES[which] + 8
    codes = (((4 + which) << _SIZES[which] | (counts - 1)) << 8) | values
    head = [(4 * flat.size, 32), (7, 5), *((int(size) - 1, 4) for size in _SIZES)]
    bits = [(value >> np.arange(width)[::-1]) & 1 for value, width in head]
    return np.packbits(np.concatenate([*bits, _bits(codes, widths)]).astype(np.uint8)).tolist()


def _bits(codes: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Numbers in so many bits each, highest first, one after the other."""
    ends = np.cumsum(widths)
    place = np.repeat(ends, widths) - 1 - np.arange(int(ends[-1]))  # of each bit in its number, from the lowest
    return ((np.repeat(codes, widths) >> place) & 1).astype(np.uint8)


def label_studio_task(
    image: str, size: tuple[int, int], answers: Iterable[tuple[str, float, MaskArray]], model: str
) -> dict[str, Any]:
    """One task with its pre-annotations.

    Args:
        image: the address under which Label Studio finds the image.
        size: H and W of the image, as a browser shows it.
        answers: phrase, score and mask of each; empty masks are left out, as there is no such stroke.
        model: what the prediction's `model_version` says.
    """
    height, width = size
    strokes: list[Mapping[str, Any]] = []
    for number, (phrase, score, mask) in enumerate(answers):
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
    """The labelling interface to which the tasks belong: the semantic segmentation template, with the phrases as labels."""
    names = dict.fromkeys(_label(phrase) for phrase in phrases)
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n</View>\n'
    )


def _label(phrase: str) -> str:
    """The label for a phrase, the same in tasks and interface: as Python's escapes what XML cannot hold (`red\\x1bcup`)."""
    return _NOT_IN_XML.sub(lambda match: ascii(match[0])[1:-1], phrase)
