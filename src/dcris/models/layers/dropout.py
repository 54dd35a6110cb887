"""Dropout whose draws cost little on a CPU, where torch 2.13 draws one number after the other in a single thread.

numpy's generator is several times as fast, and 16 bits a draw are enough. Its seed comes from torch's random state, so that a
step's randomness is still a function of its seed alone.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16
_WORTH_IT = 1 << 14
"""Elements from which on it is quicker than torch's."""


class Draw:
    """What dropout keeps: the same each time it is asked, since only the seed is remembered.

    The probability is rounded to a multiple of 1/65,536.
    """

    def __init__(self, probability: float) -> None:
        self.cut = min(round(probability * _LEVELS), _LEVELS - 1)
        self.seed = int(torch.randint(1 << 62, ()))
        self.stretch = _LEVELS / (_LEVELS - self.cut)
        """By what the elements that are kept are multiplied in return."""

    def kept(self, count: int, shape: Sequence[int]) -> Iterator[Tensor]:
        """For each of so many tensors, which elements are kept: 1 and 0. One after the other, in the same memory.

        As uint8, since torch takes eight times as long to make bfloat16 of bool.
        """
        generator = np.random.SFC64(self.seed)
        kept = torch.empty(*shape, dtype=torch.uint8)
        for _ in range(count):
            draws = generator.random_raw(-(-kept.numel() // 4)).view(np.uint16)[: kept.numel()]
            np.greater_equal(draws.reshape(kept.shape), self.cut, out=kept.numpy().view(np.bool_))
            yield kept


def drop(x: Tensor, probability: float) -> Tensor:
    """Dropout of a tensor of any shape, by draws that are not torch's where it is large and on a CPU."""
    if not 0 < probability < 1 or x.device.type != "cpu" or x.numel() < _WORTH_IT or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    draw = Draw(probability)
    (kept,) = draw.kept(1, x.shape)
    return x * kept * draw.stretch


class Dropout(nn.Dropout):
    """torch.nn.Dropout, with `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape."""
        return drop(x, self.p) if self.training else x
