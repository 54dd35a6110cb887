"""The transformer block both towers are made of, with a slot in each branch where an adapter goes.

Shape letters: B batch, P tokens (class, registers and patches, or text tokens), D width.
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
    """What an adapter may need beside the branch it sits in. It is an argument, so that no module keeps per-call state."""

    grid: tuple[int, int] | None = None
    """Patch rows and columns h, w; None in the text tower."""
    prefix: int = 0
    """Tokens before the patches or the words: class token and registers, or the start token, and what a method puts in."""
    text: Tensor | None = None
    """[B, L, T] token features of the finished text tower; None in the text tower itself, and where nothing reads the text."""
    padding: Tensor | None = None
    """[B, L] bool: True where a text token is padding; there wherever `text` is."""
    rotation: Rotation | None = None
    """Of DINOv3's queries and keys, by patch; None where positions are a table."""


_NOTHING = SlotContext()


class Slot(nn.Module):
    """A place in a block for an adapter. This one is empty: what would be there without it passes through.

    A block has four, in this order: `token_slot` before everything, where tokens may be put in or exchanged;
    `attention.qkv_slot` behind the projection to queries, keys and values; `attention_slot` and `mlp_slot` at the ends of the
    two branches.
    """

    reads_text = False
    """Whether the output depends on the text: what comes before the first such slot is shared by all phrases of an image."""
    added_tokens = 0
    """How many tokens it puts in, behind those that come before the patches or the words. For a `token_slot` alone."""

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Return what takes the place of `output`.

        Args:
            output: [B, P, D] what the branch (attention or MLP) made, before LayerScale. A `qkv_slot` gets what the projection
                made [B, P, 3D], a `token_slot` the tokens that enter the block.
            normed: [B, P, D] what the branch or the projection read: the layer norm's output. A `token_slot` gets the tokens.
            residual: [B, P, D] the residual stream before that norm. A `qkv_slot` gets `normed`, a `token_slot` the tokens.
            context: the rest an adapter may read.
        """
        return output

    def carry(self, residual: Tensor) -> Tensor:
        """What the branch is added to: the residual stream [B, P, D] as it is, unless a method changes that too.

        Not for a `token_slot` or a `qkv_slot`.
        """
        return residual

    def merge(self, block: "Block") -> bool:
        """Add to the block's own weights what has the same effect as this slot, and say whether that can be done."""
        return False


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation CLIP was trained with; the exact GELU differs by up to 0.02."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A learned factor per channel on a branch's output (DINOv2), and the sum with the residual stream, in one pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        """residual + gamma * branch, both [..., D]."""
        return torch.addcmul(residual, branch, self.gamma)


class Sum(nn.Module):
    """The same without a factor (CLIP)."""

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
        self.qkv_slot = Slot()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: SlotContext = _NOTHING) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        batch, tokens, width = x.shape
        qkv = self.qkv_slot(self.qkv(x), x, x, context).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if context.rotation is not None:
            query, key = rotate_patches(query, context.rotation), rotate_patches(key, context.rotation)
        mixed = attend(query, key, value, causal=self.causal)
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
        # Two thirds of the plain MLP's 4 * width, so that three matrices weigh what two did; rounded up to eights.
        hidden = (8 * width // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _make_mlp(width: int, kind: Literal["gelu", "quick_gelu", "swiglu"]) -> nn.Module:
    if kind == "swiglu":
        return SwiGLU(width)
    return MLP(width, nn.GELU() if kind == "gelu" else QuickGELU())


class Block(nn.Module):
    """A pre-norm transformer block in two halves, with slots on the way.

    The halves are callable apart because what precedes the first slot that reads text is computed once per image, and that
    is usually in the middle of a block.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        layer_scale: bool = True,
        mlp: Literal["gelu", "quick_gelu", "swiglu"] = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.token_slot = Slot()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, causal)
        self.attention_slot = Slot()
        self.scale1 = LayerScale(width) if layer_scale else Sum()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = _make_mlp(width, mlp)
        self.mlp_slot = Slot()
        self.scale2 = LayerScale(width) if layer_scale else Sum()

    def attend(self, x: Tensor, context: SlotContext) -> Tensor:
        """The first half: carry(x) + scale(slot(attention(norm(x)))). [B, P, D] -> [B, P, D]."""
        x = self.token_slot(x, x, x, context)
        normed = self.norm1(x)
        branch = self.attention_slot(self.attention(normed, context), normed, x, context)
        summed: Tensor = self.scale1(self.attention_slot.carry(x), branch)
        return summed

    def feed(self, x: Tensor, context: SlotContext, made: Tensor | None = None) -> Tensor:
        """The second half: carry(x) + scale(slot(mlp(norm(x)))). [B, P, D] -> [B, P, D].

        `made` [B, P, D] is what the MLP makes of x, where that is known already (`foresee`).
        """
        normed = self.norm2(x)
        made = self.mlp(normed) if made is None else made
        summed: Tensor = self.scale2(self.mlp_slot.carry(x), self.mlp_slot(made, normed, x, context))
        return summed

    def foresee(self, x: Tensor) -> Tensor:
        """What the second half's MLP will make of x, before its slot looks at the text. [B, P, D] -> [B, P, D]."""
        made: Tensor = self.mlp(self.norm2(x))
        return made

    def forward(self, x: Tensor, context: SlotContext) -> Tensor:
        """Both halves. [B, P, D] -> [B, P, D]."""
        return self.feed(self.attend(x, context), context)


def added_tokens(blocks: Iterable[nn.Module]) -> int:
    """How many tokens a method puts into the sequence that goes through the blocks."""
    count = 0
    for block in blocks:
        assert isinstance(block, Block)
        count += block.token_slot.added_tokens
    return count
