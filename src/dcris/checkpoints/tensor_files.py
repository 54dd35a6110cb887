"""Weights files of any kind as tensors by name, each read when it is asked for.

Weights come as safetensors, as what torch.save writes (a pickle and the numbers, in a zip file since torch 1.6) and as
TorchScript archives (torch.jit.save). The last two can carry code. None of it is run here: their pickles are read with
stand-ins for the few classes that weights need, and tensors are views of the file, so that no claim in it takes memory.
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
from dcris.errors import DcrisError
from dcris.utils.files import open_regular
from dcris.utils.pickles import end_of_pickle, global_name

_MAX_PICKLE = 64_000_000
"""Bytes of a file's pickle, which holds all but the numbers. Those of published weights have less than 1 MB."""
_MAX_HEADER = 16_000_000
"""Bytes of a safetensors header."""
_MAX_MODULES = 100_000
"""In a TorchScript archive; those that are there under several names count under each."""
_MAX_REPEATED = 256_000_000
"""Bytes of a tensor that repeats its numbers, as torch's expand() leaves them: a copy of it takes that much."""
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles of what torch.save wrote before 1.6."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that still lies in its file."""

    shape: tuple[int, ...]
    floating: bool
    """Whether its numbers are floating point, of any precision."""
    read: Callable[[], Tensor]
    """Gives the tensor as it is stored. Raises DcrisError where the file is damaged there."""


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a weights file by name. Only names and shapes are read now.

    They may lie in a dictionary beside other things, and torch's wrappers may have put something into their names: see
    find_weights. Raises DcrisError where the file is missing, unreadable or damaged, holds other objects than tensors, numbers
    and text, or holds no weights by name.
    """
    with _reading(path), open_regular(path) as file:
        start = file.read(9)
        # By content, so that a renamed file works; by name too, so that a damaged one is called what it is.
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return find_weights(_safetensors(path), StoredTensor, path)
        content, numbers = (_read_zip if start.startswith(b"PK") else _read_old)(file)
        found = find_weights(content, _View, path)
        return {name: _stored(path, view, numbers) for name, view in found.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a reader raises into one sentence."""
    try:
        yield
    except DcrisError:
        raise
    except FileNotFoundError as error:
        raise DcrisError(f"there is no file {path}; check the folder and the name, or fetch the file") from error
    except _ForeignError as error:
        raise DcrisError(f"{path} {error}") from error
    except Exception as error:  # a damaged file makes its readers raise nearly anything
        # A cut zip file sends its reader to places before the start, which the system calls an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise DcrisError(f"cannot read {path}: {error.strerror or error}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise DcrisError(
            f"{path} cannot be read as weights ({reason}); it may be cut short or damaged, so delete it and fetch it again"
        ) from error


# ---- safetensors ---------------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> Any:
    """A safetensors file, as its library has it. Raises OSError and SafetensorError where it cannot be read."""
    with open_regular(path) as file:  # the library opens by name, and would wait for a pipe
        if not 0 < int.from_bytes(file.read(8), "little") <= _MAX_HEADER:
            raise OSError("its header is empty or too large, or it is no safetensors file")
    return safe_open(path, framework="pt")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    file = open_safetensors(path)  # open as long as one of its readers is held

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


# ---- pickles of tensors --------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """What stands in a pickle for numbers that lie elsewhere in the file."""

    key: str
    dtype: torch.dtype
    offset: int = 0
    """Of a part of older files' storages: where it starts, in numbers."""


class _View(NamedTuple):
    """Where in a file a tensor's numbers are."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ForeignError(pickle.UnpicklingError):
    """A pickle asks for a class or function that weights do not need."""

    def __init__(self, module: str, name: str) -> None:
        asked = global_name(module, name)
        if module in _PROGRAMS:
            super().__init__(
                f"asks to run code ({asked}), which weights never need: do not trust it; fetch it again from a source you know"
            )
        else:
            super().__init__(
                f"holds {asked} beside its weights, and other objects than tensors, numbers and text are refused because they "
                "can run code; save the weights alone, where the file was made or, if you trust it, after torch.load(..., "
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
"""Modules whose functions nobody saves by mistake. They only decide the wording: all that is not in _STAND_INS is refused."""


class _Module:
    """Stands in for every class of a TorchScript program: a bag of attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Dictionary(dict[Any, Any]):
    """Stands in for dictionaries of any class; their attributes are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _StandIn:
    """What a pickle gets for a class or function that it names. A pickle can call it, and not change it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it asks to change a class")


def _view(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View:
    """A tensor, as torch's `_rebuild_tensor` and its second and third version are given it.

    What is behind the stride: whether it is trained, hooks, in the third version a kind of numbers, and marks of special views.
    """
    if not isinstance(storage, _Storage) or not (
        type(shape) is type(stride) is tuple and len(shape) == len(stride) < 50
    ):
        raise pickle.UnpicklingError("it has a tensor without numbers or shape")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (storage.offset, offset, *shape, *stride)):
        raise pickle.UnpicklingError("it has a tensor of no possible shape")
    if more[2:] and isinstance(more[-1], dict) and more[-1]:
        raise pickle.UnpicklingError("it has a tensor that is a conjugate or negative view")
    dtype = more[2] if isinstance(more[2:3] and more[2], torch.dtype) else storage.dtype
    return _View(storage, dtype, offset, shape, stride)


def _first(*values: Any) -> Any:
    """The value of which a plain object was made: nothing needs the object itself."""
    return values[0] if values else None


def _dictionary(entries: Any = (), *_: Any) -> Any:
    """A dictionary of nothing, of another one, or of the pairs in a list, as Python 2 has it."""
    if isinstance(entries, dict):
        return entries
    made = _Dictionary(entries if isinstance(entries, list) else ())
    if isinstance(entries, list):
        entries.clear()  # or six bytes of a pickle could ask for another copy
    return made


def _subclass(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """A tensor with attributes, which are left out."""
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
    "torch._utils._rebuild_meta_tensor_no_storage": _other("tensor without numbers, of the device meta"),
    # Numbers, text and containers beside the weights.
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
    # Typed lists and dictionaries among a TorchScript module's attributes.
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
"""What pickles of weights may name. No class or function is ever looked up by a name out of a file."""


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of tensors with stand-ins. `modules` admits the classes of a TorchScript program, too."""

    def __init__(self, data: bytes, modules: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.modules = modules
        self.widths: dict[str, int] = {}
        """Bytes of a number of each storage, by its key."""

    def find_class(self, module: str, name: str) -> Any:
        if self.modules and (module == "__torch__" or module.startswith("__torch__.")):
            return _Module
        module = {"__builtin__": "builtins"}.get(module, module)  # as Python 2 calls it
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _ForeignError(module, name) from None

    def persistent_load(self, pid: Any) -> _Storage:
        # The rest: the word "storage", a device that need not exist here, a length, and in old files a part of it.
        _, dtype, key, _, _, *part = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it has numbers of no known kind")
        self.widths[str(key)] = dtype.itemsize
        return _Storage(str(key), dtype, part[0][1] if part and part[0] else 0)


# ---- the files that hold them -------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a storage's bytes are in the file."""

    start: int
    size: int
    checksum: int | None = None


class _Numbers(NamedTuple):
    """A file's bytes, and where in them each storage is."""

    content: mmap.mmap
    place: Callable[[str], _Place]
    """Of a storage's key."""


def _mapped(file: BinaryIO) -> mmap.mmap:
    """The file as memory that is read when it is needed. Private: a tensor of it may be written to, the file stays."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_zip(file: BinaryIO) -> tuple[Any, _Numbers]:
    """What torch.save or torch.jit.save put into a zip file; of an archive, the tensors by the names that its modules give."""
    content = _mapped(file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), "")
    scripted = f"{root}constants.pkl" in entries  # only TorchScript writes it; torch.load goes by this file too

    def place(name: str) -> _Place:
        entry = entries[f"{root}{name}"]
        # torch compresses neither: a few bytes cannot become many.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} is compressed")
        header = content[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} is not where it should be")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + entry.file_size > len(content):
            raise zipfile.BadZipFile(f"its entry {ascii(name)[:100]} reaches beyond the end")
        # torch.save can be set to leave the checksums out, and torch does not look at them.
        return _Place(start, entry.file_size, entry.CRC if scripted else None)

    def read(name: str, most: int) -> bytes:
        start, size, _ = place(name)
        if size > most:
            raise pickle.UnpicklingError(f"its {name} is larger than the {most / 1e6:.0f} MB that are accepted")
        return content[start : start + size]

    if f"{root}byteorder" in entries and read("byteorder", 9) != sys.byteorder.encode():
        raise pickle.UnpicklingError("it was written on a machine with another order of bytes")
    data = read("data.pkl", _MAX_PICKLE)
    end_of_pickle(data)
    tree = _Unpickler(data, modules=scripted).load()
    numbers = _Numbers(content, lambda key: place(f"data/{key}"))
    return dict(_views(tree)) if scripted else tree, numbers


def _views(tree: Any) -> Iterator[tuple[str, _View]]:
    """The tensors of a tree of modules, named as its state dict names them."""
    seen, left = 0, [("", tree)]
    while left:
        prefix, module = left.pop()
        seen += 1
        # Modules in modules, each twice, are 2 ** n of them; and some hold themselves.
        if seen > _MAX_MODULES or len(prefix) > 10_000:
            raise pickle.UnpicklingError("its modules lie in one another too often")
        if isinstance(module, _Module) and isinstance(module.attributes, dict):
            for name, value in module.attributes.items():
                if isinstance(value, _View):
                    yield f"{prefix}{name}", value
                elif isinstance(value, _Module):
                    left.append((f"{prefix}{name}.", value))


def _read_old(file: BinaryIO) -> tuple[Any, _Numbers]:
    """What torch.save wrote before 1.6: five pickles, then each storage's length and numbers."""
    content = _mapped(file)
    data, at, held = content[:_MAX_PICKLE], 0, []
    widths: dict[str, int] = {}
    for expected in (_MAGIC, _PROTOCOL, None, None, None):
        end = end_of_pickle(data, at)
        unpickler = _Unpickler(data[at:end])
        held.append(unpickler.load())
        widths |= unpickler.widths
        if expected is not None and held[-1] != expected:
            raise pickle.UnpicklingError("it is no file of torch.save")
        at = end
    *_, system, tree, keys = held
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise pickle.UnpicklingError("it was written on a machine with another order of bytes")
    places = {}
    for key in keys:
        (length,) = struct.unpack_from("<q", content, at)
        places[str(key)] = _Place(at + 8, length * widths[str(key)])
        at += 8 + places[str(key)].size
        if length < 0 or at > len(content):
            raise EOFError("it ends before its last number")
    return tree, _Numbers(content, places.__getitem__)


def _stored(path: Path, view: _View, numbers: _Numbers) -> StoredTensor:
    """A tensor that is read from the file's memory. Raises UnpicklingError where it reaches outside its storage."""
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
                        raise zipfile.BadZipFile("its numbers are not those that were written")
            tensor = torch.frombuffer(numbers.content, dtype=view.dtype, count=within, offset=place.start)
            return tensor.as_strided(view.shape, view.stride, start)

    return StoredTensor(view.shape, view.dtype.is_floating_point, read)
