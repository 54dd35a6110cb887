"""Where the work is done and in which precision."""

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import get_args

import torch

from dcris.errors import DcrisError
from dcris.utils.arguments import Precision

_CGROUP = Path("/sys/fs/cgroup")


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first GPU, or else the CPU. Raises DcrisError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DcrisError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DcrisError(f"dcris runs on cpu and cuda, not on {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DcrisError(f"device {name} is not on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """The model of a GPU, or the number and model of this machine's processor cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it in hardware, or else float32. Raises DcrisError for another name."""
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise DcrisError(f"there is no precision {precision!r}; use {', '.join(get_args(Precision))}")
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Work in `dtype` inside; weights stay in float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device: of a GPU, or of the machine and within what a container may use.

    Where the system does not say, half of what is built in, and where it does not even say that, 4 GiB.
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
    """Bytes of this process in memory: now (VmRSS), or at its height (VmHWM), which is also all that systems but Linux know."""
    with suppress(OSError):
        # Not getrusage, whose height a process inherits from the one that started it.
        return _kilobytes("/proc/self/status")[field]
    import resource  # there is none on Windows

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _kilobytes(file: str) -> dict[str, float]:
    """The bytes that one of Linux's lists of "Name: 123 kB" gives."""
    lines = (line.split() for line in Path(file).read_text("utf-8").splitlines())
    return {words[0].rstrip(":"): 1024.0 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
