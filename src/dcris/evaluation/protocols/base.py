"""The base class of evaluation protocols.

Shape letters: B expressions, S side of the network's square input, H W pixels of the image, h w
logit grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcris.data.masks import summed_mask, true_mask, union_mask
from dcris.data.transforms import Transform
from dcris.evaluation.metrics import BIOU, STANDARD_METRICS, Metric, Overlap
from dcris.evaluation.none_rules import NoneRule
from dcris.evaluation.resampling import Floats, nearest
from dcris.types import Expression, MaskArray, Reference, Segmentation, Truth

SizeSubset = Callable[[int, tuple[int, int]], str | None]


@dataclass(frozen=True)
class Protocol(ABC):
    """How a family of methods is evaluated: transform, resampling, threshold and metrics.

    Every interpolation from the logit grid to the compared pixels is linear and separable. A
    protocol states it as two matrices (`resampling`), one for the rows and one for the columns. One
    that interpolates both logits and probabilities overrides `probabilities`.
    """

    threshold: float
    """A pixel belongs to the predicted mask if its probability is greater."""
    none_rule: NoneRule | None = None
    """Decides whether a prediction says that the target is absent; None in protocols without absent
    targets."""
    boundary: bool = False
    """Whether the metrics have Boundary IoU as the last one, which takes longer."""

    name: ClassVar[str]
    """Name on the command line and in result files."""
    transform: ClassVar[type[Transform]]
    """Maps the image to the network's square input."""
    metrics: ClassVar[tuple[Metric, ...]] = STANDARD_METRICS
    """The scores, two or more. Thresholds are chosen by the first; the first two are also reported
    by group of expressions and by threshold."""
    interpolate_logits: ClassVar[bool] = False
    """Interpolate the logits, then apply the sigmoid; by default probabilities are interpolated."""
    canvas: ClassVar[int | None] = None
    """Side of the square on which masks are compared; None compares them at the image's own
    size."""
    sums_polygons: ClassVar[bool] = False
    """Whether pixels in two polygons of one object are background, as in code that adds the masks
    of the polygons and compares with 1; otherwise polygons are united."""
    blanks: ClassVar[bool] = True
    """Whether "none" replaces the predicted mask by an empty one, and an empty mask says "none".
    Otherwise the rule alone decides, and the union remains that with the predicted mask."""

    def __post_init__(self) -> None:
        if self.boundary:
            # Hides the metrics of the class, which are those of every other instance.
            object.__setattr__(self, "metrics", (*type(self).metrics, BIOU))

    @property
    def own_threshold(self) -> float:
        """The threshold that the protocol's authors use, whatever `threshold` is here.

        Scores of predictions are computed at it, so that they do not depend on the threshold.
        """
        return float(getattr(type(self), "threshold", self.threshold))

    @property
    def empty_is_wrong(self) -> bool:
        """Whether an absent target has IoU 0 whatever is predicted, because the protocol knows
        none."""
        return self.none_rule is None

    @staticmethod
    @abstractmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:
        """Return the interpolation of h x w logits: [H, h] for rows and [W, w] for columns."""

    def probabilities(self, logits: Tensor, transforms: Sequence[Transform]) -> Iterator[Tensor]:
        """Resample logits to probabilities on the pixels that are compared.

        Maps are yielded one at a time because those of a large image take half a gigabyte each.
        Bicubic interpolation overshoots; clipping to 0..1 changes no decision by a threshold in
        that range.

        Args:
            logits: [B, 1, h, w].
            transforms: that of each expression's image.

        Yields:
            [H, W] float32 on the logits' device, at the image's size or the canvas's, for each
            expression.
        """
        maps = logits[:, 0].float()
        if not self.interpolate_logits:
            maps = torch.sigmoid(maps)
        for values, transform in zip(maps, transforms, strict=True):
            rows, columns = _on_device(type(self), transform, (values.shape[0], values.shape[1]), values.device)
            resampled = rows @ values @ columns
            yield torch.sigmoid(resampled) if self.interpolate_logits else resampled.clamp_(0, 1)

    @property
    def label(self) -> str:
        """Name for tables, with the rule for "none" if there is one."""
        return self.name if self.none_rule is None else f"{self.name}, none by {self.none_rule.name}"

    def size_subset(self, pixels: int, size: tuple[int, int]) -> str | None:
        """Return the data set's own subset of a target of so many pixels in an image of `size` (H,
        W); None if it has none by size."""
        return None

    def for_target(self, target: bool) -> "Protocol":
        """Return the protocol that measures expressions with or without a target: usually this."""
        return self

    def truth(self, reference: Reference, expression: Expression) -> Truth:
        """Return the true mask of an expression on the pixels that are compared.

        Raises:
            DcrisError: a segmentation cannot be decoded.
        """
        measured = self.for_target(bool(reference.targets(expression)))
        return true_mask(reference, expression, measured.rasterise)

    def rasterise(self, segmentations: Sequence[Segmentation], size: tuple[int, int]) -> MaskArray:
        """Return the union of objects in an image of `size` (H, W), on the pixels that are
        compared."""
        draw = summed_mask if self.sums_polygons else union_mask
        return self.to_canvas(draw(segmentations, size).astype(bool))

    def judge(
        self,
        counted: Overlap,
        truth_pixels: int,
        query: tuple[Reference, Expression],
        present: float | None,
        score: float | None,
    ) -> Overlap:
        """Return an overlap as the metrics need it: whether there is a target, and whether the
        prediction says "none".

        Args:
            counted: pixels of the predicted and the true mask.
            truth_pixels: those of the true mask.
            query: the reference and the expression.
            present: probability that the target is present; None if it is unknown.
            score: confidence of the prediction; None if it is unknown.

        Raises:
            DcrisError: the rule for "none" needs what is unknown.
        """
        if self.none_rule is None:
            return counted
        reference, expression = query
        counted = replace(counted, target=bool(reference.targets(expression)), group=reference.ref_id)
        pixels = counted.union + counted.intersection - truth_pixels
        none = self.none_rule.says_none(pixels, present, score)
        if not (none or (self.blanks and pixels == 0)):
            return counted
        union = truth_pixels if self.blanks or not counted.target else counted.union
        return replace(counted, intersection=0, union=union, none=True, boundary_intersection=0)

    def to_canvas(self, mask: MaskArray) -> MaskArray:
        """Resize a mask [H, W] of the image to the pixels that are compared (nearest neighbour)."""
        if self.canvas is None:
            return mask
        rows, columns = (nearest(length, self.canvas) for length in mask.shape)
        return mask[np.ix_(rows, columns)]

    def from_canvas(self, mask: MaskArray, size: tuple[int, int]) -> MaskArray:
        """Resize a mask from the canvas to an image of `size` (H, W), for display."""
        if self.canvas is None:
            return mask
        rows, columns = (nearest(self.canvas, length) for length in size)
        return mask[np.ix_(rows, columns)]


@lru_cache(maxsize=64)
def _on_device(
    protocol: type[Protocol], transform: Transform, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a protocol's matrices as float32 tensors [H, h] and [w, W] (the second is transposed).

    They are cached because the images of a data set have few distinct sizes.
    """
    rows, columns = protocol.resampling(transform, grid)

    def float32(matrix: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(matrix, np.float32)).to(device)

    return float32(rows), float32(columns.T)
