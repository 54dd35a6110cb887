"""Panels: an image with its expression, the true mask and predicted masks side by side."""

import base64
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dcris.data.images import fit_image, read_image
from dcris.data.masks import true_mask
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.report.html import render
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

CELL = 480  # pixels of a displayed image's longer side


@dataclass(frozen=True, slots=True)
class NamedMask:
    """The mask that one system predicted."""

    name: str
    mask: MaskArray
    """[H, W] bool."""
    iou: float | None
    """IoU with the true mask in 0..1; None if unknown."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One expression with its image, the true mask and one or more predicted masks."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    expression: str
    truth: MaskArray | None
    """[H, W] bool; None if unknown, so that only predictions are shown."""
    predictions: tuple[NamedMask, ...]

    def __post_init__(self) -> None:
        for mask in (self.truth, *(prediction.mask for prediction in self.predictions)):
            if mask is not None and mask.shape != self.image.shape[:2]:
                raise ValueError(f"a panel's mask is {list(mask.shape)}, but its image {list(self.image.shape[:2])}")


def select_results(results: Sequence[EvalResult], count: int = 12) -> dict[str, list[EvalResult]]:
    """Select results to show, by heading: the best, random ones and the worst, a third each.

    Under one heading each image occurs once. Ties are broken at random; the choice is the same on
    every call.
    """
    ranked = random.Random(0).sample(list(results), len(results))
    ranked.sort(key=lambda result: -result.overlap.iou)
    if len(results) <= count:
        return {"Examples": ranked}
    third = count // 3
    best = first_on_distinct_images(ranked, third)
    worst = first_on_distinct_images([result for result in reversed(ranked) if result not in best], third)
    between = [result for result in ranked if result not in best and result not in worst]
    drawn = first_on_distinct_images(random.Random(0).sample(between, len(between)), count - 2 * third)
    drawn.sort(key=lambda result: -result.overlap.iou)
    return {"The best": best, "Drawn at random": drawn, "The worst": worst}


def first_on_distinct_images(results: Iterable[EvalResult], count: int) -> list[EvalResult]:
    """Return the first `count` results that are on different images."""
    found: dict[Path, EvalResult] = {}
    for result in results:
        if len(found) == count:
            break
        found.setdefault(result.reference.image_path, result)
    return list(found.values())


def make_panel(results: Mapping[str, EvalResult]) -> Panel:
    """Make a panel of one expression from the systems' results by name.

    Raises:
        DcrisError: if the image or the true mask cannot be read.
    """
    result = next(iter(results.values()))
    reference = result.reference
    truth = true_mask(reference, result.expression).mask
    predictions = tuple(NamedMask(name, each.mask(), each.overlap.iou) for name, each in results.items())
    image = fit_image(read_image(reference.image_path), reference)
    return Panel(image, result.expression.text, truth, predictions)


def render_panels(heading: str, panels: Iterable[Panel]) -> Markup:
    """Render panels as HTML cards under a heading; empty if there are none.

    Panels are taken one at a time, because each holds its image at full size.
    """
    with_truth, several, cards = False, False, []
    for panel in panels:
        cards.append(_card(panel))
        with_truth |= panel.truth is not None
        several |= len(panel.predictions) > 1
    if not cards:
        return Markup("")
    return render(
        "examples.html",
        heading=heading,
        cards=cards,
        with_truth=with_truth,
        several=several,
        truth_colour=TRUTH_COLOUR,
        prediction_colour=PREDICTION_COLOUR,
    )


def _card(panel: Panel) -> dict[str, Any]:
    """Return the template's variables of a panel."""
    # Masks are drawn on the resized image, so that contours are equally thin on all cards.
    small = cell(panel.image, CELL)
    exact = max(panel.image.shape[:2]) <= PNG_UP_TO
    expression = panel.expression

    def image(pixels: NDArray[np.uint8], label: str, alt: str, badge: float | None = None) -> dict[str, Any]:
        image_format, data = ("png", png_bytes(pixels)) if exact else ("jpeg", jpeg_bytes(pixels))
        height, width = pixels.shape[:2]
        encoded = base64.b64encode(data).decode()
        return {
            "format": image_format,
            "data": encoded,
            "height": height,
            "width": width,
            "label": label,
            "alt": alt,
            "badge": badge,
        }

    images = [image(small, "image", "the image without masks")]
    if panel.truth is not None:
        truth = overlay(small, mask_cell(panel.truth, CELL), TRUTH_COLOUR)
        images.append(image(truth, "truth", f"true mask for: {expression}"))
    single = len(panel.predictions) == 1
    for each in panel.predictions:
        label = each.name + ("" if each.mask.any() else ": empty")
        shown = overlay(small, mask_cell(each.mask, CELL), PREDICTION_COLOUR)
        alt = f"mask predicted by {each.name} for: {expression}"
        images.append(image(shown, label, alt, None if single else _percent(each.iou)))
    return {
        "images": images,
        "expression": expression,
        "badge": _percent(panel.predictions[0].iou) if single else None,
    }


def _percent(iou: float | None) -> float | None:
    """Return an IoU in percent; None if it is unknown or not finite."""
    return None if iou is None or not math.isfinite(iou) else 100 * iou
