"""The one evaluator: every method, every data set, every protocol.

Shape letters: B phrases, S side of the network's square, H W pixels of a photograph.
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
from dcris.data.masks import decode_mask, encode_mask
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.metrics import Overlap, overlap_curve, summarise
from dcris.evaluation.protocols import Protocol
from dcris.models.encoders.vit import VisionState
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.types import Expression, MaskArray, Reference
from dcris.utils.device import autocast, choose_device, choose_precision, device_name
from dcris.utils.distributed import Processes
from dcris.version import __version__

PHRASES_PER_PASS = 32
"""Phrases of one photograph that finish the network together."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One expression, what was predicted for it, and how that agrees with the truth."""

    reference: Reference
    expression: Expression
    overlap: Overlap
    prediction: Mapping[str, Any] | None
    """The predicted mask as COCO run lengths, since a whole data set's masks must fit into memory; None if not kept."""
    curve: tuple[Overlap, ...] = ()
    """The overlap at each of CURVE_THRESHOLDS; nothing where the probabilities are not known."""

    def mask(self) -> MaskArray:
        """The predicted mask [H, W] at the photograph's size. Raises ValueError where it was not kept."""
        if self.prediction is None:
            raise ValueError("the masks of these answers were not kept")
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
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[EvalResult]:
    """Predict a mask for every question and score it, photograph by photograph.

    Each photograph goes through the network by itself, with all its phrases. So the shapes of all products, and with them
    every rounding, are the same whatever the batch size and however many processes share the work: the answers are too, bit
    for bit, on equal devices with an equal number of threads.

    Args:
        model: on `device`, in evaluation mode.
        questions: expressions, each with the reference whose mask is its truth.
        config: of the run that trained it: how photographs and phrases become tensors, and how many processes read them.
        protocol: how photographs become squares, logits masks, and on what those are compared.
        device, dtype: where and in which precision; the run's own by default.
        batch_size: photographs that are read, and moved to the device, together.
        share: (k, n) for the k-th of n processes, which answers for every n-th photograph.
        keep_masks: whether answers hold their masks.
        progress: called with the number of expressions done so far.

    Raises DcrisError where a photograph or mask cannot be read.
    """
    device, done = choose_device(device), 0
    if not (isinstance(batch_size, int) and batch_size > 0):
        raise DcrisError(f"the batch size is {batch_size!r}; it has to be a whole number of 1 or more")
    dtype = dtype or choose_precision(config.train.precision, device)
    model = prepare_for_prediction(model, dtype)
    tasks = ImageTasks(queries, config.data, tokenizer_of(config.model.text), protocol.fit, share)
    for group in task_loader(tasks, images=batch_size, workers=config.data.workers):
        images = normalise(torch.stack([task.image for task in group]).to(device), config.data)
        for task, image in zip(group, images, strict=True):
            yield from _answer_task(model, task, image[None], protocol, device, dtype, keep_masks)
            done += len(task.queries)
            progress(done)


def _answer_task(
    model: ReferringSegmenter,
    task: ImageTask,
    image: Tensor,
    protocol: Protocol,
    device: torch.device,
    dtype: torch.dtype,
    keep_masks: bool,
) -> Iterator[EvalResult]:
    truths = {number: torch.from_numpy(protocol.compared(mask)).to(device) for number, mask in task.truths.items()}
    logits = chain.from_iterable(segment_in_passes(model, image, task.tokens.to(device), device, dtype))
    for (reference, expression), one in zip(task.queries, logits, strict=True):
        (picture,) = protocol.probabilities(one[None], [task.fit])
        overlap, *curve = overlap_curve(picture, truths[reference.ref_id], protocol.threshold)
        mask = None
        if keep_masks:
            found = (picture > protocol.threshold).cpu().numpy()
            mask = encode_mask(protocol.shown(found, reference.image_size))
        yield EvalResult(reference, expression, overlap, mask, tuple(curve))


def segment_in_passes(
    model: ReferringSegmenter, image: Tensor, tokens: Tensor, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Encode an image and its phrases once, and finish the phrases some at a time, so that memory is bounded.

    Args:
        model: on `device`, in evaluation mode.
        image: [1, 3, S, S] normalised.
        tokens: [B, L].
        device, dtype: where and in which precision.

    Yields logits [b, 1, h, w], in the phrases' order.
    """
    with autocast(device, dtype):
        state = model.encode_images(image)
    pairs = [(0, phrase) for phrase in range(len(tokens))]
    yield from finish_in_passes(model, state, tokens, pairs, device, dtype, PHRASES_PER_PASS)


def finish_in_passes(
    model: ReferringSegmenter,
    state: VisionState,
    tokens: Tensor,
    pairs: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    at_once: int,
) -> Iterator[Tensor]:
    """Finish encoded images with phrases, each of which is encoded once, `at_once` pairs at a time.

    Args:
        model: on `device`, in evaluation mode.
        state: of I images, as DCRIS.encode_images leaves it.
        tokens: [K, L] of K phrases.
        pairs: an image (from 0) and a phrase (from 0) each.
        device, dtype: where and in which precision.
        at_once: pairs in one pass through the rest of the network.

    Yields logits [b, 1, h, w], in the pairs' order.
    """
    with autocast(device, dtype):
        text = model.encode_text(tokens)
    for start in range(0, len(pairs), at_once):
        images, phrases = torch.tensor(pairs[start : start + at_once], device=device).unbind(1)
        # Not around the yield: what a generator has entered holds for its caller, who would interpolate in bfloat16.
        with autocast(device, dtype):
            logits = model.segment(state.select(images), text.select(phrases))
        yield logits


def predict_on_all_ranks(
    group: Processes, queries: Queries, answer: Callable[[tuple[int, int]], Iterable[EvalResult]]
) -> list[EvalResult]:
    """What several processes answer, each its share, in the questions' order; every process gets all of it.

    Args:
        group: the processes. Each must call this with the same questions.
        questions: all of them.
        answer: gives the answers of the share (k, n), as predict_queries does.
    """
    order = {(reference.ref_id, expression.sent_id): number for number, (reference, expression) in enumerate(queries)}
    parts = group.all_gather(list(answer((group.rank, group.count))))
    return sorted(chain.from_iterable(parts), key=lambda item: order[item.reference.ref_id, item.expression.sent_id])


def exchange_phrases(references: Sequence[Reference]) -> list[tuple[Reference, Expression]]:
    """Questions in which each reference gets the phrases of another object of its photograph, in turn.

    A model that listens must fail on them. References that are alone on their photograph are left out.
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
    answers: Sequence[EvalResult],
    table: ReferenceTable,
    split: str,
    protocol: Protocol,
    *,
    model: ReferringSegmenter | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float | int | str | None]:
    """What every result file holds: the scores in percent, and what they are scores of.

    Two results can be compared where `data_sha256`, `protocol` and `threshold` agree.

    Args:
        answers: to all questions of the split.
        table: the data set.
        split: of it.
        protocol: by which the answers were measured.
        model, device, dtype: what answered, where and in which precision; None where only masks are known.
    """
    return {
        **summarise((answer.overlap for answer in answers), protocol.precision_includes_threshold),
        "references": len({answer.reference.ref_id for answer in answers}),
        "expressions": len(answers),
        "dataset": table.dataset,
        "split_by": table.split_by,
        "split": split,
        "data_sha256": table.sha256(split),
        "protocol": protocol.name,
        "threshold": protocol.threshold,
        "weights_sha256": fingerprint(model.state_dict()) if model is not None else None,
        "precision": str(dtype).removeprefix("torch.") if dtype is not None else None,
        "device": device_name(device) if device is not None else None,
        "threads": torch.get_num_threads() if device is not None else None,
        "version": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
