"""Named evaluation protocols: how logits become a mask, and what it is compared on. They move results by points.

Shape letters: B phrases, S side of the network's square, H W pixels of the photograph, h w logit grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dcris.data.letterbox import Letterbox
from dcris.errors import DcrisError
from dcris.types import MaskArray


@dataclass(frozen=True, slots=True)
class Protocol:
    """The CRIS family's way (CRIS, ETRIS, BarLeRIa, DETRIS): IoU on the photograph's own pixels, over all sentences."""

    name: Literal["cris"] = "cris"
    threshold: float = 0.35
    """A pixel is the object's if its probability is greater."""

    def probabilities(self, logits: Tensor, letterboxes: Sequence[Letterbox]) -> Iterator[NDArray[np.float32]]:
        """Logits [B, 1, h, w] -> for each phrase its photograph's probabilities [H, W].

        Sigmoid, bicubic to the square with corners aligned, and the letterbox undone with a bicubic warp. One at a time: a
        large photograph's take half a gigabyte each.
        """
        side = letterboxes[0].side
        squares = F.interpolate(torch.sigmoid(logits.float()), (side, side), mode="bicubic", align_corners=True)
        for box, square in zip(letterboxes, squares.cpu().numpy(), strict=True):
            yield box.restore(square[0])

    def mask(self, probabilities: NDArray[np.float32]) -> MaskArray:
        """Probabilities [H, W] -> [H, W] bool."""
        return probabilities > self.threshold


PROTOCOLS = {"cris": Protocol()}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises DcrisError listing the names there are."""
    if name not in PROTOCOLS:
        raise DcrisError(f"there is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
