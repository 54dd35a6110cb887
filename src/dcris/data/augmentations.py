"""Augmentations of training samples, by name. See docs/extending_training.md for adding one."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dcris.data.flip import swap_sides

Augmentation = Callable[
    [NDArray[np.uint8], NDArray[np.uint8], str, np.random.Generator], tuple[NDArray[np.uint8], NDArray[np.uint8], str]
]
"""Function from (image, mask, phrase, generator) to a changed (image, mask, phrase).

The image is [H, W, 3] uint8 RGB and the mask [H, W] with 1 on the object, both before they are
resized; the two returned arrays have the same H and W. All randomness comes from the generator, so
that a resumed run sees the same samples.
"""


def flip(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], phrase: str, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Mirror image and mask, and exchange left and right in the phrase.

    Samples with an ambiguous phrase are not changed.
    """
    mirrored = swap_sides(phrase)
    if mirrored is None:
        return image, mask, phrase
    return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1]), mirrored


AUGMENTATIONS: dict[str, Augmentation] = {"flip": flip}
"""Every augmentation by the name that `data.augmentations` uses."""
