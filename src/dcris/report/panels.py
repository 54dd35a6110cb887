"""Phrases on pictures: what was right and what the model answered, side by side."""

import base64
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.drawing import COLOURS, cell, jpeg_bytes, mask_cell, overlay, png_bytes
from dcris.engine.evaluate import Answer
from dcris.report.page import percent, text
from dcris.types import MaskArray

_ORANGE, _BLUE = COLOURS[0], COLOURS[1]
TRUTH_COLOUR, PREDICTION_COLOUR = _BLUE, _ORANGE
"""Told apart by colour-blind eyes too."""

_CELL = 480  # pixels on a picture's longer side
_PNG_UP_TO = 200  # longer side: smaller pictures are drawn scenes, which JPEG would smear


@dataclass(frozen=True, slots=True)
class Panel:
    """One phrase on one picture, with what was right and what the model answered."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    phrase: str
    truth: MaskArray | None
    """[H, W]; None where nobody knows it, and then only the prediction is shown."""
    prediction: MaskArray
    """[H, W]."""
    iou: float | None
    """Overlap of the two in 0..1."""


def pick_panels(answers: Sequence[Answer], count: int = 12) -> list[Panel]:
    """Pictures for a report: the best, the worst, and what lies between, so that nobody has to take our word for it."""
    ranked = sorted(answers, key=lambda answer: answer.overlap.iou, reverse=True)
    third = count // 3
    middle = ranked[third:-third] if len(ranked) > 2 * third else []
    typical = random.Random(0).sample(middle, min(len(middle), count - 2 * third))
    chosen = [*ranked[:third], *sorted(typical, key=lambda answer: -answer.overlap.iou), *ranked[third:][-third:]]
    return [as_panel(answer) for answer in chosen]


def as_panel(answer: Answer) -> Panel:
    """An answer as a picture of the report."""
    reference = answer.reference
    truth = decode_mask(reference.segmentation, reference.image_size).astype(bool)
    prediction = answer.mask()
    image = read_image(reference.image_path)
    return Panel(image, answer.expression.text, truth, prediction, answer.overlap.iou)


def panels_section(panels: Sequence[Panel]) -> str:
    """The panels as cards under a heading; nothing where there are none."""
    if not panels:
        return ""
    legend = f"{_swatch(PREDICTION_COLOUR)} prediction"
    if any(panel.truth is not None for panel in panels):
        legend = f"{_swatch(TRUTH_COLOUR)} truth {legend}"
    cards = "".join(_card(panel) for panel in panels)
    return f'<section><h2>Examples</h2><p class="legend">{legend}</p><div class="panels">{cards}</div></section>'


def _card(panel: Panel) -> str:
    # Masks are drawn on the cell, not on the photograph: so contours are equally thin on all cards.
    for mask in (panel.truth, panel.prediction):
        if mask is not None and mask.shape != panel.image.shape[:2]:
            raise ValueError(f"a panel's mask is {list(mask.shape)}, but its image {list(panel.image.shape[:2])}")
    small = cell(panel.image, _CELL)
    drawn = max(panel.image.shape[:2]) <= _PNG_UP_TO
    phrase = text(panel.phrase)

    def picture(pixels: NDArray[np.uint8], label: str, alt: str) -> str:
        kind, data = ("png", png_bytes(pixels)) if drawn else ("jpeg", jpeg_bytes(pixels))
        height, width = pixels.shape[:2]
        return (
            f'<figure><img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" width="{width}" '
            f'height="{height}" alt="{alt}"><figcaption>{label}</figcaption></figure>'
        )

    pictures = [picture(small, "picture", "the picture alone")]
    if panel.truth is not None:
        truth = overlay(small, mask_cell(panel.truth, _CELL), TRUTH_COLOUR)
        pictures.append(picture(truth, "truth", f"true mask for: {phrase}"))
    prediction = overlay(small, mask_cell(panel.prediction, _CELL), PREDICTION_COLOUR)
    label = "prediction" if panel.prediction.any() else "prediction: empty"
    pictures.append(picture(prediction, label, f"predicted mask for: {phrase}"))
    badge = ""
    if panel.iou is not None and math.isfinite(panel.iou):
        quality = "good" if panel.iou >= 0.7 else "fair" if panel.iou >= 0.5 else "poor"
        badge = f'<span class="badge {quality}">IoU {percent(100 * panel.iou)}</span>'
    return (
        f'<article class="card"><div class="pictures">{"".join(pictures)}</div>'
        f'<p class="caption"><q dir="auto">{phrase}</q>{badge}</p></article>'
    )


def _swatch(colour: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:rgb{colour}"></i>'
