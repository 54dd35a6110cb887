"""The public Python API: a photograph and phrases in, masks out."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dcris.card import Metrics, model_card
from dcris.config import Precision, RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.images import read_image, refuse_shape, to_rgb
from dcris.data.masks import mask_box
from dcris.data.tokenizer import require_phrase, tokenizer_of
from dcris.encoders.weights import can_be_had
from dcris.engine.checkpoint import (
    Origin,
    Towers,
    find_checkpoint,
    identify_towers,
    load_adapters,
    load_checkpoint,
    read_origin,
    save_model,
)
from dcris.engine.device import choose_device, choose_precision
from dcris.engine.evaluate import segment_in_passes
from dcris.errors import DcrisError
from dcris.hub import push
from dcris.model.dcris import DCRIS
from dcris.pretrained import locate
from dcris.protocols import Cris
from dcris.types import Prediction

ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image of any mode, or RGB pixels [H, W, 3] uint8."""

Source = str | Path
"""What names a trained model; see Segmenter.from_pretrained."""


class Segmenter:
    """A trained model, ready to answer. It keeps no state between calls, so several threads may share it.

    ```python
    segmenter = Segmenter.from_pretrained("runs/quickstart")
    for answer in segmenter.predict("photo.jpg", ["left slice", "the red cup"]):
        print(answer.phrase, answer.score, answer.box)
    ```
    """

    def __init__(
        self,
        model: DCRIS,
        config: RunConfig,
        *,
        device: str = "auto",
        precision: Precision | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_precision(precision or config.train.precision, self.device)
        self.model = model.to(self.device).eval()
        self.config = config
        self.origin: Origin = origin or {}
        """Which published checkpoint the model was converted from; empty where it was trained."""
        self.tokenizer = tokenizer_of(config.model.text)
        self.protocol = Cris()
        self._sets: Mapping[str, tuple[DCRIS, RunConfig]] = {config.data.dataset: (self.model, config)}

    @classmethod
    def from_pretrained(
        cls,
        source: Source | Mapping[str, Source] | Sequence[Source],
        *,
        device: str = "auto",
        precision: Precision | None = None,
    ) -> "Segmenter":
        """Load a trained model, or several adapter sets of one pair of towers.

        Args:
            source: a run's directory (its best checkpoint), a checkpoint's directory, a .safetensors bundle, a repository
                "owner/name" or "owner/name@revision" of the Hub, or a published DETRIS model such as "detris-b-refcoco".
                Several of them, as a list (each is then called by its data set) or as a dict by names of your own, share
                the towers of the first, which also answers where `predict` is given no name.
            device: auto, cpu, cuda or cuda:N.
            precision: auto, float32 or bfloat16; the run's own by default.

        Raises DcrisError where there is no such model, it cannot be fetched or used, its towers are not those it was trained
        on, or one of several has other towers than the first.
        """
        if isinstance(source, str | Path):
            return cls._one(source, device, precision)
        named = list(source.items()) if isinstance(source, Mapping) else [(None, each) for each in source]
        if not named:
            raise DcrisError("no model was given to load")
        segmenter = cls._one(named[0][1], device, precision)
        if named[0][0] is not None:
            segmenter._sets = {named[0][0]: (segmenter.model, segmenter.config)}
        for name, each in named[1:]:
            segmenter._add(name, each)
        return segmenter

    @classmethod
    def _one(cls, source: Source, device: str, precision: Precision | None) -> "Segmenter":
        path = find_checkpoint(locate(source))
        model, config = load_checkpoint(path)
        return cls(model, config, device=device, precision=precision, origin=read_origin(path))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that `predict(..., adapters=)` takes, in the order in which they were added."""
        return tuple(self._sets)

    def add_adapters(self, name: str, source: Source) -> None:
        """Load another checkpoint's adapters and head, to be chosen by `predict(..., adapters=name)`.

        The model that was loaded first is called by its data set. The new ones stand on the frozen towers that are in memory
        already, and answer as their own checkpoint does. Threads that are predicting meanwhile are not disturbed; two that
        add at one time have to take turns.

        Raises DcrisError as from_pretrained does, where the name is taken, and where they were trained on other towers.
        """
        self._add(name, source)

    def _add(self, name: str | None, source: Source) -> None:
        if name in self._sets:
            raise DcrisError(f"there are adapters {name!r} already; choose another name")
        model, config = load_adapters(locate(source, towers=False), self.model, self._towers)
        name = name or config.data.dataset
        if name in self._sets:
            raise DcrisError(f"two of the models were trained on {name}; give a dict, with a name for each")
        # Replaced, not changed: another thread may be reading it.
        self._sets = {**self._sets, name: (model.to(self.device).eval(), config)}

    @cached_property
    def _towers(self) -> Towers:
        return identify_towers(self.model)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        half: bool = False,
        bundle: bool = False,
        towers: bool | None = None,
        metrics: Metrics | Sequence[Metrics] = (),
        licence: str | None = None,
    ) -> Path:
        """Write the model where from_pretrained finds it again: config.json, model.safetensors and a model card, README.md.

        Of several adapter sets, the first is written.

        Args:
            path: a directory, which must not exist; or a file with `bundle`.
            half: store adapters and head in float16, in half the space. They are read back as float32.
            bundle: write one .safetensors file with everything in it, and no card; also chosen by a path of that ending.
            towers: write the frozen towers too, as towers.safetensors; by default where whoever loads the model could not
                have them from the Hub or the package.
            metrics: what `dcris evaluate --out` wrote, or several of those, for the card.
            licence: the Hub's short name of one, for the card.

        Returns the path. Raises DcrisError where it exists or cannot be written.
        """
        path = Path(path)
        bundle = bundle or path.suffix == ".safetensors"
        if bundle and path.suffix != ".safetensors":
            raise DcrisError(f"a bundle is one file whose name ends in .safetensors, and {path} does not")
        self._write(path, path.name, half, towers, metrics, licence)
        return path

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        half: bool = False,
        towers: bool | None = None,
        metrics: Metrics | Sequence[Metrics] = (),
        licence: str | None = None,
        message: str = "Upload a dcris model",
    ) -> str:
        """Upload what save_pretrained writes to the Hub, as one commit, and return the repository's address.

        Args:
            repo: "owner/name"; made where there is none.
            private: whether a repository that is made can be seen by its owner alone.
            half, towers, metrics, licence: as of save_pretrained.
            message: of the commit.

        Raises DcrisError where the Hub cannot be reached, or the token of `hf auth login` may not write there.
        """
        with TemporaryDirectory() as folder:
            made = Path(folder) / "model"
            self._write(made, repo, half, towers, metrics, licence)
            return push(made, repo, private=private, message=message)

    def _write(
        self,
        path: Path,
        name: str,
        half: bool,
        towers: bool | None,
        metrics: Metrics | Sequence[Metrics],
        licence: str | None,
    ) -> None:
        if towers is None:
            towers = not all(can_be_had(tower) for tower in (self.model.vision, self.model.text))
        rows = [metrics] if isinstance(metrics, Mapping) else list(metrics)
        card = model_card(self.config, self._towers, name=name, origin=self.origin, metrics=rows, licence=licence)
        save_model(
            path, self.model, self._towers, self.config, with_towers=towers, half=half, origin=self.origin, card=card
        )

    @overload
    def predict(
        self,
        image: ImageLike,
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        image: list[ImageLike],
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        image: ImageLike | list[ImageLike],
        phrases: str | Sequence[str],
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Find what each phrase refers to.

        Args:
            image: one image or a list of images.
            phrases: asked of each image; a single string is one phrase.
            threshold: a pixel is the object's if its probability is greater; 0.35 by default.
            scores: keep each pixel's probability in the predictions.
            adapters: the name of the adapter set that answers; the first by default.

        Returns:
            One prediction per phrase, in order; for a list of images, one such list per image.

        Raises DcrisError where an image cannot be read, a phrase is empty, the threshold is not between 0 and 1, or there are
        no such adapters.
        """
        wanted = [require_phrase(phrase) for phrase in ([phrases] if isinstance(phrases, str) else phrases)]
        if threshold is not None and not 0 < threshold < 1:
            raise DcrisError(f"the threshold must lie between 0 and 1, and is {threshold}")
        chosen = self._choose(adapters)
        if isinstance(image, list):
            return [self._predict(_pixels(each), wanted, threshold, scores, *chosen) for each in image]
        return self._predict(_pixels(image), wanted, threshold, scores, *chosen)

    def _choose(self, adapters: str | None) -> tuple[DCRIS, RunConfig]:
        if adapters is None:
            return self.model, self.config
        sets = self._sets
        if adapters not in sets:
            raise DcrisError(f"there are no adapters {adapters!r}; there are {', '.join(sets)}")
        return sets[adapters]

    @torch.no_grad()
    def _predict(
        self,
        pixels: NDArray[np.uint8],
        phrases: list[str],
        threshold: float | None,
        scores: bool,
        model: DCRIS,
        config: RunConfig,
    ) -> list[Prediction]:
        if not phrases:
            return []
        threshold = self.protocol.threshold if threshold is None else threshold
        square, fit = to_square(pixels, config.data, self.protocol.fit)
        images = normalise(square[None].to(self.device), config.data)
        tokens = tokenizer_of(config.model.text)(phrases, config.data.word_length).to(self.device)
        answers: list[Prediction] = []
        for logits in segment_in_passes(model, images, tokens, self.device, self.dtype):
            for picture in self.protocol.probabilities(logits, [fit] * len(logits)):
                answers.append(decide(phrases[len(answers)], picture.cpu().numpy(), threshold, scores))
        return answers


def _pixels(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DcrisError(f"an array must be uint8 [H, W, 3] in RGB, and is {image.dtype} {list(image.shape)}")
    refuse_shape(*image.shape[:2])
    return image


def decide(phrase: str, probabilities: NDArray[np.float32], threshold: float, scores: bool) -> Prediction:
    """The answer that probabilities [H, W] mean at a threshold; with `scores` it keeps them."""
    mask = probabilities > threshold
    found = bool(mask.any())
    return Prediction(
        phrase=phrase,
        mask=mask,
        score=float(probabilities[mask].mean()) if found else 0.0,
        box=mask_box(mask) if found else None,
        probabilities=probabilities if scores else None,
    )
