"""Where a data set's photographs are, and under which of COCO's two namings."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

OFFICIAL_FOLDER = "images/mscoco/images/train2014"
"""Below the root, in the REFER release."""

_FOLDERS = (
    OFFICIAL_FOLDER,
    "images/train2014",
    "train2014",
    "images/mscoco/images/train2017",
    "images/train2017",
    "train2017",
    "images",
)
NAMINGS = ("as recorded", "2017", "2014")
_NUMBERED = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg")
_LONG_NAME = re.compile(r"COCO_train2014_(\d{12}\.jpg)")
_NUMBER = re.compile(r"\d{12}\.jpg$")
_SHORT_NAME = re.compile(r"\d{12}\.jpg")


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A folder of photographs and the naming in it."""

    folder: Path
    naming: str = "as recorded"
    """One of "as recorded", "2014" (COCO_train2014_000000000036.jpg) and "2017" (000000000036.jpg)."""

    def path(self, name: str) -> Path:
        """The file of a photograph that the annotations call `name`. It is not looked for."""
        return self.folder / renamed(name, self.naming)


def renamed(name: str, naming: str) -> str:
    """A photograph's name under a naming.

    COCO released train2014 again as a part of train2017, without the prefix; the pictures are the same.
    """
    if naming == "2017" and (match := _LONG_NAME.fullmatch(name)):
        return match[1]
    if naming == "2014" and _SHORT_NAME.fullmatch(name):
        return f"COCO_train2014_{name}"
    return name


def image_ids(names: Iterable[str]) -> dict[str, int]:
    """A number for each photograph, where annotations give none: COCO's, or, if any has none, their places in the list."""
    distinct = list(dict.fromkeys(names))
    numbers = {name: int(match[0][:12]) for name in distinct if (match := _NUMBER.search(name))}
    return (
        numbers
        if len(set(numbers.values())) == len(distinct)
        else {name: place for place, name in enumerate(distinct, 1)}
    )


def name_within(path: Path, folder: Path) -> str:
    """What a file is called wherever its data set lies: COCO's number of it, or else its path from the data set's folder."""
    number = _NUMBERED.fullmatch(path.name)
    if number:
        return number[1]
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def find_photographs(root: Path, names: Iterable[str]) -> ImageFolder:
    """The folder below `root` that has the first of `names` that is found at all, under either naming.

    Where none is found, the official folder, so that errors name the place where people will put them.
    """
    for name in names:
        for folder in _FOLDERS:
            for naming in NAMINGS:
                photographs = ImageFolder(root / folder, naming)
                if photographs.path(name).exists():
                    return photographs
    return ImageFolder(root / OFFICIAL_FOLDER)
