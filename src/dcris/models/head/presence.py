"""The presence head, which is not in the paper: whether the image shows what the expression names.

Shape letters: B batch, h w patch grid, C head width, E sentence width.
"""

import torch
from torch import Tensor, nn

from dcris.models.layers.attention import MultiHeadAttention


class PresenceHead(nn.Module):
    """Attend from the sentence feature to the decoder's tokens, and map both to one logit.

    The attention finds the place in the image that matters for the expression, however small it is;
    a mean over all tokens would hide it. The map has a hidden layer, because presence is whether
    the two agree, which no sum over both can tell. It starts at 0, a probability of one half.
    """

    def __init__(self, width: int, sentence_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(sentence_width, width)
        self.attention = MultiHeadAttention(width, heads)
        self.hidden = nn.Linear(2 * width, width)
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))
        """Divides the logit: 1 in training, then fitted by `dcris evaluate --calibrate-on`."""

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        """F_mm [B, C, h, w] and f_s [B, E] -> logits [B], positive for "present"."""
        query = self.query(sentence)
        tokens = features.flatten(2).transpose(1, 2)
        attended = self.attention(query[:, None], tokens, tokens)[:, 0]
        hidden = self.hidden(torch.cat((attended, query), dim=-1)).relu()
        return (hidden.float() @ self.weight.float() + self.bias.float()) / self.temperature
