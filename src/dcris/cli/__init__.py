"""The command line: one file a command, which reads its arguments and calls the library.

Libraries that take long to import are imported inside the commands, so that `dcris --help` is fast.
argparse is used and not a library that derives options from types: the settings of `dcris train`
are `--SECTION.FIELD VALUE` pairs that the configuration itself checks, and every error has to be
one sentence.
"""

import errno
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from dcris.cli import (
    ablate,
    bench,
    compare,
    completion,
    data,
    evaluate,
    export,
    label_studio,
    predict,
    quickstart,
    score,
    table,
    train,
    web,
)
from dcris.cli.common import Parser, on_error
from dcris.errors import DcrisError, DcrisWarning, LongPhraseWarning, first_line, out_of_memory
from dcris.utils.streams import is_verbose, usable_streams, verbosity
from dcris.utils.workers import dead_worker
from dcris.version import __version__

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for bad arguments or input, 130 after Ctrl-C."""
    with usable_streams(), verbosity() as set_verbosity:
        return exit_code(lambda: _run(arguments, set_verbosity))


def exit_code(command: Callable[[], object]) -> int:
    """Run a function and return the exit code that its end means; see `main`.

    For bad input, or a limit of this machine, one sentence is printed instead of a traceback.
    """
    try:
        command()
    except KeyboardInterrupt:
        on_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `dcris recipes | head`
        return 0
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        if is_verbose():
            traceback.print_exc()
        on_error(sentence)
        return BAD_INPUT
    return 0


def _run(arguments: Sequence[str] | None, set_verbosity: Callable[[int], object]) -> None:
    args, rest = _parser().parse_known_args(arguments)
    set_verbosity(args.verbosity)
    if rest and not getattr(args, "takes_settings", False):
        raise DcrisError(f"`dcris {args.name}` does not take {rest[0]!r}; see `dcris {args.name} --help`")
    args.settings = rest
    with warnings.catch_warnings(), _termination():
        # Pillow warns of damaged metadata, which is not used here; an unreadable image is an error.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("always", DcrisWarning)
        # The commands say it in their own lines, the web page beside the phrase.
        warnings.simplefilter("ignore", LongPhraseWarning)
        warnings.showwarning = partial(_show, warnings.showwarning)
        args.run(args)


def _show(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print a warning of dcris as a line, without the place in its source."""
    if issubclass(category, DcrisWarning):
        on_error(str(message))
    else:
        otherwise(message, category, *where)


def _sentence(error: Exception) -> str | None:
    """Return the message for bad input or a limit of this machine; None for a defect, which keeps
    its traceback."""
    if isinstance(error, DcrisError):
        return str(error)
    if isinstance(error, RuntimeError) and (died := dead_worker(error)):
        return str(died)
    # Libraries raise several classes for this; "ancdata" is torch's, when a worker sends a file
    # descriptor.
    texts = (os.strerror(errno.EMFILE), "items of ancdata")
    if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE} or any(text in str(error) for text in texts):
        return "too many open files; raise the limit (`ulimit -n 1024`) or use fewer workers"
    if out_of_memory(error):
        return f"not enough memory ({first_line(error)}); use a smaller batch, image or model"
    if isinstance(error, UnicodeEncodeError):
        return (
            f"the file name {error.object!r} cannot be encoded as {error.encoding}, the encoding of this system; set "
            "PYTHONUTF8=1 or a UTF-8 locale (LC_ALL=C.UTF-8)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        # Errors that no reader handles: names that are too long, missing permissions, circular
        # links, failing disks.
        return f"cannot use {error.filename}: {error.strerror}; check that path"
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}:
        return f"cannot read or write: {error.strerror}; check the disks of this machine"
    return None


@contextmanager
def _termination() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that temporary files are removed as after Ctrl-C.

    Training has a handler of its own.
    """

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread, where only the caller can handle signals
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


def _parser() -> Parser:
    parser = Parser(
        prog="dcris",
        description="Referring image segmentation: given an image and an expression, predict the mask of the object.",
        epilog="example: dcris quickstart --out runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dcris {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        quickstart,
        train,
        data,
        evaluate,
        score,
        compare,
        table,
        predict,
        export,
        web,
        label_studio,
        ablate,
        bench,
        completion,
    ):
        module.add(commands)
    return parser
