"""The model prepared for prediction: same results, same state dict, nothing stored twice."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dcris.checkpoints.backbones import fingerprint
from dcris.config import ModelConfig, replace
from dcris.models.optimize import CastWeights, cast_frozen, prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from models import MULTIPLIES_BFLOAT16, images, needs_bfloat16, randomise


def model_of(config: ModelConfig) -> ReferringSegmenter:
    model = ReferringSegmenter(config)
    randomise(model)
    return model


def dense_text() -> ModelConfig:
    adapter = {"kind": "dense", "width": 32}
    return replace(get_recipe("dcris_tiny"), {"model.method.text": adapter}).model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    tokens[:, :5] = torch.randint(4, 100, (2, 5))
    return images(2, 4, 3), tokens


@pytest.mark.parametrize(
    "config",
    [get_recipe("dcris_tiny").model, get_recipe("fixed_tiny").model, dense_text()],
    ids=["dcris", "fixed", "dense"],
)
def test_it_answers_as_the_model_does(config: ModelConfig) -> None:
    """The prepared copy gives the same results, and the model is unchanged."""
    model = model_of(config).eval()
    before = fingerprint(model.state_dict())
    ready = prepare_for_prediction(model)
    pixels, tokens = inputs()
    for photographs in (pixels, images(2, 3, 5), pixels):  # what is remembered of a size must not be another's
        with torch.no_grad():
            expected, found = model(photographs, tokens)[0], ready(photographs, tokens)[0]
        assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in ready.modules())
    assert fingerprint(model.state_dict()) == before
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_it_shares_the_towers_and_does_not_train() -> None:
    """The copy shares the towers' weights and is in evaluation mode."""
    model = model_of(get_recipe("dcris_tiny").model)
    ready = prepare_for_prediction(model.train())
    assert ready.vision.blocks[0].mlp.fc1.weight is model.vision.blocks[0].mlp.fc1.weight
    assert model.training and not ready.training
    assert any(weight.requires_grad for weight in model.parameters())


def test_it_is_gone_when_nobody_holds_it() -> None:
    """The copy is freed without the garbage collector, so that validations do not accumulate
    copies.
    """
    ready = prepare_for_prediction(model_of(get_recipe("dcris_tiny").model), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ready(*inputs())[0]
    seen = weakref.ref(ready.vision)
    gc.disable()
    try:
        del ready
        assert seen() is None
    finally:
        gc.enable()


def test_half_precision_is_held_as_autocast_would_cast() -> None:
    """Stored bfloat16 weights give the results of autocast, up to rounding."""
    model = model_of(get_recipe("dcris_tiny").model).eval()
    ready = prepare_for_prediction(model, torch.bfloat16)
    assert ready.vision.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert ready.vision.norm.weight.dtype == torch.float32
    pixels, tokens = images(16, 4, 3), inputs()[1].repeat(8, 1)  # of one image, rounding alone is half or twice as much
    with torch.no_grad():
        exact = model(pixels, tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cast, held = model(pixels, tokens)[0].float(), ready(pixels, tokens)[0].float()
    assert (held - exact).norm() < 1.3 * (cast - exact).norm() + 1e-3 * exact.norm()


@needs_bfloat16
def test_a_block_is_packed_and_answers_the_same() -> None:
    """Packed products accept slices, float32 and any number of tokens, and use the exact GELU."""
    model = model_of(get_recipe("dcris_tiny").model).eval()
    ready = prepare_for_prediction(model, torch.bfloat16)
    block, plain = ready.vision.blocks[1], model.vision.blocks[1]
    assert all(type(layer) is not nn.Linear for part in (block.attention, block.mlp) for layer in part.children())
    width = model.config.vision.width
    wide = torch.randn(2, 2 * width, 7, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    for x in (wide[..., :width], wide[:1, :1, width:].bfloat16(), wide[:, ::2, ::2]):
        with torch.no_grad():
            exact, found = plain.mlp(x.float()), block.mlp(x)
            assert found.dtype == torch.bfloat16 and found.shape == exact.shape
            assert (found - exact).norm() < 0.02 * exact.norm()
            exact, found = plain.attention.qkv(x.float()), block.attention.qkv(x)
            assert (found - exact).norm() < 0.02 * exact.norm()


@needs_bfloat16
def test_the_head_is_packed_and_answers_the_same() -> None:
    """Packed convolutions accept maps of any size and memory layout."""
    model = model_of(get_recipe("dcris_tiny").model)
    exact, ready = (prepare_for_prediction(model, dtype).head for dtype in (torch.float32, torch.bfloat16))
    units = [
        (exact.neck.aggregate, ready.neck.aggregate),
        *zip(exact.neck.coordinate_conv, ready.neck.coordinate_conv, strict=True),
        (exact.projector.refine1, ready.projector.refine1),
    ]
    for plain, packed in units:
        assert type(packed[0]) is not nn.Conv2d
        channels = plain[0].rows[0].in_features if plain is exact.projector.refine1 else plain[0].in_channels
        generator = torch.Generator().manual_seed(0)
        for shape in ((1, channels, 4, 4), (3, channels, 2, 5), (1, channels, 33, 31)):
            x = torch.randn(shape, generator=generator)
            for laid in (x, x.bfloat16(), x.to(memory_format=torch.channels_last)):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    found = packed(laid)
                    assert found.dtype == torch.bfloat16
                with torch.no_grad():
                    wanted = plain(x)
                assert (found - wanted).norm() < 0.02 * wanted.norm()
    layer = ready.decoder.layers[0]
    for part in (layer.self_attention, layer.cross_attention, layer.feedforward):
        assert not any(type(child) is nn.Linear for child in part.children())


def test_two_models_on_one_pair_of_towers_hold_it_once() -> None:
    """Several models on the same towers share the bfloat16 copies."""
    first = model_of(get_recipe("dcris_tiny").model)
    second = ReferringSegmenter(get_recipe("dcris_tiny").model)
    for (name, weight), (_, shared) in zip(second.named_parameters(), first.named_parameters(), strict=True):
        if not weight.requires_grad:
            owner, _, last = name.rpartition(".")
            setattr(second.get_submodule(owner), last, nn.Parameter(shared.data, requires_grad=False))
    shared: CastWeights = {}
    one, two = (prepare_for_prediction(model, torch.bfloat16, shared) for model in (first, second))
    assert one.vision.blocks[9].mlp.fc1.weight is two.vision.blocks[9].mlp.fc1.weight
    assert one.vision.blocks[9].mlp_slot.up.weight is not two.vision.blocks[9].mlp_slot.up.weight


def test_frozen_towers_in_half_precision_train_the_same() -> None:
    """Gradients are those of autocast, up to bfloat16 rounding, and trained weights stay
    float32.
    """
    packed = MULTIPLIES_BFLOAT16
    model, same = (model_of(get_recipe("dcris_tiny").model).train() for _ in range(2))
    cast_frozen(same, torch.bfloat16)
    gradients = []
    for each in (model, same):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(*inputs())[0].float().square().mean()
        loss.backward()
        gradients.append({name: weight.grad for name, weight in each.named_parameters() if weight.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert (gradient - gradients[1][name]).norm() <= packed * 2e-2 * gradient.norm(), name
    assert all(weight.dtype == torch.float32 for weight in same.parameters() if weight.requires_grad)
    assert same.vision.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


@needs_bfloat16
def test_gradients_go_through_packed_layers() -> None:
    """Gradients pass through packed layers; only layers behind the first adapter store a transposed
    copy.
    """
    model, same = (model_of(get_recipe("dcris_tiny").model).train() for _ in range(2))
    cast_frozen(same, torch.bfloat16)
    block, plain = same.vision.blocks[-1], model.vision.blocks[-1]
    for ours, theirs in ((block.mlp.fc1, plain.mlp.fc1), (block.attention.qkv, plain.attention.qkv)):
        assert type(ours) is not nn.Linear
        x = torch.randn(2, 7, theirs.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        results = []
        for layer in (ours, theirs):
            y = layer(x).float()
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            results.append((y.detach(), *torch.autograd.grad(y, x, upstream)))
        for found, exact in zip(*results, strict=True):
            assert (found - exact).norm() < 0.02 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        loss = same(*inputs())[0].float().square().mean()
    loss.backward()
    # The first adapter is in the tenth block, behind its MLP.
    transposed = [block.mlp.fc1.transposed is not None for block in same.vision.blocks]
    assert transposed == [index > 9 for index in range(len(transposed))]
    ready = prepare_for_prediction(same, torch.bfloat16)  # validation between the steps
    again = prepare_for_prediction(ready, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plainly, found = same.eval()(*inputs())[0].float(), ready(*inputs())[0].float()
        assert torch.equal(again(*inputs())[0].float(), found)
    assert (found - plainly).norm() < 0.1 * plainly.norm()
