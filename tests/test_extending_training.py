"""A new loss or augmentation takes one function and one entry, and is then a setting like the
others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcris.cli import main
from dcris.data.augmentations import AUGMENTATIONS
from dcris.data.dataset import TrainingSamples
from dcris.data.readers.load import load_references
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.training.loggers import read_log
from dcris.training.losses import LOSSES
from dcris.training.stopping import Interrupted
from runs import EVERY_STEP, assert_same_run, quick_config, run_training
from test_train import stop_at


def mean_logit(logits: Tensor, masks: Tensor) -> Tensor:
    """A toy loss: pulls all logits to zero."""
    assert masks.shape == logits.shape and masks.max() <= 1
    return logits.float().square().mean()


def noise(
    image: np.ndarray, mask: np.ndarray, phrase: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str]:
    """A toy augmentation: random pixels, no mask, another expression."""
    assert image.shape[:2] == mask.shape
    return generator.integers(0, 256, image.shape, np.uint8), np.zeros_like(mask), f"not {phrase}"


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry that each needs."""
    monkeypatch.setitem(LOSSES, "mean_logit", mean_logit)
    monkeypatch.setitem(AUGMENTATIONS, "noise", noise)


def test_a_loss_is_added_and_logged(scenes_root: Path, tmp_path: Path) -> None:
    """The logged loss is equation 6 plus the terms, each times its weight, also over several
    passes."""
    passes = ("train.micro_batch", "3"), EVERY_STEP
    run_training(quick_config(1, *passes), scenes_root, tmp_path / "plain")
    losses = ("train.losses", '{"mean_logit": 3, "dice": 0.5}')
    run_training(quick_config(1, *passes, losses), scenes_root, tmp_path / "more")
    (plain,), (more,) = read_log(tmp_path / "plain"), read_log(tmp_path / "more")
    assert list(more)[:6] == ["step", "epoch", "loss", "loss_mean_logit", "loss_dice", "iou"]
    assert more["loss"] == pytest.approx(plain["loss"] + more["loss_mean_logit"] + more["loss_dice"], rel=1e-5)
    assert more["loss_mean_logit"] > 0
    assert 0 < more["loss_dice"] < 0.5


def test_the_gradient_is_that_of_the_sum(scenes_root: Path, tmp_path: Path) -> None:
    """A heavy loss changes the weights towards its own minimum: all logits at zero, where equation
    6 is log 2."""
    settings = EVERY_STEP, ("train.lr", "5e-4"), ("model.head.bias", "-3")
    run_training(quick_config(20, *settings, ("train.losses", '{"mean_logit": 10}')), scenes_root, tmp_path / "run")
    values = [line["loss_mean_logit"] for line in read_log(tmp_path / "run")]
    assert values[0] > 50
    assert np.mean(values[-5:]) < 0.6 * values[0], values[-5:]


def test_an_augmentation_changes_its_share_of_the_samples(scenes_root: Path) -> None:
    """Image, mask and tokens are those that the function returns, and the same again for the same
    seed."""
    config = quick_config(1, ("data.augmentations", '{"noise": 0.25}'))
    references, tokenizer = load_references(scenes_root, "scenes").split("train"), tokenizer_of(config.model.text)
    plain = TrainingSamples(references, quick_config(1).data, tokenizer, 0)
    augmented, again = (TrainingSamples(references, config.data, tokenizer, 0) for _ in range(2))
    changed = 0
    for index in range(400):
        drawn = [name for name, _ in augmented.draw_augmentations(index)]
        changed += len(drawn)
        if index < 40:
            before, sample = plain[index], augmented[index]
            assert torch.equal(sample.image, again[index].image)
            assert torch.equal(sample.image, before.image) == (not drawn)
            assert sample.mask.any() == (not drawn)
            words = plain.draw(index).text if not drawn else f"not {plain.draw(index).text}"
            assert torch.equal(sample.tokens, tokenizer([words], config.data.word_length)[0])
    assert 60 < changed < 140


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (
            lambda image, mask: (image / 255, mask, "cup"),
            r"not float64 \[112, 112, 3\] up to \S+, uint8 .* up to 1, str",
        ),
        (
            lambda image, mask: (image, mask * 255, "cup"),
            r"a mask \[H, W\] of 0 and 1 .* uint8 \[112, 112\] up to 255, str",
        ),
        (lambda image, mask: (image[:50], mask, "cup"), r"uint8 \[50, 112, 3\]"),
        (lambda image, mask: (image[:0], mask[:0], "cup"), r"uint8 \[0, 112, 3\], uint8 \[0, 112\], str"),
        (lambda image, mask: (image, mask), r"uint8 \[112, 112\] up to 1$"),
        (lambda image, mask: (image, mask, np.array(["cup"])), r"up to 1, <U3 \[1\]$"),
        (lambda image, mask: None, "not NoneType$"),
    ],
)
def test_what_an_augmentation_must_return(
    returned: Any, words: str, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other arrays are refused, above all those that would be trained on as black or empty."""
    monkeypatch.setitem(AUGMENTATIONS, "wrong", lambda image, mask, phrase, generator: returned(image, mask))
    config = quick_config(1, ("data.augmentations", '{"wrong": 1.0}'))
    with pytest.raises(DcrisError, match=f"the augmentation wrong must return .*{words}"):
        run_training(config, scenes_root, tmp_path / "run")


def test_one_augmentation_does_not_change_the_draws_of_another(scenes_root: Path) -> None:
    """Otherwise comparing two runs compares other samples, too."""
    references = load_references(scenes_root, "scenes").split("train")
    drawn = []
    for augmentations in ('{"flip": 0.5}', '{"noise": 0.5, "flip": 0.5}'):
        config = quick_config(1, ("data.augmentations", augmentations))
        samples = TrainingSamples(references, config.data, tokenizer_of(config.model.text), 0)
        drawn.append(["flip" in dict(samples.draw_augmentations(index)) for index in range(50)])
    assert drawn[0] == drawn[1]
    assert 0 < sum(drawn[0]) < 50


def test_a_run_with_both_resumes_exactly(scenes_root: Path, tmp_path: Path) -> None:
    """Bit for bit, as every run."""
    config = quick_config(
        4, EVERY_STEP, ("train.losses", '{"mean_logit": 1}'), ("data.augmentations", '{"noise": 0.5}')
    )
    run_training(config, scenes_root, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, scenes_root, tmp_path / "halves", log=stop_at(2))
    run_training(config, scenes_root, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with data\.augmentations\.noise = 0\.5, not null"):
        run_training(quick_config(4, EVERY_STEP), scenes_root, tmp_path / "halves", resume=True)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        pytest.param(
            lambda logits, masks: (logits - masks).square().mean((1, 2, 3)), "a tensor [4]", id="one a sample"
        ),
        pytest.param(lambda logits, masks: logits.detach().square().mean(), "a constant", id="without a gradient"),
        pytest.param(lambda logits, masks: logits.square().mean().item(), "of type float", id="a number"),
        pytest.param(lambda logits, masks: None, "None", id="nothing"),
    ],
)
def test_a_loss_that_cannot_be_added_is_refused(
    loss: Any,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    scenes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a gradient it would be logged and train nothing; torch refuses the others."""
    monkeypatch.setitem(LOSSES, "own", loss)
    command = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, '--train.losses={"own": 0.5}', "--train.batch_size=4"]) == 2
    said = capsys.readouterr().err
    assert "the loss own must be a tensor without dimensions" in said
    assert said.endswith(f"not {found}\n") and "Traceback" not in said


def test_a_loss_may_be_zero_without_a_gradient(
    monkeypatch: pytest.MonkeyPatch, scenes_root: Path, tmp_path: Path
) -> None:
    """As for a batch without what it is about."""
    monkeypatch.setitem(LOSSES, "own", lambda logits, masks: torch.zeros(()))
    run_training(quick_config(1, EVERY_STEP, ("train.losses", '{"own": 1}')), scenes_root, tmp_path / "run")
    assert read_log(tmp_path / "run")[0]["loss_own"] == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('train.losses={"dcie": 1}', "train.losses: unknown name 'dcie'; use one of dice, mean_logit"),
        ('train.losses={"dice": 0}', "train.losses.dice: input should be greater than 0"),
        (
            'data.augmentations={"filp": 1}',
            "data.augmentations: unknown name 'filp'; use one of flip, light, zoom, noise",
        ),
        ('data.augmentations={"flip": 2}', "data.augmentations.flip: input should be less than or equal to 1"),
    ],
)
def test_a_misspelt_name_is_refused(
    setting: str, words: str, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written, with the names that exist."""
    command = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "run"), f"--{setting}"]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
