"""Confidence intervals, scores by group of expressions, and the threshold curve of an evaluation.

Intervals are 95% percentile intervals of the bootstrap [1]: images are drawn with replacement
RESAMPLES times, and the middle 95% of the resulting scores are the interval. Images are drawn with
all their expressions, because expressions of one image, often of one object, succeed or fail
together; drawing single expressions would give intervals that are too narrow. The intervals show
how much a score depends on the choice of images, not how much it varies between training seeds.

[1] B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13.

Shape letters: P images, R resamples, C columns of counts, M metrics, T thresholds.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dcris.data.masks import union_area
from dcris.data.wording import expression_kinds
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, STANDARD_METRICS, Floats, Metric, Overlaps, in_percent, known
from dcris.evaluation.protocols.base import SizeSubset

RESAMPLES = 1000
SEED = 0
"""Seed of the resamples: two systems on one split are scored on the same drawn images."""

_DRAWN_AT_ONCE = 4_000_000  # images, which take 32 MB of weights


def analyse(
    results: Sequence[EvalResult],
    metrics: Sequence[Metric] = STANDARD_METRICS,
    *,
    by_category: bool = False,
    size_subset: SizeSubset | None = None,
) -> dict[str, Any]:
    """Return intervals, scores by group of expressions and the threshold curve, as plain JSON data.

    Args:
        results: of all queries of a split.
        metrics: of the protocol; groups and curve have the first two.
        by_category: whether to add groups by the category of the objects.
        size_subset: of the protocol.

    Returns:
        A dict of
        photographs: number of images.
        intervals: by metric, the 95% interval [low, high] in percent; empty for fewer than two
            images, and without a metric that no expression counts for, such as N-acc without
            absent targets.
        by_length, by_size, by_kind: lists of groups, each with `name`, `expressions`, the first two
            metrics and their `intervals`, drawn from the images that have such an expression.
            Groups without expressions are left out. A score is None if none of a group's
            expressions counts for it, such as one of targets in the group without any.
        by_subset: the same with all metrics by the data set's own subsets, if it has any.
        by_category: as by_length, by the category of the objects, if wanted; an expression with
            objects of several categories is in each of them.
        curve: `thresholds` and the first two metrics at each; left out if any result has no curve.

    Raises:
        DcrisError: if a true mask cannot be decoded.
    """
    described = _describe([results], metrics, by_category, size_subset)
    curve = _curve(results, metrics[:2])
    return described | ({"curve": curve} if curve else {})


def difference(
    results: Sequence[EvalResult], baseline: Sequence[EvalResult], metrics: Sequence[Metric] = STANDARD_METRICS
) -> dict[str, Any]:
    """Return a system's scores minus a baseline's on the same expressions, in percentage points.

    Intervals are paired: both systems are scored on the same drawn images. What makes an image hard
    for both then cancels, and the interval is narrower than two separate ones suggest. If it does
    not contain 0, the choice of images does not explain the difference.

    Args:
        results: of the system.
        baseline: results to subtract.
        metrics: of the protocol.

    Returns:
        The difference by metric, and `photographs`, `intervals`, `by_length`, `by_size` and
        `by_kind` as in `analyse`.

    Raises:
        ValueError: if the two are not of the same expressions.
    """
    ordered = align(baseline, results)
    total = _counts([results, ordered], metrics).sum(axis=0)
    return _by_key(total, metrics) | _describe([results, ordered], metrics)


def best_threshold(results: Sequence[EvalResult], metrics: Sequence[Metric] = STANDARD_METRICS) -> float:
    """Return the lowest of CURVE_THRESHOLDS at which the first metric is greatest.

    Raises:
        DcrisError: if no expression counts for that metric.
        ValueError: if there are no results or any has no curve.
    """
    curve = _curve(results, metrics[:1])
    if curve is None:
        raise ValueError("a threshold can only be chosen from results with threshold curves")
    found = curve[metrics[0].key]
    if None in found:
        raise DcrisError(
            f"no threshold can be chosen on a split in which no expression counts for {metrics[0].title}, such as one "
            "without any target; choose another split"
        )
    return float(curve["thresholds"][int(np.argmax(found))])


def align(results: Sequence[EvalResult], like: Sequence[EvalResult]) -> list[EvalResult]:
    """Return results in the order of another system's.

    Raises:
        ValueError: if the two are not of the same expressions, one result each.
    """
    by_sentence = {result.expression.sent_id: result for result in results}
    order = [result.expression.sent_id for result in like]
    if not len(results) == len(by_sentence) == len(order) or by_sentence.keys() != set(order):
        raise ValueError("systems must have results for the same expressions, one result for each expression")
    return [by_sentence[sent_id] for sent_id in order]


# ---- intervals -----------------------------------------------------------------------------------


def tally(results: Sequence[EvalResult], metrics: Sequence[Metric] = STANDARD_METRICS) -> Floats:
    """Return additive counts [P, C] of each image, in the order of the images' paths.

    The columns are the number of expressions, then for each metric the sum of its values and, if it
    is a ratio of sums, the sum of its weights.
    """
    overlaps = Overlaps.of(result.overlap for result in results)
    columns = [np.ones(len(results))]
    for metric in metrics:
        columns.append(np.asarray(metric.value(overlaps), np.float64))
        if metric.weight is not None:
            columns.append(metric.weight(overlaps))
    return sums_by_key([str(result.reference.image_path) for result in results], np.column_stack(columns))


def sums_by_key(keys: Sequence[str], rows: Floats) -> Floats:
    """Return the sums [P, C] of the rows [N, C] of each key, in the order of the keys."""
    # Not by np.unique, whose array of text gives each key the length of the longest.
    places = {key: place for place, key in enumerate(sorted({*keys}))}
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, [places[key] for key in keys], rows)
    return sums


def scores(counts: Floats, metrics: Sequence[Metric] = STANDARD_METRICS) -> Floats:
    """Return metrics [..., M] in percent from summed counts [..., C]; NaN for those that none of
    the expressions counts for."""
    columns = iter(np.moveaxis(counts, -1, 0))
    expressions = next(columns)
    found = []
    for metric in metrics:
        values = next(columns)
        found.append(in_percent(values, expressions if metric.weight is None else next(columns)))
    return np.stack(found, axis=-1)


def resample(counts: Floats) -> Floats:
    """Return [R, C]: the summed counts of P images drawn with replacement from [P, C], R times."""
    images = len(counts)
    random = np.random.default_rng(SEED)
    rows = max(1, _DRAWN_AT_ONCE // images)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        chosen = random.integers(images, size=(size, images))
        # A product with the number of times each image was drawn is faster than summing
        # the drawn rows.
        indices = chosen + images * np.arange(size)[:, None]
        times = np.bincount(indices.ravel(), minlength=size * images).reshape(size, images)
        drawn.append(times.astype(np.float64) @ counts)
    return np.concatenate(drawn)


def _counts(systems: Sequence[Sequence[EvalResult]], metrics: Sequence[Metric]) -> Floats:
    """Return the tally of one system [P, C], or of two side by side [P, 2 C] for paired drawing."""
    return np.concatenate([tally(results, metrics) for results in systems], axis=1)


def _scores_of(counts: Floats, metrics: Sequence[Metric]) -> Floats:
    """Return one system's metrics [..., M], or the first system's minus the second's.

    Args:
        counts: summed, [..., C] of one system or [..., 2 C] of two.
        metrics: of the protocol.
    """
    columns = 1 + sum(1 if metric.weight is None else 2 for metric in metrics)
    found = scores(counts[..., :columns], metrics)
    return found - scores(counts[..., columns:], metrics) if counts.shape[-1] > columns else found


def _by_key(counts: Floats, metrics: Sequence[Metric]) -> dict[str, float | None]:
    """Return `_scores_of` by the metrics' keys."""
    found = _scores_of(counts, metrics).tolist()
    return {metric.key: known(value) for metric, value in zip(metrics, found, strict=True)}


def _intervals(counts: Floats, metrics: Sequence[Metric], wanted: Sequence[Metric]) -> dict[str, list[float]]:
    """Return the intervals of the wanted metrics, the first ones of `metrics`, by key; none for
    fewer than two images, or where no expression counts.

    Resamples without an expression that counts for a metric have no score.
    """
    if len(counts) < 2:
        return {}
    found = {}
    for metric, drawn in zip(wanted, _scores_of(resample(counts), metrics).T[: len(wanted)], strict=True):
        defined = drawn[~np.isnan(drawn)]
        if len(defined):
            found[metric.key] = np.percentile(defined, [2.5, 97.5]).tolist()
    return found


def _describe(
    systems: Sequence[Sequence[EvalResult]],
    metrics: Sequence[Metric],
    by_category: bool = False,
    size_subset: SizeSubset | None = None,
) -> dict[str, Any]:
    """Return intervals and groups of one system, or of the difference of two in the same order."""
    counts = _counts(systems, metrics)
    described: dict[str, Any] = {"photographs": len(counts), "intervals": _intervals(counts, metrics, metrics)}
    # Decoding a mask takes longest here, so it is done once per reference, not once per expression.
    references = {result.reference.ref_id: result.reference for result in systems[0]}
    areas = {key: union_area(reference.segmentations, reference.image_size) for key, reference in references.items()}
    groupings = _groups(systems[0], areas)
    if subsets := _subsets(systems[0], areas, size_subset):
        groupings["by_subset"] = subsets
    if by_category:
        groupings["by_category"] = _categories(systems[0])
    for grouping, groups in groupings.items():
        shown = metrics if grouping == "by_subset" else metrics[:2]
        described[grouping] = [
            _group(name, [[results[index] for index in indices] for results in systems], metrics, shown)
            for name, indices in groups.items()
        ]
    return described


def _group(
    name: str, systems: Sequence[Sequence[EvalResult]], metrics: Sequence[Metric], shown: Sequence[Metric]
) -> dict[str, Any]:
    """Return the entry of one group: its size and the `shown` metrics, the first ones of `metrics`,
    with intervals."""
    counts = _counts(systems, metrics)
    values = _by_key(counts.sum(axis=0), metrics)
    return {
        "name": name,
        "expressions": len(systems[0]),
        **{metric.key: values[metric.key] for metric in shown},
        "intervals": _intervals(counts, metrics, shown),
    }


def _curve(results: Sequence[EvalResult], metrics: Sequence[Metric]) -> dict[str, list[Any]] | None:
    """Return the thresholds and each metric at each; None if any result has no curve."""
    if not results or any(len(result.curve) != len(CURVE_THRESHOLDS) for result in results):
        return None
    overlaps = Overlaps.of(result.curve for result in results)  # [N, T]
    by_key = {metric.key: [*map(known, metric.score(overlaps).tolist())] for metric in metrics}
    return {"thresholds": list(CURVE_THRESHOLDS), **by_key}


# ---- groups --------------------------------------------------------------------------------------


_LENGTHS = {"1-2 words": 2, "3-5 words": 5, "6-10 words": 10, "11 words and more": sys.maxsize}
_SIZES = {"small": 32**2, "medium": 96**2, "large": sys.maxsize}
"""COCO's classes of the true mask's area in pixels. They are meant for images of about 640 pixels,
as in COCO."""

_NO_TARGET = "no target"
"""Group of the expressions that describe nothing in the image."""


def _groups(results: Sequence[EvalResult], areas: Mapping[int, int]) -> dict[str, dict[str, list[int]]]:
    """Return, for each grouping, its groups in order with the indices of their results.

    `areas` are the pixels of each reference's objects.
    """
    kinds: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {name: [] for name in _LENGTHS}
    sizes: dict[str, list[int]] = {name: [] for name in (*_SIZES, _NO_TARGET)}
    for index, result in enumerate(results):
        expression = result.expression
        lengths[_bin(len(expression.text.split()), _LENGTHS)].append(index)
        has_target = result.reference.targets(expression)
        sizes[_bin(areas[result.reference.ref_id], _SIZES) if has_target else _NO_TARGET].append(index)
        for kind in [expression.kind] if expression.kind is not None else expression_kinds(expression.text):
            kinds.setdefault(kind, []).append(index)
    in_order = dict(sorted(kinds.items(), key=lambda item: (item[0] == "other", item[0])))
    groupings = {"by_length": lengths, "by_size": sizes, "by_kind": in_order}
    return {
        grouping: {name: indices for name, indices in groups.items() if indices}
        for grouping, groups in groupings.items()
    }


def _subsets(
    results: Sequence[EvalResult], areas: Mapping[int, int], size_subset: SizeSubset | None
) -> dict[str, list[int]]:
    """Return the data set's own subsets in alphabetical order with the indices of their results."""
    found: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        names = result.expression.subsets
        reference = result.reference
        by_size = size_subset(areas[reference.ref_id], reference.image_size) if names and size_subset else None
        for name in (*names, *([by_size] if by_size else [])):
            found.setdefault(name, []).append(index)
    return dict(sorted(found.items()))


def _categories(results: Sequence[EvalResult]) -> dict[str, list[int]]:
    """Return the categories in alphabetical order with the indices of their results."""
    found: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        if result.reference.targets(result.expression):
            for name in result.reference.category.split(", "):
                found.setdefault(name, []).append(index)
    return dict(sorted(found.items()))


def _bin(value: int, limits: Mapping[str, int]) -> str:
    """Return the first name whose limit is at least the value."""
    return next(name for name, limit in limits.items() if value <= limit)
