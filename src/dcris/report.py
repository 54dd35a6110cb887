"""A run in one HTML file: what was measured, how training went, and what the model sees.

The file stands alone (no script, no network, pictures inside), so it can be mailed, archived or opened without a server. Its
own content policy forbids everything else, whatever a phrase may contain.
"""

import base64
import html
import math
import os
import platform
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dcris.config import RunConfig
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.drawing import COLOURS, cell, jpeg_bytes, mask_cell, overlay, png_bytes
from dcris.engine.evaluate import Answer
from dcris.engine.evaluate import by_kind as scores_by_kind
from dcris.files import write_file
from dcris.model.dcris import DCRIS
from dcris.types import MaskArray

Floats = NDArray[np.float64]

_ORANGE, _BLUE = COLOURS[0], COLOURS[1]
TRUTH_COLOUR, PREDICTION_COLOUR = _BLUE, _ORANGE
"""Told apart by colour-blind eyes too."""

_CELL = 480  # pixels on a picture's longer side
_PNG_UP_TO = 200  # longer side: smaller pictures are drawn scenes, which JPEG would smear
_CURVE_POINTS = 300  # drawn per curve; a log may have a hundred thousand lines
_DASH = "\N{EN DASH}"


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


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float | int | str],
    by_kind: Mapping[str, tuple[float, int]],
    curve: Sequence[Mapping[str, float]],
    panels: Sequence[Panel],
    notes: Sequence[str],
) -> None:
    """Write the report atomically to `path`. All text is escaped; a part without content is left out.

    Args:
        path: the .html file; its directory is created.
        title: the heading.
        facts: short pairs about the run, shown in their order.
        metrics: a result file's content, in percent: `miou`, `oiou`, `prec@0.5` ..., `miou_shuffled`, and what they were
            measured on (`dataset`, `split`, `protocol`, `references`, `expressions`). Any other number or text joins the facts.
        by_kind: for each kind of phrase its mIoU in percent and its number of expressions.
        curve: lines of the training log, each with `step` and, where they were measured, `loss`, `iou` and `val_miou`, the last
            two in percent. Values that are not finite are passed over.
        panels: examples in the order in which they are shown.
        notes: plain sentences for the end.

    Raises DcrisError where the file cannot be written, ValueError where a panel's masks do not have its image's shape.
    """
    parts = [
        _header(title, metrics),
        _headline(metrics),
        _bars_section(metrics, by_kind),
        _curve_section(curve),
        _panels_section(panels),
        _facts_section(facts, metrics),
        _notes_section(notes),
    ]
    page = _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(part for part in parts if part))
    # A phrase read from a damaged file may hold half a surrogate pair, which has no UTF-8 form.
    write_file(path, page.encode("utf-8", "replace"))


# --- from an evaluation -------------------------------------------------------------------------------------------------


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


def write_evaluation_report(
    path: Path,
    *,
    title: str,
    config: RunConfig,
    model: DCRIS,
    answers: Sequence[Answer],
    metrics: dict[str, Any],
    curve: Sequence[dict[str, Any]] = (),
) -> None:
    """The report of one model on one split, as one HTML file. Raises DcrisError where it cannot be written."""
    counts = model.count_weights()
    facts = {
        "recipe": config.recipe,
        "trainable adapter weights": f"{counts['adapters']:,}",
        "trainable head weights": f"{counts['head']:,}",
        "frozen weights": f"{counts['frozen']:,}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    write_report(
        path,
        title=title,
        facts=facts,
        metrics=metrics,
        by_kind=scores_by_kind(answers),
        curve=curve,
        panels=pick_panels(answers),
        notes=(_NOTE_TINY,) if config.model.vision.name.startswith("tiny") else (),
    )


_NOTE_TINY = (
    "The towers of this model are tiny, and were pretrained on generated scenes by supervision on their attributes. They know "
    "nothing of photographs, and these figures say nothing about the paper's model."
)


# --- parts of the page ------------------------------------------------------------------------------------------------


def _header(title: str, metrics: Mapping[str, float | int | str]) -> str:
    counts = [f"{_text(_number(metrics[key]))} {key}" for key in ("expressions", "references") if key in metrics]
    places = [f"<b>{_text(str(metrics[key]))}</b>" for key in ("dataset", "split") if metrics.get(key)]
    sentence = "Measured on " + " for ".join(counts) if counts else ""
    if places:
        sentence += (" of " if sentence else "Measured on ") + ", ".join(places)
    if sentence and metrics.get("protocol"):
        sentence += f" by protocol <b>{_text(str(metrics['protocol']))}</b>"
    return f"<header><h1>{_text(title)}</h1>" + (f"<p>{sentence}.</p>" if sentence else "") + "</header>"


_HEADLINE = {
    "miou": (
        "mIoU",
        "How far the predicted and the true mask overlap (intersection over union), averaged over the phrases.",
    ),
    "oiou": ("oIoU", "All intersections added up, over all unions added up: large objects count for more."),
    "prec@0.5": ("Prec@0.5", "Share of the phrases whose mask overlaps the true one by more than half."),
    "miou_shuffled": (
        "Phrases exchanged",
        "The mIoU with every phrase exchanged for that of another object of its scene. Low is good: it shows that the phrase "
        "decides, not the picture alone.",
    ),
}


def _headline(metrics: Mapping[str, float | int | str]) -> str:
    tiles = [
        f'<div class="tile{" control" if key == "miou_shuffled" else ""}"><h3>{name}</h3>'
        f'<p class="value">{_percent(metrics[key])}</p><p class="hint">{hint}</p></div>'
        for key, (name, hint) in _HEADLINE.items()
        if key in metrics
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _bars_section(metrics: Mapping[str, float | int | str], by_kind: Mapping[str, tuple[float, int]]) -> str:
    tables = []
    if by_kind:
        rows = [(_text(kind), value, _number(count)) for kind, (value, count) in by_kind.items()]
        tables.append(_bars("By kind of phrase", ("Kind", "mIoU", "Phrases"), rows))
    thresholds = [key for key in metrics if key.startswith("prec@")]
    if thresholds:
        precisions = [(f"over {_text(key.removeprefix('prec@'))}", metrics[key], None) for key in thresholds]
        tables.append(_bars("By overlap reached", ("IoU", "Share of the phrases"), precisions))
    return f'<section class="columns">{"".join(tables)}</section>' if tables else ""


def _bars(heading: str, columns: Sequence[str], rows: Iterable[tuple[str, float | int | str, str | None]]) -> str:
    """A table whose second column is a bar of a percentage; a row is its (escaped) name, percentage and count."""
    first, second, *last = (f'<th scope="col">{name}</th>' for name in columns)
    body = []
    for name, value, count in rows:
        share = min(100.0, max(0.0, value)) if isinstance(value, int | float) and math.isfinite(value) else 0.0
        body.append(
            f'<tr><th scope="row">{name}</th><td class="track"><div><i style="width:{share:.1f}%"></i></div></td>'
            f'<td class="figure">{_percent(value)}</td>'
            + (f'<td class="figure quiet">{count}</td>' if count is not None else "")
            + "</tr>"
        )
    second = second.replace("<th ", '<th colspan="2" ', 1)
    head = "".join([first, second, *(cell_.replace("<th ", '<th class="figure" ', 1) for cell_ in last)])
    return (
        f'<div class="card"><h2>{heading}</h2><table class="bars"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _curve_section(curve: Sequence[Mapping[str, float]]) -> str:
    charts = []
    loss = _series(curve, "loss")
    if len(loss):
        charts.append(_chart("Loss", "loss", [("training loss", "a", loss, True)]))
    shares = [
        (name, colour, series, smooth)
        for key, name, colour, smooth in (("iou", "training", "a", True), ("val_miou", "validation mIoU", "b", False))
        if len(series := _series(curve, key))
    ]
    if shares:
        charts.append(_chart("Overlap", "IoU in percent", shares))
    return f'<section class="columns">{"".join(charts)}</section>' if charts else ""


def _panels_section(panels: Sequence[Panel]) -> str:
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
    phrase = _text(panel.phrase)

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
        badge = f'<span class="badge {quality}">IoU {_percent(100 * panel.iou)}</span>'
    return (
        f'<article class="card"><div class="pictures">{"".join(pictures)}</div>'
        f'<p class="caption"><q dir="auto">{phrase}</q>{badge}</p></article>'
    )


def _facts_section(facts: Mapping[str, str], metrics: Mapping[str, float | int | str]) -> str:
    shown = {"dataset", "split", "protocol", "references", "expressions", *_HEADLINE}
    # A result file may hold more than single values, as the scores by kind, which have their own table.
    rest = {
        key.replace("_", " "): value
        for key, value in metrics.items()
        if key not in shown and "@" not in key and isinstance(value, int | float | str)
    }
    known = {name.casefold() for name in facts}
    pairs = [(name, str(value)) for name, value in facts.items()]
    pairs += [(name, _number(value)) for name, value in rest.items() if name.casefold() not in known]
    if not pairs:
        return ""
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in pairs)
    return f'<section class="card"><h2>The run</h2><dl>{items}</dl></section>'


def _notes_section(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<footer><h2>Notes</h2>{''.join(f'<p>{_text(note)}</p>' for note in notes)}</footer>"


# --- the learning curve -----------------------------------------------------------------------------------------------


def _series(curve: Sequence[Mapping[str, float]], key: str) -> Floats:
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


def _chart(heading: str, unit: str, lines: Sequence[tuple[str, str, Floats, bool]]) -> str:
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


# --- words and numbers ------------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    """Text that is safe in an element and in a quoted attribute. Control characters go: no HTML file may hold them."""
    return html.escape(
        "".join(letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in value)
    )


def _percent(value: float | int | str) -> str:
    if isinstance(value, str):
        return _text(value)
    return f"{value:.1f}<small>\N{NARROW NO-BREAK SPACE}%</small>" if math.isfinite(value) else _DASH


def _number(value: float | int | str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _swatch(colour: tuple[int, int, int]) -> str:
    return f'<i class="swatch" style="background:rgb{colour}"></i>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1b2430; --quiet: #5d6b7c; --line: #e1e6ec; --grid: #edf0f4;
  --a: #0b6bd8; --b: #d05c00; --track: #e9eef4;
  --good: #16794a; --good-bg: #dcf5e7; --fair: #8a5a00; --fair-bg: #fdf0cf; --poor: #b3261e; --poor-bg: #fde4e1;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #19212b; --ink: #e8edf3; --quiet: #9aa8b8; --line: #2b3643; --grid: #242e3a;
    --a: #5aa9ff; --b: #ff9d4d; --track: #273240;
    --good: #7fe0ae; --good-bg: #123b28; --fair: #f3cd77; --fair-bg: #43340d; --poor: #ff9d94; --poor-bg: #4b1a17;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 56px; display: grid; gap: 20px; }
main > * { min-width: 0; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: clamp(1.6rem, 5vw, 2.25rem); line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin-bottom: 12px; }
header p { color: var(--quiet); margin-top: 6px; overflow-wrap: anywhere; }
header b { color: var(--ink); font-weight: 600; }
section > h2 { font-size: 1.25rem; margin: 12px 0 2px; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  break-inside: avoid; min-width: 0; }
.card > h2 { margin-top: 0; font-size: 1.05rem; }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 225px), 1fr)); }
.tile h3 { font-size: .95rem; font-weight: 600; color: var(--quiet); }
.value { font-size: 2.4rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.03em; font-variant-numeric: tabular-nums; }
.value small { font-size: 1.1rem; font-weight: 500; color: var(--quiet); letter-spacing: 0; }
.hint { font-size: .85rem; line-height: 1.4; color: var(--quiet); margin-top: 4px; }
.control { border-style: dashed; }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.bars { width: 100%; border-collapse: collapse; font-size: .92rem; }
.bars th { text-align: left; font-weight: 500; padding: 5px 14px 5px 0; overflow-wrap: anywhere; }
.bars thead th { font-size: .8rem; color: var(--quiet); font-weight: 500; }
.bars td { padding: 5px 0; }
.bars .track { width: 100%; min-width: 60px; }
.track div { background: var(--track); border-radius: 5px; height: 10px; overflow: hidden; }
.track i { display: block; height: 100%; background: var(--a); border-radius: 5px; }
.bars tbody th, .figure { white-space: nowrap; }
.bars .figure { text-align: right; padding-left: 14px; padding-right: 0; font-variant-numeric: tabular-nums; }
.bars small { color: var(--quiet); }
.bars .quiet { color: var(--quiet); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 13px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--quiet); }
svg polyline { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.a { stroke: var(--a); } svg polyline.b { stroke: var(--b); }
svg circle.a { fill: var(--a); } svg circle.b { fill: var(--b); }
svg .raw { opacity: .28; }
h2 small { float: right; font-weight: 400; font-size: .82rem; color: var(--quiet); line-height: 1.6rem; }
.key { margin-left: 14px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.key.a::before { background: var(--a); } .key.b::before { background: var(--b); }
.legend { font-size: .9rem; color: var(--quiet); margin-bottom: 12px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 3px 0 0; }
.swatch:not(:first-child) { margin-left: 14px; }
.panels { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.panels .card { padding: 12px; }
.pictures { display: grid; gap: 8px; grid-template-columns: repeat(3, minmax(0, 1fr)); align-items: end; }
.pictures img { display: block; width: 100%; height: auto; max-height: 260px; object-fit: contain; border-radius: 6px; }
figcaption { font-size: .75rem; color: var(--quiet); text-align: center; margin-top: 3px; }
.caption { display: flex; gap: 12px; align-items: flex-start; justify-content: space-between; margin-top: 8px;
  padding: 0 2px; line-height: 1.4; }
.caption q { min-width: 0; overflow-wrap: anywhere; font-weight: 550; }
.badge { flex: none; font-size: .82rem; font-weight: 600; border-radius: 99px; padding: 1px 10px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.good { color: var(--good); background: var(--good-bg); }
.fair { color: var(--fair); background: var(--fair-bg); }
.poor { color: var(--poor); background: var(--poor-bg); }
dl { display: grid; gap: 12px 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); }
dt { font-size: .8rem; color: var(--quiet); }
dd { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
footer { color: var(--quiet); font-size: .92rem; max-width: 46rem; display: grid; gap: 6px; }
footer h2 { color: var(--ink); margin-bottom: 0; }
@media (max-width: 560px) {
  main { padding: 24px 14px 40px; gap: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 14px; }
  .value { font-size: 1.9rem; }
  .card { padding: 14px; }
  svg text { font-size: 15px; }
  .pictures { gap: 5px; }
}
@media print {
  :root { color-scheme: light; --page: #fff; }
  body { font-size: 12px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { padding: 0; max-width: none; display: block; }
  main > * { margin-bottom: 14px; }
  h2, .legend { break-after: avoid; }
  .panels, .columns { grid-template-columns: 1fr 1fr; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 10px; }
  .tile { padding: 10px 12px; }
}
"""
