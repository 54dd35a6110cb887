"""DINOv3's rotary positions: queries and keys of patches are turned by angles that their places give (Simeoni et al. 2025).

Shape letters: B batch, H heads, P tokens, N = h*w patches, d head width, a multiple of 4.
"""

import math

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, [N, d] each."""

_BASE = 100.0


def patch_rotation(grid: tuple[int, int], width: int, like: Tensor) -> Rotation:
    """The rotation of each patch of a grid (h, w), row by row, for heads of that width, in the type of `like` and beside it.

    A patch's place are its centre's coordinates in -1..1, along the picture's own sides, so any grid spans the same angles.
    The first quarter of the frequencies turns by the row, the second by the column, and the second half repeats the first.
    """
    kind = torch.promote_types(like.dtype, torch.float32)
    frequencies = _BASE ** -torch.arange(0, 1, 4 / width, dtype=torch.float32, device=like.device).to(kind)
    rows, columns = ((2 * torch.arange(n, dtype=kind, device=like.device) + 1) / n - 1 for n in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_patches(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the last N tokens of [B, H, P, d]; those before them (class, registers) have no place and stay."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    prefix, patches = x.split((x.shape[-2] - len(cosine), len(cosine)), dim=-2)
    first, second = patches.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((prefix, patches * cosine + turned * sine), dim=-2)
