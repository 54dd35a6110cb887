"""Scores of predictions: how sure the model is that its mask is right."""

import numpy as np
from numpy.typing import NDArray

from dcris.evaluation.protocols import Cris


def mask_confidence(probabilities: NDArray[np.float32], threshold: float = Cris.threshold) -> float:
    """Return the mean probability of the pixels above the threshold; 0 if there are none.

    Args:
        probabilities: [H, W] in 0..1.
        threshold: the protocol's own one. With the threshold that a user chooses, the mean would
            rise with it.
    """
    inside = probabilities > threshold
    # Without a copy of the values.
    return float(probabilities.mean(dtype=np.float64, where=inside)) if inside.any() else 0.0
