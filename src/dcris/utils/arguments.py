"""Arguments of public functions, checked where they come in: a wrong one is one sentence, not an error from deep inside."""

import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar

from dcris.errors import DcrisError

T = TypeVar("T")

PathLike = str | os.PathLike[str]

Precision = Literal["auto", "float32", "bfloat16"]
"""What the network computes in; auto is bfloat16 where the device multiplies it in hardware."""


def as_path(value: PathLike, what: str) -> Path:
    """The path that `value` is. Raises DcrisError where it is none; `what` names it, as in "the data set"."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise DcrisError(f"{what} has to be a path, a str or pathlib.Path, and is {kind_of(value)}")
    return Path(text)


def require(value: Any, kind: type[T], what: str) -> T:
    """Return `value` where it is of type `kind`. Raises DcrisError where it is not."""
    if not isinstance(value, kind):
        raise DcrisError(f"{what} has to be a {kind.__name__}, and is {kind_of(value)}")
    return value


def require_number(value: Any, low: float, what: str) -> float:
    """Return `value` where it is a number of `low` or more. Raises DcrisError where it is not, as for NaN."""
    if not isinstance(value, Real):
        raise DcrisError(f"{what} has to be a number, and is {kind_of(value)}")
    number = float(value)
    if not number >= low:  # NaN, too
        raise DcrisError(f"{what} has to be {low:g} or more, and is {number}")
    return number


def require_names(names: Iterable[str], registry: Mapping[str, Any], setting: str) -> None:
    """Raise DcrisError for the first of `names` that is no key of `registry`; `setting` is the key that holds the names."""
    for name in names:
        if name not in registry:
            raise DcrisError(f"{setting}: unknown name {name!r}; use one of {', '.join(registry)}")


def kind_of(value: Any) -> str:
    """What a value is, for the end of a sentence."""
    return "None" if value is None else f"{value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
