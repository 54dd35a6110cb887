"""The journal of a folder of results: a line for each image or frame that is done, so that a repeated call skips it."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dcris.errors import DcrisError
from dcris.utils.files import MAX_TEXT, open_append, open_regular, require_replaceable, write_file

JOURNAL = "dcris-journal.jsonl"
"""The first journal of a folder; each further process has one with its number."""

LOCK = "dcris-journal.lock"
"""The file by whose lock one call at a time writes to a folder."""

_NAME = re.compile(r"dcris-journal(\.\d+)?\.jsonl")

Number = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Strict(BaseModel):
    """Lines may be damaged, or of another version: what is not exactly as described here is no entry."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Settings(_Strict):
    """What an answer depends on, beside the photograph and the phrases."""

    model: str
    """The fingerprint of the weights."""
    recipe: str
    precision: str
    threshold: float
    formats: tuple[str, ...]
    every: Number | None
    """Of a video, the first of so many frames is asked about."""
    version: str

    def differences(self, now: "Settings") -> str:
        """What differs from the settings of another call, in words; empty where nothing does."""
        if self.model != now.model:
            return "another model"
        before, after = (
            {**each, "formats": " ".join(each["formats"])} for each in (self.model_dump(), now.model_dump())
        )
        names = {"version": "dcris"}
        return ", ".join(
            f"{names.get(key, key)} {before[key]} (now {after[key]})" for key in before if before[key] != after[key]
        )


class Lengths(_Strict):
    """A mask in COCO's compressed run lengths."""

    size: tuple[Number, Number]
    counts: str


class Result(_Strict):
    """One phrase's entry in a COCO result file."""

    image_id: Number
    category_id: Number
    phrase: str
    score: float
    bbox: tuple[Number, Number, Number, Number]
    segmentation: Lengths


class Entry(_Strict):
    """What was done under one name. Its files are on disk."""

    name: str
    """Of an image, its task's name; of a frame and of a video's end, something behind that."""
    task: str
    """The start of its files' names, from the folder of the results."""
    source: str
    """`Task.source`."""
    stamp: tuple[int, int]
    """Of the source, when it was read."""
    file_name: str
    """What results call it."""
    percent_encoded: bool
    """Whether `file_name` stands for bytes that are not UTF-8."""
    address: str
    """Where Label Studio finds it."""
    place: Annotated[int, Field(ge=1, lt=1 << 53)]
    """Its number among the images and videos of this folder."""
    phrases: tuple[str, ...]
    settings: Settings
    size: tuple[Number, Number] | None = None
    files: tuple[str, ...] = ()
    results: tuple[Result, ...] | None = None
    frame: Number | None = None
    time: float | None = None
    frames: Number | None = None
    """At a video's end: how many frames were asked about."""

    @property
    def video(self) -> bool:
        """Whether it is a frame or the end of a video."""
        return self.name != self.task

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        *folders, _ = self.task.split("/")
        if self.task.startswith("/") or ".." in folders or not self.name.startswith(self.task):
            raise ValueError("a name outside the folder")
        if (self.results is None) != (self.frames is not None) or (self.size is None) != (self.results is None):
            raise ValueError("neither an answer nor an end")
        if self.results is not None and [result.phrase for result in self.results] != list(self.phrases):
            raise ValueError("other phrases than those that were asked")
        if any(result.segmentation.size != self.size for result in self.results or ()):
            raise ValueError("masks of another size")
        return self


class Journal:
    """The journals of one folder: each process appends to one of its own, and the first brings them together.

    A line is written only after the files that it names, and one that was cut short is ignored.
    """

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out = out
        self.path = out / (JOURNAL if rank == 0 else f"dcris-journal.{rank}.jsonl")
        self.damaged = 0
        """Lines that `read` has left out, as they are no entries of this version."""
        self._file: TextIO | None = None

    def read(self) -> dict[str, Entry]:
        """All entries by name, the newest of each.

        Raises DcrisError where a journal cannot be read.
        """
        self.damaged = 0
        return {entry.name: entry for path in self._paths() for entry in self._entries(path)}

    def _entries(self, path: Path) -> Iterator[Entry]:
        try:
            with open_regular(path) as file:
                while line := file.readline(MAX_TEXT):
                    if not line.endswith(b"\n"):
                        return  # its writer was killed
                    try:
                        yield Entry.model_validate_json(line)
                    except ValidationError:
                        self.damaged += 1
        except OSError as error:
            raise DcrisError(
                f"cannot read {path}: {error.strerror or error}; it lists what is done, so restore it, or choose another folder"
            ) from error

    def gather(self, all_entries: Iterable[Entry], kept: Iterable[Entry]) -> None:
        """Bring all that were read together in the first journal, and then keep only some there.

        In two steps, since a kill may come between: else an entry that is not kept would come back from another journal.
        For one process alone, while no other writes. Raises DcrisError where the disk does not let it.
        """
        others = [path for path in self._paths() if path.name != JOURNAL]
        if others:
            self._write(all_entries)
            for path in others:
                path.unlink(missing_ok=True)
        self._write(kept)

    def _write(self, entries: Iterable[Entry]) -> None:
        path, lines = self.out / JOURNAL, "".join(map(_line, entries))
        if lines:
            write_file(path, lines)
        else:
            require_replaceable(path)
            path.unlink(missing_ok=True)

    def add(self, entry: Entry) -> None:
        """Note what is done. Raises DcrisError where the disk does not let it."""
        if self._file is None:
            self._file = open_append(self.path)
        try:
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free some space there or choose another place"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if _NAME.fullmatch(path.name))


def _line(entry: Entry) -> str:
    return entry.model_dump_json(exclude_defaults=True) + "\n"
