"""Answers in a file, one JSON object a line, so that scores and pictures can be made later without running a model again.

A line holds `sent_id`, `ref_id`, `image` (the photograph's file name), `phrase`, `protocol`, `iou` in 0..1, `intersection` and
`union` in pixels as the protocol counts them, `data_sha256` (of the split), `segmentation` (the predicted mask on the
photograph, COCO's compressed run lengths), and where it was measured `curve`, a pair of intersection and union for each of
metrics.CURVE_THRESHOLDS.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcris.data.dataset import Queries
from dcris.data.images import MAX_PIXELS
from dcris.data.masks import validate_segmentation
from dcris.data.table import bad, field
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, Overlap
from dcris.evaluation.protocols import Protocol
from dcris.types import Expression, Reference
from dcris.utils.files import read_json_lines, write_file
from dcris.utils.streams import note


def write_results(path: Path, answers: Iterable[EvalResult], protocol: Protocol, data: str | None = None) -> None:
    """Write the answers, measured by `protocol` on the split with the checksum `data`, atomically.

    Raises DcrisError where the file cannot be written, ValueError where an answer comes without its mask.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(json.dumps(_line(answer, protocol, data)) + "\n" for answer in answers)

    write_file(path, fill)


def _line(answer: EvalResult, protocol: Protocol, data: str | None) -> dict[str, Any]:
    found = {
        "sent_id": answer.expression.sent_id,
        "ref_id": answer.reference.ref_id,
        "image": answer.reference.image_path.name,
        "phrase": answer.expression.text,
        "protocol": protocol.name,
        "iou": round(answer.overlap.iou, 6),
        "intersection": answer.overlap.intersection,
        "union": answer.overlap.union,
    }
    if data is not None:
        found["data_sha256"] = data
    if answer.curve:
        found["curve"] = [[overlap.intersection, overlap.union] for overlap in answer.curve]
    if answer.prediction is None:
        raise ValueError("the masks of these answers were not kept")
    return {**found, "segmentation": dict(answer.prediction)}


def read_results(path: Path, queries: Queries, protocol: Protocol, data: str | None = None) -> list[EvalResult]:
    """The answers that `write_results` wrote for these questions, in the questions' order.

    Nothing is measured again: the file's counts are believed, if they were counted by `protocol`. A note is printed where they
    were counted on a split with another checksum than `data`: masks may have changed.

    Raises DcrisError, naming the file and the line, where it cannot be read, was measured by another protocol, or does not
    answer each question once.
    """
    lines = _by_sentence(path)
    if data is not None and any(record.get("data_sha256", data) != data for _, record in lines.values()):
        note(f"{path} was measured on other data: the checksum of its split differs from this one's; evaluate again")
    answers = []
    for reference, expression in queries:
        if expression.sent_id not in lines:
            raise DcrisError(
                f"{path} has no answer to sentence {expression.sent_id}, {expression.text!r}; it is of another data set or "
                "split, or cut short"
            )
        answers.append(_answer(*lines.pop(expression.sent_id), reference, expression, protocol, path))
    if lines:
        raise DcrisError(
            f"{path} also answers sentence {next(iter(lines))}, which is not asked here; it is of another data set or split"
        )
    return answers


def _by_sentence(path: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Where each sentence's line is, and what it holds."""
    lines: dict[int, tuple[str, dict[str, Any]]] = {}
    for number, record in read_json_lines(path):
        where = f"line {number}"
        sent_id = field(record, "sent_id", int, path, where)
        if sent_id in lines:
            raise bad(path, f"{where} answers sentence {sent_id}, which {lines[sent_id][0]} did already")
        lines[sent_id] = where, record
    return lines


def _answer(
    where: str, record: dict[str, Any], reference: Reference, expression: Expression, protocol: Protocol, path: Path
) -> EvalResult:
    found = field(record, "ref_id", int, path, where), field(record, "phrase", str, path, where)
    if found != (reference.ref_id, expression.text):
        raise DcrisError(
            f"{path}, {where}, answers {found[1]!r} of reference {found[0]} as sentence {expression.sent_id}, which is "
            f"{expression.text!r} of reference {reference.ref_id} here; it is of another data set"
        )
    measured = field(record, "protocol", str, path, where)
    if measured != protocol.name:
        raise DcrisError(
            f"{path}, {where}, was measured by protocol {measured!r}, and here it is {protocol.name!r}; give --protocol, or "
            "evaluate again"
        )
    curve = field(record, "curve", list, path, where) if "curve" in record else []
    if len(curve) not in (0, len(CURVE_THRESHOLDS)):
        raise bad(path, f"{where} has a 'curve' that is not {len(CURVE_THRESHOLDS)} pairs")
    overlap = _overlap([record.get("intersection"), record.get("union")], path, where)
    mask = record.get("segmentation")
    if type(mask) is not dict:
        raise bad(path, f"{where} has no 'segmentation' in run lengths")
    try:
        validate_segmentation(mask, reference.image_size)
    except DcrisError as error:
        raise bad(path, f"{where} has a 'segmentation' that cannot be decoded ({error})") from error
    return EvalResult(reference, expression, overlap, mask, tuple(_overlap(pair, path, where) for pair in curve))


def _overlap(pair: Any, path: Path, where: str) -> Overlap:
    good = type(pair) is list and len(pair) == 2 and all(type(count) is int for count in pair)
    if not good or not 0 <= pair[0] <= pair[1] <= MAX_PIXELS:
        raise bad(path, f"{where} has an intersection and union that are no numbers of pixels")
    return Overlap(*pair)
