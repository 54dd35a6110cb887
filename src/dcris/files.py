"""Files that are either whole or not there: every result dcris writes goes through here.

A run may be killed, or the disk may fill, at any moment. Each writer therefore fills a neighbour with a temporary name and
renames it over the target, which the file system does in one step. What a killed writer leaves is a neighbour, never half a
target, and `remove_partial` knows it by its name.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dcris.errors import DcrisError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"
"""In the name of every file or directory that is not whole yet, or about to be deleted."""


def _cannot_write(path: Path, error: OSError) -> DcrisError:
    return DcrisError(f"cannot write {path}: {error.strerror or error}; free some space there or choose another place")


def make_directory(path: Path) -> Path:
    """Create `path` and its parents where they are missing, and return it. Raises DcrisError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def write_file(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write one file atomically; `content` is its bytes, its text, or a function that writes to the path it is given.

    Raises DcrisError where the disk is full or the place cannot be written to; the old file then stays as it was.
    """
    make_directory(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{_PARTIAL}", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a whole directory atomically: `fill` puts files into a temporary neighbour, which then takes the place of `path`.

    Raises DcrisError where that cannot be done; a directory that stood at `path` before then stays as it was.
    """
    make_directory(path.parent)
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_PARTIAL}"))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        fill(temporary)
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        temporary.chmod(0o755)
        sync_directory(temporary)
        if path.exists():  # a rename cannot replace a directory that holds something
            retired = path.with_name(f".{path.name}.old")  # no partial one: after a kill it is the only copy
            shutil.rmtree(retired, ignore_errors=True)
            path.rename(retired)
            try:
                temporary.rename(path)
            except OSError:
                retired.rename(path)
                raise
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory: first its name, in one step, then what is in it, so that a kill leaves no half of it in its place.

    What cannot be deleted stays.
    """
    retired = path.with_name(f".{path.name}{_PARTIAL}old")
    shutil.rmtree(retired, ignore_errors=True)
    try:
        path.rename(retired)
    except OSError:
        return
    shutil.rmtree(retired, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Delete what writers that were killed left in a folder, though not in the folders in it."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Have the disk hold the names in a folder, too, and not only the files: else a power failure undoes a rename."""
    if os.name == "nt":  # where a directory cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some network file systems cannot, and do it by themselves
            raise
    finally:
        os.close(handle)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have a folder to oneself; the claim ends with the context or the process, however that ends.

    Raises DcrisError where another process has it or where it cannot be written to. Where the file system has no locks,
    nobody is kept out.
    """
    path = make_directory(folder) / "lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise _cannot_write(path, error) from error
    with file:
        # A POSIX lock belongs to the process. Of flock's, workers would inherit a share, and outlive a killed process with it.
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise DcrisError(
                    f"another process ({file.read(200).strip() or 'unknown'}) is at work in {folder}; wait for it to end, stop "
                    "it, or choose another place"
                ) from error
            except OSError:
                pass
        with suppress(OSError):  # a full disk; who is at work is good to know, and no more
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and for good. NaN is refused: it is not JSON."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    try:
        sync_directory(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_json(path: Path, what: str, each_object: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file; `what` names it in the error ("the run's configuration").

    `each_object` is given every object of the file as soon as it is read, and returns what takes its place.

    Raises DcrisError where the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=each_object)
    except FileNotFoundError as error:
        raise DcrisError(f"{what} is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read {what}, {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DcrisError(
            f"{what}, {path}, is not valid JSON ({error}); it may be cut short, so fetch or make it again"
        ) from error
