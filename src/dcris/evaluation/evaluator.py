"""Evaluation of a model on a split, for every method, data set and protocol.

Shape letters: B expressions, S side of the network's square input, H W pixels of an image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcris.checkpoints.backbones import fingerprint
from dcris.config import RunConfig
from dcris.data.dataset import ImageTask, ImageTasks, Queries, normalise, task_loader
from dcris.data.images import fit_image, read_image
from dcris.data.masks import decode_mask, encode_mask
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.metrics import Overlap, overlap_curve, summarise, with_boundary
from dcris.evaluation.preparation import pairs_in_memory, prepared
from dcris.evaluation.protocols import Protocol
from dcris.evaluation.refinement import refine_guided
from dcris.models.optimize import sharded
from dcris.models.segmentation import Output, ReferringSegmenter, presence_probabilities
from dcris.types import Expression, MaskArray, Reference
from dcris.utils.arguments import Refinement
from dcris.utils.device import autocast, choose_device, choose_precision, device_name, precision_of
from dcris.utils.distributed import Processes
from dcris.utils.lanes import Budget, in_lanes, lane_count
from dcris.version import __version__

EXPRESSIONS_PER_PASS = 32
"""Expressions of one image that go through the head together."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The predicted mask of one expression and its overlap with the true mask."""

    reference: Reference
    expression: Expression
    overlap: Overlap
    prediction: Mapping[str, Any] | None
    """The predicted mask as COCO run lengths, so that a whole data set fits in memory; None if not
    kept."""
    curve: tuple[Overlap, ...] = ()
    """The overlap at each of CURVE_THRESHOLDS; empty if the probabilities are unknown."""
    present: float | None = None
    """Probability that the target is present, in 0..1; None if the model has no presence head."""
    score: float | None = None
    """As that of dcris.inference.prediction.Prediction; None if the probabilities are unknown."""
    compared: Mapping[str, Any] | None = None
    """The predicted mask on the square on which the protocol compares masks, as COCO run lengths;
    None in protocols that compare them at the image's size, and if it is unknown or not kept."""

    def mask(self) -> MaskArray:
        """Decode the predicted mask [H, W] at the image's size.

        Raises:
            ValueError: if it was not kept.
        """
        if self.prediction is None:
            raise ValueError("the masks of these results were not kept; evaluate with keep_masks=True")
        return decode_mask(self.prediction, self.reference.image_size).astype(bool)


@torch.no_grad()
def predict_queries(
    model: ReferringSegmenter,
    queries: Queries,
    config: RunConfig,
    protocol: Protocol,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
    keep_masks: bool = True,
    refine: Refinement = "none",
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[EvalResult]:
    """Predict a mask for every query and compare it with the truth, image by image.

    Each image goes through the network alone, with all its expressions. All products then have the
    same shapes, and so the same rounding, for any batch size and number of ranks. A CPU predicts
    up to eight images at a time, each in one thread if it has no more than eight: results are then
    identical on equal devices.

    Args:
        model: on `device`, in evaluation mode.
        queries: expressions, each with the reference whose mask is its truth.
        config: of the run that trained the model: preprocessing of images and expressions, and the
            number of workers.
        protocol: transform, resampling and threshold.
        device: where the model runs.
        dtype: working precision; the run's own by default.
        batch_size: images that are read and moved to the device together.
        share: (k, n) to evaluate every n-th image from the k-th on, as rank k of n does.
        keep_masks: whether results hold their masks.
        refine: "guided" to refine the probabilities, which no protocol does; see
            dcris.evaluation.refinement.
        progress: called with the number of expressions done so far.

    Yields:
        One result for each query.

    Raises:
        DcrisError: if an image or a mask cannot be read, or the protocol compares masks on a canvas
            and `refine` is given.
    """
    device, done = choose_device(device), 0
    if not (isinstance(batch_size, int) and batch_size > 0):
        raise DcrisError(f"the batch size is {batch_size!r}; give a whole number of 1 or more")
    if refine != "none" and any(protocol.for_target(target).canvas is not None for target in (True, False)):
        raise DcrisError(
            f"the protocol {protocol.name} compares masks on a square, where the image cannot refine them; choose "
            "another protocol or leave out --refine"
        )
    dtype = dtype or choose_precision(config.train.precision, device)
    model = prepared(model, config, dtype)
    tasks = ImageTasks(queries, config.data, tokenizer_of(config.model.text), protocol.transform, share, protocol.truth)

    def placed() -> Iterator[tuple[ImageTask, Tensor]]:
        for group in task_loader(tasks, images=batch_size, workers=config.data.workers):
            images = normalise(torch.stack([task.image for task in group]).to(device), config.data)
            yield from zip(group, images.split(1), strict=True)

    # Ranks among which a model is sharded compute each layer together, so in one order.
    lanes = 1 if sharded(model) else lane_count(device)
    memory = Budget(max(EXPRESSIONS_PER_PASS, pairs_in_memory(config, device) if lanes > 1 else 0))

    def predict(pair: tuple[ImageTask, Tensor]) -> list[EvalResult]:
        with torch.no_grad(), memory.part(min(len(pair[0].queries), EXPRESSIONS_PER_PASS)):  # in a thread of its own
            return [*_predict_task(model, *pair, protocol, device, dtype, keep_masks, refine)]

    for results in in_lanes(lanes, predict, placed()):
        yield from results
        done += len(results)
        progress(done)


def _predict_task(
    model: ReferringSegmenter,
    task: ImageTask,
    image: Tensor,
    protocol: Protocol,
    device: torch.device,
    dtype: torch.dtype,
    keep_masks: bool,
    refine: Refinement,
) -> Iterator[EvalResult]:
    """Predict and compare all expressions of one image [1, 3, S, S]."""

    def place(mask: MaskArray) -> Tensor:
        return torch.from_numpy(mask).to(device)

    truths = {
        key: (place(truth.mask), None if truth.ignored is None else place(truth.ignored))
        for key, truth in task.truths.items()
    }
    reference = task.queries[0][0]
    guide = fit_image(read_image(reference.image_path), reference) if refine == "guided" else None
    outputs = segment_in_passes(model, image, task.tokens.to(device), device, dtype)
    pairs = chain.from_iterable(zip(output.logits, presence_probabilities(output), strict=True) for output in outputs)
    for (reference, expression), (one, present) in zip(task.queries, pairs, strict=True):
        measured = protocol.for_target(bool(reference.targets(expression)))
        (probabilities,) = measured.probabilities(one[None], [task.transform])
        if guide is not None:
            refined = refine_guided(probabilities.cpu().numpy(), guide, max(one.shape[1:]))
            probabilities = torch.from_numpy(refined).to(device)
        truth, ignored = truths[reference.ref_id, expression.exists]
        counted = overlap_curve(probabilities, truth, protocol.threshold, ignored)
        predicted = (probabilities > protocol.threshold).cpu().numpy() if keep_masks or protocol.boundary else None
        if predicted is not None and protocol.boundary:
            known = task.truths[reference.ref_id, expression.exists]
            counted = (with_boundary(counted[0], predicted, known.mask, known.ignored), *counted[1:])
        score = mean_inside(probabilities, protocol.own_threshold) if present is None else present
        pixels, query = int(truth.sum()), (reference, expression)
        overlap, *curve = (protocol.judge(each, pixels, query, present, score) for each in counted)
        mask = compared = None
        if predicted is not None and keep_masks:
            mask = encode_mask(measured.from_canvas(predicted, reference.image_size))
            compared = None if measured.canvas is None else encode_mask(predicted)
        yield EvalResult(reference, expression, overlap, mask, tuple(curve), present, score, compared)


def mean_inside(probabilities: Tensor, threshold: float) -> float:
    """Return the mean of the probabilities [H, W] above a threshold; 0 if there are none."""
    inside = probabilities[probabilities > threshold]
    wide = inside if inside.device.type == "mps" else inside.double()  # Apple's GPUs have no float64
    return float(wide.mean()) if len(inside) else 0.0


def segment_in_passes(
    model: ReferringSegmenter, image: Tensor, tokens: Tensor, device: torch.device, dtype: torch.dtype
) -> Iterator[Output]:
    """Encode an image and its expressions once, then fuse them in passes of bounded memory.

    Args:
        model: on `device`, in evaluation mode.
        image: [1, 3, S, S] normalised.
        tokens: [B, L].
        device: where the model runs.
        dtype: working precision.

    Yields:
        The output for successive expressions.
    """
    with autocast(device, dtype):
        state, text = model.encode_images(image), model.encode_text(tokens)
    pairs = [(0, expression) for expression in range(len(tokens))]
    yield from model.segment_pairs(state, text, pairs, dtype, EXPRESSIONS_PER_PASS)


def predict_on_all_ranks(
    group: Processes, queries: Queries, predict: Callable[[tuple[int, int]], Iterable[EvalResult]]
) -> list[EvalResult]:
    """Evaluate each rank's share and return all results on every rank, in the queries' order.

    Args:
        group: the ranks; all of them must call this with the same queries.
        queries: all queries.
        predict: returns the results of a share (k, n), as `predict_queries` does.
    """
    order = {(reference.ref_id, expression.sent_id): number for number, (reference, expression) in enumerate(queries)}
    parts = group.all_gather(list(predict((group.rank, group.count))))
    return sorted(chain.from_iterable(parts), key=lambda item: order[item.reference.ref_id, item.expression.sent_id])


def exchange_expressions(references: Sequence[Reference]) -> list[tuple[Reference, Expression]]:
    """Return queries that pair each reference with the expressions of another object of its image.

    A model that uses the expression must score low on them. A reference that is alone on its image
    is left out.
    """
    by_image: dict[int, list[Reference]] = {}
    for reference in references:
        by_image.setdefault(reference.image_id, []).append(reference)
    return [
        (reference, expression)
        for group in by_image.values()
        if len(group) > 1
        for reference, other in zip(group, [*group[1:], group[0]], strict=True)
        for expression in other.expressions
    ]


def result_record(
    results: Sequence[EvalResult],
    table: ReferenceTable,
    split: str,
    protocol: Protocol,
    *,
    model: ReferringSegmenter | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the content of a result file: the protocol's metrics in percent and their provenance.

    Two results compare if `data_sha256`, `protocol`, `threshold`, `none_rule` (only of protocols
    with absent targets), `refine` (only in results of `dcris evaluate --refine`) and
    `strip_phrases` (only in results of models with `data.strip_phrases` "always") are equal.

    Args:
        results: of all queries of the split.
        table: the data set.
        split: its split.
        protocol: that measured the results.
        model: that predicted the masks; None if only masks are known.
        device: where it ran.
        dtype: its working precision.
    """
    return {
        **summarise((result.overlap for result in results), protocol.metrics),
        "references": len({result.reference.ref_id for result in results}),
        "expressions": len(results),
        "dataset": table.dataset,
        "split_by": table.split_by,
        "split": split,
        "data_sha256": table.sha256(split),
        "protocol": protocol.name,
        "threshold": protocol.threshold,
        **({} if protocol.none_rule is None else {"none_rule": protocol.none_rule.name}),
        "weights_sha256": fingerprint(model.state_dict()) if model is not None else None,
        "precision": precision_of(dtype) if dtype is not None else None,
        "device": device_name(device) if device is not None else None,
        "threads": torch.get_num_threads() if device is not None else None,
        "version": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
