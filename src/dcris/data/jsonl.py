"""One's own data: JSON Lines, one reference a line.

    {"image": "img/1.jpg", "mask": "m/1.png", "expressions": ["left cup", "the cup on the left"], "split": "train"}

`mask` is the path of a picture in which what is not 0 is the object, or COCO's polygons [[x, y, x, y, ...], ...] or run lengths
{"size": [H, W], "counts": ...}. Paths are relative to the file and do not lead out of its folder. `split` is train where it is
missing. `category` (text) and `id` (a whole number) may be given; other fields are let be.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dcris.data.images import image_size
from dcris.data.masks import validate_segmentation
from dcris.data.table import Complain, ReferenceTable, bad, check_text, plain_path
from dcris.data.table import field as entry
from dcris.errors import DcrisError
from dcris.types import Expression, Reference, Segmentation

LONGEST_LINE = 16 << 20
"""Bytes. A mask that takes more is better kept as a picture."""

_BOM = b"\xef\xbb\xbf"


def is_jsonl(root: Path) -> bool:
    """Whether a path means a data set in one file of JSON Lines, which is called by the file's name."""
    return root.suffix.lower() == ".jsonl"


def load_jsonl(path: Path, complain: Complain | None = None) -> ReferenceTable:
    """Read a data set of one's own. Its name is the file's stem.

    A reference's `ref_id` is its `id`, or else the number of its line; sentences and distinct photographs are numbered in the
    order in which they come. Of each photograph, and each mask that is a picture, the header is read.

    Args:
        path: the file.
        complain: told of each line that is wrong, which is then left out.

    Raises DcrisError where the file cannot be read or holds nothing, and, without `complain`, for the first line that is wrong.
    """
    reader, references, complaints = _Reader(path), [], 0
    for number, line in _lines(path):
        try:
            references.append(reader.reference(line, number))
        except DcrisError as error:
            if complain is None:
                raise
            complain(error)
            complaints += 1
    if not references and not complaints:
        raise bad(path, "it holds no references")
    return ReferenceTable(path.stem, "own", path, tuple(references))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            number = 0
            # Not `for line in file`: a file that is all one line would be read whole.
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise bad(
                        path,
                        f"line {number} is longer than {LONGEST_LINE >> 20} MiB; each line is one reference, and a large mask "
                        "is better kept as a picture",
                    )
                line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                if line:
                    yield number, line
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {path}; check the folder and the name") from error
    except OSError as error:
        raise DcrisError(f"cannot read {path}: {error.strerror or error}; check the folder and the name") from error


@dataclass
class _Reader:
    """What has been seen of a file so far."""

    path: Path
    images: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    """Number and size (H, W) of each photograph."""
    lines: dict[int, int] = field(default_factory=dict)
    """The line of each `ref_id`."""
    sentences: int = 0

    def reference(self, line: bytes, number: int) -> Reference:
        where, path = f"line {number}", self.path
        record = self._parse(line, where)
        name = self._relative(entry(record, "image", str, path, where), where, "image")
        if name not in self.images:
            self.images[name] = (len(self.images) + 1, self._size(path.parent / name, where))
        image_id, size = self.images[name]
        segmentation = self._segmentation(record, size, where)
        texts = entry(record, "expressions", list, path, where)
        if not texts:
            raise bad(path, f"{where} has an empty 'expressions'")
        for text in texts:
            if type(text) is not str:
                raise bad(path, f"{where} has 'expressions' that are not all text")
            check_text(text, path, where, "expressions")
        split, category = (
            check_text(entry(record, key, str, path, where), path, where, key) if key in record else default
            for key, default in (("split", "train"), ("category", "object"))
        )
        ref_id = entry(record, "id", int, path, where) if "id" in record else number
        other = self.lines.setdefault(ref_id, number)
        if other != number:
            raise bad(
                path,
                f"{where} has the id {ref_id}, which is that of line {other}; give each line its own, or none an id",
            )
        first = self.sentences + 1
        self.sentences += len(texts)
        return Reference(
            ref_id=ref_id,
            ann_id=ref_id,
            image_id=image_id,
            image_path=path.parent / name,
            image_size=size,
            category=category,
            split=split,
            segmentation=segmentation,
            expressions=tuple(Expression(sent_id, text) for sent_id, text in enumerate(texts, first)),
        )

    def _parse(self, line: bytes, where: str) -> Any:
        try:
            return json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            raise bad(self.path, f"{where} is not UTF-8 text (from byte {error.start + 1} on)") from error
        except json.JSONDecodeError as error:
            raise bad(
                self.path, f"{where} is not one whole JSON object ({error.msg}, at character {error.colno})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise bad(self.path, f"{where} cannot be read as JSON ({error})") from error

    def _relative(self, name: str, where: str, key: str) -> str:
        return plain_path(name.removeprefix("./"), self.path, where, key)

    def _size(self, image: Path, where: str) -> tuple[int, int]:
        try:
            return image_size(image)
        except DcrisError as error:
            raise DcrisError(f"{self.path}: {where}: {error}") from error

    def _segmentation(self, record: dict[str, Any], size: tuple[int, int], where: str) -> Segmentation:
        mask = record.get("mask")
        if mask is None:
            raise bad(self.path, f"{where} has no 'mask'")
        if type(mask) is str:
            mask = self.path.parent / self._relative(mask, where, "mask")
        try:
            return validate_segmentation(mask, size)
        except DcrisError as error:
            raise bad(self.path, f"{where} has a 'mask' that does not fit ({error})") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
