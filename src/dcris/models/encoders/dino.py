"""The vision tower: DINOv2 with registers (Oquab et al. 2023; Darcet et al. 2024), or DINOv3 (Simeoni et al. 2025).

DINOv3 differs in how it knows where a patch is (no table; dcris.models.layers.rope), in its norms' eps, and in that its keys have
no bias: ours have one of zeros, so that both families are one block.

Shape letters: B batch, N patches, R registers, P = 1 + R + N tokens, D width.
"""

import torch
from torch import Tensor, nn

from dcris.config import VisionConfig
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.vit import VisionState, VisionTower
from dcris.models.layers.rope import Rotation, patch_rotation


class DinoV2Tower(VisionTower):
    """DINOv2 with registers or DINOv3, any width and depth, any input whose sides are multiples of the patch size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width))
        # Never read when segmenting; it is part of the published weights, which are read strictly.
        self.rotary = config.family == "dinov3"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width) if self.rotary else torch.zeros(1, width))
        if not self.rotary:
            self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        eps = 1e-5 if self.rotary else 1e-6
        self.blocks = nn.ModuleList(Block(width, config.heads, mlp=config.mlp, eps=eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        for table in (self.class_token, self.registers, *(() if self.rotary else (self.positions,))):
            nn.init.trunc_normal_(table, std=0.02)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token, registers and patches, with positions where there is a table: [B, N, D] -> [B, P, D]."""
        batch = patches.shape[0]  # not len(): that would be a constant in an exported graph
        tokens = torch.cat((self.class_token.expand(batch, -1, -1), patches), dim=1)
        if not self.rotary:
            tokens = tokens + self.positions_on(grid)
        # The registers come after the class token and have no position.
        return torch.cat((tokens[:, :1], self.registers.expand(batch, -1, -1), tokens[:, 1:]), dim=1)

    def rotation(self, state: VisionState) -> Rotation | None:
        """DINOv3's, which has no table."""
        return patch_rotation(state.grid, self.config.width // self.config.heads, state.tokens) if self.rotary else None
