"""The up-sample projector (section 3.4, equation 5): a convolution whose kernel is made from the
sentence feature.

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
    """Bilinear upsampling by 2, a 3x3 convolution without bias, batch norm, ReLU.

    For prediction, batch norm is folded into the convolution, which becomes a FinerConv
    (dcris.models.optimize).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, 2h, 2w]."""
        conv, norm, relu = self
        return relu(norm(finer_convolution(x, conv.weight, conv.bias) if isinstance(conv, nn.Conv2d) else conv(x)))


class FinerConv(nn.Module):
    """`finer_convolution` with a constant kernel, stored in the layout of its products."""

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
    """Upsample the features by 4 and convolve them with weights and a bias made from f_s."""

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
    """Upsample bilinearly by 2, then convolve with zero padding.

    Interpolation acts within channels and each tap of the kernel between channels, so the two
    commute: the nine taps multiply the coarse map, which takes a quarter of the products, and the
    results are interpolated, shifted and added, one axis at a time. That is a product with a small
    constant matrix, and no fine map is stored for the gradients.

    Channels are last in memory in input and output, so that a row's columns and taps form one
    matrix, and all rows another.

    Args:
        x: [B, C, h, w].
        weight: [O, C, 3, 3].
        bias: [O], or None.

    Returns:
        [B, O, 2h, 2w].
    """
    return _refine(x, [partial(F.linear, weight=matrix, bias=shift) for matrix, shift in _kernel_rows(weight, bias)])


def _kernel_rows(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Split a kernel [O, C, 3, 3] into rows: the matrix [3 * O, C] of the row's three taps, and
    their bias [3 * O].
    """
    # The middle tap covers every pixel once, and interpolation keeps constants, so the bias can be
    # added before it.
    middle = None if bias is None else torch.cat((torch.zeros_like(bias), bias, torch.zeros_like(bias)))
    rows = [taps.permute(2, 0, 1).flatten(0, 1) for taps in weight.unbind(2)]
    return list(zip(rows, (None, middle, None), strict=True))


def _refine(x: Tensor, rows: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return the fine map [B, O, 2h, 2w] of a coarse one [B, C, h, w].

    Each of `rows` multiplies pixels [B, N, C] by the three taps of a kernel row: [B, N, 3 * O].
    """
    batch, _, height, width = x.shape
    pixels = x.flatten(2).transpose(1, 2)
    across = _finer_taps(width, x).permute(2, 1, 0).flatten(1)  # fine column x (coarse column, tap)
    downs = _finer_taps(height, x).transpose(1, 2)  # for each tap: fine row x coarse row
    fine: Tensor | None = None
    for row, down in zip(rows, downs, strict=True):
        products = row(pixels).view(batch * height, width * KERNEL, -1)
        # Not len(products): that would be a constant in an exported graph.
        columns = torch.bmm(across.to(products.dtype).expand(batch * height, -1, -1), products).view(batch, height, -1)
        lines = down.to(columns.dtype).expand(batch, -1, -1)  # autocast does not cast the arguments of baddbmm_
        fine = torch.bmm(lines, columns) if fine is None else fine.baddbmm_(lines, columns)
    assert fine is not None
    return fine.view(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _finer_taps(length: int, like: Tensor) -> Tensor:
    """Return [3, length, 2 * length]: the weight of each coarse pixel for a kernel's three taps at
    each fine pixel.
    """
    pixels = torch.eye(length, device=like.device, dtype=like.dtype)
    fine = F.pad(F.interpolate(pixels[None], scale_factor=2.0, mode="linear")[0], (1, 1))
    return torch.stack([fine[:, tap : tap + 2 * length] for tap in range(KERNEL)])


def apply_kernels(x: Tensor, kernels: Tensor, bias: Tensor, before: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Convolve each map with its own 3x3 kernel -> [B, 1, H, W].

    A grouped convolution with one group per sample is equivalent but slow on every device. Here
    each of the nine taps is multiplied with all pixels, and the nine results are shifted and added.
    F.fold puts tap k at pixel p onto p + k - 1, while a convolution needs p - (k - 1), so the taps
    are reversed.

    Args:
        x: [B, C, H, W].
        kernels: [B, C'*9], channel first; C' = C without `before`.
        bias: [B].
        before: weight [C', C] and bias [C'] of a 1x1 convolution to apply first. It is applied to
            the nine taps instead of all pixels, which is equivalent since both are linear.
    """
    batch, _, height, width = x.shape
    taps = kernels.view(batch, -1, KERNEL**2).flip(-1)
    pixels = x.flatten(2).transpose(1, 2)  # channels last, as in memory
    if before is None:
        products = pixels @ taps
    else:
        # The bias is added to the products, not to their sum, since a tap over the padding must not
        # get it. It is a row because ONNX Runtime 1.32 computes a product with a vector wrongly.
        products = pixels @ (before[0].t() @ taps) + before[1][None] @ taps
    products = products.transpose(1, 2)
    logits = F.fold(products, (height, width), KERNEL, padding=KERNEL // 2)
    return logits + bias[:, None, None, None]
