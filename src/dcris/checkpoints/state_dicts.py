"""Weights by name, found among all that a checkpoint holds, and without what torch's wrappers put into the names."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dcris.errors import DcrisError
from dcris.utils.streams import note

_T = TypeVar("_T")

_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "weights", "params"),
    # Averages over the steps of training (EMA). Last: it is the others that a program loads to train on or to evaluate.
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema"),
)
"""Under which keys programs save weights. Where several have some, the first counts."""

_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and recomputed activations put into names, at any module."""
_PREFIXES = ("module.", "model.")
"""Before every name: torch's wrappers for several GPUs and for averages; a Lightning module's attribute."""
_COUNTER = "n_averaged"
"""What torch's AveragedModel stores beside `module.`, and is no weight."""


@dataclass(frozen=True, slots=True)
class OtherValue:
    """A value of a checkpoint that is no plain tensor."""

    kind: str

    def __setstate__(self, state: Any) -> None:
        """A pickle's attributes of it are left out."""


def find_weights(content: Any, tensor: type[_T], path: Path) -> dict[str, _T]:
    """The weights in what a file holds: all of it, or what is under one of the usual keys, or under the only key that has any.

    Args:
        content: what the file holds.
        tensor: the class that stands for a tensor in it.
        path: the file, for errors.

    Where several usual keys have weights, the first of _KEYS counts, and a line on stderr names it. Raises DcrisError where
    there are none, where it is not clear which are meant, and for an entry among them that is no tensor.
    """
    if not isinstance(content, dict):
        raise DcrisError(f"{path} holds a {_kind(content)} where weights by name were expected")
    states = _states(content, tensor)
    if not states:
        held = ", ".join(f"{ascii(key)[:40]} ({_kind(value)})" for key, value in list(content.items())[:5])
        raise DcrisError(f"{path} holds no weights by name" + (f"; its entries are {held}" if held else ""))
    taken, *others = states
    if others and taken.partition(".")[0] not in _KEYS:
        raise DcrisError(
            f"{path} holds several sets of weights, under {', '.join(states)}; save the right one alone: "
            'torch.save(checkpoint[key], "weights.pth")'
        )
    if others:
        note(f"{path} holds weights under {', '.join(states)}; those under {taken} are read")
    return _without_prefixes(_tensors(states[taken], tensor, path), path)


def _states(content: dict[Any, Any], tensor: type, depth: int = 0) -> dict[str, dict[Any, Any]]:
    """The state dicts in a dictionary by their keys, the preferred first; its own key is ""."""
    found: dict[str, dict[Any, Any]] = {}
    for key in _KEYS:
        value = content.get(key)
        if isinstance(value, dict) and depth < 2:  # two deep: {"model": {"state_dict": ...}}
            within = _states(value, tensor, depth + 1)
            found |= {f"{key}.{name}".rstrip("."): state for name, state in within.items()}
    if found:
        return found
    if _has(content, tensor):
        return {"": content}
    if depth:
        return {}
    return {ascii(key)[1:-1][:40]: value for key, value in content.items() if type(key) is str and _has(value, tensor)}


def _has(value: Any, tensor: type) -> bool:
    return isinstance(value, dict) and any(isinstance(each, tensor) for each in value.values())


def _tensors(state: dict[Any, Any], tensor: type[_T], path: Path) -> dict[str, _T]:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, tensor):
            raise DcrisError(
                f"{path} is not a plain state dict: its entry {ascii(name)[:100]} is a {_kind(value)}, no tensor by name"
            )
    return state


def _without_prefixes(state: dict[str, _T], path: Path) -> dict[str, _T]:
    names = {name: _INSERTED.sub("", name) for name in state}
    while prefix := next((each for each in _PREFIXES if _all_have(each, names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items() if short != _COUNTER}
    if len(set(names.values())) != len(names):
        raise DcrisError(f"{path} has two tensors of one name after the prefixes of torch's wrappers are removed")
    return {short: state[name] for name, short in names.items()}


def _all_have(prefix: str, names: Any) -> bool:
    counted = [name for name in names if name != _COUNTER]
    return bool(counted) and all(name.startswith(prefix) for name in counted)


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, OtherValue) else type(value).__name__.lstrip("_")
