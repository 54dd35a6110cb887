"""Prompt tokens in both towers: learned tokens before the patches (VPT, Jia et al. 2022) and before the words (CoOp, Zhou et
al. 2022), shallow or in every block (VPT's "deep"; both towers at once as in MaPLe, Khattak et al. 2023).

Shape letters: B batch, P tokens, D tower width.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcris.config import MethodConfig
from dcris.models.adapters.base import put
from dcris.models.encoders.blocks import Slot, SlotContext

Tokens = Annotated[int, Field(ge=0, le=1024, strict=True)]


class PromptsConfig(MethodConfig):
    """Tokens behind the class token and the registers, and behind the start token.

    They have no positions, so the words keep theirs, which the tower was trained with (CoOp shifts them), and a sentence may be
    as long as ever. What the towers hand on has no prompts in it; through attention it depends on them.
    """

    name: Literal["prompts"] = "prompts"
    vision_tokens: Tokens = 50
    text_tokens: Tokens = 16
    deep: bool = False
    """Tokens of their own for every block, in place of what the block before made of its own."""

    def attach(self, vision: Any, text: Any) -> None:
        """The first block's slot puts the tokens in, those of further blocks exchange them."""
        patch = 3 * vision.config.patch**2
        for tower, count, spread in (
            (vision, self.vision_tokens, (6 / (patch + vision.config.width)) ** 0.5),  # VPT's
            (text, self.text_tokens, 0.02 * 3**0.5),  # as wide as CoOp's normal of 0.02
        ):
            for layer in range(len(tower.blocks) if self.deep else 1) if count else ():
                prompts = PromptTokens(count, tower.config.width, spread, puts_in=layer == 0)
                put(tower.blocks[layer], "token_slot", prompts)


class PromptTokens(Slot):
    """Tokens that are put in, or that take the place of those put in before."""

    def __init__(self, count: int, width: int, spread: float, puts_in: bool) -> None:
        super().__init__()
        self.added_tokens = count if puts_in else 0
        self.tokens = nn.Parameter(torch.empty(count, width))
        nn.init.uniform_(self.tokens, -spread, spread)

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        """Tokens [B, P, D] -> [B, P + added_tokens, D]."""
        start = context.prefix - len(self.tokens)
        behind = start if self.added_tokens else context.prefix
        prompts = self.tokens.expand(output.shape[0], -1, -1)
        return torch.cat((output[:, :start], prompts, output[:, behind:]), dim=1)
