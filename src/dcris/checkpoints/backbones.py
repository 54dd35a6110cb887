"""Load the weights of the frozen towers.

The `name` in a tower's configuration selects the weights:

- "dinov2-base", "dinov3-base", "clip-vit-base-patch16" etc. (VISION_TOWERS and TEXT_TOWERS of
  dcris.models.encoders) are downloaded from the Hub, at the configured revision, and cached;
- a path is a file from the Hub, Meta's dinov2_*_reg4_pretrain.pth, OpenAI's ViT-*.pt, or a plain
  state dict of either;
- "tiny-vision" and "tiny-text" are included in the package;
- "random" keeps the initial weights, for tests and speed measurements.
"""

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from dcris.checkpoints.tensor_files import StoredTensor, open_tensors
from dcris.config import TEXT_FAMILIES, VISION_FAMILIES, VisionConfig
from dcris.errors import DcrisError
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.text import TextTower
from dcris.models.encoders.vit import VisionTower, interpolate_positions
from dcris.models.segmentation import MERGED, ReferringSegmenter
from dcris.utils.cache import FileState, file_state
from dcris.utils.hub import fetch
from dcris.utils.wheels import WheelFile

RANDOM = "random"
TowerFiles = dict[str, FileState | None]
"""The file from which the weights of "vision" and "text" were read, as it was before; None if there
is none."""

_EMBEDDED = {"tiny-vision": "vision.", "tiny-text": "text."}
_EMBEDDED_FILE = "tiny_towers.safetensors"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_towers(model: ReferringSegmenter) -> TowerFiles:
    """Load the weights of both towers by their configurations; adapters stay unchanged.

    Returns:
        The files that were read, for `identify_towers`.

    Raises:
        DcrisError: weights cannot be loaded, or do not match the shapes of the tower.
    """
    return {name: fill_tower(each, each.config.name, each.config.revision) for name, each in model.towers.items()}


def fill_tower(tower: VisionTower | TextTower, name: str, revision: str = "main") -> FileState | None:
    """Load the weights of one tower by their name, and record their origin in `tower.source`.

    Weights of the Hub and of packages stay in their files where possible: the tower's tensors are
    memory-mapped, since those files do not change. Files of the user's own are copied.

    Returns:
        The file as it was before; None for weights that are part of the package, or random.

    Raises:
        DcrisError: the weights do not exist, cannot be downloaded or read, or a tensor is missing,
            unexpected or of another shape.
    """
    family = family_of(tower)
    published = family.sources()
    source = published.get(name)
    if name == RANDOM:
        return None
    if name in _EMBEDDED:
        prefix = _EMBEDDED[name]
        stored = load_bytes((resources.files("dcris.assets") / _EMBEDDED_FILE).read_bytes())
        tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        copy_strictly(tower_state(tower), tensors, name)
        return None
    if isinstance(source, WheelFile):
        path = source.find()
        tower.source = {"source": f"{source.distribution} on PyPI", "revision": source.version}
    elif source is not None:
        file = fetch(source, revision, _HUB_FILES)
        path = file.path
        tower.source = {"source": f"{file.repo}/{file.name}", "revision": file.commit}
    elif Path(name).is_file():
        path = Path(name)
        tower.source = {"source": path.name}
    elif name == MERGED:
        raise DcrisError(
            "the weights of merged encoders are in the saved model only, and `dcris train` cannot start from them; to train "
            "further, start from the checkpoint that was merged; to use the model, copy its whole folder"
        )
    else:
        known = ", ".join((*published, *_EMBEDDED))
        raise DcrisError(f"there are no weights {name!r}; give a file or one of {known}")
    state = file_state(path)
    fill_from_file(tower, path, family.key_mappings, mapped=source is not None)
    return state


def family_of(tower: VisionTower | TextTower) -> TowerFamily[Any]:
    """Return the registry entry of a tower's architecture."""
    families = TEXT_FAMILIES if isinstance(tower, TextTower) else VISION_FAMILIES
    family: TowerFamily[Any] = families[tower.config.family]
    return family


def fill_from_file(
    tower: VisionTower | TextTower, path: Path, mappings: Sequence[KeyMapping], *, mapped: bool = False
) -> None:
    """Copy the weights of a published file into a tower, tensor by tensor, to limit the memory.

    Half precision becomes float32. A position table with the configured `published_grid` is
    interpolated to the grid of the tower.

    Args:
        tower: to be filled.
        path: the file.
        mappings: the kinds of file that are known.
        mapped: let tensors that are used as they are stored stay in the file, memory-mapped.

    Raises:
        DcrisError: the file is damaged, or a tensor is missing, unexpected or of another shape; the
            error names the first one, and nothing has been copied then.
    """
    stored = open_tensors(path)
    mapping = next((mapping for mapping in mappings if mapping.marker in stored), None)
    if mapping is None:
        kinds = ", nor ".join(f"{mapping.title} ({mapping.marker})" for mapping in mappings)
        raise DcrisError(f"{path} is neither {kinds}: it has none of these tensors; give another file")
    target = tower_state(tower)
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    grid = tower.config.published_grid if isinstance(tower, VisionTower) else None
    if grid is not None:
        shapes["positions"] = (1 + grid**2, *shapes["positions"][1:])
    plan = {name: mapping.parts(name) for name in target}
    zeros, in_file = tuple(mapping.zeros), {}
    for name, parts in plan.items():
        for part in filter(lambda part: not part.endswith(zeros), parts):
            _check_part(stored, part, _shape_of_part(shapes[name], len(parts), name in mapping.transposed), path)
    used = {part for parts in plan.values() for part in parts}
    for part in stored:
        if part not in used and not part.startswith(mapping.ignored) and not part.endswith(mapping.ignored_endings):
            raise DcrisError(f"{path} has a tensor {part} that this model does not have; it is for another model")
    with torch.no_grad():
        for name, parts in plan.items():
            tensors = [
                torch.zeros(len(target[name]) // len(parts)) if part.endswith(zeros) else stored[part].read()
                for part in parts
            ]
            whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if grid is not None and name == "positions":
                config = tower.config
                assert isinstance(config, VisionConfig)
                (whole,) = interpolate_positions(whole[None], (config.grid, config.grid), config.position_rule)
            whole = whole.T if name in mapping.transposed else whole
            if mapped and whole.dtype == target[name].dtype and whole.is_contiguous():
                in_file[name] = whole
            else:
                target[name].copy_(whole)
    tower.load_state_dict(in_file, strict=False, assign=True)


def _shape_of_part(shape: tuple[int, ...], parts: int, transposed: bool) -> tuple[int, ...]:
    if transposed:
        return shape[::-1]
    return (shape[0] // parts, *shape[1:]) if parts > 1 else shape


def _check_part(stored: dict[str, StoredTensor], part: str, shape: tuple[int, ...], path: Path) -> None:
    if part not in stored:
        raise DcrisError(f"{path} has no tensor {part}; it is for another model or cut short")
    if stored[part].shape != shape:
        shapes = f"{list(stored[part].shape)}, but this model needs {list(shape)}"
        raise DcrisError(f"the tensor {part} of {path} has the shape {shapes}; it is for another model")
    if not stored[part].floating:
        raise DcrisError(f"the tensor {part} of {path} has integer values; quantised weights are not supported")


def is_downloadable(tower: VisionTower | TextTower) -> bool:
    """Whether others can load this tower by its name: from the package or from the Hub."""
    return tower.config.name in _EMBEDDED or "revision" in tower.source


def tower_state(tower: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a tower by name, without those of adapters in its slots."""
    return {name: value for name, value in tower.state_dict().items() if "_slot." not in name}


def frozen_state(tower: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a tower that are not trained.

    Checkpoints identify the tower by them.
    """
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in tower_state(tower).items() if name not in trained}


def copy_strictly(target: dict[str, Tensor], source: dict[str, Tensor], where: str) -> None:
    """Copy each tensor of `source` to the tensor of the same name in `target`.

    Raises:
        DcrisError: a tensor is missing, unexpected, of another shape, or has integers or complex
            numbers in place of others; the error names the first one, and nothing has been copied
            then.
    """
    for name, value in target.items():
        if name not in source:
            raise DcrisError(f"{where} has no tensor {name}; it is for another model or cut short")
        if source[name].shape != value.shape:
            shapes = f"{list(source[name].shape)}, but this model needs {list(value.shape)}"
            raise DcrisError(f"the tensor {name} of {where} has the shape {shapes}; it is for another model")
        if source[name].is_floating_point() != value.is_floating_point():
            kinds = f"{_kind(source[name])} values, but this model needs {_kind(value)}"
            raise DcrisError(f"the tensor {name} of {where} has {kinds}; quantised weights are not supported")
    for name in source:
        if name not in target:
            raise DcrisError(f"{where} has a tensor {name} that this model does not have; it is for another model")
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values, whatever the file format is."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
