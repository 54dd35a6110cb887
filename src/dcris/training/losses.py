"""The training losses: equation 6, and losses that can be added to it.

See docs/extending_training.md for adding one.

Shape letters: B batch, S side of the input square, h w logit grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dcris.config import MaskTarget, TrainConfig
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.models.segmentation import Output
from dcris.utils.arguments import kind_of

_NOTHING = -40.0
"""Logit whose loss against an empty mask, and its gradient, are 0 in float32."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from logits [B, 1, h, w] and masks [B, 1, h, w] in 0..1, already on the logits' grid, to
a scalar, the mean over the batch, in float32.

It must be a mean over samples, or splitting a batch into passes and over ranks would change its
value.
"""


def resize_masks(masks: Tensor, size: tuple[int, ...], target: MaskTarget = "nearest") -> Tensor:
    """Resize masks [B, 1, S, S] in 0..1 to [B, 1, h, w], the grid of the logits.

    Args:
        masks: of any size; those of the right size are returned as they are.
        size: h, w.
        target: "nearest" takes one pixel for each cell, as in the published code; "area" takes the
            mean of the cell; "aligned" takes the mean of a cell that lies where the protocol cris
            expects it, and makes a half-covered cell equal to its threshold.
    """
    if masks.shape[-2:] == size:
        return masks
    if target != "aligned":
        return F.interpolate(masks, size, mode=target)
    rows, columns = (_aligned_cells(pixels, cells, masks) for pixels, cells in zip(masks.shape[-2:], size, strict=True))
    share = (rows @ masks @ columns.T).clamp(0, 1)  # rounding exceeds 1
    # The odds of the share times those of the threshold: 0 and 1 stay, 0.5 becomes the threshold.
    return Cris.threshold * share / (Cris.threshold * share + (1 - Cris.threshold) * (1 - share))


def _aligned_cells(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Return [cells, pixels]: the weight of each pixel in each cell.

    The protocol interpolates probabilities with corners aligned, so the first and the last logit
    are on the centres of the first and the last pixel. The part of a cell that is outside of the
    mask does not count.
    """
    step = (pixels - 1) / max(1, cells - 1)
    edges = torch.arange(pixels + 1, device=like.device) - 0.5
    centres = torch.arange(cells, device=like.device)[:, None] * step
    starts = torch.maximum(edges[:-1], centres - step / 2)
    covered = (torch.minimum(edges[1:], centres + step / 2) - starts).clamp(min=0)
    return (covered / covered.sum(dim=1, keepdim=True)).to(like.dtype)


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
    sums and 1 added to each); 0 for a sample without an object, for which dice is not defined.

    Dice weighs all objects alike, whatever their share of the image; cross entropy weighs all
    pixels alike. With an empty mask, the coefficient would be 1 over the sum of the prediction:
    its gradient drives all predictions to 0 as long as the network cannot tell what is absent.

    Args:
        logits: [B, 1, h, w].
        masks: [B, 1, S, S] in 0..1, resized as in `text_to_pixel_loss`.

    Returns:
        A scalar in 0..1, in float32, whatever the precision of the logits.
    """
    target = resize_masks(masks, logits.shape[-2:]).float().flatten(1)
    prediction = logits.float().sigmoid().flatten(1)
    intersection = (prediction * target).sum(1)
    coefficient = (2 * intersection + 1) / (prediction.sum(1) + target.sum(1) + 1)
    return ((1 - coefficient) * target.any(1)).mean()


LOSSES: dict[str, Loss] = {"dice": dice_loss}
"""Losses that `train.losses` can add to equation 6, by name."""


def presence_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean binary cross entropy of the presence logits: a sample's object is present if its
    mask has a pixel.

    Args:
        logits: [B].
        masks: [B, 1, S, S] in 0..1, as they were read: a small object can vanish on the grid of the
            logits.

    Returns:
        A scalar in float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), _present(masks).float())


def _present(masks: Tensor) -> Tensor:
    """Return [B] bool: whether the mask has a pixel."""
    return masks.flatten(1).amax(1) > 0


def training_losses(output: Output, masks: Tensor, settings: TrainConfig) -> dict[str, Tensor]:
    """The terms of the training loss by name; the training loss is their sum.

    Args:
        output: of the network, in training.
        masks: [B, 1, S, S] in 0..1.
        settings: target, losses and presence are used.

    Returns:
        "text_to_pixel" (equation 6); each additional loss times its weight; "presence" times its
        weight, if there is a presence head, and then the others count 0 for absent objects; and the
        method's auxiliary losses.
    """
    logits = _taught_logits(output, masks)
    resized = resize_masks(masks, logits.shape[-2:], settings.target)
    terms = _mask_losses(logits, resized, settings)
    if output.presence is not None:
        terms["presence"] = settings.presence * presence_loss(output.presence, masks)
    return terms | _auxiliary_losses(output)


def masked_losses(output: Output, clean: Output, masks: Tensor, settings: TrainConfig) -> dict[str, Tensor]:
    """The terms of the loss of a masked batch (`train.masking`): the same losses, with the
    probabilities that the network predicts for the batch itself in place of the masks.

    Args:
        output: of the network for the masked batch, in training.
        clean: of the network for the batch itself; no gradient goes through it.
        masks: [B, 1, S, S] in 0..1.
        settings: losses is used.

    Returns:
        "masked", and the method's auxiliary losses. The presence head learns nothing from masked
        images: the object may be hidden.
    """
    taught, teacher = _taught_logits(output, masks), _taught_logits(clean, masks)
    terms = _mask_losses(taught, teacher.detach().float().sigmoid(), settings)
    return {"masked": torch.stack([*terms.values()]).sum()} | _auxiliary_losses(output)


def _taught_logits(output: Output, masks: Tensor) -> Tensor:
    """Return the logits that the losses of masks are of.

    Absent objects teach the presence head only. With an empty mask as the truth, masks would be
    faint wherever the network is in doubt.
    """
    if output.presence is None:
        return output.logits
    return output.logits.masked_fill(~_present(masks)[:, None, None, None], _NOTHING)


def _mask_losses(logits: Tensor, masks: Tensor, settings: TrainConfig) -> dict[str, Tensor]:
    """Return equation 6 as "text_to_pixel", and the losses added to it times their weights.

    Both tensors are on the grid of the logits.
    """
    terms = {"text_to_pixel": text_to_pixel_loss(logits, masks)}
    for name, weight in settings.losses.items():
        terms[name] = weight * _checked(f"the loss {name}", LOSSES[name](logits, masks), logits)
    return terms


def _auxiliary_losses(output: Output) -> dict[str, Tensor]:
    return {
        name: _checked(f"the loss {name} of the method", loss, output.logits) for name, loss in output.losses.items()
    }


def _checked(what: str, loss: object, logits: Tensor) -> Tensor:
    """Return a loss that an extension returned.

    Raises:
        DcrisError: it is no scalar, or a number other than 0 from which no gradient reaches the
            network: it would be logged and train nothing.
    """
    if not isinstance(loss, Tensor):
        found = kind_of(loss)
    elif loss.ndim:
        found = f"a tensor {list(loss.shape)}"
    elif logits.requires_grad and not loss.requires_grad and loss != 0:
        found = "a constant"
    else:
        return loss
    raise DcrisError(
        f"{what} must be a tensor without dimensions, the mean over the batch, that operations of torch compute from what the "
        f"network predicts, not {found}"
    )
