"""ReasonSeg: ROOT/reason_seg/ReasonSeg/SPLIT/NAME.jpg with NAME.json.

A JSON file has `text` (a list of expressions), `is_sentence`, and `shapes` with a `label` and the
`points` of a polygon. Polygons are drawn from the largest to the smallest, outline and inside.
Where the label contains "ignore", the pixels have no truth; "flag" is skipped; any other label is
the target. Files are UTF-8 or cp1252. Two official test files have no polygon: their expressions
have no target. In val and test only the first text counts.
Source: utils/data_processing.py and utils/dataset.py of LISA.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.data.images import image_size
from dcris.data.masks import encode_mask, require_polygons
from dcris.data.registry import OFFICIAL
from dcris.data.table import (
    MAX_OBJECTS,
    SPLIT_STEP,
    OnError,
    ReferenceTable,
    bad,
    field,
    located,
    skip_errors,
    texts_field,
)
from dcris.types import Expression, Reference
from dcris.utils.files import read_json
from dcris.utils.streams import counted

_FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg", "reasonseg")
_SPLITS = ("train", "val", "test")
_OBJECT, _IGNORED = 1, 255

SHORT, LONG = "short query", "long query"
"""Subsets by which LISA reports scores: phrases, and whole sentences (`is_sentence`)."""


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the only partition if a folder of a split exists; see Reader.find."""
    return [OFFICIAL] if split_by in (None, OFFICIAL) and _home(root) is not None else []


def _home(root: Path) -> Path | None:
    homes = (root / name for name in _FOLDERS)
    return next((home for home in homes if any((home / split).is_dir() for split in _SPLITS)), None)


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read ReasonSeg; see Reader.load.

    The headers of all images are read, and the polygons are drawn: what of the target is visible
    depends on all of them.
    """
    home = _home(root)
    assert home is not None
    references: list[Reference] = []
    for place, split in enumerate(_SPLITS):
        sentences = number = place * SPLIT_STEP
        files = (home / split).glob("*.*") if (home / split).is_dir() else ()
        for stem in sorted({path.stem for path in files if path.suffix in (".jpg", ".json")}):
            number += 1
            with skip_errors(on_error):
                reference = _read(home / split / stem, split, number, sentences)
                sentences += len(reference.expressions)
                references.append(reference)
    empty = [each for each in references if not each.segmentations]
    notes: tuple[str, ...] = ()
    if empty:
        names = ", ".join(f"{each.split}/{each.image_path.stem}" for each in empty[:3])
        notes = (
            f"{counted(len(empty), 'image')} without a polygon of a target ({names}{', ...' if len(empty) > 3 else ''}), whose "
            "expressions have none; some publications leave two such test images out (777 of 779)",
        )
    return ReferenceTable(dataset, split_by, root, tuple(references), notes)


def _read(stem: Path, split: str, number: int, sentences: int) -> Reference:
    image, path = stem.with_name(f"{stem.name}.jpg"), stem.with_name(f"{stem.name}.json")
    record = read_json(path, f"the annotation of {image.name}", fallback="cp1252")
    where = "the file"
    texts = texts_field(record, "text", path, where)
    sentence = field(record, "is_sentence", bool, path, where)
    size = image_size(image)
    labels = _draw(field(record, "shapes", list, path, where), size, path)
    target, ignored = labels == _OBJECT, labels == _IGNORED
    kept = texts if split == "train" else texts[:1]
    return Reference(
        ref_id=number,
        ann_ids=(number,) if target.any() else (),
        image_id=number,
        image_path=image,
        image_size=size,
        category="object",
        split=split,
        segmentations=(encode_mask(target),) if target.any() else (),
        expressions=tuple(
            Expression(
                sent_id,
                text.strip(),
                name=stem.name if len(kept) == 1 else None,
                subsets=(LONG if sentence else SHORT,),
            )
            for sent_id, text in enumerate(kept, sentences + 1)
        ),
        ignored=encode_mask(ignored) if ignored.any() else None,
    )


def _draw(shapes: list[Any], size: tuple[int, int], path: Path) -> NDArray[np.uint8]:
    """Return the label of each pixel [H, W]: 0, _OBJECT or _IGNORED."""
    if len(shapes) > MAX_OBJECTS:
        raise bad(path, f"it has {len(shapes):,} 'shapes'; the limit is {MAX_OBJECTS:,}")
    drawn: list[tuple[NDArray[np.int32], int]] = []
    for number, shape in enumerate(shapes, 1):
        where = f"shape {number}"
        label = field(shape, "label", str, path, where).lower()
        if label == "flag":
            continue
        points = field(shape, "points", list, path, where)
        if not all(type(point) is list and len(point) == 2 for point in points):
            raise bad(path, f"{where} has 'points' that are not a list of [x, y]")
        with located(path, f"{where} has unusable 'points'"):
            require_polygons([[value for point in points for value in point]], size, fewest=1)
        drawn.append((np.array(points).astype(np.int32), _IGNORED if "ignore" in label else _OBJECT))
    if len({label for _, label in drawn}) > 1:  # the order matters
        areas = [int(np.count_nonzero(_fill(np.zeros(size, np.uint8), polygon, 1))) for polygon, _ in drawn]
        drawn = [drawn[place] for place in np.argsort(areas)[::-1]]
    labels = np.zeros(size, np.uint8)
    for polygon, value in drawn:
        _fill(labels, polygon, value)
    return labels


def _fill(labels: NDArray[np.uint8], polygon: NDArray[np.int32], value: int) -> NDArray[np.uint8]:
    cv2.polylines(labels, [polygon], True, value, 1)
    cv2.fillPoly(labels, [polygon], value)
    return labels
