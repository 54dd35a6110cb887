"""The vision-language decoder (section 3.4): pixels attend to each other and to the text tokens.

Shape letters: B batch, h w patch grid, N = h*w, L text tokens, C width.
"""

import torch
from torch import Tensor, nn

from dcris.models.encoders.vit import as_map
from dcris.models.layers.activation_checkpointing import recomputed
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.layers.dropout import Dropout

_LOG_WAVELENGTHS = torch.log(torch.tensor(10000.0)).item()
"""Rounded to float32, as in the published code."""


def sine_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return positions [length, width]: sines in even, cosines in odd channels, wavelengths from 2
    pi to 10,000 * 2 pi.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-_LOG_WAVELENGTHS / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def sine_positions_2d(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return positions [rows * columns, width]: the first half of the channels encodes the column,
    the second the row.
    """
    x = sine_positions(columns, width // 2, device).expand(rows, columns, -1)
    y = sine_positions(rows, width // 2, device)[:, None].expand(rows, columns, -1)
    return torch.cat((x, y), dim=-1).flatten(0, 1)


class DecoderLayer(nn.Module):
    """Self attention, cross attention, feed-forward; pre-norm, with a second norm on the output of
    each attention.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = MultiHeadAttention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = MultiHeadAttention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, feedforward),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.LayerNorm(feedforward),
            nn.Linear(feedforward, width),
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        """Run the layer on pixels x [B, N, C].

        Args:
            x: pixels.
            positions: [N, C] of the pixels, added to queries and, in self attention, to keys; never
                to values.
            keys: [B, L, C] text tokens with positions.
            values: [B, L, C] text tokens without positions.
            padding: [B, L] bool, True where a token is padding.
        """
        normed = self.norm1(x)
        placed = normed + positions
        x = self.dropout(self.self_norm(self.self_attention(placed, placed, normed)), plus=x)
        placed = self.norm2(x) + positions
        x = self.dropout(self.cross_norm(self.cross_attention(placed, keys, values, padding)), plus=x)
        summed: Tensor = self.dropout(self.feedforward(self.norm3(x)), plus=x)
        return summed


class Decoder(nn.Module):
    """Decoder layers and a last norm. Text features of another width than the head's are projected
    first.
    """

    def __init__(self, width: int, text_width: int, heads: int, layers: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.checkpoint_activations = False
        """Whether layers are recomputed in the backward pass."""
        # The paper's head is as wide as CLIP's text features (512), so it has no such projection.
        self.text_proj = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, words: Tensor, padding: Tensor) -> Tensor:
        """Map [B, C, h, w], text tokens f_t [B, L, T] and padding [B, L] -> F_mm [B, C, h, w]."""
        rows, columns = features.shape[-2:]
        # Make it contiguous: in the map's memory order, norms and sums of tokens are ten times
        # slower.
        x = features.flatten(2).transpose(1, 2).contiguous()
        values = self.text_proj(words)
        positions = sine_positions_2d(rows, columns, x.shape[-1], x.device).to(x.dtype)
        keys = values + sine_positions(values.shape[1], values.shape[2], x.device).to(values.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = recomputed(layer, layer, x, positions, keys, values, padding)
            else:
                x = layer(x, positions, keys, values, padding)
        normed: Tensor = self.norm(x)
        return as_map(normed, (rows, columns))
