"""The packaged model `tiny`: found by its name, small, and able to segment generated scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dcris.assets
from dcris import Segmenter
from dcris.checkpoints.resolve import locate
from dcris.cli import main
from dcris.data.scenes import make_scene, scene_rng

FOLDER = Path(dcris.assets.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tiny() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu")


def test_it_is_small_and_needs_nothing_else() -> None:
    """Adapters and head in float16; the towers are part of the package."""
    assert locate("tiny") == FOLDER
    assert (FOLDER / "model.safetensors").stat().st_size <= 3_000_000
    assert not (FOLDER / "towers.safetensors").exists()
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model"]["vision"]["name"], config["model"]["text"]["name"]) == ("tiny-vision", "tiny-text")
    assert config["data"]["cache_features"] is None  # a setting of its training, not of those that start from it


def test_a_folder_called_tiny_is_not_taken_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one with a checkpoint is, as every path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert locate("tiny") == FOLDER
    (tmp_path / "tiny/model.safetensors").touch()
    assert locate("tiny") == Path("tiny")


def test_it_segments_scenes_that_it_has_not_seen(tiny: Segmenter) -> None:
    """Twelve scenes of another seed than its training and test scenes."""
    overlaps = []
    for number in range(12):
        scene = make_scene(scene_rng(123, "test", number))
        wanted = [(index, phrase.text) for index, phrases in scene.phrases.items() for phrase in phrases]
        predictions = tiny.predict(scene.image, [text for _, text in wanted])
        for (index, _), prediction in zip(wanted, predictions, strict=True):
            truth = scene.owners == index
            overlaps.append((prediction.mask & truth).sum() / (prediction.mask | truth).sum())
    assert np.mean(overlaps) > 0.6


def test_it_predicts_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the documentation, without --out."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_scene(scene_rng(123, "test", 0)).image).save("scene.png")
    assert main(["predict", "tiny", "scene.png", "-e", "left circle", "--device", "cpu"]) == 0
    assert (tmp_path / "out/scene.0-left-circle.mask.png").exists()


def test_the_card_states_its_data_and_scores() -> None:
    """Scores come with the command that measures them."""
    card = (FOLDER / "README.md").read_text()
    for part in ("dcris data scenes", "dcris evaluate tiny", "| mIoU |", "cannot segment photographs"):
        assert part in card
