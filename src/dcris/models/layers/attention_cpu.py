"""Attention on a CPU, where torch 2.13's own is slow: with gradients, with dropout, and in bfloat16 at all.

torch's fused backward pass reaches a sixth of the speed of its own matrix products in bfloat16, and its forward pass a third
where the processor multiplies bfloat16 but has no AMX. With dropout there is no fused path at all: whole attention maps are
drawn, masked, multiplied and kept, and a megabyte's worth of them leaves the cache between any two of these steps. Here one
head's map is worked on at a time, in buffers that are reused and stay in the cache. Nothing of a map is remembered for the
backward pass: it is made again, and what dropout kept from the seed of its draw. With padding and dropout whole maps, which
are small then, are made and kept in the working precision, where torch takes float32.

In bfloat16 the products of queries and keys are rounded before the softmax, as they are in any program that makes maps under
autocast; torch's fused forward pass keeps them in float32.

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
"""Entries of a map from which on a call per head costs less than it saves."""


def pays(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether `attend` is quicker than torch's own function for these [B, H, Q or K, D]."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or query.shape[-2] * key.shape[-2] < _WORTH_IT:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return dropout > 0 or query.dtype == torch.bfloat16
    return dropout == 0 and not _fused_is_quick(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(QK^T / sqrt(D)) V with dropout on the weights: [B, H, Q, D], [B, H, K, D] twice -> [B, H, Q, D].

    Dropout follows torch's random state (dcris.models.layers.dropout).
    """
    if not torch.is_grad_enabled():
        return _mix(query, key, value, Draw(dropout) if dropout else None)
    result: Tensor = _Attention.apply(query, key, value, dropout)  # type: ignore[no-untyped-call]
    return result


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """The same where `mask` is True, for small maps, as of pixels to words. With dropout torch keeps all of it in float32."""
    with torch.autocast("cpu", enabled=False):
        hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        scores = (query * query.shape[-1] ** -0.5) @ key.mT + hidden
        return drop(scores.softmax(-1), dropout) @ value


@cache
def _fused_is_quick(dtype: torch.dtype) -> bool:
    """Whether torch's fused forward pass multiplies as fast as the machine does."""
    return dtype != torch.bfloat16 or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _mix(query: Tensor, key: Tensor, value: Tensor, draw: Draw | None) -> Tensor:
    """The forward pass."""
    if draw is None and _fused_is_quick(query.dtype):
        return F.scaled_dot_product_attention(query, key, value)
    # Heads side by side in memory, as the layer after it wants them.
    mixed = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    scale = query.shape[-1] ** -0.5
    stretched = value * draw.stretch if draw else value
    scores, weights = _maps(query, key)
    heads = map(_heads, (mixed, query, key.mT, stretched))
    for out, q, k, v, kept in zip(*heads, _kept(query, key, draw), strict=True):
        torch.addmm(scores, q, k, beta=0, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=weights)
        if kept is not None:
            weights.mul_(scores.copy_(kept))
        torch.mm(weights, v, out=out)
    return mixed


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
        # Heads lie interleaved in memory; each is read several times here.
        scaled, upstream = (query * scale).contiguous(), (gradients[0] * (draw.stretch if draw else 1.0)).contiguous()
        key, value = key.contiguous(), value.contiguous()
        to_query, to_key, to_value = torch.empty_like(scaled), torch.empty_like(key), torch.empty_like(value)
        # For each query: the sum over its keys of weight times the weight's gradient.
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
    """[B, H, ...] -> B * H of [...]; taken apart at once, as one view after the other takes as long as a small product."""
    return [head for sample in x.unbind() for head in sample.unbind()]


def _kept(query: Tensor, key: Tensor, draw: Draw | None) -> Iterable[Tensor | None]:
    """For every head of every sample: what dropout keeps of its map, where there is dropout."""
    count = query.shape[0] * query.shape[1]
    return draw.kept(count, (query.shape[2], key.shape[2])) if draw else [None] * count


def _maps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two maps of one head, [Q, K]."""
    shape = query.shape[2], key.shape[2]
    return query.new_empty(shape), query.new_empty(shape)


def _minus(left: Tensor, shift: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices with left' @ right'.T = left @ right.T - shift[:, None], which saves a pass over the product; or many.

    In bfloat16 the shift is given as a sum of two numbers, so that nothing of it is lost.
    """
    high = shift.to(left.dtype)
    low = (shift - high.to(shift.dtype)).to(left.dtype)
    ones = right.new_ones(*right.shape[:-1], 2)
    return torch.cat((left, torch.stack((-high, -low), -1)), -1), torch.cat((right, ones), -1)
