"""The whole workflow in one command: scenes, training, evaluation, prediction, report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.config import RunConfig, load_config, refuse_other_run, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.data.scenes import cores, write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.evaluation.analysis import analyse
from dcris.evaluation.evaluator import EvalResult, exchange_expressions, predict_queries, result_record
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Cris
from dcris.evaluation.report.evaluation_report import write_evaluation_report
from dcris.inference.batch import BatchOptions, BatchPredictor
from dcris.inference.inputs import find_tasks
from dcris.inference.segmenter import Segmenter
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.loggers import read_log
from dcris.training.trainer import Trainer, build_model
from dcris.utils.device import choose_device, choose_precision
from dcris.utils.files import make_directory, write_json

TRAIN_SCENES, TEST_SCENES = 4800, 200


def quickstart(out: Path, *, seed: int = 0, device: str = "auto", log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the workflow in a folder; a second call continues where the first stopped.

    Args:
        out: gets scenes/ (the data set), config.json, log.jsonl and checkpoints/ (the run),
            metrics.json, predictions/ and report.html.
        seed: of the scenes and the training.
        device: as in `choose_device`.
        log: receives lines of progress.

    Returns:
        The content of metrics.json.

    Raises:
        DcrisError: a file cannot be written, or `out` has a run of another seed.
        Interrupted: after Ctrl-C while training.
    """
    begin = time.monotonic()
    chosen = choose_device(device)
    config = replace(get_recipe("dcris_tiny"), {"train.seed": seed})
    data = out / "scenes"
    if (out / "config.json").exists():
        refuse_other_run(load_config(out / "config.json"), config, out)
    # Written before the scenes, so that a run that stops while they are generated cannot be
    # continued
    # with another seed.
    write_json(make_directory(out) / "config.json", config.model_dump(mode="json"))
    if not (data / "scenes" / "refs(generated).p").exists():
        log(f"generating {TRAIN_SCENES + TEST_SCENES} scenes")
        write_scenes(data, train=TRAIN_SCENES, val=0, test=TEST_SCENES, seed=seed, workers=cores())
    table = load_references(data, config.data.dataset)
    tokenizer = tokenizer_of(config.model.text)
    log(f"training the adapters and the head ({time.monotonic() - begin:.0f} s so far)")
    model = build_model(config)
    result = Trainer(model, config, table, tokenizer, out, device=chosen, resume=True, log=log).run()
    log(f"evaluating on {TEST_SCENES} unseen scenes ({time.monotonic() - begin:.0f} s so far)")
    model, _ = load_checkpoint(result.best.path)
    model.to(chosen)
    results, metrics = evaluate_both_ways(model, config, table, "test", device=chosen)
    log("segmenting and reporting")
    segmenter = Segmenter(model, config, device=str(chosen))
    _segment_a_few(segmenter, table, out / "predictions")
    metrics["seconds"] = round(time.monotonic() - begin, 1)
    write_json(out / "metrics.json", metrics)
    write_evaluation_report(
        out / "report.html",
        title="dcris quickstart",
        config=config,
        model=model,
        results=results,
        record=metrics,
        log=read_log(out),
    )
    return metrics


def evaluate_both_ways(
    model: ReferringSegmenter, config: RunConfig, table: ReferenceTable, split: str, *, device: torch.device
) -> tuple[list[EvalResult], dict[str, Any]]:
    """Evaluate a split with its own expressions and with exchanged ones.

    Returns:
        The results with the own expressions, and the content of a result file with `miou_shuffled`,
        the mIoU with exchanged expressions.
    """
    references = table.split(split)
    protocol = Cris()
    results, exchanged = (
        list(predict_queries(model, queries, config, protocol, device=device))
        for queries in (all_queries(references), exchange_expressions(references))
    )
    metrics = result_record(
        results,
        table,
        split,
        protocol,
        model=model,
        device=device,
        dtype=choose_precision(config.train.precision, device),
    )
    analysis = analyse(results, protocol.metrics)
    return results, {
        **metrics,
        "miou_shuffled": summarise(result.overlap for result in exchanged)["miou"],
        "miou_by_kind": {group["name"]: group["miou"] for group in analysis["by_kind"]},
        "analysis": analysis,
    }


def _segment_a_few(segmenter: Segmenter, table: ReferenceTable, out: Path) -> None:
    """Predict masks for the first test scenes, with the first expression of each object."""
    expressions: dict[Path, list[str]] = {}
    for reference in table.split("test"):
        expressions.setdefault(reference.image_path, []).append(reference.expressions[0].text)
    for image, texts in list(expressions.items())[:4]:
        tasks, options = find_tasks([image], texts), BatchOptions(overwrite=True)
        for _ in BatchPredictor(segmenter, tasks, out / image.stem, options).run():
            pass
