"""The base class of the vision towers. They run half a block at a time, so that the expressions of
an image share everything that does not depend on the text.

Shape letters: B batch, H W pixels, h w patch grid, N = h*w patches, P tokens (prefix, then
patches), D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import PositionRule, VisionConfig
from dcris.models.encoders.blocks import SlotContext, SlottedBlock, count_added_tokens
from dcris.models.layers.activation_checkpointing import recomputed
from dcris.models.layers.rope import Rotation


@dataclass(frozen=True, slots=True)
class VisionState:
    """A vision tower that has run up to some half block. `VisionTower.advance` continues it."""

    tokens: Tensor
    """[B, P, D]; in a convolutional tower a map [B, D, y, x] of any stride, as all tensors here."""
    grid: tuple[int, int]
    """Patch rows and columns h, w."""
    num_prefix_tokens: int
    """Tokens before the patches, including those that a method inserts."""
    step: int = 0
    """Half blocks done: 2i means that block i is next, 2i + 1 that its second half is."""
    mlp_out: Tensor | None = None
    """[B, P, D] output of the next half block's MLP, if already computed (`precompute_mlp`)."""
    layer_outputs: tuple[Tensor, ...] = ()
    """[B, P, D] each: outputs of the feature layers that have run."""

    def select(self, index: Tensor) -> Self:
        """Return the state of the images `index` [B'] int64, for example one row per expression."""
        # index_select and not tensor[index], whose gradient is summed in any order by several
        # threads. But index_select forgets channels_last.
        return self.with_tensors([tensor.index_select(0, index) for tensor in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """Return all tensors, also those that a subclass adds; each has the image as its first
        dimension.
        """
        values = (getattr(self, field.name) for field in fields(self))
        return [item for value in values for item in _as_tuple(value) if isinstance(item, Tensor)]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """Return the state with other tensors, in the order of `tensors()` and in their memory
        layout.
        """
        rest = iter(tensors)
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = _in_layout_of(value, next(rest))
            elif isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
                changes[field.name] = tuple(_in_layout_of(item, next(rest)) for item in value)
        return replace(self, **changes)

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the patches among a tower's tokens as a map: [B, P, C] -> [B, C, h, w]."""
        rows, columns = self.grid
        return as_map(tokens[:, -rows * columns :], self.grid)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens as a map in channels-last memory layout: [B, h*w, C] -> [B, C, h, w].

    Unflatten first, then permute: transposing first gives a single image strides in which torch
    does not recognise channels_last, and every convolution then copies the map.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class VisionTower(nn.Module):
    """Patch embedding, blocks and a last norm. Subclasses create them and implement `embed`."""

    config: VisionConfig
    patch_embed: nn.Conv2d
    blocks: nn.ModuleList
    norm: nn.LayerNorm

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, str] = {}
        """Where the weights come from; set by dcris.checkpoints.backbones.fill_tower."""
        self.checkpoint_activations = False
        """Whether half blocks with gradients are recomputed in the backward pass."""

    @classmethod
    def check(cls, config: VisionConfig) -> None:
        """Raise ValueError where the configuration does not fit this architecture."""

    @classmethod
    def has(cls, config: VisionConfig, layer: int, place: str) -> bool:
        """Whether a block has a slot of that name; a transformer's has all of them."""
        return True

    @classmethod
    def block_width(cls, config: VisionConfig, layer: int) -> int:
        """Return the channels of a block's output; a transformer's blocks are all alike."""
        return config.width

    @property
    def num_own_prefix_tokens(self) -> int:
        """Tokens that `embed` puts before the patches: class token and registers."""
        return 1 + self.config.registers

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches, including those that the token slots insert."""
        return self.num_own_prefix_tokens + count_added_tokens(self.blocks)

    @property
    def first_text_step(self) -> int:
        """The first half block with a slot that reads the text; 2 * depth if there is none.

        All half blocks before it are shared by the expressions of an image.
        """
        for index, block in enumerate(self.blocks):
            assert isinstance(block, SlottedBlock)
            for half, places in enumerate(block.places):
                if any(block.slot(place).reads_text for place in places):
                    return 2 * index + half
        return 2 * len(self.blocks)

    def start(self, images: Tensor) -> VisionState:
        """Embed patches: [B, 3, H, W] normalised images -> the state before the first block.

        Raises ValueError where H or W is not a multiple of the patch size.
        """
        patch = self.config.patch
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels cannot be cut into patches of {patch}")
        patches = self.patch_embed(images)
        _, _, rows, columns = patches.shape
        tokens = self.embed(patches.flatten(2).transpose(1, 2), (rows, columns))
        return VisionState(tokens, (rows, columns), self.num_prefix_tokens)

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the input of the first block: [B, N, D] patches -> [B, P, D]."""
        raise NotImplementedError

    def positions_on(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table, where the tower has one, on a patch grid: [1, 1 + h*w, D].

        The table's first row is that of the class token. A tower without one has [1, h*w, D].
        """
        table = self.positions
        assert isinstance(table, Tensor)
        table = table.view(1, *table.shape[-2:])
        return interpolate_positions(table, grid, self.config.position_rule, int(self.num_own_prefix_tokens > 0))

    def rotation(self, state: VisionState) -> Rotation | None:
        """Return the rotation of the patches' queries and keys (DINOv3); None for other towers."""
        return None

    def advance(
        self,
        state: VisionState,
        stop: int | None = None,
        *,
        text: Tensor | None = None,
        padding: Tensor | None = None,
        feature_layers: Iterable[int] = (),
    ) -> VisionState:
        """Run half blocks from `state.step` up to but not including `stop`.

        Args:
            state: where to continue.
            stop: a number of half blocks; None runs all.
            text: [B, L, T] token features for the slots that read the text.
            padding: [B, L] bool, True where a token of the text is padding.
            feature_layers: blocks (0-based) whose outputs are appended to `layer_outputs`.
        """
        context = SlotContext(
            grid=state.grid,
            num_prefix_tokens=state.num_prefix_tokens,
            text=text,
            padding=padding,
            rotation=self.rotation(state),
        )
        wanted = set(feature_layers)
        tokens, mlp_out, outputs = state.tokens, state.mlp_out, list(state.layer_outputs)
        stop = 2 * len(self.blocks) if stop is None else stop
        for step in range(state.step, stop):
            index, half = divmod(step, 2)
            block = self.blocks[index]
            assert isinstance(block, SlottedBlock)
            run, arguments = (
                (block.feed_forward, (tokens, context, mlp_out)) if half else (block.attend, (tokens, context))
            )
            # Before the first adapter there are no gradients, so nothing is stored for the backward
            # pass.
            if self.checkpoint_activations and torch.is_grad_enabled() and (tokens.requires_grad or _trains(block)):
                tokens = recomputed(block, run, *arguments)
            else:
                tokens = run(*arguments)
            mlp_out = None
            if half and index in wanted:
                outputs.append(tokens)
        return replace(state, tokens=tokens, mlp_out=mlp_out, step=max(stop, state.step), layer_outputs=tuple(outputs))

    def precompute_mlp(self, state: VisionState) -> VisionState:
        """Return the state with the output of the next MLP, if the next half block has one.

        Only the slot behind that MLP reads the text, so all expressions of an image share it.
        """
        index, half = divmod(state.step, 2)
        if not half:
            return state
        block = self.blocks[index]
        assert isinstance(block, SlottedBlock)
        return replace(state, mlp_out=block.precompute_mlp(state.tokens))

    def finish(self, state: VisionState) -> Tensor:
        """Apply the last layer norm: [B, P, D]."""
        normed: Tensor = self.norm(state.tokens)
        return normed

    @classmethod
    def level_widths(cls, config: VisionConfig, feature_layers: tuple[int, int]) -> tuple[int, int, int]:
        """Return the channels of each of the `levels`."""
        return config.width, config.width, config.out_width

    def levels(self, state: VisionState) -> list[Tensor]:
        """Return the three maps [B, C, h, w] that the neck reads, of a tower that has run to its
        end: the outputs of the two feature layers, and of the tower.
        """
        return [state.patches(tokens) for tokens in (*state.layer_outputs, self.finish(state))]

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, P, D], the final normalised tokens."""
        return self.finish(self.advance(self.start(images), text=text))


def _trains(block: SlottedBlock) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def interpolate_positions(table: Tensor, grid: tuple[int, int], rule: PositionRule, num_prefix_rows: int = 1) -> Tensor:
    """Resize a position table [1, R + g*g, D] to another patch grid: [1, R + h*w, D].

    Three rules are in use; their results differ by up to a few per cent of a position's norm.
    "exact": antialiased, to the exact grid (Meta's hub entry for the register models, and
    transformers for DINOv2). "offset": scale factor (h + 0.1) / g, not antialiased (Meta's first
    release and the published DETRIS code, so also the one the paper trained with). "plain": to the
    exact grid, not antialiased (transformers for CLIP, and the published ETRIS code).

    Args:
        table: positions; the first R = `num_prefix_rows` rows are copied.
        grid: rows and columns h, w.
        rule: which of the three.
        num_prefix_rows: 1 for a table with a row for the class token, else 0.
    """
    side = round((table.shape[1] - num_prefix_rows) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, num_prefix_rows:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "plain":
        resized = F.interpolate(patches, size=grid, mode="bicubic")
    elif rule == "exact":
        resized = F.interpolate(patches.float(), size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        resized = F.interpolate(patches.float(), scale_factor=factors, mode="bicubic", antialias=False)
    resized = resized.to(table.dtype).permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat((table[:, :num_prefix_rows], resized), dim=1)
