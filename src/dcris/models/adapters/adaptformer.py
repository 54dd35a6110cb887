"""AdaptFormer (Chen et al. 2022): a scaled bottleneck in parallel to the MLP of every block.

Shape letters: B batch, P tokens, D tower width, r adapter width.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import Factor, MethodConfig, Width
from dcris.models.adapters.base import attach_everywhere
from dcris.models.encoders.blocks import Slot, SlotContext


class AdaptFormerConfig(MethodConfig):
    """Both towers, every block; the source has a vision tower alone. Defaults are the source's."""

    name: Literal["adaptformer"] = "adaptformer"
    width: Width = 64
    scale: Factor = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def starts_plain(self) -> bool:
        """The up-projection starts at zero."""
        return True

    def attach(self, vision: Any, text: Any) -> None:
        """One adapter a block."""
        attach_everywhere((vision, text), "mlp_slot", partial(ParallelAdapter, config=self))


class ParallelAdapter(Slot):
    """MLP(LN(x)) + scale * up(ReLU(down(LN(x)))). It starts at zero."""

    def __init__(self, width: int, config: AdaptFormerConfig) -> None:
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.down = nn.Linear(width, config.width)
        self.up = nn.Linear(config.width, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, P, D], and what the MLP read -> adapted [B, P, D]."""
        features = F.dropout(F.relu(self.down(normed)), self.dropout, self.training)
        return output + self.scale * self.up(features)
