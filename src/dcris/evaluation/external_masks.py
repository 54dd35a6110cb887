"""Evaluation of predicted masks from files, so that any system can be scored by any protocol.

Masks have the size of their image, one for each expression, identified by its `sent_id`:
- a folder of PNG files `<sent_id>.png` with two values, 0 and another for the object;
- a COCO result file (.json): a list of entries with `sent_id` and `segmentation` (run lengths or
  polygons);
- an .npz file of arrays [H, W] named by sent_id, with two values;
- a file of JSON Lines (.jsonl) with such entries, as `dcris evaluate --answers` writes it: its
  masks are scored again, by the protocol that measured them on the pixels that this compared.

Where the data set's own files call an expression otherwise (PhraseCut's task_id, RefSegRS's id,
ReasonSeg's file name), PNG files and arrays may have that name. Entries may have GSEval's keys,
`idx` and `predicted_segmentation`.

An empty mask, or `null` as the `segmentation`, answers that there is nothing. Entries of .json and
.jsonl files may have `present`, the probability that the target is present, and `score`, both in
0..1, which some rules of protocols with absent targets need. Reports show how reliable they are.
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
from dcris.data.table import bad, field, located
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import overlap, with_boundary
from dcris.evaluation.protocols import Protocol
from dcris.evaluation.results import probability
from dcris.types import Expression, MaskArray, SoftMask
from dcris.utils.files import open_zip, read_json, read_json_lines

_LONGEST_HEADER = 16_384
"""Bytes read of an .npy file's header; numpy accepts headers of up to 10,000 characters."""

_KEPT = ("segmentation", "present", "score", "protocol", "compared")
"""Fields of an entry that are kept in memory."""

Key = int | str
"""A sent_id, or the name of an expression."""


class PredictedMasks(ABC):
    """Predicted masks by the expression's key."""

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    def keys(self, expression: Expression) -> list[Key]:
        """Return the keys that an expression's mask has here, of its name and its sent_id."""
        own = (
            (expression.sent_id,)
            if expression.name == str(expression.sent_id)
            else (expression.name, expression.sent_id)
        )
        return [key for key in own if key is not None and key in self]

    def find(self, expression: Expression, size: tuple[int, int]) -> tuple[Key, MaskArray] | None:
        """Return the key of an expression's mask and the mask [H, W]; None if there is none.

        Raises:
            DcrisError: it cannot be read or has another size, or both the expression's name and its
                sent_id have a mask and these differ, so that one is of another expression.
        """
        keys = self.keys(expression)
        if not keys:
            return None
        try:
            masks = [self.mask(key, size) for key in keys]
        except DcrisError:
            if len(keys) == 1:
                raise
            masks = []  # one may have the size of its own image
        if len(masks) != len(keys) or not np.array_equal(masks[0], masks[-1]):
            raise DcrisError(
                f"the masks {keys[0]} and {keys[1]} differ, and expression {expression.sent_id} has both as its names; name "
                "all masks by sent_id, or all by the names in the data set's files"
            )
        return keys[0], masks[0]

    @abstractmethod
    def mask(self, key: Key, size: tuple[int, int]) -> MaskArray:
        """Return the mask [H, W] of an image of `size` (H, W).

        Raises:
            DcrisError: if it cannot be read or has another size.
        """

    def compared(self, key: Key, protocol: Protocol) -> MaskArray | None:
        """Return a mask on the canvas of the protocol that measured it; None if that is another one
        or unknown.

        Raises:
            DcrisError: if it cannot be decoded.
        """
        return None

    def confidence(self, key: Key, kind: str) -> float | None:
        """Return the `present` or `score` of a mask; None if the format has none.

        Raises:
            DcrisError: if it is not a number in 0..1.
        """
        return None


class _PngFolder(PredictedMasks):
    """A folder of <sent_id>.png."""

    def __init__(self, folder: Path, threshold: float | None) -> None:
        self.folder, self.threshold = folder, threshold
        if not any(folder.glob("*.png")):
            raise DcrisError(f"the folder {folder} has no masks; name each by its sent_id, such as 42.png")

    def __contains__(self, key: object) -> bool:
        # A broken link or a file that is not an image counts, so that reading it raises an
        # error naming it. A name comes from a file of the data set and must not lead elsewhere.
        return Path(f"{key}.png").name == f"{key}.png" and os.path.lexists(self.folder / f"{key}.png")

    def mask(self, key: Key, size: tuple[int, int]) -> MaskArray:
        path = self.folder / f"{key}.png"
        return decode_mask(path if self.threshold is None else SoftMask(path, self.threshold), size).astype(bool)


class _Records(PredictedMasks):
    """Records with sent_id and COCO segmentation, of a .json or .jsonl file."""

    def __init__(self, path: Path, records: Iterable[tuple[str, dict[str, Any]]]) -> None:
        self.path = path
        self.records: dict[Key, tuple[str, dict[str, Any]]] = {}  # by sent_id, with its line or entry
        for where, record in records:
            theirs = type(record) is dict and "sent_id" not in record and "idx" in record
            sent_id = field(record, "idx" if theirs else "sent_id", int, path, where)
            if sent_id in self.records:
                raise bad(path, f"{where} repeats sentence {sent_id} of {self.records[sent_id][0]}")
            kept: dict[str, Any] = {key: record[key] for key in _KEPT if key in record}
            if "segmentation" not in record and "predicted_segmentation" in record:
                kept["segmentation"] = record["predicted_segmentation"]
            self.records[sent_id] = where, kept

    def __contains__(self, key: object) -> bool:
        return key in self.records

    def mask(self, key: Key, size: tuple[int, int]) -> MaskArray:
        where, record = self.records[key]
        segmentation = record.get("segmentation", False)
        # Prediction.polygons() writes empty masks as the second.
        if segmentation is None or segmentation in ([], [[]], {"size": list(size), "counts": []}):
            return np.zeros(size, bool)
        if type(segmentation) not in (list, dict):
            raise bad(self.path, f"{where} has no 'segmentation' in run lengths or polygons")
        return self._decode(segmentation, size, where, "segmentation")

    def compared(self, key: Key, protocol: Protocol) -> MaskArray | None:
        where, record = self.records[key]
        if protocol.canvas is None or record.get("protocol") != protocol.name or "compared" not in record:
            return None
        return self._decode(record["compared"], (protocol.canvas, protocol.canvas), where, "compared")

    def _decode(self, segmentation: Any, size: tuple[int, int], where: str, name: str) -> MaskArray:
        with located(self.path, f"{where} has a '{name}' that cannot be decoded"):
            return decode_mask(segmentation, size).astype(bool)

    def confidence(self, key: Key, kind: str) -> float | None:
        where, record = self.records[key]
        return probability(record, kind, self.path, where)


class _Arrays(PredictedMasks):
    """An .npz file.

    Each array's header is checked before its content is read, because a small file can claim any
    size or hold pickled objects, which run code when loaded.
    """

    def __init__(self, path: Path, threshold: float | None) -> None:
        self.path, self.threshold = path, threshold
        with self._read_errors():
            self.archive = open_zip(path)
        self.names = set(self.archive.namelist())

    def __contains__(self, key: object) -> bool:
        return f"{key}.npy" in self.names

    def mask(self, key: Key, size: tuple[int, int]) -> MaskArray:
        name = f"{key}.npy"
        with self._read_errors():
            with self.archive.open(name) as file:
                start = io.BytesIO(file.read(_LONGEST_HEADER))  # a header may claim to be 4 GB long
            version = np.lib.format.read_magic(start)
            read: Callable[..., Any] = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(start)
            if shape != size or dtype.kind not in ("bui" if self.threshold is None else "buif"):
                raise DcrisError(
                    f"the array {key} of {self.path} is {dtype} {list(shape)}, but must be bool or integer "
                    f"{list(size)}; give masks of the image's size, or --mask-threshold for probabilities"
                )
            with self.archive.open(name) as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
            return binary_mask(values, f"{key} of {self.path}", self.threshold).astype(bool)

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Turn any error of reading the archive into a DcrisError that names it."""
        try:
            yield
        except DcrisError:
            raise
        except Exception as error:  # damaged archives raise errors of many classes
            reason = error.strerror if isinstance(error, OSError) else None
            raise DcrisError(
                f"cannot read the masks of {self.path} ({reason or error}); the file may be incomplete, so write it again"
            ) from error


def open_predicted_masks(path: Path, mask_threshold: float | None = None) -> PredictedMasks:
    """Open a folder or file of masks, in one of the formats listed above.

    Args:
        path: the folder or file.
        mask_threshold: for masks of more than two values, as in `binary_mask`.

    Raises:
        DcrisError: if it does not exist or has an unknown format.
    """
    if path.is_dir():
        return _PngFolder(path, mask_threshold)
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


def score_masks(
    path: Path,
    queries: Queries,
    protocol: Protocol,
    *,
    missing_is_empty: bool = False,
    keep_masks: bool = False,
    mask_threshold: float | None = None,
) -> Iterator[EvalResult]:
    """Compare predicted masks with the truth. The images are not read.

    Args:
        path: folder or file in one of the formats listed above. Masks of other sentences are
            ignored.
        queries: the expressions to score.
        protocol: defines the pixels on which masks are compared.
        missing_is_empty: score an expression without a mask as an empty mask.
        keep_masks: whether results hold their masks.
        mask_threshold: for masks of more than two values, as in `binary_mask`.

    Yields:
        One result for each query, in their order.

    Raises:
        DcrisError: if an expression has no mask, or a mask cannot be read or has another size than
            its image.
    """
    masks = open_predicted_masks(path, mask_threshold)
    missing = [expression for _, expression in queries if not masks.keys(expression)]
    if len(missing) == len(queries) or (missing and not missing_is_empty):
        raise DcrisError(
            f"{path} has no mask for {len(missing):,} of {len(queries):,} expressions, the first of them sentence "
            f"{missing[0].sent_id}, {missing[0].text!r}; add the masks, or give --missing-is-empty"
        )
    for reference, expression in queries:
        targets, size = reference.targets(expression), reference.image_size
        key, mask = masks.find(expression, size) or (None, np.zeros(size, bool))
        truth = protocol.truth(reference, expression)
        measures = protocol.for_target(bool(targets))
        compared = None if key is None else masks.compared(key, measures)
        compared = measures.to_canvas(mask) if compared is None else compared
        counted = overlap(compared, truth.mask, truth.ignored)
        if protocol.boundary:
            counted = with_boundary(counted, compared, truth.mask, truth.ignored)
        present = score = 0.0 if key is None else None
        try:
            if key is not None:
                present, score = (masks.confidence(key, kind) for kind in ("present", "score"))
        except DcrisError:
            # A COCO result may have any number as its score, which only some rules need.
            if protocol.none_rule is not None:
                raise
        score = present if score is None else score
        pixels, query = int(np.count_nonzero(truth.mask)), (reference, expression)
        try:
            counted = protocol.judge(counted, pixels, query, present, score)
        except DcrisError as error:
            raise DcrisError(f"{path}, sentence {expression.sent_id}: {error}") from error
        kept = encode_mask(mask) if keep_masks else None
        yield EvalResult(reference, expression, counted, kept, present=present, score=score)
