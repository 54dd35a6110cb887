"""Import torch for prediction only, in three quarters of the time."""

import sys
from types import ModuleType

_FOR_THE_COMPILER = "torch._meta_registrations"
"""Registers Python versions of torch's operations for tensors without numbers. torch imports it
last, and only for that effect."""


def import_torch() -> None:
    """Import torch without its registrations for tensors without numbers, unless it is imported
    already.

    It is for commands that end after a prediction: torch.compile and torch.export fail until
    somebody imports that module, and on the device "meta" operations that torch does not have in
    C++ raise NotImplementedError.
    """
    if "torch" in sys.modules or _FOR_THE_COMPILER in sys.modules:
        return
    sys.modules[_FOR_THE_COMPILER] = ModuleType(_FOR_THE_COMPILER)
    try:
        import torch
    finally:
        del sys.modules[_FOR_THE_COMPILER]
    vars(torch).pop("_meta_registrations", None)
