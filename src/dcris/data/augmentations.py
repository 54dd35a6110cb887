"""Augmentations of training samples, by name. See docs/extending_training.md for adding one."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.flip import swap_sides
from dcris.errors import DcrisError

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


def light(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], phrase: str, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Change brightness by up to 30% and contrast by up to 25%. Hues stay, so that colours in
    phrases remain true.
    """
    brightness, contrast = np.exp(generator.uniform(-1, 1, size=2) * np.log((1.3, 1.25)))
    middle = image.mean()
    table = np.clip((np.arange(256) - middle) * contrast + middle * brightness, 0, 255).round().astype(np.uint8)
    return table[image], mask, phrase


def zoom(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], phrase: str, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Cut out a window, or put the image onto a larger grey canvas: sides times 0.75 to 1.33.

    A sample is not changed if the window would lose more than a quarter of its object.
    """
    height, width = mask.shape
    scale = np.exp(generator.uniform(-1, 1) * np.log(4 / 3))
    rows, columns = round(height * scale), round(width * scale)
    # Where the window or, on a larger canvas, the image begins.
    top, left = (round(generator.random() * abs(size)) for size in (height - rows, width - columns))
    if scale < 1:
        window = np.s_[top : top + rows, left : left + columns]
        if mask[window].sum() < 0.75 * mask.sum():
            return image, mask, phrase
        return np.ascontiguousarray(image[window]), np.ascontiguousarray(mask[window]), phrase
    canvas = np.full((rows, columns, 3), 127, np.uint8)
    canvas[top : top + height, left : left + width] = image
    wider = np.zeros((rows, columns), np.uint8)
    wider[top : top + height, left : left + width] = mask
    return canvas, wider, phrase


AUGMENTATIONS: dict[str, Augmentation] = {"flip": flip, "light": light, "zoom": zoom}
"""Every augmentation by the name that `data.augmentations` uses."""


def augment(
    name: str, image: NDArray[np.uint8], mask: NDArray[np.uint8], phrase: str, generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Apply the augmentation of that name.

    Raises:
        DcrisError: it returns something else than an `Augmentation` does. An image of 0 to 1 would
            be trained on as black, and a mask of 0 and 255 as almost empty.
    """
    returned = AUGMENTATIONS[name](image, mask, phrase, generator)
    if not _is_sample(returned):
        parts = returned if isinstance(returned, tuple) else (returned,)
        raise DcrisError(
            f"the augmentation {name} must return an image [H, W, 3] (uint8), a mask [H, W] of 0 and 1 (uint8 or bool) and a "
            f"phrase, not {', '.join(map(_described, parts))}"
        )
    return returned


def _is_sample(value: Any) -> bool:
    if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], str)):
        return False
    image, mask, _ = value
    if not (isinstance(image, np.ndarray) and isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.size):
        return False
    return (
        image.dtype == np.uint8
        and image.shape == (*mask.shape, 3)
        and mask.dtype in (np.uint8, np.bool_)
        and bool(mask.max() <= 1)
    )


def _described(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    numbers = value.size and value.dtype.kind in "biuf"
    return f"{value.dtype} {list(value.shape)}" + (f" up to {value.max():.4g}" if numbers else "")
