"""A predicted mask, and its conversion to the formats of other programs.

Shape letters: H W height and width of the image in pixels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcris.data.images import ImageLike, Rereadable, as_pixels
from dcris.data.masks import encode_mask, mask_box
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.types import MaskArray
from dcris.utils.annotate import Annotation, annotate
from dcris.utils.arguments import PathLike, as_float, as_path, kind_of, require, require_number
from dcris.utils.drawing import COLOURS, Colour, overlay, png_bytes
from dcris.utils.files import write_file

if TYPE_CHECKING:
    import supervision

LEAST_PRESENCE = 0.5
"""Probability of presence below which a mask is empty by default: the object is probably not
there."""

_GREY = 128
"""Background of a mask without its image."""

_SHOWN = 120
"""Characters of a phrase in a warning."""


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One of the separate objects of a predicted mask."""

    mask: MaskArray
    """[height, width] bool, inside the box."""
    box: tuple[int, int, int, int]
    """Bounding box (x, y, width, height) in pixels of the image."""
    area: int
    """In pixels."""
    score: float
    """Mean probability of its pixels, in 0..1; the prediction's score if probabilities were not
    requested."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)  # compared by identity: == of arrays is an array
class Prediction:
    """The result for one image and one phrase.

    A notebook shows it as a picture.
    """

    phrase: str
    mask: MaskArray
    """[H, W] bool, at the size of the image."""
    score: float
    """Confidence in 0..1, which does not depend on the threshold: `present` where the model has a
    presence head; else the mean probability of the pixels above 0.35, 0 if there are none."""
    box: tuple[int, int, int, int] | None
    """Bounding box of the mask (x, y, width, height) in pixels; None for an empty mask."""
    probabilities: NDArray[np.float32] | None = None
    """[H, W] in 0..1; None unless requested with `scores=True`."""
    present: float | None = None
    """Probability in 0..1 that the image shows what the phrase names; None for a model without a
    presence head."""
    rejected: str | None = None
    """Why the mask is empty whatever the probabilities are ("score below 0.5"); None if it was
    decided by the threshold alone."""
    unread: str | None = None
    """The end of a phrase that is longer than the model reads (`data.word_length`): it did not
    change the result. None if all of the phrase was read."""

    image: Rereadable | None = field(default=None, repr=False)
    """The image that was given, for `plot`; None if the prediction was not made by a Segmenter."""

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"<Prediction {self.phrase!r}: {self.describe()}, {width} x {height} pixels>"

    @classmethod
    def decide(
        cls,
        phrase: str,
        probabilities: NDArray[np.float32],
        threshold: float,
        *,
        keep: bool = True,
        present: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        unread: str | None = None,
        image: Rereadable | None = None,
    ) -> "Prediction":
        """Create a prediction from probabilities.

        Args:
            phrase: the phrase.
            probabilities: [H, W] in 0..1.
            threshold: pixels with a greater probability belong to the mask.
            keep: store the probabilities in the prediction.
            present: probability that the object is there, from a presence head.
            min_score: with a lower score, the mask is empty; by default, `LEAST_PRESENCE` (0.5) if
                `present` is given, else 0.
            min_area: with fewer pixels, the mask is empty.
            unread: end of the phrase that the model does not read.
            image: that the prediction is for.

        Raises:
            DcrisError: the probabilities are not such an array, the threshold is not between 0 and
                1, or a minimum is out of range.
        """
        if not isinstance(probabilities, np.ndarray) or probabilities.ndim != 2 or probabilities.dtype.kind != "f":
            raise DcrisError(f"probabilities must be an array [H, W] of floats, not {kind_of(probabilities)}")
        threshold = require_threshold(threshold)
        min_score, min_area = require_minima(min_score, min_area, present is not None)
        score = _mean_inside(probabilities) if present is None else present
        mask = probabilities > threshold
        rejected = None
        if score < min_score:
            rejected = f"score below {min_score:g}"
        elif mask.any() and np.count_nonzero(mask) < min_area:
            rejected = f"fewer than {min_area:,} pixels"
        if rejected is not None:
            mask = np.zeros_like(mask)
        kept = probabilities if keep else None
        return cls(phrase, mask, score, mask_box(mask), kept, present, rejected, unread, image)

    def with_threshold(self, threshold: float, *, min_score: float | None = None, min_area: int = 0) -> "Prediction":
        """Return the prediction at another threshold, without a forward pass.

        The score stays the same. Minima have to be given again. Raises DcrisError without
        `probabilities`.
        """
        if self.probabilities is None:
            raise DcrisError("this prediction has no probabilities; predict with scores=True")
        return Prediction.decide(
            self.phrase,
            self.probabilities,
            threshold,
            present=self.present,
            min_score=min_score,
            min_area=min_area,
            unread=self.unread,
            image=self.image,
        )

    @property
    def box_xywh(self) -> tuple[int, int, int, int] | None:
        """The box as (x, y, width, height), as in COCO; another name of `box`."""
        return self.box

    @property
    def box_xyxy(self) -> tuple[int, int, int, int] | None:
        """The box as (left, top, right, bottom), of which the last two are outside of it."""
        if self.box is None:
            return None
        left, top, width, height = self.box
        return left, top, left + width, top + height

    @property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def verdict(self) -> str:
        """The score in percent if there is a mask; else "nothing found", or "not found" and the
        probability that the object is there."""
        if self.box is not None:
            return f"{self.score:.0%}"
        absent = self.present is not None and self.rejected is not None and "score" in self.rejected
        return f"not found ({self.present:.0%})" if absent else "nothing found"

    def describe(self) -> str:
        """Return in a few words where the object is, or why there is no mask, and the score."""
        found = f"box {self.box}" if self.box else "nothing found"
        reason = f" ({self.rejected})" if self.rejected else ""
        return f"{found}{reason}, score {self.score:.2f}"

    def instances(self, min_area: int = 1) -> list[Instance]:
        """Return the separate objects of the mask, largest first.

        These are its connected components, where pixels that touch at a corner are connected. Two
        objects that touch are one instance, and an object in two parts is two.

        Args:
            min_area: leave out components of fewer pixels.

        Raises:
            DcrisError: `min_area` is not a number of 0 or more.
        """
        require_number(min_area, "the minimum area")
        if self.box is None:
            return []
        left, top, width, height = self.box
        part = np.s_[top : top + height, left : left + width]
        inside = self.mask[part].astype(np.uint8)
        count, labels, statistics, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
        probabilities = None if self.probabilities is None else self.probabilities[part]
        found = []
        for label in range(1, count):
            x, y, across, down, area = map(int, statistics[label])
            if area < min_area:
                continue
            window = np.s_[y : y + down, x : x + across]
            mask = labels[window] == label
            score = self.score
            if probabilities is not None:
                score = float(probabilities[window].mean(dtype=np.float64, where=mask))
            found.append(Instance(mask, (left + x, top + y, across, down), area, score))
        return sorted(found, key=lambda each: -each.area)

    def to_rle(self) -> dict[str, Any]:
        """Encode the mask as COCO's compressed run lengths {"size": [H, W], "counts": str}."""
        return encode_mask(self.mask)

    def to_coco(self, image_id: int = 0, category_id: int = 1) -> dict[str, Any]:
        """Return image_id, category_id, segmentation, bbox and score of COCO, and the phrase.

        `present`, `rejected` and `unread` are added where they are not None.
        """
        optional: dict[str, Any] = {
            "present": None if self.present is None else round(self.present, 6),
            "rejected": self.rejected,
            "unread": self.unread,
        }
        return {
            "image_id": image_id,
            "category_id": category_id,
            "phrase": self.phrase,
            "score": round(self.score, 6),
            "bbox": list(self.box or (0, 0, 0, 0)),
            "segmentation": self.to_rle(),
            **{key: value for key, value in optional.items() if value is not None},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all of it except image and probabilities, ready for JSON; the mask as COCO's run
        lengths."""
        return {
            "phrase": self.phrase,
            "score": self.score,
            "present": self.present,
            "rejected": self.rejected,
            "unread": self.unread,
            "box_xywh": self.box,
            "box_xyxy": self.box_xyxy,
            "area": self.area,
            "mask": self.to_rle(),
        }

    def plot(self, image: ImageLike | None = None) -> Image.Image:
        """Draw the mask on its image, with phrase and score below it.

        Args:
            image: the image of this prediction; by default the one that was given to the Segmenter,
                which is read again if it is a file. A prediction without one is drawn on grey.

        Raises:
            DcrisError: the image cannot be read any more, or has another size than the mask.
        """
        chosen = self.image if image is None else image
        pixels = np.full((*self.mask.shape, 3), _GREY, np.uint8) if chosen is None else self._pixels_of(chosen)
        return Image.fromarray(annotate(pixels, [Annotation(self.phrase, self.verdict, self.mask)]))

    def show(self, image: ImageLike | None = None) -> None:
        """Open the picture of `plot` in the system's image viewer.

        Args and errors: as in `plot`.
        """
        self.plot(image).show(title=self.phrase)

    def save(self, path: PathLike) -> None:
        """Write the mask as a PNG file, 255 inside and 0 outside.

        Raises DcrisError if it cannot be written or the name has another ending.
        """
        target = as_path(path, "the file of the mask")
        if target.suffix.lower() != ".png":
            raise DcrisError(
                f"masks are written as PNG files, and {target} has another ending; call it {target.stem}.png"
            )
        write_file(target, png_bytes(self.mask))

    def _repr_png_(self) -> bytes:
        """Return the picture that notebooks show."""
        return png_bytes(np.asarray(self.plot()))

    def polygons(self, tolerance: float = 0.0) -> list[list[float]]:
        """Return the outlines of the mask in COCO's form: [[x, y, x, y, ...], ...] in pixels.

        The outlines follow pixel borders, so pycocotools converts them back to the same mask. Holes
        are filled, because COCO polygons have no holes.

        Args:
            tolerance: maximum deviation in pixels of a simplified outline; 0 keeps every corner.
        """
        if math.isinf(require_number(tolerance, "the tolerance")):
            raise DcrisError("the tolerance must be finite")
        # cv2 follows pixel centres, not borders. In the mask at twice the size, the centre of each
        # contour pixel lies on one side of an original pixel, which tells the border it belongs to.
        if self.box is None:
            return []
        left, top, width, height = self.box
        inside = self.mask[top : top + height, left : left + width].astype(np.uint8)
        doubled = np.repeat(np.repeat(inside, 2, axis=0), 2, axis=1)
        found, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outlines = [_remove_redundant_points((outline[:, 0] + 1) // 2 + (left, top)) for outline in found]
        if tolerance > 0:
            outlines = [cv2.approxPolyDP(outline.astype(np.int32), tolerance, True)[:, 0] for outline in outlines]
        return [[float(value) for value in outline.ravel()] for outline in outlines if len(outline) > 2]

    def cutout(self, image: ImageLike, *, crop: bool = True) -> Image.Image:
        """Return the object as an RGBA image that is transparent outside the mask.

        Args:
            image: the image of this prediction.
            crop: crop to the bounding box.

        Raises:
            DcrisError: the image has another size than the mask, or the mask is empty.
        """
        pixels = self._pixels_of(image)
        if self.box is None:
            raise DcrisError(f"the mask of {self.phrase!r} is empty, so there is nothing to cut out")
        cutout = Image.fromarray(np.dstack((pixels, self.mask.astype(np.uint8) * np.uint8(255))))
        return cutout.crop(self.box_xyxy) if crop else cutout

    def overlay(self, image: ImageLike, colour: Colour = COLOURS[0]) -> Image.Image:
        """Draw the mask on the image.

        Raises DcrisError if the image has another size than the mask.
        """
        pixels = self._pixels_of(image)
        try:
            valid = len(colour) == 3 and all(0 <= int(value) <= 255 for value in colour)
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise DcrisError(
                f"a colour must be red, green and blue from 0 to 255, such as (255, 122, 0), not {colour!r}"
            )
        return Image.fromarray(overlay(pixels, self.mask, colour))

    def _pixels_of(self, image: ImageLike) -> NDArray[np.uint8]:
        pixels = as_pixels(image)
        if pixels.shape[:2] != self.mask.shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, self.mask.shape)]
            raise DcrisError(
                f"the image is {sizes[0]} pixels and the mask {sizes[1]}; use the image of this prediction"
            )
        return pixels


def to_detections(predictions: Iterable[Prediction]) -> "supervision.Detections":
    """Convert predictions to supervision's Detections, for its annotators, trackers and data sets.

    Empty masks are omitted. `class_id` is the position of the prediction in the sequence,
    `data["class_name"]` its phrase.

    Raises:
        DcrisError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise DcrisError(f"supervision cannot be imported ({error}); install it: pip install supervision") from error
    if not isinstance(predictions, Iterable):
        raise DcrisError(f"predictions must be a list of Prediction, not {kind_of(predictions)}")
    every = [require(each, Prediction, "each prediction") for each in predictions]
    found = [(number, each) for number, each in enumerate(every) if each.box is not None]
    if not found:
        return supervision.Detections.empty()
    return supervision.Detections(
        xyxy=np.array([each.box_xyxy for _, each in found], np.float32),
        mask=np.stack([each.mask for _, each in found]),
        confidence=np.array([each.score for _, each in found], np.float32),
        class_id=np.array([number for number, _ in found]),
        data={"class_name": np.array([each.phrase for _, each in found])},
    )


def require_threshold(threshold: float) -> float:
    """Return the threshold. Raises DcrisError if it is not between 0 and 1."""
    given: Any = threshold  # callers may pass any type
    if not isinstance(given, Real) or not 0 < as_float(given) < 1:
        raise DcrisError(f"the threshold must be a number between 0 and 1, not {given!r}")
    return float(given)


def require_minima(min_score: float | None, min_area: int, presence: bool) -> tuple[float, int]:
    """Return both minima. Without a score, it is LEAST_PRESENCE for a model with a presence head,
    else 0.

    Raises DcrisError if the score is not in 0..1 or the area not a whole number from 0 to 2^53 - 1.
    """
    score: Any = min_score  # callers may pass any type
    if score is None:
        score = LEAST_PRESENCE if presence else 0.0
    area: Any = min_area
    if isinstance(score, bool) or not isinstance(score, Real) or not 0 <= as_float(score) <= 1:
        raise DcrisError(f"the minimum score must be a number from 0 to 1, not {score!r}")
    if isinstance(area, bool) or not isinstance(area, Integral) or not 0 <= int(area) < 1 << 53:
        raise DcrisError(f"the minimum area must be a whole number of pixels, from 0 to 2^53 - 1, not {area!r}")
    return float(score), int(area)


def long_phrase_warning(phrase: str, unread: str) -> str:
    """Return the warning for a phrase whose end the model does not read."""
    return f"{_short(phrase)} is longer than the model reads; its end is ignored: {_short(unread)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _mean_inside(probabilities: NDArray[np.float32]) -> float:
    """Return the mean of the probabilities above the protocol's own threshold; 0 if there are none.

    With a threshold that the caller chooses, the mean would rise with it.
    """
    inside = probabilities > Cris.threshold
    # Without a copy of the values.
    return float(probabilities.mean(dtype=np.float64, where=inside)) if inside.any() else 0.0


def _remove_redundant_points(outline: NDArray[Any]) -> NDArray[Any]:
    """Remove repeated points of a closed outline [N, 2], and points between collinear ones."""
    outline = outline[np.any(outline != np.roll(outline, 1, axis=0), axis=1)]
    before, after = outline - np.roll(outline, 1, axis=0), np.roll(outline, -1, axis=0) - outline
    bends = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    # A turn by 180 degrees is a corner, too: it encloses no area, but its point may join two parts
    # of the outline.
    turns = (before * after).sum(axis=1) < 0
    return np.asarray(outline[bends | turns])
