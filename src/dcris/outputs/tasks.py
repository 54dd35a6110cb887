"""What is asked: images and videos with their phrases, each under a name of its own for its files."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any

from dcris.data.tokenizer import require_phrase
from dcris.errors import DcrisError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts"}
_MADE = re.compile(r"\.(\d+\.(mask|overlay|cutout)\.png|overlay\.mp4)$")
_LONGEST_NAME = 200
"""Bytes. File systems take 255; what an image's files are called is longer by endings, and by more while they are written."""

_PHRASE_KEYS = ("phrase", "expression", "phrases", "expressions")


@dataclass(frozen=True, slots=True)
class Task:
    """One image or video, and what is asked of it."""

    path: Path
    shown: str
    """What results call it: its path from the folder or list that named it."""
    name: str
    """What its files are called, from the folder of the results: unique among the tasks, whatever the file system's case."""
    phrases: tuple[str, ...]

    @property
    def video(self) -> bool:
        """Whether it is a video, by its ending."""
        return self.path.suffix.lower() in VIDEOS


def find_tasks(
    places: Iterable[Path], phrases: Sequence[str], *, out: Path | None = None, recursive: bool = False
) -> list[Task]:
    """Ask the phrases of all images and videos that files, folders and patterns (`photos/*.jpg`, `**` too) name, in order.

    A folder gives its images, and with `recursive` those of its subfolders, whose files go into subfolders of the same names.
    Videos have to be named themselves or by a pattern. What is named twice is asked once. What `dcris predict` left in the
    folder `out` before is no image to ask about.

    Raises DcrisError where a phrase is empty, or a place is not there or gives nothing.
    """
    asked = tuple(require_phrase(phrase) for phrase in phrases)
    if not asked:
        raise DcrisError("no phrase was given to ask for")
    found: dict[Path, tuple[Path, PurePath]] = {}
    for place in places:
        for path, shown in _inside(place, out, recursive):
            found.setdefault(path.absolute(), (path, shown))
    names = _names([shown for _, shown in found.values()])
    return [Task(path, str(shown), name, asked) for (path, shown), name in zip(found.values(), names, strict=True)]


def read_pairs(path: Path) -> list[Task]:
    """Images or videos with phrases of their own, from a list: a file with a pair in each line, or several phrases.

    A .csv (commas) or .tsv (tabs) file has the columns `image` and `phrase`, named in its first line, or just two columns. A
    .jsonl file has objects with `image`, and `phrase` or a list of `phrases`; `expression` and `expressions` count, too, so
    that one's own data can be asked about. Paths are relative to the list. An image's phrases are numbered in the order of
    the lines.

    Raises DcrisError where the list cannot be read, naming the line. Whether the images are there is not looked at.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DcrisError(f"cannot read the list {path}: {reason or error}") from error
    readers = {".csv": ",", ".tsv": "\t", ".jsonl": None}
    if path.suffix.lower() not in readers:
        raise DcrisError(f"a list of pairs is a .csv, .tsv or .jsonl file, and {path} does not end so")
    delimiter = readers[path.suffix.lower()]
    rows = _json_pairs(path, text) if delimiter is None else _table_pairs(path, text, delimiter)
    asked: dict[str, list[str]] = {}
    for line, image, phrase in rows:
        if not isinstance(image, str) or not image or "\0" in image or not isinstance(phrase, str):
            raise DcrisError(
                f"{path}, line {line}: an image and a phrase have to be text, and are {image!r} and {phrase!r}"
            )
        try:
            asked.setdefault(image, []).append(require_phrase(phrase))
        except DcrisError as error:
            raise DcrisError(f"{path}, line {line}: {error}") from error
    if not asked:
        raise DcrisError(f"the list {path} holds no pair of an image and a phrase")
    names = _names([PurePath(PurePath(image).name) for image in asked])
    return [
        Task(path.parent / image, image, name, tuple(phrases))
        for (image, phrases), name in zip(asked.items(), names, strict=True)
    ]


def _inside(place: Path, out: Path | None, recursive: bool) -> Iterator[tuple[Path, PurePath]]:
    """The files that a place names, each with what results call it."""
    if place.is_dir():
        found = sorted(place.rglob("*") if recursive else place.iterdir())
        images = [path for path in found if _is_file(path, IMAGES, out)]
        if not images:
            more = "" if recursive else "; --recursive looks into its subfolders, too"
            raise DcrisError(f"the folder {place} has no images in it ({', '.join(sorted(IMAGES))}){more}")
        yield from ((path, path.relative_to(place)) for path in images)
    elif place.exists():
        yield place, PurePath(place.name)
    elif glob.has_magic(str(place)):
        matches = (Path(match) for match in sorted(glob.glob(str(place), recursive=True)))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        files = [path for path in matches if _is_file(path, IMAGES | VIDEOS, out)]
        if not files:
            raise DcrisError(f"no image or video matches {place}")
        yield from ((path, PurePath(path.name)) for path in files)
    else:
        raise DcrisError(f"there is no image {place}")


def _is_file(path: Path, endings: set[str], out: Path | None) -> bool:
    """Whether a folder's entry is one to ask about. A link to nothing is, so that it is said that it cannot be read."""
    if path.suffix.lower() not in endings or path.is_dir():
        return False
    made = _MADE.search(path.name) is not None
    return not (made and out is not None and path.absolute().is_relative_to(out.absolute()))


def _names(shown: Sequence[PurePath]) -> Iterator[str]:
    """A name for each: its path without the ending, cut where it is long, with a number where another has the same."""
    taken: set[str] = set()
    for path in shown:
        # As text: a photograph may be called "..png", and no path takes "." for a name.
        stem = path.as_posix().removesuffix(path.name) + _cut(path.stem)
        numbered = (f"{stem}~{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name.casefold() not in taken)
        taken.add(name.casefold())
        yield name


def _cut(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_NAME else raw[:_LONGEST_NAME].decode(errors="ignore")


def _table_pairs(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, Any, Any]]:
    rows = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    image, phrase, width, first = 0, 1, 2, True
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            header = [cell.strip().lower() for cell in row]
            if first and "image" in header:
                column = next((key for key in _PHRASE_KEYS[:2] if key in header), None)
                if column is None:
                    raise DcrisError(f"{path}, line {rows.line_num}: there is a column image, but none called phrase")
                image, phrase, width = header.index("image"), header.index(column), len(header)
            elif len(row) != width:
                kind = "tab" if delimiter == "\t" else "comma"
                raise DcrisError(
                    f"{path}, line {rows.line_num}: it has {len(row)} columns, not {width}; put a phrase with a {kind} in it "
                    "between quotation marks"
                )
            else:
                yield rows.line_num, row[image].strip(), row[phrase]
            first = False
    except csv.Error as error:
        raise DcrisError(f"{path}, line {rows.line_num}: it is not a table ({error})") from error


def _json_pairs(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DcrisError(f"{path}, line {number}: it is not JSON ({error})") from error
        key = next((key for key in _PHRASE_KEYS if isinstance(row, dict) and key in row), None)
        if key is None or "image" not in row:
            raise DcrisError(f"{path}, line {number}: it is no object with `image`, and `phrase` or `phrases`")
        phrases = row[key] if isinstance(row[key], list) else [row[key]]
        yield from ((number, row["image"], phrase) for phrase in phrases)
