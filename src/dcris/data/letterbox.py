"""The letterbox: a photograph fitted into the network's square, and back, as the CRIS family of methods does it.

The map is the affine one through three corners of the photograph, and cv2 samples it. Published scores depend on it to the last
pixel, so it is built from float32 corners as theirs is and not from the exact scale: the two differ in the seventh digit, which
is enough to move a sampling point to its neighbour.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_LONGEST_SOURCE = 32_766
"""cv2 4 refuses to warp an image with a longer side than this: it keeps coordinates in 16 bits."""


@dataclass(frozen=True, slots=True)
class Letterbox:
    """The geometry of one photograph of `size` (H, W) pixels, centred in a square of `side` (S) pixels."""

    size: tuple[int, int]
    side: int

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

    def image(self, image: NDArray[np.uint8], colour: tuple[float, float, float]) -> NDArray[np.uint8]:
        """Fit an image [H, W, 3] into the square [S, S, 3], bicubic; `colour` (0 to 255, in the image's channel order) pads it.

        Raises ValueError where the image is not of this letterbox's size.
        """
        return np.asarray(self._warp(image, cv2.INTER_CUBIC, colour), np.uint8)

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Fit a mask [H, W] of 0 and 1 into the square [S, S], bilinear, with values in 0..1.

        The values are multiples of 1/255, since the family warps 8-bit masks. Raises ValueError where the mask is not of this
        letterbox's size.
        """
        return np.asarray(self._warp(mask * np.uint8(255), cv2.INTER_LINEAR, (0.0,)) / np.float32(255), np.float32)

    def restore(self, probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bring a probability map [S, S] back to the photograph's size [H, W], bicubic, with values in 0..1.

        Bicubic overshoots; cutting that off changes no decision by a threshold inside 0..1. Raises ValueError where the map is
        not [S, S].
        """
        if probabilities.shape != (self.side, self.side):
            raise ValueError(f"the map is {probabilities.shape}, but the square is {(self.side, self.side)}")
        height, width = self.size
        restored = cv2.warpAffine(
            probabilities, self.inverse(), (width, height), flags=cv2.INTER_CUBIC, borderValue=(0.0,)
        )
        return np.clip(np.asarray(restored, np.float32), 0, 1)

    def _warp(self, source: NDArray[np.uint8], interpolation: int, border: tuple[float, ...]) -> NDArray[np.uint8]:
        if source.shape[:2] != self.size:
            raise ValueError(f"the image is {source.shape[:2]}, but the letterbox is for {self.size}")
        matrix = self.matrix()
        height, width = self.size
        if max(height, width) > _LONGEST_SOURCE:
            height, width = min(height, _LONGEST_SOURCE), min(width, _LONGEST_SOURCE)
            source = np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            matrix[:, 0] *= self.size[1] / width
            matrix[:, 1] *= self.size[0] / height
        warped = cv2.warpAffine(source, matrix, (self.side, self.side), flags=interpolation, borderValue=border)
        return np.asarray(warped, np.uint8)
