"""The tables of `dcris ablate`: Markdown, LaTeX, and one HTML file with the scores against the trainable weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dcris.evaluation.report.charts import Line, chart
from dcris.evaluation.report.html import write_page
from dcris.experiments.paper_tables import DATA_SET, SPLITS, Row, Table
from dcris.utils.files import write_file, write_json
from dcris.utils.text_tables import latex, markdown

BUDGETS = {"steps": "Equal steps", "time": "Equal time"}
"""What is kept equal between the rows, and the heading it gets."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row's runs under one budget."""

    row: Row
    name: str
    """The row in a word, for sentences and charts."""
    cells: tuple[str, ...]
    """What names the row, in the table's own columns."""
    runs: tuple[Mapping[str, Any], ...]
    """The result of each seed; see dcris.experiments.ablate."""
    failure: str | None = None
    """Why there are no runs, or fewer than were asked for."""

    def values(self, split: str, metric: str) -> list[float]:
        """One metric in percent, of each seed."""
        return [float(run["scores"][split][metric]) for run in self.runs]


def write_ablation(
    out: Path,
    name: str,
    table: Table,
    budgets: Mapping[str, Sequence[Measured]],
    *,
    splits: Sequence[str],
    data: tuple[str, str],
    backbone: int,
    notes: Sequence[str],
) -> str:
    """Write OUT/NAME.md, .tex, .html and .json, each atomically, and return the Markdown.

    Args:
        out: the folder.
        name: of the files.
        table: the paper's.
        budgets: the measured rows by budget, in the table's order.
        splits: on which was scored, in order.
        data: the data set's name and partition.
        backbone: weights of both towers, over which the share of the trainable ones is taken.
        notes: sentences on how it was measured.

    Raises DcrisError where a file cannot be written.
    """
    theirs = data == DATA_SET and tuple(splits) == SPLITS
    parts, papers, sections = [f"# {table.title}", f"On {data[0]} ({data[1]})."], [], []
    for budget, rows in budgets.items():
        header = _header(table, splits, theirs)
        cells = [_cells(measured, splits, theirs, backbone) for measured in rows]
        verdict = who_wins(rows, splits)
        parts += [f"## {BUDGETS[budget]}", markdown(header, cells), verdict]
        papers.append(f"% {table.title}, {BUDGETS[budget].lower()}\n{latex(header, cells)}\n")
        sections.append(
            {
                "heading": BUDGETS[budget],
                "header": header,
                "rows": cells,
                "summary": verdict,
                "chart": _plot(BUDGETS[budget], rows, splits),
            }
        )
    parts += [f"- {note}" for note in notes]
    page = "\n\n".join(parts[: len(parts) - len(notes)]) + "\n\n" + "\n".join(parts[len(parts) - len(notes) :]) + "\n"
    write_file(out / f"{name}.md", page)
    write_file(out / f"{name}.tex", "\n".join(papers))
    write_page(
        out / f"{name}.html",
        "ablation.html",
        title=table.title,
        dataset=data[0],
        split_by=data[1],
        sections=sections,
        notes=notes,
    )
    write_json(
        out / f"{name}.json",
        {
            budget: [
                {
                    "name": item.name,
                    "failure": item.failure,
                    "paper": {"parameters": item.row.parameters, "scores": item.row.scores},
                    "runs": item.runs,
                }
                for item in rows
            ]
            for budget, rows in budgets.items()
        },
    )
    return page


def who_wins(rows: Sequence[Measured], splits: Sequence[str]) -> str:
    """One plain sentence: which row scores most on average over splits, and by how much."""
    ranked = sorted(((_mean(item, splits), item) for item in rows if item.runs), key=lambda pair: -pair[0])
    if len(ranked) < 2:
        return "There is nothing to compare yet."
    (first, best), (second, next_best) = ranked[:2]
    spread = max(_spread(best, splits), _spread(next_best, splits))
    sure = (
        "one seed says nothing of chance"
        if len(best.runs) < 2
        else f"more than the seeds' deviation of {spread:.1f}"
        if first - second > spread
        else f"within the seeds' deviation of {spread:.1f}"
    )
    return (
        f"Best: {best.name}, mIoU {first:.1f}; then {next_best.name}, {second:.1f}. "
        f"The difference is {first - second:.1f} points: {sure}."
    )


def _mean(item: Measured, splits: Sequence[str]) -> float:
    return fmean(fmean(item.values(split, "miou")) for split in splits)


def _spread(item: Measured, splits: Sequence[str]) -> float:
    """The deviation over seeds of the mean over splits; 0 for one seed."""
    over_splits = [fmean(values) for values in zip(*(item.values(split, "miou") for split in splits), strict=True)]
    return stdev(over_splits) if len(over_splits) > 1 else 0.0


def _header(table: Table, splits: Sequence[str], theirs: bool) -> list[str]:
    scores = [f"{metric} {split}" for split in splits for metric in ("mIoU", "oIoU")]
    average = ["mIoU avg"] if len(splits) > 1 else []
    paper = [*(f"paper {split}" for split in SPLITS), "paper avg"] if theirs else []
    return [*table.columns, "Trainable", "Paper's", "% of towers", "Steps", "s a step", *scores, *average, *paper]


def _cells(item: Measured, splits: Sequence[str], theirs: bool, backbone: int) -> list[str]:
    width = 2 * len(splits) + (len(splits) > 1)
    named = [*item.cells]
    if item.runs:
        trained = int(item.runs[0]["counts"]["adapters"])
        named += [f"{trained:,}", item.row.parameters or "-", f"{100 * trained / backbone:.2f}"]
        named += [
            _number([run["steps"] for run in item.runs], 0),
            _number([run["seconds_per_step"] for run in item.runs], 3),
        ]
        named += [
            _number(item.values(split, metric), 1, spread=True) for split in splits for metric in ("miou", "oiou")
        ]
        named += [f"{_mean(item, splits):.1f}"] if len(splits) > 1 else []
        if item.failure is not None:
            named[len(item.cells) - 1] += f" ({len(item.runs)} seeds; {item.failure})"
    else:
        named += ["-", item.row.parameters or "-", "-", "-", "-", *["-"] * width]
        named[-width] = item.failure or "not run"
    if theirs:
        scores = item.row.scores
        named += [f"{value:.1f}" for value in scores] + [f"{fmean(scores):.1f}"] if scores else ["-"] * 4
    return named


def _number(values: Sequence[float], digits: int, spread: bool = False) -> str:
    """Mean, and deviation (of a sample) where there are several."""
    mean = f"{fmean(values):,.{digits}f}"
    return f"{mean} \N{PLUS-MINUS SIGN} {stdev(values):.{digits}f}" if spread and len(values) > 1 else mean


def _plot(heading: str, rows: Sequence[Measured], splits: Sequence[str]) -> str:
    """IoU against trainable weights, as figure 2: DCRIS's own points are one line, each other method a point."""
    ours: list[tuple[tuple[float, float], str]] = []
    others: list[tuple[tuple[float, float], str]] = []
    for item in rows:
        if item.runs:
            point = (item.runs[0]["counts"]["adapters"] / 1e6, _mean(item, splits))
            (ours if item.row.recipe == "dcris" else others).append((point, item.name))
    lines = list(_lines(sorted(ours), "DCRIS")) + [line for each in sorted(others) for line in _lines([each], each[1])]
    if not lines:
        return ""
    title = f"{heading}: score against trainable weights"
    return chart(title, lines, x="trainable weights beside the head, in millions", y="mIoU in percent", legend=False)


def _lines(points: Sequence[tuple[tuple[float, float], str]], name: str) -> Iterator[Line]:
    if points:
        places = np.array([place for place, _ in points], np.float64)
        yield Line(name, places, labels=tuple(label for _, label in points))
