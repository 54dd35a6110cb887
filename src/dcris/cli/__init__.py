"""The command line. Each command is a function here that reads its arguments and calls the library.

Libraries that take long to import are imported inside the commands, so that `dcris --help` answers at once. Standard argparse
is used rather than a library that derives options from types: settings are `--SECTION.FIELD VALUE` pairs checked by the
configuration itself, and every error has to be one plain sentence.
"""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from dcris.cli import ablate, bench, completion, data, evaluate, export, predict, train, web
from dcris.cli.common import Parser, complain
from dcris.errors import DcrisError, out_of_memory
from dcris.version import __version__

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for bad arguments or input, 130 after Ctrl-C."""
    try:
        args, rest = _parser().parse_known_args(arguments)
        if rest and not getattr(args, "takes_settings", False):
            raise DcrisError(f"`dcris {args.name}` does not take {rest[0]!r}; see `dcris {args.name} --help`")
        args.settings = rest
        with warnings.catch_warnings(), _termination():
            # Pillow's, about metadata that nobody here reads; what makes a picture unreadable is an error.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            args.run(args)
    except DcrisError as error:
        complain(str(error))
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if (sentence := _of_worker(error)) is not None:
            complain(sentence)
            return BAD_INPUT
        if not out_of_memory(error):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
        advice = "ask for less at once, such as a smaller batch, picture or model"
        complain(f"there is not enough memory ({reason}); {advice}")
        return BAD_INPUT
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `dcris recipes | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        # What no reader foresees: names that are too long, folders of others, links in a circle, disks that fail.
        complain(f"cannot use {error.filename}: {error.strerror}; check that path")
        return BAD_INPUT
    return 0


def _of_worker(error: Exception) -> str | None:
    """The sentence for the death of a worker; nothing where the error is another, as is any before there could be workers."""
    dataset = sys.modules.get("dcris.data.dataset")
    died = dataset and isinstance(error, RuntimeError) and dataset.dead_worker(error)
    return str(died) if died else None


@contextmanager
def _termination() -> Iterator[None]:
    """Let a request to end (SIGTERM) unwind as Ctrl-C does, so that nothing half-written stays. Training has its own way."""

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # it is on its way
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
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
        description="Referring image segmentation: a photograph and a phrase in, the mask of that object out.",
        epilog="example: dcris quickstart --out runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dcris {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (train, data, evaluate, predict, export, web, ablate, bench, completion):
        group.add(commands)
    return parser
