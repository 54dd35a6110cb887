"""The text half of CLIP (Radford et al. 2021).

Shape letters: B batch, L text tokens, T width, E width of the sentence feature.
"""

import torch
from torch import Tensor, nn

from dcris.config import TextConfig
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.text import TextTower


class ClipTextTower(TextTower):
    """CLIP's causal text transformer, of any width and depth.

    Attention is causal and padding comes last, so the sentence feature does not depend on L, except
    with an adapter that reads later tokens (DETRIS's text adapter).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, causal=True, layer_scale=False, mlp="quick_gelu", eps=1e-5)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.projection = nn.Parameter(torch.empty(config.width, config.sentence_width))
        # Not used for segmentation, but part of the published weights, which are loaded strictly.
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection, std=config.width**-0.5)

    def project(self, end_tokens: Tensor) -> Tensor:
        """Return the end tokens times the text projection: [B, T] -> [B, E]."""
        return end_tokens @ self.projection


HUB_CLIP = KeyMapping(
    title="CLIP as the Hub has it",
    marker="text_model.embeddings.token_embedding.weight",
    outside={
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "norm.weight": "text_model.final_layer_norm.weight",
        "norm.bias": "text_model.final_layer_norm.bias",
        "projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    },
    block="text_model.encoder.layers.{index}.",
    inside={
        "norm1": ("layer_norm1.{kind}",),
        "attention.qkv": tuple(f"self_attn.{part}_proj.{{kind}}" for part in "qkv"),
        "attention.proj": ("self_attn.out_proj.{kind}",),
        "norm2": ("layer_norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
    },
    # The image half, and the position numbers 0 to 76, which older releases of transformers stored.
    ignored=("vision_model.", "visual_projection.", "text_model.embeddings.position_ids"),
    transposed=frozenset({"projection"}),
)

OPENAI_CLIP = KeyMapping(
    title="CLIP as OpenAI publishes it",
    marker="positional_embedding",
    outside={
        "token_embedding.weight": "token_embedding.weight",
        "positions": "positional_embedding",
        "norm.weight": "ln_final.weight",
        "norm.bias": "ln_final.bias",
        "projection": "text_projection",
        "logit_scale": "logit_scale",
    },
    block="transformer.resblocks.{index}.",
    inside={
        "norm1": ("ln_1.{kind}",),
        "attention.qkv": ("attn.in_proj_{kind}",),
        "attention.proj": ("attn.out_proj.{kind}",),
        "norm2": ("ln_2.{kind}",),
        "mlp.fc1": ("mlp.c_fc.{kind}",),
        "mlp.fc2": ("mlp.c_proj.{kind}",),
    },
    # The image half, and three sizes that OpenAI's TorchScript archives hold as tensors.
    ignored=("visual.", "input_resolution", "context_length", "vocab_size"),
)

CLIP_TEXT = TowerFamily(
    tower=ClipTextTower,
    published=(
        (TextConfig(name="clip-vit-base-patch16"), "openai/clip-vit-base-patch16"),
        (TextConfig(name="clip-vit-base-patch32"), "openai/clip-vit-base-patch32"),
        (
            TextConfig(name="clip-vit-large-patch14", width=768, heads=12, sentence_width=768),
            "openai/clip-vit-large-patch14",
        ),
    ),
    key_mappings=(HUB_CLIP, OPENAI_CLIP),
)
