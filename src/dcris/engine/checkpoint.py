"""Checkpoints: what was trained, in a directory that is either whole or not there.

RUN/config.json and, per checkpoint, RUN/checkpoints/step-00000123/
    config.json           what the model is and how it was trained
    model.safetensors     adapters, head and their statistics; names the frozen towers by fingerprint
    optimizer.safetensors the optimiser's moments, for --resume alone
    state.json            step, score; written with the rest
A converted checkpoint has only the first two, and beside them
    towers.safetensors    the frozen towers themselves, so that no other source is needed
Where that file is missing the towers are looked for under their names, and either way they must have the fingerprints that
model.safetensors names. So the file may be deleted to save space where the named weights are at hand.
Nothing in a checkpoint can run code.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcris.adapters.base import trained_state
from dcris.config import RunConfig, load_config
from dcris.encoders.weights import copy_strictly, fingerprint, load_towers, tower_state
from dcris.errors import DcrisError
from dcris.files import read_json, write_directory
from dcris.model.dcris import DCRIS
from dcris.version import __version__

_MODEL, _OPTIMIZER, _CONFIG, _STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
_TOWERS = "towers.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int
    score: float | None
    """mIoU on the validation split in percent, where it was measured."""


Towers = dict[str, dict[str, str]]
"""The frozen towers by "vision" and "text": the name of their weights and their SHA-256; and where they are known, the file's
"source" and the Hub's "revision"."""


def identify_towers(model: DCRIS) -> Towers:
    """Name a model's frozen towers. Reads every weight: a second or two for the large ones."""
    return {
        name: {"name": part.config.name, **part.source, "sha256": fingerprint(tower_state(part))}
        for name, part in (("vision", model.vision), ("text", model.text))
    }


def save_checkpoint(
    run: Path,
    model: DCRIS,
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    step: int,
    score: float | None,
) -> Checkpoint:
    """Write the checkpoint of `step` into the run's directory, atomically. Raises DcrisError where it cannot be written."""
    metadata = _metadata(towers, step)
    state = {name: value.detach().to("cpu").contiguous() for name, value in trained_state(model).items()}
    moments = {
        f"{slot}.{key}": value.detach().to("cpu").contiguous()
        for slot, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    path = run / "checkpoints" / f"step-{step:08d}"

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, metadata)
        save_file(moments, folder / _OPTIMIZER)
        (folder / _CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        (folder / _STATE).write_text(json.dumps({"step": step, "score": score}) + "\n")

    _write(path, fill)
    return Checkpoint(path, step, score)


def save_whole(path: Path, tensors: dict[str, Tensor], config: RunConfig) -> None:
    """Write a whole model, given as its state dict, as the checkpoint directory `path`: what was trained, and the towers.

    Tensors are read one by one, so they may be mapped from a file. Raises DcrisError where it cannot be written.
    """
    with torch.device("meta"):  # names without memory
        model = DCRIS(config.model)
    trained = trained_state(model).keys()
    state = {name: value.contiguous() for name, value in tensors.items() if name in trained}
    frozen = {name: value.contiguous() for name, value in tensors.items() if name not in trained}
    towers: Towers = {
        name: {"name": part.config.name, "sha256": fingerprint(_part(frozen, name))}
        for name, part in (("vision", model.vision), ("text", model.text))
    }

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, _metadata(towers, step=0))
        save_file(frozen, folder / _TOWERS)
        (folder / _CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")

    _write(path, fill)


def _metadata(towers: Towers, step: int) -> dict[str, str]:
    return {"format": "dcris-1", "version": __version__, "step": str(step), "towers": json.dumps(towers)}


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    try:
        write_directory(path, fill)
    except SafetensorError as error:  # safetensors wraps what the disk said
        raise DcrisError(f"cannot write the checkpoint {path}: {error}") from error


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """A run's checkpoints, oldest first."""
    found = []
    for path in sorted((run / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d{8,}", path.name) and (path / _STATE).is_file():
            state = read_json(path / _STATE, "the checkpoint's state")
            fits = isinstance(state, dict) and isinstance(state.get("step"), int)
            if not fits or not isinstance(state.get("score"), int | float | None):
                raise DcrisError(f"{path / _STATE} is not the state of a checkpoint; delete {path} to do without it")
            found.append(Checkpoint(path, state["step"], state.get("score")))
    return found


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one with the highest score, the newest of equals; the newest where none has a score."""
    return max(checkpoints, key=lambda item: (item.score is not None, item.score or 0.0, item.step))


def prune_checkpoints(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the best."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        kept = {item.path for item in (*checkpoints[-keep_last:], best_checkpoint(checkpoints))}
        for item in checkpoints:
            if item.path not in kept:
                shutil.rmtree(item.path, ignore_errors=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` means: itself, or the best of the run it is.

    Raises DcrisError where there is none.
    """
    if (path / _MODEL).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return best_checkpoint(checkpoints).path
    if not path.exists():
        raise DcrisError(f"there is no checkpoint {path}; give a run's directory, as made by `dcris train --out`")
    raise DcrisError(f"{path} holds no checkpoint: neither {_MODEL} nor checkpoints/step-* is in it")


def load_checkpoint(path: Path) -> tuple[DCRIS, RunConfig]:
    """Build the model of a checkpoint directory or run, towers and all, on the CPU in evaluation mode.

    Raises DcrisError where a file is missing, cut short or of another model, or where the frozen towers are not those that
    the adapters were trained on.
    """
    path = find_checkpoint(path)
    config = _pin(load_config(path / _CONFIG), _read_towers(path))
    model = DCRIS(config.model)
    if (path / _TOWERS).is_file():
        tensors, _ = _read_tensors(path / _TOWERS)
        towers = {
            f"{name}.{key}": value
            for name, tower in (("vision", model.vision), ("text", model.text))
            for key, value in tower_state(tower).items()
        }
        copy_strictly(towers, tensors, str(path / _TOWERS))
    else:
        load_towers(model.vision, model.text, config.model)
    load_trained(model, path)
    return model, config


def load_trained(model: DCRIS, path: Path) -> None:
    """Copy a checkpoint's adapters and head into a model whose towers are filled. Raises as load_checkpoint does."""
    tensors, _ = _read_tensors(path / _MODEL)
    towers = _read_towers(path)
    for name, tower in identify_towers(model).items():
        recorded = towers.get(name, {})
        if recorded.get("sha256") != tower["sha256"]:
            revision = f" of revision {recorded['revision']}" if "revision" in recorded else ""
            raise DcrisError(
                f"{path} was trained on another {name} tower than {tower['name']} as found here; its adapters mean nothing "
                f"on these weights, so load the tower it names, {recorded.get('name')}{revision}, or train again"
            )
    copy_strictly(trained_state(model), tensors, str(path / _MODEL))


def _pin(config: RunConfig, towers: Towers) -> RunConfig:
    """The configuration with the Hub's commits that the checkpoint was trained on: "main" may have moved since."""
    model = config.model
    for part in ("vision", "text"):
        section, recorded = getattr(model, part), towers.get(part, {})
        commit = recorded.get("revision", "")
        if recorded.get("name") == section.name and re.fullmatch("[0-9a-f]{40,64}", commit):
            pinned = section.model_copy(update={"revision": commit})
            model = model.model_copy(update={part: pinned})
    return config.model_copy(update={"model": model})


def _read_towers(path: Path) -> Towers:
    """Which towers a checkpoint says it was trained on. Raises DcrisError where it does not say."""
    _, metadata = _read_tensors(path / _MODEL, names=())
    try:
        towers = json.loads(metadata["towers"])
        return {part: {key: str(value) for key, value in entry.items()} for part, entry in towers.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DcrisError(
            f"{path / _MODEL} does not say which towers it was trained on; it was not written by dcris"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Copy a checkpoint's moments into a fresh optimiser of the same model. Raises DcrisError where they do not fit."""
    tensors, _ = _read_tensors(path / _OPTIMIZER)
    state = optimizer.state_dict()
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        slot, _, key = name.partition(".")
        slots.setdefault(int(slot) if slot.isdecimal() else -1, {})[key] = value
    wanted = {slot for group in state["param_groups"] for slot in group["params"]}
    if (
        not slots
        or set(slots) - wanted
        or any(set(values) != {"step", "exp_avg", "exp_avg_sq"} for values in slots.values())
    ):
        raise DcrisError(
            f"{path / _OPTIMIZER} is not of this model; delete {path} to go on from the checkpoint before it"
        )
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def _read_tensors(path: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors (those of `names`, or all) and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            wanted = file.keys() if names is None else names
            return {name: file.get_tensor(name) for name in wanted}, file.metadata() or {}
    except FileNotFoundError as error:
        raise DcrisError(f"the checkpoint has no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise DcrisError(
            f"{path} cannot be read ({error}); it may be cut short, so copy it again or use another checkpoint"
        ) from error
