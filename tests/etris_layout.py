"""Random weights in the layout of the published ETRIS code, equal on every machine, and inputs.

tests/golden/make_etris.py fills the published classes with them; test_etris.py fills ours, without
the published code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcris.checkpoints.convert_detris import published_name
from dcris.config import RunConfig
from dcris.data.tokenizer import get_tokenizer
from dcris.models.encoders.clip_text import OPENAI_CLIP
from dcris.models.encoders.clip_vision import OPENAI_CLIP_VISION
from dcris.models.encoders.text import TextState
from dcris.models.encoders.vit import interpolate_positions
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.utils.device import shapes_only
from detris_layout import PHRASES, value_of

GRID = 14
"""Side of the position table in CLIP's file."""
POSITIONS = "backbone.visual.positional_embedding"

_BRIDGE = {
    "zoom_in": "zoom_in.{}",
    "zoom_out": "zoom_out.{}",
    "down": "linear1.{}",
    "up": "linear2.{}",
    "see": "fusion_v.{}.multihead_attn",
    "read": "fusion_t.{}.multihead_attn",
}
_STAGES = 3


@dataclass(frozen=True)
class Variant:
    """The published model, or the same on a narrower vision tower for a quick test."""

    width: int
    image_size: int
    double: bool
    """Compared in float64; see detris_layout."""
    bias: float
    """The very last bias, chosen so that the masks are neither empty nor full."""


VARIANTS = {"small": Variant(128, 80, True, 0.5), "base": Variant(768, 416, False, 0.5)}


def config_of(variant: Variant) -> RunConfig:
    """Return the recipe with the variant's tower and input."""
    config = get_recipe("etris_vit_b")
    vision = {"width": variant.width, "heads": variant.width // 64, "grid": variant.image_size // 16}
    model = config.model.model_copy(update={"vision": config.model.vision.model_copy(update=vision)})
    data = config.data.model_copy(update={"image_size": variant.image_size})
    return config.model_copy(update={"model": model, "data": data})


def theirs(name: str) -> str:
    """Return the published name of our tensor."""
    part, _, rest = name.partition(".")
    if part == "head":
        return published_name(name)
    if part == "text":
        return "backbone." + OPENAI_CLIP.parts(rest)[0]
    if part == "vision":
        return "backbone." + OPENAI_CLIP_VISION.parts(rest)[0]
    _, stage, piece, rest = rest.split(".", 3)  # stages.0.zoom_in.0.weight
    if piece.startswith("norm_"):  # there is none in the first stage
        return f"bridger.ln_{piece.removeprefix('norm_')[0]}.{int(stage) - 1}.{rest}"
    rest = re.sub("^in_", "in_proj_", re.sub(r"^out\.", "out_proj.", rest)) if piece in ("see", "read") else rest
    return f"bridger.{_BRIDGE[piece].format(stage)}.{rest}"


def inputs(variant: Variant) -> tuple[Tensor, Tensor]:
    """Return two images of noise and their tokens."""
    size = variant.image_size
    images = value_of("images", (2, 3, size, size), 0.0) * (3 * size * size) ** 0.5
    return images, get_tokenizer("clip")(PHRASES, 17)


def thinned(levels: Sequence[Tensor], words: Tensor, sentence: Tensor) -> dict[str, Tensor]:
    """Return a sample of the head's inputs: every eighth channel, and four pixels of each map."""
    some = [level.flatten(2)[:, :: level.shape[1] // 64, :: level[0, 0].numel() // 4][:, :64, :4] for level in levels]
    return {"levels": torch.stack(some), "words": words[:, :, ::8].contiguous(), "sentence": sentence}


@torch.no_grad()
def on_the_way(model: ReferringSegmenter, images: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return a sample of the head's inputs in an interleaved model, and the logits."""
    state, words = model.encode_images(images), model.encode_text(tokens)
    assert model.bridge is not None
    assert isinstance(words, TextState)
    fused = model.bridge.fuse(model.vision, model.text, state, words, model.config.head.feature_layers)
    joined, text = fused.state, fused.text
    levels = [joined.patches(each) for each in (*joined.layer_outputs, model.vision.finish(joined))]
    return thinned(levels, text.tokens, text.sentence), model.segment(state, words).logits


def transposed(name: str) -> bool:
    """Return whether the published tensor belongs to a transposed convolution."""
    kind, _, stage = name.removeprefix("bridger.").removesuffix(".0.weight").partition(".")
    last = stage == str(_STAGES - 1)
    in_bridge = (kind == "zoom_in" and last) or (kind == "zoom_out" and stage.isdigit() and not last)
    return in_bridge or name == "neck.f5_proj.0.weight"


def layout(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the published state dict, with positions resized to the
    input's grid.
    """
    with shapes_only():
        ours = ReferringSegmenter(config_of(variant).model).state_dict()
    shapes = {}
    for name, value in ours.items():
        shape = tuple(value.shape)
        shapes[theirs(name)] = (shape[1], shape[0], *shape[2:]) if transposed(theirs(name)) else shape
    return shapes


def weights(variant: Variant) -> dict[str, Tensor]:
    """Return a value for every tensor of the published state dict, with positions as in CLIP's
    file.
    """
    shapes = layout(variant) | {POSITIONS: (1 + GRID**2, variant.width)}
    return {name: value_of(name, shape, variant.bias) for name, shape in shapes.items()}


def ours(variant: Variant) -> dict[str, Tensor]:
    """Return the same by our names."""
    config = config_of(variant).model
    state = weights(variant)
    grid = config.vision.grid
    state[POSITIONS] = interpolate_positions(state[POSITIONS][None], (grid, grid), config.vision.position_rule)[0]
    with shapes_only():
        names = list(ReferringSegmenter(config).state_dict())
    return {
        name: state[theirs(name)].transpose(0, 1).contiguous() if transposed(theirs(name)) else state[theirs(name)]
        for name in names
    }
