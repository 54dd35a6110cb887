"""The whole workflow in one command: scenes, training, evaluation, prediction, report; and what the
packaged models do with the example photographs, with absent objects and with several.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.config import RunConfig, load_config, refuse_other_run, replace
from dcris.data.dataset import all_queries
from dcris.data.images import read_image
from dcris.data.masks import union_mask
from dcris.data.photographs import example_photographs
from dcris.data.readers.load import load_references
from dcris.data.scenes import DATASET, SPLIT_BY, write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse
from dcris.evaluation.confidence import assess, has_object
from dcris.evaluation.evaluator import EvalResult, exchange_expressions, predict_queries, result_record
from dcris.evaluation.metrics import GIOU, summarise
from dcris.evaluation.protocols import Cris, Grefcoco
from dcris.evaluation.report.evaluation_report import write_evaluation_report
from dcris.evaluation.report.panels import NamedMask, Panel, first_on_distinct_images
from dcris.inference.batch import BatchOptions, BatchPredictor, Done
from dcris.inference.inputs import find_tasks
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.loggers import read_log
from dcris.training.trainer import Trainer, build_model
from dcris.types import Reference
from dcris.utils.device import choose_device, choose_precision
from dcris.utils.files import make_directory, write_json
from dcris.utils.workers import cores

TRAIN_SCENES, TEST_SCENES, GENERALISED_SCENES = 4800, 200, 40


def quickstart(out: Path, *, seed: int = 0, device: str = "auto", log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the workflow in a folder; a second call continues where the first stopped.

    Without the packages of the extra `photos`, the photographs are left out, and a line is printed.

    Args:
        out: gets scenes/ (the data set), config.json, log.jsonl and checkpoints/ (the run),
            generalised/ (scenes with phrases for absent and several objects), metrics.json,
            predictions/ and report.html.
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
    # continued with another seed.
    write_json(make_directory(out) / "config.json", config.model_dump(mode="json"))
    if not (data / DATASET / f"refs({SPLIT_BY}).p").exists():
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
    scenes: dict[Path, list[str]] = {}
    for reference in table.split("test"):
        scenes.setdefault(reference.image_path, []).append(reference.expressions[0].text)
    _predict(Segmenter(model, config, device=str(chosen)), list(scenes.items())[:4], out / "predictions")
    photographs: list[tuple[Path, Prediction]] = []
    try:
        photographs = _predict(
            Segmenter.from_pretrained("photos", device=str(chosen)), example_photographs(), out / "predictions"
        )
    except DcrisError as error:
        log(f"the photographs are left out: {error}")
    metrics["photographs"] = [
        {"photograph": path.name, "phrase": each.phrase, "score": each.score, "box": list(each.box or ())}
        for path, each in photographs
    ]
    log("asking the packaged model for absent objects, and for several")
    metrics["generalised"], generalised = _generalised(out / "generalised", seed, chosen)
    metrics["seconds"] = round(time.monotonic() - begin, 1)
    write_json(out / "metrics.json", metrics)
    write_evaluation_report(
        out / "report.html",
        title="dcris quickstart",
        config=config,
        model=model,
        results=results,
        record={**metrics, **_facts(metrics["generalised"])},
        log=read_log(out),
        opening={
            "Photographs": (
                Panel(read_image(path), each.phrase, None, (NamedMask(f"photos, {each.verdict}", each.mask, None),))
                for path, each in photographs
            ),
            **generalised,
        },
    )
    return metrics


def _facts(generalised: dict[str, Any]) -> dict[str, str]:
    """Return the scores on several and absent objects, for the report's table of facts."""
    titles = {
        "n_acc": "absent objects recognised (N-acc)",
        "t_acc": "present objects recognised (T-acc)",
        "presence_auroc": "AUROC of presence",
        "miou_several": "mIoU of several objects",
        "miou_single": "mIoU of one object",
    }
    return {f"tiny: {title}": f"{generalised[key]:.1f}%" for key, title in titles.items()}


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


def evaluate_generalised(
    model: ReferringSegmenter, config: RunConfig, references: Sequence[Reference], *, device: torch.device
) -> tuple[list[EvalResult], dict[str, Any]]:
    """Evaluate expressions for one, several and absent objects by the protocol of gRefCOCO.

    Returns:
        The results; and the protocol's metrics in percent, `presence_auroc`,
        `presence_auroc_by_kind`, `presence_ece`, and the mIoU of single (`miou_single`) and several
        objects (`miou_several`).
    """
    protocol = Grefcoco()
    results = list(predict_queries(model, all_queries(references), config, protocol, device=device))
    present = (assess(results) or {})["present"]
    scores: dict[str, Any] = {
        **summarise((result.overlap for result in results), protocol.metrics),
        "presence_auroc": 100 * present["auroc"],
        "presence_auroc_by_kind": {kind: 100 * value for kind, value in present["by_kind"].items()},
        "presence_ece": 100 * present["ece"],
    }
    objects = [len(result.reference.segmentations) for result in results]
    for name, counts in (("single", range(1, 2)), ("several", range(2, sys.maxsize))):
        some = [result.overlap for result, count in zip(results, objects, strict=True) if count in counts]
        scores[f"miou_{name}"] = summarise(some, (GIOU,))["giou"]
    return results, scores


def _generalised(data: Path, seed: int, device: torch.device) -> tuple[dict[str, Any], dict[str, list[Panel]]]:
    """Ask the packaged model `tiny` for several objects of new scenes, and for absent ones.

    Returns:
        Its scores (see evaluate_generalised), and panels by heading.
    """
    if not (data / DATASET / f"refs({SPLIT_BY}).p").exists():
        write_scenes(data, train=0, val=0, test=GENERALISED_SCENES, seed=seed, generalised=True, workers=cores())
    references = load_references(data, DATASET).split("test")
    segmenter = Segmenter.from_pretrained("tiny", device=str(device))
    results, scores = evaluate_generalised(segmenter.model, segmenter.config, references, device=device)
    several = [result for result in results if len(result.reference.segmentations) > 1]
    absent = [result for result in results if not has_object(result)]
    panels = {
        heading: [_shown(segmenter, each) for each in first_on_distinct_images(some, 2)]
        for heading, some in (("Several objects", several), ("Not there", absent))
    }
    return scores, panels


def _shown(segmenter: Segmenter, result: EvalResult) -> Panel:
    """Return the panel of an expression as a user gets it: with an empty mask for what is probably
    not there."""
    reference, text = result.reference, result.expression.text
    (prediction,) = segmenter.predict(reference.image_path, text)
    name = f"tiny, {prediction.verdict}"
    truth = union_mask(reference.segmentations, reference.image_size).astype(bool)
    return Panel(read_image(reference.image_path), text, truth, (NamedMask(name, prediction.mask, None),))


def _predict(
    segmenter: Segmenter, examples: Iterable[tuple[Path, Sequence[str]]], out: Path
) -> list[tuple[Path, Prediction]]:
    """Predict masks for images with their phrases, and write a folder for each image."""
    found = []
    for image, phrases in examples:
        tasks, options = find_tasks([image], phrases), BatchOptions(overwrite=True)
        for event in BatchPredictor(segmenter, tasks, out / image.stem, options).run():
            if isinstance(event, Done):
                found += [(image, prediction) for prediction in event.predictions]
    return found
