"""The largest micro batch that fits a device, found by trial."""

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
from dcris.models.layers.activation_checkpointing import statistics_kept
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import text_to_pixel_loss
from dcris.utils.device import autocast, choose_precision, free_memory, resident_memory
from dcris.utils.distributed import Processes

_CPU = torch.device("cpu")

_USED = 0.9
"""Of the memory that is free, so much may be taken: loader, checkpoints and fragments want some too."""


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
    """What `dcris train --batch-size auto` trains in: what the run in `out` has recorded, or else what is found by trial.

    Args:
        model: of the run; moved to `device`, and else left as it is.
        config: of the run.
        tokenizer: of the model's text tower.
        references: that are trained on.
        out: the run's directory, read by the first process alone.
        device: where training is to be.
        group: the processes. Each tries on its own, and the smallest answer counts.
        say: takes lines for a person.

    Raises DcrisError where not even one sample fits, and where towers are to be sharded, which can be tried only together.
    """
    recorded = group.from_first(lambda: _recorded(out))
    batch = min(config.train.batch_size, references)
    if recorded is None:
        if config.train.shard_towers:
            raise DcrisError("--batch-size auto cannot try sharded towers; give --train.micro_batch")
        share = -(-batch // group.count)
        recorded = min(
            group.all_gather(largest_micro_batch(model, config, tokenizer, share, device, group.local_count))
        )
        # On the machine of one process there may be less room than on another's.
        found = "the largest that fits" if recorded < share else "the whole share of the batch fits"
    else:
        found = "as the run was begun"
    passes = -(-batch // (recorded * group.count))
    log(f"micro batches of {recorded} ({found}): a batch of {batch} takes {passes} passes of {group.count} processes")
    return recorded


def largest_micro_batch(
    model: ReferringSegmenter,
    config: RunConfig,
    tokenizer: Tokenizer,
    share: int,
    device: torch.device,
    neighbours: int = 1,
) -> int:
    """The largest power of two, or `share` if even that fits, of samples whose forward and backward pass the device holds.

    On CUDA passes are tried until memory runs out. A CPU's memory must not run out, so there the growth from one pass to the
    next says whether the one after it would fit into what is free. Weights, statistics and random state are left alone.

    Args:
        model: moved to `device`.
        config: of the run.
        tokenizer: of the model's text tower.
        share: the samples of a batch that this process has to take.
        device: where.
        neighbours: processes that share this machine's memory.

    Raises DcrisError where not even one sample fits.
    """
    sizes = [*(2**power for power in range(share.bit_length()) if 2**power < share), share]
    dtype = choose_precision(config.train.precision, device)
    side = config.data.image_size
    training, parameters = model.training, [item for item in model.parameters() if item.requires_grad]
    model.to(device).train()
    model.checkpoint_activations(config.train.checkpoint_activations)
    on_cuda = device.type == "cuda"

    def run(size: int) -> None:
        # Blank samples will do: memory does not depend on what is in them.
        images = normalise(torch.zeros(size, 3, side, side, dtype=torch.uint8, device=device), config.data)
        tokens = tokenizer(["left"] * size, config.data.word_length).to(device)
        with autocast(device, dtype):
            logits = model(images, tokens)
        text_to_pixel_loss(logits, torch.zeros(size, 1, side, side, device=device)).backward()
        for item in parameters:
            item.grad = None

    # Adam's two moments come with the first step, and stay.
    moments = [torch.zeros_like(item) for item in parameters for _ in range(2)] if on_cuda else []
    kept = 2 * sum(item.nbytes for item in parameters)
    try:
        with statistics_kept(model), torch.random.fork_rng([device] if on_cuda else []):
            best = _try_on_cuda(run, sizes, device) if on_cuda else _try_on_cpu(run, sizes, kept, neighbours)
    finally:
        del moments
        for item in parameters:
            item.grad = None
        model.checkpoint_activations(False)
        model.train(training)
        if on_cuda:
            torch.cuda.empty_cache()
    if not best:
        raise DcrisError(
            f"not even one sample fits the memory of {device}; try --train.checkpoint_activations true, --precision bfloat16 "
            "or a smaller model"
        )
    return best


def _recorded(out: Path) -> int | None:
    for path in sorted(out.glob("checkpoints/step-*"), reverse=True):
        with suppress(DcrisError):  # a damaged one, as resuming will find and say
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
        # Below the whole by a margin, as later allocations come in another order.
        if torch.cuda.max_memory_reserved(device) > _USED * torch.cuda.mem_get_info(device)[1]:
            break
        best = size
    return best


def _try_on_cpu(run: Callable[[int], None], sizes: Sequence[int], kept: int, neighbours: int) -> int:
    room = free_memory(_CPU) * _USED / neighbours - kept
    best, took = 0, 0.0
    for size in sizes:
        # As if all of it grew with the size: a little too careful, since a part does not.
        if took * size > room * max(best, 1):
            break
        took = _grown_by(partial(run, size))
        if took > room:
            break
        best = size
    return best


def _grown_by(act: Callable[[], None]) -> float:
    """Bytes by which this process's memory grew at its height while acting."""
    gc.collect()  # what is given back in the middle would hide as much of the growth
    before = resident_memory("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # forget the height so far
    act()
    return max(0.0, resident_memory("VmHWM") - before)
