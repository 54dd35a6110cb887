"""Random weights in the layout of the published BarLeRIa code, equal on every machine.

tests/golden/make_barleria.py fills the published classes with them; test_barleria.py fills ours,
without the published code. Towers, head and inputs are those of tests/etris_layout.py.
"""

import torch
from torch import Tensor

import etris_layout
from dcris.config import RunConfig
from dcris.models.adapters.barleria import BarleriaConfig
from dcris.models.encoders.vit import interpolate_positions
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import shapes_only
from detris_layout import value_of
from etris_layout import GRID, POSITIONS, Variant

VARIANT = Variant(width=128, image_size=80, double=True, bias=-1.5)

_BRIDGE = {
    "words_in": "intertwiner.proj",
    "out": "side_linear",
    "side.patch_embed": "side_adapter_network.vit_model.patch_embed.proj",
    "side.positions": "side_adapter_network.vit_model.pos_embed",
    "side.queries": "side_adapter_network.query_embed",
    "side.query_positions": "side_adapter_network.query_pos_embed",
    "side.words_in": "side_adapter_network.proj",
}
_FLOW = {"shift": "affine_transform.mu", "log_scale": "affine_transform.logsigma"}
_PLANAR = {"weights": "weight", "biases": "bias", "scales": "scale"}


def config_of(variant: Variant) -> RunConfig:
    """Return the published configuration on a narrower vision tower of CLIP."""
    config = etris_layout.config_of(variant)
    method = BarleriaConfig(positions=True, grid=config.model.vision.grid)
    return config.model_copy(update={"model": config.model.model_copy(update={"method": method})})


def theirs(name: str, length: int) -> list[str]:
    """Return the published names of our tensor; several where ours stacks `length` of them."""
    if "_slot." in name:
        block, _, rest = name.partition("_slot.")
        flow = "flow" if block.endswith("attention") else "flow2"
        number = block.split(".")[2]
        half = "visual." if name.startswith("vision.") else ""
        at = f"backbone.{half}transformer.resblocks.{number}.{flow}"
        if rest in _FLOW:
            return [f"{at}.{_FLOW[rest]}"]
        return [f"{at}.transforms.{k}.{_PLANAR[rest]}" for k in range(length)]
    if not name.startswith("bridge."):
        return [etris_layout.theirs(name)]
    rest = name.removeprefix("bridge.")
    for ours, other in _BRIDGE.items():
        if rest == ours or rest.startswith(f"{ours}."):
            return [other + rest.removeprefix(ours)]
    _, kind, number, rest = rest.split(".", 3)
    if kind in ("fuse_norms", "fuse"):
        return [f"side_adapter_network.fusion_layers.layer_{number}.input_proj.{int(kind == 'fuse')}.{rest}"]
    if kind == "blocks":
        rest = rest if rest.startswith(("norm", "mlp")) else f"attn.{rest}"
        return [f"side_adapter_network.vit_model.blocks.{number}.{rest}"]
    part = "linear2" if rest.startswith("feed.") else "linear"
    return [f"side_adapter_network.vit_model.decoders.{number}.{part}.weight"]


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a value for every tensor of a published state dict of these shapes, with positions as
    in CLIP's file.
    """
    state = {}
    for name, shape in shapes.items():
        value = value_of(name, (1 + GRID**2, *shape[1:]) if name == POSITIONS else shape, VARIANT.bias)
        if ".flow" in name:
            value *= 0.3  # away from where they start, but not so far that 48 of them in a row blow up
        if name.startswith("side_adapter_network.proj."):
            value *= 0.3  # the feedback grows with its square
        state[name] = value
    return state


def ours(variant: Variant) -> dict[str, Tensor]:
    """Return the same by our names."""
    config = config_of(variant).model
    method = config.method
    assert isinstance(method, BarleriaConfig)
    with shapes_only():
        wanted = ReferringSegmenter(config).state_dict()
    state = {}
    for name, like in wanted.items():
        shape = tuple(like.shape)
        parts = theirs(name, method.flow_length)
        if len(parts) > 1:
            each = (1, *shape[1:])
            state[name] = torch.cat([weights({part: each})[part] for part in parts])
            continue
        (part,) = parts
        if etris_layout.transposed(part):
            shape = (shape[1], shape[0], *shape[2:])
        elif part.endswith("input_proj.1.weight"):
            shape = (*shape, 1, 1)
        elif part.endswith(("pos_embed", "query_embed")):
            shape = (1, *shape)
        value = weights({part: shape})[part]
        if part == POSITIONS:
            grid = config.vision.grid
            (value,) = interpolate_positions(value[None], (grid, grid), config.vision.position_rule)
        if etris_layout.transposed(part):
            value = value.transpose(0, 1).contiguous()
        state[name] = value.reshape(like.shape)
    return state
