"""Several systems on the same expressions, side by side: their scores with paired intervals, and where they differ.

A system is a trained model, or a file of answers that `dcris evaluate --answers` wrote. The first is what the others are
compared with. Systems are evaluated one after another, and only their masks, as run lengths, are kept.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.data.dataset import Queries, cut_phrases
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.analysis import METRICS, align, analyse, difference
from dcris.evaluation.evaluator import EvalResult, predict_queries
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Protocol
from dcris.evaluation.report.comparison_report import TITLES
from dcris.evaluation.report.panels import first_apart
from dcris.evaluation.results import read_results
from dcris.utils.arguments import Precision
from dcris.utils.device import choose_precision
from dcris.utils.streams import note

Systems = Mapping[str, Sequence[EvalResult]]
"""Each system's answers, by its name, to the same expressions in the same order (see analysis.align)."""


def name_systems(sources: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """What the systems are called in tables: `names`, or else the last parts of their paths.

    Raises DcrisError where there are fewer than two systems, not as many names, or two systems of one name.
    """
    if len(sources) < 2:
        raise DcrisError("one system alone cannot be compared; give two or more, or use `dcris evaluate`")
    if names and len(names) != len(sources):
        raise DcrisError(
            f"there are {len(sources)} systems and {len(names)} names; give each system one, in their order"
        )
    chosen = [name.strip() for name in names] or [Path(source).stem or source for source in sources]
    if not names and len(set(chosen)) < len(chosen):
        chosen = list(sources)
    if len(set(chosen)) < len(chosen) or not all(chosen):
        raise DcrisError(
            f"two of the systems have one name, or none: {', '.join(chosen)}; give each its own by --names"
        )
    return chosen


def is_answers(path: Path) -> bool:
    """Whether a path is a file of answers, not a model."""
    return path.suffix == ".jsonl"


def answers_of(
    path: Path,
    queries: Queries,
    protocol: Protocol,
    *,
    device: torch.device,
    precision: Precision | None = None,
    data: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[EvalResult]:
    """A system's answers: read from its file, or asked of the model that is loaded from `path` and then forgotten.

    Args:
        path: as `dcris.checkpoints.resolve.locate` gives it, or a .jsonl file.
        questions: what is asked.
        protocol: how logits become masks; a file must have been made by the same.
        device, precision: where and how the model runs; its run's own precision by default.
        data: checksum of the split; a file that was measured on another is noted.
        progress: called with the number of expressions done so far.

    Raises DcrisError where the system, a photograph or a mask cannot be read, or a file does not answer just these questions.
    """
    if is_answers(path):
        return read_results(path, queries, protocol, data)
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


def gather(
    sources: Mapping[str, Path],
    queries: Queries,
    protocol: Protocol,
    *,
    device: torch.device,
    precision: Precision | None = None,
    data: str | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, list[EvalResult]]:
    """All systems' answers, in one order; `progress` is called with a system's name and its expressions done so far.

    Raises DcrisError as `answers_of` does.
    """
    found: dict[str, list[EvalResult]] = {}
    # Files first: a mistake in one should not come to light after hours of a model's work.
    for name, path in sorted(sources.items(), key=lambda item: not is_answers(item[1])):
        tell = partial(progress, name)
        found[name] = answers_of(path, queries, protocol, device=device, precision=precision, data=data, progress=tell)
    first = found[next(iter(sources))]
    return {name: align(found[name], first) for name in sources}


def compare(systems: Systems, inclusive: bool = False) -> dict[str, Any]:
    """The systems' scores, and how each but the first differs from the first, as plain JSON data.

    Args:
        systems: two or more.
        inclusive: of precision, as of `metrics.summarise`.

    Returns a dict of
        systems: for each its `name`, its scores in percent and what `dcris.evaluation.analysis.analyse` gives.
        differences: for each but the first its `name`, `minus` (the first one's name) and what `dcris.evaluation.analysis.difference`
            gives: the rows of its groups are those of the systems.
        references, expressions: how many were asked.
    """
    (first, baseline), *others = systems.items()
    return {
        "references": len({answer.reference.ref_id for answer in baseline}),
        "expressions": len(baseline),
        "systems": [
            {
                "name": name,
                **summarise((answer.overlap for answer in answers), inclusive),
                **analyse(answers, inclusive),
            }
            for name, answers in systems.items()
        ],
        "differences": [
            {"name": name, "minus": first, **difference(answers, baseline, inclusive)} for name, answers in others
        ],
    }


def telling(systems: Systems, count: int) -> dict[str, list[dict[str, EvalResult]]]:
    """Expressions to show, by heading, each with all systems' answers: where they differ most, both ways, and some at random.

    A third of `count` where the first is furthest ahead of the others (of their mean IoU), a third where it is furthest behind,
    and the rest drawn at random, by the same seed each time, since the largest differences say little of what is usual. Under
    one heading no photograph comes twice.
    """
    (first, baseline), *others = systems.items()
    leads = {
        answer.expression.sent_id: answer.overlap.iou
        - sum(theirs[place].overlap.iou for _, theirs in others) / len(others)
        for place, answer in enumerate(baseline)
    }
    shuffled = random.Random(0).sample(list(baseline), len(baseline))
    ahead = sorted(shuffled, key=lambda answer: -leads[answer.expression.sent_id])
    best = first_apart((answer for answer in ahead if leads[answer.expression.sent_id] > 0), (count + 2) // 3)
    worst = first_apart((answer for answer in ahead[::-1] if leads[answer.expression.sent_id] < 0), (count + 1) // 3)
    shown = {answer.expression.sent_id for answer in (*best, *worst)}
    rest = first_apart(
        (answer for answer in shuffled if answer.expression.sent_id not in shown), count - len(best) - len(worst)
    )
    places = {answer.expression.sent_id: place for place, answer in enumerate(baseline)}
    rivals = others[0][0] if len(others) == 1 else "the others"
    return {
        heading: [
            {name: answers[places[answer.expression.sent_id]] for name, answers in systems.items()} for answer in some
        ]
        for heading, some in (
            (f"{first} furthest ahead of {rivals}", best),
            (f"{first} furthest behind {rivals}", worst),
            ("Drawn at random", rest),
        )
        if some
    }


def as_text(comparison: Mapping[str, Any]) -> str:
    """The scores of a comparison as a table for the terminal."""
    systems, changes = comparison["systems"], comparison["differences"]
    columns = [["", *(TITLES[key] for key in METRICS)]]
    for each in [*systems, *changes]:
        name = f"{each['name']} - {each['minus']}" if "minus" in each else each["name"]
        columns.append([name, *(_figure(each, key, "+" if "minus" in each else "") for key in METRICS)])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(word.rjust(width) for word, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in zip(*columns, strict=True)
    )


def _figure(described: Mapping[str, Any], key: str, sign: str) -> str:
    bounds = described["intervals"].get(key)
    return f"{described[key]:{sign}.1f}" + (f" [{bounds[0]:{sign}.1f}, {bounds[1]:{sign}.1f}]" if bounds else "")
