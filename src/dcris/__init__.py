"""Referring image segmentation with DCRIS: predict the mask of the object that an expression
describes."""

from typing import TYPE_CHECKING, Any

from dcris.version import __version__

__all__ = ["EncodedImage", "Prediction", "Segmenter", "__version__", "to_detections"]

if TYPE_CHECKING:
    from dcris.inference.prediction import Prediction, to_detections
    from dcris.inference.segmenter import EncodedImage, Segmenter


def __getattr__(name: str) -> Any:
    # Imported on first use: `dcris --help` and `dcris.__version__` do not need torch, which takes a
    # second.
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
