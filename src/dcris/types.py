"""Data types that the whole package shares.

Shape letters: B batch, I distinct images, H W pixels of an image, S side of the network's square
input, L text tokens, G patches along a side of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # its import takes longer than most commands on data
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SoftMask:
    """A mask image with more than two values (JPEG, probability map), and the threshold that makes
    it a mask."""

    path: Path
    threshold: float
    """Pixels above it are the object: a fraction of the full scale if below 1, otherwise a pixel
    value."""


@dataclass(frozen=True, slots=True, eq=False)
class PixelPolygons:
    """Polygons through the centres of pixels, whose outline belongs to the object: as Pillow draws
    them for PhraseCut. COCO's polygons go between pixels instead."""

    polygons: tuple[NDArray[np.int32], ...]
    """[N, 2] each: x and y of the corners."""


Segmentation = list[list[float]] | Mapping[str, Any] | Path | SoftMask | PixelPolygons
"""A mask in a form of COCO, polygons (x, y, x, y, ...) or run lengths {"size": [H, W], "counts":
list, str or bytes}; the path of a mask image with two values, 0 for the background and any other
for the object; or polygons of pixels."""

MaskArray = NDArray[np.bool_]
"""[H, W] bool: True where the object is."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The true mask of an expression, on the pixels that are compared with a prediction."""

    mask: MaskArray
    """[H, W] bool; false where it is unknown."""
    ignored: MaskArray | None = None
    """[H, W] bool: pixels whose truth is unknown, so that no prediction is right or wrong there.
    None in the data sets without such pixels, which are nearly all."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A referring expression."""

    sent_id: int
    text: str
    kind: str | None = None
    """How it identifies the object (attribute, place, ordinal, ...); known for generated scenes
    only."""
    exists: bool = True
    """Whether the image has what the expression describes. If not, the expression has no target,
    whatever objects its reference has."""
    name: str | None = None
    """What the data set's own files call the expression, where its sent_id is a number of ours:
    PhraseCut's task_id. Files of predicted masks have this name."""
    subsets: tuple[str, ...] = ()
    """The data set's own subsets that it belongs to, by which its authors report scores, such as
    PhraseCut's "c100" and "i_multi"."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Objects of an image with all the expressions that describe them: the unit of the REFER data
    sets, where it is one object. In generalised data sets it may be several or none."""

    ref_id: int
    ann_ids: tuple[int, ...]
    """Identifiers of the objects, one for each segmentation."""
    image_id: int
    image_path: Path
    image_size: tuple[int, int]
    """Height and width in pixels, as the annotations record them."""
    category: str
    """Of its objects; several different ones are joined by commas, without objects it is empty."""
    split: str
    segmentations: tuple[Segmentation, ...]
    """The objects, kept apart. Their union is the true mask of the expressions."""
    expressions: tuple[Expression, ...]
    ignored: Segmentation | None = None
    """Pixels that are neither object nor background, as the annotators could not decide. They are
    in no object. Evaluation leaves them out; training takes them for background, as LISA does."""
    stretched: bool = False
    """Whether an image file of another size is resized to `image_size`; otherwise it is an
    error."""
    coco_id: int | None = None
    """COCO's number of the image, where the data set records it and the file has another name."""
    source: int = 0
    """Which data set of a mixture it is from, counted from 0."""

    def targets(self, expression: Expression) -> tuple[Segmentation, ...]:
        """Return the objects that one of its expressions describes; empty if there are none."""
        return self.segmentations if expression.exists else ()


@dataclass(frozen=True, slots=True)
class Masked:
    """What `train.masking` changes in a sample, or in the samples of a batch."""

    tokens: "Tensor"
    """[L] int64, or [B, L]: the expression with masked tokens."""
    hidden: "Tensor"
    """[G, G] bool, or [I, G, G]: the patches of the image that are hidden."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample: a letterboxed image, the tokens of one of its reference's expressions,
    and the mask."""

    image: "Tensor"
    """[3, S, S] uint8, normalised on the device: a quarter of the bytes of float32 to move there;
    or [R] uint8, the image's features as dcris.training.features stores them."""
    tokens: "Tensor"
    """[L] int64."""
    mask: "Tensor"
    """[S, S] float32 in 0..1: the object's mask on the network's square."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """See Batch."""
    masked: Masked | None = None
    """With `train.masking`, the masked copy of the sample."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples stacked for one training step."""

    images: "Tensor"
    """[B, 3, S, S] uint8, or the features [B, R] uint8; with `image_index` only the I distinct
    images, [I, 3, S, S] or [I, R]."""
    tokens: "Tensor"
    """[B, L] int64."""
    masks: "Tensor"
    """[B, 1, S, S] float32 in 0..1."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """References that could not be read and were replaced by others: number in the training split
    -> reason."""
    image_index: "Tensor | None" = None
    """[B] int64: which of `images` belongs to each sample. None: sample b has image b."""
    masked: Masked | None = None
    """With `train.masking`, the masked copies of the samples and of the images."""
