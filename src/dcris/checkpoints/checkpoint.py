"""Checkpoints: the trained weights of a model, in a directory that is written atomically.

A run has config.json, data.json (the data it was trained on) and checkpoints/step-00000123/ with

    config.json           configuration of the model and the training
    model.safetensors     adapters, head, their statistics; fingerprints of the frozen towers
    optimizer.safetensors state of the optimiser, for --resume; with train.ema also the trained
                          weights themselves, since model.safetensors then has their averages; in
                          float16 also the loss scale
    state.json            step, score, and checksums of the other files and of itself

A converted or saved checkpoint has the first two files, and optionally

    towers.safetensors    the frozen towers
    calibration.json      temperature of the presence head, from `dcris evaluate --calibrate-on`
    training_images.bin   hashes of the images it was trained on; of a run, they are in the run

Without the first, the towers are loaded by their names. In both cases they must have the recorded
fingerprints, so the file may be deleted to save space if the named weights are available.

A bundle is all of this in one .safetensors file, with the configuration in its metadata.
Checkpoints contain no code.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dcris.checkpoints.backbones import RANDOM, TowerFiles, copy_strictly, fingerprint, frozen_state, load_towers
from dcris.checkpoints.tensor_files import open_safetensors
from dcris.checkpoints.training_images import FILE, Images, images_from_text, images_to_text, pack_images, read_images
from dcris.config import RunConfig, load_config, parse_config
from dcris.data.table import shown
from dcris.errors import DcrisError
from dcris.models.adapters.attach import trained_state
from dcris.models.encoders.text import TextTower
from dcris.models.encoders.vit import VisionTower
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.arguments import PathLike, as_path
from dcris.utils.cache import FileState, file_state, remembered
from dcris.utils.device import allocate, shapes_only
from dcris.utils.files import (
    cannot_write,
    parse_json,
    read_json,
    reading,
    remove_directory,
    remove_partial,
    sha256_of,
    write_directory,
    write_file,
    write_json,
)
from dcris.version import __version__

_MODEL, _OPTIMIZER, _CONFIG, _STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
_TOWERS, CALIBRATION = "towers.safetensors", "calibration.json"
MODEL_FILES = (_MODEL, _CONFIG)
"""Files of a checkpoint that are its model; the others are for --resume."""
_BUNDLE = ".safetensors"
_IMAGES = "training_images"
"""Key of the metadata of a bundle."""
_DAMAGED = "damaged-"
"""Prefix of the directory name of a damaged checkpoint."""
_WEIGHTS = "weights."
"""Prefix of the names of trained weights in the optimiser's file."""
_LOSS_SCALE = "loss_scale."
"""Prefix of the names of the loss scale's state in the optimiser's file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    step: int
    score: float | None
    """Validation score in percent, by the metric `train.best_by`; None if not measured."""


Towers = dict[str, dict[str, str]]
"""The frozen towers by "vision" and "text": "name" of the weights, "sha256", and, if known,
"source" (file) and "revision" (of the Hub)."""

Origin = Mapping[str, str]
"""The published checkpoint that this one was converted from: "name", "source", "revision",
"sha256"; empty if none."""


def identify_towers(model: ReferringSegmenter, files: TowerFiles | None = None) -> Towers:
    """Fingerprint the frozen towers of a model.

    This reads every weight, a second or two for large towers, unless `files` are given from which
    the towers were loaded just now, and it is known what unchanged files give.
    """
    return {
        name: {"name": part.config.name, **part.source, "sha256": _fingerprint_of(part, (files or {}).get(name))}
        for name, part in model.towers.items()
    }


def _fingerprint_of(tower: VisionTower | TextTower, file: FileState | None) -> str:
    frozen = frozen_state(tower)
    if file is None:
        return fingerprint(frozen)
    # The tower's shape and the versions decide how the file is read; torch interpolates positions.
    what = repr((__version__, torch.__version__, tower.config.model_dump_json(), sorted(frozen)))
    return remembered(file, what, lambda: fingerprint(frozen))


def save_checkpoint(
    run: Path,
    model: ReferringSegmenter,
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    step: int,
    averages: Mapping[str, Tensor] | None = None,
    loss_scale: Mapping[str, Tensor] = MappingProxyType({}),
) -> Checkpoint:
    """Write the checkpoint of `step`, still without a score, to a run, atomically.

    `averages` of the trained weights, if given, are what the checkpoint offers for prediction.
    `loss_scale` is the state of dcris.training.loss_scale.

    Raises:
        DcrisError: it cannot be written.
    """
    metadata = _metadata(towers, step)
    state = _on_cpu(trained_state(model))
    slots = optimizer.state_dict()["state"].items()
    moments = _on_cpu({f"{slot}.{key}": value for slot, values in slots for key, value in values.items()})
    moments |= {_LOSS_SCALE + name: value for name, value in loss_scale.items()}
    if averages is not None:
        moments |= {_WEIGHTS + name: value for name, value in state.items()}
        state = _on_cpu(averages)
    path = run / "checkpoints" / f"step-{step:08d}"

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, metadata)
        save_file(moments, folder / _OPTIMIZER)
        (folder / _CONFIG).write_text(_config_text(config))
        files = {name: _sha256(folder / name) for name in (_MODEL, _OPTIMIZER, _CONFIG)}
        (folder / _STATE).write_text(
            json.dumps(_sealed({"step": step, "score": None, "files": files}), indent=2) + "\n"
        )

    with _writing(path):
        write_directory(path, fill)
    return Checkpoint(path, step, None)


def score_checkpoint(checkpoint: Checkpoint, score: float, by: str, split: str | None) -> None:
    """Record the validation score of a checkpoint, its metric, and the split that it is of.

    The weights are not written again.

    Raises:
        DcrisError: the state of the checkpoint cannot be read or written.
    """
    before = _read_state(checkpoint.path, checkpoint.step)
    write_json(checkpoint.path / _STATE, _sealed({**before, "score": score, "by": by, "split": split}))


def refuse_other_split(checkpoints: Iterable[Checkpoint], split: str | None, run: Path) -> None:
    """Check that the checkpoints of a run can be compared with those to come, which are scored on
    `split`; None: on none.

    Raises:
        DcrisError: one was scored on another split.
    """
    for checkpoint in checkpoints:
        if split is None or checkpoint.score is None:
            continue
        state = _read_state(checkpoint.path, checkpoint.step)
        # States had no split before; a run's splits seldom change.
        scored = state["split"] if "split" in state else load_config(checkpoint.path / _CONFIG).data.val_split
        if scored not in (None, split):
            raise DcrisError(
                f"the run in {run} chooses its best checkpoint by scores on the split {shown(scored)}, with which scores "
                f"on {shown(split)} cannot be compared; resume it with --data.val_split {scored} or null, or choose "
                "another --out"
            )


def _sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with its checksum."""
    content = {key: value for key, value in state.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _sha256(path: Path) -> str:
    with reading(path, "copy the checkpoint again or use another one"):
        return sha256_of(path)


def save_whole(
    path: Path, tensors: dict[str, Tensor], config: RunConfig, origin: Origin | None = None, half: bool = False
) -> None:
    """Write the state dict of a whole model as the checkpoint directory `path`, with the towers.

    Tensors are read one by one, so they may be memory-mapped. `origin` and `half` are as in
    save_model.

    Raises:
        DcrisError: it cannot be written.
    """
    with shapes_only():
        model = ReferringSegmenter(config.model)
    trained = trained_state(model).keys()
    state = {name: value.contiguous() for name, value in tensors.items() if name in trained}
    if half:
        state = _halved(state, model)
    frozen = {name: value.contiguous() for name, value in tensors.items() if name not in trained}
    towers: Towers = {
        name: {"name": part.config.name, "sha256": fingerprint(_part(frozen, name))}
        for name, part in model.towers.items()
    }
    _write_model(path, state, _metadata(towers, origin=origin), config, frozen)


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
    images: Images = frozenset(),
) -> None:
    """Write a model for prediction: a checkpoint directory, or a bundle with the towers.

    Args:
        path: a directory, or a .safetensors file for a bundle, that does not exist.
        model: on any device.
        towers: from identify_towers.
        config: configuration of the run that trained the model.
        with_towers: write the frozen towers too.
        half: store the trained weights in float16. Batch norm statistics and towers stay float32:
            statistics may exceed the range of float16, and towers are identified by a fingerprint
            of their exact values.
        origin: the published checkpoint.
        card: content of README.md.
        images: what it was trained on, from `read_training_images`.

    Raises:
        DcrisError: it exists or cannot be written.
    """
    if path.exists():
        raise DcrisError(f"{path} exists already; delete it or choose another path")
    state = _on_cpu(trained_state(model))
    if half:
        state = _halved(state, model)
    metadata = _metadata(towers, origin=origin)
    if path.suffix == _BUNDLE:
        whole = {**state, **_on_cpu(_tower_tensors(model))}
        metadata |= {"config": _config_text(config), **({_IMAGES: images_to_text(images)} if images else {})}
        with _writing(path):
            write_file(path, lambda at: save_file(whole, at, metadata))
    else:
        frozen = _on_cpu(_tower_tensors(model)) if with_towers else None
        _write_model(path, state, metadata, config, frozen, images, card)


def _write_model(
    path: Path,
    state: dict[str, Tensor],
    metadata: dict[str, str],
    config: RunConfig,
    frozen: dict[str, Tensor] | None,
    images: Images = frozenset(),
    card: str | None = None,
) -> None:
    """Write the directory of a model: the trained tensors and, if given, the frozen ones."""

    def fill(folder: Path) -> None:
        save_file(state, folder / _MODEL, metadata)
        if frozen is not None:
            save_file(frozen, folder / _TOWERS)
        (folder / _CONFIG).write_text(_config_text(config))
        if images:
            (folder / FILE).write_bytes(pack_images(images))
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    with _writing(path):
        write_directory(path, fill)


def _metadata(towers: Towers, step: int = 0, origin: Origin | None = None) -> dict[str, str]:
    metadata = {"format": "dcris-1", "version": __version__, "step": str(step), "towers": json.dumps(towers)}
    return {**metadata, "origin": json.dumps(dict(origin))} if origin else metadata


def _config_text(config: RunConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}


def _halved(state: Mapping[str, Tensor], model: ReferringSegmenter) -> dict[str, Tensor]:
    """Convert weights to float16; keep statistics."""
    weights = {name for name, _ in model.named_parameters()}
    return {name: value.half() if name in weights else value for name, value in state.items()}


def _tower_tensors(model: ReferringSegmenter) -> dict[str, Tensor]:
    """The frozen tensors of the towers, by their names in the whole model."""
    return {
        f"{name}.{key}": value for name, tower in model.towers.items() for key, value in frozen_state(tower).items()
    }


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # safetensors wraps OSError
        if f"(os error {errno.ENOSPC})" in str(error):
            raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise DcrisError(f"cannot write the checkpoint {path}: {error}") from error


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, oldest first.

    Raises DcrisError if the state of one cannot be read.
    """
    found = []
    for path, step in _steps(run, ""):
        try:
            found.append(Checkpoint(path, step, _read_state(path, step)["score"]))
        except DcrisError:
            if path.exists():  # a training run may have just deleted it
                raise
    return found


def _steps(run: Path, prefix: str) -> list[tuple[Path, int]]:
    """Return the directories of a run with names of checkpoints, and their steps, oldest first."""
    names = re.compile(rf"{prefix}step-(\d{{8,18}})")
    paths = (path for path in (run / "checkpoints").glob(f"{prefix}step-*") if path.is_dir())
    found = [(path, int(match[1])) for path in paths if (match := names.fullmatch(path.name))]
    return sorted(found, key=lambda item: item[1])


def _read_state(path: Path, step: int | None = None) -> dict[str, Any]:
    """Read state.json of a checkpoint.

    Raises DcrisError if it is missing, damaged or of another step than `step` (None: of any).
    """
    state = read_json(path / _STATE, "the checkpoint's state")
    if (
        not isinstance(state, dict)
        or type(state.get("step")) is not int
        or step not in (None, state["step"])
        or not isinstance(state.setdefault("score", None), int | float | None)
        or not isinstance(state.get("files"), dict)
        or state.get("sha256") != _sealed(state)["sha256"]
    ):
        raise DcrisError(f"{path / _STATE} is not a valid state of a checkpoint; delete {path} to continue without it")
    return state


def check_files(path: Path, names: Container[str] = (*MODEL_FILES, _OPTIMIZER)) -> None:
    """Compare files of a checkpoint directory with the checksums in its state.json.

    Raises:
        DcrisError: a file is missing or has changed; the error names the first one.
    """
    if not (path / _STATE).is_file():  # a converted or saved checkpoint
        return
    for name, known in _read_state(path)["files"].items():
        if name in names and _sha256(path / name) != known:
            raise DcrisError(
                f"{path / name} does not match its checksum: it is cut short or changed, so copy it again or use another "
                "checkpoint"
            )


def sound_checkpoints(run: Path, log: Callable[[str], None]) -> list[Checkpoint]:
    """Return the intact checkpoints of a run, oldest first, and move damaged ones aside.

    Delete unfinished files.

    Every file is read.

    Args:
        run: the directory of the run.
        log: receives a line per damaged checkpoint.

    Raises:
        DcrisError: all checkpoints are damaged; none is moved then.
    """
    remove_partial(run)
    remove_partial(run / "checkpoints")
    damaged: list[tuple[Path, int, str]] = []
    steps = _steps(run, "")
    for path, step in steps:
        remove_partial(path)
        try:
            _read_state(path, step)
            check_files(path)
        except DcrisError as error:
            damaged.append((path, step, str(error)))
    if damaged and len(damaged) == len(steps):
        raise DcrisError(
            f"all checkpoints of {run} are damaged: {damaged[-1][2]}; restore a copy, or delete {run} to start again"
        )
    for path, step, reason in damaged:
        aside = path.with_name(_DAMAGED + path.name)
        remove_directory(aside)
        try:
            path.rename(aside)
        except OSError as error:
            raise DcrisError(f"cannot move {path} aside ({error.strerror or error}); delete it: {reason}") from error
        log(f"the checkpoint of step {step} is damaged and was moved to {aside}: {reason}")
    return list_checkpoints(run)


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Return the checkpoint with the highest score; the newest if several or none have it."""
    return max(checkpoints, key=lambda item: (item.score is not None, item.score or 0.0, item.step))


def prune_checkpoints(run: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best, and replaced damaged ones."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        kept = {item.path for item in (*checkpoints[-keep_last:], best_checkpoint(checkpoints))}
        for item in checkpoints:
            if item.path not in kept:
                remove_directory(item.path)
        for path, step in _steps(run, _DAMAGED):
            if step <= checkpoints[-1].step:
                remove_directory(path)


def is_model(path: Path) -> bool:
    """Whether `find_checkpoint` finds something at `path`."""
    try:
        find_checkpoint(path)
    except (DcrisError, OSError, ValueError):
        return False
    return True


def is_directory_of_model(path: Path) -> bool:
    """Whether the folder `path` is itself a checkpoint or a saved model, and not a run."""
    return (path / _MODEL).is_file()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint directory or bundle at `path`, or the best checkpoint if it is a run.

    Raises:
        DcrisError: there is no checkpoint.
    """
    if path.is_file():
        if path.suffix == _BUNDLE:
            return path
        raise DcrisError(
            f"{path} is neither a checkpoint directory nor a {_BUNDLE} file; convert a published DETRIS checkpoint (.pth) "
            "with `dcris convert` first"
        )
    if is_directory_of_model(path):
        return path
    checkpoints = list_checkpoints(path)
    if checkpoints:
        return best_checkpoint(checkpoints).path
    if not path.exists():
        raise DcrisError(f"there is no checkpoint {path}; give the directory of a run (`dcris train --out`)")
    raise DcrisError(
        f"{path} has no checkpoint: it contains neither {_MODEL} nor checkpoints/step-*; give the directory of a run or a model"
    )


def load_checkpoint(path: PathLike) -> tuple[ReferringSegmenter, RunConfig]:
    """Load the model of a checkpoint directory, a run or a bundle, on the CPU in evaluation mode.

    Raises:
        DcrisError: a file is missing, cut short or of another model, or the frozen towers are not
            those that the adapters were trained on.
    """
    model, config, _ = load_identified(find_checkpoint(as_path(path, "the checkpoint")))
    return model, config


def load_identified(path: Path) -> tuple[ReferringSegmenter, RunConfig, Towers]:
    """Load the model of a checkpoint from `find_checkpoint`, with the record of its towers.

    Raises as load_checkpoint does.
    """
    check_files(path, MODEL_FILES)
    config = read_config(path)
    with shapes_only():
        model = ReferringSegmenter(config.model)
    # A hostile configuration may describe a model of any size, so check the shapes of the trained
    # tensors before allocating.
    copy_strictly(trained_state(model), _read_trained(path, model), str(path))
    tower_file = path if path.is_file() else path / _TOWERS
    if not tower_file.is_file() and RANDOM in (config.model.vision.name, config.model.text.name):
        raise DcrisError(
            f"{path} has no {_TOWERS}, without which the weights of its random encoders are lost; copy the whole folder of a "
            "saved model, or train on encoders with weights: `dcris train` does not store random ones"
        )
    allocate(model)
    if tower_file.is_file():
        files: TowerFiles = dict.fromkeys(("vision", "text"), file_state(tower_file))
        towers = _tower_tensors(model)
        copy_strictly(towers, _read_tensors(tower_file, only=towers if path.is_file() else None), str(tower_file))
    else:
        files = load_towers(model)
    found = load_trained(model, path, files)
    _load_calibration(model, path)
    return model, config, found


def model_files(path: Path) -> list[Path]:
    """Return the files that `load_checkpoint` reads at a path from `find_checkpoint`."""
    names = (_MODEL, _CONFIG, _TOWERS, CALIBRATION)
    return [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]


def store_calibration(path: Path, temperature: float, facts: Mapping[str, str]) -> None:
    """Write the temperature of a presence head beside the weights that it was fitted for.

    It is a file of its own, because the weights have a checksum and training goes on without it.

    Args:
        path: the checkpoint directory, from `find_checkpoint`.
        temperature: divides the logits.
        facts: what it was fitted on, for people.

    Raises:
        DcrisError: it cannot be written, or `path` is a bundle.
    """
    if path.is_file():
        raise DcrisError(f"{path} is a bundle, which cannot be changed; calibrate the checkpoint that it was made of")
    write_json(path / CALIBRATION, {"temperature": temperature, **facts})


def _load_calibration(model: ReferringSegmenter, path: Path) -> None:
    """Set the temperature of the presence head, if the checkpoint directory has one."""
    file = path / CALIBRATION
    if path.is_file() or not file.is_file():
        return
    content = read_json(file, "the calibration of the checkpoint")
    temperature: Any = content.get("temperature") if isinstance(content, dict) else None
    if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3 or model.head.presence is None:
        raise DcrisError(
            f"{file} has no temperature that fits this model; delete it, then calibrate again with "
            "`dcris evaluate --calibrate-on`"
        )
    model.head.presence.temperature.fill_(temperature)


def load_trained(
    model: ReferringSegmenter, path: Path, files: TowerFiles | None = None, *, presence: bool = True
) -> Towers:
    """Copy the trained weights of a checkpoint into a model with loaded towers.

    Args:
        model: with the towers.
        path: the checkpoint.
        files: as for `identify_towers`.
        presence: whether the presence heads of both have to be equal; otherwise the model's is left
            as it is.

    Returns:
        The towers, as `identify_towers`.

    Raises as load_checkpoint does.
    """
    found = identify_towers(model, files)
    target, source = (
        {name: value for name, value in each.items() if presence or not name.startswith("head.presence.")}
        for each in (trained_state(model), _read_trained(path, model))
    )
    copy_strictly(target, source, str(path))  # first: methods that train encoders differ in their frozen weights, too
    towers = _require_towers(path, found)
    for name, tower in model.towers.items():
        # The fingerprints are equal, so the recorded source is also that of these weights.
        tower.source = tower.source or _source(towers[name])
    return {name: {**each, **model.towers[name].source} for name, each in found.items()}


def _source(recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the record of a tower that `tower.source` holds."""
    return {key: recorded[key] for key in ("source", "revision") if key in recorded}


def load_adapters(path: Path, shared: ReferringSegmenter, towers: Towers) -> tuple[ReferringSegmenter, RunConfig]:
    """Load a checkpoint on the frozen towers of another model, which both then share.

    Args:
        path: a checkpoint directory, a run or a bundle; its towers are not read.
        shared: model whose tower tensors are shared, on any device.
        towers: of `shared`, from identify_towers.

    Raises:
        DcrisError: a file is missing, cut short or of another model, or the checkpoint was trained
            on other towers.
    """
    path = find_checkpoint(path)
    check_files(path, MODEL_FILES)
    config = read_config(path)
    with shapes_only():
        model = ReferringSegmenter(config.model)
    needed, present = _tower_tensors(model), _tower_tensors(shared)
    if needed.keys() < present.keys():  # the method trains some tower weights; only the frozen ones identify the towers
        present = {name: present[name] for name in needed}
        towers = {name: {**towers[name], "sha256": fingerprint(_part(present, name))} for name in towers}
    trained_there = trained_state(shared).keys()
    if any(name not in present and name in trained_there for name in needed):
        raise DcrisError(
            f"{path} needs weights of its encoders that the first model has trained; load {path} first, or alone"
        )
    recorded = _require_towers(path, towers)
    copy_strictly(needed, present, "the encoder in memory")  # only compares names and shapes: the targets are on "meta"
    expected, tensors = trained_state(model), _read_trained(path, model)
    copy_strictly(expected, tensors, str(path))
    device = shared.head.projector.visual.weight.device
    trained = {name: value.to(device, expected[name].dtype) for name, value in tensors.items()}
    model.load_state_dict({**present, **trained}, assign=True)
    for name, tower in model.towers.items():
        tower.source = _source(recorded[name])
    _load_calibration(model, path)
    return model, config


def read_origin(path: Path) -> Origin:
    """Read which published checkpoint this one was converted from.

    Raises DcrisError if it is unreadable.
    """
    try:
        return {str(key): str(value) for key, value in parse_json(_read_metadata(path).get("origin", "{}")).items()}
    except (ValueError, AttributeError) as error:
        raise DcrisError(f"the metadata of {path} have an invalid origin; copy the checkpoint again") from error


def read_training_images(path: Path) -> Images:
    """Read which images a checkpoint was trained on, a directory or a bundle; empty if that is
    unknown.

    Raises DcrisError if they are damaged.
    """
    if not path.is_file():
        return read_images(path)
    text = _read_metadata(path).get(_IMAGES)
    return frozenset() if text is None else images_from_text(text, path)


def _require_towers(path: Path, towers: Towers) -> Towers:
    """Check that a checkpoint was trained on these towers, and return its record of them.

    Raises:
        DcrisError: it was trained on others.
    """
    recorded = _read_towers(path)
    for name, tower in towers.items():
        known = recorded.get(name, {})
        if known.get("sha256") != tower["sha256"]:
            revision = f" of revision {known['revision']}" if "revision" in known else ""
            raise DcrisError(
                f"{path} was trained on another {name} encoder than {tower['name']} as found here, and its adapters work only "
                f"with the encoder {known.get('name')}{revision}; load that one or train again"
            )
    return recorded


def read_config(path: Path) -> RunConfig:
    """Read the configuration, with the Hub commits of the towers at training instead of "main"."""
    if path.is_file():
        try:
            config = parse_config(parse_json(_read_metadata(path)["config"]), str(path))
        except (KeyError, ValueError) as error:
            raise DcrisError(
                f"{path} is not a bundle: it has no configuration; give the checkpoint directory if it is a file of one"
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
    """Read the trained tensors of a directory, or of a bundle (all but the towers')."""
    return _read_tensors(path, but=_tower_tensors(model)) if path.is_file() else _read_tensors(path / _MODEL)


def _read_metadata(path: Path) -> dict[str, str]:
    file = path if path.is_file() else path / _MODEL
    with _open(file) as opened:
        return opened.metadata() or {}


def _read_towers(path: Path) -> Towers:
    """Read the record of the towers that a checkpoint was trained on.

    Raises DcrisError if there is none.
    """
    try:
        towers = parse_json(_read_metadata(path)["towers"])
        return {part: {key: str(value) for key, value in entry.items()} for part, entry in towers.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DcrisError(
            f"{path} has no record of its encoders, so it was not written by dcris; use another checkpoint"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, model: ReferringSegmenter, path: Path) -> dict[str, Tensor]:
    """Load the optimiser state of a checkpoint into a new optimiser.

    Returns the state of the loss scale, which only float16 has. If the checkpoint offers averages
    for prediction, the model gets the trained weights themselves.

    Raises DcrisError if it is of another model.
    """
    tensors = _read_tensors(path / _OPTIMIZER)
    weights, loss_scale = (
        {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        for prefix in (_WEIGHTS, _LOSS_SCALE)
    )
    if weights:
        copy_strictly(trained_state(model), weights, str(path / _OPTIMIZER))
    state = optimizer.state_dict()
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        slot, _, key = name.partition(".")
        slots.setdefault(int(slot) if re.fullmatch("[0-9]{1,9}", slot) else -1, {})[key] = value
    wanted = {
        slot: {
            key: torch.Size() if key == "step" else parameter.shape
            for key in group.get("kept", ("step", "exp_avg", "exp_avg_sq"))  # Adam's, or see dcris.training.muon
        }
        for group, numbered in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, slot in zip(group["params"], numbered["params"], strict=True)
    }
    shapes = {slot: {key: value.shape for key, value in values.items()} for slot, values in slots.items()}
    # With a loss scale, all steps so far may have been skipped.
    if not (slots or loss_scale) or any(found != wanted.get(slot) for slot, found in shapes.items()):
        raise DcrisError(
            f"{path / _OPTIMIZER} is of another model; delete {path} to continue from the checkpoint before it"
        )
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    return loss_scale


def _read_tensors(path: Path, only: Container[str] | None = None, but: Container[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file with names in `only` (None: all) and not in `but`."""
    with _open(path) as file:
        names: list[str] = list(file.keys())  # not a dict
        return {name: file.get_tensor(name) for name in names if (only is None or name in only) and name not in but}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with open_safetensors(path) as file:
            yield file
    except FileNotFoundError as error:
        raise DcrisError(f"the checkpoint has no file {path}; copy it again or use another one") from error
    except (SafetensorError, OSError) as error:
        raise DcrisError(
            f"{path} cannot be read ({error}); it may be cut short, so copy it again or use another checkpoint"
        ) from error
