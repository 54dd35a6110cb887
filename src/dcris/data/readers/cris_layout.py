"""The layout that CRIS, ETRIS and DETRIS prepare: JSON by split, a picture for each mask.

ROOT/anns/FOLDER/SPLIT.json lists the references, ROOT/masks/FOLDER/ID.png are their masks, and the photographs lie in
ROOT/images/train2014. Their tools then pack these into an LMDB that newer versions of pyarrow cannot read; what it was packed
from is read here. Source: tools/data_process.py and tools/prepare_datasets.md of DETRIS.
"""

from pathlib import Path
from typing import Any

from dcris.data.coco import CATEGORIES
from dcris.data.image_folders import find_photographs, image_ids
from dcris.data.images import image_size
from dcris.data.table import OnError, ReferenceTable, bad, field, forgiving, plain_path, read_expressions
from dcris.errors import DcrisError
from dcris.types import Expression, Reference
from dcris.utils.files import read_json

_FOLDERS = {
    "refcoco": ("refcoco", "unc"),
    "refcoco+": ("refcoco+", "unc"),
    "refcocog_u": ("refcocog", "umd"),
    "refcocog_g": ("refcocog", "google"),
}
"""The data set and its `split_by` in each folder that their instructions make."""

_NAMES = tuple(CATEGORIES.values())
"""Categories by `cat`: they number COCO's without the gaps, from 0 on."""


def find_prepared(root: Path, dataset: str, split_by: str | None = None) -> dict[str, str]:
    """The folders below ROOT/anns that hold a data set, by `split_by`. A folder may also be asked for by its own name."""
    found = {
        by: folder
        for folder, (name, by) in _FOLDERS.items()
        if dataset in (name, folder) and split_by in (None, by) and _files(root, folder)
    }
    if not found and _files(root, dataset) and _FOLDERS.get(dataset, ("", split_by))[1] == split_by:
        found[split_by or "prepared"] = dataset  # their script's own output, before it is renamed
    return found


def _files(root: Path, folder: str) -> list[Path]:
    return sorted((root / "anns" / folder).glob("*.json"))


def load_prepared(
    root: Path, dataset: str, split_by: str | None = None, on_error: OnError | None = None
) -> ReferenceTable:
    """Read a data set that CRIS's tools prepared. Without `split_by`, the only one that is there is taken.

    The size of a photograph is taken from the header of its first mask: the masks were drawn at the size that the annotations
    record, so a photograph that was resized since is noticed, and none needs to be there for the table to be read. Every mask
    is looked for; its own size is compared when it is decoded. Annotations have no identifiers in this layout, so that of the
    reference stands for its annotation's, too.

    Raises DcrisError for anything missing, malformed or contradictory, naming the file, the reference and the field;
    what is wrong with a single reference goes to `on_error`, where that is given.
    """
    found = find_prepared(root, dataset, split_by)
    if len(found) > 1:
        raise DcrisError(
            f"{root / 'anns'} holds several sets of splits of {dataset}; choose one with --split-by: {', '.join(sorted(found))}"
        )
    ((by, folder),) = found.items()
    masks = root / "masks" / folder
    drawn = {path.name for path in masks.glob("*.png")}
    entries: list[_Entry] = []
    identifiers: set[int] = set()
    sentences: set[int] = set()
    for path in _files(root, folder):
        records = read_json(path, f"the annotations of {dataset}")
        if type(records) is not list:
            raise bad(path, "it is not a list of references")
        for number, record in enumerate(records, 1):
            with forgiving(on_error):
                entry = _Entry(record, path, number, sentences)
                if entry.ref_id in identifiers:
                    raise bad(path, f"reference {entry.ref_id} is there twice, in this file or in another beside it")
                if entry.mask not in drawn:
                    raise DcrisError(
                        f"{path}: reference {entry.ref_id} has no mask {entry.mask} in {masks}; prepare the data set again, "
                        "with --generate_mask"
                    )
                identifiers.add(entry.ref_id)
                entries.append(entry)
    if not entries:
        raise DcrisError(f"there are no references in {root / 'anns' / folder}; prepare the data set again")
    photographs = find_photographs(root, {entry.split: entry.image for entry in reversed(entries)}.values())
    numbers = image_ids(entry.image for entry in entries)
    sizes: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry.image not in sizes:
            sizes[entry.image] = image_size(masks / entry.mask)
    references = tuple(
        Reference(
            ref_id=entry.ref_id,
            ann_id=entry.ref_id,
            image_id=numbers[entry.image],
            image_path=photographs.path(entry.image),
            image_size=sizes[entry.image],
            category=entry.category,
            split=entry.split,
            segmentation=masks / entry.mask,
            expressions=entry.expressions,
        )
        for entry in entries
    )
    name, _ = _FOLDERS.get(folder, (dataset, ""))
    return ReferenceTable(name, by, root, references)


class _Entry:
    """One reference as a file of the layout has it."""

    def __init__(self, record: Any, path: Path, number: int, sentences: set[int]) -> None:
        self.ref_id = field(record, "segment_id", int, path, f"entry {number}")
        where = f"reference {self.ref_id}"
        category = field(record, "cat", int, path, where)
        if not 0 <= category < len(_NAMES):
            raise bad(path, f"{where} has a 'cat' of {category}; there are {len(_NAMES)}, numbered from 0 on")
        self.split = path.stem
        self.mask = f"{self.ref_id}.png"
        self.image = plain_path(field(record, "img_name", str, path, where), path, where, "img_name")
        self.category = _NAMES[category]
        self.expressions: tuple[Expression, ...] = tuple(read_expressions(record, path, where, sentences))
