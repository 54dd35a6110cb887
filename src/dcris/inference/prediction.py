"""What the model answers, and the forms in which other programs want it.

Shape letters: H W pixels of a photograph.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcris.data.images import ImageLike, as_pixels
from dcris.data.masks import encode_mask, mask_box
from dcris.errors import DcrisError
from dcris.types import MaskArray
from dcris.utils.arguments import kind_of, require, require_number
from dcris.utils.drawing import COLOURS, Colour, overlay

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the model answers for one phrase on one photograph."""

    phrase: str
    mask: MaskArray
    """[H, W] bool, at the photograph's size."""
    score: float
    """Confidence in 0..1: the mean probability inside the mask, 0 where the mask is empty."""
    box: tuple[int, int, int, int] | None
    """x, y, width, height in pixels of the mask's bounding box; None where the mask is empty."""
    probabilities: NDArray[np.float32] | None = None
    """[H, W] in 0..1, where they were asked for."""

    def __eq__(self, other: object) -> bool:
        # Not dataclass's own: == of arrays is an array.
        if not isinstance(other, Prediction):
            return NotImplemented
        plain = (self.phrase, self.score, self.box) == (other.phrase, other.score, other.box)
        return plain and all(
            np.array_equal(np.asarray(ours), np.asarray(theirs))
            for ours, theirs in ((self.mask, other.mask), (self.probabilities, other.probabilities))
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def decide(
        cls, phrase: str, probabilities: NDArray[np.float32], threshold: float, *, keep: bool = True
    ) -> "Prediction":
        """The answer that probabilities [H, W] give: a pixel is the object's if its probability is greater than the threshold.

        `keep` is whether the answer holds them. Raises DcrisError where they are no such array or the threshold is not between
        0 and 1.
        """
        if not isinstance(probabilities, np.ndarray) or probabilities.ndim != 2 or probabilities.dtype.kind != "f":
            raise DcrisError(f"probabilities are an array [H, W] of floats, and not {kind_of(probabilities)}")
        mask = probabilities > require_threshold(threshold)
        box = mask_box(mask)
        score = float(probabilities[mask].mean()) if box else 0.0
        return cls(phrase, mask, score, box, probabilities if keep else None)

    def with_threshold(self, threshold: float) -> "Prediction":
        """The same answer decided anew, without asking the model. Raises DcrisError without `probabilities` (`scores=True`)."""
        if self.probabilities is None:
            raise DcrisError("this prediction has no probabilities to decide anew by; predict with scores=True")
        return Prediction.decide(self.phrase, self.probabilities, threshold)

    def to_rle(self) -> dict[str, Any]:
        """The mask as COCO's compressed run lengths {"size": [H, W], "counts": str}, ready for JSON and for pycocotools."""
        return encode_mask(self.mask)

    def to_coco(self, image_id: int = 0, category_id: int = 1) -> dict[str, Any]:
        """One entry of a COCO result file: image_id, category_id, segmentation, bbox, score; and the phrase beside them."""
        return {
            "image_id": image_id,
            "category_id": category_id,
            "phrase": self.phrase,
            "score": round(self.score, 6),
            "bbox": list(self.box or (0, 0, 0, 0)),
            "segmentation": self.to_rle(),
        }

    def polygons(self, tolerance: float = 0.0) -> list[list[float]]:
        """The outlines of the mask's parts as COCO has them: [[x, y, x, y, ...], ...] in pixels, without holes.

        They run along the pixels' borders, so pycocotools makes the same mask of them again, but with its holes filled, since
        COCO's polygons have none. A `tolerance` in pixels leaves corners out that the outline can do without.
        """
        require_number(tolerance, 0, "the tolerance")
        # cv2 follows the centres of pixels. Seen at twice the size, the centres of a border's small pixels tell which side
        # of a pixel they are on, and so which of the pixel's borders is meant.
        if self.box is None:
            return []
        left, top, width, height = self.box
        inside = self.mask[top : top + height, left : left + width].astype(np.uint8)
        doubled = np.repeat(np.repeat(inside, 2, axis=0), 2, axis=1)
        found, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outlines = [_without_needless((outline[:, 0] + 1) // 2 + (left, top)) for outline in found]
        if tolerance > 0:
            outlines = [cv2.approxPolyDP(outline.astype(np.int32), tolerance, True)[:, 0] for outline in outlines]
        return [[float(value) for value in outline.ravel()] for outline in outlines if len(outline) > 2]

    def cutout(self, image: ImageLike, *, crop: bool = True) -> Image.Image:
        """The object alone, as an RGBA picture: transparent outside the mask, and no larger than its box with `crop`.

        Raises DcrisError where the image is of another size than the mask, or where there is nothing to cut out.
        """
        pixels = self._fitting(image)
        if self.box is None:
            raise DcrisError(f"nothing was found for {self.phrase!r}, so there is nothing to cut out")
        picture = Image.fromarray(np.dstack((pixels, self.mask.astype(np.uint8) * np.uint8(255))))
        left, top, width, height = self.box
        return picture.crop((left, top, left + width, top + height)) if crop else picture

    def overlay(self, image: ImageLike, colour: Colour = COLOURS[0]) -> Image.Image:
        """The image with the mask shown on it. Raises DcrisError where the image is of another size than the mask."""
        pixels = self._fitting(image)
        try:
            valid = len(colour) == 3 and all(0 <= int(value) <= 255 for value in colour)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise DcrisError(f"a colour is red, green and blue from 0 to 255, as in (255, 122, 0), and not {colour!r}")
        return Image.fromarray(overlay(pixels, self.mask, colour))

    def _fitting(self, image: ImageLike) -> NDArray[np.uint8]:
        pixels = as_pixels(image)
        if pixels.shape[:2] != self.mask.shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, self.mask.shape)]
            raise DcrisError(
                f"the image is {sizes[0]} pixels and the mask {sizes[1]}; give the image that was asked about"
            )
        return pixels


def to_detections(predictions: Iterable[Prediction]) -> "supervision.Detections":
    """supervision's Detections, for its annotators, trackers and data sets; what found nothing is left out.

    `class_id` is the prediction's place in the sequence, `data["class_name"]` its phrase.
    Raises DcrisError where supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise DcrisError(f"supervision cannot be imported ({error}); install it: pip install supervision") from error
    if not isinstance(predictions, Iterable):
        raise DcrisError(f"predictions are a list of Prediction, and not {kind_of(predictions)}")
    every = [require(each, Prediction, "each prediction") for each in predictions]
    found = [(number, each) for number, each in enumerate(every) if each.box is not None]
    if not found:
        return supervision.Detections.empty()
    corners = [[x, y, x + width, y + height] for _, each in found if each.box for x, y, width, height in [each.box]]
    return supervision.Detections(
        xyxy=np.array(corners, np.float32),
        mask=np.stack([each.mask for _, each in found]),
        confidence=np.array([each.score for _, each in found], np.float32),
        class_id=np.array([number for number, _ in found]),
        data={"class_name": np.array([each.phrase for _, each in found])},
    )


def require_threshold(threshold: float) -> float:
    """The threshold itself. Raises DcrisError where it does not lie between 0 and 1."""
    given: Any = threshold  # whatever a caller passed
    if not isinstance(given, Real) or not 0 < float(given) < 1:
        raise DcrisError(f"the threshold must be a number between 0 and 1, and is {given!r}")
    return float(given)


def _without_needless(outline: NDArray[Any]) -> NDArray[Any]:
    """A closed outline [N, 2] without repeated points and without those on a straight line between their neighbours."""
    outline = outline[np.any(outline != np.roll(outline, 1, axis=0), axis=1)]
    before, after = outline - np.roll(outline, 1, axis=0), np.roll(outline, -1, axis=0) - outline
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    # There and back again is a corner too: it has no area, but its point may join two parts of the outline.
    turns = (before * after).sum(axis=1) < 0
    return np.asarray(outline[bends | turns])
