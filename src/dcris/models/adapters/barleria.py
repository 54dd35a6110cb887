"""BarLeRIa (Wang et al. 2024): flows on residual streams, words among patches, a side network.

Shape letters: B batch, N patches, L text tokens, Q queries, D vision width, T text width, S side
width, K planar flows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import (
    Blocks,
    Count,
    Layers,
    MethodConfig,
    ModelConfig,
    Width,
    check_heads,
    check_layers,
    require_slots,
)
from dcris.models.adapters.attach import attach_everywhere
from dcris.models.adapters.bridge import Bridge, Fused
from dcris.models.encoders.blocks import MLP, BranchSlot
from dcris.models.encoders.text import TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower, as_map, interpolate_positions
from dcris.models.layers.attention import attend


class BarleriaConfig(MethodConfig):
    """Defaults as published, except the grid, which is that of 448 pixels in patches of 14."""

    name: Literal["barleria"] = "barleria"
    flow_length: Annotated[int, Field(ge=0, le=64, strict=True)] = 4
    """Planar flows in a chain, after the affine one; every block has two such chains."""
    text_width: Width = 32
    """Hidden width of the two projections of the words: into the vision tower, and into the side
    network."""
    side_width: Width = 144
    side_depth: Blocks = 8
    side_heads: Width = 3
    queries: Annotated[int, Field(ge=0, le=1024, strict=True)] = 128
    """Learned tokens of the side network."""
    fused: Layers = (0, 3, 6, 9)
    """The visual blocks (0-based) whose patches are added to the side network's: the first before
    its blocks, the second after its first block, and so on."""
    grid: Count = 32
    """Side of the side network's position table."""
    reconstruction: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the side network's auxiliary loss, which trains its feedback to invert its blocks.
    """
    positions: bool = False
    """Train both towers' position tables too, as the published code does on CLIP's own vision
    tower."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError where the fused blocks are not the tower's, or widths do not fit."""
        require_slots("barleria", (0,), "token_slot", model.vision)
        check_layers("method.fused", self.fused, model.vision.depth, ascending=True)
        if len(self.fused) > self.side_depth + 1:
            raise ValueError(
                f"method.fused has {len(self.fused)} blocks; with method.side_depth {self.side_depth} there can be at most "
                f"{self.side_depth + 1}"
            )
        check_heads("method.side_width", self.side_width, self.side_heads)

    def attach(self, vision: Any, text: Any) -> None:
        """Put flows into both halves of every block of both towers."""
        for place in ("attention_slot", "mlp_slot"):
            attach_everywhere((vision, text), place, lambda width: Flow(width, self.flow_length))

    def bridge(self, model: ModelConfig) -> Bridge:
        """Return the projection of the words, and the side network."""
        return BarleriaBridge(model, self)

    def trains(self, name: str) -> bool:
        """Return whether the weight is a position table, if `positions` is set."""
        return self.positions and name in ("vision.positions", "text.positions")


class Flow(BranchSlot):
    """An affine flow and K planar flows on the residual stream; the branch reads the unchanged
    stream.

    A planar flow is z + scale_k tanh(weight_k z + bias_k). Initially the chain is almost the
    identity.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.weights = nn.Parameter(torch.empty(length, width))
        self.biases = nn.Parameter(torch.empty(length))
        self.scales = nn.Parameter(torch.empty(length, width))
        for parameter in (self.weights, self.biases, self.scales):
            nn.init.uniform_(parameter, -0.01, 0.01)

    def transform_residual(self, residual: Tensor) -> Tensor:
        """Apply the flows: [B, P, D] -> [B, P, D]."""
        z = self.shift + self.log_scale.exp() * residual
        for weight, bias, scale in zip(self.weights, self.biases, self.scales, strict=True):
            z = z + scale * torch.tanh(z @ weight + bias)[..., None]
        return z


def _bottleneck(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


@dataclass(frozen=True, slots=True)
class BarleriaState(VisionState):
    """The vision tower's state, and the patches as the side network embeds them."""

    side_patches: Tensor | None = None
    """[B, N, S]"""


class BarleriaBridge(Bridge):
    """Word embeddings pass through the vision tower; f_t guides the side network."""

    def __init__(self, model: ModelConfig, config: BarleriaConfig) -> None:
        super().__init__()
        self.words_in = _bottleneck(model.text.width, config.text_width, model.vision.width)
        for module in self.words_in:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.side = SideNetwork(model, config)
        self.fused = config.fused
        self.out = nn.Linear(config.side_width, model.head.width)

    def encode_image(self, vision: VisionTower, images: Tensor, feature_layers: Collection[int]) -> BarleriaState:
        """Embed the patches for the tower and the side network. All blocks depend on the text."""
        state = vision.start(images)
        side_patches = self.side.embed(images, state.grid)
        return BarleriaState(state.tokens, state.grid, state.num_prefix_tokens, side_patches=side_patches)

    def encode_text(self, text: TextTower, tokens: Tensor) -> TextState:
        """Embed the tokens."""
        return text.start(tokens)

    def fuse(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        text_state: TextState,
        feature_layers: Collection[int],
    ) -> Fused:
        """Insert the words behind the prefix tokens; run both towers and the side network.

        Padding tokens are words here, as in the published code: in the vision tower
        (model/intertwiner.py, whose blocks have no mask), and in the side network's attention and
        mean word (model/side_adapter/side_adapter.py).
        """
        assert isinstance(state, BarleriaState) and state.side_patches is not None
        words, prefix = self.words_in(text_state.tokens), state.num_prefix_tokens
        tokens = torch.cat((state.tokens[:, :prefix], words, state.tokens[:, prefix:]), dim=1)
        wanted = sorted({*feature_layers, *self.fused})
        ended = vision.advance(
            replace(state, tokens=tokens, num_prefix_tokens=prefix + words.shape[1]), feature_layers=wanted
        )
        outputs = dict(zip(wanted, ended.layer_outputs, strict=True))
        features = text.finish(text.advance(text_state))
        tower_patches = [outputs[layer][:, -state.side_patches.shape[1] :] for layer in self.fused]
        patches, losses = self.side(state.side_patches, tower_patches, features.tokens)
        return Fused(
            replace(ended, layer_outputs=tuple(outputs[layer] for layer in sorted(feature_layers))),
            features,
            as_map(self.out(patches), state.grid),
            losses,
        )


class SideBlock(nn.Module):
    """A pre-norm transformer block whose values take feedback."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, nn.GELU())

    def forward(self, x: Tensor, feedback: Tensor | None = None) -> Tensor:
        """Tokens [B, P, S] and feedback to their values, of the same shape -> [B, P, S]."""
        width = x.shape[-1]
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        if feedback is not None:
            # As in the published code, the values' bias counts twice.
            value = value + F.linear(feedback, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        x = x + self.proj(attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Feedback(nn.Module):
    """One step of the feedback path: a learned inverse of a block, and feedback to its values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.back = nn.Linear(width, width, bias=False)
        self.feed = nn.Linear(width, width, bias=False)


class SideNetwork(nn.Module):
    """A small transformer with top-down attention (Shi et al. 2023), over queries, words and its
    own patches.

    It runs twice. The first pass selects the tokens that agree with the mean word; linear maps send
    them back as feedback to the values of the second pass, in which the towers' patches are added
    after its blocks.
    """

    def __init__(self, model: ModelConfig, config: BarleriaConfig) -> None:
        super().__init__()
        vision, width = model.vision, config.side_width
        self.patch_embed = nn.Conv2d(3, width, vision.patch, vision.patch)
        # Without a row for a class token, as in the published code.
        self.positions = nn.Parameter(torch.empty(config.grid**2, width))
        self.queries = nn.Parameter(torch.empty(config.queries, width))
        self.query_positions = nn.Parameter(torch.empty(config.queries, width))
        self.words_in = _bottleneck(model.text.width, config.text_width, width)
        self.fuse_norms = nn.ModuleList(nn.LayerNorm(vision.width, eps=1e-6) for _ in config.fused)
        self.fuse = nn.ModuleList(nn.Linear(vision.width, width) for _ in config.fused)
        self.blocks = nn.ModuleList(SideBlock(width, config.side_heads) for _ in range(config.side_depth))
        self.feedback = nn.ModuleList(Feedback(width) for _ in range(config.side_depth))
        self.reconstruction = config.reconstruction
        for table in (self.positions, self.queries, self.query_positions):
            nn.init.normal_(table, std=0.02)
        for modules in (self.blocks, self.feedback):
            for module in modules.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for linear in self.fuse:
            assert isinstance(linear, nn.Linear)
            nn.init.kaiming_uniform_(linear.weight, a=1)
            nn.init.zeros_(linear.bias)

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return patches with positions: [B, 3, H, W] normalised images -> [B, N, S]."""
        embedded: Tensor = self.patch_embed(images)
        positions = interpolate_positions(self.positions[None], grid, "plain", num_prefix_rows=0)
        return embedded.flatten(2).transpose(1, 2) + positions

    def forward(
        self, patches: Tensor, tower_patches: Sequence[Tensor], words: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network.

        Args:
            patches: [B, N, S] from `embed`.
            tower_patches: [B, N, D] each: outputs of the vision tower's fused blocks.
            words: [B, L, T] f_t.

        Returns:
            The patches [B, N, S]; and, in training, the weighted auxiliary loss "reconstruction".
        """
        prompt = self.words_in(words)
        queries = (self.queries + self.query_positions).expand(len(patches), -1, -1)
        start = self._fuse(0, torch.cat((queries, prompt, patches), dim=1), tower_patches)
        x = start
        for block in self.blocks:
            x = block(x)
        feedback = self._feedback(x, prompt.mean(dim=1))
        x, inputs, outputs = start, [], []
        for number, (block, fed) in enumerate(zip(self.blocks, feedback, strict=True), 1):
            inputs.append(x)
            x = block(x, fed)
            outputs.append(x)
            x = self._fuse(number, x, tower_patches)
        losses = {}
        if self.training and self.reconstruction and torch.is_grad_enabled():
            losses["reconstruction"] = self.reconstruction * self._reconstruction_loss(inputs, outputs)
        return x[:, -patches.shape[1] :], losses

    def _fuse(self, number: int, x: Tensor, tower_patches: Sequence[Tensor]) -> Tensor:
        if number >= len(tower_patches):
            return x
        added = tower_patches[number]
        own, patches = x.split((x.shape[1] - added.shape[1], added.shape[1]), dim=1)
        return torch.cat((own, patches + self.fuse[number](self.fuse_norms[number](added))), dim=1)

    def _feedback(self, x: Tensor, prompt: Tensor) -> list[Tensor]:
        """Return each block's feedback from the tokens [B, P, S] and the mean word [B, S]."""
        # The published code normalises the mean word over the batch instead of over its channels. A
        # result then depends on the rest of its batch, and in a batch of one on nothing but signs.
        agreement = F.normalize(x, dim=-1) @ F.normalize(prompt, dim=-1)[:, :, None]
        x = x * agreement.clamp(0, 1)
        # x p p^T, with the published factor.
        x = 5 * (x @ prompt[:, :, None]) * prompt[:, None]
        feedback = []
        for step in reversed(self.feedback):
            assert isinstance(step, Feedback)
            x = step.back(x)
            feedback.append(step.feed(x))
        return feedback[::-1]

    def _reconstruction_loss(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        """Return the feedback steps' summed error as inverses; only the steps get gradients."""
        losses = []
        for step, before, after in zip(self.feedback, inputs, outputs, strict=True):
            assert isinstance(step, Feedback)
            losses.append(F.mse_loss(step.back(after.detach()), before.detach()))
        return torch.stack(losses).sum()
