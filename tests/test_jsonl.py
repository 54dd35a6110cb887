"""Your own data in JSON Lines: valid files, and the errors that people make."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris.data import check_report
from dcris.data.check import check_dataset
from dcris.data.dataset import TrainingSamples
from dcris.data.exporter import export_table
from dcris.data.importer import import_annotations
from dcris.data.masks import encode_mask, union_area, union_mask
from dcris.data.readers import jsonl
from dcris.data.readers.load import list_data_sets, load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import get_tokenizer
from dcris.errors import DcrisError
from dcris.evaluation.metrics import Overlap, overlap, overlap_curve
from dcris.evaluation.protocols import get_protocol
from dcris.recipes import get_recipe
from dcris.types import Sample, SoftMask
from dcris.utils import files

H, W = 8, 12
RECTANGLE = np.zeros((H, W), np.uint8)
RECTANGLE[2:6, 3:9] = 1
POLYGON = [[3.0, 2.0, 9.0, 2.0, 9.0, 6.0, 3.0, 6.0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 12 x 8 pixels, one of them rotated by its EXIF tag, and a mask image."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "img").mkdir()
    Image.new("RGB", (W, H), "green").save(folder / "img/1.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (H, W), "blue").save(folder / "img/turned.jpg", exif=exif)
    Image.fromarray(RECTANGLE * 255).save(folder / "mask.png")
    Image.new("L", (W, H + 1), 1).save(folder / "taller.png")
    (folder / "notes.jpg").write_text("these are notes")
    return folder


def line(**changes: Any) -> dict[str, Any]:
    return {"image": "img/1.jpg", "mask": "mask.png", "expressions": ["the box"]} | changes


def write(folder: Path, *lines: dict[str, Any] | str | bytes, name: str = "mine") -> Path:
    path = folder / f"{name}.jsonl"
    texts = [json.dumps(each) if isinstance(each, dict) else each for each in lines]
    path.write_bytes(b"\n".join(each.encode() if isinstance(each, str) else each for each in texts))
    return path


def load(folder: Path, *lines: dict[str, Any] | str | bytes) -> ReferenceTable:
    return load_references(write(folder, *lines), None)


def test_the_documented_format_is_read(folder: Path) -> None:
    """The documented format: masks of all kinds, ids, splits and defaults."""
    runs = encode_mask(RECTANGLE)
    plain = {"size": [H, W], "counts": [0, H * W]}
    table = load(
        folder,
        line(expressions=["the box", "a box in the middle"], category="box"),
        line(image="img/turned.jpg", mask=POLYGON, split="val"),
        "",
        line(image="./img/1.jpg", mask=runs, split="my test", note="not ours"),
        line(mask=plain),
    )
    assert (table.dataset, table.split_by, table.root) == ("mine", "own", folder / "mine.jsonl")
    assert [item.split for item in table.references] == ["train", "val", "my test", "train"]
    assert [item.category for item in table.references] == ["box", "object", "object", "object"]
    assert [item.ref_id for item in table.references] == [1, 2, 4, 5]  # line numbers
    assert [item.image_id for item in table.references] == [1, 2, 1, 1]
    assert [item.image_path for item in table.references][:2] == [folder / "img/1.jpg", folder / "img/turned.jpg"]
    assert {item.image_size for item in table.references} == {(H, W)}
    assert [each.text for each in table.references[0].expressions] == ["the box", "a box in the middle"]
    assert [each.sent_id for item in table.references for each in item.expressions] == [1, 2, 3, 4, 5]
    masks = [union_mask(item.segmentations, item.image_size) for item in table.references]
    for mask in masks[:3]:
        np.testing.assert_array_equal(mask, RECTANGLE)
    assert masks[3].all()


def test_several_objects_and_none(folder: Path) -> None:
    """Who annotates "both boxes" and "the dog" that is not there gets the union, the parts and an
    empty mask, in training and in `data check`."""
    left = [[0.0, 0.0, 2.0, 0.0, 2.0, 8.0, 0.0, 8.0]]
    path = write(
        folder,
        without("mask") | {"masks": ["mask.png", left], "expressions": ["both"]},
        line(mask=None, expressions=["the dog"]),
        without("mask") | {"masks": [], "expressions": ["the cat"]},
        line(),
        without("mask") | {"masks": [left, "mask.png"]},
    )
    table = load_references(path, None)
    both, dog, cat, box, other = table.references
    assert [len(each.segmentations) for each in table.references] == [2, 0, 0, 1, 2]
    assert [len(each.ann_ids) for each in table.references] == [2, 0, 0, 1, 2]
    objects = [each for item in table.references for each in item.ann_ids]
    assert len(set(objects)) == len(objects)
    expected = RECTANGLE.copy()
    expected[:, :2] = 1
    np.testing.assert_array_equal(union_mask(both.targets(both.expressions[0]), (H, W)), expected)
    assert union_area(both.segmentations, (H, W)) == expected.sum()
    for absent in (dog, cat):
        assert absent.targets(absent.expressions[0]) == ()
        np.testing.assert_array_equal(union_mask(absent.segmentations, (H, W)), np.zeros((H, W)))
    assert box.ann_ids == (box.ref_id,)
    assert (other.split, other.category) == ("train", "object")
    assert check_dataset(path, None).problem_count == 0
    soft = load_references(path, None, mask_threshold=0.5)
    assert [type(each) for each in soft.references[0].segmentations] == [SoftMask, list]


def test_pixels_without_a_truth_count_neither_way(folder: Path) -> None:
    """Who leaves out unclear pixels gets scores of the clear ones, whichever protocol measures; a
    prediction there would otherwise be punished for the annotators' doubt."""
    unclear = np.zeros((H, W), np.uint8)
    unclear[:, 6:] = 1
    path = write(folder, line(ignored=encode_mask(unclear)), line())
    doubted, clear = load_references(path, None).references
    assert clear.ignored is None
    everything = np.ones((H, W), bool)
    for name in ("cris", "refer"):
        protocol = get_protocol(name)
        truth, whole = (protocol.truth(each, each.expressions[0]) for each in (doubted, clear))
        assert overlap(everything, truth.mask, truth.ignored) == Overlap(4 * 3, H * 6)
        assert overlap(everything, whole.mask, whole.ignored) == Overlap(4 * 6, H * W)
        curve = overlap_curve(torch.full((H, W), 0.6), torch.tensor(truth.mask), 0.35, torch.tensor(truth.ignored))
        assert curve[0] == Overlap(4 * 3, H * 6)
        assert curve[11:13] == (Overlap(4 * 3, H * 6), Overlap(0, 4 * 3))  # at 0.55 and 0.60
    square = get_protocol("grefcoco").truth(doubted, doubted.expressions[0])
    assert square.ignored is not None
    assert square.ignored[:, 240:].all()
    assert not square.ignored[:, :240].any()
    assert load(folder, line(ignored=encode_mask(unclear))).sha256() != load(folder, line()).sha256()
    soft = load_references(write(folder, line(ignored="mask.png")), None, mask_threshold=0.5)
    assert type(soft.references[0].ignored) is SoftMask


@pytest.mark.parametrize("format", ["coco", "yolo", "labelme", "label-studio", "supervisely", "refer"])
def test_pixels_without_a_truth_are_background_elsewhere(folder: Path, tmp_path: Path, format: str) -> None:
    """In training and in exports, also where a mask has them."""
    unclear = np.zeros((H, W), np.uint8)
    unclear[:, 6:] = 1
    known = RECTANGLE & ~unclear
    for mask in ("mask.png", POLYGON, encode_mask(RECTANGLE)):
        table = load(folder, line(mask=mask, ignored=encode_mask(unclear)))
        clear = load(folder, line(mask=encode_mask(known)))
        config = get_recipe("dcris_tiny").data
        ours, theirs = (
            TrainingSamples(each.references, config, get_tokenizer("tiny"), 0)[0] for each in (table, clear)
        )
        assert isinstance(ours, Sample)
        assert isinstance(theirs, Sample)
        torch.testing.assert_close(ours.mask, theirs.mask)
        out = tmp_path / "out"
        assert export_table(table, format, out, replace=True).ignored == 1
        phrases = out / "phrases.csv" if format == "yolo" else None
        source = out / "mine" if format == "refer" else out
        import_annotations(source, out / "back.jsonl", phrases=phrases, strict=True)
        (back,) = load_references(out / "back.jsonl", None).references
        np.testing.assert_array_equal(union_mask(back.segmentations, (H, W)), known)


def test_an_unusable_ignored_mask_is_named(folder: Path) -> None:
    with pytest.raises(DcrisError, match=r"line 1 has an unusable 'ignored' \(.*taller.png is 9 x 12"):
        load(folder, line(ignored="taller.png"))


def test_an_empty_mask_is_still_a_problem(folder: Path) -> None:
    """`null` says that nothing is there; an empty mask image is a mistake of a script."""
    Image.new("L", (W, H), 0).save(folder / "empty.png")
    record = {"image": "img/1.jpg", "masks": ["mask.png", "empty.png"], "expressions": ["both"]}
    report = check_dataset(write(folder, line(mask=None), line(mask="empty.png"), record), None)
    assert report.problem_count == 2
    assert ["reference 2" in report.problems[0], "reference 3" in report.problems[1]] == [True, True]


def test_an_empty_mask_is_a_problem_beside_any_id(folder: Path) -> None:
    """A mask of `masks` has a negative number of its own; where a line's `id` was equal, `data
    check` took the mask for one that it had checked.
    """
    Image.new("L", (W, H), 0).save(folder / "empty.png")
    record = {"image": "img/1.jpg", "masks": ["empty.png"], "expressions": ["it"]}
    assert check_dataset(write(folder, line(id=-1), record), None).problem_count == 1


def test_it_is_a_data_set_like_any_other(folder: Path) -> None:
    """The file may be given as the root, whatever the data set of the recipe."""
    path = write(folder, line(), line(split="val"))
    table = load_references(path, "refcoco", "unc")
    assert table == load_references(path, None)
    assert (table.dataset, table.splits()) == ("mine", {"train": (1, 1), "val": (1, 1)})
    report = check_dataset(path, None, deep=True)
    assert (report.dataset, report.problem_count, report.leaked_images) == ("mine", 1, 1)
    assert "is in train (reference 1) and val (reference 2)" in report.problems[0]
    with pytest.raises(DcrisError, match=r"give the file of your own data, .*mine\.jsonl"):
        load_references(folder, None)


def test_given_ids_are_unique(folder: Path) -> None:
    assert [item.ref_id for item in load(folder, line(id=7), line(id=1)).references] == [7, 1]
    with pytest.raises(DcrisError, match="line 3 has the id 7, which line 1 has too"):
        load(folder, line(id=7), line(id=8), line(id=7))
    with pytest.raises(DcrisError, match="line 2 has the id 2, which line 1 has too"):  # a line number is an id, too
        load(folder, line(id=2), line())


def test_files_as_windows_writes_them(folder: Path) -> None:
    """A byte order mark, carriage returns, no line end after the last line."""
    text = "\ufeff" + "\r\n".join(
        json.dumps(line(expressions=[each]), ensure_ascii=False) for each in ("кот", "el niño")
    )
    table = load(folder, text)
    assert [item.expressions[0].text for item in table.references] == ["кот", "el niño"]
    for encoding in ("utf-16", "utf-16-le"):
        with pytest.raises(DcrisError, match=r"UTF-16 text.*save it as UTF-8"):
            load(folder, json.dumps(line()).encode(encoding))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in line().items() if name != key}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (without("image"), "has no 'image'"),
        (without("mask"), "has no 'mask'"),
        (without("expressions"), "has no 'expressions'"),
        (line(image=3), "'image' that is not text but int"),
        (line(image="img/2.jpg"), "there is no image file .*2.jpg"),
        (line(image="notes.jpg"), "cannot read the image .*notes.jpg"),
        *(
            (line(image=path), "'image' that is not a plain path")
            for path in ("/etc/passwd", "../own/img/1.jpg", "", ".")
        ),
        *(
            (line(image=path), "'image' that is not a plain path")
            for path in ("..\\img\\1.jpg", "\\\\host\\1.jpg", "C:/1.jpg", "./C:/1.jpg", "img/../img/1.jpg")
        ),
        (line(mask="../mask.png"), "'mask' that is not a plain path"),
        (line(mask="/tmp/mask.png"), "'mask' that is not a plain path"),
        (line(mask="masks/1.png"), "unusable 'mask' .*no image file .*1.png"),
        (line(mask="taller.png"), r"taller.png is 9 x 12 pixels \(height x width\), but its image is 8 x 12"),
        (line(masks=["mask.png"]), "has both 'mask' and 'masks'"),
        (without("mask") | {"masks": None}, "'masks' that is not a list but NoneType"),
        (without("mask") | {"masks": ["mask.png", None]}, "unusable mask 2 in 'masks'"),
        (without("mask") | {"masks": ["../mask.png"]}, "'mask' that is not a plain path"),
        (without("mask") | {"masks": ["mask.png"] * 1001}, "has 1,001 'masks'; the limit is 1,000"),
        (line(mask=5), "neither polygons nor run lengths"),
        (line(mask=[]), "the segmentation is empty"),
        (line(mask=[[1, 2, 3, 4]]), "polygon 1 is not a list of x, y pairs with at least 3 corners"),
        (line(mask=[1, 2, 3, 4, 5, 6]), "polygon 1 is not a list"),
        (line(mask=[[0, 0, 1e6, 0, 1e6, 1e6]]), "lies far outside the image"),
        (line(mask=encode_mask(np.ones((W, H)))), "not for an image of 8 x 12"),
        (line(mask={"size": [H, W], "counts": "0"}), "run lengths"),
        (line(expressions=[]), "has an empty 'expressions'"),
        (line(expressions="the box"), "'expressions' that is not a list but str"),
        (line(expressions=["a", 1]), "an entry of 'expressions' that is not text"),
        (line(expressions=["a", " \t"]), "has a blank 'expressions'"),
        # A model reads nothing of these, so it would be trained on and scored by an empty phrase.
        (line(expressions=["a", "&nbsp;"]), "has a blank 'expressions': '&nbsp;'"),
        (line(expressions=["a", "&amp;#160; "]), "has a blank 'expressions'"),
        (line(expressions=["a", "\u200b\ufeff"]), r"has a blank 'expressions': '\\u200b\\ufeff'"),
        (json.dumps(line(expressions=["half \ud83d"])), "is not valid Unicode text"),
        (line(split=""), "has a blank 'split'"),
        (line(split=1), "'split' that is not text but int"),
        (line(category=["x"]), "'category' that is not text but list"),
        (line(id="7"), "'id' that is not an integer but str"),
        (line(id=True), "'id' that is not an integer but bool"),
        ('{"image": "img/1.jpg", ', "is not JSON "),
        (json.dumps(line())[:-1] + ', "image": "img/2.jpg"}', "the key 'image' twice"),
        ("[1, 2]", "is not an object with named fields"),
        ("null", "is not an object with named fields"),
        (json.dumps(line(mask=[[float("nan")] * 6])), "has a corner that is not a number"),
        (json.dumps(line(id=1))[:-1] + "1" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        (b'{"image": "img/\xff.jpg"}', r"is not UTF-8 text \(from byte 16 on\)"),
        (b"\0", "is not JSON "),
    ],
)
def test_each_wrong_line_is_named(folder: Path, wrong: dict[str, Any] | str | bytes, sentence: str) -> None:
    """The error names file, line and field in one sentence."""
    with pytest.raises(DcrisError, match=rf"mine\.jsonl: line 2\b.*{sentence}") as caught:
        load(folder, line(), wrong, line())
    assert "\n" not in str(caught.value)
    report = check_dataset(folder / "mine.jsonl", None)
    assert (report.problem_count, report.splits) == (1, {"train": (2, 2)})
    assert report.problems == [str(caught.value)]


@pytest.mark.parametrize(("stored", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
@pytest.mark.parametrize("key", ["image", "mask"])
def test_a_name_in_another_unicode_form_is_named(
    folder: Path, tmp_path: Path, key: str, stored: str, written: str
) -> None:
    """The name in the error looks like that of the file, as macOS stores one of the two, so nobody
    could see what is missing."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    source = tmp_path / {"image": "img/1.jpg", "mask": "mask.png"}[key]
    place = tmp_path / normalize(stored, "\u00fc")
    place.mkdir()
    shutil.copy(source, place / normalize(stored, f"\u00e9{source.suffix}"))
    name = normalize(written, f"\u00fc/\u00e9{source.suffix}")
    with pytest.raises(DcrisError, match="one of the same letters in another Unicode normal form") as caught:
        load(tmp_path, line(**{key: name}))
    found = next(place.iterdir())
    assert ascii(str(found)) in str(caught.value)
    found.unlink()
    with pytest.raises(DcrisError, match=r"there is no image file .*; check the name"):
        load(tmp_path, line(**{key: name}))


def test_all_wrong_lines_are_found_at_once(folder: Path) -> None:
    """All errors of a file can be corrected at once."""
    path = write(folder, *[line(mask="none.png")] * 25)
    report = check_dataset(path, None)
    assert (report.problem_count, len(report.problems), report.splits) == (25, 10, {})
    assert "line 1 " in report.problems[0]
    assert "... and 15 more" in report.table()


@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb", r"a\nb"), ("a\tb", r"a\tb"), ("a\x1b[2K\u202eb", r"a\x1b[2K\u202eb")]
)
def test_a_split_stays_in_its_line_of_the_table(folder: Path, name: str, shown: str) -> None:
    """A line feed in a name made two lines, the second of which read as another split; what the
    terminal escapes later would shift the numbers."""
    table = check_dataset(write(folder, line(split=name), line()), None).table().splitlines()
    assert f"{shown:<10}{1:>12}{1:>13}" in table
    assert f"{'train':<10}{1:>12}{1:>13}" in table


def test_a_file_of_another_kind_is_not_read_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen million invalid lines would take minutes and gigabytes."""
    monkeypatch.setattr(check_report, "_MAX_ERRORS", 20)
    path = write(folder, *["1"] * 30)
    with pytest.raises(DcrisError, match=r"stopped after 20 errors; the first: .*line 1 is not an object"):
        check_dataset(path, None)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no file"), (b"", "no references"), (b"\xef\xbb\xbf\n \r\n", "no references")],
)
def test_missing_and_empty_files(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DcrisError, match=sentence):
        load_references(path, None)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DcrisError, match="cannot read"):
        load_references(tmp_path / "folder.jsonl", None)


def test_a_line_without_an_end_is_not_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another kind may be a single line of eight gigabytes."""
    path = folder / "endless.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # a sparse file
    with pytest.raises(DcrisError, match="line 1 is longer than 16 MiB"):
        load_references(path, None)
    monkeypatch.setattr(files, "MAX_LINE", len(json.dumps(line())) + 1)
    assert len(load(folder, line(), line()).references) == 1 + 1
    with pytest.raises(DcrisError, match="line 2 is longer"):
        load(folder, line(), line(split="a longer one"))


@pytest.mark.parametrize("name", ["./img/1.jpg", "img//1.jpg", "././img/./1.jpg", "img\\1.jpg", ".\\img\\1.jpg"])
def test_another_spelling_of_a_path_is_the_same_image(folder: Path, name: str) -> None:
    """`find` writes ./, some scripts write double slashes, and Windows writes backslashes."""
    table = load(folder, line(), line(image=name))
    assert {item.image_path for item in table.references} == {folder / "img/1.jpg"}
    assert {item.image_id for item in table.references} == {1}


def test_files_that_were_joined(folder: Path) -> None:
    """`cat train.jsonl val.jsonl > my.jsonl` with files that have byte order marks."""
    text = "\ufeff" + json.dumps(line()) + "\n\n"
    assert len(load(folder, text + text).references) == 2


def test_pipes_and_devices_are_named(folder: Path) -> None:
    """A pipe would block for ever, and /dev/zero has no end."""
    for name in ("pipe.jsonl", "img/pipe.jpg", "pipe.png"):
        os.mkfifo(folder / name)
    (folder / "endless.jsonl").unlink(missing_ok=True)
    (folder / "device.jsonl").symlink_to("/dev/zero")
    for path in ("pipe.jsonl", "device.jsonl"):
        with pytest.raises(DcrisError, match="not a regular file"):
            load_references(folder / path, None)
    for wrong in (line(image="img/pipe.jpg"), line(mask="pipe.png")):
        with pytest.raises(DcrisError, match=r"line 1.*it is a pipe"):
            load(folder, wrong)


def test_headers_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with fifty objects is opened once, not fifty times."""
    asked = []
    size = jsonl.image_size
    monkeypatch.setattr(jsonl, "image_size", lambda path: asked.append(path) or size(path))
    load(folder, *[line(mask=POLYGON)] * 5)
    assert asked == [folder / "img/1.jpg"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("image", "mask", "expressions", "split", "category", "id")


@settings(max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3), cut=st.integers(0, 200))
def test_any_line_is_read_or_refused(folder: Path, changes: dict[str, Any], cut: int) -> None:
    """There is no traceback, and references that are read can be trained on."""
    text = json.dumps(line(mask=POLYGON) | changes)
    for content in (text, text[:cut]):
        try:
            table = load(folder, content)
        except DcrisError as error:
            assert "\n" not in str(error)
        else:
            (item,) = table.references
            assert union_mask(item.segmentations, item.image_size).shape == (H, W)
            assert item.image_path.resolve().is_relative_to(folder.resolve())
            assert all(each.text.strip() for each in item.expressions)
            assert len(table.sha256()) == 64


# ---- the checksum of a table ---------------------------------------------------------------------


def test_the_checksum_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    """A run is not resumed on other data, and is resumed on the same data in another place."""
    lines = [line(), line(image="img/turned.jpg", mask=POLYGON), line(mask=encode_mask(RECTANGLE), split="val")]
    before = load(folder, *lines).sha256()
    moved = tmp_path / "elsewhere"
    for name in ("img/1.jpg", "img/turned.jpg", "mask.png"):
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        (moved / name).write_bytes((folder / name).read_bytes())
    assert load(moved, *lines).sha256() == before
    Image.fromarray(RECTANGLE).save(moved / "other.png")
    changes: list[dict[str, Any]] = [
        {"expressions": ["the boy"]},
        {"expressions": ["the box", "it"]},
        {"split": "val"},
        {"mask": "other.png"},
        {"mask": POLYGON},
        {"image": "img/turned.jpg"},
        {"id": 9},
    ]
    sums = {load(moved, line(**change), *lines[1:]).sha256() for change in changes}
    sums |= {load(moved, *lines[1:], lines[0]).sha256(), load(moved, *lines[:2]).sha256()}
    assert len(sums) == len(changes) + 2
    assert before not in sums


@pytest.mark.parametrize("dataset", [None, "refcoco"])
def test_an_export_is_no_data_set(tmp_path: Path, dataset: str | None) -> None:
    """The message names the command that makes one of it, and the file that was meant."""
    (tmp_path / "instances.json").write_text("{}")
    for read in (load_references, list_data_sets):
        with pytest.raises(DcrisError, match=r"instances\.json is no data set: .*`dcris data import`"):
            read(tmp_path / "instances.json", dataset)
    (tmp_path / "my.jsonl").write_text("{}")
    with pytest.raises(DcrisError, match=r"give the file of your own data, .*my\.jsonl"):
        load_references(tmp_path, dataset)
