"""`dcris bench`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import adder, device_arguments, log, positive


def add(commands: Any) -> None:
    """Describe the command of this file."""
    add = adder(commands, "dcris ")
    bench = add(
        "bench",
        _bench,
        "measure speed and memory of training and prediction on this machine",
        "--recipe dcris_tiny --json bench.json",
        "The towers' weights are random, so nothing is downloaded. Ratios and shares of the machine's own matrix products "
        "are what can be compared; seconds belong to the machine and its other work.",
    )
    bench.add_argument("--recipe", default="dcris_b", metavar="RECIPE", help="see `dcris recipes` (%(default)s)")
    bench.add_argument("--batch-size", type=positive, default=2, metavar="N", help="of the training step (%(default)s)")
    bench.add_argument("--quick", action="store_true", help="fewer rounds, and no memory")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    device_arguments(bench)


def _bench(args: argparse.Namespace) -> None:
    from dcris.experiments.bench import Row, bench, render
    from dcris.recipes import get_recipe
    from dcris.utils.files import write_json

    def show(row: Row) -> None:
        log(f"{row.what}: {row.value:.4g} {row.unit}")

    figures = bench(
        get_recipe(args.recipe),
        device=args.device,
        precision=args.precision,
        quick=args.quick,
        batch_size=args.batch_size,
        progress=show,
    )
    log(render(figures))
    if args.json is not None:
        write_json(args.json, figures)
        log(f"wrote {args.json}")
