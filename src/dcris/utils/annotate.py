"""One picture of several masks, with a legend of their phrases."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dcris.types import MaskArray
from dcris.utils.drawing import COLOURS, Colour, cell, contrasting, draw_mask, mask_cell
from dcris.utils.lettering import find_font, line_height, wrap

_SMALLEST, _LARGEST = 480, 2048
"""Longer side of the picture in pixels. Small images are enlarged, so that the text has room."""

_TEXT = 0.026  # of the picture's longer side
_LINES = 2  # of a phrase
_GREY: Colour = (130, 130, 130)

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A mask and what is written about it."""

    phrase: str
    label: str
    """Such as "93%" or "not found"."""
    mask: MaskArray
    """[H, W] bool; the phrase of an empty one is grey."""


def annotate(image: NDArray[np.uint8], annotations: Sequence[Annotation]) -> NDArray[np.uint8]:
    """Draw masks on an image in different colours, and a legend with phrases and labels below it.

    Several masks have numbers, also in the legend, for people who see few colours: those that the
    names of their files have, from 0.

    Args:
        image: [H, W, 3] uint8.
        annotations: masks of the image's size.

    Returns:
        [h, w, 3] uint8. The image in it has at most 2048 pixels on its longer side; one of at most
        240 is enlarged by whole numbers to at most 480.
    """
    longer = max(image.shape[:2])
    size = min(longer, _LARGEST) if 2 * longer > _SMALLEST else _SMALLEST
    picture = cell(image, size)
    if size == longer:
        picture = picture.copy()
    masks = [mask_cell(each.mask, size) for each in annotations]
    for number in sorted(range(len(masks)), key=lambda number: -np.count_nonzero(masks[number])):
        draw_mask(picture, masks[number], colour_of(number))  # small ones last, or they would be covered
    text = max(13, round(_TEXT * max(picture.shape[:2])))
    if len(masks) > 1:
        picture = _add_numbers(picture, masks, text)
    return np.concatenate([picture, _legend(picture.shape[1], annotations, text)])


def colour_of(number: int) -> Colour:
    """Return the colour of a mask by its number from 0."""
    return COLOURS[number % len(COLOURS)]


def _add_numbers(picture: NDArray[np.uint8], masks: Sequence[MaskArray], text: int) -> NDArray[np.uint8]:
    """Write each mask's number into its middle, and where that is taken, beside it."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    placed: list[Box] = []
    for number, mask in enumerate(masks):
        if mask.any():
            box = _free_place(_middle(mask), _tag_size(number, text), placed, canvas.size)
            placed.append(box)
            _tag(draw, box, number, text, str(number))
    return np.asarray(canvas)


def _middle(mask: MaskArray) -> tuple[int, int]:
    """Return x and y of the pixel that is farthest from the mask's edge."""
    distance = cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return int(x), int(y)


def _tag_size(number: int, text: int) -> tuple[int, int]:
    width = find_font("0", text).getlength(str(number))
    return max(round(width + 0.6 * text), round(1.3 * text)), round(1.3 * text)


def _free_place(middle: tuple[int, int], size: tuple[int, int], placed: Sequence[Box], picture: tuple[int, int]) -> Box:
    """Return a box inside the picture near a point that covers no other box, if there is room."""

    def at(across: int, down: int) -> Box:
        left, top = (
            min(max(0, centre + step * (1.1 * length) - length / 2), most - length)
            for centre, step, length, most in zip(middle, (across, down), size, picture, strict=True)
        )
        return round(left), round(top), round(left) + size[0], round(top) + size[1]

    steps = sorted(
        ((x, y) for x in range(-4, 5) for y in range(-4, 5)), key=lambda step: (abs(step[0]) + abs(step[1]), step)
    )
    boxes = (at(*step) for step in steps)
    return next((box for box in boxes if not any(_overlap(box, other) for other in placed)), at(0, 0))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tag(draw: ImageDraw.ImageDraw, box: Box, number: int, text: int, written: str) -> None:
    """Draw a field of a number's colour with what is written on it."""
    colour = colour_of(number)
    ink = contrasting(colour)
    draw.rounded_rectangle((box[0], box[1], box[2] - 1, box[3] - 1), 0.3 * text, colour, ink, max(1, text // 12))
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.text(middle, written, ink, find_font("0", text), anchor="mm")


def _legend(width: int, annotations: Sequence[Annotation], text: int) -> NDArray[np.uint8]:
    """Draw a row for each phrase: its number on its colour, its words, its label."""
    gap = round(0.6 * text)
    column = max(_tag_size(number, text)[0] for number in range(len(annotations))) if annotations else 0
    left = 2 * gap + column
    rows = []
    for each in annotations:
        label = find_font(each.label, text).getlength(each.label)
        rows.append(wrap(each.phrase, text, max(text, width - left - 2 * gap - label), _LINES) or [""])
    height = sum(len(lines) * line_height(text) for lines in rows) + (len(rows) + 1) * gap // 2
    canvas = Image.new("RGB", (width, max(1, height)), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap // 2
    for number, (each, lines) in enumerate(zip(annotations, rows, strict=True)):
        found = bool(each.mask.any())
        if found:
            written = str(number) if len(annotations) > 1 else ""
            _tag(draw, (gap, top, gap + column, top + round(1.3 * text)), number, text, written)
        ink = (0, 0, 0) if found else _GREY
        baseline = top + round(1.3 * text / 2)
        for line in lines:
            draw.text((left, baseline), line, ink, find_font(line, text), anchor="lm")
            baseline += line_height(text)
        first = top + round(1.3 * text / 2)
        draw.text((width - gap, first), each.label, ink, find_font(each.label, text), anchor="rm")
        top += len(lines) * line_height(text) + gap // 2
    return np.asarray(canvas)
