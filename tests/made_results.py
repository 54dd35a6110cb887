"""Evaluation results with given overlaps or masks, for tests of scores and reports."""

import itertools
from pathlib import Path

import numpy as np

from dcris.data.masks import encode_mask
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, Overlap, overlap
from dcris.types import Expression, MaskArray, Reference

_numbers = itertools.count(1)


def made_result(
    share: tuple[int, int] = (1, 2),
    *,
    image: str | int = 1,
    expression: str = "left one",
    kind: str | None = None,
    area: int = 25,
) -> EvalResult:
    """Return a result with that intersection and union, for an object of `area` pixels.

    The image file does not exist.
    """
    number = next(_numbers)
    runs = {"size": [1000, 1000], "counts": [0, area, 1_000_000 - area]}
    path = Path(f"images/{image}.jpg")
    queried = Expression(number, expression, kind)
    reference = Reference(number, (number,), number, path, (1000, 1000), "thing", "val", (runs,), (queried,))
    return EvalResult(reference, queried, Overlap(*share), runs)


def rectangle(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> MaskArray:
    """Return an [H, W] bool mask of a rectangle."""
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def drawn_result(reference: Reference, number: int, prediction: MaskArray, truth: MaskArray) -> EvalResult:
    """Return a result with these masks and a curve, for one expression of the reference."""
    found = overlap(prediction, truth)
    curve = (found,) * len(CURVE_THRESHOLDS)
    return EvalResult(reference, reference.expressions[number], found, encode_mask(prediction), curve)
