"""Compacter (Karimi Mahabadi et al. 2021): Houlsby's bottlenecks, with matrices that are sums of
Kronecker products.

Shape letters: B batch, P tokens, D tower width, k adapter width, n terms of the sum, r rank of a
term's large factor.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import VISION_FAMILIES, MethodConfig, ModelConfig, Positive, Width
from dcris.models.adapters.attach import is_layer_norm
from dcris.models.encoders.blocks import BranchSlot, Place, SlotContext

_PLACES: tuple[Place, Place] = ("attention_slot", "mlp_slot")


class CompacterConfig(MethodConfig):
    """Both towers, every block, after attention and after the MLP. Width and rank give the paper's
    count.
    """

    name: Literal["compacter"] = "compacter"
    width: Width = 384
    rank: Width = 16
    terms: Annotated[int, Field(gt=0, le=64, strict=True)] = 4
    """n. The widths of the towers' blocks and `width` must be multiples of it."""
    norms: bool = False
    """Train the towers' layer norms too, as the source does."""
    rule_deviation: Positive = 1e-4
    """Standard deviation of the shared rule at the start, as in configs/compacter.json of the
    source."""
    zero_init: bool = False
    """Start the up-projection at zero, so that the tower starts exactly, not approximately, as the
    plain one."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError where a matrix cannot be divided into n x n parts."""
        vision, tower = model.vision, VISION_FAMILIES[model.vision.family].tower
        adapted = [layer for layer in range(vision.depth) if any(tower.has(vision, layer, place) for place in _PLACES)]
        for key, width in (
            ("method.width", self.width),
            *((f"block {layer} of the vision encoder: width", tower.block_width(vision, layer)) for layer in adapted),
            ("text.width", model.text.width),
        ):
            if width % self.terms:
                raise ValueError(f"{key} {width} must be a multiple of method.terms {self.terms}")

    def attach(self, vision: Any, text: Any) -> None:
        """Put two adapters into each block; those of a tower share one rule, which the first of
        them holds.
        """
        for tower in (vision, text):
            first: CompacterAdapter | None = None
            for block in tower.blocks:
                for place in filter(block.has, _PLACES):
                    adapter = CompacterAdapter(block.width, self, first)
                    first = first or adapter
                    block.put(place, adapter)

    def trains(self, name: str) -> bool:
        """Return whether the weight belongs to a layer norm, if `norms` is set."""
        return self.norms and is_layer_norm(name)


class HypercomplexLinear(nn.Module):
    """y = x H + b with H [inputs, outputs] = sum over i of A_i (x) (S_i T_i); A is the rule that
    layers share.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, terms: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(terms, inputs // terms, rank))
        self.right = nn.Parameter(torch.empty(terms, rank, outputs // terms))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (*self.left, *self.right):
            nn.init.xavier_uniform_(factor, gain=2**0.5)  # the source's "glorot-uniform"

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """[B, P, inputs] and the rule A [n, n, n] -> [B, P, outputs]."""
        # Building H is cheap compared with its product with the tokens. Indices: i term; a, b
        # within A_i; p, q within S_i T_i.
        weight = torch.einsum("iab,ipq->apbq", rule, self.left @ self.right).flatten(2).flatten(0, 1)
        return F.linear(x, weight.t(), self.bias)


class CompacterAdapter(BranchSlot):
    """x + up(GELU(down(x))) on the branch's output, before LayerScale and the residual sum."""

    def __init__(self, width: int, config: CompacterConfig, first: "CompacterAdapter | None") -> None:
        super().__init__()
        # In a tuple, so that torch does not register another block's adapter as a submodule of this
        # one.
        self._first = () if first is None else (first,)
        if first is None:
            self.rule = nn.Parameter(torch.empty(config.terms, config.terms, config.terms))
            nn.init.normal_(self.rule, std=config.rule_deviation)
        self.down = HypercomplexLinear(width, config.width, config.rank, config.terms)
        self.up = HypercomplexLinear(config.width, width, config.rank, config.terms)
        if config.zero_init:
            nn.init.zeros_(self.up.left)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Branch output [B, P, D] -> adapted output [B, P, D]."""
        # Looked up at each call, since loading a checkpoint may replace the tensor.
        rule = self._first[0].rule if self._first else self.rule
        return output + self.up(F.gelu(self.down(output, rule), approximate="tanh"), rule)
