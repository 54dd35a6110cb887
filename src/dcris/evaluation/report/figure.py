"""Figures for a paper, in the layout of the paper's figures 3 and 4.

A row is one expression: the image, the true mask and each system's mask with its IoU.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dcris.evaluation.report.panels import CELL, Panel
from dcris.utils.drawing import PREDICTION_COLOUR, TRUTH_COLOUR, cell, mask_cell, overlay, png_bytes
from dcris.utils.files import write_file
from dcris.utils.lettering import CLOSE_QUOTE, OPEN_QUOTE, find_font, line_height, wrap

Pixels = NDArray[np.uint8]

_GAP = 20
_TEXT, _LABEL = 34, 28  # font sizes in pixels
_DOTS_PER_INCH = 300


def row(panel: Panel, names: bool = True) -> Pixels:
    """Draw one panel as an image [H, W, 3] uint8 on white.

    Args:
        panel: the expression with its masks.
        names: write each column's name below it.
    """
    images = _cells(panel)
    width = len(images) * (CELL + _GAP) + _GAP
    lines = wrap(OPEN_QUOTE + panel.expression + CLOSE_QUOTE, _TEXT, width - 2 * _GAP, 2)
    top = _GAP + len(lines) * line_height(_TEXT)
    labels = [_labels(panel, column, names) for column in range(len(images))]
    below = top + _GAP // 2 + images[0].shape[0] + _GAP // 2
    height = below + max(len(each) for each in labels) * line_height(_LABEL) + _GAP
    page = np.full((height, width, 3), 255, np.uint8)
    for column, image in enumerate(images):
        left = _GAP + column * (CELL + _GAP) + (CELL - image.shape[1]) // 2
        page[top + _GAP // 2 :][: image.shape[0], left : left + image.shape[1]] = image
    canvas = Image.fromarray(page)
    for number, line in enumerate(lines):
        _write(canvas, line, _TEXT, width / 2, _GAP + number * line_height(_TEXT))
    for column, some in enumerate(labels):
        for number, line in enumerate(some):
            _write(canvas, line, _LABEL, _middle(column), below + number * line_height(_LABEL))
    return np.asarray(canvas)


def figure(panels: Iterable[Panel]) -> Pixels:
    """Draw panels of the same systems below one another, with the columns' names at the foot.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: if there is no panel.
    """
    rows, names = [], []
    for panel in panels:
        rows.append(row(panel, names=False))
        names = _names(panel)
    if not rows:
        raise ValueError("a figure needs at least one panel")
    foot = Image.new("RGB", (rows[0].shape[1], line_height(_LABEL) * 2 + _GAP), "white")
    for column, name in enumerate(names):
        letter = chr(ord("a") + column % 26)
        for number, line in enumerate(wrap(f"({letter}) {name}", _LABEL, CELL, 2)):
            _write(foot, line, _LABEL, _middle(column), number * line_height(_LABEL))
    return np.concatenate([*rows, np.asarray(foot)])


def write_figures(folder: Path, panels: Iterable[tuple[str, Panel]]) -> None:
    """Write each panel as NAME.png, and all of them as figure.png and figure.pdf.

    Args:
        folder: for the files.
        panels: names and panels, taken one at a time.

    Raises:
        DcrisError: if a file cannot be written.
        ValueError: if there is no panel.
    """

    def written() -> Iterator[Panel]:
        for name, panel in panels:
            write_file(folder / f"{name}.png", png_bytes(row(panel)))
            yield panel

    whole = figure(written())
    write_file(folder / "figure.png", png_bytes(whole))
    write_file(folder / "figure.pdf", pdf_bytes(whole))


def pdf_bytes(image: Pixels) -> bytes:
    """Encode an image [H, W, 3] uint8 as a page of PDF, at 300 dots per inch."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PDF", resolution=_DOTS_PER_INCH, quality=95)
    return file.getvalue()


def _cells(panel: Panel) -> list[Pixels]:
    """Draw the columns of a panel: the image, the true mask, the predicted masks."""
    small = cell(panel.image, CELL)
    images = [small]
    if panel.truth is not None:
        images.append(overlay(small, mask_cell(panel.truth, CELL), TRUTH_COLOUR))
    return images + [overlay(small, mask_cell(each.mask, CELL), PREDICTION_COLOUR) for each in panel.predictions]


def _names(panel: Panel) -> list[str]:
    truth = ["ground truth"] if panel.truth is not None else []
    return ["input", *truth, *(each.name for each in panel.predictions)]


def _labels(panel: Panel, column: int, names: bool) -> list[str]:
    """Return the lines below a column: its name if wanted, and the IoU of a prediction."""
    named = wrap(_names(panel)[column], _LABEL, CELL, 1) if names else []
    index = column - (1 if panel.truth is None else 2)
    iou = panel.predictions[index].iou if index >= 0 else None
    return named + ([f"IoU {100 * iou:.1f}"] if iou is not None else [])


def _middle(column: int) -> float:
    return _GAP + column * (CELL + _GAP) + CELL / 2


def _write(canvas: Image.Image, line: str, size: int, middle: float, top: float) -> None:
    ImageDraw.Draw(canvas).text((middle, top), line, "black", find_font(line, size), anchor="ma")
