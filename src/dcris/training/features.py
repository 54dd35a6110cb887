"""Features of the training images on disk (`data.cache_features`).

The part of the network before the first trained weight and the text gives the same features of an
image at every step. They are computed once, for a few augmented variants of each image, and kept in
the run's directory until the run ends. A step then neither reads a photograph nor runs that part.

An augmentation may depend on the expression, so every expression of a variant has an entry with its
tokens, its mask and the row of its features. Equal images of a variant share a row.

Shape letters: I images, S side of the network's square, L text tokens, R bytes of an image's
features.
"""

import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dcris.data.dataset import TrainingSamples
from dcris.data.images import read_image
from dcris.data.tokenizer import tokenize
from dcris.errors import DcrisError
from dcris.models.encoders.vit import VisionState
from dcris.types import Sample
from dcris.utils.distributed import Processes
from dcris.utils.files import make_directory, read_json, write_json
from dcris.utils.workers import Failure, load

_MASK_SHARE = 40
"""Pixels of a mask for a byte of its compressed form, for the estimate of the disk's room."""

_SPARE = 1 << 30
"""Bytes of the disk that the features leave free, for checkpoints."""


class FeatureLayout:
    """How the features of an image become R bytes, and back.

    Args:
        state: features of any images of the right size; it gives the names, shapes and types.
        half: store float32 as float16.
    """

    def __init__(self, state: VisionState, half: bool) -> None:
        self._state, self._tensors = state, state.tensors()
        self._stored = [torch.float16 if half and x.dtype == torch.float32 else x.dtype for x in self._tensors]
        self._bytes = [x[0].numel() * kind.itemsize for x, kind in zip(self._tensors, self._stored, strict=True)]
        self.bytes = sum(self._bytes)
        """R"""

    def pack(self, state: VisionState) -> Tensor:
        """Return features as [I, R] uint8 on the CPU.

        Raises DcrisError if they exceed the range of float16.
        """
        parts = []
        for tensor, kind in zip(state.tensors(), self._stored, strict=True):
            stored = tensor.to(kind)
            if kind == torch.float16 and not stored.isfinite().all():
                raise DcrisError(
                    "the features of an image exceed the range of float16; use --train.precision float32, or train "
                    "without data.cache_features"
                )
            parts.append(stored.cpu().contiguous().flatten(1).view(torch.uint8))
        return torch.cat(parts, dim=1)

    def unpack(self, records: Tensor) -> VisionState:
        """Return the features [I, R] uint8, on the same device."""
        tensors = []
        for part, like, kind in zip(records.split(self._bytes, dim=1), self._tensors, self._stored, strict=True):
            tensors.append(part.contiguous().view(kind).view(-1, *like.shape[1:]).to(like.dtype))
        return self._state.with_tensors(tensors)


@dataclass(frozen=True, slots=True)
class _Variants:
    """All variants of an image."""

    squares: list[Tensor]
    """The distinct ones, [3, S, S] uint8 each."""
    masks: list[bytes]
    entries: list[tuple[int, int, Tensor]]
    """For each reference, variant and expression the numbers of square and mask, and the tokens."""
    failed: dict[int, str]
    """Errors by number of the reference."""


class _ImageVariants(Dataset[_Variants | Failure]):
    """The variants of images, each a list of the numbers of its references."""

    def __init__(self, samples: TrainingSamples, images: list[list[int]]) -> None:
        self.samples, self.images = samples, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> _Variants | Failure:
        squares: dict[bytes, tuple[int, Tensor]] = {}
        masks: dict[bytes, int] = {}
        found = _Variants([], [], [], {})
        for number in self.images[place]:
            entries = []
            try:
                for sample in self._samples_of(number):
                    row, _ = squares.setdefault(sample.image.numpy().tobytes(), (len(squares), sample.image))
                    mask = zlib.compress((sample.mask * 255).round().to(torch.uint8).numpy().tobytes(), 1)
                    entries.append((row, masks.setdefault(mask, len(masks)), sample.tokens))
            except DcrisError as error:
                if self.samples.config.on_bad_image == "stop":
                    return Failure(str(error))
                found.failed[number] = str(error)
                entries = [(0, 0, torch.zeros(self.samples.config.word_length, dtype=torch.int64))]
                entries *= entries_of(self.samples, number)
            found.entries.extend(entries)
        found.squares.extend(square for _, square in squares.values())
        found.masks.extend(masks)
        return found

    def _samples_of(self, number: int) -> Iterator[Sample]:
        """Yield the samples of a reference, for each variant those of its expressions."""
        samples = self.samples
        assert samples.config.cache_features
        reference = samples.references[number]
        image = read_image(reference.image_path)
        plain: dict[bool, Sample] = {}
        for variant in range(samples.config.cache_features):
            index = variant * len(samples) + number
            drawn = bool(samples.draw_augmentations(index))
            for expression in reference.expressions:
                if drawn:
                    yield samples.make(index, image.copy(), expression)
                    continue
                # The same pixels for all expressions, the same mask for all that have a target.
                if expression.exists not in plain:
                    plain[expression.exists] = samples.make(index, image, expression)
                (tokens,) = tokenize([expression.text], samples.config, samples.tokenizer)
                yield Sample(plain[expression.exists].image, tokens, plain[expression.exists].mask)


def entries_of(samples: TrainingSamples, number: int) -> int:
    """Return how many entries a reference has: its expressions times the variants."""
    return len(samples.references[number].expressions) * (samples.config.cache_features or 0)


class CachedSamples(TrainingSamples):
    """Training samples with stored features in place of images.

    Each rank writes the features of its share of the images, and reads those of all ranks.

    Args:
        samples: the samples that are stored.
        folder: for the files.
        layout: of the features.
        key: what the features depend on besides, as JSON data: files with another key are of no
            use.
        group: the processes.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        folder: Path,
        layout: FeatureLayout,
        key: dict[str, Any],
        group: Processes,
    ) -> None:
        super().__init__(samples.references, samples.config, samples.tokenizer, samples.seed)
        assert self.config.cache_features
        self.folder, self.layout, self.rank = folder, layout, group.rank
        self.key = {"bytes": layout.bytes, "processes": group.count, **key}
        self.variants = self.config.cache_features
        self.entry = np.dtype([("row", np.int64), ("mask", np.int64, 2), ("tokens", np.int64, self.config.word_length)])
        by_image: dict[int, list[int]] = {}
        for number, image in enumerate(self.images):
            by_image.setdefault(image, []).append(number)
        self.shares = [[*by_image.values()][rank :: group.count] for rank in range(group.count)]
        """The images of each rank: the numbers of their references."""
        self.places = np.zeros((len(self), 2), np.int64)
        """For each reference the rank that stores it, and its first entry."""
        for rank, share in enumerate(self.shares):
            entries = 0
            for number in (number for numbers in share for number in numbers):
                self.places[number] = rank, entries
                entries += entries_of(self, number)
        self.failed: dict[int, str] = {}

    # ---- writing --------------------------------------------------------------------------------

    def estimate(self) -> tuple[int, int]:
        """Return at most how many images have to be encoded, and the bytes of all files.

        An augmentation may leave out some expressions or objects of an image, so that two of them
        make up to four different images.
        """
        images = 0
        for numbers in (numbers for share in self.shares for numbers in share):
            expressions = sum(len(self.references[number].expressions) for number in numbers)
            images += 1
            for variant in range(self.variants):
                drawn = self.draw_augmentations(variant * len(self) + numbers[0])
                images += min(expressions, 2 ** len(drawn) - 1)
        entries = sum(entries_of(self, number) for number in range(len(self)))
        masks = len(self) * self.variants * self.config.image_size**2 // _MASK_SHARE
        return images, images * self.layout.bytes + entries * self.entry.itemsize + masks

    def require_room(self, needed: int) -> None:
        """Raise DcrisError if the disk has too little room for `needed` bytes.

        Features that an interrupted run left there will be overwritten, so their room counts.
        """
        free = shutil.disk_usage(make_directory(self.folder.parent)).free
        free += sum(path.stat().st_size for path in self.folder.glob("*.features"))
        if free < needed + _SPARE:
            raise DcrisError(
                f"the features of the training images need {needed / 1e9:,.1f} GB in {self.folder}, where {free / 1e9:,.1f} "
                "GB are free; free space, lower data.cache_features or data.image_size, or leave data.cache_features off"
            )

    def complete(self) -> bool:
        """Return whether this rank's files are all there."""
        try:
            return bool(read_json(self._path("json"), "the record of stored features")["key"] == self.key)
        except (DcrisError, KeyError, TypeError):
            return False

    def write(self, encode: Callable[[Tensor], VisionState], workers: int, at_once: int) -> Iterator[int]:
        """Write this rank's files.

        Args:
            encode: function from squares [I, 3, S, S] uint8 to their VisionState.
            workers: processes that read images.
            at_once: most images in a pass.

        Yields:
            The number of images that are done, after each.

        Raises:
            DcrisError: an image cannot be read and `config.on_bad_image` is "stop", or a file
                cannot be written.
        """
        make_directory(self.folder)
        self._path("json").unlink(missing_ok=True)
        share = self.shares[self.rank]
        variants = load(_ImageVariants(self, share), workers, batch_size=None)
        failed: dict[int, str] = {}
        rows = mask_bytes = 0
        waiting: list[Tensor] = []
        try:
            with ExitStack() as stack:
                features, masks, entries = (
                    stack.enter_context(self._path(name).open("wb")) for name in ("features", "masks", "entries")
                )
                for done, found in enumerate(variants, 1):
                    table = np.zeros(len(found.entries), self.entry)
                    ends = mask_bytes + np.cumsum([0, *(len(mask) for mask in found.masks)])
                    for line, (row, mask, tokens) in zip(table, found.entries, strict=True):
                        line["row"], line["tokens"] = rows + row, tokens.numpy()
                        if found.masks:
                            line["mask"] = ends[mask : mask + 2]
                    entries.write(table.tobytes())
                    masks.writelines(found.masks)
                    rows, mask_bytes = rows + len(found.squares), int(ends[-1])
                    failed |= found.failed
                    waiting += found.squares
                    while len(waiting) >= at_once or (waiting and done == len(share)):
                        state = encode(torch.stack(waiting[:at_once]))
                        features.write(self.layout.pack(state).numpy().tobytes())
                        del waiting[:at_once]
                    yield done
        except OSError as error:
            raise DcrisError(f"cannot write {self.folder}: {error.strerror or error}; free disk space there") from error
        write_json(self._path("json"), {"key": self.key, "failed": failed})

    def open(self) -> None:
        """Read the records of all ranks.

        Raises DcrisError if one is missing.
        """
        for rank in range(len(self.shares)):
            record = read_json(self._path("json", rank), "the record of stored features")
            self.failed |= {int(number): message for number, message in record["failed"].items()}

    def _path(self, name: str, rank: int | None = None) -> Path:
        return self.folder / f"{self.rank if rank is None else rank}.{name}"

    # ---- reading --------------------------------------------------------------------------------

    def _read(self, index: int) -> Sample | Failure:
        epoch, number = divmod(index, len(self))
        if number in self.failed:
            return Failure(self.failed[number])
        expressions = self.references[number].expressions
        rank, first = self.places[number].tolist()
        place = first + epoch % self.variants * len(expressions) + expressions.index(self.draw(index))
        try:
            entry = np.frombuffer(self._bytes("entries", rank, place, self.entry.itemsize), self.entry)[0]
            begin, end = entry["mask"].tolist()
            with self._path("masks", rank).open("rb") as file:
                file.seek(begin)
                mask = np.frombuffer(zlib.decompress(file.read(end - begin)), np.uint8)
            record = self._bytes("features", rank, int(entry["row"]), self.layout.bytes)
        except (OSError, zlib.error, IndexError) as error:
            return Failure(f"cannot read the stored features in {self.folder} ({error}); delete it and use --resume")
        side = self.config.image_size
        return Sample(
            torch.frombuffer(record, dtype=torch.uint8),
            torch.from_numpy(entry["tokens"].copy()),
            torch.from_numpy(mask.reshape(side, side) / np.float32(255)),
        )

    def _bytes(self, name: str, rank: int, place: int, size: int) -> bytearray:
        """Return record `place` of a file of records of `size` bytes."""
        content = bytearray(size)
        with self._path(name, rank).open("rb") as file:
            file.seek(place * size)
            if file.readinto(content) < size:
                raise OSError(f"{file.name} is cut short")
        return content
