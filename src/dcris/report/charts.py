"""Curves as inline SVG."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

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


def chart(heading: str, unit: str, lines: Sequence[tuple[str, str, Floats, bool]]) -> str:
    """One chart as inline SVG. A line is its name, colour class, points [N, 2], and whether it is noisy and needs smoothing."""
    width, height, left, right, top, bottom = 520, 280, 56, 24, 14, 44
    everything = np.concatenate([points for _, _, points, _ in lines])
    first, last = min(0.0, float(everything[:, 0].min())), float(everything[:, 0].max())
    if first == last:
        last += 1
    low, high = _range(everything[:, 1])

    def x(value: float) -> float:
        return left + (value - first) / (last - first) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - top - bottom)

    def trace(points: Floats) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    base = height - bottom
    marks = []
    for tick in _ticks(low, high):
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(f'<text x="{left - 8}" y="{y(tick) + 4.5:.1f}" text-anchor="end">{_tick_label(tick)}</text>')
    for tick in _ticks(first, last):
        if tick == round(tick):  # there is no half step
            marks.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{base}" y2="{base + 5}"/>')
            marks.append(f'<text x="{x(tick):.1f}" y="{base + 20}" text-anchor="middle">{_tick_label(tick)}</text>')
    marks.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    marks.append(
        f'<text class="unit" x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">step</text>'
    )
    middle = (top + base) / 2
    marks.append(
        f'<text class="unit" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{unit}</text>'
    )
    for _, colour, points, noisy in lines:
        smoothed = noisy and len(points) >= 8
        dots = "raw" if smoothed else "point"
        radius = 1.8 if smoothed else 3
        if smoothed or len(points) <= 60:
            marks += [
                f'<circle class="{colour} {dots}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}"/>'
                for a, b in _thin(points)
            ]
        if len(points) > 1:
            marks.append(
                f'<polyline class="{colour}" points="{trace(_smooth(points) if smoothed else _thin(points))}"/>'
            )
    names = "".join(f'<span class="key {colour}">{name}</span>' for name, colour, _, _ in lines)
    latest = "; ".join(f"{name} ends at {points[-1, 1]:.4g}" for name, _, points, _ in lines)
    return (
        f'<div class="card"><h2>{heading} <small>{names}</small></h2>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{heading} over the steps of training: {latest}">'
        f"{''.join(marks)}</svg></div>"
    )
