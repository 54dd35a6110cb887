"""Linear layers in int8, for prediction on CPUs.

Weights are quantised once, symmetrically, with a scale for each output channel. Inputs are
quantised at every call, over the tokens of one image, so that a result does not depend on the other
images of a batch.

One scale serves all input channels. In vision transformers a few channels can be 50 times as large
as the others, which then get only a few of the 256 levels. So every layer is tried on an example
and takes the first of three forms whose error is at most LIMIT: int8; int8 with channels divided by
SmoothQuant's factors, by which the weights are multiplied (Xiao et al. 2023, *SmoothQuant: Accurate
and Efficient Post-Training Quantization for Large Language Models*, equation 4 with alpha 0.5); or
the working precision.

Shape letters: B images or pairs, P tokens or pixels, K inputs, N outputs.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.utils.device import multiplies_int8

Forms = dict[str, Tensor]
"""The forms of a network's int8 layers by their names: SmoothQuant's factors [K], or none [0]."""

LIMIT = 0.02
"""Largest error of an int8 layer on the example: the mean over its tokens of the error's norm
relative to the product's."""

_MEASURED_TOKENS = 128
"""The error of a layer is measured on this many tokens of the example, evenly spaced."""

_LEAST_TOKENS, _LEAST_OUTPUTS = 128, 512
"""In smaller products, quantising the input takes longer than int8 saves."""


def rules() -> str:
    """Return the numbers that decide about forms."""
    return f"{LIMIT} {_MEASURED_TOKENS} {_LEAST_TOKENS} {_LEAST_OUTPUTS}"


def choose_forms(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> None:
    """Replace linear layers of a model by the forms that are chosen for them on an example.

    Args:
        model: with weights in float32.
        names: of the layers.
        run: passes an example through the model. A layer that it does not reach stays.
    """
    trials = {name: _Trial(model.get_submodule(name)) for name in names}
    for name, trial in trials.items():
        model.set_submodule(name, trial)
    with torch.no_grad():
        run()
    for name, trial in trials.items():
        model.set_submodule(name, trial.chosen)


def apply_forms(model: nn.Module, forms: Forms) -> None:
    """Replace linear layers of a model as `forms_of` found them in another copy of it.

    Raises ValueError before it changes anything, if they are those of another model.
    """
    layers = dict(model.named_modules())
    for name, factors in forms.items():
        layer = layers.get(name)
        fits = type(layer) is nn.Linear and factors.shape in ((0,), (layer.in_features,))
        if not (fits and (factors > 0).all() and factors.isfinite().all()):
            raise ValueError(f"{name} has another form")
    for name, factors in forms.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, Int8Linear(layer.weight, layer.bias, factors if len(factors) else None))


def forms_of(model: nn.Module) -> Forms:
    """Return the forms of a model's int8 layers."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    return {name: torch.empty(0) if each.factors is None else each.factors for name, each in found.items()}


class _Trial(nn.Module):
    """A linear layer whose form is chosen by its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = self.chosen = layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        assert isinstance(self.layer, nn.Linear)
        with torch.autocast("cpu", enabled=False):
            self.chosen = _choose(self.layer, x.flatten(0, -2).float())
        output: Tensor = self.layer(x)
        return output


def _choose(layer: nn.Linear, x: Tensor) -> nn.Module:
    """Return the form of a layer for inputs like x [P, K]."""
    if len(x) < _LEAST_TOKENS or layer.out_features < _LEAST_OUTPUTS:
        return layer
    some = slice(None, None, max(1, len(x) // _MEASURED_TOKENS))
    product = F.linear(x[some], layer.weight)
    exact = product if layer.bias is None else product + layer.bias
    for smooth in (False, True):
        form = Int8Linear(layer.weight, layer.bias, _factors(x, layer.weight) if smooth else None)
        errors = (form(x[None])[0, some] - exact).norm(dim=1) / product.norm(dim=1)
        if errors[errors.isfinite()].mean() <= LIMIT:
            return form
    return layer


def _factors(x: Tensor, weight: Tensor) -> Tensor:
    """Return SmoothQuant's factors [K] for inputs like x [P, K] and a weight [N, K]."""
    inputs = x.abs().amax(0)
    # A channel that is 0 on the example need not be 0 on other images.
    inputs = inputs.clamp_min(inputs.max() / 1000)
    return (inputs / weight.abs().amax(0).clamp_min(1e-5)).sqrt()


class Int8Linear(nn.Module):
    """A linear layer that multiplies in int8, with an optional fused activation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, factors: Tensor | None = None) -> None:
        """Quantise a weight [N, K] and keep its bias [N].

        `factors` [K] are those of SmoothQuant: the input is divided by them.
        """
        super().__init__()
        weight = weight.detach().float()
        if factors is not None:
            weight = weight * factors
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        whole = (weight / scale[:, None]).round_().to(torch.int8)
        self.activation = "none"
        self.output_dtype = torch.float32
        self.factors: Tensor | None
        self.scale: Tensor
        self.register_buffer("factors", factors)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(whole, None))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, K] -> [B, P, N] in `output_dtype`."""
        if self.factors is not None:
            x = x / self.factors
        outputs = [self._multiply(image) for image in x.float()]
        return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)

    def _multiply(self, x: Tensor) -> Tensor:
        low, high = (float(value) for value in torch.aminmax(x))
        if not math.isfinite(high - low):
            return x.new_full((len(x), len(self.scale)), math.nan, dtype=self.output_dtype)
        quantised, scale, zero = _quantise(x, min(low, 0.0), max(high, 0.0))
        weight = self.packed, self.scale, self.zero, self.bias
        algorithm = "none" if self.activation == "gelu" else ""  # exact GELU, not the tanh approximation
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised, scale, zero, *weight, 1.0, 0, self.output_dtype, self.activation, [], algorithm
        )
        return output


# Without VNNI the CPU adds pairs of products in 16 bits, which two products of 8 bits can exceed.
_LEVELS = 255 if multiplies_int8() else 127


def _quantise(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    """Return x [P, K] float32, which lies between `low` and `high`, as uint8, its scale and its
    zero: x = scale * (uint8 - zero).
    """
    scale = (high - low) / _LEVELS or 1.0
    zero = round(-low / scale)
    # Deprecated, but the same by other operators of torch 2.13 takes five times as long: a sum, a
    # rounding and a conversion, each a pass over memory.
    quantised = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    # As `int_repr`, without its copy.
    return torch.empty(0, dtype=torch.uint8).set_(quantised.untyped_storage(), 0, x.shape, x.stride()), scale, zero
