"""DINOv2 with registers (Oquab et al. 2023; Darcet et al. 2024) and DINOv3 (Simeoni et al. 2025).

DINOv3 differs from DINOv2 in its positions (rotary, dcris.models.layers.rope, instead of a table),
in the eps of its norms, and in that its keys have no bias. Ours have a bias of zeros, so that both
families use the same block.

Shape letters: B batch, N patches, R registers, P = 1 + R + N tokens, D width.
"""

import torch
from torch import Tensor, nn

from dcris.config import VisionConfig
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.vit import VisionState, VisionTower
from dcris.models.layers.rope import Rotation, patch_rotation


class DinoTower(VisionTower):
    """DINOv2 with registers or DINOv3, of any width and depth, for inputs of whole patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width))
        self.rotary = config.family == "dinov3"
        """Whether positions rotate queries and keys, instead of being added from a table."""
        # Not used for segmentation, but part of the published weights, which are loaded strictly.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width) if self.rotary else torch.zeros(1, width))
        if not self.rotary:
            self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        eps = 1e-5 if self.rotary else 1e-6
        self.blocks = nn.ModuleList(Block(width, config.heads, mlp=config.mlp, eps=eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        for table in (self.class_token, self.registers, *(() if self.rotary else (self.positions,))):
            nn.init.trunc_normal_(table, std=0.02)

    @classmethod
    def check(cls, config: VisionConfig) -> None:
        """Raise ValueError for CLIP's settings, or a head's width that does not fit DINOv3."""
        if config.projected_width or config.published_grid:
            raise ValueError("vision.projected_width and vision.published_grid are for CLIP's vision encoder only")
        if config.family == "dinov3" and config.width // config.heads % 4:
            raise ValueError(
                f"vision.width {config.width} must give each of the {config.heads} heads a multiple of 4 channels "
                "(DINOv3's rotary positions)"
            )

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token, registers and patches, plus the position table if any: [B, N, D] -> [B, P,
        D].
        """
        batch = patches.shape[0]  # not len(): that would be a constant in an exported graph
        tokens = torch.cat((self.class_token.expand(batch, -1, -1), patches), dim=1)
        if not self.rotary:
            tokens = tokens + self.positions_on(grid)
        # The registers come after the class token and have no position.
        return torch.cat((tokens[:, :1], self.registers.expand(batch, -1, -1), tokens[:, 1:]), dim=1)

    def rotation(self, state: VisionState) -> Rotation | None:
        """Return DINOv3's rotation of the patches' queries and keys."""
        return patch_rotation(state.grid, self.config.width // self.config.heads, state.tokens) if self.rotary else None


HUB_DINOV2 = KeyMapping(
    title="DINOv2 with registers as the Hub has it",
    marker="embeddings.cls_token",
    outside={
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "positions": "embeddings.position_embeddings",
        "patch_embed.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    block="encoder.layer.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": tuple(f"attention.attention.{part}.{{kind}}" for part in ("query", "key", "value")),
        "attention.proj": ("attention.output.dense.{kind}",),
        "scale1": ("layer_scale1.lambda1",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
        "mlp.w12": ("mlp.weights_in.{kind}",),
        "mlp.w3": ("mlp.weights_out.{kind}",),
        "scale2": ("layer_scale2.lambda1",),
    },
)

META_DINOV2 = KeyMapping(
    title="DINOv2 with registers as Meta publishes it",
    marker="cls_token",
    outside={
        "class_token": "cls_token",
        "registers": "register_tokens",
        "mask_token": "mask_token",
        "positions": "pos_embed",
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="blocks.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": ("attn.qkv.{kind}",),
        "attention.proj": ("attn.proj.{kind}",),
        "scale1": ("ls1.gamma",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
        "mlp.w12": ("mlp.w12.{kind}",),
        "mlp.w3": ("mlp.w3.{kind}",),
        "scale2": ("ls2.gamma",),
    },
)

HUB_DINOV3 = KeyMapping(
    title="DINOv3 as the Hub has it",
    marker="layer.0.attention.q_proj.weight",
    outside={
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "patch_embed.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="layer.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": tuple(f"attention.{part}_proj.{{kind}}" for part in "qkv"),
        "attention.proj": ("attention.o_proj.{kind}",),
        "scale1": ("layer_scale1.lambda1",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.up_proj.{kind}",),
        "mlp.fc2": ("mlp.down_proj.{kind}",),
        "scale2": ("layer_scale2.lambda1",),
    },
    zeros=frozenset({"attention.k_proj.bias"}),
)

DINOV2 = TowerFamily(
    tower=DinoTower,
    published=(
        (VisionConfig(name="dinov2-small", width=384, heads=6), "facebook/dinov2-with-registers-small"),
        (VisionConfig(name="dinov2-base"), "facebook/dinov2-with-registers-base"),
        (
            VisionConfig(name="dinov2-large", width=1024, depth=24, heads=16),
            "facebook/dinov2-with-registers-large",
        ),
        (
            VisionConfig(name="dinov2-giant", width=1536, depth=40, heads=24, mlp="swiglu"),
            "facebook/dinov2-with-registers-giant",
        ),
    ),
    key_mappings=(HUB_DINOV2, META_DINOV2),
)
DINOV3 = TowerFamily(
    tower=DinoTower,
    published=(
        (
            VisionConfig(name="dinov3-small", family="dinov3", width=384, heads=6, patch=16),
            "facebook/dinov3-vits16-pretrain-lvd1689m",
        ),
        (VisionConfig(name="dinov3-base", family="dinov3", patch=16), "facebook/dinov3-vitb16-pretrain-lvd1689m"),
        (
            VisionConfig(name="dinov3-large", family="dinov3", width=1024, depth=24, heads=16, patch=16),
            "facebook/dinov3-vitl16-pretrain-lvd1689m",
        ),
    ),
    key_mappings=(HUB_DINOV3,),
)
