"""An evaluation in one HTML file: what was measured, how training went, and what the model sees."""

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcris.config import RunConfig
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.report.charts import Line, chart, series, threshold_chart
from dcris.evaluation.report.html import interval, number, percent, text, write_page
from dcris.evaluation.report.panels import Panel, as_panel, panels_section, pick
from dcris.models.segmentation import ReferringSegmenter


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    panels: Mapping[str, Iterable[Panel]],
    notes: Sequence[str],
) -> None:
    """Write the report atomically to `path`. All text is escaped; a part without content is left out.

    Args:
        path: the .html file; its directory is created.
        title: the heading.
        facts: short pairs about the run, shown in their order.
        metrics: a result file's content, in percent: `miou`, `oiou`, `prec@0.5` ..., `miou_shuffled`, what they were measured
            on (`dataset`, `split_by`, `split`, `protocol`, `references`, `expressions`), and `analysis`, as
            `dcris.evaluation.analysis.analyse` gives it. Any other number or text joins the facts.
        curve: lines of the training log, each with `step` and, where they were measured, `loss`, `iou` and `val_first_miou`,
            the last two in percent. Values that are not finite are passed over.
        panels: examples by heading, in the order in which they are shown.
        notes: plain sentences for the end.

    Raises DcrisError where the file cannot be written.
    """
    analysis = metrics.get("analysis", {})
    intervals = analysis.get("intervals", {})
    parts = [
        header(title, metrics),
        _headline(metrics, intervals),
        _bars_section(metrics, analysis),
        _charts_section(analysis, curve),
        *(panels_section(heading, some) for heading, some in panels.items()),
        _facts_section(facts, metrics),
        _notes_section([*notes, NOTE_INTERVALS] if intervals else notes),
    ]
    write_page(path, title, parts)


def write_evaluation_report(
    path: Path,
    *,
    title: str,
    answers: Sequence[EvalResult],
    metrics: Mapping[str, Any],
    config: RunConfig | None = None,
    model: ReferringSegmenter | None = None,
    curve: Sequence[dict[str, Any]] = (),
) -> None:
    """The report of one model's answers on one split, or of anybody's (then without `config` and `model`), as one HTML file.

    Args:
        path, title, metrics, curve: as of `write_report`.
        answers: some are shown, so their photographs are read.
        config: of the run that trained the model.
        model: its weights are counted.

    Raises DcrisError where a photograph cannot be read or the file not be written.
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
    tiny = config is not None and config.model.vision.name.startswith("tiny")
    write_report(
        path,
        title=title,
        facts=facts,
        metrics=metrics,
        curve=curve,
        # Made one by one while the page is put together: a panel holds its whole photograph.
        panels={
            heading: (as_panel({"prediction": answer}) for answer in some) for heading, some in pick(answers).items()
        },
        notes=(_NOTE_TINY,) if tiny else (),
    )


_NOTE_TINY = (
    "The towers of this model are tiny, and were pretrained on generated scenes by supervision on their attributes. They know "
    "nothing of photographs, and these figures say nothing about the paper's model."
)


NOTE_INTERVALS = (
    "Intervals are 95% bootstrap intervals: photographs, each with all its phrases, are drawn anew a thousand times. They say "
    "how far a score depends on which photographs are in the split, not what another training seed would give."
)

_KIND_HINT = (
    "What tells the object apart: known for generated scenes, else looked up in a list of words, and then a phrase may be of "
    "several kinds."
)
_SIZE_HINT = "COCO's sizes: small up to 32 by 32 pixels of the photograph, medium up to 96 by 96."
GROUPINGS = {
    "by_kind": ("By kind of phrase", "Kind", _KIND_HINT),
    "by_length": ("By length of the phrase", "Words", ""),
    "by_size": ("By size of the object", "Size", _SIZE_HINT),
}
"""Heading, column and hint of the analysis's groupings."""


# --- parts of the page ------------------------------------------------------------------------------------------------


def header(title: str, metrics: Mapping[str, Any]) -> str:
    """The heading, and a sentence on what was measured, from a result file's content."""
    counts = [f"{text(number(metrics[key]))} {key}" for key in ("expressions", "references") if key in metrics]
    places = [f"<b>{text(str(metrics[key]))}</b>" for key in ("dataset", "split_by", "split") if metrics.get(key)]
    sentence = "Measured on " + " for ".join(counts) if counts else ""
    if places:
        sentence += (" of " if sentence else "Measured on ") + ", ".join(places)
    if sentence and metrics.get("protocol"):
        sentence += f" by protocol <b>{text(str(metrics['protocol']))}</b>"
    return f"<header><h1>{text(title)}</h1>" + (f"<p>{sentence}.</p>" if sentence else "") + "</header>"


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


def _headline(metrics: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> str:
    tiles = [
        f'<div class="tile{" control" if key == "miou_shuffled" else ""}"><h3>{name}</h3>'
        f'<p class="value">{percent(metrics[key])}</p>'
        + (f'<p class="interval">95%: {interval(intervals[key])}</p>' if key in intervals else "")
        + f'<p class="hint">{hint}</p></div>'
        for key, (name, hint) in _HEADLINE.items()
        if key in metrics
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


@dataclass(frozen=True, slots=True)
class _Bar:
    """A row of a table of percentages."""

    name: str
    value: float | int | str
    interval: Sequence[float] | None
    others: tuple[str, ...] = ()
    """Further columns, as HTML."""


def _bars_section(metrics: Mapping[str, Any], analysis: Mapping[str, Any]) -> str:
    tables = []
    for key, (heading, column, hint) in GROUPINGS.items():
        if groups := analysis.get(key):
            rows = [
                _Bar(
                    group["name"],
                    group["miou"],
                    group["intervals"].get("miou"),
                    (percent(group["oiou"]), text(number(group["expressions"]))),
                )
                for group in groups
            ]
            tables.append(_bars(heading, (column, "mIoU", "oIoU", "Phrases"), rows, hint))
    thresholds = [key for key in metrics if key.startswith("prec@")]
    if thresholds:
        intervals = analysis.get("intervals", {})
        rows = [_Bar(f"over {key.removeprefix('prec@')}", metrics[key], intervals.get(key)) for key in thresholds]
        tables.append(_bars("By overlap reached", ("IoU", "Share of the phrases"), rows))
    return f'<section class="columns">{"".join(tables)}</section>' if tables else ""


def _bars(heading: str, columns: Sequence[str], rows: Sequence[_Bar], hint: str = "") -> str:
    """A table whose second column is a bar of a percentage with its interval."""
    spans = any(row.interval for row in rows)
    body = []
    for row in rows:
        mark = ""
        if row.interval:
            low, high = (_share(bound) for bound in row.interval)
            mark = f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b>'
        body.append(
            f'<tr><th scope="row">{text(row.name)}</th>'
            f'<td class="track"><div><i style="width:{_share(row.value):.1f}%"></i>{mark}</div></td>'
            f'<td class="figure">{percent(row.value)}</td>'
            + (f'<td class="figure quiet">{interval(row.interval) if row.interval else ""}</td>' if spans else "")
            + "".join(f'<td class="figure quiet">{other}</td>' for other in row.others)
            + "</tr>"
        )
    first, second, *last = columns
    head = (
        f'<th scope="col">{first}</th><th colspan="2" scope="col">{second}</th>'
        + ('<th class="figure" scope="col">95%</th>' if spans else "")
        + "".join(f'<th class="figure" scope="col">{name}</th>' for name in last)
    )
    below = f'<p class="hint">{hint}</p>' if hint else ""
    return (
        f'<div class="card"><h2>{heading}</h2><div class="scroll"><table class="bars"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{below}</div>"
    )


def _share(value: float | int | str) -> float:
    """A percentage as a length from 0 to 100."""
    return min(100.0, max(0.0, value)) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _charts_section(analysis: Mapping[str, Any], curve: Sequence[Mapping[str, float]]) -> str:
    charts = [threshold_chart({"": analysis["curve"]})] if "curve" in analysis else []
    loss = series(curve, "loss")
    if len(loss):
        charts.append(chart("Loss", [Line("training loss", loss, noisy=True)], x="step", y="loss", whole=True))
    shares = [
        Line(name, points, noisy)
        for key, name, noisy in (
            ("iou", "training", True),
            ("val_first_miou", "validation mIoU (first sentences)", False),
        )
        if len(points := series(curve, key))
    ]
    if shares:
        charts.append(chart("Overlap", shares, x="step", y="IoU in percent", whole=True))
    return f'<section class="columns">{"".join(charts)}</section>' if charts else ""


def _facts_section(facts: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    shown = {"dataset", "split_by", "split", "protocol", "references", "expressions", *_HEADLINE}
    # A result file may hold more than single values, as the scores by kind, which have their own table.
    rest = {
        key.replace("_", " "): value
        for key, value in metrics.items()
        if key not in shown and "@" not in key and isinstance(value, int | float | str)
    }
    known = {name.casefold() for name in facts}
    pairs = [(name, str(value)) for name, value in facts.items()]
    pairs += [(name, number(value)) for name, value in rest.items() if name.casefold() not in known]
    if not pairs:
        return ""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<section class="card"><h2>The run</h2><dl>{items}</dl></section>'


def _notes_section(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<footer><h2>Notes</h2>{''.join(f'<p>{text(note)}</p>' for note in notes)}</footer>"
