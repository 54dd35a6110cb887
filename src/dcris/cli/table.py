"""`dcris table`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import adder, natural, output
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Add the command's parser."""
    table = adder(commands, "dcris ")(
        "table",
        _table,
        "make a table of results, for a paper",
        "results/*.json --format latex --out table.tex",
        "A RESULT is a system: a file of `dcris evaluate --all`, or of `dcris evaluate` or `dcris score` with --out; or a "
        "folder of such files. The best score of a column (with --by-category, of a row) is bold, the second underlined. "
        "Scores that do not compare are in different columns. LaTeX needs the package booktabs.",
    )
    table.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="result file, or folder of result files")
    table.add_argument("--names", nargs="+", metavar="NAME", help="names of the systems (default: those in the files)")
    table.add_argument(
        "--metrics",
        nargs="+",
        metavar="KEY",
        help="metrics, such as miou oiou prec@0.5 (default: the first of each protocol)",
    )
    kind = table.add_mutually_exclusive_group()
    kind.add_argument(
        "--paper",
        action="store_true",
        help="table 1 of the paper, each row with its kind of IoU, and the systems below it",
    )
    kind.add_argument(
        "--by-category", action="store_true", help="mean IoU by category of the objects, with a column for each system"
    )
    table.add_argument(
        "--cost",
        action="store_true",
        help="add weights, floating-point operations, peak memory and seconds of a prediction, of results of `evaluate --all`",
    )
    table.add_argument(
        "--format",
        choices=("markdown", "latex", "csv"),
        default="markdown",
        help="format of the table (default: %(default)s)",
    )
    table.add_argument(
        "--digits", type=_digits, default=1, metavar="N", help="decimals of scores, 0 to 10 (default: %(default)s)"
    )
    table.add_argument("--out", type=Path, help="file to write, instead of printing the table")


def _digits(text: str) -> int:
    number = natural(text)
    if number > 10:
        raise argparse.ArgumentTypeError(f"{text} is more than 10")
    return number


def _table(args: argparse.Namespace) -> None:
    from dcris.experiments.results_table import category_table, paper_table, read_systems, scores_table
    from dcris.utils.files import require_outputs, write_file

    require_outputs((args.out,), args.results)
    if args.metrics and (args.paper or args.by_category):
        raise DcrisError("--metrics does not go with --paper and --by-category, which have their own; leave it out")
    if args.cost and args.by_category:
        raise DcrisError("--cost does not go with --by-category, whose columns are systems; leave it out")
    systems = read_systems(args.results, args.names or ())
    if args.paper:
        table = paper_table(systems, args.cost)
    elif args.by_category:
        table = category_table(systems)
    else:
        table = scores_table(systems, args.metrics or (), args.cost)
    text = table.render(args.format, args.digits)
    if args.out is None:
        output(text)
    else:
        write_file(args.out, f"{text}\n")
