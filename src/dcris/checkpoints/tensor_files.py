"""Read weights files of several formats as tensors by name, each tensor on demand.

The formats are safetensors, torch.save (a pickle and the numbers, in a zip file since torch 1.6)
and TorchScript (torch.jit.save). The last two can contain code. No code is run: pickles are read
with stand-ins for the few classes that weights need. Tensors are views of the memory-mapped file,
so sizes stated in a hostile file allocate no memory.
"""

import errno
import io
import math
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dcris.checkpoints.state_dicts import OtherValue, find_weights
from dcris.errors import DcrisError, first_line
from dcris.utils.files import open_regular
from dcris.utils.pickles import end_of_pickle, global_name

_MAX_PICKLE = 64_000_000
"""Limit on the bytes of a pickle, which holds everything but the numbers. Published weights have
less than 1 MB."""
_MAX_HEADER = 16_000_000
"""Limit on the bytes of a safetensors header."""
_MAX_MODULES = 100_000
"""Limit on the modules of a TorchScript archive; a module with several names counts several
times."""
_MAX_REPEATED = 256_000_000
"""Limit on the bytes of a tensor that repeats its numbers (torch's expand()): a copy takes that
much memory."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles in files of torch.save before 1.6."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read from its file yet."""

    shape: tuple[int, ...]
    floating: bool
    """Whether its type is floating point, of any precision."""
    read: Callable[[], Tensor]
    """Read the tensor in its stored type. Raises DcrisError if the file is damaged there."""


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a weights file by name. Only names and shapes are read now.

    Other entries beside the state dict, and prefixes of torch's wrappers, are handled by
    find_weights.

    Raises:
        DcrisError: the file is missing, unreadable or damaged, holds other objects than tensors,
            numbers and text, or holds no weights by name.
    """
    with _reading(path), open_regular(path) as file:
        start = file.read(9)
        # By content, so that renamed files work; also by name, so that errors about damaged files
        # name the right format.
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return find_weights(_safetensors(path), StoredTensor, path)
        content, numbers = (_read_zip if start.startswith(b"PK") else _read_old)(file)
        found = find_weights(content, _View, path)
        return {name: _stored(path, view, numbers) for name, view in found.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert all exceptions of a reader to DcrisError."""
    try:
        yield
    except DcrisError:
        raise
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {path}; check the path, or download the file") from error
    except _ForeignError as error:
        raise DcrisError(f"{path} {error}") from error
    except Exception as error:  # readers raise many kinds of exceptions for damaged files
        # In a truncated zip file, the reader seeks to a negative position, which the system reports
        # as EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise DcrisError(f"cannot read {path}: {error.strerror or error}") from error
        raise DcrisError(
            f"{path} cannot be read as weights ({first_line(error)[:160]}); it may be cut short or damaged, so delete it and "
            "download it again"
        ) from error


# ---- safetensors ---------------------------------------------------------------------------------


def open_safetensors(path: Path) -> Any:
    """Open a file with the safetensors library.

    Raises OSError or SafetensorError if it cannot be read.
    """
    with open_regular(path) as file:  # the library opens by name and would block on a pipe
        if not 0 < int.from_bytes(file.read(8), "little") <= _MAX_HEADER:
            raise OSError("its header is empty or too large, or it is not a safetensors file")
    return safe_open(path, framework="pt")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    file = open_safetensors(path)  # stays open as long as one of the readers exists

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


# ---- pickles of tensors --------------------------------------------------------------------------


class _Storage(NamedTuple):
    """Reference in a pickle to numbers elsewhere in the file."""

    key: str
    dtype: torch.dtype
    offset: int = 0
    """Start in numbers, for the partial storages of old files."""


class _View(NamedTuple):
    """Location of the numbers of a tensor."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ForeignError(pickle.UnpicklingError):
    """A pickle names a class or function that weights do not need."""

    def __init__(self, module: str, name: str) -> None:
        found = global_name(module, name)
        if module in _PROGRAMS:
            super().__init__(
                f"tries to run code ({found}), which weights never need; do not trust it, and download it from a known source"
            )
        else:
            super().__init__(
                f"holds {found} beside its weights; only tensors, numbers and text are accepted, because other objects can run "
                "code. Save the weights alone, in the original program or, if you trust the file, after torch.load(..., "
                'weights_only=False): torch.save(checkpoint["state_dict"], "weights.pth")'
            )


_PROGRAMS = {
    "builtins",
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "shutil",
    "importlib",
    "runpy",
    "pickle",
    "ctypes",
    "socket",
}
"""Modules whose functions are never saved by mistake. This only affects the message: all names not
in _STAND_INS are refused."""


class _Module:
    """Stand-in for all classes of a TorchScript program; it keeps the attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Dictionary(dict[Any, Any]):
    """Stand-in for dictionaries of any class; attributes are ignored."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _StandIn:
    """Stand-in for a class or function. A pickle can call it, but not modify it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to modify a class")


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View:
    """Stand-in for torch's `_rebuild_tensor`, `_v2` and `_v3`.

    Arguments after the stride: requires_grad, hooks, the type (in `_v3`), and flags of special
    views.
    """
    if not isinstance(storage, _Storage) or not (
        type(shape) is type(stride) is tuple and len(shape) == len(stride) < 50
    ):
        raise pickle.UnpicklingError("it has a tensor without storage or shape")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (storage.offset, offset, *shape, *stride)):
        raise pickle.UnpicklingError("it has a tensor with an impossible shape")
    if more[2:] and isinstance(more[-1], dict) and more[-1]:
        raise pickle.UnpicklingError("it has a tensor that is a conjugate or negative view")
    dtype = more[2] if isinstance(more[2:3] and more[2], torch.dtype) else storage.dtype
    return _View(storage, dtype, offset, shape, stride)


def _first(*values: Any) -> Any:
    """Return the first argument, for objects that are represented by it."""
    return values[0] if values else None


def _dictionary(entries: Any = (), *_: Any) -> Any:
    """Create a dictionary from nothing, from another one, or from a list of pairs (Python 2)."""
    if isinstance(entries, dict):
        return entries
    made = _Dictionary(entries if isinstance(entries, list) else ())
    if isinstance(entries, list):
        entries.clear()  # otherwise six bytes of a pickle could create another copy
    return made


def _subclass(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """Stand-in for a tensor with attributes, which are ignored."""
    if not isinstance(function, _StandIn) or function.call is _subclass or type(arguments) is not tuple:
        raise pickle.UnpicklingError("it has a tensor of an unknown class")
    return function(*arguments)


def _other(kind: str) -> _StandIn:
    return _StandIn(lambda *_: OtherValue(kind))


_SAME = _StandIn(_first)
_STAND_INS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _StandIn(_view),
    "torch._utils._rebuild_tensor_v2": _StandIn(_view),
    "torch._utils._rebuild_tensor_v3": _StandIn(_view),
    "torch._utils._rebuild_parameter": _SAME,
    "torch._utils._rebuild_parameter_with_state": _SAME,
    "torch._tensor._rebuild_from_type_v2": _StandIn(_subclass),
    "torch._utils._rebuild_sparse_tensor": _other("sparse tensor"),
    "torch._utils._rebuild_qtensor": _other("quantised tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _other("tensor without numbers, on the device meta"),
    # Numbers, text and containers.
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter"), _StandIn(_dictionary)),
    "collections.defaultdict": _StandIn(lambda *_: _Dictionary()),
    **dict.fromkeys(
        (
            *(f"builtins.{name}" for name in ("set", "frozenset", "complex", "bytes", "bytearray")),
            *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "bool", "str")),
            *("_codecs.encode", "torch.Size", "torch.device", "torch.serialization._get_layout"),
            *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"),
        ),
        _SAME,
    ),
    **{
        f"{package}.{name}": _other("numpy value")
        for package in (
            "numpy",
            *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")),
        )
        for name in ("dtype", "ndarray", "scalar", "_reconstruct", "_frombuffer")
    },
    # Typed lists and dictionaries in the attributes of TorchScript modules.
    **dict.fromkeys(
        (
            *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
            "torch.jit._pickle.restore_type_tag",
        ),
        _SAME,
    ),
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype | torch.qscheme)},
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "ComplexDouble": torch.complex128,
            "ComplexFloat": torch.complex64,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
            "QInt8": torch.int8,
            "QUInt8": torch.uint8,
            "QInt32": torch.int32,
        }.items()
    },
    "torch.storage.UntypedStorage": torch.uint8,
}
"""Names that pickles of weights may contain. No class or function is ever imported by a name from a
file."""


class _Unpickler(pickle.Unpickler):
    """Reads a pickle with stand-ins; with `modules`, also the classes of a TorchScript program."""

    def __init__(self, data: bytes, modules: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.modules = modules
        self.widths: dict[str, int] = {}
        """Bytes per number of each storage, by its key."""

    def find_class(self, module: str, name: str) -> Any:
        if self.modules and (module == "__torch__" or module.startswith("__torch__.")):
            return _Module
        module = {"__builtin__": "builtins"}.get(module, module)  # name in Python 2
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _ForeignError(module, name) from None

    def persistent_load(self, pid: Any) -> _Storage:
        # Ignored: the word "storage", the device, the length. Old files also have a part of the
        # storage.
        _, dtype, key, _, _, *part = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it has numbers of an unknown type")
        self.widths[str(key)] = dtype.itemsize
        return _Storage(str(key), dtype, part[0][1] if part and part[0] else 0)


# ---- the files that hold them --------------------------------------------------------------------


class _Place(NamedTuple):
    """Location of a storage in the file, in bytes."""

    start: int
    size: int
    checksum: int | None = None


class _Numbers(NamedTuple):
    """The bytes of a file, and the location of each storage."""

    content: mmap.mmap
    place: Callable[[str], _Place]
    """Returns the location of a storage by its key."""


def _mapped(file: BinaryIO) -> mmap.mmap:
    """Map the file into memory.

    The map is private: writing to a tensor does not change the file. Call it once the start of the
    file is known to be right: the address space may be limited, and any file may come here.
    """
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_zip(file: BinaryIO) -> tuple[Any, _Numbers]:
    """Read a zip file of torch.save, or of torch.jit.save with tensor names from its modules."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    content = _mapped(file)
    root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), "")
    scripted = f"{root}constants.pkl" in entries  # only TorchScript writes this file; torch.load checks the same

    def place(name: str) -> _Place:
        entry = entries[f"{root}{name}"]
        # torch never compresses, so refuse compression: a few bytes could expand to many.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} is compressed")
        header = content[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} has a wrong position")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + entry.file_size > len(content):
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} extends beyond the end of the file")
        # torch.save can omit the checksums, and torch.load does not check them.
        return _Place(start, entry.file_size, entry.CRC if scripted else None)

    def read(name: str, most: int) -> bytes:
        start, size, _ = place(name)
        if size > most:
            raise pickle.UnpicklingError(f"its {name} is larger than the limit of {most / 1e6:.0f} MB")
        return content[start : start + size]

    if f"{root}byteorder" in entries and read("byteorder", 9) != sys.byteorder.encode():
        raise pickle.UnpicklingError("it was written on a machine with another byte order")
    data = read("data.pkl", _MAX_PICKLE)
    end_of_pickle(data)
    tree = _Unpickler(data, modules=scripted).load()
    numbers = _Numbers(content, lambda key: place(f"data/{key}"))
    return dict(_views(tree)) if scripted else tree, numbers


def _views(tree: Any) -> Iterator[tuple[str, _View]]:
    """Yield the tensors of a tree of modules, with the names of its state dict."""
    seen, left = 0, [("", tree)]
    while left:
        prefix, module = left.pop()
        seen += 1
        # n modules that each contain the next one twice give 2 ** n names, and modules may contain
        # themselves.
        if seen > _MAX_MODULES or len(prefix) > 10_000:
            raise pickle.UnpicklingError("its modules are nested too deeply")
        if isinstance(module, _Module) and isinstance(module.attributes, dict):
            for name, value in module.attributes.items():
                if isinstance(value, _View):
                    yield f"{prefix}{name}", value
                elif isinstance(value, _Module):
                    left.append((f"{prefix}{name}.", value))


def _read_old(file: BinaryIO) -> tuple[Any, _Numbers]:
    """Read a file of torch.save before 1.6: five pickles, then length and numbers per storage."""
    file.seek(0)
    data, at, held = file.read(_MAX_PICKLE), 0, []
    widths: dict[str, int] = {}
    for expected in (_MAGIC, _PROTOCOL, None, None, None):
        end = end_of_pickle(data, at)
        unpickler = _Unpickler(data[at:end])
        held.append(unpickler.load())
        widths |= unpickler.widths
        if expected is not None and held[-1] != expected:
            raise pickle.UnpicklingError("it is not a file of torch.save")
        at = end
    *_, system, tree, keys = held
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise pickle.UnpicklingError("it was written on a machine with another byte order")
    content = _mapped(file)
    places = {}
    for key in keys:
        (length,) = struct.unpack_from("<q", content, at)
        places[str(key)] = _Place(at + 8, length * widths[str(key)])
        at += 8 + places[str(key)].size
        if length < 0 or at > len(content):
            raise EOFError("it ends before its last number")
    return tree, _Numbers(content, places.__getitem__)


def _stored(path: Path, view: _View, numbers: _Numbers) -> StoredTensor:
    """Create the tensor of a view. Raises UnpicklingError if it extends beyond its storage."""
    place, item, count = numbers.place(view.storage.key), view.dtype.itemsize, math.prod(view.shape)
    within, start = place.size // item, view.offset + view.storage.offset
    reach = (
        start + 1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True)) if count else 0
    )
    if reach > within or (count > within and count * item > _MAX_REPEATED):
        raise pickle.UnpicklingError("it has a tensor that is larger than its numbers")

    def read() -> Tensor:
        if not count:
            return torch.empty(view.shape, dtype=view.dtype)
        with _reading(path):
            if place.checksum is not None:
                with memoryview(numbers.content)[place.start : place.start + place.size] as stored:
                    if zlib.crc32(stored) != place.checksum:
                        raise zipfile.BadZipFile("a checksum does not match")
            tensor = torch.frombuffer(numbers.content, dtype=view.dtype, count=within, offset=place.start)
            return tensor.as_strided(view.shape, view.stride, start)

    return StoredTensor(view.shape, view.dtype.is_floating_point, read)
