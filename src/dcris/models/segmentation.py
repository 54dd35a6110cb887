"""The whole network: frozen towers, adapters in their slots, and the segmentation head (figure 1).

Shape letters: B phrases, I images, H W pixels, h w patch grid, P visual tokens, D visual width, L text tokens.
"""

from copy import deepcopy
from functools import partial

from torch import Tensor, nn

from dcris.config import ModelConfig
from dcris.errors import DcrisError
from dcris.models.adapters.base import attach, freeze, merge, set_mode
from dcris.models.adapters.bridge import Bridge
from dcris.models.adapters.dense_cross import DenseCrossAdapter
from dcris.models.adapters.dense_text import DenseTextAdapter
from dcris.models.adapters.text import TextAdapter
from dcris.models.encoders.clip_text import TextFeatures, TextState, TextTower
from dcris.models.encoders.clip_vision import ClipVisionTower
from dcris.models.encoders.dino import DinoV2Tower
from dcris.models.encoders.vit import VisionState, VisionTower
from dcris.models.head.decoder import Decoder
from dcris.models.head.neck import Neck
from dcris.models.head.projector import Projector


class Head(nn.Module):
    """The referring image segmentation head: neck, decoder, projector."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head, text = config.head, config.text
        self.neck = Neck(
            config.vision.width,
            text.sentence_width,
            head.width,
            head.heads,
            last_width=config.vision.out_width,
            residual=head.neck_residual,
        )
        self.decoder = Decoder(head.width, text.width, head.heads, head.layers, head.feedforward, head.dropout)
        self.projector = Projector(head.width, text.sentence_width, head.bias)

    def forward(self, levels: list[Tensor], text: TextFeatures, aside: Tensor | None = None) -> Tensor:
        """Three maps [B, D, h, w], the text, and what a side network adds [B, C, h, w] -> logits [B, 1, 4h, 4w]."""
        features = self.neck(levels, text.sentence)
        if aside is not None:
            features = features + aside
        features = self.decoder(features, text.tokens, text.padding)
        logits: Tensor = self.projector(features, text.sentence)
        return logits


class ReferringSegmenter(nn.Module):
    """Segment what a phrase refers to. Text never sees the image; the image sees the text from the first adapter on.

    So it is unless the method's order is "interleaved": then a bridge runs the two towers side by side (dcris.models.adapters.bridge).
    The three steps may be called apart, so that an image is encoded once for all its phrases and a phrase once for all images.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision: VisionTower = (ClipVisionTower if config.vision.family == "clip" else DinoV2Tower)(config.vision)
        self.text = TextTower(config.text)
        if (visual := config.visual_adapter) is not None:
            make = partial(DenseCrossAdapter, config.vision.width, config.text.width, visual)
            attach(self.vision.blocks, visual.layers, "mlp_slot", make)
        if (textual := config.text_adapter) is not None:
            kind = DenseTextAdapter if textual.kind == "dense" else TextAdapter
            attach(self.text.blocks, textual.layers, "mlp_slot", partial(kind, config.text.width, textual))
        if (method := config.method) is not None:
            method.attach(self.vision, self.text)
        self.bridge: Bridge | None = method.bridge(config) if method is not None else None
        self.head = Head(config)
        freeze(self.vision, lambda name: method is not None and method.trains(f"vision.{name}"))
        freeze(self.text, lambda name: method is not None and method.trains(f"text.{name}"))
        self.train(False)

    def train(self, mode: bool = True) -> "ReferringSegmenter":
        """Switch adapters and head between training and evaluation; the frozen towers stay in evaluation mode."""
        self.training = mode
        set_mode(self.vision, mode)
        set_mode(self.text, mode)
        self.head.train(mode)
        if self.bridge is not None:
            self.bridge.train(mode)
        return self

    def checkpoint_activations(self, on: bool = True) -> None:
        """Remember only what enters each vision half block and decoder layer, and run them again in the backward pass."""
        self.vision.checkpoint_activations = self.head.decoder.checkpoint_activations = on

    def count_weights(self) -> dict[str, int]:
        """Exact numbers of "adapters", "head" and "frozen" weights; the first two are trained."""
        head = sum(parameter.numel() for parameter in self.head.parameters())
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.parameters())
        return {"adapters": trained - head, "head": head, "frozen": total - trained}

    def merged(self) -> "ReferringSegmenter":
        """A copy whose method is folded into the towers: the same answers up to rounding, for the work of the plain towers.

        Its towers are no longer the published ones, so they have to be saved with it.
        Raises DcrisError where the method, or an adapter beside it, cannot be folded.
        """
        copy = deepcopy(self)
        if self.bridge is not None or not (merge(copy.vision) and merge(copy.text)):
            raise DcrisError(
                "what was trained cannot be folded into the towers' own weights; lora, full and bitfit can be"
            )
        vision, text = (part.model_copy(update={"name": "merged"}) for part in (self.config.vision, self.config.text))
        copy.config = self.config.model_copy(update={"method": None, "vision": vision, "text": text})
        for tower, config in ((copy.vision, vision), (copy.text, text)):
            tower.config, tower.source = config, {}
            freeze(tower)
        return copy

    def encode_text(self, tokens: Tensor) -> TextFeatures | TextState:
        """[B, L] int64 -> f_t, f_s and the padding mask. Interleaved: the tower, stopped where the two first meet."""
        if self.bridge is not None:
            return self.bridge.read(self.text, tokens)
        features: TextFeatures = self.text(tokens)
        return features

    def encode_images(self, images: Tensor) -> VisionState:
        """[I, 3, H, W] normalised -> the tower stopped before the text has a say."""
        taps = self.config.head.taps
        if self.bridge is not None:
            return self.bridge.see(self.vision, images, taps)
        state = self.vision.advance(self.vision.start(images), self.vision.first_text_step, taps=taps)
        return self.vision.foresee(state)

    def segment(self, state: VisionState, text: TextFeatures | TextState, share: float = 1.0) -> Tensor:
        """Finish the images with the text, one image per phrase (VisionState.select): logits [B, 1, 4h, 4w].

        `share` is as of `forward`.
        """
        taps, aside = self.config.head.taps, None
        if self.bridge is not None:
            assert isinstance(text, TextState)
            state, text, aside = self.bridge.join(self.vision, self.text, state, text, taps, share)
        assert isinstance(text, TextFeatures)
        if self.bridge is None:
            state = self.vision.advance(state, text=text.tokens, padding=text.padding, taps=taps)
        levels = [state.patches(tokens) for tokens in (*state.taps, self.vision.finish(state))]
        logits: Tensor = self.head(levels, text, aside)
        return logits

    def forward(self, images: Tensor, tokens: Tensor, share: float = 1.0) -> Tensor:
        """[B, 3, H, W] normalised images and [B, L] tokens, pair by pair -> logits [B, 1, 4h, 4w] (h = H / 14).

        In training, `share` is how much of the batch, whose mean loss is descended, these pairs are: a method with a loss of
        its own (barleria) descends it by that.
        """
        return self.segment(self.encode_images(images), self.encode_text(tokens), share)
