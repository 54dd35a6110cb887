"""The files of `dcris ablate`: a table in Markdown, LaTeX and HTML, and all results in JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dcris.evaluation.report.charts import Curve, chart
from dcris.evaluation.report.html import write_page
from dcris.experiments.paper_tables import DATA_SET, SPLITS, Row, Table
from dcris.utils.files import write_file, write_json
from dcris.utils.text_tables import latex, markdown

BUDGETS = {"steps": "Equal steps", "time": "Equal time"}
"""Heading of each budget."""

_PAPERS = "Paper's"
"""Heading of the paper's numbers of trained weights."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The results of one row under one budget."""

    row: Row
    name: str
    """Short name for sentences and charts."""
    cells: tuple[str, ...]
    """The row's names in the table's columns."""
    runs: tuple[Mapping[str, Any], ...]
    """The result of each seed, from `dcris.experiments.ablate.train_and_score`."""
    towers: int
    """Number of weights of both towers."""
    failure: str | None = None
    """Why results are missing."""

    def values(self, split: str, metric: str) -> list[float]:
        """Return one metric of each seed, in percent."""
        return [float(run["scores"][split][metric]) for run in self.runs]


def write_ablation(
    out: Path,
    name: str,
    table: Table,
    budgets: Mapping[str, Sequence[Measured]],
    *,
    splits: Sequence[str],
    data: tuple[str, str],
    notes: Sequence[str],
) -> str:
    """Write OUT/NAME.md, .tex, .html and .json, each atomically, and return the Markdown.

    Args:
        out: the folder.
        name: of the files.
        table: title, columns and published values.
        budgets: the measured rows by budget, in the table's order.
        splits: that were evaluated, in order.
        data: name and partition of the data set.
        notes: sentences on how it was measured.

    Raises:
        DcrisError: a file cannot be written.
    """
    with_paper = data == DATA_SET and tuple(splits) == SPLITS
    parts, papers, sections = [f"# {table.title}", f"On {data[0]} ({data[1]})."], [], []
    for budget, rows in budgets.items():
        header = _header(table, splits, with_paper)
        cells = [_cells(measured, splits, with_paper) for measured in rows]
        if not any(measured.row.parameters for measured in rows):  # recipes that are in no table of the paper
            column = header.index(_PAPERS)
            for line in (header, *cells):
                del line[column]
        sentence = summary(rows, splits)
        parts += [f"## {BUDGETS[budget]}", markdown(header, cells), sentence]
        papers.append(f"% {table.title}, {BUDGETS[budget].lower()}\n{latex(header, cells)}\n")
        sections.append(
            {
                "heading": BUDGETS[budget],
                "header": header,
                "rows": cells,
                "summary": sentence,
                "chart": _chart(BUDGETS[budget], rows, splits),
            }
        )
    page = "\n\n".join(parts) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    write_file(out / f"{name}.md", page)
    write_file(out / f"{name}.tex", "\n".join(papers))
    write_page(
        out / f"{name}.html",
        "ablation.html",
        title=table.title,
        dataset=data[0],
        split_by=data[1],
        sections=sections,
        notes=[note.replace("`", "") for note in notes],
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


def summary(rows: Sequence[Measured], splits: Sequence[str]) -> str:
    """State which row has the best mean mIoU, and whether its lead is decided: larger than twice
    the larger deviation of the two best rows.
    """
    ranked = sorted(((_mean(item, splits), item) for item in rows if item.runs), key=lambda pair: -pair[0])
    if len(ranked) < 2:
        return "There are no two rows to compare."
    (first, best), (second, next_best) = ranked[:2]
    deviation = max(_deviation(best, splits), _deviation(next_best, splits))
    certainty = (
        "one seed shows no variation between seeds"
        if len(best.runs) < 2
        else f"decided, as it is more than twice the seeds' deviation of {deviation:.2f}"
        if first - second > 2 * deviation
        else f"undecided, as it is not more than twice the seeds' deviation of {deviation:.2f}"
    )
    return (
        f"Best: {best.name}, mIoU {first:.2f}; then {next_best.name}, {second:.2f}. "
        f"The difference is {first - second:.2f} points: {certainty}."
    )


def _mean(item: Measured, splits: Sequence[str]) -> float:
    """Return the mIoU averaged over splits and seeds."""
    return fmean(fmean(item.values(split, "miou")) for split in splits)


def _deviation(item: Measured, splits: Sequence[str]) -> float:
    """Return the deviation over seeds of the mIoU averaged over splits; 0 for one seed."""
    by_seed = [fmean(values) for values in zip(*(item.values(split, "miou") for split in splits), strict=True)]
    return stdev(by_seed) if len(by_seed) > 1 else 0.0


def _header(table: Table, splits: Sequence[str], with_paper: bool) -> list[str]:
    scores = [f"{metric} {split}" for split in splits for metric in ("mIoU", "oIoU")]
    average = ["mIoU avg"] if len(splits) > 1 else []
    paper = [*(f"paper {split}" for split in SPLITS), "paper avg"] if with_paper else []
    return [*table.columns, "Trainable", _PAPERS, "% of encoders", "Steps", "s per step", *scores, *average, *paper]


def _cells(item: Measured, splits: Sequence[str], with_paper: bool) -> list[str]:
    width = 2 * len(splits) + (len(splits) > 1)
    cells = [*item.cells]
    if item.runs:
        trained = int(item.runs[0]["counts"]["adapters"])
        cells += [f"{trained:,}", item.row.parameters or "-", f"{100 * trained / item.towers:.2f}"]
        cells += [
            _number([run["steps"] for run in item.runs], 0),
            _number([run["seconds_per_step"] for run in item.runs], 3),
        ]
        cells += [
            _number(item.values(split, metric), 1, spread=True) for split in splits for metric in ("miou", "oiou")
        ]
        cells += [f"{_mean(item, splits):.1f}"] if len(splits) > 1 else []
        if item.failure is not None:
            cells[len(item.cells) - 1] += f" ({len(item.runs)} seeds; {item.failure})"
    else:
        cells += ["-", item.row.parameters or "-", "-", "-", "-", *["-"] * width]
        cells[-width] = item.failure or "not run"
    if with_paper:
        scores = item.row.scores
        cells += [f"{value:.1f}" for value in scores] + [f"{fmean(scores):.1f}"] if scores else ["-"] * 4
    return cells


def _number(values: Sequence[float], digits: int, spread: bool = False) -> str:
    """Format the mean, and the sample standard deviation of several values."""
    mean = f"{fmean(values):,.{digits}f}"
    return f"{mean} \N{PLUS-MINUS SIGN} {stdev(values):.{digits}f}" if spread and len(values) > 1 else mean


def _chart(heading: str, rows: Sequence[Measured], splits: Sequence[str]) -> str:
    """Draw mIoU against trainable weights, as in the paper's figure 2.

    The points of DCRIS are one line; each other method is a point.
    """
    ours: list[tuple[tuple[float, float], str]] = []
    others: list[tuple[tuple[float, float], str]] = []
    for item in rows:
        if item.runs:
            point = (item.runs[0]["counts"]["adapters"] / 1e6, _mean(item, splits))
            (ours if item.row.recipe == "dcris" else others).append((point, item.name))
    lines = list(_lines(sorted(ours), "DCRIS")) + [line for each in sorted(others) for line in _lines([each], each[1])]
    if not lines:
        return ""
    title = f"{heading}: mIoU by trainable weights"
    return chart(title, lines, x="trainable weights without the head, in millions", y="mIoU in percent", legend=False)


def _lines(points: Sequence[tuple[tuple[float, float], str]], name: str) -> Iterator[Curve]:
    if points:
        positions = np.array([position for position, _ in points], np.float64)
        yield Curve(name, positions, labels=tuple(label for _, label in points))
