"""The picture with all masks and its legend."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageDraw

from dcris.inference.prediction import Prediction
from dcris.utils.annotate import Annotation, _free_place, _overlap, annotate, colour_of
from dcris.utils.drawing import COLOURS, contrasting, overlay
from test_drawing import box, noise


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_every_found_phrase_has_its_colour_on_the_image_and_in_the_legend() -> None:
    """A person must see which mask belongs to which phrase, and which phrase has none."""
    image = np.full((300, 400, 3), 200, np.uint8)
    masks = [box(300, 400, 20, 20, 100, 100), np.zeros((300, 400), bool), box(300, 400, 150, 200, 280, 390)]
    labels = ("93%", "not found (12%)", "40%")
    shown = annotate(image, [Annotation(f"phrase {n}", labels[n], mask) for n, mask in enumerate(masks)])
    picture, legend = shown[:300], shown[300:]
    assert shown.shape[1] == 400
    for number in range(3):
        found = number != 1
        assert has(picture, colour_of(number)) == found
        assert has(legend, colour_of(number)) == found
    near = np.logical_or.reduce([cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))) > 0 for mask in masks])
    np.testing.assert_array_equal(picture[~near], image[~near])
    rows = np.flatnonzero((legend != 255).any(axis=(1, 2)))
    middle = legend[rows[0] : rows[-1]][(rows[-1] - rows[0]) // 3 : -((rows[-1] - rows[0]) // 3)]
    assert middle.min() >= 100, "what was not found is grey"


def test_words_and_labels_are_drawn() -> None:
    """Another phrase or score is another legend; the picture of the masks is the same."""
    image, mask = noise(300, 400), box(300, 400, 50, 50, 200, 200)
    pictures = [
        annotate(image, [Annotation(phrase, label, mask)])
        for phrase, label in (("left cup", "93%"), ("left cap", "93%"), ("left cup", "94%"))
    ]
    assert all(np.array_equal(pictures[0][:300], other[:300]) for other in pictures)
    assert not any(np.array_equal(pictures[0][300:], other[300:]) for other in pictures[1:])


def test_numbers_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is photo.0-cup.mask.png; in the picture its mask was number 1."""
    drawn: list[str] = []
    text = ImageDraw.ImageDraw.text

    def recorded(self: ImageDraw.ImageDraw, xy: object, words: str, *args: object, **options: object) -> None:
        drawn.append(words)
        text(self, xy, words, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    masks = [box(300, 400, 20, 20, 100, 100), box(300, 400, 150, 200, 280, 390)]
    annotate(np.zeros((300, 400, 3), np.uint8), [Annotation("", "", mask) for mask in masks])
    assert sorted(each for each in drawn if each) == ["0", "0", "1", "1"]


def test_one_mask_is_the_overlay() -> None:
    """Without a second mask there is no number to hide the object."""
    image, mask = noise(300, 400), box(300, 400, 50, 50, 200, 200)
    np.testing.assert_array_equal(annotate(image, [Annotation("cup", "93%", mask)])[:300], overlay(image, mask))


def test_a_small_object_on_a_large_one_stays_visible() -> None:
    """Whatever the order of the phrases."""
    image = np.full((300, 400, 3), 200, np.uint8)
    large, small = box(300, 400, 0, 0, 300, 400), box(300, 400, 20, 20, 60, 60)
    for masks in ((large, small), (small, large)):
        shown = annotate(image, [Annotation("", "", mask) for mask in masks])[:300]
        outline = colour_of(0 if masks[0] is small else 1)
        assert (shown[19:61, 19:61] == outline).all(axis=-1).sum() >= 4 * 40


@given(
    shape=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    phrases=st.lists(st.text(max_size=80), max_size=5),
    seed=st.integers(0, 9),
)
@settings(max_examples=30)
def test_any_image_and_phrases(shape: tuple[int, int], phrases: list[str], seed: int) -> None:
    """A strip of one pixel, any text, no phrase at all."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*shape, 3), np.uint8)
    before = image.copy()
    shown = annotate(image, [Annotation(each, "5%", random.random(shape) < 0.02) for each in phrases])
    assert shown.dtype == np.uint8 and shown.ndim == 3
    assert max(shape) <= max(shown.shape[1], shown.shape[0])
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(("side", "width"), [(56, 448), (240, 480), (300, 300), (3000, 2048)])
def test_sizes(side: int, width: int) -> None:
    """Text needs room, and a picture to look at need not be as large as a photograph."""
    image = np.zeros((side // 2, side, 3), np.uint8)
    assert annotate(image, [Annotation("cup", "5%", np.zeros(image.shape[:2], bool))]).shape[1] == width


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 79)), min_size=1, max_size=6))
def test_numbers_do_not_cover_each_other(middles: list[tuple[int, int]]) -> None:
    """Two phrases may mean the same object: both numbers are readable, inside the picture."""
    placed: list[tuple[int, int, int, int]] = []
    for middle in middles:
        placed.append(_free_place(middle, (12, 10), placed, (100, 80)))
    for number, one in enumerate(placed):
        assert 0 <= one[0] < one[2] <= 100 and 0 <= one[1] < one[3] <= 80
        assert not any(_overlap(one, other) for other in placed[:number])


def luminance(colour: tuple[int, ...]) -> float:
    """WCAG 2's relative luminance, as its definition is written."""
    channels = []
    for value in colour:
        share = value / 255
        channels.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_mask_is_visible_on_any_object(colour: tuple[int, int, int]) -> None:
    """On an object and a background of its own colour, of white and of black."""
    assert contrast(colour, contrasting(colour)) >= 3
    for background in (*COLOURS, (255, 255, 255), (0, 0, 0), (128, 128, 128)):
        image = np.empty((60, 60, 3), np.uint8)
        image[:] = background
        shown = overlay(image, box(60, 60, 20, 20, 40, 40), colour)
        ring = {tuple(int(value) for value in pixel) for pixel in shown[30, 15:20]}
        assert max(contrast(pixel, background) for pixel in ring) >= 1.7, background


def test_the_label_of_a_prediction() -> None:
    """As on the page: the score, or that it is not there and how sure the model is."""
    one, none = np.full((2, 2), 0.9, np.float32), np.full((2, 2), 0.1, np.float32)
    assert Prediction.decide("cup", one, 0.5).verdict == "90%"
    assert Prediction.decide("cup", one, 0.5, present=0.934).verdict == "93%"
    assert Prediction.decide("cup", one, 0.5, present=0.12).verdict == "not found (12%)"
    assert Prediction.decide("cup", none, 0.5, present=0.8).verdict == "nothing found"
    assert Prediction.decide("cup", none, 0.5).verdict == "nothing found"
    assert Prediction.decide("cup", one, 0.5, present=0.9, min_area=5).verdict == "nothing found"
