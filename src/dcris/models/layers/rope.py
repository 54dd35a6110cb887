"""DINOv3's rotary positions: the queries and keys of patches are rotated by angles of their
positions (Simeoni et al. 2025).

Shape letters: B batch, H heads, P tokens, N = h*w patches, d head width, a multiple of 4.
"""

import math

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, [N, d] each."""

_BASE = 100.0


def patch_rotation(grid: tuple[int, int], width: int, like: Tensor) -> Rotation:
    """Return the rotation of each patch of a grid, row by row.

    A patch's position is its centre in coordinates from -1 to 1 along the image's sides, so any
    grid spans the same angles. The first quarter of the frequencies rotates by the row, the second
    by the column, and the second half repeats the first.

    Args:
        grid: rows and columns h, w.
        width: of a head.
        like: a tensor whose type and device the result has.
    """
    kind = torch.promote_types(like.dtype, torch.float32)
    frequencies = _BASE ** -torch.arange(0, 1, 4 / width, dtype=torch.float32, device=like.device).to(kind)
    rows, columns = ((2 * torch.arange(n, dtype=kind, device=like.device) + 1) / n - 1 for n in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_patches(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the last N tokens of [B, H, P, d]; those before them (class, registers) have no
    position.
    """
    cosine, sine = (part.to(x.dtype) for part in rotation)
    prefix, patches = x.split((x.shape[-2] - len(cosine), len(cosine)), dim=-2)
    first, second = patches.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return torch.cat((prefix, patches * cosine + rotated * sine), dim=-2)
