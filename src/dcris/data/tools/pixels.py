"""Masks that annotation tools store as images inside of text."""

import base64
import binascii
import io
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcris.data.images import read_mask_image
from dcris.data.table import shown
from dcris.data.tools.annotation import Size
from dcris.errors import DcrisError

_MAX_BYTES = 64_000_000
"""Limit on the bytes of an image inside of text. A mask compresses to far less."""


def png_mask(text: str, deflated: bool = False) -> NDArray[np.uint8]:
    """Decode a PNG in Base64 to a mask [H, W] uint8 of 0 and 1.

    Args:
        text: the Base64 text.
        deflated: whether the PNG may be compressed once more, by zlib, as Supervisely does.

    Raises:
        DcrisError: it is not such an image, or above the limits on images.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DcrisError(f"the text of the mask is not Base64 ({error}): {shown(text)}") from error
    if deflated and data[:4] != b"\x89PNG":
        try:
            inflated = zlib.decompressobj()
            data = inflated.decompress(data, _MAX_BYTES)
            if inflated.unconsumed_tail:
                raise DcrisError(f"the image in the text of the mask has more than {_MAX_BYTES:,} bytes")
        except zlib.error as error:
            raise DcrisError(f"the text of the mask is not compressed by zlib ({error}): {shown(text)}") from error
    if data[:4] != b"\x89PNG":
        raise DcrisError(f"the text of the mask is not a PNG image: {shown(text)}")
    return read_mask_image(data)


def png_text(mask: NDArray[np.uint8], box: tuple[int, int, int, int], deflated: bool = False) -> str:
    """Encode the part of a mask [H, W] of 0 and 1 in a box (left, top, width, height) as a PNG in
    Base64; `deflated` as in `png_mask`."""
    left, top, width, height = box
    stream = io.BytesIO()
    Image.fromarray(mask[top : top + height, left : left + width].astype(bool)).save(stream, "PNG")
    data = stream.getvalue()
    return base64.b64encode(zlib.compress(data) if deflated else data).decode("ascii")


def paste(mask: NDArray[np.uint8], corner: tuple[int, int], size: Size) -> NDArray[np.uint8]:
    """Return a mask of `size` with `mask` at `corner` (left, top); what lies outside is cut off."""
    (left, top), (height, width) = corner, size
    if not (abs(left) <= width and abs(top) <= height):
        raise DcrisError(f"the mask lies outside the image, at {left}, {top}")
    whole = np.zeros(size, np.uint8)
    part = mask[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    whole[max(0, top) :, max(0, left) :][: part.shape[0], : part.shape[1]] = part
    return whole
