"""The one training loop, for every method.

All randomness of a step comes from the seed and the step's number, so that a run that was interrupted, however often, ends
in the same weights as one that was not (bit for bit on a CPU).
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dcris.checkpoints.backbones import fingerprint, load_towers
from dcris.checkpoints.checkpoint import (
    Checkpoint,
    Towers,
    best_checkpoint,
    find_checkpoint,
    identify_towers,
    list_checkpoints,
    load_optimizer,
    load_trained,
    prune_checkpoints,
    save_checkpoint,
    score_checkpoint,
    sound_checkpoints,
)
from dcris.config import RunConfig, TrainConfig, load_config, refuse_other_run
from dcris.data.dataset import (
    Queries,
    Skipped,
    TrainingBatches,
    TrainingSamples,
    all_queries,
    batch_bytes,
    cut_phrases,
    normalise,
    steps_per_epoch,
    training_loader,
)
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import Tokenizer
from dcris.errors import DcrisError, out_of_memory
from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Cris
from dcris.models.adapters.base import trained_state
from dcris.models.optimize import hold_frozen
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.loggers import Monitor, check_trackers, panel_queries
from dcris.training.losses import LOSSES, training_losses
from dcris.training.parallel import divide_batch, shard_towers, synchronise_batch_norm
from dcris.types import Batch
from dcris.utils.arguments import PathLike, as_path, require, require_names
from dcris.utils.device import autocast, choose_device, choose_precision
from dcris.utils.distributed import Processes
from dcris.utils.files import claim, make_directory, read_json, write_json
from dcris.utils.workers import dead_worker, require_shared_memory

_SPREAD = 0x9E3779B97F4A7C15  # between the seeds of two places in a batch: far from any other step's or run's

_DATA = "data.json"
"""In a run's directory: which references it was trained on, and which checkpoint it was started from."""


_ALONE = Processes()


class _StopWaiting(BaseException):
    """Raised by the signal handler in a process that waits for a batch. No Exception: nothing on the way may catch it."""


class Interrupted(Exception):
    """Ctrl-C, or a request to end, after the checkpoint it asked for was written."""

    def __init__(self, number: int, checkpoint: Checkpoint) -> None:
        super().__init__(f"stopped at step {checkpoint.step}; a resumed run goes on from {checkpoint.path}")
        self.checkpoint = checkpoint
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where a finished run ended."""

    last: Checkpoint
    best: Checkpoint
    seconds: float


def build_model(config: RunConfig) -> ReferringSegmenter:
    """A new model whose trained part starts as the seed says and whose towers hold the weights they name.

    Raises DcrisError where those cannot be had.
    """
    torch.manual_seed(require(config, RunConfig, "the configuration").train.seed)
    model = ReferringSegmenter(config.model)
    load_towers(model.vision, model.text, config.model)
    return model


def total_steps(config: TrainConfig, references: int) -> int:
    """Optimiser steps of a whole run over a training split of so many references: `max_steps`, or else those of `epochs`."""
    return config.max_steps or config.epochs * steps_per_epoch(references, min(config.batch_size, references))


def check_run(config: RunConfig, table: ReferenceTable, group: Processes = _ALONE) -> None:
    """Check what can be checked before a model is built.

    Raises DcrisError where a split or a tracker is missing, shared memory is too small for the workers, or the run would end
    within its warm-up.
    """
    settings = config.train
    check_trackers(settings.trackers)
    require_names(settings.losses, LOSSES, "train.losses")
    references = len(table.split(config.data.train_split))
    if config.data.val_split:
        table.split(config.data.val_split)
    here = min(settings.batch_size, references) * group.local_count / group.count
    require_shared_memory(config.data.workers, batch_bytes(config.data, math.ceil(here)))
    if (total := total_steps(settings, references)) < settings.warmup_steps:
        raise DcrisError(
            f"the run has {total:,} steps and the warm-up of the learning rate alone takes {settings.warmup_steps:,}; train "
            "for longer (--train.max_steps or --train.epochs) or set a shorter --train.warmup_steps"
        )


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
    model: ReferringSegmenter,
    config: RunConfig,
    table: ReferenceTable,
    tokenizer: Tokenizer,
    out: PathLike,
    *,
    device: str | torch.device,
    resume: bool = False,
    log: Callable[[str], None] = print,
    group: Processes = _ALONE,
) -> TrainResult:
    """Train what is not frozen and leave checkpoints, a log and the configuration in `out`.

    Several processes train together: the batch is divided among them, gradients are those of its mean, batch norm counts
    all of it. The first alone reads and writes in `out`, which the others need not see.

    Args:
        model: with its towers filled; moved to `device`.
        config: of the run; written to out/config.json.
        table: the data set; its `config.data.train_split` is trained on.
        tokenizer: of the model's text tower.
        out: the run's directory.
        device: where to train.
        resume: go on from the newest checkpoint in `out`, or from the start where there is none.
        say: takes lines for a person.
        group: the processes, each of which calls this with the same arguments but for `device` and `log`.

    Raises DcrisError where a tracker that was asked for is not installed, where `out` holds a run and `resume` is not set or
    the run was started otherwise or on other references, where another process trains there, where all its checkpoints are
    damaged, where `config.train.start` is of another model, where data cannot be read or results not written, where processes
    cannot divide the batch or were started differently, where a worker dies or memory does not suffice, and where the loss is
    no longer a number; Interrupted after Ctrl-C or SIGTERM, with a
    checkpoint written.
    """
    require(config, RunConfig, "the configuration")
    require(table, ReferenceTable, "the table of references")
    out, device = as_path(out, "the run's directory"), choose_device(device)
    with ExitStack() as held:
        # Until the monitor is let go, too: what a tracker still has to send, a second Ctrl-C may break off.
        pending = held.enter_context(_signals())
        try:
            return _train(model, config, table, tokenizer, out, device, resume, log, group, held, pending)
        except RuntimeError as error:
            if (died := dead_worker(error)) is None:
                raise
            raise died from error


def _train(
    model: ReferringSegmenter,
    config: RunConfig,
    table: ReferenceTable,
    tokenizer: Tokenizer,
    out: Path,
    device: torch.device,
    resume: bool,
    log: Callable[[str], None],
    group: Processes,
    held: ExitStack,
    pending: "_Pending",
) -> TrainResult:
    settings = config.train
    check_run(config, table, group)
    references = table.split(config.data.train_split)
    queries = all_queries(table.split(config.data.val_split), first_only=True) if config.data.val_split else []
    going_on = resume and out.is_dir()
    checkpoints = []
    if group.first and going_on:
        held.enter_context(claim(out))
        checkpoints = sound_checkpoints(out, log)
    elif group.first and list_checkpoints(out):
        raise DcrisError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if checkpoints:
        refuse_other_run(load_config(checkpoints[-1].path / "config.json"), config, out)
    data = _record_data(table, out, going_on=bool(checkpoints))
    cut = cut_phrases(all_queries(references), config.data, tokenizer, table.dataset)
    for note in (*table.notes, *([cut] if cut else [])):
        log(note)
    towers = identify_towers(model)
    _refuse_strangers(group, config, data["sha256"], towers)
    if settings.shard_towers:
        shard_towers((model.vision, model.text), device, group)
    if group.count > 1:
        synchronise_batch_norm(model)
    model.to(device).train()
    model.checkpoint_activations(settings.checkpoint_activations)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, settings)
    first = 0
    if checkpoints:
        load_trained(model, checkpoints[-1].path)
        first = checkpoints[-1].step
        if first:  # else it was stopped while waiting for the first batch, and there are no moments
            load_optimizer(optimizer, checkpoints[-1].path)
        log(f"going on from step {first}")
    elif settings.start is not None and group.first:
        start = find_checkpoint(Path(settings.start))
        try:
            load_trained(model, start)
        except DcrisError as error:
            raise DcrisError(
                f"{error}; a run can start from a checkpoint of its own model alone, so train with the config.json of that one"
            ) from error
        data["start"] = {"checkpoint": str(start), "sha256": fingerprint(trained_state(model))}
        log(f"starting from the adapters and the head of {start}")
    last = group.from_first(lambda: checkpoints[-1] if checkpoints else None)
    first = _take_over(model, optimizer, first, group)
    samples = TrainingSamples(references, config.data, tokenizer, settings.seed)
    batch_size = min(settings.batch_size, len(samples))
    passes = divide_batch(batch_size, settings.micro_batch, group)
    if group.first:
        if not going_on:
            held.enter_context(claim(out))  # only now, as nothing is to be written before all is known to be right
        write_json(make_directory(out) / "config.json", config.model_dump(mode="json"))
        if not (checkpoints and (out / _DATA).exists()):  # a resumed run keeps the file as it is
            write_json(out / _DATA, data)
    per_epoch = steps_per_epoch(len(samples), batch_size)
    total = total_steps(settings, len(samples))
    places = [place for one in passes for place in one]
    batches = TrainingBatches(len(samples), settings.batch_size, settings.seed, first, max(first, total), places)
    loader = training_loader(samples, batches, config.data.workers, pin=device.type == "cuda")
    log(f"{len(samples):,} references, {per_epoch:,} steps an epoch, {total:,} steps in all")
    dtype = choose_precision(settings.precision, device)
    if not settings.shard_towers:  # those are FSDP's to hold
        hold_frozen(model, dtype)
    step_fn = _Step(model, config, optimizer, parameters, device, dtype, passes, batch_size, group)

    def shown() -> Iterator[EvalResult]:
        return predict_queries(model, panel_queries(queries), config, Cris(), device=device, dtype=dtype)

    skipped = Skipped(len(samples), log)
    begin = time.monotonic()

    def save(done: int) -> Checkpoint:
        saved = group.from_first(partial(save_checkpoint, out, model, towers, optimizer, config, done))
        if group.first:
            prune_checkpoints(out, settings.keep_last)
        return saved

    def end_if_asked(saved: Checkpoint) -> None:
        number = group.agree(pending.number)
        if number is not None:
            raise Interrupted(number, saved)

    def validate(saved: Checkpoint) -> None:
        # After saving: validation may be long, and a photograph of that split may be broken.
        scores = _validate(model, config, queries, device, dtype, group, pending)
        end_if_asked(saved)  # the scores are of a part, then
        # Sharded towers run in all processes or in none, so the pictures cannot wait until somebody asks for them.
        panels = [*shown()] if settings.shard_towers and settings.trackers else None
        monitor.validated(saved.step, scores, shown if panels is None else panels.copy)
        if group.first:
            # The score comes last: a checkpoint without one is validated again on resuming.
            score_checkpoint(saved, scores[settings.best_by], settings.best_by)
            prune_checkpoints(out, settings.keep_last)
        model.train()

    with Monitor(out, config, (first, total, per_epoch), device, log, group.first) as monitor:
        if first and last is not None and last.score is None and queries and (first % per_epoch == 0 or first == total):
            validate(last)  # the run was broken off before it could be
        done, saved = first, last
        try:
            for step, batch in zip(range(first, total), _read_together(loader, group, pending), strict=True):
                lr = learning_rate(settings, step, per_epoch, total)
                done = step + 1
                if config.data.on_bad_image == "skip":
                    for part in group.all_gather(batch.skipped):
                        skipped.note(part)
                loss, iou = step_fn(step, batch, lr, monitor.wants_iou(done))
                monitor.step(done, loss, iou, lr, batch_size)
                ends_epoch = done % per_epoch == 0 or done == total
                asked = group.agree(pending.number)
                if ends_epoch or (settings.save_every and done % settings.save_every == 0) or asked is not None:
                    saved = save(done)
                    if asked is not None:
                        raise Interrupted(asked, saved)
                    if ends_epoch and queries:
                        validate(saved)
        except _StopWaiting:  # in all processes, between two steps
            asked = group.agree(pending.number)
            assert asked is not None
            raise Interrupted(asked, saved if saved is not None and saved.step == done else save(done)) from None
    skipped.conclude()
    model.eval()
    finished = group.from_first(partial(list_checkpoints, out))
    return TrainResult(finished[-1], best_checkpoint(finished), time.monotonic() - begin)


def _record_data(table: ReferenceTable, out: Path, going_on: bool) -> dict[str, Any]:
    """What data.json is to say. Raises DcrisError where a run goes on and its data are no longer those it started on."""
    record = table.record()
    if not (going_on and (out / _DATA).exists()):
        return record
    try:
        before = read_json(out / _DATA, "the record of the run's data")
    except DcrisError as error:
        raise DcrisError(f"{error}; or delete it, if you know that the data are the same") from error
    if not isinstance(before, dict) or before.get("sha256") != record["sha256"]:
        raise DcrisError(
            f"the references of {table.dataset} in {table.root} are not those that the run in {out} was started on (see "
            f"{out / _DATA}); bring those back, or choose another --out"
        )
    return before


def _refuse_strangers(group: Processes, config: RunConfig, data: str, towers: Towers) -> None:
    """Check that all processes were started alike. Raises DcrisError naming what differs."""
    known = {"settings": config.model_dump(), "references": data, "towers": towers}
    for rank, other in enumerate(group.all_gather(known)):
        for what, value in other.items():
            if value != known[what]:
                raise DcrisError(
                    f"process {rank} has other {what} than process {group.rank}; start all with the same command and bring the "
                    "same files to every machine"
                )


def _take_over(model: ReferringSegmenter, optimizer: torch.optim.Optimizer, first: int, group: Processes) -> int:
    """Give every process the step, weights, statistics and moments of the first, and return the step."""
    if group.count == 1:
        return first
    weights, optimised = trained_state(model), optimizer.state_dict()
    # On the CPU: a tensor that travels goes to the device it came from, which is another process's.
    moments = {slot: {key: x.cpu() for key, x in values.items()} for slot, values in optimised["state"].items()}
    first, values, moments = group.from_first(
        lambda: (first, {name: value.cpu() for name, value in weights.items()}, moments)
    )
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)
    optimizer.load_state_dict({"state": moments, "param_groups": optimised["param_groups"]})
    return first


def _read_together(loader: Iterator[Batch], group: Processes, pending: "_Pending") -> Iterator[Batch]:
    """Batches as they come. Where one process cannot read its own, the same error is raised in all.

    Raises DcrisError, and _StopWaiting where a signal came while a process waited.
    """
    while True:
        error: DcrisError | _StopWaiting | None = None
        batch = None
        try:
            with pending.waiting():
                batch = next(loader, None)
        except (DcrisError, _StopWaiting) as met:
            error = met
        group.raise_together(error)
        if batch is None:
            return
        yield batch


def make_optimizer(model: ReferringSegmenter, settings: TrainConfig) -> torch.optim.Optimizer:
    """Adam over everything that trains, as the published code uses it (train.py)."""
    return torch.optim.Adam(
        _groups(model, settings), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def _groups(model: ReferringSegmenter, settings: TrainConfig) -> list[dict[str, Any]]:
    """What the optimiser is given: all that trains; the towers' own weights by themselves if they have another rate."""
    own: list[torch.nn.Parameter] = []
    other: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            apart = settings.tower_lr != 1 and not name.startswith(("head.", "bridge.")) and "_slot." not in name
            (own if apart else other).append(parameter)
    groups = [{"params": other, "share": 1.0}, {"params": own, "share": settings.tower_lr}]
    return [group for group in groups if group["params"]]


class _Step:
    """One optimiser step."""

    def __init__(
        self,
        model: ReferringSegmenter,
        config: RunConfig,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        device: torch.device,
        dtype: torch.dtype,
        passes: Sequence[range],
        batch_size: int,
        group: Processes,
    ) -> None:
        self.model, self.config, self.optimizer, self.parameters = model, config, optimizer, parameters
        self.device, self.dtype = device, dtype
        self.passes, self.batch_size, self.group = passes, batch_size, group

    def __call__(self, step: int, batch: Batch, lr: float, want_iou: bool) -> tuple[float, float | None]:
        """Return the loss and, where wanted, the batch's mIoU in percent, both over all passes and processes.

        Raises DcrisError where the loss is not a number (the weights are then still those of the step before) or memory does
        not suffice.
        """
        try:
            return self._take(step, batch, lr, want_iou)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).strip() or "out of memory").splitlines()[0]
            raise DcrisError(
                f"there is not enough memory for step {step + 1} ({reason}); the last checkpoint is whole, so --resume with a "
                "smaller --train.micro_batch or with --train.checkpoint_activations true, or start with a smaller batch"
            ) from error

    def _take(self, step: int, batch: Batch, lr: float, want_iou: bool) -> tuple[float, float | None]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        # Whether the first process shows the IoU is a question of its clock, which the others do not know.
        want_iou_of_all = want_iou or self.group.count > 1
        losses, ious, begin = [], [], 0
        for places in self.passes:
            part = slice(begin, begin + len(places))
            begin += len(places)
            # Dropout's random numbers belong to the step and to the place in the batch: that is what makes resuming exact.
            torch.manual_seed((self.config.train.seed * 1_000_003 + step + places.start * _SPREAD) % 2**63)
            images = normalise(batch.images[part].to(self.device, non_blocking=True), self.config.data)
            tokens, masks = (x[part].to(self.device, non_blocking=True) for x in (batch.tokens, batch.masks))
            # The mean over the batch is the sum of the passes' means, each by its share of the batch.
            share = len(places) / self.batch_size
            with autocast(self.device, self.dtype):
                logits = self.model(images, tokens, share)
            loss = torch.stack([*training_losses(logits, masks, self.config.train.losses).values()]).sum() * share
            loss.backward()
            losses.append(loss.detach())
            if want_iou_of_all:
                ious.append(_batch_iou(logits.detach(), masks) * share)
            del logits, loss  # before the next pass, and not while it runs
        value, iou = self.group.sum(sum(loss.item() for loss in losses), sum(ious))
        if not math.isfinite(value):
            raise DcrisError(
                f"the loss is {value} at step {step + 1}; the last checkpoint is whole, so go on from it with a lower "
                "--train.lr or with --train.precision float32"
            )
        self.group.sum_gradients(self.parameters)
        if self.config.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        self.optimizer.step()
        return value, iou if want_iou else None


def _batch_iou(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """mIoU in percent on the logits' grid at the CRIS family's threshold; a sign of life, not a result."""
    truth = torch.nn.functional.interpolate(masks, logits.shape[-2:], mode="nearest") > 0.5
    guess = torch.sigmoid(logits.float()) > Cris().threshold
    shared = (guess & truth).flatten(1).sum(1)
    covered = (guess | truth).flatten(1).sum(1)
    return 100 * (shared / covered.clamp(min=1)).mean().item()


def _validate(
    model: ReferringSegmenter,
    config: RunConfig,
    queries: Queries,
    device: torch.device,
    dtype: torch.dtype,
    group: Processes,
    pending: "_Pending",
) -> dict[str, float]:
    """Scores in percent on the validation split's first sentences, as the CRIS family validates while training.

    A request to end (`pending`) breaks it off: a scheduler does not wait for a whole split. The model is left in evaluation
    mode.
    """
    model.eval()
    answer = partial(predict_queries, model, queries, config, Cris(), device=device, dtype=dtype, keep_masks=False)
    if config.train.shard_towers:
        # A sharded tower runs in all processes or in none, and shares differ in their numbers of photographs.
        answers: Iterable[EvalResult] = answer()
    else:
        answers = predict_on_all_ranks(group, queries, lambda share: pending.until_asked(answer(share=share)))
    return summarise(answer.overlap for answer in answers)


class _Pending:
    """A request to end that has come and not been met yet."""

    number: int | None = None
    interruptible = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context for a wait that may be broken off: a request to end, also an earlier one, raises _StopWaiting in it."""
        self.interruptible = True
        try:
            if self.number is not None:
                raise _StopWaiting
            yield
        finally:
            self.interruptible = False

    def until_asked(self, answers: Iterator[EvalResult]) -> Iterator[EvalResult]:
        """Answers as they come, up to a request to end."""
        while True:
            try:
                with self.waiting():
                    answer = next(answers, None)
            except _StopWaiting:
                return
            if answer is None:
                return
            yield answer


@contextmanager
def _signals() -> Iterator[_Pending]:
    """Turn Ctrl-C or SIGTERM into a note that the loop reads between steps; a second Ctrl-C ends at once.

    A second SIGTERM does not: a scheduler sends one to every process, and torchrun then passes its own on. Nor does a copy of
    Ctrl-C within a second, for that reason.
    """
    pending, begin = _Pending(), 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal begin
        if pending.number is None:
            pending.number, begin = number, time.monotonic()
            if pending.interruptible:
                raise _StopWaiting
        elif number == signal.SIGINT and time.monotonic() - begin > 1:
            raise KeyboardInterrupt

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
