"""COCO: one JSON file with images, annotations and categories, as CVAT, Roboflow, FiftyOne and
Label Studio export it.

Integers may be text or end in .0, and a segmentation may be polygons in several forms or run
lengths, compressed or not. CVAT marks each brush mask as a crowd, and is known by the "attributes"
that it writes. Source: https://cocodataset.org/#format-data and the exporters of these tools.
"""

import itertools
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dcris.data.masks import decode_mask, mask_box
from dcris.data.table import bad, field, text_field
from dcris.data.tools.annotation import (
    Annotation,
    Exported,
    Format,
    Found,
    each,
    filled,
    integer,
    mapping,
    objects,
    own_phrases,
    phrases_of,
    plain_segmentation,
    polygon_masks,
    recorded_size,
    split_of,
    texts,
    whole,
)
from dcris.types import Reference, Segmentation
from dcris.utils.files import write_json

_ABSENT = "absent_expressions"
"""Field of an image with phrases that describe nothing in it."""


def _is_coco(content: Any) -> bool:
    return type(content) is dict and "annotations" in content and "images" in content


class _Index:
    """COCO records of one kind, by id."""

    def __init__(self, kind: str, key: str, records: list[Any], path: Path) -> None:
        self.kind, self.key, self.path = kind, key, path
        self.records: dict[int, Any] = {}
        self.conflicting: set[int] = set()
        for record in records:
            if (number := _identifier(record)) is not None and self.records.setdefault(number, record) != record:
                self.conflicting.add(number)

    def __getitem__(self, number: int) -> Any:
        if number in self.conflicting:
            raise bad(self.path, f"two different entries of '{self.key}' have the id {number}")
        return self.records[number]

    def id_of(self, annotation: Any, where: str) -> int:
        """Return the id of this kind in an annotation.

        Raises DcrisError if there is no such record.
        """
        number = integer(annotation, f"{self.kind}_id", self.path, where)
        if number not in self.records:
            raise bad(self.path, f"{where} names {self.kind} {number}, which the file does not have")
        return number


def _read(path: Path, content: Any) -> Found:
    records = objects(content, "annotations", path)
    images = _Index("image", "images", objects(content, "images", path), path)
    categories = content.get("categories") or []
    if type(categories) is not list:
        raise bad(path, "the file has 'categories' that is not a list")
    names = _Index("category", "categories", categories, path)
    split = filled(mapping(content.get("info")).get("split")) or split_of(path.stem)
    first: dict[int, Any] = {}

    def read(place: int, record: Any) -> Annotation | None:
        number = _identifier(record)
        where = f"entry {place} of 'annotations'" if number is None else f"annotation {number}"
        if type(record) is not dict:
            raise bad(path, f"{where} is not an object with named fields")
        if number is not None and first.setdefault(number, record) is not record and first[number] == record:
            return None  # an equal record came before
        image_id = images.id_of(record, where)
        image, of_image = images[image_id], f"image {image_id}"
        category = None
        if record.get("category_id") is not None and names.records:
            category_id = names.id_of(record, where)
            category = text_field(names[category_id], "name", path, f"category {category_id}")
        phrases = own_phrases((record, record.get("attributes")), path, where)
        crowd = _is_crowd(record, path, where)
        return Annotation(
            path=path,
            where=where,
            source=f"entry {place}" if number is None else number,
            image=field(image, "file_name", str, path, of_image),
            size=recorded_size(image, "height", "width", path, of_image),
            masks=polygon_masks(record.get("segmentation")),
            category=category,
            phrases=phrases,
            split=split,
            crowd=crowd and not phrases and "attributes" not in record,
            group=whole(record.get("reference")),
        )

    def absent(place: int, image: Any) -> Annotation | None:
        """Return the phrases that describe nothing in an image, which only this program writes."""
        if not mapping(image).get(_ABSENT):
            return None
        where = f"entry {place} of 'images'"
        return Annotation(
            path=path,
            where=where,
            source=where,
            image=field(image, "file_name", str, path, where),
            size=recorded_size(image, "height", "width", path, where),
            masks=(),
            phrases=texts(image[_ABSENT], path, where, _ABSENT),
            split=split,
        )

    yield from (name for record in categories if type(name := mapping(record).get("name")) is str)
    yield from each(read, records)
    yield from each(absent, content["images"])


def _is_crowd(record: dict[str, Any], path: Path, where: str) -> bool:
    """Return whether `iscrowd` is set."""
    value = record.get("iscrowd")
    known = {"": False, "0": False, "false": False, "1": True, "true": True}
    plain = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if plain not in known:
        raise bad(path, f"{where} has an 'iscrowd' that is neither 0 nor 1: {value!r:.80}")
    return known[plain]


def _identifier(record: Any) -> int | None:
    return whole(mapping(record).get("id"))


def _write(exported: Exported, folder: Path) -> None:
    """Write annotations/instances_SPLIT.json for each split; each object is one annotation."""
    categories = exported.categories()
    numbers = {image: number for number, image in enumerate(exported.images, 1)}
    by_split: dict[str, dict[Path, list[Reference]]] = {}
    for image, references in exported.by_image().items():
        for reference in references:
            by_split.setdefault(reference.split, {}).setdefault(image, []).append(reference)
    ids = itertools.count(1)
    for split, images in by_split.items():
        content: dict[str, Any] = {
            "info": {"description": exported.table.dataset, "split": split},
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for name, number in categories.items()],
        }
        for image, references in images.items():
            height, width = references[0].image_size
            record = {"id": numbers[image], "file_name": PurePosixPath(exported.images[image]).name}
            absent = [text for each in references if not each.segmentations for text in phrases_of(each)]
            content["images"].append(
                {**record, "height": height, "width": width, **({_ABSENT: absent} if absent else {})}
            )
            for reference in references:
                for segmentation in reference.segmentations:
                    annotation = _annotation(reference, segmentation)
                    annotation |= {"id": next(ids), "image_id": numbers[image]}
                    annotation["category_id"] = categories[reference.category or "object"]
                    content["annotations"].append(annotation)
        write_json(folder / "annotations" / f"instances_{exported.split_names[split]}.json", content)


def _annotation(reference: Reference, segmentation: Segmentation) -> dict[str, Any]:
    mask = decode_mask(segmentation, reference.image_size)
    phrases = phrases_of(reference)
    group = {"reference": reference.ref_id} if len(reference.segmentations) > 1 else {}
    return {
        "segmentation": plain_segmentation(segmentation, reference.image_size),
        "area": int(np.count_nonzero(mask)),
        "bbox": list(mask_box(mask) or (0, 0, 0, 0)),
        "iscrowd": 0,
        "expressions": phrases,
        "attributes": {"phrase": phrases[0]},  # what CVAT shows
        **group,
    }


FORMAT = Format(
    "COCO (CVAT, Roboflow, FiftyOne, Label Studio)", _read, is_content=_is_coco, write=_write, holds_absent=True
)
