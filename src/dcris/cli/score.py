"""`dcris score`."""

import argparse
import json
from pathlib import Path
from typing import Any

from dcris.cli.common import (
    adder,
    evaluation_arguments,
    output,
    own_name,
    progress,
    refuse_given,
)
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Add the command's parser."""
    score = adder(commands, "dcris ")(
        "score",
        _score,
        "evaluate predicted masks",
        "masks --data ROOT --dataset refcoco --split testA --protocol lavt",
        "PREDICTIONS is a folder of <sent_id>.png, a COCO result .json with sent_id, an .npz of arrays named by sent_id, or "
        "a results file of `dcris evaluate --answers`. PNG files and arrays may also be named by PhraseCut's task_id, "
        "RefSegRS's id, or the file name of a ReasonSeg image without its ending. For videos, it is a folder or a zip file in "
        "the layout that the authors of the data set take.",
    )
    score.add_argument(
        "predictions",
        type=Path,
        nargs="+",
        metavar="PREDICTIONS",
        help="masks to evaluate; each makes a row of the table",
    )
    evaluation_arguments(score, videos=True)
    score.set_defaults(protocol=None)  # the usual one
    score.add_argument(
        "--missing-is-empty", action="store_true", help="score an expression without a mask as an empty mask"
    )
    score.add_argument(
        "--format",
        choices=("markdown", "latex", "json"),
        default="markdown",
        help="format of the printed table (default: %(default)s)",
    )
    score.add_argument("--out", type=Path, help="result file to write (JSON)")
    score.add_argument(
        "--by-category",
        action="store_true",
        help="add scores by category of the objects to --out and --report, as `evaluate --all` does",
    )
    score.add_argument("--report", type=Path, help="HTML report to write, with good and bad predictions")


def _score(args: argparse.Namespace) -> None:
    from dcris.data.registry import VIDEO_SETS
    from dcris.utils.files import require_outputs

    require_outputs((args.out, args.report), (args.data, *args.predictions))
    if len(args.predictions) > 1 and (args.out or args.report):
        raise DcrisError("--out and --report take the masks of one system; give one PREDICTIONS")
    if args.dataset in VIDEO_SETS:
        _score_videos(args)
    else:
        _score_images(args)


def _score_images(args: argparse.Namespace) -> None:
    from dcris.data.dataset import all_queries
    from dcris.data.readers.load import load_references
    from dcris.evaluation.analysis import analyse
    from dcris.evaluation.compare import system_name
    from dcris.evaluation.confidence import assess
    from dcris.evaluation.evaluator import result_record
    from dcris.evaluation.external_masks import score_masks
    from dcris.evaluation.protocols import get_protocol
    from dcris.utils.files import write_json
    from dcris.utils.text_tables import latex, markdown, score_text

    if args.out is None and args.report is None:
        refuse_given(args, ("by_category",), "adds to --out and --report, and neither was given")
    protocol = get_protocol(args.protocol or "cris", args.none_rule, args.boundary)
    own_name(args.data, args.dataset, args.split_by)
    table = load_references(args.data, args.dataset, args.split_by, mask_threshold=args.mask_threshold)
    queries = all_queries(table.split(args.split))
    records, rows = [], []
    for path in args.predictions:
        results = []
        with progress(len(queries), "expression") as show:
            for result in score_masks(
                path,
                queries,
                protocol,
                missing_is_empty=args.missing_is_empty,
                keep_masks=args.report is not None,
                mask_threshold=args.mask_threshold,
            ):
                results.append(result)
                show(len(results))
        record = result_record(results, table, args.split, protocol)
        records.append({"predictions": path.name, **record})
        rows.append([system_name(path), *(score_text(record[metric.key], ".2f") for metric in protocol.metrics)])
    analysis = analyse(results, protocol.metrics, by_category=args.by_category, size_subset=protocol.size_subset)
    analysed = {**records[0], "analysis": analysis}
    if (confidence := assess(results)) is not None:
        analysed["confidence"] = confidence
    # The files are written even if standard output fails, and the scores printed even if a
    # file fails.
    try:
        if args.out is not None:
            write_json(args.out, analysed)
        if args.report is not None:
            from dcris.evaluation.report.evaluation_report import write_evaluation_report

            write_evaluation_report(
                args.report,
                title=f"{args.predictions[0].name} on {table.dataset} {args.split}",
                results=results,
                record=analysed,
                metrics=protocol.metrics,
            )
    finally:
        if args.format == "json":
            output(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        else:
            titles = [metric.title.replace("Prec@", "P@") for metric in protocol.metrics]
            header = [f"{table.dataset} {args.split} ({protocol.label})", *titles]
            form = latex if args.format == "latex" else markdown
            output(form(header, rows))
            if len(rows) == 1 and "by_subset" in analysis:
                keys = [metric.key for metric in protocol.metrics]
                subsets = [
                    [each["name"], *(score_text(each[key], ".2f") for key in keys)] for each in analysis["by_subset"]
                ]
                output("\n" + form([f"subsets of {table.dataset} {args.split}", *header[1:]], subsets))


def _score_videos(args: argparse.Namespace) -> None:
    from dcris.data.video_readers.load import load_videos
    from dcris.evaluation.compare import system_name
    from dcris.evaluation.video_protocols import get_video_protocol, mask_folders, score_videos
    from dcris.evaluation.video_results import video_record
    from dcris.utils.files import write_json
    from dcris.utils.text_tables import latex, markdown

    of_images = ("split_by", "none_rule", "boundary", "by_category", "report")
    refuse_given(args, of_images, f"is for images, not for {args.dataset}")
    protocol = get_video_protocol(args.dataset, args.protocol)
    videos = load_videos(args.data, args.dataset, args.split)
    scores = (*protocol.metrics, *protocol.decays)
    records, rows = [], []
    for path in args.predictions:
        with progress(len(mask_folders(videos)), "clip") as show:
            results = score_videos(
                path,
                videos,
                protocol,
                missing_is_empty=args.missing_is_empty,
                mask_threshold=args.mask_threshold,
                progress=show,
            )
        record = video_record(results, videos, protocol)
        records.append({"predictions": path.name, **record})
        rows.append([system_name(path), *(f"{record[score.key]:.2f}" for score in scores)])
    try:
        if args.out is not None:
            write_json(args.out, records[0])
    finally:
        if args.format == "json":
            short = [{key: value for key, value in record.items() if key != "rows"} for record in records]
            output(json.dumps(short[0] if len(short) == 1 else short, indent=2))
        else:
            header = [f"{args.dataset} {args.split} ({protocol.name})", *(score.title for score in scores)]
            output((latex if args.format == "latex" else markdown)(header, rows))
