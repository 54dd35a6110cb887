"""Prepare models for prediction, and frozen towers for training: compute constants once.

Results stay the same up to rounding. Folding batch norm changes logits by about 1e-6 of their size
in float32; storing weights in the working precision is what autocast does at every use; and their
memory layout affects only the speed.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dcris.errors import DcrisWarning
from dcris.models.adapters.attach import adapters
from dcris.models.encoders.blocks import MLP, Block
from dcris.models.head.decoder import DecoderLayer
from dcris.models.head.neck import ConvNormReLU
from dcris.models.head.projector import FinerConv, FinerConvNormReLU
from dcris.models.int8 import Forms, Int8Linear, apply_forms, choose_forms, forms_of
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.device import precision_of, working_dtype

Module = TypeVar("Module", bound=nn.Module)

CastWeights = dict[tuple[int, tuple[int, ...]], tuple[nn.Parameter, nn.Parameter]]
"""Frozen weights and their copies in the working precision, by data pointer and shape.

The originals are stored too, so that their memory is not reused while the entry exists.
"""

_CACHED_SIZES = 4
"""Number of image sizes whose interpolated positions are cached; most models see one."""

_GRID = 32, 32
"""Size of the maps that packed convolutions are optimised for: 448 pixels in patches of 14."""


def prepare_for_prediction(
    model: ReferringSegmenter,
    dtype: torch.dtype = torch.float32,
    cast_weights: CastWeights | None = None,
    example: Callable[[ReferringSegmenter], object] | None = None,
    forms: Forms | None = None,
) -> ReferringSegmenter:
    """Return a copy for prediction: batch norms folded, weights of products stored in `dtype`.

    Unchanged tensors are shared with `model`, which is not changed: save and fingerprint that one.
    Make another copy after a change of its weights: this one would have some of the new ones.

    A model whose towers are sharded over ranks is returned as it is.

    Args:
        model: in any mode; the copy is in evaluation mode.
        dtype: the precision of matrix products (under autocast).
        cast_weights: pass the same dictionary for several models on the same towers, to store these
            once.
        example: for int8, runs a model on an example, on which the forms of its layers are chosen
            (dcris.models.int8).
        forms: for int8, those that were chosen for this model before.
    """
    if sharded(model):
        return model  # FSDP's sharded towers (dcris.training.parallel) cannot be copied
    copy = _copy(model, {})
    copy.eval()
    for module in list(copy.modules()):
        if isinstance(module, nn.Sequential) and len(module) > 1:
            conv, norm = module[0], module[1]
            if isinstance(conv, nn.Conv1d | nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                _fold(norm, conv)
                module[1] = nn.Identity()
        if isinstance(module, FinerConvNormReLU) and isinstance(module[0], nn.Conv2d):
            module[0] = FinerConv(module[0])
    # Positions depend on the image size only. The cache wraps the model's method: with the copy's
    # own, the copy would refer to itself and stay in memory.
    copy.vision.positions_on = lru_cache(_CACHED_SIZES)(model.vision.positions_on)  # type: ignore[method-assign]
    if dtype == torch.int8:
        if forms is None:
            assert example is not None
            choose_forms(copy, _large_layers(copy), partial(example, copy))
        else:
            apply_forms(copy, forms)
        dtype = working_dtype(dtype, next(model.parameters()).device)
        if not forms_of(copy):
            text = f"no layer of this model gains by int8; it works in {precision_of(dtype)}"
            warnings.warn(text, DcrisWarning, stacklevel=2)
        _finish_int8(copy, dtype)
    if dtype != torch.float32:
        cast_weights = {} if cast_weights is None else cast_weights
        if _packs(model, dtype):
            for module in list(copy.modules()):
                _pack(module, cast_weights, for_training=False)
        for module in copy.modules():
            _cast(module, dtype, cast_weights)
    return copy  # requires_grad stays as it is, since most weights are the model's own


def _copy(module: Module, copies: dict[int, nn.Module]) -> Module:
    """Copy a tree of modules, which shares tensors and all other values with the original.

    `copies` has the copy of each module by its id, since a module can have several places. deepcopy
    does the same in five times the time, which is a tenth of what a command needs to start.
    """
    known = copies.get(id(module))
    if known is None:
        known = copies[id(module)] = type(module).__new__(type(module))
        known.__dict__ |= module.__dict__
        known._parameters, known._buffers = dict(module._parameters), dict(module._buffers)
        known._modules = {name: None if part is None else _copy(part, copies) for name, part in module._modules.items()}
    return known  # type: ignore[return-value]


def _fold(norm: nn.modules.batchnorm._BatchNorm, conv: nn.Conv1d | nn.Conv2d) -> None:
    """Fold a batch norm with its statistics into the convolution before it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def sharded(model: nn.Module) -> bool:
    """Return whether weights are divided among ranks: then a forward pass is one of all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False  # skips the import below, which takes a second
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in (*model.parameters(), *model.buffers()))


def cast_frozen(model: ReferringSegmenter, dtype: torch.dtype) -> None:
    """Store the weights of the frozen towers' products in `dtype`, in place, for training in that
    precision.

    Otherwise autocast copies each weight at every step and keeps all copies for the backward pass.
    Checkpoints identify the towers by the loaded weights, so call
    dcris.checkpoints.checkpoint.identify_towers before this.

    In bfloat16 on a CPU the vision tower's weights are packed, and packed weights cannot be copied
    or fingerprinted: `prepare_for_prediction` and `trained_state` work; for deepcopy and
    `ReferringSegmenter.merged` load the model from a checkpoint. The text tower's products are too
    small for packing to be worth its memory.
    """
    if dtype == torch.float32:
        return
    if _packs(model, dtype):
        for module in model.vision.modules():
            _pack(module, {}, for_training=True)
    for tower in model.towers.values():
        inside = {module for adapter in adapters(tower) for module in adapter.modules()}
        for module in tower.modules():
            if module not in inside and not _trains(module):
                _cast(module, dtype, {})


def _trains(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters(recurse=False))


def _packs(model: ReferringSegmenter, dtype: torch.dtype) -> bool:
    """Return whether oneDNN can multiply packed weights on the model's device."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return (
        dtype == torch.bfloat16
        and on_cpu
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(module: nn.Module, cast_weights: CastWeights, *, for_training: bool) -> None:
    """Pack the weights of the module's large products; for training only the frozen ones.

    These are nine tenths of the products in a tower. For prediction, GELU is fused into the product
    before it; a gradient would need the product's output without GELU.
    """
    for part in _parts(module):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear and not (for_training and _trains(layer)):
                _cast(layer, torch.bfloat16, cast_weights, torch.ops.mkldnn._reorder_linear_weight)
                setattr(part, name, _Packed(layer.weight, layer.bias))
        if not for_training and isinstance(part, MLP):
            _fuse_gelu(part)
    if isinstance(module, ConvNormReLU) and isinstance(module[0], nn.Conv2d) and not for_training:
        module[0], module[2] = _PackedConvReLU(module[0]), nn.Identity()


def _fuse_gelu(mlp: MLP) -> None:
    """Fuse GELU into the product before it, if that can have it."""
    first: nn.Module = mlp.fc1
    if isinstance(first, _Packed | Int8Linear) and isinstance(mlp.activation, nn.GELU):
        first.activation, mlp.activation = "gelu", nn.Identity()


def _large_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of large products."""
    parts = {part for module in model.modules() for part in _parts(module)}
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if module in parts
        for child, layer in module.named_children()
        if type(layer) is nn.Linear
    ]


def _finish_int8(model: nn.Module, dtype: torch.dtype) -> None:
    """Let int8 layers answer in the working precision, and fuse GELU into them."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.output_dtype = dtype
    for module in model.modules():
        if isinstance(module, MLP):
            _fuse_gelu(module)
            if isinstance(module.fc1, Int8Linear) and isinstance(module.fc2, Int8Linear):
                module.fc1.output_dtype = torch.float32  # which the next layer quantises faster


def _parts(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the parts of a module whose linear layers are large enough to be packed."""
    if isinstance(module, Block):
        return module.attention, module.mlp
    if isinstance(module, DecoderLayer):
        return module.self_attention, module.cross_attention, module.feedforward
    return (module.rows,) if isinstance(module, FinerConv) else ()


class _Packed(nn.Module):
    """A frozen linear layer with its weight in oneDNN's layout, and optionally a fused activation.

    The operation is the one that torch.compile uses for a linear layer. Without an activation,
    gradients reach its input: by a second copy of the weight, transposed and packed at the first
    backward pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, bias, "none"
        self.transposed: Tensor | None
        self.register_buffer("transposed", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in bfloat16."""
        if not torch.is_grad_enabled():
            return _multiply(x.to(torch.bfloat16), self.weight, self.bias, self.activation)
        output: Tensor = _Product.apply(x.to(torch.bfloat16), self)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Packed) -> Tensor:
        ctx.layer = layer
        return _multiply(x, layer.weight, layer.bias, layer.activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: _Packed = ctx.layer
        assert layer.activation == "none"
        if layer.transposed is None:
            layer.transposed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to_dense().t().contiguous())
        return _multiply(gradients[0], layer.transposed), None


class _PackedConvReLU(nn.Module):
    """A packed convolution with batch norm folded into it and a fused ReLU, without gradients."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.where = conv.padding, conv.stride, conv.dilation, conv.groups
        weight, bias = conv.weight.detach().to(torch.bfloat16), conv.bias
        assert bias is not None
        # Without a size, oneDNN chooses a layout in which a 1x1 kernel takes six times as long.
        # Maps of other sizes work too.
        size = [1, conv.in_channels, *_GRID]
        laid = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.where, size)
        self.weight = nn.Parameter(laid, requires_grad=False)
        self.bias = nn.Parameter(bias.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, O, h, w] in bfloat16."""
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(torch.bfloat16), self.weight, self.bias, *self.where, "relu", [], ""
        )
        return output


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    algorithm = "none" if activation == "gelu" else ""  # exact GELU, not the tanh approximation
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return output


def _cast(
    module: nn.Module,
    dtype: torch.dtype,
    cast_weights: CastWeights,
    lay: Callable[[Tensor], Tensor] = lambda matrix: matrix,
) -> None:
    """Replace the weights that autocast would cast by copies in `dtype`; norms, position tables and
    embeddings stay.

    `lay` changes the memory layout of a matrix.
    """
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | MultiHeadAttention):
        return
    for name, weight in list(module.named_parameters(recurse=False)):
        place = weight.data_ptr(), tuple(weight.shape)
        known = None if weight.requires_grad else cast_weights.get(place)
        if known is None:
            cast = weight.detach().to(dtype)
            known = weight, nn.Parameter(lay(cast) if name == "weight" else cast, requires_grad=False)
            if not weight.requires_grad:
                cast_weights[place] = known
        setattr(module, name, known[1])
