"""The table of references that every source of data becomes, and the strict reading of fields that all readers share.

Whatever a file holds is looked at here, once, so that nothing behind a reader has to ask again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from dcris.errors import DcrisError
from dcris.types import Expression, Reference

_T = TypeVar("_T")

_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")


@dataclass(frozen=True)
class ReferenceTable:
    """Every reference of one data set, in the file's order."""

    dataset: str
    split_by: str
    root: Path
    references: tuple[Reference, ...]

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
    return value


def bad(path: Path, what: str) -> DcrisError:
    """The error for a file of annotations that has something wrong in it."""
    return DcrisError(f"{path}: {what}; correct that, or fetch the file again")


def plain_path(name: str, path: Path, where: str, key: str = "file_name") -> str:
    """A relative path that a stranger's file names, which must not lead out of its folder, on any system."""
    if {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name or PureWindowsPath(name).drive:
        raise bad(path, f"{where} has a '{key}' that is not a plain path inside the image folder")
    return name


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
        if not text.strip():
            raise bad(path, f"sentence {sent_id} of {where} has a blank 'sent'")
        if not (kind is None or type(kind) is str):
            raise bad(path, f"sentence {sent_id} of {where} has a 'kind' that is not text")
        seen.add(sent_id)
        yield Expression(sent_id, text, kind)
