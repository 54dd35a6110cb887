"""Training on inputs of several sizes (`data.scales`)."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.batch_size import largest_micro_batch
from dcris.training.sizes import draw_size, resize
from dcris.training.stopping import Interrupted
from dcris.training.trainer import build_model
from runs import CPU, EVERY_STEP, assert_same_run, quick_config, run_training, timeless_log
from test_distributed import IN_DOUBLE_PRECISION, losses, torchrun, train_words
from test_train import stop_at

SCALES = ("data.scales", "[0.75, 1.0, 1.5]")  # of 56 pixels: 42, 56 and 84


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


def sides_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the side of the images of each pass."""
    sides: list[int] = []
    encode = ReferringSegmenter.encode_images
    monkeypatch.setattr(
        ReferringSegmenter, "encode_images", lambda self, images: sides.append(images.shape[-1]) or encode(self, images)
    )
    return sides


def test_sizes_are_whole_patches() -> None:
    """Rounded, at least one patch; off by default."""
    assert quick_config(1, SCALES).sizes == (42, 56, 84)
    assert quick_config(1).sizes == (56,)
    assert quick_config(1, ("data.scales", "[0.1]")).sizes == (14,)
    assert get_recipe("dcris_b").data.scales is None
    drawn = [draw_size((42, 56, 84), 0, step) for step in range(3000)]
    assert all(abs(count - 1000) < 120 for count in Counter(drawn).values())
    assert drawn != [draw_size((42, 56, 84), 1, step) for step in range(3000)]


def test_a_batch_has_one_size(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its step in all passes; validation has the usual size."""
    sides = sides_of(monkeypatch)
    config = quick_config(6, SCALES, ("train.micro_batch", "2"), EVERY_STEP)
    run_training(config, table, tmp_path)
    assert sides == [draw_size((42, 56, 84), 0, step) for step in range(6) for _ in range(2)]
    assert len(set(sides)) == 3
    sides.clear()
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Segmenter.from_pretrained(tmp_path, device="cpu").predict(picture, "left circle")
    assert sides == [56]


def test_images_are_resized_without_aliasing() -> None:
    """A mean of pixels, not one of them; the size itself changes nothing."""
    stripes = torch.arange(16.0).remainder(2).expand(1, 3, 16, 16)
    assert resize(stripes, 16) is stripes
    assert (resize(stripes, 4)[..., 1:3] - 0.5).abs().max() < 0.1
    assert torch.equal(resize(torch.ones(1, 3, 16, 16), 28), torch.ones(1, 3, 28, 28))


def test_the_only_scale_1_changes_nothing(table: ReferenceTable, tmp_path: Path) -> None:
    for name, settings in (("one", (("data.scales", "[1]"),)), ("none", ())):
        run_training(quick_config(2, EVERY_STEP, *settings), table, tmp_path / name)
    assert timeless_log(tmp_path / "one") == timeless_log(tmp_path / "none")


def test_a_run_of_several_sizes_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """With masking, averages, shared images and aligned targets."""
    settings = SCALES, EVERY_STEP, ("train.masking", "{}"), ("train.ema", "0.9"), ("data.phrases_per_image", "3")
    config = quick_config(4, *settings, ("train.target", "aligned"))
    run_training(config, table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, table, tmp_path / "halves", log=stop_at(2))
    run_training(config, table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with data\.scales"):
        run_training(quick_config(4, *settings, ("data.scales", "[1]")), table, tmp_path / "halves", resume=True)


def test_the_largest_size_decides_about_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--batch-size auto` must not choose a batch that only fits at the usual size."""
    sides = sides_of(monkeypatch)
    config = quick_config(1, SCALES)
    largest_micro_batch(build_model(config), config, tokenizer_of(config.model.text), 1, CPU)
    assert set(sides[1:]) == {84}  # the first asks whether one sample suffices for the batch norms


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ("[1.0, 1.1]", "data.scales [1.0, 1.1] gives the sizes [56, 56], in whole patches of 14 pixels"),
        ("[0]", "data.scales.0: input should be greater than or equal to 0.1"),
        ("[-1]", "data.scales.0: input should be greater than or equal to 0.1"),
        ("[]", "data.scales: tuple should have at least 1 item"),
        ("56", "data.scales: input should be a valid tuple"),
        ("[1, 99]", "data.scales.1: input should be less than or equal to 10"),
    ],
)
def test_wrong_values_are_refused(scales: str, message: str) -> None:
    with pytest.raises(DcrisError, match=re.escape(message)):
        quick_config(1, ("data.scales", scales))


def test_sizes_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(DcrisError, match=r"data\.scales changes the images at every step, .* leave one of them off"):
        quick_config(1, SCALES, ("data.cache_features", "1"))
    with pytest.raises(DcrisError, match=r"data\.scales gives a size of 5600 pixels; the largest is 4096"):
        quick_config(1, ("data.image_size", "1120"), ("data.scales", "[5]"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dcris_photos", "barleria_tiny", "etris_tiny"])
def test_other_towers_train_on_several_sizes(table: ReferenceTable, tmp_path: Path, recipe: str) -> None:
    """Convolutional towers and interleaved methods follow the size, too."""
    size = get_recipe(recipe).model.vision.patch * 4
    config = quick_config(4, ("data.scales", "[0.75, 1.5]"), ("data.image_size", str(size)), EVERY_STEP, recipe=recipe)
    run_training(config, table, tmp_path)
    assert len(timeless_log(tmp_path)) == 4


@pytest.mark.slow
def test_all_processes_have_the_same_size(scenes_root: Path, tmp_path: Path) -> None:
    """Or batch norms and losses would be of different images."""
    words = "--data.scales", json.dumps([0.75, 1.0, 1.5])
    for count in (1, 2):
        done = torchrun(count, *train_words(scenes_root, tmp_path / str(count), 6, *words), program=IN_DOUBLE_PRECISION)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=4e-7)
