"""Any photograph a person may have, as one kind of array: uint8 [H, W, 3], red first, turned the way it was taken.

Pillow decodes everything. The published results were made with cv2, which gives the same pixels for ordinary JPEG and takes
nine tenths of the time, but fills what a cut file lacks with grey and says nothing.
"""

import io
import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dcris.errors import DcrisError

# What Pillow logs of a broken file is raised, too; nobody who has not asked for a log is to read it twice.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MAX_PIXELS = 300_000_000
"""Larger images are refused: a file of a few kilobytes can claim any size."""

MAX_SIDE = 65_535
"""So are longer ones, which no JPEG holds: what is kept for each row and column of a photograph adds up."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""What is tried. Pillow knows dozens more, of which some start other programs (EPS) or hold no pixels of their own."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of EXIF's orientation; 5 to 8 exchange width and height."""


def read_image(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file, or its bytes, as [H, W, 3] uint8 RGB, with its EXIF orientation applied, transparency laid on white.

    Of an animation the first frame is read; 16-bit pixels keep their upper 8 bits. Raises DcrisError where the file is missing,
    not an image, cut short, or larger than `max_pixels`.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            return _pixels(_open(file, max_pixels))
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise _cannot_read(source, error) from error


def read_mask_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture of a mask as [H, W] uint8 of 0 and 1: a pixel is 1 unless it is 0, black, or wholly transparent.

    Palettes are read by index, as segmentation tools write them. No orientation is applied. Raises DcrisError where the file
    is missing, not an image, cut short, or larger than `MAX_PIXELS`.
    """
    try:
        with path.open("rb") as file:
            image = _open(file)
            image.load()
            pixels = np.asarray(image)
    except Exception as error:
        raise _cannot_read(path, error) from error
    if pixels.ndim == 2:
        return np.asarray(pixels != 0, np.uint8)
    colours = pixels[..., :-1] if image.mode in ("LA", "RGBA") else pixels
    found: NDArray[np.bool_] = np.any(colours, axis=2)
    if image.mode in ("LA", "RGBA"):
        found &= pixels[..., -1] != 0
    return np.asarray(found, np.uint8)


def mask_image_size(path: Path) -> tuple[int, int]:
    """Height and width of the mask that `read_mask_image` would return, from the file's header alone. Raises as that does."""
    try:
        with path.open("rb") as file:
            width, height = _open(file).size
            return height, width
    except Exception as error:
        raise _cannot_read(path, error) from error


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Height and width of the image that `read_image` would return, from the header of a file or of its bytes alone.

    A PNG is decoded for it, since its orientation may stand behind the pixels.
    Raises DcrisError where the file is missing, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            image = _open(file)
            width, height = image.size
            # Of a TIFF, Pillow gives the size after its orientation.
            turn = None if image.format == "TIFF" else _turn(image)
            return (width, height) if turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]) else (height, width)
    except Exception as error:
        raise _cannot_read(source, error) from error


ImageLike = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image of any mode, or pixels of uint8: RGB [H, W, 3], RGBA [H, W, 4], grey [H, W] or [H, W, 1]."""


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Whatever people have as an image, as [H, W, 3] uint8 RGB. Raises DcrisError where it cannot be read, or is none."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        raise DcrisError(
            f"an image is a path, a PIL image or a numpy array, and this is a {type(image).__name__}; several images are a list"
        )
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        raise DcrisError(
            f"an array must be uint8 [H, W, 3] in RGB ([H, W, 4] and [H, W] are taken, too), and is {image.dtype} "
            f"{list(image.shape)}"
        )
    refuse_shape(*image.shape[:2])
    if channels == 3:
        return image
    return to_rgb(Image.fromarray(np.ascontiguousarray(image if channels == 4 else image.reshape(image.shape[:2]))))


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A Pillow image as [H, W, 3] uint8 RGB, by the same rules as `read_image`: orientation applied, transparency on white.

    Raises DcrisError where the image is empty, larger than `MAX_PIXELS`, or cannot be decoded.
    """
    try:
        refuse_shape(image.size[1], image.size[0])
        return _pixels(image)
    except Exception as error:
        raise DcrisError(f"cannot read the given image ({_reason(error)}); open it anew or give another one") from error


def _open(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a header, without Image.open: its guard against huge files is a warning and a limit below ours, both global."""
    Image.init()
    start = file.read(32)
    if not start:
        raise DcrisError("the file is empty")
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or accepts is None or accepts(start) is not True:
            continue
        file.seek(0)
        image: Image.Image = factory(file, "")
        refuse_shape(image.size[1], image.size[0], max_pixels)
        return image
    raise DcrisError("it is not a JPEG, PNG, WebP, BMP, GIF or TIFF image")


def refuse_shape(height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DcrisError for a picture of no pixels, more than `max_pixels`, or a side over `MAX_SIDE`."""
    if not 0 < width * height <= max_pixels or max(height, width) > MAX_SIDE:
        raise DcrisError(
            f"it is {width} x {height} pixels, and 1 to {max_pixels:,} pixels are read, up to {MAX_SIDE:,} a side"
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF data does not make the picture unreadable
        return None


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    image.load()  # a TIFF loses its orientation tag here, since loading applies it
    turn = _turn(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise DcrisError("it holds floating-point pixels, whose range nobody knows")
    if image.mode.startswith("I"):  # Pillow's own conversion of 16-bit grey cuts every value above 255 to white
        grey = (np.clip(np.asarray(image), 0, 65_535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        transparent = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(transparent, mask=transparent.getchannel("A"))
    return np.array(image.convert("RGB"), np.uint8)


def _cannot_read(path: Path | bytes, error: Exception) -> DcrisError:
    if isinstance(path, bytes):
        return DcrisError(f"cannot read the image ({_reason(error)}); replace it or leave it out")
    if isinstance(error, FileNotFoundError):
        return DcrisError(f"there is no image file {path}; check the name, or fetch the images again")
    return DcrisError(f"cannot read the image {path} ({_reason(error)}); replace that file or leave it out")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
