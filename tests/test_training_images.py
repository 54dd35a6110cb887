"""Evaluations say which images a model was trained on."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcris.checkpoints.checkpoint import list_checkpoints, read_training_images
from dcris.checkpoints.training_images import FILE, hash_images, image_hash, pack_images, read_images, unpack_images
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.types import Reference
from runs import quick_config, run_training


def image(path: Path, coco_id: int | None = None) -> Reference:
    return Reference(1, (1,), 1, path, (4, 4), "cup", "train", (), (), coco_id=coco_id)


def evaluate(run: Path, root: Path, split: str, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Return the result and what `dcris evaluate` printed beside it."""
    words = ["--data", root, "--dataset", "scenes", "--split", split, "--device", "cpu", "--out", out]
    assert main(["evaluate", str(run), *map(str, words), "--report", str(out.with_suffix(".html"))]) == 0
    return json.loads(out.read_text()), capsys.readouterr().err


def test_an_image_of_coco_is_known_under_any_name(tmp_path: Path) -> None:
    """A model trained on train2014 has seen the images of val2017 that are in it, and those of
    Visual Genome that PhraseCut takes from COCO."""
    names = ("COCO_train2014_000000000009.jpg", "COCO_val2014_000000000009.jpg", "000000000009.jpg")
    paths = [tmp_path / str(place) / name for place, name in enumerate(names)]
    found = {image_hash(image(path)) for path in paths} | {image_hash(image(tmp_path / "2370806.jpg", coco_id=9))}
    assert len(found) == 1
    assert image_hash(image(tmp_path / "000000000010.jpg")) not in found


def test_other_images_are_known_by_name_size_and_content(tmp_path: Path) -> None:
    """Every data set has a 1.jpg; the same photograph in another folder is the same. Images without
    compression have all the same size, and often the same border."""
    for folder, content in (("a", b"one"), ("b", b"other"), ("moved", b"one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(content)
    one, other, moved = (image_hash(image(tmp_path / name / "1.jpg")) for name in ("a", "b", "moved"))
    assert one == moved != other
    assert image_hash(image(tmp_path / "a/2.jpg")) is None
    images = hash_images([image(tmp_path / name / "1.jpg") for name in ("a", "b", "moved", "nowhere")])
    assert images == {one, other}
    assert unpack_images(pack_images(images), tmp_path) == images
    assert len(pack_images(images)) < 40
    frames = np.zeros((2, 300, 400, 3), np.uint8)
    frames[1, 140:160, 190:210] = 200
    for folder, frame in zip(("train", "val"), frames, strict=True):
        (tmp_path / folder).mkdir()
        Image.fromarray(frame).save(tmp_path / folder / "1.bmp")
    assert len(hash_images([image(tmp_path / name / "1.bmp") for name in ("train", "val")])) == 2


@pytest.mark.parametrize("content", [b"", b"text", pack_images(frozenset())[:-1], pack_images(frozenset()) + b"12345"])
def test_a_damaged_list_is_named(content: bytes, tmp_path: Path) -> None:
    assert read_images(tmp_path) == frozenset()
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DcrisError, match=r"training_images.bin is not a list of training images; copy it again"):
        read_images(tmp_path)


def test_a_list_without_end_is_refused(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(DcrisError, match=r"cannot read .*training_images.bin"):
        read_images(tmp_path)


def test_evaluation_says_what_was_trained_on(
    trained_run: Path, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of seen images look like progress; those of the others are what can be compared."""
    clean, said = evaluate(trained_run, scenes_root, "test", tmp_path / "clean.json", capsys)
    assert "trained_on" not in clean
    assert "trained on" not in said
    root = tmp_path / "leaky"
    shutil.copytree(scenes_root, root)
    path = next(root.glob("scenes/refs(*).p"))
    records = pickle.loads(path.read_bytes())
    moved = next(record["image_id"] for record in records if record["split"] == "train")
    leaked = sum(len(record["sentences"]) for record in records if record["image_id"] == moved)
    for record in records:
        if record["image_id"] == moved:
            record["split"] = "test"
    path.write_bytes(pickle.dumps(records, 2))
    leaky, said = evaluate(trained_run, root, "test", tmp_path / "leaky.json", capsys)
    found = leaky["trained_on"]
    assert (found["images"], found["of"], found["expressions"]) == (1, 5, leaked)
    assert f"1 of 5 evaluated images were trained on, such as {found['examples'][0]}" in said
    assert "images trained on" in (tmp_path / "leaky.html").read_text()
    assert "images trained on" not in (tmp_path / "clean.html").read_text()
    assert found["scores_of_others"] == {key: clean[key] for key in found["scores_of_others"]}
    train, _ = evaluate(list_checkpoints(trained_run)[-1].path, scenes_root, "train", tmp_path / "t.json", capsys)
    assert (train["trained_on"]["images"], train["trained_on"]["scores_of_others"]) == (12, None)


def test_saved_models_and_further_runs_keep_it(trained_run: Path, scenes_root: Path, tmp_path: Path) -> None:
    """Whoever publishes a model passes on what it has seen, and fine-tuning adds to it."""
    table = load_references(scenes_root, "scenes")
    images = hash_images(table.split("train"))
    assert len(images) == 12
    assert read_training_images(list_checkpoints(trained_run)[-1].path) == images
    segmenter = pickle.loads(pickle.dumps(Segmenter.from_pretrained(trained_run, device="cpu")))
    for name in ("saved", "bundle.safetensors"):
        segmenter.save_pretrained(tmp_path / name)
        assert read_training_images(tmp_path / name) == images
        assert Segmenter.from_pretrained(tmp_path / name, device="cpu").images == images
    others = replace(table, references=tuple(replace(each, split="train") for each in table.split("val")))
    run_training(quick_config(1, ("train.start", str(tmp_path / "saved"))), others, tmp_path / "tuned")
    assert read_images(tmp_path / "tuned") == images | hash_images(others.references)


def test_a_lost_list_is_made_again_with_the_images_of_the_start(
    trained_run: Path, scenes_root: Path, tmp_path: Path
) -> None:
    """Without them, an evaluation on images that the first run was trained on would call them
    unseen. A run without a list is no such claim."""
    table = load_references(scenes_root, "scenes")
    start, out, lines = tmp_path / "start", tmp_path / "tuned", list[str]()
    Segmenter.from_pretrained(trained_run, device="cpu").save_pretrained(start)
    others = replace(table, references=tuple(replace(each, split="train") for each in table.split("val")))

    def train(steps: int) -> None:
        config = quick_config(steps, ("train.start", str(start)))
        run_training(config, others, out, resume=True, log=lines.append)

    train(1)
    whole = read_images(out)
    assert whole > hash_images(others.references)
    (out / FILE).unlink()
    train(2)
    assert read_images(out) == whole
    assert not any(FILE in line for line in lines)
    (out / FILE).unlink()
    start.rename(tmp_path / "moved")
    train(3)
    assert read_images(out) == frozenset()
    assert any("restore it, as it cannot be made again without the images of train.start" in line for line in lines)
