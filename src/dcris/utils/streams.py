"""The standard streams: they may be closed, in another encoding than UTF-8, or files on a disk that is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from dcris.errors import DcrisError


@contextmanager
def usable_streams() -> Iterator[None]:
    """Around a whole command: replace closed standard streams by os.devnull, and escape characters that cannot be encoded."""
    with ExitStack() as opened:
        # The next file that is opened gets the lowest number that is free. If that were 2, what C libraries print as errors
        # would land in it. In this order each stream gets its own number.
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                stream = opened.enter_context(Path(os.devnull).open(mode, encoding="utf-8"))
                opened.callback(setattr, sys, name, None)
                setattr(sys, name, stream)
        for output in (sys.stdout, sys.stderr):
            if isinstance(output, TextIOWrapper):
                output.reconfigure(errors="backslashreplace")
        yield


def is_terminal() -> bool:
    """Whether progress bars, which are drawn on standard error, have a terminal there."""
    return sys.stderr is not None and sys.stderr.isatty()


def printable(text: str) -> str:
    """Escape what a terminal would obey or cannot show: names in the text may come from strangers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def write(text: str) -> None:
    """Print text to standard output and flush it, since a process that is killed loses what is buffered.

    Raises DcrisError where the output cannot be written, and BrokenPipeError where its reader has gone.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)
        raise
    except OSError as error:
        discard(sys.stdout)
        raise DcrisError(
            f"cannot write to the standard output: {error.strerror or error}; send it elsewhere or free some space"
        ) from error


def note(text: str) -> None:
    """Print a line to standard error, where that can be written: nothing fails because a remark is lost."""
    if sys.stderr is None:  # print would then write to standard output
        return
    try:
        print(f"dcris: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


@cache
def note_once(text: str) -> None:
    """Print a line to standard error unless this process did already."""
    note(text)


def discard(stream: TextIO) -> None:
    """Send the rest of a stream to os.devnull: Python writes its buffer again at the end, and would fail again."""
    with suppress(OSError, ValueError):  # ValueError: it has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
