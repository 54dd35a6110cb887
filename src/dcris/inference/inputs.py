"""Find the images and videos of a call with their phrases, and name their result files."""

import csv
import glob
import os
import re
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain, count, islice
from pathlib import Path, PurePath
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from dcris.data.cleaning import require_phrase
from dcris.data.images import image_endings, why_not_read
from dcris.data.table import is_utf8, quoted
from dcris.errors import DcrisError
from dcris.inference.video import VIDEO_ENDINGS
from dcris.utils.files import is_partial, read_json_lines, read_text
from dcris.utils.text_tables import declared_delimiter

RECORDS = "dcris-journal.jsonl"
"""Name of the record file in a folder of results; see dcris.inference.records."""

RESULT_FILE = r".*\.\d+(-[^./]+)?\.((mask|overlay|cutout)\.png|scores\.npy)|.*\.(annotated\.png|overlay\.mp4)"
"""Pattern of the names of the files of an image, frame or video; see dcris.inference.batch."""

_RESULT = re.compile(rf"{RESULT_FILE}|.*\.frames|predictions\.json|label_studio\.(json|xml)|dcris-journal.*", re.DOTALL)
_DATA_SET = re.compile(r"predictions-(coco|yolo|labelme)")
"""Folders of results that have copies of the images; see dcris.inference.data_sets."""

_LONGEST_NAME = 200
"""Limit in bytes. File systems allow 255; file names are longer by their endings, and temporary
names by a suffix."""

_LONGEST_PHRASE = 30
"""Limit in bytes of a phrase in a file name, with which the name fits, too."""

_MAX_LISTED = 10
"""Number of file endings that the message about skipped files lists."""

_DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}
"""Candidates, the usual one first. Spreadsheets write semicolons in countries with a decimal
comma."""

_DELIMITER_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}

_NOT_UTF8 = "bytes:"
"""Prefix of a percent-encoded source. All other sources are absolute paths, so none starts with
it."""

_PHRASE_KEYS = ("phrase", "expression", "phrases", "expressions")


@dataclass(frozen=True, slots=True)
class Task:
    """One image or video and the phrases to segment in it."""

    path: Path
    shown: str
    """Name in results: the path relative to the folder or list that contains it."""
    name: str
    """Start of its result files' names, relative to the output folder; unique among the tasks,
    ignoring case."""
    phrases: tuple[str, ...]
    source: str = ""
    """Identity of the file as UTF-8 text: its path with the links to its folder resolved. Found
    once, as this takes a look at each folder of the path."""

    def __post_init__(self) -> None:
        if not self.source:
            # The file itself may be a link.
            path = os.path.join(os.path.realpath(self.path.parent), self.path.name)  # noqa: PTH118 (Path is slower)
            object.__setattr__(self, "source", path if is_utf8(path) else _NOT_UTF8 + quoted(path))

    @property
    def video(self) -> bool:
        """Whether the file ending is that of a video."""
        return _is_video(self.path)


def source_path(source: str) -> Path:
    """Return the file of a `Task.source`."""
    return Path(
        os.fsdecode(unquote_to_bytes(source.removeprefix(_NOT_UTF8))) if source.startswith(_NOT_UTF8) else source
    )


def find_tasks(
    places: Iterable[Path],
    phrases: Sequence[str],
    *,
    out: Path | None = None,
    recursive: bool | None = None,
    on_skipped: Callable[[str], None] = lambda line: None,
) -> list[Task]:
    """Find images and videos by files, folders and patterns (`photos/*.jpg`, also `**`), in order.

    A folder gives its images, but not its videos. Files that several places or links name become
    one task. Results of earlier calls (in `out`, or in any folder with records) and unfinished
    files are skipped.

    Args:
        places: files, folders and patterns.
        phrases: the phrases of every image and video.
        out: the output folder of this call.
        recursive: search subfolders of folders; their results go to subfolders of the same names.
            None: not, and the user has no --recursive, which errors then do not advise.
        on_skipped: receives one line per folder or pattern that has files which cannot be read: how
            many of which ending, and why.

    Returns:
        One task per image or video.

    Raises:
        DcrisError: a phrase is empty or not UTF-8, or a place does not exist or has no images.
    """
    checked = tuple(require_phrase(phrase) for phrase in phrases)
    if not checked:
        raise DcrisError("no phrase was given; give one or several")
    found: dict[str, Task] = {}
    for place in places:
        if not _is_result(place, out):  # the shell expands `photos/*` to results, too
            for path, shown in _files_of(place, out, recursive, on_skipped):
                task = Task(path, str(shown), _stem(shown), checked)
                found.setdefault(task.source, task)
    if not found:
        raise DcrisError("all given files are results of earlier calls; give images, videos or folders of images")
    return assign_names(found.values())


def read_phrases(path: Path) -> list[str]:
    """Read a list of phrases: one on each line, in UTF-8; blank lines are ignored.

    Raises:
        DcrisError: the file cannot be read, has no phrase, or a line is not one; the error names
            the line.
    """
    phrases = []
    for number, line in enumerate(_read_list(path).splitlines(), 1):
        if line.strip():
            try:
                phrases.append(require_phrase(line.strip()))
            except DcrisError as error:
                raise DcrisError(f"{path}, line {number}: {error}") from error
    if not phrases:
        raise DcrisError(f"the list {path} has no phrase; write one on each line")
    return phrases


def _read_list(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise DcrisError(f"cannot read the list {path}: {error.strerror or error}") from error


def read_pairs(path: Path) -> list[Task]:
    """Read a list of images (or videos) with phrases.

    A .csv or .tsv file has the columns `image` and `phrase`, named in the first line, or just two
    columns; the delimiter is a comma, semicolon or tab. A .jsonl file has objects with `image` and
    `phrase`, or a list of `phrases`; `expression` and `expressions` are accepted too, so that a
    data set in JSON Lines can be read. Paths are relative to the list. Phrases of one image are
    numbered in the order of the lines.

    Returns:
        One task per image. Whether the images exist is not checked here.

    Raises:
        DcrisError: the list cannot be read; the error names the line.
    """
    ending = path.suffix.lower()
    if ending not in {*_DELIMITERS, ".jsonl"}:
        raise DcrisError(f"a list of pairs must be a .csv, .tsv or .jsonl file, not {path}")
    rows = _json_pairs(path) if ending == ".jsonl" else _table_pairs(path, _DELIMITERS[ending])
    tasks: dict[str, Task] = {}
    for line, image, phrase in rows:
        if not _is_path(image) or not isinstance(phrase, str):
            raise DcrisError(f"{path}, line {line}: image and phrase must be text, not {image!r} and {phrase!r}")
        try:
            require_phrase(phrase)
        except DcrisError as error:
            raise DcrisError(f"{path}, line {line}: {error}") from error
        new = Task(path.parent / image, image, _stem(PurePath(PurePath(image).name)), ())
        task = tasks.get(new.source, new)
        tasks[task.source] = replace(task, phrases=(*task.phrases, phrase))
    if not tasks:
        raise DcrisError(f"the list {path} has no pairs of an image and a phrase; write one a line")
    return assign_names(tasks.values())


def assign_names(tasks: Iterable[Task], known: Mapping[str, str] | None = None) -> list[Task]:
    """Give each task a unique name, ignoring case: its known name, else "a", "a~2", ...

    No image is in a folder of a video's frames ("clip.frames"); that of extracted frames is
    "clip.frames~2" then.

    Names do not depend on which tasks are known if those have the names they got here, so a
    repeated call uses the same names.

    Args:
        tasks: their names may coincide.
        known: names of earlier calls by `Task.source`.
    """
    own = dict(known or {})
    taken, folders, of_frames = set[str](), set[str](), set[str]()
    numbers = defaultdict[Any, Iterator[int]](lambda: count(2))  # those before are not free, nor will they be

    def is_free(name: str, video: bool) -> bool:
        name = name.casefold()
        return not (name in taken or of_frames & _parents(name) or (video and frames_folder(name) in folders))

    def take(name: str, video: bool) -> None:
        name = name.casefold()
        taken.add(name)
        folders.update(_parents(name))
        of_frames.update({frames_folder(name)} if video else ())

    for source, earlier in own.items():
        take(earlier, _is_video(source_path(source)))
    result = []
    for task in tasks:
        name = own.pop(task.source, None)
        if name is None:
            inside = [folder for folder in _parents(task.name) if folder.casefold() in of_frames]
            place = inside[0] if inside else re.sub(r"~\d+$", "", task.name)  # what gets the number
            rest = task.name[len(place) :] if inside else ""
            more = numbers[place.casefold(), rest.casefold(), task.video]
            candidates = chain([task.name], (f"{place}~{number}{rest}" for number in more))
            name = next(name for name in candidates if is_free(name, task.video))
        take(name, task.video)
        result.append(replace(task, name=name))
    return result


def frames_folder(name: str) -> str:
    """Return the folder of the files of a video's frames; `name` is that of its task."""
    return f"{name}.frames"


def _parents(name: str) -> set[str]:
    """Return the folders of the files of a task with this name."""
    parts = name.split("/")
    return {"/".join(parts[:end]) for end in range(1, len(parts))}


def _is_video(path: PurePath) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def result_stem(stem: str, number: int, phrase: str) -> str:
    """Return the start of the names of the files for one phrase: "photo.0-blue-square".

    Args:
        stem: start of the names of the image's files.
        number: of the phrase, from 0.
        phrase: its letters and digits are kept, in any script.
    """
    letters = (
        letter if letter.isalnum() or unicodedata.category(letter).startswith("M") else " "
        for letter in unicodedata.normalize("NFC", phrase[:1000].lower())
    )
    words = _cut("-".join("".join(letters).split()), _LONGEST_PHRASE).rstrip("-")
    return f"{stem}.{number}-{words}" if words else f"{stem}.{number}"


def _files_of(
    place: Path, out: Path | None, recursive: bool | None, on_skipped: Callable[[str], None]
) -> Iterator[tuple[Path, PurePath]]:
    """Yield the files of a place, each with its name in results."""
    if place.is_dir():
        folders = _folders(place) if recursive else [place]
        found = sorted(path for folder in folders for path in folder.iterdir())
        images, others = _readable(found, image_endings(), out)
        if not images:
            more = "; add --recursive to search subfolders" if recursive is False else ""
            raise DcrisError(f"the folder {place} has no images in it{others and f'; it has {others}'}{more}")
        yield from ((path, path.relative_to(place)) for path in images)
    elif place.exists():
        yield place, PurePath(place.name)
        return
    elif address := re.fullmatch(r"(https?:/)/?(.*)", place.as_posix()):  # Path drops a slash
        raise DcrisError(f"{address[1]}/{address[2]} is an address; download the image, and give its file")
    elif glob.has_magic(place.as_posix()):
        found = sorted(set(_matches(place.as_posix())))
        files, others = _readable(found, image_endings() | VIDEO_ENDINGS, out)
        if not files:
            raise DcrisError(f"no image or video matches {place}{others and f'; it matches {others}'}")
        yield from ((path, PurePath(path.name)) for path in files)
    else:
        raise DcrisError(f"there is no file or folder {place}; check the name")
    if others:
        on_skipped(f"skipped in {place}: {others}")


def _readable(paths: Iterable[Path], endings: Set[str], out: Path | None) -> tuple[list[Path], str]:
    """Return the files with one of the endings, and a description of the other files.

    A broken link is returned, so that it is reported as missing. Hidden files are not counted.
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
            video = "give videos by name or by a pattern" if ending in VIDEO_ENDINGS else None
            reason = video or why_not_read(ending) or "not a readable image or video"
            others.setdefault(reason, Counter())[ending or "without ending"] += 1
    return files, "; ".join(f"{_counted(counts)} ({reason})" for reason, counts in others.items())


def _counted(endings: Counter[str]) -> str:
    shown = [f"{count} {ending}" for ending, count in endings.most_common(_MAX_LISTED)]
    more = endings.total() - sum(count for _, count in endings.most_common(_MAX_LISTED))
    return ", ".join([*shown, f"{more} others"] if more else shown)


def _is_result(path: Path, out: Path | None) -> bool:
    """Whether a file is a result of `dcris predict` (by name and folder), or unfinished."""
    if is_partial(path):
        return True
    folders = path.absolute().parents
    if not (_RESULT.fullmatch(path.name) or any(_DATA_SET.fullmatch(folder.name) for folder in (path, *folders))):
        return False
    return (out is not None and out.absolute() in folders) or any((folder / RECORDS).exists() for folder in folders)


def _matches(pattern: str) -> Iterator[Path]:
    """Yield the matches of a pattern.

    `**` visits each folder once; that of `glob` follows circular links.
    """
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
    if not after:
        yield from map(Path, glob.glob(pattern))  # noqa: PTH207 (Path.glob takes no absolute patterns)
        return
    for top in glob.glob(before) if before else ["."]:  # noqa: PTH207
        for folder in _folders(Path(top), hidden=False):
            yield from _matches(f"{glob.escape(folder.as_posix())}/{after[0] or '*'}")


def _folders(top: Path, hidden: bool = True) -> Iterator[Path]:
    """Yield a folder and its subfolders, each once, although links may be circular.

    Folders come before links to them.
    """
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


def _stem(shown: PurePath) -> str:
    """The preferred name of an image's files: its path without the ending, as short UTF-8 text."""
    # Not by PurePath: an image may be named "..png", and no path has the name ".".
    return "/".join(_cut(quoted(part)) for part in (*shown.parts[:-1], shown.stem))


def _cut(name: str, most: int = _LONGEST_NAME) -> str:
    return name if len(name.encode()) <= most else name.encode()[:most].decode(errors="ignore")


def _is_path(value: Any) -> bool:
    """Whether a value of a list is text that can be a file name."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can contain
        return False


def _table_pairs(path: Path, delimiters: str) -> Iterator[tuple[int, Any, Any]]:
    declared, text = declared_delimiter(_read_list(path))
    delimiter = declared or max(delimiters, key=lambda delimiter: _fit(text, delimiter))
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
                    raise DcrisError(
                        f"{path}, line {rows.line_num}: the header has a column image, but no column phrase; add it"
                    )
                image, phrase, width = header.index("image"), header.index(column), len(header)
            elif len(row) != width:
                advice = (
                    "separate image and phrase by a comma, a semicolon or a tab"
                    if len(row) < width
                    else f"quote phrases that contain a {_DELIMITER_NAMES.get(delimiter, repr(delimiter))}"
                )
                columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
                raise DcrisError(f"{path}, line {rows.line_num}: the line has {columns}, not {width}; {advice}")
            else:
                yield rows.line_num, row[image].strip(), row[phrase]
            first = False
    except csv.Error as error:
        raise DcrisError(f"{path}, line {rows.line_num}: not a valid table ({error}); correct that line") from error


def _fit(text: str, delimiter: str) -> tuple[bool, int, int]:
    """Rate a delimiter by: a header, the rows with an image name, the rows with two cells.

    csv.Sniffer is not used: it counts characters and may choose a space or the letter "e".
    """
    rows: list[list[str]] = []
    try:
        reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows += islice((row for row in reader if any(cell.strip() for cell in row)), 1000)
    except csv.Error:
        pass  # reported when the table is read
    pairs = [row for row in rows if len(row) == 2]
    images = sum(PurePath(image.strip()).suffix.lower() in image_endings() | VIDEO_ENDINGS for image, _ in pairs)
    return any(cell.strip().lower() == "image" for cell in chain(*rows[:1])), images, len(pairs)


def _json_pairs(path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, row in read_json_lines(path):
        keys = [key for key in _PHRASE_KEYS if isinstance(row, dict) and key in row]
        if not keys or "image" not in row:
            raise DcrisError(f"{path}, line {number}: not an object with `image` and `phrase` or `phrases`")
        if len(keys) > 1:
            raise DcrisError(
                f"{path}, line {number}: both `{keys[0]}` and `{keys[1]}` are given; write all in one list"
            )
        phrases = row[keys[0]] if isinstance(row[keys[0]], list) else [row[keys[0]]]
        if not phrases:
            raise DcrisError(f"{path}, line {number}: `{keys[0]}` is empty; give a phrase, or delete the line")
        yield from ((number, row["image"], phrase) for phrase in phrases)
