"""Read images of all common formats as upright RGB arrays, uint8 [H, W, 3].

Pillow decodes all formats. The published results were made with cv2, which gives the same pixels
for ordinary JPEG files in nine tenths of the time, but silently fills the missing part of a
truncated file with grey.

The cost of a file is bounded before it is decoded, because a file of a few kilobytes can claim any
size (see `_refuse_costly`).
"""

import ctypes
import io
import logging
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Union, cast, get_args
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.arguments import PathLike, as_path
from dcris.utils.files import open_regular
from dcris.utils.http import HTTP_ERRORS, get, is_url, reason_of

if TYPE_CHECKING:
    from torch import Tensor

# Pillow logs errors that it also raises; without a handler, Python prints the log.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MAX_PIXELS = 110_000_000
"""Limit on the pixels of an image. A prediction with an overlay takes 9 to 10 bytes per pixel, 1
GiB in all. Phone cameras of 108 megapixels are below it."""

MAX_SIDE = 65_535
"""Limit on the longer side, as in JPEG: each row and each column of an image needs some memory."""

_MAX_MEMORY = 850_000_000
"""Limit on the bytes in use while decoding, below 1 GiB by what a process needs besides.

Pillow uses 4 bytes per RGB pixel, the returned array 3."""

_MAX_FILE = 1_000_000_000
"""Limit on the bytes of a file. Some decoders read all of it into memory."""

_MAX_SCANS = 100
"""Limit on the scans of a JPEG, as in libtiff. Encoders write about 10; each is a pass over the
whole image."""

_MAX_SEGMENTS = 10_000
"""Limit on the segments of a JPEG before its pixels; Pillow reads each in Python. A colour profile
has at most 255."""

_MAX_BETWEEN = 1_000_000
"""Limit on the bytes of a JPEG before its pixels that are in no segment."""

_MAX_NUMBERS = 1_000_000
"""Limit on the numbers in one TIFF tag, such as its tiles; Pillow creates a Python object for
each."""

_FORMATS: dict[str, tuple[str | None, int]] = {
    "JPEG": ("jpg", 0),
    "PNG": ("zlib", 0),
    "WEBP": ("webp", 12),
    "BMP": (None, 2),
    "DIB": (None, 2),
    "GIF": (None, 0),
    "TIFF": (None, 0),
    "PPM": (None, 0),
    "JPEG2000": ("jpg_2000", 16),
    "HEIF": (None, 4),
    "AVIF": ("avif", 8),
}
"""Formats that are read, by Pillow's names, with the library that each needs and the bytes per
pixel that its decoder uses beside the image itself. Of Pillow's other formats, some start other
programs (EPS) or contain no pixels of their own."""

_PLUGINS = "Jpeg", "Png", "WebP", "Bmp", "Gif", "Tiff", "Ppm", "Jpeg2K", "Avif", "Mpo"
"""Pillow's modules for these formats, and for the endings of files with several JPEG images."""

_HEIF_ENDINGS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
NEEDS_PILLOW_HEIF = "to read HEIC and HEIF images, run: pip install pillow-heif"

_STORED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""For each EXIF orientation except 1: the view of the upright array [H, W, ...] in the file's
order."""
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height."""

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
"""Markers of a JPEG's pixels and of its end."""

_FEW, _CHUNK = 16, 1 << 14
"""Bytes of a JPEG in which a marker is searched for at a time: first few, as segments follow each
other in most files."""

_LARGE = 1 << 26
"""Bytes of pixels from which memory that was used for decoding is returned to the system."""

_BAND = 1 << 20
"""Pixels that are converted at a time, which avoids another copy of the whole image."""


@cache
def image_endings() -> frozenset[str]:
    """Return the file name endings (".jpg") that the installed libraries can decode."""
    _init_pillow()
    return frozenset(
        ending
        for ending, name in Image.EXTENSION.items()
        if _decodable("JPEG" if name == "MPO" else name)  # MPO: several JPEG images in one file
    )


def why_not_read(ending: str) -> str | None:
    """Return what to install for files with this ending; None if no library helps."""
    return NEEDS_PILLOW_HEIF if ending in _HEIF_ENDINGS else None


def _decodable(name: str) -> bool:
    library, _ = _FORMATS.get(name, ("", 0))
    return library != "" and name in Image.OPEN and (library is None or bool(features.check(library)))


@cache
def _init_pillow() -> None:
    """Load Pillow's plugins of the formats that are read, and pillow-heif's if it is installed.

    Image.init() loads all of them, which takes 0.15 s longer.
    """
    for name in _PLUGINS:
        with suppress(ImportError):  # older versions have no plugin for AVIF
            import_module(f"PIL.{name}ImagePlugin")
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file, or its bytes, as an upright RGB array.

    The EXIF orientation is applied, and transparency is blended with white. Of an animation, the
    first frame is read. Of 16-bit values, the upper 8 bits are kept. 32-bit integers are kept if
    none exceeds 255, else scaled so that the greatest becomes 255.

    Args:
        source: path or content of the file.
        max_pixels: limit on width times height.

    Returns:
        [H, W, 3] uint8.

    Raises:
        DcrisError: the file is missing, not a regular file, not an image, truncated, has more than
            `max_pixels`, or is too costly to decode.
    """
    with _opened(source, max_pixels) as image:
        pixels = _pixels(image)
        image.close()  # frees what Pillow decoded, as much again as the pixels
    if pixels.size > _LARGE:
        _return_free_memory()
    return pixels


def fit_image(image: NDArray[np.uint8], reference: Reference) -> NDArray[np.uint8]:
    """Return the image of a reference [H, W, 3] uint8 at its annotated size.

    Raises DcrisError if it has another size and may not be stretched.
    """
    height, width = reference.image_size
    if image.shape[:2] == reference.image_size:
        return image
    if reference.stretched:
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    raise DcrisError(
        f"{reference.image_path} is {image.shape[1]}x{image.shape[0]} pixels, but its annotations are for {width}x{height}; "
        "it was resized or replaced, so download the original"
    )


def _return_free_memory() -> None:
    """Give freed memory back to the system where the C library is glibc.

    By itself it keeps what its heap cannot shrink by: after larger blocks were freed, Pillow's
    blocks of 16 MB come from there, and the network's arrays would be allocated beside them.
    """
    with suppress(AttributeError, OSError, TypeError):  # TypeError: on Windows
        ctypes.CDLL(None).malloc_trim(0)


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Return height and width of the image that `read_image` would return, reading only headers.

    Raises DcrisError as `read_image` does, except for errors that only decoding finds.
    """
    with _opened(source, header_only=True) as image:
        width, height = image.size
        # For TIFF, Pillow applies the orientation to the size itself.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (width, height) if sideways else (height, width)


def usual_ending(path: Path) -> str:
    """Return the ending of an image file's name, or if that is not one of `image_endings`, one of
    its format. Raises DcrisError as `image_size` does."""
    if path.suffix.lower() in image_endings():
        return path.suffix
    with _opened(path, header_only=True) as image:
        return ".jp2" if image.format == "JPEG2000" else f".{str(image.format).lower()}"


def read_mask_image(source: Path | bytes, threshold: float | None = None, *, once: bool = False) -> NDArray[np.uint8]:
    """Read a mask image as an upright mask, [H, W] uint8 of 0 and 1; see `binary_mask`.

    Palette images are read by index, as segmentation tools write them. Black and fully transparent
    pixels are 0. Raises DcrisError as `read_image` and `binary_mask` do.
    """
    with _opened(source) as image:
        image.load()
        mode = {"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)
        if "transparency" in image.info:  # one colour is transparent, instead of an alpha channel
            mode = {"1": "LA", "L": "LA", "RGB": "RGBA"}.get(mode, mode)
        if mode not in ("1", "L", "P", "I", "F", "LA", "PA", "RGBA") and not mode.startswith("I;16"):
            mode = "RGB"
        pixel = np.asarray(image.crop((0, 0, 1, 1)).convert(mode))
        dtype = np.uint16 if _has_16_bits(image) else pixel.dtype
        values = _upright(image, pixel.shape[2:], dtype, lambda band: np.asarray(band.convert(mode)))
    if values.shape[2:] in ((2,), (4,)):
        values[(values[..., -1] == 0) | ~values[..., :-1].any(axis=2)] = 0
    name = "image" if isinstance(source, bytes) else str(source)
    return binary_mask(values, name, threshold, once=once)


def read_label_image(source: Path | bytes) -> NDArray[np.uint8]:
    """Read an image of labels, one value for each object of a frame, as [H, W] uint8.

    Palette images are read by index, grey ones by value. Raises DcrisError as `read_image` does,
    and if the image is in colour or has more than 8 bits.
    """
    with _opened(source) as image:
        if image.mode not in ("1", "L", "P"):
            raise DcrisError("it is in colour or has more than 8 bits; labels are an indexed or a grey image")
        image.load()
        return _upright(image, (), np.uint8, lambda band: np.asarray(band, np.uint8))


_SUMMED = 250
"""Least value of an object in masks of CRIS's tools/data_process.py, which adds the masks of its
polygons and multiplies by 255 in 8 bits: 254 where two overlap, 253 where three do."""


def binary_mask(
    values: NDArray[Any], name: str, threshold: float | None = None, *, once: bool = False
) -> NDArray[np.uint8]:
    """Convert the values of a mask image to [H, W] uint8 of 0 and 1.

    A mask with soft edges or saved as JPEG, a probability map and a map of several objects have
    more than two values. Which of them belong to the object is unknown, so a threshold is required;
    not for 8-bit values that are all 0 or nearly 255, as in masks of CRIS.

    Args:
        values: [H, W] or [H, W, C]; 0 is background. With two or four channels, the last one is
            alpha.
        name: name of the mask in errors.
        threshold: used if there are more values than 0 and one other: a pixel is 1 if its value
            (that of its brightest channel, times its opacity) is greater. Below 1 it is a share of
            the full scale: 1 for floating-point values, 255 for 8 bits, 65,535 for 16 bits, and the
            greatest value for more bits.
        once: pixels in several polygons of a mask of CRIS are background.

    Raises:
        DcrisError: a threshold is required and not given.
    """
    found: NDArray[np.bool_] = np.any(values, axis=2) if values.ndim == 3 else np.asarray(values != 0)
    if not found.any():
        return found.astype(np.uint8)
    value = values[np.unravel_index(found.argmax(), found.shape)]
    same = values == value
    if np.array_equal(found, same.all(axis=2) if values.ndim == 3 else same):
        return found.astype(np.uint8)
    if threshold is None and values.dtype == np.uint8 and values[found].min() >= _SUMMED:
        return ((values == 255) if once and values.ndim == 2 else found).astype(np.uint8)
    if threshold is None:
        raise DcrisError(
            f"the mask {name} has more values than 0 and one other (from {values.min():g} to {values.max():g}); save it with "
            "two values (one object per mask, no soft edges, not as JPEG), or give --mask-threshold"
        )
    if values.ndim == 3:
        opacity = values[..., -1] / 255 if values.shape[2] in (2, 4) else 1
        values = (values[..., : -1 if values.shape[2] in (2, 4) else None].max(axis=2) * opacity).astype(values.dtype)
    if threshold < 1 and values.dtype.kind in "iu":
        threshold *= np.iinfo(values.dtype).max if values.dtype in (np.uint8, np.uint16) else values.max()
    return (values > threshold).astype(np.uint8)


ImageLike = Union[PathLike, bytes, BinaryIO, Image.Image, NDArray[np.uint8], "Tensor"]
"""A path, an http(s) address, the bytes of an image file, an open one, a PIL image of any mode;
uint8 pixels: RGB [H, W, 3], RGBA [H, W, 4], grey [H, W] or [H, W, 1]; or a torch tensor [3, H, W]
or [1, H, W], uint8 or floating point in 0..1."""

Rereadable = Path | bytes | Image.Image | NDArray[np.uint8]
"""An image in a form that can be read any number of times."""

Channels = Literal["rgb", "bgr"]
"""Order of the channels of arrays and tensors: that of PIL, or that of OpenCV."""


def as_pixels(image: ImageLike, channels: Channels = "rgb") -> NDArray[np.uint8]:
    """Convert an image in any accepted form to [H, W, 3] uint8 RGB.

    Args:
        image: see ImageLike. An open file is read to its end.
        channels: order of the channels of arrays and tensors.

    Raises:
        DcrisError: it cannot be read or downloaded, or is not an image.
    """
    source = as_rereadable(image, channels)
    if isinstance(source, Path | bytes):
        return read_image(source)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    count = source.shape[2] if source.ndim == 3 else 1
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or count not in (1, 3, 4) or 0 in source.shape:
        raise DcrisError(
            f"an image array must be uint8 [H, W, 3] RGB, [H, W, 4] RGBA or [H, W] grey, and is "
            f"{source.dtype} {list(source.shape)}"
        )
    refuse_shape(*source.shape[:2])
    if count == 3:
        return source
    return to_rgb(Image.fromarray(np.ascontiguousarray(source if count == 4 else source.reshape(source.shape[:2]))))


def require_channels(channels: Channels) -> None:
    """Raise DcrisError if there is no such order of channels."""
    if channels not in get_args(Channels):
        raise DcrisError(f"channels must be one of {', '.join(get_args(Channels))}, not {channels!r}")


def as_rereadable(image: ImageLike, channels: Channels = "rgb") -> Rereadable:
    """Return an image in a form that `as_pixels` accepts any number of times, with channels in the
    order of RGB.

    An address is downloaded and an open file is read, at most 1 GB; a tensor becomes an array.

    Args and errors: as in `as_pixels`.
    """
    require_channels(channels)
    if isinstance(image, str) and is_url(image):
        try:
            return get(image, _MAX_FILE)
        except HTTP_ERRORS as error:
            raise DcrisError(
                f"cannot download {image} ({reason_of(error)}); check the address and the network"
            ) from error
    if isinstance(image, str | os.PathLike):
        return as_path(image, "an image")
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _as_rgb(np.asarray(image), channels)  # not of a subclass, such as np.ma, with other arithmetic
    if (torch := sys.modules.get("torch")) is not None and isinstance(image, torch.Tensor):
        return _as_rgb(_tensor_pixels(image), channels)
    if hasattr(image, "read"):
        return _read_open(cast(BinaryIO, image))
    raise DcrisError(
        "an image must be a path, an http(s) address, the bytes of a file, an open file, a PIL image, a NumPy array or a "
        f"torch tensor, not {type(image).__name__}; give several images as a list to predict"
    )


def _as_rgb(image: NDArray[np.uint8], channels: Channels) -> NDArray[np.uint8]:
    flips = channels == "bgr" and image.ndim == 3 and image.shape[2] in (3, 4)
    return image[..., [2, 1, 0, 3][: image.shape[2]]] if flips else image


def _read_open(file: BinaryIO) -> bytes:
    try:
        content = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise DcrisError(f"cannot read the given file ({error})") from error
    if not isinstance(content, bytes):
        raise DcrisError("the given file is open as text; open it with mode 'rb'")
    if len(content) > _MAX_FILE:
        raise DcrisError(f"the given file has more than {_MAX_FILE:,} bytes")
    return content


def _tensor_pixels(image: "Tensor") -> NDArray[np.uint8]:
    """Convert a tensor [3, H, W] or [1, H, W] to an array [H, W, C] uint8."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise DcrisError(f"an image tensor must be [3, H, W] or [1, H, W], and is {list(image.shape)}")
    if image.is_meta or str(image.layout) != "torch.strided":
        raise DcrisError(f"an image tensor must be dense and have values, and is {image.layout} on {image.device}")
    values = image.detach().cpu()
    if values.is_floating_point():
        values = values.float()  # 8-bit types cannot be compared
        # NaN fails the comparison, too.
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise DcrisError(
                f"a floating-point image tensor must have values in 0..1, and has {values.min():g} to {values.max():g}; do not "
                "normalise it"
            )
        values = (values * 255).round().byte()
    if str(values.dtype) != "torch.uint8":
        raise DcrisError(f"an image tensor must be uint8 or floating point, and is {values.dtype}")
    array: NDArray[np.uint8] = values.permute(1, 2, 0).contiguous().numpy()
    return array


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a Pillow image to [H, W, 3] uint8 RGB by the rules of `read_image`.

    Raises DcrisError if the image is empty, has more than `MAX_PIXELS`, or cannot be decoded.
    """
    try:
        refuse_shape(image.size[1], image.size[0])
        return _pixels(image)
    except Exception as error:
        raise DcrisError(
            f"cannot read the given image ({_reason(error)}); open it again or give another one"
        ) from error


@contextmanager
def _opened(source: Path | bytes, max_pixels: int = MAX_PIXELS, *, header_only: bool = False) -> Iterator[Image.Image]:
    """Open an image with bounded cost, and convert errors of its decoder to DcrisError.

    With `header_only`, the scans of a JPEG are not counted, because that reads the whole file.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source, _MAX_FILE) as file:
            yield _open(file, max_pixels, header_only)
    except Exception as error:  # Pillow's decoders raise nearly any error for a broken file
        raise _cannot_read(source, error) from error


def _open(file: BinaryIO, max_pixels: int, header_only: bool) -> Image.Image:
    """Read a header.

    Not with Image.open, whose guard against huge files is a global warning and a lower limit.
    """
    _init_pillow()
    start = file.read(32)
    if not start:
        raise DcrisError("the file is empty")
    late = start.startswith(b"\x89PNG") and _has_late_metadata(file)
    if start[:2] in (b"II", b"MM"):
        _refuse_tags(file)
    if start[:2] == b"\xff\xd8":
        _refuse_segments(file)
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or accepts is None or not _decodable(name) or accepts(start) is not True:
            continue
        file.seek(0)
        try:
            image: Image.Image = factory(file, "")
        except SyntaxError:  # not this format after all: AVIF and HEIF begin alike
            continue
        refuse_shape(image.size[1], image.size[0], max_pixels)
        _refuse_costly(image, name, None if header_only else file)
        if late:
            image.load()
        return image
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
        raise DcrisError(NEEDS_PILLOW_HEIF)
    raise DcrisError(f"it is not an image in one of the formats {', '.join(filter(_decodable, _FORMATS))}")


def refuse_shape(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DcrisError for an image without pixels, or above `max_pixels` or `MAX_SIDE`."""
    if not 0 < width * height <= max_pixels or max(height, width) > MAX_SIDE:
        raise DcrisError(
            f"it is {width} x {height} pixels; the limits are {max_pixels:,} pixels and {MAX_SIDE:,} per side"
        )


def _refuse_costly(image: Any, name: str, file: BinaryIO | None) -> None:
    """Raise DcrisError if decoding takes too much memory, or too many passes over `file`."""
    width, height = image.size
    per_pixel = float(_FORMATS[name][1])  # bytes, beside those of Pillow and the returned array
    if name == "JPEG":
        scans = 1 if file is None else _count_scans(file)
        if scans > _MAX_SCANS:
            raise DcrisError(f"it is a JPEG with more than {_MAX_SCANS} scans; save it again")
        if scans > 1 or "progressive" in image.info:  # all coefficients are in memory, 16 bits each
            sampling = [across * down for _, across, down, _ in getattr(image, "layer", [])] or [1] * 4
            per_pixel += 2 * sum(sampling) / max(sampling)
    elif name == "TIFF":
        per_pixel += _strip_bytes(image) / (width * height)
        per_pixel += 4 * (image.tag_v2.get(0x0112, 1) != 1)  # Pillow rotates a copy
    per_pixel += 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    needed = (per_pixel + 3) * width * height
    if needed > _MAX_MEMORY:
        raise DcrisError(
            f"it is {width} x {height} pixels, which need {needed / 1e9:.2f} GB of memory in this format; the limit is "
            f"{_MAX_MEMORY / 1e9:.2f} GB; make it smaller or save it as JPEG"
        )


_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""Start of a JPEG segment. Within compressed data, 0xFF is followed by 0 or a restart marker."""

_WITHOUT_LENGTH = frozenset({0xC8, 0xD8, _END_OF_IMAGE, *range(0xF0, 0xFE)})
"""Markers that Pillow does not take for the start of a segment. Of these, decoders accept the end
of the image only."""


def _segments(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment of a JPEG, and how many bytes before it belong to none.

    By Pillow's rules, so that nothing can be hidden from them. After the last segment, the marker
    is 0. Compressed pixels are between segments, and only read if the caller continues.
    """
    at = file.seek(2)
    start, size = at, _FEW
    while data := file.read(size):
        found = _MARKER.search(data)
        if found is None:
            size = _CHUNK
            at += len(data) - (len(data) > 1 and data.endswith(b"\xff"))  # the next byte may make it a marker
            file.seek(at)
            continue
        at += found.end()
        yield data[found.end() - 1], at - start - 2
        if data[found.end() - 1] not in _WITHOUT_LENGTH:
            file.seek(at)
            at += max(2, int.from_bytes(file.read(2), "big"))
        start, size = file.seek(at), _FEW
    yield 0, at - start


def _count_scans(file: BinaryIO) -> int:
    """Count the scans of a JPEG file's first image, up to one more than are accepted."""
    scans = 0
    for marker, _ in _segments(file):
        scans += marker == _START_OF_SCAN
        # Thumbnails are inside segments, further images after the end of the first.
        if marker == _END_OF_IMAGE or scans > _MAX_SCANS:
            break
    return scans


def _strip_bytes(image: Any) -> int:
    """Return the bytes of a TIFF's largest strip or tile, which libtiff decodes as a whole."""
    if not any(tile[0] == "libtiff" for tile in image.tile):
        return 0
    tags = image.tag_v2
    wide, high = tags.get(256, 0), tags.get(257, 0)
    wide, high = (tags[322], tags.get(323, high)) if 322 in tags else (wide, min(high, tags.get(278, high)))
    return int(wide * high * sum(tags.get(258, (1,))) // 8)


def _refuse_segments(file: BinaryIO) -> None:
    """Raise DcrisError if a JPEG has very many segments, such as comments, before its pixels, or
    very many bytes between them, which Pillow reads one by one."""
    between = 0
    for number, (marker, before) in enumerate(_segments(file), 1):
        between += before
        if number > _MAX_SEGMENTS:
            raise DcrisError(f"it is a JPEG with more than {_MAX_SEGMENTS:,} segments before its pixels; save it again")
        if between > _MAX_BETWEEN:
            raise DcrisError(f"it is a JPEG with more than {_MAX_BETWEEN:,} bytes between its segments; save it again")
        if marker == _START_OF_SCAN:
            return


def _refuse_tags(file: BinaryIO) -> None:
    """Raise DcrisError if the tags of a TIFF file or EXIF block claim more bytes than it has.

    Pillow copies the bytes of each tag, and 65,535 tags could each claim the whole file.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in head[2:4]
    (offset,) = struct.unpack(order + ("Q" if big else "L"), head[8:16] if big else head[4:8])
    file.seek(min(offset, size))
    (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2).ljust(8 if big else 2, b"\0"))
    entry = struct.Struct(order + ("HHQ8x" if big else "HHL4x"))
    entries = file.read(entry.size * min(count, 65_535))
    widths = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
    claimed = 0
    for _, kind, numbers in entry.iter_unpack(entries[: len(entries) // entry.size * entry.size]):
        claimed += numbers * widths.get(kind, 1)
        if claimed > size or (numbers > _MAX_NUMBERS and kind in widths):
            raise DcrisError("its tags claim more bytes than the file has; save it again")


def _has_late_metadata(file: BinaryIO) -> bool:
    """Return whether a PNG has text or EXIF after its pixels.

    Pillow reads that only after decoding.
    """
    file.seek(8)
    pixels = False
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">L4s", header)
        if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt") and pixels:
            return True
        pixels = pixels or kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)
    return False


def _orientation(image: Image.Image) -> int:
    try:
        exif = image.info.get("exif")
        if exif:
            _refuse_tags(io.BytesIO(exif.removeprefix(b"Exif\0\0")))
        return int(Image.Image.getexif(image).get(0x0112, 1))  # the override for PNG would decode the image
    except Exception:  # broken EXIF data do not make the image unreadable
        return 1


def _upright(image: Image.Image, channels: tuple[int, ...], dtype: Any, convert: Callable[[Any], Any]) -> NDArray[Any]:
    """Convert a loaded image to an upright array [H, W, *channels], with `convert` band by band."""
    width, height = image.size
    orientation = _orientation(image)
    shape = (width, height) if orientation in _SIDEWAYS else (height, width)
    upright = np.empty((*shape, *channels), dtype)
    stored = _STORED[orientation](upright) if orientation in _STORED else upright
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        stored[top : top + rows] = convert(band)
    return upright


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether the values of an image are 0 to 65,535, in any byte order.

    Pillow reads PGM files of more than 8 bits so, but as 32-bit integers.
    """
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    image.load()  # for TIFF, this applies the orientation and removes its tag
    if image.mode == "F":
        raise DcrisError("it has floating-point pixels of unknown range; save it with 8 bits per channel")
    if _has_16_bits(image):  # Pillow's own conversion clips values above 255
        return _upright(image, (3,), np.uint8, lambda band: (np.asarray(band) >> 8)[..., None])
    if image.mode == "I":
        least, greatest = cast(tuple[int, int], image.getextrema())
        if least < 0:
            raise DcrisError(
                "it has negative pixels, or 32-bit ones of 2,147,483,648 or more; save it with 8 bits per channel"
            )
        scale = max(255, greatest)
        return _upright(image, (3,), np.uint8, lambda band: (np.asarray(band, np.int64) * 255 // scale)[..., None])
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return _upright(image, (3,), np.uint8, _on_white)
    return _upright(image, (3,), np.uint8, lambda band: np.asarray(band.convert("RGB")))


def _on_white(band: Image.Image) -> NDArray[np.uint8]:
    # Pillow cannot convert La, which is LA multiplied by its transparency, to RGBA at once.
    transparent = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
    opaque = Image.new("RGB", band.size, "white")
    opaque.paste(transparent, mask=transparent.getchannel("A"))
    return np.asarray(opaque)


def _cannot_read(path: Path | bytes, error: Exception) -> DcrisError:
    if isinstance(path, bytes):
        return DcrisError(f"cannot read the image ({_reason(error)}); replace or remove it")
    if isinstance(error, FileNotFoundError):
        if (found := _in_other_form(path)) is not None:
            return DcrisError(
                f"there is no image file {path}, but one of the same letters in another Unicode normal form (NFC or NFD; macOS "
                f"changes it): {str(found)!a}; rename that file or folder, or write the name in its form"
            )
        return DcrisError(f"there is no image file {path}; check the name, or download the images again")
    return DcrisError(f"cannot read the image {path} ({_reason(error)}); replace or remove that file")


def _in_other_form(path: Path) -> Path | None:
    """Return the path of an existing file that differs only in the Unicode normal forms of its
    parts: "\u00e9" may be one character or two, which look alike."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        forms = (found / each for each in (part, normalize("NFC", part), normalize("NFD", part)))
        # Path.exists raises an error for names that a longer form makes too long.
        there = next((each for each in forms if os.path.exists(each)), None)  # noqa: PTH110
        if there is None:
            return None
        found = there
    return None if found == path else found


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
