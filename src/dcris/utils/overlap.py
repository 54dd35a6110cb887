"""Let a thread use up what the caller makes, while the caller makes more."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()
_POLL = 0.1
"""Seconds until each side looks whether the other has failed."""


@dataclass(frozen=True, slots=True)
class Job(Generic[Item, Result]):
    """Items, and what becomes of them."""

    items: Iterable[Item]
    """Taken by the caller's thread, one by one."""
    use: Callable[[Iterator[Item]], Result]
    """Uses all items, in the other thread."""
    alone: bool = False
    """Do not overlap with other jobs nor with itself, for items that fill the memory."""


def overlapped(jobs: Iterable[Job[Item, Result]]) -> Iterator[Result]:
    """Run jobs and yield their results in order, each while the next job is under way.

    At most three items exist at a time, unless a job made some before: one that is made, one that
    waits and one that is used.

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
            line = _Line()
            try:
                future = pool.submit(job.use, line.taken())
                pair = [each for each in (before, future) if each is not None]
                for item in job.items:
                    line.put(item, pair)
                    del item
                line.put(_END, pair)
            except BaseException as error:
                # Not an item, which has to wait for room: Ctrl-C may come again, and without an end
                # the thread would outlive the command.
                line.failure = error
                raise
            if before is not None:
                yield before.result()
            before = future
        if before is not None:
            yield before.result()


class _Line:
    """Items on their way from the caller to the thread, of which one waits."""

    def __init__(self) -> None:
        self.queue: Queue[Any] = Queue(1)
        self.failure: BaseException | None = None
        """Why there will be no more items, if they are not at their end."""

    def put(self, item: Any, futures: list[Future[Any]]) -> None:
        """Hand over an item, or raise what a job has failed with meanwhile."""
        while True:
            for future in futures:
                if future.done():
                    future.result()
            with suppress(Full):
                self.queue.put(item, timeout=_POLL)
                return

    def taken(self) -> Iterator[Any]:
        """Yield the items. Raises the failure of the caller after those before it."""
        while True:
            try:
                item = self.queue.get(timeout=_POLL)
            except Empty:
                if self.failure is not None:
                    raise self.failure from None
                continue
            if item is _END:
                return
            yield item
            del item
