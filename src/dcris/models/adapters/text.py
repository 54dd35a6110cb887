"""The text adapter (equation 3): down, ReLU, up, in parallel to the MLP of the text tower.

Shape letters: B batch, L text tokens, T tower width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import TextAdapterConfig
from dcris.models.encoders.blocks import Slot, SlotContext


class TextAdapter(Slot):
    """Equation 3. It reads the residual stream before the MLP's norm, as in the published code."""

    def __init__(self, width: int, config: TextAdapterConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Linear(width, config.width)
        self.up = nn.Linear(config.width, width)
        if config.init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, L, T] -> the same plus scale * f_w."""
        return output + self.scale * self.up(F.relu(self.down(residual)))
