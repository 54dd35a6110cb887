"""`dcris predict` for many images: tasks, output files, and errors."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from dcris import Segmenter
from dcris.cli import main
from dcris.data.brush_rle import encode_brush
from dcris.data.images import image_endings
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.inference import batch
from dcris.inference import inputs as inputs_module
from dcris.inference import records as records_module
from dcris.inference.batch import BatchPredictor, Done, Failed, Written
from dcris.inference.inputs import RECORDS, Task, assign_names, find_tasks, read_pairs, result_stem
from dcris.inference.label_studio import label_studio_config, label_studio_task
from dcris.inference.records import Records
from launcher import Launcher
from marks import slow_except
from runs import leftovers
from test_distributed import half_mask_model, torchrun

UNFINISHED, STATE = "dcris-journal.unfinished.json", "dcris-journal.state.json"


@pytest.fixture(scope="module")
def model(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds something on most images."""
    return half_mask_model(trained_run, tmp_path_factory.mktemp("half_mask_model") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 4)


def make_photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def dcris(*words: object) -> int:
    return main([str(word) for word in words])


def results(out: Path) -> list[Any]:
    return json.loads((out / "predictions.json").read_text())


def recorded(out: Path) -> list[str]:
    """The names of the records in a folder of results."""
    lines = (out / RECORDS).read_text().splitlines() if (out / RECORDS).exists() else []
    return [json.loads(line)["name"] for line in lines if line.endswith("}")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is asked -------------------------------------------------------------------------------


def test_folders_patterns_and_what_is_named_twice(photos: Path) -> None:
    """Subfolders are searched only with --recursive, and keep their structure in names."""
    make_photos(photos / "deeper", 1)
    (photos / "a folder.jpg").mkdir()
    (photos / "notes.txt").touch()
    assert [task.name for task in find_tasks([photos], ["cup"])] == ["0", "1", "2", "3"]
    deep = find_tasks([photos], ["cup"], recursive=True)
    assert [(task.name, task.shown) for task in deep][-1] == ("deeper/0", "deeper/0.png")
    assert len(deep) == 5
    twice = find_tasks([photos / "1.png", photos, photos / "[12].png"], ["cup"])
    assert [task.name for task in twice] == ["1", "0", "2", "3"]
    everywhere = find_tasks([photos / "**" / "*"], ["cup"])
    assert [task.name for task in everywhere] == ["0", "1", "2", "3", "0~2"]


def test_names_differ_on_any_file_system(tmp_path: Path) -> None:
    """A.png and a.png are the same file on case-insensitive file systems, so their masks need other
    names."""
    for name in ("a.png", "A.jpg", "a.bmp", "a~2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    names = [task.name for task in find_tasks([tmp_path], ["cup"])]
    assert len({name.casefold() for name in names}) == 4


def test_names_as_long_as_a_file_system_takes(model: Path, tmp_path: Path) -> None:
    """A name near the limit, with three bytes per character, must not stop the whole call."""
    photos = make_photos(tmp_path / "photos", 2)
    for number in range(2):
        (photos / f"{number}.png").rename(photos / f"{chr(0x3042) * 83}{number}.png")
    assert dcris("predict", model, photos, "-e", "cup", "--out", tmp_path / "out") == 0
    assert [entry["file_name"] for entry in results(tmp_path / "out")] == sorted(path.name for path in photos.iterdir())
    assert len({path.name for path in (tmp_path / "out").glob("*.mask.png")}) == 2


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    """Browsers name a second download "photo [1].png"."""
    Image.new("RGB", (4, 4)).save(tmp_path / "photo [1].png")
    assert [task.name for task in find_tasks([tmp_path / "photo [1].png"], ["cup"])] == ["photo [1]"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("way", ["recursive", "pattern", "pattern twice", "absolute", "both names"])
def test_links_in_circles(way: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Circular links must not make `**` run forever or return an image several times."""
    make_photos(photos / "a" / "deep", 1)
    for link, target in (("a/up", ".."), ("a/self", "."), ("again", "a"), ("a/deep/top", photos), ("gone", "nowhere")):
        (photos / link).symlink_to(target)
    make_photos(photos.parent / "elsewhere", 1)
    (photos / "outside").symlink_to(photos.parent / "elsewhere")
    monkeypatch.chdir(photos.parent)
    places = {
        "recursive": [Path("photos")],
        "pattern": [Path("photos/**/*.png")],
        "pattern twice": [Path("**/**/[0-9].png")],
        "absolute": [photos / "**" / "*"],
        "both names": [
            Path("photos"),
            Path("photos/again"),
            Path("photos/a/deep/top/*.png"),
            photos / "outside" / "0.png",
        ],
    }[way]
    found = find_tasks(places, ["cup"], recursive=way in {"recursive", "both names"})
    real = [task.path.resolve().relative_to(photos.parent.resolve()).as_posix() for task in found]
    assert sorted(real) == [
        "elsewhere/0.png",
        "photos/0.png",
        "photos/1.png",
        "photos/2.png",
        "photos/3.png",
        "photos/a/deep/0.png",
    ]
    assert len({task.name for task in found}) == 6


def test_paths_that_look_like_addresses(tmp_path: Path) -> None:
    """A colon is a normal character of a file name, and a list must not cause requests to other
    hosts."""
    (tmp_path / "a.csv").write_text("http:host/y.mp4,cup\n2026-11-28T10:30:00.mp4,cup\n")
    tasks = read_pairs(tmp_path / "a.csv")
    assert [task.path for task in tasks] == [tmp_path / "http:host" / "y.mp4", tmp_path / "2026-11-28T10:30:00.mp4"]
    assert [task.name for task in tasks] == ["y", "2026-11-28T10:30:00"]
    assert all(task.video for task in tasks)


@pytest.mark.parametrize("way", ["folder", "recursive", "pattern", "shell"])
def test_results_are_skipped(way: str, tmp_path: Path) -> None:
    """Results, unfinished files, and results of other calls beside the images are skipped."""
    photos = make_photos(tmp_path / "photos", 2)
    for name in ("0.0.mask.png", "0.0.overlay.png", "1.12.cutout.png", ".1.0.mask.png.partial-0123abcd.png", RECORDS):
        (photos / name).touch()
    for name in ("1.0-größe-猫.mask.png", "0.3-a_b.scores.npy", "1.annotated.png"):
        (photos / name).touch()
    for name in ("clip.overlay.mp4", "predictions.json", "0.0.scores.npy", ".clip.overlay.mp4.partial-0123abcd.mp4"):
        (photos / name).touch()
    (photos / "clip.frames").mkdir()
    (photos / "clip.frames" / "000000.0.mask.png").touch()
    places = {"pattern": [photos / "**" / "*"], "shell": sorted(photos.iterdir())}.get(way, [photos])
    found = find_tasks(places, ["cup"], out=tmp_path / "out", recursive=way == "recursive")
    assert [task.name for task in found] == ["0", "1"]
    with pytest.raises(DcrisError, match="all given files are results of earlier calls"):
        find_tasks([photos / "0.0.mask.png", photos / "clip.frames"], ["cup"])


def test_results_in_the_folder_of_the_images(model: Path, photos: Path) -> None:
    """A second call must not predict on the masks of the first."""
    for _ in range(2):
        assert dcris("predict", model, photos, "-e", "cup", "--out", photos, "--recursive") == 0
        assert len(results(photos)) == 4


def test_skipped_files_are_counted_by_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a phone may have more files of unknown formats than of known ones."""
    monkeypatch.setattr("dcris.inference.inputs.image_endings", lambda: frozenset({".jpg", ".avif", ".mpo"}))
    for name in ("a.jpg", "b.AVIF", "c.mpo", "d.heic", "e.HEIC", "f.psd", "g.mp4", "notes", ".DS_Store", "h.wmv"):
        (tmp_path / name).touch()
    lines: list[str] = []
    assert len(find_tasks([tmp_path], ["cup"], on_skipped=lines.append)) == 3
    assert lines == [
        f"skipped in {tmp_path}: 2 .heic (to read HEIC and HEIF images, run: pip install pillow-heif); "
        "1 .psd, 1 without ending (not a readable image or video); "
        "1 .mp4, 1 .wmv (give videos by name or by a pattern)"
    ]
    lines.clear()
    assert [task.path.name for task in find_tasks([tmp_path / "[a-h].*"], ["cup"], on_skipped=lines.append)] == [
        *("a.jpg", "b.AVIF", "c.mpo", "g.mp4", "h.wmv")
    ]
    assert "2 .heic" in lines[0]
    assert "1 .psd" in lines[0]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "g.mp4").touch()
    with pytest.raises(DcrisError, match=r"has no images in it; it has 1 \.mp4 \(give videos by name"):
        find_tasks([tmp_path / "films"], ["cup"])


def test_images_of_every_readable_ending_are_predicted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All readable endings are predicted; others are reported."""
    picture = Image.new("RGB", (90, 60), (200, 9, 9))
    names = {"a.jpg": "JPEG", "b.gif": "GIF", "c.jfif": "JPEG", "d.mpo": "MPO", "e.png": "PNG", "f.ppm": "PPM"}
    for name, kind in names.items():
        picture.save(tmp_path / name, kind)
    (tmp_path / "g.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "h.txt").write_text("x")
    words = ("predict", model, tmp_path, "-e", "left square", "--out", tmp_path / "out", "--format", "mask")
    code = dcris(*words)
    told = capsys.readouterr()
    assert {path.name[0] for path in (tmp_path / "out").glob("*.mask.png")} == {name[0] for name in names}
    assert "1 .txt (not a readable image" in told.out
    if ".heic" not in image_endings():
        assert code == 0
        assert "1 .heic (to read HEIC and HEIF images, run: pip install pillow-heif)" in told.out


PAIRS = {
    "named.csv": 'phrase,note,image\nthe cup,x,0.png\n"left, and small",y,1.png\n\nring,z,0.png\n',
    "bare.csv": '0.png,the cup\n1.png,"left, and small"\n0.png,ring\n',
    "semicolons.csv": "image;phrase\n0.png;the cup\n1.png;left, and small\n0.png;ring\n",
    "bare semicolons.csv": "0.png;the cup\n1.png;left, and small\n0.png;ring\n",
    "declared.csv": "sep=;\r\nimage;phrase\r\n0.png;the cup\r\n1.png;left, and small\r\n0.png;ring\r\n",
    "declared cells.csv": '"sep=;";\nimage;phrase\n0.png;the cup\n1.png;left, and small\n0.png;ring\n',
    "declared commas.csv": 'sep=,\n0.png,the cup\n1.png,"left, and small"\n0.png,ring\n',
    "tabs.csv": "0.png\tthe cup\n1.png\tleft, and small\n0.png\tring\n",
    "commas.tsv": 'image,phrase\n0.png,the cup\n1.png,"left, and small"\n./0.png,ring\n',
    "tabs.tsv": "image\texpression\r\n0.png\tthe cup\r\n1.png\tleft, and small\r\n0.png\tring\r\n",
    "lines.jsonl": '{"image": "0.png", "phrases": ["the cup", "ring"]}\n{"image": "1.png", "phrase": "left, and small"}\n',
    "own.jsonl": '{"image": "0.png", "expressions": ["the cup"], "mask": "x", "split": "val"}\n'
    '{"image": "1.png", "expression": "left, and small"}\n{"image": "0.png", "phrase": "ring"}\n',
}


@pytest.mark.parametrize("name", PAIRS)
def test_lists_of_pairs(name: str, tmp_path: Path) -> None:
    """All forms that spreadsheets and scripts write, in the order of the lines."""
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * (name in {"bare.csv", "declared.csv"}) + PAIRS[name].encode())
    tasks = read_pairs(tmp_path / name)
    assert [(task.path, task.shown, task.phrases) for task in tasks] == [
        (tmp_path / "0.png", "0.png", ("the cup", "ring")),
        (tmp_path / "1.png", "1.png", ("left, and small",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "0.png,left, small\n", r"line 1: the line has 3 columns, not 2; quote phrases that contain a comma"),
        (
            "a.csv",
            "image,phrase\n0.png,cup\n1.png\n",
            r"line 3: the line has 1 column, not 2; separate image and phrase by a comma, a semicolon",
        ),
        (
            "a.csv",
            "sep=;\nimage;phrase\n0.png;left; small\n",
            "line 3: the line has 3 columns, not 2; quote phrases that contain a semicolon",
        ),
        (
            "a.csv",
            "image phrase\n0.png cup\n",
            "line 1: the line has 1 column, not 2; separate image and phrase by a comma",
        ),
        ("a.csv", "image,word\n0.png,cup\n", "no column phrase"),
        ("a.csv", '0.png,"cup\n', "not a valid table"),
        ("a.csv", "0.png, \n", r"line 1: the phrase ' ' is empty"),
        ("a.csv", ",cup\n", "line 1: image and phrase must be text"),
        ("a.csv", "", "no pairs"),
        ("a.csv", "image,phrase\n", "no pairs"),
        ("a.tsv", "0.png cup\n", "1 column, not 2"),
        ("a.jsonl", '{"image": "0.png", "phrase": "cup"}\n[1]\n', "line 2: not an object"),
        ("a.jsonl", '{"image": "0.png"', "line 1 is not JSON"),
        ("a.jsonl", '{"image": "0.png", "phrases": []}', "line 1: `phrases` is empty"),
        ("a.jsonl", '{"image": "0.png", "phrase": "a", "phrases": ["b"]}', "both `phrase` and `phrases`"),
        ("a.jsonl", '{"image": 1, "phrase": "cup"}', "text, not 1 and 'cup'"),
        ("a.jsonl", '{"image": "0.png", "phrases": [null]}', "None"),
        ("a.jsonl", '{"image": "a\\u0000", "phrase": "cup"}', "must be text"),
        ("a.jsonl", '{"image": "a\\ud800", "phrase": "cup"}', "must be text"),
        ("a.jsonl", '{"image": "a", "phrase": "caf\\udce9"}', "line 1: the phrase .* is not UTF-8 text"),
        ("a.txt", "0.png,cup\n", r"\.csv, \.tsv or \.jsonl"),
        ("a.csv", b"caf\xe9.png,cup", "not UTF-8"),
        ("a.csv", "0.png,cup".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_bad_list_names_the_line(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    """The error must name the one wrong line of a long list."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DcrisError, match=words):
        read_pairs(tmp_path / name)


def test_pairs_are_predicted(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image gets its own phrases; a missing image does not stop the others."""
    (photos / "pairs.csv").write_text("image,phrase\n0.png,the cup\n1.png,left\nabsent.png,ring\n0.png,ring\n")
    out = tmp_path / "out"
    assert dcris("predict", model, "--pairs", photos / "pairs.csv", "--out", out) == 2
    assert "1 of 3 could not be read, all others are done" in capsys.readouterr().err
    found = [(entry["file_name"], entry["phrase"], entry["phrase_number"]) for entry in results(out)]
    assert found == [("0.png", "the cup", 0), ("0.png", "ring", 1), ("1.png", "left", 0)]
    assert (out / "0.1-ring.mask.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--pairs PAIRS -e ring", "--pairs already gives images and phrases"),
        ("PHOTOS --pairs PAIRS", "--pairs already gives images and phrases"),
        ("--pairs ABSENT.csv", "cannot read the list"),
        ("-e ring", "no image was given"),
        ("PHOTOS", "no phrase was given"),
        ("PHOTOS/*.gif -e ring", "no image or video matches"),
        # Python takes addresses; "there is no file https:/example.org/a.jpg" looked like a bug.
        ("https://example.org/a.jpg?b=1 -e ring", "https://example.org/a.jpg?b=1 is an address; download the image"),
        ("PHOTOS -e ring --every 0", "1 or more"),
        ("PHOTOS -e ring --threshold 1", "between 0 and 1"),
        ("PHOTOS -e ring --min-score 1.1", "'1.1' is not a number from 0 to 1"),
        ("PHOTOS -e ring --min-score nan", "'nan' is not a number from 0 to 1"),
        ("PHOTOS -e ring --min-area -3", "whole number of 0 or more"),
        ("PHOTOS -e ring --precision half", "invalid choice: 'half'"),
        ("PHOTOS -e ring --device gpu", "unknown device 'gpu'; use auto, cpu, cuda, cuda:N or mps"),
        ("PHOTOS --phrases ABSENT.txt", "cannot read the list"),
        ("PHOTOS --phrases EMPTY", "has no phrase; write one on each line"),
        ("PHOTOS --phrases BLANK", "line 2: the phrase '&nbsp;' is empty"),
        ("--pairs PAIRS --phrases BLANK", "--pairs already gives images and phrases"),
        ("PHOTOS/deep -e ring", "--recursive"),
    ],
)
def test_bad_arguments(
    words: str, sentence: str, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One error line, before the model is loaded and anything is written."""
    monkeypatch.setattr(Segmenter, "_load", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "blank").write_text("a cup\n&nbsp;\n")
    (photos / "deep" / "er").mkdir(parents=True)
    (tmp_path / "pairs.csv").write_text(f"{photos / '0.png'},ring\n")
    places = {"PAIRS": tmp_path / "pairs.csv", "PHOTOS": photos, "ABSENT": tmp_path / "absent"}
    places |= {"EMPTY": tmp_path / "empty", "BLANK": tmp_path / "blank"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert dcris("predict", model, *words.split(), "--out", tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert sentence in complaint
    assert complaint.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


# ---- what goes wrong on the way ------------------------------------------------------------------


def test_bad_files_among_good_ones(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad files are reported at once and at the end, do not stop the others, and are retried by the
    next call."""
    good = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(good[: len(good) // 2])
    (photos / "2.png").write_text("not a picture")
    (photos / "gone.png").symlink_to(photos / "nowhere")
    out = tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--out", out)
    assert dcris(*command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("dcris: 3 of 5 could not be read, all others are done: ")
    assert printed.err.count("\n") == 1
    assert [line.split(": ")[0] for line in printed.out.splitlines() if "skipped" in line] == [
        str(photos / name) for name in ("1.png", "2.png", "gone.png")
    ]
    # A line names its file once: long paths twice in a line hide the reason between them.
    assert all(printed.out.count(str(photos / name)) == 1 for name in ("1.png", "2.png", "gone.png"))
    assert "2.png: skipped; cannot read the image (it is not an image" in printed.out
    assert [(entry["file_name"], entry["image_id"]) for entry in results(out)] == [("0.png", 1), ("3.png", 4)]
    assert dcris("predict", model, photos / "2.png", "-e", "cup", "--out", tmp_path / "alone") == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(str(photos / "2.png")) == 1
    (photos / "1.png").write_bytes(good)
    (photos / "2.png").unlink()
    (photos / "gone.png").unlink()
    assert dcris(*command) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("2 of 3 are done already")
    assert [entry["file_name"] for entry in results(out)] == ["0.png", "1.png", "3.png"]
    assert not leftovers(out)


def written(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_finished_images_are_skipped(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call predicts again after other phrases, a changed image or a deleted file, and only
    then."""
    out = tmp_path / "out"
    command = ["predict", model, photos, "-e", "cup", "--out", out, "--format", "mask", "coco"]
    assert dcris(*command) == 0
    first, content = written(out), results(out)
    (out / "predictions.json").unlink()
    assert dcris(*command) == 0
    assert written(out) == first
    assert results(out) == content
    # A mask that is gone, and a picture that is another now.
    (out / "0.0-cup.mask.png").unlink()
    Image.new("RGB", (9, 9)).save(photos / "1.png")
    assert dcris(*command) == 0
    again = written(out)
    assert {name for name in first if again[name] == first[name]} == {"2.0-cup.mask.png", "3.0-cup.mask.png"}
    assert len(results(out)) == 4
    # All of it again.
    capsys.readouterr()
    assert dcris(*command, "--overwrite") == 0
    assert "done already" not in capsys.readouterr().out
    assert not any(written(out)[name] == time for name, time in again.items() if name.endswith(".0-cup.mask.png"))
    assert len(results(out)) == 4


def test_a_call_adds_to_earlier_results(model: Path, tmp_path: Path) -> None:
    """Images of several calls keep their own masks, entries and ids, whatever their names are."""
    one, two = make_photos(tmp_path / "one", 2), tmp_path / "two"
    two.mkdir()
    for name, size in (("0.png", (7, 5)), ("1.jpg", (9, 6)), ("2.png", (5, 5))):
        Image.new("RGB", size).save(two / name)
    out, command = tmp_path / "out", ("-e", "cup", "--format", "mask", "coco", "label-studio", "--out")
    for place in (one / "1.png", two / "0.png", one, two / "2.png", two, one):
        assert dcris("predict", model, place, *command, out) == 0
    found = {entry["name"]: (entry["file_name"], entry["image_id"]) for entry in results(out)}
    assert found == {"1": ("1.png", 1), "0": ("0.png", 2), "0~2": ("0.png", 3), "2": ("2.png", 4), "1~2": ("1.jpg", 5)}
    for entry in results(out):
        assert entry["stem"] == f"{entry['name']}.0-cup"
        mask = Image.open(out / f"{entry['stem']}.mask.png")
        assert [*mask.size][::-1] == entry["segmentation"]["size"]
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]) > 0, np.array(mask) > 0)
    assert Image.open(out / "0.0-cup.mask.png").size == (7, 5)
    assert Image.open(out / "0~2.0-cup.mask.png").size == (64, 48)
    assert len(json.loads((out / "label_studio.json").read_text())) == 5


def test_one_image_by_several_paths(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path, a linked folder or a moved folder does not make it another image."""
    work = photos.parent
    (work / "link").symlink_to("photos")
    monkeypatch.chdir(work)
    for place in (photos, "photos", "link/../link", "link/[0-9].png", "link/2.png"):
        assert dcris("predict", model, place, "-e", "cup", "--out", "out") == 0
    first = contents(work / "out")
    (work / "link").unlink()
    photos.rename(work / "moved")
    assert dcris("predict", model, "moved", "-e", "cup", "--out", "out") == 0
    assert {name: content for name, content in contents(work / "out").items() if name not in (RECORDS, STATE)} == {
        name: content for name, content in first.items() if name not in (RECORDS, STATE)
    }


def test_moved_images_that_look_alike_keep_their_own_masks(model: Path, tmp_path: Path) -> None:
    """Uncompressed images of one size and time are told apart by their folders only: after the
    folder above was renamed, each has its own mask; where folders do not tell, they are predicted
    again."""
    for number, folder in enumerate("xy"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        image = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"photos/{folder}/1.bmp")
        os.utime(tmp_path / f"photos/{folder}/1.bmp", (1e9, 1e9))

    def predicted(place: Path) -> dict[str, Any]:
        command = ("--recursive", "-e", "cup", "--min-score", "0", "--format", "coco", "--out", tmp_path / "out")
        assert dcris("predict", model, place, *command) == 0
        entries = [entry for entry in results(tmp_path / "out") if entry["file_name"].startswith(("x", "y", "z"))]
        assert len(entries) == len({entry["file_name"] for entry in entries})
        return {entry["file_name"]: entry["segmentation"] for entry in entries}

    first = predicted(tmp_path / "photos")
    assert first["x/1.bmp"] != first["y/1.bmp"]
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert predicted(tmp_path / "moved") == first
    (tmp_path / "moved/x").rename(tmp_path / "moved/z1")
    (tmp_path / "moved/y").rename(tmp_path / "moved/z2")
    again = predicted(tmp_path / "moved")
    assert (again["z1/1.bmp"], again["z2/1.bmp"]) == (first["x/1.bmp"], first["y/1.bmp"])


def test_frames_of_a_video_and_extracted_frames_beside_it(tmp_path: Path) -> None:
    """ffmpeg's frames in clip.frames/ must not take the names of the frames of clip.mp4."""
    (tmp_path / "clip.frames").mkdir()
    (tmp_path / "clip.mp4").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "clip.frames/000000.png")
    for places in ([tmp_path, tmp_path / "clip.mp4"], [tmp_path / "clip.mp4", tmp_path]):
        tasks = find_tasks(places, ["cup"], recursive=True)
        video, image = sorted(tasks, key=lambda task: task.video, reverse=True)
        assert not image.name.startswith(f"{video.name}.frames/")
        known = {task.source: task.name for task in tasks}
        assert assign_names(tasks[::-1], known) == tasks[::-1]


def test_the_time_for_images_of_one_name_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames 00000.jpg of 4,000 videos took half a minute: each name was tried from ~2 on."""
    (tmp_path / "pairs.csv").write_text("".join(f"{number}/00000.jpg,cup\n" for number in range(300)))
    tried = 0

    def counted(start: int) -> Iterator[int]:
        nonlocal tried
        for number in count(start):
            tried += 1
            yield number

    monkeypatch.setattr(inputs_module, "count", counted)
    names = [task.name for task in read_pairs(tmp_path / "pairs.csv")]
    assert names == ["00000", *(f"00000~{number}" for number in range(2, 301))]
    assert tried < 2 * 300


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--threshold", "0.6"), "made with threshold 0.35 (now 0.6)"),
        (("--format", "mask"), "made with formats coco mask (now mask)"),
        ("another model", "made with another model"),
        pytest.param(("--refine", "guided"), "made with refine none (now guided)", marks=pytest.mark.slow),
        pytest.param(("--precision", "bfloat16"), "made with precision float32 (now bfloat16)", marks=pytest.mark.slow),
        pytest.param(
            ("another photograph", "--threshold", "0.6"),
            "made with threshold 0.35 (now 0.6)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_settings_are_refused(
    change: Any, words: str, model: Path, trained_run: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    """predictions.json must not mix models or thresholds, or masks and scores of different
    phrases."""
    out = tmp_path / "out"
    assert dcris("predict", model, photos / "0.png", "-e", "cup", "--format", "mask", "coco", "--out", out) == 0
    before = contents(out)
    place = photos / "1.png" if "another photograph" in change else photos / "0.png"
    command = ["predict", trained_run if change == "another model" else model, place, "-e", "cup", "--out", out]
    more = [] if change == "another model" else [word for word in change if word != "another photograph"]
    capsys.readouterr()
    assert dcris(*command, *([] if "--format" in more else ["--format", "mask", "coco"]), *more) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert "choose another --out, or add --overwrite to replace" in complaint
    assert contents(out) == before


@pytest.mark.parametrize(("key", "value"), [("word_length", 4), ("image_size", 112)])
def test_the_same_weights_with_other_settings_are_another_model(
    key: str, value: int, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dcris convert --word-length` converts one file twice: whoever compared the two in one folder
    got the results of the first for both ("1 of 1 are done already")."""
    out, other = tmp_path / "out", Segmenter.from_pretrained(model).save_pretrained(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config["data"][key] != value
    config["data"][key] = value
    (other / "config.json").write_text(json.dumps(config))
    assert dcris("predict", model, photos / "0.png", "-e", "the red cup", "--out", out) == 0
    assert dcris("predict", other, photos / "0.png", "-e", "the red cup", "--out", out) == 2
    assert "made with another model" in capsys.readouterr().err


def test_overwrite_replaces_only_the_images_of_the_call(model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """--overwrite deletes masks of phrases that are not requested any more, keeps other images, and
    reports mixed settings."""
    out, command = tmp_path / "out", ("--format", "mask", "scores", "coco", "--out")
    assert dcris("predict", model, photos, "-e", "cup", "-e", "ring", *command, out) == 0
    before = written(out) | {name: 0 for name in contents(out) if name.startswith("0.1-")}
    capsys.readouterr()
    assert (
        dcris("predict", model, photos / "0.png", "-e", "left", *command, out, "--overwrite", "--threshold", "0.6") == 0
    )
    assert f"{out} keeps its results for 3 other images, made with threshold 0.35 (now 0.6)" in capsys.readouterr().out
    asked = [(entry["name"], entry["phrase"]) for entry in results(out)]
    assert asked == [("0", "left"), *((name, phrase) for name in "123" for phrase in ("cup", "ring"))]
    assert not list(out.glob("0.1-*"))
    assert {name for name, time in written(out).items() if time != before.get(name)} == {"0.0-left.mask.png"}
    # No call without --overwrite adds to either.
    for threshold in ("0.35", "0.6"):
        assert dcris("predict", model, photos, "-e", "left", *command, out, "--threshold", threshold) == 2
    # A call that adds nothing finds its results.
    assert dcris("predict", model, photos / "0.png", "-e", "left", *command, out, "--threshold", "0.6") == 0


def test_other_phrases_and_images_replace_their_results(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call with other phrases leaves no mask of the first beside its own; images with the
    same phrases, and those of other calls, keep theirs."""
    out, rest = tmp_path / "out", ("--format", "mask", "annotated", "coco", "--out")
    assert dcris("predict", model, photos, "-e", "cup", "-e", "ring", *rest, out) == 0
    before = written(out)
    (photos / "pairs.csv").write_text("0.png,ring\n0.png,Red cup!\n1.png,cup\n1.png,ring\n")
    capsys.readouterr()
    assert dcris("predict", model, "--pairs", photos / "pairs.csv", *rest, out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out} has results for 1 of the images with other phrases, which are replaced\n")
    assert "1 of 2 are done already" in printed
    after = written(out)
    changed = {"0.0-ring.mask.png", "0.1-red-cup.mask.png", "0.annotated.png"}
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert before.keys() - after.keys() == {"0.0-cup.mask.png", "0.1-ring.mask.png"}
    pairs = [(entry["name"], entry["phrase"]) for entry in results(out)]
    assert pairs == [("0", "ring"), ("0", "Red cup!"), *((name, each) for name in "123" for each in ("cup", "ring"))]
    for entry in results(out):
        mask = np.array(Image.open(out / f"{entry['stem']}.mask.png")) > 0
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]) > 0, mask)


@pytest.mark.parametrize(
    ("phrase", "stem"),
    [
        ("Blue square!", "a.0-blue-square"),
        ("  the_man's  left/right ../.. hat", "a.0-the-man-s-left-right-hat"),
        ("größer 猫", "a.0-größer-猫"),
        ("gro\u0308ßer", "a.0-größer"),
        ("?!", "a.0"),
        ("\u202e\x1b[31m", "a.0-31m"),
        ("कप", "a.0-कप"),
        ("CON: NUL.", "a.0-con-nul"),
        ("x" * 5000, "a.0-" + "x" * 30),
        ("a long phrase with some words in it", "a.0-a-long-phrase-with-some-words"),
        ("twenty-nine bytes are in here it", "a.0-twenty-nine-bytes-are-in-here"),
    ],
)
def test_phrases_in_file_names(phrase: str, stem: str) -> None:
    """A person finds the mask of a phrase by its name; no phrase gives a name that a file system or
    a shell has trouble with."""
    assert result_stem("a", 0, phrase) == stem


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(0, 99_999))
def test_any_phrase_is_a_short_plain_name(phrase: str, number: int) -> None:
    stem = result_stem("a", number, phrase)
    assert stem.startswith(f"a.{number}")
    assert not set(stem[len(f"a.{number}") :]) & set('./\\:*?"<>|\0\n ')
    assert len(stem.encode()) <= len(f"a.{number}-") + 30
    assert records_module._is_result_file(f"{stem}.mask.png")
    assert inputs_module._RESULT.fullmatch(f"{stem}.mask.png")


def test_files_of_a_killed_call_are_deleted(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks without a record, of phrases that the next call does not have, and unfinished files."""
    out = tmp_path / "out"
    make_photos(photos / "deeper", 1)
    command = ("predict", model, photos, "--recursive", "--out", out, "-e", "cup")
    with monkeypatch.context() as patch:
        patch.setattr("dcris.inference.records.Records.add", killed)
        for place, formats in ((photos, ("mask", "overlay", "annotated")), (photos / "deeper", ("scores",))):
            words = (
                "predict",
                model,
                place,
                "-e",
                "cup",
                "-e",
                "ring",
                "--out",
                out / place.name.replace("photos", ""),
            )
            with pytest.raises(ZeroDivisionError):
                dcris(*words, "--format", *formats)
    assert (out / "0.1-ring.mask.png").exists()
    assert (out / "0.1-ring.overlay.png").exists()
    assert (out / "0.annotated.png").exists()
    assert (out / "deeper" / "0.1-ring.scores.npy").exists()
    shutil.move(out / "deeper" / UNFINISHED, out / "dcris-journal.1.unfinished.json")
    text = (out / "dcris-journal.1.unfinished.json").read_text()
    names = {f"deeper/{name}": [f"deeper/{file}" for file in files] for name, files in json.loads(text).items()}
    (out / "dcris-journal.1.unfinished.json").write_text(json.dumps(names))
    kept = ["00.1.mask.png", "other/0.1.mask.png", "0.notes.png", "elsewhere.1.mask.png"]
    (out / "other").mkdir()
    for name in (".0.0.mask.png.partial-01234567.png", "deeper/.0.0.mask.png.partial-01234567.png", *kept):
        (out / name).touch()
    assert dcris(*command, "--format", "mask") == 0
    names = [*(f"{number}.0-cup.mask.png" for number in range(4)), "deeper/0.0-cup.mask.png", *kept]
    assert {*contents(out)} == {*names, RECORDS, STATE}


def killed(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_own_files_with_names_of_results_are_kept(more: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    """Regression: a call deleted the user's files in --out with such names.

    Only recorded files are deleted.
    """
    photos = make_photos(tmp_path / "photos", 2)
    own = [
        "0.1.mask.png",
        "0.1-ring.mask.png",
        "1.annotated.png",
        "0.0.cutout.png",
        "0.7.overlay.png",
        "1.1.scores.npy",
        "0.overlay.mp4",
        "0.frames/000000.0.mask.png",
    ]
    (photos / "0.frames").mkdir()
    for name in own:
        (photos / name).write_text(name)
    command = ("predict", model, photos, "-e", "cup", "--format", "mask", "coco", "--out", photos)
    for _ in range(2):
        assert dcris(*command, *more) == 0
        assert {name: (photos / name).read_text() for name in own} == {name: name for name in own}
    assert {path.name for path in photos.glob("[01].0-*.png")} == {"0.0-cup.mask.png", "1.0-cup.mask.png"}


def test_own_files_survive_a_kill(model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note about unfinished files must not name a file that existed before the call."""
    (photos / "0.1-ring.overlay.png").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("dcris.inference.batch.write_file", killed)
        with pytest.raises(ZeroDivisionError):
            dcris("predict", model, photos, "-e", "cup", "-e", "ring", "--format", "overlay", "--out", photos)
    assert (photos / UNFINISHED).exists()
    assert dcris("predict", model, photos, "-e", "cup", "--format", "mask", "--out", photos) == 0
    assert (photos / "0.1-ring.overlay.png").read_text() == "mine"
    assert not (photos / UNFINISHED).exists()


@pytest.mark.parametrize(
    "file",
    slow_except(
        [
            "../own.0.mask.png",
            "0.x/../../own.0.mask.png",
            "own.0.mask.png",
            "0.txt",
            "own.annotated.png",
            "0.1-x/../../own.0.mask.png",
        ],
        "0.x/../../own.0.mask.png",
        "own.0.mask.png",
    ),
)
def test_records_of_others_delete_no_other_file(file: str, model: Path, photos: Path, tmp_path: Path) -> None:
    """A folder of results may come from another person; its records must not select files to
    delete."""
    out = tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--format", "mask", "coco", "--out", out)
    assert dcris(*command) == 0
    for folder in ("0.x", "0.1-x"):
        (out / folder).mkdir()
    (out / file).write_text("mine")
    lines = (out / RECORDS).read_text()
    (out / RECORDS).write_text(lines.replace('"files":["0.0-cup.mask.png"]', f'"files":["{file}"]'))
    if not file.startswith("own."):  # inside the folder the note may name any result
        (out / UNFINISHED).write_text(json.dumps({"9": [file, f"/{file}", 1], "8": 2}))
    assert dcris(*command, "--overwrite") == 0
    assert (out / file).read_text() == "mine"


def test_results_of_a_deleted_image_are_kept(model: Path, photos: Path, tmp_path: Path) -> None:
    """Results of an image that is missing today (disk not mounted) are kept."""
    (photos / "pairs.csv").write_text("0.png,cup\n1.png,ring\n")
    out = tmp_path / "out"
    command = ("predict", model, "--pairs", photos / "pairs.csv", "--out", out)
    assert dcris(*command) == 0
    before = {name: content for name, content in contents(out).items() if name not in (RECORDS, STATE)}
    (photos / "0.png").unlink()
    for more in ((), ("--overwrite",)):
        assert dcris(*command, *more) == 2
        assert {name: content for name, content in contents(out).items() if name not in (RECORDS, STATE)} == before


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_calls_at_once(launcher: Launcher, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls would delete each other's results.

    The second is refused; a killed call does not block the folder.
    """
    photos, out = make_photos(tmp_path / "photos", 12), tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--out", out, "--format", "coco", "mask", "--device", "cpu")
    first = launcher.start(command, tmp_path / "output.txt")
    wait_until(lambda: len(recorded(out)) >= 2)
    os.kill(first, signal.SIGSTOP)
    # Its thread that writes may be in the middle of a rename.
    wait_until(lambda: Path(f"/proc/{first}/stat").read_text().rpartition(") ")[2][0] == "T")
    before = contents(out)
    assert dcris(*command) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"dcris: another process (process {first} on ")
    assert complaint.count("\n") == 1
    assert contents(out) == before
    os.kill(first, signal.SIGKILL)
    assert launcher.wait(first) == -signal.SIGKILL
    assert dcris(*command) == 0
    assert len(results(out)) == 12


DAMAGE = {
    "garbage": lambda line: line[:-200] + b"\xff\x00garbage\n",
    "NUL bytes": lambda line: b"\0" * len(line) + b"\n",
    "blank": lambda line: b"\n",
    "list": lambda line: b"[1]\n",
    "nested": lambda line: b"[" * 100_000 + b"\n",
    "number": lambda line: b"9" * 5000 + b"\n",
    "names alone": lambda line: b'{"name": "0", "task": "0"}\n',
    "header of 0.1": lambda line: b'{"settings": {"version": "0.1"}}\n',
    "other types": lambda line: re.sub(rb'"place":(\d+)', rb'"place":"\\1"', line),
    "huge number": lambda line: re.sub(rb'"place":\d+', b'"place":' + b"9" * 400, line),
    "infinity": lambda line: re.sub(rb'"score":[\d.]+', b'"score":1e999', line),
    "NaN": lambda line: re.sub(rb'"score":[\d.]+', b'"score":NaN', line),
    "list for a name": lambda line: line.replace(b'"name":"0"', b'"name":["0"]'),
    "outside": lambda line: line.replace(b'"task":"0"', b'"task":"../0"').replace(b'"name":"0"', b'"name":"../0"'),
    "other size": lambda line: line.replace(b'"size":[48,64]', b'"size":[48,65]', 1),
    "no results": lambda line: re.sub(rb'"results":\[.*?\}\}\]', b'"results":[]', line),
    "another version's": lambda line: line.replace(b'"name":"0"', b'"name":"0","more":1'),
}


@pytest.mark.parametrize(
    "damage", slow_except(["cut line", "no line end", "file gone", "empty", "each line"], "cut line", "each line")
)
def test_damaged_records(damage: str, model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """Whatever happened to the record file, results are complete and never come from a damaged
    line."""
    out = tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--out", out)
    assert dcris(*command) == 0
    expected, (first, *others) = contents(out), (out / RECORDS).read_bytes().splitlines(keepends=True)
    each = {name: change(first) for name, change in DAMAGE.items()}
    assert not [name for name, line in each.items() if line == first]
    lines = {
        "cut line": [*others, first[:40]],
        "no line end": [*others, first[:-1]],
        "file gone": [first.replace(b'"0.0-cup.mask.png"', b'"0.9-cup.mask.png"'), *others],
        "empty": [],
        "each line": [*each.values(), *others],
    }[damage]
    (out / RECORDS).write_bytes(b"".join(lines))
    capsys.readouterr()
    assert dcris(*command) == 0
    assert (f"{len(each)} damaged lines" in capsys.readouterr().out) == (damage == "each line")
    assert {**contents(out), RECORDS: b""} == {**expected, RECORDS: b""}
    assert sorted(recorded(out)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("file", slow_except([RECORDS, "dcris-journal.1.jsonl"], RECORDS))
def test_a_record_file_may_end_anywhere(file: str, model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """A kill may cut the last line of any rank after any byte, also within a character: only this
    record is lost, and the next call completes the folder."""
    (photos / "3.png").rename(photos / "é.png")
    out = tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--out", out)
    assert dcris(*command) == 0
    expected, lines = contents(out), (out / RECORDS).read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["name"])
    last = lines[3]

    def cut(length: int) -> None:
        (out / RECORDS).write_bytes(b"".join(lines[:2]))
        with (out / file).open("ab") as journal:
            journal.write(lines[2] + last[:length])

    for length in range(len(last)):
        cut(length)
        records = Records(out)
        assert sorted(records.read()) == ["0", "1", "2"]
        assert records.damaged == 0
        (out / file).unlink()
    for length in (1, last.index("é".encode()) + 1, len(last) - 1):
        cut(length)
        (out / "é.0-cup.mask.png").write_bytes(b"half")
        capsys.readouterr()
        assert dcris(*command) == 0
        assert capsys.readouterr().out.startswith("3 of 4 are done already")
        assert {**contents(out), RECORDS: b""} == {**expected, RECORDS: b""}
        assert sorted(recorded(out)) == ["0", "1", "2", "é"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_records_of_the_previous_format(end: bytes, model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """It had the settings in a first line, and records without them. Of a killed call, its last
    line may be cut. Nothing of it is used, and its images are predicted again."""
    out = tmp_path / "out"
    command = ("predict", model, photos, "-e", "cup", "--out", out)
    assert dcris(*command) == 0
    expected, records = contents(out), [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    added = {"settings", "file_name", "percent_encoded", "address", "place"}
    previous = [{"settings": records[0]["settings"]}]
    previous += [{key: record[key] for key in record if key not in added} for record in records]
    *lines, last = [json.dumps(record).encode() + b"\n" for record in previous]
    (out / RECORDS).write_bytes(b"".join(lines) + last[:-2] + end)
    for number in range(4):
        (out / f"{number}.0-cup.mask.png").write_bytes(b"previous")
    capsys.readouterr()
    assert dcris(*command) == 0
    damaged = len(lines) + len(end)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out / RECORDS} has {damaged} damaged lines; their images are predicted again\n")
    assert "done already" not in printed
    assert contents(out) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (RECORDS, "pipe"),
        (RECORDS, "link"),
        ("dcris-journal.3.jsonl", "pipe"),
        ("dcris-journal.lock", "pipe"),
        ("dcris-journal.lock", "link"),
        ("dcris-journal.lock", "link to nothing"),
        ("predictions.json", "pipe"),
        ("predictions.json", "link"),
        ("0.0-cup.mask.png", "pipe"),
        ("1.0-cup.scores.npy", "link to nothing"),
        ("1.annotated.png", "folder"),
    ],
)
def test_other_files_in_the_place_of_a_result(name: str, kind: str, model: Path, photos: Path, capsys: Any) -> None:
    """A pipe must not block the call, and files of others are not replaced, not even through a
    link."""
    (photos.parent / "theirs").write_text("theirs")
    place = photos / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(photos.parent / ("theirs" if kind == "link" else "nowhere"))
    before = place.lstat()
    code = dcris("predict", model, photos, "-e", "cup", "--out", photos)
    complaint = capsys.readouterr().err
    assert code == 2, complaint
    assert complaint.count("\n") == 1
    assert name in complaint
    assert (place.lstat().st_ino, place.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert (photos.parent / "theirs").read_text() == "theirs"
    assert not (photos.parent / "nowhere").exists()


def test_names_that_are_not_utf8(model: Path, photos: Path, tmp_path: Path) -> None:
    """Names of old disks and archives may be any bytes; every output has them in a readable
    form."""
    plain, bytes_ = photos / "caf%E9.png", os.fsdecode(b"caf\xe9.png")
    (photos / "0.png").rename(photos / bytes_)
    (photos / "1.png").rename(plain)
    (photos / "2.png").rename(photos / os.fsdecode(b"50%\xff\n.png"))
    command = (
        "predict",
        model,
        photos,
        "-e",
        "cup",
        "--format",
        "mask",
        "coco",
        "label-studio",
        "--out",
        tmp_path / "out",
    )
    for _ in range(2):
        assert dcris(*command) == 0
        found = [(entry["file_name"], entry.get("percent_encoded", False)) for entry in results(tmp_path / "out")]
        assert sorted(found) == [
            ("3.png", False),
            ("50%25%FF%0A.png", True),
            ("caf%E9.png", False),
            ("caf%E9.png", True),
        ]
        for path, content in contents(tmp_path / "out").items():
            path.encode()
            if path.endswith((".json", ".jsonl")):
                assert b"\\ud" not in content
        addresses = {task["data"]["image"] for task in json.loads((tmp_path / "out/label_studio.json").read_text())}
        names = ("3.png", "50%25%FF%0A.png", "caf%E9.png", "caf%25E9.png")
        assert addresses == {f"/data/local-files/?d={name}" for name in names}
        assert len(list((tmp_path / "out").glob("*.mask.png"))) == 4


def start(*words: object) -> subprocess.Popen[str]:
    """Start `dcris` with two threads: it predicts two images at a time."""
    return subprocess.Popen(
        [sys.executable, "-m", "dcris", *(str(word) for word in words)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        return len(recorded(out)) >= count

    wait_until(reached)


@pytest.mark.slow
def test_a_killed_call_is_repeated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a kill: nothing is predicted twice, nothing is missing, and results equal those of one
    call."""
    photos = make_photos(tmp_path / "photos", 24)
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = (
        "predict",
        model,
        photos,
        "-e",
        "cup",
        "-e",
        "ring",
        "--format",
        "mask",
        "coco",
        "--device",
        "cpu",
        "--out",
    )
    process = start(*command, out)
    wait_for_lines(process, out, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    names = recorded(out)
    assert 5 <= len(names) < 24
    before = {name: time for name, time in written(out).items() if name.split(".")[0] in names}
    assert len(before) == 2 * len(names)
    assert dcris(*command, out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(names)} of 24 are done already")
    assert len(printed.splitlines()) == 1 + 2 * (24 - len(names))
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert dcris(*command, whole) == 0
    assert results(out) == results(whole)
    assert len(results(out)) == 48


def test_ctrl_c_keeps_finished_images(model: Path, tmp_path: Path) -> None:
    """Exit code 130, one line, and predictions.json with everything that is finished."""
    photos = make_photos(tmp_path / "photos", 60)
    out = tmp_path / "out"
    process = start("predict", model, photos, "-e", "cup", "--out", out, "--format", "coco", "mask", "--device", "cpu")
    wait_for_lines(process, out, 3)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=120)
    assert (process.returncode, complaint) == (130, "dcris: interrupted\n")
    done = recorded(out)
    assert 3 <= len(done) < 60
    assert sorted(entry["file_name"] for entry in results(out)) == sorted(f"{name}.png" for name in done)
    assert not leftovers(out)


@pytest.mark.slow
def test_several_processes(model: Path, tmp_path: Path) -> None:
    """Ranks share the work, also after calls with another number of ranks, with the results of one
    rank."""
    photos = make_photos(tmp_path / "photos", 7)
    pytest.importorskip("av")
    make_video(photos / "clip.mp4", 6)
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = ("predict", model, photos, photos / "clip.mp4", "-e", "cup", "--device", "cpu", "--out")
    done = torchrun(1, *command, alone)
    assert done.returncode == 0, done.stderr
    done = torchrun(3, *command, together)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("score") == 13
    assert len(list(together.glob("dcris-journal*.jsonl"))) == 3
    assert results(together) == results(alone)
    assert {*written(together)} == {*written(alone)}
    before = written(together)
    done = torchrun(2, *command, together)
    assert done.returncode == 0, done.stderr
    assert "\n8 of 8 are done already" in f"\n{done.stdout}"
    assert written(together) == before
    assert results(together) == results(alone)
    # One bad file: the others are done, and the sentence is said once.
    (photos / "bad.png").write_text("no picture")
    done = torchrun(2, *command, together)
    assert done.returncode != 0
    assert done.stderr.count("dcris: 1 of 9 could not be read") == 1
    assert written(together) == before


def test_a_full_disk_stops_at_once(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is not a bad image: the next thousand images would fail, too."""
    import dcris.inference.batch as job

    written = job.write_file

    def full(path: Path, content: Any) -> None:
        if path.name.startswith("2."):
            raise DcrisError(f"cannot write {path}: No space left on device; free some space there")
        written(path, content)

    monkeypatch.setattr(job, "write_file", full)
    assert dcris("predict", model, photos, "-e", "cup", "--out", tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert [entry["file_name"] for entry in results(tmp_path / "out")] == ["0.png", "1.png"]


# ---- formats -------------------------------------------------------------------------------------


def middling(model: Path, image: Path, phrase: str) -> float:
    """A threshold at which half of the pixels belong to the mask."""
    (prediction,) = Segmenter.from_pretrained(model, device="cpu").predict(image, phrase, scores=True)
    return float(np.median(prediction.probabilities))


def test_cutouts(model: Path, photos: Path, tmp_path: Path) -> None:
    """The pixels of the object on a transparent background, cropped to its box."""
    out = tmp_path / "out"
    formats = ("--format", "mask", "cutout", "coco", "--threshold", middling(model, photos / "0.png", "cup"))
    assert dcris("predict", model, photos, "-e", "cup", "--out", out, *formats) == 0
    found = [entry for entry in results(out) if entry["bbox"] != [0, 0, 0, 0]]
    assert found
    assert len(list(out.glob("*.cutout.png"))) == len(found)
    for entry in found:
        stem = entry["file_name"].removesuffix(".png")
        left, top, width, height = entry["bbox"]
        cut = np.array(Image.open(out / f"{stem}.0-cup.cutout.png"))
        window = (slice(top, top + height), slice(left, left + width))
        np.testing.assert_array_equal(cut[..., 3], np.array(Image.open(out / f"{stem}.0-cup.mask.png"))[window])
        inside = cut[..., 3] > 0
        np.testing.assert_array_equal(cut[inside][:, :3], np.array(Image.open(photos / f"{stem}.png"))[window][inside])


def decode_brush(code: list[int]) -> np.ndarray:
    """Decode Label Studio's run lengths bit by bit, as its documentation and front end do."""
    bits = "".join(f"{byte:08b}" for byte in code)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    count, size = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(size)] * length if repeated else [read(size) for _ in range(length)]
    assert len(values) == count
    assert len(bits) - place < 8
    return np.array(values, np.uint8)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_brush_run_lengths(height: int, width: int, share: float, seed: int) -> None:
    """An independent decoder gives the same mask."""
    mask = np.random.default_rng(seed).random((height, width)) < share
    pixels = decode_brush(encode_brush(mask)).reshape(height, width, 4)
    np.testing.assert_array_equal(pixels, np.repeat(mask[..., None].astype(np.uint8) * 255, 4, axis=2))


@pytest.mark.parametrize("run", [1, 2, 3, 4, 5, 64, 65, 16384, 16385, 32768, 40000])
def test_long_brush_runs(run: int) -> None:
    """Runs whose length needs the next width, or several pieces."""
    mask = np.zeros((1, run + 7), bool)
    mask[0, 3 : 3 + run] = True
    np.testing.assert_array_equal(decode_brush(encode_brush(mask))[::4] > 0, mask[0])


def test_label_studio(model: Path, photos: Path, tmp_path: Path) -> None:
    """Label Studio can import the tasks: brush masks, labels equal to those of the interface, image
    URLs."""
    (photos / "0.png").rename(photos / "größe & 1.png")
    out = tmp_path / "out"
    phrases = ["the <red> cup", 'a "ring"']
    words = [word for phrase in phrases for word in ("-e", phrase)]
    formats = ("--format", "label-studio", "coco", "--threshold", middling(model, photos / "1.png", phrases[0]))
    assert dcris("predict", model, photos, *words, "--out", out, *formats) == 0
    tasks = json.loads((out / "label_studio.json").read_text())
    by_name = {entry["file_name"]: [] for entry in results(out)}
    for entry in results(out):
        by_name[entry["file_name"]].append(coco.decode(entry["segmentation"]))
    assert len(tasks) == 4
    assert tasks[-1]["data"]["image"] == "/data/local-files/?d=gr%C3%B6%C3%9Fe%20%26%201.png"
    strokes = 0
    for task, masks in zip(tasks, by_name.values(), strict=True):
        (prediction,) = task["predictions"]
        assert prediction["model_version"].startswith("dcris ")
        assert 0 <= prediction["score"] <= 1
        for stroke in prediction["result"]:
            value = stroke["value"]
            assert (stroke["type"], stroke["from_name"], stroke["to_name"]) == ("brushlabels", "tag", "image")
            assert (stroke["original_width"], stroke["original_height"], value["format"]) == (64, 48, "rle")
            mask = masks[phrases.index(value["brushlabels"][0])]
            np.testing.assert_array_equal(decode_brush(value["rle"]).reshape(48, 64, 4)[..., 3] > 0, mask > 0)
            strokes += 1
        assert len(prediction["result"]) == sum(bool(mask.any()) for mask in masks)
    assert strokes
    interface = ElementTree.parse(out / "label_studio.xml")
    assert [label.get("value") for label in interface.iter("Label")] == phrases
    assert dcris("predict", model, photos, *words, "--out", out, *formats, "--image-url", "s3://b/") == 0
    assert json.loads((out / "label_studio.json").read_text())[0]["data"]["image"] == "s3://b/1.png"


def test_labels_with_characters_that_xml_forbids() -> None:
    """Label Studio refuses an interface with a control character, and labels must be equal in tasks
    and interface."""
    phrases = ["red\x1bcup", "a\x00b\x7f", "\ufffe", "line\nbreak\ttab", 'a "b" <c> & \U0001f600']
    interface = ElementTree.fromstring(label_studio_config(phrases))
    labels = [label.get("value") for label in interface.iter("Label")]
    assert labels == ["red\\x1bcup", "a\\x00b\x7f", "\\ufffe", *phrases[3:]]
    task = label_studio_task("0.png", [(phrase, 0.5, np.ones((2, 2), bool)) for phrase in phrases], "model")
    assert [stroke["value"]["brushlabels"] for stroke in task["predictions"][0]["result"]] == [
        [label] for label in labels
    ]


# ---- videos --------------------------------------------------------------------------------------


def make_video(
    path: Path, frames: int, size: tuple[int, int] = (64, 48), codec: str = "mpeg4", turned: int = 0
) -> Path:
    """Write a video at 10 frames per second; frame n is grey (20 + 5 n) with a white upper left
    quarter."""
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if turned:
            stream.set_display_rotation(turned)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), (20 + 5 * number) % 200, np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    import av

    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        return frames, float(stream.duration * stream.time_base)


def test_a_video(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every n-th frame has its own masks, drawn on a video with the duration of the source."""
    pytest.importorskip("av")
    clip, out = make_video(tmp_path / "clip.mp4", 20, (66, 50)), tmp_path / "out"
    command = ("predict", model, clip, "-e", "cup", "-e", "ring", "--every", 4, "--out", out)
    assert dcris(*command) == 0
    printed = capsys.readouterr().out
    assert f"{clip}, frame 16: 'ring'" in printed
    assert "5 frames, H.264" in printed
    found = results(out)
    assert [(entry["frame"], entry["phrase_number"]) for entry in found] == [
        (n, k) for n in range(0, 20, 4) for k in (0, 1)
    ]
    assert [entry["time"] for entry in found[::2]] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6], abs=1e-3)
    assert len({entry["image_id"] for entry in found}) == 5
    assert {path.name for path in out.iterdir()} == {
        "clip.frames",
        "clip.overlay.mp4",
        "predictions.json",
        RECORDS,
        STATE,
    }
    assert len(list((out / "clip.frames").iterdir())) == 10
    frames, seconds = read_video(out / "clip.overlay.mp4")
    assert len(frames) == 5
    assert seconds == pytest.approx(2.0, abs=0.45)
    for entry in found:
        mask = np.array(Image.open(out / f"{entry['stem']}.mask.png"))
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), mask > 0)
    # The frames' own pixels were asked about and drawn on: far from every mask they are as they
    # were.
    for number, frame in enumerate(frames):
        untouched = ~np.logical_or.reduce([coco.decode(entry["segmentation"]) > 0 for entry in found[2 * number :][:2]])
        untouched[: 50 // 2 + 4, : 66 // 2 + 4] = False
        if untouched.sum() > 300:
            assert np.median(frame[untouched]) == pytest.approx(20 + 5 * 4 * number, abs=8)
    before = written(out) | {"video": (out / "clip.overlay.mp4").stat().st_mtime_ns}
    assert dcris(*command) == 0
    assert capsys.readouterr().out.startswith("1 of 1 are done already")
    assert written(out) | {"video": (out / "clip.overlay.mp4").stat().st_mtime_ns} == before


def test_label_studio_needs_an_address_for_each_image(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two folders have an image of the same name: in Label Studio, the masks of one would be drawn
    on the other, and corrected there. Also if the second folder comes in a later call."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "1.png", other / "0.png")
    rest = ("-e", "cup", "--format", "label-studio", "--out")
    assert dcris("predict", model, photos / "0.png", other, *rest, tmp_path / "both") == 0
    line = "2 images share the address of another one, such as /data/local-files/?d=0.png"
    assert line in capsys.readouterr().out
    assert dcris("predict", model, photos, *rest, tmp_path / "later") == 0
    assert "share the address" not in capsys.readouterr().out
    assert dcris("predict", model, other, *rest, tmp_path / "later") == 0
    assert line in capsys.readouterr().out
    assert dcris("predict", model, other, *rest, tmp_path / "later", "--image-url", "/data/local-files/?d=other/") == 0
    assert "share the address" not in capsys.readouterr().out


def test_label_studio_leaves_videos_out(model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """The note appears if there are videos, and only then. Of videos alone, nothing would be
    written: that is refused before they are predicted."""
    pytest.importorskip("av")
    clip = make_video(tmp_path / "clip.mp4", 2)
    rest = ("-e", "cup", "--format", "label-studio", "--out")
    assert dcris("predict", model, photos / "0.png", clip, *rest, tmp_path / "both") == 0
    assert "label-studio: of images only; use mask, annotated, overlay or coco" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "both/label_studio.json").read_text())) == 1
    assert dcris("predict", model, photos / "0.png", *rest, tmp_path / "photo") == 0
    assert "videos" not in capsys.readouterr().out
    assert dcris("predict", model, clip, "-e", "cup", "--format", "yolo", "labelme", "--out", tmp_path / "clip") == 2
    assert "yolo labelme: of images only, and there are only videos; add mask" in capsys.readouterr().err
    assert not (tmp_path / "clip").exists()
    assert dcris("predict", model, clip, "-e", "cup", "--format", "yolo", "coco", "--out", tmp_path / "clip") == 0


def test_a_video_is_predicted_as_its_frames(model: Path, tmp_path: Path) -> None:
    """The same network, threshold and colours as for images."""
    pytest.importorskip("av")
    from dcris.inference.video import read_frames

    clip, out = make_video(tmp_path / "clip.avi", 3), tmp_path / "out"
    assert (
        dcris("predict", model, clip, "-e", "cup", "--out", out, "--format", "scores", "coco", "--device", "cpu") == 0
    )
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    for frame, entry in zip(read_frames(clip), results(out), strict=True):
        (prediction,) = segmenter.predict(frame.pixels, "cup", scores=True)
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), prediction.mask)
        scores = np.load(out / "clip.frames" / f"{frame.index:06}.0-cup.scores.npy")
        np.testing.assert_allclose(scores, prediction.probabilities, atol=1e-3)
    assert not (out / "clip.overlay.mp4").exists()


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_rotated_video(angle: int, tmp_path: Path) -> None:
    """Rotated frames are upright, as in a player."""
    pytest.importorskip("av")
    from dcris.inference.video import read_frames

    clip = make_video(tmp_path / "clip.mp4", 2, turned=angle)
    frame = next(read_frames(clip))
    assert frame.pixels.shape[:2] == ((64, 48) if angle % 180 else (48, 64))
    height, width = frame.pixels.shape[:2]
    corners = {90: (height - 5, 5), 180: (height - 5, width - 5), 270: (5, width - 5)}
    assert frame.pixels[corners[angle]].mean() > 230
    assert frame.pixels[height - 5 if angle == 270 else 5, 5 if angle != 90 else width - 5].mean() < 100


@pytest.mark.parametrize(
    ("ending", "share"), slow_except(product(["mp4", "avi", "mkv"], [0.02, 0.6]), ("mp4", 0.02), ("avi", 0.6))
)
def test_a_video_that_is_cut_short(ending: str, share: float, model: Path, tmp_path: Path, capsys: Any) -> None:
    """Intact frames are predicted, and the truncation is reported."""
    pytest.importorskip("av")
    whole = make_video(tmp_path / f"whole.{ending}", 40)
    clip = tmp_path / f"clip.{ending}"
    clip.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    good = make_photos(tmp_path / "photos", 1)
    out = tmp_path / "out"
    code = dcris("predict", model, clip, good, "-e", "cup", "--out", out, "--every", 5)
    printed = capsys.readouterr()
    assert code == 2, printed.out
    assert "clip" in printed.err
    assert printed.err.count("\n") == 1
    assert results(out)[-1]["file_name"] == "0.png"
    frames = [entry for entry in results(out) if "frame" in entry]
    assert len(frames) < 8
    assert (out / "clip.overlay.mp4").exists() == bool(frames)
    assert dcris("predict", model, clip, good, "-e", "cup", "--out", out, "--every", 5) == 2
    # Fetched again, it is done from its start, since it is another file now.
    clip.write_bytes(whole.read_bytes())
    assert dcris("predict", model, clip, good, "-e", "cup", "--out", out, "--every", 5) == 0
    assert len(results(out)) == 9


def test_a_damaged_video(tmp_path: Path) -> None:
    """Damaged frames must not be concealed by the decoder, and closing it must not hang."""
    pytest.importorskip("av")
    from dcris.inference.video import read_frames

    clip = make_video(tmp_path / "clip.mp4", 60, (320, 240), codec="libx264")
    whole = clip.read_bytes()
    middle = len(whole) // 2
    for seed in range(5):
        damage = random.Random(seed).randbytes(400)
        clip.write_bytes(whole[:middle] + damage + whole[middle + 400 :])
        try:
            list(read_frames(clip))
        except DcrisError as error:  # gone after this, and the decoder with it
            assert re.search(r"damaged|cut short|cannot read", str(error))
        else:
            raise AssertionError(f"the damage of seed {seed} is not noticed")
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(DcrisError, match="cannot read the video"):
        list(read_frames(tmp_path / "text.mp4"))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(DcrisError, match="cannot read the video"):
        list(read_frames(tmp_path / "folder.mp4"))


def test_a_video_is_continued(model: Path, tmp_path: Path) -> None:
    """A second call continues a video; the overlay video has the frames of both calls."""
    pytest.importorskip("av")
    clip, out = make_video(tmp_path / "clip.mp4", 10), tmp_path / "out"
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    run = BatchPredictor(segmenter, find_tasks([clip], ["cup"]), out).run()
    first = [next(run) for _ in range(4)]
    run.close()  # as Ctrl-C does
    assert len(results(out)) == 5  # the fifth was being written
    second = list(BatchPredictor(segmenter, find_tasks([clip], ["cup"]), out).run())
    done = [event.frame for event in [*first, *second] if isinstance(event, Done)]
    assert done == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert len(read_video(out / "clip.overlay.mp4")[0]) == 10
    assert len(results(out)) == 10


def test_records_are_gone_through_once_for_all_videos(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were for each video: 500 finished videos of 100 frames took 30 s before the first."""
    names = [f"clip{number}" for number in range(20)]
    for name in names:
        (tmp_path / f"{name}.mp4").touch()
    passes = 0

    class Counted(dict[str, int | None]):
        def __iter__(self) -> Any:
            nonlocal passes
            passes += 1
            return super().__iter__()

        def items(self) -> Any:
            return [(name, self[name]) for name in self]

    real = records_module.ResultFolder.__init__

    def with_records(self: Any, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        frames = {f"{name}//{frame}": None for name in names for frame in range(3)}
        self.done = Counted(frames | {f"{name}//end": 3 for name in names[1:]} | {f"{names[2]}//end": 4})

    monkeypatch.setattr(records_module.ResultFolder, "__init__", with_records)
    monkeypatch.setattr(batch, "frame_count", lambda path: 5)
    tasks = find_tasks([tmp_path / "*.mp4"], ["cup"])
    job = BatchPredictor(Segmenter.from_pretrained(model, device="cpu"), tasks, tmp_path / "out")
    job.folder.close()
    assert [task.name for task in job.videos] == ["clip0", "clip2"]
    assert (job.already, job.remaining()) == (18, 4)
    assert passes <= 2


def test_without_pyav(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The error names the extra, and images are still predicted."""
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    good = make_photos(tmp_path / "photos", 1)
    assert dcris("predict", model, tmp_path / "clip.mp4", good, "-e", "cup", "--out", tmp_path / "out") == 2
    assert "pip install 'dcris[video]'" in capsys.readouterr().err
    assert len(results(tmp_path / "out")) == 1


# ---- on a GPU, images go in passes ---------------------------------------------------------------


def test_passes_of_several_images(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a pass with several images belong to the right images, also after an unreadable
    one."""
    (photos / "1.png").write_text("no picture")
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    tasks = [
        *find_tasks([photos], ["cup", "ring"]),
        Task(make_photos(tmp_path / "more", 1) / "0.png", "0.png", "other", ("left",)),
    ]
    alone, together = [], []
    for events, kind in ((alone, "cpu"), (together, "a GPU's")):
        monkeypatch.setattr(
            "dcris.inference.batch._images_per_pass", lambda device, kind=kind: 1 if kind == "cpu" else 16
        )
        job = BatchPredictor(segmenter, tasks, tmp_path / kind)
        with pytest.raises(DcrisError, match="1 of 5"):
            events.extend(job.run())
    assert [event.task.name for event in together if isinstance(event, Done)] == ["0", "2", "3", "other"]
    assert sum(isinstance(event, Failed) for event in together) == 1
    by_name = {event.task.name: event.predictions for event in alone if isinstance(event, Done)}
    for event in together:
        for ours, theirs in (
            zip(event.predictions, by_name[event.task.name], strict=True) if isinstance(event, Done) else ()
        ):
            assert ours.phrase == theirs.phrase
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)
            assert (ours.mask != theirs.mask).mean() < 0.01


@pytest.mark.parametrize(("threads", "pixels"), [(2, 48_000_000), (3, 48_000_000), (2, 100)])
def test_lanes_give_what_one_after_the_other_gives(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, pixels: int
) -> None:
    """A CPU predicts several images and frames at a time: results are in order and belong to the
    right image, also after an unreadable one, for an image with more phrases than a lane takes, and
    for images that are too large for lanes, of which no lane reads one."""
    pytest.importorskip("av")
    monkeypatch.setattr("dcris.inference.batch._MAX_LANE_PIXELS", pixels)
    monkeypatch.setattr("dcris.inference.batch.pairs_in_memory", lambda *_: 16)
    read, readers = batch.read_image, set()
    monkeypatch.setattr(
        "dcris.inference.batch.read_image", lambda path: (readers.add(threading.current_thread()), read(path))[1]
    )
    (photos / "1.png").write_text("no picture")
    segmenter = Segmenter.from_pretrained(model, device="cpu")
    many = tuple(f"cup {number}" for number in range(20))
    tasks = [
        *find_tasks([photos], ["cup", "ring"]),
        Task(make_photos(tmp_path / "more", 1) / "0.png", "0.png", "other", many),
        Task(make_photos(tmp_path / "last", 1) / "0.png", "0.png", "last", ("left",)),
        *find_tasks([make_video(tmp_path / "clip.mp4", 7)], ["cup"]),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {}
        for lanes in (1, 8):
            monkeypatch.setattr("dcris.utils.lanes._MAX_LANES", lanes)
            job, events = BatchPredictor(segmenter, tasks, tmp_path / str(lanes)), []
            with pytest.raises(DcrisError, match="1 of 7"):
                events.extend(job.run())
            found[lanes] = events
            if lanes == 8:
                assert threading.main_thread() in readers
                assert (len(readers) == 1) == (pixels == 100)
            readers.clear()
        assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads  # later threads compute with all of them
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[1], found[8], strict=True):
        assert type(one) is type(other)
        if not isinstance(one, Written):
            assert one.task == other.task
        if isinstance(one, Done):
            assert one.frame == other.frame
            assert [each.phrase for each in one.predictions] == [each.phrase for each in other.predictions]
            for ours, theirs in zip(other.predictions, one.predictions, strict=True):
                assert ours.score == pytest.approx(theirs.score, abs=1e-4)
                assert (ours.mask != theirs.mask).mean() < 0.01


def test_an_image_named_dot(model: Path, tmp_path: Path) -> None:
    """Its results are in the output folder; unfinished files of other calls in the parent folder
    are kept."""
    photos, above = tmp_path / "photos", tmp_path / ".other.png.partial-1.png"
    photos.mkdir()
    above.write_bytes(b"")
    Image.new("RGB", (30, 20)).save(photos / "..png", "PNG")
    for _ in range(2):
        assert dcris("predict", model, photos, "-e", "cup", "--out", tmp_path / "out", "--format", "mask") == 0
    assert (tmp_path / "out" / "..0-cup.mask.png").exists()
    assert above.exists()


# ---- data sets of annotation tools --------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "folder"),
    slow_except([("coco-dataset", "coco"), ("yolo", "yolo"), ("labelme", "labelme")], ("coco-dataset", "coco")),
)
def test_predict_correct_and_fine_tune(
    format: str, folder: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a tool gets comes back as training data with the same masks, and trains the model."""
    out, formats = tmp_path / "out", ("--format", format, "coco", "--min-area", 300)
    Image.new("RGB", (9, 9)).save(photos / "tiny.png")  # nothing is found on it, but it is there to be annotated
    threshold = middling(model, photos / "0.png", "cup")
    command = (
        "predict",
        model,
        photos,
        "-e",
        "cup",
        "-e",
        "left ring",
        "--out",
        out,
        *formats,
        "--threshold",
        threshold,
    )
    assert dcris(*command) == 0
    made = out / f"predictions-{folder}"
    objects = sum(entry["bbox"] != [0, 0, 0, 0] for entry in results(out))
    assert f"{made}: {objects} objects on 5 images" in capsys.readouterr().out
    assert len(list(made.rglob("*.png"))) == 5
    data = tmp_path / "corrected.jsonl"
    assert dcris("data", "import", made, "--out", data, "--val", 0, "--strict") == 0
    found = {}
    for item in load_references(data, None).references:
        found[item.image_path.name, item.expressions[0].text] = union_mask(item.segmentations, item.image_size)
    expected = {
        (entry["file_name"], entry["phrase"]): coco.decode(entry["segmentation"])
        for entry in results(out)
        if entry["bbox"] != [0, 0, 0, 0]
    }
    assert found.keys() == expected.keys()
    assert expected
    for key, mask in expected.items():
        np.testing.assert_array_equal(found[key], mask, err_msg=str(key))
    words = ("--train.max_steps", 1, "--train.batch_size", 2, "--data.workers", 0, "--device", "cpu")
    run = tmp_path / "run"
    assert dcris("train", model / "config.json", "--data", data, "--from", model, "--out", run, *words) == 0
    assert dcris("predict", run, photos / "0.png", "-e", "cup", "--out", tmp_path / "again") == 0


def test_a_data_set_grows_with_the_folder_and_is_never_taken_as_input(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its copies of the images lie in the folder that is searched."""
    command = ("predict", model, photos, "--recursive", "-e", "cup", "--format", "yolo", "--out", photos)
    images, labels = (photos / f"predictions-yolo/{kind}/train" for kind in ("images", "labels"))
    assert dcris(*command) == 0
    assert len(list(images.iterdir())) == len(list(labels.iterdir())) == 4
    capsys.readouterr()
    assert dcris(*command) == 0
    assert capsys.readouterr().out == f"4 of 4 are done already in {photos}\n"
    Image.new("RGB", (30, 20)).save(photos / "new.png")
    (photos / "3.png").unlink()
    assert dcris(*command) == 0
    assert "predictions-yolo: " in (printed := capsys.readouterr().out)
    assert f"left out: gone or changed: {photos / '3.png'}\n" in printed
    assert {path.name for path in images.iterdir()} == {"0.png", "1.png", "2.png", "new.png"}
    assert not leftovers(photos)


def test_a_replaced_image_is_not_exported_with_its_old_masks(model: Path, tmp_path: Path, capsys: Any) -> None:
    """Its masks are of another picture: whoever trains on them would train on wrong labels."""
    photos, out = make_photos(tmp_path / "photos", 2), tmp_path / "out"
    words = ("-e", "cup", "--format", "coco-dataset", "--out", out)
    assert dcris("predict", model, photos / "0.png", *words) == 0
    Image.new("RGB", (31, 17)).save(photos / "0.png")
    capsys.readouterr()
    assert dcris("predict", model, photos / "1.png", *words) == 0
    assert f"on 1 image; left out: gone or changed: {photos / '0.png'}\n" in capsys.readouterr().out
    (file,) = (out / "predictions-coco").rglob("*.json")
    assert [image["file_name"] for image in json.loads(file.read_text())["images"]] == ["1.png"]
    assert dcris("predict", model, photos, *words) == 0  # what is predicted again comes back
    (file,) = (out / "predictions-coco").rglob("*.json")
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in json.loads(file.read_text())["images"]}
    assert sizes == {"0.png": (31, 17), "1.png": (64, 48)}


def test_corrections_are_not_overwritten(model: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """Somebody has worked on the data set in its folder; the next call must not replace it."""
    out = tmp_path / "out"
    command = ["predict", model, photos / "0.png", "-e", "cup", "--format", "labelme", "mask", "--out", out]
    assert dcris(*command) == 0
    (file,) = (out / "predictions-labelme").rglob("*.json")
    file.write_text(file.read_text().replace("cup", "saucer"))
    command[2] = photos
    for more in ([], ["--overwrite"]):
        assert dcris(*command, *more) == 2
        assert "predictions-labelme was changed after it was written" in capsys.readouterr().err
    assert "saucer" in file.read_text()
    assert {path.name for path in out.glob("*.png")} == {"0.0-cup.mask.png"}
    (out / "predictions-labelme").rename(tmp_path / "corrected")
    assert dcris(*command) == 0
    assert len(list((out / "predictions-labelme").rglob("*.json"))) == 4


@pytest.mark.parametrize("format", slow_except(["coco-dataset", "yolo", "labelme"], "yolo"))
def test_a_data_set_with_a_name_that_is_not_utf8(format: str, model: Path, tmp_path: Path) -> None:
    """One such file must not end the call, nor the calls after it: the tools read UTF-8 only."""
    photos, out = make_photos(tmp_path / "photos", 2), tmp_path / "out"
    try:
        (photos / "1.png").rename(photos / os.fsdecode(b"n\xff.png"))
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    command = ("predict", model, photos, "-e", "cup", "--format", format, "--out", out)
    assert dcris(*command) == 0
    Image.open(photos / "0.png").resize((30, 20)).save(photos / "2.png")
    assert dcris(*command) == 0
    assert {path.name for path in out.rglob("*.png")} == {"0.png", "n%FF.png", "2.png"}
    (made,) = out.glob("predictions-*")
    data = tmp_path / "data.jsonl"
    assert dcris("data", "import", made, "--out", data, "--val", 0, "--strict") == 0
    assert len(data.read_text().splitlines()) == 3


def test_a_call_killed_after_the_export_does_not_count_as_a_correction(
    launcher: Launcher, model: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    """Else the folder is refused for ever, though nobody has touched it; but what is corrected
    after the kill is not lost."""
    out = tmp_path / "out"
    command = ["predict", model, photos / "0.png", "-e", "cup", "--format", "labelme", "--out", out]
    assert dcris(*command) == 0
    command[2] = photos

    code = """if True:
        import os
        from dcris.inference import data_sets
        export = data_sets.export_table
        data_sets.export_table = lambda *words, **options: (export(*words, **options), os._exit(9))
    """
    assert launcher.wait(launcher.start(command, tmp_path / "output.txt", first=code)) == 9
    shutil.copytree(out, tmp_path / "corrected", copy_function=shutil.copy2)
    assert dcris(*command) == 0
    assert len(list((out / "predictions-labelme").rglob("*.json"))) == 4
    assert dcris(*command) == 0
    (file,) = (tmp_path / "corrected/predictions-labelme").rglob("3.json")
    file.write_text(file.read_text().replace("cup", "saucer"))
    command[-1] = tmp_path / "corrected"
    assert dcris(*command) == 2
    assert "predictions-labelme was changed after it was written" in capsys.readouterr().err


# ---- what is printed, and what is not loaded ----------------------------------------------------


def test_nothing_is_loaded_if_all_is_done(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large model takes minutes to load; the answer to a repeated command needs none."""

    class Loaded(Exception):
        pass

    def load(*_: object) -> None:
        raise Loaded

    copied = Path(shutil.copytree(model, tmp_path / "model"))
    out = tmp_path / "out"
    command = ["predict", copied, photos, "-e", "cup", "--format", "mask", "coco", "yolo", "--out", out]
    assert dcris(*command) == 0
    expected = contents(out)
    capsys.readouterr()

    def loads(*words: object) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(Segmenter, "_load", load)
            try:
                assert dcris(*command, *words) == 0
            except Loaded:
                return True
        assert capsys.readouterr().out.endswith(f"are done already in {out}\n")
        return False

    assert not loads()
    command[2] = photos / "2.png"
    assert not loads()
    command[2] = photos
    assert contents(out) == expected
    for words in (
        ["-e", "ring"],
        ["--threshold", "0.5"],
        ["--overwrite"],
        ["--precision", "bfloat16"],
        ["--refine", "guided"],
    ):
        assert loads(*words), words
    for change in ("predictions.json", "0.0-cup.mask.png", "predictions-yolo", STATE):
        (out / change).rename(out / "away")
        assert loads(), change
        (out / "away").rename(out / change)
    # predictions.json is of other records, or the model is another one.
    state = json.loads((out / STATE).read_text())
    (out / STATE).write_text(json.dumps(state | {"records": "0" * 64}))
    assert loads()
    (out / STATE).write_text(json.dumps(state))
    assert not loads()
    os.utime(copied / "model.safetensors", (1, 1))
    assert loads()
    assert dcris(*command) == 0
    assert not loads()
    Image.new("RGB", (20, 10)).save(photos / "1.png")
    assert loads()


def test_json_lines(model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program reads one object for each result from standard output, and nothing else: also if
    an image cannot be read, and if results are there already."""
    (photos / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    command = ["predict", model, photos, "-e", "cup", "-e", "left ring", "--out", out, "--json"]
    assert dcris(*command) == 2
    first = capsys.readouterr()
    assert "broken.png: skipped" in first.err
    lines = [json.loads(line) for line in first.out.splitlines()]
    assert [(line["image"], line["phrase"]) for line in lines] == [
        (str(photos / f"{number}.png"), phrase) for number in range(4) for phrase in ("cup", "left ring")
    ]
    for line, entry in zip(lines, results(out), strict=True):
        fields = ("phrase", "phrase_number", "score", "bbox", "segmentation")
        assert {key: entry[key] for key in fields}.items() <= line.items()
        files = {name.rpartition(".0-cup" if line["phrase"] == "cup" else ".1-left-ring")[2] for name in line["files"]}
        assert files == {".mask.png", ".scores.npy", str(out / f"{entry['name']}.annotated.png")}
        assert all(Path(name).is_file() for name in line["files"])
    (photos / "broken.png").unlink()
    Image.new("RGB", (20, 10)).save(photos / "4.png")
    assert dcris(*command) == 0  # some are done
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][:8] == lines
    assert dcris(*command) == 0  # all are done
    again = capsys.readouterr()
    assert [json.loads(line) for line in again.out.splitlines()][:8] == lines
    assert len(again.out.splitlines()) == 10
    assert "5 of 5 are done already" in again.err


def test_phrases_from_a_file(model: Path, photos: Path, tmp_path: Path) -> None:
    """As editors on Windows save it. Lines are phrases, whatever they begin with."""
    (tmp_path / "phrases.txt").write_bytes("\ufeff# 7 on the jersey\r\n\r\n  größe  \r\n".encode())
    out = tmp_path / "out"
    words = ("-e", "cup", "--phrases", tmp_path / "phrases.txt", "--out", out)
    assert dcris("predict", model, photos / "0.png", *words) == 0
    assert [entry["phrase"] for entry in results(out)] == ["cup", "# 7 on the jersey", "größe"]
    assert dcris("predict", model, photos / "0.png", *words[2:4], "--out", tmp_path / "alone") == 0
    assert [entry["phrase"] for entry in results(tmp_path / "alone")] == ["# 7 on the jersey", "größe"]


def test_annotated_frames(model: Path, tmp_path: Path) -> None:
    """A video has one picture with legend for each predicted frame."""
    pytest.importorskip("av")
    clip, out = make_video(tmp_path / "clip.mp4", 4), tmp_path / "out"
    command = ("predict", model, clip, "-e", "cup", "--every", 2, "--format", "annotated", "--out", out)
    assert dcris(*command) == 0
    assert {path.name for path in (out / "clip.frames").iterdir()} == {"000000.annotated.png", "000002.annotated.png"}
    assert Image.open(out / "clip.frames/000002.annotated.png").height > 48
