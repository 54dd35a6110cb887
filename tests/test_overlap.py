"""One thread makes items while another uses them: order, bounds, failures of either."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest

from dcris.utils.overlap import Job, overlapped


def numbers(count: int, log: list[str], name: str) -> Iterator[int]:
    for number in range(count):
        log.append(f"make {name}{number}")
        yield number


def total(items: Iterator[int]) -> int:
    return sum(items)


@pytest.mark.parametrize("alone", [False, True])
def test_results_come_in_order(alone: bool) -> None:
    """A progress line, a record and a file each belong to one image."""
    jobs = (Job(range(count), total, alone=alone and count % 2 == 0) for count in range(20))
    assert [*overlapped(jobs)] == [sum(range(count)) for count in range(20)]
    assert [*overlapped([])] == []


def test_the_caller_does_not_wait_for_the_thread() -> None:
    """Otherwise nothing overlaps: the second item is made before the first job has been used up."""
    made = threading.Event()

    def second() -> Iterator[int]:
        made.set()
        yield 2

    def wait(items: Iterator[int]) -> bool:
        return [*items] == [1] and made.wait(20)

    assert [*overlapped([Job([1], wait), Job(second(), lambda items: [*items] == [2])])] == [True, True]


def test_what_fills_the_memory_is_alone() -> None:
    """No item of the large image exists beside another item."""
    log: list[str] = []

    def use(items: Iterator[int]) -> str:
        log.extend(f"use {item}" for item in items)
        return "done"

    jobs = [
        Job(numbers(1, log, "a"), use),
        Job(numbers(2, log, "b"), use, alone=True),
        Job(numbers(1, log, "c"), use),
    ]
    assert [*overlapped(jobs)] == ["done"] * 3
    start = log.index("make b0")
    assert "use 0" in log[:start], "the item before it was still there"
    assert log[start : start + 4] == ["make b0", "use 0", "make b1", "use 1"]


def test_few_items_wait() -> None:
    """Predictions of a photograph take megabytes each."""
    alive = most = 0

    def items() -> Iterator[int]:
        nonlocal alive, most
        for number in range(30):
            alive += 1
            most = max(most, alive)
            yield number

    def use(made: Iterator[int]) -> None:
        nonlocal alive
        for _ in made:
            time.sleep(0.002)
            alive -= 1

    [*overlapped([Job(items(), use), Job(items(), use)])]
    assert most <= 4


@pytest.mark.parametrize("error", [ValueError("network"), KeyboardInterrupt()])
def test_a_failure_of_the_caller_leaves_the_job_unfinished(error: BaseException) -> None:
    """An image of which half of the phrases are predicted must get no record."""
    finished: list[str] = []

    def broken() -> Iterator[int]:
        yield 1
        raise error

    def use(items: Iterator[int]) -> str:
        finished.append(str(sum(items)))
        return finished[-1]

    with pytest.raises(type(error)):
        [*overlapped([Job([5], use), Job(broken(), use), Job([7], use)])]
    assert finished == ["5"]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_failure_of_the_thread_stops_the_caller(after: int) -> None:
    """A full disk must not be noticed at the end of the night."""
    made: list[str] = []

    def full(items: Iterator[int]) -> None:
        for count, _ in enumerate(items):
            if count == after:
                raise OSError("disk full")

    jobs = (Job(numbers(10, made, "x"), full) for _ in range(50))
    with pytest.raises(OSError, match="disk full"):
        [*overlapped(jobs)]
    assert len(made) < 25


@pytest.mark.parametrize("place", ["submit", "put"])
def test_ctrl_c_at_any_moment_ends_the_thread(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come between any two instructions, and a second one while the first is handled;
    a thread that waits for more would keep the process alive."""
    waiting, real = threading.Event(), ThreadPoolExecutor.submit

    def submit(pool: Any, use: Any, items: Any) -> Any:
        real(pool, use, items)
        raise KeyboardInterrupt

    def put(queue: Any, item: Any, timeout: float) -> None:
        raise KeyboardInterrupt

    if place == "submit":
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    else:
        monkeypatch.setattr(Queue, "put", put)

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            [*overlapped([Job([1, 2], total)])]
        waiting.set()

    threading.Thread(target=run, daemon=True).start()
    assert waiting.wait(20), "the pool waits for the thread, and the thread for items"


def test_a_caller_that_stops_listening_ends_the_thread() -> None:
    stopped = []
    results = overlapped(Job([number], lambda items: stopped.append(sum(items))) for number in range(100))
    next(results)
    results.close()
    assert 0 < len(stopped) < 4
    assert not [each for each in threading.enumerate() if each.name.startswith("ThreadPool")]
