"""The DenseCrossAdapter (equations 1 and 2): dense multi-scale convolutions and attention to the text, in parallel to the MLP.

Shape letters: B batch, h w patch grid, N = h*w patches, P tokens (class, registers and patches), D tower width, r adapter
width, L text tokens, T text width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import DenseCrossConfig
from dcris.models.adapters.dense import DenseAdapter
from dcris.models.encoders.blocks import SlotContext
from dcris.models.encoders.vit import as_map
from dcris.models.layers.attention import MultiHeadAttention


class DenseCrossAdapter(DenseAdapter):
    """Equations 1 and 2, with the details of the authors' code for DETRIS.

    It reads what the MLP reads. Class and register tokens skip the convolutions and the attention.
    """

    reads_text = True

    def __init__(self, width: int, text_width: int, config: DenseCrossConfig) -> None:
        r = config.width
        super().__init__(width, r, dimensions=2)
        self.scale, self.mask_padding = config.scale, config.mask_padding
        self.image_proj = nn.Linear(r, config.attention_width)
        self.text_proj = nn.Linear(text_width, config.attention_width)
        self.attention = MultiHeadAttention(config.attention_width, config.heads, config.dropout)
        self.back_proj = nn.Linear(config.attention_width, r)
        self.up = nn.Linear(r, width)
        self._initialise(published=config.init == "published")

    def _initialise(self, published: bool) -> None:
        """Kaiming for the convolutions, and for the linear layers a normal distribution of deviation 0.02.

        The published adapter's own constructor sets Kaiming throughout. The constructor of the vision tower around it then
        initialises every nn.Linear again (`init_weights_vit_timm`), also that of the attention's output, but not the fused
        projection of nn.MultiheadAttention, which is a parameter and stays Xavier.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if published and isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        if not published:
            nn.init.zeros_(self.up.weight)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, P, D] -> the same plus scale * f_dc. Needs context.grid and context.text."""
        assert context.grid is not None and context.text is not None
        # F_v = ReLU(Linear_down(f_v))
        features = F.relu(self.down(normed))
        prefix, patches = features[:, : context.prefix], features[:, context.prefix :]
        dense = self.dense(as_map(patches, context.grid)).flatten(2).transpose(1, 2)
        # F_cross = MHCA(F_dense, f_t) + F_v. Padding tokens are attended to, as in the published code, unless that is off.
        text = self.text_proj(context.text)
        padding = context.padding if self.mask_padding else None
        cross = self.back_proj(self.attention(self.image_proj(dense), text, text, padding)) + patches
        adapted = self.up(torch.cat((2 * prefix, cross), dim=1))
        return torch.add(output, adapted, alpha=self.scale)
