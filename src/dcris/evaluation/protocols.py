"""Named evaluation protocols: how logits become a mask, and what it is compared on. They move results by points.

Shape letters: B phrases, S side of the network's square, H W pixels of the photograph, h w logit grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcris.data.transforms import Letterbox, Resize, ResizePad, Transform
from dcris.errors import DcrisError
from dcris.evaluation.resampling import Floats, nearest, resize_matrix, sampling_matrix
from dcris.types import MaskArray


@dataclass(frozen=True)
class Protocol(ABC):
    """How a family of methods is evaluated.

    A map of logits becomes a picture of probabilities by interpolations that are all linear and separable, so they are given
    as one matrix for the rows and one for the columns, and worked out where the logits are, at the photograph's own
    resolution.
    """

    threshold: float
    """A pixel is the object's if its probability is greater."""

    name: ClassVar[str]
    fit: ClassVar[type[Transform]]
    """How the photograph comes into the network's square."""
    before_sigmoid: ClassVar[bool] = False
    """Whether the logits are interpolated, and not the probabilities."""
    canvas: ClassVar[int | None] = None
    """Side of the square on which masks are compared; None is the photograph's own pixels."""
    precision_includes_threshold: ClassVar[bool] = False
    """Whether an IoU of exactly 0.5 counts for precision at 0.5."""

    @staticmethod
    @abstractmethod
    def matrices(fit: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:
        """The interpolation of a grid of h x w logits: a matrix [H, h] for the rows and one [W, w] for the columns."""

    def probabilities(self, logits: Tensor, fits: Sequence[Transform]) -> Iterator[Tensor]:
        """Logits [B, 1, h, w] -> for each phrase probabilities [H, W] in float32, on the logits' device.

        H and W are the photograph's, or the canvas's. One at a time: a large photograph's take half a gigabyte each. Bicubic
        overshoots; cutting that off changes no decision by a threshold inside 0..1.
        """
        maps = logits[:, 0].float()
        if not self.before_sigmoid:
            maps = torch.sigmoid(maps)
        for values, fit in zip(maps, fits, strict=True):
            rows, columns = _on_device(type(self), fit, (values.shape[0], values.shape[1]), values.device)
            picture = rows @ values @ columns
            yield torch.sigmoid(picture) if self.before_sigmoid else picture.clamp_(0, 1)

    def compared(self, mask: MaskArray) -> MaskArray:
        """A mask [H, W] of a photograph, as it is compared: itself, or its nearest pixels on the canvas."""
        if self.canvas is None:
            return mask
        rows, columns = (nearest(length, self.canvas) for length in mask.shape)
        return mask[np.ix_(rows, columns)]

    def shown(self, mask: MaskArray, size: tuple[int, int]) -> MaskArray:
        """A mask as it is compared, brought back to the photograph's `size` for people to look at."""
        if self.canvas is None:
            return mask
        rows, columns = (nearest(self.canvas, length) for length in size)
        return mask[np.ix_(rows, columns)]


@lru_cache(maxsize=64)
def _on_device(
    protocol: type[Protocol], fit: Transform, grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Photographs come in few sizes, and a size's matrices are made once. The second is transposed: [w, W]."""
    rows, columns = protocol.matrices(fit, grid)

    def float32(matrix: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(matrix, np.float32)).to(device)

    return float32(rows), float32(columns.T)


@dataclass(frozen=True)
class Cris(Protocol):
    """The CRIS family's way (CRIS, ETRIS, BarLeRIa, DETRIS): IoU on the photograph's own pixels, over all sentences.

    Sigmoid, bicubic to the square with corners aligned, and the letterbox undone by a bicubic warp with zeros around. The
    warp samples at exact positions, as OpenCV 5 does; OpenCV 4, with which the published scores were made, rounded them to
    1/32 pixel.
    """

    threshold: float = 0.35
    name = "cris"
    fit = Letterbox

    @staticmethod
    def matrices(fit: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        assert isinstance(fit, Letterbox)
        there = fit.matrix()
        return _warped(there, 1, fit, grid[0]), _warped(there, 0, fit, grid[1])


def _warped(there: Floats, axis: int, fit: Letterbox, cells: int) -> Floats:
    """Rows (axis 1) or columns (axis 0) of the photograph from a line of logits, by way of the square."""
    positions = np.arange(fit.size[1 - axis]) * there[axis, axis] + there[axis, 2]
    warp = sampling_matrix(positions, fit.side, "bicubic", edge="zero")
    return warp @ resize_matrix(cells, fit.side, "bicubic", align_corners=True)


@dataclass(frozen=True)
class Lavt(Protocol):
    """LAVT's way: the decision between object and rest on a square of 480 pixels, and the truth brought there by nearest.

    Two classes and the greater of them are, for one logit, a probability above a half.
    """

    threshold: float = 0.5
    name = "lavt"
    fit = Resize
    before_sigmoid = True
    canvas = 480
    precision_includes_threshold = True

    @staticmethod
    def matrices(fit: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (resize_matrix(cells, 480, "bilinear", align_corners=True) for cells in grid)
        return rows, columns


@dataclass(frozen=True)
class CgFormer(Protocol):
    """CGFormer's way: the photograph squashed, probabilities brought to its own pixels bicubically, above a half."""

    threshold: float = 0.5
    name = "cgformer"
    fit = Resize

    @staticmethod
    def matrices(fit: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (
            resize_matrix(cells, length, "bicubic", align_corners=True)
            for cells, length in zip(grid, fit.size, strict=True)
        )
        return rows, columns


@dataclass(frozen=True)
class Refer(Protocol):
    """The way of models on SAM: padded at two sides, logits bilinearly to the square and on to the photograph, above 0."""

    threshold: float = 0.5
    name = "refer"
    fit = ResizePad
    before_sigmoid = True

    @staticmethod
    def matrices(fit: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        assert isinstance(fit, ResizePad)
        rows, columns = (
            resize_matrix(inner, length, "bilinear", align_corners=False)
            @ resize_matrix(cells, fit.side, "bilinear", align_corners=False)[:inner]
            for cells, inner, length in zip(grid, fit.inner, fit.size, strict=True)
        )
        return rows, columns


PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (Cris(), Lavt(), CgFormer(), Refer())}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises DcrisError listing the names there are."""
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise DcrisError(f"there is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
