"""Evaluate predicted masks of any system by any protocol, so that systems can be compared on equal terms.

Masks are those of whole photographs, one for each expression, found by its `sent_id`:
- a folder of pictures named `<sent_id>.png` of two values, 0 and another for the object;
- a COCO result file (.json), a list whose entries have `sent_id` and `segmentation` (run lengths or polygons);
- an .npz file of arrays [H, W] named by sent_id, of two values, too;
- answers (.jsonl) that `dcris evaluate --answers` wrote: their masks count, not their scores.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dcris.data.dataset import Queries
from dcris.data.images import binary_mask
from dcris.data.masks import decode_mask, encode_mask
from dcris.data.table import bad, field
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import overlap
from dcris.evaluation.protocols import Protocol
from dcris.types import MaskArray, SoftMask
from dcris.utils.files import open_zip, read_json, read_json_lines

_LONGEST_HEADER = 16_384
"""Bytes of an .npy file's header that are read; numpy itself accepts 10,000 characters."""


class Predictions(ABC):
    """Masks by sent_id."""

    @abstractmethod
    def __contains__(self, sent_id: object) -> bool: ...

    @abstractmethod
    def mask(self, sent_id: int, size: tuple[int, int]) -> MaskArray:
        """The mask [H, W] for a photograph of that size. Raises DcrisError where it cannot be read or has another size."""


class _Pictures(Predictions):
    def __init__(self, folder: Path, threshold: float | None) -> None:
        self.folder, self.threshold = folder, threshold
        if not any(folder.glob("*.png")):
            raise DcrisError(f"the folder {folder} has no masks in it; they are to be named by sentence, as in 42.png")

    def __contains__(self, sent_id: object) -> bool:
        # Also where it is no picture, or a link to nothing: whoever reads it gets an error that names it.
        return os.path.lexists(self.folder / f"{sent_id}.png")

    def mask(self, sent_id: int, size: tuple[int, int]) -> MaskArray:
        path = self.folder / f"{sent_id}.png"
        return decode_mask(path if self.threshold is None else SoftMask(path, self.threshold), size).astype(bool)


class _Records(Predictions):
    """Masks as COCO stores them, by sentence."""

    def __init__(self, path: Path, records: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self.path = path
        self.found: dict[int, tuple[str, Any]] = {}
        for where, record in records:
            sent_id = field(record, "sent_id", int, path, where)
            if sent_id in self.found:
                raise bad(path, f"{where} answers sentence {sent_id}, which {self.found[sent_id][0]} did already")
            self.found[sent_id] = where, record.get("segmentation")

    def __contains__(self, sent_id: object) -> bool:
        return sent_id in self.found

    def mask(self, sent_id: int, size: tuple[int, int]) -> MaskArray:
        where, segmentation = self.found[sent_id]
        if type(segmentation) not in (list, dict):
            raise bad(self.path, f"{where} has no 'segmentation' in run lengths or polygons")
        if segmentation == [] or segmentation in ([[]], {"size": list(size), "counts": []}):
            return np.zeros(size, bool)  # nothing found, as Prediction.polygons() writes it
        try:
            return decode_mask(segmentation, size).astype(bool)
        except DcrisError as error:
            raise bad(self.path, f"{where} has a 'segmentation' that cannot be decoded ({error})") from error


class _Arrays(Predictions):
    """An .npz file. Each array's header is looked at first: a small file can claim any size, or ask to run code."""

    def __init__(self, path: Path, threshold: float | None) -> None:
        self.path, self.threshold = path, threshold
        with self._explained():
            self.archive = open_zip(path)
        self.names = set(self.archive.namelist())

    def __contains__(self, sent_id: object) -> bool:
        return f"{sent_id}.npy" in self.names

    def mask(self, sent_id: int, size: tuple[int, int]) -> MaskArray:
        name = f"{sent_id}.npy"
        with self._explained():
            with self.archive.open(name) as file:
                start = io.BytesIO(file.read(_LONGEST_HEADER))  # a header can claim to have 4 GB
            version = np.lib.format.read_magic(start)
            read: Callable[..., Any] = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(start)
            if shape != size or dtype.kind not in ("bui" if self.threshold is None else "buif"):
                raise DcrisError(
                    f"the array {sent_id} of {self.path} is {dtype} {list(shape)}, not bool or whole numbers {list(size)}; "
                    "give masks of the photographs' size, or --mask-threshold for probabilities"
                )
            with self.archive.open(name) as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
            return binary_mask(values, f"{sent_id} of {self.path}", self.threshold).astype(bool)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DcrisError:
            raise
        except Exception as error:  # a damaged archive makes its readers raise nearly anything
            reason = error.strerror if isinstance(error, OSError) else None
            raise DcrisError(
                f"cannot read the masks of {self.path} ({reason or error}); it may be cut short, so make it again"
            ) from error


def open_predictions(path: Path, mask_threshold: float | None = None) -> Predictions:
    """The masks that a folder or file holds. Raises DcrisError where there is none, or it is of no known kind."""
    if path.is_dir():
        return _Pictures(path, mask_threshold)
    if not path.exists():
        raise DcrisError(f"there are no masks at {path}; give a folder of PNGs, or a .json, .npz or .jsonl file")
    kind = path.suffix.lower()
    if kind == ".npz":
        return _Arrays(path, mask_threshold)
    if kind == ".jsonl":
        return _Records(path, ((f"line {number}", record) for number, record in read_json_lines(path)))
    if kind == ".json":
        records = read_json(path, "the result file")
        if type(records) is not list:
            raise bad(path, "it is not a list of results")
        return _Records(path, ((f"entry {number}", record) for number, record in enumerate(records, 1)))
    raise DcrisError(f"{path} is neither a folder of PNGs nor a .json, .npz or .jsonl file")


def score_predictions(
    path: Path,
    queries: Queries,
    protocol: Protocol,
    *,
    missing_is_empty: bool = False,
    keep_masks: bool = False,
    mask_threshold: float | None = None,
) -> Iterator[EvalResult]:
    """Compare masks with the truth by a protocol's rule. The photographs themselves are not needed.

    Args:
        path: a folder or file as described above. Masks for other sentences may be in it.
        questions: the expressions that count.
        protocol: on which pixels masks are compared.
        missing_is_empty: let an expression without a mask count as an empty one.
        keep_masks: whether answers hold their masks.
        mask_threshold: decides in pictures and arrays of more than two values, as in `binary_mask`.

    Yields one answer for each question, in their order. Raises DcrisError where an expression has no mask, and where a mask
    cannot be read or is not of its photograph's size.
    """
    predictions = open_predictions(path, mask_threshold)
    missing = [expression for _, expression in queries if expression.sent_id not in predictions]
    if len(missing) == len(queries) or (missing and not missing_is_empty):
        raise DcrisError(
            f"{path} has no mask for {len(missing):,} of {len(queries):,} expressions, of which the first is sentence "
            f"{missing[0].sent_id}, {missing[0].text!r}; add them, or let them count as empty with --missing-is-empty"
        )
    for reference, expression in queries:
        if expression.sent_id in predictions:
            mask = predictions.mask(expression.sent_id, reference.image_size)
        else:
            mask = np.zeros(reference.image_size, bool)
        truth = decode_mask(reference.segmentation, reference.image_size).astype(bool)
        counted = overlap(protocol.compared(mask), protocol.compared(truth))
        yield EvalResult(reference, expression, counted, encode_mask(mask) if keep_masks else None)
