"""Checkpoints: what was trained, in a directory that is either whole or not there.

RUN/config.json, RUN/data.json (what it was trained on) and, per checkpoint, RUN/checkpoints/step-00000123/
    config.json           what the model is and how it was trained
    model.safetensors     adapters, head and their statistics; names the frozen towers by fingerprint
    optimizer.safetensors the optimiser's moments, for --resume alone
    state.json            step, score and by what, and a checksum of each of the other files and of itself
A converted checkpoint has only the first two, and beside them
    towers.safetensors    the frozen towers themselves, so that no other source is needed
Where that file is missing the towers are looked for under their names, and either way they must have the fingerprints that
model.safetensors names. So the file may be deleted to save space where the named weights are at hand.
A bundle is all of it in one .safetensors file, the configuration in its metadata.
Nothing in a checkpoint can run code.
"""

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dcris.checkpoints.backbones import copy_strictly, fingerprint, frozen_state, load_towers
from dcris.checkpoints.tensor_files import open_safetensors
from dcris.config import RunConfig, load_config, parse_config
from dcris.errors import DcrisError
from dcris.models.adapters.base import trained_state
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.arguments import PathLike, as_path
from dcris.utils.files import (
    open_regular,
    parse_json,
    read_json,
    remove_directory,
    remove_partial,
    write_directory,
    write_file,
    write_json,
)
from dcris.version import __version__

_MODEL, _OPTIMIZER, _CONFIG, _STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
_TOWERS = "towers.safetensors"
_BUNDLE = ".safetensors"
_DAMAGED = "damaged-"
"""Before the name of a checkpoint that was moved aside."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int
    score: float | None
    """On the validation split, in percent, by the run's `train.best_by`; None where it was not measured."""


Towers = dict[str, dict[str, str]]
"""The frozen towers by "vision" and "text": the name of their weights and their SHA-256; and where they are known, the file's
"source" and the Hub's "revision"."""

Origin = Mapping[str, str]
"""Of a published checkpoint that was converted, which one it was: "name", "source", "revision", "sha256"; else nothing."""


def identify_towers(model: ReferringSegmenter) -> Towers:
    """Name a model's frozen towers. Reads every weight: a second or two for the large ones."""
    return {
        name: {"name": part.config.name, **part.source, "sha256": fingerprint(frozen_state(part))}
        for name, part in (("vision", model.vision), ("text", model.text))
    }


def save_checkpoint(
    run: Path,
    model: ReferringSegmenter,
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    step: int,
) -> Checkpoint:
    """Write the checkpoint of `step`, which has no score yet, into the run's directory, atomically.

    Raises DcrisError where it cannot be written.
    """
    metadata = _metadata(towers, step)
    state = _on_cpu(trained_state(model))
    slots = optimizer.state_dict()["state"].items()
    moments = _on_cpu({f"{slot}.{key}": value for slot, values in slots for key, value in values.items()})
    path = run / "checkpoints" / f"step-{step:08d}"

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, metadata)
        save_file(moments, folder / _OPTIMIZER)
        (folder / _CONFIG).write_text(_config_text(config))
        files = {name: _sha256(folder / name) for name in (_MODEL, _OPTIMIZER, _CONFIG)}
        (folder / _STATE).write_text(
            json.dumps(_sealed({"step": step, "score": None, "files": files}), indent=2) + "\n"
        )

    _write(path, fill)
    return Checkpoint(path, step, None)


def score_checkpoint(checkpoint: Checkpoint, score: float, by: str) -> None:
    """Note what validation gave, and which score it is. The weights are not written again.

    Raises DcrisError where the checkpoint's state cannot be read or written.
    """
    write_json(
        checkpoint.path / _STATE, _sealed({**_read_state(checkpoint.path, checkpoint.step), "score": score, "by": by})
    )


def _sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its own checksum."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DcrisError(f"the checkpoint has no file {path}") from error
    except OSError as error:
        raise DcrisError(f"{path} cannot be read ({error.strerror or error})") from error


def save_whole(
    path: Path, tensors: dict[str, Tensor], config: RunConfig, origin: Origin | None = None, half: bool = False
) -> None:
    """Write a whole model, given as its state dict, as the checkpoint directory `path`: what was trained, and the towers.

    Tensors are read one by one, so they may be mapped from a file. `origin` and `half` are as of save_model.
    Raises DcrisError where it cannot be written.
    """
    with torch.device("meta"):  # names without memory
        model = ReferringSegmenter(config.model)
    trained = trained_state(model).keys()
    state = {name: value.contiguous() for name, value in tensors.items() if name in trained}
    if half:
        state = _halved(state, model)
    frozen = {name: value.contiguous() for name, value in tensors.items() if name not in trained}
    towers: Towers = {
        name: {"name": part.config.name, "sha256": fingerprint(_part(frozen, name))}
        for name, part in (("vision", model.vision), ("text", model.text))
    }

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, _metadata(towers, origin=origin))
        save_file(frozen, folder / _TOWERS)
        (folder / _CONFIG).write_text(_config_text(config))

    _write(path, fill)


def save_model(
    path: Path,
    model: ReferringSegmenter,
    towers: Towers,
    config: RunConfig,
    *,
    with_towers: bool,
    half: bool = False,
    origin: Origin | None = None,
    card: str | None = None,
) -> None:
    """Write a model to be used, not to be trained on: a directory, which must not exist, or a bundle if `path` is a
    .safetensors file (which brings its towers in any case).

    Args:
        path: where.
        model: on any device.
        towers: as identify_towers names them.
        config: of the run that trained it.
        with_towers: write the frozen towers too.
        half: store what was trained in float16. Batch norm statistics and towers stay float32: the former are few and may be
            large, the latter are known by a fingerprint of exact numbers.
        origin: which published checkpoint it is.
        card: what README.md says of it.

    Raises DcrisError where the directory exists or cannot be written.
    """
    state = _on_cpu(trained_state(model))
    if half:
        state = _halved(state, model)
    metadata = _metadata(towers, origin=origin)
    if path.suffix == _BUNDLE:
        whole = {**state, **_on_cpu(_tower_tensors(model))}
        _guarded(
            path,
            lambda: write_file(path, lambda at: save_file(whole, at, {**metadata, "config": _config_text(config)})),
        )
        return
    if path.exists():
        raise DcrisError(f"{path} exists already; delete it or choose another place")

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, metadata)
        if with_towers:
            save_file(_on_cpu(_tower_tensors(model)), folder / _TOWERS)
        (folder / _CONFIG).write_text(_config_text(config))
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    _write(path, fill)


def _metadata(towers: Towers, step: int = 0, origin: Origin | None = None) -> dict[str, str]:
    metadata = {"format": "dcris-1", "version": __version__, "step": str(step), "towers": json.dumps(towers)}
    return {**metadata, "origin": json.dumps(dict(origin))} if origin else metadata


def _config_text(config: RunConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}


def _halved(state: Mapping[str, Tensor], model: ReferringSegmenter) -> dict[str, Tensor]:
    """Weights in float16; statistics as they are."""
    weights = {name for name, _ in model.named_parameters()}
    return {name: value.half() if name in weights else value for name, value in state.items()}


def _tower_tensors(model: ReferringSegmenter) -> dict[str, Tensor]:
    """The tensors of the towers that are frozen, by their names in the whole model."""
    return {
        f"{name}.{key}": value
        for name, tower in (("vision", model.vision), ("text", model.text))
        for key, value in frozen_state(tower).items()
    }


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    _guarded(path, lambda: write_directory(path, fill))


def _guarded(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except SafetensorError as error:  # safetensors wraps what the disk said
        raise DcrisError(f"cannot write the checkpoint {path}: {error}") from error


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """A run's checkpoints, oldest first. Raises DcrisError where the state of one cannot be read."""
    found = []
    for path, step in _steps(run, ""):
        try:
            found.append(Checkpoint(path, step, _read_state(path, step)["score"]))
        except DcrisError:
            if path.exists():  # else a run that goes on has just deleted it
                raise
    return found


def _steps(run: Path, prefix: str) -> list[tuple[Path, int]]:
    """The directories of a run that are named as checkpoints, and their steps, oldest first."""
    names = re.compile(rf"{prefix}step-(\d{{8,18}})")
    paths = (path for path in (run / "checkpoints").glob(f"{prefix}step-*") if path.is_dir())
    found = [(path, int(match[1])) for path in paths if (match := names.fullmatch(path.name))]
    return sorted(found, key=lambda item: item[1])


def _read_state(path: Path, step: int) -> dict[str, Any]:
    """A checkpoint's state.json. Raises DcrisError where it is missing, damaged or of another step."""
    state = read_json(path / _STATE, "the checkpoint's state")
    if (
        not isinstance(state, dict)
        or type(state.get("step")) is not int
        or state["step"] != step
        or not isinstance(state.setdefault("score", None), int | float | None)
        or not isinstance(state.get("files", {}), dict)
        or ("sha256" in state) != ("files" in state)  # neither is in those from before there were checksums
        or ("sha256" in state and state["sha256"] != _sealed(state)["sha256"])
    ):
        raise DcrisError(f"{path / _STATE} is not the state of a checkpoint; delete {path} to do without it")
    return state


def check_files(path: Path, names: Container[str] = (_MODEL, _OPTIMIZER, _CONFIG)) -> None:
    """Compare files of a checkpoint's directory with the checksums beside them, where there are any.

    Raises DcrisError naming the first that is missing or not as it was written.
    """
    if not (path / _STATE).is_file():
        return
    state = read_json(path / _STATE, "the checkpoint's state")
    step = state.get("step") if isinstance(state, dict) else None
    for name, known in _read_state(path, step if isinstance(step, int) else -1).get("files", {}).items():
        if name in names and _sha256(path / name) != known:
            raise DcrisError(
                f"{path / name} cannot be read as it was written (its checksum is another): it is cut short or changed, so "
                "copy it again or use another checkpoint"
            )


def sound_checkpoints(run: Path, log: Callable[[str], None]) -> list[Checkpoint]:
    """The checkpoints a run can go on from, oldest first, after the traces of a kill were removed; `log` takes a line for each
    that is damaged and was moved aside.

    Every file is read. Raises DcrisError where all are damaged; then none is moved.
    """
    remove_partial(run)
    remove_partial(run / "checkpoints")
    damaged: list[tuple[Path, int, str]] = []
    steps = _steps(run, "")
    for path, step in steps:
        remove_partial(path)
        try:
            if "files" in _read_state(path, step):
                check_files(path)
            else:  # from before there were checksums: what is cut short shows
                load_config(path / _CONFIG)
                for name in (_MODEL, _OPTIMIZER):
                    with _open(path / name):
                        pass
        except DcrisError as error:
            damaged.append((path, step, str(error)))
    if damaged and len(damaged) == len(steps):
        raise DcrisError(
            f"no checkpoint in {run} can be gone on from: {damaged[-1][2]}; bring back a copy, or delete {run} to start again"
        )
    for path, step, complaint in damaged:
        aside = path.with_name(_DAMAGED + path.name)
        remove_directory(aside)
        try:
            path.rename(aside)
        except OSError as error:
            raise DcrisError(f"cannot move {path} aside ({error.strerror or error}); delete it: {complaint}") from error
        log(f"the checkpoint of step {step} is damaged and is left out, moved to {aside}: {complaint}")
    return list_checkpoints(run)


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one with the highest score, the newest of equals; the newest where none has a score."""
    return max(checkpoints, key=lambda item: (item.score is not None, item.score or 0.0, item.step))


def prune_checkpoints(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the best, and damaged ones that were made anew."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        kept = {item.path for item in (*checkpoints[-keep_last:], best_checkpoint(checkpoints))}
        for item in checkpoints:
            if item.path not in kept:
                remove_directory(item.path)
        for path, step in _steps(run, _DAMAGED):
            if step <= checkpoints[-1].step:
                remove_directory(path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory or bundle that `path` means: itself, or the best of the run it is.

    Raises DcrisError where there is none.
    """
    if path.is_file():
        if path.suffix == _BUNDLE:
            return path
        raise DcrisError(
            f"{path} is neither a checkpoint's directory nor a {_BUNDLE} file; a published DETRIS checkpoint (.pth) has to go "
            "through `dcris convert` first"
        )
    if (path / _MODEL).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return best_checkpoint(checkpoints).path
    if not path.exists():
        raise DcrisError(f"there is no checkpoint {path}; give a run's directory, as made by `dcris train --out`")
    raise DcrisError(f"{path} holds no checkpoint: neither {_MODEL} nor checkpoints/step-* is in it")


def load_checkpoint(path: PathLike) -> tuple[ReferringSegmenter, RunConfig]:
    """Build the model of a checkpoint directory, a run or a bundle, towers and all, on the CPU in evaluation mode.

    Raises DcrisError where a file is missing, cut short or of another model, or where the frozen towers are not those that
    the adapters were trained on.
    """
    path = find_checkpoint(as_path(path, "the checkpoint"))
    check_files(path, (_MODEL, _CONFIG))
    config = read_config(path)
    with torch.device("meta"):  # names and shapes without memory
        model = ReferringSegmenter(config.model)
    # A stranger's configuration may ask for any amount of memory: what was trained has to be there in those shapes first.
    copy_strictly(trained_state(model), _read_trained(path, model), str(path))
    model.to_empty(device="cpu")
    beside = path if path.is_file() else path / _TOWERS
    if beside.is_file():
        towers = _tower_tensors(model)
        copy_strictly(towers, _read_tensors(beside, only=towers if path.is_file() else None), str(beside))
    else:
        load_towers(model.vision, model.text, config.model)
    load_trained(model, path)
    return model, config


def load_trained(model: ReferringSegmenter, path: Path) -> None:
    """Copy a checkpoint's adapters and head into a model whose towers are filled. Raises as load_checkpoint does."""
    towers = _require_towers(path, identify_towers(model))
    copy_strictly(trained_state(model), _read_trained(path, model), str(path))
    for name, tower in (("vision", model.vision), ("text", model.text)):
        # The fingerprint has shown that these are the recorded weights, so they come from where the record says.
        tower.source = tower.source or {key: towers[name][key] for key in ("source", "revision") if key in towers[name]}


def load_adapters(path: Path, shared: ReferringSegmenter, towers: Towers) -> tuple[ReferringSegmenter, RunConfig]:
    """A checkpoint's model on the frozen towers of another: only its adapters and head take memory.

    Args:
        path: a checkpoint directory, a run or a bundle; towers in it are not read.
        shared: the model whose towers' tensors become this one's too, on any device.
        towers: what identify_towers says of it.

    Raises DcrisError where a file is missing, cut short or of another model, or where it was trained on other towers.
    """
    path = find_checkpoint(path)
    check_files(path, (_MODEL, _CONFIG))
    config = read_config(path)
    with torch.device("meta"):  # names and shapes without memory
        model = ReferringSegmenter(config.model)
    wanted, there = _tower_tensors(model), _tower_tensors(shared)
    if wanted.keys() < there.keys():  # it trains some of its towers' weights itself, and is known by the others
        there = {name: there[name] for name in wanted}
        towers = {name: {**towers[name], "sha256": fingerprint(_part(there, name))} for name in towers}
    recorded = _require_towers(path, towers)
    copy_strictly(wanted, there, "the tower in memory")  # compares alone: nothing is there
    expected, tensors = trained_state(model), _read_trained(path, model)
    copy_strictly(expected, tensors, str(path))
    device = shared.head.projector.visual.weight.device
    trained = {name: value.to(device, expected[name].dtype) for name, value in tensors.items()}
    model.load_state_dict({**there, **trained}, assign=True)
    for name, tower in (("vision", model.vision), ("text", model.text)):
        tower.source = {key: recorded[name][key] for key in ("source", "revision") if key in recorded[name]}
    return model, config


def read_origin(path: Path) -> Origin:
    """Which published checkpoint this one was converted from; empty where it was trained. Raises DcrisError if unreadable."""
    try:
        return {str(key): str(value) for key, value in parse_json(_read_metadata(path).get("origin", "{}")).items()}
    except (ValueError, AttributeError) as error:
        raise DcrisError(f"{path} does not say where it comes from in a way that can be read") from error


def _require_towers(path: Path, towers: Towers) -> Towers:
    """Check that a checkpoint was trained on these towers, and return what it records of them.

    Raises DcrisError where it was trained on others.
    """
    recorded = _read_towers(path)
    for name, tower in towers.items():
        known = recorded.get(name, {})
        if known.get("sha256") != tower["sha256"]:
            revision = f" of revision {known['revision']}" if "revision" in known else ""
            raise DcrisError(
                f"{path} was trained on another {name} tower than {tower['name']} as found here; its adapters mean nothing "
                f"on these weights, so load the tower it names, {known.get('name')}{revision}, or train again"
            )
    return recorded


def read_config(path: Path) -> RunConfig:
    """The configuration with the Hub's commits that the checkpoint was trained on: "main" may have moved since."""
    if path.is_file():
        try:
            config = parse_config(parse_json(_read_metadata(path)["config"]), str(path))
        except (KeyError, ValueError) as error:
            raise DcrisError(
                f"{path} has no configuration in it, so it is no bundle; if it lies in a checkpoint's directory, give that"
            ) from error
    else:
        config = load_config(path / _CONFIG)
    model, towers = config.model, _read_towers(path)
    for part in ("vision", "text"):
        section, recorded = getattr(model, part), towers.get(part, {})
        commit = recorded.get("revision", "")
        if recorded.get("name") == section.name and re.fullmatch("[0-9a-f]{40,64}", commit):
            pinned = section.model_copy(update={"revision": commit})
            model = model.model_copy(update={part: pinned})
    return config.model_copy(update={"model": model})


def _read_trained(path: Path, model: ReferringSegmenter) -> dict[str, Tensor]:
    """What was trained: all of a directory's model file, and of a bundle what is no tower's."""
    return _read_tensors(path, but=_tower_tensors(model)) if path.is_file() else _read_tensors(path / _MODEL)


def _read_metadata(path: Path) -> dict[str, str]:
    file = path if path.is_file() else path / _MODEL
    with _open(file) as opened:
        return opened.metadata() or {}


def _read_towers(path: Path) -> Towers:
    """Which towers a checkpoint says it was trained on. Raises DcrisError where it does not say."""
    try:
        towers = parse_json(_read_metadata(path)["towers"])
        return {part: {key: str(value) for key, value in entry.items()} for part, entry in towers.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DcrisError(f"{path} does not say which towers it was trained on; it was not written by dcris") from error


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Copy a checkpoint's moments into a fresh optimiser of the same model. Raises DcrisError where they do not fit."""
    tensors = _read_tensors(path / _OPTIMIZER)
    state = optimizer.state_dict()
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        slot, _, key = name.partition(".")
        slots.setdefault(int(slot) if re.fullmatch("[0-9]{1,9}", slot) else -1, {})[key] = value
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


def _read_tensors(path: Path, only: Container[str] | None = None, but: Container[str] = ()) -> dict[str, Tensor]:
    """A safetensors file's tensors: all, or those whose names are in `only` and not in `but`."""
    with _open(path) as file:
        names: list[str] = list(file.keys())  # it is no dict
        return {name: file.get_tensor(name) for name in names if (only is None or name in only) and name not in but}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with open_safetensors(path) as file:
            yield file
    except FileNotFoundError as error:
        raise DcrisError(f"the checkpoint has no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise DcrisError(
            f"{path} cannot be read ({error}); it may be cut short, so copy it again or use another checkpoint"
        ) from error
