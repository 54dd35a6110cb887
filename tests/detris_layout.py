"""Random weights in the layout of the published DETRIS checkpoints, equal on every machine, and
inputs.

tests/golden/make_detris.py fills the published classes with them; test_detris.py fills ours,
without the published code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcris.config import RunConfig, VisionConfig
from dcris.recipes import get_recipe

TEXT, HEAD = 512, 512
PHRASES = ["left slice", "the third person from the right, who wears a dark blue coat and holds a very long umbrella"]
PHOTOGRAPH = (48, 72)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Variant:
    """What distinguishes the published models, and the input for the comparison."""

    width: int
    depth: int
    image_size: int
    visual_layers: tuple[int, ...]
    visual_width: int = 128
    text_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    text_width: int = 64
    word_length: int = 17
    double: bool = False
    """Compared in float64. In float32 rounding alone moves the gradients that nearly cancel by more
    than a per mille."""
    bias: float = 0.0
    """The very last bias, chosen so that the masks are neither empty nor full."""

    @property
    def feature_layers(self) -> tuple[int, int]:
        return (8, 16) if self.depth == 24 else (4, 8)


VARIANTS = {
    # Nothing of this size was published; it is the base model on DINOv2's small tower, for a test
    # that is quick.
    "small": Variant(384, 12, 112, (1, 3, 5, 7, 9, 11), word_length=22, double=True, bias=0.96),
    "base": Variant(768, 12, 448, (1, 3, 5, 7, 9, 11), bias=0.46),
    "large": Variant(1024, 24, 224, (2, 6, 10, 14, 18, 22), bias=1.49),
    "mixed": Variant(1024, 24, 112, tuple(range(1, 24)), 384, tuple(range(1, 12)), 384),
}
COMPARED = ("small", "base", "large")
STARTED = ("small", "base")
"""Those whose initial weights are compared."""

STEPS, LEARNING_RATE = 5, 1e-4
SAMPLED = 32
"""Numbers of each tensor that stand for all of it."""


RECIPES = {"base": get_recipe("detris_b"), "large": get_recipe("detris_l"), "mixed": get_recipe("detris_l_mixed")}


def config_of(name: str) -> RunConfig:
    """Return the recipe's configuration with the variant's input; "small" is the base model on a
    smaller tower.
    """
    variant = VARIANTS[name]
    config = RECIPES[name.replace("small", "base")]
    if name == "small":
        vision = VisionConfig(name="dinov2-small", width=384, heads=6)
        config = config.model_copy(update={"model": config.model.model_copy(update={"vision": vision})})
    data = {"image_size": variant.image_size, "word_length": variant.word_length}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def layout(variant: Variant) -> Shapes:
    """Return the shape of every tensor of the state dict, by name."""
    shapes: Shapes = {}
    d = variant.width

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def affine(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def batch_norm(name: str, width: int) -> None:
        affine(name, width)
        shapes[f"{name}.running_mean"], shapes[f"{name}.running_var"] = (width,), (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def attention(name: str, width: int) -> None:
        shapes[f"{name}.in_proj_weight"], shapes[f"{name}.in_proj_bias"] = (3 * width, width), (3 * width,)
        linear(f"{name}.out_proj", width, width)

    def adapter(name: str, width: int, r: int, dimensions: int) -> None:
        units = {
            "1": (r, r // 2, 1),
            "2.0": (r + r // 2, r // 16, 1),
            "2.1": (r // 16, r // 4, 3),
            "3.0": (r + r // 2 + r // 4, r // 16, 1),
            "3.1": (r // 16, r // 4, 5),
        }
        for branch, (inputs, outputs, kernel) in units.items():
            shapes[f"{name}.dense_branch{branch}.conv.weight"] = (outputs, inputs) + (kernel,) * dimensions
            shapes[f"{name}.dense_branch{branch}.conv.bias"] = (outputs,)
            batch_norm(f"{name}.dense_branch{branch}.bn", outputs)
        linear(f"{name}.D_fc1", width, r)
        linear(f"{name}.D_fc2", r, width)

    shapes["txt_backbone.positional_embedding"] = (77, TEXT)
    shapes["txt_backbone.text_projection"] = (TEXT, TEXT)
    shapes["txt_backbone.logit_scale"] = ()
    shapes["txt_backbone.token_embedding.weight"] = (49408, TEXT)
    affine("txt_backbone.ln_final", TEXT)
    for layer in range(12):
        block = f"txt_backbone.transformer.resblocks.{layer}"
        attention(f"{block}.attn", TEXT)
        affine(f"{block}.ln_1", TEXT)
        affine(f"{block}.ln_2", TEXT)
        linear(f"{block}.mlp.c_fc", TEXT, 4 * TEXT)
        linear(f"{block}.mlp.c_proj", 4 * TEXT, TEXT)
        if layer in variant.text_layers:
            adapter(f"{block}.adapter", TEXT, variant.text_width, 1)

    shapes["dinov2.cls_token"] = (1, 1, d)
    shapes["dinov2.pos_embed"] = (1, 1 + 37 * 37, d)
    shapes["dinov2.register_tokens"] = (1, 4, d)
    shapes["dinov2.mask_token"] = (1, d)
    shapes["dinov2.patch_embed.proj.weight"], shapes["dinov2.patch_embed.proj.bias"] = (d, 3, 14, 14), (d,)
    affine("dinov2.norm", d)
    for layer in range(variant.depth):
        block = f"dinov2.blocks.{layer}"
        affine(f"{block}.norm1", d)
        affine(f"{block}.norm2", d)
        linear(f"{block}.attn.qkv", d, 3 * d)
        linear(f"{block}.attn.proj", d, d)
        linear(f"{block}.mlp.fc1", d, 4 * d)
        linear(f"{block}.mlp.fc2", 4 * d, d)
        shapes[f"{block}.ls1.gamma"] = shapes[f"{block}.ls2.gamma"] = (d,)
        if layer in variant.visual_layers:
            r = variant.visual_width
            adapter(f"{block}.adapter", d, r, 2)
            attention(f"{block}.adapter.cross.multihead_attn", 128)
            linear(f"{block}.adapter.cross.image_proj", r, 128)
            linear(f"{block}.adapter.cross.text_proj", TEXT, 128)
            linear(f"{block}.adapter.cross.back_proj", 128, r)

    for level in (3, 4, 5):
        attention(f"neck.fusion{level}.multihead_attn", HEAD)
        # The last is a transposed convolution, whose inputs come first.
        shapes[f"neck.f{level}_proj.0.weight"] = (d, HEAD, 1, 1) if level == 5 else (HEAD, d, 1, 1)
        batch_norm(f"neck.f{level}_proj.1", HEAD)
    linear("neck.txt_proj", TEXT, HEAD)
    for name, inputs, kernel in (("aggr", 3 * HEAD, 1), ("coordconv.0.conv1", HEAD + 2, 3), ("coordconv.1", HEAD, 3)):
        shapes[f"neck.{name}.0.weight"] = (HEAD, inputs, kernel, kernel)
        batch_norm(f"neck.{name}.1", HEAD)
    for layer in range(3):
        at = f"decoder.layers.{layer}"
        attention(f"{at}.self_attn", HEAD)
        attention(f"{at}.multihead_attn", HEAD)
        for norm in ("self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn.3"):
            affine(f"{at}.{norm}", HEAD)
        linear(f"{at}.ffn.0", HEAD, HEAD)
        linear(f"{at}.ffn.4", HEAD, HEAD)
    affine("decoder.norm", HEAD)
    for place, outputs in ((1, HEAD), (3, HEAD // 2)):
        shapes[f"proj.vis.{place}.0.weight"] = (outputs, HEAD, 3, 3)
        batch_norm(f"proj.vis.{place}.1", outputs)
    shapes["proj.vis.4.weight"], shapes["proj.vis.4.bias"] = (HEAD // 2, HEAD // 2, 1, 1), (HEAD // 2,)
    linear("proj.txt", TEXT, HEAD // 2 * 9 + 1)
    return shapes


def _noise(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return evenly distributed numbers of mean 0 and variance 1, seeded by the name.

    They come from the bit generator's own stream, which NumPy keeps stable; its distributions may
    change.
    """
    count = int(np.prod(shape))
    bits = np.random.PCG64(crc32(name.encode())).random_raw((count + 1) // 2).view(np.uint32)[:count]
    return (bits.astype(np.float32) * np.float32(3**0.5 / 2**31) - np.float32(3**0.5)).reshape(shape)


def value_of(name: str, shape: tuple[int, ...], bias: float) -> Tensor:
    """Return ordinary numbers for a tensor by its published name, instead of a new network's zeros
    and ones.

    `bias` is the very last bias of the head.
    """
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    noise = _noise(name, shape)
    if name.endswith(("cls_token", "class_embedding", "register_tokens", "pos_embed", "positional_embedding")):
        noise *= 0.5
    elif len(shape) >= 2:
        noise *= (noise.size / shape[0]) ** -0.5
        if name.startswith("proj.txt"):  # its outputs weigh 2304 numbers
            noise *= 0.05
    elif name.endswith("running_mean"):
        noise *= 0.2
    elif name.endswith("running_var"):
        noise = 0.5 + np.abs(noise)
    elif name.endswith("weight"):
        noise = 1 + 0.2 * noise
    elif name.endswith("gamma"):  # well below 1, as trained
        noise = 0.2 + 0.05 * noise
    else:
        noise *= 0.1
    if name == "proj.txt.bias":
        noise[-1] = bias
    return torch.from_numpy(np.asarray(noise, np.float32))


def weights(variant: Variant) -> dict[str, Tensor]:
    """Return a value for every tensor."""
    return {name: value_of(name, shape, variant.bias) for name, shape in layout(variant).items()}


def sums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the sum [n] of each tensor, by name in alphabetical order."""
    return torch.stack([tensors[name].double().sum() for name in sorted(tensors)])


def norms(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the norm [n] of each tensor, by name in alphabetical order."""
    return torch.stack([tensors[name].double().norm() for name in sorted(tensors)])


def describe_start(trained: Mapping[str, Tensor]) -> Tensor:
    """Return mean, deviation and largest magnitude [n, 3] of each tensor, by name in alphabetical
    order.
    """
    rows = [(each.mean(), each.std(correction=0), each.abs().max()) for _, each in sorted(trained.items())]
    return torch.tensor(rows, dtype=torch.float64)


def adapter_inputs(variant: Variant) -> tuple[Tensor, Tensor]:
    """Return inputs of a visual adapter with the statistics of layer norms: tokens [2, 5 + 64, D]
    and text [2, L, T], float64.
    """
    shapes = ((2, 5 + 64, variant.width), (2, variant.word_length, TEXT))
    normed, text = (torch.from_numpy(_noise(f"adapter input {shape}", shape)).double() for shape in shapes)
    return normed, text


def root_mean_squares(added: Tensor) -> Tensor:
    """Return the RMS [2] of an adapter's output [B, P, D], over class and register tokens and over
    patches.
    """
    return torch.stack([part.detach().square().mean().sqrt() for part in (added[:, :5], added[:, 5:])])


def sampled(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return evenly spaced numbers [n, SAMPLED] of each tensor, by name in alphabetical order;
    those of small tensors are repeated.
    """
    rows = [tensors[name].flatten() for name in sorted(tensors)]
    return torch.stack([row[torch.linspace(0, len(row) - 1, SAMPLED).long()] for row in rows])


def gradients_of(model: nn.Module, named: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Return the gradient of every trained weight by its published name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradients[named(name)] = parameter.grad
    return gradients


def assert_norms(gradients: Mapping[str, Tensor], expected: Tensor, rel: float, floor: float) -> None:
    """Compare the norms [n] of gradients, as from `norms`: within `rel` of each, or `floor` of all
    together.
    """
    floor *= expected.norm().item()
    for name, norm, theirs in zip(sorted(gradients), norms(gradients).tolist(), expected.tolist(), strict=True):
        assert abs(norm - theirs) <= max(rel * theirs, floor), f"{name}: {norm}, not {theirs}"


def photograph() -> NDArray[np.uint8]:
    """Return noise [H, W, 3], since batch norm amplifies rounding errors in a flat image."""
    return (_noise("photograph", (*PHOTOGRAPH, 3)) * 60 + 128).astype(np.uint8)


def masks(size: int) -> Tensor:
    """Return masks [2, 1, size, size]: a rectangle for each expression."""
    both = torch.zeros(2, 1, size, size)
    both[0, 0, size // 4 : size // 2, size // 8 : size // 2] = 1
    both[1, 0, size // 3 :, size // 2 :] = 1
    return both
