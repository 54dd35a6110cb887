"""Figures for a paper, in the layout of the paper's figures 3 and 4.

A row is one expression: the image, the true mask and each system's mask with its IoU. A figure is
laid out once, and drawn as pixels or as a PDF in which text and outlines are vectors.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dcris.evaluation.report.panels import CELL, Panel
from dcris.evaluation.report.vector_pdf import Line, Page, Picture, vector_pdf
from dcris.types import MaskArray
from dcris.utils.drawing import PREDICTION_COLOUR, TRUTH_COLOUR, Colour, cell, mask_cell, overlay, png_bytes
from dcris.utils.files import write_file
from dcris.utils.lettering import CLOSE_QUOTE, OPEN_QUOTE, find_font, line_height, wrap
from dcris.utils.streams import note
from dcris.utils.text_tables import latex_text

Pixels = NDArray[np.uint8]

_GAP = 20
_TEXT, _LABEL = 34, 28  # font sizes in pixels
_DOTS_PER_INCH = 300


def row_page(panel: Panel, names: bool = True) -> Page:
    """Lay out one panel.

    Args:
        panel: the expression with its masks.
        names: write each column's name below it.
    """
    pictures = _cells(panel)
    height, width = pictures[0].pixels.shape[0], len(pictures) * (CELL + _GAP) + _GAP
    words = wrap(OPEN_QUOTE + panel.expression + CLOSE_QUOTE, _TEXT, width - 2 * _GAP, 2)
    top = _GAP + len(words) * line_height(_TEXT)
    labels = [_labels(panel, column, names) for column in range(len(pictures))]
    below = top + _GAP // 2 + height + _GAP // 2
    lines = [Line(each, _TEXT, width / 2, _GAP + number * line_height(_TEXT)) for number, each in enumerate(words)]
    lines += [
        Line(each, _LABEL, _middle(column), below + number * line_height(_LABEL))
        for column, some in enumerate(labels)
        for number, each in enumerate(some)
    ]
    return Page(
        width,
        below + max(len(each) for each in labels) * line_height(_LABEL) + _GAP,
        tuple(replace(each, top=top + _GAP // 2) for each in pictures),
        tuple(lines),
    )


def figure_page(panels: Iterable[Panel]) -> Page:
    """Lay out panels of the same systems below one another, with the columns' names at the foot.

    Raises ValueError if there is none.
    """
    pages, names = [], []
    for panel in panels:
        pages.append(row_page(panel, names=False))
        names = _names(panel)
    if not pages:
        raise ValueError("a figure needs at least one panel")
    lines = [
        Line(each, _LABEL, _middle(column), number * line_height(_LABEL))
        for column, name in enumerate(names)
        for number, each in enumerate(wrap(f"({_letter(column)}) {name}", _LABEL, CELL, 2))
    ]
    pages.append(Page(pages[0].width, line_height(_LABEL) * 2 + _GAP, (), tuple(lines)))
    tops = [0, *accumulate(page.height for page in pages)]
    return Page(
        pages[0].width,
        tops[-1],
        tuple(
            replace(each, top=each.top + top) for page, top in zip(pages, tops, strict=False) for each in page.pictures
        ),
        tuple(replace(each, top=each.top + top) for page, top in zip(pages, tops, strict=False) for each in page.lines),
    )


def draw(page: Page) -> Pixels:
    """Draw a page on white, as [H, W, 3] uint8."""
    pixels = np.full((page.height, page.width, 3), 255, np.uint8)
    for each in page.pictures:
        shown = each.pixels if each.mask is None else overlay(each.pixels, each.mask, each.colour)
        pixels[each.top :, each.left :][: shown.shape[0], : shown.shape[1]] = shown
    canvas = Image.fromarray(pixels)
    for line in page.lines:
        font = find_font(line.words, line.size)
        ImageDraw.Draw(canvas).text((line.middle, line.top), line.words, "black", font, anchor="ma")
    return np.asarray(canvas)


def write_figures(folder: Path, panels: Iterable[tuple[str, Panel]], measured: str = "") -> None:
    """Write each panel as NAME.png, and all of them as figure.png, figure.pdf and figure.tex.

    Text and outlines of figure.pdf are vectors. Without the package reportlab it has pixels only,
    and a note is printed. figure.tex is a float with figure.pdf and a caption.

    Args:
        folder: for the files.
        panels: names and panels, taken one at a time.
        measured: what the panels are from, for the caption, such as "refcoco val".

    Raises:
        DcrisError: if a file cannot be written.
        ValueError: if there is no panel.
    """
    names: list[str] = []
    expressions = []

    def written() -> Iterator[Panel]:
        for name, panel in panels:
            write_file(folder / f"{name}.png", png_bytes(draw(row_page(panel))))
            names[:] = _names(panel)
            expressions.append(panel.expression)
            yield panel

    page = figure_page(written())
    pixels = draw(page)
    write_file(folder / "figure.png", png_bytes(pixels))
    try:
        content = vector_pdf(page, _DOTS_PER_INCH)
    except ImportError:
        note("figure.pdf has pixels only; for text and outlines as vectors: pip install 'dcris[figures]'")
        content = pdf_bytes(pixels)
    write_file(folder / "figure.pdf", content)
    write_file(folder / "figure.tex", _float(names, expressions, measured))


def _float(names: Sequence[str], expressions: Sequence[str], measured: str) -> str:
    """Return a LaTeX float with figure.pdf."""
    columns = ", ".join(f"({_letter(column)}) {latex_text(name)}" for column, name in enumerate(names))
    quoted = "; ".join(f"``{latex_text(each)}''" for each in expressions)
    where = f" on {latex_text(measured)}" if measured else ""
    return "\n".join(
        [
            "% needs the package graphicx",
            r"\begin{figure*}",
            r"  \centering",
            r"  \includegraphics[width=\linewidth]{figure.pdf}",
            rf"  \caption{{Predictions{where}: {columns}. IoU in percent. Expressions: {quoted}.}}",
            r"  \label{fig:comparison}",
            r"\end{figure*}",
            "",
        ]
    )


def pdf_bytes(image: Pixels) -> bytes:
    """Encode an image [H, W, 3] uint8 as a page of PDF with pixels only, at 300 dots per inch."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PDF", resolution=_DOTS_PER_INCH, quality=95)
    return file.getvalue()


def _cells(panel: Panel) -> list[Picture]:
    """Return the columns of a panel: the image, the true mask, the predicted masks."""
    small = cell(panel.image, CELL)
    masks: list[tuple[MaskArray | None, Colour]] = [(None, TRUTH_COLOUR)]
    if panel.truth is not None:
        masks.append((mask_cell(panel.truth, CELL), TRUTH_COLOUR))
    masks += [(mask_cell(each.mask, CELL), PREDICTION_COLOUR) for each in panel.predictions]
    inset = _GAP + (CELL - small.shape[1]) // 2
    return [
        Picture(inset + column * (CELL + _GAP), 0, small, mask, colour) for column, (mask, colour) in enumerate(masks)
    ]


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


def _letter(column: int) -> str:
    return chr(ord("a") + column % 26)
