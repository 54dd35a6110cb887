"""Tiny networks with random weights, whose files have the layouts of the published ones."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dcris.config import TextConfig, VisionConfig
from models import END, START, randomise


def saved(content: object) -> bytes:
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def hub_dinov2(shape: VisionConfig, seed: int = 0) -> Dinov2WithRegistersModel:
    config = Dinov2WithRegistersConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        image_size=14 * shape.grid,
        patch_size=14,
        num_register_tokens=shape.registers,
        use_swiglu_ffn=shape.mlp == "swiglu",
    )
    model = Dinov2WithRegistersModel(config).eval()
    randomise(model, seed)
    return model


def hub_clip(shape: TextConfig, image: VisionConfig | None = None) -> CLIPModel:
    """Text and image encoder; the image encoder is a stub unless its shape is given."""
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.length,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    if image is not None:
        vision |= {"hidden_size": image.width, "intermediate_size": 4 * image.width, "num_hidden_layers": image.depth}
        vision |= {"num_attention_heads": image.heads, "patch_size": image.patch}
        vision |= {"image_size": image.patch * (image.published_grid or image.grid)}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.sentence_width)).eval()
    randomise(model)
    return model


def written(model: nn.Module, folder: Path) -> bytes:
    """The model.safetensors of transformers, with the tensor names of the Hub's files."""
    model.save_pretrained(folder)
    return (folder / "model.safetensors").read_bytes()


def as_meta(hub: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A DINOv2 of the Hub with Meta's tensor names."""
    outside = {"cls_token": "cls_token", "mask_token": "mask_token", "register_tokens": "register_tokens"}
    outside |= {"pos_embed": "position_embeddings"}
    outside |= {f"patch_embed.proj.{kind}": f"patch_embeddings.projection.{kind}" for kind in ("weight", "bias")}
    meta = {ours: hub[f"embeddings.{theirs}"] for ours, theirs in outside.items()}
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            qkv = [hub[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            meta[f"{ours}attn.qkv.{kind}"] = torch.cat(qkv)
            meta[f"{ours}attn.proj.{kind}"] = hub[f"{theirs}attention.output.dense.{kind}"]
            pairs = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
            pairs |= {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
            for mine, other in pairs.items():
                if f"{theirs}{other}.{kind}" in hub:
                    meta[f"{ours}{mine}.{kind}"] = hub[f"{theirs}{other}.{kind}"]
        for number in (1, 2):
            meta[f"{ours}ls{number}.gamma"] = hub[f"{theirs}layer_scale{number}.lambda1"]
    return meta | {f"norm.{kind}": hub[f"layernorm.{kind}"] for kind in ("weight", "bias")}


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": _QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_ResidualBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenAIClip(nn.Module):
    """The text encoder in OpenAI's layout, and an image encoder of two tensors; `forward` encodes
    text."""

    def __init__(self, shape: TextConfig) -> None:
        super().__init__()
        self.visual = nn.Conv2d(3, 4, 2)
        self.transformer = _Transformer(shape.width, shape.heads, shape.depth)
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positional_embedding = nn.Parameter(torch.zeros(shape.length, shape.width))
        self.ln_final = nn.LayerNorm(shape.width)
        self.text_projection = nn.Parameter(torch.zeros(shape.width, shape.sentence_width))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        for name, value in (
            ("input_resolution", 224),
            ("context_length", shape.length),
            ("vocab_size", shape.vocabulary),
        ):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full([length, length], float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x.transpose(0, 1), mask).transpose(0, 1))
        return x[torch.arange(len(tokens)), tokens.argmax(dim=-1)] @ self.text_projection


def openai_clip(shape: TextConfig) -> OpenAIClip:
    """Round the weights to values that half precision represents exactly."""
    model = OpenAIClip(shape).eval()
    randomise(model)
    return model.half().float()


def archive_without_program(model: nn.Module, path: Path) -> None:
    """The bytes of torch.jit.save for the model in half precision, with every line of its program
    replaced."""
    torch.jit.save(torch.jit.script(model.half()), path)
    with zipfile.ZipFile(path) as whole:
        entries = [(entry.filename, whole.read(entry)) for entry in whole.infolist()]
    with zipfile.ZipFile(path, "w") as spoilt:
        for name, content in entries:
            spoilt.writestr(name, b"this is no program" if "/code/" in name else content)
    model.float()


def as_openai(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder of a CLIP of the Hub and a tensor of the text encoder, with OpenAI's
    names."""
    ours: dict[str, Tensor] = {"positional_embedding": hub["text_model.embeddings.position_embedding.weight"]}
    outside = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight"}
    outside |= {"positional_embedding": "embeddings.position_embedding.weight"}
    for kind in ("weight", "bias"):
        outside |= {f"ln_pre.{kind}": f"pre_layrnorm.{kind}", f"ln_post.{kind}": f"post_layernorm.{kind}"}
    ours |= {f"visual.{mine}": hub[f"vision_model.{theirs}"] for mine, theirs in outside.items()}
    ours["visual.proj"] = hub["visual_projection.weight"].T.contiguous()
    depth = len([name for name in hub if name.startswith("vision_model.") and name.endswith("layer_norm1.bias")])
    for index in range(depth):
        mine, theirs = f"visual.transformer.resblocks.{index}.", f"vision_model.encoder.layers.{index}."
        for kind in ("weight", "bias"):
            qkv = [hub[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"{mine}attn.in_proj_{kind}"] = torch.cat(qkv)
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            pairs |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            ours |= {f"{mine}{a}.{kind}": hub[f"{theirs}{b}.{kind}"] for a, b in pairs.items()}
    return ours
