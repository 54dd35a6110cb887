"""LoRA (Hu et al. 2021): a low-rank change of the projections to queries and values in every block.

The peft library wraps a whole Linear and renames its weights. Here one Linear makes queries, keys
and values, and towers are filled and identified by the names of their tensors; hence this
implementation, which the tests compare with peft.

Shape letters: B batch, P tokens, D tower width.
"""

import math
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import Factor, MethodConfig, Probability, Width
from dcris.models.adapters.attach import attach_everywhere
from dcris.models.encoders.blocks import Block, QkvSlot, SlotContext


class LoraConfig(MethodConfig):
    """Both towers, every block. The ranks give the paper's count."""

    name: Literal["lora"] = "lora"
    foldable: ClassVar[bool] = True
    vision_rank: Width = 32
    text_rank: Width = 16
    scale: Factor = 1.0
    """alpha / r in the source."""
    dropout: Probability = 0.0

    def attach(self, vision: Any, text: Any) -> None:
        """Put one module into each block, for both projections."""
        for tower, rank in ((vision, self.vision_rank), (text, self.text_rank)):
            attach_everywhere((tower,), "qkv_slot", partial(LowRank, rank=rank, config=self))


class LowRank(QkvSlot):
    """q + scale * B_q A_q x and v + scale * B_v A_v x. B starts at zero, so the tower starts as the
    plain one.
    """

    def __init__(self, width: int, rank: int, config: LoraConfig) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        # For queries, then for values.
        self.down = nn.Parameter(torch.empty(2, rank, width))
        self.up = nn.Parameter(torch.zeros(2, width, rank))
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, qkv: Tensor, normed: Tensor, context: SlotContext) -> Tensor:
        """Queries, keys and values [B, P, 3D] and their input [B, P, D] -> changed [B, P, 3D]."""
        x = F.dropout(normed, self.dropout, self.training)
        query, key, value = qkv.chunk(3, dim=-1)
        changes = [self.scale * F.linear(F.linear(x, down), up) for down, up in zip(self.down, self.up, strict=True)]
        return torch.cat((query + changes[0], key, value + changes[1]), dim=-1)

    @torch.no_grad()
    def fold(self, block: Block) -> None:
        """Add the change to the weights of the projection."""
        query, _, value = block.attention.qkv.weight.chunk(3)
        for weight, down, up in zip((query, value), self.down, self.up, strict=True):
            weight.add_(up @ down, alpha=self.scale)
