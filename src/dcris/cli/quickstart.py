"""`dcris quickstart`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import adder, device_arguments, exit_interrupted, log, natural


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = adder(commands, "dcris ")(
        "quickstart", run, "generate scenes, train, evaluate, segment and report", "--out runs/quickstart"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for all results (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="seed of the scenes and the training (default: %(default)s)"
    )
    device_arguments(parser, precision=None)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from dcris.experiments.quickstart import quickstart
    from dcris.training.stopping import Interrupted

    try:
        metrics = quickstart(args.out, seed=args.seed, device=args.device, log=log)
    except Interrupted as stop:
        exit_interrupted(stop)
    log(
        f"mIoU {metrics['miou']:.1f}, with exchanged phrases {metrics['miou_shuffled']:.1f}, in {metrics['seconds']:.0f} s; "
        f"open {args.out / 'report.html'}"
    )
