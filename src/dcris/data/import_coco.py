"""COCO's annotations, which most annotation tools write, with a phrase for each object -> one's own JSON Lines."""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcris.data.images import image_size
from dcris.data.jsonl import is_jsonl
from dcris.data.masks import validate_segmentation
from dcris.data.table import bad, check_text, index_by_id, plain_path
from dcris.data.table import field as entry
from dcris.errors import DcrisError
from dcris.files import read_json, write_file

Texts = tuple[str, ...]

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
    maskless: int = 0
    """Annotations with a box alone."""
    phraseless: int = 0
    ambiguous: int = 0
    """Those whose only phrases fit another object of the photograph, too."""

    def __str__(self) -> str:
        made = ", ".join(f"{count:,} {split}" for split, count in self.splits.items())
        return f"{made} references with {self.expressions:,} expressions on {self.images:,} images{self.left_out}"

    @property
    def left_out(self) -> str:
        """The end of a sentence."""
        reasons = (
            (self.ambiguous, "whose phrase fits several objects of a photograph (--ambiguous keep)"),
            (self.crowds, "crowds (--crowds keep)"),
            (self.maskless, "without a mask"),
            (self.phraseless, "without a phrase"),
        )
        found = [f"{count:,} {reason}" for count, reason in reasons if count]
        return f"; left out: {', '.join(found)}" if found else ""


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
) -> Imported:
    """Write the JSON Lines file `out` with one reference for each annotation of a COCO file that has a mask and a phrase.

    An annotation's phrases are those that `phrases` gives for its id, else its own (an "expressions", "phrase" or "caption", in
    it or in its "attributes"), else its category's: from `phrases`, or, where there is no such file, its name. A category's
    phrase is left out where another object of the same photograph has it too: nobody could tell which one is meant.

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

    Raises DcrisError for anything missing, malformed or contradictory, naming the file and the annotation; nothing is then
    written.
    """
    if not is_jsonl(out):
        raise DcrisError(f"a data set of one's own is known by its ending; call it {out.with_suffix('.jsonl')}")
    if out.exists():
        raise DcrisError(f"{out} exists already; delete it or choose another --out")
    if split is not None and not split.strip():
        raise DcrisError("a split needs a name; give --split train, for one")
    source = _Source.read(annotations, images, out, phrases)
    done = Imported()
    objects = list(source.objects(done, keep_ambiguous, keep_crowds))
    if not objects:
        raise DcrisError(f"nothing in {annotations} has both a mask and a phrase{done.left_out}")
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
    by_annotation: dict[int, Texts] = {}
    by_category: dict[str, Texts] = {}
    by: str | None
    pairs: Iterable[tuple[str, Texts, str]]
    by, pairs = _read_csv(path) if path.suffix.lower() == ".csv" else (None, _read_mapping(path))
    for key, texts, where in pairs:
        number = (
            int(key) if re.fullmatch("[0-9]{1,99}", key) else None
        )  # Python converts no text of thousands of digits
        is_annotation = number in annotations and by != "category"
        is_category = key in categories and by != "annotation"
        if is_annotation and is_category:
            raise bad(
                path, f"{where} may be an annotation's id or a category's name; use CSV, whose heading says which"
            )
        if number is not None and is_annotation:
            by_annotation[number] = by_annotation.get(number, ()) + texts
        elif is_category:
            by_category[key] = by_category.get(key, ()) + texts
        else:
            raise bad(path, f"{where} is the id of no annotation and the name of no category")
    return Phrases(by_annotation, by_category)


def _read_mapping(path: Path) -> Iterator[tuple[str, Texts, str]]:
    content = read_json(path, "the file of phrases")
    if type(content) is not dict:
        raise bad(path, "it is not a table of phrases by annotation id or category name")
    for key, value in content.items():
        yield key, _texts(value, path, f"the entry {key!r}", "phrase"), f"the key {key!r}"


def _read_csv(path: Path) -> tuple[str, Iterable[tuple[str, Texts, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            heading = file.readline()
            mark = next((mark for mark in ",;\t" if mark in heading), ",")  # Excel's depends on the language
            columns = [name.strip(' "').lower() for name in heading.strip().split(mark)]
            rows = list(csv.DictReader(file, columns, delimiter=mark))
    except FileNotFoundError as error:
        raise DcrisError(f"the file of phrases is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read the file of phrases, {path}: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise bad(path, f"it is not CSV in UTF-8 ({error})") from error
    by = next((name for name in ("annotation", "category") if name in columns), None)
    if by is None or "phrase" not in columns:
        raise bad(path, "its heading is neither `annotation,phrase` nor `category,phrase`")
    pairs: list[tuple[str, Texts, str]] = []
    for number, row in enumerate(rows, 2):
        key, text = ((row[name] or "").strip() for name in (by, "phrase"))
        if text:
            where = f"row {number}"
            pairs.append((key, (check_text(text, path, where, "phrase"),), f"{where}, with the {by} {key!r},"))
    return by, pairs


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
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]
    phrases: Phrases | None

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
        images, annotations, categories = (
            index_by_id(entry(content, key, list, path, "the file"), key, path)
            for key in ("images", "annotations", "categories")
        )
        names = {
            number: check_text(entry(item, "name", str, path, f"category {number}"), path, f"category {number}", "name")
            for number, item in categories.items()
        }
        known = None if phrases is None else read_phrases(phrases, set(annotations), set(names.values()))
        return cls(path, folder, "" if prefix == "." else f"{prefix}/", images, annotations, names, known)

    def objects(self, done: Imported, keep_ambiguous: bool, keep_crowds: bool) -> Iterator[dict[str, Any]]:
        """The lines to be, without their splits. What is left out is counted in `done`."""
        shown = Counter(
            (self._file_name(self._image_id(number)), text)
            for number in self.annotations
            for text in {_plain(text) for text in self._category_texts(number)}
        )
        sizes: dict[int, tuple[int, int]] = {}
        for number, annotation in self.annotations.items():
            image_id = self._image_id(number)
            name = self._file_name(image_id)
            if annotation.get("iscrowd") and not keep_crowds:
                done.crowds += 1
                continue
            if not annotation.get("segmentation"):
                done.maskless += 1
                continue
            texts = self._own_texts(number)
            if not texts:
                texts = self._category_texts(number)
                if not texts:
                    done.phraseless += 1
                    continue
                if not keep_ambiguous:
                    texts = tuple(text for text in texts if shown[name, _plain(text)] == 1)
                    if not texts:
                        done.ambiguous += 1
                        continue
            if image_id not in sizes:
                sizes[image_id] = self._size(image_id)
            try:
                segmentation = validate_segmentation(annotation["segmentation"], sizes[image_id])
            except DcrisError as error:
                raise bad(self.path, f"annotation {number} cannot be decoded ({error})") from error
            if isinstance(segmentation, Mapping):
                segmentation = {key: segmentation[key] for key in ("size", "counts")}
            yield {
                "image": self.prefix + name,
                "mask": segmentation,
                "expressions": list(dict.fromkeys(texts)),
                "category": self._category(number),
                "annotation": number,  # for people alone: which one this was
            }

    def _image_id(self, number: int) -> int:
        image_id = entry(self.annotations[number], "image_id", int, self.path, f"annotation {number}")
        if image_id not in self.images:
            raise bad(self.path, f"annotation {number} names image {image_id}, which the file does not have")
        return image_id

    def _category(self, number: int) -> str:
        category_id = entry(self.annotations[number], "category_id", int, self.path, f"annotation {number}")
        if category_id not in self.categories:
            raise bad(self.path, f"annotation {number} names category {category_id}, which the file does not have")
        return self.categories[category_id]

    def _own_texts(self, number: int) -> Texts:
        if self.phrases is not None and number in self.phrases.by_annotation:
            return self.phrases.by_annotation[number]
        annotation = self.annotations[number]
        attributes = annotation.get("attributes")
        for record in (annotation, attributes if type(attributes) is dict else {}):
            for key in _OWN_FIELDS:
                if value := record.get(key):
                    return _texts(value, self.path, f"annotation {number}", key)
        return ()

    def _category_texts(self, number: int) -> Texts:
        name = self._category(number)
        return (name,) if self.phrases is None else self.phrases.by_category.get(name, ())

    def _file_name(self, image_id: int) -> str:
        where = f"image {image_id}"
        return plain_path(entry(self.images[image_id], "file_name", str, self.path, where), self.path, where)

    def _size(self, image_id: int) -> tuple[int, int]:
        """Height and width, which the photograph and the annotations must agree on."""
        height, width = (
            entry(self.images[image_id], key, int, self.path, f"image {image_id}") for key in ("height", "width")
        )
        photograph = self.images_folder / self._file_name(image_id)
        found = image_size(photograph)
        if found != (height, width):
            raise DcrisError(
                f"{photograph} is {found[0]} x {found[1]} pixels (height x width, turned as its EXIF data say), but "
                f"{self.path} says {height} x {width}, so its masks do not fit; take the photographs that were annotated"
            )
        return found


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _choose(names: set[str], share: float, seed: int) -> set[str]:
    """The photographs that go to val: as many as the share says, at least one where there is a share, and never all."""
    wanted = min(max(round(share * len(names)), share > 0), len(names) - 1)

    def lot(name: str) -> str:
        # By name and not by place: when photographs are added, nearly all that were in val stay there.
        return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()

    return set(sorted(names, key=lot)[:wanted])
