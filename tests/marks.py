"""Parameters of which some run in the quick suite and all in the whole one."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return the values for `parametrize`, with all but those in `quick` marked slow.

    A tuple is the values of several parameters. Raises ValueError where a value of `quick` is none
    of the values, as after a change of a name: the quick suite would silently lose it.
    """
    values = list(values)
    if missing := [value for value in quick if value not in values]:
        raise ValueError(f"{missing} are not among the parameters")
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*part, marks=() if value in quick else pytest.mark.slow)
        for value, part in zip(values, parts, strict=True)
    ]
