"""Several processes, as torchrun starts them: ranks, and exchange of results and errors."""

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

_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another: much longer than writing a checkpoint, or than shares of a
validation differ."""

_BUCKET = 1 << 25
"""Bytes of gradients that are sent together: few messages, without a second copy of all gradients.
"""

_FAILED = "dcris/failed"
"""Key in the shared store that counts the ranks that ended with an error."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The group of processes that torchrun started, as seen by this one; by default a single
    process.

    All ranks must call the methods in the same order. Each raises DcrisError if another rank has
    ended or does not answer.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Rank on this machine; also the number of its GPU."""
    local_count: int = 1
    """Number of processes on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with connection_errors():
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only, and return its result on all ranks, which wait for it."""
        values: list[Any] = [make() if self.first else None]
        if self.count == 1:
            return values[0]
        with connection_errors():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def agree(self, number: int | None) -> int | None:
        """Return the largest number of all ranks; None if all have None."""
        if self.count == 1:
            return number
        greatest = torch.tensor(-1 if number is None else number)
        with connection_errors():
            distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
        return None if greatest < 0 else int(greatest)

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on all ranks the error of one of them: of the highest rank, if several have one."""
        where = self.agree(None if error is None else self.rank)
        if where is None:
            return
        errors: list[Any] = [error]
        if self.count > 1:
            with connection_errors():
                distributed.broadcast_object_list(errors, src=where, device=torch.device("cpu"))
        raise errors[0] from (None if errors[0] is error else error)

    def sum(self, *numbers: float) -> list[float]:
        """Return the sum over all ranks of each number."""
        if self.count == 1:
            return [*numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        with connection_errors():
            distributed.all_reduce(sums)
        return sums.tolist()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their sum over all ranks, bit for bit the same on each.

        Not DistributedDataParallel: the trained part is small, passes of a batch are added up
        first, and a parameter that no loss reaches needs no special case, because it has no
        gradient on any rank.
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
    """Context that turns a library's error about a lost connection into a DcrisError."""
    try:
        yield
    except RuntimeError as error:
        if dead_worker(error) is not None:  # torch raises it at any place in the code
            raise
        raise DcrisError(
            f"lost connection to another rank ({_reason(error)}); check its output, then run the same command again, for "
            "training with --resume"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first sentence of a library's message, without source locations at its start."""
    text = re.sub(r"^(\[[^\]]*\]\s*)+", "", str(error).strip()) or type(error).__name__
    return text.splitlines()[0].split(". ")[0][:200]


def described_processes() -> Processes:
    """Read torchrun's environment variables; without them, return a group of one process.

    Raises:
        DcrisError: some variables are missing or not numbers.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes()
        rank, count, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Processes(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except (KeyError, ValueError) as error:
        raise DcrisError(
            f"WORLD_SIZE is set, but WORLD_SIZE, RANK or LOCAL_RANK is not a number ({error}); start processes with torchrun"
        ) from error


@contextmanager
def processes(device: str = "auto", timeout: timedelta = _TIMEOUT) -> Iterator[Processes]:
    """Context that joins the group described by torchrun's environment: NCCL on CUDA, Gloo
    elsewhere.

    An error on one rank ends all: its connections close, which the others notice. Only the first
    rank to fail raises its error; the others exit silently with code 2, so that the message is
    printed once.

    Args:
        device: as given on the command line.
        timeout: how long a rank waits for the others.

    Raises:
        DcrisError: the environment is incomplete, or the others cannot be reached.
    """
    group = described_processes()
    if group.count == 1:
        yield group
        return
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        if group.local_rank >= torch.cuda.device_count():
            raise DcrisError(
                f"local rank {group.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start one process "
                "per GPU, or use --device cpu"
            )
        torch.cuda.set_device(group.local_rank)
    # Imported before the group exists: default arguments of its functions would hold the group
    # until the interpreter ends, when its threads free tensors and abort the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        # Objects and counts are always sent with Gloo, so that the CPU does not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        shared = PrefixStore("dcris", store)
        distributed.init_process_group(backend, store=shared, rank=group.rank, world_size=group.count, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch raises both
        raise DcrisError(
            f"rank {group.rank} of {group.count} cannot connect to the others ({_reason(error)}); check the address and port "
            "of torchrun"
        ) from error
    try:
        yield group
    except Exception as error:
        # torchrun sends SIGTERM to the others as soon as one has ended, but they have to exit with
        # their own code.
        _ignore_sigterm()
        if not _is_first_to_fail(store):
            raise SystemExit(2) from error
        raise
    except SystemExit:
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _ignore_sigterm() -> None:
    with suppress(ValueError):  # not the main thread, where only the caller can handle signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_first_to_fail(store: Store) -> bool:
    """Return whether no other rank has failed before this one; also True if the store is gone."""
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:
        return True


def exit_together(group: Processes) -> None:
    """Wait for all ranks, and ignore SIGTERM, which torchrun sends to ranks that end later."""
    if group.count > 1:
        _ignore_sigterm()
        group.all_gather(None)
