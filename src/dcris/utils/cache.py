"""What dcris keeps between commands, in $DCRIS_CACHE (default: ~/.cache/dcris).

Checksums of large weights take longer than all else that a command does before it predicts, so they
are remembered for as long as the file does not change: by path, size, inode and the two times of
its last change. The second time, ctime, cannot be set back, so other content is noticed.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcris.errors import DcrisError
from dcris.utils.files import expand_home, make_directory, read_json, write_json

_FILE = "checksums.json"
_MOST = 100
"""Entries that are kept; the oldest is dropped first."""
_SETTLED = 2 * 10**9
"""Nanoseconds after a change until a file system surely shows the next one by another time."""


def cache_folder() -> Path:
    """Return the folder of what dcris keeps between commands: $DCRIS_CACHE or ~/.cache/dcris.

    Raises DcrisError if it is unknown or cannot be written.
    """
    advice = "set DCRIS_CACHE to a folder for converted checkpoints and HF_HOME to one for downloads"
    folder = expand_home(os.environ.get("DCRIS_CACHE") or "~/.cache/dcris", advice)
    try:
        return make_directory(folder)
    except DcrisError as error:
        raise DcrisError(f"{error}; {advice}") from error


@dataclass(frozen=True, slots=True)
class FileState:
    """A file and what changes with its content."""

    path: Path
    numbers: tuple[int, ...]
    """Device, inode, size in bytes, mtime and ctime in ns."""


def file_state(path: Path) -> FileState:
    """Return the state of a file. Call it before the file is read."""
    found = path.stat()
    numbers = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return FileState(path.absolute(), numbers)


def remembered(state: FileState, what: str, compute: Callable[[], str]) -> str:
    """Return `compute()`, or what it returned for this file the last time.

    A file that another process replaced meanwhile is neither trusted nor remembered.

    Args:
        state: of the file that the result depends on, from before it was read.
        what: all else that it depends on.
        compute: returns the result, such as a checksum.
    """
    key = hashlib.sha256(repr((state, what)).encode()).hexdigest()
    entries = _read()
    if key in entries and file_state(state.path) == state:
        return entries[key]
    result = compute()
    *_, changed = state.numbers
    if time.time_ns() - changed > _SETTLED and file_state(state.path) == state:
        entries[key] = result
        with suppress(DcrisError):
            write_json(cache_folder() / _FILE, dict(list(entries.items())[-_MOST:]))
    return result


def _read() -> dict[str, str]:
    """Return the entries; none where there is no file, or a damaged one."""
    with suppress(DcrisError):
        found = read_json(cache_folder() / _FILE, "the known checksums")
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return {}
