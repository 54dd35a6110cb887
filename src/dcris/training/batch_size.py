"""Find the largest micro batch that fits a device, by trial (`dcris train --batch-size auto`)."""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from dcris.config import RunConfig, load_config
from dcris.data.dataset import normalise
from dcris.data.tokenizer import Tokenizer
from dcris.errors import DcrisError
from dcris.models.layers.activation_checkpointing import frozen_statistics
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import training_losses
from dcris.utils.device import autocast, choose_precision, free_memory, resident_memory
from dcris.utils.distributed import Processes

_CPU = torch.device("cpu")

_USABLE = 0.9
"""Share of the free memory that a pass may take; the rest is for the loader, checkpoints and
fragmentation."""


def choose_micro_batch(
    model: ReferringSegmenter,
    config: RunConfig,
    tokenizer: Tokenizer,
    references: int,
    out: Path,
    device: torch.device,
    group: Processes,
    log: Callable[[str], None] = print,
) -> int:
    """Return the micro batch of a run: the one recorded in `out`, or else the largest that fits.

    Args:
        model: of the run; moved to `device` and otherwise left as it is.
        config: of the run.
        tokenizer: of the model's text tower.
        references: number of training references.
        out: the run's directory; only rank 0 reads it.
        device: to train on.
        group: the processes. Each tries on its own; the smallest result is used.
        log: receives lines of progress.

    Raises:
        DcrisError: not even one sample fits, or `train.shard_towers` is set: sharded towers need
            all ranks for a pass, but each rank tries on its own.
    """
    micro_batch = group.from_first(lambda: _recorded_micro_batch(out))
    batch = min(config.train.batch_size, references)
    if micro_batch is None:
        if config.train.shard_towers:
            raise DcrisError("--batch-size auto does not work with train.shard_towers; set --train.micro_batch instead")
        share = -(-batch // group.count)
        micro_batch = min(
            group.all_gather(largest_micro_batch(model, config, tokenizer, share, device, group.local_count))
        )
        reason = "the largest that fits" if micro_batch < share else "the whole share of the batch fits"
    else:
        reason = "as when the run was started"
    passes = -(-batch // (micro_batch * group.count))
    log(
        f"micro batches of {micro_batch} ({reason}): a batch of {batch} takes {passes} passes of {group.count} processes"
    )
    return micro_batch


def largest_micro_batch(
    model: ReferringSegmenter,
    config: RunConfig,
    tokenizer: Tokenizer,
    share: int,
    device: torch.device,
    processes: int = 1,
) -> int:
    """Return the largest micro batch that fits: a power of two, or the whole `share`.

    It is the number of samples in a forward and backward pass. On CUDA, passes are tried until
    memory runs out. On a CPU that could kill the process, so there the growth from one pass to the
    next predicts whether the one after it fits. Weights, batch norm statistics and the random state
    are not changed.

    Args:
        model: moved to `device`.
        config: of the run.
        tokenizer: of the model's text tower.
        share: samples of a batch for this process.
        device: to train on.
        processes: number of processes that share this machine's memory.

    Raises:
        DcrisError: not even one sample fits.
    """
    sizes = [*(2**power for power in range(share.bit_length()) if 2**power < share), share]
    dtype = choose_precision(config.train.precision, device)
    side = max(config.sizes)
    was_training, parameters = model.training, [item for item in model.parameters() if item.requires_grad]
    model.to(device).train()
    least = 1 if trains_on_one_sample(model, config, tokenizer, device) else 2
    model.checkpoint_activations(config.train.checkpoint_activations)
    on_cuda = device.type == "cuda"

    def run(size: int) -> None:
        size = max(size, least)  # a sample that batch norms cannot train on alone is tiny
        # Blank images suffice: memory does not depend on their content.
        images = normalise(torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device), config.data)
        tokens = tokenizer(["left"] * size, config.data.word_length).to(device)
        with autocast(device, dtype):
            output = model(images, tokens)
        losses = training_losses(output, torch.zeros(size, 1, side, side, device=device), config.train)
        torch.stack([*losses.values()]).sum().backward()
        for item in parameters:
            item.grad = None

    # Adam's two moments are allocated by the first step and stay, as do the averages.
    copies = 2 if config.train.ema is None else 3
    moments = [torch.zeros_like(item) for item in parameters for _ in range(copies)] if on_cuda else []
    moments_bytes = copies * sum(item.nbytes for item in parameters)
    try:
        with frozen_statistics(model), torch.random.fork_rng([device] if on_cuda else []):
            best = _try_on_cuda(run, sizes, device) if on_cuda else _try_on_cpu(run, sizes, moments_bytes, processes)
    finally:
        del moments
        for item in parameters:
            item.grad = None
        model.checkpoint_activations(False)
        model.train(was_training)
        if on_cuda:
            torch.cuda.empty_cache()
    if not best:
        raise DcrisError(
            f"not even one sample fits the memory of {device}; try --train.checkpoint_activations true, --precision bfloat16 "
            "or a smaller model"
        )
    return best


def trains_on_one_sample(
    model: ReferringSegmenter, config: RunConfig, tokenizer: Tokenizer, device: torch.device
) -> bool:
    """Return whether a pass of one sample gives each batch norm the two values that it needs.

    A map of one cell does not. Which maps a model has depends on its encoder and method, so a blank
    image of the smallest size is tried.

    Args:
        model: on `device`, in training mode; neither statistics nor the random state are changed.
        config: of the run.
        tokenizer: of the model's text tower.
        device: to train on.
    """
    side, devices = min(config.sizes), [device] if device.type == "cuda" else []
    images = normalise(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device), config.data)
    tokens = tokenizer(["left"], config.data.word_length).to(device)
    precision = autocast(device, choose_precision(config.train.precision, device))
    try:
        with frozen_statistics(model), torch.random.fork_rng(devices), torch.no_grad(), precision:
            model(images, tokens)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # torch has no class for it
            raise
        return False
    return True


def _recorded_micro_batch(out: Path) -> int | None:
    for path in sorted(out.glob("checkpoints/step-*"), reverse=True):
        with suppress(DcrisError):  # a damaged checkpoint; resuming reports it
            return load_config(path / "config.json").train.micro_batch
    return None


def _try_on_cuda(run: Callable[[int], None], sizes: Sequence[int], device: torch.device) -> int:
    best = 0
    for size in sizes:
        try:
            run(size)
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        # With a margin, because later allocations come in another order.
        if torch.cuda.max_memory_reserved(device) > _USABLE * torch.cuda.mem_get_info(device)[1]:
            break
        best = size
    return best


def _try_on_cpu(run: Callable[[int], None], sizes: Sequence[int], moments_bytes: int, processes: int) -> int:
    available = free_memory(_CPU) * _USABLE / processes - moments_bytes
    best, used = 0, 0.0
    for size in sizes:
        # Assumes that all memory grows with the size, which is slightly too much: a part is
        # constant.
        if used * size > available * max(best, 1):
            break
        used = memory_growth(partial(run, size))
        if used > available:
            break
        best = size
    return best


def memory_growth(function: Callable[[], None]) -> float:
    """Return the bytes by which this process's memory grows at its peak while `function` runs."""
    gc.collect()  # memory that is freed inside would hide as much of the growth
    before = resident_memory("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # reset the peak
    function()
    return max(0.0, resident_memory("VmHWM") - before)
