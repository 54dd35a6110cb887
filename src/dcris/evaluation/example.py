"""The example on which the forms of int8 layers are chosen."""

import torch

from dcris.config import RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.images import read_image
from dcris.data.photographs import example_photographs
from dcris.data.tokenizer import tokenize, tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import autocast


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
