"""Speed and memory of a recipe on this machine.

Other work on the machine disturbs times. Tasks that are compared therefore take turns within one
process, and a ratio is the median over the turns. The speed of plain matrix products is measured in
the same turns, as the limit that the machine sets.
"""

import json
import math
import pickle
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcris.checkpoints.backbones import RANDOM
from dcris.config import METHODS, TEXT_FAMILIES, VISION_FAMILIES, RunConfig, replace
from dcris.data.dataset import TrainingBatches, TrainingSamples, training_loader
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.inference.batch import BatchPredictor
from dcris.inference.inputs import find_tasks
from dcris.inference.segmenter import Segmenter
from dcris.models.adapters.dcris import DcrisConfig
from dcris.models.optimize import cast_frozen
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import LOSSES, training_losses
from dcris.training.optimizer import make_optimizer
from dcris.utils.arguments import Precision
from dcris.utils.device import (
    autocast,
    choose_device,
    choose_precision,
    device_name,
    precision_of,
    resident_memory,
    working_dtype,
)
from dcris.utils.drawing import png_bytes
from dcris.utils.files import make_directory, write_file
from dcris.utils.text_tables import markdown
from dcris.utils.workers import cores
from dcris.version import __version__

EXPRESSIONS = (
    "left slice",
    "the red cup behind the plate",
    "man in a dark blue coat",
    "second umbrella from the right",
    "dog",
    "the girl who looks away",
    "white car near the tree",
    "top of the bread",
)
Part = Literal["speed", "memory"]
PARTS: tuple[Part, ...] = ("speed", "memory")

_PYTHON = (sys.executable, "-P")
"""Command of a new process, which imports nothing from the current folder: a user's random.py there
is not the standard library's."""
_REGISTRIES: tuple[dict[str, Any], ...] = (METHODS, VISION_FAMILIES, TEXT_FAMILIES, LOSSES)
"""What a user's program can add to, and a configuration names."""
LATE_LAYERS = (4, 8, 11)
"""Three late blocks with adapters (table 5): expressions share more of the vision tower."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    what: str
    value: float
    unit: str
    ratio: float | None = None
    """Relative to what `what` names; None if nothing is compared."""
    share: float | None = None
    """Of the speed of matrix products, 0 to 1, by the counted floating-point operations."""


def take_turns(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure tasks in turns, after one turn each that is not counted.

    Args:
        tasks: by name.
        rounds: number of turns of each task.
        device: to synchronise with.
        clock: `time.process_time` counts only this process's CPU time, over all its threads, which
            suits a busy machine.

    Returns:
        By name, the seconds of each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            _synchronize(device)
            begin = clock()
            task()
            _synchronize(device)
            if turn:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over the rounds of one task's seconds divided by another's."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_products(
    device: torch.device, dtype: torch.dtype, size: int | None = None
) -> tuple[Callable[[], object], float]:
    """Return a product of two large square matrices as a task, and its floating-point operations.

    A multiply-add counts as 2 operations.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def count_operations(task: Callable[[], object]) -> float:
    """Count the operations of a task's matrix products, convolutions and attention."""

    def packed(x: object, weight: Sequence[int], *others: object, out_shape: Sequence[int], **more: object) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    def quantised(x: Sequence[int], *others: object, out_shape: Sequence[int], **more: object) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    # Operators of packed linear layers and convolutions on a CPU (dcris.models.optimize), which
    # torch does not count.
    products = (torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._convolution_pointwise)
    known: dict[Any, Callable[..., int]] = (
        dict.fromkeys(products, packed) if torch.backends.mkldnn.is_available() else {}
    )
    if known:
        known[torch.ops.onednn.qlinear_pointwise] = quantised
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        task()
    return float(counter.get_total_flops())


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: of this process's tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_memory("VmHWM") / 2**30


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe the machine and the versions that were measured."""
    gpu = {"driver": _driver(), "cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {
        "device": device_name(device),
        **gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dcris": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _driver() -> str:
    """Return the version of NVIDIA's driver; "unknown" without nvidia-smi (some containers)."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]  # one line for each GPU, all with the same version


def random_towers(config: RunConfig) -> RunConfig:
    """Return the recipe with random tower weights: equal speed and no download."""
    model = config.model
    towers = {
        "vision": model.vision.model_copy(update={"name": RANDOM}),
        "text": model.text.model_copy(update={"name": RANDOM}),
    }
    return config.model_copy(update={"model": model.model_copy(update=towers)})


class TrainingStep:
    """Optimiser steps of the training loop on one random batch, the same on every device."""

    def __init__(self, config: RunConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = ReferringSegmenter(config.model).to(device).train()
        self.model.checkpoint_activations(config.train.checkpoint_activations)
        cast_frozen(self.model, dtype)
        self.settings = config.train
        self.optimizer = make_optimizer(self.model, self.settings)
        side = config.data.image_size
        self.images = torch.randn(batch_size, 3, side, side).to(device)
        tokens = tokenizer_of(config.model.text)(["left slice"] * batch_size, config.data.word_length)
        self.tokens = tokens.to(device)
        self.masks = (torch.rand(batch_size, 1, side, side) > 0.5).float().to(device)

    def __call__(self) -> torch.Tensor:
        """Run one step: forward, loss, backward, update. Return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.dtype):
            output = self.model(self.images, self.tokens)
        loss = torch.stack([*training_losses(output, self.masks, self.settings).values()]).sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def peak_of_training(config: str, batch_size: int, device_name: str, precision: Precision) -> float:
    """Measure the peak memory of two training steps in this process.

    Args:
        config: RunConfig as JSON.
        batch_size: of the steps.
        device_name: as in `choose_device`.
        precision: working precision.

    Returns:
        GiB.
    """
    device = choose_device(device_name)
    step = TrainingStep(RunConfig.model_validate_json(config), batch_size, device, choose_precision(precision, device))
    for _ in range(2):
        step()
    return peak_memory(device)


def peak_of_prediction(config: str, batch_size: int, device_name: str, precision: Precision) -> float:
    """Measure the peak memory in GiB of predicting `batch_size` masks of one image."""
    segmenter = _segmenter(RunConfig.model_validate_json(config), device_name, precision)
    segmenter.predict(random_image(), list(EXPRESSIONS[:batch_size]))
    return peak_memory(segmenter.device)


def in_own_process(
    task: Callable[[str, int, str, Precision], float],
    config: RunConfig,
    batch_size: int,
    device: str,
    precision: Precision | None,
) -> float:
    """Call a function of this module in a new process, whose memory nothing else has used.

    Args:
        task: gets the other arguments, the configuration as JSON.
        config: may use entries that the program has added to the registries: the new process
            imports the modules that define them.
        batch_size: of the task.
        device: as in `choose_device`.
        precision: working precision.

    Raises:
        DcrisError: the process fails, or cannot import what an added entry is made of.
    """
    message = {
        "path": sys.path,
        "entries": _entries(config, losses=task is peak_of_training),
        "arguments": (config.model_dump_json(), batch_size, device, precision),
    }
    program = f"from dcris.experiments import bench; bench.run_task(bench.{task.__name__})"
    done = subprocess.run([*_PYTHON, "-c", program], input=pickle.dumps(message), capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DcrisError(f"cannot measure memory: {(lines or [f'exit code {done.returncode}'])[-1][:300]}")
    return float(done.stdout.split()[-1])


def _entries(config: RunConfig, *, losses: bool) -> list[dict[str, bytes]]:
    """Return what a configuration uses of each of _REGISTRIES; a prediction needs no `losses`."""
    method, towers = config.model.method, (config.model.vision, config.model.text)
    used = [
        [method.name] if method else [],
        *([tower.family] for tower in towers),
        [*config.train.losses] if losses else [],
    ]
    return [
        {name: _pickled(name, registry[name]) for name in names if name in registry}
        for registry, names in zip(_REGISTRIES, used, strict=True)
    ]


def _pickled(key: str, entry: object) -> bytes:
    """Return an entry for another process, which imports the modules of its classes and functions.

    The program itself, "__main__", is not imported there: that could run all of it again.
    """
    try:
        content = pickle.dumps(entry)
        if b"__main__" in content:
            raise pickle.PicklingError("it is part of the program")
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # lambdas, what a function defines, open files
        raise DcrisError(
            f"memory is measured in a new process, which cannot import {key!r}: define its class or function at the top "
            "level of a file that your program imports"
        ) from error
    return content


def run_task(task: Callable[..., float]) -> None:
    """Call a task with what `in_own_process` writes to standard input, and print its result."""
    message = pickle.load(sys.stdin.buffer)  # noqa: S301 (from the program itself)
    sys.path += message["path"]  # behind the standard library, see _PYTHON
    for registry, entries in zip(_REGISTRIES, message["entries"], strict=True):
        for key, content in entries.items():
            registry[key] = pickle.loads(content)  # noqa: S301
    print(task(*message["arguments"]))


def _segmenter(config: RunConfig, device: str, precision: Precision | None) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ReferringSegmenter(config.model), config, device=device, precision=precision)


def random_image() -> Any:
    """Return noise [480, 640, 3] uint8, the same on every call."""
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)


def bench(
    config: RunConfig,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    quick: bool = False,
    batch_sizes: Sequence[int] = (2,),
    parts: Sequence[Part] = PARTS,
    folder: Path | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure a recipe on this machine with random tower weights.

    Args:
        config: the recipe.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, float32, bfloat16, float16 or int8; the recipe's own by default. In int8
            there are no rows of training.
        quick: fewer rounds.
        batch_sizes: of the training step.
        parts: what is measured.
        folder: with images whose prediction is measured, too; None: none.
        progress: called with each row when it is measured.

    Returns:
        "machine", "recipe", "precision", "batch_sizes" and "rows", as JSON data.

    Raises:
        DcrisError: the device does not exist, a process for memory fails, or the folder has no
            images.
    """
    config = random_towers(config)
    chosen = choose_device(device)
    kind: Precision = precision or config.train.precision
    dtype = choose_precision(kind, chosen)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        progress(row)

    trained_sizes = batch_sizes if dtype != torch.int8 else ()  # nothing is trained in int8
    if "speed" in parts:
        for row in _speed(config, chosen, kind, dtype, trained_sizes, quick):
            add(row)
    if "memory" in parts:
        for row in _memory(config, device, kind, trained_sizes):
            add(row)
    if folder is not None:
        add(folder_row(config, folder, device, kind, quick))
    return {
        "machine": machine(chosen),
        "recipe": config.recipe,
        "precision": precision_of(dtype),
        "batch_sizes": list(trained_sizes),
        "rows": [asdict(row) for row in rows],
    }


def _speed(
    config: RunConfig,
    device: torch.device,
    precision: Precision,
    dtype: torch.dtype,
    batch_sizes: Sequence[int],
    quick: bool,
) -> Iterator[Row]:
    """Measure start-up, training, data loading and prediction."""
    for what, command in _STARTS.items():
        yield Row(f"start-up: {what}", _start_seconds(command, _rounds(quick)), "s")
    if batch_sizes:
        yield from training_rows(config, device, dtype, batch_sizes, quick)
    yield from prediction_rows(config, device, precision, quick)


def _rounds(quick: bool) -> int:
    return 2 if quick else 5


def training_rows(
    config: RunConfig, device: torch.device, dtype: torch.dtype, batch_sizes: Sequence[int], quick: bool
) -> Iterator[Row]:
    """Measure training steps, and the data loading that they need.

    Args:
        config: the recipe, with `random_towers`.
        device: to train on.
        dtype: working precision.
        batch_sizes: of the steps.
        quick: fewer rounds.
    """
    product, operations = matrix_products(device, dtype)
    loaded = _loading(config, quick)
    for number, batch_size in enumerate(batch_sizes):
        step = TrainingStep(config, batch_size, device, dtype)
        step()
        work = count_operations(step)
        seconds = take_turns({"step": step, "product": product}, _rounds(quick), device)
        del step  # frees its gradients and the optimiser's memory
        ceiling = operations / median(seconds["product"])
        per_step = median(seconds["step"])
        if number == 0:
            yield Row("matrix products of this machine", ceiling / 1e9, "GFLOP/s")
        yield Row(f"training step, batch {batch_size}", per_step, "s", share=work / per_step / ceiling)
        yield Row(f"training, batch {batch_size}", batch_size / per_step, "images/s")
        ratio_of_loading = loaded * per_step / batch_size
        yield Row(
            f"data loading by one process, relative to training at batch {batch_size}",
            loaded,
            "samples/s",
            ratio=ratio_of_loading,
        )


def prediction_rows(config: RunConfig, device: torch.device, precision: Precision, quick: bool) -> Iterator[Row]:
    """Measure predictions of one image with one and with 8 expressions.

    Args: as in `training_rows`.
    """
    rounds = _rounds(quick)
    segmenter, image = _segmenter(config, str(device), precision), random_image()
    product, operations = matrix_products(device, working_dtype(segmenter.dtype, device))
    one = partial(segmenter.predict, image, EXPRESSIONS[0])
    one()
    work = count_operations(one)
    seconds = take_turns({"one": one, "product": product}, rounds, device)
    per_prediction = median(seconds["one"])
    ceiling = operations / median(seconds["product"])
    yield Row("prediction, one image and expression", per_prediction, "s", share=work / per_prediction / ceiling)
    yield _many_expressions(segmenter, "8 expressions in one call, relative to 8 calls", rounds)
    method = config.model.method
    if isinstance(method, DcrisConfig) and method.visual is not None and config.model.vision.depth > max(LATE_LAYERS):
        late = replace(config, {"model.method.visual.layers": LATE_LAYERS})
        segmenter = _segmenter(late, str(device), precision)
        yield _many_expressions(segmenter, f"the same with adapters on layers {list(LATE_LAYERS)}", rounds)


def folder_row(config: RunConfig, folder: Path, device: str, precision: Precision, quick: bool) -> Row:
    """Compare `dcris predict FOLDER` with a loop that predicts and saves one image after the other.

    Both write the same files: mask, picture and probabilities of one phrase.

    Args: as in `training_rows`.
    """
    segmenter, phrase = _segmenter(config, device, precision), EXPRESSIONS[0]
    tasks = find_tasks([folder], [phrase])[: 10 if quick else None]

    with TemporaryDirectory() as out:
        numbers = count()

        def one_after_the_other() -> None:
            target = make_directory(Path(out) / str(next(numbers)))
            for number, task in enumerate(tasks):
                (prediction,) = segmenter.predict(task.path, phrase, scores=True)
                prediction.save(target / f"{number}.png")
                write_file(target / f"{number}-annotated.png", png_bytes(np.asarray(prediction.plot())))
                write_file(target / f"{number}.json", json.dumps(prediction.to_coco()))
                assert prediction.probabilities is not None
                np.save(target / f"{number}.npy", prediction.probabilities.astype(np.float16))

        def together() -> None:
            for _ in BatchPredictor(segmenter, tasks, Path(out) / str(next(numbers))).run():
                pass

        seconds = take_turns({"together": together, "apart": one_after_the_other}, 1 if quick else 3, segmenter.device)
    speed = len(tasks) / median(seconds["together"])
    return Row(
        f"{len(tasks)} images of a folder, relative to one after the other",
        speed,
        "images/s",
        ratio=ratio(seconds["apart"], seconds["together"]),
    )


def _memory(config: RunConfig, device: str, precision: Precision, batch_sizes: Sequence[int]) -> Iterator[Row]:
    """Measure peak memory, each value in a process of its own."""
    for batch_size in batch_sizes:
        peak = in_own_process(peak_of_training, config, batch_size, device, precision)
        yield Row(f"peak memory, training at batch {batch_size}", peak, "GiB")
    yield Row("peak memory, prediction", in_own_process(peak_of_prediction, config, 1, device, precision), "GiB")


def render(measured: Mapping[str, Any]) -> str:
    """Format the result of `bench` as a Markdown table and a line about the machine."""
    about = ", ".join(f"{key} {value}" for key, value in measured["machine"].items())
    return f"{table(measured['rows'])}\n{measured['recipe']}, {measured['precision']}; {about}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows, each with the fields of `Row`, as a Markdown table."""
    cells = [
        [
            row["what"],
            f"{row['value']:.4g} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "" if row["share"] is None else f"{row['share']:.0%}",
        ]
        for row in rows
    ]
    return markdown(("what", "value", "ratio", "share of matrix products"), cells)


_STARTS = {"dcris --help": ("-m", "dcris", "--help"), "import dcris": ("-c", "import dcris")}


def _start_seconds(command: Sequence[str], rounds: int) -> float:
    """Return the median seconds of a new Python process, after one run that is not counted."""
    times = []
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        subprocess.run([*_PYTHON, *command], check=True, capture_output=True)
        if turn:
            times.append(time.perf_counter() - begin)
    return median(times)


def _many_expressions(segmenter: Segmenter, what: str, rounds: int) -> Row:
    """Compare one call with 8 expressions to 8 calls."""
    image = random_image()

    def separately() -> None:
        for expression in EXPRESSIONS:
            segmenter.predict(image, expression)

    def together() -> None:
        segmenter.predict(image, list(EXPRESSIONS))

    seconds = take_turns({"together": together, "separately": separately}, max(2, rounds - 2), segmenter.device)
    return Row(what, median(seconds["together"]), "s", ratio=ratio(seconds["together"], seconds["separately"]))


def _loading(config: RunConfig, quick: bool) -> float:
    """Return the training samples per second that one process reads, with images of COCO's size."""
    with TemporaryDirectory() as folder:
        root = write_scenes(Path(folder) / "data", train=16 if quick else 64, val=0, test=0, side=560, workers=cores())
        references = load_references(root, "scenes").split("train")
        samples = TrainingSamples(references, config.data, tokenizer_of(config.model.text), 0)
        batches = TrainingBatches(len(samples), min(8, len(samples)), 0, 0, len(samples) // 8)
        begin = time.perf_counter()
        count = sum(len(batch.images) for batch in training_loader(samples, batches, 0, pin=False))
        return count / (time.perf_counter() - begin)
