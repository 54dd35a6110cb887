"""YOLO segmentation: a text file for each image, with one line for each object: the number of its
class, and the corners of its polygon as fractions of the image's sides.

The files are in folders `labels`, the images in folders `images` beside them, with the same names.
The names of the classes are in data.yaml (Ultralytics, Roboflow, CVAT) or classes.txt (Label
Studio). Lines with four numbers are boxes. Sources:
https://docs.ultralytics.com/datasets/segment and ultralytics/data/utils.py.
"""

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dcris.data.masks import union_mask
from dcris.data.outlines import mask_polygon
from dcris.data.table import bad, check_text, shown
from dcris.data.tools.annotation import (
    Annotation,
    Exported,
    Format,
    Found,
    Mask,
    Size,
    each,
    mapping,
    number,
    phrases_of,
    split_of,
    whole,
)
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import read_text, reading, write_file

_MAX_YAML = 200_000
"""Limit on the bytes of data.yaml: PyYAML is slow, and takes 200 times the memory."""

_MAX_LABELS = 16_000_000
"""Limit on the bytes of a file of labels."""

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt")


class _PlainLoader(yaml.BaseLoader):  # type: ignore[misc]  # PyYAML has no types
    """Loads text, lists and objects. Aliases are refused: short ones can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose the next node of the document."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def _is_yolo(path: Path) -> bool:
    if path.is_dir():
        named = any((path / name).is_file() for name in _NAMES)
        return named and next(_label_files(path), None) is not None
    return path.suffix.lower() in (".yaml", ".yml") or path.name == "classes.txt"


def _label_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.txt")) if "labels" in path.relative_to(folder).parts[:-1])


def _read(path: Path, content: Any) -> Found:
    if path.is_dir():
        path = next((path / name for name in _NAMES if (path / name).is_file()), path / _NAMES[0])
    names, splits = _classes(path)
    yield from names.values()
    found = False
    for file in _label_files(path.parent):
        found = True
        try:
            with reading(file):
                lines = read_text(file, _MAX_LABELS).splitlines()
        except DcrisError as error:
            yield error
        else:
            yield from each(_object, lines, file, path.parent, names, splits)
    if not found:
        raise bad(path, "there is no folder 'labels' with text files beside it or below")


def _classes(path: Path) -> tuple[Mapping[int, str], Collection[str]]:
    """Return the names of the classes by their numbers, and the names of the splits."""
    with reading(path, "it has the names of the classes, so export it with the labels"):
        text = read_text(path, _MAX_YAML)
    if path.suffix == ".txt":
        listed = dict(enumerate(text.splitlines()))
        return {key: name for key, name in listed.items() if name.strip()}, ()
    try:
        content = mapping(yaml.load(text, Loader=_PlainLoader))
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        raise bad(path, f"it is not YAML of plain values ({shown(str(error))})") from error
    names = content.get("names")
    if not isinstance(names, list | dict):
        raise bad(path, f"its 'names' are neither a list nor an object: {shown(names)}")
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    found = {}
    for key, name in pairs:
        if whole(key) is None or type(name) is not str:
            raise bad(path, f"its 'names' have an entry that is not a number with a name: {shown(key)}: {shown(name)}")
        found[whole(key) or 0] = check_text(name, path, f"class {whole(key)}", "name")
    return found, content.keys()


def _object(
    place: int, line: str, path: Path, root: Path, names: Mapping[int, str], splits: Collection[str]
) -> Annotation | None:
    words, where = line.split(), f"line {place}"
    if not words:
        return None
    category = whole(words[0])
    if category is None or category not in names:
        raise bad(path, f"{where} has a class that is not in the list of names: {shown(words[0])}")
    parts = list(path.relative_to(root).with_suffix("").parts)
    last = max(index for index, part in enumerate(parts[:-1]) if part == "labels")
    below = parts[last + 1 : -1]
    split = split_of(*below, *reversed(parts[:last])) or (below[0] if below else None)
    if below and below[0] in splits and not below[0].isalpha():  # "val_seen", of which split_of sees "val" only
        split = below[0]
    parts[last] = "images"
    return Annotation(
        path=root / "data.yaml",  # the images are named relative to it
        where=f"{where} of {path.relative_to(root).as_posix()}",
        source=f"{path.relative_to(root).as_posix()}#{place}",
        image="/".join(parts),
        size=None,
        masks=_masks(words[1:], path, where),
        category=names[category],
        split=split,
    )


def _masks(words: list[str], path: Path, where: str) -> tuple[Mask, ...] | None:
    if len(words) == 4:
        return None  # a box
    if len(words) < 6 or len(words) % 2:
        raise bad(path, f"{where} has {len(words)} numbers after the class, which are neither a polygon nor a box")
    values = [number(word, path, where, "polygon") for word in words]

    def polygon(size: Size) -> list[list[float]]:
        # Rounded, since the fraction of a whole pixel may not be a whole pixel again.
        return [[round(value * size[1 - place % 2], 6) for place, value in enumerate(values)]]

    return (polygon,)


def _write(exported: Exported, folder: Path) -> None:
    """Write labels, data.yaml, and phrases.csv, which `dcris data import --phrases` takes back.

    A line has one polygon, so the parts of an object, and its holes, are joined by cuts without
    width.
    """
    categories = exported.categories()
    rows: list[tuple[str, str]] = []
    splits = dict[str, str]()
    for image, references in exported.by_image().items():
        path = PurePosixPath(exported.images[image])
        splits[references[0].split] = path.parent.as_posix()
        labels = PurePosixPath("labels", *path.parts[1:]).with_suffix(".txt")
        lines = list[str]()
        for reference in references:
            height, width = reference.image_size
            ring = _ring(reference)
            if not ring:
                continue
            fractions = (f"{value / (height if place % 2 else width):.12g}" for place, value in enumerate(ring))
            lines.append(" ".join([str(categories[reference.category or "object"] - 1), *fractions]))
            rows += [(f"{labels.as_posix()}#{len(lines)}", text) for text in phrases_of(reference)]
        write_file(folder / labels, "".join(f"{line}\n" for line in lines))
    text = io.StringIO()
    csv.writer(text).writerows([("annotation", "phrase"), *rows])
    write_file(folder / "phrases.csv", text.getvalue())
    names = {number - 1: name for name, number in categories.items()}
    # Ultralytics needs a "train" and a "val", by whatever name: a split validation is a "val".
    known = {split_of(split): place for split, place in reversed(splits.items())} | splits
    train = known.get("train", next(iter(splits.values())))
    places = {"train": train, "val": known.get("val", train)}
    places |= {exported.split_names[split]: place for split, place in splits.items()}
    write_file(
        folder / "data.yaml",
        yaml.safe_dump({"path": ".", **places, "names": names}, sort_keys=False, allow_unicode=True),
    )


def _ring(reference: Reference) -> list[float]:
    """Return one polygon for all objects of a reference: its own, if it has just one."""
    size = reference.image_size
    if len(reference.segmentations) == 1 and isinstance(only := reference.segmentations[0], list) and len(only) == 1:
        height, width = size
        if all(0 <= value <= (height if place % 2 else width) for place, value in enumerate(only[0])):
            return only[0]
    return mask_polygon(union_mask(reference.segmentations, size))


FORMAT = Format(
    "YOLO segmentation (Ultralytics, Roboflow, CVAT, Label Studio)",
    _read,
    is_place=_is_yolo,
    write=_write,
    image_folder="images/{split}",
)
