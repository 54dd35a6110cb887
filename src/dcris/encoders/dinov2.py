"""The vision tower: DINOv2 with registers (Oquab et al. 2023; Darcet et al. 2024), or DINOv3 (Simeoni et al. 2025).

DINOv3 differs in how it knows where a patch is (no table; dcris.encoders.rotary), in its norms' eps, and in that its keys have
no bias: ours have one of zeros, so that both families are one block.

Shape letters: B batch, H W pixels, h w patch grid, N = h*w patches, R registers, P = 1 + R + N tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import PositionRule, VisionConfig
from dcris.encoders.blocks import Block, SlotContext, added_tokens
from dcris.encoders.recompute import recomputed
from dcris.encoders.rotary import patch_rotation


@dataclass(frozen=True, slots=True)
class VisionState:
    """A vision tower stopped on its way. Whatever does not depend on the text is run once and then taken up per phrase."""

    tokens: Tensor
    """[B, P, D]"""
    grid: tuple[int, int]
    step: int
    """Half blocks done: 2i means that block i is next, 2i + 1 that its second half is."""
    taps: tuple[Tensor, ...] = ()
    """[B, P, D] each: outputs collected so far."""

    def select(self, index: Tensor) -> "VisionState":
        """The state with images picked by `index` [B'] int64, an image as often as it has phrases."""
        return replace(self, tokens=self.tokens[index], taps=tuple(tap[index] for tap in self.taps))


class VisionTower(nn.Module):
    """DINOv2 with registers or DINOv3, any width and depth, any input whose sides are multiples of the patch size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, str] = {}
        """Where its weights came from, as dcris.encoders.weights.fill_tower found out."""
        self.checkpoint_activations = False
        """Whether half blocks with gradients are run again in the backward pass instead of remembered."""
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, config.registers, width))
        # Never read when segmenting; it is part of the published weights, which are read strictly.
        self.rotary = config.family == "dinov3"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width) if self.rotary else torch.zeros(1, width))
        if not self.rotary:
            self.positions = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        eps = 1e-5 if self.rotary else 1e-6
        self.blocks = nn.ModuleList(Block(width, config.heads, mlp=config.mlp, eps=eps) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        for table in (self.class_token, self.registers, *(() if self.rotary else (self.positions,))):
            nn.init.trunc_normal_(table, std=0.02)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, the registers, and what a method puts in behind them."""
        return 1 + self.config.registers + added_tokens(self.blocks)

    @property
    def first_text_step(self) -> int:
        """The first half block whose slot reads the text; 2 * depth where none does. Half blocks before it are shared."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            before = block.token_slot, block.attention.qkv_slot, block.attention_slot
            for half, slots in enumerate((before, (block.mlp_slot,))):
                if any(slot.reads_text for slot in slots):
                    return 2 * index + half
        return 2 * len(self.blocks)

    def start(self, images: Tensor) -> VisionState:
        """Embed patches: [B, 3, H, W] normalised images -> the state before the first block.

        Raises ValueError where H or W is not a multiple of the patch size.
        """
        patch = self.config.patch
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels do not divide into patches of {patch}")
        patches = self.patch_embed(images)
        batch, _, rows, columns = patches.shape
        patches = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(batch, -1, -1), patches), dim=1)
        if not self.rotary:
            tokens = tokens + interpolate_positions(self.positions, (rows, columns), self.config.position_rule)
        # The registers come after the class token and have no position.
        tokens = torch.cat((tokens[:, :1], self.registers.expand(batch, -1, -1), tokens[:, 1:]), dim=1)
        return VisionState(tokens, (rows, columns), 0)

    def advance(
        self,
        state: VisionState,
        stop: int | None = None,
        *,
        text: Tensor | None = None,
        padding: Tensor | None = None,
        taps: Iterable[int] = (),
    ) -> VisionState:
        """Run half blocks from `state.step` up to but not including `stop` (to the end by default).

        Args:
            state: where to go on from.
            stop: a number of half blocks, or None for all.
            text: [B, L, T] for the slots that read it.
            padding: [B, L] bool, True where a token of the text is padding.
            taps: blocks (from 0) whose outputs are collected on the way.
        """
        width = self.config.width // self.config.heads
        rotation = patch_rotation(state.grid, width, state.tokens) if self.rotary else None
        context = SlotContext(grid=state.grid, prefix=self.prefix, text=text, padding=padding, rotation=rotation)
        wanted = set(taps)
        tokens, collected = state.tokens, list(state.taps)
        stop = 2 * len(self.blocks) if stop is None else stop
        for step in range(state.step, stop):
            index, half = divmod(step, 2)
            block = self.blocks[index]
            assert isinstance(block, Block)
            run = block.feed if half else block.attend
            # Before the first adapter there is no gradient, so nothing is kept that could be done without.
            if self.checkpoint_activations and torch.is_grad_enabled() and (tokens.requires_grad or _trains(block)):
                tokens = recomputed(block, run, tokens, context)
            else:
                tokens = run(tokens, context)
            if half and index in wanted:
                collected.append(tokens)
        return VisionState(tokens, state.grid, max(stop, state.step), tuple(collected))

    def finish(self, state: VisionState) -> Tensor:
        """The last layer norm: [B, P, D]."""
        normed: Tensor = self.norm(state.tokens)
        return normed

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, P, D], the final normalised tokens."""
        return self.finish(self.advance(self.start(images), text=text))


def _trains(block: Block) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def interpolate_positions(table: Tensor, grid: tuple[int, int], rule: PositionRule) -> Tensor:
    """Bring a table [1, 1 + g*g, D] of positions to another patch grid: [1, 1 + h*w, D].

    Two rules are in circulation and differ by up to a few per cent of a position's norm. "exact" resizes with antialiasing
    to the exact grid (Meta's hub entry for the register models, and transformers). "offset" multiplies by (h + 0.1) / g and
    does not antialias (Meta's first release, and the published DETRIS code, so also what the paper trained with).
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "exact":
        resized = F.interpolate(patches.float(), size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        resized = F.interpolate(patches.float(), scale_factor=factors, mode="bicubic", antialias=False)
    resized = resized.to(table.dtype).permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat((table[:, :1], resized), dim=1)
