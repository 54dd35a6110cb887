"""Attention on a CPU for the cases in which torch 2.13's is slow: gradients, dropout, bfloat16.

torch's fused backward pass reaches a sixth of the speed of its own matrix products in bfloat16, and
its forward pass a third on processors that multiply bfloat16 but have no AMX. With dropout torch
has no fused path: it computes whole attention maps, which do not stay in the cache between the
steps. Here one head's map is computed at a time, in reused buffers that stay in the cache. Maps are
not stored for the backward pass but recomputed, and dropout masks are drawn again from their seed.
With padding and dropout, where maps are small, whole maps are computed and stored in the working
precision; torch uses float32.

In bfloat16 the products of queries and keys are rounded before the softmax, as in any program that
computes maps under autocast; torch's fused forward pass keeps them in float32.

Shape letters: B batch, H heads, Q queries, K keys, D head width.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcris.models.layers.dropout import Draw, drop

_WORTH_IT = 1 << 16
"""Minimum entries of a map for which processing each head separately is faster."""

_FEW_KEYS = 64
"""Maximum keys for which whole maps are computed and stored."""


def pays(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether `attend` is faster than torch's for these tensors [B, H, Q or K, D]."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or query.shape[-2] * key.shape[-2] < _WORTH_IT:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return dropout > 0 or query.dtype == torch.bfloat16
    return dropout == 0 and not _fused_is_quick(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute softmax(QK^T / sqrt(D)) V with dropout on the weights -> [B, H, Q, D].

    Dropout follows torch's random state (dcris.models.layers.dropout).

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        value: [B, H, K, D].
        dropout: probability.
    """
    if not torch.is_grad_enabled():
        return _mix(query, key, value, Draw(dropout) if dropout else None)
    result: Tensor = _Attention.apply(query, key, value, dropout)  # type: ignore[no-untyped-call]
    return result


def stores_maps(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Return whether `attend_small` is better than torch's for these tensors [B, H, Q or K, D]."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if dropout > 0:
        return mask is not None
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return trains and query.dtype == torch.bfloat16 and key.shape[-2] <= _FEW_KEYS


def attend_small(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Compute the same with an optional mask (True: attend), for small maps such as pixels to
    words.

    torch would store all intermediate maps in float32 when there is dropout; without, its fused
    backward pass in bfloat16 takes 2 to 7 times as long for 100 to 784 pixels and 12 words.
    """
    with torch.autocast("cpu", enabled=False):
        scores = (query @ key.mT).mul_(query.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=query.dtype).masked_fill_(
                ~mask, torch.finfo(query.dtype).min
            )
        return drop(scores.softmax(-1), dropout) @ value


@cache
def _fused_is_quick(dtype: torch.dtype) -> bool:
    """Return whether torch's fused forward pass is as fast as matrix products on this machine."""
    return dtype != torch.bfloat16 or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _mix(query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> Tensor:
    """Run the forward pass."""
    if draw is None and _fused_is_quick(query.dtype):
        return F.scaled_dot_product_attention(query, key, value)
    # Heads are adjacent in memory, as the next layer reads them.
    mixed = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    scores, weights = _maps(query, key)
    heads = map(_heads, (mixed, query, key.mT, value))
    for out, q, k, v, kept in zip(*heads, _kept(query, key, draw), strict=True):
        torch.addmm(scores, q, k, beta=0, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=weights)
        if kept is not None:
            weights.mul_(scores.copy_(kept))
        torch.mm(weights, v, out=out)
    return mixed if draw is None else mixed.mul_(draw.stretch)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        ctx.draw = Draw(dropout) if dropout else None
        mixed = _mix(query, key, value, ctx.draw)
        ctx.save_for_backward(query, key, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mixed = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        draw: Draw | None = ctx.draw
        # Heads are interleaved in memory, and each is read several times here.
        scaled, upstream = (query * scale).contiguous(), (gradients[0] * (draw.stretch if draw else 1.0)).contiguous()
        key, value = key.contiguous(), value.contiguous()
        to_query, to_key, to_value = torch.empty_like(scaled), torch.empty_like(key), torch.empty_like(value)
        # For each query, the sum over its keys of the weight times its gradient.
        exact = torch.promote_types(query.dtype, torch.float32)
        totals = (gradients[0].to(exact) * mixed.to(exact)).sum(-1)
        weights, change = _maps(query, key)
        mask = torch.empty_like(weights) if draw else weights
        left, right = (upstream, value) if draw else _minus(upstream, totals, value)
        made = map(_heads, (to_query, to_key, to_value))
        read = map(_heads, (scaled, key, upstream, totals, left, right.mT))
        for to_q, to_k, to_v, q, k, out, total, one, other, kept in zip(
            *made, *read, _kept(query, key, draw), strict=True
        ):
            torch.mm(q, k.t(), out=change)
            torch.softmax(change, -1, out=weights)
            torch.mm(one, other, out=change)
            if kept is not None:
                mask.copy_(kept)
                change.mul_(mask).sub_(total[:, None].to(change.dtype))
            change.mul_(weights)
            torch.mm(change.t(), q, out=to_k)
            torch.mm(change, k, out=to_q)
            torch.mm((weights if kept is None else weights.mul_(mask)).t(), out, out=to_v)
        return to_query.mul_(scale), to_key, to_value, None


def _heads(x: Tensor) -> list[Tensor]:
    """Return the B * H heads of [B, H, ...]. One unbind is faster than a view per head."""
    return [head for sample in x.unbind() for head in sample.unbind()]


def _kept(query: Tensor, key: Tensor, draw: Draw | None) -> Iterable[Tensor | None]:
    """Return the dropout mask of each head of each sample; None without dropout."""
    count = query.shape[0] * query.shape[1]
    return draw.kept(count, (query.shape[2], key.shape[2])) if draw else [None] * count


def _maps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate two maps [Q, K] of one head."""
    shape = query.shape[2], key.shape[2]
    return query.new_empty(shape), query.new_empty(shape)


def _minus(left: Tensor, shift: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices with left' @ right'.T = left @ right.T - shift[:, None], to save a pass
    over the product.

    In bfloat16 the shift is split into a sum of two numbers, so that it keeps its precision.
    """
    high = shift.to(left.dtype)
    low = (shift - high.to(shift.dtype)).to(left.dtype)
    ones = right.new_ones(*right.shape[:-1], 2)
    return torch.cat((left, torch.stack((-high, -low), -1)), -1), torch.cat((right, ones), -1)
