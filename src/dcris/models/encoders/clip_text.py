"""The text tower: the text half of CLIP (Radford et al. 2021).

Shape letters: B batch, L text tokens, T width, E width of the sentence feature.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcris.config import TextConfig
from dcris.models.encoders.blocks import Block, SlotContext, added_tokens


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the text tower says of B expressions."""

    tokens: Tensor
    """f_t [B, L, T]: token features after the final layer norm."""
    sentence: Tensor
    """f_s [B, E]: the end token's feature times the text projection."""
    padding: Tensor
    """[B, L] bool: True where a token is padding."""

    def select(self, index: Tensor) -> "TextFeatures":
        """The features of the expressions picked by `index` [B'] int64."""
        return TextFeatures(self.tokens[index], self.sentence[index], self.padding[index])


@dataclass(frozen=True, slots=True)
class TextState:
    """A text tower stopped on its way, before the image has a say (see dcris.models.adapters.bridge)."""

    tokens: Tensor
    """[B, L, T]"""
    ends: Tensor
    """[B] int64: where the end tokens are."""
    padding: Tensor
    """[B, L] bool: True where a token is padding."""
    step: int = 0
    """Blocks done."""

    def select(self, index: Tensor) -> "TextState":
        """The state of the expressions picked by `index` [B'] int64."""
        return replace(self, tokens=self.tokens[index], ends=self.ends[index], padding=self.padding[index])


class TextTower(nn.Module):
    """CLIP's causal text transformer, any width and depth."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, str] = {}
        """Where its weights came from, as dcris.checkpoints.backbones.fill_tower found out."""
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, causal=True, layer_scale=False, mlp="quick_gelu", eps=1e-5)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.projection = nn.Parameter(torch.empty(config.width, config.sentence_width))
        # Never read when segmenting; it is part of the published weights, which are read strictly.
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.projection, std=config.width**-0.5)

    def start(self, tokens: Tensor) -> TextState:
        """Embed tokens: [B, L] int64 (start, words, end, padding 0; L at most the table's length) -> the state before block 0.

        The sentence is read at the greatest id, which is the end token's in every vocabulary here, as CLIP does.
        """
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        return TextState(x, tokens.argmax(dim=-1), tokens == 0)

    def advance(self, state: TextState, stop: int | None = None) -> TextState:
        """Run blocks from `state.step` up to but not including `stop` (to the end by default)."""
        context = SlotContext(prefix=1 + added_tokens(self.blocks))
        x = state.tokens
        stop = len(self.blocks) if stop is None else stop
        for block in self.blocks[state.step : stop]:
            x = block(x, context)
        return replace(state, tokens=x, step=max(stop, state.step))

    def finish(self, state: TextState) -> TextFeatures:
        """The last layer norm, and the sentence feature."""
        x = state.tokens
        if added := added_tokens(self.blocks):
            # behind the start token, which they must not come before: it alone is not to see them
            x = torch.cat((x[:, :1], x[:, 1 + added :]), dim=1)
        x = self.norm(x)
        # shape[0], not len(): that would be a constant in an exported graph.
        sentence = x[torch.arange(x.shape[0], device=x.device), state.ends] @ self.projection
        return TextFeatures(x, sentence, state.padding)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """[B, L] int64 tokens, as `start` takes them -> features.

        Attention is causal and padding comes last, so the sentence feature does not depend on L, unless an adapter looks ahead
        (dcris.models.adapters.dense_text).
        """
        return self.finish(self.advance(self.start(tokens)))
