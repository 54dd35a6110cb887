"""The training objective (equation 6), and dice beside it.

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


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft dice coefficient, mean over the batch (Milletari et al. 2016, with plain sums; each with 1 added).

    It weighs every object alike, whatever share of the picture it covers; cross entropy weighs every pixel alike.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, S, S] in 0..1, brought to the grid as in equation 6.

    Returns:
        A scalar in 0..1, in float32 whatever the logits' precision.
    """
    truth = F.interpolate(masks, logits.shape[-2:], mode="nearest").float().flatten(1)
    guess = logits.float().sigmoid().flatten(1)
    shared = (guess * truth).sum(1)
    return (1 - (2 * shared + 1) / (guess.sum(1) + truth.sum(1) + 1)).mean()


def training_loss(logits: Tensor, masks: Tensor, dice_weight: float = 0.0) -> Tensor:
    """Equation 6, plus `dice_weight` times the dice loss where that is not 0. Shapes as of `dice_loss`."""
    loss = text_to_pixel_loss(logits, masks)
    return loss + dice_weight * dice_loss(logits, masks) if dice_weight else loss
