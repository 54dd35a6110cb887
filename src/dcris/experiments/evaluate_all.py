"""Evaluation of a checkpoint on every data set and split below a folder: a row of a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from dcris.checkpoints.checkpoint import find_checkpoint, read_config
from dcris.checkpoints.resolve import locate
from dcris.data.dataset import all_queries
from dcris.data.readers.load import list_data_sets, load_references
from dcris.data.registry import DATASETS
from dcris.data.table import is_utf8
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse
from dcris.evaluation.evaluate import Bar, Runner, no_bar
from dcris.evaluation.none_rules import HEAD
from dcris.evaluation.protocols import Protocol, get_protocol
from dcris.experiments.bench import (
    EXPRESSIONS,
    count_operations,
    in_own_process,
    peak_of_prediction,
    random_image,
    random_towers,
    take_turns,
)
from dcris.experiments.results_table import mean_of_means
from dcris.inference.segmenter import Segmenter
from dcris.utils.arguments import PathLike, Precision
from dcris.utils.device import precision_of
from dcris.utils.distributed import processes
from dcris.utils.files import write_json
from dcris.utils.provenance import describe
from dcris.utils.streams import note
from dcris.utils.text_tables import score_text

TRAIN = "train"
"""The split that is not evaluated."""
_WITHOUT_HEAD = "pixels:50"
"""Rule for absent targets of models without a presence head: that of the GRES paper."""


def evaluate_all(
    checkpoint: PathLike,
    root: Path,
    *,
    dataset: str | None = None,
    split_by: str | None = None,
    mask_threshold: float | None = None,
    protocol: str | None = None,
    none_rule: str | None = None,
    boundary: bool = False,
    name: str | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    precision: Precision | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate a checkpoint on all splits but "train" of all data sets below a folder.

    Args:
        checkpoint: run, checkpoint, bundle, or name of a packaged or published model.
        root: folder of the data sets, or one .jsonl file.
        dataset, split_by: only these; all by default.
        mask_threshold: for mask images with more than two values; that of the checkpoint's run by
            default.
        protocol: of all data sets; by default the usual one of each (dcris.data.registry).
        none_rule: for protocols with absent targets. By default the protocol's own, but pixels:50
            in place of the presence head of a model that has none.
        boundary: whether to add Boundary IoU to the metrics.
        name: of the system, in tables; the last part of the checkpoint's path by default, without
            ".safetensors".
        out: file that is written after each split, so that an interruption loses one split only.
        batch_size, precision, device, bar: as in `dcris.evaluation.evaluate.evaluate`.
        log: receives a line for each split.

    Returns:
        A dict of
        name, checkpoint: of the system.
        results: for each split, the content of a result file with scores by category.
        averages: by metric, the mean over data sets of the mean over their splits, of the metrics
            that all results have by one definition, and that are null in none.
        cost: see `measure_cost`.
        provenance: see `dcris.utils.provenance.describe`, and `seconds`.

    Raises:
        DcrisError: there is nothing to evaluate, or the checkpoint, a data set or a file cannot be
            used. All data sets are read first, so that such an error comes early.
    """
    begin = time.monotonic()
    system = Path(checkpoint).resolve().name.removesuffix(".safetensors") if name is None else name
    _require_name(system, "give another --name")
    with processes(device) as group:
        source = locate(checkpoint)
        config = read_config(find_checkpoint(source))
        threshold = config.data.mask_threshold if mask_threshold is None else mask_threshold
        tables = [
            load_references(root, *place, mask_threshold=threshold)
            for place in list_data_sets(root, dataset)
            if dataset in (None, place[0]) and split_by in (None, place[1])
        ]
        splits = [(table, split) for table in tables for split in table.splits() if split != TRAIN]
        if not splits:
            wanted = " ".join(word for word in (dataset, split_by) if word)
            raise DcrisError(
                f"{root} has no split to evaluate{f' of {wanted}' if wanted else ''}; give a folder of data sets with val or "
                f"test splits{'' if dataset else ', or name a data set with --dataset'}"
            )
        for table, split in splits:
            for text in (table.dataset, table.split_by, split):
                _require_name(text, f"rename that data set or split in {root}")
        runner = Runner.load(source, group, device=device, precision=precision, batch_size=batch_size, bar=bar)
        protocols = {
            table.dataset: _protocol(
                table.dataset, protocol, none_rule, boundary, runner.model.head.presence is not None
            )
            for table in tables
        }
        if none_rule is not None and all(each.none_rule is None for each in protocols.values()):
            get_protocol(next(iter(protocols.values())).name, none_rule)  # raises, and says why
        row: dict[str, Any] = {
            "name": system,
            "checkpoint": str(checkpoint),
            "results": [],
            "averages": {},
            "cost": group.from_first(partial(measure_cost, runner)),
            "provenance": describe(runner.device),
        }
        for table, split in splits:
            chosen = protocols[table.dataset]
            queries = all_queries(table.split(split))
            runner.warn(queries, table.dataset, chosen)
            results = runner.predict(queries, chosen)
            seen = runner.seen(results, chosen)
            record = runner.record(results, table, split, chosen, **({"trained_on": seen} if seen else {}))
            record["analysis"] = analyse(results, chosen.metrics, by_category=True, size_subset=chosen.size_subset)
            row["results"].append(record)
            row["averages"] = averages(row["results"], {each.dataset: protocols[each.dataset] for each in tables})
            row["provenance"]["seconds"] = round(time.monotonic() - begin, 1)
            if group.first:
                shown = ", ".join(f"{metric.title} {score_text(record[metric.key])}" for metric in chosen.metrics[:2])
                log(f"{table.dataset} ({table.split_by}) {split}, {chosen.label}: {shown}")
                if out is not None:
                    write_json(out, row)
    return row


def _require_name(text: str, advice: str) -> None:
    if not text.strip() or not is_utf8(text):
        raise DcrisError(f"{text!r} cannot be a name in tables; {advice}")


def _protocol(dataset: str, name: str | None, none_rule: str | None, boundary: bool, has_head: bool) -> Protocol:
    """Return the protocol that a data set is evaluated by."""
    usual = DATASETS[dataset].protocol if dataset in DATASETS else "cris"
    chosen = get_protocol(name or usual, None, boundary)
    if chosen.none_rule is None:
        return chosen
    if none_rule is None and chosen.none_rule == HEAD and not has_head:
        note(f"the model has no presence head, so {dataset} is evaluated with --none-rule {_WITHOUT_HEAD}")
        none_rule = _WITHOUT_HEAD
    return get_protocol(chosen.name, none_rule, boundary)


def averages(records: Sequence[Mapping[str, Any]], protocols: Mapping[str, Protocol]) -> dict[str, float]:
    """Return the mean over data sets of the mean over their splits, by metric, of the metrics that
    all results have, by one definition: protocols call unlike metrics gIoU. None of them is null in
    any result."""
    first, *others = (protocols[name].metrics for name in dict.fromkeys(record["dataset"] for record in records))
    shared = [metric.key for metric in first if all(metric in metrics for metrics in others)]
    data_sets = [record["dataset"] for record in records]
    means = {key: mean_of_means(data_sets, [record[key] for record in records]) for key in shared}
    return {key: mean for key, mean in means.items() if mean is not None}


def measure_cost(runner: Runner, rounds: int = 3) -> dict[str, float]:
    """Measure one prediction: an image of 640 x 480 pixels and one expression.

    Returns:
        A dict of
        trained, frozen: numbers of weights, those of the head among the trained ones.
        adapters: trained weights without the head, which papers report.
        flops: floating-point operations of matrix products, convolutions and attention; a
            multiply-add counts as 2.
        seconds: median of `rounds` predictions, after one that is not counted.
        peak_memory: GiB, in a process of its own: of tensors on a GPU, else of the process.
    """
    counts = runner.model.count_weights()
    precision = precision_of(runner.dtype)
    segmenter = Segmenter(runner.model, runner.config, device=str(runner.device), precision=precision)
    predict = partial(segmenter.predict, random_image(), EXPRESSIONS[0])
    predict()
    flops = count_operations(predict)
    seconds = take_turns({"one": predict}, rounds, runner.device)["one"]
    config = random_towers(runner.config)
    return {
        "trained": counts["adapters"] + counts["head"],
        "adapters": counts["adapters"],
        "frozen": counts["frozen"],
        "flops": flops,
        "seconds": median(seconds),
        "peak_memory": in_own_process(peak_of_prediction, config, 1, str(runner.device), precision),
    }
