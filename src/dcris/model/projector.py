"""The up-sample projector (section 3.4, equation 5): the sentence becomes the kernel that reads out the mask.

Shape letters: B batch, h w patch grid, C head width, E sentence width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dcris.model.neck import ConvNormReLU

KERNEL = 3


class Projector(nn.Module):
    """Four times finer features, and a convolution whose weights and bias are made from f_s."""

    def __init__(self, width: int, sentence_width: int, bias: float | None) -> None:
        super().__init__()
        half = width // 2
        self.refine1 = ConvNormReLU(width, width, 3)
        self.refine2 = ConvNormReLU(width, half, 3)
        self.visual = nn.Conv2d(half, half, 1)
        self.text = nn.Linear(sentence_width, half * KERNEL**2 + 1)
        if bias is not None:
            nn.init.constant_(self.text.bias[-1], bias)

    def forward(self, features: Tensor, sentence: Tensor) -> Tensor:
        """F_mm [B, C, h, w] and f_s [B, E] -> logits [B, 1, 4h, 4w]."""
        x = features
        for refine in (self.refine1, self.refine2):
            x = refine(F.interpolate(x, scale_factor=2.0, mode="bilinear"))
        parameters = self.text(sentence)
        return apply_kernels(self.visual(x), parameters[:, :-1], parameters[:, -1])


def apply_kernels(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Convolve each map with its own 3x3 kernel: [B, C, H, W], [B, C*9] (channel first), [B] -> [B, 1, H, W].

    A grouped convolution with one group per sample says the same and is slow on every device. Here each of the nine taps is
    a product with all pixels, and the nine results are shifted and added: F.fold puts tap k at pixel p onto p + k - 1,
    while a convolution wants p - (k - 1), so the taps are taken in reverse.
    """
    batch, channels, height, width = x.shape
    taps = kernels.view(batch, channels, KERNEL**2).flip(-1).transpose(1, 2)
    answers = taps @ x.flatten(2)
    logits = F.fold(answers, (height, width), KERNEL, padding=KERNEL // 2)
    return logits + bias[:, None, None, None]
