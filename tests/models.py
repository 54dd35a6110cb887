"""Small networks for tests. All sizes differ, so that exchanged axes are noticed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcris.checkpoints.backbones import copy_strictly
from dcris.config import HeadConfig, ModelConfig, TextConfig, VisionConfig
from dcris.models.adapters.dcris import DcrisConfig, DenseCrossConfig, TextAdapterConfig
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import allocate, shapes_only

TINY_VISION = VisionConfig(name="test", width=32, depth=4, heads=4, grid=4, position_rule="exact")
TINY_CLIP_VISION = VisionConfig(
    family="clip",
    name="test",
    width=48,
    depth=4,
    heads=3,
    patch=4,
    registers=0,
    grid=3,
    position_rule="plain",
    projected_width=20,
)
TINY_TEXT = TextConfig(name="test", width=24, depth=3, heads=4, vocabulary=40, length=12, sentence_width=20)
TINY_DENSE = DenseCrossConfig(layers=(1, 3), width=16, attention_width=8, heads=2, dropout=0.0)
TINY_TEXT_ADAPTER = TextAdapterConfig(layers=(0, 2), width=6)
TINY_HEAD = HeadConfig(feature_layers=(0, 2), width=16, heads=4, layers=2, feedforward=28, dropout=0.0)
START, END = 38, 39

MULTIPLIES_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not MULTIPLIES_BFLOAT16, reason="oneDNN does not multiply bfloat16 on this CPU")


def tiny_config(
    *,
    visual_adapter: DenseCrossConfig | None = TINY_DENSE,
    text_adapter: TextAdapterConfig | None = TINY_TEXT_ADAPTER,
    **changes: Any,
) -> ModelConfig:
    """Return a network of about 100,000 weights; `changes` replace its sections."""
    method = DcrisConfig(visual=visual_adapter, text=text_adapter)
    return ModelConfig(**{"vision": TINY_VISION, "text": TINY_TEXT, "method": method, "head": TINY_HEAD, **changes})


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every weight and statistic with random numbers.

    New networks are full of zeros and ones (biases, norms, LayerScale, running statistics), which
    hide mistakes.
    """
    source = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(noise(parameter) * max(parameter[0].numel(), 1) ** -0.5)
            elif name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.2 * noise(parameter))
            else:
                parameter.copy_(0.1 * noise(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + noise(buffer).abs())


def network_of(config: ModelConfig, weights: dict[str, Tensor]) -> ReferringSegmenter:
    """Return a model with exactly these weights. To draw initial ones takes a second."""
    with shapes_only():
        model = ReferringSegmenter(config)
    allocate(model)
    copy_strictly(model.state_dict(), weights, "here")
    return model


def without_dropout(module: nn.Module) -> nn.Module:
    """Set every dropout of a module to 0, torch's and ours."""
    for part in module.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def tokens_ending_at(ends: Sequence[int], length: int, seed: int = 0) -> Tensor:
    """Return tokens [B, L] int64: the start token, words, the end token at the given position of
    each row, padding.
    """
    words = torch.randint(1, START, (len(ends), length), generator=torch.Generator().manual_seed(seed))
    words[:, 0] = START
    for row, end in zip(words, ends, strict=True):
        row[end] = END
        row[end + 1 :] = 0
    return words


def images(count: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return noise [count, 3, rows * 14, columns * 14]."""
    return torch.randn(count, 3, rows * 14, columns * 14, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the greatest absolute difference of two tensors of the same shape."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def torch_attention(ours: nn.Module) -> nn.MultiheadAttention:
    """Return torch.nn.MultiheadAttention with the weights of our attention
    (dcris.models.layers.attention).
    """
    width = ours.out.in_features
    theirs = nn.MultiheadAttention(width, ours.heads, ours.dropout, batch_first=True).to(ours.in_weight.dtype)
    weights = {"in_proj_weight": ours.in_weight, "in_proj_bias": ours.in_bias}
    weights |= {"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}
    theirs.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return theirs.train(ours.training)
