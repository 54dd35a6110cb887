"""The training losses: equation 6, and losses that can be added to it.

See docs/extending_training.md for adding one.

Shape letters: B batch, S side of the input square, h w logit grid.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from logits [B, 1, h, w] and masks [B, 1, h, w] in 0..1, already on the logits' grid, to
a scalar, the mean over the batch, in float32.

It must be a mean over samples, or splitting a batch into passes and over ranks would change its
value.
"""


def resize_masks(masks: Tensor, size: tuple[int, ...], target: Literal["nearest", "area"] = "nearest") -> Tensor:
    """Resize masks [B, 1, S, S] in 0..1 to [B, 1, h, w], the grid of the logits.

    Args:
        masks: of any size; those of the right size are returned as they are.
        size: h, w.
        target: "nearest" takes one pixel for each cell, as in the published code; "area" takes the
            mean of the cell.
    """
    return masks if masks.shape[-2:] == size else F.interpolate(masks, size, mode=target)


def text_to_pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Equation 6: the mean binary cross entropy of the logits against the mask, on the logits'
    grid.

    The paper takes the logarithm of a sigmoid; this computes the same value without overflow.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, S, S] in 0..1, resized by nearest neighbour, as in the published code, unless
            they are on the logits' grid.

    Returns:
        A scalar in float32, whatever the precision of the logits.
    """
    masks = resize_masks(masks, logits.shape[-2:])
    return F.binary_cross_entropy_with_logits(logits.float(), masks.float())


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft dice coefficient, mean over the batch (Milletari et al. 2016, with plain
    sums and 1 added to each).

    Dice weighs all objects alike, whatever their share of the image; cross entropy weighs all
    pixels alike.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, S, S] in 0..1, resized as in `text_to_pixel_loss`.

    Returns:
        A scalar in 0..1, in float32, whatever the precision of the logits.
    """
    target = resize_masks(masks, logits.shape[-2:]).float().flatten(1)
    prediction = logits.float().sigmoid().flatten(1)
    intersection = (prediction * target).sum(1)
    return (1 - (2 * intersection + 1) / (prediction.sum(1) + target.sum(1) + 1)).mean()


LOSSES: dict[str, Loss] = {"dice": dice_loss}
"""Losses that `train.losses` can add to equation 6, by name."""


def training_losses(logits: Tensor, masks: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The terms of the training loss by name; the training loss is their sum.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, h, w] in 0..1, from `resize_masks`.
        weights: the weight of each additional loss; keys of LOSSES.

    Returns:
        "text_to_pixel" (equation 6), and each additional loss times its weight.
    """
    extra = {name: weight * LOSSES[name](logits, masks) for name, weight in weights.items()}
    return {"text_to_pixel": text_to_pixel_loss(logits, masks)} | extra
