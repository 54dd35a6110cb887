"""Conversions of a prediction to other formats lose nothing of the mask."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco
from scipy import ndimage

from dcris import Prediction, to_detections
from dcris.errors import DcrisError

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def make_prediction(mask: np.ndarray, phrase: str = "cup") -> Prediction:
    return Prediction.decide(phrase, np.where(mask, np.float32(0.9), np.float32(0.1)), 0.35)


def disc() -> np.ndarray:
    rows, columns = np.mgrid[:40, :60]
    return (rows - 18) ** 2 + (columns - 30) ** 2 < 150


@given(MASKS)
@settings(max_examples=300)
def test_polygons_are_the_mask_with_its_holes_filled(mask: np.ndarray) -> None:
    """pycocotools gives the same mask: half a pixel lost at each border is 10% of a small
    object."""
    polygons = make_prediction(mask).polygons()
    if not mask.any():
        assert polygons == []
        return
    found = coco.decode(coco.merge(coco.frPyObjects(polygons, *mask.shape)))
    np.testing.assert_array_equal(found.astype(bool), ndimage.binary_fill_holes(mask))


def test_simplified_polygons_stay_close() -> None:
    """A tolerance removes corners, not the object."""
    prediction = make_prediction(disc())
    exact, simple = prediction.polygons()[0], prediction.polygons(tolerance=1.5)[0]
    assert 6 <= len(simple) < len(exact) / 3
    found = coco.decode(coco.merge(coco.frPyObjects([simple], 40, 60))).astype(bool)
    assert (found & disc()).sum() / (found | disc()).sum() > 0.9
    for wrong in (float("inf"), float("nan"), -1):
        with pytest.raises(DcrisError, match="the tolerance must be"):
            prediction.polygons(tolerance=wrong)


@given(MASKS, st.integers(1, 6))
@settings(max_examples=200)
def test_instances_are_the_connected_components(mask: np.ndarray, min_area: int) -> None:
    """Who counts the objects of "both cups" needs each pixel in exactly one instance, and its box,
    area and score to be those of that instance."""
    probabilities = np.where(mask, 0.5 + np.arange(mask.size).reshape(mask.shape) / 400, 0.1).astype(np.float32)
    prediction = Prediction.decide("cups", probabilities, 0.35)
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    expected = {}
    for label, window in enumerate(ndimage.find_objects(labels), 1):
        pixels = labels == label
        if pixels.sum() >= min_area:
            rows, columns = window
            box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
            expected[pixels.tobytes()] = (box, pixels.sum(), pytest.approx(probabilities[pixels].mean()))
    found = prediction.instances(min_area)
    assert [each.area for each in found] == sorted((each.area for each in found), reverse=True)
    whole = {}
    for each in found:
        x, y, width, height = each.box
        pixels = np.zeros_like(mask)
        pixels[y : y + height, x : x + width] = each.mask
        whole[pixels.tobytes()] = (each.box, each.area, each.score)
    assert whole == expected
    assert len(prediction.instances()) == count


def test_instances_without_probabilities_have_the_score_of_the_prediction() -> None:
    """Probabilities are kept on request only; nobody may read a made-up score."""
    prediction = Prediction.decide("disc", np.where(disc(), np.float32(0.75), np.float32(0)), 0.35, keep=False)
    (only,) = prediction.instances(min_area=10)
    assert (only.score, only.box, only.area) == (prediction.score, prediction.box, disc().sum())
    with pytest.raises(DcrisError, match="the minimum area must be"):
        prediction.instances(min_area=-1)


@given(MASKS)
@settings(max_examples=100)
def test_run_lengths_and_coco_entries(mask: np.ndarray) -> None:
    """pycocotools decodes the JSON to the mask."""
    entry = json.loads(json.dumps(make_prediction(mask).to_coco(image_id=7, category_id=3)))
    np.testing.assert_array_equal(coco.decode(entry["segmentation"]).astype(bool), mask)
    assert (entry["image_id"], entry["category_id"], entry["phrase"]) == (7, 3, "cup")
    assert entry["bbox"] == coco.toBbox(entry["segmentation"]).tolist()
    assert entry["score"] == (pytest.approx(0.9) if mask.any() else 0)


def test_another_threshold_is_another_decision() -> None:
    """Equal to a prediction at that threshold."""
    picture = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    prediction = Prediction.decide("cup", picture, 0.35)
    for threshold in (0.1, 0.5, 0.99):
        moved = prediction.with_threshold(threshold)
        np.testing.assert_array_equal(moved.mask, picture > threshold)
        assert moved.score == prediction.score == pytest.approx(picture[picture > 0.35].mean())
        assert moved.probabilities is not None
    assert prediction.with_threshold(0.35).box == prediction.box
    for threshold in (0, 1, float("nan")):
        with pytest.raises(DcrisError, match="between 0 and 1"):
            prediction.with_threshold(threshold)


def test_cutouts_and_overlays() -> None:
    """The pixels of the object are unchanged; in the overlay, only the mask is coloured."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    prediction = make_prediction(disc())
    whole, cropped = prediction.cutout(pixels, crop=False), prediction.cutout(Image.fromarray(pixels))
    assert (whole.mode, whole.size) == ("RGBA", (60, 40))
    np.testing.assert_array_equal(np.array(whole)[..., 3] == 255, disc())
    np.testing.assert_array_equal(np.array(whole)[disc()][:, :3], pixels[disc()])
    left, top, width, height = prediction.box or (0, 0, 0, 0)
    np.testing.assert_array_equal(np.array(cropped), np.array(whole)[top : top + height, left : left + width])
    shown = np.array(prediction.overlay(pixels))
    far = ~ndimage.binary_dilation(disc(), iterations=4)
    np.testing.assert_array_equal(shown[far], pixels[far])
    assert (shown[disc()] != pixels[disc()]).any()
    with pytest.raises(DcrisError, match="50 x 40 pixels and the mask 60 x 40"):
        prediction.overlay(pixels[:, :50])
    with pytest.raises(DcrisError, match="from 0 to 255"):
        prediction.overlay(pixels, (0, 0, math.inf))  # type: ignore[arg-type]
    with pytest.raises(DcrisError, match="nothing to cut out"):
        make_prediction(np.zeros((40, 60), bool)).cutout(pixels)


def test_conversion_to_supervision() -> None:
    """Boxes are corners, and empty masks are omitted."""
    pytest.importorskip("supervision")
    answers = [
        make_prediction(disc(), "disc"),
        make_prediction(np.zeros((40, 60), bool), "none"),
        make_prediction(~disc(), "rest"),
    ]
    found = to_detections(answers)
    assert found.xyxy[0].tolist() == [18, 6, 43, 31]
    assert found.xyxy[1].tolist() == [0, 0, 60, 40]
    assert found.class_id.tolist() == [0, 2]
    assert found.data["class_name"].tolist() == ["disc", "rest"]
    np.testing.assert_allclose(found.confidence, [0.9, 0.9], rtol=1e-5)
    np.testing.assert_array_equal(found.mask[0], disc())
    assert len(to_detections([answers[1]])) == 0


def test_a_missing_supervision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """supervision is not a dependency."""
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(DcrisError, match="pip install supervision"):
        to_detections([])
