"""Pages of pictures and text, and PDF files of them in which text and outlines are vectors.

Coordinates are pixels from the top left.
"""

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from dcris.types import MaskArray
from dcris.utils.drawing import PNG_UP_TO, Colour, contour_width, contrasting, jpeg_bytes, png_bytes
from dcris.utils.lettering import find_font

_TINT = 0.45
"""Opacity of a mask, as in `overlay`."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with a mask on it, and where it is."""

    left: int
    top: int
    pixels: NDArray[np.uint8]
    """[H, W, 3] without the mask."""
    mask: MaskArray | None
    """[H, W] bool."""
    colour: Colour
    """Of the mask."""


@dataclass(frozen=True, slots=True)
class Line:
    """A centred line of text."""

    words: str
    size: int
    """Of the font."""
    middle: float
    top: float


@dataclass(frozen=True, slots=True)
class Page:
    """Pictures and text on a white page."""

    width: int
    height: int
    pictures: tuple[Picture, ...]
    lines: tuple[Line, ...]


def vector_pdf(page: Page, dots_per_inch: int) -> bytes:
    """Encode a page as PDF: images as JPEG (small ones exactly), masks as outlines filled with a
    tint, text in embedded fonts.

    An image that occurs several times is stored once. Equal pages give equal files.

    Raises:
        ImportError: reportlab is not installed.
    """
    from reportlab.lib.utils import ImageReader
    from reportlab.pdfgen.canvas import FILL_EVEN_ODD, Canvas

    file, scale = io.BytesIO(), 72 / dots_per_inch
    canvas = Canvas(file, (page.width * scale, page.height * scale), pageCompression=1, invariant=1)
    canvas.scale(scale, scale)
    images: dict[int, Any] = {}
    for each in page.pictures:
        height, width = each.pixels.shape[:2]
        if id(each.pixels) not in images:
            encode = png_bytes if max(height, width) <= PNG_UP_TO else jpeg_bytes
            images[id(each.pixels)] = ImageReader(io.BytesIO(encode(each.pixels)))
        bottom = page.height - each.top - height
        canvas.drawImage(images[id(each.pixels)], each.left, bottom, width, height)
        if each.mask is None or not each.mask.any():
            continue
        outlines, _ = cv2.findContours(each.mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        path = canvas.beginPath()
        for outline in outlines:
            # Corners are centres of pixels.
            corners = [(each.left + x + 0.5, page.height - each.top - y - 0.5) for x, y in outline[:, 0].tolist()]
            path.moveTo(*corners[0])
            for corner in corners[1:]:
                path.lineTo(*corner)
            path.close()
        line = contour_width(height, width)
        canvas.saveState()  # the opacity of the tint is that of later images, too
        canvas.setLineJoin(1)  # round: corners of a contour are sharp
        canvas.setFillColorRGB(*_shares(each.colour), alpha=_TINT)
        canvas.drawPath(path, stroke=0, fill=1, fillMode=FILL_EVEN_ODD)
        for colour, thickness in ((contrasting(each.colour), 2 * line), (each.colour, line)):
            canvas.setStrokeColorRGB(*_shares(colour))
            canvas.setLineWidth(thickness)
            canvas.drawPath(path, stroke=1, fill=0)
        canvas.restoreState()
    canvas.setFillColorRGB(0, 0, 0)
    for text in page.lines:
        font = find_font(text.words, text.size)
        canvas.setFont(_registered(font), text.size)
        ascent = font.getmetrics()[0] if isinstance(font, ImageFont.FreeTypeFont) else text.size
        # Without what cannot be encoded: a lone surrogate of a hostile file.
        words = text.words.encode("utf-8", "replace").decode()
        canvas.drawCentredString(text.middle, page.height - text.top - ascent, words)
    canvas.showPage()
    canvas.save()
    return file.getvalue()


def _shares(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = (value / 255 for value in colour)
    return red, green, blue


def _registered(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return reportlab's name of a font of Pillow, which the file will contain; Helvetica if it is
    not a TrueType font."""
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFError, TTFont

    if not isinstance(font, ImageFont.FreeTypeFont):
        return "Helvetica"
    name = f"dcris {'-'.join(part for part in font.getname() if part)}"
    if name not in pdfmetrics.getRegisteredFontNames():
        content = font.path if isinstance(font.path, str) and font.path else io.BytesIO(font.font_bytes)
        try:
            pdfmetrics.registerFont(TTFont(name, content))
        except TTFError:
            return "Helvetica"
    return name
