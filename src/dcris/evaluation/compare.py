"""Comparison of several systems on the same expressions, with paired intervals.

A system is a trained model or a results file of `dcris evaluate --answers`. The first system is the
baseline of the others. Systems are evaluated one after another; only their masks, as run lengths,
stay in memory.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcris.checkpoints.checkpoint import find_checkpoint, load_checkpoint, read_config
from dcris.data.dataset import Queries, cut_phrases
from dcris.data.table import shown
from dcris.data.tokenizer import strips, tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.analysis import align, analyse, difference
from dcris.evaluation.evaluator import EvalResult, predict_queries
from dcris.evaluation.metrics import STANDARD_METRICS, Metric, Score, summarise
from dcris.evaluation.protocols import Protocol
from dcris.evaluation.report.panels import first_on_distinct_images
from dcris.evaluation.results import RULES, read_results
from dcris.utils.arguments import Precision
from dcris.utils.device import choose_precision
from dcris.utils.streams import note, one_line
from dcris.utils.text_tables import latex, ranks, score_text

_ENDINGS = (".jsonl", ".json", ".npz", ".zip", ".safetensors")
"""Of files that are systems: results, masks or models."""

Systems = Mapping[str, Sequence[EvalResult]]
"""Each system's results by its name, of the same expressions in the same order (see `align`)."""


def name_systems(sources: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """Return the systems' names in tables: `names`, or the last parts of their paths.

    Raises:
        DcrisError: for fewer than two systems, another number of names, or equal or empty names.
    """
    if len(sources) < 2:
        raise DcrisError("cannot compare one system alone; give two or more, or use `dcris evaluate`")
    if names and len(names) != len(sources):
        raise DcrisError(f"there are {len(sources)} systems and {len(names)} names; give one name for each system")
    chosen = [name.strip() for name in names] or [system_name(Path(source)) or source for source in sources]
    if not names and len(set(chosen)) < len(chosen):
        chosen = list(sources)
    if len(set(chosen)) < len(chosen) or not all(chosen):
        raise DcrisError(f"the systems' names are equal or empty: {', '.join(chosen)}; give distinct ones with --names")
    return chosen


def system_name(path: Path) -> str:
    """Return the last part of a system's path, without the ending of a file: "a" of out/a.jsonl,
    but "lr0.01" of the folder runs/lr0.01."""
    return path.stem if path.suffix.lower() in _ENDINGS else path.name


def is_results_file(path: Path) -> bool:
    """Return whether a path is a results file rather than a model."""
    return path.suffix == ".jsonl"


def _predict(
    path: Path,
    queries: Queries,
    protocol: Protocol,
    device: torch.device,
    precision: Precision | None,
    progress: Callable[[int], None],
) -> list[EvalResult]:
    """Return the results of a model."""
    model, config = load_checkpoint(path)
    if cut := cut_phrases(queries, config.data, tokenizer_of(config.model.text), ""):
        note(f"{path}: {cut}")
    return list(
        predict_queries(
            model.to(device),
            queries,
            config,
            protocol,
            device=device,
            dtype=choose_precision(precision or config.train.precision, device),
            progress=progress,
        )
    )


def _rules(path: Path, protocol: Protocol) -> dict[str, Any]:
    """Return those of RULES, besides the protocol's, that a model's results will be made with."""
    config = read_config(find_checkpoint(path))
    stripped = {"strip_phrases": config.data.strip_phrases} if strips(config.data, predicting=False) else {}
    return {"threshold": protocol.threshold} | stripped


def _require_equal_rules(rules: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DcrisError if systems differ in those of RULES; nothing is known of some files."""
    first, *others = [(name, each) for name, each in rules.items() if each] or [("", {})]
    for name, each in others:
        if key := next((key for key in RULES if each.get(key) != first[1].get(key)), None):
            one, other = (shown(RULES[key](some[key])) if key in some else f"no {key}" for some in (first[1], each))
            raise DcrisError(
                f"{first[0]} and {name} do not compare: they were made with {one} and {other}; evaluate one of them again"
            )


def evaluate_systems(
    sources: Mapping[str, Path],
    queries: Queries,
    protocol: Protocol,
    *,
    device: torch.device,
    precision: Precision | None = None,
    data: str | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, list[EvalResult]]:
    """Return all systems' results in one order.

    Args:
        sources: each system's path by its name: from `dcris.checkpoints.resolve.locate`, or a
            .jsonl file.
        queries: what is evaluated.
        protocol: of the evaluation; a file must have been measured by it.
        device: where models run.
        precision: working precision; that of a model's run by default.
        data: checksum of the split; a note is printed for a file with another.
        progress: called with a system's name and its number of expressions done so far.

    Raises:
        DcrisError: if a system, an image or a mask cannot be read, a file does not hold exactly the
            results of these queries, or results do not compare: they were made with other
            thresholds, refinements or stripping of phrases.
    """
    # Files come first, so that an error in one is reported before a model has run for hours.
    read = {name: read_results(at, queries, protocol, data) for name, at in sources.items() if is_results_file(at)}
    found = {name: results for name, (results, _) in read.items()}
    _require_equal_rules({name: read[name][1] if name in read else _rules(sources[name], protocol) for name in sources})
    for name, at in sources.items():
        if name not in found:
            found[name] = _predict(at, queries, protocol, device, precision, partial(progress, name))
    first = found[next(iter(sources))]
    return {name: align(found[name], first) for name in sources}


def compare(systems: Systems, metrics: Sequence[Metric] = STANDARD_METRICS) -> dict[str, Any]:
    """Return the systems' scores and each one's difference from the first, as plain JSON data.

    Args:
        systems: two or more.
        metrics: of the protocol.

    Returns:
        A dict of
        systems: for each its `name`, its metrics in percent and the content of `analyse`.
        differences: for each but the first its `name`, `minus` (the first one's name) and the
            content of `difference`, with the same groups.
        references, expressions: their numbers.
    """
    (first, baseline), *others = systems.items()
    return {
        "references": len({result.reference.ref_id for result in baseline}),
        "expressions": len(baseline),
        "systems": [
            {
                "name": name,
                **summarise((result.overlap for result in results), metrics),
                **analyse(results, metrics),
            }
            for name, results in systems.items()
        ],
        "differences": [
            {"name": name, "minus": first, **difference(results, baseline, metrics)} for name, results in others
        ],
    }


def select_examples(systems: Systems, count: int) -> dict[str, list[dict[str, EvalResult]]]:
    """Select expressions to show: those where the systems differ most, both ways, and random ones.

    A third of `count` are those where the first system's IoU is furthest above the mean of the
    others', a third where it is furthest below, and the rest are random, because the largest
    differences are not typical. Under one heading each image occurs once. The choice is the same on
    every call.

    Returns:
        By heading, a list of expressions, each with all systems' results by name.
    """
    (first, baseline), *others = systems.items()
    leads = {
        result.expression.sent_id: result.overlap.iou
        - sum(results[index].overlap.iou for _, results in others) / len(others)
        for index, result in enumerate(baseline)
    }
    shuffled = random.Random(0).sample(list(baseline), len(baseline))
    ranked = sorted(shuffled, key=lambda result: -leads[result.expression.sent_id])
    above = (result for result in ranked if leads[result.expression.sent_id] > 0)
    below = (result for result in reversed(ranked) if leads[result.expression.sent_id] < 0)
    best = first_on_distinct_images(above, (count + 2) // 3)
    worst = first_on_distinct_images(below, (count + 1) // 3)
    shown = {result.expression.sent_id for result in (*best, *worst)}
    rest = first_on_distinct_images(
        (result for result in shuffled if result.expression.sent_id not in shown), count - len(best) - len(worst)
    )
    indices = {result.expression.sent_id: index for index, result in enumerate(baseline)}
    rivals = others[0][0] if len(others) == 1 else "the others"
    return {
        heading: [
            {name: results[indices[result.expression.sent_id]] for name, results in systems.items()}
            for result in selected
        ]
        for heading, selected in (
            (f"{first} furthest ahead of {rivals}", best),
            (f"{first} furthest behind {rivals}", worst),
            ("Drawn at random", rest),
        )
        if selected
    }


def chosen_examples(
    systems: Systems,
    *,
    sent_ids: Sequence[int] = (),
    phrases: Sequence[str] = (),
    rows: Sequence[int] = (),
    count: int = 8,
) -> dict[str, list[dict[str, EvalResult]]]:
    """Return the expressions to show, as `select_examples` does, or those that were chosen.

    Args:
        systems: two or more.
        sent_ids: of the expressions, in the order of the rows.
        phrases: texts of expressions; a text that several have gives a row for each, `count` at
            most.
        rows: numbers, from 1, of the rows of `select_examples`.
        count: number of expressions that `select_examples` chooses.

    Raises:
        DcrisError: there is no such expression or row.
    """
    if rows:
        drawn = [row for some in select_examples(systems, count).values() for row in some]
        if wrong := next((number for number in rows if not 1 <= number <= len(drawn)), None):
            raise DcrisError(f"there is no row {wrong}; choose from 1 to {len(drawn)}, or show more with --count")
        return {"Chosen": [drawn[number - 1] for number in rows]}
    if not sent_ids and not phrases:
        return select_examples(systems, count)
    baseline = next(iter(systems.values()))
    by_id = {result.expression.sent_id: index for index, result in enumerate(baseline)}
    by_text: dict[str, list[int]] = {}
    for index, result in enumerate(baseline):
        by_text.setdefault(_plain(result.expression.text), []).append(index)
    indices = []
    for sent_id in sent_ids:
        if sent_id not in by_id:
            raise DcrisError(f"no expression that was compared has the sentence id {sent_id}; give others")
        indices.append(by_id[sent_id])
    for phrase in phrases:
        if _plain(phrase) not in by_text:
            raise DcrisError(f"no expression that was compared is {phrase!r}; give one of the split")
        indices += by_text[_plain(phrase)][:count]
    return {"Chosen": [{name: results[index] for name, results in systems.items()} for index in indices]}


def _plain(phrase: str) -> str:
    """Return a phrase without what people type differently: case and spaces."""
    return " ".join(phrase.casefold().split())


def as_latex(comparison: Mapping[str, Any], metrics: Sequence[Score] = STANDARD_METRICS) -> str:
    """Format the scores of a comparison as a LaTeX tabular: the best is bold, the second
    underlined. Differences follow, with their intervals."""
    systems, differences = comparison["systems"], comparison["differences"]
    scores = [[score_text(each[metric.key]) for metric in metrics] for each in systems]
    marks = {
        (row, column + 1): kind
        for column in range(len(metrics))
        for row, kind in ranks([cells[column] for cells in scores]).items()
    }
    rows = [[each["name"], *cells] for each, cells in zip(systems, scores, strict=True)]
    rows += [
        [f"{each['name']} - {each['minus']}", *(_score(each, metric.key, "+") for metric in metrics)]
        for each in differences
    ]
    return latex(["", *(metric.title for metric in metrics)], rows, marks, parts={len(systems): ""})


def as_text(comparison: Mapping[str, Any], metrics: Sequence[Score] = STANDARD_METRICS) -> str:
    """Format the scores of a comparison as a table for the terminal."""
    columns = [["", *(metric.title for metric in metrics)]]
    for each in [*comparison["systems"], *comparison["differences"]]:
        name = f"{each['name']} - {each['minus']}" if "minus" in each else each["name"]
        sign = "+" if "minus" in each else ""
        columns.append([one_line(name), *(_score(each, metric.key, sign) for metric in metrics)])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in zip(*columns, strict=True)
    )


def _score(described: Mapping[str, Any], key: str, sign: str) -> str:
    """Format a metric with its interval."""
    bounds = described["intervals"].get(key)
    return score_text(described[key], f"{sign}.1f") + (
        f" [{bounds[0]:{sign}.1f}, {bounds[1]:{sign}.1f}]" if bounds else ""
    )
