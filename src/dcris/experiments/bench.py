"""What this machine makes of the program: seconds, ratios, memory, and shares of the machine's own matrix products.

Times on a machine that does other things too are no measurements, so whatever is compared takes turns within one process, and
a ratio is the median over the turns. The ceiling, what the machine's own matrix products reach, is measured between them.
"""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcris.checkpoints.backbones import RANDOM
from dcris.config import RunConfig, replace
from dcris.data.dataset import TrainingBatches, TrainingSamples, training_loader
from dcris.data.readers.load import load_references
from dcris.data.scenes import cores, write_scenes
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.models.adapters.dcris import DcrisConfig
from dcris.models.optimize import hold_frozen
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import text_to_pixel_loss
from dcris.utils.arguments import Precision
from dcris.utils.device import autocast, choose_device, choose_precision, device_name, resident_memory
from dcris.utils.text_tables import markdown
from dcris.version import __version__

PHRASES = (
    "left slice",
    "the red cup behind the plate",
    "man in a dark blue coat",
    "second umbrella from the right",
    "dog",
    "the girl who looks away",
    "white car near the tree",
    "top of the bread",
)
LATE_LAYERS = (4, 8, 11)
"""Adapters on three late blocks (table 5): more of the vision tower is shared between phrases."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    value: float
    unit: str
    ratio: float | None = None
    """Against whatever `what` names, where something is compared."""
    share: float | None = None
    """Of the machine's matrix products, 0 to 1, by the floating-point operations that were counted in this program."""


def take_turns(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each task in each of `rounds` rounds. The tasks take turns, after one turn each that does not count.

    On a machine that others use too, `time.process_time` as `clock` counts this process's work alone, over all its threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            _wait(device)
            begin = clock()
            task()
            _wait(device)
            if turn:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of one task's seconds divided by another's in the same round."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_products(
    device: torch.device, dtype: torch.dtype, size: int | None = None
) -> tuple[Callable[[], object], float]:
    """A task that multiplies two large square matrices, and its floating-point operations (a multiply-add is 2)."""
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def count_operations(task: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products, convolutions and attentions in a task."""

    def packed(x: object, weight: Sequence[int], *others: object, out_shape: Sequence[int], **more: object) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    # What linear layers and convolutions are in bfloat16 on a CPU (dcris.models.optimize), which torch does not count.
    products = (torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._convolution_pointwise)
    known = dict.fromkeys(products, packed) if torch.backends.mkldnn.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        task()
    return float(counter.get_total_flops())


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GiB: on a GPU by this process's tensors, or else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_memory("VmHWM") / 2**30


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures belong to."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dcris": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def random_towers(config: RunConfig) -> RunConfig:
    """The same run on towers of random weights: equal speed, and nothing to download."""
    model = config.model
    towers = {
        "vision": model.vision.model_copy(update={"name": RANDOM}),
        "text": model.text.model_copy(update={"name": RANDOM}),
    }
    return config.model_copy(update={"model": model.model_copy(update=towers)})


class TrainingStep:
    """Optimiser steps on one made-up batch, as the training loop does them."""

    def __init__(self, config: RunConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = ReferringSegmenter(config.model).to(device).train()
        self.model.checkpoint_activations(config.train.checkpoint_activations)
        hold_frozen(self.model, dtype)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.train.lr, fused=True)
        side = config.data.image_size
        self.images = torch.randn(batch_size, 3, side, side, device=device)
        tokens = tokenizer_of(config.model.text)(["left slice"] * batch_size, config.data.word_length)
        self.tokens = tokens.to(device)
        self.masks = (torch.rand(batch_size, 1, side, side, device=device) > 0.5).float()

    def __call__(self) -> None:
        """Forward, loss, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.dtype):
            logits, _ = self.model(self.images, self.tokens)
        loss = text_to_pixel_loss(logits, self.masks)
        loss.backward()
        self.optimizer.step()


def peak_of_training(config: str, batch_size: int, device_name: str, precision: Precision) -> float:
    """Peak memory in GiB of two training steps, in this process. `config` is a RunConfig as JSON."""
    device = choose_device(device_name)
    step = TrainingStep(RunConfig.model_validate_json(config), batch_size, device, choose_precision(precision, device))
    for _ in range(2):
        step()
    return peak_memory(device)


def peak_of_prediction(config: str, batch_size: int, device_name: str, precision: Precision) -> float:
    """Peak memory in GiB of predicting for one photograph and `batch_size` phrases, in this process."""
    segmenter = _segmenter(RunConfig.model_validate_json(config), device_name, precision)
    segmenter.predict(_photograph(), list(PHRASES[:batch_size]))
    return peak_memory(segmenter.device)


def in_own_process(task: Callable[[str, int, str, Precision], float], *arguments: Any) -> float:
    """What a function of this module returns in a process of its own, whose memory nothing else has used."""
    program = (
        f"import sys, json; from dcris.experiments.bench import {task.__name__} as f; print(f(*json.load(sys.stdin)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(arguments), capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DcrisError(f"the memory could not be measured: {reason[:300]}")
    return float(done.stdout.split()[-1])


def _segmenter(config: RunConfig, device: str, precision: Precision | None) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(ReferringSegmenter(config.model), config, device=device, precision=precision)


def _photograph() -> Any:
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)


def bench(
    config: RunConfig,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    quick: bool = False,
    batch_size: int = 2,
    progress: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure a recipe on this machine with random tower weights.

    Args:
        config: the run.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, float32 or bfloat16; the run's own by default.
        quick: fewer rounds, and no processes for memory.
        batch_size: of the training step.
        progress: called with each row when it is known.

    Returns "machine", "recipe", "precision", "batch_size" and "rows", as JSON can hold them. Raises DcrisError where the device
    is not there.
    """
    config = random_towers(config)
    chosen = choose_device(device)
    kind: Precision = precision or config.train.precision
    dtype = choose_precision(kind, chosen)
    rounds = 2 if quick else 5
    rows: list[Row] = []

    def add(*row: Any, **more: Any) -> None:
        rows.append(Row(*row, **more))
        progress(rows[-1])

    for what, command in _STARTS.items():
        add(f"start-up: {what}", _start_seconds(command, rounds), "s")
    product, operations = matrix_products(chosen, dtype)
    step = TrainingStep(config, batch_size, chosen, dtype)
    step()
    work = count_operations(step)
    seconds = take_turns({"step": step, "product": product}, rounds, chosen)
    ceiling = operations / median(seconds["product"])
    add("matrix products of this machine", ceiling / 1e9, "GFLOP/s")
    of_step = median(seconds["step"])
    add(f"training step, batch {batch_size}", of_step, "s", share=work / of_step / ceiling)
    add("training", batch_size / of_step, "images/s")
    del step  # its gradients and the optimiser's memory
    loaded = _loading(config, quick)
    add(
        "data loading by one process, against what training takes",
        loaded,
        "samples/s",
        ratio=loaded * of_step / batch_size,
    )

    segmenter, photograph = _segmenter(config, device, kind), _photograph()
    one = partial(segmenter.predict, photograph, PHRASES[0])
    one()
    work = count_operations(one)
    seconds = take_turns({"one": one, "product": product}, rounds, chosen)
    of_one = median(seconds["one"])
    ceiling = operations / median(seconds["product"])
    add("prediction, one photograph and phrase", of_one, "s", share=work / of_one / ceiling)
    _many_phrases(segmenter, "8 phrases at once, against 8 calls", rounds, add)
    method = config.model.method
    if isinstance(method, DcrisConfig) and method.visual is not None and config.model.vision.depth > max(LATE_LAYERS):
        late = replace(config, {"model.method.visual.layers": LATE_LAYERS})
        segmenter = _segmenter(late, device, kind)
        _many_phrases(segmenter, f"the same, adapters on {list(LATE_LAYERS)}", rounds, add)
    if not quick:
        text = config.model_dump_json()
        memory = in_own_process(peak_of_training, text, batch_size, device, kind)
        add(f"peak memory, training at batch {batch_size}", memory, "GiB")
        add("peak memory, prediction", in_own_process(peak_of_prediction, text, 1, device, kind), "GiB")
    return {
        "machine": machine(chosen),
        "recipe": config.recipe,
        "precision": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "rows": [asdict(row) for row in rows],
    }


def render(figures: Mapping[str, Any]) -> str:
    """What `bench` returns, as a Markdown table and a line about the machine."""
    cells = [
        [
            row["what"],
            f"{row['value']:.4g} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "" if row["share"] is None else f"{row['share']:.0%}",
        ]
        for row in figures["rows"]
    ]
    about = ", ".join(f"{key} {value}" for key, value in figures["machine"].items())
    title = f"{figures['recipe']}, {figures['precision']}; {about}"
    return f"{markdown(('what', 'value', 'ratio', 'share of matrix products'), cells)}\n{title}"


_STARTS = {"dcris --help": ("-m", "dcris", "--help"), "import dcris": ("-c", "import dcris")}


def _start_seconds(command: Sequence[str], rounds: int) -> float:
    times = []
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        if turn:
            times.append(time.perf_counter() - begin)
    return median(times)


def _many_phrases(segmenter: Segmenter, what: str, rounds: int, add: Callable[..., None]) -> None:
    photograph = _photograph()

    def apart() -> None:
        for phrase in PHRASES:
            segmenter.predict(photograph, phrase)

    def together() -> None:
        segmenter.predict(photograph, list(PHRASES))

    seconds = take_turns({"together": together, "apart": apart}, max(2, rounds - 2), segmenter.device)
    add(what, median(seconds["together"]), "s", ratio=ratio(seconds["together"], seconds["apart"]))


def _loading(config: RunConfig, quick: bool) -> float:
    """Samples a second that one process reads: photographs of COCO's size, decoded, letterboxed, with their masks and words."""
    with TemporaryDirectory() as folder:
        root = write_scenes(Path(folder) / "data", train=16 if quick else 64, val=0, test=0, side=560, workers=cores())
        references = load_references(root, "scenes").split("train")
        samples = TrainingSamples(references, config.data, tokenizer_of(config.model.text), 0)
        batches = TrainingBatches(len(samples), min(8, len(samples)), 0, 0, len(samples) // 8)
        begin = time.perf_counter()
        count = sum(len(batch.images) for batch in training_loader(samples, batches, 0, pin=False))
        return count / (time.perf_counter() - begin)
