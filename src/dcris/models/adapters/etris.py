"""ETRIS's bridger (Xu et al. 2023, "Bridging Vision and Language Encoders"): the towers exchange
features at several depths.

Shape letters: B batch, h w patch grid, N = h*w patches, L text tokens, D vision width, T text
width, d bridge width.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from dcris.config import Layers, MethodConfig, ModelConfig, Width, check_heads, check_layers, require_slots
from dcris.models.adapters.bridge import Bridge, Fused
from dcris.models.encoders.text import TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower, as_map
from dcris.models.layers.attention import MultiHeadAttention


class EtrisConfig(MethodConfig):
    """Three stages by default, at a third, two thirds and the end of each tower; d as published."""

    name: Literal["etris"] = "etris"
    layers: Layers = (3, 7, 11)
    """The visual blocks (0-based) after which the towers exchange features."""
    text_layers: Layers = (3, 7, 11)
    """The text blocks (0-based) after which they do; as many as `layers`."""
    width: Width = 64
    heads: Width = 8
    positions: bool = False
    """Train both towers' position tables too, as the published code does on CLIP's own vision
    tower."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError where the stages are not within the towers, or the heads do not divide
        the width.
        """
        require_slots("etris", (0,), "token_slot", model.vision)
        check_layers("method.layers", self.layers, model.vision.depth, ascending=True)
        check_layers("method.text_layers", self.text_layers, model.text.depth, ascending=True)
        if not self.layers or len(self.layers) != len(self.text_layers):
            raise ValueError("method.layers and method.text_layers must be equally long pairs of blocks, at least one")
        check_heads("method.width", self.width, self.heads)

    def bridge(self, model: ModelConfig) -> Bridge:
        """Return the bridger."""
        return EtrisBridge(model.vision.width, model.text.width, self)

    def trains(self, name: str) -> bool:
        """Return whether the weight is a position table, if `positions` is set."""
        return self.positions and name in ("vision.positions", "text.positions")


class Stage(nn.Module):
    """One exchange, at width d. Class token and registers do not take part."""

    def __init__(self, visual_width: int, text_width: int, config: EtrisConfig, *, first: bool, last: bool) -> None:
        super().__init__()
        d = config.width
        # The published code changes the resolution here by convolutions whose kernel is as wide as
        # their stride, which is 1 for vision transformers. So they are 1x1 convolutions.
        self.zoom_in = _unit(visual_width, d)
        self.zoom_out = _unit(d, visual_width)
        self.down = nn.Linear(text_width, d)
        self.up = nn.Linear(d, text_width)
        self.norm_visual, self.norm_text = (nn.Identity() if first else nn.LayerNorm(d) for _ in range(2))
        self.see = MultiHeadAttention(d, config.heads)
        self.read = MultiHeadAttention(d, config.heads)
        for linear in (self.down, self.up, self.see.out, self.read.out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for unit in (self.zoom_in, self.zoom_out):
            # Kaiming normal over the fan out. In the published code one of each pair is a
            # transposed convolution, with transposed weights, so the fan out is d for both, and D
            # in the last stage.
            convolution = unit[0]
            assert isinstance(convolution, nn.Conv2d)
            nn.init.normal_(convolution.weight, std=(2 / (visual_width if last else d)) ** 0.5)

    def forward(
        self, patches: Tensor, words: Tensor, previous: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return what to add to the patches [B, D, h, w] and to the words [B, L, T], and the next
        `previous`.

        Args:
            patches: [B, D, h, w].
            words: [B, L, T]; padding tokens take part in both attentions and are changed, as in the
                published code (Bridger_ViT in model/bridger.py gives InteractorT no mask).
            previous: [B, N, d] and [B, L, d], the inputs of the previous stage's attentions; None
                in the first stage.
        """
        grid = patches.shape[-2], patches.shape[-1]
        v, t = self.zoom_in(patches).flatten(2).transpose(1, 2), self.down(words)
        if previous is not None:
            v, t = self.norm_visual(v + previous[0]), self.norm_text(t + previous[1])
        visual, textual = v * self.see(v, t, t), t * self.read(t, v, v)
        return self.zoom_out(as_map(visual, grid)), self.up(textual), (v, t)


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class EtrisBridge(Bridge):
    """The stages, each after one block of either tower."""

    def __init__(self, visual_width: int, text_width: int, config: EtrisConfig) -> None:
        super().__init__()
        self.layers, self.text_layers = config.layers, config.text_layers
        count = len(config.layers)
        self.stages = nn.ModuleList(
            Stage(visual_width, text_width, config, first=number == 0, last=number == count - 1)
            for number in range(count)
        )

    def encode_image(self, vision: VisionTower, images: Tensor, feature_layers: Collection[int]) -> VisionState:
        """Run the vision tower up to the end of the first stage's block."""
        return self._advance(vision, vision.start(images), self.layers[0], feature_layers)

    def encode_text(self, text: TextTower, tokens: Tensor) -> TextState:
        """Run the text tower up to the end of the first stage's block."""
        return text.advance(text.start(tokens), self.text_layers[0] + 1)

    def fuse(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        text_state: TextState,
        feature_layers: Collection[int],
    ) -> Fused:
        """Run the stages and the blocks between and after them."""
        previous = None
        for stage, layer, text_layer in zip(self.stages, self.layers, self.text_layers, strict=True):
            state = self._advance(vision, state, layer, feature_layers)
            text_state = text.advance(text_state, text_layer + 1)
            visual, textual, previous = stage(state.patches(state.tokens), text_state.tokens, previous)
            prefix, patches = state.tokens.split((state.num_prefix_tokens, visual[0, 0].numel()), dim=1)
            tokens = torch.cat((prefix, patches + visual.flatten(2).transpose(1, 2)), dim=1)
            outputs = (*state.layer_outputs, tokens) if layer in feature_layers else state.layer_outputs
            state = replace(state, tokens=tokens, layer_outputs=outputs)
            text_state = replace(text_state, tokens=text_state.tokens + textual)
        state = vision.advance(state, feature_layers=feature_layers)
        return Fused(state, text.finish(text.advance(text_state)))

    def _advance(
        self, vision: VisionTower, state: VisionState, layer: int, feature_layers: Collection[int]
    ) -> VisionState:
        """Run up to the end of a block. `fuse` collects the outputs of the stages' own blocks."""
        return vision.advance(state, 2 * layer + 2, feature_layers=set(feature_layers) - set(self.layers))
