"""Prepare a model for prediction; the forms of int8 layers are chosen on a photograph."""

import sys
from functools import partial

import torch

from dcris.checkpoints.checkpoint import Towers, identify_towers
from dcris.checkpoints.int8_forms import with_known_forms
from dcris.config import RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.images import read_image
from dcris.data.photographs import example_photographs
from dcris.data.tokenizer import tokenize, tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.models.optimize import CastWeights, prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import autocast, free_memory

_SHARE_OF_MEMORY = 0.25
"""Share of the free memory that forward passes may take by default."""


def prepared(
    model: ReferringSegmenter,
    config: RunConfig,
    dtype: torch.dtype,
    cast_weights: CastWeights | None = None,
    towers: Towers | None = None,
) -> ReferringSegmenter:
    """Return a copy for prediction, as `prepare_for_prediction` does. The forms of int8 layers are
    those that are known for the model.

    Args:
        model: on its device.
        config: of the run that trained it.
        dtype: the precision of matrix products.
        cast_weights: as `prepare_for_prediction` takes them.
        towers: from `identify_towers`, if known.
    """
    prepare = partial(prepare_for_prediction, model, dtype, cast_weights, partial(run_example, config=config))
    if dtype != torch.int8:
        return prepare(None)
    return with_known_forms(model, towers or identify_towers(model), config.data, prepare)


def pairs_in_memory(config: RunConfig, device: torch.device, memory: float | None = None) -> int:
    """Return the number of image-phrase pairs, at least 1, whose forward pass fits into the memory.

    A pair is estimated from above, in float32: its largest activation is either in the projector,
    with 4 x 4 cells per patch, or in the hidden layer of a block.

    Args:
        config: of the model.
        device: where it runs.
        memory: in bytes, or infinite; a quarter of what is free by default.
    """
    cells = (config.data.image_size // config.model.vision.patch) ** 2
    projector, block = 16 * cells * 4 * config.model.head.width, cells * 12 * config.model.vision.width
    budget = _SHARE_OF_MEMORY * free_memory(device) if memory is None else memory
    return max(1, int(min(budget / (4 * max(projector, block)), sys.maxsize)))


def run_example(model: ReferringSegmenter, config: RunConfig) -> None:
    """Segment a photograph of the package, in the precision around int8 layers.

    Args:
        model: on a CPU, in evaluation mode.
        config: of the run that trained it: preprocessing.
    """
    path, phrases = example_photographs()[0]
    square, _ = to_square(read_image(path), config.data, Letterbox)
    tokens = tokenize(phrases[:1], config.data, tokenizer_of(config.model.text), predicting=True)
    with torch.no_grad(), autocast(torch.device("cpu"), torch.int8):
        model(normalise(square[None], config.data), tokens)
