"""Annotated objects on two images, which every tool's export in this folder has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


@dataclass(frozen=True)
class Object:
    image: str
    category: str
    phrase: str
    mask: Any
    """[H, W] uint8 of 0 and 1."""
    polygon: tuple[tuple[int, int], ...] = ()
    """Corners that enclose exactly the pixels of the mask; none for an object with a hole."""


def _filled(*boxes: tuple[int, int, int, int]) -> Any:
    """A mask of boxes (left, top, right, bottom); each covers or uncovers what was before."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] ^= 1
    return mask


OBJECTS = (
    Object(
        "1.png", "cup", "the left cup", _filled((3, 4, 9, 20), (9, 14, 15, 20)),
        ((3, 4), (9, 4), (9, 14), (15, 14), (15, 20), (3, 20)),
    ),
    Object("1.png", "cup", "the right cup", _filled((25, 5, 38, 17)), ((25, 5), (38, 5), (38, 17), (25, 17))),
    Object("2.png", "ring", "a ring", _filled((10, 8, 30, 26), (15, 13, 25, 21))),
    Object("2.png", "cup", "a small cup", _filled((33, 2, 39, 7)), ((33, 2), (39, 2), (39, 7), (33, 7))),
)  # fmt: skip


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (60 * number, 90, 40)).save(folder / f"{number}.png")
