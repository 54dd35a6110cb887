"""The network as prediction wants it: what is constant is worked out once, not at every use.

Both functions leave the numbers alone, up to rounding: folding batch norm moves logits by some 1e-6 of their size in float32,
holding weights in the working precision is what autocast does with them at every use, and how they lie in memory is nobody's
business but the processor's.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcris.models.adapters.base import adapters
from dcris.models.encoders.blocks import MLP, Block
from dcris.models.head.decoder import DecoderLayer
from dcris.models.head.neck import ConvNormReLU
from dcris.models.head.projector import FinerConv, FinerConvNormReLU
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.segmentation import ReferringSegmenter

Held = dict[tuple[int, tuple[int, ...]], tuple[nn.Parameter, nn.Parameter]]
"""Frozen weights and what they are in the working precision, by where they lie in memory and their shape.

The originals are kept too, so that nothing else can come to lie in their place.
"""


_REMEMBERED_SIZES = 4
"""Sizes of photographs for which positions are remembered; most models see one."""

_GRID = 32, 32
"""Of patches, where nothing else is known: an image of 448 pixels in patches of 14."""


def prepare_for_prediction(
    model: ReferringSegmenter, dtype: torch.dtype = torch.float32, held: Held | None = None
) -> ReferringSegmenter:
    """A copy for prediction alone, with batch norms in their convolutions and the weights of products held in `dtype`.

    Whatever is not changed is shared with `model`, which stays as it is: its state dict is what is saved and fingerprinted.
    A later change to its weights does not reach the copy.

    A model whose towers are sharded over processes comes back as it is.

    Args:
        model: in evaluation mode or not; the copy always is.
        dtype: what products are worked in (under autocast, as everywhere).
        held: pass the same dictionary for several models on the same towers, and these are held once.
    """
    tensors = (*model.parameters(), *model.buffers())
    if _sharded(tensors):
        return model  # its towers (dcris.utils.distributed) belong to FSDP, and cannot be copied
    copy = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copy.eval()
    for module in list(copy.modules()):
        if isinstance(module, nn.Sequential) and len(module) > 1:
            conv, norm = module[0], module[1]
            if isinstance(conv, nn.Conv1d | nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                module[0] = fuse_conv_bn_eval(conv, norm)
                module[1] = nn.Identity()
        if isinstance(module, FinerConvNormReLU) and isinstance(module[0], nn.Conv2d):
            module[0] = FinerConv(module[0])
    # Positions are the same for all photographs of one size. The model's method, since the copy's own would keep it alive.
    copy.vision.positions_on = lru_cache(_REMEMBERED_SIZES)(model.vision.positions_on)  # type: ignore[method-assign]
    if dtype != torch.float32:
        held = {} if held is None else held
        if _packs(model, dtype):
            for module in list(copy.modules()):
                _pack(module, held, for_training=False)
        for module in copy.modules():
            _hold(module, dtype, held)
    return copy  # its weights keep saying whether they train: most are the model's own


def _sharded(tensors: Iterable[Tensor]) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return False  # importing what follows takes a second, and most predictions are one process's
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def hold_frozen(model: ReferringSegmenter, dtype: torch.dtype) -> None:
    """Hold the weights of the frozen towers' products in `dtype`, in place, for training in that precision.

    Else autocast makes a copy of each at every step, and keeps all of them for the backward pass. Checkpoints name the towers
    by what was loaded, so identify them (dcris.checkpoints.checkpoint.identify_towers) before this.

    In bfloat16 on a CPU the vision tower's weights are packed, which cannot be copied or fingerprinted:
    `prepare_for_prediction` and `trained_state` work, while deepcopy and `ReferringSegmenter.merged` are for a model read from a
    checkpoint. The text tower's products are so small that packing them for both directions is not worth its memory.
    """
    if dtype == torch.float32:
        return
    if _packs(model, dtype):
        for module in model.vision.modules():
            _pack(module, {}, for_training=True)
    for tower in (model.vision, model.text):
        inside = {module for adapter in adapters(tower) for module in adapter.modules()}
        for module in tower.modules():
            if module not in inside and not _trains(module):
                _hold(module, dtype, {})


def _trains(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters(recurse=False))


def _packs(model: ReferringSegmenter, dtype: torch.dtype) -> bool:
    """Whether oneDNN's products of packed weights are there for it."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return (
        dtype == torch.bfloat16
        and on_cpu
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(module: nn.Module, held: Held, *, for_training: bool) -> None:
    """The module's large products with weights of its own, nine tenths of all in a tower; for training those that are frozen.

    For prediction GELU goes into the product before it. A gradient would need what the product made without.
    """
    for part in _parts(module):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear and not (for_training and _trains(layer)):
                _hold(layer, torch.bfloat16, held, torch.ops.mkldnn._reorder_linear_weight)
                setattr(part, name, _Packed(layer.weight, layer.bias))
        if not for_training and isinstance(part, MLP) and isinstance(part.activation, nn.GELU):
            first: nn.Module = part.fc1
            if isinstance(first, _Packed):
                first.activation, part.activation = "gelu", nn.Identity()
    if isinstance(module, ConvNormReLU) and isinstance(module[0], nn.Conv2d) and not for_training:
        module[0], module[2] = _PackedConvReLU(module[0]), nn.Identity()


def _parts(module: nn.Module) -> tuple[nn.Module, ...]:
    """Whose linear layers are worth it."""
    if isinstance(module, Block):
        return module.attention, module.mlp
    if isinstance(module, DecoderLayer):
        return module.self_attention, module.cross_attention, module.feedforward
    return (module.rows,) if isinstance(module, FinerConv) else ()


class _Packed(nn.Module):
    """A frozen linear layer whose weight lies in memory as oneDNN multiplies it, and an activation in the same pass.

    The operation is the one that torch's own compiler puts in a linear layer's place. Gradients go through it to its input,
    where there is no activation: by a second copy of the weight, turned and laid for that product when there first is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, bias, "none"
        self.turned: Tensor | None
        self.register_buffer("turned", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in bfloat16."""
        if not torch.is_grad_enabled():
            return _multiply(x.to(torch.bfloat16), self.weight, self.bias, self.activation)
        made: Tensor = _Product.apply(x.to(torch.bfloat16), self)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Packed) -> Tensor:
        ctx.layer = layer
        return _multiply(x, layer.weight, layer.bias, layer.activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: _Packed = ctx.layer
        assert layer.activation == "none"
        if layer.turned is None:
            layer.turned = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to_dense().t().contiguous())
        return _multiply(gradients[0], layer.turned), None


class _PackedConvReLU(nn.Module):
    """The same for a convolution, which has batch norm's part in its bias, and the ReLU behind it. Without gradients."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.where = conv.padding, conv.stride, conv.dilation, conv.groups
        weight, bias = conv.weight.detach().to(torch.bfloat16), conv.bias
        assert bias is not None
        # Told of no size, oneDNN lays a 1x1 kernel so that it takes six times as long. Maps of other sizes may come too.
        size = [1, conv.in_channels, *_GRID]
        laid = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.where, size)
        self.weight = nn.Parameter(laid, requires_grad=False)
        self.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h, w] in bfloat16."""
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(torch.bfloat16), self.weight, self.bias, *self.where, "relu", [], ""
        )
        return made


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    algorithm = "none" if activation == "gelu" else ""  # of GELU: not the approximation by tanh
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return made


def _hold(
    module: nn.Module, dtype: torch.dtype, held: Held, lay: Callable[[Tensor], Tensor] = lambda matrix: matrix
) -> None:
    """Only what autocast would cast: norms, position tables and embeddings stay. `lay` places a matrix in memory."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | MultiHeadAttention):
        return
    for name, weight in list(module.named_parameters(recurse=False)):
        place = weight.data_ptr(), tuple(weight.shape)
        known = None if weight.requires_grad else held.get(place)
        if known is None:
            cast = weight.detach().to(dtype)
            known = weight, nn.Parameter(lay(cast) if name == "weight" else cast, requires_grad=False)
            if not weight.requires_grad:
                held[place] = known
        setattr(module, name, known[1])
