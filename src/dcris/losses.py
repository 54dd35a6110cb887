"""The training objective (equation 6).

Shape letters: B batch, S side of the input square, h w logit grid.
"""

from torch import Tensor
from torch.nn import functional as F


def text_to_pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Equation 6: the mean binary cross entropy of the logits against the mask, on the logits' grid.

    The paper takes the logarithm of a sigmoid; this is the same number computed without overflow.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, S, S] in 0..1, brought to the grid by nearest neighbour, as in the published code.

    Returns:
        A scalar, in float32 whatever the logits' precision.
    """
    masks = F.interpolate(masks, logits.shape[-2:], mode="nearest")
    return F.binary_cross_entropy_with_logits(logits.float(), masks.float())
