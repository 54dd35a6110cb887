"""The order of the towers in which neither comes first: they run side by side and a bridge joins them.

What phrases of one image share then ends where the towers meet, and so does what images share of one phrase.
"""

from collections.abc import Collection

from torch import Tensor, nn

from dcris.models.encoders.clip_text import TextFeatures, TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower


class Bridge(nn.Module):
    """What joins the two towers. The three steps are those of dcris.models.segmentation, which may be called apart.

    The towers are arguments: they stay the model's, and frozen, while all of the bridge is trained.
    """

    def see(self, vision: VisionTower, images: Tensor, taps: Collection[int]) -> VisionState:
        """[I, 3, H, W] normalised images -> the tower stopped where the towers first meet; `taps` as of `join`."""
        raise NotImplementedError

    def read(self, text: TextTower, tokens: Tensor) -> TextState:
        """[B, L] tokens -> the tower stopped where the towers first meet."""
        raise NotImplementedError

    def join(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        words: TextState,
        taps: Collection[int],
        share: float = 1.0,
    ) -> tuple[VisionState, TextFeatures, Tensor | None]:
        """Run both towers to their ends.

        Args:
            vision, text: the towers.
            state, words: where they stopped, pair by pair.
            taps: the visual blocks (from 0) whose outputs, as the next block reads them, are wanted in the state returned.
            share: of the batch, as of DCRIS.forward, for a bridge with a loss of its own.

        Returns the vision tower's state, not yet normalised; the text; and [B, C, h, w] to be added to what the neck makes, or
        None.
        """
        raise NotImplementedError
