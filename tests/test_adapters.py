"""DCRIS's two adapters, compared with plain implementations of the equations, and their initial
weights.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.adapters.dcris import DenseCrossAdapter, TextAdapter, TextAdapterConfig
from dcris.models.encoders.blocks import Block, SlotContext
from dcris.models.encoders.clip_text import ClipTextTower
from dcris.models.encoders.dino import DinoTower
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.segmentation import ReferringSegmenter
from models import (
    TINY_DENSE,
    TINY_TEXT,
    TINY_VISION,
    error,
    images,
    randomise,
    tiny_config,
    tokens_ending_at,
    torch_attention,
)

TOLERANCE = 1e-12  # of float64 numbers about 1
GRID, PREFIX, WIDTH, TEXT_WIDTH = (3, 5), 5, 32, 24


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_cross(**changes: object) -> DenseCrossAdapter:
    adapter = DenseCrossAdapter(WIDTH, TEXT_WIDTH, TINY_DENSE.model_copy(update=changes)).double()
    randomise(adapter)
    return adapter


class PlainDenseCross:
    """Equations 1 and 2 line by line, on copies of an adapter's weights and statistics."""

    def __init__(self, adapter: DenseCrossAdapter) -> None:
        self.w = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
        self.statistics = {name: b.detach().clone() for name, b in adapter.named_buffers()}
        self.mhca = mhca = torch_attention(adapter.attention)
        self.w |= {"attention.in_weight": mhca.in_proj_weight, "attention.in_bias": mhca.in_proj_bias}
        self.w |= {"attention.out.weight": mhca.out_proj.weight, "attention.out.bias": mhca.out_proj.bias}
        self.training = adapter.training

    def conv(self, at: str, x: Tensor, size: int) -> Tensor:
        x = F.conv2d(x, self.w[f"{at}.0.weight"], self.w[f"{at}.0.bias"], padding=(size - 1) // 2)
        x = F.batch_norm(
            x,
            self.statistics[f"{at}.1.running_mean"],
            self.statistics[f"{at}.1.running_var"],
            self.w[f"{at}.1.weight"],
            self.w[f"{at}.1.bias"],
            training=self.training,
            eps=1e-3,
        )
        return x.relu()

    def linear(self, at: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{at}.weight"].T + self.w[f"{at}.bias"]

    def __call__(self, mlp_output: Tensor, normed: Tensor, text: Tensor) -> Tensor:
        f_v = self.linear("down", normed).relu()
        batch, _, r = f_v.shape
        prefix, patches = f_v[:, :PREFIX], f_v[:, PREFIX:]
        f_map = patches.reshape(batch, *GRID, r).permute(0, 3, 1, 2)
        f_1 = self.conv("branch1", f_map, 1)
        f_2 = self.conv("branch2.1", self.conv("branch2.0", torch.cat((f_map, f_1), 1), 1), 3)
        f_3 = self.conv("branch3.1", self.conv("branch3.0", torch.cat((f_map, f_1, f_2), 1), 1), 5)
        f_dense = (torch.cat((f_1, f_2, f_3), 1) + f_map).permute(0, 2, 3, 1).reshape(batch, -1, r)
        words = self.linear("text_proj", text)
        attended, _ = self.mhca(self.linear("image_proj", f_dense), words, words)
        f_cross = self.linear("back_proj", attended) + patches
        return mlp_output + 0.2 * self.linear("up", torch.cat((prefix + prefix, f_cross), 1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dense_cross_adapter_is_equations_1_and_2(training: bool) -> None:
    """Output, gradients and batch statistics equal those of the plain implementation."""
    adapter = dense_cross().train(training)
    plain = PlainDenseCross(adapter)
    output, normed, text = noise(2, 20, WIDTH), noise(2, 20, WIDTH, seed=1), noise(2, 4, TEXT_WIDTH, seed=2)
    inputs = [x.requires_grad_() for x in (output, normed, text)]
    ours = adapter(output, normed, noise(2, 20, WIDTH, seed=3), SlotContext(GRID, PREFIX, text))
    theirs = plain(output, normed, text)
    assert error(ours, theirs) < TOLERANCE

    goal = noise(*ours.shape, seed=4)
    wanted = torch.autograd.grad((theirs * goal).sum(), [*inputs, *plain.w.values()])
    found = torch.autograd.grad((ours * goal).sum(), [*inputs, *adapter.parameters()])
    for name, ours_grad, theirs_grad in zip(("output", "normed", "text", *plain.w), found, wanted, strict=True):
        assert error(ours_grad, theirs_grad) < 100 * TOLERANCE, name
    for name, statistic in adapter.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert error(statistic, plain.statistics[name]) < TOLERANCE, name


def test_dense_cross_adapter_attends_to_padding_as_published() -> None:
    """Padding is not masked by default: the published weights were trained so."""
    adapter = dense_cross().eval()
    output = normed = noise(1, 20, WIDTH)
    text = noise(1, 4, TEXT_WIDTH)
    before = adapter(output, normed, normed, SlotContext(GRID, PREFIX, text))
    text[:, -1] += 1
    after = adapter(output, normed, normed, SlotContext(GRID, PREFIX, text))
    assert error(before[:, PREFIX:], after[:, PREFIX:]) > 1e-3
    assert torch.equal(before[:, :PREFIX], after[:, :PREFIX])


def test_attention_dropout_is_for_training_only() -> None:
    """Dropout changes training outputs and never evaluation outputs."""
    adapter = dense_cross(dropout=0.5)
    x, context = noise(1, 20, WIDTH), SlotContext(GRID, PREFIX, noise(1, 4, TEXT_WIDTH))
    adapter.eval()
    assert torch.equal(adapter(x, x, x, context), adapter(x, x, x, context))
    adapter.attention.train()
    assert not torch.equal(adapter(x, x, x, context), adapter(x, x, x, context))


def test_attention_starts_as_torch_does() -> None:
    """Initial weights are those of PyTorch, as in the published head."""
    torch.manual_seed(0)
    ours = MultiHeadAttention(64, 4)
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 4)
    for mine, other in ((ours.in_weight, theirs.in_proj_weight), (ours.out.weight, theirs.out_proj.weight)):
        assert abs(mine.std() / other.std() - 1) < 0.05
        assert abs(mine.abs().max() / other.abs().max() - 1) < 0.01
    assert not ours.in_bias.any()
    assert not ours.out.bias.any()


def test_text_adapter_is_equation_3() -> None:
    """It reads the residual stream, not the normalised one."""
    adapter = TextAdapter(TEXT_WIDTH, TextAdapterConfig(width=6)).double()
    randomise(adapter)
    output, normed, residual = (noise(2, 7, TEXT_WIDTH, seed=seed) for seed in range(3))
    w = dict(adapter.named_parameters())
    f_w = (residual @ w["down.weight"].T + w["down.bias"]).clamp(min=0) @ w["up.weight"].T + w["up.bias"]
    assert error(adapter(output, normed, residual, SlotContext()), output + 0.2 * f_w) < TOLERANCE


def test_adapters_sit_beside_the_mlp_before_layer_scale() -> None:
    """LayerScale applies to the sum of MLP and adapter, as in the published weights."""
    block = Block(WIDTH, 4).double()
    block.mlp_slot = DenseCrossAdapter(WIDTH, TEXT_WIDTH, TINY_DENSE).double()
    randomise(block)
    block.eval()
    context = SlotContext(GRID, PREFIX, noise(2, 4, TEXT_WIDTH))
    x = noise(2, 20, WIDTH)
    half = x + block.scale1.gamma * block.attention(block.norm1(x))
    normed = block.norm2(half)
    branch = PlainDenseCross(block.mlp_slot)(block.mlp(normed), normed, context.text)
    assert error(block(x, context), half + block.scale2.gamma * branch) < TOLERANCE


@torch.no_grad()
def test_zero_started_adapters_leave_the_towers_alone() -> None:
    """With `init: zero` the towers' initial output is unchanged."""
    model = ReferringSegmenter(
        tiny_config(
            visual_adapter=TINY_DENSE.model_copy(update={"init": "zero"}),
            text_adapter=TextAdapterConfig(layers=(0, 2), width=6, init="zero"),
        )
    ).eval()
    plain_text, plain_vision = ClipTextTower(TINY_TEXT).eval(), DinoTower(TINY_VISION).eval()
    for ours, plain in ((model.text, plain_text), (model.vision, plain_vision)):
        plain.load_state_dict({name: weight for name, weight in ours.state_dict().items() if "_slot." not in name})
    tokens, pixels = tokens_ending_at((3, 5), 7), images(2, 3, 5)
    text = model.encode_text(tokens)
    assert torch.equal(text.tokens, plain_text(tokens).tokens)
    assert torch.equal(model.vision(pixels, text.tokens), plain_vision(pixels))
