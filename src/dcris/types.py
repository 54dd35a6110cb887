"""The vocabulary the whole package shares.

Shape letters: B batch, H W pixels of a photograph, S side of the network's square input, h w patch grid, L text tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SoftMask:
    """A picture of a mask that need not be two-valued, as JPEG masks and probability maps are not."""

    path: Path
    threshold: float
    """A pixel is the object's if its value is greater: a share of the full scale below 1, else a value."""


Segmentation = list[list[float]] | Mapping[str, Any] | Path | SoftMask
"""A mask as COCO stores it, polygons (x, y, x, y, ...) or run lengths {"size": [H, W], "counts": list, str or bytes}; or the
path of a picture of two values: 0, and any other for the object."""

MaskArray = NDArray[np.bool_]
"""[H, W] bool: True where the object is."""


@dataclass(frozen=True, slots=True)
class Expression:
    """One phrase for an object, as a person wrote it."""

    sent_id: int
    text: str
    kind: str | None = None
    """What tells the object apart (attribute, place, ordinal, ...), known for generated scenes only."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One object of one photograph with every expression for it: the sample unit of the REFER data sets."""

    ref_id: int
    ann_id: int
    image_id: int
    image_path: Path
    image_size: tuple[int, int]
    """Height and width in pixels, as the annotations record them."""
    category: str
    split: str
    segmentation: Segmentation
    expressions: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample: a letterboxed image, the tokens of one of its reference's expressions, and the mask."""

    image: Tensor
    """[3, S, S] uint8: a quarter of the normalised image's bytes on their way from the workers to the device."""
    tokens: Tensor
    """[L] int64."""
    mask: Tensor
    """[S, S] float32 in 0..1: the object's mask on the network's square."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """As of Batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples stacked for one training step."""

    images: Tensor
    """[B, 3, S, S] uint8."""
    tokens: Tensor
    """[B, L] int64."""
    masks: Tensor
    """[B, 1, S, S] float32 in 0..1."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """References that could not be read and that others stand for here: why, by their number in the training split."""
