"""From references to tensors: samples for training, images with all their phrases for evaluation.

Nothing random here depends on anything but the seed, the epoch and the reference, so a run gives the same batches whatever
the number of workers and wherever it was interrupted.

Shape letters: B batch, S side of the network's square, L text tokens, H W pixels of a photograph.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dcris.config import WORD_LENGTHS, DataConfig
from dcris.data.augmentations import AUGMENTATIONS
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.data.tokenizer import PADDING, Tokenizer
from dcris.data.transforms import Letterbox, Transform
from dcris.errors import DcrisError
from dcris.types import Batch, Expression, MaskArray, Reference, Sample
from dcris.utils.arguments import require_names
from dcris.utils.streams import note_once
from dcris.utils.workers import Failure, load, or_raise, workers_that_fit

F = TypeVar("F", bound=Transform)


_REPLACEMENTS = 20
"""How many references are tried in the place of one that cannot be read."""

_MOST_SKIPPED = 0.05
"""The share of the references that training does without before it stops; one is always allowed."""


def letterbox_colour(config: DataConfig) -> tuple[float, float, float]:
    """The padding's RGB colour in 0..255: the mean, so that normalisation makes it zero."""
    red, green, blue = (255 * value for value in config.mean)
    return red, green, blue


def to_square(image: NDArray[np.uint8], config: DataConfig, fit: type[F]) -> tuple[Tensor, F]:
    """[H, W, 3] uint8 RGB -> the network's square [3, S, S] uint8, and the geometry by which it got there."""
    fitted = fit((image.shape[0], image.shape[1]), config.image_size)
    square = fitted.image(image, letterbox_colour(config))
    return torch.from_numpy(square).permute(2, 0, 1).contiguous(), fitted


def normalise(images: Tensor, config: DataConfig) -> Tensor:
    """[B, 3, S, S] uint8 -> float32 with the configured mean and deviation, on the images' device."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


class TrainingSamples(Dataset[Sample | Failure]):
    """One sample per reference. Index `epoch * len(self) + i` is reference i with the sentence drawn for it in that epoch.

    Where reference i cannot be read and `config.on_bad_image` is "skip", another takes its place, so that batches keep their
    size: the first that can be read of those that a generator seeded with (seed, epoch, i, 1) draws. That depends on nothing
    but the seed, the index and which files are broken, so a run that skips is resumed as exactly as any other.
    """

    def __init__(self, references: Sequence[Reference], config: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        require_names(config.augmentations, AUGMENTATIONS, "data.augmentations")
        self.references, self.config, self.tokenizer, self.seed = references, config, tokenizer, seed

    def __len__(self) -> int:
        return len(self.references)

    def draw(self, index: int) -> Expression:
        """The expression of the reference in the index's epoch."""
        epoch, number = divmod(index, len(self))
        expressions = self.references[number].expressions
        return expressions[int(np.random.default_rng([self.seed, epoch, number]).integers(len(expressions)))]

    def draw_augmentations(self, index: int) -> list[tuple[str, np.random.Generator]]:
        """Return the names of the augmentations that are applied to the sample at `index`, each with its generator."""
        epoch, number = divmod(index, len(self))
        drawn = []
        for name, probability in self.config.augmentations.items():
            # One stream per name: adding an augmentation changes no draw of another, nor which expressions are drawn.
            generator = np.random.default_rng([self.seed, epoch, number, zlib.crc32(name.encode())])
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
        for other in draws.integers(len(self), size=_REPLACEMENTS).tolist():
            sample = self._read(epoch * len(self) + other)
            if isinstance(sample, Sample):
                return replace(sample, skipped=skipped)
            skipped[other] = sample.message
        return Failure(f"{first.message} ({_REPLACEMENTS} others that were drawn in its place cannot be read either)")

    def _read(self, index: int) -> Sample | Failure:
        reference = self.references[index % len(self)]
        try:
            image = read_image(reference.image_path)
            mask = decode_mask(reference.segmentation, reference.image_size)
            if image.shape[:2] != mask.shape:
                raise DcrisError(size_mismatch(reference, image))
        except DcrisError as error:
            return Failure(str(error))
        phrase = self.draw(index).text
        for name, generator in self.draw_augmentations(index):
            image, mask, phrase = AUGMENTATIONS[name](image, mask, phrase, generator)
        square, box = to_square(image, self.config, Letterbox)
        tokens = self.tokenizer([phrase], self.config.word_length)[0]
        return Sample(square, tokens, torch.from_numpy(box.mask(mask)))


class Skipped:
    """The references that training did without; what is wrong with a file is said once.

    Args:
        references: in the training split.
        say: takes lines for a person.
    """

    def __init__(self, references: int, log: Callable[[str], None]) -> None:
        self.references, self.log = references, log
        self.numbers: set[int] = set()
        self.messages: set[str] = set()

    def note(self, skipped: Mapping[int, str]) -> None:
        """Take what a batch did without. Raises DcrisError where that becomes too much of the split to be bad luck."""
        for number, message in sorted(skipped.items()):
            self.numbers.add(number)
            if message not in self.messages:  # a photograph has several references
                self.messages.add(message)
                self.log(f"skipped: {message}")
        if len(self.numbers) > max(1, _MOST_SKIPPED * self.references):
            raise DcrisError(
                f"{len(self.numbers)} of {self.references:,} references cannot be read, more than {_MOST_SKIPPED:.0%}; "
                "`dcris data check --deep` names them all, so repair the data set and --resume"
            )

    def conclude(self) -> None:
        """Say how many there were, if any."""
        if self.numbers:
            self.log(f"{len(self.numbers)} of {self.references:,} references could not be read and were skipped")


def size_mismatch(reference: Reference, image: NDArray[np.uint8]) -> str:
    """The sentence for a photograph that is not the annotated one."""
    height, width = reference.image_size
    return (
        f"{reference.image_path} is {image.shape[1]}x{image.shape[0]} pixels but its annotations are for {width}x{height}; "
        "it was resized or replaced, so fetch the original"
    )


class TrainingBatches(Sampler[list[int]]):
    """The indices of every batch from one step to another: each epoch a new order, each reference once, whole batches only.

    A set smaller than the batch gives one smaller batch an epoch. Of several processes each takes its `places` of every batch;
    the batches are the same however many there are.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first: int, last: int, places: Sequence[int] | None = None
    ) -> None:
        self.length, self.seed, self.first, self.last = length, seed, first, last
        self.batch_size = min(batch_size, length)
        self.places = range(self.batch_size) if places is None else places

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = steps_per_epoch(self.length, self.batch_size)
        order, epoch_of_order = np.empty(0, np.int64), -1
        for step in range(self.first, self.last):
            epoch, place = divmod(step, per_epoch)
            if epoch != epoch_of_order:
                order, epoch_of_order = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [epoch * self.length + int(chosen[number]) for number in self.places]


def steps_per_epoch(length: int, batch_size: int) -> int:
    """Whole batches in an epoch; one at the least."""
    return max(1, length // batch_size)


def collate(samples: list[Sample | Failure]) -> Batch | Failure:
    """Stack samples; the first failure stands for the batch."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Failure):
            return sample
        good.append(sample)
    return Batch(
        torch.stack([sample.image for sample in good]),
        torch.stack([sample.tokens for sample in good]),
        torch.stack([sample.mask for sample in good])[:, None],
        {number: message for sample in good for number, message in sample.skipped.items()},
    )


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One photograph with everything asked of it."""

    image: Tensor
    """[3, S, S] uint8."""
    fit: Transform
    tokens: Tensor
    """[K, L] int64, one row per phrase."""
    queries: tuple[tuple[Reference, Expression], ...]
    """K pairs: the expression, and the reference whose mask is the truth."""
    truths: dict[int, MaskArray]
    """[H, W] bool by ref_id."""


Queries = Sequence[tuple[Reference, Expression]]


def all_queries(references: Sequence[Reference], first_only: bool = False) -> list[tuple[Reference, Expression]]:
    """Every expression with its reference, or each reference's first alone (the CRIS family's validation in training)."""
    return [
        (reference, expression)
        for reference in references
        for expression in (reference.expressions[:1] if first_only else reference.expressions)
    ]


def cut_phrases(queries: Queries, config: DataConfig, tokenizer: Tokenizer, dataset: str) -> str | None:
    """Return a warning where phrases are longer than the model's word length and lose their ends; else None.

    Args:
        questions: all that are asked.
        config: of the model.
        tokenizer: of the model's text tower.
        dataset: the name of the data set that the questions are of.
    """
    length, known = config.word_length, WORD_LENGTHS.get(dataset, 0)
    counts = Counter(expression.text for _, expression in queries)
    rows = tokenizer([*counts], length + 1)
    cut = sum(count for count, row in zip(counts.values(), rows[:, length], strict=True) if row != PADDING)
    if not cut:
        return None
    usual = f"; {dataset} is usually read with {known}" if known > length else ""
    return f"{cut:,} of {len(queries):,} phrases are longer than {length} tokens (data.word_length) and are cut{usual}"


class ImageTasks(Dataset[ImageTask | Failure]):
    """Questions gathered by photograph, so that what does not depend on the phrase is worked out once for each."""

    def __init__(
        self,
        queries: Queries,
        config: DataConfig,
        tokenizer: Tokenizer,
        fit: type[Transform] = Letterbox,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Take every n-th photograph from the k-th on, for a `share` of (k, n)."""
        by_image: dict[str, list[tuple[Reference, Expression]]] = {}
        for reference, expression in queries:
            by_image.setdefault(str(reference.image_path), []).append((reference, expression))
        self.groups = [tuple(group) for group in by_image.values()][share[0] :: share[1]]
        self.config, self.tokenizer, self.fit = config, tokenizer, fit

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageTask | Failure:
        queries = self.groups[index]
        references = {reference.ref_id: reference for reference, _ in queries}
        try:
            image = read_image(queries[0][0].image_path)
            truths = {}
            for reference in references.values():
                if image.shape[:2] != reference.image_size:
                    raise DcrisError(size_mismatch(reference, image))
                truths[reference.ref_id] = decode_mask(reference.segmentation, reference.image_size).astype(bool)
        except DcrisError as error:
            return Failure(str(error))
        square, fit = to_square(image, self.config, self.fit)
        tokens = self.tokenizer([expression.text for _, expression in queries], self.config.word_length)
        return ImageTask(square, fit, tokens, queries, truths)


def training_loader(samples: TrainingSamples, batches: TrainingBatches, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches in order. Raises DcrisError where a sample cannot be read."""
    return load(samples, workers, batch_sampler=batches, collate_fn=collate, pin_memory=pin)


def batch_bytes(config: DataConfig, samples: int) -> int:
    """Bytes of a training batch as it comes from the workers: uint8 images, float32 masks, int64 tokens."""
    return samples * (7 * config.image_size**2 + 8 * config.word_length)


def task_loader(tasks: ImageTasks, images: int, workers: int) -> Iterator[list[ImageTask]]:
    """Lists of up to `images` tasks in order, read by as many of the workers as shared memory has room for.

    Raises DcrisError where one cannot be read.
    """
    fit = workers_that_fit(workers, images * 3 * tasks.config.image_size**2)
    if fit < workers:
        note_once(f"shared memory (/dev/shm) has room for {fit} of {workers} workers that read photographs")
    for group in load(tasks, fit, batch_size=images, collate_fn=list):
        yield list(or_raise(iter(group)))
