"""`dcris data export`: what is written is what the tools read, and comes back as it was."""

import errno
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from annotated import HEIGHT, OBJECTS, WIDTH, write_images
from dcris.cli import main
from dcris.data.exporter import export_table
from dcris.data.importer import import_annotations
from dcris.data.masks import decode_mask, encode_mask, union_mask
from dcris.data.outlines import join_rings, mask_polygon, mask_polygons
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from generalised import rrefcoco
from runs import leftovers
from tool_exports import labelme

FORMATS = ["coco", "yolo", "labelme", "label-studio", "supervisely", "refer"]


@pytest.fixture
def table(tmp_path: Path) -> ReferenceTable:
    """Polygons, one of which covers no pixel, run lengths, a mask image, several objects and none;
    two images of one name."""
    folder = tmp_path / "data"
    for name in ("a", "b"):
        write_images(folder / name)
    (folder / "a/2.png").rename(folder / "a/ä 2.PNG")
    ring, cup = OBJECTS[2].mask, OBJECTS[0]
    Image.fromarray(ring * np.uint8(255)).save(folder / "ring.png")
    polygon = [[float(value) for point in cup.polygon for value in point]]
    odd = [[0.3, 0.7, 39.9, 2.1, 20.5, 29.3, 3.7, 11.1]]
    thin = [30.0, 1.0, 34.0, 1.0, 38.0, 1.0]
    lines: list[dict[str, Any]] = [
        {"image": "a/1.png", "mask": [*polygon, thin], "expressions": ["the left cup", "cup"], "category": "cup"},
        {"image": "a/1.png", "mask": encode_mask(OBJECTS[1].mask), "expressions": ["größer & <x>"], "category": "cup"},
        {"image": "a/1.png", "masks": [polygon, encode_mask(ring)], "expressions": ["both"], "category": "a & \"b\""},
        {"image": "a/ä 2.PNG", "mask": "ring.png", "expressions": ["a ring"], "split": "val"},
        {"image": "b/1.png", "mask": odd, "expressions": ["=odd", "odd,\u2028too"], "split": "testA"},
        {"image": "b/1.png", "mask": None, "expressions": ["a dog"], "split": "testA"},
    ]  # fmt: skip
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_references(folder / "my.jsonl", None)


def content(table: ReferenceTable, absent: bool) -> list[Any]:
    """What must come back, whatever the order."""
    return sorted(
        (
            item.split,
            sorted(" ".join(each.text.split()) for each in item.expressions),
            item.category if item.segmentations else "object",
            union_mask(item.segmentations, item.image_size).tolist(),
        )
        for item in table.references
        if absent or item.segmentations
    )


def there_and_back(data: Path, format: str, out: Path, *options: str) -> ReferenceTable:
    """Export a data set and import what was written, by the commands."""
    assert main(["data", "export", str(data), *options, "--format", format, "--out", str(out)]) == 0
    source = next((file.parent for file in out.glob("*/instances.json")), out)
    phrases = ["--phrases", str(out / "phrases.csv")] if format == "yolo" else []
    assert main(["data", "import", str(source), "--out", str(out / "back.jsonl"), *phrases]) == 0
    return load_references(out / "back.jsonl", None)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported_comes_back(format: str, table: ReferenceTable, tmp_path: Path) -> None:
    """Splits, expressions, categories and every pixel; two images of one name stay apart."""
    out = tmp_path / "out"
    done = export_table(table, format, out)
    holds_absent = format in ("coco", "refer")
    assert (done.references, done.images, done.left_out) == (6 if holds_absent else 5, 3, 0 if holds_absent else 1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    source = {"refer": out / "my", "yolo": out}.get(format, out)
    phrases = out / "phrases.csv" if format == "yolo" else None
    import_annotations(source, out / "back.jsonl", phrases=phrases, strict=True, ambiguous="keep")
    back = load_references(out / "back.jsonl", None)
    assert content(back, holds_absent) == content(table, holds_absent)
    (out / "back.jsonl").unlink()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_named_after_another_split_keeps_its_own(format: str, tmp_path: Path) -> None:
    """Images of RefCOCO's val and testA are of COCO's train2014: they would become training images
    in what is exported, corrected and imported."""
    folder, out = tmp_path / "data", tmp_path / "out"
    names = {"COCO_train2014_1.png": "val", "COCO_train2014_2.png": "testA", "val_3.png": "train"}
    names |= {"4.png": "test_seen", "5.png": "test-unseen", "6.png": "not_train"}
    folder.mkdir()
    polygon = [[float(value) for point in OBJECTS[0].polygon for value in point]]
    lines = []
    for name, split in names.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
        lines.append({"image": name, "mask": polygon, "expressions": [f"cup of {name}"], "split": split})
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    back = there_and_back(folder / "my.jsonl", format, out)
    assert {item.expressions[0].text: item.split for item in back.references} == {
        f"cup of {name}": split for name, split in names.items()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_splits_with_one_name_as_files(format: str, tmp_path: Path) -> None:
    """Files of one split would replace those of another: references would be lost without a
    word."""
    folder, out = tmp_path / "data", tmp_path / "out"
    write_images(folder)
    splits = ["train", "test A", "test_A", "test/a", "x" * 81, "x" * 82, "test_A_2"]
    polygon = [[float(value) for point in OBJECTS[0].polygon for value in point]]
    lines = []
    for number, split in enumerate(splits):
        shutil.copy(folder / "1.png", folder / f"image {number}.png")
        lines.append({"image": f"image {number}.png", "mask": polygon, "expressions": [split], "split": split})
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    back = there_and_back(folder / "my.jsonl", format, out)
    assert len({image.parent.as_posix().lower() for image in out.rglob("*.png")}) in (1, len(splits))
    assert sorted(item.expressions[0].text for item in back.references) == sorted(splits)
    if format != "yolo":  # it has the names of folders only
        assert all(item.split == item.expressions[0].text for item in back.references)


@pytest.mark.parametrize("format", FORMATS)
def test_expressions_of_r_refcoco_that_describe_nothing(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They belong to a reference with an object, which may have no others. People would miss them
    only in training: COCO and REFER have them, elsewhere they are counted as left out."""
    layout, out = rrefcoco(), tmp_path / "out"
    layout.references[2]["sentences"][1]["exist"] = False
    data, own = layout.write(tmp_path / "data"), ("--dataset", layout.dataset)
    back = there_and_back(data, format, out, *own)
    written = {"coco": "5 references on 3 images\n", "refer": "3 references on 3 images\n"}
    left_out = "2 references on 2 images; left out: 3 that describe nothing in their image\n"
    assert f"{out}: {written.get(format, left_out)}" in capsys.readouterr().out

    def said(table: ReferenceTable) -> set[Any]:
        return {
            (each.text, bool(item.targets(each)))
            for item in table.references
            for each in item.expressions
            if item.targets(each) or format in written
        }

    truth = load_references(data, layout.dataset)
    assert said(back) == said(truth)
    if format == "refer":  # its protocol averages over references
        again = load_references(out, layout.dataset, "own")
        assert [len(item.expressions) for item in again.references] == [3, 3, 2]


def test_the_refer_layout_is_read_as_a_data_set(table: ReferenceTable, tmp_path: Path) -> None:
    """And by REFER's own code, which takes lists of polygons only."""
    export_table(table, "refer", tmp_path / "out")
    back = load_references(tmp_path / "out", "my")
    assert content(back, False) == content(table, False)
    assert back.split("train")[2].ann_ids == (3, 4)
    instances = json.loads((tmp_path / "out/my/instances.json").read_text())
    assert all(type(each["segmentation"][0]) is list for each in instances["annotations"])
    references = pickle.loads((tmp_path / "out/my/refs(own).p").read_bytes())
    assert [each["ann_id"] for each in references if each["image_id"] == 3] == [6, [-1]]


def test_coco_is_read_by_pycocotools(table: ReferenceTable, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    export_table(table, "coco", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out/annotations").iterdir())
    assert files == ["instances_testA.json", "instances_train.json", "instances_val.json"]
    coco = COCO(str(tmp_path / "out/annotations/instances_train.json"))
    truth = [item for item in table.references if item.split == "train"]
    masks = [each for item in truth for each in item.segmentations]
    for annotation, mask in zip(coco.loadAnns(coco.getAnnIds()), masks, strict=True):
        np.testing.assert_array_equal(coco.annToMask(annotation), decode_mask(mask, (HEIGHT, WIDTH)))
        assert annotation["area"] == coco.annToMask(annotation).sum()


def test_yolo_and_coco_are_read_by_supervision(table: ReferenceTable, tmp_path: Path) -> None:
    """It loads them as Ultralytics and COCO data sets; its masks include the border pixels."""
    import supervision

    export_table(table, "yolo", tmp_path / "yolo")
    places = {"images_directory_path": str(tmp_path / "yolo/images/train")}
    places |= {"annotations_directory_path": str(tmp_path / "yolo/labels/train")}
    data = supervision.DetectionDataset.from_yolo(
        **places, data_yaml_path=str(tmp_path / "yolo/data.yaml"), force_masks=True
    )
    ((_, _, found),) = list(data)
    assert data.classes == ["cup", 'a & "b"', "object"]
    assert found.class_id.tolist() == [0, 0, 1]
    truth = [union_mask(item.segmentations, (HEIGHT, WIDTH)) for item in table.split("train")]
    overlap = [np.sum(a & (b > 0)) / np.sum(a | (b > 0)) for a, b in zip(found.mask, truth, strict=True)]
    assert min(overlap) > 0.8
    export_table(table, "coco", tmp_path / "coco")
    data = supervision.DetectionDataset.from_coco(
        str(tmp_path / "coco/images"), str(tmp_path / "coco/annotations/instances_train.json"), force_masks=True
    )
    assert sum(len(found) for _, _, found in data) == 4


def test_yolo_names_its_folders(table: ReferenceTable, tmp_path: Path) -> None:
    export_table(table, "yolo", tmp_path / "out")
    described = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert described == {
        "path": ".",
        "train": "images/train",
        "val": "images/val",
        "testA": "images/testA",
        "names": {0: "cup", 1: 'a & "b"', 2: "object"},
    }
    assert (tmp_path / "out/labels/val/ä 2.txt").is_file()
    assert (tmp_path / "out/images/val/ä 2.PNG").is_file()


@pytest.mark.parametrize(
    ("splits", "val"),
    [
        (("train", "validation"), "validation"),
        (("train", "valid", "val"), "val"),
        (("train", "test"), "train"),
        (("mine", "valid"), "valid"),
    ],
)
def test_yolo_validates_on_the_split_for_it(
    table: ReferenceTable, tmp_path: Path, splits: tuple[str, ...], val: str
) -> None:
    """Ultralytics validated on the training images of data whose split was called validation."""
    first = next(each for each in table.references if each.segmentations)
    references = []
    for number, split in enumerate(splits, 1):
        image = first.image_path.with_name(f"{split}{first.image_path.suffix}")
        shutil.copyfile(first.image_path, image)
        references.append(replace(first, ref_id=number, image_id=number, image_path=image, split=split))
    export_table(replace(table, references=tuple(references)), "yolo", tmp_path / "out")
    described = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert (described["train"], described["val"]) == (f"images/{splits[0]}", f"images/{val}")


def test_label_studio_gets_tasks_and_an_interface(table: ReferenceTable, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    export_table(table, "label-studio", tmp_path / "out", "http://host/")
    tasks = json.loads((tmp_path / "out/tasks.json").read_text())
    assert tasks[1]["data"] == {"image": "http://host/images/%C3%A4%202.PNG", "split": "val"}
    first, second = tasks[0]["annotations"][0]["result"][:2]
    assert (first["id"], first["value"]["brushlabels"]) == (second["id"], ["cup"])
    assert second["value"]["text"] == ["the left cup", "cup"]
    interface = ElementTree.parse(tmp_path / "out/config.xml")
    assert [each.get("value") for each in interface.iter("Label")] == ["cup", 'a & "b"', "object"]
    assert {"tag", "phrase", "image"} == {each.get("name") for each in interface.iter() if each.get("name")}


@pytest.mark.parametrize("prefix", ["/static/", "../", "", "https://host/a%20b/"])
def test_images_are_found_by_relative_addresses(table: ReferenceTable, tmp_path: Path, prefix: str) -> None:
    """ "images/%C3%A4%202.PNG" of a prefix that is no full address looks like a path."""
    export_table(table, "label-studio", tmp_path / "out", prefix)
    import_annotations(tmp_path / "out/tasks.json", tmp_path / "back.jsonl", strict=True, ambiguous="keep")
    names = {each.image_path.name for each in load_references(tmp_path / "back.jsonl").references}
    assert "\u00e4 2.PNG" in names


@settings(max_examples=60)
@given(mask=arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 1)))
def test_outlines_cover_exactly_the_mask(mask: Any) -> None:
    """Parts that touch at a corner, holes, parts inside of holes; also joined to one polygon."""
    polygons = mask_polygons(mask)
    if not mask.any():
        assert polygons == []
        return
    np.testing.assert_array_equal(decode_mask(polygons, mask.shape), mask)
    rings = [[(int(x), int(y)) for x, y in zip(flat[::2], flat[1::2], strict=True)] for flat in polygons]
    joined = [[float(value) for point in join_rings(rings) for value in point]]
    np.testing.assert_array_equal(decode_mask(joined, mask.shape), mask)


@pytest.mark.timeout(60)
def test_a_mask_with_thousands_of_holes_and_parts_takes_seconds() -> None:
    """A speckled mask, as of a noisy threshold, would block an export or CVAT's function."""
    mask = np.zeros((480, 640), np.uint8)
    mask[:, :320] = 1
    mask[1::5, 1::5] ^= 1
    np.testing.assert_array_equal(decode_mask([mask_polygon(mask)], mask.shape), mask)


def test_what_cannot_be_exported_leaves_nothing(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(DcrisError, match=r"cannot write .*out: No space left on device; free disk space there"):
            export_table(table, "coco", out)
    with pytest.raises(DcrisError, match="the format 'via' cannot be written; choose from coco, label-studio, labelme"):
        export_table(table, "via", out)
    (tmp_path / "data/b/1.png").unlink()
    os.mkfifo(tmp_path / "data/b/1.png")
    with pytest.raises(DcrisError, match=r"cannot copy the image .*b/1\.png"):
        export_table(table, "coco", out)
    assert not out.exists()
    assert not leftovers(tmp_path)
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(DcrisError, match="exists already and is not empty"):
        export_table(table, "coco", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_some_file_systems_take_for_one(format: str, table: ReferenceTable, tmp_path: Path) -> None:
    names = ["\u00e9.png", "e\u0301.png", "\u00c9.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(tmp_path / "data" / name)
    items = [
        replace(each, image_path=tmp_path / "data" / name) for each, name in zip(table.references, names, strict=False)
    ]
    out = tmp_path / "out"
    export_table(replace(table, references=tuple(items)), format, out)
    written = [path.name for path in out.rglob("*.png")]
    assert len({normalize("NFD", name).lower() for name in written}) == 3
    done = import_annotations(
        out / "my" if format == "refer" else out, out / "back.jsonl", strict=True, ambiguous="keep"
    )
    assert done.images == 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("kind", "ending"), [("JPEG", ".jpeg"), ("PNG", ".png"), ("JPEG2000", ".jp2")])
def test_images_get_the_ending_of_their_format(
    format: str, kind: str, ending: str, table: ReferenceTable, tmp_path: Path
) -> None:
    """Tools know images by it. The third is of RRSIS-D, and saved in the size of its mask."""
    images = [tmp_path / "data" / name for name in ("one", "two.dat", "three")]
    for image, width in zip(images, (WIDTH, WIDTH, WIDTH + 1), strict=True):
        Image.new("RGB", (width, HEIGHT)).save(image, kind)
    items = tuple(replace(table.references[0], ref_id=place, image_path=each) for place, each in enumerate(images))
    items = (*items[:2], replace(items[2], stretched=True))
    out = tmp_path / "out"
    export_table(replace(table, references=items), format, out)
    written = {
        path.stem: path.suffix for path in out.rglob("*") if path.suffix not in (".json", ".txt") and path.is_file()
    }
    assert {"one": ending, "two": ending, "three": ending}.items() <= written.items()
    done = import_annotations(out / "my" if format == "refer" else out, out / "back.jsonl", strict=True)
    assert done.images == 3


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a tool's export to a data set and back; the list of phrases; the question.

    Ctrl-D at the question is its default answer, and not a traceback.
    """
    source, out = labelme(tmp_path / "export"), tmp_path / "my.jsonl"

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    text = run("data", "import", source, "--out", out, "--val", 0)
    assert "4 references (4 train) with 4 expressions on 2 images, from labelme; left out: 2 without a mask" in text
    assert text.endswith(f"next: dcris data check {out}\n")
    text = run("data", "export", out, "--format", "yolo", "--out", tmp_path / "yolo")
    assert text == f"{tmp_path / 'yolo'}: 4 references on 2 images\n"
    text = run("data", "import", tmp_path / "yolo", "--write-phrases", tmp_path / "todo.csv")
    assert f"{tmp_path / 'todo.csv'}: 2 objects without a phrase; fill in the last column" in text
    monkeypatch.setattr("builtins.input", Mock(side_effect=["perhaps", "KEEP", "perhaps", EOFError]))
    monkeypatch.setattr("dcris.cli.data.is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    text = run("data", "import", tmp_path / "yolo", "--out", tmp_path / "asked.jsonl", "--val", 0)
    assert "4 references (4 train)" in text
    text = run("data", "import", tmp_path / "yolo", "--out", tmp_path / "ended.jsonl")
    assert "left out: 2 whose phrase fits several objects" in text
    monkeypatch.setattr("dcris.cli.data.is_terminal", lambda: False)
    text = run("data", "import", tmp_path / "yolo", "--out", tmp_path / "dropped.jsonl")
    assert "left out: 2 whose phrase fits several objects" in text
    assert main(["data", "import", str(source)]) == 2
    assert "give --out FILE.jsonl for the data set, or --write-phrases" in capsys.readouterr().err
    assert main(["data", "export", str(out), "--format", "voc", "--out", str(tmp_path / "voc")]) == 2
    assert "the format 'voc' cannot be written; choose from coco," in capsys.readouterr().err
