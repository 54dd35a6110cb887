"""Training and evaluation from Python: the same runs as those of the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dcris
from dcris.cli import main
from dcris.config import replace
from dcris.errors import DcrisError
from dcris.recipes import get_recipe
from runs import timeless_log

SETTINGS = {"train.max_steps": 3, "train.warmup_steps": 1, "train.batch_size": 4, "data.image_size": 56}


def test_a_run_equals_that_of_the_command(scenes_root: Path, tmp_path: Path) -> None:
    """One implementation: the log, and so the weights, are equal."""
    data = dcris.load_dataset(scenes_root, "scenes")
    lines: list[str] = []
    result = dcris.train("dcris_tiny", data, tmp_path / "a", SETTINGS, device="cpu", log=lines.append)
    settings = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    command = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "b"), "--device", "cpu"]
    assert main([*command, *settings]) == 0
    assert timeless_log(tmp_path / "a") == timeless_log(tmp_path / "b")
    configs = [json.loads((tmp_path / run / "config.json").read_text()) for run in "ab"]
    assert configs[0]["data"].pop("split_by") == "generated"  # the command read the only one there is
    assert configs[1]["data"].pop("split_by") is None
    assert configs[0] == configs[1]
    assert "adapter" in lines[0]
    assert dcris.Segmenter.from_pretrained(result.best.path, device="cpu").config.recipe == "dcris_tiny"


def test_scores_equal_those_of_the_command(trained_run: Path, scenes_root: Path, tmp_path: Path) -> None:
    """One implementation, and the masks are there for whoever wants to look at them."""
    data = dcris.load_dataset(scenes_root, "scenes")
    found = dcris.evaluate(trained_run, data, "test", device="cpu", precision="float32")
    command = [
        "evaluate",
        str(trained_run),
        "--data",
        str(scenes_root),
        "--split",
        "test",
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert main([*command, "--device", "cpu", "--precision", "float32"]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(found.full_record()))
    assert found.record["miou"] == json.loads((tmp_path / "r.json").read_text())["miou"]
    result = found.results[0]
    assert result.mask().shape == result.reference.image_size
    with pytest.raises(DcrisError, match="calibrate on another split"):
        dcris.evaluate(trained_run, data, "test", calibrate_on="test")
    with pytest.raises(DcrisError, match="protocol"):
        dcris.evaluate(trained_run, data, "test", protocol="coco")


def test_own_data_without_a_split_for_validation(tmp_path: Path) -> None:
    """Recipes validate on the split that RefCOCO has; own data may have none, which is said."""
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "expressions": ["left one"], "mask": [[1, 1, 9, 1, 9, 9]]}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    data, lines = dcris.load_dataset(tmp_path / "own.jsonl"), []
    recipe = replace(get_recipe("dcris_tiny"), {"data.val_split": "val"})
    settings = SETTINGS | {"train.max_steps": 1}
    dcris.train(recipe, data, tmp_path / "run", settings, device="cpu", log=lines.append)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["data"]["dataset"], config["data"]["split_by"], config["data"]["val_split"]) == ("own", None, None)
    assert any("without validation" in line for line in lines)


def test_a_whole_section_keeps_its_fields(tmp_path: Path) -> None:
    """What follows from the data set replaces no field that a section gives."""
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "expressions": ["left one"], "mask": [[1, 1, 9, 1, 9, 9]]}
    rows = [row | {"split": split} for split in ("train", "train", "val")]
    (tmp_path / "refcocog.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    section = get_recipe("dcris_tiny").data.model_copy(update={"word_length": 11, "image_size": 56})
    for number, data in enumerate((section, section.model_dump())):
        run = tmp_path / f"run{number}"
        settings = {"train.max_steps": 1, "data": data}
        dcris.train("dcris_tiny", dcris.load_dataset(tmp_path / "refcocog.jsonl"), run, settings, device="cpu", log=len)
        config = json.loads((run / "config.json").read_text())
        assert (config["data"]["word_length"], config["data"]["val_split"]) == (11, None)


def test_wrong_arguments_are_one_sentence(scenes_root: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    data = dcris.load_dataset(scenes_root, "scenes")
    for arguments, complaint in (
        (("no_recipe", data, tmp_path / "a"), "unknown recipe 'no_recipe'"),
        (("dcris_tiny", scenes_root, tmp_path / "a"), "the data must be a ReferenceTable"),
        (("dcris_tiny", data, tmp_path / "a", {"train.lrr": 1}), "lrr"),
        (
            ("dcris_tiny", data, tmp_path / "a", "train.lr=1"),
            r"changes must map keys to values, .* not be 'train\.lr=1'",
        ),
        (("dcris_tiny", data, tmp_path / "a", None), "not be None"),
        (("dcris_tiny", data, 7), "the folder of the run must be a path"),
    ):
        with pytest.raises(DcrisError, match=complaint) as caught:
            dcris.train(*arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DcrisError, match="data set"):
        dcris.load_dataset(scenes_root)
