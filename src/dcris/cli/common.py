"""Shared by the commands: arguments, output and errors."""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from dcris.errors import DcrisError
from dcris.utils.arguments import DEVICES, Precision, did_you_mean
from dcris.utils.streams import (
    complain,
    is_quiet,
    is_terminal,
    is_verbose,
    note,
    one_line,
    printable,
    progress_lines,
    write,
)

if TYPE_CHECKING:
    from dcris.config import RunConfig
    from dcris.inference.web.server import Access

_LONGEST_LINE = 1000
"""Characters of an error message that are printed."""

_EXAMPLE = "example: "
"""Beginning of the last line of a command's help."""

Command = Callable[[argparse.Namespace], None]
CHECKPOINT = (
    "photos or tiny (part of the package), directory of a run or checkpoint, .safetensors bundle, owner/name on the Hub, or "
    "published model: detris-{b,l}-{refcoco,refcoco+,refcocog-umd,refcocog-google}, detris-l-mixed"
)
ROOT = "folder of the data sets, or a .jsonl file with your own data"


def log(text: str) -> None:
    """Print a line about what is done to standard output, unless quiet.

    Raises DcrisError if it cannot be written.
    """
    if not is_quiet():
        output(text)


def output(text: str) -> None:
    """Print what the command was run for, a table or JSON, to standard output.

    Raises DcrisError if it cannot be written.
    """
    write(printable(text))


def detail(text: str) -> None:
    """Print a line to standard error if --verbose is given."""
    if is_verbose():
        note(text)


def on_error(text: str) -> None:
    """Print an error message to standard error, as one line of bounded length."""
    line = one_line(text)
    half = _LONGEST_LINE // 2
    complain(line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}")


def quote(text: str) -> str:
    """Return a text quoted for the shell: cmd.exe and PowerShell on Windows, POSIX elsewhere."""
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def argument(path: Path | str) -> str:
    """Return a path as an argument of a suggested command, quoted and never mistaken for an
    option."""
    text = str(path)
    return quote(f"./{text}" if text.startswith("-") else text)


def given_options(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return those of some options that were given, as they are written; `names` are those of their
    values, whose defaults are None or False."""
    values = ((name, getattr(args, name)) for name in names)
    return [f"--{name.replace('_', '-')}" for name, value in values if value is not None and value is not False]


def refuse_given(args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raise DcrisError if some option was given that has no effect beside the others.

    Args:
        args: of the command.
        names: of the options, as in `given_options`.
        reason: the sentence after the option, such as "is for images".
    """
    if given := given_options(args, names):
        raise DcrisError(f"{given[0]} {reason}; leave it out")


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--section.field value` and `--section.field=value` by key.

    Raises:
        DcrisError: an argument is not a setting, or a setting has no value.
    """
    from dcris.config import parse_value

    values: dict[str, Any] = {}
    for word in _joined(words):
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise DcrisError(f"there is no option {word!r}; settings are given as --SECTION.FIELD VALUE")
        if not equals:
            raise DcrisError(f"the setting --{key} has no value; give one after it")
        values[key] = parse_value(value)
    return values


@contextmanager
def progress(total: int | None, unit: str, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show progress with the time left on standard error: a bar in a terminal, elsewhere a line
    every half minute.

    Args:
        total: number of units; None: unknown.
        unit: its name, in the singular.
        shown: False: show nothing, as on all ranks but the first.

    Yields:
        A function that receives the number of units that are done.
    """
    from tqdm import tqdm

    lines = progress_lines(note, total, unit)

    def advance(done: int) -> None:
        bar.update(done - bar.n)
        if bar.disable and shown:
            lines(done)

    with tqdm(total=total, unit=unit, disable=not (shown and is_terminal()), dynamic_ncols=True) as bar:
        yield advance


def exit_interrupted(stop: Any, again: str = "the same command", quiet: bool = False) -> NoReturn:
    """Exit after an Interrupted run: print where it stopped, and use the exit code of the signal.

    Args:
        stop: the Interrupted exception.
        again: the command or option that continues the run.
        quiet: print nothing, as on all ranks but the first.
    """
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not replace the message
    if not quiet:
        on_error(f"stopped at step {stop.checkpoint.step}; {again} continues from {stop.checkpoint.path}")
    sys.exit(stop.exit_code)


class _Help(argparse.HelpFormatter):
    """argparse's help, in which names with hyphens and commands to copy are not broken."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLE):
            return text
        words = " ".join(text.split())
        return textwrap.fill(words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse with errors as DcrisError, help written like all other output, no empty paths."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Create a parser as argparse does, whose arguments of the type Path are not empty."""
        super().__init__(*args, **{"formatter_class": _Help, **options})
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Leave settings over, which argparse does not know. Without "=" it would take their values
        for positional arguments that are left out.

        Raises DcrisError for an option that the command does not have.
        """
        found, rest = super().parse_known_args(_joined(sys.argv[1:] if args is None else args), namespace)
        # argparse takes the arguments of a list from one place, before Python 3.12.7 even an empty
        # one: "MODEL -e PHRASE IMAGE" left IMAGE over.
        for action in self._get_positional_actions():
            if action.nargs == "*":
                end = rest.index("--") if "--" in rest else len(rest)
                words = [word for word in rest[:end] if not word.startswith("-")] + rest[end + 1 :]
                setattr(found, action.dest, [*getattr(found, action.dest), *self._get_values(action, words)])
                rest = [word for word in rest[:end] if word.startswith("-")]
        for word in rest:
            option = word.partition("=")[0]
            if option.startswith("-") and "." not in option:
                hint = did_you_mean(option, self._option_string_actions)
                if not hint and self.get_default("takes_settings"):
                    hint = "; settings of a recipe are given as --SECTION.FIELD VALUE"
                self.error(f"there is no option {option}{hint}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the choice that a mistyped command or value resembles. The wording of argparse's
        own message depends on the version of Python."""
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            hint = did_you_mean(str(value), names) or f" (choose from {', '.join(names)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise DcrisError, instead of printing the usage and exiting."""
        raise DcrisError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            write(message.removesuffix("\n"))


def _joined(words: Sequence[str]) -> list[str]:
    """Write settings `--section.field value` as one word with "="."""
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        is_setting = word.startswith("--") and "." in word and "=" not in word
        has_value = is_setting and rest and not rest[0].startswith("--")
        joined.append(f"{word}={rest.pop(0)}" if has_value else word)
    return joined


def adder(commands: Any, prefix: str) -> Callable[..., argparse.ArgumentParser]:
    """Return a function that adds a command to `commands`; `prefix` is the command line before its
    name.

    The function takes the name, the function to run, a summary, the arguments of an example, and
    further help text.
    """

    def add(name: str, run: Command, summary: str, example: str, more: str = "") -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=f"{_EXAMPLE}{prefix}{name} {example}",
            allow_abbrev=False,
        )
        parser.set_defaults(run=run, name=f"{prefix}{name}".removeprefix("dcris "))
        amount = parser.add_mutually_exclusive_group()
        for letter, word, value, what in (
            ("-q", "--quiet", -1, "print errors only, and the table or JSON that was asked for"),
            ("-v", "--verbose", 1, "print details, and the traceback of an error"),
        ):
            amount.add_argument(letter, word, dest="verbosity", action="store_const", const=value, default=0, help=what)
        return parser

    return add


def _path(text: str) -> Path:
    """Parse a path. An empty one is rather a shell variable that is not set than the current
    folder, which Path takes it for."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; the current folder is '.'")
    return Path(text)


def natural(text: str) -> int:
    """Parse a whole number of 0 or more."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """Parse a whole number of 1 or more."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    # Python refuses to read thousands of digits; JSON keeps numbers up to this limit exactly.
    number = int(text) if text.isdecimal() and len(text) < 100 else -1
    if not text.isdecimal() or 0 <= number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    if not 0 <= number < 1 << 53:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is too large; the limit is {(1 << 53) - 1:,}")
    return number


def share(text: str) -> float:
    """Parse a number of at least 0 and below 1."""
    return _number(text, lambda number: 0 <= number < 1, "of at least 0 and below 1")


def level(text: str) -> float:
    """Parse a number of 0 or more."""
    return _number(text, lambda number: 0 <= number < math.inf, "of 0 or more")


def score(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _number(text, lambda number: 0 <= number <= 1, "from 0 to 1")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not fits(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {what}")
    return number


def data_root_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --data ROOT."""
    parser.add_argument("--data", type=Path, required=required, metavar="ROOT", help=ROOT)


def data_set_arguments(parser: argparse.ArgumentParser, videos: bool = False) -> None:
    """Add --dataset, --split-by and --mask-threshold; `videos`: sets of videos are possible."""
    parser.add_argument(
        "--dataset",
        help="data set: refcoco, refcoco+, refcocog, grefcoco, ref-zom, rrefcoco, rrsisd, refsegrs, reasonseg, phrasecut, "
        "refcoco-m, gseval, scenes, or a folder in ROOT; several as one: mixed, mixed-unfiltered or mixed:NAME,NAME(SPLIT_BY)"
        + ("; of videos: ref_youtube_vos, ref_davis17 or mevis" if videos else ""),
    )
    parser.add_argument(
        "--split-by", help="partition of the data set: unc, umd, google, ...; needed only if ROOT has several"
    )
    parser.add_argument(
        "--mask-threshold",
        type=level,
        metavar="T",
        help="threshold for mask images with more than two values (JPEG, soft edges, probability maps): pixels above T are the "
        "object; a T below 1 is a fraction of the full scale (default: such masks are errors)",
    )


def evaluation_arguments(parser: argparse.ArgumentParser, videos: bool = False, data_required: bool = True) -> None:
    """Add what the commands that evaluate on a split share: the data, --split and --protocol;
    `videos`: sets of videos are possible."""
    data_root_argument(parser, data_required)
    data_set_arguments(parser, videos)
    parser.add_argument("--split", default="val", help="split to evaluate (default: val)")
    parser.add_argument(
        "--protocol",
        default="cris",
        metavar="NAME",
        help="evaluation protocol: cris, lavt, cgformer, refer, grefcoco, refzom, rrefcoco, lisa, phrasecut, gseval or one of "
        "your own (default: cris)"
        + ("; of ref_davis17: davis-unsupervised (default), davis-by-label or davis-semi-supervised" if videos else ""),
    )
    parser.add_argument(
        "--none-rule",
        metavar="RULE",
        help="when a prediction counts as an absent target: head (the presence head), any-pixel (no pixel), pixels:N "
        "(fewer than N) or score:T (a score below T) (default: head for grefcoco, any-pixel for refzom and rrefcoco)",
    )

    parser.add_argument(
        "--boundary",
        action="store_true",
        help="also compute Boundary IoU (Cheng et al. 2021): the overlap of the pixels near the contours",
    )


def device_arguments(parser: argparse.ArgumentParser, precision: Any = Precision) -> None:
    """Add --device and, unless `precision` is None, --precision with these choices."""
    parser.add_argument("--device", default="auto", help=f"{DEVICES} (default: %(default)s)")
    if precision is not None:
        of_cpus = "; int8: for CPUs, see docs/performance.md" if "int8" in get_args(precision) else ""
        parser.add_argument(
            "--precision",
            choices=get_args(precision),
            help=f"precision of the computation; auto: bfloat16 if the device supports it{of_cpus} "
            "(default: the checkpoint's or recipe's)",
        )


def server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Add --host, --port, --allow-host, --auth and --no-auth."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=natural, default=port, help="port to listen on; 0 for any free one (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="further host name that clients may use; repeatable",
    )
    access = parser.add_mutually_exclusive_group()
    access.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="required user name and password, or a file with one such line per user "
        "(default: the environment variable DCRIS_WEB_AUTH)",
    )
    access.add_argument("--no-auth", action="store_true", help="serve other machines without a password")


def access_of(args: argparse.Namespace, frames: Sequence[str] = ()) -> "Access":
    """Return what the arguments of `server_arguments` say."""
    from dcris.inference.web.server import Access

    return Access(args.host, args.port, args.allow_host, frames, args.auth, args.no_auth)


def serving_at(address: str) -> None:
    """Print that a server answers at an address."""
    log(f"{address} (stop with Ctrl-C)")


def own_name(root: Path, dataset: str | None, split_by: str | None) -> str | None:
    """Return the name of a data set that is a single file, and None for a folder of data sets.

    Raises:
        DcrisError: `root` is a file, and another `dataset` or a `split_by` is given.
    """
    from dcris.data.readers.load import is_single_file

    if not is_single_file(root):
        return None
    if split_by is not None or dataset not in (None, root.stem):
        raise DcrisError(f"{root} is a single data set, {root.stem}; leave out --dataset and --split-by")
    return root.stem


def data_of(args: argparse.Namespace, config: "RunConfig") -> Any:
    """Load the data set named on the command line, or else that of the run."""
    from dcris.data.readers.load import load_references

    own_name(args.data, args.dataset, args.split_by)
    threshold = config.data.mask_threshold if args.mask_threshold is None else args.mask_threshold
    dataset, split_by = args.dataset, args.split_by
    if dataset is None or dataset == config.data.dataset:
        dataset, split_by = config.data.dataset, split_by or config.data.split_by
    return load_references(args.data, dataset, split_by, mask_threshold=threshold)
