"""The DenseCrossAdapter (equations 1 and 2): dense multi-scale convolutions and attention to the text, in parallel to the MLP.

Shape letters: B batch, h w patch grid, N = h*w patches, P tokens (class, registers and patches), D tower width, r adapter
width, L text tokens, T text width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import DenseCrossConfig
from dcris.encoders.attention import MultiHeadAttention
from dcris.encoders.blocks import Slot, SlotContext


class ConvUnit(nn.Sequential):
    """A convolution that keeps the grid, batch norm, ReLU. The convolution has a bias, as in the published code."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class DenseCrossAdapter(Slot):
    """Equations 1 and 2, with the details of the authors' code for DETRIS.

    It reads what the MLP reads. Class and register tokens skip the convolutions and the attention.
    """

    reads_text = True

    def __init__(self, width: int, text_width: int, config: DenseCrossConfig) -> None:
        super().__init__()
        r = config.width
        self.scale = config.scale
        self.down = nn.Linear(width, r)
        self.branch1 = ConvUnit(r, r // 2, 1)
        self.branch2 = nn.Sequential(ConvUnit(r + r // 2, r // 16, 1), ConvUnit(r // 16, r // 4, 3))
        self.branch3 = nn.Sequential(ConvUnit(r + r // 2 + r // 4, r // 16, 1), ConvUnit(r // 16, r // 4, 5))
        self.image_proj = nn.Linear(r, config.attention_width)
        self.text_proj = nn.Linear(text_width, config.attention_width)
        self.attention = MultiHeadAttention(config.attention_width, config.heads, config.dropout)
        self.back_proj = nn.Linear(config.attention_width, r)
        self.up = nn.Linear(r, width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        if config.zero_init:
            nn.init.zeros_(self.up.weight)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, P, D] -> the same plus scale * f_dc. Needs context.grid and context.text."""
        assert context.grid is not None and context.text is not None
        # F_v = ReLU(Linear_down(f_v))
        features = F.relu(self.down(normed))
        prefix, patches = features[:, : context.prefix], features[:, context.prefix :]
        dense = self._dense(patches, context.grid)
        # F_cross = MHCA(F_dense, f_t) + F_v. Padding tokens are attended to, as in the published code.
        text = self.text_proj(context.text)
        cross = self.back_proj(self.attention(self.image_proj(dense), text, text)) + patches
        adapted = self.up(torch.cat((2 * prefix, cross), dim=1))
        return output + self.scale * adapted

    def _dense(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """F_dense of equation 1: [B, N, r] -> [B, N, r]."""
        features = patches.transpose(1, 2).unflatten(-1, grid)
        first = self.branch1(features)
        second = self.branch2(torch.cat((features, first), dim=1))
        third = self.branch3(torch.cat((features, first, second), dim=1))
        dense = torch.cat((first, second, third), dim=1) + features
        return dense.flatten(2).transpose(1, 2)
