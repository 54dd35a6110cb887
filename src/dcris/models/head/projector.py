"""The up-sample projector (section 3.4, equation 5): the sentence becomes the kernel that reads out the mask.

Shape letters: B batch, h w patch grid, C head width, E sentence width.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.head.neck import ConvNormReLU

KERNEL = 3


class FinerConvNormReLU(ConvNormReLU):
    """A map made twice as fine by bilinear interpolation, then a 3x3 convolution without bias, batch norm, ReLU.

    For prediction the convolution has batch norm's part in it, and is a FinerConv (dcris.models.optimize).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, 2h, 2w]."""
        conv, norm, relu = self
        return relu(norm(finer_convolution(x, conv.weight, conv.bias) if isinstance(conv, nn.Conv2d) else conv(x)))


class FinerConv(nn.Module):
    """`finer_convolution` with a constant kernel, which lies in memory as it is multiplied and is not copied each time."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.rows = nn.ModuleList()
        for matrix, shift in _kernel_rows(conv.weight.detach(), None if conv.bias is None else conv.bias.detach()):
            row = nn.Linear(conv.in_channels, KERNEL * conv.out_channels, bias=shift is not None, device="meta")
            row.weight = nn.Parameter(matrix.contiguous(), conv.weight.requires_grad)
            if shift is not None:
                row.bias = nn.Parameter(shift, conv.weight.requires_grad)
            self.rows.append(row)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, 2h, 2w]."""
        return _refine(x, self.rows)


class Projector(nn.Module):
    """Four times finer features, and a convolution whose weights and bias are made from f_s."""

    def __init__(self, width: int, sentence_width: int, bias: float | None) -> None:
        super().__init__()
        half = width // 2
        self.refine1 = FinerConvNormReLU(width, width)
        self.refine2 = FinerConvNormReLU(width, half)
        self.visual = nn.Conv2d(half, half, 1)
        self.text = nn.Linear(sentence_width, half * KERNEL**2 + 1)
        if bias is not None:
            nn.init.constant_(self.text.bias[-1], bias)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        """F_mm [B, C, h, w] and f_s [B, E] -> logits [B, 1, 4h, 4w]."""
        x = self.refine2(self.refine1(features))
        parameters = self.text(sentence)
        assert self.visual.bias is not None
        before = self.visual.weight.flatten(1), self.visual.bias
        return apply_kernels(x, parameters[:, :-1], parameters[:, -1], before)


def finer_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Interpolate bilinearly to twice the size, then convolve (zero padding): [B, C, h, w], [O, C, 3, 3] -> [B, O, 2h, 2w].

    `bias` is [O], if any.

    Interpolation works within a channel and each tap of the kernel between channels, so they can change places: the nine taps
    multiply the coarse map, which takes a quarter of the products, and what they give is interpolated, shifted and added
    up, one axis at a time. That is a product with a small constant matrix, and nothing fine has to be kept for the gradients.

    Channels come last in memory, there and here: then a row's columns and their taps are one matrix, and all rows another.
    """
    return _refine(x, [partial(F.linear, weight=matrix, bias=shift) for matrix, shift in _kernel_rows(weight, bias)])


def _kernel_rows(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """A kernel [O, C, 3, 3] by rows: the matrix [3 * O, C] of a row's three taps, and what they add [3 * O]."""
    # The kernel's middle sees each pixel, and interpolation leaves constants alone, so the bias may come first.
    middle = None if bias is None else torch.cat((torch.zeros_like(bias), bias, torch.zeros_like(bias)))
    rows = [taps.permute(2, 0, 1).flatten(0, 1) for taps in weight.unbind(2)]
    return list(zip(rows, (None, middle, None), strict=True))


def _refine(x: Tensor, rows: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """[B, C, h, w] -> [B, O, 2h, 2w], where each of `rows` multiplies pixels [B, N, C] by a row's three taps: [B, N, 3 * O]."""
    batch, _, height, width = x.shape
    pixels = x.flatten(2).transpose(1, 2)
    across = _finer_taps(width, x).permute(2, 1, 0).flatten(1)  # fine column by (coarse column, tap)
    downs = _finer_taps(height, x).transpose(1, 2)  # for each tap: fine row by coarse row
    fine: Tensor | None = None
    for row, down in zip(rows, downs, strict=True):
        answers = row(pixels).view(batch * height, width * KERNEL, -1)
        # Not len(answers): that would be a constant in an exported graph.
        columns = torch.bmm(across.to(answers.dtype).expand(batch * height, -1, -1), answers).view(batch, height, -1)
        lines = down.to(columns.dtype).expand(batch, -1, -1)  # autocast leaves a product in place with what it is given
        fine = torch.bmm(lines, columns) if fine is None else fine.baddbmm_(lines, columns)
    assert fine is not None
    return fine.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _finer_taps(length: int, like: Tensor) -> Tensor:
    """[3, length, 2 * length]: how much of each coarse pixel a kernel's first, middle and last tap see at each fine one."""
    pixels = torch.eye(length, device=like.device, dtype=like.dtype)
    fine = F.pad(F.interpolate(pixels[None], scale_factor=2.0, mode="linear")[0], (1, 1))
    return torch.stack([fine[:, tap : tap + 2 * length] for tap in range(KERNEL)])


def apply_kernels(x: Tensor, kernels: Tensor, bias: Tensor, before: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Convolve each map with its own 3x3 kernel: [B, C, H, W], [B, C'*9] (channel first), [B] -> [B, 1, H, W].

    A grouped convolution with one group per sample says the same and is slow on every device. Here each of the nine taps is
    a product with all pixels, and the nine results are shifted and added: F.fold puts tap k at pixel p onto p + k - 1,
    while a convolution wants p - (k - 1), so the taps are taken in reverse.

    `before` is the weight [C', C] and bias [C'] of a 1x1 convolution that comes first; C' = C without it. It is applied to the
    nine taps instead of to all pixels, which gives the same since nothing lies between the two.
    """
    batch, _, height, width = x.shape
    taps = kernels.view(batch, -1, KERNEL**2).flip(-1)
    pixels = x.flatten(2).transpose(1, 2)  # channels last, as they lie in memory
    if before is None:
        answers = pixels @ taps
    else:
        # The bias is part of the answers, not of the sum, since a tap that sees the padding gets none of it. As a row: a
        # product with a vector comes out wrong in ONNX Runtime 1.32.
        answers = pixels @ (before[0].t() @ taps) + before[1][None] @ taps
    answers = answers.transpose(1, 2)
    logits = F.fold(answers, (height, width), KERNEL, padding=KERNEL // 2)
    return logits + bias[:, None, None, None]
