"""Make etris.safetensors: what the published ETRIS code computes with the random weights of tests/etris_layout.py.

    python tests/golden/make_etris.py CHECKOUT [VARIANT ...]

CHECKOUT is a clone of github.com/kkakkkka/ETRIS (MIT). It is run as it is and not kept here; a module that it imports and
does not need for this is replaced by an empty one, and so is the reading of CLIP's file. VARIANT limits what is made anew; the
numbers of the others stay. The base model takes a minute and 4 GB.

Each variant has, in its own precision and with dropout off:
    levels          [3, 2, 64, 4]: what enters the neck, thinned out, evaluation mode; likewise
    words           [2, L, 64], and
    sentence        [2, 512]
    logits          [2, s/2, s/2]: every second one of each axis
    train_logits    as logits, training mode
    loss            []
    gradients       [n] norms, of what trains, by name in alphabetical order
    statistics      [2, m] sum and norm of each batch norm's mean and variance after the step, by name
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import in_double, stand_in_for_clip, stub_modules

from detris_layout import masks, norms, sums
from etris_layout import POSITIONS, VARIANTS, Variant, inputs, layout, thinned, weights
from models import without_dropout

OUT = Path(__file__).with_name("etris.safetensors")


def build(variant: Variant) -> nn.Module:
    """The published model with the random weights. CLIP's file is never read; the position table is resized as published."""
    stub_modules({"loguru": {"logger": None}})
    import model.clip as clip
    import model.segmenter as segmenter
    from model.bridger import Bridger_ViT

    text = 512
    stand_in_for_clip(clip, variant.width, text)
    segmenter.Bridger_VL = partial(Bridger_ViT, d_img=[variant.width] * 3)
    config = SimpleNamespace(
        clip_pretrain="",
        word_len=17,
        word_dim=text,
        input_size=variant.image_size,
        ladder_dim=64,
        nhead=8,
        stride=[1, 1, 1],
        vis_dim=512,
        fpn_in=[variant.width, variant.width, 512],
        fpn_out=[256, 512, 1024],
        num_layers=3,
        num_head=8,
        dim_ffn=512,
        dropout=0.1,
        intermediate=False,
    )
    network = segmenter.ETRIS(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert expected == layout(variant), sorted(set(expected.items()) ^ set(layout(variant).items()))[:4]
    state = weights(variant)
    visual = {"visual.positional_embedding": state[POSITIONS]}
    (state[POSITIONS],) = clip.adapt_position_encoding(visual, 16, variant.image_size).values()
    nn.Module.load_state_dict(network, state, strict=True)
    without_dropout(network)
    if variant.double:
        in_double(network, clip)
    return network


def compute(variant: Variant) -> dict[str, Tensor]:
    network: Any = build(variant)
    images, tokens = inputs(variant)
    images = images.to(network.proj.txt.weight.dtype)
    network.eval()
    with torch.no_grad():
        levels, words, sentence = network.bridger(images, tokens, network.backbone)
        logits = network(images, tokens)
    network.train()
    train_logits, _, loss = network(images, tokens, masks(variant.image_size).to(images.dtype))
    loss.backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    statistics = {name: value for name, value in network.named_buffers() if "running" in name}
    print(f"  loss {loss.item():.4f}; shares of the masks {(logits > 0).float().mean((1, 2, 3)).tolist()}")
    return {
        **thinned(levels, words, sentence),
        "logits": logits[:, 0, ::2, ::2].contiguous(),
        "train_logits": train_logits[:, 0, ::2, ::2].contiguous(),
        "loss": loss.detach(),
        "gradients": norms(gradients),
        "statistics": torch.stack([sums(statistics), norms(statistics)]),
    }


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    golden = load_file(OUT) if OUT.exists() else {}
    for name in sys.argv[2:] or VARIANTS:
        print(name)
        golden |= {f"{name}.{key}": value for key, value in compute(VARIANTS[name]).items()}
    save_file(golden, OUT)
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
