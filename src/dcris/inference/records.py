"""Records of the finished images and frames in an output folder, and checks of the folder.

Files in the folder (N is a rank other than 0):

    dcris-journal.jsonl, dcris-journal.N.jsonl    one JSON record per finished image or frame
    dcris-journal.unfinished.json, ...N...        files that are being written
    dcris-journal.lock                            locked while a call writes to the folder
    dcris-journal.state.json                      the model's files, and those of written data sets

A repeated call skips what has a record. Only files that these files name are ever deleted.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Annotated, Any, Self, TextIO
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dcris.data.table import is_utf8, quoted
from dcris.errors import DcrisError
from dcris.inference.inputs import RECORDS, RESULT_FILE, Task, assign_names, frames_folder, source_path
from dcris.utils.arguments import Refinement
from dcris.utils.distributed import Processes
from dcris.utils.files import (
    MAX_TEXT,
    lock_folder,
    make_directory,
    open_append,
    open_regular,
    parse_json,
    read_text,
    remove_partial,
    require_replaceable,
    write_file,
)

LOCK = "dcris-journal.lock"
_STATE = "dcris-journal.state.json"
_MOST_STATE = 32_000_000
"""Limit on its bytes: a data set of 300,000 images."""

_NAME = re.compile(r"dcris-journal(\.\d+)?\.jsonl")
_UNFINISHED_NAME = re.compile(r"dcris-journal(\.\d+)?\.unfinished\.json")

Stamp = tuple[int, int]
"""Size in bytes and modification time (ns) of a file."""

Number = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Strict(BaseModel):
    """A line that does not match exactly (damaged, or of another version) is not a record."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(_Strict):
    """Everything that a result depends on except the image and the phrases."""

    model: str
    """Fingerprint of the weights."""
    recipe: str
    precision: str
    threshold: float
    min_score: float = 0.0
    min_area: Number = 0
    refine: Refinement = "none"
    """This and the two above are left out of the record by default, so that earlier records stay
    valid."""
    formats: tuple[str, ...]
    every: Number | None
    """Step between the predicted frames of a video; None for images."""
    version: str

    def differences(self, now: "Settings") -> str:
        """List what differs from the settings of another call; empty if nothing does."""
        if self.model != now.model:
            return "another model"
        before, after = (
            {**each, "formats": " ".join(each["formats"])} for each in (self.model_dump(), now.model_dump())
        )
        names = {"version": "dcris"}
        return ", ".join(
            f"{names.get(key, key)} {before[key]} (now {after[key]})" for key in before if before[key] != after[key]
        )


class RunLengths(_Strict):
    """A mask as COCO's compressed run lengths."""

    size: tuple[Number, Number]
    counts: str


class Result(_Strict):
    """The entry of one phrase in a COCO result file."""

    image_id: Number
    category_id: Number
    phrase: str
    score: float
    bbox: tuple[Number, Number, Number, Number]
    segmentation: RunLengths
    present: float | None = None
    rejected: str | None = None
    unread: str | None = None


class Record(_Strict):
    """A finished image or frame, or the end of a video. All of its files are on disk."""

    name: str
    """The task's name for an image; the task's name and a suffix for a frame or the end of a
    video."""
    task: str
    """Start of its files' names, relative to the folder."""
    source: str
    """`Task.source`."""
    stamp: Stamp
    """Of the source when it was read."""
    file_name: str
    """Name of the image in predictions.json."""
    percent_encoded: bool
    """Whether `file_name` is percent-encoded because it is not UTF-8."""
    address: str
    """URL of the image for Label Studio."""
    place: Annotated[int, Field(ge=1, lt=1 << 53)]
    """Number of the image or video in this folder, from 1."""
    phrases: tuple[str, ...]
    settings: Settings
    size: tuple[Number, Number] | None = None
    """H and W in pixels."""
    files: tuple[str, ...] = ()
    """Its files, relative to the folder."""
    results: tuple[Result, ...] | None = None
    """One per phrase; None at the end of a video."""
    frame: Number | None = None
    time: float | None = None
    """Seconds from the start of the video."""
    frames: Number | None = None
    """At the end of a video: the number of predicted frames."""

    @property
    def video(self) -> bool:
        """Whether this is a frame or the end of a video."""
        return self.name != self.task

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        *folders, _ = self.task.split("/")
        if self.task.startswith("/") or ".." in folders or not self.name.startswith(self.task):
            raise ValueError("a name outside the folder")
        # Files of dropped records are deleted, so a record must not name any other file.
        if not all(file.startswith(f"{self.task}.") and _is_result_file(file) for file in self.files):
            raise ValueError("a file that is not a result of this task")
        if (self.results is None) != (self.frames is not None) or (self.size is None) != (self.results is None):
            raise ValueError("neither a result nor the end of a video")
        if self.results is not None and [result.phrase for result in self.results] != list(self.phrases):
            raise ValueError("other phrases than the task's")
        if any(result.segmentation.size != self.size for result in self.results or ()):
            raise ValueError("masks of another size")
        return self


class WrittenFolder(_Strict):
    """A folder that was written as a whole: a data set for an annotation tool."""

    records: str
    """SHA-256 of the records that it was made of."""
    files: dict[str, Stamp | None]
    """All of its files, by their paths in it."""


class State(_Strict):
    """What a folder of results knows beside its records. It may be lost: then a call takes longer,
    or refuses to replace a folder."""

    checkpoint: dict[str, Stamp | None] = {}
    """The files of the model of the last call, by path."""
    model: str = ""
    """Fingerprint of its weights."""
    records: str = ""
    """SHA-256 of the records that predictions.json and the files for Label Studio were made of."""
    folders: dict[str, WrittenFolder] = {}
    """By name."""
    coming: dict[str, WrittenFolder] = {}
    """By name, what takes a folder's place now, or already did if the process was killed then."""

    @classmethod
    def read(cls, out: Path) -> "State":
        """Read the state of a folder; an empty one if there is none, or it is damaged."""
        try:
            return cls.model_validate_json(read_text(out / _STATE, _MOST_STATE))
        except (OSError, ValidationError):
            return cls()

    def write(self, out: Path) -> None:
        """Write the state. Raises DcrisError if it cannot be written."""
        write_file(out / _STATE, self.model_dump_json() + "\n")


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, which changes with it; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def stamps(folder: Path) -> dict[str, Stamp | None]:
    """Return the stamps of all files below a folder, by their paths in it."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {quoted(path.relative_to(folder).as_posix()): stamp_of(path) for path in files}


def _alike(sources: Iterable[str], names: Mapping[str, str], stamps: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Group sources by name and stamp."""
    groups = defaultdict[Any, list[str]](list)
    for source in sources:
        groups[names[source], stamps[source]].append(source)
    return groups


class Records:
    """The record files of one folder.

    Each rank appends to its own file; the first rank merges them.

    A record is appended after its files are on disk. A line that was cut short is ignored.
    """

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out = out
        suffix = "" if rank == 0 else f".{rank}"
        self.path = out / f"dcris-journal{suffix}.jsonl"
        self.damaged = 0
        """Number of lines that the last `read` skipped because they are not valid records."""
        self._file: TextIO | None = None
        self._unfinished_path = out / f"dcris-journal{suffix}.unfinished.json"
        self._unfinished: dict[str, list[str]] = {}

    def read(self) -> dict[str, Record]:
        """Read the newest record of each name from all record files.

        Raises:
            DcrisError: a record file cannot be read.
        """
        self.damaged = 0
        paths = sorted(path for path in self.out.iterdir() if _NAME.fullmatch(path.name))
        return {record.name: record for path in paths for record in self._read_file(path)}

    def _read_file(self, path: Path) -> Iterator[Record]:
        try:
            with open_regular(path) as file:
                while line := file.readline(MAX_TEXT):
                    if not line.endswith(b"\n"):
                        return  # the writer was killed
                    try:
                        yield Record.model_validate_json(line)
                    except ValidationError:
                        self.damaged += 1
        except OSError as error:
            raise DcrisError(
                f"cannot read {path}: {error.strerror or error}; it lists the finished images, so restore it or choose "
                "another --out"
            ) from error

    def merge(self, all_records: Iterable[Record], kept: Iterable[Record]) -> None:
        """Write all records to the first rank's file, delete the others, then keep only some.

        The two steps are needed because the process may be killed in between: a record that is not
        kept would come back from another rank's file. Call it in one process, while no other rank
        writes.

        Raises:
            DcrisError: a file cannot be written.
        """
        others = [path for path in self.out.iterdir() if _NAME.fullmatch(path.name) and path.name != RECORDS]
        if others:
            self._write(all_records)
            for path in others:
                path.unlink(missing_ok=True)
        self._write(kept)
        for path in self._unfinished_files():
            path.unlink(missing_ok=True)

    def _write(self, records: Iterable[Record]) -> None:
        path, lines = self.out / RECORDS, "".join(map(_line, records))
        if lines:
            write_file(path, lines)
        else:
            require_replaceable(path)
            path.unlink(missing_ok=True)

    def begin(self, name: str, files: Iterable[str]) -> None:
        """Note the files that are about to be written, so that the next call can delete them.

        Files that exist already are not noted: they may be the user's own.
        """
        new = [file for file in files if not os.path.lexists(self.out / file)]
        if new:
            self._unfinished[name] = new
            write_file(self._unfinished_path, json.dumps(self._unfinished) + "\n")

    def add(self, record: Record) -> None:
        """Append a record whose files are on disk.

        Raises:
            DcrisError: the file cannot be written.
        """
        if self._file is None:
            self._file = open_append(self.path)
        try:
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free some space there or choose another place"
            ) from error
        if self._unfinished.pop(record.name, None) and not self._unfinished:
            self._unfinished_path.unlink(missing_ok=True)

    def unfinished(self, recorded: Iterable[str]) -> set[str]:
        """Return the files that killed calls began under names without a record.

        Args:
            recorded: names of all records. A call may be killed between `add` and the deletion of
                its note.
        """
        done, found = set(recorded), set[str]()
        for path in self._unfinished_files():
            with suppress(OSError, ValueError):  # cut short by the kill
                content = parse_json(read_text(path))
                for name, files in content.items() if isinstance(content, dict) else ():
                    if name not in done and isinstance(files, list):
                        found |= {file for file in files if isinstance(file, str) and _is_result_file(file)}
        return found

    def _unfinished_files(self) -> list[Path]:
        found = (path for path in self.out.iterdir() if _UNFINISHED_NAME.fullmatch(path.name))
        return [path for path in found if path.is_file() and not path.is_symlink()]

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class ResultFolder:
    """An output folder and the tasks of one call that are not finished there.

    No other call can write to the folder until `close`.

    Args:
        path: the folder; it is created if missing.
        tasks: the tasks of this call, from `find_tasks` or `read_pairs`.
        settings: this call's settings for images (False) and videos (True).
        image_url: prefix of the image names for Label Studio.
        overwrite: drop the records of these tasks, whatever their settings and phrases are.
        group: the ranks that share the work and the folder.

    Results for these images with other phrases, and of images that have changed, are dropped.

    Raises:
        DcrisError: the folder cannot be written, another process writes to it, or (without
            `overwrite`) it holds results with other settings.
    """

    def __init__(
        self,
        path: Path,
        tasks: Sequence[Task],
        settings: Mapping[bool, Settings],
        *,
        image_url: str,
        overwrite: bool,
        group: Processes,
    ) -> None:
        self.path, self._settings, self._image_url = make_directory(path), settings, image_url
        self._records = Records(path, group.rank)
        self._stamps = {task.source: stamp_of(task.path) for task in tasks}
        self.notes: list[str] = []
        """Lines about the folder, which the first rank prints before the work begins."""
        self.dropped_formats: set[str] = set()
        """Formats of the records that this call dropped."""
        self._places: dict[str, int] = {}
        with ExitStack() as stack:
            if group.first:
                stack.enter_context(lock_folder(path, LOCK))
            self.tasks, self._places = group.from_first(lambda: self._prepare(list(tasks), overwrite))
            self._lock = stack.pop_all()
        records = self._records.read().values()
        self.done = {record.name: record.frames for record in records if self.is_current(record)}
        """Names of this call's finished images, frames and videos, with `Record.frames`."""
        group.all_gather(None)  # no rank may add records before all ranks have read them

    def close(self) -> None:
        """Close this rank's record file and release the folder."""
        self._records.close()
        self._lock.close()

    def records(self) -> list[Record]:
        """All records, in the order of images and frames."""
        return sorted_records(self._records.read().values())

    def addresses(self) -> dict[str, str]:
        """Return the URL for Label Studio of each image that has or gets a record, by source."""
        recorded = {record.source: record.address for record in self._records.read().values() if not record.video}
        return recorded | {
            task.source: _description(task, self._image_url)["address"] for task in self.tasks if not task.video
        }

    def is_current(self, record: Record) -> bool:
        """Whether a record is of one of these tasks and its source file has not changed."""
        return self._stamps.get(record.source) == record.stamp

    def begin(self, name: str, files: Iterable[str]) -> None:
        """Note the files that are about to be written; see `Records.begin`."""
        self._records.begin(name, files)

    def add(self, task: Task, name: str, **fields: Any) -> Record:
        """Record a finished image or frame, or the end of a video, and return the record.

        `fields` are fields of `Record`.
        """
        record = {
            "name": name,
            "task": task.name,
            "source": task.source,
            "stamp": self._stamps[task.source] or (0, 0),
            "place": self._places[task.source],
            "phrases": task.phrases,
            "settings": self._settings[task.video].model_dump(),
            **_description(task, self._image_url),
            **fields,
        }
        added = Record.model_validate_json(json.dumps(record))  # validated as `read` will validate it
        self._records.add(added)
        return added

    def _prepare(self, tasks: list[Task], overwrite: bool) -> tuple[list[Task], dict[str, int]]:
        """Delete outdated results.

        Return the tasks with their names in this folder, and the number of each source.
        """
        before = list(self._follow_moved(tasks, self._records.read().values()))
        if damaged := self._records.damaged:
            self.notes.append(f"{self._records.path} has {damaged} damaged lines; their images are predicted again")
        if not overwrite:
            self._refuse_other_settings(before)
        tasks = assign_names(tasks, {record.source: record.task for record in before})
        places = {record.source: record.place for record in before}
        used = set(places.values())
        free = (place for place in count(1) if place not in used)
        for task in tasks:
            if task.source not in places:
                places[task.source] = next(free)
        by_source = {task.source: task for task in tasks}
        kept, dropped, other_phrases = [], [], set[str]()
        for record in before:
            own = by_source.get(record.source)
            if own is None or self._stamps[own.source] is None:  # the results of a deleted image stay
                kept.append(record)
            elif own.phrases != record.phrases:
                other_phrases.add(record.source)
                dropped.append(record)
            elif not overwrite and self.is_current(record) and self._has_files(record):
                kept.append(record.model_copy(update=_description(own, self._image_url)))
            else:
                dropped.append(record)
        if other_phrases:
            self.notes.append(
                f"{self.path} has results for {len(other_phrases)} of the images with other phrases, which are replaced"
            )
        self.dropped_formats = {name for record in dropped for name in record.settings.formats}
        self._note_other_settings(kept)
        self._delete_outdated(tasks, kept, dropped)
        self._records.merge(before, kept)
        return tasks, places

    def _follow_moved(self, tasks: Iterable[Task], records: Iterable[Record]) -> Iterator[Record]:
        """Update the source of images that were moved (same name, size and modification time).

        If several images agree in that, their names in the results, which have the folders, decide;
        otherwise they are predicted again, as none may get another's masks.
        """
        records = list(records)
        now = {record.source: record.source for record in records}
        new = {task.source: task.name for task in tasks if task.source not in now}
        gone = {record.source: record.task for record in records if record.source not in self._stamps}
        stamps = {**self._stamps, **{record.source: record.stamp for record in records}}
        for names in (new | gone, {source: PurePath(source).name for source in (*new, *gone)}):
            arrived, left = (_alike(some, names, stamps) for some in (new, gone))
            for key in arrived.keys() & left.keys():
                before = [source for source in left[key] if not os.path.lexists(source_path(source))]
                if len(before) == len(arrived[key]) == 1:
                    now[before[0]] = arrived[key][0]
                    del gone[before[0]], new[arrived[key][0]]
        for record in records:
            yield record.model_copy(update={"source": now[record.source]})

    def _refuse_other_settings(self, records: Iterable[Record]) -> None:
        """Raise DcrisError if the folder holds results that must not be mixed with this call's."""
        for record in records:
            if differences := self._differences(record):
                raise DcrisError(
                    f"{self.path} holds results made with {differences}; choose another --out, or add --overwrite to "
                    "replace the results for the images of this call"
                )

    def _differences(self, record: Record) -> str:
        """List the differences between a record's settings and this call's."""
        now = self._settings[record.video]
        if record.source not in self._stamps:  # videos of other calls may have another frame step
            now = now.model_copy(update={"every": record.settings.every})
        return record.settings.differences(now)

    def _note_other_settings(self, kept: Iterable[Record]) -> None:
        """Add a note if results with other settings stay (only possible with `overwrite`)."""
        others = {record.source: words for record in kept if (words := self._differences(record))}
        if others:
            self.notes.append(
                f"{self.path} keeps its results for {len(others)} other images, made with {next(iter(others.values()))}"
            )

    def _has_files(self, record: Record) -> bool:
        return all((self.path / file).is_file() for file in record.files)

    def _delete_outdated(self, tasks: Iterable[Task], kept: Iterable[Record], dropped: Iterable[Record]) -> None:
        """Delete the files of dropped records and of killed calls, and no other file."""
        kept = list(kept)
        files = {file for record in dropped for file in record.files}
        files |= self._records.unfinished(record.name for record in chain(kept, dropped))
        for file in files - {file for record in kept for file in record.files}:
            path = self.path / file
            if path.is_file() and not path.is_symlink():
                path.unlink()
        # By text: an image may be named "..png", and the parent of `path / "."` is the parent of
        # `path`.
        folders = {self.path, *(self.path / task.name.rpartition("/")[0] for task in tasks)}
        folders |= {self.path / frames_folder(task.name) for task in tasks}
        for folder in folders:
            if folder.is_dir():
                remove_partial(folder)


def checksum(records: Iterable[Record]) -> str:
    """Return the SHA-256 of records, to see whether files are of these records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_line(record).encode())
    return digest.hexdigest()


def sorted_records(records: Iterable[Record]) -> list[Record]:
    """Return records in the order of images and frames."""
    return sorted(records, key=lambda record: (record.place, record.frame or 0))


def finished_records(
    records: Records,
    found: Mapping[str, Record],
    tasks: Sequence[Task],
    settings: Mapping[bool, Settings],
    image_url: str,
) -> list[Record] | None:
    """Return the records of tasks that a folder has all results of, with these settings, or None.

    Nothing is changed.

    Args:
        records: of the folder.
        found: what `records.read()` has just returned.
        tasks, settings, image_url: as for `ResultFolder`.
    """
    if records.damaged or records.unfinished(found):
        return None
    by_source: dict[str, list[Record]] = {}
    for record in found.values():
        by_source.setdefault(record.source, []).append(record)
    finished = []
    for task in tasks:
        own, stamp, description = by_source.get(task.source, []), stamp_of(task.path), _description(task, image_url)
        frames = sum(record.frame is not None for record in own)
        ends = [record.frames for record in own if record.results is None]
        for record in own:
            unchanged = stamp == record.stamp and record == record.model_copy(
                update={**description, "phrases": task.phrases, "settings": settings[task.video]}
            )
            if not unchanged or not all((records.out / file).is_file() for file in record.files):
                return None
        if not own or (task.video and ends != [frames]):
            return None
        finished += sorted(own, key=lambda record: record.frame or 0)
    return finished


def _description(task: Task, image_url: str) -> dict[str, Any]:
    """The fields of a record that may change while its results stay valid."""
    return {
        "file_name": quoted(task.shown),
        "percent_encoded": not is_utf8(task.shown),
        "address": image_url + quote(os.fsencode(PurePath(task.shown).as_posix())),
    }


def _is_result_file(file: str) -> bool:
    """Whether a path in a record is inside the folder and has the name of a result."""
    return (
        not file.startswith("/")
        and ".." not in file.split("/")
        and re.fullmatch(RESULT_FILE, file, re.DOTALL) is not None
    )


def _line(record: Record) -> str:
    return record.model_dump_json(exclude_defaults=True) + "\n"
