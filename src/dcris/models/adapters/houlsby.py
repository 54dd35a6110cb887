"""The adapter of Houlsby et al. (2019): a bottleneck in series, after attention and after the MLP
of every block.

Shape letters: B batch, P tokens, D tower width.
"""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import MethodConfig, Width
from dcris.models.adapters.attach import attach_everywhere, is_layer_norm
from dcris.models.encoders.blocks import BranchSlot, Place, SlotContext

_PLACES: tuple[Place, Place] = ("attention_slot", "mlp_slot")


class HoulsbyConfig(MethodConfig):
    """Both towers, every block.

    The paper's count is that of one adapter of width 64 per block; the two adapters here have half
    that width each.
    """

    name: Literal["houlsby"] = "houlsby"
    width: Width = 32
    norms: bool = False
    """Train the towers' layer norms too, as the source does."""
    zero_init: bool = False
    """Start the up-projection at zero, so that the tower starts exactly, not approximately, as the
    plain one."""

    def attach(self, vision: Any, text: Any) -> None:
        """Put two adapters into each block."""
        for place in _PLACES:
            attach_everywhere((vision, text), place, partial(HoulsbyAdapter, config=self))

    def trains(self, name: str) -> bool:
        """Return whether the weight belongs to a layer norm, if `norms` is set."""
        return self.norms and is_layer_norm(name)


class HoulsbyAdapter(BranchSlot):
    """x + up(GELU(down(x))) on the branch's output, before LayerScale and the residual sum."""

    def __init__(self, width: int, config: HoulsbyConfig) -> None:
        super().__init__()
        self.down = nn.Linear(width, config.width)
        self.up = nn.Linear(config.width, width)
        # So small that the adapter starts near the identity. The default of the authors' code
        # (modeling.py of adapter-bert) is a tenth of it.
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)
        if config.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Branch output [B, P, D] -> adapted output [B, P, D]."""
        return output + self.up(F.gelu(self.down(output)))
