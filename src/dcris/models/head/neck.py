"""The cross-modal neck (section 3.4, equation 4): three visual levels, gated by the sentence
feature and fused.

Shape letters: B batch, h w patch grid, D tower width, E sentence width, C head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dcris.models.layers.attention import MultiHeadAttention


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps the grid, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Neck(nn.Module):
    """Gate the levels by the sentence feature, fuse them, and add coordinates."""

    def __init__(
        self,
        level_widths: Sequence[int],
        sentence_width: int,
        width: int,
        heads: int,
        *,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.text_proj = nn.Linear(sentence_width, width)
        self.level_convs = nn.ModuleList(ConvNormReLU(inputs, width, 1) for inputs in level_widths)
        with torch.no_grad():
            # The published code has a transposed convolution here, whose initial weights PyTorch
            # scales by the outputs.
            self.level_convs[-1].get_parameter("0.weight").mul_((level_widths[-1] / width) ** 0.5)
        self.level_attentions = nn.ModuleList(MultiHeadAttention(width, heads) for _ in level_widths)
        self.aggregate = ConvNormReLU(len(level_widths) * width, width, 1)
        self.coordinate_conv = nn.Sequential(ConvNormReLU(width + 2, width, 3), ConvNormReLU(width, width, 3))

    def forward(self, levels: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """Three maps [B, D, h, w], each of its own width, and f_s [B, E] -> f_c [B, C, h, w]."""
        text = self.text_proj(sentence)
        gated = []
        for level, conv, attention in zip(levels, self.level_convs, self.level_attentions, strict=True):
            assert isinstance(attention, MultiHeadAttention)
            # The attention to the sentence feature has a single key, so its result is the same for
            # all pixels.
            gated.append(conv(level) * attention.single_key(text)[:, :, None, None])
        fused = self.aggregate(torch.cat(gated, dim=1))
        placed: Tensor = self.coordinate_conv(torch.cat((fused, _coordinates(fused)), dim=1))
        return fused + placed if self.residual else placed


def _coordinates(like: Tensor) -> Tensor:
    """Return x and y coordinates [B, 2, h, w], from -1 (first column or row) to 1 (last)."""
    batch, _, rows, columns = like.shape
    y, x = (torch.linspace(-1, 1, count, device=like.device, dtype=like.dtype) for count in (rows, columns))
    grid = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)))
    return grid.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
