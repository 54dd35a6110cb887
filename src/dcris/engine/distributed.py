"""Several processes at one task, as torchrun starts them: who is who, and how their results come together.

Shape letters: B batch, C channels, * any further dimensions.
"""

import importlib
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F

from dcris.data.workers import dead_worker
from dcris.encoders.clip_text import TextTower
from dcris.encoders.vision import VisionTower
from dcris.errors import DcrisError

T = TypeVar("T")

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another: far more than a checkpoint takes, or one share of a validation more than another."""

_BUCKET = 1 << 25
"""Bytes of gradients that travel together: few messages, and no second copy of all gradients at once."""

_FAILED = "dcris/failed"
"""The key under which processes that end in an error count themselves, in the store that all can reach."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all that torchrun started; alone where it did not.

    Every method is to be called by all of them in the same order. Each raises DcrisError where another process has ended or
    does not answer.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those on this machine: the number of its GPU."""
    local_count: int = 1
    """Processes on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, for all of them to have."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _answered():
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process alone makes, for all to have; none goes on before it is made."""
        values: list[Any] = [make() if self.first else None]
        if self.count == 1:
            return values[0]
        with _answered():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def agree(self, number: int | None) -> int | None:
        """The greatest number that any process has; None where none has one."""
        if self.count == 1:
            return number
        greatest = torch.tensor(-1 if number is None else number)
        with _answered():
            distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return None if greatest < 0 else int(greatest)

    def raise_together(self, error: BaseException | None) -> None:
        """Raise in every process the error that one of them has met; the last one's where several have."""
        where = self.agree(None if error is None else self.rank)
        if where is None:
            return
        errors: list[Any] = [error]
        if self.count > 1:
            with _answered():
                distributed.broadcast_object_list(errors, src=where, device=torch.device("cpu"))
        raise errors[0] from (None if errors[0] is error else error)

    def sum(self, *numbers: float) -> list[float]:
        """The sum over all processes of each of some numbers."""
        if self.count == 1:
            return [*numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        with _answered():
            distributed.all_reduce(sums)
        return sums.tolist()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all their gradients, in place, to the last bit the same everywhere.

        An explicit sum and not DistributedDataParallel: what is trained is small, passes of one batch add up first, and what
        no loss reaches needs no special case, since it has a gradient in no process.
        """
        if self.count == 1:
            return
        waiting = []
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _answered():
                waiting.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in waiting:
            with _answered():
                work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(item.nbytes for item in bucket) + gradient.nbytes > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def _answered() -> Iterator[None]:
    """What a library says of a connection that broke, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        if dead_worker(error) is not None:  # raised wherever this process is
            raise
        raise DcrisError(
            f"another process of this run has ended or does not answer ({_reason(error)}); look for what it said, and give the "
            "same command again, a training run's with --resume"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of what a library says, without the places in its source that it begins with."""
    text = re.sub(r"^(\[[^\]]*\]\s*)+", "", str(error).strip()) or type(error).__name__
    return text.splitlines()[0].split(". ")[0][:200]


def described_processes() -> Processes:
    """Which process of how many this is, as torchrun says in the environment; one alone where it says nothing.

    Raises DcrisError where the description is not whole.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        rank, count, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Processes(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except (KeyError, ValueError) as error:
        raise DcrisError(
            f"WORLD_SIZE is set, but it, RANK or LOCAL_RANK is not a number ({error}); start several processes with torchrun"
        ) from error


@contextmanager
def processes(device: str = "auto", patience: timedelta = _PATIENCE) -> Iterator[Processes]:
    """Join the group that torchrun describes in the environment, with NCCL where this runs on CUDA and Gloo elsewhere.

    An error inside ends all processes: the connections of the one that leaves are closed, on which the others leave too.
    Only the first of them raises its error; the others exit in silence with code 2, so that it is said once. `patience` is how
    long one that has come to a meeting point waits for the others.

    Raises DcrisError where the description is not whole or the others cannot be reached.
    """
    group = described_processes()
    if group.count == 1:
        yield group
        return
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        if group.local_rank >= torch.cuda.device_count():
            raise DcrisError(
                f"process {group.local_rank} of this machine has no GPU of its own, as there are {torch.cuda.device_count()}; "
                "start as many processes as there are, or give --device cpu"
            )
        torch.cuda.set_device(group.local_rank)
    # Before there is a group, which defaults of its functions would name and keep alive for ever: its threads would then free
    # tensors while the interpreter ends, which aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
        # Objects and counts travel over Gloo in any case, so that none of them makes the CPU wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        shared = PrefixStore("dcris", store)
        distributed.init_process_group(backend, store=shared, rank=group.rank, world_size=group.count, timeout=patience)
    except (RuntimeError, ValueError) as error:  # both are the library's
        raise DcrisError(
            f"process {group.rank} of {group.count} did not find the others ({_reason(error)}); check the address and port of "
            "torchrun"
        ) from error
    try:
        yield group
    except Exception as error:
        # torchrun sends SIGTERM to the others as soon as one has left; they have their own exit code to give.
        _ignore_sigterm()
        if not _is_first_to_fail(store):
            raise SystemExit(2) from error
        raise
    except SystemExit:
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _ignore_sigterm() -> None:
    with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_first_to_fail(store: Store) -> bool:
    """Whether no process has ended in an error before this one; also where nobody can tell any more."""
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:
        return True


def leave_together(group: Processes) -> None:
    """Wait for all, and end undisturbed: torchrun sends SIGTERM to those that end later than another that was interrupted."""
    if group.count > 1:
        _ignore_sigterm()
        group.gather(None)


def divide_batch(batch: int, micro_batch: int | None, group: Processes) -> list[range]:
    """Which places of a global batch this process takes, one range for each pass through the network.

    First the batch is divided into passes, then each pass among the processes, as evenly as whole samples allow. So what a
    pass holds depends on the product of `micro_batch` and the number of processes alone.

    Args:
        batch: samples in the global batch.
        micro_batch: at most so many samples per process and pass; None for one pass.
        group: the processes.

    Raises DcrisError where some process would have nothing to do in a pass.
    """
    passes = 1 if micro_batch is None else -(-batch // (micro_batch * group.count))
    if batch // passes < group.count:
        what = f"a batch of {batch}" + (f" in {passes} passes" if passes > 1 else "")
        advice = "raise train.micro_batch or start fewer" if passes > 1 else "start fewer, or raise train.batch_size"
        raise DcrisError(f"{what} leaves some of {group.count} processes without a sample; {advice}")
    ranges = []
    for number in range(passes):
        start, stop = batch * number // passes, batch * (number + 1) // passes
        size = stop - start
        ranges.append(range(start + size * group.rank // group.count, start + size * (group.rank + 1) // group.count))
    return ranges


# ---- batch norm over all processes ---------------------------------------------------------------------------------------


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the samples of all processes, with the parameters and buffers of the one it replaces.

    torch's own does this on CUDA alone. Statistics are combined from each process's mean and squared deviations, not from sums
    of squares, which lose digits; processes may hold different numbers of samples.
    """

    def __init__(self, replaced: nn.modules.batchnorm._BatchNorm) -> None:
        assert replaced.momentum is not None and replaced.track_running_stats and replaced.affine
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum)
        self.weight, self.bias = replaced.weight, replaced.bias
        self.running_mean, self.running_var = replaced.running_mean, replaced.running_var
        self.num_batches_tracked = replaced.num_batches_tracked
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, *]."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y, mean, variance, samples = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (samples / (samples - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""


class _Normalise(torch.autograd.Function):
    """Returns the normalised tensor, the mean [C], the biased variance [C] and the number of samples in all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(_wide(x), over, correction=0)
        mine = torch.cat((mean, variance, mean.new_tensor([x.numel() / x.shape[1]])))
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        with _answered():
            distributed.all_gather(everyone, mine)
        table = torch.stack(everyone)
        means, variances = table[:, :-1].chunk(2, dim=1)
        shares = table[:, -1:] / table[:, -1].sum()
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.samples = samples = table[:, -1].sum()
        ctx.mark_non_differentiable(mean, variance, samples)
        factor = weight * scale
        shape = [1, -1, *[1] * (x.dim() - 2)]
        y = _wide(x) * factor.view(shape) + (bias - mean * factor).view(shape)
        return y.to(x.dtype), mean, variance, samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        over, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        upstream = _wide(gradient)
        normed = (_wide(x) - mean.view(shape)) * scale.view(shape)
        to_bias, to_weight = upstream.sum(over), (upstream * normed).sum(over)
        # The gradients of weight and bias are this process's own part, as those of all other weights; what comes through the
        # statistics is everyone's.
        sums = torch.stack((to_bias, to_weight))
        with _answered():
            distributed.all_reduce(sums)
        by_mean, by_scale = sums / ctx.samples
        to_x = (upstream - by_mean.view(shape) - normed * by_scale.view(shape)) * (weight * scale).view(shape)
        return to_x.to(x.dtype), to_weight, to_bias, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace every batch norm of a model; its parameters and buffers stay the same objects under the same names."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child))


# ---- towers that do not fit ----------------------------------------------------------------------------------------------


def shard_towers(towers: Sequence[VisionTower | TextTower], device: torch.device, group: Processes) -> None:
    """Spread the weights of the towers' attentions and MLPs over all processes (FSDP2); each is whole only while it works.

    The unit is half a block: what adapters are in stays outside, so their parameters, gradients and names are as before. The
    rest of a tower (embeddings, norms) is whole everywhere. From here on every process has to run the towers equally often.

    Raises DcrisError where there is one process alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if group.count == 1:
        raise DcrisError(
            "train.shard_towers needs several processes to shard over; start them with torchrun, or leave it off"
        )
    # Nothing here writes into what an attention or an MLP returned, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (group.count,))
    for tower in towers:
        for block in tower.blocks:
            for part in (block.attention, block.mlp):
                assert isinstance(part, nn.Module)
                # Said explicitly, as each part is a root of its own, and roots stay whole by default.
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
