"""Curves as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcris.evaluation.report.html import text

Floats = NDArray[np.float64]

_CURVE_POINTS = 300  # drawn per curve; a log may have a hundred thousand lines


def series(curve: Sequence[Mapping[str, float]], key: str) -> Floats:
    """[N, 2] of step and value, in order of steps (a resumed run's log may repeat some); only finite values."""
    pairs = [
        (float(line["step"]), float(line[key]))
        for line in curve
        if line.get("step") is not None and line.get(key) is not None
    ]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return np.asarray(points[np.argsort(points[:, 0], kind="stable")], np.float64)


def _smooth(points: Floats) -> Floats:
    """[M, 2]: at each place a straight line fitted to its surroundings, about 1/40 of the run; M is at most `_CURVE_POINTS`.

    Unlike a running mean it neither lags nor flattens the steep beginning of a loss.
    """
    groups = np.array_split(points, min(len(points), _CURVE_POINTS))
    steps, values = np.array([group.mean(axis=0) for group in groups]).T
    places = np.arange(len(steps))
    weights = np.exp(-0.5 * ((places[:, None] - places) / max(1.0, len(places) / 40)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    middles, means = weights @ steps, weights @ values
    away = steps - middles[:, None]  # [M, M]: of each step from the middle of each surroundings
    spread = (weights * away**2).sum(axis=1)
    slopes = (weights * away * (values - means[:, None])).sum(axis=1) / np.where(spread > 0, spread, 1.0)
    return np.stack([steps, means + slopes * (steps - middles)], axis=1)


def _thin(points: Floats) -> Floats:
    """At most `_CURVE_POINTS` of the points, evenly chosen, first and last among them."""
    if len(points) <= _CURVE_POINTS:
        return points
    return np.asarray(points[np.linspace(0, len(points) - 1, _CURVE_POINTS).round().astype(int)])


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie in low..high, where low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values: Floats) -> tuple[float, float]:
    """Smallest and largest value with a little air; something around the value where all are the same."""
    low, high = float(values.min()), float(values.max())
    air = 0.05 * (high - low) if high - low > 1e-9 * max(1.0, abs(high)) else max(abs(high) * 0.1, 1e-3)
    # A quantity that is never negative keeps an axis that is not, either.
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def _tick_label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value + 0.0:.4g}"


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart."""

    name: str
    points: Floats
    """[N, 2], in order."""
    noisy: bool = False
    """Drawn as points with a smoothed line through them."""
    labels: tuple[str, ...] = ()
    """Written beside the points, one each."""


def chart(heading: str, lines: Sequence[Line], *, x: str, y: str, whole: bool = False, legend: bool = True) -> str:
    """A chart as a card with inline SVG, each line in its place's colour; an x axis of `whole` numbers gets no others."""
    width, height, left, right, top, bottom = 520, 280, 56, 24, 14, 44
    everything = np.concatenate([line.points for line in lines])
    first, last = min(0.0, float(everything[:, 0].min())), float(everything[:, 0].max())
    if first == last:
        last += 1
    low, high = _range(everything[:, 1])

    def across(value: float) -> float:
        return left + (value - first) / (last - first) * (width - left - right)

    def up(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - top - bottom)

    base = height - bottom
    marks = []
    for tick in _ticks(low, high):
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        marks.append(f'<text x="{left - 8}" y="{up(tick) + 4.5:.1f}" text-anchor="end">{_tick_label(tick)}</text>')
    for tick in _ticks(first, last):
        if not whole or tick == round(tick):
            at = f"{across(tick):.1f}"
            marks.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{base}" y2="{base + 5}"/>')
            marks.append(f'<text x="{at}" y="{base + 20}" text-anchor="middle">{_tick_label(tick)}</text>')
    marks.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    middle, side = (left + width - right) / 2, (top + base) / 2
    marks.append(f'<text class="unit" x="{middle}" y="{height - 4}" text-anchor="middle">{text(x)}</text>')
    turn = f'transform="rotate(-90 14 {side})"'
    marks.append(f'<text class="unit" x="14" y="{side}" text-anchor="middle" {turn}>{text(y)}</text>')
    for place, line in enumerate(lines):
        smoothed = line.noisy and len(line.points) >= 8
        shape = f'class="{line_class(place)}'
        if smoothed or len(line.points) <= 60:
            dots, radius = ("raw", 1.8) if smoothed else ("point", 3)
            marks += [
                f'<circle {shape} {dots}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="{radius}"/>'
                for a, b in _thin(line.points)
            ]
        if len(line.points) > 1:
            drawn = _smooth(line.points) if smoothed else _thin(line.points)
            trace = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in drawn)
            marks.append(f'<polyline {shape}" points="{trace}"/>')
        for (a, b), label in zip(line.points, line.labels, strict=False):
            # Towards the middle, so that no label leaves the picture.
            end, away = ("end", -7) if across(a) > 0.6 * width else ("start", 7)
            marks.append(
                f'<text x="{across(a) + away:.1f}" y="{up(b) - 5:.1f}" text-anchor="{end}">{text(label)}</text>'
            )
    names = "".join(
        f'<span class="key {line_class(place)}">{text(line.name)}</span>' for place, line in enumerate(lines) if legend
    )
    ends = "; ".join(f"{line.name} ends at {line.points[-1, 1]:.4g}" for line in lines)
    return (
        f'<div class="card"><h2>{text(heading)} <small>{names}</small></h2>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(f"{heading} by {x}: {ends}")}">'
        f"{''.join(marks)}</svg></div>"
    )


def line_class(place: int) -> str:
    """The style's class for the line at that place; there are six."""
    return "abcdef"[place % 6]


def threshold_chart(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The mIoU by the threshold on the probability; of one system also the oIoU.

    Args:
        curves: for each system's name what `dcris.evaluation.analysis.analyse` gives as its `curve`.
    """
    several = len(curves) > 1
    names = {"miou": ""} if several else {"miou": "mIoU", "oiou": "oIoU"}
    lines = [
        Line(f"{system} {name}".strip(), np.column_stack([curve["thresholds"], curve[key]]))
        for system, curve in curves.items()
        for key, name in names.items()
    ]
    return chart(
        "By threshold",
        lines,
        x="probability over which a pixel is the object's",
        y=f"{'mIoU' if several else 'IoU'} in percent",
    )
