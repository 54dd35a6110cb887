"""Where the frozen towers' weights come from.

A tower's configuration names its weights. "tiny-vision" and "tiny-text" ship in the package; "random" leaves a tower as it was
made, for tests and for measuring speed.
"""

import hashlib
from importlib import resources

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from dcris.config import ModelConfig
from dcris.encoders.clip_text import TextTower
from dcris.encoders.dinov2 import VisionTower
from dcris.errors import DcrisError

RANDOM = "random"
_EMBEDDED = {"tiny-vision": "vision.", "tiny-text": "text."}
_EMBEDDED_FILE = "tiny_towers.safetensors"


def load_towers(vision: VisionTower, text: TextTower, config: ModelConfig) -> None:
    """Fill both towers with the weights their configurations name. Adapters in their slots are left alone.

    Raises DcrisError where the weights cannot be had or do not fit the tower's shape.
    """
    fill_tower(vision, config.vision.name)
    fill_tower(text, config.text.name)


def fill_tower(tower: VisionTower | TextTower, name: str) -> None:
    """Fill one tower with the weights of that name, strictly: every tensor of the right shape, and none left over."""
    if name == RANDOM:
        return
    if name not in _EMBEDDED:
        raise DcrisError(
            f"this version of dcris cannot load the weights {name!r}; it carries {', '.join(_EMBEDDED)} (recipe dcris_tiny)"
        )
    prefix = _EMBEDDED[name]
    stored = load_bytes((resources.files("dcris.assets") / _EMBEDDED_FILE).read_bytes())
    tensors = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    copy_strictly(tower_state(tower), tensors, name)


def tower_state(tower: nn.Module) -> dict[str, Tensor]:
    """A tower's own tensors by name, without those of the adapters in its slots."""
    return {name: value for name, value in tower.state_dict().items() if "_slot." not in name}


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
