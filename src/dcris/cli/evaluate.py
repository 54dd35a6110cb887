"""`dcris evaluate`."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from dcris.cli.common import (
    CHECKPOINT,
    adder,
    data_of,
    device_arguments,
    evaluation_arguments,
    log,
    positive,
)
from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement
from dcris.utils.streams import is_terminal, note


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
    from dataclasses import replace
    from functools import partial

    from tqdm import tqdm

    from dcris.checkpoints.checkpoint import find_checkpoint, load_checkpoint, store_calibration
    from dcris.checkpoints.resolve import locate
    from dcris.data.dataset import Queries, all_queries, cut_phrases
    from dcris.data.tokenizer import strips, tokenizer_of
    from dcris.evaluation.analysis import analyse, best_threshold
    from dcris.evaluation.confidence import assess, presence_temperature
    from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries, result_record
    from dcris.evaluation.protocols import get_protocol
    from dcris.evaluation.results import write_results
    from dcris.utils.device import choose_device, choose_precision
    from dcris.utils.distributed import processes
    from dcris.utils.files import expand_home, write_json

    protocol = get_protocol(args.protocol, args.none_rule)
    if args.calibrate_on == args.split:
        raise DcrisError(f"--calibrate-on and --split are both {args.split}; calibrate on another split")
    with processes(args.device) as group:
        device = choose_device(args.device)
        source = locate(args.checkpoint)
        model, config = load_checkpoint(source)
        model.to(device)
        dtype = choose_precision(args.precision or config.train.precision, device)
        table = data_of(args, config)
        queries = all_queries(table.split(args.split))
        if group.first and (cut := cut_phrases(queries, config.data, tokenizer_of(config.model.text), table.dataset)):
            note(cut)
        quiet = not (group.first and is_terminal())
        keep_masks = args.report is not None or args.answers is not None

        def predict(queries: Queries, keep_masks: bool, share: tuple[int, int]) -> list[EvalResult]:
            with tqdm(total=len(queries) // share[1], unit="expression", disable=quiet) as bar:
                return list(
                    predict_queries(
                        model,
                        queries,
                        config,
                        protocol,
                        device=device,
                        dtype=dtype,
                        batch_size=args.batch_size,
                        share=share,
                        refine=args.refine,
                        keep_masks=keep_masks,
                        progress=lambda done: bar.update(done - bar.n),
                    )
                )

        temperature = None
        if args.calibrate_on is not None:
            others = all_queries(table.split(args.calibrate_on))
            calibration = predict_on_all_ranks(group, others, partial(predict, others, False))
            protocol = replace(protocol, threshold=best_threshold(calibration, protocol.metrics))
            if model.head.presence is not None:
                temperature = presence_temperature(calibration, float(model.head.presence.temperature))
                if temperature is not None:
                    model.head.presence.temperature.fill_(temperature)
                elif group.first:
                    note(
                        f"the split {args.calibrate_on} does not have both present and absent objects, so the probability of "
                        "presence is not calibrated"
                    )
        results = predict_on_all_ranks(group, queries, partial(predict, queries, keep_masks))
        if not group.first:
            return
    record = result_record(results, table, args.split, protocol, model=model, device=device, dtype=dtype)
    if args.calibrate_on is not None:
        record["calibrated_on"] = args.calibrate_on
        if temperature is not None:
            record["temperature"] = temperature
            # Not a packaged model beside a folder of its name, nor one in the Hub's cache.
            if source == expand_home(args.checkpoint) and source.is_dir():
                facts = {
                    "dataset": table.dataset,
                    "split": args.calibrate_on,
                    "data_sha256": table.sha256(args.calibrate_on),
                }
                store_calibration(find_checkpoint(source), temperature, facts)
            else:
                note(
                    f"{args.checkpoint} is not a directory of a checkpoint, so the temperature is used here only; save the "
                    "model with Segmenter.save_pretrained, then calibrate that"
                )
    if args.refine != "none":
        record["refine"] = args.refine
    if strips(config.data, predicting=False):
        record["strip_phrases"] = config.data.strip_phrases
    analysed = {**record, "analysis": analyse(results, protocol.metrics)}
    if model.head.presence is not None:
        analysed["confidence"] = assess(results)
    # The files are written even if standard output fails, and the scores printed even if a
    # file fails.
    try:
        if args.answers is not None:
            write_results(args.answers, results, protocol, table.sha256(args.split))
        if args.out is not None:
            write_json(args.out, analysed)
        if args.report is not None:
            from dcris.evaluation.report.evaluation_report import write_evaluation_report

            write_evaluation_report(
                args.report,
                title=f"{config.recipe} on {table.dataset} {args.split}",
                config=config,
                model=model,
                results=results,
                record=analysed,
                metrics=protocol.metrics,
            )
    finally:
        log(json.dumps(record, indent=2))
