"""Which images a model was trained on, so that an evaluation can say which of its images those are.

A run has training_images.bin: a heading and a hash of 6 bytes for each image, sorted, so 100 kB for
RefCOCO. No file name can be read from it, so it may be published with a model. An image of COCO is
known by its number, under any naming (train2014, val2014, 2017) or as its data set records it, any
other by its file name, its size in bytes and a part of its content: names such as 1.jpg occur in
every data set, and without compression all images have one size. Two different images have the same
hash with a probability of 4e-15.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dcris.data.coco import coco_number
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import open_regular, read_bytes, reading

FILE = "training_images.bin"

_HEADING = b"dcris training images 1\n"
_LENGTH = 6
_PART = 1 << 16
"""Bytes in the middle of a file that are read: the first are headers and often a plain border."""

_MAX_BYTES = 60_000_000
"""Of a file: ten million images."""

Images = frozenset[bytes]
"""Hashes of images."""


def image_hash(reference: Reference) -> bytes | None:
    """Return the hash of a reference's image; None if it is not COCO's and cannot be read."""
    path = reference.image_path
    number = coco_number(path.name, reference.coco_id)
    if number is not None:
        return hashlib.sha256(number.encode()).digest()[:_LENGTH]
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _PART) // 2)
            part = file.read(_PART)
    except (OSError, ValueError):
        return None
    name = f"{path.name}\n{size}\n".encode(errors="surrogateescape")
    return hashlib.sha256(name + part).digest()[:_LENGTH]


def hash_images(references: Iterable[Reference]) -> Images:
    """Return the hashes of all images that the references have."""
    first = {reference.image_path: reference for reference in references}
    return frozenset(found for reference in first.values() if (found := image_hash(reference)) is not None)


def pack_images(images: Images) -> bytes:
    """Return the content of FILE."""
    return _HEADING + b"".join(sorted(images))


def read_images(checkpoint: Path) -> Images:
    """Return the images that a checkpoint was trained on; empty if that is unknown.

    Args:
        checkpoint: its directory, as `find_checkpoint` returns it: FILE is there, or in its run.

    Raises:
        DcrisError: the file is damaged or cannot be read.
    """
    places = [checkpoint, checkpoint.parent.parent] if checkpoint.parent.name == "checkpoints" else [checkpoint]
    path = next((place / FILE for place in places if (place / FILE).exists()), None)
    if path is None:
        return frozenset()
    with reading(path):
        return unpack_images(read_bytes(path, _MAX_BYTES), path)


def unpack_images(content: bytes, path: Path) -> Images:
    """Return the images in the content of FILE, which is `path`; DcrisError if it is damaged."""
    hashes = content.removeprefix(_HEADING)
    if len(hashes) == len(content) or len(hashes) % _LENGTH:
        raise DcrisError(
            f"{path} is not a list of training images; copy it again, or delete it to evaluate without knowing them"
        )
    return frozenset(hashes[start : start + _LENGTH] for start in range(0, len(hashes), _LENGTH))


def images_to_text(images: Images) -> str:
    """Return images as text for the metadata of a bundle."""
    return base64.b64encode(pack_images(images)).decode("ascii")


def images_from_text(text: str, path: Path) -> Images:
    """Return the images in the metadata of the bundle `path`.

    Raises DcrisError if they are damaged.
    """
    try:
        return unpack_images(base64.b64decode(text, validate=True), path)
    except (binascii.Error, ValueError) as error:
        raise DcrisError(f"the training images in the metadata of {path} are damaged; copy the bundle again") from error
