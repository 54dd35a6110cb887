"""Lanes: threads that each compute one item, among which a CPU's threads are divided.

Where cores share the work on one image, they wait for each other at every operation.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Condition
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_LANES = 8
"""Limit on lanes: each needs memory for the activations of its image."""


def lane_count(device: torch.device) -> int:
    """Return the number of lanes on a device: the CPU's threads, at most eight; elsewhere 1.

    With more than eight threads, each lane has several, equally many.
    """
    if device.type != "cpu":
        return 1
    threads = torch.get_num_threads()
    return threads // math.ceil(threads / _MAX_LANES)


@contextmanager
def lanes(count: int) -> Iterator[Executor]:
    """Context with a pool of threads that divide torch's CPU threads among them.

    Calls that have not begun at its end are cancelled.
    """
    threads = torch.get_num_threads()
    started = Barrier(count + 1)
    pool = ThreadPoolExecutor(count)

    def start() -> None:
        # A thread takes torch's latest number when it first asks for it, and then keeps its own.
        torch.set_num_threads(max(1, threads // count))
        torch.get_num_threads()
        started.wait()

    try:
        if count > 1:
            for _ in range(count):  # none ends before all have started, so each takes one
                pool.submit(start)
            started.wait()
            torch.set_num_threads(threads)  # for the threads that start later
        yield pool
    finally:
        started.abort()
        pool.shutdown(cancel_futures=True)


def ahead(
    pool: Executor, count: int, compute: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with `compute(item)`, in order. A pool computes `count` of them and one more
    while the caller uses one.

    Raises:
        Exception: what `compute` raises, at its item; what `items` raises, after the items before.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    source = iter(items)
    while True:
        try:
            item = next(source)
        except Exception as error:
            failure = error
            break
        waiting.append((item, pool.submit(compute, item)))
        if len(waiting) > count:
            before, future = waiting.popleft()
            yield before, future.result()
    while waiting:
        before, future = waiting.popleft()
        yield before, future.result()
    if not isinstance(failure, StopIteration):
        raise failure


def in_lanes(count: int, compute: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `compute(item)` for each item, in order, computed in that many lanes. With one lane,
    the caller's thread computes.

    torch.no_grad and autocast are settings of a thread: `compute` has to set them.
    """
    if count == 1:
        yield from map(compute, items)
        return
    with lanes(count) as pool:
        for _, result in ahead(pool, count, compute, items):
            yield result


class Budget:
    """Something that lanes share, such as memory, and take a part of while they compute."""

    def __init__(self, total: int) -> None:
        self._left = self._total = total
        self._changed = Condition()

    @contextmanager
    def part(self, amount: int) -> Iterator[None]:
        """Context that has a part, at most all; it waits until that is there."""
        amount = min(amount, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()
