"""Label Studio's run lengths of brush masks.

The format is thi.ng/rle-pack of the RGBA values of all pixels, row by row. Header: number of values
(32 bits), bits per value - 1 (5 bits), the four run widths - 1 (4 bits each). Each run: a bit, the
index of its width (2 bits), its length - 1 (in that width); if the bit is 1, one value for all of
the run, otherwise a value for each. The last byte is padded with zeros.

Not with `label_studio_sdk`: it needs 29 further packages, older versions of numpy and OpenCV among
them, and its decoder takes any memory that a file claims.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.table import shown
from dcris.errors import DcrisError
from dcris.types import MaskArray

_SIZES = np.array([3, 4, 8, 16])
"""Bit widths of run lengths; each run has the index of its width."""

_MAX_RUN = 1 << 16

_VALUE_BITS = 8


def encode_brush(mask: MaskArray) -> list[int]:
    """Encode a mask [H, W] bool as Label Studio's `rle`, a list of bytes.

    The values are 255 inside the mask and 0 outside.
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
    widths = 3 + _SIZES[which] + _VALUE_BITS
    codes = (((4 + which) << _SIZES[which] | (counts - 1)) << _VALUE_BITS) | values
    head = [(4 * flat.size, 32), (_VALUE_BITS - 1, 5), *((int(size) - 1, 4) for size in _SIZES)]
    bits = [(value >> np.arange(width)[::-1]) & 1 for value, width in head]
    return np.packbits(np.concatenate([*bits, _bits(codes, widths)]).astype(np.uint8)).tolist()


def _bits(codes: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Concatenate numbers as bits, highest bit first, each in its own width."""
    ends = np.cumsum(widths)
    place = (
        np.repeat(ends, widths) - 1 - np.arange(int(ends[-1]))
    )  # position of each bit in its number, from the lowest
    return ((np.repeat(codes, widths) >> place) & 1).astype(np.uint8)


def decode_brush(rle: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode Label Studio's `rle` to a mask [H, W] uint8 of 0 and 1: the pixels that are not fully
    transparent.

    Raises DcrisError if it is not a list of bytes, is cut short, or is not for an image of `size`.
    """
    try:
        bits = _BitReader(bytes(rle) if type(rle) is list else b"")
    except (TypeError, ValueError):
        raise DcrisError(f"the 'rle' is not a list of bytes: {shown(rle)}") from None
    height, width = size
    count, value_bits = bits.read(32), bits.read(5) + 1
    if count != 4 * height * width or value_bits != _VALUE_BITS:
        raise DcrisError(
            f"the 'rle' has {count:,} values of {value_bits} bits, but an image of {height} x {width} pixels (height x width) "
            f"has {4 * height * width:,} of {_VALUE_BITS}"
        )
    widths = [bits.read(4) + 1 for _ in range(4)]
    alpha = np.zeros(height * width, np.uint8)
    start = 0
    while start < count:
        same = bits.read(1)
        end = start + 1 + bits.read(widths[bits.read(2)])
        if end > count:
            raise DcrisError("the 'rle' has more values than the image")
        if same:
            if bits.read(_VALUE_BITS):
                alpha[start // 4 : end // 4] = 1  # the last of a pixel's four values decides
        else:
            for place in range(start, end):
                value = bits.read(_VALUE_BITS)
                if place % 4 == 3 and value:
                    alpha[place // 4] = 1
        start = end
    return alpha.reshape(size)


class _BitReader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def read(self, width: int) -> int:
        """Return the next bits as a number. Raises DcrisError at the end of the data."""
        first, self.place = self.place, self.place + width
        part = self.data[first // 8 : -(-self.place // 8)]
        if 8 * len(self.data) < self.place:
            raise DcrisError("the 'rle' is cut short")
        return int.from_bytes(part) >> (-self.place % 8) & ((1 << width) - 1)
