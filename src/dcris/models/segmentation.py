"""The whole network: frozen towers, adapters in their slots, and the segmentation head (figure 1).

Shape letters: B expressions, I images, H W pixels, h w patch grid, D visual width, L text tokens.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcris.config import METHODS, TEXT_FAMILIES, VISION_FAMILIES, ModelConfig
from dcris.errors import DcrisError
from dcris.models.adapters.attach import fold, freeze, set_mode
from dcris.models.adapters.bridge import Bridge, Fused
from dcris.models.encoders.text import TextFeatures, TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower
from dcris.models.head.decoder import Decoder
from dcris.models.head.neck import Neck
from dcris.models.head.presence import PresenceHead
from dcris.models.head.projector import Projector
from dcris.utils.device import autocast

MERGED = "merged"
"""Name of encoders with a trained method folded into them, whose weights are saved with the model.
"""


class Output(NamedTuple):
    """What the network computes for B pairs of an image and an expression."""

    logits: Tensor
    """[B, 1, 4h, 4w] of the mask."""
    presence: Tensor | None
    """[B] float32, the logit that the object is in the image; None without a presence head."""
    losses: dict[str, Tensor]
    """In training, the method's auxiliary losses by name, to be added to the loss."""


def presence_probabilities(output: Output) -> list[float] | list[None]:
    """Return for each pair the probability that its object is in the image, or None without a
    presence head.

    Raises:
        DcrisError: a value is not finite, so that no mask or score follows from it.
    """
    broken = not bool(output.logits.isfinite().all())
    if broken or (output.presence is not None and bool(output.presence.isnan().any())):
        raise DcrisError(
            "the model computes values that are not finite: its weights are damaged, or too large for the precision; use "
            "another checkpoint, or --precision float32"
        )
    if output.presence is None:
        return [None] * len(output.logits)
    probabilities: list[float] = output.presence.sigmoid().tolist()
    return probabilities


class Head(nn.Module):
    """The referring image segmentation head: neck, decoder, projector; and the presence head, if
    there is one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head, text = config.head, config.text
        widths = VISION_FAMILIES[config.vision.family].tower.level_widths(config.vision, head.feature_layers)
        self.neck = Neck(widths, text.sentence_width, head.width, head.heads, residual=head.neck_residual)
        self.decoder = Decoder(head.width, text.width, head.heads, head.layers, head.feedforward, head.dropout)
        self.projector = Projector(head.width, text.sentence_width, head.bias)
        # Last, so that the initial weights of the others do not depend on it.
        self.presence = PresenceHead(head.width, text.sentence_width, head.heads) if head.presence else None

    def forward(
        self, levels: list[Tensor], text: TextFeatures, side_features: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits [B, 1, 4h, 4w], and those of presence [B] float32 or None.

        Args:
            levels: three maps [B, D, h, w] from `VisionTower.levels`.
            text: the text tower's features.
            side_features: [B, C, h, w] to be added to the output of the neck (BarLeRIa).
        """
        features = self.neck(levels, text.sentence)
        if side_features is not None:
            features = features + side_features
        features = self.decoder(features, text.tokens, text.padding)
        logits: Tensor = self.projector(features, text.sentence)
        return logits, None if self.presence is None else self.presence(features, text.sentence)


class ReferringSegmenter(nn.Module):
    """Segment the object that an expression refers to.

    The text tower never sees the image; the vision tower sees the text from the first adapter on.
    In an interleaved method a bridge runs both towers in alternation instead
    (dcris.models.adapters.bridge).

    `encode_images`, `encode_text` and `segment` can be called separately, so that an image is
    encoded once for all its expressions, and an expression once for all images.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision: VisionTower = VISION_FAMILIES[config.vision.family].tower(config.vision)
        self.text: TextTower = TEXT_FAMILIES[config.text.family].tower(config.text)
        method = config.method
        if method is not None:
            method.attach(self.vision, self.text)
        self.bridge: Bridge | None = method.bridge(config) if method is not None else None
        self.head = Head(config)
        freeze(self.vision, lambda name: method is not None and method.trains(f"vision.{name}"))
        freeze(self.text, lambda name: method is not None and method.trains(f"text.{name}"))
        self.train(False)

    @property
    def towers(self) -> dict[str, VisionTower | TextTower]:
        """Both towers, by the names of their sections in the configuration."""
        return {"vision": self.vision, "text": self.text}

    def train(self, mode: bool = True) -> "ReferringSegmenter":
        """Switch adapters and head between training and evaluation; the towers stay in evaluation
        mode.
        """
        self.training = mode
        set_mode(self.vision, mode)
        set_mode(self.text, mode)
        self.head.train(mode)
        if self.bridge is not None:
            self.bridge.train(mode)
        return self

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute vision half blocks and decoder layers in the backward pass, to save memory."""
        self.vision.checkpoint_activations = self.head.decoder.checkpoint_activations = on

    def count_weights(self) -> dict[str, int]:
        """Return the numbers of "adapters", "head" and "frozen" weights.

        "adapters" is everything that is trained besides the head.
        """
        head = sum(parameter.numel() for parameter in self.head.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.parameters())
        return {"adapters": trained - head, "head": head, "frozen": total - trained}

    def merged(self) -> "ReferringSegmenter":
        """Return a copy whose method is folded into the towers: same output up to rounding, at the
        cost of the plain towers.

        Its towers are no longer the published ones, so they must be saved with it.

        Raises:
            DcrisError: the method is not foldable.
        """
        method = self.config.method
        if method is not None and not method.foldable:
            known = ", ".join(sorted(name for name, each in METHODS.items() if each.foldable))
            raise DcrisError(
                f"the method {method.name} cannot be folded into the encoders; methods that can be: {known}"
            )
        copy = deepcopy(self)
        vision, text = (part.model_copy(update={"name": MERGED}) for part in (self.config.vision, self.config.text))
        copy.config = self.config.model_copy(update={"method": None, "vision": vision, "text": text})
        for tower, config in ((copy.vision, vision), (copy.text, text)):
            fold(tower)
            tower.config, tower.source = config, {}
            freeze(tower)
        return copy

    def encode_text(self, tokens: Tensor) -> TextFeatures | TextState:
        """Encode tokens [B, L] int64: f_t, f_s and the padding mask.

        Interleaved methods return the tower's state where the towers first exchange features.
        """
        if self.bridge is not None:
            return self.bridge.encode_text(self.text, tokens)
        features: TextFeatures = self.text(tokens)
        return features

    def encode_images(self, images: Tensor) -> VisionState:
        """Run the part of the vision tower that does not depend on the text, on [I, 3, H, W]
        normalised images.
        """
        layers = self.config.head.feature_layers
        if self.bridge is not None:
            return self.bridge.encode_image(self.vision, images, layers)
        state = self.vision.advance(self.vision.start(images), self.vision.first_text_step, feature_layers=layers)
        return self.vision.precompute_mlp(state)

    def trains_before_text(self) -> bool:
        """Return whether the result of `encode_images` depends on a trained weight."""
        side, weight = self.config.vision.patch, next(self.vision.parameters())
        with torch.enable_grad():
            state = self.encode_images(weight.new_zeros(1, 3, side, side))
        return any(tensor.requires_grad for tensor in state.tensors())

    def segment(self, state: VisionState, text: TextFeatures | TextState) -> Output:
        """Segment encoded images and expressions, pair by pair (`VisionState.select`)."""
        layers = self.config.head.feature_layers
        if self.bridge is not None:
            assert isinstance(text, TextState)
            fused = self.bridge.fuse(self.vision, self.text, state, text, layers)
        else:
            assert isinstance(text, TextFeatures)
            state = self.vision.advance(state, text=text.tokens, padding=text.padding, feature_layers=layers)
            fused = Fused(state, text)
        logits, presence = self.head(self.vision.levels(fused.state), fused.text, fused.side_features)
        return Output(logits, presence, fused.losses)

    def segment_pairs(
        self,
        state: VisionState,
        text: TextFeatures | TextState,
        pairs: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        at_once: int,
    ) -> Iterator[Output]:
        """Segment pairs of encoded images and expressions in passes of bounded memory.

        Args:
            state: of I images, from `encode_images`.
            text: of K expressions, from `encode_text`.
            pairs: (image, expression), both counted from 0.
            dtype: working precision.
            at_once: pairs in one pass.

        Yields:
            The output for successive pairs.
        """
        device = text.tokens.device
        for start in range(0, len(pairs), at_once):
            images, expressions = torch.tensor(pairs[start : start + at_once], device=device).unbind(1)
            # The context ends before the yield: autocast entered in a generator stays active in its
            # caller, which would then interpolate in bfloat16.
            with autocast(device, dtype):
                output = self.segment(state.select(images), text.select(expressions))
            yield output

    def forward(self, images: Tensor | VisionState, tokens: Tensor, image_index: Tensor | None = None) -> Output:
        """Segment pairs of images and expressions.

        Args:
            images: [B, 3, H, W] normalised, or encoded by `encode_images`; with `image_index` I
                images. The grid of the output has h = H / patch size rows.
            tokens: [B, L] int64.
            image_index: [B] int64, the image of each expression; an image is encoded once for all
                of them. None: expression b belongs to image b.
        """
        state = images if isinstance(images, VisionState) else self.encode_images(images)
        if image_index is not None:
            state = state.select(image_index)
        return self.segment(state, self.encode_text(tokens))
