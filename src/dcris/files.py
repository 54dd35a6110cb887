"""Files that are either whole or not there: every result dcris writes goes through here.

A run may be killed, or the disk may fill, at any moment. Each writer therefore fills a neighbour with a temporary name and
renames it over the target, which the file system does in one step.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcris.errors import DcrisError


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
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
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        fill(temporary)
        for file in temporary.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            file.chmod(0o644)  # safetensors makes files that only their owner can read
        temporary.chmod(0o755)
        if path.exists():  # a rename cannot replace a directory that holds something
            retired = path.with_name(f".{path.name}.old")
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
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
