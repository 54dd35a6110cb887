"""COCO's annotations, which most annotation tools write, with a phrase for each object -> one's own JSON Lines."""

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
from pathlib import Path
from typing import Any

from dcris.data.images import image_size
from dcris.data.masks import mask_area
from dcris.data.readers.jsonl import is_jsonl
from dcris.data.table import bad, check_text, plain_path
from dcris.data.table import field as entry
from dcris.errors import DcrisError
from dcris.utils.files import read_json, read_text, write_file

Texts = tuple[str, ...]

_MAX_PHRASES = 50_000_000
"""Bytes of a CSV file of phrases that are accepted."""

_MOST_ROWS = 1_000_000
"""Rows of it that are accepted."""

_MOST_STRANGE = 10_000
"""Entries that are not objects of JSON before the file counts as another kind: 30 MB may hold 15 million numbers."""

_SHOWN = 10

_OWN_FIELDS = ("expressions", "phrase", "caption")
"""Of an annotation, or of its "attributes", where CVAT puts what its annotators typed."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """What a file of phrases says, by annotation and by category."""

    by_annotation: Mapping[int, Texts]
    by_category: Mapping[str, Texts]


@dataclass(slots=True)
class Imported:
    """What was written, and what was left out for which reason."""

    splits: dict[str, int] = field(default_factory=dict)
    """References of each split."""
    images: int = 0
    expressions: int = 0
    crowds: int = 0
    phraseless: int = 0
    ambiguous: int = 0
    """Those whose only phrases fit another object of the photograph, too."""
    maskless: int = 0
    """Annotations with a box alone."""
    empty: int = 0
    """Those whose mask covers no pixel."""
    unusable: int = 0
    """Those with something wrong in them, or in what they refer to."""
    problems: list[str] = field(default_factory=list)
    """The first ten different ones of the last three kinds, in words."""

    def __str__(self) -> str:
        made = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        return f"{made} references with {self.expressions:,} expressions on {self.images:,} images{self.left_out}"

    @property
    def left_out(self) -> str:
        """The end of a sentence."""
        reasons = (
            (self.ambiguous, "whose phrase fits several objects of a photograph (--ambiguous keep)"),
            (self.crowds, "crowds (--crowds keep)"),
            (self.phraseless, "without a phrase"),
            (self.maskless, "without a mask"),
            (self.empty, "whose mask covers no pixel"),
            (self.unusable, "that cannot be used"),
        )
        found = [f"{count:,} {reason}" for count, reason in reasons if count]
        return f"; left out: {', '.join(found)}" if found else ""

    def add_problem(self, problem: str) -> None:
        """Keep a problem where it is among the first ten different ones: one photograph may spoil many annotations."""
        if len(self.problems) < _SHOWN and problem not in self.problems:
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
) -> Imported:
    """Write the JSON Lines file `out` with one reference for each annotation of a COCO file that has a mask and a phrase.

    An annotation's phrases are those that `phrases` gives for its id, else its own (an "expressions", "phrase" or "caption", in
    it or in its "attributes"), else its category's: from `phrases`, or, where there is no such file, its name. A category's
    phrase is left out where another object of the same photograph has it too: nobody could tell which one is meant.

    Different tools write COCO in different ways, so whole numbers may be text or end in .0, polygons may be lists of points,
    and polygons of fewer than three corners are left out beside others. What still cannot be used is counted and left out.

    Args:
        annotations: the COCO file: polygons, run lengths or compressed run lengths.
        images: the folder that its file names begin at. It has to be beside or below `out`.
        out: what to write; it must not exist.
        phrases: a .json or .csv file; see read_phrases.
        split: puts everything into one split; otherwise photographs are divided into train and val.
        val: the share of the photographs that go to val; the same ones for the same `seed` and file names.
        seed: chooses other ones.
        keep_ambiguous: keep categories' phrases that fit several objects.
        keep_crowds: keep annotations with `iscrowd`, too. For ambiguity they always count.
        strict: raise DcrisError for the first annotation that has no mask or cannot be used.

    Raises DcrisError where a file cannot be read, where its phrases name what it does not have, and where nothing is left;
    nothing is then written.
    """
    if not is_jsonl(out):
        raise DcrisError(f"a data set of one's own is known by its ending; call it {out.with_suffix('.jsonl')}")
    if out.exists():
        raise DcrisError(f"{out} exists already; delete it or choose another --out")
    if split is not None and not split.strip():
        raise DcrisError("a split needs a name; give --split train, for one")
    source = _Source.read(annotations, images, out, phrases)
    done = Imported()
    objects = list(source.objects(done, keep_ambiguous, keep_crowds, strict))
    if not objects:
        first = f"; the first problem: {done.problems[0]}" if done.problems else ""
        raise DcrisError(f"nothing in {annotations} has both a mask and a phrase{done.left_out}{first}")
    names = {item["image"] for item in objects}
    chosen = _choose(names, val, seed) if split is None else set()
    for item in objects:
        item["split"] = split or ("val" if item["image"] in chosen else "train")
    done.splits = dict(sorted(Counter(item["split"] for item in objects).items()))
    done.images = len(names)
    done.expressions = sum(len(item["expressions"]) for item in objects)

    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in objects)

    write_file(out, fill)
    return done


def read_phrases(path: Path, annotations: set[int], categories: set[str]) -> Phrases:
    """Read phrases for annotations, by their ids, and for categories, by their names.

    JSON: {"71": "left cup", "cup": ["a cup", "the mug"]}. CSV, with a heading: `annotation,phrase` or `category,phrase`, and a
    row for each phrase; rows without a phrase are passed over. Raises DcrisError where a key is neither or could be both.
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
                path, f"{where} may be an annotation's id or a category's name; use CSV, whose heading says which"
            )
        if number is not None and is_annotation:
            by_annotation.setdefault(number, {}).update(dict.fromkeys(texts))
        elif is_category:
            by_category.setdefault(key, {}).update(dict.fromkeys(texts))
        else:
            raise bad(path, f"{where} is the id of no annotation and the name of no category")
    return Phrases(
        {number: tuple(texts) for number, texts in by_annotation.items()},
        {name: tuple(texts) for name, texts in by_category.items()},
    )


def _read_mapping(path: Path) -> Iterator[tuple[str, Texts, str]]:
    content = read_json(path, "the file of phrases")
    if type(content) is not dict:
        raise bad(path, "it is not a table of phrases by annotation id or category name")
    for key, value in content.items():
        yield key, _texts(value, path, f"the entry {key!r}", "phrase"), f"the key {key!r}"


def _read_csv(path: Path) -> tuple[str, Iterable[tuple[str, Texts, str]]]:
    try:
        text = read_text(path, _MAX_PHRASES)
    except FileNotFoundError as error:
        raise DcrisError(f"the file of phrases is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read the file of phrases, {path}: {error.strerror or error}") from error
    lines = io.StringIO(text, newline="")
    heading = lines.readline()
    if chosen := re.match("sep=(.)", heading, re.IGNORECASE):  # as Excel writes and reads it
        heading = lines.readline()
    # Excel's delimiter depends on the language.
    mark = chosen[1] if chosen else next((mark for mark in ",;\t" if mark in heading), ",")
    columns = [name.strip(' "').lower() for name in heading.strip().split(mark)]
    by = next((name for name in ("annotation", "category") if name in columns), None)
    if by is None or "phrase" not in columns:
        raise bad(path, "its heading is neither `annotation,phrase` nor `category,phrase`")
    return by, _rows(path, lines, mark, columns, by)


def _rows(path: Path, lines: io.StringIO, mark: str, columns: list[str], by: str) -> Iterator[tuple[str, Texts, str]]:
    key_column, text_column = columns.index(by), columns.index("phrase")
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=mark), 2):
            if number > _MOST_ROWS:
                raise bad(path, f"it has more than {_MOST_ROWS:,} rows")
            key, text = (row[column].strip() if column < len(row) else "" for column in (key_column, text_column))
            if text:
                where = f"row {number}"
                yield key, (check_text(text, path, where, "phrase"),), f"{where}, with the {by} {key!r},"
    except csv.Error as error:
        raise bad(path, f"it is not CSV ({error})") from error


def _texts(value: Any, path: Path, where: str, key: str) -> Texts:
    """A phrase or a list of them, each once."""
    values = value if type(value) is list else [value]
    if not values or not all(type(text) is str for text in values):
        raise bad(path, f"{where} has a '{key}' that is neither text nor a list of texts")
    return tuple(dict.fromkeys(check_text(text, path, where, key) for text in values))


@dataclass(frozen=True)
class _Source:
    """A COCO file, its photographs, and where they lie from the file to be written."""

    path: Path
    images_folder: Path
    prefix: str
    images: "_Index"
    categories: "_Index"
    annotations: list[Any]
    indexed: "_Index"
    """The annotations."""
    phrases: Phrases | None
    sizes: dict[int, tuple[int, int] | str] = field(default_factory=dict)
    """Height and width of each photograph that was looked at, or what is wrong with it."""
    names: dict[int, str] = field(default_factory=dict)
    """File names by image id; checking one takes longer than all else."""

    @classmethod
    def read(cls, path: Path, folder: Path, out: Path, phrases: Path | None) -> "_Source":
        # abspath and not resolve(): a link to photographs that lie elsewhere is fine.
        home, place = (Path(os.path.abspath(each)) for each in (out.parent, folder))  # noqa: PTH100
        if not place.is_dir():
            raise DcrisError(f"there is no folder {folder}; --images takes the folder that the file names begin at")
        if not place.is_relative_to(home):
            raise DcrisError(
                f"the photographs in {folder} are not below {home}, where the paths in {out.name} begin; choose an --out "
                "beside or above them, or make a link to them there"
            )
        prefix = place.relative_to(home).as_posix()
        content = read_json(path, "the file of annotations")
        images, annotations = (entry(content, key, list, path, "the file") for key in ("images", "annotations"))
        strange = sum(type(record) is not dict for record in annotations)
        if strange > _MOST_STRANGE:
            raise bad(path, f"{strange:,} entries of 'annotations' are not tables of named fields")
        categories = content.get("categories") or []
        if type(categories) is not list:
            raise bad(path, "the file has 'categories' that are not a list")
        named, indexed = (
            _Index(kind, key, records, path)
            for kind, key, records in (
                ("category", "categories", categories),
                ("annotation", "annotations", annotations),
            )
        )
        known = None if phrases is None else read_phrases(phrases, set(indexed.records), named.names())
        prefix = "" if prefix == "." else f"{prefix}/"
        return cls(path, folder, prefix, _Index("image", "images", images, path), named, annotations, indexed, known)

    def objects(
        self, done: Imported, keep_ambiguous: bool, keep_crowds: bool, strict: bool
    ) -> Iterator[dict[str, Any]]:
        """The lines to be, without their splits. What is left out is counted in `done`."""
        every = (_Object(self, place, record) for place, record in enumerate(self.annotations, 1))
        objects = [each for each in every if not self.indexed.is_copy(each.number, each.record)]
        shown = Counter(phrase for each in objects for phrase in each.shown())
        for each in objects:
            try:
                if each.crowd() and not keep_crowds:
                    done.crowds += 1
                    continue
                segmentation = each.segmentation()
                if segmentation is None:
                    done.maskless += 1
                    raise _LeftOutError(f"{self.path}: {each.where} has no mask")
                texts = each.own_texts()
                if not texts:
                    texts = each.category_texts()
                    if not texts:
                        done.phraseless += 1
                        continue
                    if not keep_ambiguous:
                        texts = tuple(text for text in texts if shown[each.file_name, _plain(text)] == 1)
                        if not texts:
                            done.ambiguous += 1
                            continue
                size = self.size(each.image_id)
                try:
                    area = mask_area(segmentation, size)
                except DcrisError as error:
                    raise bad(self.path, f"{each.where} cannot be decoded ({error})") from error
                if area == 0:
                    done.empty += 1
                    raise _LeftOutError(f"{self.path}: {each.where} has a mask that covers no pixel")
                category = each.category
            except DcrisError as error:
                if strict:
                    raise
                done.unusable += not isinstance(error, _LeftOutError)
                done.add_problem(str(error))
                continue
            line = {
                "image": self.prefix + each.file_name,
                "mask": segmentation,
                "expressions": list(dict.fromkeys(texts)),
            }
            if category is not None:
                line["category"] = category
            if each.number is not None:
                line["annotation"] = each.number  # for people alone: which one this was
            yield line

    def file_name(self, image_id: int) -> str:
        """The name of a photograph from the folder of images."""
        if image_id not in self.names:
            record, where = self.images[image_id], f"image {image_id}"
            self.names[image_id] = plain_path(entry(record, "file_name", str, self.path, where), self.path, where)
        return self.names[image_id]

    def size(self, image_id: int) -> tuple[int, int]:
        """Height and width, which the photograph and the annotations must agree on."""
        if image_id not in self.sizes:
            try:
                self.sizes[image_id] = self._size(image_id)
            except DcrisError as error:
                self.sizes[image_id] = str(error)
        found = self.sizes[image_id]
        if isinstance(found, str):
            raise DcrisError(found)  # anew: raised again, an exception's traceback would grow each time
        return found

    def _size(self, image_id: int) -> tuple[int, int]:
        record, where = self.images[image_id], f"image {image_id}"
        height, width = (_number(record, key, self.path, where) for key in ("height", "width"))
        photograph = self.images_folder / self.file_name(image_id)
        found = image_size(photograph)
        if found != (height, width):
            raise DcrisError(
                f"{photograph} is {found[0]} x {found[1]} pixels (height x width, turned as its EXIF data say), but "
                f"{self.path} says {height} x {width}, so its masks do not fit; take the photographs that were annotated"
            )
        return found


class _LeftOutError(DcrisError):
    """An annotation that is counted under a reason of its own."""


class _Index:
    """COCO's records of one kind by their ids."""

    def __init__(self, kind: str, key: str, records: list[Any], path: Path) -> None:
        self.kind, self.key, self.path = kind, key, path
        self.records: dict[int, Any] = {}
        self.contradicted: set[int] = set()
        for number, record in zip(_identifiers(records), records, strict=True):
            if number is not None and self.records.setdefault(number, record) != record:
                self.contradicted.add(number)

    def __getitem__(self, number: int) -> Any:
        if number in self.contradicted:
            raise bad(self.path, f"two entries of '{self.key}' have the id {number} and differ")
        return self.records[number]

    def is_copy(self, number: int | None, record: Any) -> bool:
        """Whether an equal record with the same id came before."""
        first = record if number is None else self.records[number]
        return first is not record and first == record

    def of(self, annotation: Any, where: str) -> int:
        """The id that an annotation gives for this kind. Raises DcrisError where there is no such record."""
        number = _number(annotation, f"{self.kind}_id", self.path, where)
        if number not in self.records:
            raise bad(self.path, f"{where} names {self.kind} {number}, which the file does not have")
        return number

    def names(self) -> set[str]:
        """The names of all records that have one."""
        names = (record.get("name") for record in self.records.values() if type(record) is dict)
        return {name for name in names if type(name) is str}


class _Object:
    """One entry of 'annotations'. Its methods raise DcrisError, naming it, where it cannot be used."""

    __slots__ = ("number", "place", "record", "source")

    def __init__(self, source: _Source, place: int, record: Any) -> None:
        self.source, self.place, self.record = source, place, record
        (self.number,) = _identifiers([record])

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def where(self) -> str:
        return f"entry {self.place} of 'annotations'" if self.number is None else f"annotation {self.number}"

    def _get(self, key: str) -> Any:
        if type(self.record) is not dict:
            raise bad(self.path, f"{self.where} is not a table of named fields")
        return self.record.get(key)

    @property
    def image_id(self) -> int:
        return self.source.images.of(self.record, self.where)

    @property
    def file_name(self) -> str:
        return self.source.file_name(self.image_id)

    @property
    def category(self) -> str | None:
        """None where the annotation or the file has no categories."""
        if self._get("category_id") is None or not self.source.categories.records:
            return None
        number = self.source.categories.of(self.record, self.where)
        where = f"category {number}"
        name = entry(self.source.categories[number], "name", str, self.path, where)
        return check_text(name, self.path, where, "name")

    def crowd(self) -> bool:
        value = self._get("iscrowd")
        known = {"": False, "0": False, "false": False, "1": True, "true": True}
        plain = "" if value is None else str(value).strip().lower().removesuffix(".0")
        if plain not in known:
            raise bad(self.path, f"{self.where} has an 'iscrowd' that is neither 0 nor 1")
        return known[plain]

    def segmentation(self) -> Any:
        """None where there is a box alone."""
        try:
            return _plain_segmentation(self._get("segmentation"))
        except DcrisError as error:
            raise bad(self.path, f"{self.where} cannot be decoded ({error})") from error

    def own_texts(self) -> Texts:
        phrases = self.source.phrases
        if phrases is not None and self.number is not None and self.number in phrases.by_annotation:
            _ = self.source.indexed[self.number]  # raises where two annotations have this id
            return phrases.by_annotation[self.number]
        attributes = self._get("attributes")
        for record in (self.record, attributes if type(attributes) is dict else {}):
            for key in _OWN_FIELDS:
                if value := record.get(key):
                    return _texts(value, self.path, self.where, key)
        return ()

    def category_texts(self) -> Texts:
        name, phrases = self.category, self.source.phrases
        if name is None:
            return ()
        return (name,) if phrases is None else phrases.by_category.get(name, ())

    def shown(self) -> set[tuple[str, str]]:
        """The photograph with each phrase of the category, by which others may be meant too; none where it is not known."""
        if type(self.record) is not dict or "image_id" not in self.record:
            return set()
        try:
            name = self.file_name
            return {(name, _plain(text)) for text in self.category_texts()}
        except DcrisError:  # named when its turn comes
            return set()


def _whole(value: Any) -> int | None:
    """The whole number of at most 18 digits that is meant: 7, 7.0, "7", or None."""
    if type(value) is float and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if type(value) is str and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*", value)):
        return int(match[1])
    return value if type(value) is int and abs(value) < 10**18 else None


def _number(record: Any, key: str, path: Path, where: str) -> int:
    number = _whole(record.get(key)) if type(record) is dict else None
    return entry(record, key, int, path, where) if number is None else number  # which says what is wrong with it


def _identifiers(records: Iterable[Any]) -> Iterator[int | None]:
    return (_whole(record.get("id")) if type(record) is dict else None for record in records)


def _plain_segmentation(value: Any) -> Any:
    """COCO's polygons or run lengths from the forms in which tools write them; None where there is nothing.

    Raises DcrisError where it is none of these forms. What they say is checked when they are decoded.
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
        raise DcrisError("the segmentation is neither a list of polygons nor run lengths with 'size' and 'counts'")
    alone = not any(type(each) is list and (len(each) != 2 or type(each[0]) in (list, dict)) for each in value)
    polygons = [_corners(each) for each in ([value] if alone else value)]
    if not any(polygons):
        return None
    large = [polygon for polygon in polygons if len(polygon) >= 6]  # editing leaves specks of one or two corners
    if not large:
        raise DcrisError("no polygon has three corners")
    return large


def _corners(polygon: Any) -> list[float]:
    """x, y, x, y, ... from numbers, from points [x, y] or from points {"x": x, "y": y}."""
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


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _choose(names: set[str], share: float, seed: int) -> set[str]:
    """The photographs that go to val: as many as the share says, at least one where there is a share, and never all."""
    wanted = min(max(round(share * len(names)), share > 0), len(names) - 1)

    def lot(name: str) -> str:
        # By name and not by place: when photographs are added, nearly all that were in val stay there.
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    return set(sorted(names, key=lot)[:wanted])
