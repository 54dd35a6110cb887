"""`dcris evaluate`, `dcris score` and `dcris compare`."""

import argparse
import json
from pathlib import Path
from typing import Any

from dcris.cli.common import (
    CHECKPOINT,
    adder,
    data_of,
    data_root_argument,
    data_set_arguments,
    device_arguments,
    log,
    natural,
    own_name,
    positive,
    protocol_argument,
)
from dcris.errors import DcrisError
from dcris.utils.streams import is_terminal, note


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    add = adder(commands, "dcris ")
    evaluate = add("evaluate", _evaluate, "score a checkpoint", "runs/tiny --data data/scenes --split test")
    evaluate.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    data_root_argument(evaluate)
    data_set_arguments(evaluate)
    evaluate.add_argument("--split", default="val", help="(%(default)s)")
    protocol_argument(evaluate)
    evaluate.add_argument(
        "--calibrate-on",
        metavar="SPLIT",
        help="take the threshold with the best mIoU on this split, and not the protocol's; the result records it",
    )
    evaluate.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="photographs read at a time; changes no result (8)"
    )
    evaluate.add_argument("--out", type=Path, help="result file (JSON), with intervals and scores by group of phrases")
    evaluate.add_argument("--report", type=Path, help="HTML file with pictures of good and bad predictions")
    evaluate.add_argument("--answers", type=Path, help="JSON Lines file with every mask, for `dcris compare`")
    device_arguments(evaluate)

    score = add(
        "score",
        _score,
        "score anybody's masks",
        "masks --data ROOT --dataset refcoco --split testA --protocol lavt",
        "PREDICTIONS is a folder of <sent_id>.png, a COCO result .json with sent_id, an .npz of arrays named by sent_id, or "
        "what `dcris evaluate --answers` wrote.",
    )
    score.add_argument("predictions", type=Path, nargs="+", metavar="PREDICTIONS", help="several give a table's rows")
    data_root_argument(score)
    data_set_arguments(score)
    score.add_argument("--split", default="val", help="(%(default)s)")
    protocol_argument(score)
    score.add_argument(
        "--missing-is-empty", action="store_true", help="an expression without a mask counts as found nothing"
    )
    score.add_argument("--format", choices=("markdown", "latex", "json"), default="markdown", help="(%(default)s)")
    score.add_argument("--out", type=Path, help="result file (JSON)")
    score.add_argument("--report", type=Path, help="HTML file with pictures of good and bad predictions")

    compare = add(
        "compare",
        _compare,
        "show systems side by side, with intervals of their differences",
        "runs/a runs/b --data data/scenes --split test --out compare.html",
        "The first is what the others are compared with.",
    )
    compare.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help=f"{CHECKPOINT}; or a .jsonl file of answers that `dcris evaluate --answers` wrote",
    )
    data_root_argument(compare)
    data_set_arguments(compare)
    compare.add_argument("--split", default="val", help="(%(default)s)")
    protocol_argument(compare)
    compare.add_argument("--names", nargs="+", metavar="NAME", help="of the systems, in their order")
    compare.add_argument("--count", type=natural, default=8, metavar="N", help="phrases to show (%(default)s)")
    compare.add_argument("--out", type=Path, help="HTML file with tables, curves and pictures")
    compare.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures for a paper: each row, figure.png and figure.pdf"
    )
    compare.add_argument("--json", action="store_true", help="print JSON, with the scores by group of phrases")
    device_arguments(compare)


def _evaluate(args: argparse.Namespace) -> None:
    from dataclasses import replace
    from functools import partial

    from tqdm import tqdm

    from dcris.checkpoints.checkpoint import load_checkpoint
    from dcris.checkpoints.resolve import locate
    from dcris.data.dataset import Queries, all_queries, cut_phrases
    from dcris.data.tokenizer import tokenizer_of
    from dcris.evaluation.analysis import analyse, best_threshold
    from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries, result_record
    from dcris.evaluation.protocols import get_protocol
    from dcris.evaluation.results import write_results
    from dcris.utils.device import choose_device, choose_precision
    from dcris.utils.distributed import processes
    from dcris.utils.files import write_json

    protocol = get_protocol(args.protocol)
    if args.calibrate_on == args.split:
        raise DcrisError(f"a threshold that is chosen on {args.split} says nothing there; calibrate on another split")
    with processes(args.device) as group:
        device = choose_device(args.device)
        model, config = load_checkpoint(locate(args.checkpoint))
        model.to(device)
        dtype = choose_precision(args.precision or config.train.precision, device)
        table = data_of(args, config)
        queries = all_queries(table.split(args.split))
        if group.first and (cut := cut_phrases(queries, config.data, tokenizer_of(config.model.text), table.dataset)):
            note(cut)
        quiet = not (group.first and is_terminal())
        keep_masks = args.report is not None or args.answers is not None

        def answer(queries: Queries, keep_masks: bool, share: tuple[int, int]) -> list[EvalResult]:
            with tqdm(total=len(queries) // share[1], unit="phrase", disable=quiet) as bar:
                found = predict_queries(
                    model,
                    queries,
                    config,
                    protocol,
                    device=device,
                    dtype=dtype,
                    batch_size=args.batch_size,
                    share=share,
                    keep_masks=keep_masks,
                    progress=lambda done: bar.update(done - bar.n),
                )
                return list(found)

        if args.calibrate_on is not None:
            others = all_queries(table.split(args.calibrate_on))
            found = predict_on_all_ranks(group, others, partial(answer, others, False))
            protocol = replace(protocol, threshold=best_threshold(found))
        answers = predict_on_all_ranks(group, queries, partial(answer, queries, keep_masks))
        if not group.first:
            return
    result = result_record(answers, table, args.split, protocol, model=model, device=device, dtype=dtype)
    if args.calibrate_on is not None:
        result["calibrated_on"] = args.calibrate_on
    metrics = {**result, "analysis": analyse(answers, protocol.precision_includes_threshold)}
    try:
        if args.answers is not None:
            write_results(args.answers, answers, protocol, table.sha256(args.split))
        if args.out is not None:
            write_json(args.out, metrics)
        if args.report is not None:
            from dcris.evaluation.report.evaluation_report import write_evaluation_report

            title = f"{config.recipe} on {table.dataset} {args.split}"
            write_evaluation_report(
                args.report, title=title, config=config, model=model, answers=answers, metrics=metrics
            )
    finally:  # the scores are printed although a file cannot be written, and the files written although nothing can be printed
        log(json.dumps(result, indent=2))


def _score(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.dataset import all_queries
    from dcris.data.readers.load import load_references
    from dcris.evaluation.analysis import analyse
    from dcris.evaluation.evaluator import result_record
    from dcris.evaluation.external_masks import score_predictions
    from dcris.evaluation.metrics import PRECISION_THRESHOLDS
    from dcris.evaluation.protocols import get_protocol
    from dcris.utils.files import write_json
    from dcris.utils.text_tables import latex, markdown

    if len(args.predictions) > 1 and (args.out or args.report):
        raise DcrisError("--out and --report are of one system's masks; give them one at a time")
    protocol = get_protocol(args.protocol)
    own_name(args.data, args)
    table = load_references(args.data, args.dataset, args.split_by, mask_threshold=args.mask_threshold)
    queries = all_queries(table.split(args.split))
    results, rows = [], []
    for path in args.predictions:
        with tqdm(total=len(queries), unit="phrase", disable=not is_terminal()) as bar:
            answers = []
            for answer in score_predictions(
                path,
                queries,
                protocol,
                missing_is_empty=args.missing_is_empty,
                keep_masks=args.report is not None,
                mask_threshold=args.mask_threshold,
            ):
                answers.append(answer)
                bar.update(1)
        result = result_record(answers, table, args.split, protocol)
        results.append({"predictions": path.name, **result})
        columns = ("miou", "oiou", *(f"prec@{threshold}" for threshold in PRECISION_THRESHOLDS))
        rows.append([path.stem, *(f"{result[column]:.2f}" for column in columns)])
    metrics = {**results[0], "analysis": analyse(answers, protocol.precision_includes_threshold)}
    try:
        if args.out is not None:
            write_json(args.out, metrics)
        if args.report is not None:
            from dcris.evaluation.report.evaluation_report import write_evaluation_report

            title = f"{args.predictions[0].name} on {table.dataset} {args.split}"
            write_evaluation_report(args.report, title=title, answers=answers, metrics=metrics)
    finally:
        if args.format == "json":
            log(json.dumps(results[0] if len(results) == 1 else results, indent=2))
        else:
            precisions = (f"P@{threshold}" for threshold in PRECISION_THRESHOLDS)
            header = [f"{table.dataset} {args.split} ({protocol.name})", "mIoU", "oIoU", *precisions]
            log((latex if args.format == "latex" else markdown)(header, rows))


def _compare(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.checkpoints.checkpoint import find_checkpoint, read_config
    from dcris.checkpoints.resolve import locate
    from dcris.data.dataset import all_queries
    from dcris.data.readers.load import load_references
    from dcris.evaluation.compare import as_text, compare, gather, is_answers, name_systems, telling
    from dcris.evaluation.protocols import get_protocol
    from dcris.evaluation.report.comparison_report import write_comparison_report
    from dcris.evaluation.report.figure import write_figures
    from dcris.evaluation.report.panels import as_panel
    from dcris.utils.device import choose_device

    names = name_systems(args.systems, args.names or ())
    protocol, device = get_protocol(args.protocol), choose_device(args.device)
    paths = [Path(each) if is_answers(Path(each)) else find_checkpoint(locate(each)) for each in args.systems]
    models = [path for path in paths if not is_answers(path)]
    if models:
        table = data_of(args, read_config(models[0]))
    elif own_name(args.data, args) is None and args.dataset is None:
        raise DcrisError("files of answers do not say which data set they are of; give --dataset")
    else:
        table = load_references(args.data, args.dataset, args.split_by, mask_threshold=args.mask_threshold)
    queries = all_queries(table.split(args.split))
    with tqdm(total=len(queries) * len(models), unit="phrase", disable=not is_terminal()) as bar:
        done = dict.fromkeys(names, 0)

        def progress(name: str, count: int) -> None:
            bar.update(count - done[name])
            done[name] = count

        systems = gather(
            dict(zip(names, paths, strict=True)),
            queries,
            protocol,
            device=device,
            precision=args.precision,
            data=table.sha256(args.split),
            progress=progress,
        )
    comparison = compare(systems, protocol.precision_includes_threshold)
    shown = telling(systems, args.count)
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
                    "protocol": protocol.name,
                },
                panels={heading: map(as_panel, some) for heading, some in shown.items()},
            )
        if args.images is not None and shown:
            rows = enumerate((answers for some in shown.values() for answers in some), 1)
            write_figures(
                args.images,
                (
                    (f"{number:02}-sentence-{answers[names[0]].expression.sent_id}", as_panel(answers))
                    for number, answers in rows
                ),
            )
    finally:
        log(json.dumps(comparison, indent=2) if args.json else as_text(comparison))
