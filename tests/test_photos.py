"""The packaged model `photos`: found by its name, small, licensed, and able to find a cat."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dcris.assets
from dcris import Segmenter
from dcris.checkpoints.checkpoint import find_checkpoint, read_training_images
from dcris.checkpoints.resolve import locate
from dcris.checkpoints.training_images import pack_images
from dcris.cli import main
from dcris.data.masks import decode_mask
from dcris.data.photographs import example_photographs
from dcris.data.readers.load import load_references
from dcris.data.training_table import training_table
from dcris.errors import DcrisError
from dcris.recipes import get_recipe
from dcris.utils import wheels

FOLDER = Path(dcris.assets.__file__).parent / "photos"
CAT = next(path for path, _ in example_photographs() if path.stem == "chelsea")


@pytest.fixture(scope="module")
def photos() -> Segmenter:
    return Segmenter.from_pretrained("photos", device="cpu")


def test_only_photographs_with_a_licence_that_permits_it_were_used() -> None:
    """The configuration that is shipped states the licences, and the card lists the photographs."""
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["data"]["licences"] == [4, 5, 7, 8]
    rows = (FOLDER / "photographs.csv").read_text().splitlines()
    assert rows[0] == "coco_id,licence,url" and 100 < len(rows) - 1 <= 137
    assert {row.split(",")[1] for row in rows[1:]} <= {"4", "5", "7", "8"}


def test_it_is_small() -> None:
    """Adapters and head in float16; the towers come from PyPI."""
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    assert not (FOLDER / "towers.safetensors").exists()


def test_a_folder_of_photographs_is_not_taken_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People have folders called photos. One with a checkpoint is used, as every path is."""
    monkeypatch.chdir(tmp_path)
    assert locate("photos") == FOLDER
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").touch()
    assert locate("photos") == FOLDER
    (folder / "model.safetensors").touch()
    assert locate("photos") == Path("photos")


def test_it_segments_a_photograph_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of the README, without --out."""
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "photos", str(CAT), "-e", "cat", "--device", "cpu"]) == 0
    mask = np.asarray(Image.open(tmp_path / "out/chelsea.0-cat.mask.png")) > 0
    assert 0.2 < mask.mean() < 0.95
    # The cat's face fills the middle; the corner at the top left is a carpet.
    assert mask[100:200, 180:300].mean() > 0.8
    (result,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert result["phrase"] == "cat" and result["score"] > 0.5


def test_loading_does_not_import_torchs_compiler() -> None:
    """Nor the library for symbols that it is based on. They take two seconds and one, and a mask
    from the command line needs none of it.
    """
    code = (
        "import sys; from dcris import Segmenter; Segmenter.from_pretrained('photos', device='cpu'); "
        "sys.exit(not {'torch._dynamo.convert_frame', 'sympy'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_examples_have_phrases_that_it_understands(photos: Segmenter) -> None:
    """What a visitor of the page clicks first shows something, or says that it is not there."""
    for path, phrases in example_photographs():
        for prediction in photos.predict(path, list(phrases)):
            assert (prediction.box is None) == (prediction.phrase == "bird"), (path.name, prediction.phrase)
            assert prediction.score < 0.2 or prediction.score > 0.9


def test_without_the_packages_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    code = main(["predict", "photos", str(CAT), "-e", "cat", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2 and "pip install 'dcris[photos]'" in said and said.count("\n") == 1
    with pytest.raises(DcrisError, match="not installed"):
        Segmenter.from_pretrained("photos")


def test_it_can_be_trained_further_on_own_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--from photos` starts from the shipped adapters and head; a few steps move them."""
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((300, 451), np.uint8)
    mask[40:260, 110:400] = 255
    Image.fromarray(mask).save("mask.png")
    shutil.copy(CAT, "cat.jpg")
    lines = [{"image": "cat.jpg", "mask": "mask.png", "expressions": ["my pet"], "split": "train"}] * 2
    Path("my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["train", "dcris_photos", "--data", "my.jsonl", "--from", "photos", "--out", "run", "--device", "cpu"]
    settings = {"data.image_size": 64, "data.workers": 0, "train.max_steps": 2, "train.warmup_steps": 1}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main([*words, *flags]) == 0
    start, end = (load_file(folder / "model.safetensors") for folder in (FOLDER, find_checkpoint(tmp_path / "run")))
    weights = [name for name in end if name.endswith(("weight", "bias"))]
    moved = {name: (end[name].float() - start[name].float()).abs().max().item() for name in weights}
    assert 0 < max(moved.values()) < 0.05


@pytest.mark.slow
def test_the_average_of_models_is_a_model(tmp_path: Path) -> None:
    """The mean of the weights, with the configuration of the last, that knows what all were trained
    on; models of other architectures are refused."""
    one, two = (tmp_path / name for name in "ab")
    for folder, factor in ((one, 1.5), (two, 0.5)):
        shutil.copytree(FOLDER, folder)
        weights = load_file(FOLDER / "model.safetensors")
        weights = {
            name: value.float() * factor if value.is_floating_point() else value for name, value in weights.items()
        }
        with safe_open(FOLDER / "model.safetensors", "pt") as file:
            save_file(weights, folder / "model.safetensors", file.metadata())
        (folder / "training_images.bin").write_bytes(pack_images(frozenset({folder.name.encode() * 6})))
    tool = [sys.executable, Path(__file__).parents[1] / "tools/average_models.py"]
    subprocess.run([*tool, one, two, "--out", tmp_path / "mean"], check=True)
    mean, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "mean", FOLDER))
    assert mean.keys() == start.keys()
    assert all(torch.equal(mean[name], start[name].to(mean[name].dtype)) for name in start)
    assert read_training_images(tmp_path / "mean") == {b"aaaaaa", b"bbbbbb"}
    refused = subprocess.run(
        [*tool, one, "tiny", "--out", tmp_path / "no"], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "one architecture" in refused.stderr and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_composed_photographs_are_of_permitted_training_photographs(refer_root: Path, tmp_path: Path) -> None:
    """A pasted object of a test photograph would spoil its score, one of another licence the
    model's. What a paste covers is cut out of the masks.
    """
    tool = Path(__file__).parents[1] / "tools/compose_photos.py"
    contents = []
    for name in ("a", "b"):
        words = [*("--data", refer_root), "--out", tmp_path / name, "--licences", 4, 5, 7, 8, "--per-photograph", 1]
        words += ["--scenes", 3]
        subprocess.run([sys.executable, tool, *map(str, words)], check=True)
        contents.append(json.loads((tmp_path / name / "cocomini/instances.json").read_text()))
    assert contents[0] == contents[1]
    root = tmp_path / "a"
    table = load_references(root, "cocomini")
    held_out = {reference.image_id for reference in table.references if reference.split != "train"}
    licences = {image["id"]: image["license"] for image in contents[0]["images"]}
    scenes = [image for image in contents[0]["images"] if image.get("composed_of") == []]
    composed = [image for image in contents[0]["images"] if image.get("composed_of")]
    assert len(composed) > 100
    for image in composed:
        assert held_out.isdisjoint(image["composed_of"])
        assert {licences[number] for number in image["composed_of"]} <= {4, 5, 7, 8}
    config = get_recipe("dcris_photos").data.model_copy(
        update={"dataset": "cocomini", "generate_phrases": True, "licences": (4, 5, 7, 8)}
    )
    described = {reference.image_id for reference in training_table(table, config).split("train")}
    assert sum(image["id"] in described for image in composed) > 0.9 * len(composed)
    assert len(scenes) == 3 and {image["id"] for image in scenes} <= described
    for image in composed[:10]:
        size = image["height"], image["width"]
        own = [each for each in contents[0]["annotations"] if each["image_id"] == image["id"]]
        assert sum(decode_mask(each["segmentation"], size).sum() for each in own) == sum(each["area"] for each in own)
        # The last pasted object lies above all others.
        last = decode_mask(own[-1]["segmentation"], size)
        assert all(not (last & decode_mask(each["segmentation"], size)).any() for each in own[:-1])
