"""HTML reports: each is one file without scripts or links, rendered from the Jinja2 templates.

Styles and images are inside the file, so it can be mailed, archived and opened without a server.
All text is escaped, and a content security policy in the page forbids everything from outside.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dcris.utils.files import write_file

DASH = "\N{EN DASH}"
_THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render a template and write it to a file atomically.

    Args:
        path: the .html file; its directory is created.
        template: name of a file in `templates`.
        context: the template's variables.

    Raises:
        DcrisError: if the file cannot be written.
    """
    write_file(path, _printable(render(template, **context)).encode())


def render(template: str, **context: Any) -> Markup:
    """Render a template of this package with all text escaped."""
    return Markup(_environment().get_template(template).render(context))


def percent(value: float | int | str | None) -> str:
    """Format a percentage; None and a value that is not finite become a dash, and text stays as it
    is."""
    if value is None or isinstance(value, str):
        return DASH if value is None else value
    return Markup("{:.1f}<small>{}%</small>").format(value, _THIN_SPACE) if math.isfinite(value) else DASH


def interval(bounds: Sequence[float]) -> str:
    """Format an interval of percentages or of their differences."""
    between = " to " if min(bounds) < 0 else f"{_THIN_SPACE}{DASH}{_THIN_SPACE}"
    return between.join(f"{bound:.1f}".replace("-", "\N{MINUS SIGN}") for bound in bounds)


def number(value: float | int | str) -> str:
    """Format a count or a value with few digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def length(value: float | int | str | None) -> float:
    """Return a percentage clipped to 0..100; 0 if it is not a finite number."""
    return min(100.0, max(0.0, value)) if isinstance(value, int | float) and math.isfinite(value) else 0.0


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dcris.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "number": number, "length": length}
    return environment


def _printable(page: str) -> str:
    """Replace control characters and unpaired surrogates, which HTML files must not contain."""
    if page.isprintable():
        return page
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in page
    )
