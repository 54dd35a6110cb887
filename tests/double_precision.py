"""`python double_precision.py ...` is `dcris ...` with a model in double precision.

Two ways to compute the same step then differ by the way and not by rounding. In single precision,
rounding grows: one of a million inputs of a ReLU is so near zero that its sign changes, and the
curves differ by up to 5e-4 within twenty steps, even between two numbers of threads.
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
