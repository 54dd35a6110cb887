"""Predictions as data sets of annotation tools: to correct, and to train on.

They are written by dcris.data.exporter, as `dcris data export` writes references. A phrase is the
expression of its object and also its category, since some tools show nothing else.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from dcris.data.exporter import export_table
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.inference.inputs import source_path
from dcris.inference.records import Record, Result, State, WrittenFolder, checksum, stamp_of, stamps
from dcris.types import Expression, Reference
from dcris.utils.files import remove_directory
from dcris.utils.streams import counted

TOOLS = {"coco-dataset": "coco", "yolo": "yolo", "labelme": "labelme"}
"""Formats of `dcris predict` that are data sets, and their names in dcris.data.tools.FORMATS."""

_MAX_LISTED = 5
"""Number of images that are named as left out."""


def data_set_folder(out: Path, format: str) -> Path:
    """Return the folder of a data set in a folder of results."""
    return out / f"predictions-{TOOLS[format]}"


def require_unchanged(out: Path, formats: Iterable[str]) -> None:
    """Raise DcrisError if one of the data sets was changed since it was written: it may have
    corrections, and writing it again would lose them."""
    state = State.read(out)
    for folder in (data_set_folder(out, each) for each in formats if each in TOOLS):
        known = [each[folder.name].files for each in (state.folders, state.coming) if folder.name in each]
        if folder.is_dir() and stamps(folder) not in known:
            raise DcrisError(
                f"{folder} was changed after it was written, and would be replaced; move it elsewhere to keep the changes, or "
                "choose another --out"
            )


def is_written(out: Path, format: str, records: Sequence[Record]) -> bool:
    """Return whether the data set of these records is in a folder of results."""
    folder = data_set_folder(out, format)
    known = State.read(out).folders.get(folder.name)
    return folder.is_dir() and known is not None and known.records == checksum(records)


def write_data_set(out: Path, format: str, records: Sequence[Record]) -> str:
    """Write the results of images as a data set in a folder of results, in place of an earlier one.

    Args:
        out: the folder of results.
        format: a key of TOOLS.
        records: of images. Those that are gone or were changed since are left out: a mask would not
            fit the image.

    Returns:
        What it has, in words.

    Raises:
        DcrisError: a file cannot be read or written. An earlier data set is then unchanged.
    """
    folder, state = data_set_folder(out, format), State.read(out)
    there, left_out = list[Record](), list[str]()
    for record in records:
        path = source_path(record.source)
        if stamp_of(path) == record.stamp:
            there.append(record)
        else:
            left_out.append(str(path))
    references = tuple(_references(there))
    written, coming = ({k: v for k, v in each.items() if k != folder.name} for each in (state.folders, state.coming))

    def note(new: Path) -> None:
        # A process that is killed between the move and the writing of the state below leaves a
        # folder that was not changed, and that may be replaced.
        written[folder.name] = WrittenFolder(records=checksum(records), files=stamps(new))
        state.model_copy(update={"coming": {**coming, folder.name: written[folder.name]}}).write(out)

    if references:
        table = ReferenceTable("predictions", "", out, references)
        export_table(table, TOOLS[format], folder, replace=True, on_written=note)
    elif folder.name in state.folders:
        remove_directory(folder)
    state.model_copy(update={"folders": written, "coming": coming}).write(out)
    found = sum(bool(each.segmentations) for each in references)
    return f"{counted(found, 'object')} on {counted(len(there), 'image')}{_listed(left_out)}"


def _listed(left_out: Sequence[str]) -> str:
    if not left_out:
        return ""
    more = f" and {len(left_out) - _MAX_LISTED:,} more" if len(left_out) > _MAX_LISTED else ""
    return f"; left out: gone or changed: {', '.join(left_out[:_MAX_LISTED])}{more}"


def _references(records: Iterable[Record]) -> Iterable[Reference]:
    """Yield a reference for each mask, and one without objects for an image without any."""
    numbers = count(1)
    for record in records:
        found: list[Result | None] = [each for each in record.results or () if each.bbox[2]]
        for result in found or [None]:
            number = next(numbers)
            yield Reference(
                ref_id=number,
                ann_ids=() if result is None else (number,),
                image_id=record.place,
                image_path=source_path(record.source),
                image_size=record.size or (0, 0),
                category="" if result is None else result.phrase,
                split="train",
                segmentations=() if result is None else (result.segmentation.model_dump(mode="json"),),
                expressions=() if result is None else (Expression(number, result.phrase),),
            )
