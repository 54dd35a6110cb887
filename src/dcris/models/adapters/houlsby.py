"""The adapter of Houlsby et al. (2019): a bottleneck in series, behind attention and behind the MLP of every block.

Shape letters: B batch, P tokens, D tower width, r adapter width.
"""

import re
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import MethodConfig, Width
from dcris.models.adapters.base import Place, attach_everywhere
from dcris.models.encoders.blocks import Slot, SlotContext

_PLACES: tuple[Place, Place] = ("attention_slot", "mlp_slot")


class HoulsbyConfig(MethodConfig):
    """Both towers, every block. The paper's count is that of one 64 wide adapter a block; these are two of half that width."""

    name: Literal["houlsby"] = "houlsby"
    width: Width = 32
    norms: bool = False
    """Train the towers' layer norms too, as the source does."""
    zero_init: bool = False
    """Start the up-projection at zero, so that the tower starts exactly as the plain one, not only nearly."""

    def starts_plain(self) -> bool:
        """With zero_init; else nearly."""
        return self.zero_init

    def attach(self, vision: Any, text: Any) -> None:
        """Two adapters a block."""
        for place in _PLACES:
            attach_everywhere((vision, text), place, partial(HoulsbyAdapter, config=self))

    def trains(self, name: str) -> bool:
        """The layer norms, where that is asked for."""
        return self.norms and re.search(r"\.norm[12]?\.", name) is not None


class HoulsbyAdapter(Slot):
    """x + up(GELU(down(x))) on what the branch made, before it joins the residual stream (and before LayerScale)."""

    def __init__(self, width: int, config: HoulsbyConfig) -> None:
        super().__init__()
        self.down = nn.Linear(width, config.width)
        self.up = nn.Linear(config.width, width)
        for linear in (self.down, self.up):  # small enough for the whole to be nearly the identity, as in the source
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)
        if config.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Branch output [B, P, D] -> adapted [B, P, D]."""
        return output + self.up(F.gelu(self.down(output)))
