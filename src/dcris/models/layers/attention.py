"""Attention, and its multi-head form as the adapters and the head use it.

Shape letters: B batch, H heads, Q queries, K keys, C width, D head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.layers import attention_cpu as cpu_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(QK^T / sqrt(D)) V with dropout on the weights: [B, H, Q, D], [B, H, K, D] twice -> [B, H, Q, D].

    `mask` is bool, True where a query may attend to a key; `causal` lets it attend to keys up to its own place.
    """
    if mask is None and not causal and cpu_attention.pays(query, key, value, dropout):
        return cpu_attention.attend(query, key, value, dropout)
    if mask is not None and not causal and dropout > 0 and query.device.type == "cpu":
        return cpu_attention.attend_masked(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout)


class MultiHeadAttention(nn.Module):
    """torch.nn.MultiheadAttention's weights and start, without the attention map that nobody reads.

    The queries', keys' and values' projections are one matrix [3C, C], started as torch does (Xavier over all three as one).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attend from [B, Q, C] to [B, K, C]; `padding` [B, K] bool is True for keys to leave out. Returns [B, Q, C]."""
        weights, biases = self.in_weight.chunk(3), self.in_bias.chunk(3)
        query, key, value = (
            self._split(F.linear(x, weight, bias))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if padding is None else ~padding[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask=mask, dropout=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def single_key(self, value: Tensor) -> Tensor:
        """Attention to one key alone: [B, C] -> [B, C], the same for every query.

        The softmax over one key is 1 whatever the query, so queries and keys have no part in the result, and their weights
        no gradient. There is no dropout: on a lone weight of 1 it would erase the whole text.
        """
        width = value.shape[-1]
        return self.out(F.linear(value, self.in_weight[2 * width :], self.in_bias[2 * width :]))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
