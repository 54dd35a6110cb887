"""Make detris.safetensors: what the published DETRIS code computes with the random weights of tests/detris_layout.py.

    python tests/golden/make_detris.py CHECKOUT [VARIANT ...]

CHECKOUT is a clone of github.com/jiaqihuang01/DETRIS (MIT). It is run as it is and not kept here; modules that it imports and
does not need for this are replaced by empty ones, and so is the reading of the towers' files. VARIANT limits what is made
anew; the numbers of the others stay. The large model takes a few minutes and 6 GB.

Each variant has, in its own precision and with dropout off:
    tokens          [2, L]
    logits          [2, s/2, s/2]: every second one of each axis, evaluation mode
    scores          [2, H, W]: probabilities at the photograph's size
    train_logits    as logits, training mode
    loss            []
    gradients       [n] norms, of what trains, by name in alphabetical order
    statistics      [2, m] sum and norm of each batch norm's mean and variance after the step, by name

and of what trains, by our names in alphabetical order, from the published constructors and steps:
    start           [n, 3] mean, deviation and largest magnitude of each tensor as constructed, over STARTS random starts
    start_rms       [2] root mean square of what the visual adapters add to the MLP's output then: prefix tokens, patches
    steps.losses    [5] of five steps of Adam on one batch, from the weights of tests/detris_layout.py (small alone)
    steps.updates   [n, SAMPLED] by which these steps changed that many numbers of each tensor
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import cv2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import in_double, stand_in_for_clip, stub_modules

from dcris.checkpoints.convert_detris import rename_tensors
from dcris.models.segmentation import ReferringSegmenter
from detris_layout import (
    COMPARED,
    HEAD,
    LEARNING_RATE,
    PHRASES,
    STARTED,
    STEPS,
    TEXT,
    VARIANTS,
    Variant,
    adapter_inputs,
    config_of,
    describe_start,
    layout,
    masks,
    norms,
    photograph,
    root_mean_squares,
    sampled,
    sums,
    weights,
)
from models import without_dropout

OUT = Path(__file__).with_name("detris.safetensors")


def stub_imports() -> None:
    empty = ("fvcore", "fvcore.nn", "fvcore.nn.weight_init", "lmdb", "pyarrow", "torchvision")
    stub_modules({name: {} for name in empty} | {"loguru": {"logger": None}})


STARTS = 4


def build(variant: Variant, dropout: bool = False, constructed: bool = False) -> nn.Module:
    """The published model without its dropout; its towers' files are never read.

    It has the random weights, or, where it is as `constructed`, those that its constructors leave.
    """
    import model.clip as clip
    import model.segmenter as segmenter
    from model.dinov2.models import vision_transformer

    stand_in_for_clip(clip, 64, TEXT)
    clip.adapt_position_encoding = lambda state, *_, **__: state
    small = variant.width == 384
    segmenter.vit_base = vision_transformer.vit_small if small else vision_transformer.vit_base
    config = SimpleNamespace(
        clip_pretrain="",
        dino_pretrain="",
        dino_name="dino-base" if variant.depth == 12 else "dinov2-large",
        word_len=variant.word_length,
        input_size=variant.image_size // 16 * 16,
        txtual_adapter_layer=variant.text_layers,
        txt_adapter_dim=variant.text_width,
        visual_adapter_layer=variant.visual_layers,
        visual_adapter_dim=variant.visual_width,
        ladder_dim=128,
        nhead=8,
        dino_layers=variant.depth,
        output_dinov2=list(variant.feature_layers),
        fpn_in=[variant.width] * 3,
        fpn_out=[256, 512, 1024],
        stride=[1, 1, 1],
        num_layers=3,
        vis_dim=HEAD,
        num_head=8,
        dim_ffn=512,
        dropout=0.1,
        intermediate=False,
        word_dim=TEXT,
    )
    with patch.object(torch, "load", lambda *_, **__: {}):
        network = segmenter.DETRIS(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert expected == layout(variant), sorted(set(expected.items()) ^ set(layout(variant).items()))[:4]
    if not constructed:
        nn.Module.load_state_dict(network, weights(variant), strict=True)
    if not dropout:
        without_dropout(network)
    if variant.double:
        in_double(network, clip)
    return network


def inputs(variant: Variant, network: Any) -> tuple[Tensor, Tensor, Any]:
    """Two images and their tokens, and the way back from the square to the photograph."""
    from utils.dataset import RefDataset, tokenize

    size = variant.image_size
    data: Any = object.__new__(RefDataset)
    data.input_size = (size, size)
    data.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    data.std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    picture = photograph()
    there, back = data.getTransformMat(picture.shape[:2], True)
    colour = [255 * value.item() for value in data.mean.flatten()]
    square = cv2.warpAffine(picture, there, (size, size), flags=cv2.INTER_CUBIC, borderValue=colour)
    images = torch.stack([data.convert(square)[0]] * 2).to(network.proj.txt.weight.dtype)
    tokens = tokenize(PHRASES, variant.word_length, True)
    return images, tokens, back


def compute(variant: Variant) -> dict[str, Tensor]:
    network: Any = build(variant)
    images, tokens, back = inputs(variant, network)
    size, picture = variant.image_size, photograph()
    network.eval()
    with torch.no_grad():
        logits = network(images, tokens)
    probabilities = F.interpolate(torch.sigmoid(logits.float()), size=(size, size), mode="bicubic", align_corners=True)
    height, width = picture.shape[:2]
    warp = partial(cv2.warpAffine, M=back, dsize=(width, height), flags=cv2.INTER_CUBIC, borderValue=0.0)
    scores = torch.stack([torch.from_numpy(warp(each)) for each in probabilities[:, 0].numpy()])

    network.train()
    train_logits, _, loss = network(images, tokens, masks(size).to(images.dtype))
    loss.backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.requires_grad}
    statistics = {name: value for name, value in network.named_buffers() if "running" in name}
    print(f"  loss {loss.item():.4f}; shares of the masks {(scores > 0.35).float().mean((1, 2)).tolist()}")
    return {
        "tokens": tokens,
        "logits": logits[:, 0, ::2, ::2].contiguous(),
        "scores": scores,
        "train_logits": train_logits[:, 0, ::2, ::2].contiguous(),
        "loss": loss.detach(),
        "gradients": norms(gradients),
        "statistics": torch.stack([sums(statistics), norms(statistics)]),
    }


def start(name: str) -> dict[str, Tensor]:
    """What the constructors leave."""
    variant, tables, added = VARIANTS[name], [], []
    for seed in range(STARTS):
        torch.manual_seed(seed)
        network: Any = build(variant, constructed=True).double().train()
        tables.append(describe_start(trained(name, network)))
        for block in network.dinov2.blocks:
            if block.use_adapter:
                normed, text = adapter_inputs(variant)
                added.append(root_mean_squares(0.2 * block.adapter(normed, text)))
    means, deviations, largest = torch.stack(tables).unbind(-1)
    table = torch.stack([means.mean(0), deviations.square().mean(0).sqrt(), largest.amax(0)], dim=1)
    return {"start": table, "start_rms": torch.stack(added).mean(0)}


def steps(name: str) -> dict[str, Tensor]:
    """Steps as train.py takes them: Adam as it comes, no weight decay, no clipping."""
    variant = VARIANTS[name]
    network: Any = build(variant).train()
    images, tokens, _ = inputs(variant, network)
    before = {key: value.detach().clone() for key, value in trained(name, network).items()}
    optimizer = torch.optim.Adam((each for each in network.parameters() if each.requires_grad), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        _, _, loss = network(images, tokens, masks(variant.image_size).to(images.dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    after = trained(name, network)
    return {
        "steps.losses": torch.stack(losses),
        "steps.updates": sampled({key: after[key] - before[key] for key in after}),
    }


def trained(name: str, network: nn.Module) -> dict[str, Tensor]:
    """The published weights that train, by our names and in our layout."""
    config = config_of(name).model
    with torch.device("meta"):
        ours = {key for key, value in ReferringSegmenter(config).named_parameters() if value.requires_grad}
    return {
        key: value.detach() for key, value in rename_tensors(network.state_dict(), config, name).items() if key in ours
    }


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    stub_imports()
    golden = load_file(OUT) if OUT.exists() else {}
    for name in sys.argv[2:] or COMPARED:
        print(name)
        made = compute(VARIANTS[name])
        if name in STARTED:
            made |= start(name)
        if VARIANTS[name].double:
            made |= steps(name)
        golden |= {f"{name}.{key}": value for key, value in made.items()}
    save_file(golden, OUT)
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
