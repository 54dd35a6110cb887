"""What dcris keeps between commands, in $DCRIS_CACHE (default: ~/.cache/dcris).

Checksums of large weights take longer than all else that a command does before it predicts, so they
are remembered for as long as the file does not change: by path, size, inode and the two times of
its last change. The second time, ctime, cannot be set back, so other content is noticed. The file
with the checksums belongs to one user: what others could have written is not used.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcris.errors import DcrisError
from dcris.utils.files import expand_home, make_directory, open_regular, parse_json, write_file

_FILE = "checksums.json"
_MOST = 100
"""Entries that are kept; the oldest is dropped first."""
_LARGEST = 1_000_000
"""Most bytes of the file. The entries that are kept take about 14,000."""
_NOTICED = os.name != "nt"
"""Whether ctime is the time of the last change. On Windows it is that of the creation, so nothing
is remembered there."""
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
    if key in entries and _is_unchanged(state):
        return entries[key]
    result = compute()
    *_, changed = state.numbers
    if _NOTICED and time.time_ns() - changed > _SETTLED and _is_unchanged(state):
        entries[key] = result
        with suppress(DcrisError):
            content = json.dumps(dict(list(entries.items())[-_MOST:]), indent=2)
            write_file(cache_folder() / _FILE, content + "\n", mode=0o644)
    return result


def _is_unchanged(state: FileState) -> bool:
    with suppress(OSError):  # it was removed meanwhile
        return file_state(state.path) == state
    return False


def _read() -> dict[str, str]:
    """Return the entries; none where there is no file, or a damaged one, or one of other users."""
    with suppress(DcrisError, OSError, ValueError):
        found = parse_json(read_own(cache_folder() / _FILE, _LARGEST).decode())
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return {}


def read_own(path: Path, most: int) -> bytes:
    """Return the first `most` bytes of a file in the cache folder.

    Raises OSError if it cannot be read, is larger, or other users can have written it.
    """
    with open_regular(path, most) as file:
        if not _is_own(os.fstat(file.fileno())):
            raise PermissionError(f"other users can have written {path}")
        return file.read(most)


def _is_own(found: os.stat_result) -> bool:
    """Return whether only this user or the administrator can have written a file.

    DCRIS_CACHE may be a folder that several users share."""
    owners = (0, os.geteuid()) if hasattr(os, "geteuid") else (found.st_uid,)
    return found.st_uid in owners and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
