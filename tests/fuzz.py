"""Spoiling files of every format, and running the command that reads them.

A `Spoil` damages one file, as a bad download, a careless script or a stranger would; everything it
does follows from the random numbers it is given. Those that know a format take its content apart,
put something hostile at one place, and write it again, so that they get past the outermost check.
`survives` runs one command on a spoilt file and says what was not as it has to be.
"""

import contextlib
import copy
import faulthandler
import gc
import io
import json
import os
import pickle
import re
import resource
import select
import shutil
import signal
import socket
import struct
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import numpy as np
import torch

from dcris.cli import main

Spoil = Callable[[Random, Path], str]
"""Damages the file at the path and says how."""


class Hostile:
    """Pickled, it asks whoever opens it to run a command, which leaves a file in the working
    directory."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch HACKED",)

    def __deepcopy__(self, memo: object) -> "Hostile":
        return self  # or copying would do it already


# ---- any file ------------------------------------------------------------------------------------


def cut(random: Random, path: Path) -> str:
    data = path.read_bytes()
    kept = random.choice([0, 1, len(data) - 1, random.randrange(len(data)), random.randrange(len(data))])
    path.write_bytes(data[:kept])
    return f"cut to {kept} bytes"


def flip(random: Random, path: Path) -> str:
    """A few bytes become others, often near the start or the end, where headers and tables of
    contents are."""
    data = bytearray(path.read_bytes())
    first, last = random.choice([(0, len(data)), (0, min(64, len(data))), (max(0, len(data) - 200), len(data))])
    places = [random.randrange(first, last) for _ in range(random.choice([1, 1, 3, 20]))]
    for place in places:
        data[place] = random.choice([0, 0xFF, data[place] ^ 1 << random.randrange(8), random.randrange(256)])
    path.write_bytes(bytes(data))
    return f"other bytes at {places}"


def shift(random: Random, path: Path) -> str:
    """Bytes are left out, put in or repeated, so that everything behind them is in another
    place."""
    data = path.read_bytes()
    place, length = random.randrange(len(data)), random.choice([1, 2, 7, 300])
    put = random.choice([b"", random.randbytes(length), data[place : place + length] * 2, b"\0" * length])
    path.write_bytes(data[:place] + put + data[place + length * random.randrange(2) :])
    return f"{len(put)} bytes put in at {place}"


_OTHERS = (
    *(
        b"",
        b"\0",
        b"\n",
        b"5",
        b'"text"',
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"PK\3\4",
        b"\x80\x04.",
        b"\x89PNG\r\n\x1a\n",
    ),
    *(
        b"<html>404 Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"II*\0\x08\0\0\0",
        b"GIF89a\xff\xff\xff\xff",
    ),
)


_DEVICES = ("/dev/zero", "/dev/full", "/dev/random", "/dev/null", "/proc/self/mem")
_INSTEAD = ("nothing", "folder", "full folder", "link to nothing", "link to itself", "link to folder", "loop", "pipe")
_INSTEAD += ("link to pipe", "socket", "hole", "other", *_DEVICES)


def replace(random: Random, path: Path) -> str:
    """Put something else altogether in the place of a file or folder: another kind of file, or a
    stranger's content."""
    kind = random.choice(_INSTEAD)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    aside = path.with_name("aside")
    if aside.is_dir():  # of another case
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "full folder":
            (path / path.name).mkdir(parents=True)
        case "link to nothing":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case "link to folder":
            aside.mkdir()
            path.symlink_to("aside")
        case "loop":  # a folder that contains itself by a link
            path.mkdir()
            (path / path.name).symlink_to(path, target_is_directory=True)
        case "pipe":
            os.mkfifo(path)
        case "link to pipe":
            os.mkfifo(aside)
            path.symlink_to("aside")
        case "socket":
            with (
                socket.socket(socket.AF_UNIX) as end,
                contextlib.chdir(path.parent),
            ):  # its whole path would be too long
                end.bind("aside")
            aside.rename(path)
        case "hole":  # 20 GB that take no room on the disk
            path.touch()
            os.truncate(path, 20_000_000_000)
        case "other":
            path.write_bytes(random.choice([*_OTHERS, random.randbytes(999)]))
        case _ if kind in _DEVICES:
            path.symlink_to(kind)
    return kind


ANY: tuple[Spoil, ...] = (cut, flip, shift, replace)

# ---- trees of plain data -------------------------------------------------------------------------

_DEEP = "@deep@"
"""Stands for something nested deeper than any writer could write it."""

WORDS = (
    *(
        "",
        " ",
        "\0",
        "a\nb",
        "\r",
        "\t",
        "\x1b[31m",
        "\u2028",
        "\u202e",
        "\ud800",
        "\udcff",
        "NaN",
        "é",
        "猫" * 9,
        "x" * 5000,
        "9" * 5000,
    ),
    *(
        "..",
        ".",
        "/",
        "../../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "a\\b",
        "a/../b",
        "%s%n{}",
        "a" * 255 + ".png",
        "-1",
        _DEEP,
    ),
)
_NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        255,
        2**16,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        2**80,
        -(2**31),
        -(2**80),
        10**400,
    ),
    *(0.0, -0.0, 0.5, 1e-320, 1e30, -1e30, 1.8e308, float("nan"), float("inf"), -float("inf")),
)


def hostile(random: Random) -> Any:
    """A value that hardly any field expects."""
    nan = float("nan")
    others = (
        None,
        True,
        False,
        [],
        {},
        [[]],
        [{}],
        [None],
        {"": None},
        [nan] * 6,
        [[nan] * 8],
        [1, 2, 3],
        [[0] * 6],
        "text",
    )
    kind = random.choice([WORDS, _NUMBERS, others])
    return copy.deepcopy(random.choice(kind))


def _places(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree)))


def _descend(random: Random, tree: Any) -> tuple[Any, Any] | None:
    """A container and a place in it: at each level as likely here as deeper, so that long lists do
    not get all of it."""
    while isinstance(tree, dict | list) and tree:
        place = random.choice(_places(tree))
        if not isinstance(tree[place], dict | list) or not tree[place] or random.random() < 0.3:
            return tree, place
        tree = tree[place]
    return None


def _short(value: Any, length: int = 60) -> str:
    try:
        return repr(value)[:length]
    except (ValueError, RecursionError):  # a number of thousands of digits; something that is too deep
        return type(value).__name__


def spoil_tree(random: Random, tree: Any, strange: Callable[[Random], Any] = hostile) -> tuple[Any, str]:
    """The tree with one thing changed, and in words what."""
    found = _descend(random, tree)
    if found is None or random.random() < 0.02:
        return strange(random), "all of it replaced"
    owner, place = found
    old, where = owner[place], _short(place)
    match random.choice(
        ["set", "set", "set", "set", "drop", "copy", "wrap", "number", "swap", "more", "rename", "kind"]
    ):
        case "drop":
            del owner[place]
            return tree, f"without {where}"
        case "copy" if isinstance(owner, list):
            owner.insert(place, copy.deepcopy(old))
            return tree, f"{where} twice"
        case "wrap":
            owner[place] = random.choice([[old], {"value": old}, [old] * 3])
            return tree, f"{where} in a container"
        case "number" if isinstance(old, int | float):
            owner[place] = random.choice([-old, old + 1, old - 1, old * 10**6, old + 0.5 if abs(old) < 1e300 else 0])
            return tree, f"{where} is {_short(owner[place])}"
        case "swap":
            other, there = _descend(random, tree) or found
            owner[place] = copy.deepcopy(other[there])
            return tree, f"{where} is what is at {_short(there)}"
        case "more" if isinstance(owner, dict):
            owner[random.choice(WORDS)] = strange(random)
            return tree, f"something more beside {where}"
        case "rename" if isinstance(owner, dict):
            owner[random.choice([str(place).upper(), f"{place} ", random.choice(WORDS)])] = owner.pop(place)
            return tree, f"{where} has another name"
        case "kind":
            owner[place] = _short(old, 1000)
            return tree, f"{where} as text"
    owner[place] = strange(random)
    return tree, f"{where} is {_short(owner[place])}"


def _several(random: Random, tree: Any, strange: Callable[[Random], Any] = hostile) -> tuple[Any, str]:
    words = []
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        tree, what = spoil_tree(random, tree, strange)
        words.append(what)
    return tree, "; ".join(words)


def _json(random: Random, tree: Any) -> bytes:
    """JSON, and what passes for it."""
    text = json.dumps(tree, ensure_ascii=random.random() < 0.8)
    depth = random.choice([300, 900, 980, 100_000])
    text = text.replace(f'"{_DEEP}"', "[" * depth + "]" * depth)
    if random.random() < 0.05:
        return text.encode(random.choice(["utf-16", "utf-8-sig", "utf-32"]), "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def json_tree(random: Random, path: Path) -> str:
    """A JSON file that says something else in one place."""
    tree, what = _several(random, json.loads(path.read_bytes()))
    path.write_bytes(_json(random, tree))
    return what


def json_lines(random: Random, path: Path) -> str:
    """The same of a file with JSON on each line."""
    tree, what = _several(random, [json.loads(line) for line in path.read_bytes().splitlines()])
    path.write_bytes(b"\n".join(_json(random, line) for line in (tree if isinstance(tree, list) else [tree])) + b"\n")
    return what


def csv_cells(random: Random, path: Path) -> str:
    """A table with other cells, or more or fewer of them in a row."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    tree, what = _several(random, rows)
    lines = [row if isinstance(row, list) else [row] for row in (tree if isinstance(tree, list) else [tree])]
    text = "\n".join(",".join(map(str, row)) for row in lines)
    path.write_bytes(text.encode(random.choice(["utf-8", "utf-8", "utf-8", "utf-16"]), "surrogatepass"))
    return what


def pickle_tree(random: Random, path: Path) -> str:
    """A pickle of other data, of data that contains itself, or of more than data."""

    def strange(random: Random) -> Any:
        if random.random() < 0.8:
            return hostile(random)
        endless: list[Any] = []
        endless.append(endless)
        rest = (
            endless,
            {"sentences": endless},
            (),
            (1, "a"),
            {1, 2},
            b"bytes",
            2j,
            Hostile(),
            Path("x"),
            bytearray(b"x"),
            len,
            10**5000,
        )
        return random.choice(rest)

    tree, what = _several(random, pickle.loads(path.read_bytes()), strange)
    if isinstance(tree, list) and random.random() < 0.05:
        tree.append(tree)
        what += "; contains itself"
    protocol = random.randrange(6)
    try:
        data = pickle.dumps(tree, protocol)
    except ValueError:  # protocol 0 knows neither lone surrogates nor numbers of thousands of digits
        data = pickle.dumps(tree, 2)
    marker, depth = b"X\6\0\0\0" + _DEEP.encode(), random.choice([300, 100_000])
    path.write_bytes(data.replace(marker, b"]" * depth + b"a" * (depth - 1)))
    return f"{what} (protocol {protocol})"


# ---- tensors -------------------------------------------------------------------------------------


def safetensors_tree(random: Random, path: Path) -> str:
    """Another header before the same numbers. Metadata that is itself JSON is changed inside."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.setdefault("__metadata__", {})
    inside = random.choice([key for key in ("towers", "config", "origin") if key in metadata] or [None])
    if inside is not None and random.random() < 0.6:
        tree, what = _several(random, json.loads(metadata[inside]))
        metadata[inside] = _json(random, tree).decode("utf-8", "replace")
        what = f"{inside}: {what}"
    else:
        header, what = _several(random, header)
    text = _json(random, header)
    size = random.choice([len(text)] * 9 + [2**63, len(text) + 1, 0])
    path.write_bytes(struct.pack("<Q", size) + text + numbers)
    return what


def torch_tree(random: Random, path: Path) -> str:
    """A file of torch.save with other things in its dictionary."""

    def strange(random: Random) -> Any:
        tensors = (
            torch.zeros(0),
            torch.zeros(()),
            torch.zeros(3, 4, 5),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(2, 2).to_sparse(),
            torch.zeros(3, device="meta"),
            torch.full((4,), float("nan")),
            torch.zeros(1).expand(1000, 1000),
            torch.nn.Parameter(torch.zeros(2)),
        )
        return random.choice(
            [hostile(random), random.choice(tensors), random.choice([Hostile(), len, {"a": torch.zeros(1)}, 2j])]
        )

    content = torch.load(path, weights_only=False)
    tree, what = _several(random, dict(content), strange)
    with warnings.catch_warnings(action="ignore"):
        (torch.save if random.random() < 0.7 else save_old)(tree, path)
    return what


def save_old(content: Any, path: Path) -> None:
    """Write a file in the format of torch.save before version 1.6.

    Storages are named in their order and not by their addresses, so that the same content gives the
    same file."""
    names: dict[str, str] = {}

    class Pickler(pickle._Pickler):
        def save_pers(self, pid: Any) -> None:
            if pid[0] == "storage":
                pid = (*pid[:2], names.setdefault(pid[2], f"{len(names):015}"), *pid[3:])
            super().save_pers(pid)

    def dump(value: Any, file: Any, protocol: int) -> None:
        if type(value) is list:  # the addresses, in whose order torch then writes the storages
            value.sort(key=[*names].index)
            value = [names[address] for address in value]
        pickle.dump(value, file, protocol)

    module = SimpleNamespace(__name__="pickle", Pickler=Pickler, dump=dump)
    torch.save(content, path, pickle_module=module, _use_new_zipfile_serialization=False)


def zip_members(path: Path) -> dict[str, bytes]:
    """What a zip file holds, by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_tree(random: Random, path: Path) -> str:
    """A zip file without a member, with others, or with another content, name or compression of
    one."""
    files = zip_members(path)
    # Published models have thousands of members; what decides how a file is read are a few of them.
    few = [name for name in files if not re.search(r"/data/\d+$|/code/", name)]
    name = random.choice([*files, *few, *few])
    kind = random.choice(["drop", "name", "twice", "bytes", "bytes", "cut", "more", "empty", "exchange"])
    data = bytearray(files[name])
    if kind == "drop":
        del files[name]
    elif kind == "name":
        files[random.choice([f"../{name}", f"/{name}", name.upper(), f"x/{name}", "\u202e"])] = files.pop(name)
    elif kind == "bytes" and data:
        for _ in range(random.choice([1, 3, 20])):
            data[random.randrange(len(data))] = random.randrange(256)
    elif kind == "cut":
        data = data[: random.randrange(len(data) + 1)]
    elif kind == "empty":
        data = bytearray()
    elif kind == "exchange":
        data = bytearray(files[random.choice(list(files))])
    elif kind == "more":
        files[random.choice(["data.pkl", "x/data.pkl", "constants.pkl", "version", "code/", name + "/"])] = bytes(data)
    if name in files:
        files[name] = bytes(data)
    compression = random.choice(
        [zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings(action="ignore"):
        for each, content in [*files.items(), *([(name, b"")] if kind == "twice" else [])]:
            archive.writestr(zipfile.ZipInfo(each), content, compression)  # the current time would be in it otherwise
    return f"{kind} of {name}, compression {compression}"


def npz_arrays(random: Random, path: Path) -> str:
    """An .npz file with arrays of other kinds, shapes and names, or whose headers say so."""
    files = zip_members(path)
    name = random.choice(list(files))
    kind = random.choice(["array", "array", "header", "name", "twice", "bytes"])
    if kind == "array":
        stream = io.BytesIO()
        nan = np.array([[float("nan")]])
        arrays = (
            nan,
            np.zeros(0, bool),
            np.zeros((), bool),
            np.zeros((30, 40), "S3"),
            np.array([Hostile()]),
            np.zeros(3, "i4,f8"),
        )
        arrays += (
            np.zeros((30, 40), complex),
            np.asfortranarray(np.ones((30, 40), ">u2")),
            np.zeros((30, 40), "M8[s]"),
        )
        np.save(stream, random.choice(arrays))
        files[name] = stream.getvalue()
    elif kind == "header":
        shapes = (
            b"(30, 40, 1)",
            b"(2**9, 1)",
            b"(10**12, 40)",
            b"(-30, -40)",
            b"(30.0, 40)",
            b"((30, 40),)",
            b"x",
            b"[30, 40]",
        )
        text = b"{'descr': '" + random.choice([b"|b1", b"|O", b"<u1", b"|V9", b"<M8[s]", b"x"]) + b"', "
        text += (
            b"'fortran_order': "
            + random.choice([b"False", b"0", b"None"])
            + b", 'shape': "
            + random.choice(shapes)
            + b"}"
        )
        files[name] = (
            b"\x93NUMPY"
            + bytes([random.choice([0, 1, 2, 3, 255]), 0])
            + struct.pack("<H", len(text))
            + text
            + bytes(1200)
        )
    elif kind == "name":
        files[random.choice(["1.npy", f"../{name}", f"/{name}", name.upper(), name[:-4], "a\0.npy"])] = files.pop(name)
    elif kind == "bytes":
        data = bytearray(files[name])
        data[random.randrange(len(data))] = random.randrange(256)
        files[name] = bytes(data[: random.choice([len(data), 5, 90])])
    compression = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for each, data in [*files.items(), *([(name, files[name])] if kind == "twice" else [])]:
            archive.writestr(zipfile.ZipInfo(each), data, compression)  # the current time would be in it otherwise
    return f"{kind} of {name}"


def parquet_rows(random: Random, path: Path) -> str:
    """A Parquet file with other values, types or columns. What is JSON inside is changed inside."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    for _ in range(20):
        tree = copy.deepcopy(rows)
        column = random.choice(list(tree[0]))
        if column.startswith("raw_") and random.random() < 0.8:
            inside, what = _several(random, json.loads(tree[0][column]))
            tree[0][column] = _json(random, inside).decode("utf-8", "replace")
        elif random.random() < 0.4:  # a column has one type
            value, what = hostile(random), "another type"
            tree = [{**row, column: value} for row in tree]
        else:
            tree, what = _several(random, tree)
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tree), path)
        except (pyarrow.ArrowException, LookupError, TypeError, ValueError, AttributeError, OverflowError):
            continue  # nobody can write that, not even a stranger
        return f"{column}: {what}"
    return "nothing"


# ---- pictures ------------------------------------------------------------------------------------


def png_chunks(random: Random, path: Path) -> str:
    """A PNG file whose parts are other, fewer or more, each with the checksum that it ought to
    have."""
    data, at, chunks = path.read_bytes(), 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    place = random.randrange(len(chunks))
    kind = random.choice(["size", "size", "bytes", "drop", "twice", "more"])
    if kind == "size":
        side = struct.pack(">II", *(random.choice([0, 1, 40, 2**16, 2**31 - 1, 2**32 - 1, 12_000]) for _ in range(2)))
        chunks[0][1] = side + chunks[0][1][8:]
    elif kind == "bytes" and chunks[place][1]:
        content = bytearray(chunks[place][1])
        content[random.randrange(len(content))] = random.randrange(256)
        chunks[place][1] = bytes(content)
    elif kind == "drop":
        del chunks[place]
    elif kind == "twice":
        chunks.insert(place, chunks[place])
    else:
        bomb = b"a\0\0" + zlib.compress(bytes(20_000_000), 1)
        more = (
            [b"zTXt", bomb],
            [b"iCCP", bomb],
            [b"tRNS", b"\0"],
            [b"PLTE", b"\0" * 4],
            [b"eXIf", random.randbytes(40)],
        )
        more += ([b"acTL", b"\xff" * 8], [b"fdAT", b"\0"], [b"gAMA", b""], [b"cHRM", b"\0"], [b"IDAT", b"\0\0"])
        chunks.insert(place, random.choice(more))
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    path.write_bytes(data[:8] + b"".join(parts))
    return f"{kind} in {len(chunks)} chunks"


# ---- running a command on it ---------------------------------------------------------------------

SECONDS = 30
"""Of a processor; of waiting it may be four times as many, since the machine may have other
work."""

MEMORY = 1 << 30
"""Bytes that a command may take beyond what the process has at its start."""

_GUARD = 4 << 30
"""Bytes of address space beyond the start's at which the system refuses more, so that a case does
not fill the machine."""

_OUT_OF_MEMORY = re.compile("MemoryError|not enough memory|[Uu]nable to alloc|[Cc]annot alloc|bad_alloc|malloc")


_QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What Python does not show to people."""


def complaint(words: Sequence[object], seconds: int = SECONDS, memory: int = MEMORY) -> tuple[int, str | None]:
    """Run a command in a process of its own: its exit code, and what is wrong with how it ended, if
    anything.

    That is a traceback, a warning, more or less than one sentence, a signal, too long a time, or
    too much memory.
    """
    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _run_and_leave(words, seconds, report, errors)
        handle = os.pidfd_open(child)
        try:
            ended, _, _ = select.select([handle], [], [], 4 * seconds)
            if not ended:
                os.kill(child, signal.SIGXCPU)  # as the system does after so much work; it says where it is
                select.select([handle], [], [], 1)
        finally:
            os.close(handle)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it started
            _, status, usage = os.wait4(child, 0)
        report.seek(0)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
        if status != 0:
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
            reason = f"took more than {seconds} s" if late else f"ended with the wait status {status:#x}"
            return -1, f"it {reason}\n" + "".join(said.splitlines(keepends=True)[:12])
        code, wrong, before = pickle.load(report)
    taken = (usage.ru_maxrss - before) * 1024
    if wrong is None and taken > memory:
        wrong = f"it took {taken / 1e6:,.0f} MB"
    elif wrong is None and said and not any(str(word).endswith(".tiff") for word in words):
        wrong = f"a library wrote {said!r}"  # as libtiff does, which Python cannot prevent
    return code, wrong


def _run_and_leave(words: Sequence[object], seconds: int, report: IO[bytes], errors: IO[bytes]) -> NoReturn:
    code = 99
    try:
        os.setpgid(0, 0)
        os.dup2(errors.fileno(), 2)
        # Not dump_traceback_later: pytest has called that, and a second call waits for a thread
        # that is not here.
        faulthandler.register(signal.SIGXCPU, errors, chain=True)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        torch.set_num_threads(1)  # threads do not survive a fork
        gc.freeze()  # nor could an object of the parent be deleted that waits for its threads, such as a video's decoder
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _GUARD,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = (*complaint_here(words), before)
        report.write(pickle.dumps(found))
        report.flush()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def complaint_here(words: Sequence[object]) -> tuple[int, str | None]:
    """The same without limits, in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as a terminal's
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with warnings.catch_warnings(record=True) as shown, streams[0], streams[1]:
        warnings.simplefilter("always")
        try:
            code = main([str(word) for word in words])
            out.flush()
        except (Exception, SystemExit):
            return -1, "it ended in\n" + traceback.format_exc(limit=-6)
    err.flush()
    said = err.buffer.getvalue().decode() if isinstance(err.buffer, io.BytesIO) else ""
    said = re.sub(r"^dcris: unpacking [^\n]*\n", "", said)  # Parquet's photographs, which takes long
    for warning in shown:
        if not issubclass(warning.category, _QUIET):
            return code, f"it warned of {warning.message}"
    if code == 0:
        return code, f"it succeeded, but wrote {said!r}" if said else None
    if code != 2 or not said.startswith("dcris: ") or not said.endswith("\n") or not said[:-1].isprintable():
        return code, f"it ended with {code} and wrote {said!r}"
    if _OUT_OF_MEMORY.search(said):
        return code, f"it ran out of memory: {said!r}"
    return code, f"its sentence has {len(said)} letters" if len(said) > 2000 else None


def files_in(folder: Path) -> set[str]:
    """Every file below a folder, and every link."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


class Snapshot:
    """What a folder's files were, to make them so again. Copying the folder for each case would
    take ten times as long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: (folder / name).read_bytes() for name in files_in(folder)}

    def restore(self) -> None:
        for name in files_in(self.folder) - set(self.files):
            (self.folder / name).unlink()
        for name, data in self.files.items():
            path = self.folder / name
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1e9 and path.read_bytes() == data:
                continue
            for place in [*reversed(path.relative_to(self.folder).parents), path.relative_to(self.folder)]:
                whole = self.folder / place
                if whole.is_symlink() or (whole.exists() and not whole.is_dir()):
                    whole.unlink()
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
