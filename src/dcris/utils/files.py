"""Read files that a user names, and write results atomically.

A run may be killed, or the disk may fill, at any moment. So each writer fills a file with a
temporary name in the same folder and renames it to the target, which the file system does in one
step. A killed writer leaves a temporary file, never a half-written target, and `remove_partial`
recognises it by its name.
"""

import codecs
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
"""Part of the name of every file or directory that is incomplete, or about to be deleted."""

MAX_TEXT = 1_000_000_000
"""Most bytes of a text or JSON file. COCO's largest annotation file has 0.45 GB."""

MAX_LINE = 16 << 20
"""Most bytes of a line of JSON Lines. A mask that takes more should be an image file."""

_MAX_ZIP_LIST = 32 << 20
"""Most bytes of the list of files in a zip file: 300,000 files of the usual names, or 0.3 GB of
memory."""

_MAX_BRACKETS = 1_000_000
"""Most opening brackets in JSON of any length; see `_refuse_dense`."""


class LockedError(DcrisError):
    """Another process holds the lock of a folder."""


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""


def cannot_write(path: Path, error: OSError) -> DcrisError:
    """Return the error of a path that cannot be written."""
    full = "free disk space there or " if error.errno in FULL else ""
    return DcrisError(f"cannot write {path}: {error.strerror or error}; {full}choose another path")


def make_directory(path: Path) -> Path:
    """Create a directory and its parents if they do not exist, and return it.

    Raises:
        DcrisError: that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def expand_home(path: str | Path, instead: str = "give the path in full") -> Path:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    Raises:
        DcrisError: the home folder is unknown (in containers, users may have no entry in passwd);
            `instead` ends the message.
    """
    plain = Path(path)
    try:
        return plain.expanduser()
    except RuntimeError as error:
        if plain.exists():  # the name of the file starts with ~
            return plain
        raise DcrisError(
            f"the home folder in {path} is unknown because HOME is not set; set it, or {instead}"
        ) from error


@contextmanager
def reading(path: Path, missing: str = "check the folder and the name") -> Iterator[None]:
    """Context in which an error of reading a file, or one below a folder, becomes a DcrisError that
    names it.

    `missing` ends the message if there is no such file.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {error.filename or path}; {missing}") from error
    except OSError as error:
        advice = "" if error.errno == errno.EILSEQ else "; check the folder and the name"  # see read_text
        raise DcrisError(f"cannot read {error.filename or path}: {error.strerror or error}{advice}") from error


def open_regular(path: Path, max_bytes: int | None = None) -> BufferedReader:
    """Open a regular file, or a link to one, for reading in binary mode.

    For all files that a user or a data set names.

    Other kinds are refused: a pipe would block forever, and a device such as /dev/zero has no end.

    Args:
        path: the file.
        max_bytes: largest size to accept; None accepts any. The file may still grow, so readers
            that load all of it use `read_bytes`, which stops there.

    Raises:
        OSError: the file is missing, unreadable, not regular or too large; `strerror` is the
            reason.
    """
    _require_regular(path, path.stat())  # before opening, which has side effects for some devices
    # O_NONBLOCK: if the file was replaced by a pipe in between, opening it does not wait for a
    # writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        found = os.fstat(file.fileno())
        _require_regular(path, found)
        if max_bytes is not None and found.st_size > max_bytes:
            raise _too_large(path, max_bytes)
    except OSError:
        file.close()
        raise
    return file


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file. Raises OSError like `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Raises OSError like `open_regular`.
    """
    content = b""
    with open_regular(path, max_bytes) as file:
        # Not read(max_bytes + 1), which allocates that much for any file. The loop is for files
        # that grow.
        size = min(max_bytes, os.fstat(file.fileno()).st_size)
        while len(content) <= max_bytes and (part := file.read(min(size, max_bytes - len(content)) + 1)):
            content += part
    if len(content) > max_bytes:
        raise _too_large(path, max_bytes)
    return content


def read_text(path: Path, max_bytes: int = MAX_TEXT, fallback: str = "utf-8-sig") -> str:
    """Return the text of a regular file in UTF-8, with or without a byte order mark.

    A file that is not UTF-8 is decoded by the codec `fallback`.

    Raises:
        OSError: as for `open_regular`, or the file is neither (EILSEQ); `strerror` is the reason,
            and for EILSEQ also what to do.
    """
    content = read_bytes(path, max_bytes)
    _refuse_non_utf8(path, content)
    try:
        with suppress(UnicodeDecodeError):
            return content.decode("utf-8-sig")
        return content.decode(fallback)
    except UnicodeDecodeError as error:
        raise OSError(
            errno.EILSEQ, f"it is not UTF-8 text (from byte {error.start + 1} on); save it as UTF-8", str(path)
        ) from error


def _refuse_non_utf8(path: Path, start: bytes) -> None:
    """Raise OSError if a file starts like a zip file or like UTF-16: with its byte order mark or a
    two-byte letter."""
    if start.startswith(b"PK\3\4"):
        raise OSError(
            errno.EILSEQ,
            "it is a zip file, not text: unpack an archive first, and save a spreadsheet as CSV in UTF-8",
            str(path),
        )
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (start[1:2] == b"\0" and start[:1] != b"\0"):
        raise OSError(
            errno.EILSEQ,
            "it is UTF-16 text, as `>` in Windows PowerShell 5 writes it; save it as UTF-8",
            str(path),
        )


class _ZipFile(BufferedReader):
    """A zip file whose list of files is bounded, which zipfile reads at once."""

    most = _MAX_ZIP_LIST

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise ValueError(f"it lists too many files; the limit is {_MAX_ZIP_LIST >> 20} MB of names")
        return super().read(size)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file for reading whose members are stored or deflated.

    Other compressions can take any amount of memory before the first byte (LZMA's dictionary).
    Callers limit the size of a member.

    Raises:
        OSError: as for `open_regular`, or the file is not such a zip file; `strerror` is the
            reason.
    """
    file = _ZipFile(open_regular(path).detach())
    try:
        archive = zipfile.ZipFile(file)
        file.most = sys.maxsize  # members are bounded by callers
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in archive.infolist()):
            raise ValueError("it uses a compression other than deflate")
    except Exception as error:  # for a damaged archive, zipfile raises nearly any exception
        file.close()
        raise OSError(errno.EINVAL, f"it is not a readable zip file ({error})", str(path)) from error
    return archive


def kind_of_file(mode: int) -> str:
    """Return the kind of a file with this `st_mode` in words, for example "a folder"."""
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


def _too_large(path: Path, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than the limit of {max_bytes / 1e6:,.0f} MB", str(path))


def _temporary(path: Path) -> Path:
    """Return an unused name in the folder of `path`, of at most 200 bytes.

    It has the same ending, by which some writers choose their format.
    """
    start = os.fsencode(path.name)[:100].decode(errors="ignore")
    ending = path.suffix if len(os.fsencode(path.suffix)) <= 20 else ""
    return path.with_name(f".{start}{_PARTIAL}{secrets.token_hex(4)}{ending}")


def require_replaceable(path: Path, allowed: Callable[[int], bool] = stat.S_ISREG) -> None:
    """Raise DcrisError if `path` exists and is not of the `allowed` kind."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is missing, or the writer reports what is wrong with its folder
        return
    if not allowed(mode):
        raise DcrisError(f"cannot write {path}: {kind_of_file(mode)} with this name exists; choose another name")


def require_outputs(outputs: Iterable[Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Raise DcrisError if the result files of a command cannot be written, before its work is done.

    Nothing remains of the attempt.

    Args:
        outputs: the files; None: not asked for.
        inputs: files that the command reads, which a result must not replace, or None. What is no
            path, such as the name of a model, is ignored.
    """
    read = (each for each in inputs if each is not None and os.path.isfile(each))  # noqa: PTH113 - names of models
    taken = {os.path.realpath(each): "this command reads that file" for each in read}
    for path in (each for each in outputs if each is not None):
        require_replaceable(path)
        real = os.path.realpath(path)
        if real in taken:
            raise DcrisError(f"cannot write {path}: {taken[real]}; choose another name")
        taken[real] = "another result is to have this name"
        parents = path.absolute().parents
        temporary = _temporary(next((each for each in parents if each.exists()), parents[-1]) / path.name)
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            temporary.unlink()
        except OSError as error:
            raise cannot_write(path, error) from error


def open_append(path: Path) -> TextIO:
    """Open a regular file for reading and appending, as UTF-8 text; it is created if missing.

    Raises:
        DcrisError: it cannot be opened, or is not a regular file.
    """
    require_replaceable(path)
    # If it was replaced by a link or a pipe in between: does not follow the link or wait for the
    # pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return os.fdopen(os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666), "a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error


def write_file(
    path: Path, content: bytes | str | Callable[[Path], None], *, mode: int = 0o666, sync: bool = True
) -> None:
    """Write a file atomically.

    Args:
        path: the file; its folder is created if missing.
        content: bytes, text, or a function that writes to the path it receives.
        mode: its permissions, without those of the process's umask, as for all new files.
        sync: wait until it is on the disk, which takes milliseconds. Without, call `sync_files` for
            all files before anything relies on them: after a power failure they can be empty.

    Raises:
        DcrisError: the disk is full, the path is not writable, or it is not a regular file (but a
            link, pipe or device). The previous content is then unchanged.
    """
    make_directory(path.parent)
    require_replaceable(path)
    temporary = _temporary(path)
    try:
        # Not tempfile, which gives access to the owner only, whatever the umask.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            _sync(temporary)
        temporary.chmod(mode)  # some writers (safetensors) replace the file by their own
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk. The first may bring most of them there.

    Raises:
        DcrisError: one cannot be opened, or the disk is full.
    """
    for path in paths:
        try:
            _sync(path)
        except OSError as error:
            raise cannot_write(path, error) from error


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a directory atomically. Permissions are those of new files (the process's umask).

    Args:
        path: the directory; an existing one is replaced.
        fill: function that writes the files into the temporary directory it receives.

    Raises:
        DcrisError: writing fails, or `path` is not a directory, or the current one or above it. An
            existing directory is then unchanged.
    """
    with suppress(OSError):  # the current folder may be gone, and `path` be elsewhere
        here = Path.cwd()
        if path.resolve() in (here, *here.parents):  # this process would stay in the folder that it was
            raise DcrisError(
                f"cannot write {path}: it is the current folder or above it; give the name of a new folder"
            )
    make_directory(path.parent)
    require_replaceable(path, stat.S_ISDIR)
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            if file.is_dir():
                sync_directory(file)
                continue
            _sync(file)
            file.chmod(mode)  # safetensors writes files that only their owner can read
        sync_directory(temporary)
        if path.exists():  # a rename cannot replace a directory that is not empty
            retired = path.with_name(f".{path.name}.old")  # not a partial name: after a kill this is the only copy
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
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory.

    It is renamed first, so that a kill does not leave half of it under its name.

    Files that cannot be deleted remain.
    """
    retired = path.with_name(f".{path.name}{_PARTIAL}old")
    shutil.rmtree(retired, ignore_errors=True)
    try:
        path.rename(retired)
    except OSError:
        return
    shutil.rmtree(retired, ignore_errors=True)


def is_partial(path: Path) -> bool:
    """Return whether the name of `path` is that of an unfinished file or directory."""
    return path.name.startswith(".") and _PARTIAL in path.name


def remove_partial(folder: Path) -> None:
    """Delete unfinished files and directories of killed writers in a folder, not in subfolders."""
    for path in folder.glob(f".*{_PARTIAL}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_directory(folder: Path) -> None:
    """Sync the names in a folder to disk; otherwise a power failure can undo a rename."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not support it, and sync by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path, name: str = "lock") -> Iterator[None]:
    """Context that locks a folder against other processes, by a lock on its file `name`.

    The lock ends with the context or the process, even a killed one. On a file system without
    locks, it has no effect.

    Raises:
        LockedError: another process holds the lock.
        DcrisError: the file cannot be written.
    """
    path = make_directory(folder) / name
    for tries_left in reversed(range(100)):
        with open_append(path) as file:
            if fcntl is not None:
                _lock_file(file, folder)
            # Its owner may have removed it between opening and locking. Retries are limited,
            # because some network drives report another inode each time.
            if tries_left and not _is_at(file, path):
                continue
            with suppress(OSError):  # a full disk; the owner is only recorded for the error message of others
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            try:
                yield
            finally:
                with suppress(OSError):  # Windows cannot remove an open file
                    path.unlink()
            return


def _lock_file(file: TextIO, folder: Path) -> None:
    try:
        # A POSIX lock belongs to the process. Forked workers would inherit one of flock, and could
        # outlive a killed process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(200).strip() or "unknown"
        raise LockedError(
            f"another process ({owner}) is writing to {folder}; wait until it ends, stop it, or choose another folder"
        ) from error
    except OSError:  # the file system has no locks
        pass


def _is_at(file: TextIO, path: Path) -> bool:
    """Return whether `path` is the name of this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically, and sync it to disk.

    Raises:
        ValueError: NaN, which is not JSON.
    """
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    try:
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def parse_json(text: str, each_object: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse JSON from an untrusted source.

    Args:
        text: the JSON.
        each_object: function that receives every object as soon as it is read, and returns its
            replacement.

    Raises:
        ValueError: it is not JSON, has a key twice in one object (Python would keep the last), is
            nested too deeply, or would take far more memory than its length suggests.
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
        if "integer string conversion" in str(error):  # Python limits it, because the time grows quadratically
            raise ValueError("a number has too many digits") from error
        raise


def _refuse_dense(brackets: int, length: int) -> None:
    """Raise ValueError for JSON with too many lists and objects: `[],` takes 64 bytes in memory."""
    if brackets > max(_MAX_BRACKETS, length // 8):
        raise ValueError(f"{brackets:,} lists and objects in {length:,} characters are too many")


def read_json(
    path: Path,
    what: str,
    each_object: Callable[[dict[str, Any]], Any] | None = None,
    fallback: str = "utf-8-sig",
) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: name of its content for the error message, as in "the run's configuration".
        each_object: see `parse_json`.
        fallback: see `read_text`.

    Raises:
        DcrisError: the file is missing, unreadable or not JSON.
    """
    text = ""
    try:
        text = read_text(path, fallback=fallback)
        return parse_json(text, each_object)
    except FileNotFoundError as error:
        raise DcrisError(f"{what} is missing: there is no file {path}; check the folder and the name") from error
    except OSError as error:
        raise DcrisError(f"cannot read {what}, {path}: {error.strerror or error}") from error
    except ValueError as error:
        if text.lstrip().startswith("<"):  # no JSON does
            raise DcrisError(
                f"{what}, {path}, is XML or HTML, not JSON; export or download it again in a format that is JSON"
            ) from error
        raise DcrisError(
            f"{what}, {path}, is not valid JSON ({error}); it may be truncated: download or write it again"
        ) from error


def read_json_lines(path: Path, on_error: Callable[[DcrisError], None] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the number, from 1, and the value of each line of a JSON Lines file that is not blank.

    Args:
        path: a regular file in UTF-8, with any line ends; byte order marks are ignored, also inside
            (from `cat`).
        on_error: receives the error of each invalid line; the other lines are yielded.

    Raises:
        DcrisError: the file cannot be read or, without `on_error`, a line is invalid.
    """
    brackets = length = 0
    with reading(path), open_regular(path) as file:
        _refuse_non_utf8(path, file.read(4))
        file.seek(0)
        # Not `for line in file`, which would load a file without line ends whole.
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise DcrisError(
                    f"{path}: line {number} is longer than {MAX_LINE >> 20} MiB; write one object a line, and large masks "
                    "as image files"
                )
            brackets, length = brackets + line.count(b"[") + line.count(b"{"), length + len(line)
            try:
                _refuse_dense(brackets, length)
            except ValueError as error:
                raise DcrisError(f"{path}: {error}; split the file") from error
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


def _of_line(error: ValueError) -> str:
    """Describe why a line is invalid."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text (from byte {error.start + 1} on)"
    if isinstance(error, json.JSONDecodeError):  # its own message names line 1
        return f"is not JSON ({error.msg} at character {error.colno})"
    return f"is not valid JSON ({error})"
