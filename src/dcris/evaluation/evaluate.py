"""Evaluation in one call, for the command line and for Python."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dcris.checkpoints.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    read_config,
    read_training_images,
    store_calibration,
)
from dcris.checkpoints.resolve import locate
from dcris.checkpoints.training_images import Images, image_hash
from dcris.config import RunConfig
from dcris.data.dataset import Queries, all_queries, cut_phrases
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import strips, tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse, best_threshold
from dcris.evaluation.confidence import assess, presence_temperature
from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries, result_record
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.protocols.base import Protocol
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.arguments import PathLike, Precision, Refinement, as_path
from dcris.utils.device import choose_device, choose_precision
from dcris.utils.distributed import processes
from dcris.utils.files import expand_home
from dcris.utils.streams import note

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opens a display of progress for that many expressions; its context receives the number done."""


@contextmanager
def _no_bar(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The results of a model on a split."""

    results: list[EvalResult]
    """One for each expression, with its mask unless it was left out."""
    record: dict[str, Any]
    """The metrics in percent by key ("miou"), what they were measured on, and what with."""
    config: RunConfig
    model: ReferringSegmenter
    protocol: Protocol

    def full_record(self) -> dict[str, Any]:
        """Return the content of a result file: the record with `analysis`
        (dcris.evaluation.analysis.analyse) and, for a model with a presence head, `confidence`
        (dcris.evaluation.confidence.assess)."""
        record = {**self.record, "analysis": analyse(self.results, self.protocol.metrics)}
        if self.model.head.presence is not None:
            record["confidence"] = assess(self.results)
        return record


def evaluate(
    checkpoint: PathLike,
    data: ReferenceTable | Callable[[RunConfig], ReferenceTable],
    split: str = "val",
    *,
    protocol: str = "cris",
    none_rule: str | None = None,
    calibrate_on: str | None = None,
    refine: Refinement = "none",
    batch_size: int = 8,
    keep_masks: bool = True,
    precision: Precision | None = None,
    device: str = "auto",
    bar: Bar = _no_bar,
) -> Evaluation:
    """Evaluate a checkpoint on a split, as `dcris evaluate` does.

    Args:
        checkpoint: run, checkpoint, bundle, or name of a packaged or published model.
        data: from `dcris.load_dataset`; or a function that loads them for the checkpoint's
            configuration.
        split: its expressions are evaluated.
        protocol: "cris", "lavt", "refer", "cgformer", "grefcoco", "refzom" or "rrefcoco".
        none_rule: for protocols with absent targets: "head", "any-pixel", "pixels:50" or
            "score:0.5"; the protocol's own by default.
        calibrate_on: another split. The threshold with the best first metric on it is used, and the
            temperature of a presence head is fitted to it and stored with the checkpoint.
        refine: "guided" refines the edges of masks, which no protocol does.
        batch_size: images read at a time; does not change results.
        keep_masks: whether the results hold their masks.
        precision: of the network's computation; the run's own by default.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        bar: displays progress.

    Returns:
        The evaluation, the same on all processes that torchrun started.

    Raises:
        DcrisError: the checkpoint, the split or a file cannot be used, or an argument is wrong.
    """
    chosen = get_protocol(protocol, none_rule)
    if calibrate_on == split:
        raise DcrisError(f"the split {split} is evaluated and calibrated on; calibrate on another split")
    with processes(device) as group:
        place = choose_device(device)
        source = locate(checkpoint)
        config = read_config(find_checkpoint(source))
        # Before the model, which can take minutes to load.
        table = data if isinstance(data, ReferenceTable) else data(config)
        queries = all_queries(table.split(split))
        model, _ = load_checkpoint(source)
        trained_on = read_training_images(find_checkpoint(source))
        model.to(place)
        dtype = choose_precision(precision or config.train.precision, place)
        if group.first and (cut := cut_phrases(queries, config.data, tokenizer_of(config.model.text), table.dataset)):
            note(cut)

        def predict(queries: Queries, keep_masks: bool, share: tuple[int, int]) -> list[EvalResult]:
            with bar(len(queries) // share[1]) as progress:
                return list(
                    predict_queries(
                        model,
                        queries,
                        config,
                        chosen,
                        device=place,
                        dtype=dtype,
                        batch_size=batch_size,
                        share=share,
                        refine=refine,
                        keep_masks=keep_masks,
                        progress=progress,
                    )
                )

        temperature = None
        if calibrate_on is not None:
            others = all_queries(table.split(calibrate_on))
            calibration = predict_on_all_ranks(group, others, partial(predict, others, False))
            chosen = replace(chosen, threshold=best_threshold(calibration, chosen.metrics))
            if model.head.presence is not None:
                temperature = presence_temperature(calibration, float(model.head.presence.temperature))
                if temperature is not None:
                    model.head.presence.temperature.fill_(temperature)
                elif group.first:
                    note(
                        f"the split {calibrate_on} does not have both present and absent objects, so the probability of "
                        "presence is not calibrated"
                    )
        results = predict_on_all_ranks(group, queries, partial(predict, queries, keep_masks))
        first = group.first
    record: dict[str, Any] = result_record(results, table, split, chosen, model=model, device=place, dtype=dtype)
    if calibrate_on is not None:
        record["calibrated_on"] = calibrate_on
        if temperature is not None:
            record["temperature"] = temperature
            if first:
                _store_temperature(checkpoint, source, temperature, table, calibrate_on)
    if seen := _seen(results, trained_on, chosen):
        record["trained_on"] = seen
        if first:
            note(
                f"{seen['images']:,} of {seen['of']:,} evaluated images were trained on, such as {seen['examples'][0]}; scores "
                "of the others alone are in the result, under trained_on"
            )
    if refine != "none":
        record["refine"] = refine
    if strips(config.data, predicting=False):
        record["strip_phrases"] = config.data.strip_phrases
    return Evaluation(results, record, config, model, chosen)


def _seen(results: Sequence[EvalResult], images: Images, protocol: Protocol) -> dict[str, Any] | None:
    """Return what the evaluation says about images that the model was trained on; None if there is
    nothing to say, or nobody knows what it was trained on."""
    first = {result.reference.image_path: result.reference for result in results}
    hashes = {path: image_hash(reference) for path, reference in first.items()} if images else {}
    known = {path for path, found in hashes.items() if found in images}
    if not known:
        return None
    others = [result.overlap for result in results if result.reference.image_path not in known]
    return {
        "images": len(known),
        "of": len(first),
        "expressions": len(results) - len(others),
        "examples": [path.name for path in first if path in known][:10],
        "scores_of_others": summarise(others, protocol.metrics) if others else None,
    }


def _store_temperature(
    checkpoint: PathLike, source: Path, temperature: float, table: ReferenceTable, split: str
) -> None:
    # Not a packaged model beside a folder of its name, nor one in the Hub's cache.
    if source == expand_home(as_path(checkpoint, "the checkpoint")) and source.is_dir():
        facts = {"dataset": table.dataset, "split": split, "data_sha256": table.sha256(split)}
        store_calibration(find_checkpoint(source), temperature, facts)
    else:
        note(
            f"{checkpoint} is not a directory of a checkpoint, so the temperature is used here only; save the model with "
            "Segmenter.save_pretrained, then calibrate that"
        )
