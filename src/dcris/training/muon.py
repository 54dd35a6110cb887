"""Muon (Jordan et al. 2024): orthogonal steps for weight matrices, and AdamW for the rest.

torch.optim.Muon takes matrices alone, one after the other. Here a convolution is a matrix, too, the
packed projections of an attention are three, and all of one size are computed together: a network
of small matrices would otherwise spend a large part of each step on starting operations.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dcris.models.adapters.barleria import SideBlock
from dcris.models.adapters.compacter import HypercomplexLinear
from dcris.models.adapters.lora import LowRank
from dcris.models.encoders.blocks import SelfAttention, SwiGLU
from dcris.models.layers.attention import MultiHeadAttention

Stack = tuple[int, int, int]
"""What a weight is: so many matrices of so many rows and columns."""

_MOMENTUM = "momentum"

# Five steps of this polynomial bring singular values to between 0.7 and 1.2 (Jordan et al. 2024).
_POLYNOMIAL, _STEPS = (3.4445, -4.7750, 2.0315), 5
_ADAMW_RMS = 0.2
"""Root mean square of AdamW's changes, over the learning rate; matrices get the same (Liu et al.
2025), so that both share one learning rate."""


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for the other weights of the groups.

    Args:
        groups: parameters in groups, each with its own settings.
        matrices: from `weight_matrices`.
        lr: learning rate.
        betas: of AdamW; the first is the momentum of Muon (Nesterov's), too.
        weight_decay: share of the weights, times the learning rate, that a step removes.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Mapping[nn.Parameter, Stack],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.matrices = matrices
        parts = []
        for group in groups:
            for chosen in True, False:
                parameters = [p for p in group["params"] if (p in matrices) == chosen]
                if parameters:
                    # `kept`: names of the state that a checkpoint has of each weight.
                    parts.append({**group, "params": parameters, **({"kept": {_MOMENTUM}} if chosen else {})})
        super().__init__(parts, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        # A GradScaler leaves it to fused AdamW to skip a step that overflowed; here it must not
        # call `step` at all.
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state over. AdamW would look for its own in the matrices, to update old ones."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all weights that have gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "kept" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "kept" in group:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_size: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        parameters: list[nn.Parameter] = group["params"]
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state[_MOMENTUM] = torch.zeros_like(parameter)
            momentum, decay = state[_MOMENTUM], group["betas"][0]
            momentum.lerp_(parameter.grad, 1 - decay)
            direction = parameter.grad.lerp(momentum, decay)
            stack = direction.reshape(self.matrices[parameter])
            by_size.setdefault(self.matrices[parameter][1:], []).append((parameter, stack))
        for size, alike in by_size.items():
            directions = orthogonalise(torch.cat([stack for _, stack in alike]))
            directions *= -group["lr"] * _ADAMW_RMS * max(size) ** 0.5
            parts = directions.split([len(stack) for _, stack in alike])
            for (parameter, _), part in zip(alike, parts, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(part.reshape(parameter.shape))


def weight_matrices(model: nn.Module) -> dict[nn.Parameter, Stack]:
    """Return the weights of all layers that multiply by matrices.

    Weights of depthwise convolutions, embeddings and tokens are not matrices in this sense.
    """
    found: dict[nn.Parameter, Stack] = {}
    for module in model.modules():  # the layers of a module follow it
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1):
            weight = module.get_parameter("weight")
            found.setdefault(weight, (1, len(weight), weight[0].numel()))
        elif isinstance(module, MultiHeadAttention):
            found |= _packed(module.in_weight, 3)
        elif isinstance(module, SelfAttention | SideBlock):
            found |= _packed(module.get_parameter("qkv.weight"), 3)
        elif isinstance(module, SwiGLU):
            found |= _packed(module.get_parameter("w12.weight"), 2)
        elif isinstance(module, LowRank | HypercomplexLinear):
            found |= {weight: (*weight.shape,) for weight in module.parameters() if weight.ndim == 3}
    return found


def _packed(weight: nn.Parameter, count: int) -> dict[nn.Parameter, Stack]:
    """Return what a weight is that stores so many matrices one below the other."""
    return {weight: (count, len(weight) // count, weight.shape[1])}


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of matrices [N, rows, columns] by values near 1; zeros stay.

    Newton-Schulz iterations, in the precision of the matrices.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the products below are of the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, third, fifth = _POLYNOMIAL
    for _ in range(_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=third, alpha=fifth), x, beta=first)
    return x.mT if tall else x
