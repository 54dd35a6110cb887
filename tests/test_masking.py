"""Masking with distillation (`train.masking`), as in MaskRIS."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dcris.config import MaskingConfig, TrainConfig
from dcris.data.dataset import TrainingBatches, TrainingSamples, normalise, training_loader
from dcris.data.masking import hidden_patches, hide, mask_tokens
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import BertTokenizer, ClipTokenizer, TinyTokenizer, Tokenizer, tokenizer_of
from dcris.errors import DcrisError
from dcris.models.segmentation import Output
from dcris.training.loggers import read_log
from dcris.training.losses import masked_losses, resize_masks
from dcris.training.stopping import Interrupted
from dcris.training.trainer import build_model
from marks import slow_except
from runs import EVERY_STEP, assert_same_run, last_tensors, quick_config, run_training
from test_distributed import IN_DOUBLE_PRECISION, losses, torchrun, train_words
from test_train import stop_at

MASKING = ("train.masking", "{}")
SHARED = ("data.phrases_per_image", "3")


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


def samples_of(table: ReferenceTable, *settings: tuple[str, str]) -> TrainingSamples:
    config = quick_config(1, MASKING, *settings)
    return TrainingSamples(table.split("train"), config.data, tokenizer_of(config.model.text), 0, config.train.masking)


# ---- what is masked ------------------------------------------------------------------------------


@given(st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 99))
def test_the_share_of_hidden_patches_is_exact(grid: int, share: float, seed: int) -> None:
    """As in the published code, the number of visible patches is rounded down."""
    config = MaskingConfig(grid=grid, image=share)
    hidden = hidden_patches(config, np.random.default_rng(seed))
    assert hidden.shape == (grid, grid)
    assert grid * grid - int(hidden.sum()) == int(grid * grid * (1 - share))
    assert torch.equal(hidden, hidden_patches(config, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("side", "grid"), slow_except([(448, 14), (56, 14), (70, 4), (9, 14)], (56, 14), (70, 4), (9, 14))
)
def test_hidden_patches_have_the_mean_colour(side: int, grid: int) -> None:
    """0 is what normalisation makes of the mean. At 448 pixels the patches are the 32 pixels of the
    published code; a grid need not divide the side."""
    source = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, side, side, generator=source) + 1
    hidden = torch.rand(2, grid, grid, generator=source) < 0.75
    found = hide(images, hidden)
    for place in range(2):
        for row in range(0, side, 3):
            for column in range(0, side, 3):
                expected = images[place, :, row, column]
                if hidden[place, row * grid // side, column * grid // side]:
                    expected = torch.zeros(3)
                assert torch.equal(found[place, :, row, column], expected)


@pytest.mark.parametrize(
    "tokenizer", [TinyTokenizer.embedded(), BertTokenizer(), ClipTokenizer()], ids=lambda t: t.name
)
def test_words_are_masked_by_the_published_shares(tokenizer: Tokenizer) -> None:
    """15% of the tokens are chosen: 80% of them become the mask token, 10% a random one. Start, end
    and padding stay, and none of them gets into the phrase, or the text tower would read another
    length."""
    phrase = "red star left of the blue circle behind a small green square at the top"
    (row,) = tokenizer([phrase], 20)
    end = int((row == tokenizer.end_token).int().argmax())
    words = end - 1
    generator = np.random.default_rng(0)
    rows = torch.stack([mask_tokens(row, MaskingConfig(), tokenizer, generator) for _ in range(4000)])
    assert (rows[:, 0] == row[0]).all() and (rows[:, end:] == row[end:]).all()
    inside = rows[:, 1:end]
    assert not torch.isin(inside, torch.tensor([0, tokenizer.end_token])).any()
    changed, masked = inside != row[1:end], inside == tokenizer.mask_token
    count = 4000 * words
    assert masked.sum().item() / count == pytest.approx(0.12, abs=0.006)
    assert (changed & ~masked).sum().item() / count == pytest.approx(0.015, abs=0.003)
    assert len(inside[changed & ~masked].unique()) > 20
    assert torch.equal(mask_tokens(row, MaskingConfig(words=0), tokenizer, generator), row)


def test_a_masked_word_is_bert_s_mask_token_or_the_start_token() -> None:
    """CLIP and the tiny towers have no [MASK]."""
    bert, tiny = BertTokenizer(), TinyTokenizer.embedded()
    assert bert.mask_token == 103
    for tokenizer in (tiny, ClipTokenizer()):
        assert tokenizer.mask_token == tokenizer(["a"], 4)[0, 0] != tokenizer.end_token


def test_draws_depend_on_seed_epoch_and_reference(table: ReferenceTable) -> None:
    """References of a shared image hide the same patches, with words of their own, so that a batch
    has each masked image once; another epoch draws anew."""
    alone, shared = samples_of(table), samples_of(table, SHARED)
    same = [number for number, image in enumerate(shared.images) if image == shared.images[0]]
    assert len(same) > 1
    for samples, count in ((alone, len(same)), (shared, 1)):
        patterns = set()
        for number in same:
            one, again, later = samples[number], samples[number], samples[number + len(samples)]
            assert one.masked and again.masked and later.masked
            assert torch.equal(one.masked.hidden, again.masked.hidden)
            assert torch.equal(one.masked.tokens, again.masked.tokens)
            assert not torch.equal(one.masked.hidden, later.masked.hidden)
            patterns.add(one.masked.hidden.numpy().tobytes())
        assert len(patterns) == count
    batches = TrainingBatches(len(shared), 9, 0, 0, 2, None, shared.images, 3)
    for indices, batch in zip(batches, training_loader(shared, batches, 1, pin=False), strict=True):
        assert batch.masked is not None and batch.image_index is not None
        assert len(batch.images) == len(batch.masked.hidden) < len(indices) == len(batch.masked.tokens)
        for place, index in enumerate(indices):
            masked = shared[index].masked
            assert torch.equal(batch.masked.tokens[place], masked.tokens)
            assert torch.equal(batch.masked.hidden[batch.image_index[place]], masked.hidden)


# ---- the loss ------------------------------------------------------------------------------------


def test_a_step_is_half_the_sample_and_half_its_masked_copy(table: ReferenceTable, tmp_path: Path) -> None:
    """Compare the logged terms with the definition. Running statistics are those of whole images:
    prediction sees no others."""
    config = quick_config(1, MASKING, EVERY_STEP)
    run_training(config, table, tmp_path / "masked")
    run_training(quick_config(1, EVERY_STEP), table, tmp_path / "plain")
    samples = samples_of(table)
    (indices,) = TrainingBatches(len(samples), 4, 0, 0, 1)
    drawn = [samples[index] for index in indices]
    model = build_model(config).train()
    masks = torch.stack([sample.mask for sample in drawn])[:, None]
    images = normalise(torch.stack([sample.image for sample in drawn]), config.data)
    clean = model(images, torch.stack([sample.tokens for sample in drawn])).logits
    copies = hide(images, torch.stack([sample.masked.hidden for sample in drawn]))
    masked = model(copies, torch.stack([sample.masked.tokens for sample in drawn])).logits
    first = F.binary_cross_entropy_with_logits(clean, resize_masks(masks, clean.shape[-2:]))
    guess = clean.sigmoid()
    second = -(guess * F.logsigmoid(masked) + (1 - guess) * F.logsigmoid(-masked)).mean()
    (line,) = read_log(tmp_path / "masked")
    assert line["loss_masked"] == pytest.approx(second.item() / 2, rel=1e-4)
    assert line["loss"] == pytest.approx((first + second).item() / 2, rel=1e-4)
    ours, plain = last_tensors(tmp_path / "masked"), last_tensors(tmp_path / "plain")
    statistics = [name for name in ours if "running" in name]
    assert statistics
    assert all(torch.equal(ours[name], plain[name]) for name in statistics)
    assert not all(torch.equal(value, plain[name]) for name, value in ours.items())


def test_the_teacher_gets_no_gradient_and_absent_objects_teach_nothing() -> None:
    """Other losses apply to the masked copy, too, with their weights."""
    source = torch.Generator().manual_seed(0)
    clean, masked = (torch.randn(2, 1, 4, 4, generator=source).requires_grad_() for _ in range(2))
    masks = torch.ones(2, 1, 8, 8)
    masks[1] = 0
    settings = TrainConfig(losses={"dice": 0.5})
    aside = {"aside": torch.tensor(3.0, requires_grad=True)}
    plain = masked_losses(Output(masked, None, aside), Output(clean, None, {}), masks, settings)
    assert plain.keys() == {"masked", "aside"}
    plain["masked"].backward()
    assert clean.grad is None
    assert masked.grad is not None and all(each.any() for each in masked.grad)
    masked.grad = None
    presence = torch.zeros(2, requires_grad=True)
    terms = masked_losses(Output(masked, presence, {}), Output(clean, presence, {}), masks, settings)
    terms["masked"].backward()
    assert [bool(each.any()) for each in masked.grad] == [True, False]
    assert presence.grad is None
    alone = masked_losses(Output(masked[:1], None, {}), Output(clean[:1], None, {}), masks[:1], settings)
    assert terms["masked"].item() == pytest.approx(alone["masked"].item() / 2, rel=1e-5)


def test_the_weight_divides_the_loss(table: ReferenceTable, tmp_path: Path) -> None:
    """With nothing masked, the copy is the sample; the weights of the two losses add up to 1."""
    nothing = ("train.masking", '{"image": 0, "words": 0, "weight": 0.25}')
    run_training(quick_config(1, nothing, EVERY_STEP), table, tmp_path / "run")
    run_training(quick_config(1, EVERY_STEP), table, tmp_path / "plain")
    (line,), (plain,) = read_log(tmp_path / "run"), read_log(tmp_path / "plain")
    assert line["loss"] - line["loss_masked"] == pytest.approx(0.75 * plain["loss"], rel=1e-5)
    assert line["iou"] == plain["iou"]


# ---- with other options --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_masking_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """With averages, shared images, passes, clipping, recomputed activations and workers."""
    settings = (MASKING, EVERY_STEP, SHARED, ("train.ema", "0.9"), ("train.micro_batch", "2"), ("train.clip_norm", "1"))
    settings += ("data.augmentations", '{"flip": 0.5}'), ("train.checkpoint_activations", "true")
    run_training(quick_config(4, *settings), table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(quick_config(4, *settings), table, tmp_path / "halves", log=stop_at(2))
    run_training(quick_config(4, *settings, ("data.workers", "1")), table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with train\.masking"):
        run_training(quick_config(4, *settings, ("train.masking", "null")), table, tmp_path / "halves", resume=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"image": 1}', r"train\.masking\.image: input should be less than 1"),
        ('{"words": -0.1}', r"train\.masking\.words: input should be greater than or equal to 0"),
        ('{"weight": 0}', r"train\.masking\.weight: input should be greater than 0"),
        ('{"grid": 0}', r"train\.masking\.grid"),
        ('{"ratio": 0.5}', r"unknown setting train\.masking\.ratio"),
        ("true", r"train\.masking"),
    ],
)
def test_wrong_values_are_refused(value: str, message: str) -> None:
    with pytest.raises(DcrisError, match=message):
        quick_config(1, ("train.masking", value))


def test_stored_features_cannot_be_masked() -> None:
    with pytest.raises(DcrisError, match=r"train\.masking changes the images .* leave one of them off"):
        quick_config(1, MASKING, ("data.cache_features", "1"))


@pytest.mark.slow
def test_masking_on_several_processes(scenes_root: Path, tmp_path: Path) -> None:
    """Two ranks take the steps of one, batch norms included."""
    words = "--train.masking", "{}", "--data.phrases_per_image", "3"
    for count in (1, 2):
        done = torchrun(count, *train_words(scenes_root, tmp_path / str(count), 6, *words), program=IN_DOUBLE_PRECISION)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=4e-7)
