"""Parquet as the Hub has it: the same references as in the REFER layout."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TinyRefer
from dcris.data.check import check_dataset
from dcris.data.readers.load import load_references
from dcris.data.readers.parquet import refer_split, split_in_name
from dcris.errors import DcrisError
from layouts import hub_files, hub_rows, parquet


def _write(root: Path, dataset: str, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (root / dataset / name).write_bytes(content)
    return root


def test_the_same_references_as_in_the_refer_layout(tiny_refer: TinyRefer, tmp_path: Path) -> None:
    """The Hub's copy of RefCOCO gives the same scores as the release; its `test` is testA."""
    tiny_refer.instances["categories"] = [{"id": 5, "name": "airplane"}, {"id": 6, "name": "bus"}]  # as COCO has it
    original = load_references(tiny_refer.write(), "tiny")
    root = _write(tmp_path / "hub", "refcoco", hub_files(tiny_refer.references, tiny_refer.instances))
    (root / "images").mkdir()
    tiny_refer.image_folder.rename(root / "images/train2014")
    table = load_references(root, "refcoco")
    assert (table.dataset, table.split_by, table.splits()) == ("refcoco", "unc", original.splits())
    found = {reference.ref_id: reference for reference in table.references}
    for truth in original.references:
        reference = found[truth.ref_id]
        assert reference.image_path == root / "images/train2014" / truth.image_path.name
        for attribute in ("ann_ids", "image_id", "image_size", "category", "split", "segmentations", "expressions"):
            assert getattr(reference, attribute) == getattr(truth, attribute)
    assert check_dataset(root, "refcoco").problem_count == 0
    with pytest.raises(DcrisError, match="split by unc, not by google"):
        load_references(root, "refcoco", "google")


def test_real_references(refer_root: Path, tmp_path: Path) -> None:
    """Masks of COCO's three kinds, and text with people's spelling errors."""
    with (refer_root / "cocomini/refs(templated).p").open("rb") as file:
        records = pickle.load(file)
    instances = json.loads((refer_root / "cocomini/instances.json").read_text())
    _write(tmp_path, "RefCOCOplus", hub_files(records, instances))
    original = load_references(refer_root, "cocomini")
    table = load_references(tmp_path, "refcoco+")
    assert (table.dataset, table.split_by, table.splits()) == ("refcoco+", "unc", original.splits())
    expected = {reference.ref_id: reference for reference in original.references}
    for reference in table.references:
        truth = expected[reference.ref_id]
        for attribute in ("ann_ids", "image_id", "image_size", "category", "split", "segmentations", "expressions"):
            assert getattr(reference, attribute) == getattr(truth, attribute)


def test_files_of_downloaders_are_ignored(tiny_refer: TinyRefer, tmp_path: Path) -> None:
    """`hf download --local-dir` creates a folder for its metadata and unfinished files."""
    root = _write(tmp_path, "mine", hub_files(tiny_refer.references, tiny_refer.instances))
    _write(root, "mine", {".cache/huggingface/train-0.parquet": b"half", "README.md": b"", "data/notes.txt": b""})
    assert load_references(root, "mine").splits() == {"train": (1, 2), "val": (1, 2), "testA": (1, 1)}


_Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: row.update(raw_anns="{"), "row 1 has a 'raw_anns' that is not JSON"),
        # It compresses to 5 KB, but would need 100 MB as lists.
        (lambda row: row.update(raw_anns=f"[{'[],' * 1_500_000}0]"), "row 1 has a 'raw_anns' .*lists and objects"),
        (lambda row: row.update(raw_anns="[]"), "entry 1 of 'annotations' is not an object"),
        (lambda row: row.update(raw_image_info=None), "row 1 has a 'raw_image_info' that is not text but NoneType"),
        (lambda row: row.update(ann_id=None), "row 1 has a 'ann_id' that is not an integer but NoneType"),
        (lambda row: row.update(ann_id=5), "reference 11 names annotation 5, which data does not have"),
        (lambda row: row.update(sentences=None), "row 1 has a 'sentences' that is not a list"),
        (lambda row: row.update(sentences=[]), "reference 11 has an empty 'sentences'"),
        (lambda row: row["sentences"][0].update(sent=None), "'sent' that is not text but NoneType"),
        (lambda row: row.pop("sentences"), "it lacks the columns sentences of jxu124/refcoco and has "),
        (
            lambda row: row.update(raw_image_info=row["raw_image_info"].replace("1.png", "../1.png")),
            "image 1 has a 'file_name' that is not a plain path",
        ),
    ],
)
def test_each_malformed_row_is_named(tiny_refer: TinyRefer, tmp_path: Path, change: _Change, sentence: str) -> None:
    """The error names the row and the field, and no path leads out of the image folder."""
    (row,) = hub_rows(tiny_refer.references, tiny_refer.instances)["validation"]
    change(row)
    root = _write(tmp_path, "refcoco", {"data/validation-00000-of-00001.parquet": parquet([row])})
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(root, "refcoco")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>not found</html>" * 9, None])
def test_other_files_are_reported_as_not_parquet(tiny_refer: TinyRefer, tmp_path: Path, content: bytes | None) -> None:
    """A truncated download, or an error page under the file's name."""
    if content is None:
        content = next(iter(hub_files(tiny_refer.references, tiny_refer.instances).values()))[:-20]
    root = _write(tmp_path, "refcoco", {"validation.parquet": content})
    with pytest.raises(DcrisError, match="is not a whole Parquet file") as caught:
        load_references(root, "refcoco")
    assert "\n" not in str(caught.value)


def test_damage_anywhere_gives_one_sentence_or_none(tiny_refer: TinyRefer, tmp_path: Path) -> None:
    """Whichever byte is wrong, there is no traceback and no crash."""
    whole = bytearray(next(iter(hub_files(tiny_refer.references, tiny_refer.instances).values())))
    random = np.random.default_rng(0)
    refused = 0
    for place in random.integers(4, len(whole) - 4, 300):
        spoiled = bytearray(whole)
        spoiled[place] ^= int(random.integers(1, 256))
        root = _write(tmp_path, "refcoco", {"validation.parquet": bytes(spoiled)})
        try:
            load_references(root, "refcoco")
        except DcrisError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def _repeated(rows: int, words: int, text: str) -> pyarrow.Table:
    """Equal rows, which compress to almost nothing."""
    numbers = {name: pyarrow.repeat(1, rows) for name in ("ref_id", "ann_id", "image_id", "category_id")}
    texts = {name: pyarrow.repeat(text, rows) for name in ("split", "file_name", "raw_anns", "raw_image_info")}
    sentence = [pyarrow.repeat(1, words), pyarrow.repeat("x", words)]
    sentences = pyarrow.StructArray.from_arrays(sentence, ["sent_id", "sent"])
    starts = pyarrow.array([*([0] * rows), words], pyarrow.int32())
    return pyarrow.table({**numbers, **texts, "sentences": pyarrow.ListArray.from_arrays(starts, sentences)})


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (lambda: _repeated(2000, 0, "x" * 100_000), "far more text than a data set of that size could"),
        (lambda: _repeated(1, 3_000_000, "x"), "column sentences.list.element.sent_id has 3,000,000 values"),
        (lambda: _repeated(1_000_000, 0, "x"), "column ref_id has 1,000,000 values"),
        pytest.param(
            lambda: _repeated(1, 0, "x" * 150_000_000), "column split has 1 values in 150", marks=pytest.mark.slow
        ),
    ],
    ids=["texts", "list", "rows", "pages"],
)
def test_a_small_file_cannot_take_gigabytes(tmp_path: Path, table: Callable[[], pyarrow.Table], sentence: str) -> None:
    """9 KB of Parquet decoded to 6 GB: a value may be repeated a million times, and pages are
    compressed a thousandfold.
    """
    (tmp_path / "refcoco").mkdir()
    path = tmp_path / "refcoco/val.parquet"
    pyarrow.parquet.write_table(table(), path, compression="zstd")
    assert path.stat().st_size < 200_000
    with pytest.raises(DcrisError, match=sentence):
        load_references(tmp_path, "refcoco")


def test_a_footer_cannot_claim_values_that_it_lacks(tmp_path: Path) -> None:
    """A file of 25 bytes that claims a list of numbers took memory and time without a bound."""
    footer = bytes([0x99, 0xF7, 0xC0, 0x84, 0x3D, 0])  # field 9, a list of a million doubles
    content = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    root = _write(tmp_path, "refcoco", {"validation.parquet": content})
    with pytest.raises(DcrisError, match=r"not a whole Parquet file .*cut short"):
        load_references(root, "refcoco")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Opening a pipe would block for ever."""
    (tmp_path / "refcoco").mkdir()
    os.mkfifo(tmp_path / "refcoco/val.parquet")
    with pytest.raises(DcrisError, match="it is a pipe, not a regular file"):
        load_references(tmp_path, "refcoco")


def test_without_pyarrow_the_sentence_says_how_to_get_it(
    tiny_refer: TinyRefer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow is large and rarely needed, so it is an optional dependency."""
    root = _write(tmp_path, "refcoco", hub_files(tiny_refer.references, tiny_refer.instances))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DcrisError, match=r'pip install "pyarrow>=14\.0\.1"'):
        load_references(root, "refcoco")


@given(
    split=st.sampled_from(["train", "validation", "val", "test", "testA", "testB"]),
    before=st.sampled_from(["", "data/", "default/", "a/test-b/"]),
    after=st.from_regex(r"(-\d{5}-of-\d{5}(-[0-9a-f]{16})?)?", fullmatch=True),
)
def test_splits_are_read_off_the_names_that_the_hub_gives(split: str, before: str, after: str) -> None:
    """Test references must not be taken for training references."""
    assert split_in_name(Path(f"{before}{split}{after}.parquet")) == split
    assert split_in_name(Path(f"{before}parquet-{split}.parquet")) == split
    assert split_in_name(Path(f"{before}{split}/0000.parquet")) == split


def test_splits_by_their_names_in_refer() -> None:
    assert [refer_split("refcoco", name) for name in ("validation", "test", "testB")] == ["val", "testA", "testB"]
    assert [refer_split("refcocog", name) for name in ("validation", "test", "train")] == ["val", "test", "train"]
    with pytest.raises(DcrisError, match="does not contain a split"):
        split_in_name(Path("data/attested.parquet"))
