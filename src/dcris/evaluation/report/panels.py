"""Phrases on pictures: what was right and what the model answered, side by side."""

import base64
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.report.html import percent, text
from dcris.types import MaskArray
from dcris.utils.drawing import (
    PNG_UP_TO,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    cell,
    jpeg_bytes,
    mask_cell,
    overlay,
    png_bytes,
)

CELL = 480  # pixels on a picture's longer side


@dataclass(frozen=True, slots=True)
class Guess:
    """What one model answered."""

    name: str
    mask: MaskArray
    """[H, W] bool."""
    iou: float | None
    """Overlap with the truth in 0..1."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One phrase on one picture, with what was right and what one model or several answered."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    phrase: str
    truth: MaskArray | None
    """[H, W] bool; None where nobody knows it, and then only guesses are shown."""
    guesses: tuple[Guess, ...]

    def __post_init__(self) -> None:
        for mask in (self.truth, *(guess.mask for guess in self.guesses)):
            if mask is not None and mask.shape != self.image.shape[:2]:
                raise ValueError(f"a panel's mask is {list(mask.shape)}, but its image {list(self.image.shape[:2])}")


def pick(answers: Sequence[EvalResult], count: int = 12) -> dict[str, list[EvalResult]]:
    """Answers to show, by heading: the best, the worst, and what lies between, so that nobody has to take our word for it.

    A third of `count` each, where there are so many; under one heading no photograph comes twice. Of equal ones chance decides,
    by the same seed each time.
    """
    ranked = random.Random(0).sample(list(answers), len(answers))
    ranked.sort(key=lambda answer: -answer.overlap.iou)
    if len(answers) <= count:
        return {"Examples": ranked}
    third = count // 3
    best = first_apart(ranked, third)
    worst = first_apart([answer for answer in reversed(ranked) if answer not in best], third)
    between = [answer for answer in ranked if answer not in best and answer not in worst]
    typical = first_apart(random.Random(0).sample(between, len(between)), count - 2 * third)
    typical.sort(key=lambda answer: -answer.overlap.iou)
    return {"The best": best, "Drawn at random": typical, "The worst": worst}


def first_apart(answers: Iterable[EvalResult], count: int) -> list[EvalResult]:
    """The first `count` answers that are on different photographs."""
    found: dict[Path, EvalResult] = {}
    for answer in answers:
        if len(found) == count:
            break
        found.setdefault(answer.reference.image_path, answer)
    return list(found.values())


def as_panel(named: Mapping[str, EvalResult]) -> Panel:
    """Answers to one expression as one picture of the report, by their models' names.

    Raises DcrisError where the photograph or the true mask cannot be read.
    """
    answer = next(iter(named.values()))
    reference = answer.reference
    truth = decode_mask(reference.segmentation, reference.image_size).astype(bool)
    guesses = tuple(Guess(name, each.mask(), each.overlap.iou) for name, each in named.items())
    return Panel(read_image(reference.image_path), answer.expression.text, truth, guesses)


def panels_section(heading: str, panels: Iterable[Panel]) -> str:
    """The panels as cards under a heading, taken one by one; nothing where there are none."""
    truths, several, cards = False, False, []
    for panel in panels:
        cards.append(_card(panel))
        truths |= panel.truth is not None
        several |= len(panel.guesses) > 1
    if not cards:
        return ""
    legend = f"{_swatch(PREDICTION_COLOUR)} prediction"
    if truths:
        legend = f"{_swatch(TRUTH_COLOUR)} truth {legend}"
    return (
        f'<section><h2>{text(heading)}</h2><p class="legend">{legend}</p>'
        f'<div class="panels{" wide" if several else ""}">{"".join(cards)}</div></section>'
    )


def _card(panel: Panel) -> str:
    # Masks are drawn on the cell, not on the photograph: so contours are equally thin on all cards.
    small = cell(panel.image, CELL)
    drawn = max(panel.image.shape[:2]) <= PNG_UP_TO
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
        truth = overlay(small, mask_cell(panel.truth, CELL), TRUTH_COLOUR)
        pictures.append(picture(truth, "truth", f"true mask for: {phrase}"))
    below = ""
    for guess in panel.guesses:
        label, badge = text(guess.name) + ("" if guess.mask.any() else ": empty"), _badge(guess.iou)
        if len(panel.guesses) == 1:
            below = badge
        else:
            label += f" {badge}"
        prediction = overlay(small, mask_cell(guess.mask, CELL), PREDICTION_COLOUR)
        pictures.append(picture(prediction, label, f"mask predicted by {text(guess.name)} for: {phrase}"))
    return (
        f'<article class="card"><div class="pictures">{"".join(pictures)}</div>'
        f'<p class="caption"><q dir="auto">{phrase}</q>{below}</p></article>'
    )


def _badge(iou: float | None) -> str:
    if iou is None or not math.isfinite(iou):
        return ""
    quality = "good" if iou >= 0.7 else "fair" if iou >= 0.5 else "poor"
    return f'<span class="badge {quality}">IoU {percent(100 * iou)}</span>'


def _swatch(colour: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:rgb{colour}"></i>'
