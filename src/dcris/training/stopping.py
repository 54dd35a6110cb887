"""Stopping a run on Ctrl-C or SIGTERM: between two steps, with a checkpoint."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from dcris.checkpoints.checkpoint import Checkpoint

T = TypeVar("T")

_SECOND = 1.0
"""Seconds after a first Ctrl-C in which another one counts as a copy of it."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM, after its checkpoint was written.

    Args:
        number: the signal.
        checkpoint: the one that a resumed run continues from.
    """

    def __init__(self, number: int, checkpoint: Checkpoint) -> None:
        super().__init__(f"stopped at step {checkpoint.step}; resuming continues from {checkpoint.path}")
        self.checkpoint = checkpoint
        self.exit_code = 128 + number


class StopWaiting(BaseException):
    """Raised by the signal handler to break off a wait.

    A BaseException, so that no library on the way catches it.
    """


class StopRequest:
    """A signal to stop the run, which is still pending."""

    signal: int | None = None
    """The number of the signal; None without a request."""
    _waiting = False

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Context for a wait that a request breaks off: StopWaiting is raised, also for an earlier
        one."""
        self._waiting = True
        try:
            if self.signal is not None:
                raise StopWaiting
            yield
        finally:
            self._waiting = False

    def take_until_stop(self, items: Iterator[T]) -> Iterator[T]:
        """Yield `items`, and end early if a request arrives."""
        while True:
            try:
                with self.interrupts():
                    item = next(items, None)
            except StopWaiting:
                return
            if item is None:
                return
            yield item

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: note the request; a second Ctrl-C raises KeyboardInterrupt at once.

        A second SIGTERM does not: a scheduler sends one to every process, and torchrun then
        forwards its own. For the same reason a second Ctrl-C within a second of the first is
        ignored.
        """
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            if self._waiting:
                raise StopWaiting
        elif number == signal.SIGINT and time.monotonic() - self._since > _SECOND:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Context in which Ctrl-C and SIGTERM set the StopRequest it gives, which the loop checks."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, request.handle)
    except ValueError:  # not the main thread, where only the caller can handle signals
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
