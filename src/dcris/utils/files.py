"""Files: what a user names is opened here, and every result is written here, whole or not at all.

A run may be killed, or the disk may fill, at any moment. Each writer therefore fills a neighbour with a temporary name and
renames it over the target, which the file system does in one step. What a killed writer leaves is a neighbour, never half a
target, and `remove_partial` knows it by its name.
"""

import codecs
import errno
import json
import os
import secrets
import shutil
import socket
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO

from dcris.errors import DcrisError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"
"""In the name of every file or directory that is not whole yet, or about to be deleted."""

MAX_TEXT = 1_000_000_000
"""Bytes of a text or JSON file that are accepted. COCO's largest annotation file has 0.45 GB."""

MAX_LINE = 16 << 20
"""Bytes of a line of JSON Lines that are accepted. A mask that takes more is better kept as a picture."""

_MAX_BRACKETS = 1_000_000
"""Opening brackets that are accepted in JSON of any length; see `_refuse_dense`."""


def _cannot_write(path: Path, error: OSError) -> DcrisError:
    return DcrisError(f"cannot write {path}: {error.strerror or error}; free some space there or choose another place")


def make_directory(path: Path) -> Path:
    """Create `path` and its parents where they are missing, and return it. Raises DcrisError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def expand_home(path: str | Path, instead: str = "give the path in full") -> Path:
    """The path with a leading `~` or `~user` replaced by that home folder.

    Raises DcrisError, ending in `instead`, where that is not known: users of containers may have no entry in passwd.
    """
    plain = Path(path)
    try:
        return plain.expanduser()
    except RuntimeError as error:
        if plain.exists():  # a file whose name starts with ~
            return plain
        raise DcrisError(f"the home folder in {path} is not known, as HOME is not set; set it, or {instead}") from error


def open_regular(path: Path, most: int | None = None) -> BufferedReader:
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
    content = b""
    with open_regular(path, most) as file:
        # Not read(most + 1), which allocates that much for any file. A file that grows takes more turns.
        size = min(most, os.fstat(file.fileno()).st_size)
        while len(content) <= most and (part := file.read(min(size, most - len(content)) + 1)):
            content += part
    if len(content) > most:
        raise _too_large(path, most)
    return content


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """The text of a regular file in UTF-8, with or without the byte order mark that Windows programs write.

    Raises OSError, with the reason as its `strerror`, as `open_regular` does and where the file is not UTF-8.
    """
    content = read_bytes(path, most)
    _refuse_utf16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(
            errno.EILSEQ, f"it is not UTF-8 text (from byte {error.start + 1} on); save it as UTF-8", str(path)
        ) from error


def _refuse_utf16(path: Path, start: bytes) -> None:
    """Raise OSError where a file begins as UTF-16 does, with its byte order mark or a letter of two bytes."""
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (start[1:2] == b"\0" and start[:1] != b"\0"):
        raise OSError(
            errno.EILSEQ,
            "it is UTF-16 text, which `>` of Windows PowerShell 5 writes, for one; save it as UTF-8",
            str(path),
        )


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file for reading, with members that are stored or deflated.

    Other compressions may take any amount of memory before the first byte (LZMA's dictionary). Callers bound the size of a
    member.

    Raises OSError, with the reason as its `strerror`, as `open_regular` does and where it is no such zip file.
    """
    file = open_regular(path)
    try:
        archive = zipfile.ZipFile(file)
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in archive.infolist()):
            raise ValueError("its compression is another than deflate")
    except Exception as error:  # a damaged archive makes its reader raise nearly anything
        file.close()
        raise OSError(errno.EINVAL, f"it is not a zip file that can be read ({error})", str(path)) from error
    return archive


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


def require_replaceable(path: Path, allowed: Callable[[int], bool] = stat.S_ISREG) -> None:
    """Raise DcrisError where something else than the `allowed` kind of file is in the place of a result."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is missing, or what is wrong with its folder is reported by the writer
        return
    if not allowed(mode):
        raise DcrisError(
            f"cannot write {path}: {kind_of_file(mode)} of this name exists and is kept; choose another name"
        )


def open_append(path: Path) -> TextIO:
    """Open a result to read it and to add to its end, as UTF-8 text.

    Raises DcrisError where that cannot be done, or where it is something else than a regular file, as `write_file` does.
    """
    require_replaceable(path)
    # If a link or a pipe has taken its place meanwhile, the one is not followed and the other not waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666), "a+", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_file(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write one file atomically; `content` is its bytes, its text, or a function that writes to the path it is given.

    Its permissions are those of any new file (the process's umask). Raises DcrisError where the disk is full, the place cannot
    be written to, or holds something else than a regular file (a link, pipe or device); what is there stays as it was.
    """
    make_directory(path.parent)
    require_replaceable(path)
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
    require_replaceable(path, stat.S_ISDIR)
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
def claim(folder: Path, name: str = "lock") -> Iterator[None]:
    """Have a folder to oneself, by a lock on its file `name`; it ends with the context or the process, however that ends.

    Raises DcrisError where another process has it or where it cannot be written to. Where the file system has no locks,
    no process is kept out.
    """
    path = make_directory(folder) / name
    for tries_left in reversed(range(100)):
        with open_append(path) as file:
            if fcntl is not None:
                _lock(file, folder)
            # Its owner may have removed it between opening and locking. Some network drives number a file anew at each look.
            if tries_left and not _is_at(file, path):
                continue
            with suppress(OSError):  # a full disk; the name of the owner is only for the error of others
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            try:
                yield
            finally:
                with suppress(OSError):  # on Windows an open file cannot be removed
                    path.unlink()
            return


def _lock(file: TextIO, folder: Path) -> None:
    try:
        # A POSIX lock belongs to the process. Of flock's, workers would inherit a share, and outlive a killed process with it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(200).strip() or "unknown"
        raise DcrisError(
            f"another process ({owner}) is writing to {folder}; wait until it ends, stop it, or choose another place"
        ) from error
    except OSError:  # the file system has no locks
        pass


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether `path` names this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and for good. NaN is refused: it is not JSON."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    try:
        sync_directory(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def parse_json(text: str, each_object: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse JSON of unknown origin; `each_object` is given every object as soon as it is read and returns what replaces it.

    Raises ValueError, with a short reason, where it is not JSON, has a key twice in one object (of which Python would keep the
    last), is nested too deeply, or would take far more memory than its length suggests.
    """
    _refuse_dense(text.count("[") + text.count("{"), len(text))

    def make(pairs: list[tuple[str, Any]]) -> Any:
        made = dict(pairs)
        if len(made) < len(pairs):
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"an object has the key {key[:100]!r} twice")
        return made if each_object is None else each_object(made)

    try:
        return json.loads(text, object_pairs_hook=make)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's limit, because the time grows with the square
            raise ValueError("a number has too many digits") from error
        raise


def _refuse_dense(brackets: int, length: int) -> None:
    """Raise ValueError for JSON with very many lists and objects: `[],` has 3 bytes in a file and 64 in memory."""
    if brackets > max(_MAX_BRACKETS, length // 8):
        raise ValueError(f"{brackets:,} lists and objects in {length:,} characters are more than is read")


def read_json(path: Path, what: str, each_object: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file; `what` names it in the error ("the run's configuration"), and `each_object` is as of `parse_json`.

    Raises DcrisError where the file is missing, unreadable or not JSON.
    """
    try:
        return parse_json(read_text(path), each_object)
    except FileNotFoundError as error:
        raise DcrisError(f"{what} is missing: there is no file {path}") from error
    except OSError as error:
        raise DcrisError(f"cannot read {what}, {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DcrisError(
            f"{what}, {path}, is not valid JSON ({error}); it may be cut short, so fetch or make it again"
        ) from error


def read_json_lines(path: Path, on_error: Callable[[DcrisError], None] | None = None) -> Iterator[tuple[int, Any]]:
    """The number, from 1 on, and the value of each line of a JSON Lines file that is not blank.

    Args:
        path: a regular file in UTF-8, with any line ends and byte order marks, as `cat` of several files leaves them.
        complain: receives the error of each line that cannot be read; the other lines are yielded.

    Raises DcrisError where the file cannot be read and, without `on_error`, for the first line that cannot.
    """
    brackets = length = 0
    try:
        with open_regular(path) as file:
            _refuse_utf16(path, file.read(2))
            file.seek(0)
            # Not `for line in file`: a file that is all one line would be read whole.
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise DcrisError(
                        f"{path}: line {number} is longer than {MAX_LINE >> 20} MiB; put each object on a line of its own, and "
                        "keep a large mask as a picture"
                    )
                brackets, length = brackets + line.count(b"[") + line.count(b"{"), length + len(line)
                try:
                    _refuse_dense(brackets, length)
                except ValueError as error:
                    raise DcrisError(f"{path}: {error}; divide the file") from error
                text = line.removeprefix(codecs.BOM_UTF8).strip()
                if not text:
                    continue
                try:
                    value = parse_json(text.decode())
                except ValueError as error:
                    found = DcrisError(f"{path}: line {number} {_of_line(error)}; correct that line")
                    if on_error is None:
                        raise found from error
                    on_error(found)
                else:
                    yield number, value
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {path}; check the folder and the name") from error
    except OSError as error:
        raise DcrisError(f"cannot read {path}: {error.strerror or error}; check the folder and the name") from error


def _of_line(error: ValueError) -> str:
    """What is wrong with a line that `parse_json` or a decoder refused."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (from byte {error.start + 1} on)"
    if isinstance(error, json.JSONDecodeError):  # its own text speaks of line 1
        return f"is not JSON ({error.msg} at character {error.colno})"
    return f"is not JSON that can be read ({error})"
