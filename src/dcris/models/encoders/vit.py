"""What the vision towers have in common: they are run half a block at a time, so that phrases share what they can.

Shape letters: B batch, H W pixels, h w patch grid, N = h*w patches, P tokens (prefix, then patches), D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import PositionRule, VisionConfig
from dcris.models.encoders.blocks import Block, SlotContext, added_tokens
from dcris.models.layers.activation_checkpointing import recomputed
from dcris.models.layers.rope import Rotation


@dataclass(frozen=True, slots=True)
class VisionState:
    """A vision tower stopped on its way. Whatever does not depend on the text is run once and then taken up per phrase."""

    tokens: Tensor
    """[B, P, D]"""
    grid: tuple[int, int]
    step: int
    """Half blocks done: 2i means that block i is next, 2i + 1 that its second half is."""
    made: Tensor | None = None
    """[B, P, D] what the next half block's MLP makes of the tokens, where that is known already."""
    taps: tuple[Tensor, ...] = ()
    """[B, P, D] each: outputs collected so far."""
    guests: int = 0
    """Words that go through the tower behind its prefix, where a method puts some in (dcris.models.adapters.barleria)."""
    aside: Tensor | None = None
    """[B, N, S] the patches as a side network embeds them; None where there is no such network."""

    def select(self, index: Tensor) -> "VisionState":
        """The state with images picked by `index` [B'] int64, an image as often as it has phrases."""
        made, aside = (None if x is None else x[index] for x in (self.made, self.aside))
        taps = tuple(tap[index] for tap in self.taps)
        return replace(self, tokens=self.tokens[index], made=made, taps=taps, aside=aside)

    def patches(self, tokens: Tensor) -> Tensor:
        """The patches among a tower's tokens, as a map: [B, P, C] -> [B, C, h, w]."""
        rows, columns = self.grid
        return as_map(tokens[:, -rows * columns :], self.grid)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens as a map whose channels come last in memory, without a copy: [B, h*w, C] -> [B, C, h, w].

    The order matters: transposed before they are unflattened, tokens of one photograph get strides in which torch does not
    see that channels come last, and every convolution moves the map in memory.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class VisionTower(nn.Module):
    """Patches, blocks and a last norm; the subclass embeds the patches and finishes."""

    config: VisionConfig
    patch_embed: nn.Conv2d
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, str] = {}
        """Where its weights came from, as dcris.checkpoints.backbones.fill_tower found out."""
        self.checkpoint_activations = False
        """Whether half blocks with gradients are run again in the backward pass instead of remembered."""

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
        _, _, rows, columns = patches.shape
        return VisionState(self.embed(patches.flatten(2).transpose(1, 2), (rows, columns)), (rows, columns), 0)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """What enters the first block: [B, N, D] patches -> [B, P, D]."""
        raise NotImplementedError

    def positions_on(self, grid: tuple[int, int]) -> Tensor:
        """The table of positions, where there is one, on a grid of patches: [1, 1 + h*w, D]."""
        table = self.positions
        assert isinstance(table, Tensor)
        return interpolate_positions(table.view(1, *table.shape[-2:]), grid, self.config.position_rule)

    def rotation(self, state: VisionState) -> Rotation | None:
        """What the patches' queries and keys are turned by, where positions are told in that way."""
        return None

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
        context = SlotContext(
            grid=state.grid,
            prefix=self.prefix + state.guests,
            text=text,
            padding=padding,
            rotation=self.rotation(state),
        )
        wanted = set(taps)
        tokens, made, collected = state.tokens, state.made, list(state.taps)
        stop = 2 * len(self.blocks) if stop is None else stop
        for step in range(state.step, stop):
            index, half = divmod(step, 2)
            block = self.blocks[index]
            assert isinstance(block, Block)
            run, arguments = (block.feed, (tokens, context, made)) if half else (block.attend, (tokens, context))
            # Before the first adapter there is no gradient, so nothing is kept that could be done without.
            if self.checkpoint_activations and torch.is_grad_enabled() and (tokens.requires_grad or _trains(block)):
                tokens = recomputed(block, run, *arguments)
            else:
                tokens = run(*arguments)
            made = None
            if half and index in wanted:
                collected.append(tokens)
        return replace(state, tokens=tokens, made=made, step=max(stop, state.step), taps=tuple(collected))

    def foresee(self, state: VisionState) -> VisionState:
        """The state with what the next half block's MLP, if it has one, makes of the tokens: only its slot reads the text."""
        index, half = divmod(state.step, 2)
        if not half:
            return state
        block = self.blocks[index]
        assert isinstance(block, Block)
        return replace(state, made=block.foresee(state.tokens))

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

    Three rules are in circulation and differ by up to a few per cent of a position's norm. "exact" resizes with antialiasing
    to the exact grid (Meta's hub entry for the register models, and transformers for DINOv2). "offset" multiplies by
    (h + 0.1) / g and does not antialias (Meta's first release, and the published DETRIS code, so also what the paper trained
    with). "plain" resizes to the exact grid and does not antialias (transformers for CLIP, and the published ETRIS code).
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "plain":
        resized = F.interpolate(patches, size=grid, mode="bicubic")
    elif rule == "exact":
        resized = F.interpolate(patches.float(), size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        resized = F.interpolate(patches.float(), scale_factor=factors, mode="bicubic", antialias=False)
    resized = resized.to(table.dtype).permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat((table[:, :1], resized), dim=1)
