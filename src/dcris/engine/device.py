"""Where the work is done and in which precision."""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from dcris.config import Precision
from dcris.errors import DcrisError


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first GPU, or else the CPU. Raises DcrisError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DcrisError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DcrisError(f"dcris runs on cpu and cuda, not on {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DcrisError(f"device {name} is not on this machine, which has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it in hardware, or else float32."""
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
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device: of a GPU, or of the machine (where that does not say, 4 GiB are assumed)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 4 * 2**30
