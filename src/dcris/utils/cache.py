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


def remembered(path: Path, what: str, compute: Callable[[], str]) -> str:
    """Return `compute()`, or what it returned for this file the last time.

    Args:
        path: the file that the result depends on.
        what: all else that it depends on.
        compute: returns the result, such as a checksum.
    """
    status = path.stat()
    facts = (
        str(path.absolute()),
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        what,
    )
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    entries = _read()
    if key not in entries:
        entries[key] = compute()
        if time.time_ns() - status.st_ctime_ns > _SETTLED:
            with suppress(DcrisError):
                write_json(cache_folder() / _FILE, dict(list(entries.items())[-_MOST:]))
    return entries[key]


def _read() -> dict[str, str]:
    """Return the entries; none where there is no file, or a damaged one."""
    with suppress(DcrisError):
        found = read_json(cache_folder() / _FILE, "the known checksums")
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return {}
