"""Convert references to tensors: samples for training, images with all queries for evaluation.

Random choices depend only on the seed, the epoch and the reference, so a run has the same batches
for any number of workers and after any interruption.

Shape letters: B batch, S side of the network's square, L text tokens, H W pixels of an image,
K expressions of an image.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dcris.config import DataConfig, MaskingConfig
from dcris.data.augmentations import AUGMENTATIONS, augment
from dcris.data.images import fit_image, read_image
from dcris.data.masking import hidden_patches, mask_tokens
from dcris.data.masks import true_mask
from dcris.data.mixing import samples_of_sets
from dcris.data.registry import DATASETS
from dcris.data.tokenizer import Tokenizer, cut_texts, tokenize
from dcris.data.transforms import Letterbox, Transform
from dcris.errors import DcrisError
from dcris.types import Batch, Expression, Masked, Reference, Sample, Truth
from dcris.utils.arguments import require_names
from dcris.utils.streams import note_once
from dcris.utils.workers import Failure, load, or_raise, workers_that_fit

T = TypeVar("T", bound=Transform)

_MAX_REPLACEMENTS = 20
"""References that are tried in place of one that cannot be read."""

_MAX_SKIPPED = 0.05
"""Share of the references that training may skip before it stops; one is always allowed."""


def letterbox_colour(config: DataConfig) -> tuple[float, float, float]:
    """Return the padding's RGB colour, 0 to 255: the mean, which normalisation maps to 0."""
    red, green, blue = (255 * value for value in config.mean)
    return red, green, blue


def to_square(image: NDArray[np.uint8], config: DataConfig, transform: type[T]) -> tuple[Tensor, T]:
    """Transform an image to the network's square input.

    Args:
        image: [H, W, 3] uint8 RGB.
        config: side of the square and colour of the padding.
        transform: the kind of transform.

    Returns:
        The square [3, S, S] uint8, and the transform for this image's size.
    """
    applied = transform((image.shape[0], image.shape[1]), config.image_size)
    square = applied.image(image, letterbox_colour(config))
    return torch.from_numpy(square).permute(2, 0, 1).contiguous(), applied


def normalise(images: Tensor, config: DataConfig) -> Tensor:
    """Normalise [B, 3, S, S] uint8 to float32, on the same device."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


class TrainingSamples(Dataset[Sample | Failure]):
    """One sample per reference and epoch.

    Index `epoch * len(self) + i` is reference i with one of its expressions, drawn for that epoch.

    If reference i cannot be read and `config.on_bad_image` is "skip", another reference replaces
    it, so that batches keep their size: the first readable one that a generator seeded with (seed,
    epoch, i, 1) draws. That depends only on the seed, the index and which files are broken, so a
    run that skips references is resumed as exactly as any other.

    With `config.phrases_per_image` above 1, all references of an image get the same draws of
    augmentations, so that their pixels are equal unless an augmentation depends on the expression.
    So do they with `config.cache_features`, and the draws repeat after so many epochs.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        config: DataConfig,
        tokenizer: Tokenizer,
        seed: int,
        masking: MaskingConfig | None = None,
    ) -> None:
        require_names(config.augmentations, AUGMENTATIONS, "data.augmentations")
        self.references, self.config, self.tokenizer, self.seed = references, config, tokenizer, seed
        self.masking = masking
        self.shares_images = config.phrases_per_image > 1
        self.images: Sequence[int] = range(len(references))
        """For each reference the number that stands for its image in random draws: that of the
        image's first reference, or its own if each reference has its own draws."""
        if self.shares_images or config.cache_features:
            first: dict[Path, int] = {}
            self.images = [first.setdefault(each.image_path, number) for number, each in enumerate(references)]
        self._last_image: tuple[Path, NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return len(self.references)

    def draw(self, index: int) -> Expression:
        """Return the expression of the reference in the epoch of `index`."""
        epoch, number = divmod(index, len(self))
        expressions = self.references[number].expressions
        return expressions[int(np.random.default_rng([self.seed, epoch, number]).integers(len(expressions)))]

    def draw_augmentations(self, index: int) -> list[tuple[str, np.random.Generator]]:
        """Return the augmentations of the sample at `index`: their names and generators."""
        epoch, number = divmod(index, len(self))
        if self.config.cache_features:
            epoch %= self.config.cache_features
        drawn = []
        for name, probability in self.config.augmentations.items():
            # One stream per name: adding an augmentation changes no draw of another, nor which
            # expressions are drawn.
            generator = np.random.default_rng([self.seed, epoch, self.images[number], zlib.crc32(name.encode())])
            if generator.random() < probability:
                drawn.append((name, generator))
        return drawn

    def __getitem__(self, index: int) -> Sample | Failure:
        first = self._read(index)
        if isinstance(first, Sample) or self.config.on_bad_image == "stop":
            return first
        epoch, number = divmod(index, len(self))
        skipped = {number: first.message}
        draws = np.random.default_rng([self.seed, epoch, number, 1])
        for other in draws.integers(len(self), size=_MAX_REPLACEMENTS).tolist():
            sample = self._read(epoch * len(self) + other)
            if isinstance(sample, Sample):
                return replace(sample, skipped=skipped)
            skipped[other] = sample.message
        return Failure(
            f"{first.message} ({_MAX_REPLACEMENTS} references drawn as its replacement cannot be read either)"
        )

    def _read(self, index: int) -> Sample | Failure:
        try:
            image = self._read_image(self.references[index % len(self)].image_path)
            return self.make(index, image, self.draw(index))
        except DcrisError as error:
            return Failure(str(error))

    def make(self, index: int, image: NDArray[np.uint8], expression: Expression) -> Sample:
        """Make the sample at `index` from its image [H, W, 3] uint8 and one of its expressions.

        Raises DcrisError if the mask cannot be read, or is not of the image's size, or an
        augmentation returns no sample.
        """
        reference = self.references[index % len(self)]
        text = expression.text
        mask = true_mask(reference, expression).mask.astype(np.uint8)
        image = fit_image(image, reference)
        for name, generator in self.draw_augmentations(index):
            image, mask, text = augment(name, image, mask, text, generator)
        square, letterbox = to_square(image, self.config, Letterbox)
        (tokens,) = tokenize([text], self.config, self.tokenizer)
        masked = None if self.masking is None else self._mask(index, tokens, self.masking)
        return Sample(square, tokens, torch.from_numpy(letterbox.mask(mask)), masked=masked)

    def _mask(self, index: int, tokens: Tensor, masking: MaskingConfig) -> Masked:
        """Draw the masked copy of the sample at `index`: its patches by its image, its words by its
        reference."""
        epoch, number = divmod(index, len(self))
        by_image, by_reference = (
            np.random.default_rng([self.seed, epoch, each, zlib.crc32(name)])
            for each, name in ((self.images[number], b"masked patches"), (number, b"masked words"))
        )
        return Masked(mask_tokens(tokens, masking, self.tokenizer, by_reference), hidden_patches(masking, by_image))

    def _read_image(self, path: Path) -> NDArray[np.uint8]:
        if not self.shares_images:
            return read_image(path)
        # References of an image follow each other. Augmentations may change the array they get.
        if self._last_image is None or self._last_image[0] != path:
            self._last_image = path, read_image(path)
        return self._last_image[1].copy()


class Skipped:
    """Counts the references that training skipped, and logs each error once.

    Args:
        references: number of references in the training split.
        log: receives the messages.
    """

    def __init__(self, references: int, log: Callable[[str], None]) -> None:
        self.references, self.log = references, log
        self.numbers: set[int] = set()
        self.messages: set[str] = set()

    def note(self, skipped: Mapping[int, str]) -> None:
        """Record the skipped references of a batch: errors by number of the reference in the split.

        Raises DcrisError if more than 5% of the split were skipped.
        """
        for number, message in sorted(skipped.items()):
            self.numbers.add(number)
            if message not in self.messages:  # an image has several references
                self.messages.add(message)
                self.log(f"skipped: {message}")
        if len(self.numbers) > max(1, _MAX_SKIPPED * self.references):
            raise DcrisError(
                f"{len(self.numbers)} of {self.references:,} references cannot be read, more than {_MAX_SKIPPED:.0%}; "
                "find them with `dcris data check --deep`, repair the data set, then continue with --resume"
            )

    def conclude(self) -> None:
        """Log the total, if any reference was skipped."""
        if self.numbers:
            self.log(f"{len(self.numbers)} of {self.references:,} references could not be read and were skipped")


class TrainingBatches(Sampler[list[int]]):
    """Indices of the batches of steps `first` to `last` (exclusive), for TrainingSamples.

    Each epoch has a new order, each reference once, and whole batches only. A split smaller than
    the batch gives one smaller batch per epoch. The batches do not depend on the number of ranks:
    each rank takes its `places` of every batch.

    With `weights`, the samples of an epoch are from each data set of a mixture in proportion to its
    weight. Each data set goes through passes of its own, in which it has each reference once: an
    epoch has a part of a pass, or several.

    With `together` above 1, references of an image follow each other in the order, in groups of up
    to so many. A batch, and a rank's places in it, may cut a group in two.

    Args:
        length: number of references.
        batch_size: samples of a batch.
        seed: of the run.
        first, last: the steps.
        places: places in each batch; None for all.
        images: a number for the image of each reference.
        together: most references of a group.
        sources: for each reference the number of its data set; needed with weights.
        weights: of the data sets.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        first: int,
        last: int,
        places: Sequence[int] | None = None,
        images: Sequence[int] = (),
        together: int = 1,
        sources: Sequence[int] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        self.length, self.seed, self.first, self.last = length, seed, first, last
        self.batch_size = min(batch_size, length)
        self.places = range(self.batch_size) if places is None else places
        self.images, self.together = images, together
        self.per_epoch = steps_per_epoch(length, self.batch_size)
        self.sets: list[tuple[NDArray[np.int64], int]] = []
        """With weights, the references of each data set and its samples in an epoch."""
        if weights is not None:
            counts = samples_of_sets(weights, self.per_epoch * self.batch_size)
            self.sets = [(np.flatnonzero(np.array(sources) == number), count) for number, count in enumerate(counts)]

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order, epoch_of_order = np.empty(0, np.int64), -1
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != epoch_of_order:
                order, epoch_of_order = self._order(epoch), epoch
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [int(chosen[number]) for number in self.places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of an epoch in their order."""
        generator = np.random.default_rng([self.seed, epoch])
        order = self._weighted(epoch, generator) if self.sets else self._all(epoch, generator)
        if self.together == 1:
            return order
        groups: list[list[int]] = []
        newest: dict[tuple[int, int], list[int]] = {}
        for index in order.tolist():
            # References of an image in another pass have other augmentations.
            image = index // self.length, self.images[index % self.length]
            group = newest.get(image)
            if group is None or len(group) == self.together:
                group = newest[image] = []
                groups.append(group)
            group.append(index)
        # Shuffled once more: the largest groups were begun early in the order.
        return np.array([index for place in generator.permutation(len(groups)) for index in groups[place]])

    def _all(self, epoch: int, generator: np.random.Generator) -> NDArray[np.int64]:
        return epoch * self.length + generator.permutation(self.length)

    def _weighted(self, epoch: int, generator: np.random.Generator) -> NDArray[np.int64]:
        parts = []
        for number, (references, count) in enumerate(self.sets):
            passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(references))
            for each in np.unique(passes):
                shuffled = np.random.default_rng([self.seed, int(each), number, 1]).permutation(references)
                parts.append(int(each) * self.length + shuffled[places[passes == each]])
        return generator.permutation(np.concatenate(parts))


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Return the number of whole batches in an epoch, at least one."""
    return max(1, length // batch_size)


def collate(samples: list[Sample | Failure], share_images: bool = False) -> Batch | Failure:
    """Stack samples to a batch. If any sample failed, return the first failure instead.

    With `share_images`, equal images are stacked once.
    """
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)
    firsts, image_index = good, None
    if share_images:
        # By content: an augmentation that depends on the expression makes several of one image.
        keys = [b"".join(part.numpy().tobytes() for part in _image_parts(sample)) for sample in good]
        distinct = dict(zip(keys, good, strict=True))
        places = {key: place for place, key in enumerate(distinct)}
        firsts, image_index = [*distinct.values()], torch.tensor([places[key] for key in keys])
    masked = [sample.masked.tokens for sample in good if sample.masked is not None]
    hidden = [sample.masked.hidden for sample in firsts if sample.masked is not None]
    return Batch(
        torch.stack([sample.image for sample in firsts]),
        torch.stack([sample.tokens for sample in good]),
        torch.stack([sample.mask for sample in good])[:, None],
        {number: message for sample in good for number, message in sample.skipped.items()},
        image_index,
        Masked(torch.stack(masked), torch.stack(hidden)) if masked else None,
    )


def _image_parts(sample: Sample) -> tuple[Tensor, ...]:
    """Return what samples have in common that share an image."""
    return (sample.image,) if sample.masked is None else (sample.image, sample.masked.hidden)


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One image with all its queries."""

    image: Tensor
    """[3, S, S] uint8."""
    transform: Transform
    """From the image to the square."""
    tokens: Tensor
    """[K, L] int64, one row per expression."""
    queries: tuple[tuple[Reference, Expression], ...]
    """K pairs: the reference with the true mask, and the expression."""
    truths: dict[tuple[int, bool], Truth]
    """True masks by ref_id and `exists` of the expression: of the image's size, or on other pixels
    if ImageTasks was given another `truth`."""


Queries = Sequence[tuple[Reference, Expression]]
"""Expressions to be segmented, each with its reference."""


def all_queries(
    references: Sequence[Reference], first_only: bool = False, present_only: bool = False
) -> list[tuple[Reference, Expression]]:
    """Return a query for each expression.

    Args:
        references: with the expressions.
        first_only: only each reference's first one, as CRIS and its successors validate during
            training.
        present_only: only those that have a target, for protocols that know no absent ones.
    """
    found: list[tuple[Reference, Expression]] = []
    for reference in references:
        chosen = [each for each in reference.expressions if not present_only or reference.targets(each)]
        found += ((reference, each) for each in (chosen[:1] if first_only else chosen))
    return found


def cut_phrases(queries: Queries, config: DataConfig, tokenizer: Tokenizer, dataset: str) -> str | None:
    """Return a warning if expressions are cut because they exceed the model's word length.

    Args:
        queries: the expressions.
        config: the model's data configuration.
        tokenizer: of the model's text tower.
        dataset: name of the data set, whose usual word length is mentioned.
    """
    length = config.word_length
    counts = Counter(expression.text for _, expression in queries)
    cut = sum(counts[text] for text in cut_texts([*counts], config, tokenizer))
    if not cut:
        return None
    usual = DATASETS[dataset].word_length if dataset in DATASETS else 0
    advice = f"; {dataset} is usually read with {usual}" if usual > length else ""
    return f"{cut:,} of {len(queries):,} expressions are longer than {length} tokens (data.word_length) and are cut{advice}"


class ImageTasks(Dataset[ImageTask | Failure]):
    """Queries grouped by image, so that each image is encoded once for all its expressions."""

    def __init__(
        self,
        queries: Queries,
        config: DataConfig,
        tokenizer: Tokenizer,
        transform: type[Transform] = Letterbox,
        share: tuple[int, int] = (0, 1),
        truth: Callable[[Reference, Expression], Truth] = true_mask,
    ) -> None:
        """Take every n-th image from the k-th on, for a `share` of (k, n).

        `truth` makes the true mask of an expression.
        """
        by_image: dict[str, list[tuple[Reference, Expression]]] = {}
        for reference, expression in queries:
            by_image.setdefault(str(reference.image_path), []).append((reference, expression))
        self.groups = [tuple(group) for group in by_image.values()][share[0] :: share[1]]
        self.config, self.tokenizer, self.transform, self.truth = config, tokenizer, transform, truth

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageTask | Failure:
        queries = self.groups[index]
        distinct = {(reference.ref_id, expression.exists): (reference, expression) for reference, expression in queries}
        try:
            image = read_image(queries[0][0].image_path)
            truths = {}
            for key, (reference, expression) in distinct.items():
                image = fit_image(image, reference)
                truths[key] = self.truth(reference, expression)
        except DcrisError as error:
            return Failure(str(error))
        square, transform = to_square(image, self.config, self.transform)
        tokens = tokenize([expression.text for _, expression in queries], self.config, self.tokenizer)
        return ImageTask(square, transform, tokens, queries, truths)


def training_loader(samples: TrainingSamples, batches: TrainingBatches, workers: int, pin: bool) -> Iterator[Batch]:
    """Yield the batches in order. Raises DcrisError if a sample cannot be read."""
    stack = partial(collate, share_images=samples.shares_images)
    return load(samples, workers, batch_sampler=batches, collate_fn=stack, pin_memory=pin)


def batch_bytes(config: DataConfig, samples: int) -> int:
    """Return the bytes of a training batch: uint8 images, float32 masks, int64 tokens."""
    return samples * (7 * config.image_size**2 + 8 * config.word_length)


def task_loader(tasks: ImageTasks, images: int, workers: int) -> Iterator[list[ImageTask]]:
    """Yield lists of up to `images` tasks in order.

    As many workers are started as shared memory has room for. Raises DcrisError if an image or mask
    cannot be read.
    """
    usable = workers_that_fit(workers, images * 3 * tasks.config.image_size**2)
    if usable < workers:
        note_once(f"shared memory (/dev/shm) has room for {usable} of {workers} data loader workers")
    for group in load(tasks, usable, batch_size=images, collate_fn=list):
        yield list(or_raise(iter(group)))
