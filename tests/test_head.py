"""Neck, decoder, projector and loss, compared with plain implementations of section 3.4 and
equation 6.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.head.decoder import Decoder, sine_positions, sine_positions_2d
from dcris.models.head.neck import Neck
from dcris.models.head.projector import Projector, apply_kernels, finer_convolution
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import text_to_pixel_loss
from models import error, images, randomise, tiny_config, tokens_ending_at, torch_attention

TOLERANCE = 1e-12  # of float64 numbers about 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(width: int = 12, heads: int = 3) -> MultiHeadAttention:
    module = MultiHeadAttention(width, heads).double()
    randomise(module)
    return module


def check_attention_gradients(ours: MultiHeadAttention, theirs: nn.MultiheadAttention) -> None:
    assert error(ours.in_weight.grad, theirs.in_proj_weight.grad) < 100 * TOLERANCE
    assert error(ours.in_bias.grad, theirs.in_proj_bias.grad) < 100 * TOLERANCE
    assert error(ours.out.weight.grad, theirs.out_proj.weight.grad) < 100 * TOLERANCE
    assert error(ours.out.bias.grad, theirs.out_proj.bias.grad) < 100 * TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "padding left out"])
def test_attention_is_torchs(masked: bool) -> None:
    """Results and gradients equal those of torch.nn.MultiheadAttention, with which the published
    head was trained.
    """
    ours = attention()
    theirs = torch_attention(ours)
    query, key, value = noise(2, 5, 12), noise(2, 4, 12, seed=1), noise(2, 4, 12, seed=2)
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]]) if masked else None
    found = ours(query, key, value, padding)
    wanted, _ = theirs(query, key, value, key_padding_mask=padding)
    assert error(found, wanted) < TOLERANCE
    goal = noise(*found.shape, seed=3)
    (found * goal).sum().backward()
    (wanted * goal).sum().backward()
    check_attention_gradients(ours, theirs)


def test_one_key_needs_no_queries() -> None:
    """The shortcut for a single key keeps the result and the gradients: none for queries
    and keys.
    """
    ours = attention()
    theirs = torch_attention(ours)
    query, value = noise(2, 5, 12), noise(2, 12, seed=1)
    found = ours.single_key(value)
    wanted, _ = theirs(query, value[:, None], value[:, None])
    assert error(found[:, None].expand(-1, 5, -1), wanted) < TOLERANCE
    goal = noise(*wanted.shape, seed=2)
    (found[:, None] * goal).sum().backward()
    (wanted * goal).sum().backward()
    check_attention_gradients(ours, theirs)
    assert not ours.in_weight.grad[:24].any()
    assert not ours.in_bias.grad[:24].any()


def conv_norm_relu(unit: nn.Sequential, x: Tensor) -> Tensor:
    """Apply a unit's convolution, batch norm and ReLU in evaluation mode."""
    weight, norm = unit[0].weight, unit[1]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def test_neck_is_per_pixel_attention_to_the_sentence() -> None:
    """Every pixel attends to f_s, level by level, before the levels are fused."""
    neck = Neck((10, 10, 10), 9, 12, 3).double().eval()
    randomise(neck)
    levels, sentence = [noise(2, 10, 3, 5, seed=seed) for seed in range(3)], noise(2, 9, seed=3)
    text = neck.text_proj(sentence)[:, None]
    gated = []
    for level, conv, module in zip(levels, neck.level_convs, neck.level_attentions, strict=True):
        pixels = conv_norm_relu(conv, level).flatten(2).transpose(1, 2)
        attended, _ = torch_attention(module)(pixels, text, text)
        gated.append((pixels * attended).transpose(1, 2).reshape(2, 12, 3, 5))
    fused = conv_norm_relu(neck.aggregate, torch.cat(gated, 1))
    x = torch.tensor([-1, -0.5, 0, 0.5, 1]).double().expand(2, 1, 3, 5)
    y = torch.tensor([[-1.0], [0], [1]]).double().expand(2, 1, 3, 5)
    first, second = neck.coordinate_conv
    expected = fused + conv_norm_relu(second, conv_norm_relu(first, torch.cat((fused, x, y), 1)))
    assert error(neck(levels, sentence), expected) < TOLERANCE


def test_coordinates_are_x_then_y() -> None:
    """Coordinates are x, then y; border cells are exactly -1 and 1."""
    neck = Neck((10, 10, 10), 9, 12, 3).eval()
    seen: list[Tensor] = []
    neck.coordinate_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    neck([torch.zeros(2, 10, 3, 5)] * 3, torch.zeros(2, 9))
    x, y = seen[0][:, -2], seen[0][:, -1]
    assert torch.equal(x, torch.tensor([-1, -0.5, 0, 0.5, 1]).expand(2, 3, 5))
    assert torch.equal(y, torch.tensor([[-1.0], [0], [1]]).expand(2, 3, 5))


def sine(position: int, channel: int, width: int) -> float:
    angle = position / 10000 ** ((channel - channel % 2) / width)
    return math.cos(angle) if channel % 2 else math.sin(angle)


def test_positions_follow_the_formula() -> None:
    """Sine positions equal the formula, for words and for pixels."""
    expected = [[sine(place, channel, 12) for channel in range(12)] for place in range(22)]
    assert error(sine_positions(22, 12), torch.tensor(expected)) < 1e-5
    expected = [
        [sine(column, channel, 6) for channel in range(6)] + [sine(row, channel, 6) for channel in range(6)]
        for row in range(3)
        for column in range(5)
    ]
    assert error(sine_positions_2d(3, 5, 12), torch.tensor(expected)) < 1e-5


def plain_decoder(decoder: Decoder, features: Tensor, words: Tensor, padding: Tensor) -> Tensor:
    """Section 3.4 implemented with torch's own modules, in evaluation mode."""
    batch, width, rows, columns = features.shape
    words = decoder.text_proj(words)
    places = sine_positions_2d(rows, columns, width).double()
    keys = words + sine_positions(words.shape[1], width).double()
    x = features.reshape(batch, width, -1).permute(0, 2, 1)
    for layer in decoder.layers:
        y = layer.norm1(x)
        y, _ = torch_attention(layer.self_attention)(y + places, y + places, y)
        x = x + layer.self_norm(y)
        y = layer.norm2(x)
        y, _ = torch_attention(layer.cross_attention)(y + places, keys, words, key_padding_mask=padding)
        x = x + layer.cross_norm(y)
        into, _, _, norm, out = layer.feedforward
        x = x + out(norm(into(layer.norm3(x)).clamp(min=0)))
    return decoder.norm(x).permute(0, 2, 1).reshape(batch, width, rows, columns)


@pytest.mark.parametrize("text_width", [16, 10], ids=["words as wide as the head", "words projected"])
def test_decoder_is_section_3_4(text_width: int) -> None:
    """Positions are added to queries and keys only, padding is masked, and attention outputs are
    normalised.
    """
    decoder = Decoder(16, text_width, heads=4, layers=2, feedforward=20, dropout=0.1).double()
    randomise(decoder)
    decoder.eval()
    assert isinstance(decoder.text_proj, nn.Identity) == (text_width == 16)
    features, words = noise(2, 16, 3, 5), noise(2, 6, text_width, seed=1)
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    found = decoder(features, words, padding)
    assert error(found, plain_decoder(decoder, features, words, padding)) < TOLERANCE
    # The content of the padding must not matter.
    words[1, 3:] = 1e3
    assert torch.equal(decoder(features, words, padding), found)
    decoder.train()
    assert not torch.equal(decoder(features, words, padding), decoder(features, words, padding))


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_kernels_per_sample_are_a_grouped_convolution(
    batch: int, channels: int, rows: int, columns: int, seed: int
) -> None:
    """The result equals a grouped convolution, also at the borders."""
    x, kernels, bias = (
        noise(*shape, seed=seed + 100 * i).requires_grad_()
        for i, shape in enumerate(((batch, channels, rows, columns), (batch, channels * 9), (batch,)))
    )
    found = apply_kernels(x, kernels, bias)
    wanted = F.conv2d(
        x.reshape(1, -1, rows, columns), kernels.reshape(batch, channels, 3, 3), bias, padding=1, groups=batch
    ).transpose(0, 1)
    assert error(found, wanted) < TOLERANCE
    goal = noise(*found.shape, seed=seed + 300)
    ours = torch.autograd.grad((found * goal).sum(), (x, kernels, bias))
    theirs = torch.autograd.grad((wanted * goal).sum(), (x, kernels, bias))
    assert all(error(a, b) < 10 * TOLERANCE for a, b in zip(ours, theirs, strict=True))


@given(
    batch=st.integers(1, 3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 4),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_finer_convolution_is_interpolation_then_convolution(
    batch: int, inputs: int, outputs: int, rows: int, columns: int, seed: int
) -> None:
    """The result and the gradients equal interpolation followed by a convolution, also at the
    borders.
    """
    x = noise(batch, inputs, rows, columns, seed=seed).requires_grad_()
    weight = noise(outputs, inputs, 3, 3, seed=seed + 100).requires_grad_()
    found = finer_convolution(x, weight)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), weight, padding=1)
    assert error(found, wanted) < TOLERANCE
    goal = noise(*found.shape, seed=seed + 300)
    ours = torch.autograd.grad((found * goal).sum(), (x, weight))
    theirs = torch.autograd.grad((wanted * goal).sum(), (x, weight))
    assert all(error(a, b) < 10 * TOLERANCE for a, b in zip(ours, theirs, strict=True))


def test_finer_convolution_rounds_no_worse_in_bfloat16() -> None:
    """In bfloat16 it rounds hardly worse than interpolation followed by a convolution."""
    x, weight = noise(1, 256, 16, 16).float(), noise(64, 256, 3, 3, seed=1).float() / 48
    exact = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = finer_convolution(x, weight).float()
        plain = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), weight, padding=1).float()
    assert (ours - exact).norm() < 1.5 * (plain - exact).norm()


def test_finer_convolution_where_autocast_interpolates_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA autocast interpolates in float32; an in-place product must not mix precisions."""
    interpolate = F.interpolate
    x, weight, bias = (noise(*shape).float() for shape in ((1, 8, 3, 5), (4, 8, 3, 3), (4,)))
    with torch.autocast("cpu", torch.bfloat16):
        expected = finer_convolution(x, weight, bias)
        monkeypatch.setattr(F, "interpolate", lambda x, **how: interpolate(x.float(), **how))
        assert torch.equal(finer_convolution(x, weight, bias), expected)


def test_projector_is_equation_5() -> None:
    """The kernel made from f_s is applied to the upsampled features, on the paper's grid."""
    projector = Projector(12, 9, None).double()
    randomise(projector)
    projector.eval()
    features, sentence = noise(2, 12, 3, 5), noise(2, 9, seed=1)
    x = features
    for unit in (projector.refine1, projector.refine2):
        x = conv_norm_relu(unit, nn.Upsample(scale_factor=2, mode="bilinear")(x))
    x = F.conv2d(x, projector.visual.weight, projector.visual.bias)
    words = projector.text(sentence)
    kernels, bias = words[:, :-1].reshape(2, 6, 3, 3), words[:, -1]
    expected = F.conv2d(x.reshape(1, 12, 12, 20), kernels, bias, padding=1, groups=2).transpose(0, 1)
    assert projector(features, sentence).shape == (2, 1, 12, 20)
    assert error(projector(features, sentence), expected) < TOLERANCE


def test_the_last_bias_can_start_below_zero() -> None:
    """`head.bias` sets the last bias and nothing else."""
    torch.manual_seed(0)
    plain = Projector(12, 9, None)
    torch.manual_seed(0)
    shifted = Projector(12, 9, -3.0)
    assert shifted.text.bias[-1].item() == -3
    assert torch.equal(shifted.text.bias[:-1], plain.text.bias[:-1])
    assert torch.equal(shifted.text.weight, plain.text.weight)


def plain_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Equation 6 with explicit logarithms, cell by cell, with the mask's pixel at each cell's upper
    left corner.
    """
    total, (batch, _, rows, columns) = torch.zeros(()).double(), logits.shape
    for sample in range(batch):
        for row in range(rows):
            for column in range(columns):
                inside = masks[sample, 0, row * masks.shape[2] // rows, column * masks.shape[3] // columns]
                probability = logits[sample, 0, row, column].double().sigmoid()
                total = total - (probability.log() if inside else (1 - probability).log())
    return total / (batch * rows * columns)


@pytest.mark.parametrize("size", [(8, 12), (28, 42), (14, 21)], ids=["the grid's own", "the network's", "the patches'"])
def test_loss_is_equation_6(size: tuple[int, int]) -> None:
    """The loss equals equation 6."""
    logits = noise(2, 1, 8, 12).mul(3).requires_grad_()
    masks = (noise(2, 1, *size, seed=1) > 0).float()
    loss, expected = text_to_pixel_loss(logits, masks), plain_loss(logits, masks)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    assert error(ours, theirs) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_huge_logits_is_finite(dtype: torch.dtype) -> None:
    """A confident wrong prediction gives a finite loss."""
    logits = torch.full((1, 1, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    masks = torch.ones(1, 1, 16, 16)
    assert text_to_pixel_loss(logits, masks).item() == 0
    loss = text_to_pixel_loss(logits, 1 - masks)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e4, rel=1e-2)
    assert text_to_pixel_loss(-logits, masks).item() == loss.item()
    loss.backward()
    assert torch.equal(logits.grad, torch.full_like(logits, 1 / 16))


def test_the_head_reads_the_feature_layers_and_the_normed_output() -> None:
    """The levels are the feature layers' outputs as they are and the normalised last output,
    patches only.
    """
    model = ReferringSegmenter(tiny_config()).double()
    randomise(model)
    model.eval()
    pixels, tokens = images(2, 3, 5).double(), tokens_ending_at((3, 5), 7)
    text = model.encode_text(tokens)
    state = model.vision.advance(model.vision.start(pixels), text=text.tokens, feature_layers=range(4))
    levels = []
    for x in (state.layer_outputs[0], state.layer_outputs[2], model.vision.norm(state.layer_outputs[3])):
        patches = x[:, 5:]
        levels.append(torch.stack([patches[:, 5 * row : 5 * row + 5] for row in range(3)], 1).permute(0, 3, 1, 2))
    features = model.head.neck(levels, text.sentence)
    features = model.head.decoder(features, text.tokens, tokens == 0)
    assert error(model(pixels, tokens)[0], model.head.projector(features, text.sentence)) < TOLERANCE


@pytest.mark.slow
def test_the_projector_is_exported_for_any_number_of_phrases() -> None:
    """An exported graph accepts any number of expressions."""
    projector = Projector(8, 6, None).eval()
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 8, 3, 4), torch.randn(2, 6)
    program = torch.export.export(projector, example, dynamic_shapes=({0: batch}, {0: batch}))
    features, sentence = torch.randn(5, 8, 3, 4), torch.randn(5, 6)
    assert error(program.module()(features, sentence), projector(features, sentence)) < 1e-5
