"""Make barleria.safetensors: what the published BarLeRIa code computes with the random weights of tests/barleria_layout.py.

    python tests/golden/make_barleria.py CHECKOUT

CHECKOUT is a clone of github.com/NastrondAd/BarLeRIa (MIT). It is not kept here, and runs as it is but for this:
- detectron2, fvcore and timm are replaced by the little of them that it needs, written here; EVA-CLIP is left out;
- widths that it has written into its code, 768 of the image half, are those of the variant;
- one line of the side network normalises the mean word over the batch; it does so over the channels here, as our code does.
CLIP's file is never read. What comes out is as of make_etris.py, and
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_ins import in_double, stand_in_for_clip, stub_modules

from barleria_layout import VARIANT, config_of, theirs, weights
from dcris.models.segmentation import ReferringSegmenter
from detris_layout import masks, norms
from etris_layout import POSITIONS, inputs, thinned
from models import without_dropout

OUT = Path(__file__).with_name("barleria.safetensors")


class PatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(in_features, hidden_features),
            act_layer(),
            nn.Linear(hidden_features, in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def configurable(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *arguments: Any) -> None:
        init(self, **type(self).from_config(*arguments))

    return wrapped


class Registry(dict[str, Any]):
    def __init__(self, name: str) -> None:
        super().__init__()

    def register(self) -> Callable[[type], type]:
        def note(cls: type) -> type:
            self[cls.__name__] = cls
            return cls

        return note


def stub_imports() -> None:
    def create_model(name: str, pretrained: bool, **settings: Any) -> nn.Module:
        made: nn.Module = getattr(sys.modules["model.absvit"], name)(pretrained, **settings)
        return made

    nothing = SimpleNamespace(Block=type(None), ResidualAttentionBlock=type(None))
    ready: dict[str, dict[str, Any]] = {
        "turtle": {"forward": None},
        "einops": {"rearrange": None},
        "eva_clip": {"eva_vit_model": nothing, "transformer": nothing},
        "fvcore": {},
        "fvcore.nn": {},
        "fvcore.nn.weight_init": {"c2_xavier_fill": lambda module: None},
        "detectron2": {},
        "detectron2.config": {"configurable": configurable},
        "detectron2.layers": {
            "ShapeSpec": lambda channels: SimpleNamespace(channels=VARIANT.width),
            "Conv2d": nn.Conv2d,
            "CNNBlockBase": type("CNNBlockBase", (nn.Module,), {"__init__": lambda self, *_: nn.Module.__init__(self)}),
        },
        "detectron2.utils": {},
        "detectron2.utils.logger": {"log_first_n": lambda *_: None},
        "detectron2.utils.registry": {"Registry": Registry},
        "timm": {"create_model": create_model},
        "timm.data": dict.fromkeys(
            f"IMAGENET_{kind}_{part}" for kind in ("DEFAULT", "INCEPTION") for part in ("MEAN", "STD")
        ),
        "timm.models": {"register_model": lambda function: function},
        "timm.models.helpers": {"build_model_with_cfg": None, "named_apply": lambda *_: None, "adapt_input_conv": None},
        "timm.models.layers": {
            **{"PatchEmbed": PatchEmbed, "Mlp": Mlp, "DropPath": None, "to_2tuple": None, "lecun_normal_": None},
            "trunc_normal_": nn.init.trunc_normal_,
        },
        "timm.models.layers.helpers": {"to_2tuple": None},
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models.vision_transformer": {
            **{
                "_cfg": lambda: None,
                "_create_vision_transformer": None,
                "VisionTransformer": None,
                "Block": type(None),
            },
        },
        "loguru": {"logger": None},
    }
    stub_modules(ready)


def build() -> nn.Module:
    import model.clip as clip
    import model.segmenter as segmenter
    import model.side_adapter.side_adapter as side_adapter

    text, width = 512, VARIANT.width
    stand_in_for_clip(clip, width, text)
    published = segmenter.set_snf
    segmenter.set_snf = lambda model, method, flow_dim=width, **more: published(model, method, flow_dim, **more)
    side_adapter.F = SimpleNamespace(
        **{name: getattr(F, name) for name in ("interpolate", "mse_loss")},
        normalize=lambda x, dim: F.normalize(x, dim=2 if x.dim() == 4 else dim),
    )
    side = SimpleNamespace(
        NAME="RegionwiseSideAdapterNetwork",
        VIT_NAME="absvit_tiny_patch16_224",
        PRETRAINED=False,
        IMAGE_SIZE=VARIANT.image_size,
        DROP_PATH_RATE=0.0,
        NUM_QUERIES=128,
        FUSION_TYPE="add",
        FUSION_MAP=["0->0", "3->1", "6->2", "9->3"],
        DEEP_SUPERVISION_IDXS=[8],
    )
    config = SimpleNamespace(
        **{
            "clip_pretrain": "",
            "word_len": 17,
            "word_dim": text,
            "input_size": VARIANT.image_size,
            "SIDE_ADAPTER": side,
        },
        **{"ladder_dim": 64, "nhead": 8, "stride": [1, 1, 1], "vis_dim": 512},
        **{
            "use_snf": True,
            "snf_method": "normalization_flow",
            "flow_length": 4,
            "use_side": True,
            "use_txt_add": False,
        },
        **{"fpn_in": [width, width, 512], "fpn_out": [256, 512, 1024], "num_layers": 3, "num_head": 8, "dim_ffn": 512},
        **{"dropout": 0.1, "intermediate": False},
    )
    network: Any = segmenter.BARLERIA(config)
    network.intertwiner.proj = nn.Sequential(nn.Linear(text, 32), nn.ReLU(), nn.Linear(32, width))
    unique = dict(network.named_parameters()) | dict(network.named_buffers())
    state = weights({name: tuple(value.shape) for name, value in unique.items()})
    visual = {"visual.positional_embedding": state[POSITIONS]}
    (state[POSITIONS],) = clip.adapt_position_encoding(visual, 16, VARIANT.image_size).values()
    with torch.no_grad():
        for name, value in unique.items():
            value.copy_(state[name])
    without_dropout(network)
    in_double(network, clip)
    made: nn.Module = network
    return made


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    stub_imports()
    network: Any = build()
    with torch.device("meta"):
        ours = [
            name
            for name, weight in ReferringSegmenter(config_of(VARIANT).model).named_parameters()
            if weight.requires_grad
        ]
    images, tokens = inputs(VARIANT)
    images = images.double()
    network.eval()
    with torch.no_grad():
        levels, words, sentence, outputs = network.intertwiner(images, tokens, network.backbone)
        made, _ = network.side_adapter_network(images, outputs, words)
        logits = network(images, tokens)
    network.train()
    truth = masks(VARIANT.image_size).double()
    train_logits, small, loss = network(images, tokens, truth)
    loss.backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    whole = {name: torch.cat([gradients.pop(part).flatten() for part in theirs(name, 4)]) for name in ours}
    assert not gradients, list(gradients)[:4]
    print(f"loss {loss.item():.4f}; shares of the masks {(logits > 0).float().mean((1, 2, 3)).tolist()}")
    side = made[0]["x"].flatten(2)
    golden = {
        **thinned(levels, words, sentence),
        "side": side[:, ::3, :: side.shape[2] // 4].contiguous(),
        "logits": logits[:, 0, ::2, ::2].contiguous(),
        "train_logits": train_logits[:, 0, ::2, ::2].contiguous(),
        "loss": F.binary_cross_entropy_with_logits(train_logits, small),
        "whole_loss": loss.detach(),
        "gradients": norms(whole),
    }
    save_file(golden, OUT)
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
