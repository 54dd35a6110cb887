"""Convert COCO annotations, as most annotation tools export them, to your own data (JSON Lines)."""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dcris.data.images import image_size
from dcris.data.masks import mask_area
from dcris.data.readers.jsonl import is_jsonl
from dcris.data.table import bad, check_text, plain_path
from dcris.data.table import field as read_field
from dcris.data.tokenizer import clean_text
from dcris.errors import DcrisError
from dcris.utils.files import read_json, read_text, write_file

Texts = tuple[str, ...]

_MAX_PHRASES = 50_000_000
"""Limit on the bytes of a CSV file of phrases."""

_MAX_ROWS = 1_000_000
"""Limit on its rows."""

_MAX_NON_OBJECTS = 10_000
"""Entries of 'annotations' that may be something else than objects before the file is refused as
another kind of file: 30 MB may contain 15 million numbers."""

_MAX_SHOWN = 10

_PHRASE_FIELDS = ("expressions", "phrase", "caption")
"""Fields with an annotation's own phrases, in it or in its "attributes", where CVAT writes typed
text."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """Content of a phrase file."""

    by_annotation: Mapping[int, Texts]
    """By annotation id."""
    by_category: Mapping[str, Texts]
    """By category name."""


@dataclass(slots=True)
class ImportResult:
    """Counts of what was written, and of the annotations that were left out, by reason."""

    splits: dict[str, int] = field(default_factory=dict)
    """References of each split."""
    images: int = 0
    expressions: int = 0
    crowds: int = 0
    without_phrase: int = 0
    ambiguous: int = 0
    """All their phrases fit another object of the image, too."""
    without_mask: int = 0
    """They have only a box."""
    empty: int = 0
    """Their mask covers no pixel."""
    unusable: int = 0
    """They, or what they refer to, are malformed."""
    problems: list[str] = field(default_factory=list)
    """The first ten different problems of the last three kinds, in words."""

    def __str__(self) -> str:
        written = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        return f"{written} references with {self.expressions:,} expressions on {self.images:,} images{self.left_out}"

    @property
    def left_out(self) -> str:
        """The annotations left out, as the end of a sentence; empty if there are none."""
        reasons = (
            (self.ambiguous, "whose phrase fits several objects of an image (--ambiguous keep)"),
            (self.crowds, "crowds (--crowds keep)"),
            (self.without_phrase, "without a phrase"),
            (self.without_mask, "without a mask"),
            (self.empty, "whose mask covers no pixel"),
            (self.unusable, "that cannot be used"),
        )
        found = [f"{count:,} {reason}" for count, reason in reasons if count]
        return f"; left out: {', '.join(found)}" if found else ""

    def add_problem(self, problem: str) -> None:
        """Keep a problem if it is among the first ten different ones.

        One image may affect many annotations.
        """
        if len(self.problems) < _MAX_SHOWN and problem not in self.problems:
            self.problems.append(problem)


def import_coco(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    phrases: Path | None = None,
    split: str | None = None,
    val: float = 0.1,
    seed: int = 0,
    keep_ambiguous: bool = False,
    keep_crowds: bool = False,
    strict: bool = False,
) -> ImportResult:
    """Convert each COCO annotation with a mask and a phrase to a reference in a JSON Lines file.

    The phrases of an annotation are, in this order of precedence: those that `phrases` gives for
    its id; its own (an "expressions", "phrase" or "caption" field, in it or in its "attributes");
    those of its category, from `phrases` or, without such a file, the category's name. A category's
    phrase is left out if another object of the image has it too, because it is ambiguous.

    Tools write COCO in different ways, so integers may be text or end in .0, polygons may be lists
    of points, and polygons of fewer than three corners are ignored beside others. What still cannot
    be used is counted and left out.

    Args:
        annotations: COCO file with polygons, run lengths or compressed run lengths.
        images: folder that the file names are relative to, beside or below `out`.
        out: file to write; must not exist.
        phrases: a .json or .csv file; see read_phrases.
        split: name of the split for all references; default: images are divided into train and val.
        val: share of the images for val. The choice depends only on `seed` and the file names.
        seed: seed of the choice.
        keep_ambiguous: keep category phrases that fit several objects.
        keep_crowds: keep annotations with `iscrowd`. They always count for ambiguity.
        strict: raise DcrisError for the first annotation without a mask or that cannot be used.

    Returns:
        Counts of what was written and left out.

    Raises:
        DcrisError: a file cannot be read, the phrases name an unknown annotation or category, or
            nothing is left. Nothing is written then.
    """
    if not is_jsonl(out):
        raise DcrisError(f"--out must end in .jsonl; change it to {out.with_suffix('.jsonl')}")
    if out.exists():
        raise DcrisError(f"{out} exists already; delete it or choose another --out")
    if split is not None and not split.strip():
        raise DcrisError("--split is blank; give a name, such as --split train")
    source = _CocoFile.read(annotations, images, out, phrases)
    result = ImportResult()
    lines = list(source.lines(result, keep_ambiguous, keep_crowds, strict))
    if not lines:
        first = f"; the first problem: {result.problems[0]}" if result.problems else ""
        raise DcrisError(f"no annotation in {annotations} has both a mask and a phrase{result.left_out}{first}")
    names = {line["image"] for line in lines}
    val_names = _choose(names, val, seed) if split is None else set()
    for line in lines:
        line["split"] = split or ("val" if line["image"] in val_names else "train")
    result.splits = dict(sorted(Counter(line["split"] for line in lines).items()))
    result.images = len(names)
    result.expressions = sum(len(line["expressions"]) for line in lines)

    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    write_file(out, fill)
    return result


def read_phrases(path: Path, annotations: set[int], categories: set[str]) -> Phrases:
    """Read a phrase file: phrases by annotation id or category name.

    JSON: {"71": "left cup", "cup": ["a cup", "the mug"]}. CSV: a header `annotation,phrase` or
    `category,phrase`, then one phrase per row; rows without a phrase are ignored.

    Args:
        path: the file.
        annotations: ids of the annotations.
        categories: names of the categories.

    Raises:
        DcrisError: the file is malformed, or a key is neither an id nor a name, or could be both.
    """
    by_annotation: dict[int, dict[str, None]] = {}
    by_category: dict[str, dict[str, None]] = {}
    by: str | None
    pairs: Iterable[tuple[str, Texts, str]]
    by, pairs = _read_csv(path) if path.suffix.lower() == ".csv" else (None, _read_mapping(path))
    for key, texts, where in pairs:
        number = _whole(key)
        is_annotation = number in annotations and by != "category"
        is_category = key in categories and by != "annotation"
        if is_annotation and is_category:
            raise bad(
                path,
                f"{where} is both the id of an annotation and the name of a category; use CSV, whose header tells them apart",
            )
        if number is not None and is_annotation:
            by_annotation.setdefault(number, {}).update(dict.fromkeys(texts))
        elif is_category:
            by_category.setdefault(key, {}).update(dict.fromkeys(texts))
        else:
            problem = (
                "neither the id of an annotation nor the name of a category" if by is None else "not in the COCO file"
            )
            raise bad(path, f"{where} is {problem}")
    return Phrases(
        {number: tuple(texts) for number, texts in by_annotation.items()},
        {name: tuple(texts) for name, texts in by_category.items()},
    )


def _read_mapping(path: Path) -> Iterator[tuple[str, Texts, str]]:
    content = read_json(path, "the phrase file")
    if type(content) is not dict:
        raise bad(path, "it is not an object with phrases by annotation id or category name")
    for key, value in content.items():
        yield key, _texts(value, path, f"the entry {key!r}", "phrase"), f"the key {key!r}"


def _read_csv(path: Path) -> tuple[str, Iterable[tuple[str, Texts, str]]]:
    try:
        text = read_text(path, _MAX_PHRASES)
    except FileNotFoundError as error:
        raise DcrisError(f"the phrase file is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read the phrase file {path}: {error.strerror or error}") from error
    lines = io.StringIO(text, newline="")
    header = lines.readline()
    if declared := re.match("sep=(.)", header, re.IGNORECASE):  # Excel's declaration of the delimiter
        header = lines.readline()
    # Excel's delimiter depends on the language. The header alone decides: csv.Sniffer would also
    # guess from phrases, which contain commas.
    delimiter = declared[1] if declared else next((mark for mark in ",;\t" if mark in header), ",")
    columns = [name.strip(' "').lower() for name in header.strip().split(delimiter)]
    by = next((name for name in ("annotation", "category") if name in columns), None)
    if by is None or "phrase" not in columns:
        raise bad(path, "its header is neither `annotation,phrase` nor `category,phrase`")
    return by, _read_rows(path, lines, delimiter, columns, by)


def _read_rows(
    path: Path, lines: io.StringIO, delimiter: str, columns: list[str], by: str
) -> Iterator[tuple[str, Texts, str]]:
    key_column, text_column = columns.index(by), columns.index("phrase")
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter), 2):
            if number > _MAX_ROWS:
                raise bad(path, f"it has more than {_MAX_ROWS:,} rows")
            key, text = (row[column].strip() if column < len(row) else "" for column in (key_column, text_column))
            if text:
                where = f"row {number}"
                yield key, (check_text(text, path, where, "phrase"),), f"{where}, with the {by} {key!r},"
    except csv.Error as error:
        raise bad(path, f"it is not CSV ({error})") from error


def _texts(value: Any, path: Path, where: str, key: str) -> Texts:
    """Return the distinct phrases of a field that is text or a list of texts."""
    values = value if type(value) is list else [value]
    if not values or not all(type(text) is str for text in values):
        raise bad(path, f"{where} has a '{key}' that is neither text nor a list of texts")
    return tuple(dict.fromkeys(check_text(text, path, where, key) for text in values))


@dataclass(frozen=True)
class _CocoFile:
    """A COCO file, its images, and their place relative to the file to be written."""

    path: Path
    images_folder: Path
    prefix: str
    """Path of the images folder relative to the written file, with a slash at the end, or empty."""
    images: "_Index"
    categories: "_Index"
    annotations: list[Any]
    annotation_index: "_Index"
    phrases: Phrases | None
    sizes: dict[int, tuple[int, int] | str] = field(default_factory=dict)
    """Height and width of each checked image, or its problem in words; by image id."""
    names: dict[int, str] = field(default_factory=dict)
    """Checked file names by image id: the check is the slowest step."""

    @classmethod
    def read(cls, path: Path, folder: Path, out: Path, phrases: Path | None) -> "_CocoFile":
        # abspath, not resolve(): links to images that are stored elsewhere are allowed.
        home, place = (Path(os.path.abspath(each)) for each in (out.parent, folder))  # noqa: PTH100
        if not place.is_dir():
            raise DcrisError(
                f"there is no folder {folder}; --images takes the folder that the file names are relative to"
            )
        if not place.is_relative_to(home):
            raise DcrisError(
                f"the images in {folder} are not below {home}, the folder of {out.name}; choose an --out beside or above them, "
                "or create a link to them there"
            )
        prefix = place.relative_to(home).as_posix()
        content = read_json(path, "the annotation file")
        images, annotations = (read_field(content, key, list, path, "the file") for key in ("images", "annotations"))
        others = sum(type(record) is not dict for record in annotations)
        if others > _MAX_NON_OBJECTS:
            raise bad(path, f"{others:,} entries of 'annotations' are not objects with named fields")
        categories = content.get("categories") or []
        if type(categories) is not list:
            raise bad(path, "the file has 'categories' that is not a list")
        category_index, annotation_index = (
            _Index(kind, key, records, path)
            for kind, key, records in (
                ("category", "categories", categories),
                ("annotation", "annotations", annotations),
            )
        )
        known = (
            None if phrases is None else read_phrases(phrases, set(annotation_index.records), category_index.names())
        )
        prefix = "" if prefix == "." else f"{prefix}/"
        image_index = _Index("image", "images", images, path)
        return cls(path, folder, prefix, image_index, category_index, annotations, annotation_index, known)

    def lines(
        self, result: ImportResult, keep_ambiguous: bool, keep_crowds: bool, strict: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield the lines of the file, without their splits.

        What is left out is counted in `result`.
        """
        every = (_Annotation(self, place, record) for place, record in enumerate(self.annotations, 1))
        annotations = [each for each in every if not self.annotation_index.is_copy(each.number, each.record)]
        objects_of = Counter(phrase for each in annotations for phrase in each.phrases_on_image())
        for each in annotations:
            try:
                if each.is_crowd() and not keep_crowds:
                    result.crowds += 1
                    continue
                segmentation = each.segmentation()
                if segmentation is None:
                    result.without_mask += 1
                    raise _LeftOutError(f"{self.path}: {each.where} has no mask")
                texts = each.own_phrases()
                if not texts:
                    texts = each.category_phrases()
                    if not texts:
                        result.without_phrase += 1
                        continue
                    if not keep_ambiguous:
                        texts = tuple(text for text in texts if objects_of[each.file_name, _comparable(text)] == 1)
                        if not texts:
                            result.ambiguous += 1
                            continue
                size = self.size(each.image_id)
                try:
                    area = mask_area(segmentation, size)
                except DcrisError as error:
                    raise bad(self.path, f"{each.where} cannot be decoded ({error})") from error
                if area == 0:
                    result.empty += 1
                    raise _LeftOutError(f"{self.path}: {each.where} has a mask without a pixel")
                category = each.category
            except DcrisError as error:
                if strict:
                    raise
                result.unusable += not isinstance(error, _LeftOutError)
                result.add_problem(str(error))
                continue
            line = {
                "image": self.prefix + each.file_name,
                "mask": segmentation,
                "expressions": list(dict.fromkeys(texts)),
            }
            if category is not None:
                line["category"] = category
            if each.number is not None:
                line["annotation"] = each.number  # not read again; for people who look up the source
            yield line

    def file_name(self, image_id: int) -> str:
        """Return the checked file name of an image, relative to the images folder."""
        if image_id not in self.names:
            record, where = self.images[image_id], f"image {image_id}"
            self.names[image_id] = plain_path(read_field(record, "file_name", str, self.path, where), self.path, where)
        return self.names[image_id]

    def size(self, image_id: int) -> tuple[int, int]:
        """Return height and width of an image.

        Raises DcrisError if file and annotations disagree.
        """
        if image_id not in self.sizes:
            try:
                self.sizes[image_id] = self._size(image_id)
            except DcrisError as error:
                self.sizes[image_id] = str(error)
        found = self.sizes[image_id]
        if isinstance(found, str):
            raise DcrisError(found)  # a new one: re-raising one exception would grow its traceback
        return found

    def _size(self, image_id: int) -> tuple[int, int]:
        record, where = self.images[image_id], f"image {image_id}"
        height, width = (_number(record, key, self.path, where) for key in ("height", "width"))
        image = self.images_folder / self.file_name(image_id)
        found = image_size(image)
        if found != (height, width):
            raise DcrisError(
                f"{image} is {found[0]} x {found[1]} pixels (height x width, after its EXIF orientation), but {self.path} "
                f"says {height} x {width}, so its masks do not fit; use the images that were annotated"
            )
        return found


class _LeftOutError(DcrisError):
    """An annotation that is counted for another reason than `unusable`."""


class _Index:
    """COCO records of one kind, by id."""

    def __init__(self, kind: str, key: str, records: list[Any], path: Path) -> None:
        self.kind, self.key, self.path = kind, key, path
        self.records: dict[int, Any] = {}
        self.conflicting: set[int] = set()
        for number, record in zip(_identifiers(records), records, strict=True):
            if number is not None and self.records.setdefault(number, record) != record:
                self.conflicting.add(number)

    def __getitem__(self, number: int) -> Any:
        if number in self.conflicting:
            raise bad(self.path, f"two different entries of '{self.key}' have the id {number}")
        return self.records[number]

    def is_copy(self, number: int | None, record: Any) -> bool:
        """Return whether an equal record with the same id came before."""
        first = record if number is None else self.records[number]
        return first is not record and first == record

    def id_of(self, annotation: Any, where: str) -> int:
        """Return the id of this kind in an annotation.

        Raises DcrisError if there is no such record.
        """
        number = _number(annotation, f"{self.kind}_id", self.path, where)
        if number not in self.records:
            raise bad(self.path, f"{where} names {self.kind} {number}, which the file does not have")
        return number

    def names(self) -> set[str]:
        """Return the names of all records that have one."""
        names = (record.get("name") for record in self.records.values() if type(record) is dict)
        return {name for name in names if type(name) is str}


class _Annotation:
    """One entry of 'annotations'. Its methods raise DcrisError, naming it, if it cannot be used."""

    __slots__ = ("file", "number", "place", "record")

    def __init__(self, file: _CocoFile, place: int, record: Any) -> None:
        self.file, self.place, self.record = file, place, record
        (self.number,) = _identifiers([record])

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def where(self) -> str:
        return f"entry {self.place} of 'annotations'" if self.number is None else f"annotation {self.number}"

    def _get(self, key: str) -> Any:
        if type(self.record) is not dict:
            raise bad(self.path, f"{self.where} is not an object with named fields")
        return self.record.get(key)

    @property
    def image_id(self) -> int:
        return self.file.images.id_of(self.record, self.where)

    @property
    def file_name(self) -> str:
        return self.file.file_name(self.image_id)

    @property
    def category(self) -> str | None:
        """Name of the category; None if the annotation or the file has none."""
        if self._get("category_id") is None or not self.file.categories.records:
            return None
        number = self.file.categories.id_of(self.record, self.where)
        where = f"category {number}"
        name = read_field(self.file.categories[number], "name", str, self.path, where)
        return check_text(name, self.path, where, "name")

    def is_crowd(self) -> bool:
        """Return whether `iscrowd` is set."""
        value = self._get("iscrowd")
        known = {"": False, "0": False, "false": False, "1": True, "true": True}
        plain = "" if value is None else str(value).strip().lower().removesuffix(".0")
        if plain not in known:
            raise bad(self.path, f"{self.where} has an 'iscrowd' that is neither 0 nor 1")
        return known[plain]

    def segmentation(self) -> Any:
        """Return the segmentation in COCO's own form; None if there is only a box."""
        try:
            return _coco_segmentation(self._get("segmentation"))
        except DcrisError as error:
            raise bad(self.path, f"{self.where} cannot be decoded ({error})") from error

    def own_phrases(self) -> Texts:
        """Return the phrases for this annotation alone, from the phrase file or its own fields."""
        phrases = self.file.phrases
        if phrases is not None and self.number is not None and self.number in phrases.by_annotation:
            _ = self.file.annotation_index[self.number]  # raises where two annotations have this id
            return phrases.by_annotation[self.number]
        attributes = self._get("attributes")
        for record in (self.record, attributes if type(attributes) is dict else {}):
            for key in _PHRASE_FIELDS:
                if value := record.get(key):
                    return _texts(value, self.path, self.where, key)
        return ()

    def category_phrases(self) -> Texts:
        """Return the phrases of the category."""
        name, phrases = self.category, self.file.phrases
        if name is None:
            return ()
        return (name,) if phrases is None else phrases.by_category.get(name, ())

    def phrases_on_image(self) -> set[tuple[str, str]]:
        """Return (image, phrase) for each phrase of the category, to find ambiguous phrases."""
        if type(self.record) is not dict or "image_id" not in self.record:
            return set()
        try:
            name = self.file_name
            return {(name, _comparable(text)) for text in self.category_phrases()}
        except DcrisError:  # reported when the annotation itself is read
            return set()


def _whole(value: Any) -> int | None:
    """Return the integer that 7, 7.0 or "7" stands for, of at most 18 digits, or None."""
    if type(value) is float and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if type(value) is str and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*", value)):
        return int(match[1])
    return value if type(value) is int and abs(value) < 10**18 else None


def _number(record: Any, key: str, path: Path, where: str) -> int:
    number = _whole(record.get(key)) if type(record) is dict else None
    return read_field(record, key, int, path, where) if number is None else number  # raises the error


def _identifiers(records: Iterable[Any]) -> Iterator[int | None]:
    return (_whole(record.get("id")) if type(record) is dict else None for record in records)


def _coco_segmentation(value: Any) -> Any:
    """Convert a segmentation as tools write it to COCO's polygons or run lengths.

    Returns None if there is none.

    Raises DcrisError if the form is unknown. The content is checked when it is decoded.
    """
    if type(value) is dict and "counts" in value:
        counts, size = value["counts"], value.get("size")
        return {
            "size": [_whole(side) for side in size] if type(size) is list else size,
            "counts": [_whole(count) for count in counts] if type(counts) is list else counts,
        }
    if value is None or value in ("", [], {}):
        return None
    if type(value) is not list:
        raise DcrisError("the segmentation is neither polygons nor run lengths with 'size' and 'counts'")
    single = not any(type(each) is list and (len(each) != 2 or type(each[0]) in (list, dict)) for each in value)
    polygons = [_corners(each) for each in ([value] if single else value)]
    if not any(polygons):
        return None
    large = [polygon for polygon in polygons if len(polygon) >= 6]  # editing leaves remnants of one or two corners
    if not large:
        raise DcrisError("no polygon has three corners")
    return large


def _corners(polygon: Any) -> list[float]:
    """Convert numbers, points [x, y] or points {"x": x, "y": y} to x, y, x, y, ..."""
    flat: list[float] = []
    for item in polygon if type(polygon) is list else [polygon]:
        point = [item.get("x"), item.get("y")] if type(item) is dict else item if type(item) is list else [item]
        for value in point:
            try:
                flat.append(
                    value if isinstance(value, int | float) else float(value) if type(value) is str else math.nan
                )
            except ValueError:
                flat.append(math.nan)
    return flat


_comparable = cache(clean_text)
"""Phrases that are equal after cleaning are the same to a model. Cached, since ftfy is slow and
phrases repeat."""


def _choose(names: set[str], share: float, seed: int) -> set[str]:
    """Choose images for val: the given share, at least one if the share is not 0, and never all."""
    count = min(max(round(share * len(names)), share > 0), len(names) - 1)

    def order(name: str) -> str:
        # By name, not by place: if images are added later, nearly all images of val stay there.
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    return set(sorted(names, key=order)[:count])
