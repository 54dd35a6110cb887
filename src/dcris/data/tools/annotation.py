"""What every format of an annotation tool is read into, and the field checks that the formats
share."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcris.data.masks import decode_mask, encode_mask
from dcris.data.table import ReferenceTable, bad, check_text, field, shown, text_field
from dcris.errors import DcrisError
from dcris.types import PixelPolygons, Reference, Segmentation, SoftMask

Size = tuple[int, int]
"""Height and width in pixels."""

Mask = Callable[[Size], Any]
"""Returns a mask in COCO's form for an image of this size, and raises DcrisError if it cannot.

It is called late: most formats are read before the size of the image is known, and decoded masks of
all annotations would not fit in memory."""

Texts = tuple[str, ...]

PHRASE_FIELDS = ("expressions", "expression", "phrases", "phrase", "captions", "caption", "description")
"""Names of attributes that hold an annotation's own phrases; the first filled one counts."""

_MAX_NON_OBJECTS = 10_000
"""Entries of a list that may be something else than objects before the file is refused as another
kind of file: 30 MB may contain 15 million numbers."""

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Splits by the words that tools use for them in the names of files and folders."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated object, or several with common phrases."""

    path: Path
    """Its file, for errors and for the folder that `image` is relative to."""
    where: str
    """Its place in the file, for errors."""
    source: int | str
    """Identifier in the tool's export, by which phrases can be given to it."""
    image: str
    """Name of the image as the file has it: a path or the last part of one, without the ending in
    formats that leave it out."""
    size: Size | None
    """Size of the image that was annotated; None if the format does not record it."""
    masks: tuple[Mask, ...] | None
    """One for each object; empty if the phrases describe nothing in the image; None if the tool has
    only a box, a point or a line."""
    category: str | None = None
    phrases: Texts = ()
    """Its own phrases, in contrast to those of its category."""
    split: str | None = None
    """None if the format does not state it; then the folders of a file may."""
    crowd: bool = False
    group: int | str | None = None
    """Annotations of an image with the same group are one reference with several objects."""


Found = Iterator[Annotation | DcrisError | str]
"""The annotations of a file in its order, and the error for each that cannot be read.

Where the format has a list of categories, their names come, too: a phrase file may name one that no
annotation has."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of annotation tools. Either `is_content` or `is_place` recognises it."""

    title: str
    """Its name for people, with the tools that write it."""
    read: Callable[[Path, Any], Found]
    """Reads a file or folder; the second argument is the content of a JSON file, else None."""
    is_content: Callable[[Any], bool] = lambda content: False
    """Whether the content of a JSON file has this format."""
    is_place: Callable[[Path], bool] = lambda path: False
    """Whether a folder, or a file by its name, has this format."""
    write: "Callable[[Exported, Path], None] | None" = None
    """Writes references into a new folder, where their images already are; None if this format is
    only read."""
    image_folder: str = "images"
    """Folder of the images in what is written; `{split}` is the split of an image."""
    holds_absent: bool = False
    """Whether it can hold phrases that describe nothing in the image."""
    mixes_absent: bool = False
    """Whether it can hold them in a reference to objects, as R-RefCOCO does. Where not, they are
    written as a reference of their own."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The references that a format writes."""

    table: ReferenceTable
    images: Mapping[Path, str]
    """Path of each image in the new folder, with slashes, by its path in the table. The last parts
    are unique even without their endings."""
    split_names: Mapping[str, str]
    """Name of each split as that of a file or folder. They are unique, ignoring case."""
    image_url: str
    """Prefix of the paths for tools that show images by URL."""

    def by_image(self) -> dict[Path, list[Reference]]:
        """Return the references of each image, in the order of the table."""
        found: dict[Path, list[Reference]] = {}
        for reference in self.table.references:
            found.setdefault(reference.image_path, []).append(reference)
        return found

    def categories(self) -> dict[str, int]:
        """Number the categories from 1, in the order of the table."""
        annotated = (each for each in self.table.references if each.segmentations or each.expressions)
        names = dict.fromkeys(each.category or "object" for each in annotated)
        return {name: number for number, name in enumerate(names, 1)}


def apart(reference: Reference) -> Iterator[Reference]:
    """Yield the objects of a reference with the expressions that describe them, and without objects
    the others, which describe nothing in the image."""
    present = tuple(each for each in reference.expressions if reference.targets(each))
    absent = tuple(each for each in reference.expressions if not reference.targets(each))
    if present or not absent:
        yield replace(reference, expressions=present)
    if absent:
        yield replace(reference, ann_ids=(), segmentations=(), category="", expressions=absent)


def phrases_of(reference: Reference) -> list[str]:
    """Return the texts of a reference's expressions."""
    return [each.text for each in reference.expressions]


def plain_segmentation(segmentation: Segmentation, size: Size) -> Any:
    """Return a mask as COCO's polygons or compressed run lengths, ready for JSON."""
    if isinstance(segmentation, list):
        return segmentation
    if isinstance(segmentation, Path | SoftMask | PixelPolygons):
        return encode_mask(decode_mask(segmentation, size))
    counts = segmentation["counts"]
    return {"size": list(size), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def each(read: Callable[..., Annotation | None], records: Iterable[Any], *context: Any) -> Found:
    """Yield `read(number, record, *context)` for each record, from 1, or the error that it raises.

    Nothing is yielded for a record that is not an annotation (None).
    """
    for number, record in enumerate(records, 1):
        try:
            found = read(number, record, *context)
        except DcrisError as error:
            yield error
        else:
            if found is not None:
                yield found


def objects(content: Any, key: str, path: Path, where: str = "the file") -> list[Any]:
    """Return the list `content[key]`, whose entries should be JSON objects.

    Raises DcrisError if it is not a list, or if so many entries are something else that the file is
    of another kind.
    """
    records = field(content, key, list, path, where)
    others = sum(type(record) is not dict for record in records)
    if others > _MAX_NON_OBJECTS:
        raise bad(path, f"{others:,} entries of '{key}' are not objects with named fields")
    return records


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON object of which nothing is required; another value is an empty one."""
    return value if type(value) is dict else {}


def filled(value: Any) -> str | None:
    """Return a text that is not blank; None for another value."""
    return value if type(value) is str and value.strip() else None


def whole(value: Any) -> int | None:
    """Return the integer that 7, 7.0 or "7" stands for, of at most 18 digits, or None."""
    if type(value) is float and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if type(value) is str and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*", value)):
        return int(match[1])
    return value if type(value) is int and abs(value) < 10**18 else None


def integer(record: Any, key: str, path: Path, where: str) -> int:
    """Return the integer `record[key]`, as `whole` reads it. Raises DcrisError if it is none."""
    number = whole(record.get(key)) if type(record) is dict else None
    return field(record, key, int, path, where) if number is None else number  # raises the error


def number(value: Any, path: Path, where: str, key: str) -> float:
    """Return a finite number, or one written as text. Raises DcrisError, naming `key`, for
    others."""
    try:
        found = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise bad(path, f"{where} has a '{key}' that is not a number: {shown(value)}")
    return found


def recorded_size(record: Any, height: str, width: str, path: Path, where: str) -> Size | None:
    """Return the size of the image from two fields, or None if both are missing."""
    if mapping(record).get(height) is None and mapping(record).get(width) is None:
        return None
    return integer(record, height, path, where), integer(record, width, path, where)


def texts(value: Any, path: Path, where: str, key: str) -> Texts:
    """Return the distinct texts of a field that is text or a list of texts.

    Raises DcrisError for anything else, and for blank text.
    """
    values = value if type(value) is list else [value]
    if not values or not all(type(text) is str for text in values):
        raise bad(path, f"{where} has a '{key}' that is neither text nor a list of texts: {shown(value)}")
    return tuple(dict.fromkeys(check_text(text, path, where, key) for text in values))


def own_phrases(records: Iterable[Any], path: Path, where: str) -> Texts:
    """Return the phrases in the first of PHRASE_FIELDS that one of the records has, or none."""
    for record in records:
        fields = {key.lower(): (key, value) for key, value in mapping(record).items() if value}
        for name in PHRASE_FIELDS:
            if name in fields:
                key, value = fields[name]
                return texts(value, path, where, key)
    return ()


def category_name(value: Any, path: Path, where: str, key: str) -> str | None:
    """Return the name of a category; None for an empty one."""
    if value is None or value == "":
        return None
    return text_field({key: value}, key, path, where)


def split_of(*names: str) -> str | None:
    """Return the split that the first of these names has as a word, or None.

    Names are those of folders of the export, and of files with a whole subset, such as
    instances_val2017: that of an image may have such a word by chance (COCO_train2014_...).
    """
    words = (word for name in names for word in re.split(r"[^a-z]+", name.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def polygon_masks(value: Any) -> tuple[Mask] | None:
    """Return the mask of a segmentation as tools write COCO's, alone; None if it is empty.

    Polygons may be flat or lists of points, and those with fewer than three corners are ignored
    beside others: editing leaves them. The numbers are checked when the mask is decoded.
    """
    if not value or (type(value) is list and not any(_corners(part) for part in _polygons(value))):
        return None
    return (lambda size: _segmentation(value),)


def _segmentation(value: Any) -> Any:
    """Convert a segmentation to COCO's polygons or run lengths. Raises DcrisError for other
    forms."""
    if type(value) is dict and "counts" in value:
        counts, size = value["counts"], value.get("size")
        return {
            "size": [whole(side) for side in size] if type(size) is list else size,
            "counts": [whole(count) for count in counts] if type(counts) is list else counts,
        }
    if type(value) is not list:
        raise DcrisError(
            f"the segmentation is neither polygons nor run lengths with 'size' and 'counts': {shown(value)}"
        )
    polygons = [_corners(part) for part in _polygons(value)]
    large = [polygon for polygon in polygons if len(polygon) >= 6]
    if not large:
        raise DcrisError(f"no polygon has three corners: {shown(value)}")
    return large


def _polygons(value: list[Any]) -> list[Any]:
    """Return the polygons of a list that may be a single one."""
    single = not any(type(part) is list and (len(part) != 2 or type(part[0]) in (list, dict)) for part in value)
    return [value] if single else value


def _corners(polygon: Any) -> list[Any]:
    """Convert numbers, points [x, y] or points {"x": x, "y": y} to x, y, x, y, ..."""
    flat: list[Any] = []
    for item in polygon if type(polygon) is list else [polygon]:
        for value in [item.get("x"), item.get("y")] if type(item) is dict else item if type(item) is list else [item]:
            try:
                flat.append(float(value) if type(value) is str else value)
            except ValueError:
                flat.append(value)  # refused, and shown, when the mask is decoded
    return flat


def split_folder(split: str) -> str:
    """Return the name of a split as that of a file or folder."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in split)[:80] or "_"
