"""The layout of CRIS, ETRIS and DETRIS: a JSON file for each split, a PNG file for each mask.

ROOT/anns/FOLDER/SPLIT.json lists the references, ROOT/masks/FOLDER/ID.png are their masks, and the
images are in ROOT/images/train2014. Their tools then pack these files into an LMDB, which newer
versions of pyarrow cannot read; here the files themselves are read.
Source: tools/data_process.py and tools/prepare_datasets.md of DETRIS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcris.data.coco import CATEGORIES, find_images, image_ids
from dcris.data.images import image_size
from dcris.data.registry import PARTITIONS
from dcris.data.table import OnError, ReferenceTable, bad, field, path_field, read_expressions, skip_errors
from dcris.errors import DcrisError
from dcris.types import Expression, Reference
from dcris.utils.files import read_json

_FOLDERS = {partition.cris_folder: key for key, partition in PARTITIONS.items() if partition.cris_folder}
"""Data set and `split_by` of each folder that their instructions create."""

_CATEGORY_NAMES = tuple(CATEGORIES.values())
"""By `cat`, which numbers COCO's categories from 0 without gaps."""


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the `split_by` of each partition of a data set below ROOT/anns; see Reader.find.

    A folder may also be requested by its own name.
    """
    return [*_find_folders(root, dataset, split_by)]


def _find_folders(root: Path, dataset: str, split_by: str | None) -> dict[str, str]:
    """Return the folders below ROOT/anns that contain a data set, by `split_by`."""
    found = {
        by: folder
        for folder, (name, by) in _FOLDERS.items()
        if dataset in (name, folder) and split_by in (None, by) and _split_files(root, folder)
    }
    if not found and _split_files(root, dataset) and _FOLDERS.get(dataset, ("", split_by))[1] == split_by:
        found[split_by or "prepared"] = dataset  # the output of their script under its original name
    return found


def _split_files(root: Path, folder: str) -> list[Path]:
    return sorted((root / "anns" / folder).glob("*.json"))


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read a data set in the layout of CRIS; see Reader.load.

    The size of an image is that of its first usable mask, read from the header: masks have the
    annotated size, so an image that was resized later is detected, and the images need not exist to
    read the table. Every mask must exist; its own size is checked when it is decoded. Annotations
    have no identifiers in this layout, so the ann_id is the ref_id.
    """
    folder = _find_folders(root, dataset, split_by)[split_by]
    masks = root / "masks" / folder
    mask_names = {path.name for path in masks.glob("*.png")}
    entries: list[_Entry] = []
    identifiers: set[int] = set()
    sentences: set[int] = set()
    for path in _split_files(root, folder):
        records = read_json(path, f"the annotations of {dataset}")
        if type(records) is not list:
            raise bad(path, "it is not a list of references")
        for number, record in enumerate(records, 1):
            with skip_errors(on_error):
                entry = _Entry(record, path, number, sentences)
                if entry.ref_id in identifiers:
                    raise bad(path, f"reference {entry.ref_id} occurs twice, in this file or in another split's file")
                if entry.mask not in mask_names:
                    raise DcrisError(
                        f"{path}: the mask {entry.mask} of reference {entry.ref_id} is missing in {masks}; prepare the data "
                        "set again with --generate_mask"
                    )
                identifiers.add(entry.ref_id)
                entries.append(entry)
    images = find_images(root, {entry.split: entry.image for entry in reversed(entries)}.values())
    numbers = image_ids(entry.image for entry in entries)
    sizes: dict[str, tuple[int, int]] = {}
    references: list[Reference] = []
    for entry in entries:
        with skip_errors(on_error):
            if entry.image not in sizes:
                sizes[entry.image] = image_size(masks / entry.mask)
            references.append(
                Reference(
                    ref_id=entry.ref_id,
                    ann_ids=(entry.ref_id,),
                    image_id=numbers[entry.image],
                    image_path=images.path(entry.image),
                    image_size=sizes[entry.image],
                    category=entry.category,
                    split=entry.split,
                    segmentations=(masks / entry.mask,),
                    expressions=entry.expressions,
                )
            )
    name, _ = _FOLDERS.get(folder, (dataset, ""))
    return ReferenceTable(name, split_by, root, tuple(references))


class _Entry:
    """The checked fields of one reference."""

    def __init__(self, record: Any, path: Path, number: int, sentences: set[int]) -> None:
        self.ref_id = field(record, "segment_id", int, path, f"entry {number}")
        where = f"reference {self.ref_id}"
        category = field(record, "cat", int, path, where)
        if not 0 <= category < len(_CATEGORY_NAMES):
            raise bad(path, f"{where} has a 'cat' of {category}; valid are 0 to {len(_CATEGORY_NAMES) - 1}")
        self.split = path.stem
        self.mask = f"{self.ref_id}.png"
        self.image = path_field(record, "img_name", path, where)
        self.category = _CATEGORY_NAMES[category]
        self.expressions: tuple[Expression, ...] = tuple(read_expressions(record, path, where, sentences))
