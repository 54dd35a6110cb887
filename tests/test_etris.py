"""ETRIS's bridger, compared with the authors' code.

The golden numbers are those of the published code on random weights in its layout
(tests/golden/make_etris.py).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcris.config import parse_value, replace
from dcris.errors import DcrisError
from dcris.models.adapters.etris import EtrisBridge, EtrisConfig, Stage
from dcris.models.encoders.blocks import SlotContext
from dcris.models.encoders.text import TextState
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.losses import text_to_pixel_loss
from detris_layout import assert_norms, gradients_of, masks, norms, sums
from etris_layout import VARIANTS, config_of, inputs, on_the_way, ours, theirs
from models import error, network_of, randomise, without_dropout

GOLDEN = Path(__file__).parent / "golden" / "etris.safetensors"


@pytest.mark.parametrize("name", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_the_published_code_s_own_numbers(name: str) -> None:
    """Features, logits, loss, gradients and statistics equal those of the published code."""
    variant = VARIANTS[name]
    expected = {key.removeprefix(f"{name}."): value for key, value in load_file(GOLDEN).items() if key.startswith(name)}
    model = network_of(config_of(variant).model, ours(variant))
    dtype = torch.float64 if variant.double else torch.float32
    images, tokens = inputs(variant)
    model, images = model.to(dtype), images.to(dtype)
    entering, logits = on_the_way(model, images, tokens)
    for key, value in entering.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, 0, ::2, ::2], expected["logits"], rtol=0, atol=1e-4)
    assert 0.02 < (logits > 0).double().mean() < 0.98

    logits = without_dropout(model.train())(images, tokens)[0]
    loss = text_to_pixel_loss(logits, masks(variant.image_size))
    loss.backward()
    torch.testing.assert_close(logits.detach()[:, 0, ::2, ::2], expected["train_logits"], rtol=0, atol=1e-3)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    rel, floor = (1e-6, 1e-14) if variant.double else (1e-3, 1e-6)
    assert_norms(gradients_of(model, theirs), expected["gradients"], rel, floor)
    trained = {theirs(key): value for key, value in model.named_buffers() if "running" in key}
    found = torch.stack([sums(trained), norms(trained)])
    torch.testing.assert_close(found, expected["statistics"], rtol=1e-5, atol=1e-4)


def test_how_the_bridger_starts() -> None:
    """Initial weights are distributed as in the published code: Kaiming over the fan out as torch
    counts it.
    """
    torch.manual_seed(0)
    bridge = EtrisBridge(768, 512, EtrisConfig())
    for number, stage in enumerate(bridge.stages):
        fan = 768 if number == 2 else 64
        assert isinstance(stage, Stage)
        for unit in (stage.zoom_in, stage.zoom_out):
            assert unit[0].weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02)
        for linear in (stage.down, stage.up, stage.see.out, stage.read.out):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not linear.bias.any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", "[3, 7, 12]", "method.layers .* from 0 to 11"),
        ("text_layers", "[7, 3, 11]", "method.text_layers .* ascending"),
        ("layers", "[]", "method.layers"),
        ("layers text_layers", "[]", "at least one"),
        ("layers", "[3, 11]", "equally long"),
        ("heads", "5", "method.width 32 cannot be divided among 5 heads"),
        ("depth", "5", "unknown setting model.method.depth"),
    ],
)
def test_settings_that_do_not_fit_are_named(key: str, value: str, message: str) -> None:
    """Unsuitable settings are errors of the configuration."""
    with pytest.raises(DcrisError, match=message):
        replace(get_recipe("etris_tiny"), {f"model.method.{each}": parse_value(value) for each in key.split()})


def test_stages_may_lie_anywhere() -> None:
    """Stages can follow any blocks; the output of a feature layer includes the exchange
    behind it.
    """
    settings = {"model.method.layers": (2, 4), "model.method.text_layers": (0, 9)}
    model = ReferringSegmenter(replace(get_recipe("etris_tiny"), settings).model).double()
    randomise(model)
    images = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.tensor([[1, 5, 9, 128, 0], [1, 7, 128, 0, 0]])
    bridge = model.bridge
    assert isinstance(bridge, EtrisBridge)
    with torch.no_grad():
        state, words = model.encode_images(images), model.encode_text(tokens)
        assert (state.step, state.layer_outputs) == (6, ())
        assert isinstance(words, TextState)
        assert words.step == 1
        fused = bridge.fuse(model.vision, model.text, state, words, model.config.head.feature_layers)
        # By hand, a block and an exchange after the other.
        x, t, before = model.vision.start(images).tokens, model.text.start(tokens).tokens, None
        context, outputs = SlotContext(grid=(3, 4), num_prefix_tokens=5), []
        for layer, block in enumerate(model.vision.blocks):
            x = block(x, context)
            if layer in (2, 4):
                first, last = ((0, 1), (1, 10))[(2, 4).index(layer)]
                for text_block in model.text.blocks[first:last]:
                    t = text_block(t, SlotContext(num_prefix_tokens=1))
                patches = x[:, 5:].transpose(1, 2).reshape(2, 128, 3, 4)
                seen, said, before = bridge.stages[(2, 4).index(layer)](patches, t, before)
                x, t = torch.cat((x[:, :5], x[:, 5:] + seen.flatten(2).transpose(1, 2)), dim=1), t + said
            if layer in (4, 8):
                outputs.append(x)
        for text_block in model.text.blocks[10:]:
            t = text_block(t, SlotContext(num_prefix_tokens=1))
    assert fused.side_features is None
    assert error(fused.state.tokens, x) < 1e-10
    assert error(fused.text.tokens, model.text.norm(t)) < 1e-10
    for ours_, theirs_ in zip(fused.state.layer_outputs, outputs, strict=True):
        assert error(ours_, theirs_) < 1e-10
