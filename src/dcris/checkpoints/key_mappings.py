"""How published files name a tower's tensors: one layout per family of files.

Sources: the state dicts of facebookresearch/dinov2 and openai/CLIP, and what transformers writes for the same networks.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """One family of files. Our names are translated to theirs, so only what a tower needs is ever read."""

    title: str
    marker: str
    """The tensor by which a file of the family is known."""
    outside: dict[str, str]
    """Our names outside the blocks to theirs."""
    block: str
    """What their names of block {index} start with."""
    inside: dict[str, tuple[str, ...]]
    """Our names inside a block, without the last part (`kind`), to theirs; several are stacked along the first axis."""
    zeros: frozenset[str] = frozenset()
    """How the names end of tensors that their network does without, and that are zeros in ours."""
    needless: tuple[str, ...] = ()
    """How the names start of tensors that a tower does without, and that are no reason to refuse a file."""
    transposed: frozenset[str] = frozenset()
    """Our names whose tensors the file holds transposed."""

    def parts(self, name: str) -> tuple[str, ...]:
        """The file's tensors that make up our tensor of that name."""
        if name in self.outside:
            return (self.outside[name],)
        _, index, rest = name.split(".", 2)  # blocks.3.attention.qkv.weight
        part, _, kind = rest.rpartition(".")
        return tuple(self.block.format(index=index) + template.format(kind=kind) for template in self.inside[part])


HUB_DINOV2 = Layout(
    title="DINOv2 with registers as the Hub has it",
    marker="embeddings.cls_token",
    outside={
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "positions": "embeddings.position_embeddings",
        "patch_embed.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    block="encoder.layer.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": tuple(f"attention.attention.{part}.{{kind}}" for part in ("query", "key", "value")),
        "attention.proj": ("attention.output.dense.{kind}",),
        "scale1": ("layer_scale1.lambda1",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
        "mlp.w12": ("mlp.weights_in.{kind}",),
        "mlp.w3": ("mlp.weights_out.{kind}",),
        "scale2": ("layer_scale2.lambda1",),
    },
)

HUB_DINOV3 = Layout(
    title="DINOv3 as the Hub has it",
    marker="layer.0.attention.q_proj.weight",
    outside={
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "patch_embed.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="layer.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": tuple(f"attention.{part}_proj.{{kind}}" for part in "qkv"),
        "attention.proj": ("attention.o_proj.{kind}",),
        "scale1": ("layer_scale1.lambda1",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.up_proj.{kind}",),
        "mlp.fc2": ("mlp.down_proj.{kind}",),
        "scale2": ("layer_scale2.lambda1",),
    },
    zeros=frozenset({"attention.k_proj.bias"}),
)

META_DINOV2 = Layout(
    title="DINOv2 with registers as Meta publishes it",
    marker="cls_token",
    outside={
        "class_token": "cls_token",
        "registers": "register_tokens",
        "mask_token": "mask_token",
        "positions": "pos_embed",
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    block="blocks.{index}.",
    inside={
        "norm1": ("norm1.{kind}",),
        "attention.qkv": ("attn.qkv.{kind}",),
        "attention.proj": ("attn.proj.{kind}",),
        "scale1": ("ls1.gamma",),
        "norm2": ("norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
        "mlp.w12": ("mlp.w12.{kind}",),
        "mlp.w3": ("mlp.w3.{kind}",),
        "scale2": ("ls2.gamma",),
    },
)

HUB_CLIP = Layout(
    title="CLIP as the Hub has it",
    marker="text_model.embeddings.token_embedding.weight",
    outside={
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "norm.weight": "text_model.final_layer_norm.weight",
        "norm.bias": "text_model.final_layer_norm.bias",
        "projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    },
    block="text_model.encoder.layers.{index}.",
    inside={
        "norm1": ("layer_norm1.{kind}",),
        "attention.qkv": tuple(f"self_attn.{part}_proj.{{kind}}" for part in "qkv"),
        "attention.proj": ("self_attn.out_proj.{kind}",),
        "norm2": ("layer_norm2.{kind}",),
        "mlp.fc1": ("mlp.fc1.{kind}",),
        "mlp.fc2": ("mlp.fc2.{kind}",),
    },
    # The image half; and the numbers 0 to 76, which older releases of transformers stored.
    needless=("vision_model.", "visual_projection.", "text_model.embeddings.position_ids"),
    transposed=frozenset({"projection"}),
)

OPENAI_CLIP = Layout(
    title="CLIP as OpenAI publishes it",
    marker="positional_embedding",
    outside={
        "token_embedding.weight": "token_embedding.weight",
        "positions": "positional_embedding",
        "norm.weight": "ln_final.weight",
        "norm.bias": "ln_final.bias",
        "projection": "text_projection",
        "logit_scale": "logit_scale",
    },
    block="transformer.resblocks.{index}.",
    inside={
        "norm1": ("ln_1.{kind}",),
        "attention.qkv": ("attn.in_proj_{kind}",),
        "attention.proj": ("attn.out_proj.{kind}",),
        "norm2": ("ln_2.{kind}",),
        "mlp.fc1": ("mlp.c_fc.{kind}",),
        "mlp.fc2": ("mlp.c_proj.{kind}",),
    },
    # The image half; and three sizes, which an archive keeps as tensors.
    needless=("visual.", "input_resolution", "context_length", "vocab_size"),
)

# The image halves of the same files.

HUB_CLIP_VISION = Layout(
    title="CLIP as the Hub has it",
    marker="vision_model.embeddings.class_embedding",
    outside={
        "patch_embed.weight": "vision_model.embeddings.patch_embedding.weight",
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        # The Hub's own spelling.
        "pre_norm.weight": "vision_model.pre_layrnorm.weight",
        "pre_norm.bias": "vision_model.pre_layrnorm.bias",
        "norm.weight": "vision_model.post_layernorm.weight",
        "norm.bias": "vision_model.post_layernorm.bias",
        "projection": "visual_projection.weight",
    },
    block="vision_model.encoder.layers.{index}.",
    inside=HUB_CLIP.inside,
    needless=("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids"),
    transposed=frozenset({"projection"}),
)

OPENAI_CLIP_VISION = Layout(
    title="CLIP with a vision transformer as OpenAI publishes it",
    marker="visual.class_embedding",
    outside={
        "patch_embed.weight": "visual.conv1.weight",
        "class_token": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "pre_norm.weight": "visual.ln_pre.weight",
        "pre_norm.bias": "visual.ln_pre.bias",
        "norm.weight": "visual.ln_post.weight",
        "norm.bias": "visual.ln_post.bias",
        "projection": "visual.proj",
    },
    block="visual.transformer.resblocks.{index}.",
    inside=OPENAI_CLIP.inside,
    needless=(
        *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
        *("input_resolution", "context_length", "vocab_size"),
    ),
)

VISION_LAYOUTS = {
    "dinov2": (HUB_DINOV2, META_DINOV2),
    "dinov3": (HUB_DINOV3,),
    "clip": (HUB_CLIP_VISION, OPENAI_CLIP_VISION),
}
"""By the tower's family."""
TEXT_LAYOUTS = (HUB_CLIP, OPENAI_CLIP)
