"""`dcris evaluate`."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

from dcris.cli.common import (
    CHECKPOINT,
    adder,
    data_of,
    device_arguments,
    evaluation_arguments,
    output,
    positive,
    progress,
)
from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement


def add(commands: Any) -> None:
    """Add the command's parser."""
    evaluate = adder(commands, "dcris ")(
        "evaluate", _evaluate, "evaluate a checkpoint on a split", "runs/tiny --data data/scenes --split test"
    )
    evaluate.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    evaluation_arguments(evaluate)
    evaluate.add_argument(
        "--calibrate-on",
        metavar="SPLIT",
        help="use the threshold with the best first metric (mIoU) on this split, and fit the temperature of a presence head "
        "to it, which is stored with the checkpoint; the result records both (default: the protocol's threshold)",
    )
    evaluate.add_argument(
        "--refine",
        choices=get_args(Refinement),
        default="none",
        help="guided: move the edges of masks to edges of the image, which no protocol does; the result records it "
        "(default: %(default)s)",
    )
    evaluate.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="images read at a time; does not change results (default: %(default)s)",
    )
    evaluate.add_argument(
        "--out", type=Path, help="result file to write (JSON), with intervals and scores by group of expressions"
    )
    evaluate.add_argument("--report", type=Path, help="HTML report to write, with good and bad predictions")
    evaluate.add_argument(
        "--answers", type=Path, help="results file to write (JSON Lines), with every mask, for `dcris compare`"
    )
    device_arguments(evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from dcris.evaluation.evaluate import evaluate
    from dcris.evaluation.results import write_results
    from dcris.utils.distributed import described_processes
    from dcris.utils.files import write_json

    if args.calibrate_on == args.split:
        raise DcrisError(f"--calibrate-on and --split are both {args.split}; calibrate on another split")
    first = described_processes().first
    found = evaluate(
        args.checkpoint,
        partial(data_of, args),
        args.split,
        protocol=args.protocol,
        none_rule=args.none_rule,
        boundary=args.boundary,
        calibrate_on=args.calibrate_on,
        refine=args.refine,
        batch_size=args.batch_size,
        keep_masks=args.report is not None or args.answers is not None,
        precision=args.precision,
        device=args.device,
        bar=partial(progress, unit="expression", shown=first),
    )
    if not first:
        return
    analysed = found.full_record()
    # The files are written even if standard output fails, and the scores printed even if a
    # file fails.
    try:
        if args.answers is not None:
            write_results(args.answers, found.results, found.protocol, found.record["data_sha256"])
        if args.out is not None:
            write_json(args.out, analysed)
        if args.report is not None:
            from dcris.evaluation.report.evaluation_report import write_evaluation_report

            write_evaluation_report(
                args.report,
                title=f"{found.config.recipe} on {found.record['dataset']} {args.split}",
                config=found.config,
                model=found.model,
                results=found.results,
                record=analysed,
                metrics=found.protocol.metrics,
            )
    finally:
        output(json.dumps(found.record, indent=2))
