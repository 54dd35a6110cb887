"""Training on inputs of several sizes (`data.scales`)."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

_STREAM = 0x53495A45
"""Keeps the draws of sizes apart from the other draws by seed and number."""


def draw_size(sizes: tuple[int, ...], seed: int, step: int) -> int:
    """Return the size of a step, counted from 0; it is the same on all ranks."""
    return sizes[int(np.random.default_rng([seed, step, _STREAM]).integers(len(sizes)))]


def resize(images: Tensor, side: int) -> Tensor:
    """Resize images [B, 3, H, W] to `side` pixels a side; those of that size stay as they are."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
