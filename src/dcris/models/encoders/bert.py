"""BERT (Devlin et al. 2019) as a text tower, above all MiniLM (Wang et al. 2020) as
sentence-transformers trained it: the sentence feature is the mean of the tokens.

Shape letters: B batch, L text tokens, P tokens in a block, T width.
"""

import torch
from torch import Tensor, nn

from dcris.config import TextConfig
from dcris.models.encoders.blocks import Block, SlotContext
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.text import TextState, TextTower
from dcris.utils.wheels import minilm_file

_EPS = 1e-12


class PostNormBlock(Block):
    """A block whose norms follow the sums. What an adapter gets as the branch's normed input is
    thus the residual stream itself.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, layer_scale=False, eps=_EPS)

    def attend(self, x: Tensor, context: SlotContext) -> Tensor:
        """First half [B, P, T]: norm(transform_residual(x) + slot(attention(x)))."""
        x = self.token_slot(x, context)
        branch = self.attention_slot(self.attention(x, context), x, x, context)
        normed: Tensor = self.norm1(self.scale1(self.attention_slot.transform_residual(x), branch))
        return normed

    def feed_forward(self, x: Tensor, context: SlotContext, mlp_out: Tensor | None = None) -> Tensor:
        """Second half [B, P, T]: norm(transform_residual(x) + slot(mlp(x)))."""
        mlp_out = self.precompute_mlp(x) if mlp_out is None else mlp_out
        branch = self.mlp_slot(mlp_out, x, x, context)
        normed: Tensor = self.norm2(self.scale2(self.mlp_slot.transform_residual(x), branch))
        return normed

    def precompute_mlp(self, x: Tensor) -> Tensor:
        """Return the MLP's output for x [B, P, T], before its slot."""
        mlp_out: Tensor = self.mlp(x)
        return mlp_out


class BertTower(TextTower):
    """BERT's encoder, of any width and depth. It attends in both directions, but not to padding."""

    masks_padding = True

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.token_types = nn.Parameter(torch.empty(2, config.width))
        """Embeddings of first and second sentences; there is only a first one here."""
        self.embedding_norm = nn.LayerNorm(config.width, eps=_EPS)
        self.blocks = nn.ModuleList(PostNormBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.Identity()  # the last block ends with one
        for table in (self.token_embedding.weight, self.positions, self.token_types):
            nn.init.normal_(table, std=0.02)

    @classmethod
    def check(cls, config: TextConfig) -> None:
        """Raise ValueError where the sentence feature has another width than the tokens."""
        if config.sentence_width != config.width:
            raise ValueError(f"text.sentence_width must be text.width, {config.width}: it is the mean of the tokens")

    def start(self, tokens: Tensor) -> TextState:
        """Embed tokens: [B, L] int64 -> the state before block 0."""
        state = super().start(tokens)
        return TextState(self.embedding_norm(state.tokens + self.token_types[0]), state.ends, state.padding)

    def summarise(self, tokens: Tensor, state: TextState) -> Tensor:
        """Return the mean over the tokens that are not padding: [B, L, T] -> [B, T]."""
        words = (~state.padding).unsqueeze(-1).to(tokens.dtype)
        return (tokens * words).sum(1) / words.sum(1)


HUB_BERT = KeyMapping(
    title="BERT as the Hub has it",
    marker="embeddings.word_embeddings.weight",
    outside={
        "token_embedding.weight": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "token_types": "embeddings.token_type_embeddings.weight",
        "embedding_norm.weight": "embeddings.LayerNorm.weight",
        "embedding_norm.bias": "embeddings.LayerNorm.bias",
    },
    block="encoder.layer.{index}.",
    inside={
        "attention.qkv": tuple(f"attention.self.{part}.{{kind}}" for part in ("query", "key", "value")),
        "attention.proj": ("attention.output.dense.{kind}",),
        "norm1": ("attention.output.LayerNorm.{kind}",),
        "mlp.fc1": ("intermediate.dense.{kind}",),
        "mlp.fc2": ("output.dense.{kind}",),
        "norm2": ("output.LayerNorm.{kind}",),
    },
    # The classifier of next sentences, and the position numbers, which older releases stored.
    ignored=("pooler.", "embeddings.position_ids"),
)

_MINILM = minilm_file("model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")

BERT = TowerFamily(
    tower=BertTower,
    published=(
        (
            TextConfig(
                name="all-minilm-l6-v2",
                family="bert",
                tokenizer="bert",
                width=384,
                depth=6,
                heads=12,
                vocabulary=30522,
                length=512,
                sentence_width=384,
            ),
            _MINILM,
        ),
    ),
    key_mappings=(HUB_BERT,),
)
