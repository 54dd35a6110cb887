"""Options of training beyond the paper: weight averages, area targets, AdamW, shared images,
learning rates of parts, stored features."""

import json
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import TinyRefer
from dcris.checkpoints.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from dcris.config import TrainConfig, parse_config
from dcris.data import dataset
from dcris.data.dataset import TrainingBatches, TrainingSamples, steps_per_epoch, training_loader
from dcris.data.mixing import mix
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.inference.segmenter import Segmenter
from dcris.models.adapters.attach import trained_state
from dcris.models.encoders.vit import VisionState
from dcris.models.segmentation import Output, ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training import features, trainer
from dcris.training.averaging import WeightAverage
from dcris.training.features import FeatureLayout
from dcris.training.losses import resize_masks, text_to_pixel_loss
from dcris.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from dcris.training.stopping import Interrupted
from dcris.training.trainer import Trainer, build_model
from dcris.types import Reference
from dcris.utils import streams
from marks import slow_except
from models import randomise, tiny_config, without_dropout
from runs import CPU, EVERY_STEP, assert_same_run, last_tensors, quick_config, run_training, timeless_log
from test_distributed import IN_DOUBLE_PRECISION, losses, torchrun, train_words
from test_train import stop_at, weights

EMA = EVERY_STEP, ("train.ema", "0.9")


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


def test_options_are_off_by_default() -> None:
    """The paper's recipes must stay the paper's."""
    config = get_recipe("dcris_b")
    assert (config.train.ema, config.train.target, config.train.optimizer) == (None, "nearest", "adam")
    assert (config.train.masking, config.train.lr_factors) == (None, {})
    assert (config.data.phrases_per_image, config.data.cache_features) == (1, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [("train.ema", "0.9")],
        [("train.optimizer", "adamw"), ("train.weight_decay", "0.01")],
        [("train.lr_factors", '{"head": 2, "adapters": 0.5}')],
        [("train.precision", "float16"), ("train.clip_norm", "1")],
        [("train.masking", "{}")],
        [("data.scales", "[0.75, 1.0, 1.25]")],
        [("data.dataset", "mixed-unfiltered:scenes,few"), ("data.weights", "[1, 2]")],
    ],
    ids=lambda settings: settings[-1][0],
)
def test_fifty_steps_with_each_option(table: ReferenceTable, tmp_path: Path, settings: list[tuple[str, str]]) -> None:
    """The loss falls, and the model predicts."""
    config = quick_config(50, EVERY_STEP, ("train.lr", "1e-3"), *settings, recipe="dcris_tiny")
    if config.data.weights:
        few = replace(table, dataset="few", references=table.split("train")[:20])
        table = mix(config.data.dataset, [table, few], filtered=False)
    run_training(config, table, tmp_path)
    found = [line["loss"] for line in timeless_log(tmp_path)]
    assert len(found) == 50
    assert sum(found[-10:]) < 0.8 * sum(found[:10])
    (answer,) = Segmenter.from_pretrained(tmp_path, device="cpu").predict(
        np.zeros((40, 50, 3), np.uint8), "left circle", scores=True
    )
    assert answer.probabilities is not None and np.isfinite(answer.probabilities).all()


# ---- weight averages ---------------------------------------------------------------------------


def test_average_by_definition() -> None:
    """Weights are averaged with the decay's warm-up, batch norm statistics are copied, and the
    exchange with the model is exact."""
    model = ReferringSegmenter(tiny_config())
    randomise(model, 0)
    average = WeightAverage(model, 0.3)
    expected = {name: value.clone().double() for name, value in trained_state(model).items()}
    parameters = {name for name, _ in model.named_parameters()}
    for step in range(5):
        randomise(model, step + 1)
        average.update(step)
        for name, value in trained_state(model).items():
            decay = min(0.3, (1 + step) / (10 + step)) if name in parameters else 0.0
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert any(name.endswith("running_var") for name in average.values)
    for name, value in average.values.items():
        assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name
    current, averages = ({n: v.clone() for n, v in state.items()} for state in (trained_state(model), average.values))
    with average.applied():
        assert all(torch.equal(value, averages[name]) for name, value in trained_state(model).items())
    assert all(torch.equal(value, current[name]) for name, value in trained_state(model).items())
    assert all(torch.equal(value, averages[name]) for name, value in average.values.items())


def test_averages_do_not_change_training(table: ReferenceTable, tmp_path: Path) -> None:
    """The losses are those of a run without averages; the checkpoint has both kinds of weights, and
    loading it, and the trainer's model at the end, give the averages."""
    run_training(quick_config(4, EVERY_STEP), table, tmp_path / "plain")
    config = quick_config(4, *EMA)
    model, tokenizer = build_model(config), tokenizer_of(config.model.text)
    Trainer(model, config, table, tokenizer, tmp_path / "ema", device=CPU, log=len).run()
    assert timeless_log(tmp_path / "plain") == timeless_log(tmp_path / "ema")
    plain, averages = last_tensors(tmp_path / "plain"), last_tensors(tmp_path / "ema")
    stored = last_tensors(tmp_path / "ema", "optimizer.safetensors")
    assert all(torch.equal(stored[f"weights.{name}"], value) for name, value in plain.items())
    changed = [name for name, value in plain.items() if not torch.equal(value, averages[name])]
    assert changed
    assert not any("running" in name for name in changed)
    loaded, _ = load_checkpoint(tmp_path / "ema")
    for each in (loaded, model):
        assert all(torch.equal(value, averages[name]) for name, value in trained_state(each).items())


@pytest.mark.slow
def test_a_run_with_averages_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """Also after a validation, which exchanges the weights, and with old checkpoints deleted."""
    few = ReferenceTable(table.dataset, table.split_by, table.root, (*table.split("train")[:8], *table.split("val")))
    config = quick_config(6, *EMA, ("data.val_split", "val"), ("train.keep_last", "1"))
    run_training(config, few, tmp_path / "whole")
    for number, step in enumerate((1, 4)):
        with pytest.raises(Interrupted):
            run_training(config, few, tmp_path / "halves", resume=number > 0, log=stop_at(step))
    run_training(config, few, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with train\.ema = 0\.9, not null"):
        run_training(quick_config(6, EVERY_STEP, ("data.val_split", "val")), few, tmp_path / "halves", resume=True)


def test_averages_are_validated(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During validation the model has the weights of the checkpoint that gets the score."""
    seen = []

    def compare(self: Trainer) -> dict[str, float]:
        assert self.last is not None
        stored, _ = load_checkpoint(self.last.path)
        ours = trained_state(self.model)
        seen.append(all(torch.equal(value, ours[name]) for name, value in trained_state(stored).items()))
        return {"miou": 50.0 - len(seen)}

    monkeypatch.setattr(Trainer, "compute_scores", compare)
    few = ReferenceTable(table.dataset, table.split_by, table.root, table.split("train")[:4])
    run_training(quick_config(3, *EMA, ("data.val_split", "train"), ("train.keep_last", "1")), few, tmp_path / "run")
    assert seen == [True] * 3
    assert find_checkpoint(tmp_path / "run").name == "step-00000001"
    assert len(list_checkpoints(tmp_path / "run")) == 2


def test_a_run_starts_from_averages(table: ReferenceTable, tmp_path: Path) -> None:
    """`train.start` uses what the checkpoint offers for prediction."""
    run_training(quick_config(3, *EMA), table, tmp_path / "first")
    start = ("train.start", json.dumps(str(tmp_path / "first")))
    run_training(quick_config(1, *EMA, start, ("train.lr", "1e-30")), table, tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(value, second[name], atol=1e-20) for name, value in first.items())


@pytest.mark.slow
def test_averages_of_several_processes(scenes_root: Path, tmp_path: Path) -> None:
    """Resuming on two processes is exact, and the averages are those of one process up to
    rounding."""
    for name, counts in (("one", (1,)), ("two", (2,)), ("split", (2, 2))):
        for number, count in enumerate(counts, 1):
            words = "--train.ema", "0.9", "--train.schedule", "step", "--resume"
            done = torchrun(count, *train_words(scenes_root, tmp_path / name, 4 * number // len(counts), *words))
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "split") == losses(tmp_path / "two")
    one, two, split = (last_tensors(tmp_path / name) for name in ("one", "two", "split"))
    assert all(torch.equal(value, split[name]) for name, value in two.items())
    assert all(torch.allclose(value, two[name], rtol=1e-3, atol=1e-4) for name, value in one.items())


# ---- targets -----------------------------------------------------------------------------------


def test_targets_on_the_grid() -> None:
    """Nearest takes the first pixel of a cell, area the mean; the losses use what they get."""
    masks = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]])[None, None]
    assert resize_masks(masks, (2, 2)).tolist() == [[[[1, 0], [1, 1]]]]
    area = resize_masks(masks, (2, 2), "area")
    assert area.tolist() == [[[[0.25, 0.25], [1, 0.75]]]]
    assert resize_masks(masks, (4, 4), "area") is masks
    logits = torch.randn(1, 1, 2, 2)
    assert torch.equal(text_to_pixel_loss(logits, masks), text_to_pixel_loss(logits, resize_masks(masks, (2, 2))))
    by_hand = -(area * logits.sigmoid().log() + (1 - area) * (-logits).sigmoid().log()).mean()
    assert text_to_pixel_loss(logits, area).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (16, 12)])
def test_aligned_targets_of_plain_masks(size: tuple[int, int]) -> None:
    """Cells without an edge keep their value, on every grid; half a cell is the threshold."""
    for value, expected in ((0.0, 0.0), (1.0, 1.0), (0.5, Cris.threshold)):
        aligned = resize_masks(torch.full((2, 1, 16, 24), value), size, "aligned")
        assert aligned.shape[-2:] == size and aligned.min() >= 0 and aligned.max() <= 1
        assert torch.allclose(aligned, torch.tensor(expected))


def test_aligned_targets_lie_where_the_protocol_reads_them() -> None:
    """A network that reaches its targets gets a much higher IoU with these than with the others."""
    y, x = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    places = ((20, 18, 8), (95, 20, 11), (56, 60, 15), (98, 97, 13))
    masks = torch.stack([((x - a) ** 2 + (y - b) ** 2 < r**2).float() for a, b, r in places])[:, None]
    scores = {}
    for target in ("nearest", "area", "aligned"):
        logits = resize_masks(masks, (32, 32), target).logit(eps=1e-6)
        maps = Cris().probabilities(logits, [Letterbox((112, 112), 112)] * len(masks))
        found = [(probability > Cris.threshold, mask[0] > 0) for probability, mask in zip(maps, masks, strict=True)]
        scores[target] = min(((a & b).sum() / (a | b).sum()).item() for a, b in found)
    assert scores["aligned"] > 0.9 > scores["area"] + 0.05 > scores["nearest"] + 0.1


@pytest.mark.parametrize("target", ["nearest", "aligned"])
def test_the_training_iou_of_a_perfect_network_is_100(target: Any) -> None:
    """The log's IoU compares the target with the logits at the target's own threshold."""
    y, x = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    masks = ((x - 50) ** 2 + (y - 61) ** 2 < 8**2).float()[None, None]
    logits = resize_masks(masks, (32, 32), target).logit(eps=1e-6)
    found = trainer.batch_iou(Output(logits, None, {}), masks, TrainConfig(target=target))
    assert found == pytest.approx(100)


def test_area_targets_train_and_resume(table: ReferenceTable, tmp_path: Path) -> None:
    """The setting changes the loss, in all terms, and is fixed for a run."""
    dice = EVERY_STEP, ("train.losses", '{"dice": 1}')
    area = quick_config(2, *dice, ("train.target", "area"))
    run_training(quick_config(1, *dice), table, tmp_path / "nearest")
    with pytest.raises(Interrupted):
        run_training(area, table, tmp_path / "area", log=stop_at(1))
    plain, other = (timeless_log(tmp_path / name)[0] for name in ("nearest", "area"))
    assert all(plain[name] != other[name] for name in ("loss", "loss_dice"))
    assert plain["loss"] == pytest.approx(other["loss"], rel=0.1)
    with pytest.raises(DcrisError, match=r'started with train\.target = "area", not "nearest"'):
        run_training(quick_config(2, *dice), table, tmp_path / "area", resume=True)
    run_training(area, table, tmp_path / "area", resume=True)


# ---- optimizer ---------------------------------------------------------------------------------


def test_adamw_decays_the_weights() -> None:
    """AdamW takes a share of each weight; Adam adds the decay to the gradient, whose size it then
    divides out."""
    model = ReferringSegmenter(tiny_config())
    weight = model.head.projector.text.weight
    for kind in ("adam", "adamw"):
        optimizer = make_optimizer(model, TrainConfig(optimizer=kind, lr=0.01, weight_decay=0.5))
        before = weight.detach().clone()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        change = weight.detach() - before
        expected = -0.01 * before.sign() if kind == "adam" else -0.01 * 0.5 * before
        assert torch.allclose(change, expected, rtol=1e-2, atol=1e-6), kind


@pytest.mark.parametrize("optimizer", slow_except(("adamw", "muon"), "muon"))
def test_a_run_resumes_exactly_with(optimizer: str, table: ReferenceTable, tmp_path: Path) -> None:
    """Its state is in the checkpoint."""
    config = quick_config(4, EVERY_STEP, ("train.optimizer", optimizer), ("train.weight_decay", "0.1"))
    run_training(config, table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, table, tmp_path / "halves", log=stop_at(2))
    run_training(config, table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


# ---- shared images -----------------------------------------------------------------------------

SHARED = ("data.phrases_per_image", "3")


def runs_of(numbers: list[int]) -> list[int]:
    """Return the lengths of the runs of equal numbers."""
    return [len([*run]) for _, run in groupby(numbers)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.integers(1, 9), st.integers(2, 5), st.integers(0, 50))
def test_an_epoch_has_each_reference_once_beside_others_of_its_image(
    images: list[int], size: int, together: int, first: int
) -> None:
    """Whole batches in an order that depends on seed and epoch only, in as few groups as possible
    of each image."""
    length, per_epoch = len(images), steps_per_epoch(len(images), min(size, len(images)))
    first = min(first, 2 * per_epoch)
    whole = [*TrainingBatches(length, size, 7, 0, 2 * per_epoch, None, images, together)]
    assert {len(batch) for batch in whole} == {min(size, length)}
    assert [*TrainingBatches(length, size, 7, first, 2 * per_epoch, None, images, together)] == whole[first:]
    for epoch in range(2):
        indices = [index for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for index in batch]
        assert {index // length for index in indices} == {epoch}
        assert len(set(indices)) == len(indices)
    order = TrainingBatches(length, size, 7, 0, 1, None, images, together)._order(0).tolist()
    assert sorted(order) == [*range(length)]
    groups = sum(-(-count // together) for count in Counter(images).values())
    # Groups of the same image may meet, so there are at most so many runs.
    assert len(runs_of([images[number] for number in order])) <= groups


def small_images(model: ReferringSegmenter, count: int) -> torch.Tensor:
    """Return noise of four patches by four."""
    side = 4 * model.config.vision.patch
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def shared_samples(table: ReferenceTable, *settings: tuple[str, str]) -> TrainingSamples:
    config = quick_config(1, SHARED, *settings)
    return TrainingSamples(table.split("train"), config.data, tokenizer_of(config.model.text), 0)


def test_a_batch_has_each_image_once(table: ReferenceTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images by index are those of the samples; a group's image is read once. The draws of
    augmentations are those of the image, and mirrored or not decides what is equal."""
    reads: list[Path] = []
    read = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path: reads.append(path) or read(path))
    samples = shared_samples(table, ("data.augmentations", '{"flip": 0.5}'))
    batches = TrainingBatches(len(samples), 9, 0, 0, 3, None, samples.images, 3)
    for indices, batch in zip(batches, training_loader(samples, batches, 0, pin=False), strict=True):
        assert len(reads) <= len(runs_of([samples.images[index % len(samples)] for index in indices])) + 1
        assert batch.image_index is not None
        assert len(batch.images) < len(indices) == len(batch.tokens)
        expected = torch.stack([samples[index].image for index in indices])
        assert torch.equal(batch.images[batch.image_index], expected)
        reads.clear()
    same = [number for number, image in enumerate(samples.images) if image == samples.images[0]]
    assert len(same) > 1
    for epoch in range(9):
        drawn = [[name for name, _ in samples.draw_augmentations(epoch * len(samples) + number)] for number in same]
        assert all(names == drawn[0] for names in drawn)


@pytest.mark.parametrize(
    "recipe",
    slow_except(
        ["dcris_tiny", "lora_tiny", "etris_tiny", "barleria_tiny", "dcris_photos"], "dcris_tiny", "barleria_tiny"
    ),
)
def test_sharing_changes_neither_logits_nor_gradients(recipe: str) -> None:
    """Up to rounding, wherever a method reads the text, also if weights before that are trained."""
    model = without_dropout(ReferringSegmenter(get_recipe(recipe).model)).double()
    randomise(model)
    pixels, index = small_images(model, 2).double(), torch.tensor([0, 1, 0, 0])
    tokens = torch.randint(1, 99, (4, 14))
    found = []
    for arguments in ((pixels, tokens, index), (pixels[index], tokens)):
        logits, _, auxiliary = model.train()(*arguments)
        gradients = torch.autograd.grad(
            logits.square().mean() + sum(auxiliary.values()),
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            allow_unused=True,
        )
        found.append([logits, *(gradient for gradient in gradients if gradient is not None)])
    assert all(torch.allclose(one, other, rtol=1e-6, atol=1e-9) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_a_run_with_shared_images_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """With passes that cut groups, augmentations that depend on the expression, and workers."""
    settings = SHARED, EVERY_STEP, ("train.micro_batch", "2"), ("data.augmentations", '{"flip": 0.5}')
    run_training(quick_config(4, *settings), table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(quick_config(4, *settings), table, tmp_path / "halves", log=stop_at(2))
    run_training(quick_config(4, *settings, ("data.workers", "1")), table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
def test_shared_images_on_several_processes(scenes_root: Path, tmp_path: Path) -> None:
    """Each rank shares what it has; the samples are those of one process."""
    words = "--data.phrases_per_image", "3"
    for count in (1, 3):
        done = torchrun(count, *train_words(scenes_root, tmp_path / str(count), 6, *words), program=IN_DOUBLE_PRECISION)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=4e-7)


# ---- learning rates of parts -------------------------------------------------------------------

FACTORS = ("train.lr_factors", '{"head": 3, "adapters": 0.5}')


def moves(table: ReferenceTable, run: Path, *settings: tuple[str, str]) -> dict[str, float]:
    """Return how far the first step of Adam moved the weights of each part at most: it moves each
    weight by its learning rate, whatever the gradient."""
    config = quick_config(1, ("train.lr", "1e-4"), *settings, recipe="full_tiny")
    before = trained_state(build_model(config))
    run_training(config, table, run)
    after, found = last_tensors(run), dict.fromkeys(("head", "towers"), 0.0)
    for name, value in before.items():
        if value.is_floating_point() and "running" not in name:
            part = "head" if name.startswith("head.") else "towers"
            found[part] = max(found[part], (after[name] - value).abs().max().item())
    return found


@pytest.mark.parametrize(
    ("factors", "head", "towers"),
    [
        (None, 1, 0.1),
        ('{"towers": 0.01, "head": 3}', 3, 0.01),
        pytest.param("{}", 1, 1, marks=pytest.mark.slow),
        pytest.param('{"head": 0.5}', 0.5, 1, marks=pytest.mark.slow),
    ],
)
def test_each_part_learns_at_its_own_rate(
    table: ReferenceTable, tmp_path: Path, factors: str | None, head: float, towers: float
) -> None:
    """The recipe of full tuning has a factor of 0.1 for the towers."""
    found = moves(table, tmp_path, *([("train.lr_factors", factors)] if factors else []))
    assert found == pytest.approx({"head": 1e-4 * head, "towers": 1e-4 * towers}, rel=0.02)


def test_the_schedule_applies_to_all_parts() -> None:
    """Every weight is in one group; warm-up and cosine multiply the factors."""
    config = quick_config(10, FACTORS, ("train.warmup_steps", "4"))
    model = build_model(config)
    optimizer = make_optimizer(model, config.train)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    counts = model.count_weights()
    assert sizes == [counts["adapters"], counts["head"]]
    for step in range(10):
        lr = learning_rate(config.train, step, 100, 10)
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * 0.5, lr * 3])


@pytest.mark.slow
def test_a_run_with_rates_of_parts_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """The moments of the optimizer go to their own weights again."""
    config = quick_config(4, FACTORS, *EMA)
    run_training(config, table, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(config, table, tmp_path / "halves", log=stop_at(2))
    run_training(config, table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    with pytest.raises(DcrisError, match=r"started with train\.lr_factors"):
        run_training(quick_config(4, *EMA), table, tmp_path / "halves", resume=True)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ('{"neck": 2}', "train.lr_factors.neck: input should be 'adapters', 'head' or 'towers'"),
        ('{"head": 0}', "train.lr_factors.head: input should be greater than 0"),
        ('{"head": -1}', "train.lr_factors.head: input should be greater than 0"),
        ('{"head": true}', None),
        ("0.1", "train.lr_factors: input should be a valid dictionary"),
    ],
)
def test_wrong_factors_are_refused(factors: str, message: str | None) -> None:
    """One sentence names the part."""
    if message is None:
        assert quick_config(1, ("train.lr_factors", factors)).train.lr_factors == {"head": 1.0}
        return
    with pytest.raises(DcrisError, match=re.escape(message)):
        quick_config(1, ("train.lr_factors", factors))


def test_a_factor_without_weights_is_refused(table: ReferenceTable, tmp_path: Path) -> None:
    """A factor that changes nothing is a mistake, and nothing is written."""
    with pytest.raises(DcrisError, match=r"factor for the towers, but nothing is trained there .* adapters and head"):
        run_training(quick_config(1, ("train.lr_factors", '{"towers": 1}')), table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_older_files_have_a_rate_for_the_towers() -> None:
    """`tower_lr` of a run's config.json means what it meant."""
    for value, factors in ((1.0, {}), (0.1, {"towers": 0.1})):
        tree = get_recipe("full_tiny").model_dump(mode="json")
        del tree["train"]["lr_factors"]
        tree["train"]["tower_lr"] = value
        assert parse_config(tree, "config.json").train.lr_factors == factors
    with pytest.raises(DcrisError, match=r"unknown setting train\.tower_lr"):
        quick_config(1, ("train.tower_lr", "0.1"))


# ---- stored features ---------------------------------------------------------------------------

CACHED = ("data.cache_features", "2")
FLIP = ("data.augmentations", '{"flip": 0.5}')


def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run that would store features read and encode its images, with the same draws."""
    monkeypatch.setattr(Trainer, "_cache_features", lambda self: None)


@pytest.mark.parametrize("recipe", slow_except(["dcris_tiny", "etris_tiny", "fixed_tiny"], "etris_tiny"))
def test_stored_features_do_not_change_the_run(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """In float32 all logged values and weights are equal bit for bit, over both variants of an
    image, also of expressions without a target; no image is read during training; and nothing is
    left at the end."""

    def first_absent(reference: Reference) -> Reference:
        first, *others = reference.expressions
        return replace(reference, expressions=(replace(first, exists=False), *others))

    references = tuple(map(first_absent, table.split("train")[:8]))
    few = ReferenceTable(table.dataset, table.split_by, table.root, references)
    config = quick_config(5, CACHED, FLIP, EVERY_STEP, ("train.precision", "float32"), recipe=recipe)

    def no_image(self: TrainingSamples, path: Path) -> None:
        raise AssertionError(f"{path} is read")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSamples, "_read_image", no_image)
        run_training(config, few, tmp_path / "cached")
    assert not (tmp_path / "cached/features").exists()
    uncached(monkeypatch)
    run_training(config, few, tmp_path / "plain")
    assert_same_run(tmp_path / "cached", tmp_path / "plain")


def test_what_precedes_the_steps_shows_progress(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storing features and validation may take hours."""
    monkeypatch.setattr(streams, "_SECONDS_BETWEEN_LINES", 0)
    lines: list[str] = []
    run_training(quick_config(1, CACHED, ("data.val_split", "val")), table, tmp_path / "run", log=lines.append)
    images = len({reference.image_path for reference in table.split("train")})
    assert sum(f" of {images} images, " in line and line.endswith(" left") for line in lines) == images
    assert f"{images} of {images} images, 00:00 left" in lines
    expressions = [line for line in lines if " validation expressions, " in line]
    assert expressions[-1] == f"{len(expressions)} of {len(expressions)} validation expressions, 00:00 left"


def test_a_run_with_stored_features_resumes_exactly(table: ReferenceTable, tmp_path: Path) -> None:
    """With the files of the interrupted run, with files that are gone, and with damaged ones; also
    with shared images and workers."""
    config = quick_config(5, CACHED, FLIP, SHARED, EVERY_STEP)
    run_training(config, table, tmp_path / "whole")
    stored = tmp_path / "halves/features"
    lines: list[str] = []
    for step, damage in enumerate((None, None, shutil.rmtree, lambda at: (at / "0.json").write_text("{}")), 1):
        if damage:
            damage(stored)
        workers = ("data.workers", str(step % 2))
        with pytest.raises(Interrupted):
            resumed = quick_config(5, CACHED, FLIP, SHARED, EVERY_STEP, workers)
            stop = stop_at(step)
            log = lambda line, stop=stop: (lines.append(line), stop(line))  # noqa: E731
            run_training(resumed, table, tmp_path / "halves", resume=True, log=log)
        assert (stored / "0.json").exists()
    run_training(config, table, tmp_path / "halves", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    assert not stored.exists()
    assert sum(line.startswith("storing the features") for line in lines) == 3


def test_half_precision_is_close(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, features are stored as float16; losses change by bfloat16's own rounding, which
    other batch shapes cause too: about 1% in a tiny model."""
    config = quick_config(4, CACHED, EVERY_STEP, ("train.precision", "bfloat16"), ("train.lr", "1e-5"))
    run_training(config, table, tmp_path / "cached")
    uncached(monkeypatch)
    run_training(config, table, tmp_path / "plain")
    found, expected = ([line["loss"] for line in timeless_log(tmp_path / name)] for name in ("cached", "plain"))
    assert found == pytest.approx(expected, rel=4e-2)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "recipe",
    slow_except(["dcris_tiny", "fixed_tiny", "etris_tiny", "dcris_photos"], "dcris_tiny", "fixed_tiny", "etris_tiny"),
)
def test_layout_of_features(recipe: str, half: bool) -> None:
    """All tensors of a state come back, in the precision they are stored in; values beyond
    float16 are an error."""
    model = ReferringSegmenter(get_recipe(recipe).model)
    randomise(model)
    with torch.no_grad():
        state = model.encode_images(small_images(model, 3))
    layout = FeatureLayout(state.select(torch.tensor([0])), half)
    records = layout.pack(state)
    assert records.shape == (3, layout.bytes)
    again = layout.unpack(records)
    assert (again.grid, again.step) == (state.grid, state.step)
    for one, other in zip(again.tensors(), state.tensors(), strict=True):
        assert torch.equal(one, other.half().float() if half else other)
        assert one.stride() == other.stride()
    if half:
        with pytest.raises(DcrisError, match="exceed the range of float16"):
            layout.pack(state.with_tensors([1e6 * tensor for tensor in state.tensors()]))


@pytest.mark.parametrize(
    ("recipe", "trains"),
    [(recipe, False) for recipe in ("dcris_tiny", "etris_tiny", "fixed_tiny")]
    + [(recipe, True) for recipe in ("lora_tiny", "bitfit_tiny", "full_tiny", "barleria_tiny", "adaptformer_tiny")],
)
def test_trained_weights_before_the_text(table: ReferenceTable, tmp_path: Path, recipe: str, trains: bool) -> None:
    """Where the part changes in training, storing its result is refused before anything is
    written."""
    config = quick_config(1, CACHED, recipe=recipe)
    assert ReferringSegmenter(config.model).trains_before_text() == trains
    if trains:
        with pytest.raises(DcrisError, match="needs an image encoder without trained weights before the text"):
            run_training(config, table, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_features_need_room_on_the_disk(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are known before the first is written, and the estimate is an upper bound."""
    lines: list[str] = []
    sizes: list[int] = []
    remove = trainer.remove_directory

    def measure(folder: Path) -> None:
        sizes.append(sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json"))
        remove(folder)

    monkeypatch.setattr(trainer, "remove_directory", measure)
    config = quick_config(1, CACHED, ("data.augmentations", '{"flip": 0.5, "light": 0.5, "zoom": 0.8}'))
    run_training(config, table, tmp_path / "run", log=lines.append)
    (line,) = (line for line in lines if line.startswith("storing the features of up to"))
    estimate = float(re.search(r"([\d.]+) GB", line)[1]) * 1e9  # type: ignore[index]
    assert 0.2 * estimate < sizes[0] < estimate + 1e7
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DcrisError, match=r"features of the training images need 0\.\d GB in .*features, where 0\.0 GB"):
        run_training(config, table, tmp_path / "other")
    assert not (tmp_path / "other/features").exists()
    # What an interrupted run left there is overwritten, so its room counts.
    left = tmp_path / "other/features/0.features"
    left.parent.mkdir()
    with left.open("wb") as file:
        file.truncate(10**10)
    run_training(config, table, tmp_path / "other", resume=True)


def test_unreadable_images_with_stored_features(tiny_refer: TinyRefer, tmp_path: Path) -> None:
    """They stop the run, or are skipped and counted, as without stored features."""
    tiny_refer.references[1]["split"] = tiny_refer.references[0]["split"] = "train"
    root = tiny_refer.write()
    table = load_references(root, tiny_refer.dataset)
    (tiny_refer.image_folder / "2.png").write_bytes(b"")
    settings = CACHED, ("data.val_split", "null"), ("data.dataset", tiny_refer.dataset)
    with pytest.raises(DcrisError, match=r"cannot read .*2\.png"):
        run_training(quick_config(2, *settings), table, tmp_path / "stop")
    lines: list[str] = []
    skip = ("data.on_bad_image", "skip")
    run_training(quick_config(2, *settings, skip), table, tmp_path / "skip", log=lines.append)
    assert sum("2.png" in line for line in lines) == 1
    assert lines[-1].startswith("1 of 3 references could not be read")


def test_a_stop_while_features_are_stored(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends it with a checkpoint of step 0, and the run then continues."""
    pack = FeatureLayout.pack

    def interrupted(self: FeatureLayout, state: VisionState) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        return pack(self, state)

    config = quick_config(2, CACHED, EVERY_STEP)
    monkeypatch.setattr(FeatureLayout, "pack", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 0"):
        run_training(config, table, tmp_path / "run")
    monkeypatch.undo()
    run_training(config, table, tmp_path / "run", resume=True)
    run_training(config, table, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_stored_features_on_several_processes(scenes_root: Path, tmp_path: Path) -> None:
    """Each rank stores its share of the images and reads those of the others."""
    for count, words in ((1, ()), (3, ("--data.cache_features", "1", "--data.workers", "1"))):
        done = torchrun(count, *train_words(scenes_root, tmp_path / str(count), 6, *words), program=IN_DOUBLE_PRECISION)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=4e-7)
    assert not (tmp_path / "3/features").exists()
