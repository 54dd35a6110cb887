"""BarLeRIa (Wang et al. 2024): flows on the residual streams, words among the patches, and a side network over all of it.

Shape letters: B batch, N patches, L text tokens, Q queries, D vision width, T text width, S side width, K planar flows.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from dcris.config import Blocks, Count, Layers, MethodConfig, Width
from dcris.models.adapters.base import attach_everywhere
from dcris.models.adapters.bridge import Bridge
from dcris.models.encoders.blocks import MLP, Slot
from dcris.models.encoders.clip_text import TextFeatures, TextState, TextTower
from dcris.models.encoders.vit import VisionState, VisionTower, as_map, interpolate_positions
from dcris.models.layers.attention import attend

if TYPE_CHECKING:
    from dcris.config import ModelConfig


class BarleriaConfig(MethodConfig):
    """All defaults are the published ones, but for the grid, which is that of 448 pixels in patches of 14."""

    name: Literal["barleria"] = "barleria"
    order: ClassVar[Literal["text first", "interleaved"]] = "interleaved"
    flow_length: Annotated[int, Field(ge=0, le=64, strict=True)] = 4
    """Planar flows in a row, behind the affine one; two such rows in every block."""
    text_width: Width = 32
    """Width between the words' embeddings and what of them goes among the patches; and before the side network."""
    side_width: Width = 144
    side_depth: Blocks = 8
    side_heads: Width = 3
    queries: Annotated[int, Field(ge=0, le=1024, strict=True)] = 128
    """Learned tokens of the side network."""
    fused: Layers = (0, 3, 6, 9)
    """The visual blocks (from 0) whose patches are added to the side network's: the first before its blocks, the second behind
    its first block, and so on."""
    grid: Count = 32
    """Side of the side network's position table."""
    reconstruction: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the side network's own loss, which teaches its feedback to go back through its blocks."""
    positions: bool = False
    """Train both towers' position tables too, as the published code does on CLIP's own vision tower."""

    def check(self, model: "ModelConfig") -> None:
        """Raise ValueError where the fused blocks are not the tower's, widths do not fit, or the slots are wanted by others."""
        depth = model.vision.depth
        if list(self.fused) != sorted(set(self.fused)) or any(layer >= depth for layer in self.fused):
            raise ValueError(
                f"method.fused {list(self.fused)} must be ascending numbers below the tower's {depth} blocks"
            )
        if len(self.fused) > self.side_depth + 1:
            raise ValueError(f"method.fused has more blocks than the side network's {self.side_depth} and one")
        if self.side_width % self.side_heads:
            raise ValueError(f"method.side_width {self.side_width} does not divide into {self.side_heads} heads")
        if model.text_adapter is not None:
            raise ValueError("text_adapter sits where barleria has its flows; set it to null")

    def attach(self, vision: Any, text: Any) -> None:
        """Flows in both halves of every block of both towers."""
        for place in ("attention_slot", "mlp_slot"):
            attach_everywhere((vision, text), place, lambda width: Flow(width, self.flow_length))

    def bridge(self, model: "ModelConfig") -> Bridge:
        """The words' way among the patches, and the side network."""
        return BarleriaBridge(model, self)

    def trains(self, name: str) -> bool:
        """The position tables, where that is asked for."""
        return self.positions and name in ("vision.positions", "text.positions")


class Flow(Slot):
    """An affine and K planar flows, which the residual stream goes through while the branch reads it as it was.

    z + scale_k tanh(weight_k z + bias_k), one k after the other. Almost the identity at the start.
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

    def carry(self, residual: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        z = self.shift + self.log_scale.exp() * residual
        for weight, bias, scale in zip(self.weights, self.biases, self.scales, strict=True):
            z = z + scale * torch.tanh(z @ weight + bias)[..., None]
        return z


def _between(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class BarleriaBridge(Bridge):
    """The words' embeddings go through the vision tower beside the patches; the finished words guide the side network."""

    def __init__(self, model: "ModelConfig", config: BarleriaConfig) -> None:
        super().__init__()
        self.words_in = _between(model.text.width, config.text_width, model.vision.width)
        for module in self.words_in:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.side = SideNetwork(model, config)
        self.fused = config.fused
        self.out = nn.Linear(config.side_width, model.head.width)

    def see(self, vision: VisionTower, images: Tensor, taps: Collection[int]) -> VisionState:
        """The patches, as the tower and as the side network embed them: words are among them from the first block on."""
        state = vision.start(images)
        return replace(state, aside=self.side.embed(images, state.grid))

    def read(self, text: TextTower, tokens: Tensor) -> TextState:
        """The embedded tokens."""
        return text.start(tokens)

    def join(
        self,
        vision: VisionTower,
        text: TextTower,
        state: VisionState,
        words: TextState,
        taps: Collection[int],
        share: float = 1.0,
    ) -> tuple[VisionState, TextFeatures, Tensor | None]:
        """Words among the patches, behind class token and registers; both towers; the side network."""
        guests = self.words_in(words.tokens)
        tokens = torch.cat((state.tokens[:, : vision.prefix], guests, state.tokens[:, vision.prefix :]), dim=1)
        state = replace(state, tokens=tokens, guests=guests.shape[1])
        wanted = sorted({*taps, *self.fused})
        state = vision.advance(state, taps=wanted)
        outputs = dict(zip(wanted, state.taps, strict=True))
        finished = text.finish(text.advance(words))
        embedded = state.aside
        assert embedded is not None
        seen = [outputs[layer][:, -embedded.shape[1] :] for layer in self.fused]
        patches = self.side(embedded, seen, finished.tokens, share)
        aside = as_map(self.out(patches), state.grid)
        return replace(state, taps=tuple(outputs[layer] for layer in sorted(taps))), finished, aside


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
        """[B, P, S] and feedback of the same shape, which is projected and added to the values -> [B, P, S]."""
        width = x.shape[-1]
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        if feedback is not None:
            # As in the published code, the values' bias counts twice.
            value = value + F.linear(feedback, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        x = x + self.proj(attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Feedback(nn.Module):
    """One step back through a block: what the block before is thought to have made, and what is fed to this one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.back = nn.Linear(width, width, bias=False)
        self.feed = nn.Linear(width, width, bias=False)


class SideNetwork(nn.Module):
    """A small transformer with top-down attention (Shi et al. 2023), over queries, words and patches of its own.

    It runs twice: once without the towers, to see which of its tokens agree with the mean word; these are sent back through
    linear maps, as feedback to the values of the second run, which the towers' patches are added to on the way.
    """

    def __init__(self, model: "ModelConfig", config: BarleriaConfig) -> None:
        super().__init__()
        vision, width = model.vision, config.side_width
        self.patch_embed = nn.Conv2d(3, width, vision.patch, vision.patch)
        # The first row, of the class token that the published network was made with, is left out there and here.
        self.positions = nn.Parameter(torch.empty(config.grid**2, width))
        self.queries = nn.Parameter(torch.empty(config.queries, width))
        self.query_positions = nn.Parameter(torch.empty(config.queries, width))
        self.words_in = _between(model.text.width, config.text_width, width)
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
        """[B, 3, H, W] normalised images -> [B, N, S] patches with positions."""
        table = torch.cat((self.positions[:1], self.positions))[None]  # the first row stands for a class token
        positions = interpolate_positions(table, grid, "plain")[:, 1:]
        embedded: Tensor = self.patch_embed(images)
        return embedded.flatten(2).transpose(1, 2) + positions

    def forward(self, patches: Tensor, seen: Sequence[Tensor], words: Tensor, share: float = 1.0) -> Tensor:
        """What the side network makes of the patches.

        Args:
            patches: [B, N, S] as embedded.
            seen: [B, N, D] each: what the fused blocks of the vision tower made of them.
            words: [B, L, T] f_t.
            share: of the batch whose mean loss is descended, these are so much.

        Returns [B, N, S].
        """
        prompt = self.words_in(words)
        queries = (self.queries + self.query_positions).expand(len(patches), -1, -1)
        start = self._fuse(0, torch.cat((queries, prompt, patches), dim=1), seen)
        x = start
        for block in self.blocks:
            x = block(x)
        feedback = self._go_back(x, prompt.mean(dim=1))
        x, entered, left = start, [], []
        for number, (block, fed) in enumerate(zip(self.blocks, feedback, strict=True), 1):
            entered.append(x)
            x = block(x, fed)
            left.append(x)
            x = self._fuse(number, x, seen)
        result = x[:, -patches.shape[1] :]
        if self.training and self.reconstruction and torch.is_grad_enabled():
            penalty = share * self.reconstruction * self._penalty(entered, left)
            result = _WithPenalty.apply(result, penalty)  # type: ignore[no-untyped-call]
        return result

    def _fuse(self, number: int, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        if number >= len(seen):
            return x
        own, patches = x.split((x.shape[1] - seen[number].shape[1], seen[number].shape[1]), dim=1)
        return torch.cat((own, patches + self.fuse[number](self.fuse_norms[number](seen[number]))), dim=1)

    def _go_back(self, x: Tensor, prompt: Tensor) -> list[Tensor]:
        """Feedback for each block, from the tokens [B, P, S] that agree with the mean word [B, S]."""
        # The published code normalises the mean word over the batch instead of over its channels. Then an answer depends on
        # what else is asked in the same batch, and for a batch of one on nothing but signs.
        agreement = F.normalize(x, dim=-1) @ F.normalize(prompt, dim=-1)[:, :, None]
        x = x * agreement.clamp(0, 1)
        # x p p^T, and the published factor.
        x = 5 * (x @ prompt[:, :, None]) * prompt[:, None]
        feedback = []
        for step in reversed(self.feedback):
            assert isinstance(step, Feedback)
            x = step.back(x)
            feedback.append(step.feed(x))
        return feedback[::-1]

    def _penalty(self, entered: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
        """How far each step back is from undoing its block; only the steps learn from it."""
        losses = []
        for step, before, after in zip(self.feedback, entered, left, strict=True):
            assert isinstance(step, Feedback)
            losses.append(F.mse_loss(step.back(after.detach()), before.detach()))
        return torch.stack(losses).sum()


class _WithPenalty(torch.autograd.Function):
    """A tensor as it is, whose backward pass also descends a penalty: as if it were added to the loss, which no method sees."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, penalty: Tensor) -> Tensor:
        """[B, N, S] and [] -> the same [B, N, S]."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient passes; the penalty's is 1."""
        (gradient,) = gradients
        return gradient, gradient.new_ones(())
