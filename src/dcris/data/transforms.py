"""The ways in which a photograph is fitted into the network's square: letterboxed, squashed, or padded at two sides."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LONGEST_SOURCE = 32_766
"""cv2 4 refuses to warp an image with a longer side than this: it keeps coordinates in 16 bits."""


@dataclass(frozen=True)
class Transform(ABC):
    """The geometry of one photograph of `size` (H, W) pixels in a square of `side` (S) pixels."""

    size: tuple[int, int]
    side: int

    @abstractmethod
    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:
        """Fit an image [H, W, 3] into the square [S, S, 3]; `colour` (0 to 255, in the image's channel order) pads it.

        Raises ValueError where the image is not of this fit's size.
        """

    def _check(self, array: NDArray[np.uint8]) -> None:
        if array.shape[:2] != self.size:
            raise ValueError(f"the image is {array.shape[:2]}, but the fit is for {self.size}")


@dataclass(frozen=True)
class Letterbox(Transform):
    """In its own proportions, centred, bicubic: the CRIS family's way.

    The map is the affine one through three corners of the photograph, and cv2 samples it. It is built from float32 corners as
    the published one is and not from the exact scale: the two differ in the seventh digit, which is enough to move a sampling
    point to its neighbour.
    """

    def _corners(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Three corners, top left, top right and bottom left, x before y: [3, 2] on the photograph and on the square."""
        height, width = self.size
        scale = min(self.side / height, self.side / width)
        left, top = (self.side - width * scale) / 2, (self.side - height * scale) / 2
        photograph = [(0, 0), (width, 0), (0, height)]
        square = [(left, top), (width * scale + left, top), (left, height * scale + top)]
        return np.array(photograph, np.float32), np.array(square, np.float32)

    def matrix(self) -> NDArray[np.float64]:
        """[2, 3]: takes a pixel (x, y, 1) of the photograph to the square."""
        photograph, square = self._corners()
        return np.asarray(cv2.getAffineTransform(photograph, square), np.float64)

    def inverse(self) -> NDArray[np.float64]:
        """[2, 3]: takes a pixel (x, y, 1) of the square to the photograph."""
        photograph, square = self._corners()
        return np.asarray(cv2.getAffineTransform(square, photograph), np.float64)

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:  # noqa: D102
        return np.asarray(self._warp(image, cv2.INTER_CUBIC, colour), np.uint8)

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Fit a mask [H, W] of 0 and 1 into the square [S, S], bilinear, with values in 0..1.

        The values are multiples of 1/255, since the family warps 8-bit masks. Raises ValueError where the mask is not of this
        letterbox's size.
        """
        return np.asarray(self._warp(mask * np.uint8(255), cv2.INTER_LINEAR, (0.0,)) / np.float32(255), np.float32)

    def _warp(self, source: NDArray[np.uint8], interpolation: int, border: tuple[float, ...]) -> NDArray[np.uint8]:
        self._check(source)
        matrix = self.matrix()
        height, width = self.size
        if max(height, width) > _LONGEST_SOURCE:
            height, width = min(height, _LONGEST_SOURCE), min(width, _LONGEST_SOURCE)
            source = np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            matrix[:, 0] *= self.size[1] / width
            matrix[:, 1] *= self.size[0] / height
        warped = cv2.warpAffine(source, matrix, (self.side, self.side), flags=interpolation, borderValue=border)
        return np.asarray(warped, np.uint8)


@dataclass(frozen=True)
class Resize(Transform):
    """Stretched over the whole square, bilinear with every pixel counted: LAVT's and CGFormer's way."""

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:  # noqa: D102
        self._check(image)
        resized = Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return np.asarray(resized, np.uint8)


@dataclass(frozen=True)
class ResizePad(Transform):
    """In its own proportions in the top left corner, bilinear with every pixel counted: the way of models on SAM."""

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the photograph on the square."""
        height, width = self.size
        scale = self.side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:  # noqa: D102
        self._check(image)
        height, width = self.inner
        square = np.empty((self.side, self.side, 3), np.uint8)
        square[:] = np.rint(colour).astype(np.uint8)
        square[:height, :width] = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return square
