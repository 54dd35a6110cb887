"""Masks compared with pycocotools, the reference implementation, and malformed masks."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from dcris.data import masks as masks_module
from dcris.data.images import read_image
from dcris.data.masks import decode_mask, encode_mask, mask_area, mask_box, validate_segmentation
from dcris.errors import DcrisError
from dcris.types import SoftMask


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
    return (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)


@given(masks())
@settings(max_examples=60)
def test_every_mask_survives_compression_and_pycocotools_agrees(mask):
    """Predictions are written in this form, and other programs read the same mask."""
    encoded = encode_mask(mask)
    assert json.loads(json.dumps(encoded)) == encoded
    assert np.array_equal(decode_mask(encoded, mask.shape), mask)
    assert np.array_equal(coco.decode(encoded), mask)
    assert mask_area(encoded, mask.shape) == mask.sum()
    as_bytes = {"size": mask.shape, "counts": encoded["counts"].encode()}
    assert np.array_equal(decode_mask(as_bytes, mask.shape), mask)


@given(masks())
@settings(max_examples=40)
def test_plain_run_lengths_give_the_same_mask(mask):
    """COCO's crowd annotations are uncompressed, column by column."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    counts = [0, *runs] if flat[0] else runs
    decoded = decode_mask({"size": list(mask.shape), "counts": counts}, mask.shape)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, mask)


@given(masks(), st.sampled_from(["run lengths", "polygons", "image file"]))
@settings(max_examples=60)
def test_the_area_is_that_of_the_decoded_mask(tmp_path_factory, mask, form):
    """Scores by object size use the area of the mask that is scored."""
    segmentation = encode_mask(mask)
    if form == "polygons":
        height, width = mask.shape
        segmentation = [[0.0, 0.0, width, 1.5, 0.3 * width, height], [0.0, 0.0, width / 2, 0.0, width / 2, height]]
    elif form == "image file":
        segmentation = tmp_path_factory.mktemp("mask") / "mask.png"
        Image.fromarray(mask).save(segmentation)
    assert mask_area(segmentation, mask.shape) == decode_mask(segmentation, mask.shape).sum()


def test_a_large_mask_has_long_runs(tmp_path):
    """Runs above 2**20 need more characters than those of any COCO image."""
    mask = np.zeros((3000, 4000), np.uint8)
    mask[100:2900, 3000:3010] = 1
    assert np.array_equal(decode_mask(encode_mask(mask), mask.shape), mask)


def test_a_polygon_fills_the_pixels_it_covers():
    mask = decode_mask([[2, 3, 12, 3, 12, 9, 2, 9]], (30, 40))
    expected = np.zeros((30, 40), np.uint8)
    expected[3:9, 2:12] = 1
    assert np.array_equal(mask, expected)


def test_overlapping_polygons_are_a_union():
    """A sum would be 2 where they overlap."""
    left, right = [0, 0, 20, 0, 20, 10, 0, 10], [10, 0, 30, 0, 30, 10, 10, 10]
    mask = decode_mask([left, right], (10, 40))
    assert mask.max() == 1
    assert mask.sum() == mask_area([left, right], (10, 40)) == 300


def test_the_mask_is_a_plain_writable_array():
    """torch.from_numpy warns about read-only arrays."""
    for segmentation in ([[0, 0, 4, 0, 4, 4]], {"size": [5, 6], "counts": [3, 4, 23]}):
        mask = decode_mask(segmentation, (5, 6))
        assert mask.flags.c_contiguous
        assert mask.flags.writeable
        assert mask.shape == (5, 6)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        5,
        "text",
        [],
        {},
        [[]],
        [5],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, None]],
        [[1, 2, 3, 4, 5, True]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, float("inf")]],
        [[1, 2, 3, 4, 5, 10**400]],
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[-10, -10, 20, -10, 20, 20] * 150_000],
        {"size": [8, 10]},
        {"counts": [80]},
        {"size": [10, 8], "counts": [80]},
        {"size": 80, "counts": [80]},
        {"size": [8, 10], "counts": None},
        {"size": [8, 10], "counts": []},
        {"size": [8, 10], "counts": [79]},
        {"size": [8, 10], "counts": [81]},
        {"size": [8, 10], "counts": [90, -10]},
        {"size": [8, 10], "counts": [80.0]},
        {"size": [8, 10], "counts": [True, 79]},
        {"size": [8, 10], "counts": [10**30]},
        {"size": [8, 10], "counts": ""},
        {"size": [8, 10], "counts": "P"},
        {"size": [8, 10], "counts": "PPP"},
        {"size": [8, 10], "counts": "ü"},
        {"size": [8, 10], "counts": "\n"},
        {"size": [8, 10], "counts": b"\xff\xff"},
        {"size": [8, 10], "counts": "oooooooooooooooo0"},
        {"size": [8, 10], "counts": "P2000000O"},
    ],
)
def test_a_malformed_mask_is_refused(segmentation):
    """pycocotools ends the process for several of these, or requests all memory."""
    for use in (validate_segmentation, decode_mask, mask_area):
        with pytest.raises(DcrisError, match=r"segmentation|polygon|run lengths"):
            use(segmentation, (8, 10))


@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30))
@settings(max_examples=200)
def test_any_text_either_fills_the_mask_exactly_or_is_refused(text):
    """Predicted masks from any source are scored, so the text may be anything."""
    segmentation = {"size": [6, 7], "counts": text}
    try:
        mask = decode_mask(segmentation, (6, 7))
    except DcrisError:
        return
    assert np.array_equal(mask, coco.decode(segmentation))


@pytest.mark.parametrize("size", [(0, 5), (-1, -5), (100_000, 100_000)])
def test_impossible_sizes_are_refused(size):
    """A mask of ten billion pixels would exhaust the memory before anything else is checked."""
    for segmentation in ([[0, 0, 1, 0, 1, 1]], {"size": list(size), "counts": [size[0] * size[1]]}):
        with pytest.raises(DcrisError):
            decode_mask(segmentation, size)


def test_boxes_are_tight():
    mask = np.zeros((10, 12), bool)
    assert mask_box(mask) is None
    mask[3, 4] = mask[7, 9] = True
    assert mask_box(mask) == (4, 3, 6, 5)
    assert mask_box(np.ones((1, 1), np.uint8)) == (0, 0, 1, 1)


def test_only_matrices_are_encoded():
    with pytest.raises(ValueError, match="a mask must be"):
        encode_mask(np.zeros((2, 2, 2), bool))
    assert encode_mask(np.full((2, 2), 255, np.uint8)) == encode_mask(np.ones((2, 2), bool))


def test_real_masks_are_those_of_pycocotools(refer_root):
    """Crowds, holes and objects of many parts from COCO's annotators."""
    content = json.loads((refer_root / "cocomini/instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    crowds = [annotation for annotation in content["annotations"] if annotation["iscrowd"]]
    for annotation in [*crowds, *content["annotations"][::25]]:
        height, width = sizes[annotation["image_id"]]
        runs = coco.frPyObjects(annotation["segmentation"], height, width)
        expected = coco.decode(coco.merge(runs) if isinstance(runs, list) else runs)
        assert np.array_equal(decode_mask(annotation["segmentation"], (height, width)), expected)
        assert mask_area(annotation["segmentation"], (height, width)) == expected.sum()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_a_mask_image_has_0_and_one_other_value(tmp_path, mode):
    """Tools write masks as 0/1, 0/255, palette indices or colours; all give the same object."""
    truth = np.zeros((5, 7), np.uint8)
    truth[1:3, 2:6] = 1
    if mode == "I;16":
        image = Image.fromarray(truth.astype(np.uint16) * 300)
    elif mode == "P":
        image = Image.fromarray(truth * np.uint8(3)).convert("L")
        image.putpalette([0, 0, 0] * 256)
    elif mode in ("RGBA", "LA"):
        image = Image.fromarray(truth * np.uint8(255)).convert(mode)
        image.putalpha(Image.fromarray(truth * np.uint8(255)))
    else:
        image = Image.fromarray(truth * np.uint8(255)).convert(mode)
    path = tmp_path / "mask.png"
    image.save(path)
    np.testing.assert_array_equal(decode_mask(path, (5, 7)), truth)
    assert mask_area(path, (5, 7)) == 8
    with pytest.raises(DcrisError, match=r"5 x 7 pixels .* but its image is 7 x 5"):
        decode_mask(path, (7, 5))


DISC = np.hypot(*(np.mgrid[:40, :50] - np.array([20, 25])[:, None, None])) < 12


def _soft(kind: str) -> np.ndarray | Image.Image:
    """A disc as tools save it with more than two values."""
    grey = DISC.astype(np.uint8) * 255
    soft = Image.fromarray(grey).resize((25, 20), Image.Resampling.BOX).resize((50, 40), Image.Resampling.BILINEAR)
    return {
        "probabilities": np.where(DISC, 230, 12).astype(np.uint8),
        "white beside nearly white": np.where(DISC, 255, 100).astype(np.uint8),
        "16 bits": np.where(DISC, 60_000, 700).astype(np.uint16),
        "floating-point": np.where(DISC, 0.9, 0.05).astype(np.float32),
        "soft edges": soft,
        "colours": np.where(DISC[..., None], [250, 9, 9], [12, 3, 3]).astype(np.uint8),
        "soft opacity": np.dstack([grey | 255, np.where(DISC, 230, 12).astype(np.uint8)]),
        "several objects": np.where(DISC, 255, np.arange(50) < 5).astype(np.uint8),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        *(
            (kind, "tif" if kind == "floating-point" else "png")
            for kind in ("probabilities", "16 bits", "floating-point")
        ),
        *(
            (kind, "png")
            for kind in ("white beside nearly white", "soft edges", "colours", "several objects", "soft opacity")
        ),
    ],
)
def test_a_mask_of_more_than_two_values_needs_a_threshold(tmp_path, kind, ending):
    """Otherwise all nonzero pixels would count: a disc saved as a probability map would cover
    everything.
    """
    image = _soft(kind)
    path = tmp_path / f"mask.{ending}"
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    for use in (decode_mask, mask_area):
        with pytest.raises(DcrisError, match=r"mask\..* has more values than 0 and one other .*--mask-threshold"):
            use(path, (40, 50))
    found = decode_mask(SoftMask(path, 0.5), (40, 50)).astype(bool)
    assert (found & DISC).sum() / (found | DISC).sum() > (0.85 if kind == "soft edges" else 0.999)


def test_a_mask_in_which_polygons_overlap_as_cris_stores_it(tmp_path):
    """Its script multiplies the sum of the polygons' masks by 255 in 8 bits. In data that were
    prepared for CRIS or DETRIS, one object in 150 has such a mask, which stopped the evaluation."""
    path = tmp_path / "mask.png"
    polygons = DISC.astype(np.uint8) + np.roll(DISC, 5, 0) + np.roll(DISC, 8, 1)
    Image.fromarray(polygons * np.uint8(255)).save(path)
    assert set(np.unique(np.asarray(Image.open(path)))) == {0, 253, 254, 255}
    np.testing.assert_array_equal(decode_mask(path, (40, 50)), polygons > 0)
    assert mask_area(path, (40, 50)) == np.count_nonzero(polygons)
    assert decode_mask(SoftMask(path, 254), (40, 50)).sum() == np.count_nonzero(polygons == 1)


@pytest.mark.parametrize("quality", [75, 95, 100])
def test_a_mask_saved_as_jpeg_needs_a_threshold(tmp_path, quality):
    """Compression creates values near 0 around the object, which would all count."""
    path = tmp_path / "mask.jpg"
    Image.fromarray(DISC.astype(np.uint8) * 255).save(path, quality=quality)
    with pytest.raises(DcrisError, match=r"not as JPEG.*--mask-threshold"):
        decode_mask(path, (40, 50))
    for threshold in (0.5, 127):
        assert np.array_equal(decode_mask(SoftMask(path, threshold), (40, 50)), DISC)


@pytest.mark.parametrize("value", [1, 60, 254, 255])
def test_a_threshold_leaves_masks_of_two_values_as_they_are(tmp_path, value):
    """A data set may contain both binary masks and probability maps."""
    path = tmp_path / "mask.png"
    Image.fromarray(DISC.astype(np.uint8) * np.uint8(value)).save(path)
    for image in (path, SoftMask(path, 0.5), SoftMask(path, 200)):
        assert np.array_equal(decode_mask(image, (40, 50)), DISC)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_mask_is_applied(tmp_path, orientation):
    """Image and mask with the same EXIF tag fit each other."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[3:9, 5:20] = 255
    for name, content in (("photo.png", pixels), ("mask.png", pixels[..., 0]), ("mask.tif", pixels[..., 0])):
        Image.fromarray(content).save(tmp_path / name, exif=exif)
    photo = read_image(tmp_path / "photo.png")[..., 0] > 128
    for name in ("mask.png", "mask.tif"):
        assert validate_segmentation(tmp_path / name, photo.shape) == tmp_path / name
        assert np.array_equal(decode_mask(tmp_path / name, photo.shape).astype(bool), photo)


@pytest.mark.parametrize("read", [decode_mask, mask_area])
def test_run_lengths_are_decoded_once(monkeypatch, read):
    """Every sample of an epoch decodes its mask, so validation and decoding share the work."""
    calls = []
    original = masks_module._uncompress
    monkeypatch.setattr(masks_module, "_uncompress", lambda text: calls.append(text) or original(text))
    read(encode_mask(np.eye(20, 30)), (20, 30))
    assert len(calls) == 1


@given(data=st.data(), height=st.integers(0, 12), width=st.integers(0, 12), band=st.sampled_from([1, 5, 1 << 22]))
def test_masks_are_encoded_as_by_pycocotools(data: st.DataObject, height: int, width: int, band: int) -> None:
    """For any number of runs, and with runs that cross the bands that are encoded at once."""
    values = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(values, bool).reshape(height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks_module, "_BAND", band)
        encoded = encode_mask(mask)
    expected = coco.encode(np.asfortranarray(mask, np.uint8))
    assert encoded == {"size": [height, width], "counts": expected["counts"].decode()}
