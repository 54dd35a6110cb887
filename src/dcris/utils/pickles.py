"""Limit the memory that an untrusted pickle can take, before any of it is run.

One byte of a pickle can make a set of 216 bytes, and five bytes a table of 32 GB. So all
instructions are checked first, and a pickle that would take many times its own size is refused.
Which classes it may name is decided by the caller's `find_class`.
"""

import pickle
import pickletools
from collections.abc import Collection

_MEMORY_PER_BYTE = 32
"""Bytes of memory that a pickle may take per byte of its size.

REFER's official files take 7, compact ones 27.
"""
_MEMORY_OF_ANY = 16_000_000
"""Bytes of memory that any pickle may take in addition, because small ones need relatively more."""

_COSTS = (
    (32, ""),  # every instruction: a place on the stack and one in a container
    (40, "NONE NEWTRUE NEWFALSE EMPTY_TUPLE BININT BININT2 LONG1 LONG4 INT LONG BINFLOAT FLOAT"),
    (72, "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"),
    (72, "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 TUPLE TUPLE1 TUPLE2 TUPLE3"),
    (104, "EMPTY_LIST LIST"),
    (256, "EMPTY_DICT DICT"),
    (256, "REDUCE BUILD NEWOBJ NEWOBJ_EX OBJ INST PERSID BINPERSID"),
    (512, "EMPTY_SET FROZENSET"),
)
"""Bytes of memory that instructions take, in addition to the size of their arguments."""
_LONG_NUMBER = 100_000
"""Bytes that are counted for an integer of more than 8 bytes.

Thousands of such integers can share one hash, and a dictionary of n of them then takes n * n steps.
"""

_LINES = dict.fromkeys(["INT", "LONG", "FLOAT", "STRING", "UNICODE", "GET", "PUT", "PERSID"], 1) | {
    "GLOBAL": 2,
    "INST": 2,
}
"""Instructions whose arguments are lines of text: name -> number of lines."""
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_STOP, _PUT, _LONG_BINPUT, _LONG1, _LONG4 = (_CODES[name] for name in ("STOP", "PUT", "LONG_BINPUT", "LONG1", "LONG4"))
_LINES_OF = {_CODES[name]: lines for name, lines in _LINES.items()}
_NUMBERS = {_CODES["INT"], _CODES["LONG"]}


def _sizes() -> list[int]:
    """Return for each instruction its size with its argument.

    Negative: the number of bytes of the length that precedes a variable argument. 0: other
    instructions.
    """
    counts = {
        pickletools.UP_TO_NEWLINE: 0,
        pickletools.TAKEN_FROM_ARGUMENT1: -1,
        pickletools.TAKEN_FROM_ARGUMENT4: -4,
        pickletools.TAKEN_FROM_ARGUMENT4U: -4,
        pickletools.TAKEN_FROM_ARGUMENT8U: -8,
    }
    sizes = [0] * 256
    for opcode in pickletools.opcodes:
        size = opcode.arg.n if opcode.arg else 0
        sizes[ord(opcode.code)] = counts.get(size, 1 + size)
    for code in (_STOP, _LONG_BINPUT, _LONG1, _LONG4, *_LINES_OF):
        sizes[code] = 0
    return sizes


_SIZES = _sizes()
_COST = [
    next((cost for cost, names in reversed(_COSTS) if _NAMES.get(code) in names.split()), 32) for code in range(256)
]
# Minus the memory that the instruction's own bytes allow.
_EXCESS = [
    cost - _MEMORY_PER_BYTE * max(1, 1 - size if size < 0 else size) for cost, size in zip(_COST, _SIZES, strict=True)
]


class InstructionError(pickle.UnpicklingError):
    """A pickle contains an instruction that is not allowed."""

    def __init__(self, name: str, place: int) -> None:
        super().__init__(f"it has the pickle instruction {name} at byte {place}")
        self.name = name


def global_name(*parts: str) -> str:
    """Return the name of a global for an error message: on one line, escaped and cut."""
    return ascii(".".join(parts))[1:-1][:100]


def end_of_pickle(data: bytes, start: int = 0, admitted: Collection[str] = frozenset(_CODES)) -> int:
    """Return the position after the pickle that starts at `start`, without running it.

    Args:
        data: contains the pickle.
        start: its position.
        admitted: the allowed instructions, by pickletools' names.

    Raises:
        InstructionError: the pickle has another instruction.
        UnpicklingError: the pickle is truncated, or would take many times its size in memory.
    """
    codes = {_CODES[name] for name in admitted}
    sizes = [size if code in codes else 0 for code, size in enumerate(_SIZES)]
    at, spent, highest = start, 0, 0
    try:
        while spent <= _MEMORY_OF_ANY:
            code = data[at]
            spent += _EXCESS[code]
            size = sizes[code]
            if size > 0:
                at += size
            elif size < 0:
                length = int.from_bytes(data[at + 1 : at + 1 - size], "little")
                at += 1 - size + length
                spent -= _MEMORY_PER_BYTE * length
            elif code not in codes:
                raise InstructionError(_NAMES[code], at)
            elif code == _LONG_BINPUT:
                place = int.from_bytes(data[at + 1 : at + 5], "little")
                if place > highest:  # Python allocates a table of twice as many entries
                    spent += 16 * (place - highest)
                    highest = place
                at += 5
            elif code in _LINES_OF:
                first = at + 1
                for _ in range(_LINES_OF[code]):
                    at = data.index(b"\n", at) + 1
                if code == _PUT:
                    place = int(data[first:at])
                    spent += 16 * max(0, place - highest)
                    highest = max(place, highest)
                elif code in _NUMBERS and at - first > 20:
                    spent += _LONG_NUMBER
                spent -= _MEMORY_PER_BYTE * (at - first)
            elif code == _STOP:
                return at + 1
            else:  # LONG1 or LONG4
                width = 1 if code == _LONG1 else 4
                length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
                if length > 8:
                    spent += _LONG_NUMBER
                at += 1 + width + length
    except (IndexError, KeyError, ValueError) as error:  # end of the data, unknown instruction, or not a number
        raise pickle.UnpicklingError("it ends before its last instruction, or is not a pickle") from error
    raise pickle.UnpicklingError("it would take far more memory than its size explains")
