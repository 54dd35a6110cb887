"""What is asked: images and videos with their phrases, each under a name of its own for its files."""

import csv
import glob
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain, count, islice
from pathlib import Path, PurePath
from typing import Any, NoReturn
from urllib.parse import quote, unquote_to_bytes

from dcris.data.images import image_endings, why_not_read
from dcris.data.tokenizer import require_phrase
from dcris.errors import DcrisError
from dcris.inference.records import JOURNAL
from dcris.inference.video import VIDEO_ENDINGS
from dcris.utils.files import is_partial, read_json_lines, read_text

_RESULT = re.compile(
    r".*\.\d+\.((mask|overlay|cutout)\.png|scores\.npy)|.*\.(overlay\.mp4|frames)|"
    r"predictions\.json|label_studio\.(json|xml)|dcris-journal.*",
    re.DOTALL,
)
_LONGEST_NAME = 200
"""Bytes. File systems take 255; what an image's files are called is longer by endings, and by more while they are written."""

_SHOWN = 10
"""Endings of files that are left out, by name."""

_DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
"""Those that are tried, first the one that the ending names: spreadsheets write semicolons where commas are in numbers."""

_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}

_NOT_UTF8 = "bytes:"
"""Before a source that is percent-encoded: other sources are absolute paths, so none begins so."""

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
        return self.path.suffix.lower() in VIDEO_ENDINGS

    @property
    def source(self) -> str:
        """Which file it is, in UTF-8: one photograph has one source, whichever links to its folder it is named by."""
        path = _real(self.path)
        return path if is_utf8(path) else _NOT_UTF8 + quoted(path)


def source_exists(source: str) -> bool:
    """Whether the file of a `Task.source` is still there."""
    name = unquote_to_bytes(source.removeprefix(_NOT_UTF8)) if source.startswith(_NOT_UTF8) else os.fsencode(source)
    return os.path.lexists(name)


def is_utf8(name: str) -> bool:
    """Whether a file name can be written as text: on Unix it may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def quoted(name: str) -> str:
    """A file name as text: as it is, or percent-encoded by its bytes where those are not UTF-8."""
    return name if is_utf8(name) else quote(os.fsencode(name))


def find_tasks(
    places: Iterable[Path],
    phrases: Sequence[str],
    *,
    out: Path | None = None,
    recursive: bool = False,
    left_out: Callable[[str], None] = lambda line: None,
) -> list[Task]:
    """Ask the phrases of all images and videos that files, folders and patterns (`photos/*.jpg`, `**` too) name, in order.

    A folder gives its images, and with `recursive` those of its subfolders, whose files go into subfolders of the same names.
    Videos have to be named themselves or by a pattern. What is named twice, or reached by several links, is asked once. Results
    of earlier calls, in `out` and in other folders with a journal, and unfinished files are skipped.

    Of folders and patterns, what can be read by its ending is taken. `left_out` receives a line for each of them that has other
    files: how many of which ending, and why.

    Raises DcrisError where a phrase is empty or not UTF-8, or a place is not there or gives nothing.
    """
    asked = tuple(require_phrase(phrase) for phrase in phrases)
    if not asked:
        raise DcrisError("no phrase was given to ask for")
    found: dict[str, Task] = {}
    for place in places:
        if not _is_result(place, out):  # the shell's `photos/*` names them, too
            for path, shown in _inside(place, out, recursive, left_out):
                found.setdefault(_real(path), Task(path, str(shown), _stem(shown), asked))
    if not found:
        raise DcrisError(
            "only results of earlier calls were named; name photographs or videos, or the folder they are in"
        )
    return named(found.values())


def read_pairs(path: Path) -> list[Task]:
    """Images or videos with phrases of their own, from a list: a file with a pair in each line, or several phrases.

    A .csv or .tsv file has the columns `image` and `phrase`, named in its first line, or just two columns, with commas,
    semicolons or tabs between them. A .jsonl file has objects with `image`, and `phrase` or a list of `phrases`; `expression`
    and `expressions` count, too, so that one's own data can be asked about. Paths are relative to the list. An image's phrases
    are numbered in the order of the lines.

    Raises DcrisError where the list cannot be read, naming the line. Whether the images are there is not looked at.
    """
    ending = path.suffix.lower()
    if ending not in {*_DELIMITERS, ".jsonl"}:
        raise DcrisError(f"a list of pairs is a .csv, .tsv or .jsonl file, and {path} does not end so")
    rows = _json_pairs(path) if ending == ".jsonl" else _table_pairs(path, _DELIMITERS[ending])
    asked: dict[str, Task] = {}
    for line, image, phrase in rows:
        if not _is_path(image) or not isinstance(phrase, str):
            raise DcrisError(
                f"{path}, line {line}: an image and a phrase have to be text, and are {image!r} and {phrase!r}"
            )
        try:
            require_phrase(phrase)
        except DcrisError as error:
            raise DcrisError(f"{path}, line {line}: {error}") from error
        source = _real(path.parent / image)
        task = asked.get(source) or Task(path.parent / image, image, _stem(PurePath(PurePath(image).name)), ())
        asked[source] = replace(task, phrases=(*task.phrases, phrase))
    if not asked:
        raise DcrisError(f"the list {path} holds no pair of an image and a phrase")
    return named(asked.values())


def named(tasks: Iterable[Task], known: Mapping[str, str] | None = None) -> list[Task]:
    """The tasks, each under a name of its own: the one that `known` has for its source, else one that is free.

    A name that another has, upper and lower case being one, gets a number. Names do not depend on which of the tasks are
    known, as long as those have the names that they got here: so a repeated call uses the same names.
    """
    own = dict(known or {})
    taken = {name.casefold() for name in own.values()}
    result = []
    for task in tasks:
        name = own.pop(task.source, None)
        if name is None:
            bare = re.sub(r"~\d+$", "", task.name)
            candidates = chain([task.name], (f"{bare}~{number}" for number in count(2)))
            name = next(name for name in candidates if name.casefold() not in taken)
        taken.add(name.casefold())
        result.append(replace(task, name=name))
    return result


def _inside(
    place: Path, out: Path | None, recursive: bool, left_out: Callable[[str], None]
) -> Iterator[tuple[Path, PurePath]]:
    """The files that a place names, each with what results call it."""
    if place.is_dir():
        folders = _folders(place) if recursive else [place]
        found = sorted(path for folder in folders for path in folder.iterdir())
        images, others = _readable(found, image_endings(), out)
        if not images:
            more = "" if recursive else "; --recursive also looks into subfolders"
            raise DcrisError(f"the folder {place} has no images in it{others and f'; it has {others}'}{more}")
        yield from ((path, path.relative_to(place)) for path in images)
    elif place.exists():
        yield place, PurePath(place.name)
        return
    elif glob.has_magic(place.as_posix()):
        found = sorted(set(_matches(place.as_posix())))
        files, others = _readable(found, image_endings() | VIDEO_ENDINGS, out)
        if not files:
            raise DcrisError(f"no image or video matches {place}{others and f'; it matches {others}'}")
        yield from ((path, PurePath(path.name)) for path in files)
    else:
        raise DcrisError(f"there is no image {place}")
    if others:
        left_out(f"left out of {place}: {others}")


def _readable(paths: Iterable[Path], endings: Set[str], out: Path | None) -> tuple[list[Path], str]:
    """The files to ask about, by their endings, and in words which others there are.

    A link to nothing is one, so that it is reported as missing. Files with a leading dot are not counted: folders are full of
    those that only programs know.
    """
    files: list[Path] = []
    others: dict[str, Counter[str]] = {}
    for path in paths:
        ending = path.suffix.lower()
        if path.is_dir() or _is_result(path, out):
            continue
        if ending in endings:
            files.append(path)
        elif not path.name.startswith("."):
            video = "name videos, or give a pattern that matches them" if ending in VIDEO_ENDINGS else None
            reason = video or why_not_read(ending) or "no picture or video that can be read"
            others.setdefault(reason, Counter())[ending or "without ending"] += 1
    return files, "; ".join(f"{_counted(counts)} ({reason})" for reason, counts in others.items())


def _counted(endings: Counter[str]) -> str:
    shown = [f"{count} {ending}" for ending, count in endings.most_common(_SHOWN)]
    more = endings.total() - sum(count for _, count in endings.most_common(_SHOWN))
    return ", ".join([*shown, f"{more} others"] if more else shown)


def _is_result(path: Path, out: Path | None) -> bool:
    """Whether `dcris predict` has written a file, by its name and folder, or some writer has not finished it."""
    if is_partial(path):
        return True
    if not _RESULT.fullmatch(path.name):
        return False
    folders = path.absolute().parents
    return (out is not None and out.absolute() in folders) or any((folder / JOURNAL).exists() for folder in folders)


def _matches(pattern: str) -> Iterator[Path]:
    """What a pattern names. `**` stands for any folders below, each once: glob's own follows links in circles."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not after:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        return
    for top in glob.glob(before) if before else ["."]:  # noqa: PTH207
        for folder in _folders(Path(top), hidden=False):
            yield from _matches(f"{glob.escape(folder.as_posix())}/{after[0] or '*'}")


def _folders(top: Path, hidden: bool = True) -> Iterator[Path]:
    """A folder and all below it, each once: links may lead in circles. Folders come before links to them."""
    seen: set[str] = set()  # real paths; inode numbers are 0 on some network drives
    waiting = deque([top])
    while waiting:
        for name, below, _ in os.walk(waiting.popleft(), onerror=_raise):
            folder, real = Path(name), os.path.realpath(name)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(one for one in below if (hidden or one[0] != ".") and not is_partial(Path(one)))
            waiting.extend(
                folder / one for one in below if (folder / one).is_symlink()
            )  # which os.walk does not follow
            yield folder


def _raise(error: OSError) -> NoReturn:
    raise error


def _real(path: Path) -> str:
    """The absolute path of a file, through the real folder it is in. The file itself may be a link, with a name of its own."""
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118 (Path would be the slower way to text)


def _stem(shown: PurePath) -> str:
    """The name that a photograph's files are to have: its path without the ending, as text, cut where it is long."""
    # Not by PurePath: a photograph may be called "..png", and no path takes "." for a name.
    return "/".join(_cut(quoted(part)) for part in (*shown.parts[:-1], shown.stem))


def _cut(name: str) -> str:
    return name if len(name.encode()) <= _LONGEST_NAME else name.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _is_path(value: Any) -> bool:
    """Whether a value of a list names a file: text that some file name may have."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a character, which JSON can spell
        return False


def _table_pairs(path: Path, delimiters: str) -> Iterator[tuple[int, Any, Any]]:
    try:
        text = read_text(path)
    except OSError as error:
        raise DcrisError(f"cannot read the list {path}: {error.strerror or error}") from error
    declared = re.match(r'"?sep=(.)"?[ \t]*(?=[\r\n]|$)', text, re.IGNORECASE)  # Excel's own first line
    text = text[declared.end() :] if declared else text
    delimiter = declared[1] if declared else max(delimiters, key=lambda delimiter: _fit(text, delimiter))
    rows = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
                advice = (
                    "put a comma, a semicolon or a tab between image and phrase"
                    if len(row) < width
                    else f"put a phrase with a {_NAMES.get(delimiter, repr(delimiter))} in it between quotation marks"
                )
                columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
                raise DcrisError(f"{path}, line {rows.line_num}: it has {columns}, not {width}; {advice}")
            else:
                yield rows.line_num, row[image].strip(), row[phrase]
            first = False
    except csv.Error as error:
        raise DcrisError(f"{path}, line {rows.line_num}: it is not a table ({error})") from error


def _fit(text: str, delimiter: str) -> tuple[bool, int, int]:
    """How well a delimiter divides a table: whether its header is found, how many rows begin with a picture, or have two cells.

    Not by csv.Sniffer, which looks at the frequency of letters, and so takes spaces or an "e" for delimiters.
    """
    rows: list[list[str]] = []
    try:
        reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows += islice((row for row in reader if any(cell.strip() for cell in row)), 1000)
    except csv.Error:
        pass  # reported when the table is read
    pairs = [row for row in rows if len(row) == 2]
    pictures = sum(PurePath(image.strip()).suffix.lower() in image_endings() | VIDEO_ENDINGS for image, _ in pairs)
    return any(cell.strip().lower() == "image" for cell in chain(*rows[:1])), pictures, len(pairs)


def _json_pairs(path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, row in read_json_lines(path):
        key = next((key for key in _PHRASE_KEYS if isinstance(row, dict) and key in row), None)
        if key is None or "image" not in row:
            raise DcrisError(f"{path}, line {number}: it is no object with `image`, and `phrase` or `phrases`")
        phrases = row[key] if isinstance(row[key], list) else [row[key]]
        yield from ((number, row["image"], phrase) for phrase in phrases)
