"""Facts about COCO: categories, names and folders of image files, and the image server."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

IMAGE_SERVER = "http://images.cocodataset.org/{}"
"""COCO's own server, which serves single images of "train2014" and its other folders. HTTPS fails:
the certificate is for another host."""

IMAGE_FOLDER = "images/mscoco/images/train2014"
"""Folder of the images below the root, in the REFER release."""

_IMAGE_FOLDERS = (
    IMAGE_FOLDER,
    "images/mscoco/train2014",
    "images/train2014",
    "train2014",
    "images/trainval2014",
    "trainval2014",
    "images/mscoco/images/train2017",
    "images/train2017",
    "train2017",
    "images",
)
"""Folders below the root that are searched for images, in this order."""

NAMINGS = ("as recorded", "2017", "2014")
"""How an image file may be named: as the annotations record it, 000000000036.jpg (release of 2017),
or COCO_train2014_000000000036.jpg (release of 2014)."""

_ANY_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg")
_NAME_OF_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")
_OF_VAL2014 = "COCO_val2014_"
_NAME_OF_2017 = re.compile(r"\d{12}\.jpg")
_NUMBER_AT_END = re.compile(r"\d{12}\.jpg$")

# fmt: off
CATEGORIES: Mapping[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
# fmt: on
"""Names of the 80 categories by category_id, which goes from 1 to 90 with gaps."""


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A folder of images and how the files in it are named (one of NAMINGS)."""

    folder: Path
    naming: str = "as recorded"

    def path(self, name: str) -> Path:
        """Return the path of the image that the annotations call `name`; it may be missing.

        Ref-ZOM has images of train2014 and val2014. Where these are not merged into one folder, the
        second is beside the first.
        """
        folder = self.folder
        if folder.name == "train2014" and name.startswith(_OF_VAL2014):
            folder = folder.with_name("val2014")
        return folder / rename_image(name, self.naming)


def find_images(root: Path, names: Iterable[str], usual: str | None = None) -> ImageFolder:
    """Find the folder of the images below `root`, by the first of `names` that exists there.

    All namings are tried.

    If none is found, return the `usual` folder, by default that of the REFER release, so that
    errors name the usual place.
    """
    folders = _IMAGE_FOLDERS if usual is None else (usual, *_IMAGE_FOLDERS)
    for name in names:
        for folder in folders:
            for naming in NAMINGS:
                images = ImageFolder(root / folder, naming)
                if images.path(name).exists():
                    return images
    return ImageFolder(root / folders[0])


def rename_image(name: str, naming: str) -> str:
    """Return the name of an image file under another naming (one of NAMINGS).

    The images of train2014, and nearly all of val2014, are part of train2017, where their names
    have no prefix.
    """
    if naming == "2017" and (match := _NAME_OF_2014.fullmatch(name)):
        return match[1]
    if naming == "2014" and _NAME_OF_2017.fullmatch(name):
        return f"COCO_train2014_{name}"
    return name


def portable_name(path: Path, folder: Path, coco_id: int | None = None) -> str:
    """Return a name for a file that is the same wherever its data set is stored.

    That is COCO's image number, under any naming or as the data set records it, or else the path
    relative to `folder`, the data set's.
    """
    number = coco_number(path.name, coco_id)
    if number is not None:
        return number
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def coco_number(name: str, coco_id: int | None = None) -> str | None:
    """Return COCO's number of an image, 12 digits: as its data set records it, or from its file
    name under any naming. None if it is not of COCO."""
    if coco_id is not None:
        return f"{coco_id:012d}"
    match = _ANY_NAME.fullmatch(name)
    return match[1] if match else None


def image_ids(names: Iterable[str]) -> dict[str, int]:
    """Number images whose annotations have no image_id.

    These are COCO's numbers, read from the file names; or, if any name has no number or two names
    have the same one, positions in the list, from 1.
    """
    distinct = list(dict.fromkeys(names))
    numbers = {name: int(match[0][:12]) for name in distinct if (match := _NUMBER_AT_END.search(name))}
    if len(set(numbers.values())) == len(distinct):
        return numbers
    return {name: number for number, name in enumerate(distinct, 1)}
