"""Referring image segmentation: a photograph and a phrase in, the mask of that object out (DCRIS)."""

from typing import TYPE_CHECKING, Any

from dcris.version import __version__

__all__ = ["Prediction", "Segmenter", "__version__"]

if TYPE_CHECKING:
    from dcris.segmenter import Segmenter
    from dcris.types import Prediction


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `dcris --help` and `dcris.__version__` do without it.
    if name == "Segmenter":
        from dcris.segmenter import Segmenter

        return Segmenter
    if name == "Prediction":
        from dcris.types import Prediction

        return Prediction
    raise AttributeError(f"module 'dcris' has no attribute {name!r}")
