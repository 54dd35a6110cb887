"""The exponential moving average of the trained weights (Polyak and Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dcris.models.adapters.attach import trained_state
from dcris.models.segmentation import ReferringSegmenter


class WeightAverage:
    """Averages of a model's trained weights, which start as their present values.

    Batch norm statistics are averages already, so they are copied. A low decay at the start
    forgets the initial weights soon: step n, from 0, uses min(decay, (1 + n) / (10 + n)).

    Args:
        model: on its device; its parameters must stay the same tensors.
        decay: share of the old average that a step keeps.
    """

    def __init__(self, model: ReferringSegmenter, decay: float) -> None:
        self.decay = decay
        self._current = trained_state(model)
        self._weights = [name for name, _ in model.named_parameters() if name in self._current]
        self.values: dict[str, Tensor] = {name: value.clone() for name, value in self._current.items()}
        """The averages, by the names of `trained_state`."""

    def update(self, step: int) -> None:
        """Include the weights after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([part[name] for name in self._weights] for part in (self.values, self._current))
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for name in self.values.keys() - {*self._weights}:
            self.values[name].copy_(self._current[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averages as its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Exchange the averages and the model's weights, in place."""
        for name, average in self.values.items():
            weight = average.clone()
            average.copy_(self._current[name])
            self._current[name].copy_(weight)
