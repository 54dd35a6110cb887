"""Predicted masks of videos, in a folder or a zip file as the authors of the data sets take them.

Nothing is unpacked: masks are read from the zip file by their names. It may come from a stranger,
so the memory that its list of files, a file and a mask take is bounded before they are read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from dcris.data.images import image_size, read_label_image, read_mask_image
from dcris.data.table import shown
from dcris.errors import DcrisError
from dcris.evaluation.video_metrics import Labels
from dcris.types import MaskArray
from dcris.utils.files import open_zip, read_bytes

_MAX_FILE = 64 << 20
"""Most bytes of a mask's file; those of 4K videos have 8 MB even without compression."""

_MAX_DEPTH = 8
"""Most folders in the path of a file in a zip file; official layouts have 4."""

_MAX_FOLDERS = 100_000
"""Most folders in a zip file; that of MeViS's train has 25,000."""

_MAC = "__MACOSX"
"""Folder with copies of all names that the Finder adds to a zip file."""


class SubmittedMasks(ABC):
    """Files of predicted masks by name, such as "VIDEO/EXPRESSION/FRAME.png"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prefix = ""
        """Outer folders of the names, which end in "/"."""

    @abstractmethod
    def _list(self, folder: str) -> frozenset[str]: ...

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Return a file's content, of _MAX_FILE bytes and at most one more.

        Raises any exception."""

    def enter(self, expected: Collection[str], layout: str) -> None:
        """Set the prefix to the outer folders around those that are `expected`, such as
        "Annotations/".

        Raises:
            DcrisError: none of the `expected` ones is there; `layout` describes what should be.
        """
        for _ in range(_MAX_DEPTH):
            names = self.names("")
            if not names.isdisjoint(expected):
                return
            folders = [name for name in names if self.names(name) and name != _MAC]
            if len(folders) != 1:
                break
            self.prefix += f"{folders[0]}/"
        first = shown(min(expected))
        raise DcrisError(
            f"{self.path} has no masks of this split; give a folder or zip file with {layout}, that is with a folder {first}"
        )

    def names(self, folder: str) -> frozenset[str]:
        """Return the names of what is in a folder; "" is the outermost. There
        are none in a folder that does not exist."""
        return self._list(f"{self.prefix}{folder}".rstrip("/"))

    def mask(self, name: str, size: tuple[int, int], threshold: float | None = None) -> MaskArray:
        """Return a mask [H, W] bool of two values, or of more with a threshold as in `binary_mask`.

        Raises:
            DcrisError: it cannot be read, or is not of `size` (H, W).
        """
        return self._decoded(name, size, lambda content: read_mask_image(content, threshold)).astype(bool)

    def labels(self, name: str, size: tuple[int, int], most: int) -> Labels:
        """Return labels [H, W] of objects; 0 is the background.

        Raises:
            DcrisError: they cannot be read, are not of `size` (H, W), or one is above `most`.
        """
        labels = self._decoded(name, size, read_label_image)
        if (greatest := int(labels.max())) > most:
            raise DcrisError(
                f"{self._place(name)} has the label {greatest}, but objects are numbered from 1 to {most} here; write the "
                "number of its object as the value of a pixel, and 0 for the background"
            )
        return labels

    def _decoded(self, name: str, size: tuple[int, int], decode: Callable[[bytes], Labels]) -> Labels:
        """Return what `decode` makes of an image of `size`, which is found in its header."""
        try:
            content = self._read(self.prefix + name)
        except Exception as error:  # damaged archives raise errors of many classes
            reason = error.strerror if isinstance(error, OSError) else None
            raise self._bad(name, reason or error) from error
        if len(content) > _MAX_FILE:
            raise self._bad(name, f"it is larger than the limit of {_MAX_FILE >> 20} MB")
        try:
            found = image_size(content)
        except DcrisError as error:
            raise self._bad(name, error) from error
        if found != size:
            raise DcrisError(
                f"{self._place(name)} is {found[0]} x {found[1]} pixels (height x width), but the true mask is {size[0]} x "
                f"{size[1]}; write masks at the size of the frames"
            )
        try:
            return decode(content)
        except DcrisError as error:
            raise self._bad(name, error) from error

    def _place(self, name: str) -> str:
        return f"{self.path}: {self.prefix}{name}"

    def _bad(self, name: str, problem: object) -> DcrisError:
        return DcrisError(f"{self._place(name)} cannot be used as a mask ({problem}); write it again")


class _Folder(SubmittedMasks):
    def _list(self, folder: str) -> frozenset[str]:
        place = self.path / folder
        try:
            return frozenset(each.name for each in place.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        except OSError as error:
            raise DcrisError(f"cannot read the folder {place} ({error.strerror or error}); copy it again") from error

    def _read(self, name: str) -> bytes:
        return read_bytes(self.path / name, _MAX_FILE)


class _Zip(SubmittedMasks):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.archive = open_zip(path)
        names = self.archive.namelist()
        if len(set(names)) < len(names):
            raise OSError(0, "it has two files of one name")
        self.folders = _by_folder(names)

    def _list(self, folder: str) -> frozenset[str]:
        return frozenset(self.folders.get(folder, ()))

    def _read(self, name: str) -> bytes:
        with self.archive.open(name) as file:
            return file.read(_MAX_FILE + 1)


def _by_folder(names: Iterable[str]) -> dict[str, set[str]]:
    """Return what is in each folder of a zip file.

    Raises:
        OSError: a name would lead out of the folder in which the file is unpacked, or there are too
            many folders; `strerror` is the reason.
    """
    folders: dict[str, set[str]] = {}
    for name in names:
        parts = name.removesuffix("/").split("/", _MAX_DEPTH + 1)
        if len(parts) > _MAX_DEPTH or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise OSError(0, f"the name {shown(name)} in it is not a plain path")
        for depth, part in enumerate(parts):
            folders.setdefault("/".join(parts[:depth]), set()).add(part)
        if len(folders) > _MAX_FOLDERS:
            raise OSError(0, f"it has more than {_MAX_FOLDERS:,} folders")
    return folders


def open_submission(path: Path, expected: Collection[str], layout: str) -> SubmittedMasks:
    """Open a folder or zip file of predicted masks.

    Args:
        path: the folder or file.
        expected: names of the folders in it, of which some may be missing. They may be inside of
            others, each alone in the next.
        layout: of the names, for error messages.

    Raises:
        DcrisError: it does not exist, is neither, or has nothing that is expected.
    """
    try:
        masks: SubmittedMasks = _Folder(path) if path.is_dir() else _Zip(path)
        masks.enter(expected, layout)
    except OSError as error:
        raise DcrisError(
            f"cannot read the masks in {path}: {error.strerror or error}; give a folder or zip file with {layout}"
        ) from error
    return masks
