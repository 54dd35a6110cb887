"""The command line. Each command is a function here that reads its arguments and calls the library.

Libraries that take long to import are imported inside the commands, so that `dcris --help` answers at once. Standard argparse
is used rather than a library that derives options from types: settings are `--SECTION.FIELD VALUE` pairs checked by the
configuration itself, and every error has to be one plain sentence.
"""

import sys
import warnings
from collections.abc import Sequence

from dcris.cli import completion, data, evaluate, export, predict, train, web
from dcris.cli.common import Parser, one_line
from dcris.errors import DcrisError
from dcris.version import __version__

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for bad arguments or input, 130 after Ctrl-C."""
    try:
        args, rest = _parser().parse_known_args(arguments)
        if rest and not getattr(args, "takes_settings", False):
            raise DcrisError(f"`dcris {args.name}` does not take {rest[0]!r}; see `dcris {args.name} --help`")
        args.settings = rest
        with warnings.catch_warnings():
            # Pillow's, about metadata that nobody here reads; what makes a picture unreadable is an error.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            args.run(args)
    except DcrisError as error:
        print(f"dcris: {one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
        advice = "ask for less at once, such as a smaller batch, picture or model"
        print(f"dcris: {one_line(f'there is not enough memory ({reason}); {advice}')}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dcris: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `dcris recipes | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        # What no reader foresees: names that are too long, folders of others, links in a circle, disks that fail.
        print(f"dcris: {one_line(f'cannot use {error.filename}: {error.strerror}; check that path')}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or a GPU had no memory left. torch has a class of its own for GPUs alone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _parser() -> Parser:
    parser = Parser(
        prog="dcris",
        description="Referring image segmentation: a photograph and a phrase in, the mask of that object out.",
        epilog="example: dcris quickstart --out runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dcris {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (train, data, evaluate, predict, export, web, completion):
        group.add(commands)
    return parser
