"""Time from the shell to the first mask: new processes of `dcris predict` on one photograph.

    python benchmarks/start_up.py [--models photos dcris_b] [--rounds 5]

DCRIS-B is made with random weights: towers in the layout of the published files in a Hub cache of
its own (HF_HOME), and a checkpoint on them. The files are read before the first round, so that they
are in the system's cache, and so is what the first process compiles.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from dcris.checkpoints.backbones import family_of, tower_state
from dcris.checkpoints.checkpoint import identify_towers, save_model
from dcris.data.photographs import example_photographs
from dcris.models.encoders.text import TextTower
from dcris.models.encoders.vit import VisionTower
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe

_COMMIT = "0" * 40


def make_model(folder: Path, name: str = "dcris_b") -> Path:
    """Write a Hub cache with both towers of a recipe, and a checkpoint on them, unless they exist.

    Returns:
        The checkpoint; the cache is `folder`/home.
    """
    path = folder / name
    if path.exists():
        return path
    config = get_recipe(name)
    torch.manual_seed(0)
    model = ReferringSegmenter(config.model).eval()
    for tower in model.towers.values():
        repository = _publish(tower, folder / "home" / "hub")
        tower.source = {"source": f"{repository}/model.safetensors", "revision": _COMMIT}
    save_model(path, model, identify_towers(model), config, with_towers=False)
    return path


def _publish(tower: VisionTower | TextTower, cache: Path) -> str:
    """Write a tower into a Hub cache, with the tensor names of its repository."""
    family = family_of(tower)
    repository = str(family.sources()[tower.config.name])
    mapping, tensors = family.key_mappings[0], {}
    for name, value in tower_state(tower).items():
        parts = mapping.parts(name)
        stored = value.T if name in mapping.transposed else value
        pieces = stored.chunk(len(parts)) if len(parts) > 1 else (stored,)
        tensors |= dict(zip(parts, pieces, strict=True))
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(_COMMIT)
    (place / "snapshots" / _COMMIT).mkdir(parents=True, exist_ok=True)
    unneeded = tuple(mapping.zeros)
    kept = {name: value.contiguous().clone() for name, value in tensors.items() if not name.endswith(unneeded)}
    save_file(kept, place / "snapshots" / _COMMIT / "model.safetensors")
    return repository


def measure(command: list[str], rounds: int, home: Path) -> dict[str, float]:
    """Run a command `rounds` + 1 times and return the median and the least seconds of all but the
    first."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return {"median": round(statistics.median(seconds[1:]), 3), "least": round(min(seconds[1:]), 3)}


def main() -> None:
    """Measure the bare import of torch and each model, and print the seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["photos", "dcris_b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("start_up"), help="for the model with random weights")
    arguments = parser.parse_args()
    home = arguments.folder.resolve() / "home"
    photograph = next(path for path, _ in example_photographs() if path.name == "coffee.jpg")
    results = {"import torch": measure([sys.executable, "-c", "import torch"], arguments.rounds, home)}
    for name in arguments.models:
        model = "photos" if name == "photos" else str(make_model(arguments.folder, name))
        out = arguments.folder / f"out-{name}"
        command = [
            sys.executable,
            "-m",
            "dcris",
            "predict",
            model,
            str(photograph),
            "-e",
            "cup",
            "--out",
            str(out),
            "--overwrite",
        ]
        results[name] = measure(command, arguments.rounds, home)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
