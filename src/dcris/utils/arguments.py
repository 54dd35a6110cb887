"""Checks of the arguments of public functions, so that a wrong one raises a DcrisError that names
it."""

import math
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar

from dcris.errors import DcrisError

T = TypeVar("T")

PathLike = str | os.PathLike[str]

DEVICES = "auto, cpu, cuda, cuda:N or mps"
"""Names of devices, for help and messages; see dcris.utils.device.choose_device."""

TrainingPrecision = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of training; auto is bfloat16 if the device supports it in hardware. float16 is for
GPUs without bfloat16; training then scales the loss (dcris.training.loss_scale)."""

Precision = Literal[TrainingPrecision, "int8"]
"""Precision of prediction and evaluation. int8 is for CPUs: large linear layers multiply in 8 bits
(dcris.models.int8), everything else works as with auto."""

TrackerName = Literal["tensorboard", "wandb"]
"""Where training can show curves, besides its log; see dcris.training.loggers."""

Refinement = Literal["none", "guided"]
"""How the edges of predicted masks are refined by the image; guided: see
dcris.evaluation.refinement."""


ALIKE = 0.75
"""Least similarity of a mistyped name (difflib's ratio): 0.75 for two exchanged letters of four."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" with the most similar of `names`; empty if none is similar."""
    similar = get_close_matches(name, names, 1, ALIKE)
    return f" (did you mean {similar[0]}?)" if similar else ""


def as_path(value: PathLike, what: str) -> Path:
    """Return `value` as a Path.

    Raises:
        DcrisError: another type, or empty text, which Path takes for the current folder; `what`
            names the argument, as in "the data set".
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise DcrisError(f"{what} must be a path (str or pathlib.Path), not {kind_of(value)}")
    if not text:
        raise DcrisError(f"{what} must be a path, and is empty; the current folder is '.'")
    return Path(text)


def require(value: Any, kind: type[T], what: str) -> T:
    """Return `value` if it is a `kind`. Raises DcrisError otherwise; `what` names the argument."""
    if not isinstance(value, kind):
        raise DcrisError(f"{what} must be a {kind.__name__}, not {kind_of(value)}")
    return value


def require_number(value: Any, what: str) -> float:
    """Return `value` as a float if it is a number of at least 0.

    Raises DcrisError otherwise, also for NaN.
    """
    if not isinstance(value, Real):
        raise DcrisError(f"{what} must be a number, not {kind_of(value)}")
    number = as_float(value)
    if not number >= 0:  # NaN, too
        raise DcrisError(f"{what} must be 0 or more, not {number}")
    return number


def as_float(number: Any) -> float:
    """Return a number as a float; a whole one of more than 308 digits is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def require_names(names: Iterable[str], registry: Mapping[str, Any], setting: str) -> None:
    """Raise DcrisError for a name that is not a key of `registry`; `setting` is the key with the
    names."""
    for name in names:
        if name not in registry:
            raise DcrisError(f"{setting}: unknown name {name!r}; use one of {', '.join(registry)}")


def kind_of(value: Any) -> str:
    """Describe a value of a wrong type, for the end of a message."""
    return "None" if value is None else f"{value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
