"""`dcris data import`: exports of annotation tools become references; annotations that cannot are
counted. COCO is the example; tests/test_tools.py has the other formats.
"""

import csv
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris.data.check import check_dataset
from dcris.data.importer import ImportResult, import_annotations, list_without_phrase
from dcris.data.masks import decode_mask, encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from runs import leftovers

H, W = 8, 12
MASK = np.zeros((H, W), np.uint8)
MASK[1:4, 2:9] = 1
POLYGON = [[2.0, 1.0, 9.0, 1.0, 9.0, 4.0, 2.0, 4.0]]
RUNS = encode_mask(MASK)
CUP, DOG, DOT = 1, 2, 3


class Export:
    """The export of an annotation tool. Change `content`, then `load()` it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "photos").mkdir(parents=True)
        for number in range(1, 5):
            Image.new("RGB", (W, H), (number, 0, 0)).save(folder / f"photos/{number}.png")
        self.content: dict[str, Any] = {
            "images": [{"id": n, "file_name": f"{n}.png", "height": H, "width": W} for n in range(1, 5)],
            "categories": [{"id": CUP, "name": "cup"}, {"id": DOG, "name": "dog"}, {"id": DOT, "name": "7"}],
            "annotations": [],
        }
        for image_id, category_id, segmentation in (
            (1, CUP, POLYGON),
            (1, DOG, RUNS),
            (2, CUP, POLYGON),
            (2, CUP, POLYGON),
            (3, DOG, {"size": [H, W], "counts": [0, H * W]}),
        ):
            self.add(image_id, category_id, segmentation)

    def add(self, image_id: int, category_id: int, segmentation: Any = POLYGON, **more: Any) -> int:
        number = 11 + len(self.content["annotations"])
        record = {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation}
        self.content["annotations"].append(record | more)
        return number

    def load(self, phrases: Any = None, **settings: Any) -> tuple[ReferenceTable, ImportResult]:
        out = self.folder / "my.jsonl"
        out.unlink(missing_ok=True)
        (self.folder / "coco.json").write_text(json.dumps(self.content))
        if phrases is not None:
            file = self.folder / ("phrases.csv" if isinstance(phrases, str) else "phrases.json")
            file.write_text(phrases if isinstance(phrases, str) else json.dumps(phrases), encoding="utf-8")
            settings["phrases"] = file
        settings = {"images": self.folder / "photos", "val": 0.0} | settings
        done = import_annotations(self.folder / "coco.json", out, **settings)
        return load_references(out, None), done


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return Export(tmp_path / "export")


def said(table: ReferenceTable) -> list[tuple[int, list[str]]]:
    """Number of the image and expressions of each reference."""
    return [(int(item.image_path.stem), [each.text for each in item.expressions]) for item in table.references]


def test_category_names_are_phrases_where_they_mean_one_object(export: Export) -> None:
    """ "cup" in an image with two cups is ambiguous."""
    table, done = export.load()
    assert said(table) == [(1, ["cup"]), (1, ["dog"]), (3, ["dog"])]
    assert (done.splits, done.images, done.expressions, done.ambiguous) == ({"train": 3}, 2, 3, 2)
    assert "left out: 2 whose phrase fits several objects of an image" in str(done)
    assert [item.category for item in table.references] == ["cup", "dog", "dog"]
    for item, mask in zip(table.references, (MASK, MASK, np.ones((H, W))), strict=True):
        np.testing.assert_array_equal(union_mask(item.segmentations, (H, W)), mask)
    table, done = export.load(ambiguous="keep")
    assert [phrases for number, phrases in said(table) if number == 2] == [["cup"], ["cup"]]
    assert done.left_out == ""


def test_crowds_are_left_out_but_count_for_ambiguity(export: Export) -> None:
    """One dog beside a crowd of dogs is not the only dog."""
    export.add(3, DOG, RUNS, iscrowd=1)
    table, done = export.load()
    assert said(table) == [(1, ["cup"]), (1, ["dog"])]
    assert (done.crowds, done.ambiguous) == (1, 3)
    table, done = export.load(keep_crowds=True, ambiguous="keep")
    assert (len(table.references), done.crowds) == (6, 0)


def test_boxes_are_not_masks(export: Export) -> None:
    """Some tools export boxes with an empty segmentation."""
    export.add(4, DOG, [], bbox=[1, 2, 3, 4])
    del export.content["annotations"][0]["segmentation"]
    table, done = export.load()
    assert (len(table.references), done.without_mask) == (2, 2)


def test_an_annotation_s_own_phrase_comes_first(export: Export) -> None:
    """Under any of the field names, and for any number of objects of the category."""
    for record, (key, value) in zip(
        export.content["annotations"][1:4],
        [
            ("caption", "the brown dog"),
            ("phrase", "left cup"),
            ("expressions", ["right cup", "the red cup", "right cup"]),
        ],
        strict=True,
    ):
        record[key] = value
    export.content["annotations"][0]["caption"] = ""  # an empty field
    export.content["annotations"][4]["attributes"] = {"occluded": False, "phrase": "the dog"}  # as CVAT exports them
    table, done = export.load()
    assert said(table) == [
        (1, ["cup"]),
        (1, ["the brown dog"]),
        (2, ["left cup"]),
        (2, ["right cup", "the red cup"]),
        (3, ["the dog"]),
    ]
    assert done.left_out == ""


def test_phrases_from_a_file(export: Export) -> None:
    """Precedence: phrases by annotation id, the annotation's own, phrases by category.

    Other annotations have none, unless the file has phrases of annotations only.
    """
    export.content["annotations"][1]["phrase"] = "the brown dog"
    export.content["annotations"][4]["phrase"] = "the black dog"
    table, done = export.load({"13": ["left cup"], "14": "right cup", "15": "it", "cup": ["a mug", "cup"]})
    assert said(table) == [
        (1, ["a mug", "cup"]),
        (1, ["the brown dog"]),
        (2, ["left cup"]),
        (2, ["right cup"]),
        (3, ["it"]),
    ]
    table, done = export.load({"dog": "a dog"})
    assert said(table) == [(1, ["the brown dog"]), (3, ["the black dog"])]
    assert done.without_phrase == 3
    table, done = export.load({"13": "left cup"})
    assert [phrases for _, phrases in said(table)] == [["cup"], ["the brown dog"], ["left cup"], ["the black dog"]]
    assert done.ambiguous == 1


def test_one_phrase_for_two_categories_fits_both(export: Export) -> None:
    """ "thing" for cups and dogs is ambiguous in an image with both."""
    table, done = export.load({"cup": ["Thing ", "cup"], "dog": "thing"})
    assert said(table) == [(1, ["cup"]), (3, ["thing"])]
    assert done.ambiguous == 3


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_phrases_from_a_spreadsheet(export: Export, mark: str) -> None:
    """CSV with any delimiter, with further columns and with rows that have no phrase yet."""
    rows = [
        ["\ufeffAnnotation", "who", "Phrase"],
        ["11", "me", '"the ""blue"" cup"'],
        ["12", "me", ""],
        ["11", "", "кубок"],
    ]
    table, done = export.load("\r\n".join(mark.join(row) for row in rows))
    assert said(table) == [(1, ['the "blue" cup', "кубок"]), (1, ["dog"]), (3, ["dog"])]
    assert done.ambiguous == 2
    # As Excel and pandas write them, and as a spreadsheet saves it, with the cells of other lines.
    for declared in (f"sep={mark}", f'"sep={mark}"', f"sep={mark}{mark}", f'"sep={mark}"{mark * 4}'):
        table, _ = export.load(f"{declared}\nannotation{mark}phrase\n11.0{mark}a cup\n")
        assert said(table)[0] == (1, ["a cup"])
    table, _ = export.load(f"category{mark}phrase\n7{mark}dot\ncup{mark}a cup\n")
    assert said(table) == [(1, ["a cup"])]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_phrases_in_another_encoding_are_refused_with_one_advice(export: Export, encoding: str) -> None:
    """The folder and the name are right."""
    (export.folder / "coco.json").write_text(json.dumps(export.content))
    path = export.folder / "phrases.csv"
    path.write_bytes("category,phrase\ncup,die größere Tasse\n".encode(encoding))
    with pytest.raises(DcrisError, match=r"phrases\.csv: it is .*; save it as UTF-8$"):
        import_annotations(export.folder / "coco.json", export.folder / "my.jsonl", phrases=path)


def test_an_apostrophe_inside_a_category_is_part_of_its_name(export: Export) -> None:
    """One that stood before a hyphen was taken for a spreadsheet's mark, and the category was not
    found in the export.
    """
    export.content["categories"][1]["name"] = "kids'-toy"
    table, _ = export.load("category,phrase\nkids'-toy,a toy\n")
    assert (1, ["a toy"]) in said(table)


@pytest.mark.parametrize(
    ("phrases", "sentence"),
    [
        ({"99": "x"}, "'99' is neither the id of an annotation nor the name of a category"),
        ({"cups": "x"}, "'cups' is neither the id of an annotation"),
        ({"cup": ""}, "blank 'phrase'"),
        ({"cup": []}, "neither text nor a list of texts"),
        ({"cup": {"a": "b"}}, "neither text nor a list of texts"),
        (["cup"], "not an object with phrases"),
        ("id,text\n1,x", "header is neither"),
        ("annotation\n11", "header is neither"),
        ("", "header is neither"),
        ("annotation,phrase\n11,x\n12,y\n99,x", "row 4, with the annotation '99', is not in the export"),
        ("annotation,phrase\ncup,x", "row 2, with the annotation 'cup', is not in the export"),
        ("category,phrase\n11,x", "row 2, with the category '11', is not in the export"),
        ('annotation,phrase\n11,"' + "x" * 200_000 + '"', "not CSV"),
    ],
)
def test_unknown_keys_and_blank_phrases_are_refused(export: Export, phrases: Any, sentence: str) -> None:
    """A misspelt name would silently leave out a category."""
    with pytest.raises(DcrisError, match=rf"phrases\.(json|csv).*{sentence}"):
        export.load(phrases)
    assert not (export.folder / "my.jsonl").exists()


def test_an_ambiguous_key_is_refused(export: Export) -> None:
    """Category names may be numbers; the CSV header tells ids and names apart."""
    for number, record in enumerate(export.content["annotations"], 5):
        record["id"] = number
    with pytest.raises(DcrisError, match="'7' is both an annotation and a category"):
        export.load({"7": "x"})
    table, _ = export.load("annotation,phrase\n7,x\n")
    assert (2, ["x"]) in said(table)


def _set(place: tuple[Any, ...], value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value

    return change


FIRST = ("annotations", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(("annotations",), None), "'annotations' that is not a list"),
        (_set((*FIRST, "image_id"), 99), "annotation 11 names image 99, which the file does not have"),
        (_set((*FIRST, "category_id"), 99), "annotation 11 names category 99, which the file does not have"),
        (_set((*FIRST, "category_id"), "cup"), "annotation 11 has a 'category_id' that is not an integer"),
        (_set(FIRST, 5), "entry 1 of 'annotations' is not an object"),
        (_set((*FIRST, "iscrowd"), "perhaps"), "annotation 11 has an 'iscrowd' that is neither 0 nor 1"),
        (_set((*FIRST, "segmentation"), [[1, 2]]), "annotation 11 cannot be decoded .*no polygon has three corners"),
        (_set((*FIRST, "segmentation"), [[1, 2, 3, 4]]), "annotation 11 cannot be decoded .*no polygon has three"),
        (_set((*FIRST, "segmentation"), [*POLYGON, [1] * 7]), "annotation 11 cannot be decoded .*polygon 2"),
        (_set((*FIRST, "segmentation"), [["1", "x"] * 4]), "annotation 11 cannot be decoded .*polygon 1"),
        (_set((*FIRST, "segmentation"), [[1, 1, 5, 1, 9, 1]]), "annotation 11 has a mask without a pixel"),
        (_set((*FIRST, "segmentation"), {"size": [H, W], "counts": [H * W]}), "annotation 11 has a mask without"),
        (_set((*FIRST, "segmentation"), [[]]), "annotation 11 has no mask"),
        (_set((*FIRST, "segmentation"), "[[1,1,2,2,3,1]]"), "annotation 11 cannot be decoded .*neither polygons"),
        (_set(("images", 1), {"id": "1", "file_name": "2.png"}), "two different entries of 'images' have the id 1"),
        (_set((*FIRST, "segmentation"), {"size": [W, H], "counts": [W * H]}), "annotation 11 cannot be decoded"),
        (_set((*FIRST, "segmentation"), [[float("nan")] * 6]), "annotation 11 cannot be decoded"),
        (_set((*FIRST, "caption"), 5), "annotation 11 has a 'caption' that is neither text"),
        (_set((*FIRST, "phrase"), " "), "annotation 11 has a blank 'phrase'"),
        (_set(("categories", 0, "name"), ""), "category 1 has a blank 'name'"),
        (_set(("images", 0, "file_name"), "../../etc/passwd"), "no image file '../../etc/passwd' in .*photos"),
        (_set(("images", 0, "file_name"), 7), r"image 1 has a 'file_name' that is not text but int \(7\)"),
        (_set(("images", 0, "file_name"), "none.png"), "no image file .*none.png"),
        (_set(("images", 0, "height"), W), r"1.png is 8 x 12 pixels .* has 12 x 12, so its masks do not fit"),
        (_set(("annotations",), [1] * 20_000), "20,000 entries of 'annotations' are not objects"),
        (_set(("annotations",), []), "no annotation in .* has both a mask and a phrase"),
    ],
)
def test_each_problem_of_an_export_is_named(export: Export, change: Any, sentence: str) -> None:
    """With `strict` nothing is written; otherwise the annotation is left out and named, and the
    others are converted.
    """
    change(export.content)
    with pytest.raises(DcrisError, match=sentence) as caught:
        export.load(strict=True)
    assert "\n" not in str(caught.value)
    assert not (export.folder / "my.jsonl").exists()
    assert not leftovers(export.folder)
    if len(export.content["annotations"] or ()) != 5:
        return
    table, done = export.load()
    assert str(caught.value) in done.problems
    left_out = done.unusable + done.without_mask + done.empty + done.ambiguous
    assert len(table.references) == len(export.content["annotations"]) - left_out
    assert not check_dataset(export.folder / "my.jsonl", None).problem_count


def test_the_first_ten_problems_are_named(export: Export) -> None:
    """A missing image is named once, even if it has many objects."""
    for _ in range(12):
        export.add(4, DOT, [[1, 2]])
    for _ in range(3):
        export.add(5, DOT)
    export.content["images"].append({"id": 5, "file_name": "none.png", "height": H, "width": W})
    _, done = export.load(ambiguous="keep")
    assert (done.unusable, len(done.problems)) == (15, 10)
    assert "15 that cannot be used" in str(done)
    export.content["annotations"] = export.content["annotations"][-3:]
    with pytest.raises(
        DcrisError, match=r"3 that cannot be used; the first problem: there is no image file .*none\.png"
    ):
        export.load(ambiguous="keep")


POINTS = [[2, 1], [9, 1], [9, 4], [2, 4]]


@pytest.mark.parametrize(
    "change",
    [
        {"segmentation": [*POLYGON, [4.0, 2.0, 4.0, 3.0], [4.0, 2.0], []]},  # remnants of editing
        {"segmentation": POLYGON[0]},
        {"segmentation": [[str(value) for value in POLYGON[0]]]},
        {"segmentation": POINTS},
        {"segmentation": [POINTS]},
        {"segmentation": [{"x": x, "y": y} for x, y in POINTS]},
        {"segmentation": [[{"x": x, "y": y} for x, y in POINTS]]},
        {"segmentation": RUNS},
        {"segmentation": {"size": [float(H), str(W)], "counts": RUNS["counts"]}},
        {"segmentation": {"size": [H, W], "counts": [17.0, 3, 5, 3, 5, 3, 5, 3, 5, 3, 5, 3, 5, 3, 28]}},
        {"id": "11"},
        {"id": 11.0, "image_id": "1", "category_id": 1.0},
        {"image_id": "0000001"},
        *({"iscrowd": value} for value in (0, 0.0, False, None, "0", "false", "", "0.0")),
    ],
)
def test_other_spellings_of_annotations_are_read(export: Export, change: dict[str, Any]) -> None:
    """Numbers as text or with .0, lists of points, remnants of editing."""
    export.content["annotations"][0].update(change)
    table, _ = export.load(strict=True)
    assert len(table.references) == 3
    np.testing.assert_array_equal(decode_mask(table.references[0].segmentations[0], (H, W)), MASK)


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", "1.0"])
def test_all_spellings_of_iscrowd_are_read(export: Export, value: Any) -> None:
    export.content["annotations"][0]["iscrowd"] = value
    assert export.load(strict=True)[1].crowds == 1


def test_other_spellings_of_records_are_read(export: Export) -> None:
    """Sizes as text, other spellings of paths, no categories, repeated records."""
    expected = said(export.load()[0])
    images, annotations = export.content["images"], export.content["annotations"]
    images[0].update(height=str(H), width=float(W), file_name="./1.png")
    images[2].update(id="3", file_name=".//3.png")
    images.append(images[0])
    annotations.append(annotations[0])
    images.append({"id": 9, "file_name": "2.png", "height": H, "width": W})  # an image that is listed twice
    annotations[3]["image_id"] = 9
    table, done = export.load(strict=True)
    assert said(table) == expected
    assert done.ambiguous == 2
    annotations[0]["phrase"] = "a blue cup"
    del export.content["categories"], annotations[0]["category_id"]
    table, done = export.load(strict=True)
    assert said(table) == [(1, ["a blue cup"])]
    assert done.without_phrase == 4


def test_two_annotations_of_one_id(export: Export) -> None:
    """Merged files have them. They matter only for phrases by annotation id."""
    export.content["annotations"][1]["id"] = 11
    assert len(export.load(strict=True)[0].references) == 3
    table, done = export.load({"11": "it", "13": "the left cup"})
    assert said(table) == [(2, ["the left cup"]), (3, ["dog"])]
    assert done.unusable == 2
    assert "two annotations have the id 11, and the phrase file gives it a phrase" in done.problems[0]


def test_a_disk_that_is_full_leaves_nothing(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dcris.utils.files.os.fsync", full)
    with pytest.raises(DcrisError, match=r"cannot write .*my\.jsonl: No space left"):
        export.load()
    assert not (export.folder / "my.jsonl").exists()
    assert not leftovers(export.folder)


def test_paths_are_relative_to_the_written_file(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder can be moved as a whole."""
    export.load()
    assert json.loads((export.folder / "my.jsonl").read_text().splitlines()[0])["image"] == "photos/1.png"
    coco, photos = export.folder / "coco.json", export.folder / "photos"
    import_annotations(coco, images=photos, out=photos / "beside.jsonl")
    assert json.loads((photos / "beside.jsonl").read_text().splitlines()[0])["image"] == "1.png"
    monkeypatch.chdir(photos)
    import_annotations(coco, Path("../relative.jsonl"), images=Path("../photos"), val=0)
    assert (export.folder / "relative.jsonl").read_bytes() == (export.folder / "my.jsonl").read_bytes()
    (export.folder / "elsewhere").mkdir()
    with pytest.raises(DcrisError, match="not below"):
        import_annotations(coco, images=photos, out=export.folder / "elsewhere/my.jsonl")
    (export.folder / "elsewhere/link").symlink_to(photos)
    import_annotations(coco, export.folder / "elsewhere/my.jsonl", images=export.folder / "elsewhere/link")
    assert len(load_references(export.folder / "elsewhere/my.jsonl", None).references) == 3


def test_existing_files_are_not_overwritten(export: Export) -> None:
    """The phrases may have been edited by hand."""
    export.load()
    coco, photos, out = export.folder / "coco.json", export.folder / "photos", export.folder / "my.jsonl"
    before = out.read_bytes()
    with pytest.raises(DcrisError, match="exists already"):
        import_annotations(coco, images=photos, out=out)
    with pytest.raises(DcrisError, match=r"change it to .*my\.jsonl"):
        import_annotations(coco, images=photos, out=export.folder / "my.json")
    with pytest.raises(DcrisError, match="no folder"):
        import_annotations(coco, export.folder / "new.jsonl", images=export.folder / "images")
    with pytest.raises(DcrisError, match="--split is blank"):
        import_annotations(coco, images=photos, out=export.folder / "new.jsonl", split=" ")
    assert out.read_bytes() == before
    assert not (export.folder / "new.jsonl").exists()


@settings(max_examples=30)
@given(
    objects=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([CUP, DOG, DOT])), min_size=1, max_size=12),
    val=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_splits_go_by_image(
    tmp_path_factory: pytest.TempPathFactory, objects: list[tuple[int, int]], val: float, seed: int
) -> None:
    """No image is in two splits, the share is respected, and the same seed gives the same file."""
    export = Export(tmp_path_factory.mktemp("x") / "export")
    export.content["annotations"] = []
    for image_id, category_id in objects:
        export.add(image_id, category_id)
    table, done = export.load(val=val, seed=seed, ambiguous="keep")
    text = (export.folder / "my.jsonl").read_bytes()
    images = {split: {item.image_id for item in table.references if item.split == split} for split in ("train", "val")}
    count = len({image_id for image_id, _ in objects})
    assert not images["train"] & images["val"]
    assert images["train"]
    assert len(images["val"]) == (min(max(1, round(val * count)), count - 1) if val else 0)
    assert len(table.references) == len(objects) == sum(done.splits.values())
    export.load(val=val, seed=seed, ambiguous="keep")
    assert (export.folder / "my.jsonl").read_bytes() == text


@pytest.mark.parametrize("name", ["coco.json", "phrases.csv", "phrases.json", "photos/1.png"])
def test_what_is_no_regular_file_is_named(export: Export, name: str) -> None:
    """Opening a pipe would block for ever."""
    export.load({"cup": "a cup"})
    (export.folder / "my.jsonl").unlink()
    (export.folder / name).unlink(missing_ok=True)
    os.mkfifo(export.folder / name)
    coco, phrases = export.folder / "coco.json", export.folder / name if "phrases" in name else None
    with pytest.raises(DcrisError, match="it is a pipe"):
        import_annotations(
            coco, export.folder / "my.jsonl", images=export.folder / "photos", phrases=phrases, strict=True
        )


def test_a_split_by_name(export: Export) -> None:
    """For exports with one file per split, which `cat` joins."""
    files = []
    for split in ("train", "test"):
        _, done = export.load(split=split, val=0.5)
        assert done.splits == {split: 3}
        files.append((export.folder / "my.jsonl").read_bytes())
    (export.folder / "both.jsonl").write_bytes(b"".join(files))
    assert load_references(export.folder / "both.jsonl", None).splits() == {"train": (3, 3), "test": (3, 3)}


def _boxes(export: Export, *lefts: int) -> None:
    """Give image 1 one cup for each left side, each 2 pixels wide, and no other annotation."""
    export.content["annotations"] = []
    for left in lefts:
        export.add(1, CUP, [[left, 2, left + 2, 2, left + 2, 6, left, 6]])


def test_one_expression_for_all_objects_of_a_phrase(export: Export) -> None:
    """`merge`: "cup" describes all cups of the image, as in generalised data sets.

    One with a phrase of its own is a cup, too: without it, a model would learn to leave it out.
    """
    _boxes(export, 0, 4, 8)
    export.content["annotations"][1]["expressions"] = ["the cup in between"]
    export.add(1, DOG, RUNS)
    table, done = export.load(ambiguous="merge")
    assert said(table) == [(1, ["cup"]), (1, ["the cup in between"]), (1, ["dog"])]
    assert [len(item.segmentations) for item in table.references] == [3, 1, 1]
    assert done.left_out == ""
    for place, others in ((2, ["the cup in between", "dog"]), (1, ["dog"])):
        polygon = export.content["annotations"][place].pop("segmentation")
        table, done = export.load(ambiguous="merge")
        assert said(table) == [(1, [text]) for text in others]
        assert (done.ambiguous, done.without_mask) == (1, 1)
        export.content["annotations"][place]["segmentation"] = polygon


def test_generated_phrases_tell_objects_apart(export: Export) -> None:
    """`place`: only where the boxes decide it clearly, as for photographs."""
    _boxes(export, 0, 9)
    table, done = export.load(ambiguous="place")
    left, right = ([each.text for each in item.expressions] for item in table.references)
    assert all("left" in text and "cup" in text for text in left)
    assert all("right" in text and "cup" in text for text in right)
    assert 0 < len(left) <= 4
    _boxes(export, 4, 4)
    export.add(2, DOG)
    table, done = export.load(ambiguous="place")
    assert (said(table), done.ambiguous) == ([(2, ["dog"])], 2)
    _boxes(export, 0, 9)
    export.add(1, CUP, [])  # a box without a mask may be anywhere
    export.add(2, DOG)
    assert export.load(ambiguous="place")[1].ambiguous == 2


def test_what_is_ambiguous_can_be_asked(export: Export) -> None:
    """The question has a number and an example; without ambiguous phrases there is none."""
    asked: list[tuple[int, str]] = []

    def choose(count: int, example: str) -> str:
        asked.append((count, example))
        return "keep"

    assert len(export.load(ambiguous=choose)[0].references) == 5
    assert asked == [(2, "'cup' in '2.png'")]
    _boxes(export, 0)
    export.load(ambiguous=choose)
    assert len(asked) == 1


def test_own_phrases_of_two_objects_are_ambiguous_too(export: Export) -> None:
    """Somebody typed the same words twice; nothing says which object they mean."""
    for record in export.content["annotations"][2:4]:
        record["phrase"] = "left cup"
    assert export.load()[1].ambiguous == 2
    export.content["annotations"][3]["phrase"] = ["Left cup ", "the right cup"]
    table, done = export.load()
    assert (2, ["the right cup"]) in said(table)
    assert done.ambiguous == 1


def test_objects_without_a_phrase_are_listed_and_taken_back(export: Export) -> None:
    """Two calls and a spreadsheet: what has a phrase is not listed, and what is listed gets one."""
    export.add(4, DOG)
    del export.content["annotations"][5]["category_id"]
    (export.folder / "coco.json").write_text(json.dumps(export.content))
    todo = export.folder / "todo.csv"
    arguments = (export.folder / "coco.json", todo)
    done = list_without_phrase(*arguments, images=export.folder / "photos")
    assert done.listed == 3
    rows = list(csv.DictReader(todo.read_text().splitlines()))
    assert [(row["annotation"], row["image"], row["category"]) for row in rows] == [
        ("13", "2.png", "cup"),
        ("14", "2.png", "cup"),
        ("16", "4.png", ""),
    ]
    assert {row["box"] for row in rows} == {"2 1 7 3"}
    assert {row["phrase"] for row in rows} == {""}
    with pytest.raises(DcrisError, match="exists already, perhaps with phrases"):
        list_without_phrase(*arguments)
    phrases = [f"number {row['annotation']}" for row in rows]
    todo.write_text(
        "annotation;phrase\n"
        + "".join(f"{row['annotation']};{text}\n" for row, text in zip(rows, phrases, strict=True))
    )
    out = export.folder / "my.jsonl"
    done = import_annotations(export.folder / "coco.json", out, images=export.folder / "photos", phrases=todo)
    assert done.left_out == ""
    assert [text for _, (text,) in said(load_references(out, None))] == ["cup", "dog", *phrases[:2], "dog", phrases[2]]
    todo.unlink()
    export.content["annotations"][2]["id"] = "=1+1"
    (export.folder / "coco.json").write_text(json.dumps(export.content))
    list_without_phrase(*arguments)
    assert "=1" not in todo.read_text()  # an entry without an id is named by its place


def test_crowds_that_are_kept_are_listed(export: Export) -> None:
    """Else --crowds keep would still leave them out of the import that takes the list back."""
    export.add(3, DOG, RUNS, iscrowd=1)
    arguments = (export.folder / "coco.json", export.folder / "todo.csv")
    (export.folder / "coco.json").write_text(json.dumps(export.content))
    listed = []
    for keep_crowds in (False, True):
        (export.folder / "todo.csv").unlink(missing_ok=True)
        listed.append(list_without_phrase(*arguments, images=export.folder / "photos", keep_crowds=keep_crowds).listed)
    assert listed[1] == listed[0] + 1


@pytest.mark.parametrize(
    "name", ["../../media/upload/1/0a1b2c3d-1.png", "images\\0a1b2c3d-1.png", "/data/1.png", "C:\\x\\1.png"]
)
def test_images_are_found_by_their_names(export: Export, name: str) -> None:
    """Label Studio's COCO export names images by their place on its server."""
    export.content["images"][0]["file_name"] = name
    table, _ = export.load(strict=True)
    assert said(table)[0] == (1, ["cup"])
    shutil.move(export.folder / "photos", export.folder / "deep/er")
    (export.folder / "my.jsonl").unlink()
    import_annotations(export.folder / "coco.json", export.folder / "my.jsonl", strict=True)
    assert json.loads((export.folder / "my.jsonl").read_text().splitlines()[0])["image"] == "deep/er/1.png"


def test_uploads_are_found_by_the_names_that_label_studio_gives_them(export: Export) -> None:
    """It replaces spaces and leaves out other signs; only uploads are searched for in this way."""
    (export.folder / "photos/1.png").rename(export.folder / "photos/Tasse 1 (ä, neu).png")
    export.content["images"][0]["file_name"] = "/data/upload/1/0a1b2c3d-Tasse_1_ä_neu.png"
    table, _ = export.load(strict=True)
    assert table.references[0].image_path == export.folder / "photos/Tasse 1 (ä, neu).png"
    export.content["images"][0]["file_name"] = "Tasse_1_ä_neu.png"
    with pytest.raises(DcrisError, match="no image file"):
        export.load(strict=True)


@pytest.mark.parametrize(("stored", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_another_unicode_form_are_found(export: Export, stored: str, written: str) -> None:
    """macOS may store a letter with its accent as two characters, and tools write it as one, so an
    archive of photographs that looks right had no image."""
    name = "Caf\u00e9.png"
    path = export.folder / "photos" / normalize(stored, name)
    (export.folder / "photos/1.png").rename(path)
    export.content["images"][0]["file_name"] = normalize(written, name)
    table, _ = export.load(strict=True)
    assert table.references[0].image_path == path


def test_images_of_one_name_are_told_apart_by_folder(export: Export) -> None:
    """Otherwise the masks of one image would be learnt on another."""
    for folder in ("a", "b"):
        (export.folder / "photos" / folder).mkdir()
        shutil.copy(export.folder / "photos/1.png", export.folder / "photos" / folder / "9.png")
    export.content["images"][0]["file_name"] = "/somewhere/b/9.png"
    table, _ = export.load(strict=True)
    assert table.references[0].image_path == export.folder / "photos/b/9.png"
    export.content["images"][0]["file_name"] = "9.png"
    with pytest.raises(DcrisError, match=r"'9.png' may be .*a/9.png or .*b/9.png; give the folder"):
        export.load(strict=True)


def test_links_that_lead_out_are_the_user_s_own(export: Export, tmp_path: Path) -> None:
    """A name in the file never reaches an image above the folder."""
    shutil.copy(export.folder / "photos/1.png", tmp_path / "secret.png")
    export.content["images"][0]["file_name"] = "../../secret.png"
    with pytest.raises(DcrisError, match=r"no image file '\.\./\.\./secret\.png'"):
        export.load(strict=True)


def test_masks_of_cvat_are_no_crowds(export: Export) -> None:
    """CVAT exports each brush mask as a crowd, with its attributes."""
    runs = {"size": [H, W], "counts": [17, 3, 5, 3, 5, 3, 5, 3, 5, 3, 5, 3, 5, 3, 28]}
    export.add(4, DOG, runs, iscrowd=1, attributes={"occluded": False, "phrase": "the brown dog"})
    export.add(4, CUP, runs, iscrowd=1, attributes={"occluded": False})
    table, done = export.load(strict=True)
    assert said(table)[-2:] == [(4, ["the brown dog"]), (4, ["cup"])]
    np.testing.assert_array_equal(decode_mask(table.references[-1].segmentations[0], (H, W)), MASK)
    assert done.crowds == 0


def test_a_folder_with_a_file_for_each_split(export: Export) -> None:
    """As Roboflow exports it: identifiers are unique in a file only, and the splits are kept."""
    for split, images in (("train", [1, 2]), ("valid", [3])):
        (export.folder / split).mkdir()
        content = {**export.content, "images": [each for each in export.content["images"] if each["id"] in images]}
        content["annotations"] = [each for each in export.content["annotations"] if each["image_id"] in images]
        (export.folder / split / "_annotations.coco.json").write_text(json.dumps(content))
        for number in images:
            shutil.copy(export.folder / f"photos/{number}.png", export.folder / split / f"{number}.png")
    (export.folder / "package.json").write_text('{"name": "x"}')
    shutil.rmtree(export.folder / "photos")
    out = export.folder / "my.jsonl"
    done = import_annotations(export.folder, out, ambiguous="keep", strict=True)
    assert done.splits == {"train": 4, "val": 1}
    first = json.loads(out.read_text().splitlines()[0])
    assert (first["image"], first["annotation"]) == ("train/1.png", "train/_annotations.coco.json#11")
    assert check_dataset(out, None).problem_count == 0
    out.unlink()
    assert import_annotations(export.folder, out, split="test", strict=True).splits == {"test": 3}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "none", "the annotation file is missing: there is no file or folder .*none"),
        (
            lambda folder: folder / "photos",
            "photos has no file of a known format; .*: coco.*masks that are images need",
        ),
        (lambda folder: folder / "other.json", "the format of .*other.json is unknown; .*: coco"),
    ],
)
def test_unknown_formats_are_refused(export: Export, make: Any, sentence: str) -> None:
    (export.folder / "other.json").write_text('{"a": 1}')
    with pytest.raises(DcrisError, match=sentence):
        import_annotations(make(export.folder), export.folder / "my.jsonl")
    with pytest.raises(DcrisError, match="there is no format 'cocoa'; choose from coco"):
        import_annotations(export.folder / "other.json", export.folder / "my.jsonl", format="cocoa")
    with pytest.raises(DcrisError, match="has no 'annotations'"):
        import_annotations(export.folder / "other.json", export.folder / "my.jsonl", format="coco")


def test_a_real_export(refer_root: Path, tmp_path: Path) -> None:
    """COCO's own annotations: objects of several polygons, crowds, thousands of objects."""
    out = tmp_path / "coco.jsonl"
    (tmp_path / "photos").symlink_to(refer_root / "images/mscoco/images/train2014")
    done = import_annotations(refer_root / "cocomini/instances.json", out, images=tmp_path / "photos")
    assert (done.crowds, sum(done.splits.values()) + done.ambiguous) == (49, 4624 - 49)
    table = load_references(out, None)
    content = json.loads((refer_root / "cocomini/instances.json").read_text())
    by_id = {record["id"]: record for record in content["annotations"]}
    alike = Counter((record["image_id"], record["category_id"]) for record in content["annotations"])
    for text, item in zip(out.read_text().splitlines(), table.references, strict=True):
        annotation = by_id[json.loads(text)["annotation"]]
        assert (annotation["segmentation"],) == item.segmentations
        assert alike[annotation["image_id"], annotation["category_id"]] == 1


def test_an_image_of_a_longer_path_than_any_is_left_out(tmp_path: Path) -> None:
    """The other annotations are imported."""
    folder = tmp_path / ("a" * 200) / ("b" * 200)
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(folder / "1.png")
    names = ["1.png", "/".join(["c" * 240] * 16)]
    content = {
        "images": [{"id": number, "file_name": name, "height": 10, "width": 20} for number, name in enumerate(names)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "segmentation": [[1, 1, 8, 1, 8, 8]]}
            for number in (0, 1)
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    result = import_annotations(folder / "coco.json", folder / "out.jsonl")
    assert (result.expressions, result.unusable) == (1, 1)


def refer_folder(folder: Path, phrases: dict[str, str]) -> Path:
    """Write files of references, each with one phrase, and their instances.json and image."""
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(folder / "1.png")
    instances = {
        "images": [{"id": 1, "file_name": "1.png", "height": 10, "width": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 8, 1, 8, 8]]}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    for file, phrase in phrases.items():
        record = {"ref_id": 1, "ann_id": 1, "image_id": 1, "category_id": 1, "split": "train"}
        references = [{**record, "sentences": [{"sent_id": 1, "sent": phrase}]}]
        content = pickle.dumps(references) if file.endswith(".p") else json.dumps(references).encode()
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["Ref_ZOM.p", "Ref-ZOM(final).p", "refs(own).json"])
def test_a_file_of_references_is_read_under_any_of_its_names(tmp_path: Path, name: str) -> None:
    """It is the given one, even if another of the same partition is beside it."""
    folder = refer_folder(tmp_path / "zom", {name: "left cup", "refs(own).p": "another cup"})
    import_annotations(folder / name, folder / "out.jsonl", images=folder)
    assert [each.expressions[0].text for each in load_references(folder / "out.jsonl").references] == ["left cup"]


def test_a_folder_of_data_sets_in_the_refer_layout(tmp_path: Path) -> None:
    """Its instances.json were read as COCO's, whose phrases are the names of categories."""
    folder = refer_folder(tmp_path / "things", {"refs(own).p": "left cup"})
    assert import_annotations(tmp_path, tmp_path / "out.jsonl", images=folder).format == "refer"
    assert [each.expressions[0].text for each in load_references(tmp_path / "out.jsonl").references] == ["left cup"]
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "nowhere").symlink_to("none")
    (tmp_path / "out.jsonl").unlink()
    import_annotations(tmp_path, tmp_path / "out.jsonl", images=folder)
    refer_folder(tmp_path / "others", {"refs(unc).p": "left cup"})
    with pytest.raises(DcrisError, match=r"several partitions: others/refs\(unc\).p, things/refs\(own\).p; give"):
        import_annotations(tmp_path, tmp_path / "again.jsonl")
