"""Line charts as inline SVG, which follow the page's light or dark colours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dcris.evaluation.metrics import STANDARD_METRICS, Metric
from dcris.evaluation.report.html import render

Floats = NDArray[np.float64]

_CURVE_POINTS = 300  # drawn per curve; a log may have 100,000 lines
_COLOURS = "abcdef"  # classes of style.css


def series(log: Sequence[Mapping[str, float]], key: str) -> Floats:
    """Extract a value from the lines of a training log.

    Lines without a step or value and values that are not finite are left out.

    Args:
        log: lines with `step` and other values. A resumed run's log may repeat steps.
        key: of the value.

    Returns:
        [N, 2]: step and value, by step.
    """
    pairs = [
        (float(line["step"]), float(line[key]))
        for line in log
        if line.get("step") is not None and line.get(key) is not None
    ]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return np.asarray(points[np.argsort(points[:, 0], kind="stable")], np.float64)


def _smooth(points: Floats) -> Floats:
    """Smooth [N, 2] points by local linear regression over about 1/40 of the run.

    Unlike a running mean, it neither lags nor flattens the steep beginning of a loss.

    Returns:
        [M, 2], where M is at most `_CURVE_POINTS`.
    """
    groups = np.array_split(points, min(len(points), _CURVE_POINTS))
    steps, values = np.array([group.mean(axis=0) for group in groups]).T
    index = np.arange(len(steps))
    weights = np.exp(-0.5 * ((index[:, None] - index) / max(1.0, len(index) / 40)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    centres, means = weights @ steps, weights @ values
    offsets = steps - centres[:, None]  # [M, M]: of each step from the centre of each neighbourhood
    spread = (weights * offsets**2).sum(axis=1)
    slopes = (weights * offsets * (values - means[:, None])).sum(axis=1) / np.where(spread > 0, spread, 1.0)
    return np.stack([steps, means + slopes * (steps - centres)], axis=1)


def _thin(points: Floats) -> Floats:
    """Return at most `_CURVE_POINTS` evenly spaced points, including the first and the last."""
    if len(points) <= _CURVE_POINTS:
        return points
    return np.asarray(points[np.linspace(0, len(points) - 1, _CURVE_POINTS).round().astype(int)])


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in low..high, where low < high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Floats) -> tuple[float, float]:
    """Return the range of the y axis: that of the values with a margin, never empty."""
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) if high - low > 1e-9 * max(1.0, abs(high)) else max(abs(high) * 0.1, 1e-3)
    # The margin must not make the axis of a quantity without negative values negative.
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _tick_label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value + 0.0:.4g}"


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of a chart."""

    name: str
    points: Floats
    """[N, 2], in order."""
    noisy: bool = False
    """Draw the points with a smoothed line through them."""
    labels: tuple[str, ...] = ()
    """Text beside each point."""


@dataclass(frozen=True, slots=True)
class _Box:
    """The chart's size and the margins around its plot."""

    width: int = 520
    height: int = 280
    left: int = 66
    right: int = 24
    top: int = 14
    bottom: int = 44

    @property
    def base(self) -> int:
        """Height of the x axis."""
        return self.height - self.bottom


def chart(heading: str, lines: Sequence[Curve], *, x: str, y: str, whole: bool = False, legend: bool = True) -> Markup:
    """Draw a chart as a card with inline SVG.

    Args:
        heading: of the card.
        lines: the curves; at least one point in all.
        x, y: labels of the axes.
        whole: label the x axis at whole numbers only.
        legend: name the curves in the heading.
    """
    box = _Box()
    points = np.concatenate([line.points for line in lines])
    first, last = min(0.0, float(points[:, 0].min())), float(points[:, 0].max())
    if first == last:
        last += 1
    low, high = _range(points[:, 1])

    def across(value: float) -> float:
        return round(box.left + (value - first) / (last - first) * (box.width - box.left - box.right), 1)

    def up(value: float) -> float:
        return round(box.base - (value - low) / (high - low) * (box.base - box.top), 1)

    def place(some: Floats) -> list[tuple[float, float]]:
        return [(across(a), up(b)) for a, b in some]

    def drawn(index: int, line: Curve) -> dict[str, Any]:
        smoothed = line.noisy and len(line.points) >= 8
        labels = []
        for (a, b), label in zip(line.points, line.labels, strict=False):
            # Labels extend towards the middle, so that none leaves the chart.
            anchor, offset = ("end", -7) if across(a) > 0.6 * box.width else ("start", 7)
            labels.append((across(a) + offset, up(b) - 5, anchor, label))
        return {
            "name": line.name,
            "colour": _COLOURS[index % len(_COLOURS)],
            "smoothed": smoothed,
            "dots": place(_thin(line.points)) if smoothed or len(line.points) <= 60 else [],
            "line": place(_smooth(line.points) if smoothed else _thin(line.points)) if len(line.points) > 1 else [],
            "labels": labels,
        }

    ends = "; ".join(f"{line.name} ends at {line.points[-1, 1]:.4g}" for line in lines)
    return render(
        "chart.html",
        heading=heading,
        summary=f"{heading} by {x}: {ends}",
        x=x,
        y=y,
        legend=legend,
        box=box,
        y_ticks=[(up(tick), _tick_label(tick)) for tick in _ticks(low, high)],
        x_ticks=[(across(tick), _tick_label(tick)) for tick in _ticks(first, last) if not whole or tick == round(tick)],
        curves=[drawn(index, line) for index, line in enumerate(lines)],
    )


def threshold_chart(
    curves: Mapping[str, Mapping[str, Sequence[Any]]], metrics: Sequence[Metric] = STANDARD_METRICS
) -> Markup:
    """Draw scores by probability threshold: the first metric, and for one system also the second.
    Without any score it is empty.

    Args:
        curves: by system name, the `curve` of `dcris.evaluation.analysis.analyse`.
        metrics: of the protocol.
    """
    several = len(curves) > 1
    first = metrics[0]
    names = {first.key: ""} if several else {metric.key: metric.title for metric in metrics[:2]}
    lines = [
        Curve(f"{system} {name}".strip(), points)
        for system, curve in curves.items()
        for key, name in names.items()
        if len(points := _known_points(curve["thresholds"], curve[key]))
    ]
    if not lines:
        return Markup()
    return chart(
        "Score by threshold",
        lines,
        x="probability threshold of the mask",
        y=f"{first.title if several else 'score'} in percent",
    )


def _known_points(thresholds: Sequence[float], scores: Sequence[float | None]) -> Floats:
    """Return the points of a curve [N, 2], without those that nothing counts for."""
    return np.array([pair for pair in zip(thresholds, scores, strict=True) if pair[1] is not None], np.float64)
