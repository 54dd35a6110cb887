"""Small files that claim or unpack to much, or that take long to read: each function writes one of
many in the place of a file.

They follow from the random numbers alone, as the mutations of fuzz.py do. Zeros are never
compressed as a whole: one compressed mebibyte is repeated, so that writing a bomb of gigabytes
takes as little as its file.
"""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fuzz import hostile, zip_members

_MEBI = 1 << 20
_LARGE = 1_500_000_000
"""Bytes: over the limit on a command's memory, and below those on whole files."""

# ---- zeros ---------------------------------------------------------------------------------------


@cache
def _packed_mebi() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(_MEBI)) + packer.flush(zlib.Z_FULL_FLUSH)  # what follows does not look back


def deflated_zeros(size: int) -> bytes:
    """So many zeros, compressed without a header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return _packed_mebi() * (size // _MEBI) + packer.compress(bytes(size % _MEBI)) + packer.flush()


def zlib_zeros(size: int) -> bytes:
    """The same with zlib's header and its checksum, which is simple for zeros."""
    return b"\x78\x9c" + deflated_zeros(size) + struct.pack(">HH", size % 65521, 1)


@cache
def _crc_of_zeros(size: int) -> int:
    crc = 0
    for _ in range(size // _MEBI):
        crc = zlib.crc32(bytes(_MEBI), crc)
    return zlib.crc32(bytes(size % _MEBI), crc)


# ---- zip -----------------------------------------------------------------------------------------


def write_zip(path: Path, entries: Iterable[tuple[str, int, int, int, bytes]], flags: int = 0) -> None:
    """A zip file of (name, method, checksum, size, packed content), whatever these say."""
    body, directory, count = bytearray(), bytearray(), 0
    for name, method, crc, size, packed in entries:
        raw = name.encode("utf-8", "surrogateescape")
        fields = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 33, crc, len(packed), size, len(raw), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + raw
        body += b"PK\3\4" + fields + raw + packed
        count = min(count + 1, 65535)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\5\6" + end)


def zip_bomb(random: Random, path: Path) -> str:
    """An archive of which one member unpacks to gigabytes, says that it does, or that is there a
    hundred thousand times."""
    members = zip_members(path)
    names = [name for name in members if name.endswith(("data.pkl", "constants.pkl", ".npy", "/version", "byteorder"))]
    target = random.choice([*members, *names, *names])
    kind = random.choice(["unpacks", "unpacks", "continues", "claims", "many", "encrypted", "overlaps"])
    size = random.choice([300_000_000, _LARGE, 4_000_000_000])
    entries = []
    for name, content in members.items():
        entry = (name, 0, zlib.crc32(content), len(content), content)
        if name == target and kind == "unpacks":
            entry = (name, 8, _crc_of_zeros(size), size, deflated_zeros(size))
        elif name == target and kind == "continues":
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(size)
            entry = (name, 8, 0, min(size + len(content), 2**32 - 1), packed)
        elif name == target and kind == "claims":
            entry = (
                name,
                random.choice([0, 8]),
                0,
                random.choice([0, len(content) - 1, 2**32 - 2, 2**32 - 1]),
                content,
            )
        entries.append(entry)
    if kind == "many":
        entries += [(f"{target}{number}", 0, 0, 0, b"") for number in range(100_000)]
    elif kind == "overlaps":
        entries *= 1000
    write_zip(path, entries, flags=kind == "encrypted")
    return f"zip bomb: {target} {kind} ({size:,})"


# ---- pickles -------------------------------------------------------------------------------------


def _plain(value: Any) -> bytes:
    """The instructions that leave `value` on the stack. They use the memo's first entries."""
    return pickle.dumps(value, 2)[2:-1]


def _laughs(levels: int, kind: bytes) -> bytes:
    """A container of two of a container of two ..., all of them the same: a few bytes that are
    2**levels values."""
    code = b"]r\xe8\3\0\0" + b"0"
    for level in range(1000, 1000 + levels):
        inner = b"j" + struct.pack("<I", level)
        code += b"(" + inner + inner + kind + b"r" + struct.pack("<I", level + 1) + b"0"
    return code + b"j" + struct.pack("<I", 1000 + levels)


def _pickled(random: Random) -> tuple[str, bytes]:
    """Instructions that leave one value on the stack, which takes long or much to make or to
    use."""
    many, deep = random.choice([300_000, 6_000_000, 25_000_000]), random.choice([900, 10_000, 1_000_000])
    place = random.choice([2**24, 2**28, 2**31 - 1, 2**32 - 1])
    tuples = _laughs(random.choice([20, 40, 200]), b"t")
    small = {
        "lists": b"]",
        "dicts": b"}",
        "sets": b"\x8f",
        "tuples": b"N\x85",
        "frozensets": b"(\x91",
        "texts": b"U\2ab",
        "numbers": b"M\xff\xff",
        "fractions": b"G" + bytes(8),
        "memoised": b"N\x94",
        "lists of lists": b"(]]l",
    }
    name = random.choice(list(small))
    choices = {
        f"{many} {name}": b"(" + small[name] * (many // len(small[name])) + b"l",
        f"{many} {name} in a tuple": b"(" + small[name] * (many // len(small[name])) + b"t",
        f"memo {place}": b"Nr" + struct.pack("<I", place),
        f"memo {place} in words": b"Np" + str(place * random.choice([1, 2**40])).encode() + b"\n",
        f"memo entries, {many}": b"N" + b"\x94" * many,
        f"{deep} lists deep": b"]" * deep + b"a" * (deep - 1),
        f"{deep} tuples deep": b")" + b"\x85" * deep,
        f"{deep} dicts deep": b"}" + (b"U\1a" + b"}") * deep + b"s" * deep,
        "a doubled list": _laughs(random.choice([20, 40, 200]), b"l"),
        "a doubled tuple": tuples,
        "a doubled tuple as a key": b"}" + tuples + b"Ns",
        "a doubled tuple in a set": b"\x8f(" + tuples + b"\x90",
        "a list in itself": b"]r\xe8\3\0\0j\xe8\3\0\0a",
        "a dict in itself": b"}r\xe8\3\0\0U\x09sentencesj\xe8\3\0\0s",
        "a long text": b"\x8d" + struct.pack("<Q", random.choice([2**31, 2**40, 2**62])) + b"text",
        "long bytes": b"\x8e" + struct.pack("<Q", random.choice([2**31, 2**40, 2**62])) + b"text",
        "a long frame": b"\x95" + struct.pack("<Q", random.choice([2**31, 2**62])) + b"N",
        "long numbers": b"(" + (b"L" + b"9" * 4200 + b"L\n") * 1000 + b"l",
        "a longer number": b"I" + b"9" * 1_000_000 + b"\n",
        "large numbers": b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 20_000 + b"l",
    }
    what = random.choice(list(choices))
    return what, choices[what]


def refs_bomb(random: Random, path: Path) -> str:
    """Plain pickles of references with such a value in place of the list, behind it, or in a
    field."""
    what, code = _pickled(random)
    references = pickle.loads(path.read_bytes())
    where = random.choice(["list", "entry", "field"])
    if where == "entry":
        code = _plain(references) + code + b"a"
    elif where == "field":
        key = random.choice(list(references[0]))
        code = _plain(references[1:]) + _plain(references[0]) + _plain(key) + code + b"sa"
    path.write_bytes(b"\x80\4" + code + b".")
    return f"{what} as {where}"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tensor(random: Random) -> bytes:
    """A tensor of which the file has less, or elsewhere, or of another kind."""
    numbers = (0, 1, 4, 2**31, 2**40, 2**62, -1)
    sizes = ((2**31, 2**31), (2**40,), (0, 2**62), (4,) * 40, (), (-1,), (2, 2))
    strides = ((0, 0), (0,), (1, 1), (2**62,), (-1,), (0,) * 40)
    kind = random.choice(["FloatStorage", "ByteStorage", "ComplexDoubleStorage", "UntypedStorage", "float32"])
    storage = b"(" + _plain("storage") + _global("torch", kind) + _plain(random.choice(["0", "1", "../0"]))
    storage += _plain(random.choice(["cpu", "cuda:0", "meta"])) + _plain(random.choice(numbers)) + b"tQ"
    view = b"".join(map(_plain, (random.choice(numbers), random.choice(sizes), random.choice(strides))))
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + view + b"\x89" + _ORDERED + b"tR"


_ORDERED = _global("collections", "OrderedDict") + b")R"


def _weights(random: Random) -> tuple[str, bytes]:
    """The same of what weights files may hold besides."""
    call = random.choice(
        [("builtins", "bytearray"), ("__builtin__", "bytearray"), ("torch", "Size"), ("builtins", "set")]
    )
    amount = random.choice([10**9, 2**33, 10**11, 10**30])
    wrapper, deep = random.choice(["model", "state_dict", "module", "ema"]), random.choice([3, 900, 5_000])
    name = wrapper.encode()
    key = b"U" + bytes([len(name)]) + name
    choices = {
        f"{call[1]}({amount})": _global(*call) + _plain((amount,)) + b"R",
        "a strange tensor": _tensor(random),
        f"{deep} times {wrapper}": b"}" + (key + b"}") * deep + b"s" * deep,
        f"{wrapper} in itself": b"}r\xe8\3\0\0" + key + b"j\xe8\3\0\0s",
        "a strange storage": _plain(hostile(random)) + b"Q",
        "a strange parameter": _global("torch._utils", "_rebuild_parameter")
        + _plain((hostile(random), True, {}))
        + b"R",
        "a sparse tensor": _global("torch._utils", "_rebuild_sparse_tensor") + _plain((hostile(random), (1,))) + b"R",
        "an empty tensor": _global("torch._utils", "_rebuild_meta_tensor_no_storage")
        + _plain((1, (2**40,), (1,), False))
        + b"R",
        "code to run": _global("os", "system") + _plain(("touch HACKED",)) + b"R",
    }
    what = random.choice([*choices, "plain"])
    return _pickled(random) if what == "plain" else (what, choices[what])


def torch_bomb(random: Random, path: Path) -> str:
    """A file of torch.save, of either kind, with such a value in place of its dictionary or beside
    its tensors."""
    what, code = _weights(random)
    name = random.choice(["a", "model", "state_dict", "pos_embed"])
    beside = random.random() < 0.6
    if not zipfile.is_zipfile(path):  # a number, a version, facts about the machine, and then the content
        stream = io.BytesIO(path.read_bytes())
        for _ in range(3):
            pickle.load(stream)
        start, rest = stream.tell(), stream.getvalue()
        content = _until_stop(rest[start:])
        tail = rest[start + len(content) :]
        new = content[:-1] + _plain(name) + code + b"s." if beside else b"\x80\2" + code + b"."
        path.write_bytes(rest[:start] + new + tail)
    else:
        members = zip_members(path)
        pickled = next(name for name in members if name.endswith("data.pkl"))
        members[pickled] = members[pickled][:-1] + _plain(name) + code + b"s." if beside else b"\x80\2" + code + b"."
        write_zip(path, ((each, 0, zlib.crc32(data), len(data), data) for each, data in members.items()))
    return f"{what}{' beside weights' if beside else ''}"


def _until_stop(data: bytes) -> bytes:
    import pickletools

    last = 0
    for _, _, at in pickletools.genops(data):
        last = at or 0
    return data[: last + 1]


def torchscript_bomb(random: Random, path: Path) -> str:
    """An archive of TorchScript whose tree of modules has such an attribute, or is one."""
    what, code = _weights(random)
    members = zip_members(path)
    module = _global("__torch__", "M") + b")\x81"
    tree = {
        "an attribute": module + b"}" + _plain("a") + code + b"sb",
        "the tree": code,
        "the state": module + code + b"b",
        "a module in itself": module + b"r\xe8\3\0\0}" + _plain("a") + b"j\xe8\3\0\0sb",
        "many modules": _global("__torch__", "M") + b"r\xe8\3\0\0(" + b"j\xe8\3\0\0)\x81" * 1_500_000 + b"l",
        "modules deep": (module + b"}U\1a") * 50_000 + b"N" + b"sb" * 50_000,
    }
    where = random.choice([*tree, "an attribute", "an attribute"])
    for name in members:
        if name.endswith("data.pkl"):
            members[name] = b"\x80\2" + tree[where] + b"."
    write_zip(path, ((each, 0, zlib.crc32(data), len(data), data) for each, data in members.items()))
    return f"{what} in {where}"


# ---- tensors and tables --------------------------------------------------------------------------


def safetensors_bomb(random: Random, path: Path) -> str:
    """A header that is long, or that says of a small file what is true of a large one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, numbers = data[8 : 8 + length], data[8 + length :]
    header = json.loads(text)
    first = next(name for name in header if name != "__metadata__")
    kind = random.choice(["blanks", "many", "shape", "kind", "claim", "hole", "metadata", "twice", "overlap"])
    if kind == "blanks":
        text += b" " * random.choice([10_000_000, 99_000_000])
    elif kind == "many":
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(numbers), len(numbers)]}
        text = json.dumps({**header, **{f"a{number}": empty for number in range(400_000)}}).encode()
    elif kind == "shape":
        header[first]["shape"] = random.choice([[0, 2**63], [2**32, 2**32], [2**64], [1] * 5000, [-1], [1.5], []])
    elif kind == "kind":
        header[first]["dtype"] = random.choice(["F8_E4M3", "F4", "C64", "BOOL", "U64", "F999", "", None])
    elif kind == "claim":
        header[first]["data_offsets"] = random.choice([[0, 2**63], [2**40, 2**41], [-1, 4], [8, 0], [0], []])
    elif kind == "metadata":
        header.setdefault("__metadata__", {})["config"] = "[" * random.choice([1000, 20_000_000])
    elif kind == "overlap":
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = header[first]["data_offsets"]
    if kind in ("shape", "kind", "claim", "metadata", "overlap"):
        text = json.dumps(header).encode()
    elif kind == "twice":
        text = text[:-1] + b"," + text[1:]
    claimed = random.choice([2**31, 2**40, 2**63 - 1]) if kind == "hole" else len(text)
    path.write_bytes(struct.pack("<Q", claimed) + text + numbers)
    if kind == "hole":
        with path.open("rb+") as file:
            file.truncate(20_000_000_000)
    return f"header: {kind}"


def npz_bomb(random: Random, path: Path) -> str:
    """Arrays that are longer than their shape says, or shorter, with headers of megabytes."""
    members = zip_members(path)
    target = random.choice(list(members))
    kind = random.choice(["tail", "header", "shape", "kind"])
    entries = []
    for name, content in members.items():
        size, packed, crc = len(content), zlib.compress(content, 1, wbits=-15), zlib.crc32(content)
        if name == target and kind == "tail":
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + deflated_zeros(_LARGE)
            size, crc = len(content) + _LARGE, 0
        elif name == target:
            shapes = ["(100000, 100000)", "(2**40,)", "(1,) * 10**9", "(30, 40" + ", 1" * 60 + ")", "9" * 5000]
            kinds = ["'<U1000000000'", "'|V2147483647'", "[('a', '|b1')] * 99", "'|O'"]
            described = random.choice(kinds) if kind == "kind" else "'|b1'"
            shape = random.choice(shapes) if kind == "shape" else "(30, 40)"
            text = f"{{'descr': {described}, 'fortran_order': False, 'shape': {shape}, }}"
            if kind == "header":
                text = random.choice([" " * 60_000_000, "(" * 5000, "[" * 200_000, "-" * 100_000]) + text
            new = b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text.encode() + bytes(1200)
            size, packed, crc = len(new), zlib.compress(new, 1, wbits=-15), zlib.crc32(new)
        entries.append((name, 8, crc, size, packed))
    write_zip(path, entries)
    return f"{kind} of {target}"


def parquet_bomb(random: Random, path: Path) -> str:
    """Columns that are a few bytes in the file and gigabytes outside: repeated, compressed, or
    without end."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    column = random.choice(table.column_names)
    kind = random.choice(["repeated", "lists", "long", "nulls", "columns", "groups", "deep", "rows"])
    count = len(table)
    if kind == "repeated":  # one text, and so many rows that refer to it
        rows, text = random.choice([(20_000, "x" * 1_000_000), (1000, "[" * 5_000_000), (3_000_000, "x" * 500)])
        value = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), [text])
        taken = table.take(pyarrow.array(np.zeros(rows, np.int32)))
        table = taken.set_column(taken.column_names.index(column), column, value)
    elif kind == "lists":
        inner = pyarrow.array(np.zeros(60_000_000 * count, np.float32))
        value = pyarrow.ListArray.from_arrays(pyarrow.array([60_000_000 * each for each in range(count + 1)]), inner)
        table = table.set_column(table.column_names.index(column), column, value)
    elif kind == "long":
        value = pyarrow.array([bytes(600_000_000)] * count, pyarrow.large_binary())
        table = table.set_column(table.column_names.index(column), column, value)
    elif kind == "nulls":
        table = pyarrow.table({name: pyarrow.nulls(50_000_000, pyarrow.int8()) for name in table.column_names})
    elif kind == "columns":
        for number in range(3000):
            table = table.append_column(f"more {number}", pyarrow.nulls(count, pyarrow.int8()))
    elif kind == "deep":
        value = pyarrow.nulls(count, pyarrow.int8())
        for _ in range(random.choice([50, 300])):
            value = pyarrow.StructArray.from_arrays([value], ["a"])
        table = table.set_column(table.column_names.index(column), column, value)
    elif kind == "rows":
        table = table.take(pyarrow.array(np.zeros(random.choice([100_000, 1_000_000]), np.int32)))
    compression = random.choice(["zstd", "gzip", "snappy", "brotli"]) if kind != "long" else "zstd"
    size = 1 if kind == "groups" else None
    pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=size, store_schema=kind == "deep")
    return f"{kind} in {column}"


# ---- pictures ------------------------------------------------------------------------------------

_SIDES = (
    (17_300, 17_300),
    (13_300, 13_300),
    (9_400, 9_400),
    (65_535, 65_535),
    (65_535, 4_000),
    (1, 65_535),
    (65_535, 1),
)
_SIDES += ((2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5), (20_000, 3_000), (16_383, 16_383), (40_000, 40_000))


def _png(random: Random, width: int, height: int) -> bytes:
    depth, colour, channels = random.choice(
        [(1, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3), (8, 3, 1), (8, 6, 4), (16, 6, 4)]
    )
    size = min((1 + (width * depth * channels + 7) // 8) * height, 3_000_000_000)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, random.choice([0, 0, 0, 1]))
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib_zeros(size)) + chunk(b"IEND", b"")
    )


def _jpeg(random: Random, data: bytes, width: int, height: int) -> bytes:
    if random.random() < 0.4:  # a picture of more scans or segments than anybody writes
        stream = io.BytesIO()
        side = random.choice([64, 1000, 3000])
        Image.new("RGB", (side, side), "grey").save(stream, "JPEG", progressive=True)
        data = stream.getvalue()
        kind = random.choice(["scans", "scans", "comments", "tables"])
        if kind == "scans":
            at = data.rindex(b"\xff\xda")
            return data[:at] + data[at:-2] * random.choice([100, 2000, 30_000]) + b"\xff\xd9"
        if kind == "comments":
            return data[:2] + b"\xff\xfe\0\2" * random.choice([1000, 3_000_000]) + data[2:]
        at = data.index(b"\xff\xdb")
        table = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        return data[:at] + table * 200_000 + data[at:]
    places = [at for at in range(len(data) - 8) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC1, 0xC2)]
    changed = bytearray(data)
    for at in places[-1:]:
        changed[at + 5 : at + 9] = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
    return bytes(changed)


def _tiff(random: Random, width: int, height: int) -> bytes:
    compression, bits, samples = (
        random.choice([1, 5, 7, 8, 32773, 50000]),
        random.choice([1, 8, 16, 32]),
        random.choice([1, 3, 4]),
    )
    size = min(width * height * bits * samples // 8, 2_000_000_000)
    content = zlib_zeros(size) if compression == 8 else bytes(1000)
    tags = {
        256: width,
        257: height,
        258: bits,
        259: compression,
        262: 1 if samples == 1 else 2,
        277: samples,
        278: height,
    }
    tags |= {273: 8, 279: len(content), 339: random.choice([1, 2, 3])}
    kind = random.choice(["plain", "plain", "loop", "tiles", "counts", "samples"])
    if kind == "tiles":
        tags |= {
            322: random.choice([16, 2**16, 2**31 - 16]),
            323: random.choice([16, 2**16, 2**31 - 16]),
            324: 8,
            325: len(content),
        }
        del tags[273], tags[278], tags[279]
    elif kind == "samples":
        tags[277] = 65_535
    place = 8 + len(content)
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        count = random.choice([1, 2**28, 2**32 - 1]) if kind == "counts" and tag in (258, 273, 279) else 1
        directory += struct.pack("<HHII", tag, 4, count, value % 2**32)
    return b"II*\0" + struct.pack("<I", place) + content + directory + struct.pack("<I", place if kind == "loop" else 0)


def _gif(random: Random, width: int, height: int) -> bytes:
    width, height = min(width, 65_535), min(height, 65_535)
    frame = (
        b"\x2c"
        + struct.pack("<HHHHB", 0, 0, random.choice([1, width]), random.choice([1, height]), 0)
        + b"\2\2\x44\1\0"
    )
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + bytes(6)
        + frame * random.choice([1, 1, 50_000])
        + b";"
    )


def _webp(random: Random, width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), "green").save(stream, "WEBP", lossless=True)
    body = bytearray(stream.getvalue()[12:])
    if random.random() < 0.7:  # of the pixels, not of the canvas alone
        side = (min(width, 16_384) - 1) % 2**14 | ((min(height, 16_384) - 1) % 2**14) << 14
        body[9:13] = struct.pack("<I", side | int.from_bytes(body[9:13], "little") & 0xF0000000)
    canvas = (
        b"VP8X"
        + struct.pack("<II", 10, 0)
        + ((width - 1) % 2**24).to_bytes(3, "little")
        + ((height - 1) % 2**24).to_bytes(3, "little")
    )
    body = bytearray(canvas) + body
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + bytes(body)


def _bmp(random: Random, width: int, height: int) -> bytes:
    bits, compression = random.choice([(8, 1), (4, 2), (8, 0), (24, 0), (32, 3)])
    colours = random.choice([0, 2, 256, 2**31 - 1])
    pixels = random.choice([b"\0\1", b"\xff\0" * 500_000 + b"\0\1", b"\0\2\xff\xff" * 500_000, bytes(1000)])
    header = struct.pack(
        "<IiiHHIIiiII",
        40,
        min(width, 2**31 - 1),
        random.choice([1, -1]) * min(height, 2**31 - 1),
        1,
        bits,
        compression,
        0,
        1,
        1,
        colours,
        0,
    )
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(pixels), 0, 0, 54 + 1024) + header + bytes(1024) + pixels


def _patched(data: bytes, marker: bytes, skip: int, content: bytes) -> bytes:
    at = data.find(marker)
    return data if at < 0 else data[: at + skip] + content + data[at + skip + len(content) :]


def _jp2(random: Random, data: bytes, width: int, height: int) -> bytes:
    sides = struct.pack(">II", width % 2**32, height % 2**32)
    tiles = random.choice([sides, struct.pack(">II", 1, 1), struct.pack(">II", 2**31, 2**31)])
    data = _patched(data, b"\xff\x51", 6, sides + bytes(8) + tiles)
    return _patched(data, b"ihdr", 4, struct.pack(">II", height % 2**32, width % 2**32))


def picture_bomb(random: Random, path: Path) -> str:
    """A picture of the path's format that has, or claims, more pixels, scans or parts than a
    photograph."""
    width, height = random.choice(_SIDES)
    data = path.read_bytes()
    match path.suffix:
        case ".png":
            data = _png(random, width, height)
        case ".jpg" | ".jfif" | ".mpo":
            data = _jpeg(random, data, width, height)
        case ".tiff":
            data = _tiff(random, width, height)
        case ".gif":
            data = _gif(random, width, height)
        case ".webp":
            data = _webp(random, width, height)
        case ".bmp":
            data = _bmp(random, width, height)
        case ".jp2":
            data = _jp2(random, data, width, height)
        case ".avif":
            data = _patched(data, b"ispe", 8, struct.pack(">II", width % 2**32, height % 2**32))
    path.write_bytes(data)
    return f"{width} x {height} pixels, {len(data):,} bytes"


# ---- videos --------------------------------------------------------------------------------------

ADDRESS = ("127.0.0.1", 47_811)
"""What a playlist asks for; a test that listens there sees whether it was."""


def playlist(random: Random, path: Path) -> str:
    """A list of other files, or of addresses, under a video's name: FFmpeg would open them."""
    url = random.choice(
        ["http://{}:{}/a.ts", "tcp://{}:{}", "https://{}:{}/a.mp4", "udp://{}:{}", "rtmp://{}:{}/a"]
    ).format(*ADDRESS)
    other = random.choice([url, "other.mp4", "file:other.mp4", "/dev/zero", "/etc/passwd", "concat:a|b"])
    composition = "http://www.smpte-ra.org/schemas/2067-3/2016"
    host, port = ADDRESS
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{other}\n#EXT-X-ENDLIST\n",
        "hls master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{other}\n",
        "hls key": f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{other}"\n#EXTINF:9.0,\na.ts\n',
        "concat": f"ffconcat version 1.0\nfile '{other}'\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        f'<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{other}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>",
        "sdp": f"v=0\no=- 0 0 IN IP4 {host}\ns=a\nc=IN IP4 {host}\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "quicktime": f'<?xml version="1.0"?><?quicktime type="application/x-quicktime-media-link"?><embed src="{other}" />',
        "imf": f'<?xml version="1.0"?><CompositionPlaylist xmlns="{composition}"><Id>{other}</Id></CompositionPlaylist>',
        "asx": f'<asx version="3.0"><entry><ref href="{other}"/></entry></asx>',
        "pls": f"[playlist]\nFile1={other}\nNumberOfEntries=1\n",
        "subtitles": f"# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n{other}\n",
        "metadata": f";FFMETADATA1\ntitle={other}\n",
        "redirect": f"[Reference]\nRef1={other}\n",
    }
    kind = random.choice(list(lists))
    path.write_text(lists[kind])
    return f"{kind} of {other}"


def video_bomb(random: Random, path: Path) -> str:
    """A video of PNG pictures that are larger than any film."""
    import av

    width, height = random.choice(_SIDES)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "rgb24"
        for number in range(random.choice([1, 3])):
            packet = av.Packet(_png(random, width, height))
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.is_keyframe = True
            container.mux(packet)
    return f"{width} x {height} pixels"
