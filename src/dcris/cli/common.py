"""What the commands share: arguments, and how they speak."""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dcris.errors import DcrisError
from dcris.utils.streams import note, printable, write

if TYPE_CHECKING:
    from dcris.config import RunConfig

_LONGEST_LINE = 1000
Command = Callable[[argparse.Namespace], None]
CHECKPOINT = (
    "a run's or checkpoint's directory, a .safetensors bundle, owner/name on the Hub, or a published model: "
    "detris-{b,l}-{refcoco,refcoco+,refcocog-umd,refcocog-google}, detris-l-mixed"
)
ROOT = "the folder of the data sets, or a data set of one's own: a .jsonl file"


def log(text: str) -> None:
    """Print a line for a person to standard output. Raises DcrisError where that cannot be written."""
    write(printable(text))


def on_error(text: str) -> None:
    """Print why a command ends, as one line of bounded length."""
    line = printable(text).replace("\n", "\\n")
    half = _LONGEST_LINE // 2
    note(line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")


def argument(path: Path | str) -> str:
    """Quote a path as an argument of an advised command: spaces stay inside it, and a leading dash makes it no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def exit_interrupted(stop: Any, again: str = "the same command", quiet: bool = False) -> NoReturn:
    """End as an interrupted run does: a sentence, which one of several processes says, and the exit code of the signal.

    `again` is what goes on from where it stopped.
    """
    with suppress(ValueError):  # where this is not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would take the place of the sentence
    if not quiet:
        on_error(f"stopped at step {stop.checkpoint.step}; {again} goes on from {stop.checkpoint.path}")
    sys.exit(stop.exit_code)


class Parser(argparse.ArgumentParser):
    """argparse, but errors are one sentence, and help goes to standard output as all other text does."""

    def error(self, message: str) -> NoReturn:
        """Raise DcrisError, where argparse would print its usage and leave."""
        raise DcrisError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            write(message.removesuffix("\n"))


def adder(commands: Any, prefix: str) -> Callable[..., argparse.ArgumentParser]:
    """A function that adds a command to `commands`, with the example that every command's help ends in."""

    def add(name: str, run: Command, summary: str, example: str, more: str = "") -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=f"example: {prefix}{name} {example}",
            allow_abbrev=False,
        )
        parser.set_defaults(run=run, name=f"{prefix}{name}".removeprefix("dcris "))
        return parser

    return add


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return share


def level(text: str) -> float:
    """A number of 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def data_root_argument(parser: argparse.ArgumentParser) -> None:
    """--data ROOT."""
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help=ROOT)


def data_set_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --split-by and --mask-threshold."""
    parser.add_argument(
        "--dataset",
        help="refcoco, refcoco+, refcocog, scenes, or a folder of ROOT; mixed, mixed-unfiltered or mixed:NAME,NAME(SPLIT_BY) "
        "for several as one",
    )
    parser.add_argument("--split-by", help="unc, umd, google, ...; asked for only where ROOT has several")
    parser.add_argument(
        "--mask-threshold",
        type=level,
        metavar="T",
        help="threshold for mask pictures of more than two values (JPEG, soft edges, probability maps): pixels above T are the "
        "object, where a T below 1 is a share of the full scale (default: such pictures are refused)",
    )


def protocol_argument(parser: argparse.ArgumentParser) -> None:
    """--protocol."""
    parser.add_argument(
        "--protocol",
        default="cris",
        metavar="NAME",
        help="cris, lavt, cgformer or refer: how masks are compared (cris)",
    )


def device_arguments(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    """--device and, where it is a choice, --precision."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    if precision:
        parser.add_argument(
            "--precision", choices=("auto", "float32", "bfloat16"), help="auto is bfloat16 where the device has it"
        )


def own_name(root: Path, args: argparse.Namespace) -> str | None:
    """The name of a data set that is one file; None where ROOT holds data sets by name."""
    from dcris.data.readers.jsonl import is_jsonl

    if not is_jsonl(root):
        return None
    if args.split_by is not None or args.dataset not in {None, root.stem}:
        raise DcrisError(f"{root} is one data set, called {root.stem}; leave out --dataset and --split-by")
    return root.stem


def data_of(args: argparse.Namespace, config: "RunConfig") -> Any:
    """The data set named on the command line, or else the run's own."""
    from dcris.data.readers.load import load_references

    own_name(args.data, args)
    threshold = config.data.mask_threshold if args.mask_threshold is None else args.mask_threshold
    dataset, split_by = args.dataset, args.split_by
    if dataset is None or dataset == config.data.dataset:
        dataset, split_by = config.data.dataset, split_by or config.data.split_by
    return load_references(args.data, dataset, split_by, mask_threshold=threshold)
