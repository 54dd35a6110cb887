"""Blocks with slots for adapters, and the transformer block of most towers.

Shape letters: B batch, P tokens (prefix and patches, or text tokens), D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.models.layers.attention import attend
from dcris.models.layers.rope import Rotation, rotate_patches


@dataclass(frozen=True, slots=True)
class SlotContext:
    """Inputs of adapters besides the features. Passed as an argument, so that no module stores
    per-call state.
    """

    grid: tuple[int, int] | None = None
    """Patch rows and columns h, w; None in the text tower."""
    num_prefix_tokens: int = 0
    """Tokens before the patches or the words: class token and registers, or the start token, plus
    the tokens that a method inserts behind them."""
    text: Tensor | None = None
    """[B, L, T] token features of the finished text tower; None in the text tower, and where no
    adapter reads the text."""
    padding: Tensor | None = None
    """[B, L] bool, True where a text token is padding; given together with `text`."""
    mask: Tensor | None = None
    """[B, 1, 1, P] bool, True for the tokens that self attention attends to; None: all of them."""
    rotation: Rotation | None = None
    """DINOv3's rotation of queries and keys, for each patch; None for towers with a position table.
    """


_NO_CONTEXT = SlotContext()

Place = Literal["token_slot", "qkv_slot", "attention_slot", "mlp_slot"]
"""Names of the slots."""

Places = tuple[tuple[Place, ...], tuple[Place, ...]]
"""The slots of a block's first and second half, in the order in which they run."""


class Slot(nn.Module):
    """Base class of the adapters that a block can hold: TokenSlot, QkvSlot and BranchSlot.

    A block has four slots, in this order: `token_slot` (a TokenSlot) before everything else;
    `attention.qkv_slot` (a QkvSlot) behind the projection to queries, keys and values;
    `attention_slot` and `mlp_slot` (BranchSlots) at the ends of the two branches.
    """

    reads_text = False
    """Whether the output depends on the text. Everything before the first such slot is computed
    once for all expressions of an image."""

    def fold(self, block: "Block") -> None:
        """Change the block's own weights so that the block without this adapter gives the same
        output.

        Implemented by methods whose settings have `foldable = True`.
        """
        raise NotImplementedError


class TokenSlot(Slot):
    """An adapter that inserts or replaces tokens before a block."""

    num_added_tokens = 0
    """How many tokens it inserts, behind those that precede the patches or the words."""

    def forward(self, tokens: Tensor, context: SlotContext) -> Tensor:
        """Tokens that enter the block [B, P, D] -> [B, P + num_added_tokens, D]."""
        raise NotImplementedError


class QkvSlot(Slot):
    """An adapter that changes queries, keys and values."""

    def forward(self, qkv: Tensor, normed: Tensor, context: SlotContext) -> Tensor:
        """Output of the projection [B, P, 3D] and its input [B, P, D] -> changed [B, P, 3D]."""
        raise NotImplementedError


class BranchSlot(Slot):
    """An adapter at the end of a branch (attention or MLP)."""

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Return the changed branch output [B, P, D].

        Args:
            output: [B, P, D] output of the branch, before LayerScale.
            normed: [B, P, D] input of the branch: the output of its layer norm.
            residual: [B, P, D] the residual stream before that norm.
            context: further inputs.
        """
        return output

    def transform_residual(self, residual: Tensor) -> Tensor:
        """Return what the branch is added to: by default the residual stream [B, P, D]."""
        return residual


class EmptySlot(Slot):
    """A slot without an adapter, in any of the four places: its first input passes through."""

    num_added_tokens = 0

    def forward(self, x: Tensor, *others: Tensor | SlotContext) -> Tensor:
        """Return `x` unchanged."""
        return x

    def transform_residual(self, residual: Tensor) -> Tensor:
        """Return the residual stream unchanged."""
        return residual


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation CLIP was trained with; the exact GELU differs by up to
    0.02.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """Add a branch's output, times a learned factor per channel, to the residual (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """residual + gamma * branch, both [..., D]."""
        return torch.addcmul(residual, branch, self.gamma)


class Sum(nn.Module):
    """Add a branch's output to the residual stream, without a factor (CLIP)."""

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """residual + branch, both of any shape."""
        return residual + branch


class SelfAttention(nn.Module):
    """Multi-head self attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_slot: QkvSlot | EmptySlot = EmptySlot()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: SlotContext = _NO_CONTEXT) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        batch, tokens, width = x.shape
        qkv = self.qkv_slot(self.qkv(x), x, context).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if context.rotation is not None:
            query, key = rotate_patches(query, context.rotation), rotate_patches(key, context.rotation)
        mixed = attend(query, key, value, mask=context.mask, causal=self.causal)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Linear, activation, linear; the hidden layer is four times as wide."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.activation = activation
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gated MLP: silu(gate) * value, gate and value from one projection (DINOv2-giant)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Two thirds of the plain MLP's 4 * width, so that three matrices have as many weights as
        # two; rounded up to a multiple of 8.
        hidden = (8 * width // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


MlpKind = Literal["gelu", "quick_gelu", "swiglu"]


def _make_mlp(width: int, kind: MlpKind) -> nn.Module:
    if kind == "swiglu":
        return SwiGLU(width)
    return MLP(width, nn.GELU() if kind == "gelu" else QuickGELU())


class SlottedBlock(nn.Module):
    """A block in two halves, each of which may have slots for adapters.

    The halves can be called separately: what precedes the first slot that reads the text is
    computed once per image, and that slot is usually in the middle of a block.
    """

    places: Places

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        """Channels of the block's output, and of the features in its slots."""

    def has(self, place: Place) -> bool:
        """Whether the block has such a slot."""
        return any(place in half for half in self.places)

    def slot(self, place: Place) -> "Slot | EmptySlot":
        """Return the adapter in a slot, or the EmptySlot."""
        found: Slot | EmptySlot = getattr(self, place)
        return found

    def put(self, place: Place, adapter: "Slot | EmptySlot") -> None:
        """Put an adapter into a slot."""
        setattr(self, place, adapter)

    def attend(self, x: Tensor, context: SlotContext) -> Tensor:
        """Run the first half."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor, context: SlotContext, mlp_out: Tensor | None = None) -> Tensor:
        """Run the second half. `mlp_out` is the result of `precompute_mlp` for x, if known."""
        raise NotImplementedError

    def precompute_mlp(self, x: Tensor) -> Tensor:
        """Return what the second half computes of x before its slot."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: SlotContext) -> Tensor:
        """Both halves."""
        return self.feed_forward(self.attend(x, context), context)


class Block(SlottedBlock):
    """A pre-norm transformer block: attention, then an MLP. [B, P, D] -> [B, P, D]."""

    places: Places = (("token_slot", "qkv_slot", "attention_slot"), ("mlp_slot",))

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        layer_scale: bool = True,
        mlp: MlpKind = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width)
        self.token_slot: TokenSlot | EmptySlot = EmptySlot()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, causal)
        self.attention_slot: BranchSlot | EmptySlot = EmptySlot()
        self.scale1 = LayerScale(width) if layer_scale else Sum()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _make_mlp(width, mlp)
        self.mlp_slot: BranchSlot | EmptySlot = EmptySlot()
        self.scale2 = LayerScale(width) if layer_scale else Sum()

    def slot(self, place: Place) -> "Slot | EmptySlot":
        """Return the adapter in a slot, or the EmptySlot."""
        return self.attention.qkv_slot if place == "qkv_slot" else super().slot(place)

    def put(self, place: Place, adapter: "Slot | EmptySlot") -> None:
        """Put an adapter into a slot."""
        setattr(self.attention if place == "qkv_slot" else self, place, adapter)

    def attend(self, x: Tensor, context: SlotContext) -> Tensor:
        """First half [B, P, D]: transform_residual(x) + scale(slot(attention(norm(x))))."""
        x = self.token_slot(x, context)
        normed = self.norm1(x)
        branch = self.attention_slot(self.attention(normed, context), normed, x, context)
        summed: Tensor = self.scale1(self.attention_slot.transform_residual(x), branch)
        return summed

    def feed_forward(self, x: Tensor, context: SlotContext, mlp_out: Tensor | None = None) -> Tensor:
        """Second half [B, P, D]: transform_residual(x) + scale(slot(mlp(norm(x)))).

        `mlp_out` [B, P, D] is the MLP's output for x, where it is already known (`precompute_mlp`).
        """
        normed = self.norm2(x)
        mlp_out = self.mlp(normed) if mlp_out is None else mlp_out
        summed: Tensor = self.scale2(self.mlp_slot.transform_residual(x), self.mlp_slot(mlp_out, normed, x, context))
        return summed

    def precompute_mlp(self, x: Tensor) -> Tensor:
        """Return the MLP's output for x [B, P, D], before its slot."""
        mlp_out: Tensor = self.mlp(self.norm2(x))
        return mlp_out


def count_added_tokens(blocks: Iterable[nn.Module]) -> int:
    """Return how many tokens the token slots of the blocks insert into the sequence."""
    return sum(block.token_slot.num_added_tokens for block in blocks if isinstance(block, Block))
