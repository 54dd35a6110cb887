"""`dcris ablate`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import ROOT, adder, device_arguments, exit_interrupted, log, natural, positive
from dcris.errors import DcrisError
from dcris.experiments.paper_tables import TABLES


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    add = adder(commands, "dcris ")
    ablate = add(
        "ablate",
        _ablate,
        "run a table of the paper, row by row, and write it",
        "table2 --recipe tiny --out runs/ablations",
        "What is done is skipped, and tables in one OUT share their runs. Under torchrun, or started "
        "again while it runs, it spreads them over processes.",
    )
    ablate.add_argument("table", choices=tuple(TABLES), metavar="TABLE", help=", ".join(TABLES))
    ablate.add_argument("--data", type=Path, metavar="ROOT", help=f"{ROOT}; the tiny recipe generates its own without")
    ablate.add_argument("--out", type=Path, required=True, help="folder of the tables and of all their runs")
    ablate.add_argument("--recipe", choices=("tiny", "b"), default="b", help="size of the towers (%(default)s)")
    ablate.add_argument(
        "--seeds", type=natural, nargs="+", default=[0, 1, 2], metavar="SEED", help="of the runs (0 1 2)"
    )
    ablate.add_argument("--steps", type=positive, help="of a run with equal steps; the recipe's by default")
    ablate.add_argument("--epochs", type=positive, help="the same in epochs")
    ablate.add_argument(
        "--budget",
        choices=("steps", "time", "both"),
        default="both",
        help="what is equal between the rows: steps, or the time that DCRIS takes for them (%(default)s)",
    )
    device_arguments(ablate, precision=False)


def _ablate(args: argparse.Namespace) -> None:
    from dcris.experiments.ablate import ablate
    from dcris.training.stopping import Interrupted

    try:
        failures = ablate(
            args.table,
            args.out,
            root=args.data,
            size=args.recipe,
            seeds=args.seeds,
            steps=args.steps,
            epochs=args.epochs,
            budgets=("steps", "time") if args.budget == "both" else (args.budget,),
            device=args.device,
            log=log,
        )
    except Interrupted as stop:
        exit_interrupted(stop)
    log(f"written: {args.out / args.table}.md, .tex, .html and .json")
    if failures:
        raise DcrisError(
            f"{len(failures)} of the rows failed ({failures[0]}); the others are written, and this can be run again"
        )
