"""Files: what a user names is opened here, and every result is written here, whole or not at all.

A run may be killed, or the disk may fill, at any moment. Each writer therefore fills a neighbour with a temporary name and
renames it over the target, which the file system does in one step. What a killed writer leaves is a neighbour, never half a
target, and `remove_partial` knows it by its name.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dcris.errors import DcrisError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"
"""In the name of every file or directory that is not whole yet, or about to be deleted."""

MAX_TEXT = 1_000_000_000
"""Bytes of a text or JSON file that are accepted. COCO's largest annotation file has 0.45 GB."""


def _cannot_write(path: Path, error: OSError) -> DcrisError:
    return DcrisError(f"cannot write {path}: {error.strerror or error}; free some space there or choose another place")


def make_directory(path: Path) -> Path:
    """Create `path` and its parents where they are missing, and return it. Raises DcrisError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a file for reading, in binary. Every file that a user or a data set names is opened here.

    A pipe would block for ever, and a device such as /dev/zero has no end: only regular files, and links to them, are opened.

    Args:
        path: the file.
        most: the largest size to accept, in bytes; None accepts any. The file may still grow, so readers that load all of it
            use `read_bytes`, which stops there.

    Raises OSError, with the reason as its `strerror`, where the file is missing, unreadable, not regular or too large.
    """
    _require_regular(path, path.stat())  # before it is opened: opening some devices has effects
    # O_NONBLOCK: if a pipe has taken its place meanwhile, opening it does not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        found = os.fstat(file.fileno())
        _require_regular(path, found)
        if most is not None and found.st_size > most:
            raise _too_large(path, most)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError as `open_regular` does."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _too_large(path, most)
    return content


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """The text of a regular file in UTF-8, with or without the byte order mark that Windows programs write.

    Raises OSError as `open_regular` does, and UnicodeDecodeError (a ValueError) where the file is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8-sig")


def kind_of_file(mode: int) -> str:
    """The kind of a file with this `st_mode` in words, "a folder" for example."""
    kinds = {
        stat.S_ISREG: "a regular file",
        stat.S_ISDIR: "a folder",
        stat.S_ISLNK: "a link",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next((words for test, words in kinds.items() if test(mode)), "a device")


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    raise OSError(errno.ENXIO, f"it is {kind_of_file(found.st_mode)}, not a regular file", str(path))


def _too_large(path: Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than the {most / 1e6:,.0f} MB that are accepted", str(path))


def _temporary(path: Path) -> Path:
    """A free name beside `path`, with its ending, by which some writers choose their format. It is at most 200 bytes long."""
    start = os.fsencode(path.name)[:100].decode(errors="ignore")
    ending = path.suffix if len(os.fsencode(path.suffix)) <= 20 else ""
    return path.with_name(f".{start}{_PARTIAL}{secrets.token_hex(4)}{ending}")


def _require_replaceable(path: Path, allowed: Callable[[int], bool]) -> None:
    """Raise DcrisError where something else than the `allowed` kind of file is in the place of a result."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is missing, or what is wrong with its folder is reported by the writer
        return
    if not allowed(mode):
        raise DcrisError(
            f"cannot write {path}: {kind_of_file(mode)} of this name exists and is kept; choose another name"
        )


def write_file(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write one file atomically; `content` is its bytes, its text, or a function that writes to the path it is given.

    Its permissions are those of any new file (the process's umask). Raises DcrisError where the disk is full, the place cannot
    be written to, or holds something else than a regular file (a link, pipe or device); what is there stays as it was.
    """
    make_directory(path.parent)
    _require_replaceable(path, stat.S_ISREG)
    temporary = _temporary(path)
    try:
        # Not by tempfile: its files are for their owner alone, whatever the umask.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # some writers (safetensors) put a file of their own in its place
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a whole directory atomically: `fill` puts files into a temporary neighbour, which then takes the place of `path`.

    Permissions are those of any new file (the process's umask). Raises DcrisError where that cannot be done, or where `path`
    is something else than a directory; a directory that stood at `path` before then stays as it was.
    """
    make_directory(path.parent)
    _require_replaceable(path, stat.S_ISDIR)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        fill(temporary)
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            file.chmod(mode)  # safetensors makes files that only their owner can read
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


def is_partial(path: Path) -> bool:
    """Whether `path` is, by its name, a file or directory that a writer has not finished."""
    return path.name.startswith(".") and _PARTIAL in path.name


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
        return json.loads(read_text(path), object_hook=each_object)
    except FileNotFoundError as error:
        raise DcrisError(f"{what} is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read {what}, {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DcrisError(
            f"{what}, {path}, is not valid JSON ({error}); it may be cut short, so fetch or make it again"
        ) from error
