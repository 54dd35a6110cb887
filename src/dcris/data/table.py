"""The table of references that every data set layout is read into, and the field checks that
readers share.

Readers check everything that a file contains, once, so that later code need not check it again.
"""

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar
from urllib.parse import quote

from dcris.data.cleaning import is_blank
from dcris.data.coco import portable_name
from dcris.data.images import MAX_PIXELS
from dcris.errors import DcrisError
from dcris.types import Expression, PixelPolygons, Reference, SoftMask

_T = TypeVar("_T")

OnError = Callable[[DcrisError], None]
"""Callback that receives the error of each skipped reference."""

SPLIT_STEP = 10_000_000
"""Files without numbers are numbered from a multiple of this, by the place of their split, so that
a split's numbers do not depend on which others are there."""

MAX_OBJECTS = 1000
"""Most objects of a reference. COCO has at most 100 in an image, and decoding each takes time."""

_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")


@dataclass(frozen=True)
class ReferenceTable:
    """All references of one data set, in the order of its files."""

    dataset: str
    split_by: str
    root: Path
    references: tuple[Reference, ...]
    notes: tuple[str, ...] = ()
    """Sentences about references that were left out or combined, for people who train on the
    data."""

    def splits(self) -> dict[str, tuple[int, int]]:
        """Return the number of references and of expressions of each split.

        The order is train, val, testA, testB, test, then other splits.
        """
        names = dict.fromkeys(reference.split for reference in self.references)
        counts = {name: [0, 0] for name in (*(known for known in _SPLIT_ORDER if known in names), *names)}
        for reference in self.references:
            counts[reference.split][0] += 1
            counts[reference.split][1] += len(reference.expressions)
        return {name: (references, expressions) for name, (references, expressions) in counts.items()}

    def split(self, name: str) -> tuple[Reference, ...]:
        """Return the references of one split.

        Raises DcrisError, listing the splits, if there is none.
        """
        chosen = tuple(reference for reference in self.references if reference.split == name)
        if not chosen:
            raise DcrisError(
                f"{self.dataset} ({self.split_by}) in {self.root} has no split '{name}'; choose from {', '.join(self.splits())}"
            )
        return chosen

    def sha256(self, split: str | None = None) -> str:
        """Return a checksum of the references, of all or of one split, in their order.

        It covers identifiers, splits, expressions, masks and file names. It does not depend on
        where the root is or which of COCO's namings the images have, so a data set may move to
        another machine. The pixels of images and of mask images are not covered: reading them takes
        minutes.
        """
        digest = hashlib.sha256()
        folder = self.root.parent if self.root.is_file() else self.root

        def to_plain(value: Any) -> Any:
            """Replace a part of a segmentation that JSON cannot represent."""
            if isinstance(value, Path):
                return portable_name(value, folder)
            if isinstance(value, SoftMask):
                return [value.path, value.threshold]
            if isinstance(value, PixelPolygons):
                return [polygon.tolist() for polygon in value.polygons]
            return value.decode("latin1") if isinstance(value, bytes) else dict(value)

        for reference in self.references if split is None else self.split(split):
            objects = _alone(reference.ann_ids), _alone(reference.segmentations)
            identifiers = (reference.ref_id, objects[0], reference.image_id, reference.split)
            image = (portable_name(reference.image_path, folder), reference.image_size)
            expressions = [
                (expression.sent_id, expression.text, *(() if expression.exists else (False,)))
                for expression in reference.expressions
            ]
            ignored = () if reference.ignored is None else (reference.ignored,)
            content = (identifiers, image, expressions, objects[1], *ignored)
            digest.update(json.dumps(content, default=to_plain).encode())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return what a run records about its data, ready for JSON."""
        return {
            "dataset": self.dataset,
            "split_by": self.split_by,
            "splits": {
                name: {"references": references, "expressions": expressions}
                for name, (references, expressions) in self.splits().items()
            },
            "notes": list(self.notes),
            "sha256": self.sha256(),
        }


def _alone(objects: tuple[_T, ...]) -> _T | tuple[_T, ...]:
    """Return the only object itself: the checksums of data sets with one object in each reference
    are older than references with several."""
    return objects[0] if len(objects) == 1 else objects


_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate, which JSON can contain ("\\ud83d") but which cannot be encoded as UTF-8."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80

_LONGEST = 1000
"""Most characters of a path, and of a name in a result file: Markdown pads a column to its longest
cell."""

_LARGEST = 1e18
"""Of the numbers in a result file, among which are counts of operations."""

_TYPE_NAMES = {
    int: "an integer",
    str: "text",
    list: "a list",
    dict: "an object with named fields",
    bytes: "bytes",
    bool: "true or false",
}


def field(record: Any, key: str, kind: type[_T], path: Path, where: str) -> _T:
    """Return `record[key]` if it is exactly of type `kind`: a bool is not an int here.

    Args:
        record: a JSON object, of unknown origin.
        key: name of the field.
        kind: int, str, list, bytes or bool.
        path: the file, for the error.
        where: the place in the file, for the error, such as "reference 7".

    Raises:
        DcrisError: the record is not an object, the field is missing or has another type, or its
            text cannot be encoded as UTF-8.
    """
    if type(record) is not dict:
        raise bad(path, f"{where} is not an object with named fields")
    if key not in record:
        raise bad(path, f"{where} has no '{key}'")
    value = record[key]
    if type(value) is not kind:
        found = "NaN" if type(value) is float and math.isnan(value) else f"{type(value).__name__} ({shown(value)})"
        raise bad(path, f"{where} has a '{key}' that is not {_TYPE_NAMES[kind]} but {found}")
    if isinstance(value, int) and abs(value) >= 1 << 63:  # Python refuses to print an int of thousands of digits
        raise bad(path, f"{where} has a '{key}' of more than 64 bits")
    if isinstance(value, str) and not is_utf8(value):
        raise bad(path, f"{where} has a '{key}' that is not valid Unicode text: {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value of unknown origin for an error message: its start and its end, escaped."""
    return _SHORT.repr(value)


def is_utf8(text: str) -> bool:
    """Return whether text can be encoded as UTF-8: it has no lone surrogate."""
    return text.isascii() or _SURROGATE.search(text) is None


def quoted(name: str) -> str:
    """Return a file name as UTF-8 text, percent-encoded if its bytes are not UTF-8. On Unix they
    may be any."""
    return name if is_utf8(name) else quote(os.fsencode(name))


def bad(path: Path, problem: str) -> DcrisError:
    """Return the error for an annotation file with a problem in it."""
    return DcrisError(f"{path}: {problem}; correct the file or download it again")


@contextmanager
def located(path: Path, problem: str) -> Iterator[None]:
    """Context in which a DcrisError becomes that of an annotation file with a problem, as its
    reason."""
    try:
        yield
    except DcrisError as error:
        raise bad(path, f"{problem} ({error})") from error


class ErrorCount:
    """Callback that counts the errors that `on_error` receives; without `on_error`, it raises
    them."""

    def __init__(self, on_error: OnError | None) -> None:
        self.on_error, self.count = on_error, 0

    def __call__(self, error: DcrisError) -> None:
        """Count and pass on an error."""
        if self.on_error is None:
            raise error
        self.count += 1
        self.on_error(error)


@contextmanager
def skip_errors(on_error: OnError | None) -> Iterator[None]:
    """Pass a DcrisError raised inside to `on_error`; without `on_error`, let it propagate."""
    try:
        yield
    except DcrisError as error:
        if on_error is None:
            raise
        on_error(error)


def plain_path(name: str, path: Path, where: str, key: str) -> str:
    """Return a relative path from a file of unknown origin as `inner_path`.

    Raises DcrisError if it leads out of its folder; `path`, `where` and `key` locate it.
    """
    found = inner_path(name)
    if found is None:
        raise bad(path, f"{where} has a '{key}' that is not a plain path inside its folder: {shown(name)}")
    return found


def inner_path(name: str) -> str | None:
    """Return a relative path of unknown origin in normal form; None if it leads out of its folder.

    "./a.jpg", "a//b.jpg" and backslashes become "a.jpg" and "a/b.jpg". The check holds on every
    operating system.
    """
    parts = path_parts(name)
    leads_out = name.startswith(("/", "\\")) or ".." in parts or PureWindowsPath(*parts).drive
    return None if not parts or leads_out else "/".join(parts)


def path_parts(name: str) -> list[str]:
    """Return the folders and the name of the file in a path with slashes or backslashes; nothing if
    no file can have it."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    # The operating system raises other errors for such names than for missing files.
    unusable = len(name) > _LONGEST or any(len(part.encode(errors="replace")) > 255 for part in parts)
    return [] if unusable or "\0" in name or not is_utf8(name) else parts


def path_field(record: Any, key: str, path: Path, where: str) -> str:
    """Return the relative path `record[key]`: `field` and `plain_path`."""
    return plain_path(field(record, key, str, path, where), path, where, key)


def plain_name(name: str, path: Path, where: str, key: str) -> str:
    """Return a name that becomes a part of paths. Raises DcrisError if it has several parts, or
    `plain_path` would change it."""
    if plain_path(name, path, where, key) != name or "/" in name:
        raise bad(path, f"{where} has a '{key}' that is not a plain name: {shown(name)}")
    return name


def size_field(record: Any, path: Path, where: str) -> tuple[int, int]:
    """Return `height` and `width` of an image's record. Raises DcrisError if no image can have
    them."""
    height, width = (field(record, key, int, path, where) for key in ("height", "width"))
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise bad(path, f"{where} cannot be {height} x {width} pixels")
    return height, width


def index_by_id(records: list[Any], key: str, path: Path) -> dict[int, dict[str, Any]]:
    """Index COCO records by their `id`. `key` is the name of the list in the file.

    Raises DcrisError if two different records have the same id.
    """
    index: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records, 1):
        identifier = field(record, "id", int, path, f"entry {number} of '{key}'")
        if index.setdefault(identifier, record) != record:
            raise bad(path, f"two different entries of '{key}' have the id {identifier}")
    return index


def check_text(text: str, path: Path, where: str, key: str) -> str:
    """Return `text` unchanged. Raises DcrisError if it is blank, also only after the cleaning that
    models do, or cannot be encoded as UTF-8."""
    if not is_utf8(text):
        raise bad(path, f"{where} has a '{key}' that is not valid Unicode text: {text!r}")
    if is_blank(text):
        raise bad(path, f"{where} has a blank '{key}'" + (f": {shown(text)}" if text.strip() else ""))
    return text


def text_field(record: Any, key: str, path: Path, where: str) -> str:
    """Return the text `record[key]`, which is not blank: `field` and `check_text`."""
    return check_text(field(record, key, str, path, where), path, where, key)


def texts_field(record: Any, key: str, path: Path, where: str) -> list[str]:
    """Return the texts in the list `record[key]`: one or more, none of them blank."""
    texts = field(record, key, list, path, where)
    if not texts:
        raise bad(path, f"{where} has an empty '{key}'")
    for text in texts:
        if type(text) is not str:
            raise bad(path, f"{where} has an entry of '{key}' that is not text")
        check_text(text, path, where, key)
    return texts


def short_text(record: Any, key: str, path: Path, where: str) -> str:
    """Return a name from a file of unknown origin: `text_field`, and not too long."""
    text = text_field(record, key, path, where)
    if len(text) > _LONGEST:
        raise bad(path, f"{where} has a '{key}' of {len(text):,} characters; the limit is {_LONGEST:,}")
    return text


def finite_number(record: Any, key: str, path: Path, where: str) -> float:
    """Return a finite number from a file of unknown origin. Raises DcrisError if it is not one."""
    value = record.get(key)
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:  # NaN is not
        raise bad(path, f"{where} has no number as '{key}'")
    return float(value)


def read_expressions(record: Any, path: Path, where: str, seen: set[int]) -> Iterable[Expression]:
    """Yield the expressions of a reference record.

    In R-RefCOCO, `exist` is false for sentences that describe nothing in the image. `seen` collects
    the sent_ids of the whole file, so that duplicates are found.
    """
    sentences = field(record, "sentences", list, path, where)
    if not sentences:
        raise bad(path, f"{where} has an empty 'sentences'")
    for number, sentence in enumerate(sentences, 1):
        sent_id = field(sentence, "sent_id", int, path, f"sentence {number} of {where}")
        place = f"sentence {sent_id} of {where}"
        text = text_field(sentence, "sent", path, place)
        kind = None if sentence.get("kind") is None else field(sentence, "kind", str, path, place)
        exists = sentence.get("exist", True)
        if sent_id in seen:
            raise bad(path, f"{place} occurs twice")
        if type(exists) not in (bool, int) or exists not in (0, 1):
            raise bad(path, f"{place} has an 'exist' that is neither true nor false")
        seen.add(sent_id)
        yield Expression(sent_id, text, kind, bool(exists))
