"""Evaluation in one call, for the command line and for Python."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

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
from dcris.data.registry import DATASETS
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import strips, tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse, best_threshold
from dcris.evaluation.confidence import assess, presence_temperature
from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries, result_record
from dcris.evaluation.metrics import summarise
from dcris.evaluation.none_rules import LeastScore
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.protocols.base import Protocol
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.arguments import PathLike, Precision, Refinement, as_path
from dcris.utils.device import choose_device, choose_precision
from dcris.utils.distributed import Processes, processes
from dcris.utils.files import expand_home
from dcris.utils.streams import note

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opens a display of progress for that many expressions; its context receives the number done."""


@contextmanager
def no_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Display nothing."""
    yield lambda done: None


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """A loaded checkpoint that predicts the masks of queries, on all processes of a group."""

    model: ReferringSegmenter
    """On `device`."""
    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    """Working precision."""
    group: Processes
    trained_on: Images
    """Those that the model was trained on; empty if that is unknown."""
    batch_size: int
    """Images read at a time; does not change results."""
    bar: Bar

    @classmethod
    def load(
        cls,
        source: Path,
        group: Processes,
        *,
        device: str = "auto",
        precision: Precision | None = None,
        batch_size: int = 8,
        bar: Bar = no_bar,
    ) -> "Runner":
        """Load a checkpoint from a path of `dcris.checkpoints.resolve.locate`.

        Raises:
            DcrisError: the checkpoint or the device cannot be used.
        """
        place = choose_device(device)
        model, config = load_checkpoint(source)
        dtype = choose_precision(precision or config.train.precision, place)
        trained_on = read_training_images(find_checkpoint(source))
        return cls(model.to(place), config, place, dtype, group, trained_on, batch_size, bar)

    def predict(
        self, queries: Queries, protocol: Protocol, *, refine: Refinement = "none", keep_masks: bool = False
    ) -> list[EvalResult]:
        """Return the results of all queries, the same on all processes; see `predict_queries`."""

        def predict_share(share: tuple[int, int]) -> list[EvalResult]:
            with self.bar(len(queries) // share[1]) as progress:
                return list(
                    predict_queries(
                        self.model,
                        queries,
                        self.config,
                        protocol,
                        device=self.device,
                        dtype=self.dtype,
                        batch_size=self.batch_size,
                        share=share,
                        refine=refine,
                        keep_masks=keep_masks,
                        progress=progress,
                    )
                )

        return predict_on_all_ranks(self.group, queries, predict_share)

    def record(
        self, results: Sequence[EvalResult], table: ReferenceTable, split: str, protocol: Protocol, **more: Any
    ) -> dict[str, Any]:
        """Return the content of a result file without its analysis, and with `more`."""
        record = result_record(results, table, split, protocol, model=self.model, device=self.device, dtype=self.dtype)
        record |= more
        if strips(self.config.data, predicting=False):
            record["strip_phrases"] = self.config.data.strip_phrases
        return record

    def seen(self, results: Sequence[EvalResult], protocol: Protocol) -> dict[str, Any] | None:
        """Return which images of the results were trained on, see `_seen`, and print a note, once
        for all processes, if there are any."""
        seen = _seen(results, self.trained_on, protocol)
        if seen and self.group.first:
            note(
                f"{seen['images']:,} of {seen['of']:,} evaluated images were trained on, such as {seen['examples'][0]}; scores "
                "of the others alone are in the result, under trained_on"
            )
        return seen

    def warn(self, queries: Queries, dataset: str, protocol: Protocol) -> None:
        """Print notes, once for all processes, if expressions are longer than the model reads, or
        have no target, which the protocol does not know."""
        if not self.group.first:
            return
        if cut := cut_phrases(queries, self.config.data, tokenizer_of(self.config.model.text), dataset):
            note(cut)
        absent = sum(not reference.targets(expression) for reference, expression in queries)
        if absent and protocol.empty_is_wrong:
            usual = DATASETS[dataset].protocol if dataset in DATASETS else "cris"
            better = next(name for name in (usual, "grefcoco") if not get_protocol(name).empty_is_wrong)
            note(
                f"{absent:,} of {len(queries):,} expressions have no target, which {protocol.name} scores 0 whatever "
                f"is predicted; --protocol {better} judges them"
            )


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

    def full_record(self, by_category: bool = False) -> dict[str, Any]:
        """Return the content of a result file: the record with `analysis`
        (dcris.evaluation.analysis.analyse), with scores by category if wanted, and, for a model
        with a presence head, `confidence` (dcris.evaluation.confidence.assess)."""
        analysis = analyse(
            self.results, self.protocol.metrics, by_category=by_category, size_subset=self.protocol.size_subset
        )
        record = {**self.record, "analysis": analysis}
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
    boundary: bool = False,
    calibrate_on: str | None = None,
    refine: Refinement = "none",
    batch_size: int = 8,
    keep_masks: bool = True,
    precision: Precision | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> Evaluation:
    """Evaluate a checkpoint on a split, as `dcris evaluate` does.

    Args:
        checkpoint: run, checkpoint, bundle, or name of a packaged or published model.
        data: from `dcris.load_dataset`; or a function that loads them for the checkpoint's
            configuration.
        split: its expressions are evaluated.
        protocol: "cris", "lavt", "refer", "cgformer", "grefcoco", "refzom", "rrefcoco", "lisa",
            "phrasecut" or "gseval".
        none_rule: for protocols with absent targets: "head", "any-pixel", "pixels:50" or
            "score:0.5"; the protocol's own by default.
        boundary: whether to add Boundary IoU to the metrics.
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
    chosen = get_protocol(protocol, none_rule, boundary)
    if calibrate_on == split:
        raise DcrisError(f"the split {split} is evaluated and calibrated on; calibrate on another split")
    with processes(device) as group:
        choose_device(device)  # before the data, which can take long to read
        source = locate(checkpoint)
        config = read_config(find_checkpoint(source))
        # Before the model, which can take minutes to load.
        table = data if isinstance(data, ReferenceTable) else data(config)
        queries = all_queries(table.split(split))
        runner = Runner.load(source, group, device=device, precision=precision, batch_size=batch_size, bar=bar)
        model = runner.model
        runner.warn(queries, table.dataset, chosen)
        temperature = None
        if calibrate_on is not None:
            others = all_queries(table.split(calibrate_on))
            calibration = runner.predict(others, chosen, refine=refine)
            if model.head.presence is not None:
                temperature = presence_temperature(calibration, float(model.head.presence.temperature))
                if temperature is not None:
                    model.head.presence.temperature.fill_(temperature)
                    if isinstance(chosen.none_rule, LeastScore):  # other rules do not depend on the temperature
                        calibration = runner.predict(others, chosen, refine=refine)
                elif group.first:
                    note(
                        f"the split {calibrate_on} does not have both present and absent objects, so the probability of "
                        "presence is not calibrated"
                    )
            chosen = replace(chosen, threshold=best_threshold(calibration, chosen.metrics))
        results = runner.predict(queries, chosen, refine=refine, keep_masks=keep_masks)
        first = group.first
    more: dict[str, Any] = {}
    if calibrate_on is not None:
        more["calibrated_on"] = calibrate_on
        if temperature is not None:
            more["temperature"] = temperature
            if first:
                _store_temperature(checkpoint, source, temperature, table, calibrate_on)
    if seen := runner.seen(results, chosen):
        more["trained_on"] = seen
    if refine != "none":
        more["refine"] = refine
    record = runner.record(results, table, split, chosen, **more)
    return Evaluation(results, record, config, model, chosen)


def _seen(results: Sequence[EvalResult], images: Images, protocol: Protocol) -> dict[str, Any] | None:
    """Return the record of evaluated images that the model was trained on; None if there are none,
    or its training images are unknown."""
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
