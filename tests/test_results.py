"""Results files:

reading returns what was written, and damaged or foreign files raise clear errors.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcris.data.dataset import Queries
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.results import read_results, write_results
from made_results import drawn_result, made_result

CRIS = get_protocol("cris")


def some(count: int = 3) -> list[EvalResult]:
    """Return results with and without a curve, with masks that can be decoded."""
    made = [made_result((number, 7), image=number, expression=f"phrase {number}") for number in range(count)]
    mask = np.zeros((1000, 1000), bool)
    mask[:20, :20] = True
    return [drawn_result(made[0].reference, 0, mask, mask), *made[1:]]


def queries_of(results: list[EvalResult]) -> Queries:
    return [(each.reference, each.expression) for each in results]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
@settings(max_examples=30)
def test_results_are_read_as_written(tmp_path_factory: pytest.TempPathFactory, phrases: list[str]) -> None:
    """Expressions may hold line ends; results come in the queries' order."""
    path = tmp_path_factory.mktemp("results") / "deep" / "a.jsonl"
    results = [
        *some(),
        *(made_result(expression=phrase) for phrase in phrases),
        made_result(expression="é\u2028\n"),
    ]
    write_results(path, results, CRIS)
    assert len(path.read_bytes().splitlines()) == len(results)
    assert read_results(path, queries_of(results)[::-1], CRIS)[0] == results[::-1]


def test_a_line_has_the_documented_fields(tmp_path: Path) -> None:
    """The fields that other programs, such as pandas, read."""
    write_results(tmp_path / "a.jsonl", some(), CRIS)
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert (first["image"], first["phrase"], first["protocol"]) == ("0.jpg", "phrase 0", "cris")
    assert (first["iou"], first["intersection"], first["union"]) == (1.0, 400, 400)
    assert first["segmentation"]["size"] == [1000, 1000]
    assert first["curve"] == [[400, 400]] * 19


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sent_id": None}, "'sent_id'"),
        ({"sent_id": True}, "'sent_id'"),
        ({"ref_id": 10**6}, "another data set"),
        ({"phrase": "another"}, "another data set"),
        ({"phrase": 5}, "'phrase'"),
        ({"protocol": "lavt"}, "protocol 'lavt'"),
        ({"protocol": ["cris"]}, "'protocol'"),
        ({"union": -1}, "numbers of pixels"),
        ({"union": 10**30}, "numbers of pixels"),
        ({"union": float("nan")}, "numbers of pixels"),
        ({"intersection": 8}, "numbers of pixels"),
        ({"intersection": 0.5}, "numbers of pixels"),
        ({"curve": [[1, 2]]}, "'curve'"),
        ({"curve": 5}, "'curve'"),
        ({"curve": [[1, 2, 3]] * 19}, "numbers of pixels"),
        ({"segmentation": None}, "'segmentation'"),
        ({"segmentation": [[0, 0, 5, 5, 0, 5]]}, "'segmentation'"),
        ({"segmentation": {"size": [10**9, 10**9], "counts": "1"}}, "cannot be decoded"),
        ({"segmentation": {"size": [-3, -4], "counts": [12]}}, "cannot be decoded"),
        ({"segmentation": {"size": [3, 4], "counts": [5, 6]}}, "cannot be decoded"),
        ({"segmentation": {"size": [1000, 1000], "counts": [5, 6]}}, "cannot be decoded"),
        ({"segmentation": {"size": "34", "counts": [12]}}, "cannot be decoded"),
        ({"segmentation": {"size": [1000, 1000], "counts": "9" * 10**5}}, "cannot be decoded"),
    ],
)
def test_a_changed_line_raises(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    """The error names file and line; a wrong count must not end in a wrong table."""
    path, results = tmp_path / "a.jsonl", some()
    write_results(path, results, CRIS)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    path.write_text("\n".join(lines))
    with pytest.raises(DcrisError, match=r"a\.jsonl") as caught:
        read_results(path, queries_of(results), CRIS)
    assert sentence in str(caught.value)
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no result for sentence"),
        (b"\xff\xfe\n", "UTF-16"),
        (b"{}\n", "'sent_id'"),
        (b"[1]\n", "named fields"),
        (b"\n", "no result for sentence"),
        (b"[" * 100_000, "line 1 is not valid JSON"),
        (b'{"sent_id": ' + b"9" * 5000 + b"}", "line 1 is not valid JSON"),
    ],
)
def test_another_file_raises(tmp_path: Path, content: bytes, sentence: str) -> None:
    """Images, result files and incomplete lines are not results files."""
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DcrisError, match=r"a\.jsonl") as caught:
        read_results(tmp_path / "a.jsonl", queries_of(some()), CRIS)
    assert sentence in str(caught.value)


def test_a_file_saved_by_an_editor_is_read(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends and blank lines, as editors leave them, are accepted."""
    path, results = tmp_path / "a.jsonl", some()
    write_results(path, results, CRIS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"  \r\n\n")
    assert len(read_results(path, queries_of(results), CRIS)[0]) == len(results)


def test_results_of_other_queries_raise(tmp_path: Path) -> None:
    """Results of another split, incomplete or repeated ones, and a missing file are errors."""
    path, results = tmp_path / "a.jsonl", some()
    write_results(path, results, CRIS)
    with pytest.raises(DcrisError, match="no result for sentence"):
        read_results(path, queries_of([*results, made_result()]), CRIS)
    with pytest.raises(DcrisError, match="has a result for sentence"):
        read_results(path, queries_of(results[1:]), CRIS)
    write_results(path, [*results, results[0]], CRIS)
    with pytest.raises(DcrisError, match=r"line 4 repeats sentence \d+ of line 1"):
        read_results(path, queries_of(results), CRIS)
    with pytest.raises(DcrisError, match="there is no file"):
        read_results(tmp_path / "absent.jsonl", [], CRIS)


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    """An incomplete file would look like the results of a smaller split."""
    results = some()
    results[2] = replace(results[2], prediction=None)
    with pytest.raises(ValueError, match="not kept"):
        write_results(tmp_path / "a.jsonl", results, CRIS)
    assert not list(tmp_path.iterdir())
