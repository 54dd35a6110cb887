"""The image half of CLIP (Radford et al. 2021), the vision tower of ETRIS and BarLeRIa as published.

Shape letters: B batch, N patches, P = 1 + N tokens, D width, E width of the projection.
"""

import torch
from torch import Tensor, nn

from dcris.config import VisionConfig
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.vit import VisionState, VisionTower


class ClipVisionTower(VisionTower):
    """CLIP's vision transformer, any width and depth, any input whose sides are multiples of the patch size.

    Its last norm and its projection, which CLIP applies to the class token alone, are applied to every token here, as in the
    published code of CRIS and its successors.
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

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token and patches, with positions, normalised: [B, N, D] -> [B, P, D]."""
        tokens = torch.cat((self.class_token.expand(patches.shape[0], 1, -1), patches), dim=1) + self.positions_on(grid)
        normed: Tensor = self.pre_norm(tokens)
        return normed

    def finish(self, state: VisionState) -> Tensor:
        """The last layer norm and the projection: [B, P, E]."""
        return super().finish(state) @ self.projection
