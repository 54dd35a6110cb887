"""DETRIS's text adapter: the dense branches of equation 1 along the sentence, in parallel to the MLP of the text tower.

Shape letters: B batch, L text tokens, T tower width, r adapter width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import TextAdapterConfig
from dcris.models.adapters.dense import DenseAdapter
from dcris.models.encoders.blocks import SlotContext


class DenseTextAdapter(DenseAdapter):
    """The published DETRIS code's: down, ReLU, 1-D convolutions over the words, up. It reads what the plain one reads.

    The start token skips the convolutions, as the class token does in the visual adapter. Padding takes part in them, and in
    the batch norm's statistics; and a convolution looks ahead, so unlike CLIP a token's feature depends on the words behind
    it. Hence the sentence must be cut to the word length the weights were trained with.
    """

    def __init__(self, width: int, config: TextAdapterConfig) -> None:
        super().__init__(width, config.width, dimensions=1)
        self.scale = config.scale
        self.up = nn.Linear(config.width, width)
        if config.init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, L, T] -> the same plus scale * the adapter's."""
        features = F.relu(self.down(residual))
        start, words = features[:, :1], features[:, 1:]
        dense = self.dense(words.transpose(1, 2)).transpose(1, 2)
        return output + self.scale * self.up(torch.cat((2 * start, dense), dim=1))
