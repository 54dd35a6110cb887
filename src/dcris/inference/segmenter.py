"""The public Python API: predict masks for an image and phrases."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dcris.checkpoints.backbones import fingerprint, is_downloadable
from dcris.checkpoints.checkpoint import (
    Origin,
    Towers,
    find_checkpoint,
    identify_towers,
    load_adapters,
    load_identified,
    read_origin,
    read_training_images,
    save_model,
)
from dcris.checkpoints.model_card import Metrics, model_card
from dcris.checkpoints.resolve import locate
from dcris.checkpoints.training_images import Images
from dcris.config import RunConfig
from dcris.data.cleaning import require_phrase
from dcris.data.dataset import normalise, to_square
from dcris.data.images import Channels, ImageLike, Rereadable, as_pixels, as_rereadable, require_channels
from dcris.data.tokenizer import cut_texts, strips, tokenize, tokenizer_of, unread_end
from dcris.data.transforms import Transform
from dcris.errors import DcrisError, DcrisWarning, LongPhraseWarning
from dcris.evaluation.preparation import pairs_in_memory, prepared
from dcris.evaluation.protocols import Cris
from dcris.evaluation.refinement import refine_guided
from dcris.inference.inputs import find_tasks
from dcris.inference.prediction import Prediction, long_phrase_warning, require_minima, require_threshold
from dcris.inference.smoothing import Maps, require_window, smoothed
from dcris.models.adapters.attach import trained_state
from dcris.models.encoders.text import TextFeatures, TextState
from dcris.models.encoders.vit import VisionState
from dcris.models.optimize import CastWeights
from dcris.models.segmentation import ReferringSegmenter, presence_probabilities
from dcris.utils.arguments import PathLike, Precision, Refinement, as_path, kind_of, require, require_number
from dcris.utils.device import autocast, choose_device, choose_precision, precision_of, working_dtype
from dcris.utils.http import is_url
from dcris.utils.hub import push
from dcris.utils.streams import counted

Source = PathLike
"""A trained model by path or name; see Segmenter.from_pretrained."""

Phrases = str | Sequence[str]

FRAMES_AT_ONCE = 8
"""Default number of frames of a video that are encoded at once."""

_MAX_MASK_PIXELS = 400_000_000
"""Limit on the pixels of a frame's masks, all phrases together: 200 phrases in full HD. Each takes
a byte, with its probability five."""

_MAX_PAIRS = 32
"""Limit on the pairs of an image and a phrase per forward pass. More are not faster."""


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: tensors have no single answer to ==
class EncodedImage:
    """The features of an image that do not depend on the phrase; see `Segmenter.encode_image`."""

    size: tuple[int, int]
    """Height and width of the image in pixels."""
    adapters: str
    """Name of the adapter set that encoded the image; `Segmenter.segment` uses the same one."""
    _encoded: "_Encoded"
    """With the image as it was given, because the pixels of a photograph can take more memory than
    its features."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPhrases:
    """The features of phrases; see `Segmenter.encode_phrases`."""

    phrases: tuple[str, ...]
    adapters: str
    """Name of the adapter set that encoded them."""
    _text: TextFeatures | TextState
    _unread: Mapping[str, str]
    """Ends of phrases that the model does not read."""


class _Encoded(NamedTuple):
    """Images that went through the network as far as no phrase is needed."""

    images: Sequence[Rereadable]
    state: VisionState
    transforms: Sequence[Transform]


class _Set(NamedTuple):
    """A set of adapters with its head."""

    ready: ReferringSegmenter
    """The copy that predicts."""
    config: RunConfig
    model: ReferringSegmenter
    """As it was loaded."""


@dataclass(frozen=True, slots=True)
class _Decision:
    """How masks are made of probabilities."""

    threshold: float
    min_score: float
    min_area: int
    refine: Refinement
    keep: bool
    """Whether predictions keep their probabilities."""


class Segmenter:
    """A trained model for prediction.

    Usually made by `Segmenter.from_pretrained`. It keeps no state between calls, so several threads
    may share it. It can be pickled, for other processes. A segmenter is called as its method
    `predict`.

    ```python
    segmenter = Segmenter.from_pretrained("runs/quickstart")
    for prediction in segmenter.predict("photo.jpg", ["left dog", "the red cup"]):
        print(prediction.phrase, prediction.score, prediction.box)
    ```

    Args:
        model: a network with its weights, which is moved to the device.
        config: the configuration of the run that trained it.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, bfloat16, float16 or, on CPUs, int8; by default the run's own.
        origin: the published checkpoint that the model was converted from, for model cards.
        images: hashes of the images that the model was trained on, which `save_pretrained` keeps.
        towers: from identify_towers; computed when they are needed.

    Raises:
        DcrisError: an argument has the wrong type, there is no such device or precision, or the
            floating-point weights are neither in float32 nor in that precision.
    """

    def __init__(
        self,
        model: ReferringSegmenter,
        config: RunConfig,
        *,
        device: str = "auto",
        precision: Precision | None = None,
        origin: Origin | None = None,
        images: Images = frozenset(),
        towers: Towers | None = None,
    ) -> None:
        require(model, ReferringSegmenter, "the model")
        require(config, RunConfig, "the configuration")
        self.model = model.eval()
        self.config = config
        self.origin: Origin = origin or {}
        """The published checkpoint that the model was converted from; empty if it was not
        converted."""
        self.images = images
        """Hashes of the images that the model was trained on; empty if they are unknown."""
        self.tokenizer = tokenizer_of(config.model.text)
        self.protocol = Cris()
        if towers is not None:
            self._towers = towers
        self._precision: Precision = config.train.precision if precision is None else precision
        self._place({config.data.dataset: (model, config)}, device)

    def _place(self, sets: Mapping[str, tuple[ReferringSegmenter, RunConfig]], device: str) -> None:
        """Move models to a device and prepare them there."""
        self.device = choose_device(device)
        self.dtype = choose_precision(self._precision, self.device)
        self._cast_weights: CastWeights = {}
        self._sets: Mapping[str, _Set] = {name: self._prepared(*each) for name, each in sets.items()}

    def _prepared(self, model: ReferringSegmenter, config: RunConfig) -> _Set:
        working = working_dtype(self.dtype, self.device)
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and weight.dtype not in (torch.float32, working):
                raise DcrisError(
                    f"the weight {name} of the model is {weight.dtype}, which cannot be computed with in {working}; leave the "
                    "model in torch.float32, and choose the precision of the computation with `precision`"
                )
        model.to(self.device)
        towers = self._towers if self.dtype == torch.int8 else None
        return _Set(prepared(model, config, self.dtype, self._cast_weights, towers), config, model)

    def to(self, device: str) -> "Segmenter":
        """Move the model to a device (auto, cpu, cuda, cuda:N or mps), and return this segmenter.

        As a torch module, it is moved itself: no other thread may predict meanwhile. The precision
        "auto" is chosen again.

        Raises:
            DcrisError: there is no such device.
        """
        choose_precision(self._precision, choose_device(device))  # fails before anything is moved
        self._place({name: (each.model, each.config) for name, each in self._sets.items()}, device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle contains: the models as they were loaded, not those that predict."""
        sets = {name: (each.model, each.config) for name, each in self._sets.items()}
        return {
            "sets": sets,
            "device": str(self.device),
            "precision": self._precision,
            "origin": self.origin,
            "images": self.images,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare the models of a pickle, on the device that they were on."""
        (name, (model, config)), *others = state["sets"].items()
        Segmenter.__init__(
            self,
            model,
            config,
            device=state["device"],
            precision=state["precision"],
            origin=state["origin"],
            images=state["images"],
        )
        (only,) = self._sets.values()
        self._sets = {name: only, **{other: self._prepared(*each) for other, each in others}}

    @classmethod
    def from_pretrained(
        cls,
        source: Source | Mapping[str, Source] | Sequence[Source],
        *,
        device: str = "auto",
        precision: Precision | None = None,
    ) -> "Segmenter":
        """Load a trained model, or several adapter sets on the same encoders.

        Args:
            source: a packaged model ("photos", "tiny"), a run directory (its best checkpoint), a
                checkpoint directory, a .safetensors bundle, a repository "owner/name" or
                "owner/name@revision" on the Hub, or a published DETRIS model such as
                "detris-b-refcoco". A list or dict of these loads several adapter sets on the
                encoders of the first. A list names each set by its data set, a dict by its key.
                `predict` uses the first set by default.
            device: auto, cpu, cuda, cuda:N or mps.
            precision: auto, float32, bfloat16, float16 or, on CPUs, int8; by default the run's own.

        Raises:
            DcrisError: the model does not exist, cannot be fetched or loaded, its encoders are not
                those it was trained on, or one of several has other encoders than the first.
        """
        chosen = choose_device(device)  # fails before anything is fetched
        if precision is not None:
            choose_precision(precision, chosen)
        if isinstance(source, Mapping):
            named: list[tuple[str | None, Source]] = [
                (require(name, str, "the name of each model"), each) for name, each in source.items()
            ]
        elif isinstance(source, Iterable) and not isinstance(source, str | bytes | os.PathLike):
            named = [(None, each) for each in source]
        else:
            return cls._load(source, device, precision)
        if not named:
            raise DcrisError("no model was given")
        segmenter = cls._load(named[0][1], device, precision)
        if named[0][0] is not None:
            (only,) = segmenter._sets.values()
            segmenter._sets = {named[0][0]: only}
        for name, each in named[1:]:
            segmenter._add(name, each)
        return segmenter

    @classmethod
    def _load(cls, source: Source, device: str, precision: Precision | None) -> "Segmenter":
        path = find_checkpoint(locate(source))
        model, config, towers = load_identified(path)
        origin, images = read_origin(path), read_training_images(path)
        return cls(model, config, device=device, precision=precision, origin=origin, images=images, towers=towers)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names for `predict(..., adapters=)`, in the order in which they were added."""
        return tuple(self._sets)

    def has_presence(self, adapters: str | None = None) -> bool:
        """Return whether an adapter set has a presence head, whose probability is then the score.

        Args:
            adapters: as in `predict`.
        """
        return self._sets[self._name(adapters)].ready.head.presence is not None

    def add_adapters(self, name: str, source: Source) -> None:
        """Load the adapters and head of another checkpoint, for `predict(..., adapters=name)`.

        The first model is named by its data set. The new adapters use the frozen encoders that are
        already in memory, and give the same results as their own checkpoint. Other threads may
        predict meanwhile, but only one thread at a time may add adapters.

        Raises:
            DcrisError: as in from_pretrained; also if the name is in use, or they were trained on
                other encoders.
        """
        self._add(require(name, str, "the name of the adapters"), source)

    def _add(self, name: str | None, source: Source) -> None:
        if name in self._sets:
            raise DcrisError(f"the name {name!r} is already used by other adapters; choose another name")
        model, config = load_adapters(locate(source, towers=False), self.model, self._towers)
        name = name or config.data.dataset
        if name in self._sets:
            raise DcrisError(f"two of the models were trained on {name}; give a dict with a name for each")
        # Replaced, not modified: another thread may be reading it.
        self._sets = {**self._sets, name: self._prepared(model, config)}

    def merged(self) -> "Segmenter":
        """Return a segmenter with trained weights merged into the encoders, for methods like LoRA.

        The results are the same up to rounding, at the speed of the plain encoders. A saved copy
        includes its encoders. Of several adapter sets, the first is used.

        Raises:
            DcrisError: the method does not support merging.
        """
        model = self.model.merged()
        config = self.config.model_copy(update={"model": model.config})
        precision = precision_of(self.dtype)
        device = str(self.device)
        return Segmenter(model, config, device=device, precision=precision, origin=self.origin, images=self.images)

    @cached_property
    def _towers(self) -> Towers:
        return identify_towers(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of everything that decides what the first adapter set predicts, except the
        options of `predict`: all weights, those of the encoders included, and the settings of the
        network and of its input, with which the same weights give other masks."""
        towers = "".join(tower["sha256"] for tower in self._towers.values())
        weights = fingerprint(trained_state(self.model))
        origin = {"name", "revision"}  # of the towers' weights, whatever they are
        network = self.config.model.model_dump_json(exclude_defaults=True, exclude={"vision": origin, "text": origin})
        data = self.config.data
        given = (data.image_size, data.word_length, strips(data, predicting=True), data.mean, data.std)
        return hashlib.sha256(f"{towers}{weights}{network}{given}".encode()).hexdigest()

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
        """Save the model for from_pretrained: config.json, model.safetensors and README.md.

        Of several adapter sets, the first is saved.

        Args:
            path: a directory, with `bundle` a file, that does not exist.
            half: store adapters and head in float16, which halves their size. They are loaded as
                float32.
            bundle: write one .safetensors file with everything and no card; implied by a path with
                that ending.
            towers: write the frozen encoders too, as towers.safetensors; by default only if
                others cannot get them from the Hub or the package.
            metrics: output of `dcris evaluate --out`, or a list of such outputs, for the card.
            licence: short licence name of the Hub, for the card.

        Returns:
            The path.

        Raises:
            DcrisError: the path exists or cannot be written.
        """
        path = as_path(path, "the path to save to")
        bundle = bundle or path.suffix == ".safetensors"
        if bundle and path.suffix != ".safetensors":
            raise DcrisError(f"the name of a bundle ends in .safetensors, which {path} does not")
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
        """Upload the files of save_pretrained to the Hub, as one commit.

        Args:
            repo: "owner/name"; created if it does not exist.
            private: create the repository as private.
            half: as in save_pretrained.
            towers: as in save_pretrained.
            metrics: as in save_pretrained.
            licence: as in save_pretrained.
            message: commit message.

        Returns:
            URL of the repository.

        Raises:
            DcrisError: the Hub cannot be reached, or the token of `hf auth login` does not permit
                writing.
        """
        require(repo, str, "the repository")
        require(message, str, "the message")
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            self._write(path, repo, half, towers, metrics, licence)
            return push(path, repo, private=private, message=message)

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
            towers = not all(is_downloadable(tower) for tower in self.model.towers.values())
        if not isinstance(metrics, dict | list | tuple):
            raise DcrisError(
                f"metrics must be the output of `dcris evaluate --out` or a list of such outputs, not {kind_of(metrics)}"
            )
        rows = (
            [metrics]
            if isinstance(metrics, Mapping)
            else [require(row, dict, "each of the metrics") for row in metrics]
        )
        for row in rows:
            if missing := [key for key in ("dataset", "split", "protocol") if not isinstance(row.get(key), str)]:
                raise DcrisError(
                    f"the metrics have no text as '{missing[0]}'; give the output of `dcris evaluate --out`, or the "
                    "'results' in that of `dcris evaluate --all`"
                )
        if licence is not None:
            require(licence, str, "the licence")
        card = model_card(self.config, self._towers, name=name, origin=self.origin, metrics=rows, licence=licence)
        save_model(
            path,
            self.model,
            self._towers,
            self.config,
            with_towers=towers,
            half=half,
            origin=self.origin,
            card=card,
            images=self.images,
        )

    @overload
    def predict(
        self,
        image: ImageLike,
        phrases: Phrases,
        *,
        threshold: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        scores: bool = False,
        refine: Refinement | None = None,
        channels: Channels = "rgb",
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
        min_score: float | None = None,
        min_area: int = 0,
        scores: bool = False,
        refine: Refinement | None = None,
        channels: Channels = "rgb",
        adapters: str | None = None,
        memory: float | None = None,
    ) -> list[list[Prediction]]: ...

    def predict(
        self,
        image: ImageLike | list[ImageLike],
        phrases: Phrases | Sequence[Sequence[str]],
        *,
        threshold: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        scores: bool = False,
        refine: Refinement | None = None,
        channels: Channels = "rgb",
        adapters: str | None = None,
        memory: float | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """Predict the mask of the object that each phrase refers to.

        Quotes around a phrase and a full stop at its end are ignored, unless the model's
        configuration says otherwise (`data.strip_phrases`). The end of a phrase of more than
        `data.word_length` tokens is ignored, too: `Prediction.unread` has it, and a
        LongPhraseWarning is given.

        Args:
            image: one image or a list of images. An image is a path, an http(s) address, the bytes
                of an image file, an open file, a PIL image of any mode, a uint8 array [H, W, 3],
                [H, W, 4] or [H, W], or a tensor [3, H, W] of uint8 or of floats in 0..1; EXIF
                orientation is applied. Several images share forward passes as far as memory allows.
            phrases: phrases for every image; a string is one phrase. For a list of images, this may
                also be a list with the phrases of each image.
            threshold: pixels with a greater probability belong to the mask; 0.35 by default.
            min_score: with a lower score, the mask is empty and `Prediction.rejected` says so; by
                default 0.5 for a model with a presence head, else 0.
            min_area: the same for masks of fewer pixels.
            scores: keep the probability of each pixel in the predictions.
            refine: "guided" moves the edges of masks to edges of the image, "none" does not; the
                model's own setting by default (`data.refine`).
            channels: "bgr" for arrays of OpenCV.
            adapters: name of the adapter set; the first by default.
            memory: bytes that activations may take; a quarter of the free memory by default.

        Returns:
            One prediction per phrase, in order; for a list of images, one such list per image. The
            grouping into forward passes changes predictions by no more than rounding.

        Raises:
            DcrisError: an image cannot be read, a phrase is empty, the threshold is not between 0
                and 1, a minimum is out of range, or the refinement or the adapter set does not
                exist.
        """
        name, decision = self._check(adapters, threshold, min_score, min_area, refine, scores)
        given = _as_list(phrases)
        if not isinstance(image, list):
            (predictions,) = self._predict([image], [_check_phrases(given)], name, decision, channels, memory)
            _warn(_unread_of(predictions))
            return predictions
        if not any(isinstance(each, Iterable) and not isinstance(each, str | bytes) for each in given):
            checked = [_check_phrases(given)] * len(image)
        elif len(given) == len(image):
            checked = [_check_phrases(_as_list(each)) for each in given]
        else:
            raise DcrisError(
                f"{counted(len(image), 'image')} given, but phrases for {len(given):,}; give as many of both"
            )
        found = self._predict(image, checked, name, decision, channels, memory)
        _warn(_unread_of(chain.from_iterable(found)))
        return found

    __call__ = predict

    def stream(
        self,
        images: PathLike | Iterable[ImageLike],
        phrases: Phrases,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
        **options: Any,
    ) -> Iterator[tuple[ImageLike, list[Prediction]]]:
        """Predict for many images one after the other, each when its result is asked for.

        Args:
            images: images as `predict` takes them, also from a generator; or a folder or a pattern
                (`photos/*.jpg`), whose images are taken in order.
            phrases: phrases for every image; a string is one phrase.
            on_error: "skip" leaves out images that cannot be read, each with a warning.
            progress: show a bar on standard error.
            options: of `predict`.

        Yields:
            Each image as it was given, and its predictions.

        Raises:
            DcrisError: as in `predict`.
        """
        if on_error not in ("raise", "skip"):
            raise DcrisError(f"on_error must be raise or skip, not {on_error!r}")
        shared = _check_phrases(_as_list(phrases))
        if isinstance(images, str | os.PathLike) and not (isinstance(images, str) and is_url(images)):
            place = as_path(images, "the images")
            images = [task.path for task in find_tasks([place], shared) if not task.video]
            if not images:
                raise DcrisError(f"{place} holds only videos; give the frames of a video to predict_frames")
        elif not _are_several(images):
            raise DcrisError(
                f"images must be a folder, a pattern or several images, not {kind_of(images)}; for one, use predict"
            )
        self.predict([], shared, **options)  # a wrong option is not an unreadable image
        return self._stream(images, shared, on_error == "skip", progress, options)

    def _stream(
        self, images: Iterable[ImageLike], phrases: list[str], skip: bool, progress: bool, options: dict[str, Any]
    ) -> Iterator[tuple[ImageLike, list[Prediction]]]:
        for image in tqdm(images, unit="image", disable=not progress):
            try:
                found = self.predict(image, phrases, **options)
            except DcrisError as error:
                if not skip:
                    raise
                warnings.warn(f"an image is left out: {error}", DcrisWarning, stacklevel=3)
            else:
                yield image, found

    @torch.no_grad()
    def encode_image(
        self, image: ImageLike, *, channels: Channels = "rgb", adapters: str | None = None
    ) -> EncodedImage:
        """Compute the features of an image that do not depend on the phrase, for `segment`.

        The result refers to the image, for `refine`: a file is then read again, and an array must
        not change.

        Args and errors: as in `predict`.
        """
        name, image = self._name(adapters), as_rereadable(image, channels)
        encoded = self._encode([image], *self._sets[name][:2])
        return EncodedImage(encoded.transforms[0].size, name, encoded)

    @torch.no_grad()
    def encode_phrases(
        self, phrases: Phrases, *, adapters: str | None = None, predicting: bool = True
    ) -> EncodedPhrases:
        """Compute the features of phrases, for `segment` with several images.

        Args:
            phrases, adapters: as in `predict`.
            predicting: False for the expressions of a data set, which are read as they are, as in
                training and evaluation, unless `data.strip_phrases` is "always".

        Errors: as in `predict`.
        """
        name = self._name(adapters)
        model, config, _ = self._sets[name]
        checked = _check_phrases(_as_list(phrases))
        tokens = tokenize(checked, config.data, tokenizer_of(config.model.text), predicting=predicting).to(self.device)
        with autocast(self.device, self.dtype):
            text = model.encode_text(tokens)
        return EncodedPhrases(tuple(checked), name, text, self.unread(checked, adapters=name, predicting=predicting))

    def segment(
        self,
        encoded: EncodedImage,
        phrases: Phrases | EncodedPhrases,
        *,
        threshold: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        scores: bool = False,
        refine: Refinement | None = None,
    ) -> list[Prediction]:
        """Predict masks for an image encoded by `encode_image`, with the same results as `predict`.

        Another threshold needs no further forward pass: use `scores=True` and
        `Prediction.with_threshold`.

        Args and errors: as in `predict`.
        """
        require(encoded, EncodedImage, "the encoded image")
        name, decision = self._check(encoded.adapters, threshold, min_score, min_area, refine, scores)
        if not isinstance(phrases, EncodedPhrases):
            phrases = self.encode_phrases(phrases, adapters=name)
        elif phrases.adapters != name:
            raise DcrisError(
                f"the phrases were encoded by the adapters {phrases.adapters}, the image by {name}; use the same for both"
            )
        pairs = [(0, number) for number in range(len(phrases.phrases))]
        with torch.no_grad():
            found = list(self._decode(encoded._encoded, phrases, pairs, decision, None))
        _warn(_unread_of(found))
        return found

    def predict_frames(
        self,
        frames: Iterable[ImageLike],
        phrases: Phrases,
        *,
        batch: int = FRAMES_AT_ONCE,
        smooth: int = 1,
        threshold: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        scores: bool = False,
        refine: Refinement | None = None,
        channels: Channels = "rgb",
        adapters: str | None = None,
        predicting: bool = True,
        memory: float | None = None,
    ) -> Iterator[list[Prediction]]:
        """Predict for the frames of a video one after the other.

        Each phrase is encoded once for all frames, and each frame once for all phrases.

        Args:
            frames: images as `predict` takes them, also from a generator; they have one size.
            phrases: phrases for every frame; a string is one phrase. For one that is longer than
                the model reads, a LongPhraseWarning is given.
            batch: number of frames that are encoded at once, as far as memory allows.
            smooth: odd number of frames over which the probabilities of a frame are averaged, with
                as many before it as after it; at the ends of the video over those that there are.
                1 leaves them as they are.
            threshold, min_score, min_area, scores, refine, channels, adapters, memory: as in
                `predict`.
            predicting: as in `encode_phrases`.

        Yields:
            One prediction per phrase, in order, for each frame.

        Raises:
            DcrisError: as in `predict`; also if a frame has another size than the first, or `batch`
                or `smooth` is not such a number.
        """
        name, decision = self._check(adapters, threshold, min_score, min_area, refine, scores)
        window = require_window(smooth)
        encoded = self.encode_phrases(phrases, adapters=name, predicting=predicting)
        if not encoded.phrases:
            raise DcrisError("no phrase was given for the frames; give one or several")
        if type(batch) is not int or batch < 1:
            raise DcrisError(f"the number of frames that are encoded at once must be 1 or more, not {batch!r}")
        if not _are_several(frames):
            raise DcrisError(f"frames must be several images, not {kind_of(frames)}; for one image, use predict")
        require_channels(channels)
        at_once = self._pairs_per_pass(self._sets[name].config, memory)
        _warn(encoded._unread)
        rereadable = (as_rereadable(frame, channels) for frame in frames)
        return self._predict_frames(rereadable, encoded, batch, at_once, window, decision)

    @torch.no_grad()
    def _predict_frames(
        self,
        frames: Iterator[Rereadable],
        phrases: EncodedPhrases,
        batch: int,
        at_once: int,
        window: int,
        decision: _Decision,
    ) -> Iterator[list[Prediction]]:
        pairs = [(0, phrase) for phrase in phrases.phrases]
        found = self._frame_maps(frames, phrases, batch, at_once)
        for (image, transform), maps in smoothed(found, window):
            guides = self._guides([image])
            yield [*self._decide(pairs, maps, [image], [transform], decision, phrases._unread, guides)]

    def _frame_maps(
        self, frames: Iterator[Rereadable], phrases: EncodedPhrases, batch: int, at_once: int
    ) -> Iterator[tuple[tuple[Rereadable, Transform], Maps]]:
        """Yield each frame with its maps for all phrases."""
        model, config, _ = self._sets[phrases.adapters]
        count = len(phrases.phrases)
        size: tuple[int, int] | None = None
        while some := [*islice(frames, min(batch, at_once))]:
            encoded = self._encode(some, model, config)
            pairs = [(frame, phrase) for frame in range(len(some)) for phrase in range(count)]
            outputs = [*model.segment_pairs(encoded.state, phrases._text, pairs, self.dtype, at_once)]
            logits = torch.cat([output.logits for output in outputs]).split(count)
            present = chain.from_iterable(map(presence_probabilities, outputs))
            for frame, transform, of_frame in zip(some, encoded.transforms, logits, strict=True):
                if size is None:
                    size = transform.size
                    _require_masks(size, count)
                if transform.size != size:
                    raise DcrisError(
                        f"a frame has {transform.size[1]} x {transform.size[0]} pixels, but the first frame of its video "
                        f"{size[1]} x {size[0]}; all frames must have one size"
                    )
                yield (frame, transform), Maps(of_frame, [*islice(present, count)])

    def unread(self, phrases: Iterable[str], *, adapters: str | None = None, predicting: bool = True) -> dict[str, str]:
        """Return the ends of phrases that the model does not read, by phrase.

        Args:
            phrases: phrases that are not too long have no entry.
            adapters: as in `predict`.
            predicting: as in `encode_phrases`.
        """
        config = self._sets[self._name(adapters)].config
        tokenizer = tokenizer_of(config.model.text)
        cut = cut_texts([*dict.fromkeys(phrases)], config.data, tokenizer, predicting=predicting)
        return {phrase: unread_end(phrase, config.data, tokenizer) for phrase in cut}

    def _name(self, adapters: str | None) -> str:
        """Return the name of the adapter set: the first one for None."""
        name = next(iter(self._sets)) if adapters is None else adapters
        if not isinstance(name, str) or name not in self._sets:
            raise DcrisError(f"there are no adapters {adapters!r}; the available ones are {', '.join(self._sets)}")
        return name

    def _check(
        self,
        adapters: str | None,
        threshold: float | None,
        min_score: float | None,
        min_area: int,
        refine: Refinement | None,
        scores: bool,
    ) -> tuple[str, _Decision]:
        name = self._name(adapters)
        if refine is None:
            refine = self._sets[name].config.data.refine
        elif not isinstance(refine, str) or refine not in get_args(Refinement):
            raise DcrisError(f"there is no refinement {refine!r}; choose one of {', '.join(get_args(Refinement))}")
        threshold = self.protocol.threshold if threshold is None else require_threshold(threshold)
        minima = require_minima(min_score, min_area, self.has_presence(name))
        return name, _Decision(threshold, *minima, refine, bool(scores))

    @torch.no_grad()
    def _predict(
        self,
        images: Sequence[ImageLike],
        phrases: Sequence[Sequence[str]],
        adapters: str,
        decision: _Decision,
        channels: Channels,
        memory: float | None,
    ) -> list[list[Prediction]]:
        model, config, _ = self._sets[adapters]
        results: list[list[Prediction]] = []
        require_channels(channels)
        at_once = self._pairs_per_pass(config, memory)
        for start in range(0, len(images), at_once):
            some_images = [as_rereadable(image, channels) for image in images[start : start + at_once]]
            some_phrases = phrases[start : start + at_once]
            if not any(some_phrases):
                # Without phrases there is nothing to predict, but unreadable images must still
                # raise an error.
                results += [[] for image in some_images if as_pixels(image).size]
                continue
            # Encode a phrase of several images only once.
            distinct = {phrase: n for n, phrase in enumerate(dict.fromkeys(p for each in some_phrases for p in each))}
            encoded = self._encode(some_images, model, config)
            pairs = [(number, distinct[phrase]) for number, each in enumerate(some_phrases) for phrase in each]
            found = self._decode(
                encoded, self.encode_phrases(list(distinct), adapters=adapters), pairs, decision, memory
            )
            results += [[next(found) for _ in each] for each in some_phrases]
        return results

    def _encode(self, images: Sequence[Rereadable], model: ReferringSegmenter, config: RunConfig) -> _Encoded:
        squares, transforms = zip(
            *(to_square(as_pixels(image), config.data, self.protocol.transform) for image in images), strict=True
        )
        pixels = normalise(torch.stack(squares).to(self.device), config.data)
        with autocast(self.device, self.dtype):
            return _Encoded(images, model.encode_images(pixels), transforms)

    def _decode(
        self,
        encoded: _Encoded,
        phrases: EncodedPhrases,
        pairs: Sequence[tuple[int, int]],
        decision: _Decision,
        memory: float | None,
    ) -> Iterator[Prediction]:
        """Yield the predictions for pairs (image number, phrase number), in order."""
        if not pairs:
            return
        model, config, _ = self._sets[phrases.adapters]
        at_once = self._pairs_per_pass(config, memory)
        done, pixels_of = 0, self._guides(encoded.images)
        for output in model.segment_pairs(encoded.state, phrases._text, pairs, self.dtype, at_once):
            some = pairs[done : done + len(output.logits)]
            named = [(image, phrases.phrases[phrase]) for image, phrase in some]
            maps = Maps(output.logits, presence_probabilities(output))
            yield from self._decide(
                named, maps, encoded.images, encoded.transforms, decision, phrases._unread, pixels_of
            )
            done += len(some)

    @staticmethod
    def _guides(images: Sequence[Rereadable]) -> Callable[[int], NDArray[np.uint8]]:
        """Return a function that reads the pixels of an image by its number, and keeps one's."""
        return lru_cache(maxsize=1)(lambda image: as_pixels(images[image]))

    def _decide(
        self,
        pairs: Sequence[tuple[int, str]],
        maps: Maps,
        images: Sequence[Rereadable],
        transforms: Sequence[Transform],
        decision: _Decision,
        unread: Mapping[str, str],
        pixels_of: Callable[[int], NDArray[np.uint8]],
    ) -> Iterator[Prediction]:
        """Yield the predictions for pairs (image number, phrase), in order, from their maps."""
        found = self.protocol.probabilities(maps.logits, [transforms[image] for image, _ in pairs])
        for (image, phrase), each, present in zip(pairs, found, maps.present, strict=True):
            probabilities = each.cpu().numpy()
            if decision.refine == "guided":
                probabilities = refine_guided(probabilities, pixels_of(image), max(maps.logits.shape[2:]))
            yield Prediction.decide(
                phrase,
                probabilities,
                decision.threshold,
                keep=decision.keep,
                present=present,
                min_score=decision.min_score,
                min_area=decision.min_area,
                image=images[image],
                unread=unread.get(phrase),
            )

    def _pairs_per_pass(self, config: RunConfig, memory: float | None) -> int:
        """Number of image-phrase pairs whose forward pass fits into the memory (bytes)."""
        if memory is not None:
            memory = require_number(memory, "the memory")
        return min(_MAX_PAIRS, pairs_in_memory(config, self.device, memory))


def _require_masks(size: tuple[int, int], phrases: int) -> None:
    if size[0] * size[1] * phrases > _MAX_MASK_PIXELS:
        raise DcrisError(
            f"a frame of {size[1]} x {size[0]} pixels with {phrases:,} phrases has masks of more than {_MAX_MASK_PIXELS:,} "
            "pixels; use smaller frames or fewer phrases"
        )


def _are_several(images: Any) -> bool:
    """Return whether a value can be gone through as images. Single ones can be, too: an open file
    as its lines, a tensor [3, H, W] as three."""
    if isinstance(images, torch.Tensor):
        return images.ndim == 4
    one = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray | Image.Image)
    return isinstance(images, Iterable) and not one and not hasattr(images, "read")


def _as_list(phrases: Any) -> list[Any]:
    """Return one phrase or several as a list."""
    if isinstance(phrases, str):
        return [phrases]
    if not isinstance(phrases, Iterable) or isinstance(phrases, bytes):
        raise DcrisError(f"phrases must be a str or a list of str, not {kind_of(phrases)}")
    return list(phrases)


def _check_phrases(phrases: Iterable[Any]) -> list[str]:
    return [require_phrase(phrase) for phrase in phrases]


def _unread_of(predictions: Iterable[Prediction]) -> dict[str, str]:
    """Return what is not read of each phrase that is longer than the model reads."""
    return {each.phrase: each.unread for each in predictions if each.unread is not None}


def _warn(unread_of: Mapping[str, str]) -> None:
    """Give one warning for each phrase that is longer than the model reads."""
    for phrase, unread in unread_of.items():
        warnings.warn(long_phrase_warning(phrase, unread), LongPhraseWarning, stacklevel=3)
