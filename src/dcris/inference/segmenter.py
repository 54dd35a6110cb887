"""The public Python API: a photograph and phrases in, masks out."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch

from dcris.checkpoints.backbones import can_be_had
from dcris.checkpoints.checkpoint import (
    Origin,
    Towers,
    find_checkpoint,
    identify_towers,
    load_adapters,
    load_checkpoint,
    read_origin,
    save_model,
)
from dcris.checkpoints.model_card import Metrics, model_card
from dcris.checkpoints.resolve import locate
from dcris.config import RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.images import ImageLike, as_pixels
from dcris.data.tokenizer import require_phrase, tokenizer_of
from dcris.data.transforms import Transform
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import finish_in_passes
from dcris.evaluation.protocols import Cris
from dcris.inference.prediction import Prediction, require_threshold
from dcris.models.encoders.vit import VisionState
from dcris.models.optimize import Held, prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.arguments import PathLike, Precision, as_path, kind_of, require, require_number
from dcris.utils.device import autocast, choose_device, choose_precision, free_memory
from dcris.utils.hub import push

Source = PathLike
"""What names a trained model; see Segmenter.from_pretrained."""

Phrases = str | Sequence[str]

_AT_MOST = 32
"""Pairs of an image and a phrase in one pass, however much memory there is: more are no faster."""

_SHARE_OF_MEMORY = 0.25
"""Of what is free: others want some, too."""


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: tensors have no single answer to ==
class EncodedImage:
    """What of an image does not depend on the phrase, worked out once by `Segmenter.encode_image`."""

    size: tuple[int, int]
    """H and W of the image in pixels."""
    adapters: str
    """The adapter set it was encoded with; only that can go on from it."""
    _fit: Transform
    _state: VisionState


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
        model: ReferringSegmenter,
        config: RunConfig,
        *,
        device: str = "auto",
        precision: Precision | None = None,
        origin: Origin | None = None,
    ) -> None:
        require(model, ReferringSegmenter, "the model")
        require(config, RunConfig, "the configuration")
        self.device = choose_device(device)
        self.dtype = choose_precision(config.train.precision if precision is None else precision, self.device)
        self.model = model.to(self.device).eval()
        self.config = config
        self.origin: Origin = origin or {}
        """Which published checkpoint the model was converted from; empty where it was trained."""
        self.tokenizer = tokenizer_of(config.model.text)
        self.protocol = Cris()
        self._held: Held = {}
        self._ready = prepare_for_prediction(self.model, self.dtype, self._held)
        self._sets: Mapping[str, tuple[ReferringSegmenter, RunConfig]] = {config.data.dataset: (self._ready, config)}

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
        chosen = choose_device(device)  # before anything is fetched
        if precision is not None:
            choose_precision(precision, chosen)
        if isinstance(source, Mapping):
            named: list[tuple[str | None, Source]] = [
                (require(name, str, "the name of each model"), each) for name, each in source.items()
            ]
        elif isinstance(source, Iterable) and not isinstance(source, str | bytes | os.PathLike):
            named = [(None, each) for each in source]
        else:
            return cls._one(source, device, precision)
        if not named:
            raise DcrisError("no model was given to load")
        segmenter = cls._one(named[0][1], device, precision)
        if named[0][0] is not None:
            segmenter._sets = {named[0][0]: (segmenter._ready, segmenter.config)}
        for name, each in named[1:]:
            segmenter._add(name, each)
        return segmenter

    @classmethod
    def _one(cls, source: Source, device: str, precision: Precision | None) -> "Segmenter":
        path = find_checkpoint(locate(_source(source)))
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
        self._add(require(name, str, "the name of the adapters"), source)

    def _add(self, name: str | None, source: Source) -> None:
        if name in self._sets:
            raise DcrisError(f"there are adapters {name!r} already; choose another name")
        model, config = load_adapters(locate(_source(source), towers=False), self.model, self._towers)
        name = name or config.data.dataset
        if name in self._sets:
            raise DcrisError(f"two of the models were trained on {name}; give a dict, with a name for each")
        # Replaced, not changed: another thread may be reading it.
        ready = prepare_for_prediction(model.to(self.device), self.dtype, self._held)
        self._sets = {**self._sets, name: (ready, config)}

    def merged(self) -> "Segmenter":
        """This segmenter with what was trained in its towers folded into their weights, where the method allows that (LoRA).

        It answers the same up to rounding and takes the time of the plain towers; saved, it brings its towers along. Of several
        adapter sets, the first is taken. Raises DcrisError where it cannot be folded.
        """
        model = self.model.merged()
        config = self.config.model_copy(update={"model": model.config})
        precision: Precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        return Segmenter(model, config, device=str(self.device), precision=precision, origin=self.origin)

    @cached_property
    def _towers(self) -> Towers:
        return identify_towers(self.model)

    def save_pretrained(
        self,
        path: PathLike,
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
        path = as_path(path, "the place to save to")
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
        require(repo, str, "the repository")
        require(message, str, "the message")
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
        if not isinstance(metrics, dict | list | tuple):
            raise DcrisError(
                f"metrics are what `dcris evaluate --out` wrote, or a list of those, and not {kind_of(metrics)}"
            )
        rows = (
            [metrics]
            if isinstance(metrics, Mapping)
            else [require(row, dict, "each of the metrics") for row in metrics]
        )
        if licence is not None:
            require(licence, str, "the licence")
        card = model_card(self.config, self._towers, name=name, origin=self.origin, metrics=rows, licence=licence)
        save_model(
            path, self.model, self._towers, self.config, with_towers=towers, half=half, origin=self.origin, card=card
        )

    @overload
    def predict(
        self,
        image: ImageLike,
        phrases: Phrases,
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
        memory: float | None = None,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self,
        image: list[ImageLike],
        phrases: Phrases | Sequence[Sequence[str]],
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
        memory: float | None = None,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        image: ImageLike | list[ImageLike],
        phrases: Phrases | Sequence[Sequence[str]],
        *,
        threshold: float | None = None,
        scores: bool = False,
        adapters: str | None = None,
        memory: float | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Find what each phrase refers to.

        Args:
            image: one image (a path, a PIL image of any mode, or an array; EXIF's orientation is applied) or a list of images,
                which go through the network together as far as the memory allows.
            phrases: asked of each image; a single string is one phrase. For a list of images also a list of lists, the phrases
                of each image.
            threshold: a pixel is the object's if its probability is greater; 0.35 by default.
            scores: keep each pixel's probability in the predictions.
            adapters: the name of the adapter set that answers; the first by default.
            memory: bytes that the network's features may take while it runs; a quarter of what is free there by default.

        Returns:
            One prediction per phrase, in order; for a list of images, one such list per image. What else is asked in the same
            call changes an answer by no more than rounding.

        Raises DcrisError where an image cannot be read, a phrase is empty, the threshold is not between 0 and 1, or there are
        no such adapters.
        """
        name, threshold = self._check(adapters, threshold)
        if memory is not None:
            memory = require_number(memory, 0, "the memory")
        asked = _listed(phrases)
        if not isinstance(image, list):
            (answers,) = self._predict([image], [_phrases(asked)], name, threshold, scores, memory)
            return answers
        if not any(isinstance(each, Iterable) and not isinstance(each, str | bytes) for each in asked):
            wanted = _phrases(asked)
            return self._predict(image, [wanted] * len(image), name, threshold, scores, memory)
        if len(asked) != len(image):
            raise DcrisError(f"there are phrases for {len(asked)} images, and {len(image)} images; give as many")
        return self._predict(image, [_phrases(_listed(each)) for each in asked], name, threshold, scores, memory)

    @torch.no_grad()
    def encode_image(self, image: ImageLike, *, adapters: str | None = None) -> EncodedImage:
        """Work out what of an image does not depend on the phrase, for `segment` to go on from as often as wanted.

        Args: as of `predict`. Raises DcrisError as that does.
        """
        name, _ = self._check(adapters, None)
        state, (fit,) = self._encode([image], *self._sets[name])
        return EncodedImage(fit.size, name, fit, state)

    @torch.no_grad()
    def segment(
        self, encoded: EncodedImage, phrases: Phrases, *, threshold: float | None = None, scores: bool = False
    ) -> list[Prediction]:
        """Find what each phrase refers to in an image that was encoded before; the answers are `predict`'s.

        Another threshold costs no further pass through the network: ask with `scores` and use `Prediction.with_threshold`.

        Args and errors: as of `predict`.
        """
        require(encoded, EncodedImage, "the encoded image")
        _, threshold = self._check(encoded.adapters, threshold)
        wanted = _phrases(_listed(phrases))
        pairs = [(0, number) for number in range(len(wanted))]
        return list(
            self._finish(encoded._state, [encoded._fit], wanted, pairs, encoded.adapters, threshold, scores, None)
        )

    def _check(self, adapters: str | None, threshold: float | None) -> tuple[str, float]:
        sets = self._sets
        name = next(iter(sets)) if adapters is None else adapters
        if not isinstance(name, str) or name not in sets:
            raise DcrisError(f"there are no adapters {adapters!r}; there are {', '.join(sets)}")
        return name, self.protocol.threshold if threshold is None else require_threshold(threshold)

    @torch.no_grad()
    def _predict(
        self,
        images: Sequence[ImageLike],
        phrases: Sequence[Sequence[str]],
        adapters: str,
        threshold: float,
        scores: bool,
        memory: float | None,
    ) -> list[list[Prediction]]:
        model, config = self._sets[adapters]
        answers: list[list[Prediction]] = []
        at_once = self._at_once(model, config, memory)
        for start in range(0, len(images), at_once):
            asked = phrases[start : start + at_once]
            if not any(asked):
                # Nothing is asked of them, but that they cannot be read is said.
                answers += [[] for image in images[start : start + at_once] if as_pixels(image).size]
                continue
            # A phrase that is asked of several images is encoded once for all of them.
            distinct = {
                phrase: number for number, phrase in enumerate(dict.fromkeys(p for each in asked for p in each))
            }
            state, fits = self._encode(images[start : start + at_once], model, config)
            pairs = [(number, distinct[phrase]) for number, each in enumerate(asked) for phrase in each]
            found = self._finish(state, fits, list(distinct), pairs, adapters, threshold, scores, memory)
            answers += [[next(found) for _ in each] for each in asked]
        return answers

    def _encode(
        self, images: Sequence[ImageLike], model: ReferringSegmenter, config: RunConfig
    ) -> tuple[VisionState, list[Transform]]:
        squares, fits = zip(
            *(to_square(as_pixels(image), config.data, self.protocol.transform) for image in images), strict=True
        )
        pixels = normalise(torch.stack(squares).to(self.device), config.data)
        with autocast(self.device, self.dtype):
            return model.encode_images(pixels), list(fits)

    def _finish(
        self,
        state: VisionState,
        fits: Sequence[Transform],
        phrases: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        adapters: str,
        threshold: float,
        scores: bool,
        memory: float | None,
    ) -> Iterator[Prediction]:
        """The answers to pairs of an image and a phrase, in order, at each image's size."""
        if not pairs:
            return
        model, config = self._sets[adapters]
        tokens = tokenizer_of(config.model.text)(phrases, config.data.word_length).to(self.device)
        at_once = self._at_once(model, config, memory)
        done = 0
        for logits in finish_in_passes(model, state, tokens, pairs, self.device, self.dtype, at_once):
            some = pairs[done : done + len(logits)]
            pictures = self.protocol.probabilities(logits, [fits[image] for image, _ in some])
            for (_, phrase), picture in zip(some, pictures, strict=True):
                yield Prediction.decide(phrases[phrase], picture.cpu().numpy(), threshold, keep=scores)
            done += len(logits)

    def _at_once(self, model: ReferringSegmenter, config: RunConfig, memory: float | None) -> int:
        """Pairs of an image and a phrase for which a pass through the network stays within the memory."""
        budget = _SHARE_OF_MEMORY * free_memory(self.device) if memory is None else memory
        return int(min(_AT_MOST, max(1, budget / _bytes_per_pair(model, config))))


def _source(source: Source) -> str | Path:
    """A str, which may be a name, stays one."""
    return source if isinstance(source, str) else as_path(source, "a model")


def _listed(phrases: Any) -> list[Any]:
    """A phrase or several as a list."""
    if isinstance(phrases, str):
        return [phrases]
    if not isinstance(phrases, Iterable) or isinstance(phrases, bytes):
        raise DcrisError(f"phrases are a str or a list of str, and not {kind_of(phrases)}")
    return list(phrases)


def _phrases(phrases: Iterable[Any]) -> list[str]:
    return [require_phrase(phrase) for phrase in phrases]


def _bytes_per_pair(model: ReferringSegmenter, config: RunConfig) -> int:
    """What one image with one phrase takes at the network's widest place, in float32: an estimate from above.

    That is either the projector, whose maps are four times as fine as the patches, or a block's hidden layer.
    """
    cells = (config.data.image_size // config.model.vision.patch) ** 2
    projector = 16 * cells * 4 * config.model.head.width
    block = cells * 12 * config.model.vision.width
    return 4 * max(projector, block)
