"""The base class of the text towers, and what they return.

Shape letters: B batch, L text tokens, T width, E width of the sentence feature.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcris.config import TextConfig
from dcris.models.encoders.blocks import SlotContext, count_added_tokens


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Output of a text tower for B expressions."""

    tokens: Tensor
    """f_t [B, L, T]: token features after the final layer norm."""
    sentence: Tensor
    """f_s [B, E]: the projected feature of the whole expression."""
    padding: Tensor
    """[B, L] bool: True where a token is padding."""

    def select(self, index: Tensor) -> "TextFeatures":
        """Return the features of the expressions `index` [B'] int64."""
        return TextFeatures(self.tokens[index], self.sentence[index], self.padding[index])


@dataclass(frozen=True, slots=True)
class TextState:
    """A text tower that has run up to some block, for interleaved methods (adapters.bridge)."""

    tokens: Tensor
    """[B, L, T]"""
    ends: Tensor
    """[B] int64: positions of the end tokens."""
    padding: Tensor
    """[B, L] bool: True where a token is padding."""
    step: int = 0
    """Blocks done."""

    def select(self, index: Tensor) -> "TextState":
        """Return the state of the expressions `index` [B'] int64."""
        return replace(self, tokens=self.tokens[index], ends=self.ends[index], padding=self.padding[index])


class TextTower(nn.Module):
    """Token and position embedding, blocks, a last norm and a projection.

    Subclasses create the blocks and the norm, and may replace `start` and `finish`.
    """

    config: TextConfig
    blocks: nn.ModuleList
    norm: nn.Module
    masks_padding = False
    """Whether the blocks' attention excludes padding. A causal one need not: padding comes last."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, str] = {}
        """Where the weights come from; set by dcris.checkpoints.backbones.fill_tower."""
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.length, config.width))

    @classmethod
    def check(cls, config: TextConfig) -> None:
        """Raise ValueError where the configuration does not fit this architecture."""

    def start(self, tokens: Tensor) -> TextState:
        """Embed tokens: [B, L] int64 -> the state before block 0.

        L is at most `config.length`; the tokens are start, words, end and padding (0). The end
        token is the one with the greatest id, as in CLIP; this holds for every vocabulary here.
        """
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        return TextState(x, tokens.argmax(dim=-1), tokens == 0)

    def advance(self, state: TextState, stop: int | None = None) -> TextState:
        """Run blocks from `state.step` up to but not including `stop`; None runs all."""
        added = count_added_tokens(self.blocks)
        mask = None
        if self.masks_padding:
            words = ~state.padding
            # Inserted tokens follow the start token; the first block inserts them.
            mask = torch.cat((words[:, :1], words.new_ones(words.shape[0], added), words[:, 1:]), dim=1)[:, None, None]
        context = SlotContext(num_prefix_tokens=1 + added, mask=mask)
        x = state.tokens
        stop = len(self.blocks) if stop is None else stop
        for block in self.blocks[state.step : stop]:
            x = block(x, context)
        return replace(state, tokens=x, step=max(stop, state.step))

    def finish(self, state: TextState) -> TextFeatures:
        """Return the token features after the last layer norm, and the sentence feature."""
        x = state.tokens
        if added := count_added_tokens(self.blocks):
            # Inserted tokens follow the start token, which therefore does not attend to them.
            x = torch.cat((x[:, :1], x[:, 1 + added :]), dim=1)
        x = self.norm(x)
        return TextFeatures(x, self.summarise(x, state), state.padding)

    def summarise(self, tokens: Tensor, state: TextState) -> Tensor:
        """Return the sentence feature of the finished tokens: [B, L, T] -> [B, E]."""
        # shape[0], not len(): that would be a constant in an exported graph.
        return self.project(tokens[torch.arange(tokens.shape[0], device=tokens.device), state.ends])

    def project(self, end_tokens: Tensor) -> Tensor:
        """Return the sentence feature of the end tokens: [B, T] -> [B, E]."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> TextFeatures:
        """[B, L] int64 tokens, as in `start`, -> features."""
        return self.finish(self.advance(self.start(tokens)))
