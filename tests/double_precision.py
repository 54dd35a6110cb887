"""`python double_precision.py ...` is `dcris ...` with a model in double precision.

What differs between two ways to make the same step is then the way and not rounding. In single precision rounding soon becomes
more: one of a step's million arguments of a ReLU lies so near zero that it falls on the other side, and the curves part, by
up to 5e-4 within twenty steps, between two numbers of threads too.
"""

import sys

from torch import Tensor

from dcris.cli import main
from dcris.models.encoders.vit import VisionState
from dcris.models.segmentation import ReferringSegmenter
from dcris.training import trainer

build_model = trainer.build_model
encode_images = ReferringSegmenter.encode_images


def encode_in_double(self: ReferringSegmenter, images: Tensor) -> VisionState:
    return encode_images(self, images.double())


if __name__ == "__main__":
    trainer.build_model = lambda *words, **named: build_model(*words, **named).double()
    ReferringSegmenter.encode_images = encode_in_double  # type: ignore[method-assign]
    sys.exit(main())
