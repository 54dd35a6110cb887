"""Referring image segmentation: a photograph and a phrase in, the mask of that object out (DCRIS)."""

from typing import TYPE_CHECKING, Any

from dcris.version import __version__

__all__ = ["EncodedImage", "Prediction", "Segmenter", "__version__", "to_detections"]

if TYPE_CHECKING:
    from dcris.inference.prediction import Prediction, to_detections
    from dcris.inference.segmenter import EncodedImage, Segmenter


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `dcris --help` and `dcris.__version__` do without it.
    if name == "Segmenter":
        from dcris.inference.segmenter import Segmenter

        return Segmenter
    if name in {"Prediction", "to_detections"}:
        from dcris.inference import prediction

        return getattr(prediction, name)
    if name == "EncodedImage":
        from dcris.inference.segmenter import EncodedImage

        return EncodedImage
    raise AttributeError(f"module 'dcris' has no attribute {name!r}")
