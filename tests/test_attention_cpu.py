"""The CPU attention, compared with torch's: outputs, gradients and dropout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dcris.models.layers import attention_cpu as cpu_attention
from dcris.models.layers.attention import attend
from dcris.models.layers.dropout import Draw, Dropout

# Samples, queries, keys, heads and width of a head; keys are not always as many as queries.
SHAPES = [(2, 260, 260, 3, 16), (1, 300, 257, 2, 8), (2, 65, 70, 1, 4)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return queries, keys and values in the memory layout of the layers: heads interleaved."""
    batch, queries, keys, heads, width = shape
    made = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, heads * width, dtype=torch.float64, generator=made)
        .to(dtype)
        .unflatten(-1, (heads, width))
        .transpose(1, 2)
        .requires_grad_()
        for length in (queries, keys, keys)
    ]


def with_gradients(function, tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    out = function(*tensors)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def maps(draw: Draw, query: Tensor, key: Tensor) -> Tensor:
    """Return the dropout masks of all heads: [B, H, Q, K]."""
    heads = query.shape[0] * query.shape[1]
    kept = [kept.clone() for kept in draw.kept(heads, (query.shape[2], key.shape[2]))]
    return torch.stack(kept).unflatten(0, query.shape[:2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "maps"])
def test_outputs_and_gradients_are_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients equal torch's, for either forward pass."""
    monkeypatch.setattr(cpu_attention, "_fused_is_quick", lambda dtype: fused)
    exact = with_gradients(F.scaled_dot_product_attention, inputs(shape, torch.float64))
    ours = with_gradients(lambda *x: cpu_attention.attend(*x, 0.0), inputs(shape, dtype))
    for our, their in zip(ours, exact, strict=True):
        assert our.dtype == dtype
        assert ((our.double() - their).norm() / their.norm()).item() < tolerance


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_is_that_of_an_explicit_mask(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in the forward and the backward pass uses the same mask and the right scale."""
    drawn = []
    draw = cpu_attention.Draw
    monkeypatch.setattr(cpu_attention, "Draw", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    for shape in SHAPES:
        ours = with_gradients(lambda *x: cpu_attention.attend(*x, dropout), inputs(shape, torch.float64))
        kept, stretch = maps(drawn[-1], *inputs(shape, torch.float64)[:2]), drawn[-1].stretch
        assert stretch == pytest.approx(1 / (1 - dropout), rel=1e-4)
        assert kept.double().mean().item() == pytest.approx(1 - dropout, abs=0.02)

        def explicit(
            query: Tensor, key: Tensor, value: Tensor, kept: Tensor = kept, stretch: float = stretch
        ) -> Tensor:
            weights = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
            return (weights * kept * stretch) @ value

        for our, their in zip(ours, with_gradients(explicit, inputs(shape, torch.float64)), strict=True):
            assert ((our - their).norm() / their.norm()).item() < 1e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_pixels_attend_to_words_and_not_to_padding(dtype: torch.dtype, tolerance: float) -> None:
    """Masked keys get no weight, with and without dropout."""
    shape = (2, 1100, 17, 3, 16)
    mask = torch.arange(17) < torch.tensor([5, 9])[:, None, None, None]

    def ours(*x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(*x, mask=mask, dropout=0.2)

    torch.manual_seed(3)
    draw = Draw(0.2)
    (kept,) = draw.kept(1, (2, 3, 1100, 17))

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return (torch.softmax(scores, -1) * kept * draw.stretch) @ value

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = with_gradients(ours, inputs(shape, dtype))
    for our, their in zip(found, with_gradients(explicit, inputs(shape, torch.float64)), strict=True):
        assert our.dtype == dtype
        assert ((our.double() - their).norm() / their.norm()).item() < tolerance
    for to_words in found[2:]:
        assert not to_words[0, :, 5:].any() and not to_words[1, :, 9:].any() and to_words[0, :, :5].all()


@pytest.mark.parametrize("masked", [True, False])
def test_few_keys_in_bfloat16_are_as_exact_as_torchs(masked: bool) -> None:
    """Pixels that attend to words while training: output and gradients against float64."""
    mask = torch.arange(12) < torch.tensor([7, 12])[:, None, None, None] if masked else None
    shape = (2, 300, 12, 4, 32)

    def torchs(*x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=mask)

    def ours(*x: Tensor) -> Tensor:
        return attend(*x, mask=mask)

    exact = with_gradients(torchs, inputs(shape, torch.float64))
    found = [with_gradients(each, inputs(shape, torch.bfloat16)) for each in (torchs, ours)]
    for expected, their, our in zip(exact, *found, strict=True):
        assert not torch.equal(their, our)
        assert (our.double() - expected).norm() < 1.5 * (their.double() - expected).norm()


def test_dropout_follows_torchs_seed_and_differs_between_heads() -> None:
    """Dropout depends on torch's seed only, which makes resuming exact, and differs
    between heads.
    """
    query, key, _ = inputs(SHAPES[0], torch.float32)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return maps(Draw(0.3), query, key)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    kept = draw(5)
    for one, other in ((kept[0, 0], kept[0, 1]), (kept[0, 0], kept[1, 0])):
        both = (one & other).double().mean().item()
        assert both == pytest.approx(0.49, abs=0.01)  # independent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_quick_dropout_is_dropout(dtype: torch.dtype) -> None:
    """The fast dropout keeps the right fraction and scales outputs and gradients."""
    x = torch.ones(3, 100, 200, dtype=dtype).requires_grad_()
    layer = Dropout(0.25)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert y.dtype == dtype and torch.equal(y, layer(x))
    assert not torch.equal(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert kept[0, 0].double().mean().item() == pytest.approx(0.75, abs=0.15)
    torch.testing.assert_close(y[kept].detach(), torch.full_like(y[kept], 4 / 3).detach(), rtol=1e-2, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x, plus=x), x + y)
    assert torch.equal(layer.eval()(x), x) and torch.equal(layer(x, plus=x), 2 * x)
    assert not Dropout(1.0)(x).any() and torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize(
    ("queries", "gradients", "dropout", "dtype", "amx", "expected"),
    [
        (260, True, 0.1, torch.float32, False, True),
        (260, True, 0.0, torch.bfloat16, False, True),
        (260, True, 0.0, torch.bfloat16, True, True),
        (260, True, 0.0, torch.float32, False, False),
        (260, False, 0.0, torch.bfloat16, False, True),
        (260, False, 0.0, torch.bfloat16, True, False),
        (260, False, 0.0, torch.float32, False, False),
        (260, False, 0.1, torch.bfloat16, False, False),
        (20, True, 0.1, torch.bfloat16, False, False),
    ],
)
def test_it_is_used_where_it_pays(
    queries: int,
    gradients: bool,
    dropout: float,
    dtype: torch.dtype,
    amx: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small maps, float32 without dropout, and prediction with AMX use torch's function."""
    used = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.setattr(cpu_attention, "_fused_is_quick", cpu_attention._fused_is_quick.__wrapped__)
    monkeypatch.setattr(cpu_attention, "attend", lambda *x: used.append(1) or x[0])
    tensors = inputs((1, queries, 260, 1, 8), dtype)
    with torch.set_grad_enabled(gradients):
        attend(*tensors, dropout=dropout)
        attend(*tensors, dropout=dropout, mask=torch.ones(queries, 260, dtype=torch.bool))
        attend(*tensors, dropout=dropout, causal=True)
    assert bool(used) == expected
    assert len(used) <= 1


def test_a_step_through_a_model_is_as_exact_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, gradients are about as exact as those of torch's bfloat16 attention."""
    from dcris.models.segmentation import ReferringSegmenter
    from dcris.recipes import get_recipe
    from models import images, randomise, without_dropout

    model = ReferringSegmenter(get_recipe("dcris_tiny").model).train()
    randomise(model)
    without_dropout(model)
    torch.manual_seed(0)
    pictures, tokens = images(1, 16, 17), torch.randint(4, 100, (1, 9))

    def gradients(half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(pictures, tokens)[0].float().square().mean()
        found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    calls: list[int] = []
    monkeypatch.setattr(cpu_attention, "pays", lambda *x: False)
    exact, plain = gradients(half=False), gradients(half=True)
    monkeypatch.setattr(cpu_attention, "pays", lambda *x: calls.append(1) or True)
    assert (gradients(half=False) - exact).norm() < 1e-4 * exact.norm()
    assert (gradients(half=True) - exact).norm() < 1.3 * (plain - exact).norm()
    assert calls
