"""Several systems in one HTML file: their scores, their differences, and what they answered side by side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcris.evaluation.analysis import METRICS
from dcris.evaluation.report.charts import threshold_chart
from dcris.evaluation.report.evaluation_report import GROUPINGS, NOTE_INTERVALS, header
from dcris.evaluation.report.html import interval, number, percent, text, write_page
from dcris.evaluation.report.panels import Panel, panels_section

TITLES = {"miou": "mIoU", "oiou": "oIoU", **{key: key.capitalize() for key in METRICS if key.startswith("prec@")}}
"""Of the metrics, as the field writes them."""

_NOTE_PAIRED = (
    "Differences are in percentage points, and their intervals are paired: both systems are scored on the same drawn "
    "photographs. Coloured are those whose interval does not hold 0. Of twenty intervals one misses by chance, so a single "
    "coloured one among many rows proves little."
)


def write_comparison_report(
    path: Path,
    *,
    title: str,
    comparison: Mapping[str, Any],
    measured: Mapping[str, Any],
    panels: Mapping[str, Iterable[Panel]],
) -> None:
    """Write a comparison as one HTML file, atomically. All text is escaped.

    Args:
        path: the .html file; its directory is created.
        title: the heading.
        comparison: what `dcris.evaluation.compare.compare` gives.
        measured: `dataset`, `split_by`, `split` and `protocol`.
        panels: examples by heading.

    Raises DcrisError where the file cannot be written.
    """
    curves = {each["name"]: each["curve"] for each in comparison["systems"] if "curve" in each}
    parts = [
        header(title, {**measured, **{key: comparison[key] for key in ("references", "expressions")}}),
        _table(comparison),
        f'<section class="columns">{threshold_chart(curves)}</section>' if curves else "",
        *(panels_section(heading, some) for heading, some in panels.items()),
        f"<footer><h2>Notes</h2><p>{NOTE_INTERVALS}</p><p>{_NOTE_PAIRED}</p></footer>",
    ]
    write_page(path, title, parts)


def _table(comparison: Mapping[str, Any]) -> str:
    """All scores: a row for each metric and group, a column for each system and each difference from the first."""
    first, *others = comparison["systems"]
    head, columns = [text(first["name"])], [[_score(*figure) for figure in _figures(first)]]
    for system, change in zip(others, comparison["differences"], strict=True):
        head += [text(system["name"]), f"{text(system['name'])}<br>minus {text(change['minus'])}"]
        columns += [[_score(*figure) for figure in _figures(system)], [_change(*figure) for figure in _figures(change)]]
    cells = zip(*columns, strict=True)
    body = []
    for heading, labels in _labels(first):
        body.append(f'<tr><th class="part" scope="rowgroup" colspan="{len(columns) + 1}">{heading}</th></tr>')
        body += [f'<tr><th scope="row">{label}</th>{"".join(next(cells))}</tr>' for label in labels]
    titles = "".join(f'<th class="figure" scope="col">{name}</th>' for name in head)
    return (
        f'<section class="card"><div class="scroll"><table class="scores"><thead><tr><td></td>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _labels(system: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The table's parts, each with its rows' names, as HTML."""
    yield "All phrases", [TITLES[key] for key in METRICS]
    for grouping, (heading, _, hint) in GROUPINGS.items():
        if groups := system[grouping]:
            counts = [f"{text(each['name'])} <small>{number(each['expressions'])}</small>" for each in groups]
            yield f"{heading}: mIoU <small>{hint}</small>", counts


def _figures(described: Mapping[str, Any]) -> Iterator[tuple[float, Sequence[float] | None]]:
    """The values of a column with their intervals, in the order of the rows."""
    for key in METRICS:
        yield described[key], described["intervals"].get(key)
    for grouping in GROUPINGS:
        for group in described[grouping]:
            yield group["miou"], group["intervals"].get("miou")


def _score(value: float, bounds: Sequence[float] | None) -> str:
    return f'<td class="figure">{percent(value)}{_below(bounds)}</td>'


def _change(value: float, bounds: Sequence[float] | None) -> str:
    sure = "" if bounds is None or bounds[0] <= 0 <= bounds[1] else " good" if value > 0 else " poor"
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""
    return f'<td class="figure"><span class="change{sure}">{sign}{abs(value):.1f}</span>{_below(bounds)}</td>'


def _below(bounds: Sequence[float] | None) -> str:
    return f'<div class="interval">{interval(bounds)}</div>' if bounds else ""
