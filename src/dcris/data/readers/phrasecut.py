"""PhraseCut: ROOT/VGPhraseCut_v0/refer_SPLIT.json, lists of tasks: a phrase and its objects.

image_data_split.json has the images (`image_id`, `width`, `height`, `split`, `coco_id`), whose
files are images/<image_id>.jpg. A task has `Polygons`, for each object polygons of [x, y], which
Pillow draws; the target is the union. The file of val leaves out the images of miniv. Predictions
are named by `task_id`, the `name` of an expression.

Subsets are those of the authors that follow from a task: categories (c20, ...) and attributes
(a20, ...) by frequency, which name_att_rel_count.json states, the structure of the phrase (p_...),
the number of objects (i_...) and whether the image is in COCO (d_...). `size_subset` gives those by
size. Those by the authors' word lists (a_color, t_stuff, ...) are left out: their repository has no
licence.
Source: utils/refvg_loader.py, utils/subset.py and utils/data_transfer.py of PhraseCutDataset.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.coco import CATEGORIES
from dcris.data.masks import validate_segmentation
from dcris.data.registry import OFFICIAL
from dcris.data.table import (
    MAX_OBJECTS,
    SPLIT_STEP,
    OnError,
    ReferenceTable,
    bad,
    field,
    located,
    size_field,
    skip_errors,
    text_field,
)
from dcris.types import Expression, PixelPolygons, Reference
from dcris.utils.files import read_json

_FOLDERS = ("VGPhraseCut_v0", "phrasecut", "PhraseCut")
_SPLITS = ("train", "val", "test", "miniv")
_IMAGES = ("image_data_split.json", "image_data_split3000.json")
"""The second is its name on the authors' drive."""
_COUNTS = "name_att_rel_count.json"

_TYPES = {"name": "p_name", "attribute": "p_att+", "relation": "p_rel+", "verbose": "p_verbose"}
_CATEGORY_RANKS, _ATTRIBUTE_RANKS = (20, 100, 500), (20, 100, 200)


def find(root: Path, dataset: str, split_by: str | None = None) -> Sequence[str]:
    """Return the only partition if a file of tasks exists; see Reader.find."""
    return [OFFICIAL] if split_by in (None, OFFICIAL) and _home(root) is not None else []


def _home(root: Path) -> Path | None:
    homes = (root / name for name in _FOLDERS)
    return next((home for home in homes if any((home / f"refer_{split}.json").is_file() for split in _SPLITS)), None)


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None = None) -> ReferenceTable:
    """Read PhraseCut; see Reader.load. The images need not exist."""
    home = _home(root)
    assert home is not None
    known = _read_images(home), *_read_ranks(home)
    seen = set[str]()
    references: list[Reference] = []
    for place, split in enumerate(_SPLITS):
        path = home / f"refer_{split}.json"
        if not path.is_file():
            continue
        tasks = read_json(path, "the tasks of PhraseCut", _compact)
        if type(tasks) is not list:
            raise bad(path, "it is not a list of tasks")
        reader = _TaskReader(home, *known, seen, place * SPLIT_STEP + 1)
        for number, task in enumerate(tasks, 1):
            with skip_errors(on_error):
                references.append(reader.read(task, split, path, number))
    return ReferenceTable(dataset, split_by, root, tuple(references))


def size_subset(pixels: int, size: tuple[int, int]) -> str:
    """Return the subset by size of a target of so many pixels in an image of `size` (H, W)."""
    share = pixels / (size[0] * size[1])
    return "s_small" if share < 0.02 else "s_large" if share > 0.2 else "s_mid"


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """Turn the polygons of a task into arrays as soon as it is read: lists take ten times as much.

    Polygons of fewer than two corners are dropped, and coordinates cut to integers, as in the
    authors' code. What is malformed is left for `_TaskReader`.
    """
    if "Polygons" in record:
        with suppress(TypeError, ValueError, OverflowError):
            record["Polygons"] = [
                PixelPolygons(tuple(_corners(polygon) for polygon in _list(instance) if len(_list(polygon)) > 1))
                for instance in _list(record["Polygons"])
            ]
    return record


def _list(value: Any) -> list[Any]:
    """Return a list as it is: texts and dicts, too, have a length and elements."""
    if type(value) is not list:
        raise TypeError("not a list")
    return value


def _corners(polygon: list[Any]) -> NDArray[np.int32]:
    corners = np.array(polygon)
    if corners.shape != (len(polygon), 2) or corners.dtype.kind not in "if" or not (np.abs(corners) < 1e6).all():
        raise ValueError("not a polygon of [x, y]")
    return corners.astype(np.int32)


@dataclass(frozen=True, slots=True)
class _Image:
    size: tuple[int, int]
    split: str
    coco_id: int | None


def _read_images(home: Path) -> dict[int, _Image]:
    path = next((home / name for name in _IMAGES if (home / name).is_file()), home / _IMAGES[0])
    records = read_json(path, "the images of PhraseCut")
    if type(records) is not list:
        raise bad(path, "it is not a list of images")
    images: dict[int, _Image] = {}
    for number, record in enumerate(records, 1):
        image_id = field(record, "image_id", int, path, f"entry {number}")
        where = f"image {image_id}"
        size = size_field(record, path, where)
        coco_id = field(record, "coco_id", int, path, where) if record.get("coco_id") else None
        images[image_id] = _Image(size, field(record, "split", str, path, where), coco_id)
    return images


def _read_ranks(home: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the rank by frequency, from 0, of each category and of each attribute."""
    path = home / _COUNTS
    content = read_json(path, "the frequencies of PhraseCut's words")
    ranks: list[dict[str, int]] = []
    for key in ("cat", "att"):
        pairs = field(content, key, list, path, "the file")
        if not all(type(pair) is list and pair and type(pair[0]) is str for pair in pairs):
            raise bad(path, f"its '{key}' is not a list of words with their counts")
        # The first of equal words counts, as with list.index.
        ranks.append({pair[0]: rank for rank, pair in reversed(list(enumerate(pairs)))})
    return ranks[0], ranks[1]


class _TaskReader:
    """Reads the tasks of a split and numbers them and their objects, from `first`."""

    def __init__(
        self,
        home: Path,
        images: Mapping[int, _Image],
        categories: Mapping[str, int],
        attributes: Mapping[str, int],
        seen: set[str],
        first: int,
    ) -> None:
        self.home, self.images, self.categories, self.attributes = home, images, categories, attributes
        self.coco_names = frozenset(CATEGORIES.values())
        self.numbers, self.objects, self.seen = itertools.count(first), itertools.count(first), seen

    def read(self, task: Any, split: str, path: Path, number: int) -> Reference:
        name = field(task, "task_id", str, path, f"entry {number}")
        where = f"task {name}"
        if name in self.seen:
            raise bad(path, f"{where} occurs twice, in this file or in another split's")
        if "/" in name or not name.strip():
            raise bad(path, f"{where} has a 'task_id' that cannot be the name of a file")
        image_id = field(task, "image_id", int, path, where)
        image = self.images.get(image_id)
        if image is None:
            raise bad(path, f"{where} names image {image_id}, which {_IMAGES[0]} does not have")
        if image.split != split:
            raise bad(path, f"{where} is of {split}, but its image {image_id} is of {image.split} in {_IMAGES[0]}")
        objects = self._objects(task, image.size, path, where)
        segmentations = tuple(each for each in objects if each.polygons)
        text = text_field(task, "phrase", path, where)
        structure = field(task, "phrase_structure", dict, path, where)
        category = field(structure, "name", str, path, f"the phrase_structure of {where}")
        self.seen.add(name)
        ref_id = next(self.numbers)
        return Reference(
            ref_id=ref_id,
            ann_ids=tuple(itertools.islice(self.objects, len(segmentations))),
            image_id=image_id,
            image_path=self.home / "images" / f"{image_id}.jpg",
            image_size=image.size,
            category=category,
            split=split,
            segmentations=segmentations,
            expressions=(
                Expression(
                    ref_id,
                    text,
                    name=name,
                    subsets=self._subsets(structure, category, len(objects), image, path, where),
                ),
            ),
            coco_id=image.coco_id,
        )

    def _objects(self, task: Any, size: tuple[int, int], path: Path, where: str) -> tuple[PixelPolygons, ...]:
        boxes, objects = (field(task, key, list, path, where) for key in ("instance_boxes", "Polygons"))
        if len(boxes) != len(objects):
            raise bad(path, f"{where} has {len(boxes)} 'instance_boxes' but {len(objects)} 'Polygons'")
        if not 0 < len(objects) <= MAX_OBJECTS:
            raise bad(path, f"{where} has {len(objects):,} 'Polygons'; it must have 1 to {MAX_OBJECTS:,}")
        for place, polygons in enumerate(objects, 1):
            if type(polygons) is not PixelPolygons:
                raise bad(path, f"{where} has 'Polygons' that are not lists of polygons of [x, y]")
            if polygons.polygons:
                with located(path, f"{where} has an unusable object {place} in its 'Polygons'"):
                    validate_segmentation(polygons, size)
        return tuple(objects)

    def _subsets(
        self, structure: dict[str, Any], category: str, objects: int, image: _Image, path: Path, where: str
    ) -> tuple[str, ...]:
        where = f"the phrase_structure of {where}"
        attributes, relations = (
            field(structure, key, list, path, where) for key in ("attributes", "relation_descriptions")
        )
        kind = _TYPES.get(field(structure, "type", str, path, where))
        if not all(type(word) is str for word in attributes):
            raise bad(path, f"{where} has 'attributes' that are not texts")
        rank = min(
            (self.attributes.get(word, _ATTRIBUTE_RANKS[-1]) for word in attributes), default=_ATTRIBUTE_RANKS[-1]
        )
        found = {
            "c_coco": category in self.coco_names,
            "p_att": attributes,
            "p_attm": len(attributes) > 1,
            "p_rel": relations,
            "p_relm": len(relations) > 1,
            "p_att_rel": attributes and relations,
            "i_single": objects == 1,
            "i_multi": 1 < objects < 5,
            "i_many": objects >= 5,
            "d_cocotv": image.coco_id is not None,
            "d_notcocotv": image.coco_id is None,
        }
        return (
            *(subset for subset, belongs in found.items() if belongs),
            *([kind] if kind else []),
            *_by_rank("c", self.categories.get(category, _CATEGORY_RANKS[-1]), _CATEGORY_RANKS),
            *_by_rank("a", rank, _ATTRIBUTE_RANKS),
        )


def _by_rank(letter: str, rank: int, limits: tuple[int, int, int]) -> list[str]:
    """Return the subsets of a word of this rank, from 0, such as ["c21-100", "c100", "c500"].

    A phrase without an attribute, or with unknown ones, is in the last one, as in the authors'
    code.
    """
    first, second, third = limits
    names = {
        f"{letter}{first}": rank < first,
        f"{letter}{first + 1}-{second}": first <= rank < second,
        f"{letter}{second + 1}-{third}": second <= rank < third,
        f"{letter}{third}+": rank >= third,
        f"{letter}{second}": rank < second,
        f"{letter}{third}": rank < third,
    }
    return [name for name, belongs in names.items() if belongs]
