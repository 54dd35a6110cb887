"""The formats of annotation tools: every export becomes the objects that were annotated.

The exports are those of tests/tool_exports.py.
"""

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from annotated import OBJECTS, write_images
from conftest import make_tiny_refer
from dcris.cli import main
from dcris.data.brush_rle import decode_brush, encode_brush
from dcris.data.check import check_dataset
from dcris.data.importer import ImportResult, import_annotations, list_without_phrase
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.tools import FORMATS, recognise
from dcris.errors import DcrisError
from dcris.types import Reference
from tool_exports import (
    Maker,
    cvat_coco,
    datumaro,
    fiftyone,
    label_studio,
    label_studio_coco,
    label_studio_min,
    labelme,
    labelme_itself,
    of_image,
    predictions,
    roboflow,
    roboflow_yolo,
    supervisely,
    supervisely_itself,
    via_1,
    via_2,
    yolo,
)

EVERY = [item.phrase for item in OBJECTS]
POLYGONS = [item.phrase for item in OBJECTS if item.polygon]
MADE: list[tuple[str, str, Maker, list[str]]] = [
    ("Label Studio JSON", "label-studio", label_studio, EVERY),
    ("Datumaro", "datumaro", datumaro, EVERY),
    ("CVAT COCO", "coco", cvat_coco, EVERY),
    ("labelme", "labelme", labelme, EVERY),
    ("VIA 2", "via", via_2, POLYGONS),
    ("VIA 1", "via", via_1, POLYGONS),
    ("Supervisely", "supervisely", supervisely, EVERY),
    ("labelme, by itself", "labelme", labelme_itself, EVERY),
    ("Supervisely, by its SDK", "supervisely", supervisely_itself, EVERY),
    ("predictions", "dcris", predictions, EVERY),
]


def load(source: Path, folder: Path, **more: Any) -> tuple[tuple[Reference, ...], ImportResult]:
    out = folder / "my.jsonl"
    out.unlink(missing_ok=True)
    done = import_annotations(source, out, **{"val": 0.0} | more)
    assert check_dataset(out, None, deep=True).problem_count == 0
    return load_references(out, None).references, done


def mask_of(reference: Reference) -> Any:
    return union_mask(reference.segmentations, reference.image_size)


@pytest.mark.parametrize(("name", "format", "make", "phrases"), MADE, ids=[each[0] for each in MADE])
def test_an_export_becomes_what_was_annotated(
    name: str, format: str, make: Maker, phrases: list[str], tmp_path: Path
) -> None:
    """Each object with its own phrase, its category and exactly its pixels."""
    source = make(tmp_path)
    assert recognise(source)[0] == format
    references, done = load(source, tmp_path)
    assert [[each.text for each in item.expressions] for item in references] == [[phrase] for phrase in phrases]
    assert (done.format, done.unusable, done.ambiguous) == (format, 0, 0)
    for reference in references:
        (truth,) = (item for item in OBJECTS if item.phrase == reference.expressions[0].text)
        assert reference.image_path.name == truth.image
        assert reference.category == ("object" if format == "dcris" else truth.category)
        np.testing.assert_array_equal(mask_of(reference), truth.mask)
    assert FORMATS[format].title in str(done)


@pytest.mark.parametrize(("make", "has_phrases"), [(fiftyone, True), (roboflow, False), (roboflow_yolo, False)])
def test_fiftyone_and_roboflow_draw_polygons_through_pixels(make: Maker, has_phrases: bool, tmp_path: Path) -> None:
    """Their libraries make polygons of masks, whose corners are the centres of border pixels, so
    that up to a pixel is missing on each side."""
    references, done = load(make(tmp_path), tmp_path, ambiguous="keep", keep_crowds=True)
    assert (done.unusable, len(references)) == (0, len(OBJECTS))
    for reference, truth in zip(references, OBJECTS, strict=True):
        assert reference.image_path.name == truth.image
        assert reference.expressions[0].text == (truth.phrase if has_phrases else truth.category)
        assert reference.category == truth.category
        found = mask_of(reference)
        assert np.sum(found & truth.mask) / np.sum(found | truth.mask) > 0.6


def test_yolo_has_classes_and_splits(tmp_path: Path) -> None:
    """Phrases come from the names of the classes, or from a list that is written and filled in."""
    source = yolo(tmp_path)
    references, done = load(source, tmp_path, ambiguous="keep")
    assert [(item.split, item.category) for item in references] == [("train", "cup"), ("train", "cup"), ("val", "cup")]
    assert done.without_mask == 2
    for reference, truth in zip(references, [item for item in OBJECTS if item.polygon], strict=True):
        np.testing.assert_array_equal(mask_of(reference), truth.mask)
    list_without_phrase(source, tmp_path / "todo.csv")
    rows = (tmp_path / "todo.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [
        "labels/train/1.txt#1",
        "labels/train/1.txt#2",
        "labels/val/2.txt#1",
    ]
    filled = [rows[0], rows[1] + "the left cup", rows[2] + "the right cup"]
    (tmp_path / "todo.csv").write_text("\n".join(filled))
    references, _ = load(source, tmp_path, phrases=tmp_path / "todo.csv")
    assert [item.expressions[0].text for item in references] == ["the left cup", "the right cup"]
    (tmp_path / "my.jsonl").unlink()
    (tmp_path / "data.yaml").rename(tmp_path / "x.yaml")
    (tmp_path / "classes.txt").write_text("cup\nring\n")  # as Label Studio exports it
    assert len(load(source, tmp_path, ambiguous="keep")[0]) == 3
    assert len(load(tmp_path / "x.yaml", tmp_path, ambiguous="keep")[0]) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [x]\nnames: *a\n", "it has an alias"),
        ("names: !!python/object/apply:os.system ['touch x']\n", "no annotation in"),  # a list with a text
        ("names: 7\n", "neither a list nor an object: '7'"),
        ("names: {a: b}\n", "an entry that is not a number with a name: 'a': 'b'"),
        ("names: [" + "[" * 5000, "not YAML of plain values"),
        ("names:\n\t- x\n", "not YAML of plain values"),
    ],
)
def test_yaml_of_strangers_runs_no_code(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = yolo(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DcrisError, match=sentence):
        load(source, tmp_path)
    assert not (tmp_path / "x").exists()


def test_label_studio_json_min_pairs_texts_of_one_tag_only(tmp_path: Path) -> None:
    """It has no ids. With a brush and a polygon in an image, the order of texts says nothing."""
    references, done = load(label_studio_min(tmp_path), tmp_path)
    assert [item.expressions[0].text for item in references] == ["the left cup", "the right cup", "ring", "cup"]
    assert [item.image_path.name for item in references] == ["1.png", "1.png", "2.png", "2.png"]
    for reference, truth in zip(references, OBJECTS, strict=True):
        np.testing.assert_array_equal(mask_of(reference), truth.mask)
    (problem,) = done.problems
    assert "task 2 has 2 texts for 2 regions of 2 tags, and JSON-MIN does not say" in problem
    assert "['a ring', 'a small cup']; export JSON" in problem


def test_label_studio_coco_has_no_phrases_and_no_brush(tmp_path: Path) -> None:
    references, _ = load(label_studio_coco(tmp_path), tmp_path, ambiguous="keep")
    assert [item.expressions[0].text for item in references] == ["cup", "cup", "cup"]
    for reference, truth in zip(references, [item for item in OBJECTS if item.polygon], strict=True):
        np.testing.assert_array_equal(mask_of(reference), truth.mask)


def _task(tmp_path: Path, change: Callable[[list[Any]], None]) -> Path:
    source = label_studio(tmp_path)
    content = json.loads(source.read_text())
    change(content)
    source.write_text(json.dumps(content))
    return source


def test_the_annotation_that_counts(tmp_path: Path) -> None:
    """Of several annotators the ground truth, else the last; skipped tasks and predictions do not
    count where there are annotations."""

    def several(content: list[Any]) -> None:
        (first,) = content[0]["annotations"]
        old = {**first, "updated_at": "2025-01-01", "result": []}
        content[0]["annotations"] = [first, old, {**first, "was_cancelled": True, "updated_at": "2027-01-01"}]
        content[1]["annotations"][0]["was_cancelled"] = True
        content[1]["predictions"] = [{"result": first["result"]}]

    references, _ = load(_task(tmp_path, several), tmp_path)
    assert [item.expressions[0].text for item in references] == ["the left cup", "the right cup"]

    def truth(content: list[Any]) -> None:
        several(content)
        content[0]["annotations"][1] |= {"ground_truth": True, "result": content[0]["annotations"][0]["result"][:2]}

    assert len(load(_task(tmp_path, truth), tmp_path)[0]) == 1


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=images/1.png",
        "https://example.org/photos/1.png?token=a%20b",
        "s3://bucket/some/1.png",
        "http://localhost:8080/data/local-files/?d=x%2Fimages%2F1.png",
        "1.png",
        "images/1.png",
    ],
)
def test_addresses_of_label_studio(address: str, tmp_path: Path) -> None:
    def change(content: list[Any]) -> None:
        content[0]["data"] = {"title": "some task", "picture_of_it": address}

    references, _ = load(_task(tmp_path, change), tmp_path, strict=True)
    assert references[0].image_path.name == "1.png"


def _result(change: dict[str, Any], place: int = 0, task: int = 0) -> Callable[[list[Any]], None]:
    def apply(content: list[Any]) -> None:
        result = content[task]["annotations"][0]["result"][place]
        result["value"].update(change.pop("value", {}))
        result.update(change)

    return apply


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_result({"value": {"points": [[0, 0], [1, "x"], [2, 0]]}}), "region r0 of task 1 .*not a number: 'x'"),
        (_result({"value": {"points": [[0, 0], [1], [2, 0]]}}), r"region r0 of task 1 .*not x and y: \[1\]"),
        (_result({"value": {"points": [[0, 0], [1, 1]]}}), "region r0 of task 1 .*polygon 1 is not a list"),
        (_result({"value": {"points": [[0, 0], [1, 1], [900, 0]]}}), "lies far outside the image: 360"),
        (_result({"original_width": 41}), "1.png is 30 x 40 pixels .* has 30 x 41"),
        (_result({"value": {"text": [" "]}}, 1), "region r0 of task 1 has a blank 'text'"),
        (_result({"value": {"text": 7}}, 1), "region r0 of task 1 has a 'text' that is neither .*: 7"),
        (_result({"value": {"polygonlabels": [7]}}), r"'label' that is not text but int \(7\)"),
        (_result({"value": {"rle": [1, 2, 300]}}, task=1), r"not a list of bytes: \[1, 2, 300\]"),
        (_result({"value": {"rle": [0, 0, 18, 192, 57, 27, 255]}}, task=1), "the 'rle' is cut short"),
        (_result({"value": {"rle": [255] * 40}}, task=1), "the 'rle' has 4,294,967,295 values of 32 bits"),
        (lambda content: content[0].update(data={"x": "y"}), "task 1 has no address of an image"),
    ],
)
def test_what_is_wrong_in_label_studio_json_is_named(
    change: Callable[[list[Any]], None], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DcrisError, match=sentence) as caught:
        load(_task(tmp_path, change), tmp_path, strict=True)
    assert "\n" not in str(caught.value)


def test_what_predict_writes_for_label_studio_comes_back(tmp_path: Path) -> None:
    """Pre-annotations are read as they are, where no task has been annotated."""
    from dcris.inference.label_studio import label_studio_task

    write_images(tmp_path / "images")
    tasks = [
        label_studio_task(
            f"/data/local-files/?d={number}.png",
            [(item.phrase, 0.9, item.mask.astype(bool)) for item in of_image(number)],
            "dcris",
        )
        for number in (1, 2)
    ]
    (tmp_path / "label_studio.json").write_text(json.dumps(tasks))
    references, done = load(tmp_path / "label_studio.json", tmp_path, strict=True)
    assert [item.expressions[0].text for item in references] == EVERY
    assert done.format == "label-studio"
    for reference, truth in zip(references, OBJECTS, strict=True):
        np.testing.assert_array_equal(mask_of(reference), truth.mask)


@settings(max_examples=60)
@given(mask=arrays.arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 30))))
def test_brush_masks_survive(mask: Any) -> None:
    np.testing.assert_array_equal(decode_brush(encode_brush(mask), mask.shape), mask)


def _naive_brush(rle: list[int]) -> list[int]:
    """All values, bit by bit, as the format describes it."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(width: int) -> int:
        nonlocal place
        place += width
        return int(bits[place - width : place], 2)

    count, width = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        same = read(1)
        run = read(sizes[read(2)]) + 1
        values += [read(width)] * run if same else [read(width) for _ in range(run)]
    return values


@settings(max_examples=60)
@given(
    runs=st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from([0, 1, 255]), min_size=1, max_size=8)), max_size=9),
    data=st.data(),
)
def test_brush_strokes_of_other_encoders_are_read(runs: list[tuple[bool, list[int]]], data: st.DataObject) -> None:
    """Runs of single values, and runs that end inside a pixel."""
    values, bits = list[int](), ""
    for same, listed in runs:
        run = [listed[0]] * len(listed) if same else listed
        values += run
        bits += f"{int(same)}00{len(run) - 1:03b}" + "".join(f"{value:08b}" for value in (run[:1] if same else run))
    rest = -len(values) % 4 or 4
    values += [255] * rest
    bits += f"100{rest - 1:03b}{255:08b}"
    head = f"{len(values):032b}00111" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    text = head + bits
    text += "0" * (-len(text) % 8)
    rle = [int(text[place : place + 8], 2) for place in range(0, len(text), 8)]
    assert _naive_brush(rle) == values
    pixels = np.array(values).reshape(-1, 4)
    np.testing.assert_array_equal(decode_brush(rle, (1, len(pixels)))[0], pixels[:, 3] > 0)
    cut = data.draw(st.integers(0, len(rle) - 2))
    with pytest.raises(DcrisError):
        decode_brush(rle[:cut], (1, len(pixels)))


@pytest.mark.parametrize("make", [labelme, supervisely])
def test_splits_of_images_are_their_folders(make: Maker, tmp_path: Path) -> None:
    """Not their names, nor what the folder of the export is called: test images would be trained
    on."""
    root = tmp_path / "test export"
    for split, stem in (("train", "val_1"), ("valid", "COCO_train2014_1"), ("", "train_1")):
        make(root / split)
        for path in list((root / split).rglob("2.*")):
            path.unlink()
        for path in list((root / split).rglob("1.*")):
            if path.suffix == ".json":
                path.write_text(path.read_text().replace("1.png", f"{stem}.png"))
            path.rename(path.with_name(path.name.replace("1.", f"{stem}.")))
    references, done = load(root, root)
    assert {(item.image_path.stem, item.split) for item in references} == {
        ("val_1", "train"),
        ("COCO_train2014_1", "val"),
        ("train_1", "train"),
    }
    assert done.unusable == 0


def test_shapes_of_one_group_are_one_object(tmp_path: Path) -> None:
    """labelme: an object in two parts; without a group they would be two."""
    labelme(tmp_path)
    content = json.loads((tmp_path / "1.json").read_text())
    for shape in content["shapes"][:2]:
        shape |= {"group_id": 3, "description": "both cups\nthe cups"}
    (tmp_path / "1.json").write_text(json.dumps(content))
    references, _ = load(tmp_path / "1.json", tmp_path)
    (reference,) = references
    assert [each.text for each in reference.expressions] == ["both cups", "the cups"]
    np.testing.assert_array_equal(mask_of(reference), OBJECTS[0].mask | OBJECTS[1].mask)


@pytest.mark.parametrize(
    ("make", "file", "old", "new", "sentence"),
    [
        (labelme, "2.json", '"mask": "iVBOR', '"mask": "#VBOR', "shape 1 .*is not Base64 .*'#VBOR"),
        (labelme, "2.json", '"mask": "iVBOR', '"mask": "aaaaa', "shape 1 .*is not a PNG image"),
        (labelme, "2.json", '"points": [[10,', '"points": [["x",', "shape 1 has a 'points' that is not a number: 'x'"),
        (labelme, "2.json", '"points": [[10,', '"points": [[99999,', "shape 1 .*lies outside the image, at 99999, 8"),
        (labelme, "2.json", '"label": "ring"', '"label": 4', r"shape 1 has a 'label' that is not text but int \(4\)"),
        (via_2, "via.json", '"all_points_x": [3, 9', '"all_points_x": [3', "region 1 .* has 5 'all_points_x' but 6"),
        (via_1, "via.json", '"all_points_x": [3, 9', '"all_points_x": [3, "q"', "corner that is not a number.*: 'q'"),
        (via_2, "via.json", '"regions": [', '"regions": 3, "x": [', "'regions' that are neither a list nor an object: 3"),
        (yolo, "labels/val/2.txt", "0 0.825", "7 0.825", "class that is not in the list of names: '7'"),
        (yolo, "labels/val/2.txt", "0 0.825", "0 0.825 0.1", "line 1 has 9 numbers after the class"),
        (yolo, "labels/val/2.txt", "0 0.825", "0 nan", "not a number: 'nan'"),
        (supervisely, "ds/ann/2.png.json", '"data": "eJ', '"data": "aa', "object 1 .*not compressed by zlib .*'aa"),
        (supervisely, "ds/ann/2.png.json", '"origin": [10,', '"origin": ["x",', "'origin' that is not a number: 'x'"),
        (supervisely, "ds/ann/1.png.json", '"exterior": [[25', '"exterior": [[1e9', "'points' far outside the image"),
        (supervisely, "ds/ann/1.png.json", '"height": 30', '"height": 31', "has 31 x 40, so its masks do not fit"),
        (datumaro, "datumaro.json", '"label_id": 1', '"label_id": 9', "not in the list of labels: 9"),
        (labelme, "2.json", '"version"', r'"split": "\ud83d", "version"', "shape 1 has a 'split' that is not valid Uni"),
        (datumaro, "datumaro.json", '"id": "1"', r'"id": "\ud83d"', "item 1 has a 'id' that is not valid"),
        (predictions, "predictions.json", '"file_name": "1.png"', '"file_name": "3.png"', "no image file '3.png'"),
        (predictions, "predictions.json", '"score": 0.9', '"frame": 3', "result 1 is of a video, '1.png'"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_export_is_named(
    make: Maker, file: str, old: str, new: str, sentence: str, tmp_path: Path
) -> None:
    """With the file, the place and the value; without --strict the other objects are imported."""
    source = make(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    references, done = load(source, tmp_path, ambiguous="keep")
    (problem,) = (each for each in done.problems if re.search(sentence, each))
    assert "\n" not in problem
    assert references
    with pytest.raises(DcrisError):
        load(source, tmp_path, ambiguous="keep", strict=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "the file is not an object with named fields"),
        ({"items": []}, "the file has no 'categories'"),
        ({"items": [], "categories": [{"id": 1, "name": "cup"}]}, "the file has a 'categories' that is not an object"),
        ({"items": [], "categories": {"label": "cup"}}, "'label' is not an object with named fields"),
        ({"items": [], "categories": {"label": {}}}, "'label' has no 'labels'"),
        (
            {"items": [], "categories": {"label": {"labels": 7}}},
            r"'label' has a 'labels' that is not a list but int \(7\)",
        ),
        ({"categories": {}}, "the file has no 'items'"),
    ],
)
def test_a_file_that_is_not_datumaro_s_is_refused(
    content: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong `--format` is a message with the file and the field, not a traceback."""
    source = tmp_path / "export.json"
    source.write_text(json.dumps(content))
    assert main(["data", "import", str(source), "--format", "datumaro", "--out", str(tmp_path / "my.jsonl")]) == 2
    assert re.search(f"{re.escape(str(source))}.*{sentence}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"imagePath": 7, "shapes": []}', r"bad\.json: .*'imagePath' that is not text"),
        ('{"imagePath": "1.png", "shapes": {}}', r"bad\.json: .*'shapes' that is not a list"),
        ('{"imagePath": "1.png", "shapes": [], "imageHeight": "x"}', r"bad\.json: .*'imageHeight'"),
        ('{"imagePath": "1.png", "sha', r"bad\.json"),
        # Without a field that is needed they were taken for files of other kinds and not named.
        ('{"shapes": [], "imageData": null}', r"bad\.json: the file has no 'imagePath'"),
        ('{"imagePath": "1.png", "imageHeight": 8, "imageWidth": 9}', r"bad\.json: the file has no 'shapes'"),
    ],
)
def test_a_file_among_several_that_cannot_be_read(text: str, sentence: str, tmp_path: Path) -> None:
    """One damaged file of labelme would cost the annotations of a whole folder."""
    source = labelme(tmp_path / "all")
    (source / "bad.json").write_text(text)
    references, done = load(source, source)
    assert (len(references), done.unusable) == (len(OBJECTS), 1)
    assert any(re.search(sentence, each) for each in done.problems)
    with pytest.raises(DcrisError, match=sentence):
        load(source, source, strict=True, ambiguous="keep")
    alone = tmp_path / "alone"
    alone.mkdir()
    (source / "bad.json").rename(alone / "bad.json")
    for place in (alone, alone / "bad.json"):
        with pytest.raises(DcrisError, match=sentence):
            load(place, alone)


def test_bitmaps_take_bounded_memory(tmp_path: Path) -> None:
    """A few kilobytes of text can stand for gigabytes of zeros."""
    source = supervisely(tmp_path)
    bomb = base64.b64encode(zlib.compress(bytes(200_000_000))).decode()
    path = tmp_path / "ds/ann/2.png.json"
    content = json.loads(path.read_text())
    content["objects"][0]["bitmap"]["data"] = bomb
    path.write_text(json.dumps(content))
    _, done = load(source, tmp_path)
    assert any("the image in the text of the mask has more than 64,000,000 bytes" in each for each in done.problems)


def test_an_empty_instance_of_supervisely_joins_nothing(tmp_path: Path) -> None:
    """Else all objects of an image are one, with the phrases of all."""
    source = supervisely(tmp_path)
    expected, _ = load(source, tmp_path)
    for path in tmp_path.glob("ds/ann/*.json"):
        content = json.loads(path.read_text())
        for item in content["objects"]:
            item["instance"] = ""
        path.write_text(json.dumps(content))
    found, _ = load(source, tmp_path)
    assert found == expected


def test_a_polygon_of_supervisely_has_holes(tmp_path: Path) -> None:
    source = supervisely(tmp_path)
    path = tmp_path / "ds/ann/2.png.json"
    content = json.loads(path.read_text())
    ring = {"exterior": [[10, 8], [29, 8], [29, 25], [10, 25]], "interior": [[[15, 13], [24, 13], [24, 20], [15, 20]]]}
    content["objects"][0] |= {"geometryType": "polygon", "points": ring}
    path.write_text(json.dumps(content))
    references, _ = load(source, tmp_path)
    np.testing.assert_array_equal(mask_of(references[2]), OBJECTS[2].mask)


def test_a_data_set_in_the_refer_layout(tmp_path: Path) -> None:
    """Splits, expressions and masks stay; the images are found as for training."""
    table = load_references(make_tiny_refer(tmp_path).write(), "tiny")
    references, done = load(tmp_path / "tiny", tmp_path, strict=True, ambiguous="keep")
    assert done.format == "refer"
    assert [item.split for item in references] == [item.split for item in table.references]
    for found, true in zip(references, table.references, strict=True):
        assert [each.text for each in found.expressions] == [each.text for each in true.expressions]
        np.testing.assert_array_equal(mask_of(found), mask_of(true))


def test_folders_of_several_formats_are_refused(tmp_path: Path) -> None:
    """`dcris predict` can write two formats into one folder."""
    labelme(tmp_path)
    predictions(tmp_path)
    with pytest.raises(
        DcrisError, match=r"files of two formats, .*1\.json \(labelme\) and .*predictions\.json \(dcris\)"
    ):
        load(tmp_path, tmp_path)
    assert len(load(tmp_path, tmp_path, format="dcris")[0]) == 4
