"""The one training loop, for every method.

All randomness of a step comes from the seed and the step's number, so that a run that was interrupted, however often, ends
in the same weights as one that was not (bit for bit on a CPU).
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcris.adapters.base import trained_state
from dcris.config import RunConfig, TrainConfig, load_config, refuse_other_run
from dcris.data.dataset import (
    Questions,
    TrainingBatches,
    TrainingSamples,
    all_questions,
    normalise,
    steps_per_epoch,
    training_loader,
)
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import Tokenizer
from dcris.encoders.weights import fingerprint, load_towers
from dcris.engine.checkpoint import (
    Checkpoint,
    best_checkpoint,
    find_checkpoint,
    identify_towers,
    list_checkpoints,
    load_optimizer,
    load_trained,
    prune_checkpoints,
    save_checkpoint,
    score_checkpoint,
)
from dcris.engine.device import autocast, choose_precision
from dcris.engine.evaluate import Answer, answer_questions
from dcris.engine.trackers import Monitor, check_trackers, panel_questions
from dcris.errors import DcrisError
from dcris.files import make_directory, read_json, write_json
from dcris.losses import training_loss
from dcris.metrics import summarise
from dcris.model.dcris import DCRIS
from dcris.protocols import Cris
from dcris.types import Batch

_DATA = "data.json"
"""In a run's directory: which references it was trained on, and which checkpoint it was started from."""


class Interrupted(Exception):
    """Ctrl-C, or a request to end, after the checkpoint it asked for was written."""

    def __init__(self, number: int, checkpoint: Checkpoint) -> None:
        super().__init__(f"stopped at step {checkpoint.step}; `--resume` goes on from {checkpoint.path}")
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a finished run ended."""

    last: Checkpoint
    best: Checkpoint
    seconds: float


def build_model(config: RunConfig) -> DCRIS:
    """A new model whose trained part starts as the seed says and whose towers hold the weights they name.

    Raises DcrisError where those cannot be had.
    """
    torch.manual_seed(config.train.seed)
    model = DCRIS(config.model)
    load_towers(model.vision, model.text, config.model)
    return model


def total_steps(config: TrainConfig, references: int) -> int:
    """Optimiser steps of a whole run over a training split of so many references."""
    steps = config.epochs * steps_per_epoch(references, min(config.batch_size, references))
    return min(steps, config.max_steps) if config.max_steps else steps


def learning_rate(config: TrainConfig, step: int, per_epoch: int, total: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then a fall by steps (section 4.2) or along half a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    passed = sum(step >= milestone * per_epoch for milestone in config.milestones)
    return config.lr * config.gamma**passed


def train(
    model: DCRIS,
    config: RunConfig,
    table: ReferenceTable,
    tokenizer: Tokenizer,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train what is not frozen and leave checkpoints, a log and the configuration in `out`.

    Args:
        model: with its towers filled; moved to `device`.
        config: of the run; written to out/config.json.
        table: the data set; its `config.data.train_split` is trained on.
        tokenizer: of the model's text tower.
        out: the run's directory.
        device: where to train.
        resume: go on from the newest checkpoint in `out`, or from the start where there is none.
        say: takes lines for a person.

    Raises DcrisError where a tracker that was asked for is not installed, where `out` holds a run and `resume` is not set or
    the run was started otherwise or on other references, where `config.train.start` is of another model, where data cannot be
    read or results not written, and where the loss is no longer a number; Interrupted after Ctrl-C or SIGTERM, with a
    checkpoint written.
    """
    settings = config.train
    check_trackers(settings.trackers)
    references = table.split(config.data.train_split)
    # Read now, so that a split that is not there ends the run before its first step and not after its first epoch.
    questions = all_questions(table.split(config.data.val_split), first_only=True) if config.data.val_split else []
    checkpoints = list_checkpoints(out)
    if checkpoints and not resume:
        raise DcrisError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if checkpoints:
        refuse_other_run(load_config(checkpoints[-1].path / "config.json"), config, out)
    data = _record_data(table, out, going_on=bool(checkpoints))
    for note in table.notes:
        say(note)
    model.to(device).train()
    towers = identify_towers(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    first = 0
    if checkpoints:
        load_trained(model, checkpoints[-1].path)
        load_optimizer(optimizer, checkpoints[-1].path)
        first = checkpoints[-1].step
        say(f"going on from step {first}")
    elif settings.start is not None:
        start = find_checkpoint(Path(settings.start))
        try:
            load_trained(model, start)
        except DcrisError as error:
            raise DcrisError(
                f"{error}; a run can start from a checkpoint of its own model alone, so train with the config.json of that one"
            ) from error
        data["start"] = {"checkpoint": str(start), "sha256": fingerprint(trained_state(model))}
        say(f"starting from the adapters and the head of {start}")
    write_json(make_directory(out) / "config.json", config.model_dump(mode="json"))
    write_json(out / _DATA, data)
    samples = TrainingSamples(references, config.data, tokenizer, settings.seed)
    per_epoch = steps_per_epoch(len(samples), min(settings.batch_size, len(samples)))
    total = total_steps(settings, len(samples))
    batches = TrainingBatches(len(samples), settings.batch_size, settings.seed, first, total)
    loader = training_loader(samples, batches, config.data.workers, pin=device.type == "cuda")
    say(f"{len(samples):,} references, {per_epoch:,} steps an epoch, {total:,} steps in all")
    dtype = choose_precision(settings.precision, device)
    step_fn = _Step(model, config, optimizer, parameters, device, dtype)
    shown = partial(_answers, model, config, panel_questions(questions), tokenizer, device, dtype, keep_masks=True)
    begin = time.monotonic()

    # Signals are let go before the monitor is: what a tracker still has to send, a second Ctrl-C may break off.
    with Monitor(out, config, (first, total, per_epoch), device, say) as monitor, _signals() as pending:
        for step, batch in zip(range(first, total), loader, strict=True):
            lr = learning_rate(settings, step, per_epoch, total)
            done = step + 1
            loss, iou = step_fn(step, batch, lr, monitor.wants_iou(done))
            monitor.step(done, loss, iou, lr, len(batch.images))
            ends_epoch = done % per_epoch == 0 or done == total
            if ends_epoch or (settings.save_every and done % settings.save_every == 0) or pending.number is not None:
                saved = save_checkpoint(out, model, towers, optimizer, config, done)
                prune_checkpoints(out, settings.keep_last)
                if pending.number is not None:
                    raise Interrupted(pending.number, saved)
            if ends_epoch and questions:
                # After saving: validation may be long, and a photograph of that split may be broken.
                scores = _validate(model, config, questions, tokenizer, device, dtype)
                score_checkpoint(saved, scores["miou"])
                monitor.validated(done, scores, shown)
                prune_checkpoints(out, settings.keep_last)
                if pending.number is not None:
                    raise Interrupted(pending.number, saved)
                model.train()
    model.eval()
    finished = list_checkpoints(out)
    return TrainResult(finished[-1], best_checkpoint(finished), time.monotonic() - begin)


def _record_data(table: ReferenceTable, out: Path, going_on: bool) -> dict[str, Any]:
    """What data.json is to say. Raises DcrisError where a run goes on and its data are no longer those it started on."""
    record = table.record()
    if not (going_on and (out / _DATA).exists()):
        return record
    before = read_json(out / _DATA, "the record of the run's data")
    if not isinstance(before, dict) or before.get("sha256") != record["sha256"]:
        raise DcrisError(
            f"the references of {table.dataset} in {table.root} are not those that the run in {out} was started on (see "
            f"{out / _DATA}); bring those back, or choose another --out"
        )
    return before


class _Step:
    """One optimiser step."""

    def __init__(
        self,
        model: DCRIS,
        config: RunConfig,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.config, self.optimizer, self.parameters = model, config, optimizer, parameters
        self.device, self.dtype = device, dtype

    def __call__(self, step: int, batch: Batch, lr: float, want_iou: bool) -> tuple[float, float | None]:
        """Return the loss and, where wanted, the batch's mIoU in percent.

        Raises DcrisError where the loss is not a number; the weights are then still those of the step before.
        """
        # Dropout's random numbers belong to the step: that is what makes resuming exact.
        torch.manual_seed(self.config.train.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = normalise(batch.images.to(self.device, non_blocking=True), self.config.data)
        tokens, masks = (x.to(self.device, non_blocking=True) for x in (batch.tokens, batch.masks))
        with autocast(self.device, self.dtype):
            logits = self.model(images, tokens)
        loss = training_loss(logits, masks, self.config.train.dice_weight)
        value = loss.item()
        if not math.isfinite(value):
            raise DcrisError(
                f"the loss is {value} at step {step + 1}; the last checkpoint is whole, so go on from it with a lower "
                "--train.lr or with --train.precision float32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        self.optimizer.step()
        return value, _batch_iou(logits.detach(), masks) if want_iou else None


def _batch_iou(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """mIoU in percent on the logits' grid at the CRIS family's threshold; a sign of life, not a result."""
    truth = torch.nn.functional.interpolate(masks, logits.shape[-2:], mode="nearest") > 0.5
    guess = torch.sigmoid(logits.float()) > Cris().threshold
    shared = (guess & truth).flatten(1).sum(1)
    covered = (guess | truth).flatten(1).sum(1)
    return 100 * (shared / covered.clamp(min=1)).mean().item()


def _validate(
    model: DCRIS,
    config: RunConfig,
    questions: Questions,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Scores in percent on the validation split's first sentences, as the CRIS family validates while training."""
    return summarise(answer.overlap for answer in _answers(model, config, questions, tokenizer, device, dtype))


def _answers(
    model: DCRIS,
    config: RunConfig,
    questions: Questions,
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
    keep_masks: bool = False,
) -> Iterator[Answer]:
    model.eval()
    workers = config.data.workers
    return answer_questions(
        model,
        questions,
        config.data,
        tokenizer,
        Cris(),
        device=device,
        dtype=dtype,
        workers=workers,
        keep_masks=keep_masks,
    )


class _Pending:
    number: int | None = None


@contextmanager
def _signals() -> Iterator[_Pending]:
    """Turn the first Ctrl-C or SIGTERM into a note that the loop reads between steps; a second one ends at once."""
    pending = _Pending()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        pending.number = number
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield pending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
