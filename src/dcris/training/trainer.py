"""The training loop, the same for every method.

All random numbers of a step come from the seed and the number of the step, so a run that was
interrupted and resumed ends in the same weights as one that was not (bit for bit on a CPU).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch

from dcris.checkpoints import training_images
from dcris.checkpoints.backbones import fingerprint, load_towers
from dcris.checkpoints.checkpoint import (
    MODEL_FILES,
    Checkpoint,
    Towers,
    best_checkpoint,
    check_files,
    find_checkpoint,
    identify_towers,
    is_directory_of_model,
    list_checkpoints,
    load_optimizer,
    load_trained,
    prune_checkpoints,
    read_config,
    read_training_images,
    refuse_other_split,
    save_checkpoint,
    score_checkpoint,
    sound_checkpoints,
)
from dcris.config import RunConfig, TrainConfig, load_config, other_network, refuse_other_run
from dcris.data.augmentations import AUGMENTATIONS
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
from dcris.data.masking import hide
from dcris.data.mixing import require_weights
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import Tokenizer
from dcris.errors import DcrisError, first_line, out_of_memory
from dcris.evaluation.evaluator import EvalResult, predict_on_all_ranks, predict_queries
from dcris.evaluation.metrics import summarise
from dcris.evaluation.protocols import Cris
from dcris.models.adapters.attach import trained_state
from dcris.models.encoders.vit import VisionState
from dcris.models.layers.activation_checkpointing import frozen_statistics
from dcris.models.optimize import cast_frozen
from dcris.models.segmentation import Output, ReferringSegmenter
from dcris.training.averaging import WeightAverage
from dcris.training.batch_size import trains_on_one_sample
from dcris.training.compilation import compiled
from dcris.training.features import CachedSamples, FeatureLayout
from dcris.training.loggers import Monitor, check_trackers, panel_queries
from dcris.training.loss_scale import LossScale
from dcris.training.losses import LOSSES, masked_losses, resize_masks, training_losses
from dcris.training.optimizer import learning_rate, make_optimizer, set_learning_rate, warmup_steps
from dcris.training.parallel import divide_batch, shard_towers, synchronise_batch_norm
from dcris.training.provenance import RunRecord
from dcris.training.sizes import draw_size, resize
from dcris.training.stopping import Interrupted, StopRequest, StopWaiting, stop_requests
from dcris.types import Batch
from dcris.utils.arguments import PathLike, as_path, require, require_names
from dcris.utils.device import autocast, choose_device, choose_precision
from dcris.utils.distributed import Processes
from dcris.utils.files import lock_folder, make_directory, read_json, remove_directory, write_file, write_json
from dcris.utils.streams import counted, progress_lines
from dcris.utils.workers import dead_worker, require_shared_memory

T = TypeVar("T")

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of neighbouring places in a batch, far beyond other steps and runs."""

_CONFIG = "config.json"
_DATA = "data.json"
"""File in a run's directory that records its references, and the checkpoint it was started from."""

_FEATURES = "features"
"""Folder in a run's directory for `data.cache_features`."""
_ENCODED_AT_ONCE = 8
"""Images in a pass that computes features to be stored."""

_ALONE = Processes()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of a finished run."""

    last: Checkpoint
    best: Checkpoint
    """By the validation score; the last one in a run without validation."""
    seconds: float


def build_model(config: RunConfig) -> ReferringSegmenter:
    """Return a new model with trainable weights from the seed and the towers' pretrained weights.

    Raises:
        DcrisError: tower weights are missing or unreadable.
    """
    torch.manual_seed(require(config, RunConfig, "the configuration").train.seed)
    model = ReferringSegmenter(config.model)
    load_towers(model)
    return model


def total_steps(settings: TrainConfig, references: int) -> int:
    """Return the steps of a whole run: `max_steps` if set, or else those of `epochs`.

    Args:
        settings: of the run.
        references: number of training references.
    """
    return settings.max_steps or settings.epochs * steps_per_epoch(references, min(settings.batch_size, references))


def check_run(config: RunConfig, table: ReferenceTable, group: Processes = _ALONE) -> None:
    """Check what can be checked before the model is built.

    Raises:
        DcrisError: a split, tracker, loss or augmentation does not exist, weights do not fit the
            mixture, or shared memory is too small for the workers.
    """
    settings = config.train
    check_trackers(settings.trackers)
    require_names(settings.losses, LOSSES, "train.losses")
    require_names(config.data.augmentations, AUGMENTATIONS, "data.augmentations")
    references = len(table.split(config.data.train_split))
    batch = min(settings.batch_size, references)
    require_weights(config.data, table, batch * steps_per_epoch(references, batch))
    val_split = config.data.val_split
    if val_split and not all_queries(table.split(val_split), present_only=True):
        raise DcrisError(
            f"no expression of the split {val_split} has a target, so it cannot validate training; choose another "
            "--data.val_split, or null"
        )
    samples = batch * group.local_count / group.count
    require_shared_memory(config.data.workers, batch_bytes(config.data, math.ceil(samples)))


class Trainer:
    """Trains the adapters and the head of a model; writes checkpoints and a log to `out`.

    The loop is in `_train`; what it calls is below it, in that order. Several processes can train
    together: each takes a part of every batch, gradients are those of the whole batch's mean, and
    batch norm uses the statistics of the whole batch. Only rank 0 reads and writes `out`.

    Args:
        model: with its towers filled; moved to `device`.
        config: of the run; written to out/config.json.
        table: the data set, from `training_table`; `config.data.train_split` is trained on.
        tokenizer: of the model's text tower.
        out: the run's directory.
        device: to train on.
        resume: continue from the newest checkpoint in `out`, or start if there is none.
        log: receives lines of progress.
        group: the processes; all call this with the same arguments except `device` and `log`.

    Raises:
        DcrisError: an argument has the wrong type, a tracker is not installed, a split is missing,
            or the batch cannot be divided among the processes.
    """

    def __init__(
        self,
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
    ) -> None:
        self.model, self.config = model, require(config, RunConfig, "the configuration")
        self.table, self.tokenizer = require(table, ReferenceTable, "the table of references"), tokenizer
        self.out, self.device = as_path(out, "the run's directory"), choose_device(device)
        self.resume, self.log, self.group = resume, log, group
        check_run(config, table, group)

        self.settings = config.train
        self.dtype = choose_precision(self.settings.precision, self.device)
        self.loss_scale = LossScale(self.dtype, self.device)
        references, val_split = table.split(config.data.train_split), config.data.val_split
        self.samples = TrainingSamples(references, config.data, tokenizer, self.settings.seed, self.settings.masking)
        self.queries: Queries = (
            all_queries(table.split(val_split), first_only=True, present_only=True) if val_split else []
        )
        self.skipped = Skipped(len(self.samples), log)
        self.batch_size = min(self.settings.batch_size, len(self.samples))
        self.passes = divide_batch(self.batch_size, self.settings.micro_batch, group)
        self.per_epoch = steps_per_epoch(len(self.samples), self.batch_size)
        self.total = total_steps(self.settings, len(self.samples))

        self.done = 0  # steps taken, those before resuming included
        self.last: Checkpoint | None = None
        self.average: WeightAverage | None = None
        self.seen_before = frozenset[bytes]()
        """Images that the weights of `train.start` were trained on."""
        self.features: CachedSamples | None = None
        self.stop = StopRequest()
        self.record: RunRecord | None = None  # on rank 0
        self.forward: Callable[..., Output] = model
        """The model, or what run() compiles from it."""

        # Set by run():
        self.towers: Towers
        self.parameters: list[torch.nn.Parameter]
        self.statistics: list[torch.Tensor]  # of the batch norms
        self.optimizer: torch.optim.Optimizer
        self.monitor: Monitor

    def run(self) -> TrainResult:
        """Train to the end.

        Raises:
            DcrisError: `out` holds a model, or a run and `resume` is not set, or the run has other
                settings or references; another process trains in `out`; all its checkpoints are
                damaged; `config.train.start` is damaged or from another model; the ranks have
                different settings; a pass has one sample, which is too small for batch norm; data
                cannot be read or results not written; a worker dies; memory does not suffice; the
                loss or the weights are not finite; float16 overflows at every step.
            Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
        """
        # Signals are handled until the monitor is closed, so that a second Ctrl-C can break off a
        # tracker that still sends.
        with ExitStack() as stack:
            self.stop = stack.enter_context(stop_requests())
            try:
                return self._run(stack)
            except RuntimeError as error:
                if (died := dead_worker(error)) is None:
                    raise
                raise died from error

    def _run(self, stack: ExitStack) -> TrainResult:
        self._prepare(stack)
        begin = time.monotonic()
        if self.config.data.cache_features and self.done < self.total:
            self._cache_features()
        with Monitor(
            self.out, self.config, self.done, self.total, self.per_epoch, self.device, self.log, self.group.first
        ) as self.monitor:
            self._validate_unscored()
            self._train()
        self.skipped.conclude()
        if self.loss_scale.skipped:
            self.log(f"{self.loss_scale.skipped:,} of {self.total:,} steps were skipped because float16 overflowed")
        self.model.eval()
        if self.average is not None:
            self.average.exchange()  # the model is then that of the last checkpoint
        checkpoints = self.group.from_first(partial(list_checkpoints, self.out))
        if self.group.first:
            remove_directory(self.out / _FEATURES)
        if self.record is not None:
            self.record.write()
        return TrainResult(checkpoints[-1], best_checkpoint(checkpoints), time.monotonic() - begin)

    # ---- the loop -------------------------------------------------------------------------------

    def _train(self) -> None:
        """The training loop."""
        settings, monitor = self.settings, self.monitor
        for step, batch in zip(range(self.done, self.total), self._batches(), strict=True):
            self._note_skipped(batch)
            lr = learning_rate(settings, step, self.per_epoch, self.total)
            set_learning_rate(self.optimizer, lr)

            # A forward pass that overflows makes the statistics of batch norm NaN for good.
            statistics = [each.clone() for each in self.statistics] if self.loss_scale.on else []
            with self._memory_errors(step):
                losses, iou = self.forward_backward(step, batch, monitor.wants_iou(step + 1))
                if not self.loss_scale.on:  # which skips such steps
                    self._require_finite(losses, step)
                self.group.sum_gradients(self.parameters)
                stepped = self.loss_scale.step(self.optimizer, self.parameters, losses["loss"], settings.clip_norm)
                if not stepped:
                    torch._foreach_copy_(self.statistics, statistics)
                elif self.average is not None:
                    self.average.update(step)
            self.done = step + 1
            monitor.step(self.done, losses, iou, lr, self.batch_size, self.loss_scale.report())

            ends_epoch = self.done % self.per_epoch == 0 or self.done == self.total
            if ends_epoch or (settings.save_every and self.done % settings.save_every == 0):
                self.save()
            self._stop_if_requested()
            if ends_epoch and self.queries:
                self.validate()

    def forward_backward(self, step: int, batch: Batch, want_iou: bool) -> tuple[dict[str, float], float | None]:
        """Compute the loss of this process's part of a batch, in passes, and its gradients.

        Args:
            step: number of the step, from 0.
            batch: this process's samples of the step.
            want_iou: whether to compute the batch's IoU.

        Returns:
            losses: over the whole batch, all ranks: "loss", and the terms added to equation 6, by
                name.
            iou: mIoU of the whole batch in percent, if wanted.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # Only rank 0 wants the IoU, by its clock, but summing it takes all ranks.
        compute_iou = want_iou or self.group.count > 1
        size = draw_size(self.config.sizes, self.settings.seed, step)
        terms, ious, begin = [], [], 0
        for places in self.passes:
            part = slice(begin, begin + len(places))
            begin += len(places)
            # Dropout is seeded by the step and the place in the batch: that makes resuming exact.
            torch.manual_seed((self.settings.seed * 1_000_003 + step + places.start * _SEED_STRIDE) % 2**63)
            rows, image_index = self._rows(batch, part)
            images = self._images(batch.images[rows], size)
            tokens, masks = (x[part].to(self.device, non_blocking=True) for x in (batch.tokens, batch.masks))
            # The batch's mean is the sum of the passes' means, each times its share of the batch.
            share = len(places) / self.batch_size
            with autocast(self.device, self.dtype):
                output = self.forward(images, tokens, image_index)
            losses = training_losses(output, masks, self.settings)
            weight = 0.0 if self.settings.masking is None else self.settings.masking.weight
            terms.append(self._backward(losses, share * (1 - weight)))
            if batch.masked is not None:
                hidden, masked_tokens = batch.masked.hidden[rows], batch.masked.tokens[part]
                masked = self._forward_masked(images, hidden, masked_tokens, image_index)
                terms.append(self._backward(masked_losses(masked, output, masks, self.settings), share * weight))
                del masked
            if compute_iou:
                ious.append(batch_iou(output, masks, self.settings) * share)
            del output, losses  # free this pass's memory before the next one
        names = [name for name in dict.fromkeys(chain(*terms)) if name != "text_to_pixel"]
        *values, iou = self.group.sum(
            *(sum(term[name].item() for term in terms if name in term) for name in names), sum(ious)
        )
        return dict(zip(names, values, strict=True)), iou if want_iou else None

    # ---- what the loop calls --------------------------------------------------------------------

    def _backward(self, losses: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """Add the gradients of a pass's terms, times its share, and return the terms times it, and
        their sum as "loss"."""
        loss = torch.stack([*losses.values()]).sum() * share
        self.loss_scale.scale(loss).backward()
        return {"loss": loss.detach()} | {name: term.detach() * share for name, term in losses.items()}

    def _rows(self, batch: Batch, part: slice) -> tuple[slice | torch.Tensor, torch.Tensor | None]:
        """Return which of a batch's images its part has, and which of these each sample has, on the
        device."""
        if batch.image_index is None:
            return part, None
        rows, image_index = batch.image_index[part].unique(return_inverse=True)
        return rows, image_index.to(self.device)

    def _images(self, images: torch.Tensor, size: int) -> torch.Tensor | VisionState:
        """Return images on the device, normalised and of that size, or the features that are stored
        for them."""
        images = images.to(self.device, non_blocking=True)
        if self.features is not None:
            return self.features.layout.unpack(images)
        return resize(normalise(images, self.config.data), size)

    def _forward_masked(
        self,
        images: torch.Tensor | VisionState,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        image_index: torch.Tensor | None,
    ) -> Output:
        """Return the output for the masked copies of samples (`train.masking`).

        Batch norms keep their running statistics: prediction sees whole images.
        """
        assert isinstance(images, torch.Tensor)  # stored features cannot be masked
        hidden, tokens = (x.to(self.device, non_blocking=True) for x in (hidden, tokens))
        with frozen_statistics(self.model), autocast(self.device, self.dtype):
            return self.forward(hide(images, hidden), tokens, image_index)

    def _batches(self) -> Iterator[Batch]:
        """Yield this process's part of each batch.

        An error that one rank meets in reading is raised on all ranks.

        Raises:
            DcrisError: a sample cannot be read on some rank.
            Interrupted: a signal arrived while a rank waited for a batch.
        """
        places = [place for ranges in self.passes for place in ranges]
        last = max(self.done, self.total)
        indices = TrainingBatches(
            len(self.samples),
            self.settings.batch_size,
            self.settings.seed,
            self.done,
            last,
            places,
            self.samples.images,
            self.config.data.phrases_per_image,
            [reference.source for reference in self.samples.references],
            self.config.data.weights,
        )
        loader = training_loader(self.samples, indices, self.config.data.workers, pin=self.device.type == "cuda")
        while True:
            error: DcrisError | StopWaiting | None = None
            batch = None
            try:
                with self.stop.interrupts():
                    batch = next(loader, None)
            except (DcrisError, StopWaiting) as met:
                error = met
            try:
                self.group.raise_together(error)
            except StopWaiting:
                self._stop_if_requested()
                raise
            if batch is None:
                return
            yield batch

    def _note_skipped(self, batch: Batch) -> None:
        if self.config.data.on_bad_image == "skip":
            for part in self.group.all_gather(batch.skipped):
                self.skipped.note(part)

    def _require_finite(self, losses: dict[str, float], step: int) -> None:
        """Raise DcrisError for a loss that is NaN or infinite; the weights are then still those of
        the step before."""
        if not math.isfinite(losses["loss"]):
            raise _diverged(f"the loss is {losses['loss']} at step {step + 1}")

    @contextmanager
    def _memory_errors(self, step: int) -> Iterator[None]:
        """Turn an out-of-memory error of a step into a DcrisError."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise DcrisError(
                f"not enough memory for step {step + 1} ({first_line(error)}); the last checkpoint is intact: --resume with a "
                "smaller --train.micro_batch or with --train.checkpoint_activations true, or start again with a smaller batch"
            ) from error

    def save(self) -> Checkpoint:
        """Write a checkpoint of the current step and delete old ones.

        Raises DcrisError for weights that are NaN or infinite: the loss that shows them is that of
        the next step.
        """
        if not all(bool(weight.isfinite().all()) for weight in self.parameters):
            raise _diverged(f"the weights are not finite after step {self.done}")
        averages = self.average.values if self.average else None
        self.last = self.group.from_first(
            partial(
                save_checkpoint,
                self.out,
                self.model,
                self.towers,
                self.optimizer,
                self.config,
                self.done,
                averages,
                self.loss_scale.state(),
            )
        )
        if self.group.first:
            prune_checkpoints(self.out, self.settings.keep_last)
        if self.record is not None:
            self.record.write()
        return self.last

    def _stop_if_requested(self) -> None:
        """Save a checkpoint and raise Interrupted if any rank received Ctrl-C or SIGTERM."""
        number = self.group.agree(self.stop.signal)
        if number is None:
            return
        saved = self.last if self.last is not None and self.last.step == self.done else self.save()
        raise Interrupted(number, saved)

    # ---- validation -----------------------------------------------------------------------------

    def validate(self) -> None:
        """Score the newest checkpoint on the validation split, and log the scores.

        It comes after saving: validation takes long, and an image of its split may be unreadable.
        """
        with self.average.applied() if self.average is not None else nullcontext():
            self._validate()
        self.model.train()

    def _validate(self) -> None:
        assert self.last is not None
        scores = self.compute_scores()
        self._stop_if_requested()  # a signal cut validation short, so the scores are of a part only
        panels: Callable[[], Iterable[EvalResult]] = self._panels
        if self.settings.shard_towers and self.settings.trackers:
            # Sharded towers must run on all ranks, but only rank 0 asks for panels.
            panels = [*self._panels()].copy
        self.monitor.validated(self.last.step, scores, panels)
        if self.group.first:
            # The score is written last: on resuming, a checkpoint without one is validated again.
            by = self.settings.best_by
            score_checkpoint(self.last, scores[by], by, self.config.data.val_split)
            prune_checkpoints(self.out, self.settings.keep_last)

    def compute_scores(self) -> dict[str, float]:
        """Return scores in percent on the validation split's first expressions that have a target,
        as the CRIS family validates in training.

        A stop request ends it early: a scheduler does not wait for a whole split. Leaves the model
        in evaluation mode.
        """
        self.model.eval()
        predict = partial(self._predict, self.queries, keep_masks=False)
        results: Iterable[EvalResult]
        if self.settings.shard_towers:
            # Sharded towers must run equally often on all ranks, but shares differ in their numbers
            # of images.
            results = predict()
        else:
            results = predict_on_all_ranks(
                self.group,
                self.queries,
                lambda share: self._with_progress(
                    self.stop.take_until_stop(predict(share=share)), len(self.queries), "validation expression"
                ),
            )
        scores = summarise(result.overlap for result in results)
        return {key: score for key, score in scores.items() if score is not None}  # each, if there are results

    def _validate_unscored(self) -> None:
        """Validate the checkpoint that was resumed from, if the run was stopped before it was
        scored."""
        ends_epoch = self.done % self.per_epoch == 0 or self.done == self.total
        if self.done and self.last is not None and self.last.score is None and self.queries and ends_epoch:
            self.validate()

    def _panels(self) -> Iterator[EvalResult]:
        return self._predict(panel_queries(self.queries))

    def _predict(self, queries: Queries, **options: Any) -> Iterator[EvalResult]:
        return predict_queries(
            self.model, queries, self.config, Cris(), device=self.device, dtype=self.dtype, **options
        )

    # ---- before the first step ------------------------------------------------------------------

    def _cache_features(self) -> None:
        """Store the features of the training images, or use those from before an interruption."""
        data, begin = self.config.data, time.monotonic()
        blank = self._encode(torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8))
        layout = FeatureLayout(blank, half=self.dtype != torch.float32)
        places = sum(len(places) for places in self.passes)
        sample_bytes = layout.bytes + batch_bytes(data, 1)
        require_shared_memory(data.workers, places * self.group.local_count * sample_bytes)
        key = {
            "references": self.table.sha256(),
            "towers": self.towers,
            "model": self.config.model.model_dump(mode="json"),
            "data": data.model_dump(mode="json", exclude={"workers", "on_bad_image", "val_split"}),
            "seed": self.settings.seed,
            "precision": str(self.dtype),
        }
        self.samples = self.features = CachedSamples(self.samples, self.out / _FEATURES, layout, key, self.group)
        if not all(self.group.all_gather(self.features.complete())):
            images, needed = self.features.estimate()
            self.features.require_room(needed)
            self.log(
                f"storing the features of up to {counted(images, 'image')}, {needed / 1e9:,.2f} GB, in {self.features.folder}"
            )
            written = self.features.write(self._encode, data.workers, _ENCODED_AT_ONCE)
            for _ in self._with_progress(
                self.stop.take_until_stop(written), sum(map(len, self.features.shares)), "image"
            ):
                pass
            self._stop_if_requested()
            self.log(f"stored the features in {time.monotonic() - begin:.0f} s")
        self.features.open()

    def _with_progress(self, items: Iterator[T], total: int, unit: str) -> Iterator[T]:
        """Yield this rank's share of `total` items, and log how many are done after each half
        minute."""
        advance = progress_lines(self.log, total, unit)
        for done, item in enumerate(items, 1):
            advance(min(done * self.group.count, total))
            yield item

    @torch.no_grad()
    def _encode(self, squares: torch.Tensor) -> VisionState:
        with autocast(self.device, self.dtype):
            return self.model.encode_images(normalise(squares.to(self.device), self.config.data))

    def _prepare(self, stack: ExitStack) -> None:
        """Find the checkpoints, compare the ranks, prepare model and optimizer, and write the run's
        configuration.

        Nothing is written before everything has been checked. `stack` holds the lock on the run's
        directory.
        """
        resuming = self.resume and self.out.is_dir()
        checkpoints = []
        if self.group.first and is_directory_of_model(self.out):
            raise DcrisError(f"{self.out} holds a model, not a run; choose another --out")
        if self.group.first and resuming:
            stack.enter_context(lock_folder(self.out))
            checkpoints = sound_checkpoints(self.out, self.log)
        elif self.group.first and list_checkpoints(self.out):
            raise DcrisError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out")
        newest = checkpoints[-1] if checkpoints else None
        if newest is not None:
            refuse_other_run(load_config(newest.path / _CONFIG), self.config, self.out)
            refuse_other_split(checkpoints, self.config.data.val_split, self.out)
        record = self._data_record(newest)
        cut = cut_phrases(all_queries(self.samples.references), self.config.data, self.tokenizer, self.table.dataset)
        for note in (*self.table.notes, *([cut] if cut else [])):
            self.log(note)

        self.towers = identify_towers(self.model)
        self._require_same_on_all_ranks(record["sha256"])
        self._prepare_model()
        self._require_values_for_batch_norm()
        if self.config.data.cache_features:
            self._require_frozen_images()
        self._load_weights(newest, record)
        self.last = self.group.from_first(lambda: newest)
        self._copy_from_first_rank()

        if self.group.first:
            if not resuming:
                stack.enter_context(lock_folder(self.out))
            self.record = RunRecord(self.out, self.device, self.group.count, record["sha256"], resuming)
            write_json(make_directory(self.out) / _CONFIG, self.config.model_dump(mode="json"))
            if newest is None or not (self.out / _DATA).exists():
                write_json(self.out / _DATA, record)
            if newest is None or not (self.out / training_images.FILE).exists():
                self._write_training_images(again=newest is not None)
            self.record.write()
        self.log(
            f"{counted(len(self.samples), 'reference')}, {counted(self.per_epoch, 'step')} an epoch, "
            f"{counted(self.total, 'step')} in all"
        )
        if (warmup := warmup_steps(self.settings, self.total)) < self.settings.warmup_steps:
            self.log(
                f"the warm-up takes {counted(warmup, 'step')}, not {self.settings.warmup_steps:,}: that is more than half of "
                "this run"
            )
        if not self.settings.shard_towers:  # FSDP holds sharded weights itself
            cast_frozen(self.model, self.dtype)

    def _data_record(self, newest: Checkpoint | None) -> dict[str, Any]:
        """Return the content of data.json.

        Raises:
            DcrisError: the run was started on other references.
        """
        record, path = self.table.record(), self.out / _DATA
        if newest is None or not path.exists():
            return record
        try:
            before = read_json(path, "the record of the run's data")
        except DcrisError as error:
            raise DcrisError(f"{error}; or delete it, if you know that the data are the same") from error
        if not isinstance(before, dict) or before.get("sha256") != record["sha256"]:
            raise DcrisError(
                f"the references of {self.table.dataset} in {self.table.root} are not those that the run in {self.out} was "
                f"started on (see {path}); restore those, or choose another --out"
            )
        return before

    def _write_training_images(self, again: bool) -> None:
        """Write the list of the images that the run is trained on, with those of `train.start`.

        A list without these would hide them from evaluations, so none is written `again`, after the
        first was lost, if the checkpoint is lost, too.
        """
        path, start = self.out / training_images.FILE, self.settings.start
        if again and start is not None:
            try:
                self.seen_before = read_training_images(find_checkpoint(Path(start)))
            except DcrisError as error:
                self.log(
                    f"{path} is missing, so evaluations will not know which images this run was trained on; restore it, as it "
                    f"cannot be made again without the images of train.start: {error}"
                )
                return
        seen = training_images.hash_images(self.samples.references) | self.seen_before
        write_file(path, training_images.pack_images(seen))

    def _require_same_on_all_ranks(self, references: str) -> None:
        """Raise DcrisError naming what differs, if the ranks were started differently."""
        own = {"settings": self.config.model_dump(), "references": references, "towers": self.towers}
        for rank, other in enumerate(self.group.all_gather(own)):
            for name, value in other.items():
                if value != own[name]:
                    raise DcrisError(
                        f"ranks {self.group.rank} and {rank} have different {name}; use the same command and the same files "
                        "on all ranks"
                    )

    def _prepare_model(self) -> None:
        """Move the model to the device, shard it and synchronise its batch norms as configured, and
        make the optimizer and the compiled network."""
        model = self.model
        if self.settings.shard_towers:
            shard_towers([*model.towers.values()], self.device, self.group)
        if self.group.count > 1:
            synchronise_batch_norm(model)
        model.to(self.device).train()
        model.checkpoint_activations(self.settings.checkpoint_activations)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained = trained_state(model)
        self.statistics = [buffer for name, buffer in model.named_buffers() if name in trained]
        self.optimizer = make_optimizer(model, self.settings)
        self.forward = compiled(model, self.settings, self.device, self.group)

    def _require_values_for_batch_norm(self) -> None:
        """Raise DcrisError if some pass has a single sample, on which batch norms cannot train.

        Several processes have several samples in each pass.
        """
        if self.group.count > 1 or min(map(len, self.passes)) > 1:
            return
        if not trains_on_one_sample(self.model, self.config, self.tokenizer, self.device):
            side = min(self.config.sizes)
            what = f"{len(self.passes)} passes, some of which have" if len(self.passes) > 1 else "one pass, which has"
            raise DcrisError(
                f"a batch of {self.batch_size} takes {what} one sample, and batch norm cannot train on one image of "
                f"{side} x {side} pixels, as it gets a single value; raise data.image_size, or train.batch_size and "
                "train.micro_batch to two samples a pass"
            )

    def _require_frozen_images(self) -> None:
        """Raise DcrisError if the features of an image change during training."""
        if self.settings.shard_towers:
            raise DcrisError("data.cache_features does not work with train.shard_towers; leave one of them off")
        if self.model.trains_before_text():
            method = self.config.model.method
            raise DcrisError(
                f"data.cache_features needs an image encoder without trained weights before the text, but the method "
                f"{method.name if method else None} trains some there; leave it off"
            )

    def _load_weights(self, newest: Checkpoint | None, record: dict[str, Any]) -> None:
        """Load the checkpoint that is resumed, or else that of `train.start`, which is noted in
        `record`."""
        if newest is not None:
            load_trained(self.model, newest.path)
            self.done = newest.step
        elif self.settings.start is not None and self.group.first:
            start = find_checkpoint(Path(self.settings.start))
            check_files(start, MODEL_FILES)
            before = read_config(start)
            had, has = before.model.head.presence, self.model.head.presence is not None
            try:
                load_trained(self.model, start, presence=had == has)
            except DcrisError as error:
                raise DcrisError(
                    f"{error}; a run can only start from a checkpoint of the same model, here of the recipe {before.recipe}: "
                    f"train with {start / 'config.json'} in place of {self.config.recipe}"
                ) from error
            if self.model.head.presence is not None:
                self.model.head.presence.temperature.fill_(1)  # of other weights than those to come
            self.seen_before = read_training_images(start)
            record["start"] = {"checkpoint": str(start), "sha256": fingerprint(trained_state(self.model))}
            self.log(f"starting from the adapters and the head of {start}")
            if others := other_network(before, self.config):
                self.log(f"{start} was trained with {'; '.join(others)}")
            if has and not had:
                self.log(f"{start} has no presence head: a new one is trained")
            elif had and not has:
                self.log(f"the presence head of {start} is left out; --model.head.presence true keeps it")
        if self.settings.ema is not None:
            self.average = WeightAverage(self.model, self.settings.ema)
        if newest is not None:
            if self.done:  # a run that was stopped before its first step has no optimizer state
                self.loss_scale.load(load_optimizer(self.optimizer, self.model, newest.path))
            self.log(f"resuming from step {self.done}")

    def _copy_from_first_rank(self) -> None:
        """Copy the step, trained weights with their averages, batch norm statistics, and the states
        of optimizer and loss scale of rank 0 to the other ranks."""
        if self.group.count == 1:
            return
        own = self.optimizer.state_dict()
        weights = [*trained_state(self.model).values(), *(self.average.values.values() if self.average else ())]
        # Moved to the CPU first: a pickled tensor is restored on its device, which is another
        # rank's.
        state = {slot: {key: x.cpu() for key, x in values.items()} for slot, values in own["state"].items()}
        self.done, values, state, loss_scale = self.group.from_first(
            lambda: (self.done, [weight.cpu() for weight in weights], state, self.loss_scale.state())
        )
        self.loss_scale.load(loss_scale)
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _diverged(what: str) -> DcrisError:
    return DcrisError(
        f"{what}; the last checkpoint is intact: start another run --from it with a lower --train.lr or with --precision "
        "float32"
    )


def batch_iou(output: Output, masks: torch.Tensor, settings: TrainConfig) -> float:
    """Return a rough mIoU of a batch in percent, on the grid of the logits, at the CRIS family's
    threshold.

    An empty mask of an absent object counts as 1 where the model is to tell absent objects, else
    as 0.

    Args:
        output: of the network.
        masks: [B, 1, S, S] in 0..1.
        settings: target is used.
    """
    logits = output.logits.detach()
    # Aligned targets have the protocol's threshold where half of a cell is covered.
    half = Cris.threshold if settings.target == "aligned" else 0.5
    target = resize_masks(masks, logits.shape[-2:], settings.target) > half
    prediction = torch.sigmoid(logits.float()) > Cris.threshold
    intersection = (prediction & target).flatten(1).sum(1)
    union = (prediction | target).flatten(1).sum(1)
    iou = intersection / union.clamp(min=1)
    if output.presence is not None:
        iou = torch.where(union == 0, 1.0, iou)
    return 100 * iou.mean().item()
