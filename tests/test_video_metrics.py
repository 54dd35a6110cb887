"""J and F decide which of two video methods a paper calls the better one, and are compared with
figures of other programs, so they must equal the official definition, not be near it."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcris.evaluation.video_metrics import (
    Contour,
    best_match,
    compare_labels,
    compare_masks,
    contour_accuracy,
    contour_pixels,
    decay,
    recall,
    region_similarity,
    tolerance,
)
from marks import slow_except
from video_reference import made_masks, slow_clip, slow_contour, slow_f, slow_j, slow_match

SIZES = [(1, 1), (1, 9), (7, 1), (9, 13), (48, 64), (75, 100), (76, 100), (150, 200), (30, 300)]
"""The tolerance is 1 pixel up to a diagonal of 125 (75 x 100), then 2, then 3."""


def clip_scores(predictions, truths):
    return np.mean([compare_masks(*pair) for pair in zip(predictions, truths, strict=True)], axis=0)


@pytest.mark.parametrize(
    ("height", "width"), slow_except(SIZES, (1, 1), (1, 9), (7, 1), (9, 13), (48, 64), (75, 100), (76, 100))
)
def test_j_and_f_equal_their_definition(height, width):
    random = np.random.default_rng(height + width)
    for _ in range(4):
        predictions, truths = (made_masks(random, (height, width), 5) for _ in range(2))
        assert clip_scores(predictions, truths) == pytest.approx(slow_clip(predictions, truths), abs=1e-12)


@given(seed=st.integers(0, 2**32), height=st.integers(1, 40), width=st.integers(1, 40))
def test_j_and_f_equal_their_definition_for_any_mask(seed, height, width):
    random = np.random.default_rng(seed)
    one, other = made_masks(random, (height, width), 2)
    assert compare_masks(one, other) == pytest.approx((slow_j(one, other), slow_f(one, other)), abs=1e-12)
    assert [*zip(*map(np.ndarray.tolist, np.nonzero(contour_pixels(one))), strict=True)] == slow_contour(one)


@given(seed=st.integers(0, 2**32), height=st.integers(1, 40), width=st.integers(1, 40))
def test_scores_of_two_masks_do_not_depend_on_which_is_the_truth(seed, height, width):
    one, other = made_masks(np.random.default_rng(seed), (height, width), 2)
    assert compare_masks(one, other) == pytest.approx(compare_masks(other, one))
    assert compare_masks(one, one).tolist() == [1, 1]


@given(seed=st.integers(0, 2**32), top=st.integers(1, 8), left=st.integers(1, 8))
def test_scores_do_not_depend_on_where_in_the_frame_the_object_is(seed, top, left):
    random = np.random.default_rng(seed)
    pair = made_masks(random, (20, 24), 2)
    # The window in which contours are compared must not cut off what is near them.
    places = [(1, 1), (top, left), (30 - 21, 34 - 25)]
    scores = []
    for y, x in places:
        frames = np.zeros((2, 30, 34), bool)
        frames[:, y : y + 20, x : x + 24] = pair
        scores.append(compare_masks(*frames).tolist())
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0] == pytest.approx(scores[2])


def test_limits_of_the_definition():
    empty, full, dot = np.zeros((20, 30), bool), np.ones((20, 30), bool), np.zeros((20, 30), bool)
    dot[7, 9] = True
    assert compare_masks(empty, empty).tolist() == [1, 1]  # nothing there, and nothing said
    assert compare_masks(full, full).tolist() == [1, 1]
    assert compare_masks(dot, empty).tolist() == compare_masks(empty, dot).tolist() == [0, 0]
    # The authors' contour does not have the border of the frame: neither mask has a contour.
    assert compare_masks(full, empty).tolist() == [0, 1]
    assert contour_pixels(dot).nonzero()[0].tolist() == [6, 6, 7, 7]  # half a pixel towards the origin


def test_contours_match_up_to_the_tolerance_and_not_beyond():
    # 480 x 854: 0.008 of a diagonal of 979.7 is 7.8, so 8 pixels match and 9 do not.
    assert tolerance((480, 854)) == 8
    truth = np.zeros((480, 854), bool)
    truth[:, 400:] = True
    for shift, expected in ((8, 1.0), (9, 0.0)):
        moved = np.zeros_like(truth)
        moved[:, 400 + shift :] = True
        assert contour_accuracy(Contour.of(moved), Contour.of(truth)) == expected
    # Distance is Euclidean: (6, 6) is 8.49 away.
    dots = np.zeros((2, 480, 854), bool)
    dots[0, 100, 100] = dots[1, 106, 106] = True
    assert compare_masks(*dots)[1] == pytest.approx(slow_f(*dots)) != 1


def test_masks_of_another_size_are_an_error():
    with pytest.raises(ValueError, match="shape"):
        region_similarity(np.zeros((4, 5), bool), np.zeros((5, 4), bool))
    with pytest.raises(ValueError, match="shape"):
        compare_labels(np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.uint8), (1, 1))


@given(seed=st.integers(0, 2**32), predicted=st.integers(0, 4), true=st.integers(1, 3))
def test_labels_are_compared_like_their_masks(seed, predicted, true):
    random = np.random.default_rng(seed)
    labels = [np.zeros((24, 31), np.uint8) for _ in range(2)]
    for each, most in zip(labels, (predicted + 1, true + 1), strict=True):
        for label in range(1, most + 1):  # one more than counts, which is background
            each[made_masks(random, each.shape, 1)[0]] = label
    found = compare_labels(*labels, (predicted, true))
    assert found.shape == (predicted, true, 2)
    for one in range(predicted):
        for other in range(true):
            expected = compare_masks(labels[0] == one + 1, labels[1] == other + 1)
            assert found[one, other] == pytest.approx(expected)


@given(seed=st.integers(0, 2**32), columns=st.integers(1, 4), more=st.integers(0, 2), whole=st.booleans())
def test_the_best_match_is_the_best_of_all_ways(seed, columns, more, whole):
    random = np.random.default_rng(seed)
    gains = random.random((columns + more, columns))
    if whole:
        gains = np.round(3 * gains)  # with ties
    rows = best_match(gains)
    assert len({*rows.tolist()}) == columns
    assert gains[rows, np.arange(columns)].sum() == pytest.approx(slow_match(gains))


def test_the_best_match_of_many_proposals_equals_scipy():
    scipy = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(0)
    for columns in (1, 5, 12, 20):
        gains = random.random((20, columns))
        expected = scipy.linear_sum_assignment(gains, maximize=True)
        assert gains[best_match(gains), np.arange(columns)].sum() == pytest.approx(gains[expected].sum())
    with pytest.raises(ValueError, match="3 columns"):
        best_match(np.zeros((2, 3)))


def test_recall_and_decay():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert recall(values) == 5 / 8  # 0.5 is not recalled
    # Bounds of the quarters of frames 1 to 8: 1, 2.75, 4.5, 6.25, 8, rounded to 1, 3, 5, 6, 8.
    assert decay(values) == pytest.approx(np.mean([1.0, 0.9, 0.8]) - np.mean([0.5, 0.4, 0.3]))
    assert decay(np.array([0.7])) == 0
    assert decay(np.array([1.0, 0.2])) == pytest.approx(0.8)
    # The authors' 8 bits begin again at frame 257; here, quarters of a long video are quarters.
    assert decay(np.repeat([1.0, 0.5, 0.5, 0.25], 250)) == pytest.approx(0.75, abs=0.01)


@pytest.mark.slow
def test_a_clip_of_60_frames_takes_less_than_20_seconds():
    y, x = np.mgrid[:480, :854]

    def frame(number, shift):
        labels = np.zeros((480, 854), np.uint8)
        for each in range(4):
            labels[((y - 240 - shift) / 150) ** 2 + ((x - 110 - 210 * each - number) / 95) ** 2 <= 1] = each + 1
        return labels

    clip = [(frame(number, 6), frame(number, 0)) for number in range(60)]
    begin = time.process_time()
    scores = np.mean([compare_labels(*pair, (4, 4)) for pair in clip], axis=0)
    took = time.process_time() - begin
    assert scores[range(4), range(4), 0] == pytest.approx(np.full(4, 0.95), abs=0.03)
    assert took < 20, f"{took:.1f} s"
