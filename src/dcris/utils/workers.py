"""Processes that read photographs ahead of the network, and what can go wrong with them.

A worker passes tensors on through shared memory. Containers often have little of that (Docker: 64 MB), some systems have none.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import queues
from pathlib import Path
from typing import Any, TypeVar

from dcris.errors import DcrisError
from dcris.utils.streams import note, note_once

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")  # on Linux; no other system limits it in a way that could be read

_AHEAD = 2
"""Batches that each worker reads ahead."""

_PATIENCE = 60
"""Seconds without a batch before a note is printed. Ten times as long ends the command."""

_ADVICE = (
    "the memory of this machine or its shared memory (/dev/shm) may be too small, so use fewer --data.workers (0 for none) or "
    "give a container more (docker run --shm-size=1g); a training run keeps its last checkpoint"
)

_WORKER_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?")

CANNOT_START = (OSError, ImportError, NotImplementedError)
"""What multiprocessing raises where the system has no semaphores (no writable /dev/shm) or allows no more processes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way out of a worker, where raising it would bury its sentence in a traceback."""

    message: str


def dead_worker(error: RuntimeError) -> DcrisError | None:
    """Return the sentence for the death of a worker if that is what torch raised, which it does wherever this process is."""
    if (died := _WORKER_DIED.match(str(error))) is None:
        return None
    how = f"was killed ({died[2].strip()})" if died[2] else "ended"
    return DcrisError(f"process {died[1]}, a worker that reads photographs, {how}; {_ADVICE}")


def note_no_workers(error: Exception) -> None:
    """Print that work is done without worker processes, as they could not be started."""
    note_once(f"worker processes cannot be started here ({error}); continuing without them, which is slower")


def shared_memory_left() -> float:
    """Bytes of shared memory that are free; infinite where the system sets no limit, or has none that can be written."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):
        return float("inf")
    limited = found.f_blocks > 0 and os.access(_SHARED_MEMORY, os.W_OK)
    return float(found.f_bavail * found.f_frsize) if limited else float("inf")


def workers_that_fit(workers: int, batch_bytes: float) -> int:
    """Return how many of these workers shared memory has room for: each holds two batches, and the network a further one."""
    room = (shared_memory_left() / batch_bytes - 1) / _AHEAD
    return workers if room >= workers else max(0, int(room))


def require_shared_memory(workers: int, batch_bytes: float) -> None:
    """Raise DcrisError where batches of that size do not fit into shared memory with that many workers."""
    if (fit := workers_that_fit(workers, batch_bytes)) < workers:
        batches = _AHEAD * workers + 1
        raise DcrisError(
            f"the shared memory of this machine is too small: {workers} workers need {batches * batch_bytes / 1e6:,.1f} MB for "
            f"{batches} batches, and {_SHARED_MEMORY} has {shared_memory_left() / 1e6:,.1f} MB left; use --data.workers {fit}, "
            "a smaller batch, or give a container more (docker run --shm-size=1g)"
        )


def load(dataset: Any, workers: int, **options: Any) -> Iterator[Any]:
    """Start a DataLoader and return its batches; without workers where the system cannot start any.

    Args:
        dataset: a map-style dataset.
        workers: processes that read it; 0 reads it in this one.
        options: DataLoader's.

    Raises DcrisError where a worker cannot pass on a batch, or none comes for ten minutes.
    """
    import cv2
    from torch.utils.data import DataLoader

    if workers:
        # A worker is one process on one core. Set here and not in the worker: after a fork cv2 would wait for ever for the
        # threads that its parent had.
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            multiprocessing.get_context().Lock()  # torch leaves an iterator behind that cannot be deleted if this fails in it
            loader = DataLoader(
                dataset,
                num_workers=workers,
                worker_init_fn=_start_worker,
                prefetch_factor=_AHEAD,
                timeout=_PATIENCE,
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
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                # Not an error yet: a disk may be slow, or a whole job suspended for hours (Ctrl-Z) and resumed.
                waited += 1
                if waited == 1:
                    note(f"the workers have read nothing for {_PATIENCE} s; still waiting")
                elif waited == 10:
                    raise DcrisError(
                        f"no photographs have been read for {10 * _PATIENCE // 60} minutes; check the disk they are on; "
                        f"else {_ADVICE}"
                    ) from error
                continue
            waited = 0
            yield batch
    finally:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # one that hangs (in a read from a network disk) would otherwise be waited for at exit


def or_raise(items: Iterator[T | Failure]) -> Iterator[T]:
    """The items. Raises DcrisError at the first failure among them."""
    for item in items:
        if isinstance(item, Failure):
            raise DcrisError(item.message)
        yield item


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in a worker: a terminal sends it to every process, and the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _start_worker(worker: int) -> None:
    queues.Queue._on_queue_feeder_error = _send_failure  # type: ignore[attr-defined]
    # Many schedulers, too, send requests to end to every process, but the batches of the step in progress are still wanted.
    # Only the process that these are for may end its workers.
    ignore_interrupts()
    if hasattr(signal, "sigwaitinfo"):  # not on Windows and macOS; there SIGTERM ends a worker, and that is reported
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _send_failure(queue: Any, error: Exception, item: Any) -> None:
    """Send the error in place of the batch that could not be sent (no shared memory left, too many open files).

    multiprocessing calls this in the thread that sends. By default it prints a traceback there, drops the batch, and the
    parent waits for it for ever.
    """
    index, _ = item
    queue.put((index, Failure(f"a worker that reads photographs cannot pass them on ({error}); {_ADVICE}")))


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
