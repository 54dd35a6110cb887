"""Exactly the adapters and the head are trained."""

import copy

import pytest
import torch
from torch import nn

from dcris.models.adapters.attach import trained_state
from dcris.models.encoders.blocks import EmptySlot
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import text_to_pixel_loss
from models import images, randomise, tiny_config, tokens_ending_at

TRAINED = (
    "head.",
    "text.blocks.0.mlp_slot.",
    "text.blocks.2.mlp_slot.",
    "vision.blocks.1.mlp_slot.",
    "vision.blocks.3.mlp_slot.",
)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def model() -> ReferringSegmenter:
    network = ReferringSegmenter(tiny_config())
    randomise(network)
    return network


def step(model: ReferringSegmenter, seed: int = 0) -> None:
    """Take one step of Adam over all trained weights, on noise."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    masks = (torch.randn(2, 1, 42, 70, generator=torch.Generator().manual_seed(seed)) > 0).float()
    text_to_pixel_loss(model(images(2, 3, 5), tokens_ending_at((3, 5), 7))[0], masks).backward()
    optimizer.step()


def test_exactly_adapters_and_head_train(model: ReferringSegmenter) -> None:
    """The trained weights are those of the adapters and the head."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.startswith(TRAINED)}
    for prefix in TRAINED:
        assert any(name.startswith(prefix) for name in trainable), prefix
    assert {name for name in trainable if not name.startswith("head.")} == {
        name for name, _ in model.named_parameters() if "_slot." in name
    }


@pytest.mark.parametrize("part", ["visual_adapter", "text_adapter"])
def test_an_adapter_left_out_leaves_nothing_behind(part: str) -> None:
    """Without one of the adapters, no weight of it is left."""
    names = [name for name, _ in ReferringSegmenter(tiny_config(**{part: None})).named_parameters() if "_slot." in name]
    other = "text." if part == "visual_adapter" else "vision."
    assert names
    assert all(name.startswith(other) for name in names)


def test_a_training_step_moves_what_trains_and_nothing_else(model: ReferringSegmenter) -> None:
    """Frozen weights and buffers are unchanged by a training step."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    step(model)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if not name.startswith(TRAINED)}
    assert not moved & frozen
    # A bias right before batch norm changes nothing, so its gradient is only what rounding leaves
    # of zero.
    idle = {
        f"{name}.0.bias"
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[1], nn.BatchNorm2d)
    }
    assert set(before) - frozen - moved <= idle


def test_frozen_weights_get_no_gradient(model: ReferringSegmenter) -> None:
    """Frozen weights have no gradients, which would need memory."""
    model.train()
    step(model)
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_modes_switch_adapters_and_head_only(model: ReferringSegmenter) -> None:
    """The towers stay in evaluation mode; adapters and head follow the model's mode."""
    assert not model.training, "a fresh network answers; training is asked for"
    for mode in (True, False, True):
        assert model.train(mode) is model
        for name, module in model.named_modules():
            if isinstance(module, EmptySlot):  # an empty slot has no mode
                continue
            trained = not name or f"{name}.".startswith(TRAINED)
            assert module.training == (mode and trained), name
    assert model.eval() is model
    assert not any(module.training for module in model.modules() if not isinstance(module, EmptySlot))


@torch.no_grad()
def test_statistics_move_in_training_and_never_in_evaluation(model: ReferringSegmenter) -> None:
    """Batch statistics change in training only."""
    batch = images(2, 3, 5), tokens_ending_at((3, 5), 7)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    assert all(name.startswith(TRAINED) for name in before)
    model.eval()
    model(*batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.train()
    model(*batch)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_checkpoints_hold_what_was_trained(model: ReferringSegmenter) -> None:
    """A checkpoint has trained weights and statistics, not the towers, and restores the network."""
    state = trained_state(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    statistics = {
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for kind in STATISTICS
    }
    assert set(state) == trainable | statistics
    assert not any(value.requires_grad for value in state.values())

    pixels, tokens = images(2, 3, 5), tokens_ending_at((3, 5), 7)
    model.train()
    step(model)
    expected = model.eval()(pixels, tokens)[0]
    fresh = ReferringSegmenter(tiny_config())
    frozen = {name: value for name, value in model.state_dict().items() if not name.startswith(TRAINED)}
    fresh.load_state_dict({**frozen, **trained_state(model)}, strict=True)
    assert torch.equal(fresh(pixels, tokens)[0], expected)
