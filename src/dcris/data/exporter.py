"""Write references in the formats of annotation tools, with copies of their images."""

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from PIL import Image

from dcris.data.images import fit_image, image_size, read_image, usual_ending
from dcris.data.masks import decode_mask, encode_mask
from dcris.data.table import ReferenceTable, quoted
from dcris.data.tools import FORMATS
from dcris.data.tools.annotation import Exported, apart, split_folder
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.files import FULL, write_directory

IMAGE_URL = "/data/local-files/?d="
"""Where Label Studio looks for local files."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Counts of what was written."""

    references: int
    images: int
    left_out: int
    """References to nothing in their image, which this format cannot hold."""
    ignored: int = 0
    """References with pixels that have no truth, which are background in all formats."""


def export_table(
    table: ReferenceTable,
    format: str,
    out: Path,
    image_url: str = IMAGE_URL,
    *,
    replace: bool = False,
    on_written: Callable[[Path], None] = lambda folder: None,
) -> ExportResult:
    """Write references, and copies of their images, into a new folder.

    Args:
        table: the references, from `load_references`. One without objects and expressions stands
            for an image on which nothing is annotated.
        format: a key of FORMATS that can be written.
        out: the folder; must not exist, or be empty.
        image_url: prefix of the paths of images for tools that show them by URL.
        replace: replace an existing folder.
        on_written: called with the folder when all of its files are written, before it is moved to
            `out`.

    Raises:
        DcrisError: the format cannot be written, the folder is not empty, a mask cannot be decoded,
            or a file cannot be read or written. Nothing is left then.
    """
    write = FORMATS[format].write if format in FORMATS else None
    if write is None:
        able = ", ".join(name for name, each in FORMATS.items() if each.write)
        raise DcrisError(f"the format {format!r} cannot be written; choose from {able}")
    if not replace and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DcrisError(f"{out} exists already and is not empty; delete it or choose another --out")
    form = FORMATS[format]
    references = tuple(map(_known, table.references))
    if not form.mixes_absent:
        references = tuple(part for each in references for part in apart(each))
    kept = tuple(
        each
        for each in references
        if bool(each.segmentations) == bool(each.expressions) or (form.holds_absent and each.expressions)
    )
    if not kept:
        raise DcrisError(f"{table.root} has no reference with an object, so there is nothing to export as {format}")
    used = set[str]()
    split_names = {
        split: _unique(split_folder(split), used) for split in dict.fromkeys(reference.split for reference in kept)
    }
    splits: dict[Path, str] = {}
    for reference in kept:
        splits.setdefault(reference.image_path, split_names[reference.split])
    exported = Exported(
        ReferenceTable(table.dataset, table.split_by, table.root, kept),
        _names(splits, form.image_folder),
        split_names,
        image_url,
    )

    def fill(folder: Path) -> None:
        for image, of_image in exported.by_image().items():
            _copy_image(of_image[0], folder / exported.images[image])
        write(exported, folder)
        on_written(folder)

    write_directory(out, fill)
    doubtful = sum(1 for reference in kept if reference.ignored is not None)
    return ExportResult(len(kept), len(exported.images), len(references) - len(kept), doubtful)


def _copy_image(reference: Reference, target: Path) -> None:
    """Copy the image of a reference, or write it at the size of its mask, as tools want it, where
    these differ (RRSIS-D)."""
    source = reference.image_path
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if reference.stretched and image_size(source) != reference.image_size:
            Image.fromarray(fit_image(read_image(source), reference)).save(target, quality=95)
        else:
            shutil.copyfile(source, target)
    except (OSError, ValueError, shutil.SpecialFileError) as error:  # ValueError: no format of that ending
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # the folder is at fault, and its writer says so
        raise DcrisError(f"cannot copy the image {source} ({error}); check the file") from error


def _known(reference: Reference) -> Reference:
    """Return a reference whose objects are without the pixels that have no truth: no format has
    them, so they become background."""
    if reference.ignored is None:
        return reference
    size = reference.image_size
    known = decode_mask(reference.ignored, size) == 0
    return replace_fields(
        reference, segmentations=tuple(encode_mask(decode_mask(each, size) & known) for each in reference.segmentations)
    )


def _names(splits: Mapping[Path, str], folder: str) -> dict[Path, str]:
    """Return a path in the new folder for each image. The last parts are unique without their
    endings and ignoring case and Unicode's normal forms, since tools name their files after them,
    and UTF-8. They have an ending, since tools know images by it."""
    used, names = set[str](), {}
    common = Path(os.path.commonpath([path.parent for path in splits])) if splits else Path()
    for path, split in splits.items():
        stem, ending = quoted(path.stem), usual_ending(path)
        if _folded(stem) in used:
            stem = quoted("_".join(path.relative_to(common).with_suffix("").parts))
        names[path] = (PurePosixPath(folder.format(split=split)) / f"{_unique(stem, used)}{ending}").as_posix()
    return names


def _unique(name: str, used: set[str]) -> str:
    """Return a name, numbered if `used` has it, and add it there, folded."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    found = next(each for each in itertools.chain([name], numbered) if _folded(each) not in used)
    used.add(_folded(found))
    return found


def _folded(name: str) -> str:
    """Return a name without what some file systems ignore: case and Unicode's normal form."""
    return normalize("NFC", name).lower()
