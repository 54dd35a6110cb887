"""What is done already: a line for each image or frame, so that work that was stopped goes on where it was."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dcris.errors import DcrisError
from dcris.files import write_file

Entry = dict[str, Any]
"""What was done under one name: "name", "source", "stamp", and what `Job` adds."""

JOURNAL = "dcris-journal.jsonl"
"""The first journal of a folder; each further process has one with its number."""
_NAME = re.compile(r"dcris-journal(\.\d+)?\.jsonl")


class Journal:
    """The journals of one folder: each process appends to one of its own, and the first brings them together.

    A line is there only after everything that it speaks of is on disk, and one that was cut short is no line. The first line of
    a journal holds the settings: what was made with others counts for nothing.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.out = out
        self.settings = settings
        self.path = out / (JOURNAL if rank == 0 else f"dcris-journal.{rank}.jsonl")
        self._file: TextIO | None = None

    def gather(self, wanted: Callable[[Entry], bool]) -> None:
        """Keep in the first journal those entries of all of them that are `wanted`, and remove the others.

        For one process alone, while no other writes. Raises DcrisError where the disk does not let it.
        """
        kept = {entry["name"]: entry for entry in self.read() if wanted(entry)}
        if kept:
            lines = [self._line(self._header()), *(self._line(entry) for entry in kept.values())]
            write_file(self.out / JOURNAL, "".join(lines))
        for path in self._paths():
            if not kept or path.name != JOURNAL:
                path.unlink(missing_ok=True)

    def read(self) -> Iterator[Entry]:
        """All entries that were made with these settings, in no order that means anything."""
        for path in self._paths():
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file):
                    # Of a process that was killed while it wrote, the last line may be cut short.
                    entry = _parse(line) if line.endswith("\n") else None
                    if number == 0 and entry != self._header():
                        break
                    if number and entry is not None and isinstance(entry.get("name"), str):
                        yield entry

    def add(self, entry: Entry) -> None:
        """Note what is done. Raises DcrisError where the disk does not let it."""
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(self._line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free some space there or choose another place"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        file = self.path.open("a", encoding="utf-8")
        if file.tell() == 0:
            file.write(self._line(self._header()))
        return file

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.out.iterdir() if _NAME.fullmatch(path.name))

    def _header(self) -> Entry:
        return {"settings": dict(self.settings)}

    @staticmethod
    def _line(entry: Entry) -> str:
        return json.dumps(entry, allow_nan=False) + "\n"


def _parse(line: str) -> Entry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
