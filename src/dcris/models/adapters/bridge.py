"""Interface for methods that interleave both encoders (ETRIS, BarLeRIa).

The expressions of an image then share the image encoder only up to the point where the towers first
exchange features, and likewise for the images of an expression.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from dcris.models.encoders.text import TextFeatures, TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower


@dataclass(frozen=True, slots=True)
class Fused:
    """Output of `Bridge.fuse`."""

    state: VisionState
    """The vision tower after its last block, before the last norm, with the feature layers'
    outputs."""
    text: TextFeatures
    side_features: Tensor | None = None
    """[B, C, h, w] to be added to the output of the neck."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Auxiliary losses, weighted, by name; empty except in training."""


class Bridge(nn.Module):
    """Connects the two towers, which are arguments. All of the bridge is trained."""

    def encode_image(self, vision: VisionTower, images: Tensor, feature_layers: Collection[int]) -> VisionState:
        """Run the vision tower up to where the towers first exchange features.

        Args:
            vision: the tower.
            images: [I, 3, H, W] normalised.
            feature_layers: as in `fuse`.
        """
        raise NotImplementedError

    def encode_text(self, text: TextTower, tokens: Tensor) -> TextState:
        """Run the text tower on [B, L] tokens up to where the towers first exchange features."""
        raise NotImplementedError

    def fuse(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        text_state: TextState,
        feature_layers: Collection[int],
    ) -> Fused:
        """Run both towers to their ends.

        Args:
            vision, text: the towers.
            state, text_state: where `encode_image` and `encode_text` stopped, pair by pair.
            feature_layers: the visual blocks (0-based) whose outputs the head reads. An output is
                the next block's input, so it includes what the bridge adds behind the block.
        """
        raise NotImplementedError
