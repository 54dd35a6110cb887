"""Text on images.

English text is set in the font that comes with Pillow, so that pictures are the same on every
machine. Other letters need a font of the system; a letter that it lacks is drawn as a box.
"""

import string
from bisect import bisect_right
from contextlib import suppress
from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
OPEN_QUOTE, CLOSE_QUOTE = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
_PILLOW_LETTERS = {*string.printable, ELLIPSIS, OPEN_QUOTE, CLOSE_QUOTE}
_SYSTEM_FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")  # of Linux, macOS and Windows


def line_height(size: int) -> int:
    """Return the distance of lines in pixels for a font size in pixels."""
    return round(1.3 * size)


def wrap(words: str, size: int, width: float, most: int) -> list[str]:
    """Break text into at most `most` lines of `width` pixels, cut with an ellipsis."""
    visible = "".join(letter if letter.isprintable() else " " for letter in words[:1000])
    font = find_font(visible, size)
    lines: list[str] = []
    for word in visible.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [line if font.getlength(line) <= width else _shorten(line, font, width) for line in lines]


def _shorten(line: str, font: Font, width: float) -> str:
    ends = range(1, len(line))
    fits = bisect_right(ends, width, key=lambda end: font.getlength(line[:end] + ELLIPSIS))
    return line[:fits] + ELLIPSIS


def find_font(words: str, size: int) -> Font:
    """Return a font of a size in pixels that has the letters of a text, if there is one."""
    return _load_font(size, own=set(words) <= _PILLOW_LETTERS)


@cache
def _load_font(size: int, own: bool) -> Font:
    for name in () if own else _SYSTEM_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
