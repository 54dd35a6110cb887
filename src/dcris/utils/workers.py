"""Worker processes that read images ahead of the network, and their failures.

Workers pass tensors through shared memory. Containers often have little of it (Docker: 64 MB), some
systems have none.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import queues
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dcris.errors import DcrisError
from dcris.utils.streams import note, note_once

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")  # on Linux; other systems have no limit that can be read

_PREFETCH = 2
"""Batches that each worker reads ahead."""

_TIMEOUT = 60
"""Seconds without a batch before a message is printed. After ten times as long the command ends."""

_ADVICE = (
    "memory or shared memory (/dev/shm) may be too small: use fewer --data.workers (0 for none) or give the container more "
    "(docker run --shm-size=1g); a training run keeps its last checkpoint"
)

_WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?")

_running: set[Any] = set()
"""Iterators of torch whose workers run.

Held here, because an error's traceback may hold one in a cycle. Python then finalises its queues
before it closes `_batches`: the workers would never read that they should end, and torch waits five
seconds for each.
"""

CANNOT_START = (OSError, ImportError, NotImplementedError)
"""Exceptions of multiprocessing if the system has no semaphores (no writable /dev/shm) or allows no
more processes."""


def cores() -> int:
    """Return the number of CPUs that this process may use.

    In a container or a job these may be fewer than the machine's.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that a worker returns instead of raising, which would bury the message in a
    traceback."""

    message: str


def dead_worker(error: RuntimeError) -> DcrisError | None:
    """Return a DcrisError if torch raised `error` because a worker died (it does so at any place in
    the code), else None."""
    if (died := _WORKER_DIED.match(str(error))) is None:
        return None
    how = f"was killed ({died[2].strip()})" if died[2] else "ended"
    return DcrisError(f"process {died[1]}, a worker that reads images, {how}; {_ADVICE}")


def note_no_workers(error: Exception) -> None:
    """Print once that worker processes could not be started."""
    note_once(f"cannot start worker processes ({error}); continuing without them, which is slower")


def shared_memory_left() -> float:
    """Return the free bytes of shared memory; infinite if the system sets no limit or it is not
    writable."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):
        return float("inf")
    limited = found.f_blocks > 0 and os.access(_SHARED_MEMORY, os.W_OK)
    return float(found.f_bavail * found.f_frsize) if limited else float("inf")


def workers_that_fit(workers: int, batch_bytes: float) -> int:
    """Return how many workers fit in shared memory: each holds two batches, and the network one
    more."""
    room = (shared_memory_left() / batch_bytes - 1) / _PREFETCH
    return workers if room >= workers else max(0, int(room))


def require_shared_memory(workers: int, batch_bytes: float) -> None:
    """Raise DcrisError if the batches of so many workers do not fit in shared memory."""
    if (fit := workers_that_fit(workers, batch_bytes)) < workers:
        batches = _PREFETCH * workers + 1
        raise DcrisError(
            f"shared memory is too small: {workers} workers need {batches * batch_bytes / 1e6:,.1f} MB for {batches} "
            f"batches, and {_SHARED_MEMORY} has {shared_memory_left() / 1e6:,.1f} MB free; use --data.workers {fit}, "
            "a smaller batch, or give the container more (docker run --shm-size=1g)"
        )


def load(dataset: Any, workers: int, **options: Any) -> Iterator[Any]:
    """Return an iterator over the batches of a DataLoader; without workers if the system cannot
    start any.

    Args:
        dataset: a map-style dataset.
        workers: number of worker processes; 0 reads in this process.
        options: passed to DataLoader.

    Raises:
        DcrisError: a worker cannot pass a batch on, or no batch arrives for ten minutes.
    """
    import cv2
    from torch.utils.data import DataLoader

    if workers:
        _report_dead_workers_once()
        # One thread per worker. Set here and not in the worker: after a fork, cv2 would wait
        # forever for the threads of its parent.
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            multiprocessing.get_context().Lock()  # fails here and not in torch, which would leave a broken iterator
            loader = DataLoader(
                dataset,
                num_workers=workers,
                worker_init_fn=_start_worker,
                prefetch_factor=_PREFETCH,
                timeout=_TIMEOUT,
                **options,
            )
            return or_raise(_batches(iter(loader)))
        except CANNOT_START as error:
            note_no_workers(error)
        finally:
            cv2.setNumThreads(threads)
    return or_raise(iter(DataLoader(dataset, **options)))


def _batches(iterator: Any) -> Iterator[Any]:
    waited = 0
    _running.add(iterator)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                # Not an error yet: the disk may be slow, or the job was suspended (Ctrl-Z) for
                # hours.
                waited += 1
                if waited == 1:
                    note(f"the workers have read nothing for {_TIMEOUT} s; still waiting")
                elif waited == 10:
                    raise DcrisError(
                        f"no images have been read for {10 * _TIMEOUT // 60} minutes; check their disk; otherwise {_ADVICE}"
                    ) from error
                continue
            waited = 0
            yield batch
    finally:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # Python would wait at exit for one that hangs, for example in a read from a network disk
        _running.discard(iterator)


def or_raise(items: Iterator[T | Failure]) -> Iterator[T]:
    """Yield the items. Raises DcrisError for the first Failure among them."""
    for item in items:
        if isinstance(item, Failure):
            raise DcrisError(item.message)
        yield item


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in a worker: a terminal sends it to all processes, but the parent ends its
    workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _report_dead_workers_once() -> None:
    """Do not print an error for a dead worker that Python cannot raise.

    torch raises it in a signal handler, so also inside callbacks of the interpreter, which print a
    traceback and continue. The wait for the next batch then raises it again.
    """
    before = sys.unraisablehook
    if getattr(before, "knows_dead_workers", False):
        return

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and dead_worker(error)):
            before(unraisable)

    report.knows_dead_workers = True  # type: ignore[attr-defined]
    sys.unraisablehook = report


def _start_worker(worker: int) -> None:
    queues.Queue._on_queue_feeder_error = _send_failure  # type: ignore[attr-defined]
    sys.excepthook = _report_exception
    # Schedulers may send SIGTERM to all processes, but the current step still needs its batches. So
    # a worker only obeys a SIGTERM from its parent.
    ignore_interrupts()
    if hasattr(signal, "sigwaitinfo"):  # missing on Windows and macOS, where SIGTERM ends a worker and is reported
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _send_failure(queue: Any, error: Exception, item: Any) -> None:
    """Send a Failure instead of a batch that could not be sent (no shared memory left, too many
    open files).

    multiprocessing calls this in its sending thread. Its default prints a traceback and drops the
    batch, for which the parent then waits forever.
    """
    index, _ = item
    queue.put((index, Failure(f"a worker that reads images cannot pass them on ({error}); {_ADVICE}")))


def _report_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of a worker's thread, except a connection that the parent closed.

    An interrupted parent leaves while multiprocessing's thread passes it a batch; the thread then
    prints a traceback.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
