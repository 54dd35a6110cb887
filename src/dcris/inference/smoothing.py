"""Smooth masks over time: a centred moving average of the probabilities of a video's frames."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dcris.data.table import shown
from dcris.errors import DcrisError

T = TypeVar("T")

MAX_WINDOW = 99
"""Limit on the frames whose maps are in memory: 200 phrases take 10 MB in each."""

_LIMIT = 1e-6
"""Probabilities keep this distance from 0 and 1 when they become logits again."""


class Maps(NamedTuple):
    """What the network gives for the phrases of one frame, or for other pairs of an image and a
    phrase."""

    logits: Tensor
    """[P, 1, h, w]."""
    present: Sequence[float | None]
    """Probability that the object is there, one per phrase; None without a presence head."""


def require_window(frames: int) -> int:
    """Return a width in frames. Raises DcrisError unless it is an odd number from 1 to
    MAX_WINDOW."""
    if type(frames) is not int or not 1 <= frames <= MAX_WINDOW or frames % 2 == 0:
        raise DcrisError(
            f"masks are smoothed over an odd number of frames (1, 3, 5, ... {MAX_WINDOW}), not {shown(frames)}"
        )
    return frames


def smoothed(frames: Iterator[tuple[T, Maps]], width: int) -> Iterator[tuple[T, Maps]]:
    """Yield each frame with the mean of the probabilities of the `width` frames around it.

    At the ends of a video, the mean is over the frames that there are. With a width of 1, frames
    stay as they are. The maps are averaged on the network's grid: interpolation to the frame's
    pixels is linear, so that the order makes a difference only where it is clipped to 0..1.

    Args:
        frames: of one video, in order.
        width: from `require_window`.
    """
    if width == 1:
        yield from frames
        return
    half = width // 2
    items, around = deque[T](), deque[Maps | None](maxlen=width)  # `around` has no maps beyond the ends
    for number, frame in enumerate(chain(frames, repeat(None, half))):
        if frame is None:
            around.append(None)
        else:
            items.append(frame[0])
            around.append(frame[1]._replace(logits=frame[1].logits.float().sigmoid()))
        if number >= half:
            yield items.popleft(), _mean([maps for maps in around if maps is not None])


def _mean(around: Sequence[Maps]) -> Maps:
    probabilities = sum((each.logits for each in around), torch.zeros_like(around[0].logits)) / len(around)
    present = [
        None if None in values else sum(value for value in values if value is not None) / len(values)
        for values in zip(*(each.present for each in around), strict=True)
    ]
    return Maps(probabilities.logit(_LIMIT), present)
