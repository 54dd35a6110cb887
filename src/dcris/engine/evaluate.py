"""The one evaluator: every method, every data set, every protocol.

Shape letters: B phrases, I images, S side of the network's square, H W pixels of a photograph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcris.config import DataConfig
from dcris.data.dataset import ImageTask, ImageTasks, Questions, normalise, task_loader
from dcris.data.letterbox import Letterbox
from dcris.data.masks import encode_mask
from dcris.data.tokenizer import Tokenizer
from dcris.encoders.weights import fingerprint
from dcris.engine.device import autocast
from dcris.metrics import Overlap, overlap, summarise
from dcris.model.dcris import DCRIS
from dcris.protocols import Protocol
from dcris.types import Expression, MaskArray, Reference
from dcris.version import __version__

PHRASES_PER_PASS = 32
"""Phrases that finish the network together. Results do not depend on it beyond rounding."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One expression, what was predicted for it, and how that agrees with the truth."""

    reference: Reference
    expression: Expression
    overlap: Overlap
    prediction: Mapping[str, Any]
    """The predicted mask as COCO run lengths: a whole data set's masks must fit into memory."""


@torch.no_grad()
def answer_questions(
    model: DCRIS,
    questions: Questions,
    config: DataConfig,
    tokenizer: Tokenizer,
    protocol: Protocol,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Answer]:
    """Predict a mask for every question and score it, photograph by photograph.

    Args:
        model: on `device`, in evaluation mode.
        questions: expressions, each with the reference whose mask is its truth.
        config: how photographs and phrases become tensors.
        tokenizer: of the model's text tower.
        protocol: how logits become masks.
        device, dtype: where and in which precision.
        workers: processes that read photographs.
        progress: called with the number of expressions done so far.

    Raises DcrisError where a photograph or mask cannot be read.
    """
    done = 0
    tasks = ImageTasks(questions, config, tokenizer)
    for group in task_loader(tasks, images=max(1, PHRASES_PER_PASS // 4), workers=workers):
        images = normalise(torch.stack([task.image for task in group]).to(device), config)
        tokens = torch.cat([task.tokens for task in group]).to(device)
        owners = torch.tensor([index for index, task in enumerate(group) for _ in task.questions], device=device)
        boxes = [task.box for task in group for _ in task.questions]
        masks: list[MaskArray] = []
        for logits, some_boxes in segment_in_passes(model, images, tokens, owners, boxes, device, dtype):
            masks += [protocol.mask(picture) for picture in protocol.probabilities(logits, some_boxes)]
        for (task, number), mask in zip(_numbered(group), masks, strict=True):
            reference, expression = task.questions[number]
            yield Answer(reference, expression, overlap(mask, task.truths[reference.ref_id]), encode_mask(mask))
        done += len(masks)
        progress(done)


def _numbered(group: Sequence[ImageTask]) -> Iterator[tuple[ImageTask, int]]:
    for task in group:
        for number in range(len(task.questions)):
            yield task, number


def segment_in_passes(
    model: DCRIS,
    images: Tensor,
    tokens: Tensor,
    owners: Tensor,
    boxes: Sequence[Letterbox],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Sequence[Letterbox]]]:
    """Encode images and phrases once, and finish them some phrases at a time, so that memory is bounded.

    Args:
        model: on `device`, in evaluation mode.
        images: [I, 3, S, S] normalised.
        tokens: [B, L].
        owners: [B] int64: each phrase's image.
        boxes: B, each phrase's photograph on the square.
        device, dtype: where and in which precision.

    Yields logits [b, 1, h, w] and the letterboxes that belong to them, in order.
    """
    with autocast(device, dtype):
        state = model.encode_images(images)
        text = model.encode_text(tokens)
        for start in range(0, len(tokens), PHRASES_PER_PASS):
            chosen = torch.arange(start, min(start + PHRASES_PER_PASS, len(tokens)), device=device)
            yield (
                model.segment(state.select(owners[chosen]), text.select(chosen)),
                boxes[start : start + PHRASES_PER_PASS],
            )


def by_kind(answers: Sequence[Answer]) -> dict[str, tuple[float, int]]:
    """For each kind of phrase its mIoU in percent and the number of expressions; nothing where kinds are not known."""
    kinds: dict[str, list[Overlap]] = {}
    for answer in answers:
        if answer.expression.kind is not None:
            kinds.setdefault(answer.expression.kind, []).append(answer.overlap)
    return {kind: (summarise(items)["miou"], len(items)) for kind, items in sorted(kinds.items())}


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
    answers: Sequence[Answer], model: DCRIS, *, dataset: str, split: str, protocol: Protocol
) -> dict[str, float | int | str]:
    """What every result file holds: the scores in percent, and all that is needed to know what they are scores of."""
    return {
        **summarise(answer.overlap for answer in answers),
        "references": len({answer.reference.ref_id for answer in answers}),
        "expressions": len(answers),
        "dataset": dataset,
        "split": split,
        "protocol": protocol.name,
        "weights_sha256": fingerprint(model.state_dict()),
        "version": __version__,
    }
