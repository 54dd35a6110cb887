"""Where the frozen towers' weights come from, and how they are filled: strictly.

A tower's configuration names its weights:
- "dinov2-base", "dinov3-base", "clip-vit-base-patch16" and so on (VISION_TOWERS and TEXT_TOWERS of dcris.models.encoders) are fetched from the
  Hub, at the revision beside the name, and cached;
- the path of a file: what the Hub has, Meta's dinov2_*_reg4_pretrain.pth, OpenAI's ViT-*.pt, a plain state dict of either;
- "tiny-vision" and "tiny-text" ship in the package;
- "random" leaves a tower as it was made, for tests and for measuring speed.
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
from dcris.config import TEXT_FAMILIES, VISION_FAMILIES, ModelConfig, VisionConfig
from dcris.errors import DcrisError
from dcris.models.encoders.registry import KeyMapping, TowerFamily
from dcris.models.encoders.text import TextTower
from dcris.models.encoders.vit import VisionTower, interpolate_positions
from dcris.utils.hub import fetch

RANDOM = "random"
_EMBEDDED = {"tiny-vision": "vision.", "tiny-text": "text."}
_EMBEDDED_FILE = "tiny_towers.safetensors"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_towers(vision: VisionTower, text: TextTower, config: ModelConfig) -> None:
    """Fill both towers with the weights their configurations name. Adapters in their slots are left alone.

    Raises DcrisError where the weights cannot be had or do not fit the tower's shape.
    """
    fill_tower(vision, config.vision.name, config.vision.revision)
    fill_tower(text, config.text.name, config.text.revision)


def fill_tower(tower: VisionTower | TextTower, name: str, revision: str = "main") -> None:
    """Fill one tower with the weights of that name, strictly, and note on it where they came from (`tower.source`).

    Raises DcrisError where there are no such weights, where they cannot be fetched or read, and where a tensor is missing,
    left over or of another shape.
    """
    family = family_of(tower)
    published = family.repositories()
    if name == RANDOM:
        return
    if name in _EMBEDDED:
        prefix = _EMBEDDED[name]
        stored = load_bytes((resources.files("dcris.assets") / _EMBEDDED_FILE).read_bytes())
        tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        copy_strictly(tower_state(tower), tensors, name)
    elif name in published:
        file = fetch(published[name], revision, _HUB_FILES)
        fill_from_file(tower, file.path, family.key_mappings)
        tower.source = {"source": f"{file.repo}/{file.name}", "revision": file.commit}
    elif Path(name).is_file():
        fill_from_file(tower, Path(name), family.key_mappings)
        tower.source = {"source": Path(name).name}
    else:
        known = ", ".join((*published, *_EMBEDDED))
        raise DcrisError(f"there are no weights {name!r}: it is neither a file nor one of {known}")


def family_of(tower: VisionTower | TextTower) -> TowerFamily[Any]:
    """Return the registry's entry of a tower's architecture."""
    families = TEXT_FAMILIES if isinstance(tower, TextTower) else VISION_FAMILIES
    family: TowerFamily[Any] = families[tower.config.family]
    return family


def fill_from_file(tower: VisionTower | TextTower, path: Path, mappings: Sequence[KeyMapping]) -> None:
    """Copy a published file into a tower, one tensor at a time, so that no second copy of all is ever in memory.

    Numbers of half precision become float32, and a position table that the configuration says is of another grid is brought to
    the tower's. Raises DcrisError, before anything is copied, naming the first tensor that is
    missing, of another shape, or that nothing here has a place for; and where the file is damaged.
    """
    stored = open_tensors(path)
    mapping = next((mapping for mapping in mappings if mapping.marker in stored), None)
    if mapping is None:
        kinds = ", nor ".join(f"{mapping.title} ({mapping.marker})" for mapping in mappings)
        raise DcrisError(f"{path} is neither {kinds}: none of these tensors is in it")
    target = tower_state(tower)
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    grid = tower.config.published_grid if isinstance(tower, VisionTower) else None
    if grid is not None:
        shapes["positions"] = (1 + grid**2, *shapes["positions"][1:])
    plan = {name: mapping.parts(name) for name in target}
    zeros = tuple(mapping.zeros)
    for name, parts in plan.items():
        for part in filter(lambda part: not part.endswith(zeros), parts):
            _check_part(stored, part, _shape_of_part(shapes[name], len(parts), name in mapping.transposed), path)
    used = {part for parts in plan.values() for part in parts}
    for part in stored:
        if part not in used and not part.startswith(mapping.ignored):
            raise DcrisError(f"{path} has a tensor {part} that this model has no place for; it is for another model")
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
            target[name].copy_(whole.T if name in mapping.transposed else whole)


def _shape_of_part(shape: tuple[int, ...], parts: int, transposed: bool) -> tuple[int, ...]:
    if transposed:
        return shape[::-1]
    return (shape[0] // parts, *shape[1:]) if parts > 1 else shape


def _check_part(stored: dict[str, StoredTensor], part: str, shape: tuple[int, ...], path: Path) -> None:
    if part not in stored:
        raise DcrisError(f"{path} has no tensor {part}; it is not for this model, or is cut short")
    if stored[part].shape != shape:
        shapes = f"{list(stored[part].shape)}, while this model needs {list(shape)}"
        raise DcrisError(f"the tensor {part} of {path} has the shape {shapes}; it is for another model")
    if not stored[part].floating:
        raise DcrisError(f"the tensor {part} of {path} holds whole numbers; quantised weights cannot be loaded")


def can_be_had(tower: VisionTower | TextTower) -> bool:
    """Whether anybody can fill this tower by its name: its weights are in the package or came from the Hub."""
    return tower.config.name in _EMBEDDED or "revision" in tower.source


def tower_state(tower: nn.Module) -> dict[str, Tensor]:
    """A tower's own tensors by name, without those of the adapters in its slots."""
    return {name: value for name, value in tower.state_dict().items() if "_slot." not in name}


def frozen_state(tower: nn.Module) -> dict[str, Tensor]:
    """Those of a tower's own tensors that are not trained. They are what a checkpoint knows the tower by."""
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in tower_state(tower).items() if name not in trained}


def copy_strictly(target: dict[str, Tensor], source: dict[str, Tensor], where: str) -> None:
    """Copy every tensor of `source` over its namesake in `target`.

    Raises DcrisError naming the first that is missing, left over, or of another shape; nothing has then been copied.
    """
    for name, value in target.items():
        if name not in source:
            raise DcrisError(f"{where} has no tensor {name}; it is not for this model, or is cut short")
        if source[name].shape != value.shape:
            shapes = f"{list(source[name].shape)}, while this model needs {list(value.shape)}"
            raise DcrisError(f"the tensor {name} of {where} has the shape {shapes}")
    for name in source:
        if name not in target:
            raise DcrisError(f"{where} has a tensor {name} that this model has no place for")
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values in float32, so that it does not depend on a file's layout or precision."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
