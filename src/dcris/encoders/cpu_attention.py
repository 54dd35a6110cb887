"""Attention with gradients on a CPU, several times as fast as torch 2.13's.

torch's fused backward pass reaches a sixth of the speed of its own matrix products in bfloat16, and with dropout there is no
fused path at all: whole attention maps are drawn, masked, multiplied and kept, and a megabyte's worth of them leaves the
cache between any two of these steps. Here one head's map is worked on at a time, in buffers that are reused and stay in the
cache. Nothing of a map is remembered for the backward pass: it is made again from the softmax's denominators, and what dropout
kept from the seed of its draw.

Shape letters: B batch, H heads, Q queries, K keys, D head width.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16
_WORTH_IT = 1 << 16
"""Entries of a map from which on a call per head costs less than it saves."""


def pays(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether `attend` is quicker than torch's own function for these [B, H, Q or K, D]."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    large = query.shape[-2] * key.shape[-2] >= _WORTH_IT
    return query.device.type == "cpu" and wants_gradient and large and (dropout > 0 or query.dtype == torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(QK^T / sqrt(D)) V with dropout on the weights: [B, H, Q, D], [B, H, K, D] twice -> [B, H, Q, D].

    Dropout follows torch's random state. Its probability is rounded to a multiple of 1/65,536, as a draw takes 16 bits.
    """
    result: Tensor = _Attention.apply(query, key, value, dropout)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        mixed, denominators = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.draw = None
        if dropout:
            # Without dropout the map need not be seen; with it, only the denominators are of use.
            ctx.draw = _Draw(dropout)
            scale = query.shape[-1] ** -0.5
            weights, mask = _maps(query, key)
            stretched = value * ctx.draw.stretch
            for place, kept in zip(_heads(query), ctx.draw.maps(query, key), strict=True):
                torch.mm(*_minus(query[place] * scale, denominators[place], key[place]), out=weights).exp_()
                weights.mul_(mask.copy_(kept))
                mixed[place] = weights @ stretched[place]
        ctx.save_for_backward(query, key, value, mixed, denominators)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mixed, denominators = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        draw: _Draw | None = ctx.draw
        # Heads lie interleaved in memory; each is read several times here.
        scaled, upstream = (query * scale).contiguous(), (gradients[0] * (draw.stretch if draw else 1.0)).contiguous()
        key, value = key.contiguous(), value.contiguous()
        to_query, to_key, to_value = torch.empty_like(scaled), torch.empty_like(key), torch.empty_like(value)
        # For each query: the sum over its keys of weight times the weight's gradient.
        totals = (gradients[0].to(denominators.dtype) * mixed.to(denominators.dtype)).sum(-1)
        weights, change = _maps(query, key)
        mask = torch.empty_like(weights) if draw else weights
        places = _heads(query)
        for place, kept in zip(places, draw.maps(query, key) if draw else [None] * len(places), strict=True):
            out = upstream[place]
            torch.mm(*_minus(scaled[place], denominators[place], key[place]), out=weights).exp_()
            if kept is None:
                torch.mm(*_minus(out, totals[place], value[place]), out=change)
            else:
                mask.copy_(kept)
                torch.mm(out, value[place].t(), out=change).mul_(mask)
                change.sub_(totals[place][:, None].to(change.dtype))
            change.mul_(weights)
            torch.mm(change.t(), scaled[place], out=to_key[place])
            torch.mm(change, key[place], out=to_query[place])
            torch.mm((weights if kept is None else weights.mul_(mask)).t(), out, out=to_value[place])
        return to_query.mul_(scale), to_key, to_value, None


def _heads(x: Tensor) -> list[tuple[int, int]]:
    return [(sample, head) for sample in range(x.shape[0]) for head in range(x.shape[1])]


def _maps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two maps of one head, [Q, K]."""
    shape = query.shape[2], key.shape[2]
    return query.new_empty(shape), query.new_empty(shape)


def _minus(left: Tensor, shift: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is left @ right.T - shift[:, None], which saves a pass over the product.

    In bfloat16 the shift is given as a sum of two numbers, so that nothing of it is lost.
    """
    high = shift.to(left.dtype)
    low = (shift - high.to(shift.dtype)).to(left.dtype)
    ones = right.new_ones(len(right), 2)
    return torch.cat((left, torch.stack((-high, -low), 1)), 1), torch.cat((right, ones), 1).t()


class _Draw:
    """What dropout keeps of the maps: the same each time it is asked, since only the seed is remembered.

    torch draws one number after the other; numpy's generator is several times as fast, and 16 bits a weight are enough. Its
    seed comes from torch's state, so that a step's randomness is still a function of its seed alone.
    """

    def __init__(self, dropout: float) -> None:
        self.cut = round(dropout * _LEVELS)
        self.seed = int(torch.randint(1 << 62, ()))
        self.stretch = _LEVELS / (_LEVELS - self.cut)
        """By what the weights that are kept are multiplied in return."""

    def maps(self, query: Tensor, key: Tensor) -> Iterator[Tensor]:
        """For each head of each sample, which weights are kept: [Q, K] bool. One map after the other, in the same memory."""
        generator = np.random.SFC64(self.seed)
        kept = torch.empty(query.shape[2], key.shape[2], dtype=torch.bool)
        for _ in _heads(query):
            draws = generator.random_raw(-(-kept.numel() // 4)).view(np.uint16)[: kept.numel()]
            np.greater_equal(draws.reshape(kept.shape), self.cut, out=kept.numpy())
            yield kept
