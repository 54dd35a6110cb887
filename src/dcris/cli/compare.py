"""`dcris compare`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcris.cli.common import (
    CHECKPOINT,
    adder,
    data_of,
    device_arguments,
    evaluation_arguments,
    natural,
    output,
    own_name,
    positive,
    progress,
    refuse_given,
)
from dcris.errors import DcrisError

if TYPE_CHECKING:
    from dcris.evaluation.metrics import Score

_OF_EXAMPLES = ("count", "sent_ids", "phrases", "rows")
"""Arguments that choose the expressions that --out and --images show."""

_OF_IMAGES = (
    *("data", "dataset", "split_by", "split", "protocol", "none_rule", "boundary", "mask_threshold", "precision"),
    *("out", "images", *_OF_EXAMPLES),
)
"""Arguments that are for images."""


def add(commands: Any) -> None:
    """Add the command's parser."""
    compare = adder(commands, "dcris ")(
        "compare",
        _compare,
        "compare systems, with intervals of their differences",
        "runs/a runs/b --data data/scenes --split test --out compare.html",
        "The first system is the baseline of the others.",
    )
    compare.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help=f"{CHECKPOINT}; or a .jsonl results file of `dcris evaluate --answers`; or, of videos, .json "
        "result files of `dcris score --out`, which need none of the following options",
    )
    evaluation_arguments(compare, data_required=False)
    compare.set_defaults(split=None, protocol=None)  # to tell whether they were given for videos
    compare.add_argument(
        "--names", nargs="+", metavar="NAME", help="names of the systems (default: parts of their paths)"
    )
    compare.add_argument("--count", type=natural, metavar="N", help="number of expressions to show (default: 8)")
    chosen = compare.add_mutually_exclusive_group()
    chosen.add_argument("--sent-ids", type=int, nargs="+", metavar="ID", help="expressions to show, by sentence id")
    chosen.add_argument("--phrases", nargs="+", metavar="PHRASE", help="expressions to show, by their text")
    chosen.add_argument(
        "--rows",
        type=positive,
        nargs="+",
        metavar="N",
        help="of the expressions that would be shown, only these, by the numbers in the names of their files",
    )
    compare.add_argument("--out", type=Path, help="HTML report to write, with tables, curves and examples")
    compare.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder for paper figures: each row, figure.png, .pdf and .tex"
    )
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, with the scores by group of expressions")
    form.add_argument("--latex", action="store_true", help="print a LaTeX table, which needs the package booktabs")
    device_arguments(compare)


def _compare(args: argparse.Namespace) -> None:
    from dcris.evaluation.video_results import is_video_result

    videos = [each for each in args.systems if is_video_result(Path(each))]
    if len(videos) == len(args.systems):
        _compare_videos(args)
    elif videos:
        raise DcrisError(
            f"{videos[0]} is a result file of videos (.json), and not all systems are; for images, give models or .jsonl files "
            "of `dcris evaluate --answers`"
        )
    else:
        _compare_images(args)


def _compare_videos(args: argparse.Namespace) -> None:
    from dcris.evaluation.compare import name_systems
    from dcris.evaluation.video_results import compare_videos

    refuse_given(args, _OF_IMAGES, "is for images, and result files of videos state what they measure")
    names = name_systems(args.systems, args.names or ())
    comparison, protocol = compare_videos(dict(zip(names, map(Path, args.systems), strict=True)))
    _print(args, comparison, protocol.metrics)


def _print(args: argparse.Namespace, comparison: Mapping[str, Any], metrics: "Sequence[Score]") -> None:
    from dcris.evaluation.compare import as_latex, as_text

    if args.json:
        output(json.dumps(comparison, indent=2))
    else:
        output((as_latex if args.latex else as_text)(comparison, metrics))


def _compare_images(args: argparse.Namespace) -> None:
    from dcris.checkpoints.checkpoint import find_checkpoint, read_config
    from dcris.checkpoints.resolve import locate
    from dcris.data.dataset import all_queries
    from dcris.data.readers.load import load_references
    from dcris.evaluation.compare import (
        chosen_examples,
        compare,
        evaluate_systems,
        is_results_file,
        name_systems,
    )
    from dcris.evaluation.protocols import get_protocol
    from dcris.evaluation.report.comparison_report import write_comparison_report
    from dcris.evaluation.report.figure import write_figures
    from dcris.evaluation.report.panels import make_panel
    from dcris.utils.device import choose_device
    from dcris.utils.files import require_outputs

    require_outputs((args.out,), (args.data, *args.systems))
    if args.data is None:
        raise DcrisError("the data set is missing; give --data ROOT")
    if args.out is None and args.images is None:
        refuse_given(args, _OF_EXAMPLES, "chooses what --out and --images show, and neither was given")
    args.split, args.protocol = args.split or "val", args.protocol or "cris"
    names = name_systems(args.systems, args.names or ())
    protocol, device = get_protocol(args.protocol, args.none_rule, args.boundary), choose_device(args.device)
    paths = [Path(each) if is_results_file(Path(each)) else find_checkpoint(locate(each)) for each in args.systems]
    models = [path for path in paths if not is_results_file(path)]
    if not models:
        refuse_given(args, ("precision",), "is for models, and only results files were given")
    if models:
        table = data_of(args, read_config(models[0]))
    elif own_name(args.data, args.dataset, args.split_by) is None and args.dataset is None:
        raise DcrisError("results files do not name their data set; give --dataset")
    else:
        table = load_references(args.data, args.dataset, args.split_by, mask_threshold=args.mask_threshold)
    queries = all_queries(table.split(args.split))
    with progress(len(queries) * len(models), "expression") as show:
        done = dict.fromkeys(names, 0)

        def show_done(name: str, count: int) -> None:
            done[name] = count
            show(sum(done.values()))

        systems = evaluate_systems(
            dict(zip(names, paths, strict=True)),
            queries,
            protocol,
            device=device,
            precision=args.precision,
            data=table.sha256(args.split),
            progress=show_done,
        )
    comparison = compare(systems, protocol.metrics)
    examples = chosen_examples(
        systems,
        sent_ids=args.sent_ids or (),
        phrases=args.phrases or (),
        rows=args.rows or (),
        count=8 if args.count is None else args.count,
    )
    # The files are written even if standard output fails, and the scores printed even if a
    # file fails.
    try:
        if args.out is not None:
            write_comparison_report(
                args.out,
                title=f"{', '.join(names[:-1])} and {names[-1]}",
                comparison=comparison,
                measured={
                    "dataset": table.dataset,
                    "split_by": table.split_by,
                    "split": args.split,
                    "protocol": protocol.label,
                },
                panels={heading: map(make_panel, rows) for heading, rows in examples.items()},
                metrics=protocol.metrics,
            )
        if args.images is not None and examples:
            rows = enumerate((results for rows in examples.values() for results in rows), 1)
            write_figures(
                args.images,
                (
                    (f"{number:02}-sentence-{results[names[0]].expression.sent_id}", make_panel(results))
                    for number, results in rows
                ),
                f"{table.dataset} {args.split}",
            )
    finally:
        _print(args, comparison, protocol.metrics)
