"""The report of a comparison: scores of several systems, their differences, and examples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcris.evaluation.metrics import STANDARD_METRICS, Metric
from dcris.evaluation.report.charts import threshold_chart
from dcris.evaluation.report.evaluation_report import GROUPINGS, NOTE_INTERVALS
from dcris.evaluation.report.html import write_page
from dcris.evaluation.report.panels import Panel, render_panels

_NOTE_PAIRED = (
    "Differences are in percentage points. Their intervals are paired: both systems are scored on the same drawn images. "
    "Differences are coloured if their interval does not contain 0. One interval in twenty does not by chance alone, so a "
    "single coloured value among many rows is weak evidence."
)


def write_comparison_report(
    path: Path,
    *,
    title: str,
    comparison: Mapping[str, Any],
    measured: Mapping[str, Any],
    panels: Mapping[str, Iterable[Panel]],
    metrics: Sequence[Metric] = STANDARD_METRICS,
) -> None:
    """Write a comparison as one HTML file, atomically.

    Args:
        path: the .html file; its directory is created.
        title: the heading.
        comparison: from `dcris.evaluation.compare.compare`.
        measured: `dataset`, `split_by`, `split` and `protocol`, as far as they are known.
        panels: examples by heading.
        metrics: of the protocol.

    Raises:
        DcrisError: if the file cannot be written.
    """
    curves = {each["name"]: each["curve"] for each in comparison["systems"] if "curve" in each}
    described = _described(comparison)
    write_page(
        path,
        "comparison.html",
        title=title,
        measured={
            **dict.fromkeys(("dataset", "split_by", "split", "protocol")),
            **measured,
            "references": comparison["references"],
            "expressions": comparison["expressions"],
        },
        columns=[{"name": each["name"], "minus": each.get("minus")} for each in described],
        parts_of_table=list(_parts(described, metrics)),
        charts=[threshold_chart(curves, metrics)] if curves else [],
        examples=[render_panels(heading, some) for heading, some in panels.items()],
        notes=(NOTE_INTERVALS, _NOTE_PAIRED),
    )


def _described(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the columns: the first system, then each other one and its difference."""
    first, *others = comparison["systems"]
    pairs = zip(others, comparison["differences"], strict=True)
    return [first, *(each for pair in pairs for each in pair)]


def _parts(described: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> Iterator[dict[str, Any]]:
    """Yield the parts of the table: all metrics, then the first metric by group of expressions."""
    rows = [
        {"name": metric.title, "count": None, "cells": [_cell(each, each, metric) for each in described]}
        for metric in metrics
    ]
    yield {"heading": "All expressions", "hint": "", "rows": rows}
    first = metrics[0]
    for grouping, (heading, _, hint) in GROUPINGS.items():
        rows = [
            {
                "name": groups[0]["name"],
                "count": groups[0]["expressions"],
                "cells": [_cell(each, group, first) for each, group in zip(described, groups, strict=True)],
            }
            for groups in zip(*(each.get(grouping, ()) for each in described), strict=True)
        ]
        if rows:
            yield {"heading": f"{heading}: {first.title}", "hint": hint, "rows": rows}


def _cell(column: Mapping[str, Any], scored: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """Return the template's variables of a score or a difference."""
    value, bounds = scored[metric.key], scored["intervals"].get(metric.key)
    difference = "minus" in column and value is not None
    certain = difference and bounds is not None and not bounds[0] <= 0 <= bounds[1]
    return {
        "value": value,
        "interval": bounds,
        "difference": difference,
        "quality": ("good" if value > 0 else "poor") if certain else "",
    }
