"""The optimiser, its parameter groups, and the learning rate of each step."""

import math
from typing import Any

import torch

from dcris.config import Part, TrainConfig
from dcris.errors import DcrisError
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.muon import Muon, weight_matrices


def make_optimizer(model: ReferringSegmenter, settings: TrainConfig) -> torch.optim.Optimizer:
    """Return Adam, as in the published code (train.py), AdamW or Muon for all that is trained.

    Raises DcrisError as `parameter_groups` does.
    """
    groups = parameter_groups(model, settings)
    lr, betas, weight_decay = settings.lr, settings.betas, settings.weight_decay
    if settings.optimizer == "muon":
        return Muon(groups, weight_matrices(model), lr, betas, weight_decay)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def parameter_groups(model: ReferringSegmenter, settings: TrainConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups, each with its `lr_factor`.

    First those of the parts without a factor in `settings.lr_factors`, then one group for each.

    Raises:
        DcrisError: a part that has a factor has nothing to train.
    """
    parts: dict[Part, list[torch.nn.Parameter]] = {"adapters": [], "head": [], "towers": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[_part(name)].append(parameter)
    for part in settings.lr_factors:
        if not parts[part]:
            trained = " and ".join(name for name, parameters in parts.items() if parameters)
            raise DcrisError(
                f"train.lr_factors has a factor for the {part}, but nothing is trained there in this run, only: {trained}; "
                "leave it out"
            )
    factors = {name: factor for name, factor in settings.lr_factors.items() if factor != 1}
    # In the order of the model: the numbers of the optimiser's slots depend on it.
    plain = [p for name, p in model.named_parameters() if p.requires_grad and _part(name) not in factors]
    groups = [{"params": plain, "lr_factor": 1.0}]
    groups += [{"params": parts[part], "lr_factor": factors[part]} for part in parts if part in factors]
    return [group for group in groups if group["params"]]


def _part(name: str) -> Part:
    """Return the part of the network that a parameter of this name belongs to."""
    if name.startswith("head."):
        return "head"
    return "adapters" if name.startswith("bridge.") or "_slot." in name else "towers"


def warmup_steps(settings: TrainConfig, total: int) -> int:
    """Return the steps of the warm-up of a run of `total` steps.

    A warm-up of more than half of the run takes a tenth of it instead: a recipe's warm-up suits its
    own length, and a short run would end before it reaches the learning rate.
    """
    return settings.warmup_steps if 2 * settings.warmup_steps <= total else total // 10


def learning_rate(settings: TrainConfig, step: int, per_epoch: int, total: int) -> float:
    """Return the learning rate of a step: linear warm-up, then milestones (section 4.2) or half a
    cosine.

    Args:
        settings: of the run.
        step: from 0.
        per_epoch: steps in an epoch.
        total: steps of the run.
    """
    warmup = warmup_steps(settings, total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    passed = sum(step >= milestone * per_epoch for milestone in settings.milestones)
    return settings.lr * settings.gamma**passed


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
