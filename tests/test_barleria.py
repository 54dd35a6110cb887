"""BarLeRIa, compared with the authors' code.

The golden numbers are those of the published code on random weights in its layout
(tests/golden/make_barleria.py).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from barleria_layout import VARIANT, config_of, ours
from dcris.config import parse_value, replace
from dcris.errors import DcrisError
from dcris.models.adapters.barleria import BarleriaBridge, Flow
from dcris.models.encoders.blocks import SlotContext
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.losses import text_to_pixel_loss
from detris_layout import assert_norms, gradients_of, masks
from etris_layout import inputs, on_the_way
from models import error, network_of, randomise, without_dropout

GOLDEN = Path(__file__).parent / "golden" / "barleria.safetensors"


def test_the_published_code_s_own_numbers() -> None:
    """Features, logits, losses and gradients equal those of the published code."""
    expected = load_file(GOLDEN)
    model = network_of(config_of(VARIANT).model, ours(VARIANT))
    images, tokens = inputs(VARIANT)
    model, images = model.double(), images.double()
    assert isinstance(model.bridge, BarleriaBridge)
    sides: list[Tensor] = []
    model.bridge.side.register_forward_hook(lambda module, arguments, result: sides.append(result[0]))
    found, logits = on_the_way(model, images, tokens)
    side = sides[0].transpose(1, 2)
    found |= {"side": side[:, ::3, :: side.shape[2] // 4], "logits": logits[:, 0, ::2, ::2]}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-4)
    assert 0.02 < (logits > 0).double().mean() < 0.98

    logits, _, auxiliary = without_dropout(model.train())(images, tokens)
    loss = text_to_pixel_loss(logits, masks(VARIANT.image_size))
    whole = loss + auxiliary["reconstruction"]
    whole.backward()
    torch.testing.assert_close(logits.detach()[:, 0, ::2, ::2], expected["train_logits"], rtol=0, atol=1e-3)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    # The gradients are those of the published loss, to which the side network's own loss is added.
    assert expected["whole_loss"] > expected["loss"] + 0.1
    assert whole.item() == pytest.approx(expected["whole_loss"].item(), rel=1e-5)
    assert_norms(gradients_of(model), expected["gradients"], rel=1e-6, floor=1e-14)


def test_a_flow_is_an_affine_and_planar_ones() -> None:
    """A flow equals its formula and starts near the identity."""
    flow, x = Flow(6, 3).double(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    assert error(flow.transform_residual(x), x) < 0.01
    assert flow(x, x, x, SlotContext()) is x  # the branch is unchanged
    randomise(flow)
    z = torch.stack([flow.shift[d] + torch.exp(flow.log_scale[d]) * x[..., d] for d in range(6)], dim=-1)
    for k in range(3):
        inner = sum(flow.weights[k, d] * z[..., d] for d in range(6)) + flow.biases[k]
        z = torch.stack([z[..., d] + flow.scales[k, d] * torch.tanh(inner) for d in range(6)], dim=-1)
    assert error(flow.transform_residual(x), z) < 1e-12


def test_an_answer_does_not_depend_on_its_batch() -> None:
    """A result does not depend on the batch, unlike in the published code, which normalises over
    it.
    """
    model = ReferringSegmenter(get_recipe("barleria_tiny").model).double()
    randomise(model)
    images = torch.randn(3, 3, 70, 56, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.tensor([[1, 5, 9, 128, 0], [1, 7, 128, 0, 0], [1, 6, 4, 8, 128]])
    with torch.no_grad():
        together = model(images, tokens)[0]
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1])[0] for i in range(3)])
    assert error(together, alone) < 1e-9 * together.abs().max()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fused", "[0, 12]", "method.fused .* from 0 to 11"),
        ("fused", "[0, 1, 2, 3, 4, 5]", "method.fused has 6 blocks; with method.side_depth 4 there can be at most 5"),
        ("side_heads", "5", "method.side_width 48 cannot be divided among 5 heads"),
        ("flow_length", "-1", "model.method.flow_length"),
    ],
)
def test_settings_that_do_not_fit_are_named(key: str, value: str, message: str) -> None:
    """Unsuitable settings are errors of the configuration."""
    with pytest.raises(DcrisError, match=message):
        replace(get_recipe("barleria_tiny"), {f"model.method.{key}": parse_value(value)})


def test_the_auxiliary_loss_is_returned_in_training_only() -> None:
    """The reconstruction loss is returned in training, and not in evaluation."""
    model = ReferringSegmenter(get_recipe("barleria_tiny").model)
    batch = torch.randn(1, 3, 56, 56), torch.tensor([[1, 5, 9, 128, 0]])
    assert model(*batch).losses == {}
    auxiliary = model.train()(*batch).losses
    assert set(auxiliary) == {"reconstruction"}
    with torch.no_grad():
        assert model(*batch).losses == {}
