"""Standard streams, which may be closed, use an encoding other than UTF-8, or be files on a full
disk; and how much is written to them."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from dcris.errors import DcrisError

_SECONDS_BETWEEN_LINES = 30
"""Of progress outside of a terminal."""


@contextmanager
def usable_streams() -> Iterator[None]:
    """Context for a command: replace closed standard streams by os.devnull, and escape what cannot
    be encoded."""
    with ExitStack() as opened:
        # The next file to be opened gets the lowest free number. If that is 2, error messages of C
        # libraries are written into that file. Opened in this order, each stream gets its own
        # number.
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                stream = opened.enter_context(Path(os.devnull).open(mode, encoding="utf-8"))
                opened.callback(setattr, sys, name, None)
                setattr(sys, name, stream)
        for output in (sys.stdout, sys.stderr):
            if isinstance(output, TextIOWrapper):
                output.reconfigure(errors="backslashreplace")
        yield


_verbosity: ContextVar[int] = ContextVar("verbosity", default=0)


@contextmanager
def verbosity() -> Iterator[Callable[[int], object]]:
    """Context for a command, which yields a function that sets how much it prints: -1 errors and
    the table or JSON that was asked for, 0 the usual, 1 details, too."""
    token = _verbosity.set(0)
    try:
        yield _verbosity.set
    finally:
        _verbosity.reset(token)


def is_quiet() -> bool:
    """Return whether only errors are printed, and the table or JSON that was asked for."""
    return _verbosity.get() < 0


def is_verbose() -> bool:
    """Return whether details are printed."""
    return _verbosity.get() > 0


def is_terminal() -> bool:
    """Return whether progress bars are drawn: standard error is a terminal, and not quiet."""
    return not is_quiet() and sys.stderr is not None and sys.stderr.isatty()


def printable(text: str) -> str:
    """Escape control characters and others that a terminal cannot show: file names may come from
    untrusted sources."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def one_line(text: str) -> str:
    """Return a text for one line of a table or a message: `printable`, line feeds included."""
    return printable(text).replace("\n", "\\n")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def progress_lines(log: Callable[[str], object], total: int | None, unit: str) -> Callable[[int], None]:
    """Return a function that receives the number of units that are done, and logs it with the time
    left each half minute.

    Args:
        log: receives the lines.
        total: number of units; None: unknown.
        unit: its name, in the singular.
    """
    from tqdm import tqdm

    begin = latest = time.monotonic()

    def advance(done: int) -> None:
        nonlocal latest
        if time.monotonic() - latest < _SECONDS_BETWEEN_LINES:
            return
        latest = time.monotonic()
        line = counted(done, unit) if total is None else f"{done:,} of {counted(total, unit)}"
        if total is not None and done:
            line += f", {tqdm.format_interval((latest - begin) / done * (total - done))} left"
        log(line)

    return advance


def write(text: str) -> None:
    """Print text to standard output and flush it, since a killed process loses what is buffered.

    Raises:
        DcrisError: standard output cannot be written.
        BrokenPipeError: the reader of a pipe has closed it.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        raise
    except OSError as error:
        discard(sys.stdout)
        raise DcrisError(
            f"cannot write to standard output: {error.strerror or error}; redirect it elsewhere or free disk space"
        ) from error


def note(text: str) -> None:
    """Print a line to standard error, unless quiet. Does nothing if that cannot be written."""
    if not is_quiet():
        complain(text)


def complain(text: str) -> None:
    """Print an error to standard error. Does nothing if that cannot be written."""
    if sys.stderr is None:  # print would then write to standard output
        return
    try:
        print(f"dcris: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


@cache
def note_once(text: str) -> None:
    """Print a line to standard error, unless this process has printed it before."""
    note(text)


def discard(stream: TextIO) -> None:
    """Redirect a stream to os.devnull: Python flushes its buffer again at exit, and would fail
    again."""
    with suppress(OSError, ValueError):  # ValueError: the stream has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
