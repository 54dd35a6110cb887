"""How predicted masks of videos are handed in, by data set: names of files, values of pixels, and
whether they are packed into a zip file.

Sources: inference_ytvos.py and docs/Ref-Youtube-VOS.md of ReferFormer; inference_davis.py of
ReferFormer and results.py of davis2017-evaluation; README and tools/eval_mevis.py of MeViS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.videos import VideoExpression
from dcris.types import MaskArray


@dataclass(frozen=True, slots=True)
class Submission:
    """The official form of the masks of a data set of videos."""

    file: Callable[[VideoExpression, str], str]
    """(expression, frame) -> path of the PNG file, with slashes."""
    joint: bool = False
    """Whether the objects of an annotator share an indexed PNG of labels; otherwise each expression
    has its own, 0 and 255."""
    zipped: bool = True
    """Whether a server takes them as a zip file."""


SUBMISSIONS: Mapping[str, Submission] = {
    "ref_youtube_vos": Submission(lambda each, frame: f"Annotations/{each.video}/{each.expression_id}/{frame}.png"),
    "ref_davis17": Submission(
        lambda each, frame: f"anno_{each.annotator}/{each.video}/{frame}.png", joint=True, zipped=False
    ),
    "mevis": Submission(lambda each, frame: f"{each.video}/{each.expression_id}/{frame}.png"),
}
"""By data set."""


class Labels:
    """Masks of several objects of a frame, one value a pixel: where they overlap, that of the
    object with the greatest probability, and of the first one if several have it.

    In the source, probabilities below the threshold become 0, and the background has 0.1: with a
    threshold of 0.1 or more, these are the same labels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.values: NDArray[np.uint8] = np.zeros(size, np.uint8)
        """[H, W]; 0 is the background."""
        self._greatest = np.zeros(size, np.float32)

    def add(self, value: int, mask: MaskArray, probabilities: NDArray[np.floating[Any]]) -> None:
        """Add an object.

        Args:
            value: its label.
            mask: [H, W] bool.
            probabilities: [H, W] of its mask.
        """
        better = mask & (probabilities > self._greatest)
        self.values[better] = value
        self._greatest[better] = probabilities[better]


def palette() -> list[int]:
    """Return the colours of labels, 256 times red, green and blue, as PASCAL VOC and DAVIS have
    them: the bits of a label are dealt to the three channels in turn, from the highest bit on."""
    return [
        sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for label in range(256)
        for channel in range(3)
    ]
