"""A model as a function for CVAT's automatic annotation.

    cvat-cli task auto-annotate 7 --function-module dcris.inference.cvat \\
        -p model=str:photos -p "phrases=str:left cup; the bowl"

CVAT's client loads this module, gets the images of a task, and uploads one mask for each phrase.
The phrase is the text attribute `phrase`, which `dcris data import` reads in CVAT's COCO export.
Needs `cvat-sdk`, which is not a dependency of dcris. Source: cvat_sdk/auto_annotation/interface.py
(2.80).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dcris.data.outlines import mask_polygon
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.types import MaskArray

if TYPE_CHECKING:
    from cvat_sdk.auto_annotation import DetectionFunctionContext, DetectionFunctionSpec
    from PIL.Image import Image

_LABEL, _ATTRIBUTE = 0, 0
"""Identifiers of the label and of its attribute in the function's specification."""


class SegmentPhrases:
    """A detection function for `cvat_sdk.auto_annotation.annotate_task`.

    Args:
        segmenter: the model.
        phrases: what to segment in each image.
        label: name of the label in the CVAT task, which has a text attribute `phrase`.
    """

    def __init__(self, segmenter: Segmenter, phrases: Sequence[str], label: str = "object") -> None:
        self._segmenter, self._phrases, self._label = segmenter, list(phrases), label

    @property
    def spec(self) -> "DetectionFunctionSpec":
        """The label, with its attribute."""
        from cvat_sdk import auto_annotation

        attribute = auto_annotation.text_attribute_spec("phrase", _ATTRIBUTE)
        label = auto_annotation.label_spec(self._label, _LABEL, attributes=[attribute])
        return auto_annotation.DetectionFunctionSpec(labels=[label])

    def detect(self, context: "DetectionFunctionContext", image: "Image") -> list[Any]:
        """Return a shape for each phrase with a mask: a mask, or one polygon for all of its parts.

        Args:
            context: `conf_threshold` is the least score; by default, that of `Segmenter.predict`.
            image: of any mode.
        """
        from cvat_sdk import auto_annotation
        from cvat_sdk.models import AttributeValRequest

        shapes = []
        for found in self._segmenter.predict(image, self._phrases, min_score=context.conf_threshold):
            if not found.mask.any():
                continue
            attributes = [AttributeValRequest(spec_id=_ATTRIBUTE, value=found.phrase)]
            if context.conv_mask_to_poly:
                shape = auto_annotation.polygon(_LABEL, mask_polygon(found.mask), attributes=attributes)
            else:
                shape = auto_annotation.mask(_LABEL, _encoded(found.mask), attributes=attributes)
            shapes.append(shape)
        return shapes


def create(
    model: str = "photos", phrases: str = "", label: str = "object", device: str = "auto", precision: str | None = None
) -> SegmentPhrases:
    """Create the function, as `cvat-cli --function-module` does.

    Args:
        model: what `dcris predict` takes.
        phrases: separated by semicolons or lines.
        label: name of the label in the CVAT task.
        device: auto, cpu, cuda or cuda:N.
        precision: as in `Segmenter.from_pretrained`.

    Raises:
        DcrisError: there is no phrase, or as `Segmenter.from_pretrained` does.
    """
    wanted = [each.strip() for each in phrases.replace(";", "\n").splitlines() if each.strip()]
    if not wanted:
        raise DcrisError("there is no phrase; give them with -p 'phrases=str:left cup; the bowl'")
    return SegmentPhrases(Segmenter.from_pretrained(model, device=device, precision=precision), wanted, label)  # type: ignore[arg-type]  # validated there


def _encoded(mask: MaskArray) -> list[float]:
    from cvat_sdk.masks import encode_mask

    return list(encode_mask(mask))
