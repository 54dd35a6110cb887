"""How much the scores of predictions tell: ranking, calibration, and where to cut.

Shape letters: N expressions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.evaluation.evaluator import EvalResult

_BINS = 10
"""Equally wide bins of the reliability diagram and of the expected calibration error."""

_RIGHT = 0.5
"""A mask with a greater IoU is right."""

TEMPERATURES = (0.05, 20.0)
"""Range of fitted temperatures."""

Floats = NDArray[np.float64]
Truths = NDArray[np.bool_]


def assess(results: Sequence[EvalResult]) -> dict[str, Any] | None:
    """Return how much the scores of results tell, as plain JSON data; None if they have no scores.

    Returns:
        `score` (against an IoU above 0.5) and, with a presence head, `present` (against the truth),
        each a dict of
        auroc: probability that a right one scores higher than a wrong one; None if all are right or
            all wrong.
        ece: expected calibration error, from 0 to 1.
        bins: those of the reliability diagram with results, each `count`, `mean` score and `share`
            of right ones.
        by_kind (of `present`, where absent objects have kinds): AUROC of each kind against all that
            are there.
        And `min_score`: the recommended minimum, its `kept` share of right ones and `dropped` share
        of wrong ones; left out if all are right or all wrong. Right is to be there, for a presence
        head on a split with absent objects, else an IoU above 0.5.
    """
    if not results or any(result.score is None for result in results):
        return None
    scores = np.array([result.score for result in results], np.float64)
    # An expression with an empty truth is right if its mask is empty, too, whatever the protocol
    # counts; its score cannot say so.
    right = np.array([result.overlap.iou > _RIGHT and has_object(result) for result in results], np.bool_)
    found: dict[str, Any] = {"score": _assess(scores, right)}
    there = right
    if all(result.present is not None for result in results):
        present = np.array([result.present for result in results], np.float64)
        truths = np.array([has_object(result) for result in results], np.bool_)
        found["present"] = _assess(present, truths) | _by_kind(results, present, truths)
        if not truths.all():
            there = truths
    if there.any() and not there.all():
        cut = best_cut(scores, there)
        kept, dropped = float((scores[there] >= cut).mean()), float((scores[~there] < cut).mean())
        found["min_score"] = {"value": cut, "kept": kept, "dropped": dropped}
    return found


def _assess(scores: Floats, right: Truths) -> dict[str, Any]:
    bins = reliability(scores, right)
    return {"auroc": auroc(scores, right), "ece": calibration_error(bins), "bins": bins}


def _by_kind(results: Sequence[EvalResult], present: Floats, truths: Truths) -> dict[str, Any]:
    kinds = np.array([result.expression.kind or "" for result in results], np.str_)
    absent = sorted({*kinds[~truths].tolist()} - {""})
    if not truths.any() or not absent:
        return {}
    chosen = {kind: truths | (kinds == kind) for kind in absent}
    return {"by_kind": {kind: auroc(present[among], truths[among]) for kind, among in chosen.items()}}


def has_object(result: EvalResult) -> bool:
    """Return whether the image has what the expression describes."""
    return bool(result.reference.targets(result.expression))


def auroc(scores: Floats, right: Truths) -> float | None:
    """Return the area under the receiver operating characteristic; equal scores count half.

    None if all [N] are right or all wrong.
    """
    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1; the mean rank of equal ones
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def reliability(scores: Floats, right: Truths) -> list[dict[str, float]]:
    """Return the bins of equal width that have scores: `count`, `mean` score, `share` right."""
    numbers = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    return [
        {
            "count": int(inside.sum()),
            "mean": float(scores[inside].mean()),
            "share": float(right[inside].mean()),
        }
        for inside in (numbers == number for number in np.unique(numbers))
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error (Guo et al. 2017): the mean difference of `mean` and
    `share` over all results of the bins."""
    total = sum(each["count"] for each in bins)
    return sum(each["count"] * abs(each["mean"] - each["share"]) for each in bins) / total


def best_cut(scores: Floats, right: Truths) -> float:
    """Return the cut at which the share of right ones that are kept (scores of at least the cut)
    plus that of wrong ones that are dropped is greatest (Youden's J), between two scores.

    Args:
        scores: [N] in 0..1.
        right: [N], with both values.
    """
    values = np.unique(scores)
    kept, dropped = (
        1 - np.searchsorted(np.sort(scores[right]), values) / right.sum(),
        np.searchsorted(np.sort(scores[~right]), values) / (~right).sum(),
    )
    place = int(np.argmax(kept + dropped))
    below, least = float(values[place - 1]) if place else 0.0, float(values[place])
    middle = round((below + least) / 2, 3)
    return middle if below < middle <= least else least


def presence_temperature(results: Sequence[EvalResult], current: float) -> float | None:
    """Return the temperature of a presence head that fits results best.

    Args:
        results: of a split.
        current: temperature that the results were predicted with.

    Returns:
        None if the results have no presence, or their objects are all there or all absent.
    """
    present = [result.present for result in results if result.present is not None]
    truths = np.array([has_object(result) for result in results], np.bool_)
    if len(present) < len(results) or truths.all() or not truths.any():
        return None
    shares = np.clip(np.array(present, np.float64), 1e-7, 1 - 1e-7)
    # Presences are float32: fitted again to those of this temperature, other digits would change.
    return round(fit_temperature(current * np.log(shares / (1 - shares)), truths), 4)


def fit_temperature(logits: Floats, right: Truths) -> float:
    """Return the temperature in TEMPERATURES whose cross entropy is least (Guo et al. 2017).

    The cross entropy is convex in the inverse temperature, so the root of its derivative is found
    by bisection.

    Args:
        logits: [N], of probabilities.
        right: [N].
    """
    low, high = (1 / bound for bound in reversed(TEMPERATURES))
    for _ in range(60):
        middle = math.sqrt(low * high)
        slope = ((_sigmoid(logits * middle) - right) * logits).sum()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float64)
