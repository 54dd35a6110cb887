"""The layout of CRIS, ETRIS and DETRIS: the same references as in the REFER layout, and one
sentence for each error.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import TinyRefer
from dcris.data.check import check_dataset
from dcris.data.coco import CATEGORIES
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from layouts import write_prepared


@pytest.fixture
def prepared(tiny_refer: TinyRefer, tmp_path: Path) -> tuple[ReferenceTable, Path]:
    """The small data set in the REFER layout, and the root of the same one as their tools prepare
    it.
    """
    table = load_references(tiny_refer.write(), "tiny")
    root = tmp_path / "prepared"
    write_prepared(table, root, "refcocog_u")
    (root / "images").mkdir()
    tiny_refer.image_folder.rename(root / "images/train2014")
    return table, root


def test_the_same_references_as_in_the_refer_layout(prepared):
    """Data prepared for DETRIS give the same scores."""
    original, root = prepared
    table = load_references(root, "refcocog", "umd")
    assert (table.dataset, table.split_by, table.root) == ("refcocog", "umd", root)
    assert table.splits() == original.splits()
    expected = {reference.ref_id: reference for reference in original.references}
    for reference in table.references:
        truth = expected[reference.ref_id]
        assert reference.image_path == root / "images/train2014" / truth.image_path.name
        assert reference.image_path.is_file()
        for attribute in ("split", "category", "expressions", "image_size"):
            assert getattr(reference, attribute) == getattr(truth, attribute)
        mask = union_mask(reference.segmentations, reference.image_size)
        np.testing.assert_array_equal(mask, union_mask(truth.segmentations, truth.image_size))
    assert len({reference.image_id for reference in table.references}) == 2
    assert check_dataset(root, "refcocog").problem_count == 0


@pytest.mark.slow
def test_real_references(refer_root, tmp_path):
    """COCO's own names, categories and masks."""
    original = load_references(refer_root, "cocomini")
    write_prepared(original, tmp_path, "refcoco")
    table = load_references(tmp_path, "refcoco")
    assert (table.dataset, table.split_by) == ("refcoco", "unc")
    assert table.splits() == original.splits()
    expected = {reference.ref_id: reference for reference in original.references}
    for reference in table.references:
        truth = expected[reference.ref_id]
        found = (reference.image_id, reference.category, reference.expressions, reference.image_size)
        assert found == (truth.image_id, truth.category, truth.expressions, truth.image_size)
    for reference in table.references[::50]:
        mask = union_mask(reference.segmentations, reference.image_size)
        truth = expected[reference.ref_id]
        np.testing.assert_array_equal(mask, union_mask(truth.segmentations, truth.image_size))


def test_the_categories_are_cocos(refer_root):
    content = json.loads((refer_root / "cocomini/instances.json").read_text())
    assert {category["id"]: category["name"] for category in content["categories"]} == CATEGORIES


def test_folders_by_their_own_names_and_by_the_data_set_they_hold(prepared):
    """The folder's name contains the partition, the data set's does not; both are accepted, and
    ambiguity is an error.
    """
    _, root = prepared
    for dataset, split_by in (("refcocog", None), ("refcocog", "umd"), ("refcocog_u", None), ("refcocog_u", "umd")):
        table = load_references(root, dataset, split_by)
        assert (table.dataset, table.split_by) == ("refcocog", "umd")
    with pytest.raises(DcrisError, match=r"refcocog in .* is split by umd, not by google; change --split-by"):
        load_references(root, "refcocog", "google")
    (root / "anns/refcocog_u").rename(root / "anns/mine")
    (root / "masks/refcocog_u").rename(root / "masks/mine")
    table = load_references(root, "mine")
    assert (table.dataset, table.split_by) == ("mine", "prepared")
    for place in ("anns", "masks"):
        (root / place / "mine").rename(root / place / "refcocog_u")
        (root / place / "refcocog_g").symlink_to(root / place / "refcocog_u")
    assert load_references(root, "refcocog", "google").split_by == "google"
    with pytest.raises(DcrisError, match="several partitions of refcocog; choose one with --split-by: google, umd"):
        load_references(root, "refcocog")


def test_the_empty_test_split_of_googles_refcocog(prepared):
    """Their script writes a test.json without references for it."""
    _, root = prepared
    (root / "anns/refcocog_u/test.json").write_text("[]")
    assert list(load_references(root, "refcocog").splits()) == ["train", "val", "testA"]
    for path in (root / "anns/refcocog_u").iterdir():
        path.write_text("[]")
    with pytest.raises(DcrisError, match=r"refcocog in .* has no references"):
        load_references(root, "refcocog")


def test_masks_may_have_any_value_but_0(prepared):
    """Some copies have 1, others 255."""
    _, root = prepared
    path = root / "masks/refcocog_u/11.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(pixels // 255).save(path)
    (reference,) = load_references(root, "refcocog").split("val")
    assert union_mask(reference.segmentations, reference.image_size).sum() == (pixels > 0).sum() > 0


def test_the_orientation_of_a_mask_is_applied(prepared):
    """A mask may be rotated by its EXIF tag only."""
    _, root = prepared
    path = root / "masks/refcocog_u/11.png"
    mask = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = 3
    mask.save(path, exif=exif)
    (reference,) = load_references(root, "refcocog").split("val")
    turned = np.asarray(mask)[::-1, ::-1] > 0
    assert np.array_equal(union_mask(reference.segmentations, reference.image_size).astype(bool), turned)


def test_masks_that_are_missing_or_of_another_size(prepared):
    """Without --generate_mask, their script writes no masks; a resized mask does not fit its
    object.
    """
    _, root = prepared
    path = root / "masks/refcocog_u/11.png"
    Image.open(path).resize((20, 15)).save(path)
    report = check_dataset(root, "refcocog")
    assert "15 x 20" in report.problems[0]
    path.unlink()
    with pytest.raises(
        DcrisError, match=r"val\.json: the mask 11\.png of reference 11 is missing in .*--generate_mask"
    ):
        load_references(root, "refcocog")


def test_a_damaged_mask_is_one_problem_among_others(prepared):
    """`data check` stopped at the first image whose first mask was damaged, and listed nothing."""
    original, root = prepared
    path = root / "masks/refcocog_u/10.png"
    path.write_bytes(path.read_bytes()[:20])
    report = check_dataset(root, "refcocog")
    assert "10.png" in report.problems[0]
    assert sum(references for references, _ in report.splits.values()) == len(original.references) - 1
    with pytest.raises(DcrisError, match=r"cannot read the image .*10\.png"):
        load_references(root, "refcocog")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"segment_id": "../../11"}, "entry 1 has a 'segment_id' that is not an integer but str"),
        ({"segment_id": 12}, r"val\.json: reference 12 occurs twice"),
        ({"cat": 80}, "reference 11 has a 'cat' of 80; valid are 0 to 79"),
        ({"cat": -1}, "reference 11 has a 'cat' of -1"),
        ({"img_name": "../1.png"}, "'img_name' that is not a plain path"),
        ({"sentences": []}, "reference 11 has an empty 'sentences'"),
        ({"sentences": [{"idx": 0, "sent": "a"}]}, "has no 'sent_id'"),
        ({"sentences": [{"idx": 0, "sent_id": 300, "sent": "a"}]}, "sentence 300 of reference 11 occurs twice"),
        ({"sentences": [{"idx": 0, "sent_id": 1, "sent": " "}]}, "blank 'sent'"),
    ],
)
def test_each_malformed_entry_is_named(prepared, change, sentence):
    """The error names the file, the reference and the field."""
    _, root = prepared
    path = root / "anns/refcocog_u/val.json"
    (entry,) = json.loads(path.read_text())
    path.write_text(json.dumps([entry | change]))
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(root, "refcocog")
    assert "\n" not in str(caught.value)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(key=st.sampled_from(["segment_id", "cat", "img_name", "sentences", "bbox", "sentences_num"]), value=_VALUES)
def test_nothing_in_a_file_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    """Any content gives one sentence or references, never a traceback."""
    root = tmp_path_factory.mktemp("any")
    entry = {"segment_id": 1, "cat": 0, "img_name": "1.png", "sentences": [{"sent_id": 1, "sent": "it"}]}
    (root / "anns/refcoco").mkdir(parents=True)
    (root / "masks/refcoco").mkdir(parents=True)
    Image.new("L", (4, 3)).save(root / "masks/refcoco/1.png")
    (root / "anns/refcoco/val.json").write_text(json.dumps([entry | {key: value}]))
    try:
        table = load_references(root, "refcoco")
    except DcrisError as error:
        assert "\n" not in str(error)
    else:
        assert table.references[0].image_size == (3, 4)


def test_a_missing_data_set_lists_all_layouts(tmp_path):
    """The error lists the places of all layouts."""
    with pytest.raises(DcrisError) as caught:
        load_references(tmp_path, "refcoco")
    for place in ("refcoco/refs(...).p", "anns/refcoco/*.json", "refcoco/**/*.parquet", "dcris data fetch"):
        assert place in str(caught.value)
