"""Metrics: papers are compared by them, so one pixel too many matters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcris.evaluation.metrics import PRECISION_THRESHOLDS, Overlap, overlap, summarise

KEYS = ["miou", "oiou", "prec@0.5", "prec@0.6", "prec@0.7", "prec@0.8", "prec@0.9"]
OVERLAPS = st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)).map(lambda pair: Overlap(min(pair), max(pair)))


def grid(*rows: str) -> np.ndarray:
    """Return a mask drawn as text, where # is the object."""
    return np.array([[character == "#" for character in row] for row in rows])


def test_overlap_counts_pixels() -> None:
    """Three pixels shared, five predicted, four true."""
    prediction = grid("##..", "##..", "#...")
    truth = grid("##..", "#...", "...#")
    assert overlap(prediction, truth) == Overlap(3, 6)
    assert overlap(truth, prediction) == Overlap(3, 6)
    assert Overlap(3, 6).iou == 0.5


def test_counts_do_not_overflow() -> None:
    """Unions of large images and sums over a split stay exact."""
    mask = np.ones((20_000, 5_000), bool)
    assert overlap(mask, mask) == Overlap(10**8, 10**8)
    assert summarise([Overlap(2**40, 2**40)] * 3)["oiou"] == 100.0


def test_masks_of_different_shapes_raise() -> None:
    """numpy would broadcast a thin mask over a wide one and return a meaningless score."""
    with pytest.raises(ValueError, match=r"\(1, 4\).*\(3, 4\)"):
        overlap(np.ones((1, 4), bool), np.ones((3, 4), bool))


def test_an_empty_prediction_scores_zero() -> None:
    """Two empty masks score 0, not NaN or 1, so that empty predictions gain nothing. Their oIoU is
    0 / 0."""
    nothing, something = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    assert overlap(nothing, something).iou == 0
    assert overlap(nothing, nothing).iou == 0
    assert summarise([overlap(nothing, nothing)]) == dict.fromkeys(KEYS, 0.0) | {"oiou": None}


def test_scores_by_hand() -> None:
    """IoU 1/2, 3/4 and 0 over unions of 2, 100 and 10 pixels: mIoU and oIoU differ."""
    scores = summarise([Overlap(1, 2), Overlap(75, 100), Overlap(0, 10)])
    assert list(scores) == KEYS
    assert scores["miou"] == pytest.approx(100 * (0.5 + 0.75 + 0) / 3)
    assert scores["oiou"] == pytest.approx(100 * 76 / 112)
    assert [scores[f"prec@{t}"] for t in PRECISION_THRESHOLDS] == pytest.approx([100 / 3, 100 / 3, 100 / 3, 0, 0])


@pytest.mark.parametrize("threshold", PRECISION_THRESHOLDS)
def test_precision_excludes_equality(threshold: float) -> None:
    """Precision is strict, as in the CRIS family:

    0 at an IoU of exactly t, 100 with one more pixel.
    """
    shared = round(threshold * 10_000)
    key = f"prec@{threshold}"
    assert summarise([Overlap(shared, 10_000)])[key] == 0
    assert summarise([Overlap(shared + 1, 10_000)])[key] == 100


def test_no_expressions_give_no_scores() -> None:
    """The mean of nothing is NaN, which is not valid JSON, and 0 would be a bad score."""
    assert summarise([]) == dict.fromkeys(KEYS)


@given(st.lists(OVERLAPS, min_size=1, max_size=30), st.randoms())
def test_order_and_grouping_do_not_matter(items: list[Overlap], random: object) -> None:
    """Scores do not depend on how images are divided among ranks."""
    scores = summarise(items)
    assert all(0 <= value <= 100 + 1e-9 and math.isfinite(value) for value in scores.values() if value is not None)
    mixed = list(items)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert summarise(mixed) == pytest.approx(scores, abs=1e-9)
    assert summarise(iter(mixed)) == pytest.approx(scores, abs=1e-9)  # a generator can be read once

    cut = len(mixed) // 2
    first, second = (
        {key: value or 0.0 for key, value in summarise(some).items()} for some in (mixed[:cut], mixed[cut:])
    )
    for key in ("miou", *(f"prec@{t}" for t in PRECISION_THRESHOLDS)):
        merged = (cut * first[key] + (len(mixed) - cut) * second[key]) / len(mixed)
        assert merged == pytest.approx(scores[key], abs=1e-9)
    unions = sum(item.union for item in items)
    if unions:
        assert scores["oiou"] == pytest.approx(100 * sum(item.intersection for item in items) / unions)


@given(st.lists(OVERLAPS, min_size=1, max_size=30))
def test_precision_falls_with_its_threshold(items: list[Overlap]) -> None:
    """Repeating a set does not change its scores."""
    scores = summarise(items)
    precisions = [scores[f"prec@{t}"] for t in PRECISION_THRESHOLDS]
    assert precisions == sorted(precisions, reverse=True)
    assert summarise([*items, *items]) == pytest.approx(scores, abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_counts_against_sets_of_pixels(height: int, width: int, seed: int) -> None:
    """Compare with the definition on sets of pixels, for masks of any shape and memory layout."""
    source = np.random.default_rng(seed)
    prediction, truth = source.random((2, height, width)) < source.random((2, 1, 1))
    ours, theirs = (set(zip(*np.nonzero(mask), strict=True)) for mask in (prediction, truth))
    expected = Overlap(len(ours & theirs), len(ours | theirs))
    assert overlap(prediction, truth) == expected
    assert overlap(np.asfortranarray(prediction), truth[::-1][::-1]) == expected
