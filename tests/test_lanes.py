"""Lanes: a CPU computes several images at a time, and nobody notices but by the clock."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dcris import Segmenter
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.utils.lanes import in_lanes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_scores_do_not_depend_on_the_number_of_lanes(tmp_path: Path) -> None:
    """Each image is computed by one thread, so results are the same bit for bit."""
    segmenter = Segmenter.from_pretrained("tiny", device="cpu")
    table = load_references(write_scenes(tmp_path, train=0, val=0, test=7, side=112), "scenes")
    queries = all_queries(table.split("test"))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = predict_queries(segmenter.model, queries, segmenter.config, Cris(), device=CPU, batch_size=3)
        found.append([(each.expression, each.overlap, each.prediction, each.score) for each in results])
    assert found[0] == found[1] == found[2]
    assert [expression for expression, *_ in found[0]] == [expression for _, expression in queries]


def test_an_image_that_cannot_be_read_ends_an_evaluation(tmp_path: Path) -> None:
    """Results before it are yielded; torch's threads are as they were."""
    segmenter = Segmenter.from_pretrained("tiny", device="cpu")
    table = load_references(write_scenes(tmp_path, train=0, val=0, test=4, side=112), "scenes")
    queries = all_queries(table.split("test"))
    queries[-1][0].image_path.write_bytes(b"no picture")
    torch.set_num_threads(2)
    results = predict_queries(segmenter.model, queries, segmenter.config, Cris(), device=CPU, batch_size=1)
    seen = 0
    with pytest.raises(DcrisError, match="cannot read the image"):
        for _ in results:
            seen += 1
    assert seen
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_lanes_keep_the_order_and_do_not_run_ahead(count: int) -> None:
    """Images of a folder of any length are not all in memory at one time."""
    torch.set_num_threads(4)
    used, taken = 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            assert taken - used <= count + 2
            yield number

    def compute(number: int) -> tuple[int, int]:
        time.sleep(0.001 * (number % 3))
        return number, torch.get_num_threads()

    for found in in_lanes(count, compute, items()):
        assert found == (used, 4 // count)
        used += 1
    assert used == 20
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


def test_lanes_stop_with_the_caller() -> None:
    """After Ctrl-C or an error nothing is computed any more, and no thread is left."""
    torch.set_num_threads(2)
    begun: list[int] = []

    def compute(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise DcrisError("the fourth fails")
        return number

    before = threading.active_count()
    with pytest.raises(DcrisError, match="the fourth fails"):
        for _ in in_lanes(2, compute, range(1000)):
            pass
    results = in_lanes(2, compute, range(4, 1000))
    assert next(results) == 4
    results.close()
    assert len(begun) < 20
    assert threading.active_count() == before
