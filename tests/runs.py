"""Short training runs of the tiny recipe."""

import atexit
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file

from dcris.checkpoints.checkpoint import _sealed, list_checkpoints
from dcris.config import RunConfig, TextConfig, VisionConfig, parse_value, replace
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import get_tokenizer
from dcris.recipes import get_recipe
from dcris.training.trainer import Trainer, TrainResult, build_model

CPU = torch.device("cpu")
EVERY_STEP = ("train.log_every", "1")
PLAIN = {
    "data.phrases_per_image": 1,
    "train.ema": None,
    "train.losses": {},
    "train.optimizer": "adam",
    "train.lr": 2e-3,
    "train.betas": [0.9, 0.98],
    "train.target": "nearest",
}
"""Settings without the tiny recipe's options of training, and with a learning rate for Adam. Tests
switch them on one by one."""
PLAIN_WORDS = [
    word
    for key, value in PLAIN.items()
    for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
]
"""The same for the command line."""


@cache
def small_network() -> dict[str, Any]:
    """Settings of a network of four blocks, which runs in a third of the tiny recipe's time; the
    weights of its towers are random numbers, in files beside the system's other temporary ones."""
    from published import hub_clip, hub_dinov2, written

    shape = {"depth": 4, "heads": 4, "width": 32}
    vision = VisionConfig(**shape, grid=4)
    text = TextConfig(**shape, tokenizer="tiny", vocabulary=144, length=24, sentence_width=32)
    folder = Path(mkdtemp(prefix="dcris-towers-"))
    atexit.register(rmtree, folder)
    networks = {"vision": hub_dinov2(vision), "text": hub_clip(text)}
    for name, network in networks.items():
        (folder / f"{name}.safetensors").write_bytes(written(network, folder / name))
    return {
        "model.vision": vision.model_copy(update={"name": str(folder / "vision.safetensors")}),
        "model.text": text.model_copy(update={"name": str(folder / "text.safetensors")}),
        "model.method.visual.layers": [2, 3],
        "model.method.text.layers": [2, 3],
        "model.head.feature_layers": [1, 2],
        "model.head.width": 32,
    }


@cache
def small_recipe() -> Path:
    """A file that `dcris train` takes in place of dcris_tiny, with the small network."""
    config = replace(get_recipe("dcris_tiny"), small_network())
    path = Path(config.model.vision.name).with_name("small.json")
    path.write_text(config.model_dump_json())
    return path


def quick_config(steps: int, *settings: tuple[str, str], recipe: str | None = None) -> RunConfig:
    """Return a recipe with batches of four small images, read without workers, and PLAIN settings;
    without a recipe's name that of dcris_tiny, on a small network."""
    base = {
        "train.max_steps": steps,
        "train.epochs": 1000,
        "train.batch_size": 4,
        "train.warmup_steps": 1,
        "data.workers": 0,
        "data.image_size": 56,
    }
    config = get_recipe(recipe) if recipe else replace(get_recipe("dcris_tiny"), small_network())
    return replace(config, PLAIN | base | {key: parse_value(text) for key, text in settings})


def run_training(
    config: RunConfig, table: ReferenceTable | Path, out: Path, resume: bool = False, log: Callable[[str], None] = len
) -> TrainResult:
    """Train as `dcris train` does, on the CPU, without output."""
    if isinstance(table, Path):
        table = load_references(table, config.data.dataset)
    tokenizer = get_tokenizer(config.model.text.tokenizer)
    return Trainer(build_model(config), config, table, tokenizer, out, device=CPU, resume=resume, log=log).run()


def last_tensors(run: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Return the tensors of a run's newest checkpoint."""
    return load_file(list_checkpoints(run)[-1].path / file)


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs have the same weights, statistics, optimizer state and log, bit for bit; speed and
    memory may differ."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = last_tensors(one, file), last_tensors(other, file)
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{len(different)} tensors of {file} differ, {different[0]} first"
    assert timeless_log(one) == timeless_log(other)


def timeless_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a log without the values that depend on the machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "images_per_second", "peak_memory_mb"):
            line.pop(name, None)
    return lines


def leftovers(folder: Path) -> list[Path]:
    """Return files with a temporary name, which nothing may leave behind."""
    return [path for path in folder.rglob(".*") if path.name != ".gitignore"]


def unseal(checkpoint: Path) -> None:
    """Remove the checksums of the files, as a hostile checkpoint may, so that changes are not
    detected by them."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(_sealed({**state, "files": {}})))
