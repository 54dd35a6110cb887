"""Tables for a paper from result files: scores by split, costs, and scores by category.

A system is a result file of `dcris evaluate --all`, `dcris evaluate` or `dcris score`, or a folder
of such files. Scores are in one column only if they compare: same data set, split, protocol,
threshold and rules.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dcris.data.table import bad, field, finite_number, short_text
from dcris.errors import DcrisError
from dcris.evaluation.metrics import BIOU, Score
from dcris.evaluation.protocols import PROTOCOLS
from dcris.evaluation.results import RULES, rules_of
from dcris.evaluation.video_protocols import VIDEO_PROTOCOLS
from dcris.experiments.paper_tables import TABLE_1, TABLE_1_SPLITS
from dcris.utils.files import read_json
from dcris.utils.streams import note
from dcris.utils.text_tables import BLANK, Mark, comma_separated, latex, markdown, ranks, score_text

Format = Literal["markdown", "latex", "csv"]
FORMATS: tuple[Format, ...] = ("markdown", "latex", "csv")
_MOST_RESULTS = 1000
"""Most results in a file. The columns of a table are compared with each other."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a column shows: results of one measure compare with each other."""

    dataset: str
    split_by: str
    split: str
    protocol: str
    rules: tuple[tuple[str, str], ...]
    """Other fields that change scores, with their names for headings."""


@dataclass(frozen=True, slots=True)
class SystemResults:
    """The results of one system."""

    name: str
    records: Mapping[Measure, Mapping[str, Any]]
    cost: Mapping[str, float]
    """See dcris.experiments.evaluate_all.measure_cost; empty if it was not measured."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of scores."""

    measure: Measure
    metric: Score
    group: str
    """Heading over the columns of one data set."""
    label: str
    """Heading below it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row."""

    cells: tuple[str, ...]
    """The first cells: its name, and what distinguishes rows of one name."""
    values: tuple[float | None, ...]
    """In percent, one for each column of scores."""
    costs: tuple[str, ...] = ()
    part: str = ""
    """Heading of its part of the table."""
    rank: str = ""
    """Rows are ranked among those with the same text."""


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table before it is formatted."""

    first: tuple[str, ...]
    """Headings of the first cells."""
    spans: tuple[tuple[str, int], ...]
    """Headings over columns of scores, with the numbers of columns."""
    labels: tuple[str, ...]
    """Headings of the columns of scores."""
    costs: tuple[str, ...]
    """Headings of the columns of costs."""
    lines: tuple[Line, ...]
    by_row: bool = False
    """Scores are ranked along rows: each column is a system."""

    def render(self, form: Format, digits: int = 1) -> str:
        """Return the table as text: the best score of a column, or of a row where columns are
        systems, is bold, the second underlined.

        Args:
            form: markdown, latex or csv; the last has neither.
            digits: decimals of the scores.
        """
        shown = [[score_text(value, f".{digits}f") for value in line.values] for line in self.lines]
        rows = [[*line.cells, *cells, *line.costs] for line, cells in zip(self.lines, shown, strict=True)]
        groups = [text for text, count in self.spans for _ in range(count)] or [""] * len(self.labels)
        labels = [f"{group} {label}".strip() for group, label in zip(groups, self.labels, strict=True)]
        header = [*self.first, *labels, *self.costs]
        if form == "csv":
            return comma_separated(header, [["" if cell == BLANK else cell for cell in row] for row in rows])
        marks = {(row, column + len(self.first)): kind for row, column, kind in self._marks(shown)}
        if form == "markdown":
            return markdown(header, rows, marks)
        return latex(
            [*self.first, *self.labels, *self.costs],
            rows,
            marks,
            [("", len(self.first)), *self.spans, *([("", len(self.costs))] if self.costs else [])]
            if self.spans
            else (),
            self._parts(),
        )

    def _marks(self, shown: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, Mark]]:
        """Yield the row, the column of scores and the mark of each score that has one."""
        if self.by_row:
            for row, cells in enumerate(shown):
                for column, kind in ranks(cells, BLANK).items():
                    yield row, column, kind
            return
        for column in range(len(self.labels)):
            for row, kind in _ranks([cells[column] for cells in shown], [line.rank for line in self.lines]):
                yield row, column, kind

    def _parts(self) -> dict[int, str]:
        parts = [line.part for line in self.lines]
        return {number: part for number, part in enumerate(parts) if part != (parts[number - 1] if number else "")}


def _ranks(cells: Sequence[str], among: Sequence[str]) -> Iterator[tuple[int, Mark]]:
    """Yield the marks of a column's rows, ranked among those with the same text."""
    for name in dict.fromkeys(among):
        rows = [row for row, other in enumerate(among) if other == name]
        for place, mark in ranks([cells[row] for row in rows], BLANK).items():
            yield rows[place], mark


# ---- reading -------------------------------------------------------------------------------------


def read_systems(paths: Sequence[Path], names: Sequence[str] = ()) -> list[SystemResults]:
    """Read each system's results.

    Args:
        paths: files, or folders of files.
        names: of the systems; by default that in the file, or else the name of the file or folder.

    Raises:
        DcrisError: a file is missing or is not a result file, a system has two results of the same
            measure, systems were measured on different references of one split, or names are equal.
    """
    if names and len(names) != len(paths):
        raise DcrisError(f"there are {len(paths)} systems and {len(names)} names; give one name for each system")
    systems = [_read_system(path) for path in paths]
    if names:
        systems = [replace(system, name=name) for system, name in zip(systems, names, strict=True)]
    if len({system.name for system in systems}) < len(systems):
        raise DcrisError(
            f"two systems are called the same: {', '.join(system.name for system in systems)}; use --names"
        )
    measured: dict[Measure, tuple[str, str]] = {}
    for system in systems:
        for measure, record in system.records.items():
            other, checksum = measured.setdefault(measure, (system.name, record["data_sha256"]))
            if record["data_sha256"] != checksum:
                raise DcrisError(
                    f"{other} and {system.name} were measured on different references of {measure.dataset} "
                    f"({measure.split_by}) {measure.split}, so their scores do not compare; evaluate one of them again"
                )
    return systems


def _read_system(path: Path) -> SystemResults:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DcrisError(f"the folder {path} has no result files; give files of `dcris evaluate --out`")
    parts = [read_row(read_json(file, "the result file"), file) for file in files]
    records = dict[Measure, Mapping[str, Any]]()
    for part in parts:
        for measure, record in part.records.items():
            if measure in records:
                raise _twice(measure, path)
            records[measure] = record
    cost = next((part.cost for part in parts if part.cost), {})
    return SystemResults(path.name if path.is_dir() else parts[0].name, records, cost)


def read_row(content: Any, path: Path) -> SystemResults:
    """Check the content of a result file, of `dcris evaluate --all` or of a single split.

    Raises:
        DcrisError: it is not a result file; the message names `path`.
    """
    if type(content) is not dict:
        raise bad(path, "it is not a result file")
    if "results" not in content:
        return SystemResults(path.stem, {_measure(content, path, "the file"): content}, {})
    records = dict[Measure, Mapping[str, Any]]()
    results = field(content, "results", list, path, "the file")
    if len(results) > _MOST_RESULTS:
        raise bad(path, f"it has {len(results):,} results; the limit is {_MOST_RESULTS:,}")
    for number, record in enumerate(results, 1):
        measure = _measure(record, path, f"result {number}")
        if measure in records:
            raise _twice(measure, path)
        records[measure] = record
    values = field(content, "cost", dict, path, "the file")
    cost = {key: finite_number(values, key, path, "its 'cost'") for key in values}
    name = short_text(content, "name", path, "the file")
    if not records:
        raise bad(path, "it has no results; evaluate again")
    return SystemResults(name, records, cost)


def _twice(measure: Measure, path: Path) -> DcrisError:
    return DcrisError(
        f"{path} has two results of {measure.dataset} ({measure.split_by}) {measure.split} by the protocol "
        f"{measure.protocol}; remove one of them"
    )


def _measure(record: Any, path: Path, where: str) -> Measure:
    """Check a result, and return what it measures."""
    dataset, split_by, split, protocol, _ = (
        short_text(record, key, path, where) for key in ("dataset", "split_by", "split", "protocol", "data_sha256")
    )
    if protocol not in PROTOCOLS and protocol not in VIDEO_PROTOCOLS:
        known = ", ".join([*PROTOCOLS, *VIDEO_PROTOCOLS])
        raise DcrisError(f"{path}, {where}: there is no protocol {protocol!r}; choose from {known}")
    keys = [metric.key for metric in _metrics(protocol)]
    if protocol in PROTOCOLS:
        finite_number(record, "threshold", path, where)
        keys += [BIOU.key] if BIOU.key in record else []
    for key in keys:
        if record.get(key, ...) is not None:  # None: nothing counts for it
            finite_number(record, key, path, where)
    rules = tuple((key, RULES[key](value)) for key, value in rules_of(record, path, where).items())
    return Measure(dataset, split_by, split, protocol, rules)


def _metrics(protocol: str) -> Sequence[Score]:
    """Return the scores of a protocol of images or videos."""
    return PROTOCOLS[protocol].metrics if protocol in PROTOCOLS else VIDEO_PROTOCOLS[protocol].metrics


# ---- tables --------------------------------------------------------------------------------------


def scores_table(systems: Sequence[SystemResults], metrics: Sequence[str] = (), cost: bool = False) -> ResultTable:
    """Return the table of all systems' scores, a column for each split.

    The average is the mean of the data sets' means, as in most rows of the paper's table 1; rows
    that lack a column have none.

    Args:
        systems: from `read_systems`.
        metrics: keys such as "miou" and "oiou"; by default the first of each protocol.
        cost: whether to add weights, operations, memory and time.

    Raises:
        DcrisError: no result has such a metric.
    """
    columns = _columns(systems, metrics)
    lines = []
    for system in systems:
        values = [_score(system, column.measure, column.metric) for column in columns]
        lines.append(Line((system.name,), (*values, *_averages(columns, values))))
    spans = [(group, len([*members])) for group, members in groupby(column.group for column in columns)]
    keys = _averaged(columns)
    labels = [*(column.label for column in columns), *(_titled("Avg", columns, key) for key in keys)]
    if keys:
        spans.append(("", len(keys)))
    table = ResultTable(("Method",), tuple(spans), tuple(labels), (), tuple(lines))
    return _with_costs(table, systems) if cost else table


def paper_table(systems: Sequence[SystemResults], cost: bool = False) -> ResultTable:
    """Return table 1 of the paper with the systems below it.

    The rows of the paper differ in what their "IoU" is, so each row names it, and rows are ranked
    among those with the same one. A system has a row for each. Averages of published rows are as
    printed. Results that are not of the table's splits, or have not both mIoU and oIoU, are named
    on standard error.

    Raises:
        DcrisError: a system has no other results.
    """
    titles = {"miou": "mIoU", "oiou": "oIoU"}
    for system in systems:
        left_out = [measure for measure in system.records if not _in_table_1(measure)]
        if len(left_out) == len(system.records):
            raise DcrisError(
                f"{system.name} has no result for table 1, which shows mIoU or oIoU of RefCOCO, RefCOCO+ and RefCOCOg; leave "
                "it out, or evaluate it there with --protocol cris"
            )
        if left_out:
            named = ", ".join(f"{each.dataset} {each.split} ({each.protocol})" for each in left_out)
            note(f"table 1 has no place for these results of {system.name}: {named}")
    lines = [
        Line(
            (f"{system.name} ({system.venue})" if system.venue else system.name, titles[system.metric], BLANK),
            (*system.scores, system.average),
            part=system.group,
            rank=system.metric,
        )
        for system in TABLE_1
    ]
    owners: list[SystemResults | None] = [None] * len(lines)
    for system in systems:
        # One row for each protocol with its rules.
        variants = {(measure.protocol, measure.rules): None for measure in system.records if _in_table_1(measure)}
        for protocol, rules in variants:
            for metric in (each for each in _metrics(protocol) if each.key in titles):
                values = [_score(system, Measure(*place, protocol, rules), metric) for place in TABLE_1_SPLITS]
                cells = (system.name, titles[metric.key], protocol)
                groups = [place[0] for place in TABLE_1_SPLITS]
                lines.append(
                    Line(cells, (*values, mean_of_means(groups, values)), part="Measured here", rank=metric.key)
                )
                owners.append(system)
    labels = [*(split for _, _, split in TABLE_1_SPLITS[:6]), "val (umd)", "test (umd)", "val (google)", "Avg"]
    spans = (("RefCOCO", 3), ("RefCOCO+", 3), ("G-Ref", 3), ("", 1))
    table = ResultTable(("Method", "IoU", "Protocol"), spans, tuple(labels), (), tuple(lines))
    return _with_costs(table, owners) if cost else table


def category_table(systems: Sequence[SystemResults]) -> ResultTable:
    """Return the systems' mean IoU by category, over the expressions of all their splits but those
    by `rrefcoco`, which averages over references.

    Raises:
        DcrisError: a system has no scores by category, or another set of splits and rules than the
            first.
    """
    columns, counts = [], dict[str, int]()
    for system in systems:
        if system.records.keys() != systems[0].records.keys():
            raise DcrisError(
                f"{systems[0].name} and {system.name} were measured on different splits or by other rules, so their scores by "
                "category do not compare; give result files of the same splits, protocols and thresholds"
            )
        sums: dict[str, float] = {}
        counts = {}
        for measure, record in system.records.items():
            known = [metric.key for metric in _metrics(measure.protocol)[:2]]
            key = next((key for key in known if key in ("miou", "giou")), None)
            if key is None:
                continue
            groups = record.get("analysis", {}).get("by_category") if type(record.get("analysis")) is dict else None
            if type(groups) is not list:
                raise DcrisError(
                    f"{system.name} has no scores by category; evaluate it with `dcris evaluate --all` or --by-category"
                )
            place = Path(system.name)
            for group in groups:
                name = short_text(group, "name", place, "a category")
                size = field(group, "expressions", int, place, f"the category {name}")
                sums[name] = sums.get(name, 0.0) + size * finite_number(group, key, place, f"the category {name}")
                counts[name] = counts.get(name, 0) + size
        columns.append({name: total / max(1, counts[name]) for name, total in sums.items()})
    if not counts:
        raise DcrisError(
            "no result has a mean IoU by category, which those of videos, of rrefcoco and without any target lack; give others"
        )
    lines = tuple(
        Line((name, f"{counts[name]:,}"), tuple(column.get(name) for column in columns)) for name in sorted(counts)
    )
    labels = tuple(system.name for system in systems)
    return ResultTable(("Category", "Expressions"), (), labels, (), lines, by_row=True)


def _in_table_1(measure: Measure) -> bool:
    metrics = {metric.key for metric in _metrics(measure.protocol)}
    return (measure.dataset, measure.split_by, measure.split) in TABLE_1_SPLITS and {"miou", "oiou"} <= metrics


def _columns(systems: Sequence[SystemResults], metrics: Sequence[str]) -> list[Column]:
    """Return the columns of scores, by data set and partition in the order of the results."""
    measures = list(dict.fromkeys(measure for system in systems for measure in system.records))
    order = {name: place for place, name in enumerate(dict.fromkeys(measure.dataset for measure in measures))}
    measures.sort(key=lambda measure: (order[measure.dataset], measure.split_by))
    columns = []
    for measure in measures:
        known = _metrics(measure.protocol)
        if any(BIOU.key in system.records.get(measure, {}) for system in systems):
            known = (*known, BIOU)
        wanted = [metric for metric in known if metric.key in metrics] if metrics else known[:1]
        partitions = {each.split_by for each in measures if each.dataset == measure.dataset}
        group = measure.dataset + (f" ({measure.split_by})" if len(partitions) > 1 else "")
        columns += [Column(measure, metric, group, _label(measure, measures)) for metric in wanted]
    unknown = [key for key in metrics if all(column.metric.key != key for column in columns)]
    if unknown:
        raise DcrisError(
            f"no result has the metric {' or '.join(unknown)}; see `dcris evaluate` for those of a protocol"
        )
    if len({column.metric.title for column in columns}) > 1:
        columns = [replace(column, label=f"{column.label} {column.metric.title}") for column in columns]
    return columns


def _label(measure: Measure, measures: Sequence[Measure]) -> str:
    """Return the split's name, with what distinguishes it from other measures of the same split."""
    alike = [
        other
        for other in measures
        if (other.dataset, other.split_by, other.split) == (measure.dataset, measure.split_by, measure.split)
    ]
    names = [measure.protocol] if len({other.protocol for other in alike}) > 1 else []
    same = [other for other in alike if other.protocol == measure.protocol]
    shared = set.intersection(*({*other.rules} for other in same))
    names += [text for rule in measure.rules if rule not in shared for text in rule[1:]]
    return f"{measure.split} ({', '.join(names)})" if names else measure.split


def _score(system: SystemResults, measure: Measure, metric: Score) -> float | None:
    record = system.records.get(measure)
    value = None if record is None else record.get(metric.key)
    return None if value is None else float(value)


def _averaged(columns: Sequence[Column]) -> list[str]:
    """Return the keys of the metrics that several columns have, each of another split, and all by
    one definition: protocols call unlike metrics gIoU."""
    splits: dict[str, list[tuple[str, str, str]]] = {}
    definitions: dict[str, set[Score]] = {}
    for column in columns:
        measure, key = column.measure, column.metric.key
        splits.setdefault(key, []).append((measure.dataset, measure.split_by, measure.split))
        definitions.setdefault(key, set()).add(column.metric)
    return [
        key
        for key, each in splits.items()
        if len(each) > 1 and len({*each}) == len(each) and len(definitions[key]) == 1
    ]


def _averages(columns: Sequence[Column], values: Sequence[float | None]) -> Iterator[float | None]:
    for key in _averaged(columns):
        chosen = [(column, value) for column, value in zip(columns, values, strict=True) if column.metric.key == key]
        yield mean_of_means([column.measure.dataset for column, _ in chosen], [value for _, value in chosen])


def mean_of_means(groups: Sequence[str], values: Sequence[float | None]) -> float | None:
    """Return the mean over groups of the mean over their values; None if a value is missing."""
    by_group: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is None:
            return None
        by_group.setdefault(group, []).append(value)
    return fmean(fmean(each) for each in by_group.values())


def _titled(text: str, columns: Sequence[Column], key: str) -> str:
    titles = {column.metric.key: column.metric.title for column in columns}
    return text if len(titles) == 1 else f"{text} {titles[key]}"


_COSTS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "adapters": ("Adapters (M)", lambda value: f"{value / 1e6:.2f}"),
    "trained": ("Trainable (M)", lambda value: f"{value / 1e6:.2f}"),
    "flops": ("FLOPs (G)", lambda value: f"{value / 1e9:,.1f}"),
    "peak_memory": ("Memory (GiB)", lambda value: f"{value:.2f}"),
    "seconds": ("s / image", lambda value: f"{value:.3f}"),
}


def _with_costs(table: ResultTable, systems: Iterable[SystemResults | None]) -> ResultTable:
    lines = []
    for line, system in zip(table.lines, systems, strict=True):
        known = {} if system is None else system.cost
        cells = tuple(show(known[key]) if key in known else BLANK for key, (_, show) in _COSTS.items())
        lines.append(replace(line, costs=cells))
    return replace(table, lines=tuple(lines), costs=tuple(title for title, _ in _COSTS.values()))
