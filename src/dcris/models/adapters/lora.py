"""LoRA (Hu et al. 2021): a low-rank change of the projections to queries and values in every block.

The peft library does the same to a whole Linear under new names. Here one Linear makes queries, keys and values, and towers are
filled and recognised by their tensors' names; so these are a few lines of our own, and peft is the oracle in the tests.

Shape letters: B batch, P tokens, D tower width, r rank.
"""

import math
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import Factor, MethodConfig, Width
from dcris.models.adapters.base import attach_everywhere
from dcris.models.encoders.blocks import Block, Slot, SlotContext


class LoraConfig(MethodConfig):
    """Both towers, every block. The ranks land on the paper's count."""

    name: Literal["lora"] = "lora"
    vision_rank: Width = 32
    text_rank: Width = 16
    scale: Factor = 1.0
    """What the source calls alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def starts_plain(self) -> bool:
        """B starts at zero."""
        return True

    def attach(self, vision: Any, text: Any) -> None:
        """One module a block, for both projections."""
        for tower, rank in ((vision, self.vision_rank), (text, self.text_rank)):
            attach_everywhere((tower,), "qkv_slot", partial(LowRank, rank=rank, config=self))


class LowRank(Slot):
    """q + scale * B_q A_q x and v + scale * B_v A_v x. B starts at zero, so the tower starts as the plain one."""

    def __init__(self, width: int, rank: int, config: LoraConfig) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        # For queries, then for values.
        self.down = nn.Parameter(torch.empty(2, rank, width))
        self.up = nn.Parameter(torch.zeros(2, width, rank))
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Queries, keys and values [B, P, 3D], and what they are made of [B, P, D] -> changed [B, P, 3D]."""
        x = F.dropout(normed, self.dropout, self.training)
        query, key, value = output.chunk(3, dim=-1)
        changes = [self.scale * F.linear(F.linear(x, down), up) for down, up in zip(self.down, self.up, strict=True)]
        return torch.cat((query + changes[0], key, value + changes[1]), dim=-1)

    @torch.no_grad()
    def merge(self, block: Block) -> bool:
        """Add the change to the projection's weights."""
        query, _, value = block.attention.qkv.weight.chunk(3)
        for weight, down, up in zip((query, value), self.down, self.up, strict=True):
            weight.add_(up @ down, alpha=self.scale)
        return True
