"""Prompt tokens in both towers: learned tokens before the patches (VPT, Jia et al. 2022) and the
words (CoOp, Zhou et al. 2022).

They are shallow, or in every block (VPT's "deep"; in both towers at once as in MaPLe, Khattak et
al. 2023).

Shape letters: B batch, P tokens, D tower width.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcris.config import MethodConfig, ModelConfig, require_slots
from dcris.models.encoders.blocks import SlotContext, TokenSlot

Tokens = Annotated[int, Field(ge=0, le=1024, strict=True)]


class PromptsConfig(MethodConfig):
    """Tokens behind the class token and the registers, and behind the start token.

    Prompts have no positions, so the words keep the positions that the tower was trained with (CoOp
    shifts them) and expressions may be as long as without prompts. The towers' outputs contain no
    prompts.
    """

    name: Literal["prompts"] = "prompts"
    vision_tokens: Tokens = 50
    text_tokens: Tokens = 16
    deep: bool = False
    """Every block has its own prompts, which replace the outputs of the previous block's."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError for prompts in a vision tower without tokens."""
        if self.vision_tokens:
            require_slots("prompts (unless method.vision_tokens is 0)", (0,), "token_slot", model.vision)

    def attach(self, vision: Any, text: Any) -> None:
        """Insert the prompts before the first block and, if deep, replace them before each other
        block.
        """
        patch = 3 * vision.config.patch**2
        for tower, count, spread in (
            (vision, self.vision_tokens, (6 / (patch + vision.config.width)) ** 0.5),  # as in VPT
            (text, self.text_tokens, 0.02 * 3**0.5),  # the deviation of CoOp's normal distribution, 0.02
        ):
            for layer in range(len(tower.blocks) if self.deep else 1) if count else ():
                prompts = PromptTokens(count, tower.config.width, spread, insert=layer == 0)
                tower.blocks[layer].put("token_slot", prompts)


class PromptTokens(TokenSlot):
    """Tokens that are inserted, or that replace the tokens inserted before."""

    def __init__(self, count: int, width: int, spread: float, insert: bool) -> None:
        super().__init__()
        self.num_added_tokens = count if insert else 0
        self.tokens = nn.Parameter(torch.empty(count, width))
        nn.init.uniform_(self.tokens, -spread, spread)

    def forward(self, tokens: Tensor, context: SlotContext) -> Tensor:
        """Tokens [B, P, D] -> [B, P + num_added_tokens, D]."""
        start = context.num_prefix_tokens - len(self.tokens)
        behind = start if self.num_added_tokens else context.num_prefix_tokens
        prompts = self.tokens.expand(tokens.shape[0], -1, -1)
        return torch.cat((tokens[:, :start], prompts, tokens[:, behind:]), dim=1)
