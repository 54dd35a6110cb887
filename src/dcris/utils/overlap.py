"""Let a thread use up what the caller makes, while the caller makes more."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
_POLL = 0.1
"""Seconds until a full queue is looked at again: the thread may have failed."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Item, Result]):
    """Items, and what becomes of them."""

    items: Iterable[Item]
    """Made by the caller's thread, one by one."""
    use: Callable[[Iterator[Item]], Result]
    """Uses all items, in the other thread."""
    alone: bool = False
    """Do not overlap with other jobs nor with itself, for items that fill the memory."""


def overlapped(jobs: Iterable[Job[Item, Result]]) -> Iterator[Result]:
    """Run jobs and yield their results in order, each while the next job is under way.

    At most three items exist at a time: one that is made, one that waits and one that is used.

    Raises:
        Exception: what making or using an item raises. If making fails, the iterator of `use`
            raises it too, so that no job ends as if it had had all items; jobs before it are
            finished.
    """
    with ThreadPoolExecutor(1) as pool:
        before: Future[Result] | None = None
        for job in jobs:
            if job.alone:
                if before is not None:
                    yield before.result()
                    before = None
                yield job.use(iter(job.items))
                continue
            line: Queue[Any] = Queue(1)
            future = pool.submit(job.use, _taken(line))
            pair = [each for each in (before, future) if each is not None]
            try:
                for item in job.items:
                    _put(line, item, pair)
                    del item
                _put(line, _END, pair)
            except BaseException as error:
                _end(line, _Failure(error), future)
                raise
            if before is not None:
                yield before.result()
            before = future
        if before is not None:
            yield before.result()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _taken(line: "Queue[Any]") -> Iterator[Any]:
    while (item := line.get()) is not _END:
        if isinstance(item, _Failure):
            raise item.error
        yield item
        del item


def _end(line: "Queue[Any]", failure: _Failure, future: Future[Any]) -> None:
    """Let a job fail, unless it has."""
    while not future.done():
        with suppress(Full):
            line.put(failure, timeout=_POLL)
            return


def _put(line: "Queue[Any]", item: Any, futures: list[Future[Any]]) -> None:
    """Hand over an item, or raise what a job has failed with meanwhile."""
    while True:
        for future in futures:
            if future.done():
                future.result()
        with suppress(Full):
            line.put(item, timeout=_POLL)
            return
