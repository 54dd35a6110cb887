"""AdaptFormer (Chen et al. 2022): a scaled bottleneck in parallel to the MLP of every block.

Shape letters: B batch, P tokens, D tower width.
"""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import Factor, MethodConfig, Probability, Width
from dcris.models.adapters.attach import attach_everywhere
from dcris.models.encoders.blocks import BranchSlot, SlotContext


class AdaptFormerConfig(MethodConfig):
    """Both towers, every block; the source has a vision tower only. Defaults are the source's."""

    name: Literal["adaptformer"] = "adaptformer"
    width: Width = 64
    scale: Factor = 0.1
    dropout: Probability = 0.1

    def attach(self, vision: Any, text: Any) -> None:
        """Put one adapter into each block."""
        attach_everywhere((vision, text), "mlp_slot", partial(ParallelAdapter, config=self))


class ParallelAdapter(BranchSlot):
    """MLP(LN(x)) + scale * up(ReLU(down(LN(x)))). The up-projection starts at zero.

    This is the paper's equation. The published code (models/custom_modules.py) gives the adapter x
    itself.
    """

    def __init__(self, width: int, config: AdaptFormerConfig) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.down = nn.Linear(width, config.width)
        self.up = nn.Linear(config.width, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, P, D] and MLP input -> adapted output [B, P, D]."""
        features = F.dropout(F.relu(self.down(normed)), self.dropout, self.training)
        return output + self.scale * self.up(features)
