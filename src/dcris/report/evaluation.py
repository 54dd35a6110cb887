"""An evaluation in one HTML file: what was measured, how training went, and what the model sees."""

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dcris.config import RunConfig
from dcris.engine.evaluate import Answer
from dcris.engine.evaluate import by_kind as scores_by_kind
from dcris.model.dcris import DCRIS
from dcris.report.charts import chart, series
from dcris.report.page import number, percent, text, write_page
from dcris.report.panels import Panel, panels_section, pick_panels


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
        panels_section(panels),
        _facts_section(facts, metrics),
        _notes_section(notes),
    ]
    write_page(path, title, parts)


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
    counts = [f"{text(number(metrics[key]))} {key}" for key in ("expressions", "references") if key in metrics]
    places = [f"<b>{text(str(metrics[key]))}</b>" for key in ("dataset", "split") if metrics.get(key)]
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


def _headline(metrics: Mapping[str, float | int | str]) -> str:
    tiles = [
        f'<div class="tile{" control" if key == "miou_shuffled" else ""}"><h3>{name}</h3>'
        f'<p class="value">{percent(metrics[key])}</p><p class="hint">{hint}</p></div>'
        for key, (name, hint) in _HEADLINE.items()
        if key in metrics
    ]
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _bars_section(metrics: Mapping[str, float | int | str], by_kind: Mapping[str, tuple[float, int]]) -> str:
    tables = []
    if by_kind:
        rows = [(text(kind), value, number(count)) for kind, (value, count) in by_kind.items()]
        tables.append(_bars("By kind of phrase", ("Kind", "mIoU", "Phrases"), rows))
    thresholds = [key for key in metrics if key.startswith("prec@")]
    if thresholds:
        precisions = [(f"over {text(key.removeprefix('prec@'))}", metrics[key], None) for key in thresholds]
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
            f'<td class="figure">{percent(value)}</td>'
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
    loss = series(curve, "loss")
    if len(loss):
        charts.append(chart("Loss", "loss", [("training loss", "a", loss, True)]))
    shares = [
        (name, colour, points, smooth)
        for key, name, colour, smooth in (("iou", "training", "a", True), ("val_miou", "validation mIoU", "b", False))
        if len(points := series(curve, key))
    ]
    if shares:
        charts.append(chart("Overlap", "IoU in percent", shares))
    return f'<section class="columns">{"".join(charts)}</section>' if charts else ""


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
    pairs += [(name, number(value)) for name, value in rest.items() if name.casefold() not in known]
    if not pairs:
        return ""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<section class="card"><h2>The run</h2><dl>{items}</dl></section>'


def _notes_section(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<footer><h2>Notes</h2>{''.join(f'<p>{text(note)}</p>' for note in notes)}</footer>"
