"""Several processes at one task, as torchrun starts them: who is who, and how their results come together."""

import importlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dcris.errors import DcrisError
from dcris.utils.workers import dead_worker

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

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, by rank, for all of them to have."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with connection_errors():
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process alone makes, for all to have; none goes on before it is made."""
        values: list[Any] = [make() if self.first else None]
        if self.count == 1:
            return values[0]
        with connection_errors():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def agree(self, number: int | None) -> int | None:
        """The greatest number that any process has; None where none has one."""
        if self.count == 1:
            return number
        greatest = torch.tensor(-1 if number is None else number)
        with connection_errors():
            distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return None if greatest < 0 else int(greatest)

    def raise_together(self, error: BaseException | None) -> None:
        """Raise in every process the error that one of them has met; the last one's where several have."""
        where = self.agree(None if error is None else self.rank)
        if where is None:
            return
        errors: list[Any] = [error]
        if self.count > 1:
            with connection_errors():
                distributed.broadcast_object_list(errors, src=where, device=torch.device("cpu"))
        raise errors[0] from (None if errors[0] is error else error)

    def sum(self, *numbers: float) -> list[float]:
        """The sum over all processes of each of some numbers."""
        if self.count == 1:
            return [*numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        with connection_errors():
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
            with connection_errors():
                waiting.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in waiting:
            with connection_errors():
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
def connection_errors() -> Iterator[None]:
    """Turn what a library raises over a broken connection into a DcrisError."""
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


def exit_together(group: Processes) -> None:
    """Wait for all, and end undisturbed: torchrun sends SIGTERM to those that end later than another that was interrupted."""
    if group.count > 1:
        _ignore_sigterm()
        group.all_gather(None)
