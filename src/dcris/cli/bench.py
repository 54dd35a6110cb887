"""`dcris bench`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcris.cli.common import adder, device_arguments, log, output, positive, refuse_given


def add(commands: Any) -> None:
    """Add the command's parser."""
    bench = adder(commands, "dcris ")(
        "bench",
        _bench,
        "measure the speed and memory of a recipe on this machine",
        "--recipe dcris_tiny --json bench.json",
        "Weights are random, so nothing is downloaded. Compare ratios and shares of the speed of matrix products; "
        "seconds depend on the machine and its other work.",
    )
    bench.add_argument(
        "--recipe", default="dcris_b", metavar="RECIPE", help="recipe, see `dcris recipes` (default: %(default)s)"
    )
    bench.add_argument(
        "--batch-size",
        type=positive,
        nargs="+",
        metavar="N",
        help="batch sizes of the training step (default: 2)",
    )
    bench.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="train with less memory: recompute activations in the backward pass",
    )
    part = bench.add_mutually_exclusive_group()
    part.add_argument("--only", choices=("speed", "memory"), help="part to measure (default: both)")
    part.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="measure only predictions of the images in DIR, against a loop that predicts and saves one after the other",
    )
    bench.add_argument("--quick", action="store_true", help="fewer rounds, and no memory")
    bench.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write")
    device_arguments(bench)


def _bench(args: argparse.Namespace) -> None:
    from dcris.config import replace
    from dcris.experiments.bench import PARTS, Part, Row, bench, render
    from dcris.recipes import get_recipe
    from dcris.utils.files import require_outputs, write_json

    require_outputs((args.json,), ())

    def show(row: Row) -> None:
        output(f"{row.what}: {row.value:.4g} {row.unit}")

    if args.folder is not None:
        refuse_given(args, ("batch_size", "checkpoint_activations"), "is for training steps, which --folder leaves out")
    if args.only == "memory":
        refuse_given(args, ("quick",), "leaves out the memory, which --only memory measures")
    config = get_recipe(args.recipe)
    if args.checkpoint_activations:
        config = replace(config, {"train.checkpoint_activations": True})
    parts: Sequence[Part] = ("speed",) if args.quick else PARTS
    if args.folder is not None:
        parts = ()
    elif args.only:
        parts = (args.only,)
    measured = bench(
        config,
        device=args.device,
        precision=args.precision,
        quick=args.quick,
        batch_sizes=args.batch_size or [2],
        parts=parts,
        folder=args.folder,
        progress=show,
    )
    output(render(measured))
    if args.json is not None:
        write_json(args.json, measured)
        log(f"wrote {args.json}")
