"""Find the weights in a checkpoint, and remove the name prefixes of torch's wrappers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dcris.errors import DcrisError
from dcris.utils.streams import note

_T = TypeVar("_T")

_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "weights", "params"),
    # Averages over training steps (EMA). Last, because programs load the others for training and
    # evaluation.
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema", "ema"),
)
"""Usual keys of weights. If several have weights, the first counts."""

_INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Name parts that torch.compile, FSDP and activation checkpointing insert at any module."""
_PREFIXES = ("module.", "model.")
"""Prefixes of all names: torch's wrappers for several GPUs and averages, and the attribute of a
Lightning module."""
_COUNTER = "n_averaged"
"""Counter that torch's AveragedModel stores beside the weights."""


@dataclass(frozen=True, slots=True)
class OtherValue:
    """A value of a checkpoint that is not a plain tensor."""

    kind: str

    def __setstate__(self, state: Any) -> None:
        """Ignore the attributes in a pickle."""


def find_weights(content: Any, tensor: type[_T], path: Path) -> dict[str, _T]:
    """Return the weights in the content of a file.

    These are all of it, or the value of a usual key or of the only key with weights.

    If several usual keys have weights, the first of _KEYS counts, and a note on stderr names it.

    Args:
        content: content of the file.
        tensor: class that represents tensors in it.
        path: the file, for errors.

    Raises:
        DcrisError: there are no weights, several candidates, or an entry that is not a tensor.
    """
    if not isinstance(content, dict):
        raise DcrisError(f"{path} holds a {_kind(content)} instead of weights by name; save a state dict")
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
        note(f"{path} holds weights under {', '.join(states)}; using {taken}")
    return _without_prefixes(_tensors(states[taken], tensor, path), path)


def _states(content: dict[Any, Any], tensor: type, depth: int = 0) -> dict[str, dict[Any, Any]]:
    """Return the state dicts in a dictionary by their keys, in order of preference.

    The dictionary itself has the key "".
    """
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
                f"{path} is not a plain state dict: its entry {ascii(name)[:100]} is a {_kind(value)}; save tensors only"
            )
    return state


def _without_prefixes(state: dict[str, _T], path: Path) -> dict[str, _T]:
    names = {name: _INSERTED.sub("", name) for name in state}
    while prefix := next((each for each in _PREFIXES if _all_have(each, names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items() if short != _COUNTER}
    if len(set(names.values())) != len(names):
        raise DcrisError(
            f"{path} has two tensors of one name without the prefixes of torch's wrappers; rename one of them"
        )
    return {short: state[name] for name, short in names.items()}


def _all_have(prefix: str, names: Any) -> bool:
    counted = [name for name in names if name != _COUNTER]
    return bool(counted) and all(name.startswith(prefix) for name in counted)


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, OtherValue) else type(value).__name__.lstrip("_")
