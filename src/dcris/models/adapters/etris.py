"""ETRIS's bridger (Xu et al. 2023, "Bridging Vision and Language Encoders"): the towers exchange what they see and read.

Shape letters: B batch, h w patch grid, N = h*w patches, L text tokens, D vision width, T text width, d bridge width.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from dcris.config import Layers, MethodConfig, Width
from dcris.models.adapters.bridge import Bridge
from dcris.models.encoders.clip_text import TextFeatures, TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower, as_map
from dcris.models.layers.attention import MultiHeadAttention

if TYPE_CHECKING:
    from dcris.config import ModelConfig


class EtrisConfig(MethodConfig):
    """Three stages by default, after a third, two thirds and the whole of either tower; d as published."""

    name: Literal["etris"] = "etris"
    order: ClassVar[Literal["text first", "interleaved"]] = "interleaved"
    layers: Layers = (3, 7, 11)
    """The visual blocks (from 0) behind which the towers meet."""
    text_layers: Layers = (3, 7, 11)
    """The text blocks (from 0) behind which they do."""
    width: Width = 64
    heads: Width = 8
    positions: bool = False
    """Train both towers' position tables too, as the published code does on CLIP's own vision tower."""

    def check(self, model: "ModelConfig") -> None:
        """Raise ValueError where the stages are not within the towers, or the heads do not divide the width."""
        for key, layers, depth in (
            ("layers", self.layers, model.vision.depth),
            ("text_layers", self.text_layers, model.text.depth),
        ):
            if not layers or list(layers) != sorted(set(layers)) or layers[-1] >= depth:
                raise ValueError(
                    f"method.{key} {list(layers)} must be ascending numbers below the tower's {depth} blocks"
                )
        if len(self.layers) != len(self.text_layers):
            raise ValueError(
                "method.layers and method.text_layers must be equally many: the towers meet there pair by pair"
            )
        if self.width % self.heads:
            raise ValueError(f"method.width {self.width} does not divide into {self.heads} heads")

    def bridge(self, model: "ModelConfig") -> Bridge:
        """The bridger."""
        return EtrisBridge(model.vision.width, model.text.width, self)

    def trains(self, name: str) -> bool:
        """The position tables, where that is asked for."""
        return self.positions and name in ("vision.positions", "text.positions")


class Stage(nn.Module):
    """One exchange, at width d. Class token and registers have no part in it."""

    def __init__(self, visual_width: int, text_width: int, config: EtrisConfig, *, first: bool, last: bool) -> None:
        super().__init__()
        d = config.width
        # The published code changes resolution here with convolutions as wide as their stride, which is 1 for vision
        # transformers. What is left are 1x1 convolutions.
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
            # Kaiming normal over the fan out. As one of each pair is a transposed convolution there, whose weights are stored
            # the other way round, either comes out as the width inside, and in the last stage as the width outside.
            convolution = unit[0]
            assert isinstance(convolution, nn.Conv2d)
            nn.init.normal_(convolution.weight, std=(2 / (visual_width if last else d)) ** 0.5)

    def forward(
        self, patches: Tensor, words: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What is to be added to either, and what the next stage takes over.

        Args:
            patches: [B, D, h, w].
            words: [B, L, T]; padding tokens take part, as in the published code.
            before: the last stage's [B, N, d] and [B, L, d], as they were before they met; None in the first.
        """
        grid = patches.shape[-2], patches.shape[-1]
        v, t = self.zoom_in(patches).flatten(2).transpose(1, 2), self.down(words)
        if before is not None:
            v, t = self.norm_visual(v + before[0]), self.norm_text(t + before[1])
        seen, said = v * self.see(v, t, t), t * self.read(t, v, v)
        return self.zoom_out(as_map(seen, grid)), self.up(said), (v, t)


def _unit(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class EtrisBridge(Bridge):
    """The stages, each behind one block of either tower."""

    def __init__(self, visual_width: int, text_width: int, config: EtrisConfig) -> None:
        super().__init__()
        self.layers, self.text_layers = config.layers, config.text_layers
        count = len(config.layers)
        self.stages = nn.ModuleList(
            Stage(visual_width, text_width, config, first=number == 0, last=number == count - 1)
            for number in range(count)
        )

    def see(self, vision: VisionTower, images: Tensor, taps: Collection[int]) -> VisionState:
        """Up to and with the first visual block behind which the towers meet."""
        return self._advance(vision, vision.start(images), self.layers[0], taps)

    def read(self, text: TextTower, tokens: Tensor) -> TextState:
        """Up to and with the first text block behind which they do."""
        return text.advance(text.start(tokens), self.text_layers[0] + 1)

    def join(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        words: TextState,
        taps: Collection[int],
        share: float = 1.0,
    ) -> tuple[VisionState, TextFeatures, Tensor | None]:
        """Stage after stage, and the rest of the blocks."""
        before = None
        for stage, layer, text_layer in zip(self.stages, self.layers, self.text_layers, strict=True):
            state = self._advance(vision, state, layer, taps)
            words = text.advance(words, text_layer + 1)
            seen, said, before = stage(state.patches(state.tokens), words.tokens, before)
            prefix, patches = state.tokens.split((vision.prefix, seen[0, 0].numel()), dim=1)
            tokens = torch.cat((prefix, patches + seen.flatten(2).transpose(1, 2)), dim=1)
            tapped = (*state.taps, tokens) if layer in taps else state.taps
            state = replace(state, tokens=tokens, taps=tapped)
            words = replace(words, tokens=words.tokens + said)
        return vision.advance(state, taps=taps), text.finish(text.advance(words)), None

    def _advance(self, vision: VisionTower, state: VisionState, layer: int, taps: Collection[int]) -> VisionState:
        """Up to and with a block. What the towers meet behind is tapped after that, and so not here."""
        return vision.advance(state, 2 * layer + 2, taps=set(taps) - set(self.layers))
