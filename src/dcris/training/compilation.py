"""The network compiled for training (`train.compile`).

Compiled is the training pass of the whole network: encoders, adapters and head, forward and
backward. Losses, optimiser, validation and prediction are not. The compiled network has the model's
own weights and modules, so checkpoints do not differ.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dcris.config import TrainConfig
from dcris.errors import DcrisError, first_line, out_of_memory
from dcris.models.segmentation import Output, ReferringSegmenter
from dcris.utils.distributed import Processes

_BACKEND = "inductor"


def compiled(
    model: ReferringSegmenter, settings: TrainConfig, device: torch.device, group: Processes
) -> Callable[..., Output]:
    """Return a function that computes what `model` does, compiled if `settings.compile` is set.

    It compiles at its first call, and again for inputs of other shapes, which takes minutes.

    Raises:
        DcrisError: there is no compiler for the device, or another setting does not work with a
            compiled network. The function raises it where the network cannot be compiled.
    """
    if not settings.compile:
        return model
    for key, used in (
        ("train.shard_towers", settings.shard_towers),
        ("train.checkpoint_activations", settings.checkpoint_activations),
    ):
        if used:
            raise DcrisError(f"train.compile does not work with {key}; leave one of them off")
    if group.count > 1:
        raise DcrisError("train.compile works with one process only; leave it off, or start without torchrun")
    _require_compiler(device)
    run = torch.compile(model, backend=_BACKEND)

    def forward(*arguments: Any) -> Output:
        try:
            output: Output = run(*arguments)
        except Exception as error:
            if out_of_memory(error) or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = first_line(error)[:200]
            raise DcrisError(f"the network cannot be compiled ({reason}); leave train.compile off") from error
        return output

    return forward


def _require_compiler(device: torch.device) -> None:
    """Raise DcrisError if something is missing that torch needs to compile for the device."""
    if device.type == "cuda":
        variable, usual = "CC", "gcc"
    else:
        variable, usual = "CXX", "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get(variable, usual)
    missing = [f"the compiler {compiler}"] if shutil.which(compiler) is None else []
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's header files (Python.h)")
    if device.type == "cuda" and find_spec("triton") is None:
        missing.append("the package triton")
    if missing:
        raise DcrisError(
            f"train.compile needs {' and '.join(missing)}, not found here; install them (Debian: apt-get install g++ "
            f"python3-dev; another compiler can be named in the variable {variable}), or leave it off"
        )
