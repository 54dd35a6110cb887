"""Transforms from an image to the network's square input: letterbox, resize, and resize with
padding.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MAX_WARP_SIDE = 32_766
"""cv2 4 refuses to warp an image with a longer side: it keeps coordinates in 16 bits."""


@dataclass(frozen=True)
class Transform(ABC):
    """The geometry of one image of `size` (H, W) pixels in a square of `side` (S) pixels."""

    size: tuple[int, int]
    side: int

    @abstractmethod
    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:
        """Transform an image [H, W, 3] to the square [S, S, 3].

        Args:
            image: must have the height and width of this transform, else ValueError is raised.
            colour: of the padding, 0 to 255, in the image's channel order.
        """

    def _check(self, array: NDArray[np.uint8]) -> None:
        if array.shape[:2] != self.size:
            raise ValueError(f"the image is {array.shape[:2]}, but the transform is for {self.size}")


@dataclass(frozen=True)
class Letterbox(Transform):
    """Scale to fit, keep the proportions, centre; bicubic. Used by CRIS and its successors.

    The affine map through three corners of the image, sampled by cv2. It is computed from float32
    corners, as in the published code, and not from the exact scale: the two differ in the seventh
    digit, enough to move a sampling point to its neighbour.
    Source: `getTransformMat` in utils/dataset.py of CRIS.
    """

    def _corners(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return three corners as (x, y), [3, 2] on the image and on the square.

        They are the top left, top right and bottom left ones.
        """
        height, width = self.size
        scale = min(self.side / height, self.side / width)
        left, top = (self.side - width * scale) / 2, (self.side - height * scale) / 2
        image = [(0, 0), (width, 0), (0, height)]
        square = [(left, top), (width * scale + left, top), (left, height * scale + top)]
        return np.array(image, np.float32), np.array(square, np.float32)

    def matrix(self) -> NDArray[np.float64]:
        """Return the matrix [2, 3] that maps an image pixel (x, y, 1) to the square."""
        image, square = self._corners()
        return np.asarray(cv2.getAffineTransform(image, square), np.float64)

    def inverse(self) -> NDArray[np.float64]:
        """Return the matrix [2, 3] that maps a pixel (x, y, 1) of the square to the image."""
        image, square = self._corners()
        return np.asarray(cv2.getAffineTransform(square, image), np.float64)

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:  # noqa: D102
        return np.asarray(self._warp(image, cv2.INTER_CUBIC, colour), np.uint8)

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Transform a mask [H, W] of 0 and 1 to the square [S, S], bilinear, values in 0..1.

        Values are multiples of 1/255, because the published code warps 8-bit masks. Raises
        ValueError if the mask does not have the size of this transform.
        """
        return np.asarray(self._warp(mask * np.uint8(255), cv2.INTER_LINEAR, (0.0,)) / np.float32(255), np.float32)

    def _warp(self, source: NDArray[np.uint8], interpolation: int, border: tuple[float, ...]) -> NDArray[np.uint8]:
        self._check(source)
        height, width = self.size
        if height == width == self.side:  # the map is the identity, and no pixel changes
            return source.copy()
        matrix = self.matrix()
        if max(height, width) > _MAX_WARP_SIDE:
            height, width = min(height, _MAX_WARP_SIDE), min(width, _MAX_WARP_SIDE)
            source = np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            matrix[:, 0] *= self.size[1] / width
            matrix[:, 1] *= self.size[0] / height
        warped = cv2.warpAffine(source, matrix, (self.side, self.side), flags=interpolation, borderValue=border)
        return np.asarray(warped, np.uint8)


@dataclass(frozen=True)
class Resize(Transform):
    """Stretch to the whole square, bilinear with antialiasing. Used by LAVT and CGFormer."""

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:  # noqa: D102
        self._check(image)
        resized = Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return np.array(resized, np.uint8)


@dataclass(frozen=True)
class ResizePad(Transform):
    """Scale to fit, keep the proportions, place at the top left; bilinear with antialiasing.

    Used by models on SAM.
    """

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the image on the square, in pixels."""
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
