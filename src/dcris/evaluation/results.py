"""Results of single expressions as JSON Lines, so that scores and reports need no second model run.

A line has `sent_id`, `ref_id`, `image` (file name), `phrase`, `protocol`, `iou` in 0..1,
`intersection` and `union` in pixels as the protocol counts them, `data_sha256` (of the split),
`segmentation` (the predicted mask as COCO's compressed run lengths), those of RULES that it was
made with and, if known, `curve`: a pair of intersection and union for each of
metrics.CURVE_THRESHOLDS, `present`, the probability that the target is present, and `score`, that
of the mask. Protocols with absent targets add `none_rule`, the name of their rule, `none`, whether
the prediction says "none", and the same as a third number in each entry of `curve`. With Boundary
IoU, `boundary` is the pair of intersection and union of the boundaries. Protocols that compare
masks on a square add `compared`, the mask there, so that it can be scored again exactly.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcris.data.dataset import Queries
from dcris.data.images import MAX_PIXELS
from dcris.data.masks import validate_segmentation
from dcris.data.table import bad, field, finite_number, located, short_text, shown
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, Overlap
from dcris.evaluation.protocols import Protocol
from dcris.types import Expression, Reference
from dcris.utils.files import read_json_lines, write_file
from dcris.utils.streams import note

RULES: Mapping[str, Callable[[Any], str]] = {
    "threshold": lambda value: f"threshold {value:g}",
    "none_rule": lambda value: f"none by {value}",
    "refine": lambda value: f"refined, {value}",
    "strip_phrases": lambda value: "phrases stripped",
}
"""Fields of a result file, besides the protocol, that change scores, and how they are named."""


def write_results(
    path: Path,
    results: Iterable[EvalResult],
    protocol: Protocol,
    data: str | None = None,
    rules: Mapping[str, Any] | None = None,
) -> None:
    """Write results to a file atomically.

    Args:
        path: the file.
        results: with their masks.
        protocol: that measured them.
        data: checksum of their split.
        rules: those of RULES that they were made with.

    Raises:
        DcrisError: if the file cannot be written.
        ValueError: if a result has no mask.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="ascii") as file:
            lines = (_record(result, protocol, data) | dict(rules or {}) for result in results)
            file.writelines(json.dumps(line) + "\n" for line in lines)

    write_file(path, fill)


def _record(result: EvalResult, protocol: Protocol, data: str | None) -> dict[str, Any]:
    """Return the fields of a result's line."""
    record = {
        "sent_id": result.expression.sent_id,
        "ref_id": result.reference.ref_id,
        "image": result.reference.image_path.name,
        "phrase": result.expression.text,
        "protocol": protocol.name,
        "iou": round(result.overlap.iou, 6),
        "intersection": result.overlap.intersection,
        "union": result.overlap.union,
    }
    if data is not None:
        record["data_sha256"] = data
    if result.present is not None:
        record["present"] = result.present
    if result.score is not None:
        record["score"] = result.score
    if protocol.none_rule is not None:
        record |= {"none_rule": protocol.none_rule.name, "none": result.overlap.none}
    if protocol.boundary:
        record["boundary"] = [result.overlap.boundary_intersection, result.overlap.boundary_union]
    if result.curve:
        none = [[] if protocol.none_rule is None else [int(overlap.none)] for overlap in result.curve]
        record["curve"] = [
            [overlap.intersection, overlap.union, *last] for overlap, last in zip(result.curve, none, strict=True)
        ]
    if result.prediction is None:
        raise ValueError("the masks of these results were not kept; evaluate with keep_masks=True")
    if result.compared is not None:
        record["compared"] = dict(result.compared)
    return {**record, "segmentation": dict(result.prediction)}


def rules_of(record: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Return those of RULES that a record of unknown origin was made with.

    Raises DcrisError, with `path` and `where`, for a value that is not a number or a short text.
    """
    checks = {key: finite_number if key == "threshold" else short_text for key in RULES if key in record}
    return {key: check(record, key, path, where) for key, check in checks.items()}


def read_results(
    path: Path, queries: Queries, protocol: Protocol, data: str | None = None
) -> tuple[list[EvalResult], dict[str, Any]]:
    """Read the results of these queries from a file of `write_results`, in the queries' order.

    Pixel counts are taken from the file and not computed again. A note is printed if the file was
    measured on a split with another checksum, because masks may have changed.

    Returns:
        The results, and those of RULES that they were made with; none of these for files of dcris
        before 2026-12, which do not say it.

    Args:
        path: the file.
        queries: what the file has to hold results of.
        protocol: that must have measured them.
        data: checksum of the queries' split.

    Raises:
        DcrisError: with file and line, if the file cannot be read, was measured by another protocol
            or does not hold exactly one result for each query, or its lines disagree in RULES.
    """
    lines, rules = _by_sentence(path)
    if data is not None and any(record.get("data_sha256", data) != data for _, record in lines.values()):
        note(f"{path} was measured on a split with another checksum; evaluate again if its masks have changed")
    results = []
    for reference, expression in queries:
        if expression.sent_id not in lines:
            raise DcrisError(
                f"{path} has no result for sentence {expression.sent_id}, {expression.text!r}; it is of another data "
                "set or split, or incomplete"
            )
        results.append(_result(*lines.pop(expression.sent_id), reference, expression, protocol, path))
    if lines:
        raise DcrisError(
            f"{path} has a result for sentence {next(iter(lines))}, which is not in this split; it is of another data "
            "set or split"
        )
    return results, rules if "threshold" in rules else {}


def _by_sentence(path: Path) -> tuple[dict[int, tuple[str, dict[str, Any]]], dict[str, Any]]:
    """Read a file's lines: each sent_id's line number (as "line N") and record; and their rules."""
    lines: dict[int, tuple[str, dict[str, Any]]] = {}
    rules: dict[str, Any] = {}
    for number, record in read_json_lines(path):
        where = f"line {number}"
        sent_id = field(record, "sent_id", int, path, where)
        if sent_id in lines:
            raise bad(path, f"{where} repeats sentence {sent_id} of {lines[sent_id][0]}")
        found = rules_of(record, path, where)
        if lines and found != rules:
            raise bad(path, f"{where} was made with other settings than line 1 ({', '.join(RULES)})")
        lines[sent_id], rules = (where, record), found
    return lines, rules


def _result(
    where: str, record: dict[str, Any], reference: Reference, expression: Expression, protocol: Protocol, path: Path
) -> EvalResult:
    """Check a line against its query and return it as a result."""
    named = field(record, "ref_id", int, path, where), field(record, "phrase", str, path, where)
    if named != (reference.ref_id, expression.text):
        raise DcrisError(
            f"{path}, {where}: sentence {expression.sent_id} is {shown(named[1])} of reference {named[0]}, but "
            f"{expression.text!r} of reference {reference.ref_id} in this data set; the file is of another data set"
        )
    measured = field(record, "protocol", str, path, where)
    if measured != protocol.name:
        raise DcrisError(
            f"{path}, {where}: measured by protocol {shown(measured)}, not {protocol.name!r}; give that --protocol "
            "or evaluate again"
        )
    if protocol.none_rule is not None:
        rule = field(record, "none_rule", str, path, where)
        if rule != protocol.none_rule.name:
            raise DcrisError(
                f"{path}, {where}: measured with the rule {shown(rule)} for absent targets, not "
                f"{protocol.none_rule.name!r}; give that --none-rule or evaluate again"
            )
    curve = field(record, "curve", list, path, where) if "curve" in record else []
    if len(curve) not in (0, len(CURVE_THRESHOLDS)):
        raise bad(path, f"{where} has a 'curve' that is not {len(CURVE_THRESHOLDS)} entries")
    counts = [record.get("intersection"), record.get("union")]
    if protocol.none_rule is not None:
        counts.append(int(field(record, "none", bool, path, where)))
    mask = record.get("segmentation")
    if type(mask) is not dict:
        raise bad(path, f"{where} has no 'segmentation' in run lengths")
    with located(path, f"{where} has a 'segmentation' that cannot be decoded"):
        validate_segmentation(mask, reference.image_size)
    present, score = (probability(record, key, path, where) for key in ("present", "score"))

    def read(counts: Any) -> Overlap:
        return _overlap(counts, (reference, expression), protocol, path, where)

    found = read(counts)
    if protocol.boundary:
        if "boundary" not in record:
            raise DcrisError(f"{path}, {where}: measured without Boundary IoU; leave out --boundary or evaluate again")
        shared, both = _pixels(record["boundary"], path, where)
        found = replace(found, boundary_intersection=shared, boundary_union=both)
    return EvalResult(
        reference, expression, found, mask, tuple(map(read, curve)), present, present if score is None else score
    )


def probability(record: Mapping[str, Any], key: str, path: Path, where: str) -> float | None:
    """Return the value of a key, in 0..1; None if there is none.

    Raises DcrisError, with `path` and `where`, for another value.
    """
    value = record.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise bad(path, f"{where} has a '{key}' that is not a number from 0 to 1")
    return float(value)


def _overlap(counts: Any, query: tuple[Reference, Expression], protocol: Protocol, path: Path, where: str) -> Overlap:
    """Check intersection and union, and "none" if the protocol has it."""
    if protocol.none_rule is None:
        return protocol.judge(Overlap(*_pixels(counts, path, where)), 0, query, None, None)
    if type(counts) is not list or len(counts) != 3:
        raise _no_counts(path, where)
    shared, covered = _pixels(counts[:2], path, where)
    if type(counts[2]) is not int or counts[2] not in (0, 1):
        raise bad(path, f"{where} has a 'curve' whose third numbers are not 0 or 1")
    reference, expression = query
    return Overlap(shared, covered, bool(reference.targets(expression)), bool(counts[2]), reference.ref_id)


def _pixels(counts: Any, path: Path, where: str) -> tuple[int, int]:
    """Check a pair of intersection and union."""
    valid = type(counts) is list and len(counts) == 2 and all(type(count) is int for count in counts)
    if not valid or not 0 <= counts[0] <= counts[1] <= MAX_PIXELS:
        raise _no_counts(path, where)
    return counts[0], counts[1]


def _no_counts(path: Path, where: str) -> DcrisError:
    return bad(path, f"{where} has an intersection and union that are not numbers of pixels")
