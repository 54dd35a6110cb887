"""GSEval, the benchmark of GroundingSuite: ROOT/GSEval/GroundingSuite-Eval.jsonl.

A line has `idx`, `image_path`, `class_id`, `label`, `caption`, `box` and `segmentation` (run
lengths). The images are of COCO unlabeled2017. Scores are reported by `class_id`, the subset of an
expression; predictions are named by `idx`. The file has 3,715 lines, not the 3,800 of the paper.
Source: evaluate_grounding.py of hustvl/GroundingSuite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcris.data.coco import image_ids
from dcris.data.masks import only_mask, validate_segmentation
from dcris.data.registry import OFFICIAL
from dcris.data.table import OnError, ReferenceTable, bad, field, located, path_field, skip_errors, text_field
from dcris.types import Expression, Reference, Segmentation
from dcris.utils.files import read_json_lines

FILE = "GroundingSuite-Eval.jsonl"
IMAGE_FOLDER = "images/unlabeled2017"
"""Folder of the images below the root, where `dcris data fetch` puts them."""

_FOLDERS = ("GSEval", "gseval", ".")
_IMAGE_FOLDERS = (IMAGE_FOLDER, "unlabeled2017", "images", "GSEval/unlabeled2017", "GSEval/images", "GSEval", ".")


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the only partition if the file exists; see Reader.find."""
    return [OFFICIAL] if split_by in (None, OFFICIAL) and _path(root) is not None else []


def _path(root: Path) -> Path | None:
    return next((path for name in _FOLDERS if (path := root / name / FILE).is_file()), None)


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read GSEval; see Reader.load. The images need not exist. Its only split is test."""
    path = _path(root)
    assert path is not None
    lines: list[_Line] = []
    seen: set[int] = set()
    for number, record in read_json_lines(path, on_error):
        with skip_errors(on_error):
            line = _read(record, path, f"line {number}")
            if line.idx in seen:
                raise bad(path, f"line {number} has the idx {line.idx}, which another line has too")
            seen.add(line.idx)
            lines.append(line)
    names = list(dict.fromkeys(line.image for line in lines))
    folder = _find_images(root, names)
    numbers = image_ids(names)
    references = tuple(
        Reference(
            ref_id=line.idx,
            ann_ids=(line.idx,),
            image_id=numbers[line.image],
            image_path=folder / line.image if (folder / line.image).exists() else folder / Path(line.image).name,
            image_size=line.size,
            category=line.label,
            split="test",
            segmentations=(line.mask,),
            expressions=(Expression(line.idx, line.caption, name=str(line.idx), subsets=(line.subset,)),),
        )
        for line in lines
    )
    return ReferenceTable(dataset, split_by, root, references)


@dataclass(frozen=True, slots=True)
class _Line:
    idx: int
    image: str
    subset: str
    label: str
    caption: str
    mask: Segmentation
    size: tuple[int, int]


def _read(record: Any, path: Path, where: str) -> _Line:
    idx = field(record, "idx", int, path, where)
    where = f"{where} (idx {idx})"
    image = path_field(record, "image_path", path, where)
    kind = record.get("class_id")
    if type(kind) is not int:
        kind = text_field(record, "class_id", path, where)
    label, caption = (text_field(record, key, path, where) for key in ("label", "caption"))
    mask = only_mask(record.get("segmentation"))
    size = mask.get("size") if type(mask) is dict else None
    if type(size) is not list or len(size) != 2 or not all(type(side) is int for side in size):
        raise bad(path, f"{where} has no 'segmentation' in run lengths with a 'size'")
    height, width = size
    with located(path, f"{where} has a 'segmentation' that cannot be decoded"):
        validate_segmentation(mask, (height, width))
    return _Line(idx, image, f"class {kind}", label, caption, mask, (height, width))


def _find_images(root: Path, names: Sequence[str]) -> Path:
    """Return the folder of the images: that in which one of a hundred names exists."""
    for name in names[:: 1 + len(names) // 100]:
        for folder in _IMAGE_FOLDERS:
            if (root / folder / name).exists() or (root / folder / Path(name).name).exists():
                return root / folder
    return root / IMAGE_FOLDER
