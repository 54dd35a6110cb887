"""The loss scale of training in float16, whose smallest gradients would otherwise become 0.

The loss is multiplied by a factor, and the gradients are divided by it before the step. A step
whose gradients are not finite is skipped, and the factor is halved; it is doubled after 2,000 steps
without one (torch.amp.GradScaler). Micikevicius et al. 2018, section 3.2.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dcris.errors import DcrisError

_MOST_IN_A_ROW = 25
"""Skipped steps in a row after which a run ends: the factor fell from 65,536 to 0.002."""


class LossScale:
    """Takes the optimiser's steps; in float16 with a loss scale, otherwise as they are.

    Args:
        dtype: working precision.
        device: of the gradients.

    Raises:
        DcrisError: float16 on a device without a loss scale.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.on = dtype == torch.float16
        if self.on and device.type not in ("cpu", "cuda"):
            raise DcrisError(
                f"train.precision float16 works on cuda and cpu, not on {device.type}; use float32 or bfloat16"
            )
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.on)
        self.skipped = 0
        """Steps skipped since the run was started."""
        self._in_a_row = 0

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the present factor."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: float, clip_norm: float | None
    ) -> bool:
        """Clip the gradients, let the optimiser take its step, and return True; return False if the
        step was skipped, which changes no weight.

        Args:
            optimizer: of `parameters`, whose gradients are those of the scaled loss, summed over
                the ranks.
            parameters: all that is trained.
            loss: of the step, over all ranks; if it is not finite, the step is skipped.
            clip_norm: maximum norm of the gradient; None: no clipping.

        Raises:
            DcrisError: too many steps in a row were skipped.
        """
        if self.on and not math.isfinite(loss):
            # Some gradients of an infinite loss are finite. With one that is not, the step is
            # skipped on all ranks.
            next(each.grad for each in parameters if each.grad is not None).fill_(math.inf)
        self._scaler.unscale_(optimizer)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= before:
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == _MOST_IN_A_ROW:
            raise DcrisError(
                f"float16 overflowed in {_MOST_IN_A_ROW} steps in a row, with ever smaller loss scales; the last checkpoint is "
                "intact: start another run --from it, with --precision bfloat16 or float32 or with a lower --train.lr"
            )
        return False

    def report(self) -> dict[str, float]:
        """Return what the log shows; nothing without a loss scale."""
        return {"loss_scale": self._scaler.get_scale(), "skipped_steps": self.skipped} if self.on else {}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs, on the CPU; nothing without a loss scale."""
        if not self.on:
            return {}
        numbers = self._scaler.state_dict() | {"skipped": self.skipped, "in_a_row": self._in_a_row}
        return {name.lstrip("_"): torch.tensor(numbers[name], dtype=torch.float64) for name in _SAVED}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the `state` of a run. Raises KeyError if it is incomplete."""
        if not self.on:
            return
        numbers = {name: state[name.lstrip("_")].item() for name in _SAVED}
        self.skipped, self._in_a_row = int(numbers["skipped"]), int(numbers["in_a_row"])
        self._scaler.load_state_dict(
            self._scaler.state_dict() | {"scale": numbers["scale"], "_growth_tracker": int(numbers["_growth_tracker"])}
        )


_SAVED = ("scale", "_growth_tracker", "skipped", "in_a_row")
