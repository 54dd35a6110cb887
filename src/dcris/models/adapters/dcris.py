"""DCRIS (Xu et al. 2024) and its successor DETRIS (Huang et al. 2025): adapters beside the MLPs of
both towers.

DCRIS has the DenseCrossAdapter in the vision tower (equations 1 and 2) and a bottleneck in the text
tower (equation 3). DETRIS replaces the bottleneck by dense convolutions along the sentence.

Shape letters: B batch, h w patch grid, N = h*w patches, P tokens (prefix and patches), D vision
width, L text tokens, T text width, r adapter width, * a grid (h w patches, or L text tokens).
"""

from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import (
    Factor,
    Layers,
    MethodConfig,
    ModelConfig,
    Probability,
    Section,
    Width,
    check_heads,
    check_layers,
    require_slots,
)
from dcris.models.adapters.attach import attach
from dcris.models.encoders.blocks import BranchSlot, SlotContext
from dcris.models.encoders.vit import as_map
from dcris.models.layers.attention import MultiHeadAttention


class _AdapterConfig(Section):
    """Settings that both adapters share."""

    layers: Layers = (1, 3, 5, 7, 9, 11)
    """Blocks (0-based) that have an adapter."""
    scale: Factor = 0.2
    init: Literal["published", "zero"] = "published"
    """Initial weights. published: as the constructors of the published code leave them; zero: the
    up-projection is zero, so that the adapted tower starts as the plain one."""


class DenseCrossConfig(_AdapterConfig):
    """The visual DenseCrossAdapter (equations 1 and 2)."""

    width: Annotated[int, Field(gt=0, le=16_384, multiple_of=16)] = 128
    attention_width: Width = 128
    heads: Width = 8
    dropout: Probability = 0.1
    mask_padding: bool = False
    """Exclude the expression's padding tokens from the attention. The published code includes them.
    """


class TextAdapterConfig(_AdapterConfig):
    """The text adapter."""

    kind: Literal["plain", "dense"] = "plain"
    """plain: the paper's (equation 3); dense: that of the published DETRIS code, with convolutions
    along the sentence."""
    width: Width = 64


class DcrisConfig(MethodConfig):
    """Both adapters. Set one of them to null to leave it out."""

    name: Literal["dcris"] = "dcris"
    visual: DenseCrossConfig | None = DenseCrossConfig()
    text: TextAdapterConfig | None = TextAdapterConfig()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.visual is None and self.text is None:
            raise ValueError("visual and text are both null; to train the head only, set model.method to null")
        return self

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError where layers or widths do not fit."""
        if (visual := self.visual) is not None:
            check_layers("method.visual.layers", visual.layers, model.vision.depth)
            require_slots("dcris", visual.layers, "mlp_slot", model.vision)
            check_heads("method.visual.attention_width", visual.attention_width, visual.heads)
        if (text := self.text) is not None:
            check_layers("method.text.layers", text.layers, model.text.depth)
            if text.kind == "dense" and text.width % 16:
                raise ValueError(f"method.text.width {text.width} must be a multiple of 16 for the dense kind")

    def attach(self, vision: Any, text: Any) -> None:
        """Put an adapter beside the MLP of each of the named blocks."""
        if self.visual is not None:
            make = partial(DenseCrossAdapter, text_width=text.config.width, config=self.visual)
            attach((vision.blocks[layer] for layer in self.visual.layers), "mlp_slot", make)
        if self.text is not None:
            kind = DenseTextAdapter if self.text.kind == "dense" else TextAdapter
            attach((text.blocks[layer] for layer in self.text.layers), "mlp_slot", partial(kind, config=self.text))

    def describe(self) -> str:
        """Return the name and the paper of DCRIS or, with its text adapter, of DETRIS."""
        if self.text is not None and self.text.kind == "dense":
            return "DETRIS (Huang et al. 2025, *Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation*)"
        return "DCRIS (Xu et al. 2024, *Enhancing Fine-grained Multi-modal Alignment via Adapters*)"


class ConvUnit(nn.Sequential):
    """A convolution that keeps the grid, batch norm, ReLU. The convolution has a bias, as in the
    published code.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dimensions: int) -> None:
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
        super().__init__(
            conv(inputs, outputs, kernel, padding=kernel // 2),
            norm(outputs, eps=1e-3),
            nn.ReLU(inplace=True),
        )


class DenseAdapter(BranchSlot):
    """Linear_down and the dense branches of equation 1, over a grid of one (text) or two (patches)
    dimensions.
    """

    def __init__(self, width: int, r: int, dimensions: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, r)
        self.branch1 = ConvUnit(r, r // 2, 1, dimensions)
        self.branch2 = nn.Sequential(
            ConvUnit(r + r // 2, r // 16, 1, dimensions), ConvUnit(r // 16, r // 4, 3, dimensions)
        )
        self.branch3 = nn.Sequential(
            ConvUnit(r + r // 2 + r // 4, r // 16, 1, dimensions), ConvUnit(r // 16, r // 4, 5, dimensions)
        )

    def dense(self, features: Tensor) -> Tensor:
        """Compute F_dense of equation 1: [B, r, *] -> [B, r, *]."""
        first = self.branch1(features)
        second = self.branch2(torch.cat((features, first), dim=1))
        third = self.branch3(torch.cat((features, first, second), dim=1))
        return torch.cat((first, second, third), dim=1) + features


class DenseCrossAdapter(DenseAdapter):
    """Equations 1 and 2, with the details of the authors' code for DETRIS.

    It reads the MLP's input. Class and register tokens skip the convolutions and the attention.
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
        """Use Kaiming for convolutions and a truncated normal of deviation 0.02 for linear layers.

        The published adapter's own constructor uses Kaiming throughout. The constructor of the
        vision tower around it then initialises every nn.Linear again (`init_weights_vit_timm`),
        also the output projection of the attention, but not the fused projection of
        nn.MultiheadAttention, which is a parameter and stays Xavier.
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
        """MLP output [B, P, D] -> the same plus scale * f_dc. Needs the context's grid and text."""
        assert context.grid is not None and context.text is not None
        # F_v = ReLU(Linear_down(f_v))
        features = F.relu(self.down(normed))
        prefix, patches = features[:, : context.num_prefix_tokens], features[:, context.num_prefix_tokens :]
        dense = self.dense(as_map(patches, context.grid)).flatten(2).transpose(1, 2)
        # F_cross = MHCA(F_dense, f_t) + F_v. By default padding tokens are not masked, as in the
        # published code.
        text = self.text_proj(context.text)
        padding = context.padding if self.mask_padding else None
        cross = self.back_proj(self.attention(self.image_proj(dense), text, text, padding)) + patches
        adapted = self.up(torch.cat((2 * prefix, cross), dim=1))
        return torch.add(output, adapted, alpha=self.scale)


def _text_up(config: TextAdapterConfig, width: int) -> nn.Linear:
    """Return the up-projection of a text adapter, with its initial weights."""
    up = nn.Linear(config.width, width)
    if config.init == "zero":
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    return up


class TextAdapter(BranchSlot):
    """Equation 3: down, ReLU, up. It reads the residual stream before the MLP's norm, as in the
    published code.
    """

    def __init__(self, width: int, config: TextAdapterConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Linear(width, config.width)
        self.up = _text_up(config, width)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, L, T] -> the same plus scale * f_w."""
        return output + self.scale * self.up(F.relu(self.down(residual)))


class DenseTextAdapter(DenseAdapter):
    """DETRIS's text adapter: down, ReLU, the dense branches of equation 1 along the sentence, up.

    It reads the residual stream, as the plain one does. The start token skips the convolutions.
    Padding takes part in them, and in the batch norm's statistics. A convolution reads later
    tokens, so unlike in CLIP a token's feature depends on the tokens after it: `data.word_length`
    must be the one that the weights were trained with.
    """

    def __init__(self, width: int, config: TextAdapterConfig) -> None:
        super().__init__(width, config.width, dimensions=1)
        self.scale = config.scale
        self.up = _text_up(config, width)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """MLP output [B, L, T] -> the same plus scale times the adapter's output."""
        features = F.relu(self.down(residual))
        start, words = features[:, :1], features[:, 1:]
        dense = self.dense(words.transpose(1, 2)).transpose(1, 2)
        return output + self.scale * self.up(torch.cat((2 * start, dense), dim=1))
