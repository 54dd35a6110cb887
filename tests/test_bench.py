"""`dcris bench`: it measures what it says, on any recipe, without a download."""

import json
import time

import pytest
import torch

from dcris.cli import main
from dcris.experiments.bench import in_own_process, matrix_products, peak_of_training, ratio, render, take_turns
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from models import needs_bfloat16

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else nobody can say whether their machine, or a change, is slow."""
    out = tmp_path / "bench.json"
    assert main(["bench", "--recipe", "dcris_tiny", "--quick", "--device", "cpu", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert render(figures) in shown
    rows = {row["what"]: row for row in figures["rows"]}
    assert rows["training step, batch 2"]["value"] > 0 < rows["prediction, one photograph and phrase"]["share"]
    assert 0 < rows["8 phrases at once, against 8 calls"]["ratio"] < 1
    assert figures["machine"]["torch"] == torch.__version__ and figures["recipe"] == "dcris_tiny"


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    """Else whatever this process has used before counts as the training's."""
    block = torch.ones(1 << 28)  # 1 GiB that the other process must not count
    peak = in_own_process(peak_of_training, get_recipe("dcris_tiny").model_dump_json(), 2, "cpu", "float32")
    assert 0.1 < peak < block.numel() * 4 / 2**30


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Else a typing mistake ends in a traceback, or in a long measurement of something else."""
    for words in (["--recipe", "nothing"], ["--batch-size", "0"], ["--device", "abacus"]):
        assert main(["bench", *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith("dcris: ") and told.count("\n") == 1


def test_tasks_take_turns_and_the_first_turn_does_not_count() -> None:
    """Else what runs second is timed on a warmer machine than what runs first."""
    order: list[str] = []
    seconds = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]
    slept = take_turns({"sleep": lambda: time.sleep(0.02)}, 1, CPU)["sleep"][0]
    worked = take_turns({"sleep": lambda: time.sleep(0.02)}, 1, CPU, time.process_time)["sleep"][0]
    assert worked < 0.02 <= slept


def test_a_ratio_is_taken_within_each_turn() -> None:
    """Else a machine that slows down half way through decides the comparison."""
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_products_are_counted_twice_per_multiply_add() -> None:
    """Else shares of the ceiling are off by a factor of two."""
    task, operations = matrix_products(CPU, torch.float32, 64)
    from dcris.experiments.bench import count_operations

    assert operations == 2 * 64**3 == count_operations(task)


@needs_bfloat16
def test_a_prepared_model_s_operations_are_all_counted() -> None:
    """Else a prediction in bfloat16 seems to use a quarter of the machine."""
    from dcris.experiments.bench import count_operations
    from dcris.models.optimize import prepare_for_prediction

    model = ReferringSegmenter(get_recipe("dcris_tiny").model).eval()
    ready = prepare_for_prediction(model, torch.bfloat16)
    images, tokens = torch.zeros(1, 3, 112, 112), torch.zeros(1, 9, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert count_operations(lambda: ready(images, tokens)) == count_operations(lambda: model(images, tokens))
