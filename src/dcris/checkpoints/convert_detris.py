"""Convert published DETRIS checkpoints to dcris's format.

DETRIS (Huang et al. 2025) is the successor of DCRIS. A published file has one state dict of towers,
adapters and head, and optionally the state of optimiser and scheduler, which is ignored. Each
tensor of the state dict has exactly one counterpart here: the published code drops CLIP's image
encoder before saving, its `fusion` has no weights, and the two tensors that segmentation does not
read (`logit_scale`, `mask_token`) are also part of dcris's towers.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcris.checkpoints.checkpoint import save_whole
from dcris.checkpoints.tensor_files import open_tensors
from dcris.config import ModelConfig, RunConfig, replace
from dcris.errors import DcrisError
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import shapes_only

# By width and depth of the vision tower. Tensors do not show the number of heads and the feature
# layers; recipes do.
_RECIPES = {
    (768, 12): ("detris_b",),
    (1024, 24): ("detris_l", "detris_l_mixed"),
}

# Pattern of the file name, data set, partition, word length. The first match counts.
_DATA_SETS: tuple[tuple[str, str, str | None, int], ...] = (
    (r"mix", "mixed-unfiltered", None, 17),
    (r"refcoco(\+|plus)", "refcoco+", "unc", 17),
    (r"refcocog_?(u|umd)(?![a-z])", "refcocog", "umd", 22),
    (r"refcocog_?(g|google)(?![a-z])", "refcocog", "google", 17),
    (r"refcoco(?!g)", "refcoco", "unc", 17),
)

# Our names -> published names. All matching rules are applied, in this order.
_NAMES = tuple(
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        # adapters of both towers
        (r"\.mlp_slot\.", ".adapter."),
        (r"(?<=adapter\.)down\.", "D_fc1."),
        (r"(?<=adapter\.)up\.", "D_fc2."),
        (r"(?<=adapter\.)(branch1|branch[23]\.[01])\.0\.", r"dense_\1.conv."),
        (r"(?<=adapter\.)(branch1|branch[23]\.[01])\.1\.", r"dense_\1.bn."),
        (r"(?<=adapter\.)((image|text|back)_proj)\.", r"cross.\1."),
        (r"(?<=adapter\.)attention\.in_", "cross.multihead_attn.in_proj_"),
        (r"(?<=adapter\.)attention\.out\.", "cross.multihead_attn.out_proj."),
        # vision tower
        (r"^vision\.", "dinov2."),
        (r"^dinov2\.class_token$", "dinov2.cls_token"),
        (r"^dinov2\.registers$", "dinov2.register_tokens"),
        (r"^dinov2\.positions$", "dinov2.pos_embed"),
        (r"^dinov2\.patch_embed\.", "dinov2.patch_embed.proj."),
        (r"(?<=^dinov2)(\.blocks\.\d+\.)scale", r"\1ls"),
        (r"(?<=^dinov2)(\.blocks\.\d+\.)attention\.", r"\1attn."),
        # text tower
        (r"^text\.", "txt_backbone."),
        (r"^txt_backbone\.positions$", "txt_backbone.positional_embedding"),
        (r"^txt_backbone\.projection$", "txt_backbone.text_projection"),
        (r"^txt_backbone\.norm\.", "txt_backbone.ln_final."),
        (r"^txt_backbone\.blocks\.", "txt_backbone.transformer.resblocks."),
        (r"(?<=^txt_backbone\.transformer\.resblocks\.)(\d+\.)norm", r"\1ln_"),
        (r"(?<=^txt_backbone\.transformer\.resblocks\.)(\d+\.)attention\.qkv\.", r"\1attn.in_proj_"),
        (r"(?<=^txt_backbone\.transformer\.resblocks\.)(\d+\.)attention\.proj\.", r"\1attn.out_proj."),
        (r"(?<=^txt_backbone\.transformer\.resblocks\.)(\d+\.mlp\.)fc1\.", r"\1c_fc."),
        (r"(?<=^txt_backbone\.transformer\.resblocks\.)(\d+\.mlp\.)fc2\.", r"\1c_proj."),
        # neck; its levels are numbered from 3, as in CRIS, whose backbone is a ResNet
        (r"^head\.neck\.", "neck."),
        (r"^neck\.text_proj\.", "neck.txt_proj."),
        (r"^neck\.aggregate\.", "neck.aggr."),
        (r"^neck\.coordinate_conv\.0\.", "neck.coordconv.0.conv1."),
        (r"^neck\.coordinate_conv\.1\.", "neck.coordconv.1."),
        *((rf"^neck\.level_convs\.{i}\.", f"neck.f{i + 3}_proj.") for i in range(3)),
        *((rf"^neck\.level_attentions\.{i}\.", f"neck.fusion{i + 3}.multihead_attn.") for i in range(3)),
        # decoder
        (r"^head\.decoder\.", "decoder."),
        (r"^(decoder\.layers\.\d+\.)self_attention\.", r"\1self_attn."),
        (r"^(decoder\.layers\.\d+\.)cross_attention\.", r"\1multihead_attn."),
        (r"^(decoder\.layers\.\d+\.)(self|cross)_norm\.", r"\1\2_attn_norm."),
        (r"^(decoder\.layers\.\d+\.)feedforward\.", r"\1ffn."),
        # torch's attention in neck and decoder
        (r"^((neck|decoder)\..*attn\.)in_(weight|bias)$", r"\1in_proj_\3"),
        (r"^((neck|decoder)\..*attn\.)out\.", r"\1out_proj."),
        # projector
        (r"^head\.projector\.refine1\.", "proj.vis.1."),
        (r"^head\.projector\.refine2\.", "proj.vis.3."),
        (r"^head\.projector\.visual\.", "proj.vis.4."),
        (r"^head\.projector\.text\.", "proj.txt."),
    )
)

_TRANSPOSED = "neck.f5_proj.0.weight"
"""A transposed 1x1 convolution, which equals a plain one with the first two axes swapped."""


_MAX_REPEATED = 256_000_000
"""Limit on the bytes that all tensors may take beyond the size of their file, because they repeat
numbers."""


def convert_file(
    path: Path,
    out: Path,
    word_length: int | None = None,
    origin: Mapping[str, str] | None = None,
    half: bool = False,
) -> RunConfig:
    """Convert a published checkpoint to a checkpoint directory with the frozen towers.

    Args:
        path: the published file.
        out: a directory that does not exist.
        word_length: tokens per phrase; by default from the file name.
        origin: the published checkpoint, for the record.
        half: store adapters and head in float16.

    Returns:
        The configuration.

    Raises:
        DcrisError: as in convert_detris; also if `out` cannot be written. It does not exist then.
    """
    if out.exists():
        raise DcrisError(f"{out} exists already; delete it or choose another --out")
    config, tensors = convert_detris(path, word_length)
    size, stored = sum(value.nbytes for value in tensors.values()), path.stat().st_size
    if size > stored + _MAX_REPEATED:  # expanded tensors: a small file could fill the disk
        raise DcrisError(
            f"the tensors of {path} take {size / 1e9:.1f} GB, but the file has {stored / 1e9:.1f} GB; it is not a "
            "published checkpoint, so download it again"
        )
    save_whole(out, tensors, config, origin, half)
    return config


def convert_detris(path: Path, word_length: int | None = None) -> tuple[RunConfig, dict[str, Tensor]]:
    """Return configuration and tensors (memory-mapped, by our names) of a published checkpoint.

    Widths, layers and the kind of text adapter follow from the tensors, the data set from the file
    name, and the word length from the data set unless it is given.

    Raises:
        DcrisError: the file cannot be read, is not such a checkpoint (the error names the first
            tensor that is missing, unexpected or of another shape), or its word length is unknown.
    """
    theirs = read_state(path)
    config = recognise(theirs, str(path))
    config = replace(config, _data_settings(path, word_length))
    return config, rename_tensors(theirs, config.model, str(path))


def rename_tensors(theirs: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """Return the tensors of a published state dict by our names: exactly those of the model.

    Args:
        theirs: the published state dict.
        config: the model.
        where: name of the file, for errors.

    Raises:
        DcrisError: a tensor is missing, unexpected, or of another shape or type; the error names
            the first one.
    """
    with shapes_only():
        ours = ReferringSegmenter(config).state_dict()
    left, renamed = dict(theirs), {}
    for name, expected in ours.items():
        published = published_name(name)
        if published not in left:
            raise DcrisError(
                f"{where} has no tensor {published}; it is not a complete DETRIS checkpoint, so download it again"
            )
        value = left.pop(published)
        if published == _TRANSPOSED and value.dim() == expected.dim():
            value = value.transpose(0, 1)
        plain = value.layout == torch.strided and not value.is_meta
        same_kind = value.dtype.is_floating_point == expected.dtype.is_floating_point
        if value.shape != expected.shape or not same_kind or not plain:
            raise DcrisError(
                f"the tensor {published} of {where} is {value.dtype} {list(value.shape)}, but the model needs "
                f"{expected.dtype} {list(expected.shape)}"
            )
        renamed[name] = value
    for name in left:
        raise DcrisError(
            f"{where} has a tensor {name!r} that is not part of a DETRIS model; use a published checkpoint"
        )
    return renamed


def published_name(name: str) -> str:
    """Return the published name of a tensor."""
    for pattern, theirs in _NAMES:
        name = pattern.sub(theirs, name)
    return name


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the weights of a file by name, memory-mapped.

    No code in the file is run. Raises DcrisError as open_tensors.
    """
    return {name: stored.read() for name, stored in open_tensors(path).items()}


def recognise(tensors: Mapping[str, Tensor], where: str) -> RunConfig:
    """Return the run configuration of a published state dict, from its names and shapes.

    It is that of the recipe with the same model, or else of the closest recipe with that model.
    `where` names the file in errors.

    Raises:
        DcrisError: the state dict is not of a DETRIS model.
    """
    width = _size(tensors, "dinov2.cls_token", -1, where)
    depth = len(_numbers(tensors, r"dinov2\.blocks\.([0-9]{1,4})\."))
    if (width, depth) not in _RECIPES:
        known = " or ".join(f"{blocks} blocks of width {wide}" for wide, blocks in _RECIPES)
        raise DcrisError(
            f"{where} has a vision encoder with {depth} blocks of width {width}; a DETRIS model has {known}"
        )
    from dcris.recipes import get_recipe  # all recipes are built then, which prediction need not wait for

    recipes = [get_recipe(name) for name in _RECIPES[width, depth]]
    assert recipes[0].model.method is not None
    method = recipes[0].model.method.model_dump()
    if layers := _numbers(tensors, r"dinov2\.blocks\.([0-9]{1,4})\.adapter\."):
        at = f"dinov2.blocks.{layers[0]}.adapter"
        method["visual"] |= {
            "layers": layers,
            "width": _size(tensors, f"{at}.D_fc1.weight", 0, where),
            "attention_width": _size(tensors, f"{at}.cross.image_proj.weight", 0, where),
        }
    else:
        method["visual"] = None
    if layers := _numbers(tensors, r"txt_backbone\.transformer\.resblocks\.([0-9]{1,4})\.adapter\."):
        at = f"txt_backbone.transformer.resblocks.{layers[0]}.adapter"
        method["text"] |= {
            "kind": "dense" if any(name.startswith(f"{at}.dense_") for name in tensors) else "plain",
            "layers": layers,
            "width": _size(tensors, f"{at}.D_fc1.weight", 0, where),
        }
    else:
        method["text"] = None
    try:
        found = replace(recipes[0], {"model.method": method if method["visual"] or method["text"] else None})
    except DcrisError as error:
        raise DcrisError(f"{where} has no valid DETRIS model: {error}") from error
    return next((recipe for recipe in recipes if recipe.model == found.model), found)


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """Return the distinct numbers that the pattern matches at the start of the names, ascending."""
    return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})


def _size(tensors: Mapping[str, Tensor], name: str, axis: int, where: str) -> int:
    if name not in tensors or tensors[name].dim() == 0:
        raise DcrisError(f"{where} is not a DETRIS checkpoint: it has no tensor {name}")
    return tensors[name].shape[axis]


def data_set_of(stem: str) -> tuple[str, str | None, int] | None:
    """Return data set, partition and word length from a published file name; None if unknown."""
    return next((row[1:] for row in _DATA_SETS if re.search(row[0], stem.lower())), None)


def _data_settings(path: Path, word_length: int | None) -> dict[str, Any]:
    """Return the settings of the data section, from the file's name."""
    known = data_set_of(path.stem)
    settings: dict[str, Any] = {} if known is None else {"data.dataset": known[0], "data.split_by": known[1]}
    if word_length is None:
        if known is None:
            raise DcrisError(
                f"the name of {path} has no known data set; give the word length: --word-length 17, or 22 for the umd "
                "partition of G-Ref"
            )
        word_length = known[2]
    return {**settings, "data.word_length": word_length}
