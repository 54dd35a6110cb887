"""The report of an evaluation: scores, curves of the training, and examples."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from dcris.config import RunConfig
from dcris.evaluation.confidence import assess
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import STANDARD_METRICS, Metric
from dcris.evaluation.report.charts import Curve, chart, series, threshold_chart
from dcris.evaluation.report.html import number, percent, write_page
from dcris.evaluation.report.panels import Panel, make_panel, render_panels, select_results
from dcris.models.segmentation import ReferringSegmenter

NOTE_INTERVALS = (
    "Intervals are 95% bootstrap intervals over images, each drawn with all its expressions. They show how much a score "
    "depends on the images of the split, not how much it varies between training seeds."
)
_NOTE_TINY = (
    "The encoders of this model are tiny and were pretrained on generated scenes with their attributes as labels. They "
    "have never seen photographs, so these scores say nothing about the paper's model."
)
_KIND_HINT = (
    "What identifies the object. It is known for generated scenes; for others it is looked up in word lists, and an "
    "expression may be of several kinds."
)
_SIZE_HINT = "COCO's sizes: small up to 32 x 32 pixels of the image, medium up to 96 x 96."
GROUPINGS = {
    "by_kind": ("By kind of expression", "Kind", _KIND_HINT),
    "by_length": ("By length of the expression", "Words", ""),
    "by_size": ("By size of the object", "Size", _SIZE_HINT),
    "by_subset": ("By subset of the data set", "Subset", "As the data set's authors divide it."),
    "by_category": ("By category of the object", "Category", ""),
}
"""Heading, column title and hint of each grouping of `analyse`."""

_EXCHANGED = Metric(
    "miou_shuffled",
    "Expressions exchanged",
    lambda overlaps: overlaps.iou,
    description="mIoU with each expression exchanged for that of another object of its scene. Low is good: the model "
    "uses the expression, not only the image.",
)
_MEASURED = ("dataset", "split_by", "split", "protocol", "references", "expressions")


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    record: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    panels: Mapping[str, Iterable[Panel]],
    notes: Sequence[str],
    metrics: Sequence[Metric] = STANDARD_METRICS,
    opening: Mapping[str, Iterable[Panel]] = MappingProxyType({}),
    confidence: Mapping[str, Any] | None = None,
) -> None:
    """Write a report to `path` atomically. Parts without content are left out.

    Args:
        path: the .html file; its directory is created.
        title: the heading.
        facts: names and values about the run, in order.
        record: content of a result file: the metrics in percent, None being shown as a dash, what
            they were measured on, and optionally `miou_shuffled` and `analysis` (from `analyse`).
            Other numbers and texts are added to the facts.
        log: lines of the training log, each with `step` and optionally `loss`, `iou` and
            `val_first_miou` (the last two in percent). Values that are not finite are left out.
        panels: examples by heading.
        notes: sentences for the end of the page.
        metrics: of the protocol.
        opening: examples by heading that stand before the scores.
        confidence: of dcris.evaluation.confidence.assess.

    Raises:
        DcrisError: if the file cannot be written.
    """
    analysis = record.get("analysis", {})
    intervals = analysis.get("intervals", {})
    write_page(
        path,
        "evaluation.html",
        title=title,
        measured={
            **dict.fromkeys(("dataset", "split_by", "split", "protocol")),
            **{key: record[key] for key in _MEASURED if key in record},
        },
        tiles=_tiles(record, intervals, metrics),
        opening=[render_panels(heading, some) for heading, some in opening.items()],
        tables=[*_tables(record, analysis, metrics), *_confidence_tables(confidence or {})],
        charts=[*_charts(analysis, log, metrics), *_confidence_charts(confidence or {})],
        examples=[render_panels(heading, some) for heading, some in panels.items()],
        facts=_facts(facts, record, metrics),
        notes=[*notes, NOTE_INTERVALS] if intervals else notes,
    )


def write_evaluation_report(
    path: Path,
    *,
    title: str,
    results: Sequence[EvalResult],
    record: Mapping[str, Any],
    config: RunConfig | None = None,
    model: ReferringSegmenter | None = None,
    log: Sequence[dict[str, Any]] = (),
    metrics: Sequence[Metric] = STANDARD_METRICS,
    opening: Mapping[str, Iterable[Panel]] = MappingProxyType({}),
) -> None:
    """Write the report of results on one split.

    Args:
        path, title, record, log, metrics, opening: as in `write_report`.
        results: of the split; the images of those that are shown are read.
        config: of the run that trained the model; None if only masks are known.
        model: whose weights are counted; None if only masks are known.

    Raises:
        DcrisError: if an image cannot be read or the file cannot be written.
    """
    facts = {}
    if config is not None:
        facts["recipe"] = config.recipe
    if model is not None:
        counts = model.count_weights()
        facts["trainable adapter weights"] = f"{counts['adapters']:,}"
        facts["trainable head weights"] = f"{counts['head']:,}"
        facts["frozen weights"] = f"{counts['frozen']:,}"
        facts["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    confidence = assess(results)
    tiny = config is not None and config.model.vision.name.startswith("tiny")
    write_report(
        path,
        title=title,
        facts=facts,
        record=record,
        log=log,
        # A generator, because a panel holds its image at full size until it is rendered.
        panels={
            heading: (make_panel({"prediction": result}) for result in some)
            for heading, some in select_results(results).items()
        },
        notes=(_NOTE_TINY,) if tiny else (),
        metrics=metrics,
        opening=opening,
        confidence=confidence,
    )


def _tiles(
    record: Mapping[str, Any], intervals: Mapping[str, Sequence[float]], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Return the scores shown large: metrics with a description, and the control."""
    return [
        {
            "title": metric.title,
            "value": record[metric.key],
            "interval": intervals.get(metric.key),
            "description": metric.description,
            "control": metric is _EXCHANGED,
        }
        for metric in (*metrics, _EXCHANGED)
        if metric.description and metric.key in record
    ]


def _tables(record: Mapping[str, Any], analysis: Mapping[str, Any], metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return the tables of groups of expressions, and of all metrics but the first two."""
    first, second, *others = metrics
    tables = []
    for key, (heading, column, hint) in GROUPINGS.items():
        rows = [
            {
                "name": group["name"],
                "value": group.get(first.key),
                "interval": group["intervals"].get(first.key),
                "others": (percent(group.get(second.key)), number(group["expressions"])),
            }
            for group in analysis.get(key, ())
        ]
        tables.append(_table(heading, (column, first.title, second.title, "Count"), rows, hint))
    intervals = analysis.get("intervals", {})
    rows = [
        {
            "name": metric.title,
            "value": record[metric.key],
            "interval": intervals.get(metric.key),
            "others": (),
        }
        for metric in others
        if metric.key in record
    ]
    tables.append(_table("Other metrics", ("Metric", "Percent"), rows))
    return [table for table in tables if table["rows"]]


def _table(heading: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], hint: str = "") -> dict[str, Any]:
    """Return the template's variables of a table whose second column is a bar of a percentage."""
    return {
        "heading": heading,
        "columns": columns,
        "rows": rows,
        "hint": hint,
        "with_intervals": any(row["interval"] for row in rows),
    }


_QUANTITIES = {
    "score": "Score: IoU above 0.5",
    "present": "Presence: the object is there",
}
"""What each part of `assess` predicts."""


def _confidence_tables(confidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table of what the scores tell, if they are known."""
    rows = [
        {"name": f"{name}: {title}", "value": 100 * confidence[key][measure], "interval": None, "others": ()}
        for key, name in _QUANTITIES.items()
        if key in confidence
        for measure, title in (("auroc", "AUROC"), ("ece", "calibration error"))
        if confidence[key][measure] is not None
    ]
    rows += [
        {"name": f"{_QUANTITIES['present']}: AUROC, {kind}", "value": 100 * value, "interval": None, "others": ()}
        for kind, value in confidence.get("present", {}).get("by_kind", {}).items()
    ]
    hint = (
        "AUROC: how often a right one scores higher than a wrong one; 50% is chance. Calibration error: mean difference "
        "of score and share of right ones, in ten bins."
    )
    if cut := confidence.get("min_score"):
        hint += (
            f" Recommended: --min-score {cut['value']:.3g}, which keeps {cut['kept']:.1%} of the right ones and "
            f"drops {cut['dropped']:.1%} of the wrong ones of this split."
        )
    return [_table("What the score tells", ("Measure", "Percent"), rows, hint)] if rows else []


def _confidence_charts(confidence: Mapping[str, Any]) -> list[Markup]:
    """Draw the reliability diagrams."""
    diagonal = Curve("calibrated", np.array([(0.0, 0.0), (1.0, 1.0)]))
    return [
        chart(
            f"Reliability. {name}",
            [
                Curve("measured", np.array([(each["mean"], each["share"]) for each in confidence[key]["bins"]])),
                diagonal,
            ],
            x="mean score of the bin",
            y="share of right ones",
        )
        for key, name in _QUANTITIES.items()
        if key in confidence
    ]


def _charts(analysis: Mapping[str, Any], log: Sequence[Mapping[str, float]], metrics: Sequence[Metric]) -> list[Markup]:
    """Draw the threshold curve and the training log."""
    charts = [threshold_chart({"": analysis["curve"]}, metrics)] if "curve" in analysis else []
    loss = series(log, "loss")
    if len(loss):
        charts.append(chart("Loss", [Curve("training loss", loss, noisy=True)], x="step", y="loss", whole=True))
    shares = [
        Curve(name, points, noisy)
        for key, name, noisy in (
            ("iou", "training", True),
            ("val_first_miou", "validation mIoU (first sentences)", False),
        )
        if len(points := series(log, key))
    ]
    if shares:
        charts.append(chart("IoU", shares, x="step", y="IoU in percent", whole=True))
    return charts


def _facts(facts: Mapping[str, str], record: Mapping[str, Any], metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """Return names and values about the run; single values of the record follow the given facts."""
    shown = {*_MEASURED, _EXCHANGED.key, *(metric.key for metric in metrics)}
    rest = {
        key.replace("_", " "): value
        for key, value in record.items()
        if key not in shown and isinstance(value, int | float | str)
    }
    if seen := record.get("trained_on"):
        rest["images trained on"] = f"{seen['images']:,} of {seen['of']:,}"
    known = {name.casefold() for name in facts}
    return [
        *((name, str(value)) for name, value in facts.items()),
        *((name, number(value)) for name, value in rest.items() if name.casefold() not in known),
    ]
