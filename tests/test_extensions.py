"""Extensions beyond the paper: each is off by default and is one field of the configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.cli import main
from dcris.config import TrainConfig, replace
from dcris.data.augmentations import AUGMENTATIONS
from dcris.data.dataset import TrainingSamples, all_queries, normalise
from dcris.data.flip import swap_sides
from dcris.data.readers.load import load_references
from dcris.data.tokenizer import tokenizer_of
from dcris.evaluation.analysis import analyse, best_threshold
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.models.adapters.dcris import DcrisConfig, DenseCrossConfig
from dcris.models.segmentation import Output, ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.losses import dice_loss, text_to_pixel_loss, training_losses
from models import error, images, randomise, tiny_config, tokens_ending_at
from runs import CPU, quick_config, run_training

PHRASES = (
    "the man left right Left RIGHT leftmost rightmost left-hand now next all in front of a tree lft - , . second from"
)


def dcris(*arguments: object) -> int:
    """Run the command line in this process."""
    return main([str(argument) for argument in arguments])


def test_extensions_are_off_by_default() -> None:
    """The paper's recipes must stay the paper's."""
    config = get_recipe("dcris_b")
    assert config.data.augmentations == {}
    assert config.data.refine == "none"
    assert config.train.losses == {}
    assert isinstance(config.model.method, DcrisConfig)
    assert config.model.method.visual is not None
    assert not config.model.method.visual.mask_padding
    assert config.model.vision.family == "dinov2"


# ---- dice ----------------------------------------------------------------------------------------


def test_dice_loss_by_definition() -> None:
    """Compare with 1 - 2 * intersection / (sum of both), smoothed by 1."""
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 4, 5, generator=source)
    masks = (torch.rand(3, 1, 8, 10, generator=source) > 0.6).float()
    expected = []
    for guess, truth in zip(torch.sigmoid(logits)[:, 0].numpy(), masks[:, 0, ::2, ::2].numpy(), strict=True):
        expected.append(1 - (2 * (guess * truth).sum() + 1) / (guess.sum() + truth.sum() + 1))
    assert dice_loss(logits, masks).item() == pytest.approx(float(np.mean(expected)), abs=1e-6)
    assert dice_loss(40 * (2 * masks - 1), masks).item() == pytest.approx(0, abs=1e-6)
    # A sample without an object counts 0, and has no gradient.
    masks[1], expected[1] = 0, 0.0
    logits.requires_grad_()
    loss = dice_loss(logits, masks)
    assert loss.item() == pytest.approx(float(np.mean(expected)), abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert [bool(each.any()) for each in logits.grad] == [True, False, True]


def test_dice_loss_is_added_to_equation_6(scenes_root: Path, tmp_path: Path) -> None:
    """The weight adds the Dice loss to equation 6, and 0 leaves it unchanged."""
    source = torch.Generator().manual_seed(1)
    logits, masks = torch.randn(2, 1, 4, 4, generator=source), torch.ones(2, 1, 8, 8)
    alone = text_to_pixel_loss(logits, masks)
    output = Output(logits, None, {})
    assert training_losses(output, masks, TrainConfig()).keys() == {"text_to_pixel"}
    assert torch.equal(training_losses(output, masks, TrainConfig())["text_to_pixel"], alone)
    both = training_losses(output, masks, TrainConfig(losses={"dice": 0.5}))
    assert torch.allclose(sum(both.values()), alone + 0.5 * dice_loss(logits, masks))
    logged = {}
    for losses in ("{}", '{"dice": 0.5}'):
        out = tmp_path / str(len(losses))
        run_training(quick_config(1, ("train.losses", losses), ("train.log_every", "1")), scenes_root, out)
        logged[losses] = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    plain, dice = logged.values()
    assert 0 < dice["loss"] - plain["loss"] <= 0.5


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_padding_is_hidden_from_the_adapters(masked: bool) -> None:
    """With mask_padding, logits do not depend on the number of padding tokens."""
    visual = DenseCrossConfig(layers=(1, 3), width=16, attention_width=8, heads=2, dropout=0.0, mask_padding=masked)
    model = ReferringSegmenter(tiny_config(visual_adapter=visual)).double().eval()
    randomise(model)
    pixels, tokens = images(2, 3, 4).double(), tokens_ending_at((3, 5), 11)
    short, long = model(pixels, tokens[:, :6])[0], model(pixels, tokens)[0]
    assert (error(short, long) < 1e-10) == masked


# ---- resolution ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_resolution_trains_and_predicts(scenes_root: Path, tmp_path: Path) -> None:
    """Positions, coordinates and logits follow the image size, in training and evaluation."""
    table, logits = load_references(scenes_root, "scenes"), {}
    for size in (56, 112, 168):
        out = tmp_path / str(size)
        run_training(quick_config(2, ("data.image_size", str(size))), scenes_root, out)
        model, config = load_checkpoint(out)
        found = predict_queries(model, all_queries(table.split("test")), config, Cris(), device=CPU)
        assert all(result.mask().shape == result.reference.image_size for result in found)
        samples = TrainingSamples(table.split("train"), config.data, tokenizer_of(config.model.text), 0)
        sample = samples[0]
        with torch.no_grad():
            logits[size] = model(normalise(sample.image[None], config.data), sample.tokens[None])[0]
        assert logits[size].shape[-2:] == (4 * size // 14, 4 * size // 14)
        assert torch.isfinite(logits[size]).all()
    # A model trained at one size also predicts at another.
    model, config = load_checkpoint(tmp_path / "56")
    finer = replace(config, {"data.image_size": 112})
    found = predict_queries(model, all_queries(table.split("test")), finer, Cris(), device=CPU)
    assert sum(1 for _ in found) == len(all_queries(table.split("test")))


def test_a_whole_model_on_dinov3() -> None:
    """A whole model on a DINOv3 tower has logits of the right shape and gradients in its
    adapters."""
    config = tiny_config()
    vision = config.vision.model_copy(update={"family": "dinov3", "patch": 16})
    model = ReferringSegmenter(config.model_copy(update={"vision": vision})).train()
    logits = model(torch.randn(2, 3, 48, 64), tokens_ending_at((3, 5), 8))[0]
    assert logits.shape == (2, 1, 12, 16)
    logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    assert all(parameter.grad is None for parameter in model.vision.patch_embed.parameters())


# ---- threshold -----------------------------------------------------------------------------------


def test_the_threshold_is_chosen_on_another_split(
    scenes_root: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrating on the evaluated split is an error; the result records the threshold and its
    split."""
    result = tmp_path / "result.json"
    data = ("--data", scenes_root, "--device", "cpu")
    assert dcris("evaluate", trained_run, *data, "--split", "test", "--calibrate-on", "val", "--out", result) == 0
    record = json.loads(result.read_text())
    model, config = load_checkpoint(trained_run)
    queries = all_queries(load_references(scenes_root, "scenes").split("val"))
    results = [*predict_queries(model, queries, config, Cris(), device=CPU)]
    curve = analyse(results)["curve"]
    best = curve["thresholds"][int(np.argmax(curve["miou"]))]
    assert record["calibrated_on"] == "val"
    assert record["threshold"] == best_threshold(results) == best
    # The scores are those at that threshold.
    near = record["analysis"]["curve"]["thresholds"].index(best)
    assert record["miou"] == pytest.approx(record["analysis"]["curve"]["miou"][near], abs=1e-6)
    capsys.readouterr()
    assert dcris("evaluate", trained_run, *data, "--split", "test", "--calibrate-on", "test") == 2
    assert "give two splits" in capsys.readouterr().err
    image = next((scenes_root / "images/mscoco/images/train2014").iterdir())
    out = tmp_path / "masks"
    command = ("predict", trained_run, image, "-e", "red circle", "--out", out, "--device", "cpu", "--threshold")
    assert dcris(*command, result) == 0
    assert dcris(*command, tmp_path / "nothing.json") == 2
    assert "the threshold (neither a number nor a result file) is missing" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[]")
    assert dcris(*command, tmp_path / "list.json") == 2
    assert dcris(*command, 0.5, "--overwrite") == 0


# ---- light and zoom ------------------------------------------------------------------------------


def test_light_keeps_mask_phrase_and_hues() -> None:
    """A phrase such as "the red cup" stays true: channels keep their order, and grey stays grey."""
    image = np.random.default_rng(0).integers(40, 200, (20, 30, 3), dtype=np.uint8)
    image[:, 15:] = image[:, 15:, :1]
    mask = np.eye(20, 30, dtype=np.uint8)
    means = set()
    for seed in range(20):
        lit, same, phrase = AUGMENTATIONS["light"](image, mask, "the red cup", np.random.default_rng(seed))
        assert same is mask and phrase == "the red cup"
        means.add(round(float(lit.mean())))
        assert (lit[:, 15:] == lit[:, 15:, :1]).all()
        order = np.diff(image.astype(int), axis=2) * np.diff(lit.astype(int), axis=2)
        assert (order >= 0).all()
    assert len(means) > 10 and min(means) < image.mean() < max(means)


def test_zoom_moves_image_and_mask_alike() -> None:
    """The object's pixels stay its own, their number changes only at the window's border, and most
    of it is always seen."""
    mask = np.zeros((60, 80), np.uint8)
    mask[5:25, 50:78] = 1
    image = np.where(
        mask[..., None], np.uint8(250), np.random.default_rng(0).integers(0, 100, (60, 80, 3), dtype=np.uint8)
    )
    shapes = set()
    for seed in range(60):
        zoomed, moved, phrase = AUGMENTATIONS["zoom"](image, mask, "top right", np.random.default_rng(seed))
        assert zoomed.shape[:2] == moved.shape and phrase == "top right"
        assert ((zoomed == 250).all(-1) == moved.astype(bool)).all()
        assert 0.75 * mask.sum() <= moved.sum() <= mask.sum()
        shapes.add(moved.shape)
    heights = sorted(height for height, _ in shapes)
    assert 45 <= heights[0] < 50 and 75 < heights[-1] <= 80


# ---- flip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "mirrored"),
    [
        ("left slice", "right slice"),
        ("Second man from LEFT, in red", "Second man from RIGHT, in red"),
        ("rightmost cup", "leftmost cup"),
        ("the right-hand glove", "the left-hand glove"),
        ("between left and right", "between right and left"),
        ("bright copyright sign", "bright copyright sign"),
        ("brightest upright bottle, leftovers", "brightest upright bottle, leftovers"),
        ("the one in the middle", "the one in the middle"),
        ("woman on right in blue", "woman on left in blue"),
        ("", ""),
    ],
)
def test_sides_change_places(phrase: str, mirrored: str) -> None:
    """Swapping left and right gives the expression of the flipped image."""
    assert swap_sides(phrase) == mirrored


@pytest.mark.parametrize(
    "phrase",
    [
        "the cat right now",
        "cup right next to the plate",
        "man right in front of us",
        "slice that was left",
        "pizza left over",
        "all right",
        "lft guy",
        "guy on rt",
        "leFt dog",
        "cup left next to the plate",
    ],
)
def test_words_that_name_no_side_are_kept(phrase: str) -> None:
    """ "right" and "left" with other meanings, as in "right next to", are not swapped."""
    assert swap_sides(phrase) is None


@pytest.mark.parametrize("phrase", ["topleft donut", "Upperright cup", "leftguy", "far left2 man", "lefthanded man"])
def test_a_side_inside_a_word_is_not_mirrored(phrase: str) -> None:
    """People leave out spaces. The image was mirrored, and the expression still named the old side:
    it then described another object.
    """
    assert swap_sides(phrase) is None


@pytest.mark.parametrize("phrase", ["\uff4ceft cup", "\uff32IGHT cup", "&#108;eft cup"])
def test_a_side_that_only_tokenizers_read_is_not_mirrored(phrase: str) -> None:
    """They read "left cup"; mirrored, that expression described another cup."""
    assert swap_sides(phrase) is None


@given(st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PHRASES.split()), max_size=8).map(" ".join)))
def test_swapping_twice_changes_nothing(phrase: str) -> None:
    """Swapping twice gives the expression back, with as many words."""
    mirrored = swap_sides(phrase)
    if mirrored is not None:
        assert swap_sides(mirrored) == phrase
        assert len(mirrored.split()) == len(phrase.split())


def test_flipped_samples_show_the_object_of_their_expression(scenes_root: Path) -> None:
    """Image, mask and expression are flipped together, and equally in any worker, resumed run
    and epoch."""
    config = quick_config(1, ("data.image_size", "112")).data  # the scenes' own size, so that nothing is resampled
    flip = config.model_copy(update={"augmentations": {"flip": 0.5}})
    references = load_references(scenes_root, "scenes").split("train")
    tokenizer = tokenizer_of(quick_config(1).model.text)
    plain, mirrored = (TrainingSamples(references, data, tokenizer, 3) for data in (config, flip))
    kinds = set()
    for index in range(3 * len(plain)):
        before, after, again = plain[index], mirrored[index], mirrored[index]
        phrase = plain.draw(index).text
        other = swap_sides(phrase) if mirrored.draw_augmentations(index) else None
        assert torch.equal(after.image, again.image)
        assert torch.equal(after.tokens, again.tokens)
        assert torch.equal(after.tokens, tokenizer([phrase if other is None else other], config.word_length)[0])
        if other is None:
            assert torch.equal(after.image, before.image)
            assert torch.equal(after.mask, before.mask)
        else:
            assert torch.equal(after.image, before.image.flip(-1))
            assert torch.equal(after.mask, before.mask.flip(-1))
        kinds.add((index // len(plain), other is not None))
    assert len(kinds) == 6, "in each epoch some are mirrored and some are not"
    epochs = [
        [len(mirrored.draw_augmentations(epoch * len(plain) + at)) for at in range(len(plain))] for epoch in (0, 1)
    ]
    assert epochs[0] != epochs[1], "another epoch draws anew"


def test_training_flips_samples(scenes_root: Path, tmp_path: Path) -> None:
    """Training uses the flip when the field is on."""
    for name, chosen in (("plain", "{}"), ("mirrored", '{"flip": 0.5}')):
        settings = ("data.augmentations", chosen), ("train.log_every", "1")
        run_training(quick_config(2, *settings), scenes_root, tmp_path / name)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("plain", "mirrored")
    ]
    assert losses[0] != losses[1]
