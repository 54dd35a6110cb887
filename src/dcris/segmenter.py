"""The public Python API: a photograph and phrases in, masks out."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dcris.config import Precision, RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.images import read_image, to_rgb
from dcris.data.masks import mask_box
from dcris.data.tokenizer import get_tokenizer, require_phrase
from dcris.engine.checkpoint import load_checkpoint
from dcris.engine.device import autocast, choose_device, choose_precision
from dcris.engine.evaluate import PHRASES_PER_PASS
from dcris.errors import DcrisError
from dcris.model.dcris import DCRIS
from dcris.protocols import Protocol
from dcris.types import Prediction

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image of any mode, or RGB pixels [H, W, 3] uint8."""


class Segmenter:
    """A trained model, ready to answer. It keeps no state between calls, so several threads may share it.

    ```python
    segmenter = Segmenter.from_pretrained("runs/quickstart")
    for answer in segmenter.predict("photo.jpg", ["left slice", "the red cup"]):
        print(answer.phrase, answer.score, answer.box)
    ```
    """

    def __init__(
        self, model: DCRIS, config: RunConfig, *, device: str = "auto", precision: Precision | None = None
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_precision(precision or config.train.precision, self.device)
        self.model = model.to(self.device).eval()
        self.config = config
        self.tokenizer = get_tokenizer(config.model.text.tokenizer)
        self.protocol = Protocol()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str = "auto", precision: Precision | None = None
    ) -> "Segmenter":
        """Load a run's directory, or one of its checkpoints.

        Args:
            path: as made by `dcris train --out` or `dcris quickstart`.
            device: auto, cpu, cuda or cuda:N.
            precision: auto, float32 or bfloat16; the run's own by default.

        Raises DcrisError where there is no checkpoint, or it cannot be used.
        """
        model, config = load_checkpoint(Path(path))
        return cls(model, config, device=device, precision=precision)

    @overload
    def predict(
        self,
        image: ImageLike,
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        image: list[ImageLike],
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        image: ImageLike | list[ImageLike],
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Find what each phrase refers to.

        Args:
            image: one image or a list of images.
            phrases: asked of each image; a single string is one phrase.
            threshold: a pixel is the object's if its probability is greater; 0.35 by default.
            scores: keep each pixel's probability in the predictions.

        Returns:
            One prediction per phrase, in order; for a list of images, one such list per image.

        Raises DcrisError where an image cannot be read, a phrase is empty or the threshold is not between 0 and 1.
        """
        wanted = [require_phrase(phrase) for phrase in ([phrases] if isinstance(phrases, str) else phrases)]
        if threshold is not None and not 0 < threshold < 1:
            raise DcrisError(f"the threshold must lie between 0 and 1, and is {threshold}")
        if isinstance(image, list):
            return [self._predict(_pixels(each), wanted, threshold, scores) for each in image]
        return self._predict(_pixels(image), wanted, threshold, scores)

    @torch.no_grad()
    def _predict(
        self, pixels: NDArray[np.uint8], phrases: list[str], threshold: float | None, scores: bool
    ) -> list[Prediction]:
        if not phrases:
            return []
        threshold = self.protocol.threshold if threshold is None else threshold
        square, box = to_square(pixels, self.config.data)
        images = normalise(square[None].to(self.device), self.config.data)
        tokens = self.tokenizer(phrases, self.config.data.word_length).to(self.device)
        answers: list[Prediction] = []
        with autocast(self.device, self.dtype):
            state = self.model.encode_images(images)
            text = self.model.encode_text(tokens)
            for start in range(0, len(phrases), PHRASES_PER_PASS):
                some = torch.arange(start, min(start + PHRASES_PER_PASS, len(phrases)), device=self.device)
                logits = self.model.segment(state.select(torch.zeros_like(some)), text.select(some))
                pictures = self.protocol.probabilities(logits, [box] * len(some))
                answers += [
                    _prediction(phrase, picture, threshold, scores)
                    for phrase, picture in zip(phrases[start : start + PHRASES_PER_PASS], pictures, strict=True)
                ]
        return answers


def _pixels(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DcrisError(f"an array must be uint8 [H, W, 3] in RGB, and is {image.dtype} {list(image.shape)}")
    return image


def _prediction(phrase: str, probabilities: NDArray[np.float32], threshold: float, scores: bool) -> Prediction:
    mask = probabilities > threshold
    found = bool(mask.any())
    return Prediction(
        phrase=phrase,
        mask=mask,
        score=float(probabilities[mask].mean()) if found else 0.0,
        box=mask_box(mask) if found else None,
        probabilities=probabilities if scores else None,
    )
