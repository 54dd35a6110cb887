"""Answers made by hand, for tests of what is worked out from them."""

import itertools
from pathlib import Path

import numpy as np

from dcris.data.masks import encode_mask
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, Overlap, overlap
from dcris.types import Expression, MaskArray, Reference

_numbers = itertools.count(1)


def answer(
    share: tuple[int, int] = (1, 2),
    *,
    photograph: str | int = 1,
    phrase: str = "left one",
    kind: str | None = None,
    area: int = 25,
) -> EvalResult:
    """An answer with that many pixels shared and covered, for an object of `area` pixels on a photograph nobody opens."""
    number = next(_numbers)
    expression = Expression(number, phrase, kind)
    runs = {"size": [1000, 1000], "counts": [0, area, 1_000_000 - area]}
    path = Path(f"photographs/{photograph}.jpg")
    reference = Reference(number, number, number, path, (1000, 1000), "thing", "val", runs, (expression,))
    return EvalResult(reference, expression, Overlap(*share), runs)


def rectangle(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> MaskArray:
    """[H, W] bool with that rectangle set."""
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def drawn(reference: Reference, number: int, prediction: MaskArray, truth: MaskArray) -> EvalResult:
    """An answer to a reference's expression of that number, with its curve."""
    found = overlap(prediction, truth)
    curve = (found,) * len(CURVE_THRESHOLDS)
    return EvalResult(reference, reference.expressions[number], found, encode_mask(prediction), curve)
