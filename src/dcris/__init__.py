"""Referring image segmentation with DCRIS: predict the mask of the object that an expression
describes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcris.version import __version__

__all__ = [
    "EncodedImage",
    "EncodedPhrases",
    "Prediction",
    "Segmenter",
    "__version__",
    "evaluate",
    "load_dataset",
    "to_detections",
    "train",
]

if TYPE_CHECKING:
    from dcris.data.readers.load import load_references as load_dataset
    from dcris.evaluation.evaluate import evaluate
    from dcris.inference.prediction import Prediction, to_detections
    from dcris.inference.segmenter import EncodedImage, EncodedPhrases, Segmenter
    from dcris.training.train import train

_PLACES = {
    "EncodedImage": ("inference.segmenter", "EncodedImage"),
    "EncodedPhrases": ("inference.segmenter", "EncodedPhrases"),
    "Prediction": ("inference.prediction", "Prediction"),
    "Segmenter": ("inference.segmenter", "Segmenter"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "load_dataset": ("data.readers.load", "load_references"),
    "to_detections": ("inference.prediction", "to_detections"),
    "train": ("training.train", "train"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `dcris --help` and `dcris.__version__` do not need torch, which takes a
    # second.
    if name not in _PLACES:
        raise AttributeError(f"module 'dcris' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"dcris.{module}"), attribute)
