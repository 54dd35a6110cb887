"""What the two dense adapters share (equation 1): down, and three branches of convolutions that each read those before them.

Shape letters: B batch, D tower width, r adapter width, * the grid (h w patches, or L text tokens).
"""

import torch
from torch import Tensor, nn

from dcris.models.encoders.blocks import Slot


class ConvUnit(nn.Sequential):
    """A convolution that keeps the grid, batch norm, ReLU. The convolution has a bias, as in the published code."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dimensions: int) -> None:
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
        super().__init__(
            conv(inputs, outputs, kernel, padding=kernel // 2),
            norm(outputs, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class DenseAdapter(Slot):
    """Linear_down and the dense branches over a grid of one (text) or two (patches) dimensions; the rest is the subclass's."""

    def __init__(self, width: int, inner: int, dimensions: int) -> None:
        super().__init__()
        r = inner
        self.down = nn.Linear(width, r)
        self.branch1 = ConvUnit(r, r // 2, 1, dimensions)
        self.branch2 = nn.Sequential(
            ConvUnit(r + r // 2, r // 16, 1, dimensions), ConvUnit(r // 16, r // 4, 3, dimensions)
        )
        self.branch3 = nn.Sequential(
            ConvUnit(r + r // 2 + r // 4, r // 16, 1, dimensions), ConvUnit(r // 16, r // 4, 5, dimensions)
        )

    def dense(self, features: Tensor) -> Tensor:
        """F_dense of equation 1: [B, r, *] -> [B, r, *]."""
        first = self.branch1(features)
        second = self.branch2(torch.cat((features, first), dim=1))
        third = self.branch3(torch.cat((features, first, second), dim=1))
        return torch.cat((first, second, third), dim=1) + features
