"""Photographs of every kind a person may have, against cv2 and against values known beforehand."""

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dcris.data.images import image_size, read_image, to_rgb
from dcris.errors import DcrisError


@pytest.fixture
def photo():
    """A smooth picture [30, 40, 3], which JPEG keeps nearly as it is."""
    rows, columns = np.mgrid[0:30, 0:40]
    return np.stack([rows * 8, columns * 6, 255 - rows * 4 - columns * 3], axis=2).astype(np.uint8)


def _save(folder: Path, name: str, image: Image.Image, **options) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_files_give_their_pixels(tmp_path, photo, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = _save(tmp_path, f"a.{suffix}", Image.fromarray(photo), **options)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.array_equal(image, photo)
    assert image_size(path) == (30, 40)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_is_what_cv2_makes_of_it(tmp_path, photo, mode, subsampling):
    """Published numbers were made with cv2's decoder, and red must not come last."""
    image = Image.fromarray(photo).convert(mode)
    path = _save(tmp_path, "a.jpg", image, quality=90, **({"subsampling": subsampling} if mode == "RGB" else {}))
    assert np.abs(read_image(path).astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_the_way_it_was_taken(tmp_path, photo, orientation, suffix):
    """Phones store nearly every upright photograph on its side; 'left' would mean 'top' in it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path, f"a.{suffix}", Image.fromarray(photo), exif=exif)
    turned = {
        1: photo,
        2: photo[:, ::-1],
        3: photo[::-1, ::-1],
        4: photo[::-1],
        5: photo.swapaxes(0, 1),
        6: np.rot90(photo, -1),
        7: photo[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(photo),
    }[orientation]
    image = read_image(path)
    assert image.shape == turned.shape
    assert image_size(path) == turned.shape[:2]
    assert np.abs(image.astype(int) - turned).mean() < 3
    if suffix == "jpg":
        assert np.abs(image.astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1


def test_broken_exif_does_not_hide_the_picture(tmp_path, photo):
    path = _save(tmp_path, "a.jpg", Image.fromarray(photo), exif=b"Exif\0\0not EXIF at all")
    assert read_image(path).shape == (30, 40, 3)
    assert image_size(path) == (30, 40)


def test_cmyk_has_its_colours(tmp_path):
    """Pictures from print; read as they are stored, their colours come out inverted."""
    path = _save(tmp_path, "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    red = read_image(path)[8, 8].astype(int)
    assert red[0] > 230
    assert red[1:].max() < 25


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    """Pillow's own conversion makes everything above 255, so nearly every such picture, plain white."""
    values = np.array([[0, 256, 32_768, 65_535]], np.uint16)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), values)
    assert np.array_equal(read_image(path)[0], np.repeat([[0], [1], [128], [255]], 3, axis=1))
    cv2.imwrite(str(path), np.stack([values, values * 0, values * 0], axis=2))
    assert np.array_equal(read_image(path)[0, :, 2], [0, 1, 128, 255])


def test_transparency_is_laid_on_white(tmp_path, photo):
    """The colour under a transparent pixel is arbitrary, mostly black, and not what the person saw."""
    half = np.dstack([photo, np.full((30, 40), 255, np.uint8)])
    half[:, :20] = 0
    expected = photo.copy()
    expected[:, :20] = 255
    assert np.array_equal(read_image(_save(tmp_path, "a.png", Image.fromarray(half))), expected)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert read_image(_save(tmp_path, "p.png", palette)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert read_image(_save(tmp_path, "t.png", palette, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    grey = Image.fromarray(np.array([[90, 90]], np.uint8))
    grey.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert read_image(_save(tmp_path, "g.png", grey))[..., 0].tolist() == [[90, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I", "CMYK", "YCbCr", "HSV", "LA", "RGBA"])
def test_pillow_images_of_every_mode_become_rgb(mode):
    """A program hands over whatever its own steps left it with."""
    image = to_rgb(Image.new(mode, (5, 4)))
    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8


def test_pillow_images_are_turned_like_files(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "png", exif=exif)
    assert to_rgb(Image.open(stream)).shape == (40, 30, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (700, 1)])
def test_small_and_narrow_pictures_are_read(tmp_path, shape):
    path = _save(tmp_path, "a.png", Image.fromarray(np.full((*shape, 3), 7, np.uint8)))
    assert read_image(path).shape == (*shape, 3)
    assert image_size(path) == shape


def test_108_megapixels_are_read_without_a_word(tmp_path):
    """Phones of today take them; Pillow warns about each, on the screen of a person who cannot do anything about it."""
    path = tmp_path / "a.png"
    Image.new("1", (12_000, 9_000), 1).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (9_000, 12_000)
        image = read_image(path)
    assert image.shape == (9_000, 12_000, 3)
    assert image[-1, -1].tolist() == [255, 255, 255]


def test_a_file_that_claims_too_many_pixels_is_refused(tmp_path):
    """A few kilobytes may unpack to more than the memory holds."""
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 15_001)).save(path)
    for read in (read_image, image_size):
        with pytest.raises(DcrisError, match="20000 x 15001 pixels"):
            read(path)
    with pytest.raises(DcrisError, match="20000 x 15001 pixels"):
        to_rgb(Image.new("1", (20_000, 15_001)))
    with pytest.raises(DcrisError, match="0 x 5 pixels"):
        to_rgb(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_cut_short_is_refused(tmp_path, photo, suffix):
    """cv2 returns such pictures with a grey lower half, and a model would be trained on that."""
    path = _save(tmp_path, f"a.{suffix}", Image.fromarray(photo))
    data = path.read_bytes()
    for kept in (len(data) * 2 // 3, len(data) - 30, 12):
        path.write_bytes(data[:kept])
        with pytest.raises(DcrisError, match=rf"cannot read the image .*a\.{suffix}"):
            read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0\n"]
)
def test_what_is_no_image_is_said_to_be_so(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(DcrisError, match=r"cannot read the image .*a\.jpg \(.+\)") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    for read in (read_image, image_size):
        with pytest.raises(DcrisError, match=r"there is no image file .*b\.jpg"):
            read(tmp_path / "b.jpg")
        with pytest.raises(DcrisError, match=r"cannot read the image .*[Dd]irectory"):
            read(tmp_path)


def test_floating_point_pixels_are_refused(tmp_path):
    path = _save(tmp_path, "a.tiff", Image.fromarray(np.ones((3, 3), np.float32)))
    with pytest.raises(DcrisError, match="floating-point"):
        read_image(path)


def test_real_photographs_are_what_cv2_makes_of_them(refer_root):
    for path in sorted((refer_root / "images/mscoco/images/train2014").iterdir())[::40]:
        image = read_image(path)
        assert image_size(path) == image.shape[:2]
        assert np.abs(image.astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1
