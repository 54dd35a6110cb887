"""Lanes: a CPU computes several images at a time, with the same results and bounded memory."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dcris import Segmenter
from dcris.config import replace
from dcris.data.dataset import Queries, all_queries
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.evaluation import evaluator
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.utils.lanes import in_lanes, lane_count
from marks import slow_except

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def segmenter_of(recipe: str) -> Segmenter:
    """A model with random weights whose masks are not empty."""
    torch.manual_seed(0)
    config = get_recipe(recipe)
    model = ReferringSegmenter(config.model)
    with torch.no_grad():
        model.head.projector.text.bias[-1] += 1.5
    return Segmenter(model, config, device="cpu")


def scene_queries(folder: Path, count: int) -> Queries:
    table = load_references(write_scenes(folder, train=0, val=0, test=count, side=112), "scenes")
    return all_queries(table.split("test"))


@pytest.mark.parametrize(
    "recipe",
    slow_except(
        ["dcris_tiny_generalised", "etris_tiny", "barleria_tiny", "prompts_tiny"],
        "dcris_tiny_generalised",
        "barleria_tiny",
    ),
)
def test_scores_do_not_depend_on_the_number_of_lanes(tmp_path: Path, recipe: str) -> None:
    """Each image is computed by one thread, so results are the same bit for bit; also of methods
    that compute both encoders in turns."""
    segmenter, queries = segmenter_of(recipe), scene_queries(tmp_path, 4)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = predict_queries(segmenter.model, queries, segmenter.config, Cris(), device=CPU, batch_size=3)
        found.append([(each.expression, each.overlap, each.prediction, each.score) for each in results])
    assert found[0] == found[1] == found[2]
    assert any(overlap.intersection for _, overlap, *_ in found[0])
    assert [expression for expression, *_ in found[0]] == [expression for _, expression in queries]


def test_an_image_that_cannot_be_read_ends_an_evaluation(tmp_path: Path) -> None:
    """Results before it are yielded; torch's threads are as they were."""
    segmenter, queries = segmenter_of("dcris_tiny"), scene_queries(tmp_path, 4)
    last = queries[-1][0].image_path
    last.write_bytes(b"no picture")
    config = replace(segmenter.config, {"data.workers": 0})
    torch.set_num_threads(2)
    results = predict_queries(segmenter.model, queries, config, Cris(), device=CPU, batch_size=1)
    seen = []
    with pytest.raises(DcrisError, match="cannot read the image"):
        for result in results:
            seen.append(result.expression)
            assert threads_of_a_new_thread() == 2
    assert seen == [expression for reference, expression in queries if reference.image_path != last]
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


def test_memory_of_an_evaluation_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lanes together compute as many expressions at a time as fit into the memory, at least one
    pass."""
    segmenter, queries = segmenter_of("dcris_tiny"), scene_queries(tmp_path, 9)
    inside, most, real = 0, 0, evaluator.segment_in_passes
    lock = threading.Lock()

    def measured(model: Any, image: Any, tokens: torch.Tensor, *more: Any) -> list[Any]:
        nonlocal inside, most
        with lock:
            inside += min(len(tokens), 4)
            most = max(most, inside)
        time.sleep(0.02)
        outputs = [*real(model, image, tokens, *more)]
        with lock:
            inside -= min(len(tokens), 4)
        return outputs

    monkeypatch.setattr(evaluator, "segment_in_passes", measured)
    monkeypatch.setattr(evaluator, "EXPRESSIONS_PER_PASS", 4)
    torch.set_num_threads(3)
    for pairs, bound in ((1, 4), (9, 9), (1000, 12)):
        monkeypatch.setattr(evaluator, "pairs_in_memory", lambda config, device, pairs=pairs: pairs)
        most = 0
        assert [*predict_queries(segmenter.model, queries, segmenter.config, Cris(), device=CPU)]
        assert bound - 3 <= most <= bound


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (2, 2), (8, 8), (9, 4), (12, 6), (15, 7), (16, 8), (64, 8)])
def test_no_thread_is_idle(threads: int, count: int) -> None:
    """At most eight lanes, all with equally many threads."""
    torch.set_num_threads(threads)
    assert lane_count(CPU) == count
    assert lane_count(torch.device("cuda")) == 1
    assert threads - count < count * (threads // count) <= threads


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

    def broken() -> Iterator[int]:
        yield from range(10, 16)
        raise DcrisError("there are no more")

    seen = []
    with pytest.raises(DcrisError, match="there are no more"):
        seen.extend(in_lanes(2, compute, broken()))
    assert seen == [*range(10, 16)]  # also those that were computed ahead
    results = in_lanes(2, compute, range(4, 1000))
    assert next(results) == 4
    results.close()
    assert len(begun) < 20
    assert threading.active_count() == before
