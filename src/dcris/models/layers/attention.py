"""Scaled dot-product attention, and the multi-head attention of the adapters and the head.

Shape letters: B batch, H heads, Q queries, K keys, C width, D head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.layers import attention_cpu as cpu_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Compute softmax(QK^T / sqrt(D)) V with dropout on the weights.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        value: [B, H, K, D].
        mask: bool, True where a query attends to a key.
        causal: queries attend only to keys up to their own position.
        dropout: probability.

    Returns:
        [B, H, Q, D].
    """
    if mask is None and not causal and cpu_attention.pays(query, key, value, dropout):
        return cpu_attention.attend(query, key, value, dropout)
    if not causal and cpu_attention.stores_maps(query, key, mask, dropout):
        return cpu_attention.attend_small(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, dropout_p=dropout)


class MultiHeadAttention(nn.Module):
    """torch.nn.MultiheadAttention with the same weights and initialisation, without returning
    attention maps.

    The projections of queries, keys and values are one matrix [3C, C], initialised as in torch
    (Xavier over the whole matrix).
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
        """Attend from queries [B, Q, C] to keys and values [B, K, C] -> [B, Q, C].

        `padding` [B, K] is True for keys to exclude.
        """
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
        """Attend to a single key: [B, C] -> [B, C], the same for every query.

        The softmax over one key is 1 for any query, so the result does not depend on queries and
        keys, and their weights get no gradient. There is no dropout: on a single weight of 1 it
        would remove the whole text.
        """
        width = value.shape[-1]
        return self.out(F.linear(value, self.in_weight[2 * width :], self.in_bias[2 * width :]))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
