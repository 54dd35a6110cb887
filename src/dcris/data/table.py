"""The table of references that every source of data becomes, and the strict reading of fields that all readers share.

Whatever a file holds is looked at here, once, so that nothing behind a reader has to ask again.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from dcris.data.image_folders import name_within
from dcris.errors import DcrisError
from dcris.types import Expression, Reference, SoftMask

_T = TypeVar("_T")

OnError = Callable[[DcrisError], None]
"""Callback that receives the error of each reference that cannot be used and is left out."""

_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")


@dataclass(frozen=True)
class ReferenceTable:
    """Every reference of one data set, in the file's order."""

    dataset: str
    split_by: str
    root: Path
    references: tuple[Reference, ...]
    notes: tuple[str, ...] = ()
    """What was left out or put together on the way here, for whoever trains on it."""

    def splits(self) -> dict[str, tuple[int, int]]:
        """References and expressions of each split that exists; train, val, testA, testB and test come first."""
        names = dict.fromkeys(reference.split for reference in self.references)
        counts = {name: [0, 0] for name in (*(known for known in _SPLIT_ORDER if known in names), *names)}
        for reference in self.references:
            counts[reference.split][0] += 1
            counts[reference.split][1] += len(reference.expressions)
        return {name: (references, expressions) for name, (references, expressions) in counts.items()}

    def split(self, name: str) -> tuple[Reference, ...]:
        """The references of one split. Raises DcrisError, naming the splits that exist, where there is none of that name."""
        chosen = tuple(reference for reference in self.references if reference.split == name)
        if not chosen:
            raise DcrisError(
                f"{self.dataset} ({self.split_by}) in {self.root} has no split '{name}'; choose from {', '.join(self.splits())}"
            )
        return chosen

    def sha256(self, split: str | None = None) -> str:
        """A checksum of what the references (all, or those of one split) say, in their order.

        That is identifiers, splits, phrases, masks and names of files.

        Where the root is does not count, nor under which of COCO's namings the photographs lie, so that a data set may move to
        another machine. Nor do the pixels of photographs and of masks that are pictures: reading them would take minutes.
        """
        digest = hashlib.sha256()
        folder = self.root.parent if self.root.is_file() else self.root

        def plain(value: Any) -> Any:
            """What JSON has no word for in a segmentation."""
            if isinstance(value, Path):
                return name_within(value, folder)
            if isinstance(value, SoftMask):
                return [value.path, value.threshold]
            return value.decode("latin1") if isinstance(value, bytes) else dict(value)

        for reference in self.references if split is None else self.split(split):
            identifiers = (reference.ref_id, reference.ann_id, reference.image_id, reference.split)
            photograph = (name_within(reference.image_path, folder), reference.image_size)
            phrases = [(expression.sent_id, expression.text) for expression in reference.expressions]
            content = (identifiers, photograph, phrases, reference.segmentation)
            digest.update(json.dumps(content, default=plain).encode())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a run writes down about its data, ready for JSON."""
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


_HALF = re.compile("[\ud800-\udfff]")
"""Half of a character, as JSON can spell it ("\\ud83d"). Python holds it as text, but nothing can encode it."""

_KINDS = {int: "a whole number", str: "text", list: "a list", bytes: "bytes"}


def field(record: Any, key: str, kind: type[_T], path: Path, where: str) -> _T:
    """`record[key]`, which must be exactly of type `kind`: a bool is no whole number here."""
    if type(record) is not dict:
        raise bad(path, f"{where} is not a table of named fields")
    if key not in record:
        raise bad(path, f"{where} has no '{key}'")
    value = record[key]
    if type(value) is not kind:
        found = "NaN" if type(value) is float and math.isnan(value) else type(value).__name__
        raise bad(path, f"{where} has a '{key}' that is not {_KINDS[kind]} but {found}")
    if isinstance(value, int) and abs(value) >= 1 << 63:  # Python itself writes none of thousands of digits
        raise bad(path, f"{where} has a '{key}' that has more than 64 bits")
    return value


def bad(path: Path, what: str) -> DcrisError:
    """The error for a file of annotations that has something wrong in it."""
    return DcrisError(f"{path}: {what}; correct that, or fetch the file again")


@contextmanager
def forgiving(on_error: OnError | None) -> Iterator[None]:
    """Around the reading of one reference: with `on_error`, what is wrong with it goes there, and the next may be read."""
    try:
        yield
    except DcrisError as error:
        if on_error is None:
            raise
        on_error(error)


def plain_path(name: str, path: Path, where: str, key: str = "file_name") -> str:
    """A relative path that a stranger's file names, which must not lead out of its folder, on any system.

    Returned without needless parts: "./a.jpg" and "a//b.jpg" are read as "a.jpg" and "a/b.jpg", as are Windows' backslashes.
    """
    slashed = name.replace("\\", "/")
    parts = [part for part in slashed.split("/") if part not in ("", ".")]
    leads_out = slashed.startswith("/") or ".." in parts or PureWindowsPath(*parts).drive
    # Longer ones are an error of the system's, not a file that is not there; and no file's name holds half a character.
    unusable = len(name) > 1000 or any(len(part.encode(errors="replace")) > 255 for part in parts)
    if not parts or leads_out or unusable or "\0" in name or _HALF.search(name):
        raise bad(path, f"{where} has a '{key}' that is not a plain path inside its folder")
    return "/".join(parts)


def index_by_id(records: list[Any], key: str, path: Path) -> dict[int, dict[str, Any]]:
    """COCO's records by their identifiers. Raises DcrisError where two that differ have the same one.

    `key` is what the file calls the list.
    """
    index: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records, 1):
        identifier = field(record, "id", int, path, f"entry {number} of '{key}'")
        if index.setdefault(identifier, record) != record:
            raise bad(path, f"two entries of '{key}' have the id {identifier} and differ")
    return index


def check_text(text: str, path: Path, where: str, key: str) -> str:
    """Return `text` as it is. Raises DcrisError where it is blank, or holds half a character and can be written nowhere."""
    if not text.strip():
        raise bad(path, f"{where} has a blank '{key}'")
    if _HALF.search(text):
        raise bad(path, f"{where} has a '{key}' that is no proper text: {text!r}")
    return text


def read_expressions(record: Any, path: Path, where: str, seen: set[int]) -> Iterable[Expression]:
    """The expressions of a reference; `seen` gathers their identifiers over the whole file."""
    sentences = field(record, "sentences", list, path, where)
    if not sentences:
        raise bad(path, f"{where} has an empty 'sentences'")
    for number, sentence in enumerate(sentences, 1):
        sent_id = field(sentence, "sent_id", int, path, f"sentence {number} of {where}")
        text = field(sentence, "sent", str, path, f"sentence {sent_id} of {where}")
        kind = sentence.get("kind")
        if sent_id in seen:
            raise bad(path, f"sentence {sent_id} of {where} is there twice")
        check_text(text, path, f"sentence {sent_id} of {where}", "sent")
        if not (kind is None or type(kind) is str):
            raise bad(path, f"sentence {sent_id} of {where} has a 'kind' that is not text")
        seen.add(sent_id)
        yield Expression(sent_id, text, kind)
