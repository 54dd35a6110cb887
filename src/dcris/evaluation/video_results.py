"""Result files of videos: scores with intervals and a row for each expression; and comparisons.

A result file is that of `dcris score --out`, as for images (dcris.evaluation.evaluator), with
`rows`: for each expression, or in Ref-DAVIS17 for each object and annotator, its `video`,
`expression`, `phrase`, number of `frames` and scores in 0..1.

Shape letters: V videos, K scores.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcris.data.registry import OFFICIAL
from dcris.data.table import bad, field
from dcris.data.videos import VideoSet
from dcris.errors import DcrisError
from dcris.evaluation.analysis import resample, sums_by_key
from dcris.evaluation.metrics import Floats
from dcris.evaluation.results import RULES
from dcris.evaluation.video_protocols import VIDEO_PROTOCOLS, VideoProtocol, VideoResult, checksum
from dcris.utils.files import read_json
from dcris.version import __version__

Row = Mapping[str, Any]


def video_record(results: Sequence[VideoResult], videos: VideoSet, protocol: VideoProtocol) -> dict[str, Any]:
    """Return the content of a result file: scores in percent and what they belong to.

    Two results compare if `data_sha256` and `protocol` are equal. In Ref-DAVIS17, `relabelled` is
    how many objects were compared with a prediction of another label.
    """
    rows = [_row(each) for each in results]
    keys = _keys(protocol)
    record = {
        **_means(rows, keys),
        "videos": len({each.video for each in results}),
        "expressions": len(videos.expressions),
        "dataset": videos.dataset,
        "split_by": OFFICIAL,
        "split": videos.split,
        "data_sha256": checksum(videos),
        "protocol": protocol.name,
        "version": __version__,
        "numpy": np.__version__,
    }
    analysis: dict[str, Any] = {"intervals": _intervals([rows], keys)}
    if annotators := sorted({each.annotator for each in results if each.annotator is not None}):
        record["relabelled"] = sum(each.label != each.target for each in results)
        analysis["by_annotator"] = [
            {"annotator": number, **_means([row for row in rows if row["annotator"] == number], keys)}
            for number in annotators
        ]
    return {**record, "analysis": analysis, "rows": rows}


def _keys(protocol: VideoProtocol) -> list[str]:
    return [each.key for each in (*protocol.metrics, *protocol.decays)]


def _row(result: VideoResult) -> dict[str, Any]:
    row: dict[str, Any] = {"video": result.video, "expression": result.expression, "phrase": result.phrase}
    if result.annotator is not None:
        row |= {"annotator": result.annotator, "object": result.target, "label": result.label}
    return row | {"frames": result.frames, **result.values}


def _means(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, float]:
    """Return the means of scores over rows, in percent."""
    return {key: float(100 * np.mean([row[key] for row in rows])) for key in keys}


# ---- intervals -----------------------------------------------------------------------------------


def _tally(rows: Sequence[Row], keys: Sequence[str]) -> Floats:
    """Return for each video the number of its rows and the sums of their scores, [V, 1 + K]."""
    counts = np.array([[1, *(row[key] for key in keys)] for row in rows], np.float64)
    return sums_by_key([row["video"] for row in rows], counts)


def _intervals(systems: Sequence[Sequence[Row]], keys: Sequence[str]) -> dict[str, list[float]]:
    """Return the 95% interval of each score in percent, or of one system's minus another's.

    Videos are drawn with replacement, with all of their rows, because these succeed or fail
    together; two systems are scored on the same drawn videos. No intervals for fewer than two.
    """
    counts = np.concatenate([_tally(rows, keys) for rows in systems], axis=1)
    if len(counts) < 2:
        return {}
    parts = np.split(resample(counts), len(systems), axis=1)
    means = [100 * part[:, 1:] / part[:, :1] for part in parts]
    drawn = means[0] - means[1] if len(means) == 2 else means[0]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {key: [float(a), float(b)] for key, a, b in zip(keys, low, high, strict=True)}


# ---- comparison ----------------------------------------------------------------------------------


def is_video_result(path: Path) -> bool:
    """Return whether a path is a result file rather than a model or a results file of images."""
    return path.suffix == ".json"


def read_video_record(path: Path) -> dict[str, Any]:
    """Read a result file of videos.

    Raises:
        DcrisError: it cannot be read, or is not such a file.
    """
    record = read_json(path, "the result file")
    protocol = field(record, "protocol", str, path, "the file")
    if protocol not in VIDEO_PROTOCOLS or "rows" not in record:
        raise DcrisError(
            f"{path} is not a result of videos; only these are compared as .json; for images, give models or .jsonl files of "
            "`dcris evaluate --answers`"
        )
    field(record, "data_sha256", str, path, "the file")
    rows = field(record, "rows", list, path, "the file")
    if not rows:
        raise bad(path, "it has no rows")
    for number, row in enumerate(rows, 1):
        field(row, "video", str, path, f"row {number}")
        for key in _keys(VIDEO_PROTOCOLS[protocol]):
            value = row.get(key)
            if type(value) not in (int, float) or not -1 <= value <= 1:
                raise bad(path, f"row {number} has no number from -1 to 1 as '{key}'")
    return dict(record)


def compare_videos(sources: Mapping[str, Path]) -> tuple[dict[str, Any], VideoProtocol]:
    """Compare result files of videos with the first, as `dcris.evaluation.compare.compare` does.

    Args:
        sources: each system's file by its name, two or more.

    Returns:
        The systems' scores and differences with their intervals, and the protocol.

    Raises:
        DcrisError: a file cannot be used, or was measured on other expressions, by another protocol
            or by other RULES than the first.
    """
    records = {name: read_video_record(path) for name, path in sources.items()}
    (first, baseline), *others = records.items()
    differences = {"protocol": "by another protocol", "data_sha256": "on other expressions"}
    differences |= {key: f"with another {key!r}" for key in RULES}
    for name, record in others:
        for key, what in differences.items():
            if record.get(key) != baseline.get(key):
                raise DcrisError(
                    f"{sources[name]} was measured {what} than {sources[first]}, so they do not compare; score one again"
                )
    protocol = VIDEO_PROTOCOLS[baseline["protocol"]]
    keys, order = [each.key for each in protocol.metrics], [_identity(row) for row in baseline["rows"]]
    rows = {name: _in_order(record["rows"], order, sources[name]) for name, record in records.items()}
    scores = {name: _means(some, keys) for name, some in rows.items()}
    comparison = {
        "videos": len({row["video"] for row in baseline["rows"]}),
        "expressions": len(order),
        "systems": [{"name": name, **scores[name], "intervals": _intervals([rows[name]], keys)} for name in rows],
        "differences": [
            {
                "name": name,
                "minus": first,
                **{key: scores[name][key] - scores[first][key] for key in keys},
                "intervals": _intervals([rows[name], rows[first]], keys),
            }
            for name, _ in others
        ],
    }
    return comparison, protocol


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(str(row.get(key)) for key in ("video", "expression", "annotator", "object"))


def _in_order(rows: Iterable[Row], order: Sequence[tuple[Any, ...]], path: Path) -> list[Row]:
    """Return rows in the order of another system's.

    Raises DcrisError if they are not of the same expressions, one row each."""
    found = [*rows]
    by_identity = {_identity(row): row for row in found}
    if len(by_identity) != len(found) or by_identity.keys() != set(order):
        raise DcrisError(f"{path} has not one row for each expression of the first system; score its masks again")
    return [by_identity[each] for each in order]
