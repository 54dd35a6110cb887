"""Check dcris on a GPU against the CPU, and measure its speed and memory there.

    python benchmarks/gpu.py --json gpu.json --markdown gpu.md

One command of at most 8 minutes on an H100 or H200. It needs dcris and a GPU, but no network, no
weights and no data: the networks have the sizes of the paper and random weights, the images are
generated. torch.compile needs gcc and Python's header files. Each part runs in a process of its own
and has a time limit; a part that reaches it, that comes too late or for which the machine lacks
memory or a compiler, is listed as left out. A failed check is printed with its numbers and does not
stop the other parts.

Exit code: 1 if a check fails or is left out, or a part ends with an error; 2 for wrong arguments;
else 0. `--device cpu --tiny` runs every line that does not need CUDA, in a few seconds.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dcris.checkpoints.checkpoint import list_checkpoints
from dcris.config import RunConfig, replace
from dcris.data.dataset import ImageTasks, Queries, all_queries, normalise, task_loader
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError, out_of_memory
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.experiments.bench import (
    EXPRESSIONS,
    Row,
    TrainingStep,
    folder_row,
    machine,
    peak_of_training,
    prediction_rows,
    random_towers,
    ratio,
    table,
    take_turns,
    training_rows,
)
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.batch_size import largest_micro_batch
from dcris.training.compilation import compiled
from dcris.training.train import train
from dcris.utils.device import autocast, choose_device, choose_precision, precision_of
from dcris.utils.distributed import Processes
from dcris.utils.files import write_file, write_json
from dcris.utils.text_tables import markdown
from dcris.utils.workers import cores

T = TypeVar("T")

CPU = torch.device("cpu")
FLOAT32_TOLERANCE = 2e-3
"""Allowed relative difference in float32, without TF32. Another order of sums on a CPU gives up to
3e-4, in the gradients of DCRIS-B; a wrong mask, scale or position gives more than 1e-2."""
BFLOAT16_FLOOR = 2.0**-7
"""Relative difference that is always allowed in bfloat16: one unit in the last place."""
RESERVE = 10.0
"""Seconds kept for the end of the program."""


@dataclass(frozen=True, slots=True)
class Check:
    """A difference, and the greatest one that passes."""

    what: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is allowed; NaN is not."""
        return self.found <= self.allowed


@dataclass(frozen=True, slots=True)
class Run:
    """The device and the sizes of what is measured."""

    device_name: str
    recipes: tuple[str, ...] = ("dcris_b", "dcris_l")
    """The first one is used for everything but training."""
    batch: int = 32
    """Of training, as in the paper."""
    most: int = 1024
    """The largest batch that is tried."""
    images: int = 128
    """Of the evaluation."""
    folder: int = 64
    """Images in a folder that is predicted."""
    side: int = 640
    """Of these images, in pixels."""
    rounds: int = 20
    """Of single predictions."""
    quick: bool = False
    workers: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further changes of the recipes, by name."""
    patience: float = 1
    """Factor of the time limits."""

    @property
    def device(self) -> torch.device:
        """The device that is compared with the CPU."""
        return choose_device(self.device_name)

    @property
    def dtype(self) -> torch.dtype:
        """The working precision: bfloat16 where the device multiplies it."""
        return choose_precision("auto", self.device)

    def config(self, recipe: str | None = None, changes: Mapping[str, Any] = MappingProxyType({})) -> RunConfig:
        """Return a recipe, by default the first one, with random towers and changes by name."""
        settings = {"data.workers": self.workers, **self.settings, **changes}
        return replace(random_towers(get_recipe(recipe or self.recipes[0])), settings)


def tiny(device_name: str) -> Run:
    """Return a run of seconds."""
    settings = {
        "data.image_size": 56,
        "model.vision.depth": 4,
        "model.text.depth": 4,
        "model.method.visual.layers": (2, 3),
        "model.method.text.layers": (2, 3),
        "model.head.feature_layers": (0, 2),
    }
    return Run(
        device_name,
        ("dcris_tiny",),
        batch=2,
        most=2,
        images=2,
        folder=2,
        side=56,
        rounds=1,
        quick=True,
        workers=0,
        settings=settings,
        patience=10,
    )


Found = Iterator[Row | Check]


# ---- checks --------------------------------------------------------------------------------------


def check_networks(run: Run) -> Found:
    """Compare both encoders and the logits, of the copy that predicts, with those of the CPU."""
    config = run.config()
    model = _model(config)
    with torch.no_grad():
        for weight in model.parameters():  # zeros and ones of a new model would hide mistakes
            weight.add_(torch.randn_like(weight) * (0.1 if weight.dim() < 2 else weight[0].numel() ** -0.5))
    images, tokens = _inputs(config, 2)

    def outputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        ready = prepare_for_prediction(model.to(device), dtype)
        x, words = images.to(device), tokens.to(device)
        with torch.no_grad(), autocast(device, dtype):
            text = ready.encode_text(words)
            state = ready.vision.advance(ready.encode_images(x), text=text.tokens, padding=text.padding)
            logits = ready(x, words).logits
        return {
            "text encoder, words": text.tokens,
            "text encoder, sentence": text.sentence,
            "image encoder with adapters": ready.vision.finish(state),
            "logits": logits,
        }

    yield from _compare(run, outputs)


def check_training(run: Run) -> Found:
    """Compare the losses of three steps and the gradients of the first one with those of the CPU.

    Later gradients would need a large tolerance: Adam's first steps have the same length for every
    weight, so that rounding decides where a gradient is almost 0.
    """
    # Dropout draws other numbers on another device. At the recipe's learning rate, three steps from
    # random weights would magnify rounding.
    changes = {"model.head.dropout": 0.0, "model.method.visual.dropout": 0.0, "train.lr": 1e-6}
    config = run.config(changes=changes)

    def outputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        step = TrainingStep(config, 2, device, dtype)
        first = step()
        gradients = torch.cat([weight.grad.flatten() for weight in step.model.parameters() if weight.grad is not None])
        return {"losses of three steps": torch.stack([first, step(), step()]), "gradients of the first": gradients}

    yield from _compare(run, outputs)


def _compare(run: Run, outputs: Callable[[torch.device, torch.dtype], dict[str, Tensor]]) -> Iterator[Check]:
    """Compare the outputs on a device with the CPU's in float32.

    In bfloat16, twice the CPU's own rounding error is allowed.
    """
    exact, rounded = outputs(CPU, torch.float32), outputs(CPU, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        # By default, convolutions multiply in TF32, which rounds almost as much as bfloat16 does.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = outputs(run.device, dtype)
        for name, expected in exact.items():
            allowed = FLOAT32_TOLERANCE
            if dtype == torch.bfloat16:
                allowed = _allowed_rounding(_difference(rounded[name], expected))
            precision = precision_of(dtype)
            yield Check(f"{name}, {precision}, against the CPU", _difference(found[name], expected), allowed)


def _allowed_rounding(difference: float) -> float:
    """Return the difference in bfloat16 that passes where another implementation has this one."""
    return max(BFLOAT16_FLOOR, 2 * difference)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to that of the expected values."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def check_resuming(run: Run) -> Found:
    """Compare a run that was resumed from its second step with one that was not interrupted.

    As some operations of a GPU may add in any order, the difference of two equal runs is measured,
    too: where it is 0, resuming must be exact.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    changes = {
        "train.max_steps": 4,
        "train.epochs": 1000,
        "train.batch_size": 2,
        "train.save_every": 2,
        "train.warmup_steps": 0,
        "data.train_split": "test",
        "data.val_split": None,
        "data.workers": 0,
    }
    config = run.config(changes=changes)
    with TemporaryDirectory() as folder:
        data = _scenes(Path(folder) / "data", 4, run.side)
        whole, again, resumed = (Path(folder) / name for name in ("whole", "again", "resumed"))
        for out in (whole, again):
            train(config, data, out, device=run.device_name, log=len)
        shutil.copytree(whole, resumed)
        shutil.rmtree(list_checkpoints(resumed)[-1].path)
        (middle,) = list_checkpoints(resumed)
        assert middle.step == 2
        train(config, data, resumed, device=run.device_name, log=len, resume=True)
        repeated, difference = (_greatest_difference(whole, other) for other in (again, resumed))
    yield Check("resumed training, weights and optimizer", difference, 3 * repeated)


def _greatest_difference(one: Path, other: Path) -> float:
    """Return the greatest difference of two runs' weights and moments."""
    differences = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(list_checkpoints(run)[-1].path / file) for run in (one, other))
        assert ours.keys() == theirs.keys()
        differences += [float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours]
    return float(np.max(differences))  # NaN if one is


def evaluation(run: Run) -> Found:
    """Check that scores do not depend on the batch size, and compare the speed with evaluation of
    one expression at a time."""
    config, device = run.config(), run.device
    model = _model(config).to(device)
    with TemporaryDirectory() as folder:
        queries = all_queries(_scenes(Path(folder), run.images, run.side).split("test"))

        def evaluate(batch_size: int) -> list[tuple[int, int]]:
            found = predict_queries(
                model,
                queries,
                config,
                Cris(),
                device=device,
                dtype=run.dtype,
                batch_size=batch_size,
                keep_masks=False,
            )
            return [(each.overlap.intersection, each.overlap.union) for each in found]

        alone = evaluate(1)
        together, seconds = _timed(run, partial(evaluate, 8))
        one_by_one, seconds_of_one = _timed(run, lambda: _one_at_a_time(model, queries, config, device))
    different = sum(a != b for a, b in zip(together, alone, strict=True))
    yield Check(f"results of {len(queries)} expressions that depend on the batch size", different, 0)
    mious = [100 * mean(shared / max(union, 1) for shared, union in each) for each in (together, one_by_one)]
    yield Check("mIoU in points, against one expression at a time in float32", abs(mious[0] - mious[1]), 0.5)
    yield Row(
        f"evaluation of {run.images} images with {len(queries)} expressions, relative to one expression at a time in "
        "float32",
        len(queries) / seconds,
        "expressions/s",
        ratio=seconds_of_one / seconds,
    )


def _one_at_a_time(
    model: ReferringSegmenter, queries: Queries, config: RunConfig, device: torch.device
) -> list[tuple[int, int]]:
    """Evaluate as the published code does: the whole network in float32 for each expression, and
    resampling and counting on the CPU, with one process that reads images.

    Source: `inference` in engine/engine.py of DETRIS.

    Returns:
        Intersection and union of each expression, in pixels.
    """
    tasks = ImageTasks(queries, config.data, tokenizer_of(config.model.text))
    counts = []
    for (task,) in task_loader(tasks, images=1, workers=min(1, config.data.workers)):
        image = normalise(task.image[None].to(device), config.data)
        assert isinstance(task.transform, Letterbox)
        height, width = task.transform.size
        for tokens, (reference, expression) in zip(task.tokens, task.queries, strict=True):
            with torch.no_grad():
                scores = model(image, tokens[None].to(device)).logits.sigmoid()
                scores = F.interpolate(scores, image.shape[-2:], mode="bicubic", align_corners=True)[0, 0]
            warped = cv2.warpAffine(
                scores.cpu().numpy(), task.transform.inverse(), (width, height), flags=cv2.INTER_CUBIC
            )
            predicted, truth = warped > Cris.threshold, task.truths[reference.ref_id, expression.exists].mask > 0
            counts.append((int(np.sum(predicted & truth)), int(np.sum(predicted | truth))))
    return counts


# ---- measurements --------------------------------------------------------------------------------


def training(run: Run, recipe: str) -> Found:
    """Measure the peak memory and the speed of training, in this order: the peak is that of the
    process."""
    config = run.config(recipe)
    peak = peak_of_training(config.model_dump_json(), run.batch, run.device_name, "auto")
    yield Row(f"{recipe}: peak memory, training at batch {run.batch}", peak, "GiB")
    for row in training_rows(config, run.device, run.dtype, (run.batch,), run.quick):
        yield _of(recipe, row)


def largest_batch(run: Run, recipe: str) -> Found:
    """Find the largest batch that fits the memory, up to `run.most`."""
    config = run.config(recipe)
    found = largest_micro_batch(
        ReferringSegmenter(config.model), config, tokenizer_of(config.model.text), run.most, run.device, 1
    )
    yield Row(f"{recipe}: largest batch that fits, of powers of 2 up to {run.most}", found, "images")


def prediction(run: Run) -> Found:
    """Measure predictions, and the network alone with and without a CUDA graph."""
    recipe = run.recipes[0]
    for row in prediction_rows(run.config(), run.device, "auto", run.quick):
        yield _of(recipe, row)
    network = _logits(run, _ready(run, run.dtype), run.dtype)
    graph = _graphed(network) if run.device.type == "cuda" else network
    yield Check("logits in a CUDA graph", _difference(graph(), network()), BFLOAT16_FLOOR)
    yield from _faster(run, f"{recipe}: network alone, one image and expression", network, "in a CUDA graph", graph)


def _graphed(task: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture a task in a CUDA graph. It reads the same tensors at each call, and its result is
    overwritten by the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not happen in the capture
        for _ in range(3):
            task()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = task()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def folder_of_images(run: Run) -> Found:
    """Measure the prediction of a folder, whose images share passes on a GPU, against calls one
    after the other."""
    with TemporaryDirectory() as root:
        (reference, *_) = _scenes(Path(root), run.folder, run.side).split("test")
        images = reference.image_path.parent
        yield _of(run.recipes[0], folder_row(run.config(), images, run.device_name, "auto", run.quick))


def compiled_prediction(run: Run) -> Found:
    """Measure `torch.compile` for the network of a single prediction."""
    what, ready = f"{run.recipes[0]}: network alone, one image and expression", _ready(run, run.dtype)
    plain, fast = (_logits(run, model, run.dtype) for model in (ready, _compile(run, ready)))
    found, seconds = _timed(run, fast)
    yield Row(f"{what}, compiling", seconds, "s")
    exact = _logits(run, _ready(run, torch.float32), torch.float32)()
    allowed = _allowed_rounding(_difference(plain(), exact))
    yield Check("logits of the compiled network, against float32", _difference(found, exact), allowed)
    yield from _faster(run, what, plain, "compiled", fast)


def compiled_training(run: Run) -> Found:
    """Measure `torch.compile` for a training step."""
    plain, fast = (TrainingStep(run.config(), run.batch, run.device, run.dtype) for _ in range(2))
    fast.model = _compile(run, fast.model)
    what = f"{run.recipes[0]}: training step, batch {run.batch}"
    _, seconds = _timed(run, fast)
    yield Row(f"{what}, compiling", seconds, "s")
    yield from _faster(run, what, plain, "compiled", fast)


def _compile(run: Run, model: ReferringSegmenter) -> Any:
    """Return the network compiled as by `train.compile`; as it is on a CPU, which takes minutes."""
    settings = run.config(changes={"train.compile": run.device.type == "cuda"}).train
    return compiled(model, settings, run.device, Processes())


def _timed(run: Run, task: Callable[[], T]) -> tuple[T, float]:
    """Return the result of a task and its seconds."""
    begin = time.perf_counter()
    result = task()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def _faster(run: Run, what: str, plain: Callable[[], object], how: str, fast: Callable[[], object]) -> Iterator[Row]:
    """Compare two implementations; the ratio is the time of the plain one to that of the other."""
    seconds = take_turns({"plain": plain, "fast": fast}, run.rounds, run.device)
    yield Row(what, median(seconds["plain"]), "s")
    yield Row(f"{what}, {how}", median(seconds["fast"]), "s", ratio=ratio(seconds["plain"], seconds["fast"]))


# ---- models and data -----------------------------------------------------------------------------


def _model(config: RunConfig) -> ReferringSegmenter:
    torch.manual_seed(0)
    return ReferringSegmenter(config.model)


def _inputs(config: RunConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return images [count, 3, S, S] and tokens [count, L], the same at each call."""
    side = config.data.image_size
    tokens = tokenizer_of(config.model.text)(list(EXPRESSIONS[:count]), config.data.word_length)
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)), tokens


def _ready(run: Run, dtype: torch.dtype) -> ReferringSegmenter:
    """Return the copy of a model that predicts."""
    return prepare_for_prediction(_model(run.config()).to(run.device), dtype)


def _logits(run: Run, ready: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a task: the logits of one image and expression, always from the same tensors."""
    device = run.device
    images, tokens = (x.to(device) for x in _inputs(run.config(), 1))

    def logits() -> Tensor:
        # Casts that autocast keeps would be memory of a CUDA graph.
        cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
        with torch.no_grad(), cast:
            return ready(images, tokens).logits

    return logits


def _scenes(root: Path, count: int, side: int) -> ReferenceTable:
    """Write generated scenes with the split test, and return their references."""
    write_scenes(root, train=0, val=0, test=count, side=side, workers=min(count, cores()))
    return load_references(root, "scenes")


def _of(recipe: str, row: Row) -> Row:
    """Return the row with the recipe's name, which rows of the machine do not need."""
    return row if row.what.startswith("matrix products") else Row(**asdict(row) | {"what": f"{recipe}: {row.what}"})


# ---- parts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark, which runs in a process of its own."""

    name: str
    function: Callable[[Run], Found]
    limit: float
    """Seconds."""
    checks: bool = False
    """Whether it is a failure if the part is left out."""


def parts_of(run: Run) -> list[Part]:
    """Return all parts, the most important first. Their limits add up to more than 8 minutes: most
    take a fraction of theirs."""
    return [
        Part("networks", check_networks, 60, checks=True),
        Part("training steps", check_training, 90, checks=True),
        Part("resuming", check_resuming, 90, checks=True),
        Part("evaluation", evaluation, 100, checks=True),
        *(Part(f"training of {recipe}", partial(training, recipe=recipe), 75) for recipe in run.recipes),
        Part("prediction", prediction, 60),
        Part("folder", folder_of_images, 75),
        Part("compiled prediction", compiled_prediction, 75),
        *(Part(f"largest batch of {recipe}", partial(largest_batch, recipe=recipe), 45) for recipe in run.recipes),
        Part("compiled training", compiled_training, 120),
    ]


def measure(
    run: Run, parts: Sequence[Part], minutes: float, report: Callable[[Mapping[str, Any]], None]
) -> Mapping[str, Any]:
    """Run parts one after the other.

    Args:
        run: what to measure.
        parts: in order.
        minutes: time for all of them.
        report: called after each part with all that was found so far.

    Returns:
        "checks" and "rows", with the fields of Check and Row (None for numbers that are not
        finite); "left_out" and "errors", with "part" and "reason"; "failed", whether anything is
        wrong; "seconds" of each part.
    """
    begin = time.monotonic()
    results: dict[str, Any] = {"failed": False, "checks": [], "rows": [], "left_out": [], "errors": [], "seconds": {}}
    for part in parts:
        started = time.monotonic()
        left = 60 * minutes - RESERVE - (started - begin)
        ending = ("left_out", f"no time left of {minutes:g} minutes")
        if left > 0:
            with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
                ending = _run(part, run, min(run.patience * part.limit, left), scratch, results)
        if ending is not None:
            kind, reason = ending
            results[kind].append({"part": part.name, "reason": reason})
            results["failed"] |= kind == "errors" or part.checks
            print(f"{part.name}: {reason}", flush=True)
        results["seconds"][part.name] = time.monotonic() - started
        report(results)
    return results


def _run(part: Part, run: Run, limit: float, scratch: str, results: dict[str, Any]) -> tuple[str, str] | None:
    """Run a part and add what it finds to the results. Return why it ended early: the kind
    ("left_out" or "errors") and the reason."""
    # A fork of a process that has imported torch, but has not used CUDA. The optimizers import
    # torch's compiler, which takes a second or two.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dcris.experiments.bench", "dcris.training.train", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(part.function, run, sender, scratch))
    process.start()
    sender.close()
    deadline = time.monotonic() + limit
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            kind, content = receiver.recv()
            if kind == "end":
                process.join(5)
                return content
            if kind == "checks":
                results["failed"] |= not content["passed"]
            results[kind].append(content)
            print(_line(kind, content), flush=True)
        return "left_out", f"it did not end within {limit:.0f} s"
    except EOFError:
        process.join()
        return "errors", f"its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.kill()  # if it had no group yet
        process.join()


def _child(function: Callable[[Run], Found], run: Run, sender: Connection, scratch: str) -> None:
    """Send what a part finds as pairs of its kind and its content, then why it ended early."""
    os.setpgrp()  # a group that can be ended as a whole
    multiprocessing.set_start_method(None, force=True)  # not that of this process, for data loaders
    os.environ["TMPDIR"] = tempfile.tempdir = scratch  # emptied by the caller, also after the time limit
    try:
        for found in function(run):
            if isinstance(found, Check):
                content = {"passed": found.passed, **asdict(found)}
                infinite = {key: None for key in ("found", "allowed") if not math.isfinite(content[key])}
                sender.send(("checks", content | infinite))  # JSON has no NaN
            else:
                sender.send(("rows", asdict(found)))
        sender.send(("end", None))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        # DcrisError: the machine lacks something, such as a compiler.
        lacking = out_of_memory(error) or isinstance(error, DcrisError)
        sender.send(("end", ("left_out" if lacking else "errors", reason)))


def _line(kind: str, content: Mapping[str, Any]) -> str:
    if kind == "checks":
        verdict = "passed" if content["passed"] else "FAILED"
        return f"{verdict}: {content['what']}: {_number(content['found'])}, allowed {_number(content['allowed'])}"
    return f"{content['what']}: {content['value']:.4g} {content['unit']}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def render(results: Mapping[str, Any]) -> str:
    """Format results as Markdown: the machine, measurements, checks and what is missing."""
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    checks = [
        [
            check["what"],
            _number(check["found"]),
            _number(check["allowed"]),
            "passed" if check["passed"] else "**failed**",
        ]
        for check in results["checks"]
    ]
    missing = [
        f"{title}: {item['part']} ({item['reason']})."
        for key, title in (("left_out", "Left out"), ("errors", "Error"))
        for item in results[key]
    ]
    return "\n\n".join(
        [
            f"{about}, {results['precision']}; `{results['command']}`, {sum(results['seconds'].values()):.0f} s:",
            table(results["rows"]),
            markdown(("check", "difference", "allowed", "result"), checks),
            *missing,
        ]
    )


def main() -> None:
    """Measure all parts, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the tiny model and a few images, to try the program")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    args = parser.parse_args()
    run = tiny(args.device) if args.tiny else Run(args.device, workers=min(8, cores()))
    parts = parts_of(run)
    if unknown := {*(args.only or ())} - {part.name for part in parts}:
        names = ", ".join(f'"{part.name}"' for part in parts)
        parser.error(f"there is no part {min(unknown)!r}; choose from {names}")
    if args.only:
        parts = [part for part in parts if part.name in args.only]
    try:
        about = {
            "machine": machine(run.device),
            "precision": precision_of(run.dtype),
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        }

        def report(results: Mapping[str, Any]) -> None:  # after each part, so that nothing is lost
            if args.json:
                write_json(args.json, about | results)
            if args.markdown:
                write_file(args.markdown, render(about | results) + "\n")

        results = measure(run, parts, args.minutes, report)
    except DcrisError as error:
        parser.error(str(error))
    print(f"\n{render(about | results)}")
    sys.exit(int(results["failed"]))


if __name__ == "__main__":
    main()
