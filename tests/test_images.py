"""Images of all formats, compared with cv2 and with known values."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcris.data import images
from dcris.data.images import _count_scans, image_endings, image_size, read_image, read_mask_image, to_rgb
from dcris.errors import DcrisError
from dcris.utils.files import open_regular
from marks import slow_except


@pytest.fixture
def photo():
    """A smooth image [30, 40, 3], which JPEG hardly changes."""
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
def test_jpeg_equals_cv2(tmp_path, photo, mode, subsampling):
    """Published scores were made with cv2's decoder. Channels are RGB."""
    image = Image.fromarray(photo).convert(mode)
    path = _save(tmp_path, "a.jpg", image, quality=90, **({"subsampling": subsampling} if mode == "RGB" else {}))
    assert np.abs(read_image(path).astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, photo, orientation, suffix):
    """Phones store most images rotated; without the rotation, 'left' would mean 'top'."""
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


def test_broken_exif_is_ignored(tmp_path, photo):
    path = _save(tmp_path, "a.jpg", Image.fromarray(photo), exif=b"Exif\0\0not EXIF at all")
    assert read_image(path).shape == (30, 40, 3)
    assert image_size(path) == (30, 40)


def test_cmyk_has_the_right_colours(tmp_path):
    """CMYK values are stored inverted."""
    path = _save(tmp_path, "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95)
    red = read_image(path)[8, 8].astype(int)
    assert red[0] > 230
    assert red[1:].max() < 25


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    """Pillow's own conversion clips values above 255, so nearly all of the image would be white."""
    values = np.array([[0, 256, 32_768, 65_535]], np.uint16)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), values)
    assert np.array_equal(read_image(path)[0], np.repeat([[0], [1], [128], [255]], 3, axis=1))
    cv2.imwrite(str(path), np.stack([values, values * 0, values * 0], axis=2))
    assert np.array_equal(read_image(path)[0, :, 2], [0, 1, 128, 255])


@pytest.mark.parametrize("ending", ["png", "pgm", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_in_every_format(tmp_path, ending, order):
    """The threshold of a big-endian TIFF and a PGM was a share of their greatest value instead of
    65,535, so pixels of low probability became the object; a dark PGM was brightened.
    """
    values = np.array([[0, 1_000, 30_000]], np.uint16)
    path = tmp_path / f"a.{ending}"
    if ending == "tif":
        mode = "I;16" if order == "<u2" else "I;16B"
        Image.frombytes(mode, (3, 1), values.astype(order).tobytes()).save(path)
    else:
        cv2.imwrite(str(path), values)
    assert read_image(path)[0, :, 0].tolist() == [0, 1_000 >> 8, 30_000 >> 8]
    assert read_mask_image(path, 0.4).tolist() == [[0, 0, 1]]
    assert read_mask_image(path, 0.5).tolist() == [[0, 0, 0]]
    assert read_mask_image(path, 900).tolist() == [[0, 1, 1]]


@given(values=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8))
def test_the_greatest_of_32_bits_becomes_255(values):
    """Rounding made it 254 for one greatest value in eight."""
    greatest = max(255, *values)
    image = to_rgb(Image.fromarray(np.array([values], np.int32)))
    assert image[0, :, 0].tolist() == [value * 255 // greatest for value in values]


def test_transparency_is_laid_on_white(tmp_path, photo):
    """The colour of a transparent pixel is arbitrary, mostly black."""
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


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_is_background_of_a_mask(tmp_path, mode):
    """PNG optimisers replace an alpha channel by one transparent colour; if that is white, the mask
    was read inside out or refused.
    """
    pixels = np.full((4, 5, 4), (255, 255, 255, 0), np.uint8)
    pixels[1:3, 1:3] = (200, 0, 0, 255) if mode == "RGB" else (0, 0, 0, 255)
    whole = _save(tmp_path, "whole.png", Image.fromarray(pixels))
    image = Image.fromarray(pixels[..., :3]).convert(mode)
    optimised = _save(tmp_path, "optimised.png", image, transparency=(255, 255, 255) if mode == "RGB" else 255)
    assert np.array_equal(read_image(optimised), read_image(whole))
    assert np.array_equal(read_mask_image(optimised), read_mask_image(whole))


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I", "CMYK", "YCbCr", "HSV", "LA", "La", "RGBA", "RGBa"])
def test_pillow_images_of_every_mode_become_rgb(mode):
    """Callers may pass images of any mode."""
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
def test_small_and_narrow_images_are_read(tmp_path, shape):
    path = _save(tmp_path, "a.png", Image.fromarray(np.full((*shape, 3), 7, np.uint8)))
    assert read_image(path).shape == (*shape, 3)
    assert image_size(path) == shape


def test_108_megapixels_are_read_without_a_warning(tmp_path):
    """Phones take them; Pillow would print a warning for each."""
    path = tmp_path / "a.png"
    Image.new("1", (12_000, 9_000), 1).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (9_000, 12_000)
        image = read_image(path)
    assert image.shape == (9_000, 12_000, 3)
    assert image[-1, -1].tolist() == [255, 255, 255]


def test_a_small_png_of_299_megapixels_is_refused_by_its_header(tmp_path):
    """A PNG of 36 KB took 5 GB: the size has to be checked before anything is decoded."""
    path = tmp_path / "a.png"
    header = struct.pack(">IIBBBBB", 17_300, 17_300, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    for read in (read_image, image_size):
        with pytest.raises(DcrisError, match="17300 x 17300 pixels"):
            read(path)


def test_a_file_that_claims_too_many_pixels_is_refused(tmp_path):
    """A few kilobytes may decompress to more than the memory."""
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
def test_a_truncated_image_is_refused(tmp_path, photo, suffix):
    """cv2 returns such images with a grey lower half, which would be trained on."""
    path = _save(tmp_path, f"a.{suffix}", Image.fromarray(photo))
    data = path.read_bytes()
    for kept in (len(data) * 2 // 3, len(data) - 30, 12):
        path.write_bytes(data[:kept])
        with pytest.raises(DcrisError, match=rf"cannot read the image .*a\.{suffix}"):
            read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0\n"]
)
def test_other_files_are_reported_as_no_image(tmp_path, content):
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
        with pytest.raises(DcrisError, match=r"cannot read the image .*a folder"):
            read(tmp_path)


def test_floating_point_pixels_are_refused(tmp_path):
    path = _save(tmp_path, "a.tiff", Image.fromarray(np.ones((3, 3), np.float32)))
    with pytest.raises(DcrisError, match="floating-point"):
        read_image(path)


def _tiff(values: np.ndarray) -> bytes:
    """An uncompressed grey TIFF with the array's type and byte order."""
    order, raw = (">" if values.dtype.byteorder == ">" else "<"), values.tobytes()
    entries = [
        *((256, values.shape[1]), (257, values.shape[0]), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8)),
        *((277, 1), (278, values.shape[0]), (279, len(raw)), (339, 2 if values.dtype.kind == "i" else 1)),
    ]
    directory = b"".join(struct.pack(order + "HHLL", tag, 4, 1, value) for tag, value in entries)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "L", 8 + len(raw))
    return head + raw + struct.pack(order + "H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("kind", ["<u4", ">i4", "<i2"])
@pytest.mark.parametrize(("greatest", "scaled"), [(255, 255), (200, 200), (1_000, 255), (30_000, 255)])
def test_whole_numbers_of_unknown_range_are_scaled_by_the_greatest(kind, greatest, scaled):
    """Such TIFFs would be black, because their upper bits are 0."""
    values = np.linspace(0, greatest, 120).reshape(10, 12).astype(kind)
    image = read_image(_tiff(values))
    assert image.max() == scaled
    assert np.abs(image[..., 1] - values * (scaled / greatest)).max() <= 1


def test_sixteen_bits_in_either_byte_order_are_read_alike():
    values = np.arange(0, 65_536, 256).reshape(16, 16)
    for kind in ("<u2", ">u2"):
        assert np.array_equal(read_image(_tiff(values.astype(kind)))[..., 0], values >> 8)


def test_negative_pixels_are_refused():
    with pytest.raises(DcrisError, match="negative pixels"):
        read_image(_tiff(np.array([[-3, 200]], "<i4")))


ENDINGS = ["jfif", "jpe", "mpo", "apng", "gif", "dib", "tif", "jp2", "j2k", "avif", "webp", "pgm", "ppm"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_each_format_that_can_be_decoded_is_read_and_its_ending_known(tmp_path, photo, ending):
    """The images of a folder are found by these endings."""
    path = tmp_path / f"a.{ending}"
    try:
        Image.fromarray(photo).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow cannot write {ending}")
    assert path.suffix in image_endings()
    assert image_size(path) == read_image(path).shape[:2] == (30, 40)


def test_heic_is_read_by_pillow_heif_or_names_it(tmp_path, photo, monkeypatch):
    """Phones write HEIC. Without a decoder, the error names the package to install."""
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    image_endings()  # loads Pillow's plugins, and pillow-heif's if it is installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(DcrisError, match="pip install pillow-heif"):
        read_image(content)
    monkeypatch.undo()
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.fromarray(photo).save(tmp_path / "a.heic", quality=100)
    assert read_image(tmp_path / "a.heic").shape == photo.shape
    assert ".heic" in image_endings()


def test_pipes_and_devices_are_refused(tmp_path):
    """Opening a pipe blocks for ever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", Path("/dev/zero")):
        for read in (read_image, image_size, read_mask_image):
            with pytest.raises(DcrisError, match=r"cannot read the image .*not a regular file"):
                read(path)


def _progressive(photo: np.ndarray, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(photo):
    """Each scan is a pass over the whole image: 2 MB of scans take minutes."""
    assert read_image(_progressive(photo, 20)).shape == photo.shape
    with pytest.raises(DcrisError, match=r"a JPEG with more than 100 scans"):
        read_image(_progressive(photo, 5_000))


def test_the_size_is_read_from_the_first_bytes(photo, tmp_path, monkeypatch):
    """Otherwise a data set of 100,000 large images would be read completely each time."""
    path = tmp_path / "a.jpg"
    path.write_bytes(_progressive(photo, 20) + bytes(1_000_000))
    with open_regular(path) as file:
        monkeypatch.setattr("dcris.data.images.open_regular", lambda *_: nullcontext(file))
        assert image_size(path) == photo.shape[:2]
        assert file.tell() < 100_000


def test_a_jpeg_of_very_many_comments_is_refused_before_pillow_reads_them(photo):
    """Twelve megabytes of empty comments take Pillow seconds, each time that the file is opened."""
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG")
    data = buffer.getvalue()
    for count, fits in ((9_000, True), (3_000_000, False)):
        spoilt = data[:2] + b"\xff\xff" + b"\xff\xfe\x00\x02" * count + data[2:]
        if fits:
            assert read_image(spoilt).shape == photo.shape
        else:
            with pytest.raises(DcrisError, match="more than 10,000 segments"):
                read_image(spoilt)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (b"\0" + b"\xff\xfe\x00\x02" * 20_000, "segments"),
        ((b"\xff\xf0\xff\xff" + b"\xff\xfe\x00\x02" * 10_000) * 2, "segments"),  # not a segment for Pillow
        (b"\xff\xc8" * 20_000, "segments"),
        (b"\0" * 2_000_000, "bytes between its segments"),
        (b"\xff" * 2_000_000, "bytes between its segments"),
        (b"\xff\xd0" * 1_000_000, "bytes between its segments"),
    ],
)
def test_nothing_is_hidden_between_the_segments_of_a_jpeg(hidden: bytes, message: str, photo):
    """A gigabyte of it would take Pillow 20 GB of memory, or minutes."""
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG")
    data = buffer.getvalue()
    first = 4 + int.from_bytes(data[4:6], "big")
    for spoilt in (data[:first] + hidden + data[first:], data[:first] + hidden):
        for read in (read_image, image_size):
            with pytest.raises(DcrisError, match=message):
                read(spoilt)


_BETWEEN = b"\0", b"a" * 16_383, b"a" * 16_382, b"\xff\xff\xfe\x00\x03\xda", b"\xff\xff\x00", b"\xff\x00", b"\xff\xd3"


@given(parts=st.lists(st.sampled_from(_BETWEEN)))
def test_a_jpeg_with_bytes_between_its_segments_is_the_same_image(parts):
    """Cameras leave such bytes. Markers may begin at any place in what is read at a time."""
    pixels = np.full((16, 16, 3), 90, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    first = 4 + int.from_bytes(data[4:6], "big")
    spoilt = data[:first] + b"".join(parts) + data[first:]
    with io.BytesIO(data) as plain, io.BytesIO(spoilt) as file:
        assert _count_scans(file) == _count_scans(plain) == 10
    assert image_size(spoilt) == (16, 16)


def test_images_inside_or_behind_a_jpeg_are_not_counted_as_its_scans(photo):
    """Cameras write a preview into the header and a video after the image; both contain bytes that
    look like scans.
    """
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "JPEG", comment=b"\xff\xda" * 500)
    assert read_image(stream.getvalue() + b"\xff\xda" * 500).shape == photo.shape


def _tags(size: int) -> bytes:
    """A TIFF directory of 3,000 tags that all claim the same `size` bytes."""
    count, start = 3_000, 8 + 2 + 12 * 3_000 + 4
    entries = b"".join(struct.pack("<HHLL", 30_000 + number, 7, size, start) for number in range(count))
    return b"II*\0" + struct.pack("<LH", 8, count) + entries + bytes(4 + size)


def test_tags_that_claim_the_same_bytes_are_refused(photo):
    """Pillow copies the bytes of each tag: a file of 2 MB took 6 GB."""
    with pytest.raises(DcrisError, match="tags claim more"):
        image_size(_tags(1_000))
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "PNG", exif=b"Exif\0\0" + _tags(1_000))
    assert np.array_equal(read_image(stream.getvalue()), photo)  # of EXIF, only the orientation is read


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [("a.jp2", "RGB", {}), ("a.webp", "RGB", {}), ("a.jpg", "RGB", {"progressive": True, "subsampling": 0})],
)
def test_images_whose_decoder_needs_much_memory_are_refused_by_their_headers(
    tmp_path, monkeypatch, name, mode, options
):
    """The memory per pixel depends on the format: JPEG 2000 takes three times as much as baseline
    JPEG.
    """
    monkeypatch.setattr(images, "_MAX_MEMORY", 7 * 10_000)
    for side, fits in ((100, False), (40, True)):
        path = _save(tmp_path, name, Image.new(mode, (side, side)), **options)
        if fits:
            assert image_size(path) == (side, side)
        else:
            with pytest.raises(DcrisError, match=r"100 x 100 pixels, which need"):
                image_size(path)
    assert image_size(_save(tmp_path, "plain.jpg", Image.new("RGB", (100, 100)))) == (100, 100)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of Linux")
@pytest.mark.parametrize("mode", slow_except(["RGB", "RGBA", "P", "I;16", "L"], "RGBA"))
def test_decoding_takes_no_more_memory_than_is_counted(tmp_path, mode, photo):
    """Also for a small file that decompresses to the largest image."""
    side = 5_000
    path = _save(tmp_path, "a.png", Image.new(mode, (side, side)), compress_level=1)
    code = (
        "import sys, resource; from pathlib import Path; from dcris.data.images import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_image(Path(sys.argv[1])); before = peak(); read_image(Path(sys.argv[2])); print(peak() - before)"
    )
    small = _save(tmp_path, "b.png", Image.new(mode, (1_000, 1_000)))
    run = subprocess.run([sys.executable, "-c", code, small, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 9 * side * side


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of Linux")
def test_what_decoding_used_is_returned(tmp_path):
    """Else the network's arrays are allocated beside it. In a process that freed a large block
    before, the C library keeps Pillow's blocks for the thread that read ahead.
    """
    code = (
        "import ctypes, sys; from pathlib import Path; from dcris.data.images import read_image\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "library = ctypes.CDLL(None); library.malloc.restype = ctypes.c_void_p; library.free.argtypes = [ctypes.c_void_p]\n"
        "library.free(library.malloc(31 << 20))\n"
        "in_use = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "before = in_use(); pixels = ThreadPoolExecutor(1).submit(read_image, Path(sys.argv[1])).result()\n"
        "print(in_use() - before - pixels.nbytes)"
    )
    path = _save(tmp_path, "a.jpg", Image.new("RGB", (6_000, 6_000)))
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 72_000_000  # of the 144 MB that the decoded image took


def test_the_size_of_a_png_needs_no_decoding(tmp_path, photo):
    """If the masks of a data set are PNG files, the header of each is read when the data set is
    loaded.
    """
    path = _save(tmp_path, "a.png", Image.fromarray(photo))
    data = path.read_bytes()
    at = data.index(b"IDAT") + 20
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    assert image_size(path) == (30, 40)
    with pytest.raises(DcrisError):
        read_image(path)


def test_an_orientation_after_the_pixels_of_a_png_is_applied(tmp_path, photo):
    path = _save(tmp_path, "a.png", Image.fromarray(photo))
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">L4s", len(block), b"eXIf") + block
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + struct.pack(">L", zlib.crc32(chunk[4:])) + data[-12:])
    assert image_size(path) == read_image(path).shape[:2] == (40, 30)


def test_real_images_equal_cv2(refer_root):
    for path in sorted((refer_root / "images/mscoco/images/train2014").iterdir())[::40]:
        image = read_image(path)
        assert image_size(path) == image.shape[:2]
        assert np.abs(image.astype(int) - cv2.imread(str(path))[..., ::-1]).max() <= 1
