"""Several processes at one task, as torchrun starts them: who is who, and how their results come together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from dcris.errors import DcrisError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all that torchrun started; alone where it did not."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Among those on this machine: the number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, for all of them to have. All must call this."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        distributed.all_gather_object(values, value)
        return [value for value in values if value is not None]


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the group that torchrun describes in the environment, with NCCL where this runs on CUDA and Gloo elsewhere.

    Raises DcrisError where the description is not whole.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    try:
        group = Processes(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError) as error:
        raise DcrisError(
            f"WORLD_SIZE is set, but RANK or LOCAL_RANK is not a number ({error}); start several processes with torchrun"
        ) from error
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(group.local_rank)
    distributed.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield group
    finally:
        distributed.destroy_process_group()
