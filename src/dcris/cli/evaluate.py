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
    given_options,
    log,
    output,
    own_name,
    positive,
    progress,
    refuse_given,
)
from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement


def add(commands: Any) -> None:
    """Add the command's parser."""
    evaluate = adder(commands, "dcris ")(
        "evaluate",
        _evaluate,
        "evaluate a checkpoint on a split, or on all",
        "runs/tiny --data data/scenes --split test",
        "`dcris table` makes tables of the results of --all.",
    )
    evaluate.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    evaluation_arguments(evaluate, videos=True)
    evaluate.set_defaults(split=None, protocol=None)  # to tell whether --all was given with one
    evaluate.add_argument(
        "--all",
        action="store_true",
        help="evaluate every split but train of every data set in ROOT, each by its usual protocol, with scores by category, "
        "averages, and the cost of a prediction; --dataset and --split-by choose among the data sets",
    )
    evaluate.add_argument(
        "--name", dest="system", metavar="NAME", help="name in tables, with --all (default: the last part of CKPT)"
    )
    evaluate.add_argument(
        "--by-category",
        action="store_true",
        help="add scores by category of the objects to --out and --report, as --all does",
    )
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
    from dcris.cli.evaluate_videos import evaluate_videos
    from dcris.data.registry import VIDEO_SETS
    from dcris.evaluation.evaluate import evaluate
    from dcris.evaluation.results import RULES, write_results
    from dcris.utils.distributed import described_processes
    from dcris.utils.files import require_outputs, write_json

    first = described_processes().first
    if first:
        require_outputs((args.out, args.report, args.answers), (args.checkpoint, args.data))
    if args.all:
        _evaluate_all(args)
        return
    if args.system is not None:
        raise DcrisError("--name is for --all, whose results are a row of a table; leave it out")
    if args.dataset in VIDEO_SETS:
        evaluate_videos(args)
        return
    if args.out is None and args.report is None:
        refuse_given(args, ("by_category",), "adds to --out and --report, and neither was given")
    args.split, args.protocol = args.split or "val", args.protocol or "cris"
    if args.calibrate_on == args.split:
        raise DcrisError(
            f"--calibrate-on and --split (default: val) are both {args.split}; give two splits, such as --calibrate-on val "
            "--split test"
        )
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
    analysed = found.full_record(args.by_category)
    # The files are written even if standard output fails, and the scores printed even if a
    # file fails.
    try:
        if args.answers is not None:
            rules = {key: value for key, value in found.record.items() if key in RULES}
            write_results(args.answers, found.results, found.protocol, found.record["data_sha256"], rules)
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


def _evaluate_all(args: argparse.Namespace) -> None:
    from dcris.experiments.evaluate_all import evaluate_all
    from dcris.experiments.results_table import read_row, scores_table
    from dcris.utils.distributed import described_processes

    if single := given_options(args, ("split", "calibrate_on", "report", "answers")):
        raise DcrisError(f"--all does not go with {single[0]}; leave out one of them")
    if args.refine != "none":
        raise DcrisError("--all does not go with --refine, which is part of no protocol; leave out one of them")
    first = described_processes().first
    row = evaluate_all(
        args.checkpoint,
        args.data,
        dataset=own_name(args.data, args.dataset, args.split_by) or args.dataset,
        split_by=args.split_by,
        mask_threshold=args.mask_threshold,
        protocol=args.protocol,
        none_rule=args.none_rule,
        boundary=args.boundary,
        name=args.system,
        out=args.out,
        batch_size=args.batch_size,
        precision=args.precision,
        device=args.device,
        bar=partial(progress, unit="expression", shown=first),
        log=log,
    )
    if first:
        output(scores_table([read_row(row, args.out or Path("the result"))], cost=True).render("markdown"))
