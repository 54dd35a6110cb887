"""Watching a training run: the log, and a bar or lines for a person."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dcris.errors import DcrisError
from dcris.files import write_file


class Log:
    """log.jsonl: a line of JSON every so many steps. On resuming, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = _lines(path) if step and path.exists() else ()
        write_file(path, b"".join(text + b"\n" for text, line in lines if line["step"] <= step))

    def add(self, line: dict[str, Any]) -> None:
        """Append a line. Raises DcrisError where the disk is full."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DcrisError(
                f"cannot write {self.path}: {error.strerror or error}; free some space there and --resume"
            ) from error


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. Raises DcrisError where it cannot be read."""
    return [line for _, line in _lines(run / "log.jsonl")]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a log, as they are and read; what is no line of numbers (the last may be cut short) is left out."""
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise DcrisError(f"cannot read {path}: {error.strerror or error}; move it away to go on without it") from error
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        known = isinstance(line, dict) and type(line.get("step")) is int
        if known and all(type(value) in (int, float) and abs(value) < 1e300 for value in line.values()):
            yield text, line


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, first: int, total: int, say: Callable[[str], None]) -> None:
        self.say, self.total, self.every = say, total, max(1, total // 20)
        self.bar = tqdm(total=total, initial=first, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, done: int, loss: float, lr: float) -> None:
        """Show that so many steps are done."""
        self.bar.update(1)
        if self.terminal:
            self.bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.1e}", refresh=False)
        elif done % self.every == 0 or done == self.total:
            self.say(f"step {done}/{self.total} loss {loss:.3f} lr {lr:.1e}")
