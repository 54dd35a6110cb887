"""`dcris ablate`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import (
    ROOT,
    adder,
    device_arguments,
    exit_interrupted,
    log,
    natural,
    own_name,
    parse_settings,
    positive,
    refuse_given,
)
from dcris.errors import DcrisError
from dcris.experiments.paper_tables import SIZES, TABLES


def add(commands: Any) -> None:
    """Add the command's parser."""
    ablate = adder(commands, "dcris ")(
        "ablate",
        _ablate,
        "train and compare recipes, or the rows of a table of the paper",
        "table2 --recipe tiny --out runs/ablations",
        "Finished runs are skipped, and tables in one OUT share equal runs. Several processes can work on one OUT: start "
        "the command again, or use torchrun. Settings of all rows are given as --SECTION.FIELD VALUE, as for `dcris train`.",
    )
    ablate.set_defaults(takes_settings=True)
    ablate.add_argument("table", nargs="?", choices=tuple(TABLES), metavar="TABLE", help=", ".join(TABLES))
    ablate.add_argument(
        "--recipes", nargs="+", default=(), metavar="RECIPE", help="recipes to compare instead of a table"
    )
    ablate.add_argument(
        "--data", type=Path, metavar="ROOT", help=f"{ROOT} (default for tiny recipes: generated scenes)"
    )
    ablate.add_argument("--dataset", help="name of the data set (default: that of the first row)")
    ablate.add_argument("--split-by", help="partition of the data set; needed only if ROOT has several")
    ablate.add_argument("--out", type=Path, required=True, help="folder of the tables and all their runs")
    ablate.add_argument("--recipe", choices=SIZES, help="size of the encoders in TABLE (default: b)")
    ablate.add_argument(
        "--seeds", type=natural, nargs="+", default=[0, 1, 2], metavar="SEED", help="seeds of the runs (default: 0 1 2)"
    )
    length = ablate.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="steps of a run with equal steps (default: 100 for a table of tiny, else the recipe's length)",
    )
    length.add_argument(
        "--epochs", type=positive, metavar="N", help="epochs of a run with equal steps, in place of --steps"
    )
    ablate.add_argument(
        "--budget",
        choices=("steps", "time", "both"),
        default="both",
        help="what is equal between rows: steps, or the time of the baseline (DCRIS, or the first recipe) "
        "(default: %(default)s)",
    )
    device_arguments(ablate, precision=None)


def _ablate(args: argparse.Namespace) -> None:
    from dcris.experiments.ablate import ablate, recipe_study, table_study
    from dcris.training.stopping import Interrupted

    if (args.table is None) == (not args.recipes):
        raise DcrisError("give either a TABLE or --recipes; see `dcris ablate --help`")
    if args.data is not None:
        own_name(args.data, args.dataset, args.split_by)
    else:
        refuse_given(args, ("split_by",), "is for the data sets in --data, which was not given")
    if args.recipes:
        refuse_given(args, ("recipe",), "is for TABLE, and --recipes names whole recipes")
    study = recipe_study(args.recipes) if args.recipes else table_study(args.table, args.recipe or "b")
    try:
        failures = ablate(
            study.changed(parse_settings(args.settings)),
            args.out,
            root=args.data,
            dataset=args.dataset,
            split_by=args.split_by,
            seeds=args.seeds,
            steps=args.steps,
            epochs=args.epochs,
            budgets=("steps", "time") if args.budget == "both" else (args.budget,),
            device=args.device,
            log=log,
        )
    except Interrupted as stop:
        exit_interrupted(stop)
    log(f"written: {args.out / study.name}.md, .tex, .html and .json")
    if failures:
        raise DcrisError(
            f"{len(failures)} rows failed ({failures[0]}); the others are in the table, and the same command tries "
            "the failed ones again"
        )
