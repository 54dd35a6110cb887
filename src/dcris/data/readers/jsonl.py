"""Your own data in JSON Lines, one reference per line.

    {"image": "img/1.jpg", "mask": "m/1.png", "expressions": ["cup", "red cup"], "split": "val"}

`mask` is the path of an image of two values, 0 and another one for the object, or COCO's polygons
[[x, y, x, y, ...], ...] or run lengths {"size": [H, W], "counts": ...}. Expressions that describe
several objects have `masks`, a list of such masks, in place of `mask`; expressions that describe
nothing in the image have "mask": null. Paths are relative to the file and must not lead out of its
folder. Optional fields: `ignored` (a mask of the pixels that evaluation leaves out), `split`
(default: train), `category` (text) and `id` (an integer). Unknown fields are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from dcris.data.images import image_size
from dcris.data.masks import validate_segmentation
from dcris.data.table import (
    MAX_OBJECTS,
    OnError,
    ReferenceTable,
    bad,
    field,
    located,
    path_field,
    plain_path,
    skip_errors,
    text_field,
    texts_field,
)
from dcris.errors import DcrisError
from dcris.types import Expression, Reference, Segmentation
from dcris.utils.files import read_json_lines

_SPLIT_BY = "own"


def is_jsonl(path: Path) -> bool:
    """Return whether a path has the name of a data set in JSON Lines."""
    return path.suffix.lower() == ".jsonl"


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the one partition if `root` is a JSON Lines file; see Reader.find."""
    return [_SPLIT_BY] if is_jsonl(root) else []


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read the JSON Lines file `root`; see Reader.load.

    The data set is named after the file's stem. The ref_id is the `id`, or else the line
    number. Expressions and distinct images are numbered in the order of the file. The headers of
    all images and mask images are read.
    """
    reader, references = _LineReader(root), list[Reference]()
    for number, record in read_json_lines(root, on_error):
        with skip_errors(on_error):
            references.append(reader.read(record, number))
    return ReferenceTable(root.stem, _SPLIT_BY, root, tuple(references))


@dataclass
class _LineReader:
    """Reads the lines of one file and remembers what must be unique or is needed again."""

    path: Path
    images: dict[str, tuple[int, tuple[int, int]]] = dataclass_field(default_factory=dict)
    """Number and size (H, W) of each image."""
    lines: dict[int, int] = dataclass_field(default_factory=dict)
    """Line number of each ref_id."""
    expressions: int = 0
    """Number of expressions so far."""
    listed: int = 0
    """Number of objects in `masks` so far."""

    def read(self, record: Any, number: int) -> Reference:
        """Return the reference of line `number`. Raises DcrisError if the line cannot be used."""
        where, path = f"line {number}", self.path
        name = path_field(record, "image", path, where)
        if name not in self.images:
            self.images[name] = (len(self.images) + 1, self._image_size(path.parent / name, where))
        image_id, size = self.images[name]
        segmentations = self._read_segmentations(record, size, where)
        texts = texts_field(record, "expressions", path, where)
        split, category = (
            text_field(record, key, path, where) if key in record else default
            for key, default in (("split", "train"), ("category", "object"))
        )
        ref_id = field(record, "id", int, path, where) if "id" in record else number
        other = self.lines.setdefault(ref_id, number)
        if other != number:
            raise bad(path, f"{where} has the id {ref_id}, which line {other} has too; ids must be unique or absent")
        ignored = record.get("ignored")
        first = self.expressions + 1
        self.expressions += len(texts)
        ann_ids: tuple[int, ...] = (ref_id,) if segmentations else ()
        if "masks" in record:  # numbered downwards from -1, since the identifier of a single mask is the ref_id
            ann_ids = tuple(-number for number in range(self.listed + 1, self.listed + 1 + len(segmentations)))
            self.listed += len(segmentations)
        return Reference(
            ref_id=ref_id,
            ann_ids=ann_ids,
            image_id=image_id,
            image_path=path.parent / name,
            image_size=size,
            category=category,
            split=split,
            segmentations=segmentations,
            expressions=tuple(Expression(sent_id, text) for sent_id, text in enumerate(texts, first)),
            ignored=None if ignored is None else self._read_segmentation(ignored, size, where, "'ignored'"),
        )

    def _image_size(self, image: Path, where: str) -> tuple[int, int]:
        try:
            return image_size(image)
        except DcrisError as error:
            raise DcrisError(f"{self.path}: {where}: {error}") from error

    def _read_segmentations(
        self, record: dict[str, Any], size: tuple[int, int], where: str
    ) -> tuple[Segmentation, ...]:
        """Return the objects of a line: those of `masks`, that of `mask`, or none if it is null."""
        if "masks" not in record:
            if "mask" not in record:
                raise bad(self.path, f"{where} has no 'mask'")
            mask = record["mask"]
            return () if mask is None else (self._read_segmentation(mask, size, where, "'mask'"),)
        if "mask" in record:
            raise bad(self.path, f"{where} has both 'mask' and 'masks'")
        masks = field(record, "masks", list, self.path, where)
        if len(masks) > MAX_OBJECTS:
            raise bad(self.path, f"{where} has {len(masks):,} 'masks'; the limit is {MAX_OBJECTS:,}")
        return tuple(
            self._read_segmentation(mask, size, where, f"mask {number} in 'masks'")
            for number, mask in enumerate(masks, 1)
        )

    def _read_segmentation(self, mask: Any, size: tuple[int, int], where: str, what: str) -> Segmentation:
        if type(mask) is str:
            mask = self.path.parent / plain_path(mask, self.path, where, "mask")
        with located(self.path, f"{where} has an unusable {what}"):
            return validate_segmentation(mask, size)
