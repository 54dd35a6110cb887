"""Weights files of any kind as tensors by name, each read when it is asked for.

Published weights come as safetensors, as pickles in a zip file (torch.save) and as TorchScript archives (torch.jit.save). The
last two can carry code. None of it is run here: torch's own reader admits tensors only, and of an archive the pickled tree is
walked with stand-ins for its classes while its program is left unread.
"""

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dcris.errors import DcrisError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that still lies in its file."""

    shape: tuple[int, ...]
    floating: bool
    """Whether its numbers are floating point, of any precision."""
    read: Callable[[], Tensor]
    """Gives the tensor as it is stored. Raises DcrisError where the file is damaged there."""


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a weights file by name. Only names and shapes are read now, wherever the kind of file allows that.

    Raises DcrisError where the file is missing, unreadable, damaged, asks to run code, or is not a plain state dict.
    """
    with _reading(path):
        with path.open("rb") as file:
            start = file.read(9)
        # By content, so that a renamed file works; by name too, so that a damaged one is called what it is.
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return _open_safetensors(path)
        in_zip = zipfile.is_zipfile(path)
        if in_zip:
            archive = zipfile.ZipFile(path)
            root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")), "")
            # Only TorchScript writes constants; torch.load goes by this file too.
            if f"{root}constants.pkl" in archive.namelist():
                return _open_torchscript(path, archive, root)
            archive.close()
        # Without mmap both halves of CLIP would be in memory; files from before 2020 are not zip files and cannot have it.
        with warnings.catch_warnings(action="ignore"):  # about old formats; there is nothing to do about them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
        return _from_state_dict(path, content)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a reader raises into one sentence."""
    try:
        yield
    except DcrisError:
        raise
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {path}; check the folder and the name, or fetch the file") from error
    except Exception as error:  # a damaged file makes its readers raise nearly anything
        # A cut zip file sends its reader to places before the start, which the system calls an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise DcrisError(f"cannot read {path}: {error.strerror or error}") from error
        if request := re.search(r"GLOBAL (\S+)", str(error)):
            raise DcrisError(
                f"{path} asks to run code ({request[1]}), which weights never need: do not trust it; "
                "fetch it again from a source you know"
            ) from error
        # torch puts its reason behind a paragraph that advises to let the file run its code.
        told = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error).strip() or type(error).__name__
        reason = told.splitlines()[0][:160]
        raise DcrisError(
            f"{path} cannot be read as weights ({reason}); it may be cut short or damaged, so delete it and fetch it again"
        ) from error


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    file: Any = safe_open(path, framework="pt")  # open as long as one of its readers is held

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with _reading(path):
                return file.get_tensor(name)

        return read

    tensors = {}
    for name in file.keys():  # noqa: SIM118
        header = file.get_slice(name)
        floating = header.get_dtype().startswith(("F", "BF"))
        tensors[name] = StoredTensor(tuple(header.get_shape()), floating, reader(name))
    return tensors


def _from_state_dict(path: Path, content: Any) -> dict[str, StoredTensor]:
    if not isinstance(content, dict):
        raise DcrisError(f"{path} holds a {type(content).__name__} where weights by name were expected")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DcrisError(
                f"{path} is not a plain state dict: its entry {name!r} is a {type(value).__name__}, no tensor"
            )
    return {
        name: StoredTensor(tuple(value.shape), value.is_floating_point(), partial(Tensor.detach, value))
        for name, value in content.items()
    }


class _View(NamedTuple):
    """Where in an archive a tensor's numbers are."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Module:
    """Stands in for every class of an archive's program: a bag of attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def _view(storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any) -> _View:
    return _View(*storage, offset, tuple(shape), tuple(stride))


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
    # Typed lists and dictionaries among a module's attributes.
    ("torch.jit._pickle", "build_intlist"): _as_it_is,
    ("torch.jit._pickle", "build_doublelist"): _as_it_is,
    ("torch.jit._pickle", "build_boollist"): _as_it_is,
    ("torch.jit._pickle", "build_tensorlist"): _as_it_is,
    ("torch.jit._pickle", "restore_type_tag"): _as_it_is,
}


class _TreeUnpickler(pickle.Unpickler):
    """Builds an archive's tree of modules out of stand-ins. No class or function that a file names is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, _, _ = pid  # the rest: the word "storage", a device that need not exist here, a length
        return key, dtype


def _open_torchscript(path: Path, archive: zipfile.ZipFile, root: str) -> dict[str, StoredTensor]:
    with archive.open(f"{root}data.pkl") as file:
        tree = _TreeUnpickler(file).load()

    def reader(view: _View) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with _reading(path):
                numbers = bytearray(archive.read(f"{root}data/{view.storage}"))  # zipfile checks the sum
                # as_strided refuses a view that reaches outside the numbers.
                return torch.frombuffer(numbers, dtype=view.dtype).as_strided(view.shape, view.stride, view.offset)

        return read

    return {name: StoredTensor(view.shape, view.dtype.is_floating_point, reader(view)) for name, view in _views(tree)}


def _views(module: Any, prefix: str = "") -> Iterator[tuple[str, _View]]:
    """The tensors of a tree of modules, named as its state dict names them."""
    if isinstance(module, _Module) and isinstance(module.attributes, dict):
        for name, value in module.attributes.items():
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
            else:
                yield from _views(value, f"{prefix}{name}.")
