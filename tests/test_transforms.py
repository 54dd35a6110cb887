"""The letterbox compared with a direct implementation of CRIS's published formula."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcris.data.transforms import Letterbox
from dcris.evaluation.protocols import Cris

COLOUR = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))
sides = st.sampled_from([112, 224, 448])


def logits_of(probabilities):
    """[S, S] -> [1, 1, S, S]."""
    return torch.from_numpy(probabilities.astype(np.float32)).logit(1e-6)[None, None]


def _published(size, side):
    """The published formula: scale to fit, centre, affine map through three float32 corners; both
    directions.
    """
    height, width = size
    scale = min(side / height, side / width)
    new_h, new_w = height * scale, width * scale
    x, y = (side - new_w) / 2.0, (side - new_h) / 2.0
    there = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    here = np.array([[x, y], [new_w + x, y], [x, new_h + y]], np.float32)
    return cv2.getAffineTransform(there, here), cv2.getAffineTransform(here, there)


@given(sizes, sides, st.integers(0, 2**32 - 1))
@example((224, 224), 224, 0)  # nothing to scale
@settings(max_examples=40)
def test_every_pixel_is_that_of_the_published_formula(size, side, seed):
    """A difference of one pixel would change scores."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    mask = rng.integers(0, 2, size, np.uint8)
    forward, back = _published(size, side)
    box = Letterbox(size, side)
    assert np.array_equal(box.matrix(), forward)
    assert np.array_equal(box.inverse(), back)
    fitted = cv2.warpAffine(image, forward, (side, side), flags=cv2.INTER_CUBIC, borderValue=COLOUR)
    assert np.array_equal(box.image(image, COLOUR), fitted)
    fitted = cv2.warpAffine(mask * 255, forward, (side, side), flags=cv2.INTER_LINEAR, borderValue=0.0) / 255.0
    assert np.allclose(box.mask(mask), fitted, rtol=0, atol=1e-7)


@given(sizes, sides)
@settings(max_examples=60)
def test_the_inverse_undoes_the_transform(size, side):
    """A shift would cost accuracy at every border of a mask."""
    box = Letterbox(size, side)
    there, back = (np.vstack([matrix, [0, 0, 1]]) for matrix in (box.matrix(), box.inverse()))
    corners = np.array([[0, 0, 1], [size[1], 0, 1], [0, size[0], 1], [size[1], size[0], 1]], float).T
    assert np.allclose(back @ there @ corners, corners, rtol=1e-3, atol=max(size) * 1e-4)
    fitted = (there @ corners)[:2]
    assert fitted.min() > -1e-3
    assert fitted.max() < side + 1e-3
    assert np.isclose(np.ptp(fitted, axis=1).max(), side, atol=1e-3)
    assert np.allclose(fitted.mean(axis=1), side / 2, atol=1e-3)


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (333, 500), (448, 448), (100, 60), (1200, 900)])
def test_a_mask_comes_back_where_it_was(size):
    """The loss from the resampling to the square and back is small."""
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    mask = ((rows / size[0] - 0.4) ** 2 + (columns / size[1] - 0.6) ** 2 < 0.06).astype(np.uint8)
    box = Letterbox(size, 448)
    (restored,) = Cris().probabilities(logits_of(box.mask(mask)), [box])
    restored = restored.numpy() > 0.5
    overlap = np.logical_and(restored, mask).sum() / np.logical_or(restored, mask).sum()
    assert overlap > 0.98


def test_padding_has_its_colour_and_is_outside_the_image(tmp_path):
    image = Letterbox((100, 200), 64).image(np.full((100, 200, 3), 200, np.uint8), (10, 20, 30))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert (image[:15] == (10, 20, 30)).all()
    assert (image[50:] == (10, 20, 30)).all()
    assert (image[18:46, 2:62] == 200).all()


def test_values_stay_probabilities():
    """Bicubic sampling overshoots at edges: probabilities of 1.07 would be possible."""
    square = np.zeros((64, 64), np.float32)
    square[20:40, 20:40] = 1
    (restored,) = Cris().probabilities(logits_of(square), [Letterbox((200, 150), 64)])
    restored = restored.numpy()
    assert restored.dtype == np.float32
    assert restored.shape == (200, 150)
    assert (restored.min(), restored.max()) == (0, 1)
    mask = Letterbox((200, 150), 64).mask((np.arange(30_000).reshape(200, 150) % 7 == 0).astype(np.uint8))
    assert (mask.dtype, mask.shape) == (np.float32, (64, 64))
    assert mask.min() >= 0
    assert mask.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 5000), (5000, 1), (3, 40_000), (40_000, 2), (1, 65_535)])
def test_extreme_shapes_pass(size):
    """Very long images and a single pixel give the right shapes and finite values.

    cv2 4 refuses sides above 32,766.
    """
    box = Letterbox(size, 56)
    assert box.image(np.full((*size, 3), 99, np.uint8), COLOUR).shape == (56, 56, 3)
    assert np.isfinite(box.mask(np.ones(size, np.uint8))).all()
    (restored,) = Cris().probabilities(torch.zeros(1, 1, 32, 32), [box])
    assert restored.shape == size
    assert restored.isfinite().all()


def test_a_very_long_image_keeps_its_ends_apart():
    """Shrinking before the warp does not shift anything: the bright last tenth stays the last
    tenth.
    """
    image = np.zeros((500, 40_000, 3), np.uint8)
    image[:, 36_000:] = 255
    fitted = Letterbox((500, 40_000), 400).image(image, (0, 0, 0))
    assert np.flatnonzero(fitted[..., 0].max(axis=0) > 127).tolist() == list(range(360, 400))
    mask = Letterbox((500, 40_000), 400).mask(image[..., 0] // 255)
    assert np.flatnonzero(mask.max(axis=0) > 0.5).tolist() == list(range(360, 400))


def test_arrays_of_another_size_raise_value_error():
    box = Letterbox((10, 20), 14)
    for use in (
        lambda: box.image(np.zeros((20, 10, 3), np.uint8), COLOUR),
        lambda: box.mask(np.zeros((20, 10), np.uint8)),
    ):
        with pytest.raises(ValueError, match="but the"):
            use()
