"""From references to tensors: samples for training, images with all their phrases for evaluation.

Nothing random here depends on anything but the seed, the epoch and the reference, so a run gives the same batches whatever
the number of workers and wherever it was interrupted.

Shape letters: B batch, S side of the network's square, L text tokens, H W pixels of a photograph.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dcris.config import DataConfig
from dcris.data.fits import Fit, Letterbox
from dcris.data.flip import swap_sides
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.data.tokenizer import Tokenizer
from dcris.errors import DcrisError
from dcris.types import Batch, Expression, MaskArray, Reference, Sample

T = TypeVar("T")
F = TypeVar("F", bound=Fit)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way out of a worker, where raising it would bury its sentence in a traceback."""

    message: str


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
    """One sample per reference. Index `epoch * len(self) + i` is reference i with the sentence drawn for it in that epoch."""

    def __init__(self, references: Sequence[Reference], config: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.references, self.config, self.tokenizer, self.seed = references, config, tokenizer, seed

    def __len__(self) -> int:
        return len(self.references)

    def draw(self, index: int) -> Expression:
        """The expression of the reference in the index's epoch."""
        epoch, number = divmod(index, len(self))
        expressions = self.references[number].expressions
        return expressions[int(np.random.default_rng([self.seed, epoch, number]).integers(len(expressions)))]

    def mirrored(self, index: int, phrase: str) -> str | None:
        """The phrase for the mirrored photograph where the sample of that index is to be mirrored, or None."""
        epoch, number = divmod(index, len(self))
        # A draw of its own: with or without mirroring, the same sentences are drawn.
        if not self.config.flip or np.random.default_rng([self.seed, epoch, number, 1]).integers(2) == 0:
            return None
        return swap_sides(phrase)

    def __getitem__(self, index: int) -> Sample | Failure:
        reference = self.references[index % len(self)]
        try:
            image = read_image(reference.image_path)
            mask = decode_mask(reference.segmentation, reference.image_size)
            if image.shape[:2] != mask.shape:
                raise DcrisError(size_mismatch(reference, image))
        except DcrisError as error:
            return Failure(str(error))
        phrase = self.draw(index).text
        if (other := self.mirrored(index, phrase)) is not None:
            phrase, image, mask = other, np.ascontiguousarray(image[:, ::-1]), mask[:, ::-1]
        square, box = to_square(image, self.config, Letterbox)
        tokens = self.tokenizer([phrase], self.config.word_length)[0]
        return Sample(square, tokens, torch.from_numpy(box.mask(mask)))


def size_mismatch(reference: Reference, image: NDArray[np.uint8]) -> str:
    """The sentence for a photograph that is not the annotated one."""
    height, width = reference.image_size
    return (
        f"{reference.image_path} is {image.shape[1]}x{image.shape[0]} pixels but its annotations are for {width}x{height}; "
        "it was resized or replaced, so fetch the original"
    )


class TrainingBatches(Sampler[list[int]]):
    """The indices of every batch from one step to another: each epoch a new order, each reference once, whole batches only.

    A set smaller than the batch gives one smaller batch an epoch.
    """

    def __init__(self, length: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.length, self.seed, self.first, self.last = length, seed, first, last
        self.batch_size = min(batch_size, length)

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
            yield [epoch * self.length + int(number) for number in chosen]


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
    )


@dataclass(frozen=True, slots=True)
class ImageTask:
    """One photograph with everything asked of it."""

    image: Tensor
    """[3, S, S] uint8."""
    fit: Fit
    tokens: Tensor
    """[K, L] int64, one row per phrase."""
    questions: tuple[tuple[Reference, Expression], ...]
    """K pairs: the expression, and the reference whose mask is the truth."""
    truths: dict[int, MaskArray]
    """[H, W] bool by ref_id."""


Questions = Sequence[tuple[Reference, Expression]]


def all_questions(references: Sequence[Reference], first_only: bool = False) -> list[tuple[Reference, Expression]]:
    """Every expression with its reference, or each reference's first alone (the CRIS family's validation in training)."""
    return [
        (reference, expression)
        for reference in references
        for expression in (reference.expressions[:1] if first_only else reference.expressions)
    ]


class ImageTasks(Dataset[ImageTask | Failure]):
    """Questions gathered by photograph, so that what does not depend on the phrase is worked out once for each."""

    def __init__(
        self,
        questions: Questions,
        config: DataConfig,
        tokenizer: Tokenizer,
        fit: type[Fit] = Letterbox,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Take every n-th photograph from the k-th on, for a `share` of (k, n)."""
        by_image: dict[str, list[tuple[Reference, Expression]]] = {}
        for reference, expression in questions:
            by_image.setdefault(str(reference.image_path), []).append((reference, expression))
        self.groups = [tuple(group) for group in by_image.values()][share[0] :: share[1]]
        self.config, self.tokenizer, self.fit = config, tokenizer, fit

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageTask | Failure:
        questions = self.groups[index]
        references = {reference.ref_id: reference for reference, _ in questions}
        try:
            image = read_image(questions[0][0].image_path)
            truths = {}
            for reference in references.values():
                if image.shape[:2] != reference.image_size:
                    raise DcrisError(size_mismatch(reference, image))
                truths[reference.ref_id] = decode_mask(reference.segmentation, reference.image_size).astype(bool)
        except DcrisError as error:
            return Failure(str(error))
        square, fit = to_square(image, self.config, self.fit)
        tokens = self.tokenizer([expression.text for _, expression in questions], self.config.word_length)
        return ImageTask(square, fit, tokens, questions, truths)


def _start_worker(worker: int) -> None:
    # Ctrl-C on a terminal reaches every process, but the batches of the step in progress are still wanted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start(loader: DataLoader[T]) -> Iterator[Any]:
    """Start the loader's workers with one cv2 thread each: a worker is one process on one core.

    Set here and not in the worker: after a fork cv2 waits for ever for the threads that its parent had.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return iter(loader)
    finally:
        cv2.setNumThreads(threads)


def training_loader(samples: TrainingSamples, batches: TrainingBatches, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches in order. Raises DcrisError where a sample cannot be read."""
    loader: DataLoader[Sample | Failure] = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )
    return _or_raise(_start(loader))


def task_loader(tasks: ImageTasks, images: int, workers: int) -> Iterator[list[ImageTask]]:
    """Lists of up to `images` tasks in order. Raises DcrisError where one cannot be read."""
    loader: DataLoader[ImageTask | Failure] = DataLoader(
        tasks,
        batch_size=images,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
    )
    for group in _start(loader):
        yield list(_or_raise(iter(group)))


def _or_raise(items: Iterator[T | Failure]) -> Iterator[T]:
    for item in items:
        if isinstance(item, Failure):
            raise DcrisError(item.message)
        yield item
