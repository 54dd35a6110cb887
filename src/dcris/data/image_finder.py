"""Find the images that the export of an annotation tool names."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar
from unicodedata import normalize
from urllib.parse import unquote

from dcris.data.images import image_endings, image_size
from dcris.data.table import inner_path, path_parts, shown
from dcris.data.tools.annotation import Annotation, Size
from dcris.errors import DcrisError

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value", Path, Size)

_MAX_FILES = 5_000_000
"""Most files that are looked at when an image is searched for by its name."""

_UPLOAD = re.compile("[0-9a-f]{8}-(.+)", re.DOTALL)
"""Name of a file that Label Studio stores: eight hexadecimal digits before the name that it had."""

_NOT_STORED = re.compile(r"[^-\w.]")
"""Characters that Label Studio leaves out of the name of an upload, after it has replaced spaces by
underscores (Django's `get_valid_filename`)."""


class ImageFinder:
    """Finds images by path, then by the last part of their path.

    Names come from files of unknown origin, so only files below the folder are ever found.

    Args:
        source: the export, a file or a folder.
        images: folder of the images; None: the export's folder.
    """

    def __init__(self, source: Path, images: Path | None) -> None:
        folder = source if source.is_dir() else source.parent
        if images is None and not source.is_dir() and folder.name in ("annotations", "ann", "labels"):
            folder = folder.parent
        self.images, self.root = images, folder if images is None else images
        if not self.root.is_dir():
            raise DcrisError(
                f"there is no folder {self.root}; --images takes the folder that the file names are relative to"
            )
        self._by_name: dict[str, list[Path]] | None = None
        self._by_upload: dict[str, list[Path]] = defaultdict(list)
        self._found: dict[tuple[str, Path], Path | str] = {}
        self._sizes: dict[Path, Size | str] = {}

    def find(self, annotation: Annotation) -> Path:
        """Return the path of the image of an annotation. Raises DcrisError if none is found."""
        return _unless_error(self._found, (annotation.image, annotation.path.parent), self._search)

    def size(self, image: Path) -> Size:
        """Return the size of an image that was found. Raises DcrisError if it cannot be read."""
        return _unless_error(self._sizes, image, image_size)

    def _search(self, key: tuple[str, Path]) -> Path:
        name, beside = key
        # Relative addresses look like paths, but have names such as "red%20cup.jpg".
        if found := self._look_for(name, beside) or self._look_for(unquote(name), beside):
            return found
        raise DcrisError(
            f"there is no image file {shown(name)} in {self.root}, nor one of its name in a folder below; give the folder of "
            "the images with --images"
        )

    def _look_for(self, name: str, beside: Path) -> Path | None:
        if (inner := inner_path(name)) is not None:
            for folder in (self.root,) if self.images else (beside, self.root):
                path = folder / inner
                if path.is_file() or (path.exists() and not path.is_dir()):  # other kinds of files are refused by name
                    return path
        parts = path_parts(name)
        last = normalize("NFC", parts[-1]) if parts else ""
        found = self._index().get(last)
        if not found and (upload := _UPLOAD.fullmatch(last)):
            found = self._index().get(upload[1]) or self._by_upload.get(upload[1])
        return _closest(found, parts, name) if found else None

    def _index(self) -> dict[str, list[Path]]:
        """Return the image files below the folder by their names, with and without endings.

        Names are in one Unicode normal form: tools write NFC, and macOS may store NFD.
        """
        if self._by_name is None:
            self._by_name, seen, endings = defaultdict(list), 0, image_endings()
            for folder, folders, files in os.walk(self.root):
                folders.sort()
                seen += len(files)
                if seen > _MAX_FILES:
                    raise DcrisError(
                        f"{self.root} has more than {_MAX_FILES:,} files; choose a smaller folder for --images"
                    )
                for file in sorted(files):
                    path = Path(folder, file)
                    if path.suffix.lower() in endings:
                        name = normalize("NFC", file)
                        self._by_name[name].append(path)
                        self._by_name[Path(name).stem].append(path)
                        self._by_upload[_NOT_STORED.sub("", name.strip().replace(" ", "_"))].append(path)
        return self._by_name


def _unless_error(known: dict[_Key, _Value | str], key: _Key, make: Callable[[_Key], _Value]) -> _Value:
    """Return `known[key]`, made if it is missing; an error is kept as text and raised each time."""
    if key not in known:
        try:
            known[key] = make(key)
        except DcrisError as error:
            known[key] = str(error)
    found = known[key]
    if isinstance(found, str):
        raise DcrisError(found)  # a new one: re-raising one exception would grow its traceback
    return found


def _closest(found: list[Path], parts: list[str], name: str) -> Path:
    """Return the path that shares most folders with the name, counted from its end."""

    def shared(path: Path) -> int:
        folders = path.parent.parts[::-1]
        wanted = parts[-2::-1]
        return next((n for n, (a, b) in enumerate(zip(folders, wanted, strict=False)) if a != b), len(wanted))

    best = max(map(shared, found))
    closest = [path for path in found if shared(path) == best]
    if len(closest) > 1:
        raise DcrisError(
            f"the image {shown(name)} may be {closest[0]} or {closest[1]}; give the folder that the names are relative to with "
            "--images"
        )
    return closest[0]
