import io
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris.utils.drawing import COLOURS, cell, contour_width, jpeg_bytes, mask_cell, mask_layer, overlay, png_bytes

GREEN = (0, 200, 0)
BLACK = (0, 0, 0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def box(height, width, top, left, bottom, right):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_overlay_tints_the_inside_and_leaves_what_is_far_alone():
    image, mask = noise(60, 80), box(60, 80, 20, 30, 40, 50)
    before = image.copy()
    shown = overlay(image, mask, GREEN)
    assert np.array_equal(image, before)
    assert shown.dtype == np.uint8 and shown.shape == image.shape
    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0  # one pixel of colour and one of black
    assert np.array_equal(shown[~near], image[~near])
    expected = np.rint(image[mask] * 0.55 + np.array(GREEN) * 0.45)
    assert np.abs(shown[mask] - expected).max() <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from(COLOURS))
@settings(max_examples=50)
def test_a_layer_over_the_image_is_the_overlay(height, width, seed, colour):
    """A browser that lays it over the image shows what `overlay` draws, up to rounding."""
    image, mask = noise(height, width, seed), np.random.default_rng(seed).random((height, width)) > 0.5
    layer = decode(png_bytes(mask_layer(mask, colour)))
    assert layer.shape == (height, width, 4)
    alpha = layer[..., 3:] / 255
    composed = layer[..., :3] * alpha + image * (1 - alpha)
    assert np.abs(composed - overlay(image, mask, colour)).max() <= 2.5


def test_contour_lies_just_outside():
    image = np.full((40, 40, 3), 90, np.uint8)
    shown = overlay(image, box(40, 40, 10, 10, 20, 20), GREEN)
    row = shown[15]
    assert tuple(row[9]) == GREEN and tuple(row[20]) == GREEN
    assert tuple(row[8]) == BLACK and tuple(row[21]) == BLACK
    assert tuple(row[7]) == (90, 90, 90) and tuple(row[22]) == (90, 90, 90)


def test_a_hole_has_a_contour_too():
    mask = box(60, 60, 10, 10, 50, 50)
    mask[20:40, 20:40] = False
    shown = overlay(np.zeros((60, 60, 3), np.uint8), mask, GREEN)
    assert tuple(shown[30, 20]) == GREEN and tuple(shown[30, 30]) == (0, 0, 0)


def test_contour_grows_with_the_picture():
    assert contour_width(1, 1) == 1
    assert contour_width(112, 112) == 1
    assert contour_width(480, 640) == 3
    assert contour_width(9_000, 12_000) > 40
    shown = overlay(np.full((480, 640, 3), 9, np.uint8), box(480, 640, 200, 200, 300, 300), GREEN)
    assert (shown[250, 100:200] == GREEN).all(axis=1).sum() == 3
    assert (shown[250, 100:200] == BLACK).all(axis=1).sum() == 2


def test_empty_and_full_masks():
    image = noise(30, 40)
    empty = overlay(image, np.zeros((30, 40), bool))
    assert np.array_equal(empty, image) and not np.shares_memory(empty, image)
    full = overlay(image, np.ones((30, 40), bool), GREEN)
    assert np.abs(full - np.rint(image * 0.55 + np.array(GREEN) * 0.45)).max() <= 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60)
def test_any_shape_and_mask(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) > 0.8
    image = noise(height, width, seed)
    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0
    shown = overlay(image, mask, GREEN)
    assert np.array_equal(shown[~near], image[~near])


def test_views_and_read_only_pictures():
    image, mask = noise(50, 60), box(50, 60, 10, 10, 30, 30)
    image.setflags(write=False)
    flipped = overlay(image[:, ::-1], mask[:, ::-1], GREEN)
    assert np.array_equal(flipped[:, ::-1], overlay(image, mask, GREEN))


def test_a_huge_photograph_takes_little_memory_beside_its_copy():
    height, width = 3_000, 4_000
    image = np.zeros((height, width, 3), np.uint8)
    mask = np.ones((height, width), bool)
    mask[0, 0] = False
    tracemalloc.start()
    try:
        shown = overlay(image, mask)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shown[1_500, 2_000].any()
    assert peak < 3 * image.nbytes  # in float64, one copy alone would be eight times the picture


def test_overlay_refuses_what_does_not_fit():
    image = noise(10, 12)
    for wrong in (np.zeros((12, 10), bool), np.zeros((10, 12), np.uint8)):
        with pytest.raises(ValueError, match="mask must be bool"):
            overlay(image, wrong)
    with pytest.raises(ValueError, match="an image must be"):
        overlay(image.astype(np.float32), np.zeros((10, 12), bool))


def test_colours_are_far_apart():
    lab = cv2.cvtColor(np.array([COLOURS], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)
    assert len(COLOURS) == 20
    assert distances[~np.eye(len(COLOURS), dtype=bool)].min() > 36


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((112, 112), (448, 448)),
        ((1, 1), (480, 480)),
        ((300, 200), (300, 200)),
        ((900, 1600), (270, 480)),
        ((1, 12_000), (1, 480)),
        ((100, 1), (400, 4)),
    ],
)
def test_cells(shape, expected):
    image, mask = noise(*shape), np.ones(shape, bool)
    assert cell(image, 480).shape == (*expected, 3)
    assert mask_cell(mask, 480).shape == expected
    assert mask_cell(mask, 480).all()


def test_small_pictures_keep_their_pixels():
    image = noise(3, 5)
    large = cell(image, 10)
    assert np.array_equal(large[::2, ::2], image) and np.array_equal(large[1::2, 1::2], image)


def test_large_pictures_are_averaged():
    checks = np.indices((400, 400)).sum(axis=0) % 2 * 200
    small = cell(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8), 100)
    assert (small == 100).all()


@pytest.mark.parametrize("shape", [(50, 70), (700, 900), (1000, 333)])
def test_mask_and_picture_stay_in_line(shape):
    mask = box(*shape, shape[0] // 4, shape[1] // 3, shape[0] // 2, shape[1] // 2)
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * np.uint8(255)
    small = mask_cell(mask, 200)
    assert np.array_equal(small, cell(image, 200)[..., 0] >= 128)
    assert not np.array_equal(np.roll(small, 1, axis=1), small)


def test_a_tiny_object_does_not_vanish():
    mask = box(2_000, 3_000, 1_200, 600, 1_201, 601)
    assert np.argwhere(mask_cell(mask, 300)).tolist() == [[120, 60]]
    assert not mask_cell(np.zeros((2_000, 3_000), bool), 300).any()


def test_cell_refuses_nothing():
    with pytest.raises(ValueError, match="cannot make a cell"):
        cell(np.zeros((0, 4, 3), np.uint8), 10)


def test_png_is_exact():
    image, mask = noise(17, 23), box(17, 23, 2, 3, 9, 20)
    assert np.array_equal(decode(png_bytes(image)), image)
    assert np.array_equal(decode(png_bytes(image[..., 0])), image[..., 0])
    assert np.array_equal(decode(png_bytes(mask)), mask * np.uint8(255))
    assert np.array_equal(decode(png_bytes(mask[:, ::-1])), mask[:, ::-1] * np.uint8(255))


def test_jpeg_keeps_colours():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = (220, 30, 30)
    assert np.abs(decode(jpeg_bytes(image)).astype(int) - image).max() < 30


def test_encoders_refuse_what_is_no_picture():
    for wrong in (np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), np.zeros((3, 3, 3), bool), np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="as an image"):
            png_bytes(wrong)
    with pytest.raises(ValueError, match="without pixels"):
        png_bytes(np.zeros((0, 3), bool))
    with pytest.raises(ValueError, match="65535"):
        jpeg_bytes(np.zeros((1, 70_000, 3), np.uint8))
