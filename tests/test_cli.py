"""The command line from end to end: results are written, and errors are one message."""

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from conftest import TinyRefer
from dcris import Segmenter, load_dataset, train
from dcris.checkpoints.checkpoint import Checkpoint, list_checkpoints
from dcris.cli import common, main
from dcris.cli.train import configuration
from dcris.config import load_config
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES
from dcris.training.stopping import Interrupted
from dcris.training.trainer import Trainer
from dcris.utils import streams
from dcris.utils.device import shapes_only
from runs import assert_same_run, leftovers, small_recipe

COMMANDS = [
    "quickstart",
    "data fetch",
    "data check",
    "data scenes",
    "data import",
    "data export",
    "train",
    "evaluate",
    "compare",
]
COMMANDS += ["predict", "recipes", "completion", "ablate", "bench", "convert", "export", "serve", "web"]
JOURNAL, STATE = "dcris-journal.jsonl", "dcris-journal.state.json"
QUICK = shlex.split(
    "--train.max_steps 3 --train.batch_size 4 --train.warmup_steps 1 --data.workers 0 --data.image_size 56 --device cpu"
)
RESULT_KEYS = {"miou", "oiou", *(f"prec@0.{digit}" for digit in "56789"), "references", "expressions", "dataset"}
RESULT_KEYS |= {"split", "split_by", "data_sha256", "protocol", "threshold", "weights_sha256"}
RESULT_KEYS |= {"precision", "device", "threads", "version", "torch", "numpy"}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "COCO_train2014_000000000042.jpg"
    path.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((60, 45), Image.Resampling.BICUBIC).save(path)
    return path


def dcris(*words: object) -> int:
    """Run a command in this process."""
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail because of bad input, and return its message."""
    code = dcris(*words)
    error_text = capsys.readouterr().err
    assert code == 2, error_text
    assert error_text.startswith("dcris: ")
    assert error_text.count("\n") == 1
    assert error_text.endswith("\n")
    return error_text


# ---- everything in turn ------------------------------------------------------------------------


def test_from_scenes_to_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From nothing: scenes, check, train, evaluate, predict."""
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    assert dcris("data", "scenes", data, "--train", 5, "--val", 0, "--test", 2, "--seed", 1) == 0
    assert dcris("data", "check", data, "--dataset", "scenes", "--deep", "--json") == 0
    printed = capsys.readouterr().out
    assert set(json.loads(printed[printed.index("{") :])) >= {"dataset", "splits"}
    assert dcris("train", "dcris_tiny", "--data", data, "--out", run, *QUICK) == 0
    assert "adapter" in capsys.readouterr().out
    assert list_checkpoints(run)[-1].step == 3
    result, report = tmp_path / "results" / "test.json", tmp_path / "results" / "test.html"
    answers = tmp_path / "results" / "test.jsonl"
    files = ("--out", result, "--report", report, "--answers", answers)
    assert dcris("evaluate", run, "--data", data, "--split", "test", *files) == 0
    record = json.loads(result.read_text())
    analysis = record.pop("analysis")
    assert json.loads(capsys.readouterr().out) == record
    assert record.keys() >= RESULT_KEYS
    assert analysis["intervals"]["miou"][0] <= record["miou"] <= analysis["intervals"]["miou"][1]
    assert sum(group["expressions"] for group in analysis["by_length"]) == record["expressions"]
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert 100 * np.mean([line["iou"] for line in lines]) == pytest.approx(record["miou"], abs=1e-3)
    assert (record["dataset"], record["split"], record["protocol"]) == ("scenes", "test", "cris")
    assert record["expressions"] >= record["references"] >= 4
    assert "<html" in report.read_text()
    images = data / "images/mscoco/images/train2014"
    assert dcris("predict", run, images, "-e", "red circle", "-e", "the ring", "--out", out) == 0
    assert len(capsys.readouterr().out.splitlines()) == 14
    assert len(json.loads((out / "predictions.json").read_text())) == 14
    # A mask and scores of each, a picture of each image; predictions.json, records and state.
    assert len(list(out.iterdir())) == 2 * 14 + 7 + 3
    # A run can be repeated from its config.json.
    again = tmp_path / "again"
    assert dcris("train", run / "config.json", "--data", data, "--out", again) == 0
    assert (again / "config.json").read_text() == (run / "config.json").read_text()
    assert_same_run(run, again)
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_real_photographs(refer_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real images and masks: any size, grey, polygons and crowds."""
    assert dcris("data", "check", refer_root, "--dataset", "cocomini") == 0
    run = tmp_path / "run"
    assert dcris("train", "dcris_tiny", "--data", refer_root, "--dataset", "cocomini", "--out", run, *QUICK) == 0
    split = ("--split", "val", "--dataset", "refcoco")
    assert dcris("evaluate", run, "--data", refer_root, *split) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed[printed.rindex("\n{\n") :])
    assert record["dataset"] == "refcoco"
    assert 0 <= record["miou"] <= 100


@pytest.mark.parametrize("name", ["s p", "it's", "$HOME", "-x", "a;b"])
def test_suggested_commands_are_quoted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths in suggested commands are quoted for the shell."""
    monkeypatch.chdir(tmp_path)
    assert dcris("data", "scenes", f"./{name}", "--train", "2", "--val", "1", "--test", "1") == 0
    advised = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    assert dcris(*advised[1:]) == 0


def test_suggested_commands_are_quoted_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """cmd.exe and PowerShell take double quotes only; backslashes are as they are."""
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "name", "nt")
        quoted = [common.quote(text) for text in ("C:\\my data\\a.jsonl", "C:\\data", "held out")]
    assert quoted == ['"C:\\my data\\a.jsonl"', "C:\\data", '"held out"']


def test_one_of_each(scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nouns are in the singular after "1"."""
    folder = Path(shutil.copytree(scenes_root, tmp_path / "own"))
    coco, data, todo = folder / "scenes/instances.json", folder / "one.jsonl", tmp_path / "todo.csv"
    content = json.loads(coco.read_text())
    content["annotations"] = [{**content["annotations"][0], "caption": "it"}]
    export = tmp_path / "export.json"
    export.write_text(json.dumps(content))
    content["annotations"][0] = {**content["annotations"][0], "caption": "", "category_id": None}
    (tmp_path / "unnamed.json").write_text(json.dumps(content))
    images = ("--images", folder / "images/mscoco/images/train2014", "--val", "0")
    assert dcris("data", "import", tmp_path / "unnamed.json", *images, "--write-phrases", todo) == 0
    assert dcris("data", "import", export, *images, "--out", data) == 0
    assert dcris("data", "check", data) == 0
    assert dcris("data", "export", data, "--format", "coco", "--out", tmp_path / "coco") == 0
    settings = (*QUICK, "--train.max_steps", "1", "--train.batch_size", "1")
    assert dcris("train", "dcris_tiny", "--data", data, "--out", tmp_path / "run", *settings) == 0
    assert dcris("evaluate", tmp_path / "run", "--data", data, "--split", "train") == 0
    printed = capsys.readouterr()
    for text in ("1 object without", "1 reference on 1 image", "1 step in all"):
        assert text in printed.out
    assert not re.findall(r"(?<![\d.,])1 (?!loss)[a-z]+s\b", printed.out + printed.err)


def test_own_data(scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an annotation tool's export to a model tuned on it; the file is the whole data set."""
    folder = Path(shutil.copytree(scenes_root, tmp_path / "own"))
    data, coco = folder / "shapes.jsonl", folder / "scenes/instances.json"
    image_folder = folder / "images/mscoco/images/train2014"
    assert dcris("data", "import", coco, "--images", image_folder, "--out", data, "--val", "0.2") == 0
    assert f"next: dcris data check {data}" in capsys.readouterr().out
    assert dcris("data", "check", data, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dataset"], report["leaked_images"], set(report["splits"])) == ("shapes", 0, {"train", "val"})
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    assert dcris("train", small_recipe(), "--data", data, "--out", run, *QUICK) == 0
    assert json.loads((run / "config.json").read_text())["data"]["dataset"] == "shapes"
    # The recipe does not validate, but the data have a split for it.
    assert "validation (first sentences) after epoch" in capsys.readouterr().out
    assert list_checkpoints(run)[-1].score is not None
    assert json.loads((run / "data.json").read_text())["splits"] == report["splits"]
    assert dcris("evaluate", run, "--data", data, "--split", "val", "--out", tmp_path / "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["dataset"] == "shapes"
    # Without a validation split, starting from the previous run.
    text = data.read_text().replace('"split": "val"', '"split": "held out"')
    other = folder / "other.jsonl"
    other.write_text(text)
    config = run / "config.json"
    capsys.readouterr()
    assert dcris("train", config, "--data", other, "--from", run, "--out", tuned) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("other has no split 'val': training runs without validation")
    assert f"starting from the adapters and the head of {list_checkpoints(run)[-1].path}" in printed
    assert f"next: dcris evaluate {tuned} --data {other} --split 'held out'" in printed
    assert (
        dcris("train", small_recipe(), "--data", data, "--out", tmp_path / "not", *QUICK, "--data.val_split", "null")
        == 0
    )
    assert "validation" not in capsys.readouterr().out
    assert dcris("evaluate", tuned, "--data", other, "--split", "held out") == 0
    capsys.readouterr()
    assert dcris("evaluate", tuned, "--data", scenes_root, "--dataset", "scenes") == 0
    # The import has its own splits, so what the scenes validate on was trained on.
    assert "of 3 evaluated images were trained on, such as scene_" in capsys.readouterr().err
    assert dcris("train", config, "--data", other, "--from", run, "--out", tuned, "--resume") == 0
    for words in (("train", config, "--out", tmp_path / "b", "--data.val_split", "val"), ("evaluate", run)):
        assert "no split 'val'; choose from train, held out" in refused(capsys, *words, "--data", other)
    assert not (tmp_path / "b").exists()
    # A resumed run does not read the start again, so that may be moved, and need not be named.
    moved = Path(shutil.move(run, tmp_path / "moved"))
    for start in (("--from", run), ("--from", moved), ()):
        words = ("train", moved / "config.json", "--data", other, "--out", tuned, "--resume", *start)
        assert dcris(*words) == 0
    assert json.loads((tuned / "config.json").read_text())["train"]["start"] == str(run)
    # Killed before its first checkpoint, it starts anew, and from what is named now.
    shutil.rmtree(tuned / "checkpoints")
    capsys.readouterr()
    assert dcris("train", moved / "config.json", "--data", other, "--from", moved, "--out", tuned, "--resume") == 0
    assert f"starting from the adapters and the head of {moved}" in capsys.readouterr().out


def test_mixture(scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name can be used for any data set; what was left out is reported and recorded."""
    root = Path(shutil.copytree(scenes_root, tmp_path / "data"))
    content = pickle.loads((root / "scenes/refs(generated).p").read_bytes())
    tested = {record["image_id"] for record in content if record["split"] == "val"}
    for record in content:
        record["split"] = "train"
    shutil.copytree(root / "scenes", root / "again")
    (root / "again/refs(generated).p").write_bytes(pickle.dumps(content))
    leaks = sum(record["image_id"] in tested for record in content)
    run, name = tmp_path / "run", "mixed:scenes,again"
    assert dcris("train", small_recipe(), "--data", root, "--dataset", name, "--out", run, *QUICK) == 0
    assert "again generated: " in capsys.readouterr().out
    record = json.loads((run / "data.json").read_text())
    assert (record["dataset"], len(record["notes"])) == (name, 3)
    assert leaks > 0
    assert dcris("evaluate", run, "--data", root) == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == name


def test_files_of_predict(trained_run: Path, photo: Path, tmp_path: Path) -> None:
    """Masks, scores and COCO results agree, at the size of the image."""
    phrases = ["red circle", "the leftmost ring"]
    scores = Segmenter.from_pretrained(trained_run, device="cpu").predict(photo, phrases, scores=True)
    assert scores[0].probabilities is not None
    threshold = float(np.median(scores[0].probabilities))
    words = [word for phrase in phrases for word in ("-e", phrase)]
    assert dcris("predict", trained_run, photo, *words, "--out", tmp_path / "out", "--threshold", threshold) == 0
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["phrase"] for entry in results] == phrases
    areas = []
    for number, entry in enumerate(results):
        assert entry["stem"] == f"{photo.stem}.{number}-{phrases[number].replace(' ', '-')}"
        stem = tmp_path / "out" / entry["stem"]
        mask = np.array(Image.open(f"{stem}.mask.png"))
        assert mask.shape == (45, 60)
        assert set(np.unique(mask)) <= {0, 255}
        areas.append(int((mask > 0).sum()))
        np.testing.assert_array_equal(coco.decode(entry["segmentation"]), mask > 0)
        probabilities = np.load(f"{stem}.scores.npy")
        assert probabilities.dtype == np.float16
        expected = scores[number].probabilities
        assert expected is not None
        np.testing.assert_allclose(probabilities, expected, atol=1e-3)
        np.testing.assert_array_equal(expected > threshold, mask > 0)
        assert (entry["image_id"], entry["file_name"]) == (42, photo.name)
        assert 0 <= entry["score"] <= 1
        if areas[-1]:
            assert entry["bbox"] == list(coco.toBbox(entry["segmentation"]))
        else:
            assert entry["bbox"] == [0, 0, 0, 0]
    assert 0 < areas[0] < 45 * 60
    # Small images are enlarged, with a legend below.
    annotated = Image.open(tmp_path / "out" / f"{photo.stem}.annotated.png")
    assert annotated.size[0] == 60 * 8 and annotated.size[1] > 45 * 8
    assert len(list((tmp_path / "out").iterdir())) == 8
    assert not leftovers(tmp_path)


def test_predict_formats(trained_run: Path, photo: Path, tmp_path: Path) -> None:
    """Overlays of many images would fill a disk."""
    assert dcris("predict", trained_run, photo, "-e", "ring", "--out", tmp_path / "a", "--format", "mask", "coco") == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        f"{photo.stem}.0-ring.mask.png",
        "predictions.json",
        JOURNAL,
        STATE,
    }


def test_images_with_the_same_name(trained_run: Path, photo: Path, tmp_path: Path) -> None:
    """a.jpg and a.png, or images of two folders, must not overwrite each other's masks."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for number, (folder, name) in enumerate([(0, "a.png"), (0, "a~2.png"), (1, "a.png"), (1, "a.bmp")]):
        folders[folder].mkdir(exist_ok=True)
        Image.new("RGB", (10 + number, 10)).save(folders[folder] / name)
    out = tmp_path / "out"
    assert dcris("predict", trained_run, *folders, "-e", "ring", "--out", out, "--format", "mask") == 0
    assert sorted(Image.open(path).size[0] for path in out.glob("*.png")) == [10, 11, 12, 13]


def odd_images(folder: Path) -> dict[str, tuple[int, int]]:
    """Images from scanners, phones and the web, with the height and width that a viewer shows."""
    folder.mkdir()
    image = Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(folder / "deep.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("L").save(folder / "grey.webp")
    image.convert("1").save(folder / "black and white.tiff")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    image.save(folder / "größe 猫.JPG")
    return {path.stem: (30, 40) for path in folder.iterdir()} | {"turned": (40, 30), "one": (1, 1)}


def test_odd_images(trained_run: Path, tmp_path: Path) -> None:
    """At the size that a viewer shows."""
    sizes = odd_images(tmp_path / "in")
    out = tmp_path / "out"
    assert dcris("predict", trained_run, tmp_path / "in", "-e", "the cup", "--out", out) == 0
    assert len(sizes) == 9
    for stem, size in sizes.items():
        assert np.array(Image.open(out / f"{stem}.0-the-cup.mask.png")).shape == size
        assert np.load(out / f"{stem}.0-the-cup.scores.npy").shape == size


@pytest.mark.slow
def test_very_large_image(trained_run: Path, tmp_path: Path) -> None:
    """A panorama or a scan of 108 million pixels."""
    Image.new("RGB", (12_000, 9_000), "green").save(tmp_path / "large.jpg")
    assert dcris("predict", trained_run, tmp_path / "large.jpg", "-e", "left", "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "large.0-left.mask.png") as mask:
        assert mask.size == (12_000, 9_000)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "COMMAND"),
        ("data", "COMMAND"),
        ("fly", "fly"),
        ("predict RUN PHOTO --out OUT", "-e"),
        ("predict RUN -e ring --out OUT", "IMAGE_OR_FOLDER"),
        ("predict PHOTO -e ring --out OUT", "42.jpg, is the model; add IMAGE_OR_FOLDER"),
        ("predict RUN PHOTO -e ring --out OUT --colour red", "--colour"),
        ("predict RUN PHOTO -e ring --out OUT --format jpeg", "jpeg"),
        ("predict RUN PHOTO -e ring --out OUT --threshold 2", "threshold"),
        ("predict RUN PHOTO -e ring --out OUT --threshold much", "much"),
        ("predict RUN PHOTO -e ring --out OUT --every 0", "'0' is not a whole number of 1 or more"),
        (f"predict RUN PHOTO -e ring --out OUT --every {10**20}", "10000000000000000000... is too large"),
        (f"predict RUN PHOTO -e ring --out OUT --min-area {'9' * 5000}", "99999999999999999999... is too large"),
        # Before the model is loaded, which can take minutes.
        ("predict CUT PHOTO -e ring --out OUT --threshold 2", "between 0 and 1"),
        ("predict CUT PHOTO -e ring --out OUT --device tpu", "tpu"),
        ("predict CUT ABSENT -e ring --out OUT", "no file or folder"),
        ("evaluate CUT --data DATA --split test --device tpu", "tpu"),
        ("train dcris_tiny --data ABSENT --out OUT --device tpu", "tpu"),
        ("predict RUN PHOTO -e '' --out OUT", "empty"),
        # Shell variables that are not set; Path takes them for the current folder.
        ("predict RUN '' -e ring --out OUT", "IMAGE_OR_FOLDER: the path is empty"),
        ("predict RUN PHOTO -e ring --out ''", "--out: the path is empty"),
        ("predict '' PHOTO -e ring --out OUT", "a model must be a path, and is empty"),
        ("train dcris_tiny --data '' --out OUT", "--data: the path is empty"),
        ("predict RUN PHOTO -e ring -e '  ' --out OUT", "empty"),
        ("predict RUN ABSENT -e ring --out OUT", "absent"),
        ("predict RUN EMPTY -e ring --out OUT", "no images"),
        ("predict RUN NOIMAGE -e ring --out OUT", "notes.jpg"),
        ("predict ABSENT PHOTO -e ring --out OUT", "no checkpoint"),
        ("predict photo PHOTO -e ring --out OUT", "did you mean photos?"),
        ("predict EMPTY PHOTO -e ring --out OUT", "has no checkpoint"),
        ("predict CUT PHOTO -e ring --out OUT", "cut short"),
        ("predict RUN PHOTO -e ring --out OUT --device cuda:99", "cuda:99"),
        ("predict RUN PHOTO -e ring --out OUT --device tpu", "tpu"),
        ("predict RUN PHOTO -e ring --out NOIMAGE", "cannot write"),
        ("predict RUN PHOTO -e ring --out NOIMAGE/deeper", "cannot write"),
        ("evaluate RUN --data DATA --split dev", "'dev'"),
        ("evaluate RUN --data DATA --split test --protocol lvat", "lvat"),
        ("evaluate RUN --data DATA --dataset refcoco9 --split test", "refcoco9"),
        (
            "evaluate RUN --data DATA --dataset refcoco9 --split test",
            "choose one of its data sets with --dataset: scenes",
        ),
        ("evaluate RUN --data ABSENT --split test", "there is no file or folder"),
        ("evaluate RUN --data DATA --split test --out NOIMAGE/a.json", "cannot write"),
        ("evaluate RUN --data DATA --split test --answers NOIMAGE/a.jsonl", "cannot write"),
        ("evaluate CUT --data DATA --split test", "cut short"),
        ("train dcris_xl --data DATA --out OUT", "dcris_xl"),
        ("train dcris_tinny --data DATA --out OUT", "did you mean dcris_tiny?"),
        ("train dcris_tiny --data DATA --out OUT --train.lrr 1", "did you mean train.lr?"),
        ("train dcris_tiny --data DATA --out OUT --train.lr fast", "train.lr"),
        ("train dcris_tiny --data DATA --out OUT --train.lr -1", "train.lr"),
        ("train dcris_tiny --data DATA --out OUT --train.lr NaN", "train.lr"),
        ("train dcris_tiny --data DATA --out OUT --train.lr", "no value"),
        ("train dcris_tiny --data DATA --out OUT --data.train_split --train.max_steps 5", "train_split has no value"),
        ("train dcris_tiny --data DATA --out OUT --model.method.visual.layers [1,99]", "layers"),
        ("train dcris_tiny --data DATA --out OUT --batchsize 1", "did you mean --batch-size?"),
        ("train dcris_tiny --data DATA --out OUT --lr 1", "settings of a recipe are given as --SECTION.FIELD VALUE"),
        ("predit RUN PHOTO -e ring", "invalid choice: 'predit' (did you mean predict?)"),
        ("data chekc DATA", "did you mean check?"),
        ("completion fish", "(choose from bash, zsh, tcsh)"),
        ("predict RUN PHOTO -e ring --tresh=0.3", "there is no option --tresh (did you mean --threshold?)"),
        ("train dcris_tiny --data DATA --out OUT --data.train_split dev", "'dev'"),
        ("train dcris_tiny --data DATA --dataset nowhere --out OUT", "nowhere"),
        ("train dcris_tiny --data ABSENT --out OUT", "absent"),
        ("train dcris_tiny --data DATA --out NOIMAGE", "cannot write"),
        ("train dcris_tiny --data DATA --out RUN", "already holds a run"),
        ("train dcris_tiny --data DATA --out OUT --device cuda:99", "cuda:99"),
        ("train ABSENT.json --data DATA --out OUT", "absent.json"),
        ("train dcris_tiny --data DATA --dataset scenes --out OUT --model.vision.name dinov5", "dinov2-base"),
        ("data check ABSENT --dataset scenes", "there is no file or folder"),
        ("data check DATA --dataset scenes --split-by unc", "unc"),
        ("data check DATA", "choose one of its data sets with --dataset: scenes"),
        ("data check EMPTY", "choose one with --dataset"),
        ("data check NOIMAGE.jsonl", "there is no file"),
        ("data check DATA/x.jsonl --dataset y", "leave out --dataset"),
        ("train dcris_tiny --data DATA/x.jsonl --split-by unc --out OUT", "leave out --dataset and --split-by"),
        ("evaluate RUN --data DATA/x.jsonl --dataset y", "leave out --dataset"),
        ("train dcris_tiny --data DATA --from ABSENT --out OUT", "no checkpoint"),
        (
            "train dcris_tiny --data DATA --from RUN --model.head.width 64 --out OUT --device cpu",
            "checkpoint of the same model",
        ),
        ("train dcris_tiny --data DATA --dataset mixed --out OUT", "refcoco"),
        (
            "train dcris_tiny --data DATA --dataset mixed:scenes,scenes --out OUT",
            "is not a list of different data sets",
        ),
        ("data check DATA --dataset mixed:scenes --split-by unc", "mixed:refcoco(unc)"),
        ("data import DATA/scenes/instances.json --images DATA --out OUT.json", "out.jsonl"),
        ("data import DATA/scenes/instances.json --images EMPTY --out EMPTY/x.jsonl", "no image file"),
        ("data import ABSENT --images DATA --out DATA/x.jsonl", "is missing"),
        ("data import NOIMAGE --images DATA --out DATA/x.jsonl", "not valid JSON"),
        (
            "data import DATA/scenes/instances.json --images DATA --out DATA/x.jsonl --val 1",
            "at least 0 and below 1",
        ),
        (
            "data import DATA/scenes/instances.json --images DATA --out DATA/x.jsonl --val much",
            "at least 0 and below 1",
        ),
        ("data scenes OUT --train -1", "-1"),
        ("data scenes OUT --train 0 --val 0 --test 0", "zero"),
        ("data scenes DATA --train 1", "scenes"),
        ("data scenes NOIMAGE --train 1", "notes.jpg"),
        ("recipes --show dcris_xl", "dcris_xl"),
        ("quickstart --seed x", "x"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    words: str,
    sentence: str,
    trained_run: Path,
    scenes_root: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line that names the problem, no traceback, and no partial result."""
    (tmp_path / "notes.jpg").write_text("these are notes")
    (tmp_path / "empty").mkdir()
    places = {"RUN": trained_run, "DATA": scenes_root, "PHOTO": photo, "OUT": tmp_path / "out"}
    places |= {"ABSENT": tmp_path / "absent", "EMPTY": tmp_path / "empty", "NOIMAGE": tmp_path / "notes.jpg"}
    if "CUT" in words:
        places["CUT"] = Path(shutil.copytree(trained_run, tmp_path / "cut"))
        for path in (tmp_path / "cut").rglob("model.safetensors"):
            path.write_bytes(path.read_bytes()[:5000])
    for name, place in places.items():
        words = words.replace(name, str(place))
    before = {path for root in (tmp_path, trained_run, scenes_root) for path in root.rglob("*")}
    assert sentence in refused(capsys, *shlex.split(words))
    after = {path for root in (tmp_path, trained_run, scenes_root) for path in root.rglob("*")}
    # The folder for the results may exist, but must be empty.
    assert after - before <= {tmp_path / "out"}
    assert (tmp_path / "notes.jpg").read_text() == "these are notes"


@pytest.mark.parametrize(
    ("words", "option", "reason"),
    [
        ("predict tiny PHOTO -e ring --out OUT", "--every 2", "give videos by name"),
        ("predict tiny PHOTO -e ring --out OUT", "--image-url https://a/", "for --format label-studio"),
        ("predict tiny --pairs ABSENT --out OUT", "--recursive", "for folders"),
        ("evaluate tiny --data ABSENT", "--by-category", "adds to --out and --report"),
        ("score ABSENT --data ABSENT", "--by-category", "adds to --out and --report"),
        ("compare ABSENT.jsonl ABSENT.jsonl --data ABSENT", "--count 3", "what --out and --images show"),
        ("compare ABSENT.jsonl ABSENT.jsonl --data ABSENT", "--sent-ids 3", "what --out and --images show"),
        ("compare a.jsonl b.jsonl --data ABSENT", "--precision float32", "for models"),
        ("bench --folder ABSENT", "--batch-size 3", "for training steps"),
        ("bench --folder ABSENT", "--checkpoint-activations", "for training steps"),
        ("bench --only memory", "--quick", "leaves out the memory"),
        ("ablate --recipes dcris_tiny --out OUT", "--recipe tiny", "for TABLE"),
        ("ablate table2 --recipe tiny --out OUT", "--split-by unc", "for the data sets in --data"),
        ("data export DATA --dataset scenes --format coco --out OUT", "--image-url https://a/", "for label-studio"),
        ("data import ABSENT --out OUT.jsonl --split val", "--val 0.5", "puts all images into one split"),
        ("data import ABSENT --out OUT.jsonl --split val", "--seed 0", "puts all images into one split"),
        ("train dcris_tiny --data DATA --dataset mevis --out OUT", "--split-by unc", "is for images, not for mevis"),
        ("train dcris_tiny --data DATA --dataset mevis --out OUT", "--data.mask_threshold 3", "data set of images"),
        ("train dcris_tiny --data DATA/x.jsonl --out OUT", "--data.dataset y", "is a single data set"),
        ("train dcris_tiny --data DATA/x.jsonl --out OUT", "--data.split_by unc", "is a single data set"),
        ("train dcris_tiny --data DATA --out OUT", "--data.frame_step 3", "for a data set of videos"),
        ("train dcris_tiny --data DATA --out OUT", "--train.gamma 0.5", "for the schedule step"),
        ("train dcris_tiny --data DATA --out OUT", "--train.milestones [1]", "for the schedule step"),
        ("train dcris_tiny --data DATA --out OUT", "--train.presence 2", "for a presence head"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: str,
    option: str,
    reason: str,
    scenes_root: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who gives it expects one. It is refused before any file is read that could take long."""
    places = {"DATA": scenes_root, "PHOTO": photo, "OUT": tmp_path / "out", "ABSENT": tmp_path / "absent"}
    for name, place in places.items():
        words = words.replace(name, str(place))
    sentence = refused(capsys, *shlex.split(words), *option.split())
    assert reason in sentence
    assert option.split()[0].removeprefix("--").replace("data.", "").replace("_", "-") in sentence.replace("_", "-")
    assert "leave" in sentence
    assert not (tmp_path / "out").exists()


def test_settings_without_effect_are_refused_in_python(scenes_root: Path, tmp_path: Path) -> None:
    """As on the command line, where they are for another part of the network or of the data."""
    data = load_dataset(scenes_root, "scenes")
    with pytest.raises(DcrisError, match=r"train\.presence is for a presence head, which this run does not have"):
        train("dcris_tiny", data, tmp_path / "out", {"train.presence": 2.0})


def test_only_dcris_predict_advises_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other commands that take a folder of images have no --recursive."""
    (tmp_path / "empty").mkdir()
    for words in (
        "predict tiny EMPTY -e ring",
        "bench --recipe dcris_tiny --folder EMPTY",
        "web tiny --examples EMPTY",
    ):
        sentence = refused(capsys, *words.replace("EMPTY", str(tmp_path / "empty")).split())
        assert ("--recursive" in sentence) == words.startswith("predict"), sentence


@pytest.mark.parametrize(
    ("words", "sentence"), [("--data ABSENT", "no file or folder"), ("--data DATA --split dev", "'dev'")]
)
def test_evaluate_reads_the_data_before_the_model(
    words: str,
    sentence: str,
    trained_run: Path,
    scenes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A large model takes minutes to load, and a mistyped folder only a moment to be found."""

    def load(path: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dcris.evaluation.evaluate.load_checkpoint", load)
    given = words.replace("DATA", str(scenes_root)).replace("ABSENT", str(tmp_path / "absent"))
    assert sentence in refused(capsys, "evaluate", str(trained_run), *shlex.split(given))


class Hostile:
    """An object whose pickle runs a command when it is opened."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch HACKED",)


@pytest.mark.parametrize(
    "damage", ["cut refs", "hostile pickle", "no mask", "no pictures", "broken json", "two splits"]
)
def test_bad_data(
    tiny_refer: TinyRefer,
    damage: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From `data check` and from `train`."""
    monkeypatch.chdir(tmp_path)
    if damage == "no mask":
        del tiny_refer.instances["annotations"][2]["segmentation"]
    root = tiny_refer.write()
    if damage == "cut refs":
        tiny_refer.pickle_path.write_bytes(tiny_refer.pickle_path.read_bytes()[:300])
    if damage == "hostile pickle":
        tiny_refer.pickle_path.write_bytes(pickle.dumps([Hostile()]))
    if damage == "no pictures":
        for path in tiny_refer.image_folder.iterdir():
            path.unlink()
    if damage == "broken json":
        tiny_refer.json_path.write_text(tiny_refer.json_path.read_text()[:100])
    if damage == "two splits":
        shutil.copy(tiny_refer.pickle_path, tiny_refer.pickle_path.with_name("refs(other).p"))
    words = {
        "cut refs": "cut short",
        "hostile pickle": "do not trust it",
        "no mask": "annotation 73",
        "no pictures": "",
        "broken json": "instances.json",
        "two splits": "--split-by",
    }
    assert words[damage] in refused(capsys, "data", "check", root, "--dataset", "tiny")
    train = ("train", "dcris_tiny", "--data", root, "--dataset", "tiny", "--out", tmp_path / "run")
    assert words[damage] in refused(capsys, *train, *QUICK)
    assert not (tmp_path / "HACKED").exists()
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 16.0 EiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: 12"),
    ],
)
def test_out_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Out of memory gives one message that helps, not a traceback."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dcris.data.check.check_dataset", fail)
    assert "not enough memory" in refused(capsys, "data", "check", ".", "--dataset", "any")
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):  # a bug keeps its traceback
        dcris("data", "check", ".", "--dataset", "any")


def test_a_result_is_one_line(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file name with a line end looked like the result of another image."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png\nb.png: 'cup' box (1, 2, 3, 4), score 0.99\nc.png")
    (tmp_path / "d\ne.png").write_text("no image")
    words = ["predict", trained_run, tmp_path, "-e", "ring", "--out", tmp_path / "out", "--device", "cpu"]
    assert main([str(word) for word in words]) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert r"a.png\nb.png" in first
    assert r"d\ne.png: skipped" in second


def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File names may contain control characters, or characters that no terminal can show."""
    name = "a\x1b[2J\n\udcff" + "x" * 5000
    error_text = refused(capsys, "data", "check", tmp_path, "--dataset", name)
    assert r"a\x1b[2J\n\udcff" in error_text
    assert len(error_text) < 1100


# ---- the program itself ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command's help ends with an example."""
    with pytest.raises(SystemExit) as exit_interrupted:
        dcris(*command.split(), "--help")
    assert exit_interrupted.value.code == 0
    printed = capsys.readouterr().out
    assert "tower" not in printed  # the documentation calls them encoders
    assert f"\nexample: dcris {command}".rstrip() in printed
    assert "-\n" not in printed  # names such as ref-zom stay whole


def test_help_examples_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    """Examples are valid, settings after `dcris train` included; a misspelt setting is detected."""
    from dcris.cli import _parser

    for command in COMMANDS:
        with pytest.raises(SystemExit):
            dcris(*command.split(), "--help")
        example = " ".join(capsys.readouterr().out.split()).partition("example: dcris ")[2]
        args, rest = _parser().parse_known_args(shlex.split(example))
        assert not rest or args.name == "train", example
        if args.name == "train":
            args.settings = rest
            configuration(args)
            args.settings = [word.replace("train.lr", "train.lrr") for word in rest]
            with pytest.raises(DcrisError, match=r"train\.lrr"):
                configuration(args)


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ("predict tiny -e ring a.jpg b.jpg", "a.jpg b.jpg"),
        ("predict tiny a.jpg -e ring b.jpg --out o c.jpg", "a.jpg b.jpg c.jpg"),
        ("predict tiny -e ring --format mask coco -- -a.jpg", "-a.jpg"),
        ("predict -e ring tiny a.jpg", "a.jpg"),
        ("predict tiny a.jpg -e ring", "a.jpg"),
        ("predict tiny -e ring", ""),
    ],
)
def test_images_may_follow_options(words: str, images: str) -> None:
    """`dcris predict photos -e "left dog" photo.jpg` said that it does not take 'photo.jpg'."""
    from dcris.cli import _parser

    args, rest = _parser().parse_known_args(words.split())
    assert (args.checkpoint, args.images, rest) == ("tiny", [Path(name) for name in images.split()], [])


def test_settings_take_precedence_over_a_schedule(scenes_root: Path, tmp_path: Path) -> None:
    """A trial of a published schedule with fewer epochs must not train for all of them."""
    words = ("--schedule", "detris", "--train.epochs", 2, "--train.max_steps", 1, "--data.workers", 0)
    assert dcris("train", "fixed_tiny", "--data", scenes_root, "--out", tmp_path, *words, "--device", "cpu") == 0
    settings = load_config(tmp_path / "config.json").train
    assert (settings.epochs, settings.milestones) == (2, (35, 55))
    assert settings.schedule == "step", "the recipe's is cosine, which ignores milestones"


@pytest.mark.parametrize(
    ("option", "value", "key", "other"),
    [
        ("--batch-size", 4, "train.batch_size", 8),
        ("--dataset", "scenes", "data.dataset", "refcoco"),
        ("--split-by", "unc", "data.split_by", "null"),
        ("--precision", "float32", "train.precision", "bfloat16"),
        ("--from", "tiny", "train.start", "photos"),
        ("--tracker", "wandb", "train.trackers", "[]"),
        ("--on-bad-image", "skip", "data.on_bad_image", "stop"),
        ("--mask-threshold", 0.5, "data.mask_threshold", 127),
    ],
)
def test_an_option_and_a_setting_that_differ_are_refused(
    option: str, value: object, key: str, other: object, scenes_root: Path, tmp_path: Path, capsys
) -> None:
    """One of both values would be ignored, and the user would compare runs that are equal."""
    words = ("train", "fixed_tiny", "--data", scenes_root, "--out", tmp_path / "run", *QUICK[:2], "--device", "cpu")
    assert f"{option} and --{key} give different values" in refused(capsys, *words, option, value, f"--{key}", other)


@pytest.mark.parametrize(
    "names",
    [
        ("dcris_b", "dcris_tiny", "dcris_tiny_generalised", "fixed_tiny"),
        pytest.param(tuple(RECIPES), marks=pytest.mark.slow, id="all"),
    ],
)
def test_recipes(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """With exact numbers; `python tools/list_recipes.py` writes the list."""
    assert dcris("recipes", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["summary"] for name, row in rows.items()} == {
        name: each.summary for name, each in RECIPES.items()
    }
    for name in names:
        with shapes_only():
            counts = ReferringSegmenter(RECIPES[name].config.model).count_weights()
        assert {key: rows[name][key] for key in ("adapters", "head", "frozen")} == counts, name
    assert rows["dcris_tiny"]["adapters"] > 0 == rows["fixed_tiny"]["adapters"]
    assert dcris("recipes") == 0
    printed = capsys.readouterr().out
    assert f"{rows['dcris_b']['adapters']:,}" in printed
    assert len({len(line) for line in printed.splitlines() if line.startswith(("recipe ", *rows))}) == 1  # aligned
    assert dcris("recipes", "--show", "dcris_tiny") == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "dcris_tiny"


def in_a_process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("word", ["--help", "recipes"])
def test_help_is_quick(word: str) -> None:
    """It imports neither torch nor numpy, which takes seconds on a cold disk."""
    code = f"import sys; from dcris.cli import main\ntry: main([{word!r}])\nexcept SystemExit: pass\n"
    done = in_a_process("-c", code + "print({'torch', 'numpy', 'cv2', 'PIL', 'pydantic'} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


def test_commands_on_data_are_quick(tmp_path: Path) -> None:
    """They do not import torch, which takes longer than most of them."""
    own, scenes = f"{tmp_path}/own.jsonl", f"{tmp_path}/scenes"
    commands = [
        f"data scenes {scenes} --train 2 --val 1 --test 1",
        f"data check {scenes} --dataset scenes",
        f"data import {scenes}/scenes/instances.json --images {scenes} --out {own}",
        f"data export {own} --format coco --out {tmp_path}/coco",
    ]
    code = "import sys; from dcris.cli import main; assert not any(main(command.split()) for command in sys.argv[1:])\n"
    done = in_a_process("-c", code + "print({'torch'} & set(sys.modules))", *commands)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


def test_a_missing_image_is_quick() -> None:
    """A mistake in the name of a file does not wait for torch."""
    code = "import sys; from dcris.cli import main; main(['predict', 'photos', 'nowhere.jpg', '-e', 'cup'])\n"
    done = in_a_process("-c", code + "print({'torch'} & set(sys.modules))")
    assert "nowhere.jpg" in done.stderr
    assert done.stdout.endswith("set()\n")


def test_exit_codes_reach_the_shell(trained_run: Path, photo: Path, tmp_path: Path) -> None:
    """Through `python -m dcris`: 0 with nothing on standard error, 2 with one line."""
    command = ("-m", "dcris", "predict", str(trained_run), str(photo), "--out", str(tmp_path / "out"))
    good, bad = in_a_process(*command, "-e", "ring"), in_a_process(*command, "-e", "ring", "--batch-size", "0")
    assert (good.returncode, good.stderr) == (0, "")
    assert bad.returncode == 2
    assert bad.stderr.startswith("dcris: ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["quickstart", "ablate table3 --recipe tiny"])
def test_interruption_message(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an option that the command has: only `dcris train` has --resume."""

    def stop(*_: object, **__: object) -> NoReturn:
        raise Interrupted(signal.SIGTERM, Checkpoint(tmp_path / "step-00000007", 7, None))

    module = importlib.import_module(f"dcris.experiments.{command.split()[0]}")
    monkeypatch.setattr(Trainer, "run", stop)
    monkeypatch.setattr(module, "write_scenes", partial(write_scenes_of, 2))
    with pytest.raises(SystemExit) as left:
        dcris(*command.split(), "--out", tmp_path / "out", "--device", "cpu")
    assert left.value.code == 128 + signal.SIGTERM
    expected = f"dcris: stopped at step 7; the same command continues from {tmp_path / 'step-00000007'}\n"
    assert capsys.readouterr().err == expected


def write_scenes_of(count: int, root: Path, **settings: Any) -> None:
    """Write a few scenes instead of thousands."""
    write_scenes(root, **{**settings, "train": count, "test": count})


def test_shell_completion() -> None:
    """As bash does for the tab key, from the printed script."""
    printed = in_a_process("-m", "dcris", "completion", "bash")
    assert printed.returncode == 0, printed.stderr
    ask = """
    words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_dcris; echo "${COMPREPLY[@]}"; }
    words dcris ev; words dcris evaluate --spl; words dcris data ch
    """
    done = subprocess.run(["bash", "-c", printed.stdout + ask], capture_output=True, text=True, check=False)
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert found == [{"evaluate"}, {"--split", "--split-by"}, {"check"}]


def test_cut_expressions_are_counted(trained_run: Path, scenes_root: Path, tmp_path: Path, capsys) -> None:
    """Evaluating a model of short expressions on longer ones prints how many are cut."""
    phrases = ["red circle", "red " * 12 + "circle"]
    line = {"image": "a.png", "mask": [[1, 1, 9, 1, 9, 9]], "expressions": phrases, "split": "val"}
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "refcocog.jsonl").write_text(json.dumps(line))
    assert dcris("evaluate", trained_run, "--data", tmp_path / "refcocog.jsonl") == 0
    error_text = capsys.readouterr().err
    assert "1 of 2 expressions are longer than 14 tokens" in error_text
    assert "refcocog is usually read with 22" in error_text
    assert dcris("evaluate", trained_run, "--data", scenes_root, "--split", "test") == 0
    assert capsys.readouterr().err == ""


def test_compare_reports_other_data(scenes_root: Path, trained_run: Path, tmp_path: Path, capsys) -> None:
    """Results that were computed on other masks are reported."""
    root = Path(shutil.copytree(scenes_root, tmp_path / "data"))
    split = ("--data", root, "--dataset", "scenes", "--split", "test")
    answers = tmp_path / "a.jsonl"
    assert dcris("evaluate", trained_run, *split, "--answers", answers, "--out", tmp_path / "a.json") == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["split_by"], record["precision"]) == ("generated", "float32")
    assert record["device"]
    shutil.copyfile(answers, tmp_path / "b.jsonl")
    assert dcris("compare", answers, tmp_path / "b.jsonl", *split) == 0
    assert "another checksum" not in capsys.readouterr().err
    instances = root / "scenes/instances.json"
    content = json.loads(instances.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    instances.write_text(json.dumps(content))
    assert dcris("compare", answers, tmp_path / "b.jsonl", *split) == 0
    assert "was measured on a split with another" in capsys.readouterr().err


# ---- how much is printed -----------------------------------------------------------------------


def test_quiet_and_verbose(trained_run: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-q leaves what a script needs: results on standard output, errors on standard error. -v says
    what was used, and where an error comes from."""
    predict = ("predict", trained_run, photo, "-e", "ring", "--device", "cpu", "--out")
    assert dcris(*predict, tmp_path / "a", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert dcris("recipes", "--show", "dcris_tiny", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)
    assert dcris("predict", trained_run, tmp_path / "none.png", "-e", "ring", "-q") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "none.png" in printed.err
    assert dcris(*predict, tmp_path / "b", "--verbose") == 0
    printed = capsys.readouterr()
    assert "'ring'" in printed.out
    assert "dcris_tiny, on cpu (" in printed.err and "in float32, loaded in " in printed.err
    assert dcris("predict", trained_run, tmp_path / "none.png", "-e", "ring", "-v") == 2
    printed = capsys.readouterr()
    assert "Traceback" in printed.err and "find_tasks" in printed.err
    assert printed.err.splitlines()[-1].startswith("dcris: there is no file or folder")
    assert dcris(*predict, tmp_path / "c") == 0  # the next command in this process prints as usual
    assert "'ring'" in capsys.readouterr().out
    assert "not allowed with argument -q" in refused(capsys, "recipes", "-q", "-v")


def test_training_can_be_quiet(scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scheduler mails what a job prints."""
    words = ("train", small_recipe(), "--data", scenes_root, "--out", tmp_path / "run", *QUICK)
    assert dcris(*words, "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert dcris(*words, "--resume", "-v") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("dcris: training on cpu (") and "in float32\n" in printed.err
    assert "steps in all" in printed.out


@pytest.mark.parametrize("total", [4, None])
def test_progress_in_a_log_and_in_a_terminal(
    total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log gets plain lines, not the control characters of a bar, and both the time left."""
    monkeypatch.setattr(streams, "_SECONDS_BETWEEN_LINES", 0)
    with common.progress(total, "image") as show:
        show(1)
        show(4)
    lines = capsys.readouterr().err.splitlines()
    if total is None:
        assert lines == ["dcris: 1 image", "dcris: 4 images"]
    else:
        assert re.fullmatch(r"dcris: 1 of 4 images, \d\d:\d\d left", lines[0])
        assert lines[1] == "dcris: 4 of 4 images, 00:00 left"
    monkeypatch.setattr(streams, "_SECONDS_BETWEEN_LINES", 1000)
    with common.progress(total, "image") as show:
        show(4)
    with common.progress(total, "image", shown=False) as show:
        show(4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "is_terminal", lambda: True)
    with common.progress(total, "image") as show:
        show(4)
    assert ("4/4" if total else "4image") in capsys.readouterr().err
