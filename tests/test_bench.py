"""`dcris bench`: what it measures, and that it needs no download."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcris.cli import main
from dcris.config import replace
from dcris.errors import DcrisError
from dcris.experiments import bench
from dcris.experiments.bench import (
    TrainingStep,
    count_operations,
    in_own_process,
    machine,
    matrix_products,
    peak_of_training,
    random_towers,
    ratio,
    render,
    take_turns,
)
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.muon import Muon
from models import needs_bfloat16

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows of speed are measured, for each batch size. No value of this machine is expected."""
    out = tmp_path / "bench.json"
    words = ["bench", "--recipe", "dcris_tiny", "--quick", "--device", "cpu", "--batch-size", "2", "3"]
    assert main([*words, "--json", str(out)]) == 0
    measured = json.loads(out.read_text())
    assert render(measured) in capsys.readouterr().out
    rows = {row["what"]: row for row in measured["rows"]}
    assert rows["training step, batch 2"]["value"] > 0 < rows["prediction, one image and expression"]["share"]
    assert rows["training step, batch 3"]["value"] > 0
    assert rows["8 expressions in one call, relative to 8 calls"]["ratio"] > 0
    assert measured["machine"]["torch"] == torch.__version__ and measured["recipe"] == "dcris_tiny"


def test_a_folder_alone_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever segments many images sees what the command gains over a loop of their own."""
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (number, 9, 9)).save(tmp_path / f"{number}.png")
    out = tmp_path / "bench.json"
    words = ["bench", "--recipe", "dcris_tiny", "--quick", "--device", "cpu", "--folder", str(tmp_path)]
    assert main([*words, "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["what"] == "3 images of a folder, relative to one after the other"
    assert row["value"] > 0 < row["ratio"]
    assert main([*words[:-1], str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_alone_is_measured(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each batch size of the training step, and one for prediction."""
    out = tmp_path / "bench.json"
    words = [
        "bench",
        "--recipe",
        "dcris_tiny",
        "--only",
        "memory",
        "--batch-size",
        "1",
        "8",
        "--checkpoint-activations",
    ]
    assert main([*words, "--device", "cpu", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "peak memory, training at batch 1",
        "peak memory, training at batch 8",
        "peak memory, prediction",
    ]
    assert all(row["unit"] == "GiB" and row["value"] > 0 for row in rows)


@pytest.mark.slow
def test_a_training_step_is_that_of_the_recipe() -> None:
    """The tiny recipe trains with Muon and dice, but a step of Adam with equation 6 was measured:
    without Muon's products, and with memory for one moment more of each matrix."""
    config = random_towers(get_recipe("dcris_tiny"))
    step, plain = (
        TrainingStep(each, 2, CPU, torch.float32) for each in (config, replace(config, {"train.losses": {}}))
    )
    assert type(step.optimizer) is Muon
    assert step() > plain() + 0.1


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that this process uses does not count. A random.py beside someone's data is not the
    standard library's, and may be of a stranger."""
    (tmp_path / "random.py").write_text("raise SystemExit('code of this folder ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[2]))
    block = torch.ones(1 << 28)  # 1 GiB
    peak = in_own_process(peak_of_training, get_recipe("dcris_tiny"), 2, "cpu", "float32")
    assert 0.1 < peak < block.numel() * 4 / 2**30


@pytest.mark.slow
def test_an_error_of_the_process_is_raised_here() -> None:
    """As one sentence, not as the end of a pool."""
    config = get_recipe("dcris_tiny")
    with pytest.raises(DcrisError, match="unknown device 'nothing'"):
        in_own_process(peak_of_training, config, 2, "nothing", "float32")


def test_invalid_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown recipe or device and a batch size of 0 are errors before anything is measured."""
    for words in (["--recipe", "nothing"], ["--batch-size", "0"], ["--device", "abacus"]):
        assert main(["bench", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("dcris: ") and error.count("\n") == 1


def test_tasks_take_turns_and_the_first_turn_is_not_counted() -> None:
    """The order of tasks must not favour one of them."""
    order: list[str] = []
    seconds = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_turns_are_timed_by_the_given_clock() -> None:
    """By wall-clock time a sleeping task takes its sleep; by another clock what that shows."""
    slept = take_turns({"sleep": partial(time.sleep, 0.02)}, 1, CPU)["sleep"][0]
    assert slept >= 0.02
    ticks = iter(range(100))
    counted = take_turns({"sleep": partial(time.sleep, 0.02)}, 3, CPU, lambda: next(ticks))
    assert counted["sleep"] == [1, 1, 1]


def test_a_ratio_is_taken_within_each_turn() -> None:
    """A machine that slows down between turns does not change it."""
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_a_multiply_add_is_two_operations() -> None:
    """The stated and the counted operations of a product agree."""
    task, operations = matrix_products(CPU, torch.float32, 64)
    assert operations == 2 * 64**3 == count_operations(task)


def test_a_gpu_is_described_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a GPU depend on its driver. Without nvidia-smi, or where it fails, the rest
    stays."""
    monkeypatch.setattr(bench, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine(torch.device("cuda"))["driver"] == "unknown"
    program = tmp_path / "nvidia-smi"
    for text, expected in (("exit 9", "unknown"), ("true", "unknown"), ("echo 570.86.15; echo 570.86.15", "570.86.15")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert machine(torch.device("cuda"))["driver"] == expected
    assert machine(torch.device("cuda"))["device"] == "NVIDIA H200"
    assert "driver" not in machine(CPU)


@needs_bfloat16
def test_all_operations_of_a_prepared_model_are_counted() -> None:
    """Packed layers in bfloat16 count as the plain ones."""
    model = ReferringSegmenter(get_recipe("dcris_tiny").model).eval()
    ready = prepare_for_prediction(model, torch.bfloat16)
    images, tokens = torch.zeros(1, 3, 112, 112), torch.zeros(1, 9, dtype=torch.int64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert count_operations(lambda: ready(images, tokens)) == count_operations(lambda: model(images, tokens))
