"""The example photographs in the package."""

from importlib import resources
from pathlib import Path

_PHRASES = {
    "astronaut.jpg": ("woman",),
    "chelsea.jpg": ("cat", "bird"),  # there is no bird
    "coffee.jpg": ("cup",),
}


def example_photographs() -> list[tuple[Path, tuple[str, ...]]]:
    """Return the file of each example photograph, and phrases for it, one of them for an
    absent object."""
    folder = Path(str(resources.files("dcris.assets") / "photographs"))
    return [(folder / name, phrases) for name, phrases in _PHRASES.items()]
