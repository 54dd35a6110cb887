"""The image half of CLIP (Radford et al. 2021), the vision tower of ETRIS and BarLeRIa as
published.

Shape letters: B batch, N patches, P = 1 + N tokens, D width, E width of the projection.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dcris.config import VisionConfig
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.clip_text import HUB_CLIP, OPENAI_CLIP
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.vit import VisionState, VisionTower


class ClipVisionTower(VisionTower):
    """CLIP's vision transformer, of any width and depth, for inputs of whole patches.

    Its last norm and its projection, which CLIP applies to the class token only, are applied to
    every token here, as in the published code of CRIS and its successors.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + config.grid**2, width))
        self.pre_norm = nn.LayerNorm(width, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, layer_scale=False, mlp="quick_gelu", eps=1e-5) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.projection = nn.Parameter(torch.empty(width, config.out_width))
        for table in (self.class_token, self.positions, self.projection):
            nn.init.normal_(table, std=width**-0.5)

    @classmethod
    def check(cls, config: VisionConfig) -> None:
        """Raise ValueError where registers or another MLP are asked for."""
        if config.registers or config.mlp != "gelu":
            raise ValueError('a CLIP vision encoder needs vision.registers 0 and vision.mlp "gelu"')

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token and patches, with positions, normalised: [B, N, D] -> [B, P, D]."""
        tokens = torch.cat((self.class_token.expand(patches.shape[0], 1, -1), patches), dim=1) + self.positions_on(grid)
        normed: Tensor = self.pre_norm(tokens)
        return normed

    def finish(self, state: VisionState) -> Tensor:
        """Apply the last layer norm and the projection: [B, P, E]."""
        return super().finish(state) @ self.projection


HUB_CLIP_VISION = KeyMapping(
    title="CLIP as the Hub has it",
    marker="vision_model.embeddings.class_embedding",
    outside={
        "patch_embed.weight": "vision_model.embeddings.patch_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        # The Hub's own spelling.
        "pre_norm.weight": "vision_model.pre_layrnorm.weight",
        "pre_norm.bias": "vision_model.pre_layrnorm.bias",
        "norm.weight": "vision_model.post_layernorm.weight",
        "norm.bias": "vision_model.post_layernorm.bias",
        "projection": "visual_projection.weight",
    },
    block="vision_model.encoder.layers.{index}.",
    inside=HUB_CLIP.inside,
    ignored=("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"),
    transposed=frozenset({"projection"}),
)

OPENAI_CLIP_VISION = KeyMapping(
    title="CLIP with a vision transformer as OpenAI publishes it",
    marker="visual.class_embedding",
    outside={
        "patch_embed.weight": "visual.conv1.weight",
        "class_token": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "pre_norm.weight": "visual.ln_pre.weight",
        "pre_norm.bias": "visual.ln_pre.bias",
        "norm.weight": "visual.ln_post.weight",
        "norm.bias": "visual.ln_post.bias",
        "projection": "visual.proj",
    },
    block="visual.transformer.resblocks.{index}.",
    inside=OPENAI_CLIP.inside,
    ignored=(
        *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
        *("input_resolution", "context_length", "vocab_size"),
    ),
)


def _published(size: str, **shape: Any) -> tuple[VisionConfig, str]:
    name = f"clip-vit-{size}"
    config = VisionConfig(family="clip", name=name, registers=0, position_rule="plain", **shape)
    return config, f"openai/{name}"


CLIP_VISION = TowerFamily(
    tower=ClipVisionTower,
    published=(
        _published("base-patch16", patch=16, grid=14, projected_width=512),
        _published("base-patch32", patch=32, grid=7, projected_width=512),
        _published("large-patch14", patch=14, grid=16, width=1024, depth=24, heads=16, projected_width=768),
    ),
    key_mappings=(HUB_CLIP_VISION, OPENAI_CLIP_VISION),
)
