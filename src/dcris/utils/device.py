"""Devices, precision and memory."""

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dcris.errors import DcrisError, DcrisWarning
from dcris.utils.arguments import DEVICES, Precision

_CGROUP = Path("/sys/fs/cgroup")

_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device by name; "auto" is the first GPU, or else the CPU.

    Raises:
        DcrisError: it does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DcrisError(f"unknown device {name!r}; use {DEVICES}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise DcrisError(f"dcris runs on cpu, cuda and mps, not on {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DcrisError(f"no device {name}: this machine has no Apple GPU that PyTorch can use; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DcrisError(f"no device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or the number and model of the processor cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return a dtype; "auto" is bfloat16 if the device multiplies it in hardware, otherwise
    float32. torch.int8 stands for int8 products in a network that else works in `working_dtype`.

    Raises:
        DcrisError: the name is unknown, or the device cannot multiply int8.
    """
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise DcrisError(f"unknown precision {precision!r}; use {', '.join(get_args(Precision))}")
    if precision == "int8":
        return _choose_int8(device)
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        fast = False  # whether it is faster was never measured
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def _choose_int8(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        raise DcrisError(f"int8 is for CPUs, not for {device}; use --device cpu or another precision")
    try:
        with warnings.catch_warnings():
            # torch 2.13 deprecates quantized tensors, and says so once.
            warnings.simplefilter("ignore")
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
        torch.ops.onednn.qlinear_prepack(torch.zeros(1, 1, dtype=torch.int8), None)
    except (AttributeError, RuntimeError) as error:
        raise DcrisError(
            f"PyTorch {torch.__version__} multiplies no int8 on this machine; use another precision"
        ) from error
    if not multiplies_int8():
        _warn_of_slow_int8()
    return torch.int8


@cache
def _warn_of_slow_int8() -> None:
    """Warn once: a command chooses its precision several times."""
    text = "this CPU has no instructions for int8 products (VNNI or AMX): int8 is slower here than float32"
    warnings.warn(text, DcrisWarning, stacklevel=4)


def multiplies_int8() -> bool:
    """Return whether the CPU has instructions for sums of int8 products (VNNI, AMX or i8mm)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"))


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a network's features: for int8, that of "auto"."""
    return choose_precision("auto", device) if dtype == torch.int8 else dtype


def precision_of(dtype: torch.dtype) -> Precision:
    """Return the name of a dtype that `choose_precision` gives."""
    return next(name for name, each in _DTYPES.items() if each == dtype)


_FILLS = frozenset(
    [getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_")]
    + [getattr(torch.nn.init, name) for name in ("normal_", "uniform_", "constant_", "kaiming_uniform_")]
)


class _LeaveUnfilled(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which modules are made without memory for their weights, on the device "meta".

    Nothing is filled there: it takes time, and for normal random numbers torch 2.13 imports its
    compiler, which takes two seconds.
    """
    with torch.device("meta"), _LeaveUnfilled():
        yield


def allocate(model: nn.Module) -> None:
    """Give a model that was made in `shapes_only` memory on the CPU for its weights, not filled.

    It does what `model.to_empty(device="cpu")` does, for which torch 2.13 imports sympy: a second.
    """
    with torch.no_grad():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context that computes in `dtype`; weights stay in float32."""
    dtype = working_dtype(dtype, device)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free: of a GPU, or of the machine within the limit of its
    container.

    If the system does not tell, half of the installed memory; if it does not tell that either, 4
    GiB.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        free = [_kilobytes("/proc/meminfo")["MemAvailable"]]
    except (OSError, KeyError):  # not on Linux
        try:
            free = [0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        except (AttributeError, OSError, ValueError):  # on Windows
            free = [4.0 * 2**30]
    with suppress(OSError, ValueError):
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text("ascii"))
            caches = (line.split() for line in (_CGROUP / "memory.stat").read_text("ascii").splitlines())
            used -= sum(int(value) for name, value in caches if name in {"inactive_file", "active_file"})
            free.append(float(int(limit) - used))
    return max(0.0, min(free))


def resident_memory(field: str) -> float:
    """Return the bytes of this process in memory: now (VmRSS), or at its peak (VmHWM).

    Only the peak is known outside Linux.
    """
    with suppress(OSError):
        # Not getrusage: a process inherits the peak of the one that started it.
        return _kilobytes("/proc/self/status")[field]
    import resource  # missing on Windows

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _kilobytes(file: str) -> dict[str, float]:
    """Parse a Linux file of lines "Name: 123 kB" to bytes by name."""
    lines = (line.split() for line in Path(file).read_text("utf-8").splitlines())
    return {words[0].rstrip(":"): 1024.0 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
