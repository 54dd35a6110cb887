"""Dropout with fast random numbers on a CPU, where torch 2.13 draws them one by one in a single
thread.

numpy's generator is several times faster, and 16 bits per draw suffice. Its seed comes from torch's
random state, so a step's randomness still depends only on torch's seed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16
_WORTH_IT = 1 << 14
"""Minimum number of elements for which it is faster than torch's."""


class Draw:
    """A dropout mask that is stored as a seed and can be generated repeatedly.

    The probability is rounded to a multiple of 1/65,536.
    """

    def __init__(self, probability: float) -> None:
        self.cut = min(round(probability * _LEVELS), _LEVELS - 1)
        self.seed = int(torch.randint(1 << 62, ()))
        self.stretch = _LEVELS / (_LEVELS - self.cut)
        """Factor that the kept elements are multiplied by."""

    def kept(self, count: int, shape: Sequence[int]) -> Iterator[Tensor]:
        """Yield `count` masks of that shape: 1 where an element is kept, else 0. All use the same
        memory.

        The type is uint8, since torch converts bool to bfloat16 eight times slower.
        """
        generator = np.random.SFC64(self.seed)
        kept = torch.empty(*shape, dtype=torch.uint8)
        for _ in range(count):
            draws = generator.random_raw(-(-kept.numel() // 4)).view(np.uint16)[: kept.numel()]
            np.greater_equal(draws.reshape(kept.shape), self.cut, out=kept.numpy().view(np.bool_))
            yield kept


def drop(x: Tensor, probability: float, plus: Tensor | None = None) -> Tensor:
    """Apply dropout to a tensor of any shape, and add `plus`; large tensors on a CPU use numpy's
    generator.
    """
    if not 0 < probability < 1 or x.device.type != "cpu" or x.numel() < _WORTH_IT or torch.compiler.is_compiling():
        dropped = F.dropout(x, probability)
        return dropped if plus is None else plus + dropped
    draw = Draw(probability)
    (kept,) = draw.kept(1, x.shape)
    dropped = x * kept
    return dropped.mul_(draw.stretch) if plus is None else torch.add(plus, dropped, alpha=draw.stretch)


class Dropout(nn.Dropout):
    """torch.nn.Dropout, implemented by `drop`."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Apply it to a tensor of any shape, and add `plus`, the residual."""
        if self.training:
            return drop(x, self.p, plus)
        return x if plus is None else plus + x
