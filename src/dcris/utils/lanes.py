"""Lanes: threads that each compute one item, among which a CPU's threads are divided.

Where cores share the work on one image, they wait for each other at every operation.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_LANES = 8
"""Limit on lanes: each needs memory for the activations of its image."""


def lane_count(device: torch.device) -> int:
    """Return the number of lanes on a device: the CPU's threads, at most eight; elsewhere 1."""
    return min(torch.get_num_threads(), _MAX_LANES) if device.type == "cpu" else 1


@contextmanager
def lanes(count: int) -> Iterator[Executor]:
    """Context with a pool of threads that divide torch's CPU threads among them.

    Calls that have not begun at its end are cancelled.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(max(1, threads // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a thread's setting is also that of threads that start later


def ahead(
    pool: Executor, count: int, compute: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with `compute(item)`, in order. A pool computes `count` of them and one more
    while the caller uses one.

    Raises:
        Exception: what `compute` raises, at its item.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(compute, item)))
        if len(waiting) > count:
            before, future = waiting.popleft()
            yield before, future.result()
    while waiting:
        before, future = waiting.popleft()
        yield before, future.result()


def in_lanes(count: int, compute: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `compute(item)` for each item, in order, computed in that many lanes; a single one is
    the caller's thread.

    torch.no_grad and autocast are settings of a thread: `compute` has to set them.
    """
    if count == 1:
        yield from map(compute, items)
        return
    with lanes(count) as pool:
        for _, result in ahead(pool, count, compute, items):
            yield result
