"""COCO: one JSON file with images, annotations and categories, as CVAT, Roboflow, FiftyOne and
Label Studio export it.

Integers may be text or end in .0, and a segmentation may be polygons in several forms or run
lengths, compressed or not. CVAT marks each brush mask as a crowd, and is known by the "attributes"
that it writes. Source: https://cocodataset.org/#format-data and the exporters of these tools.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dcris.data.table import bad, check_text, field
from dcris.data.tools.annotation import (
    Annotation,
    Format,
    Found,
    each,
    integer,
    mapping,
    objects,
    own_phrases,
    polygon_mask,
    recorded_size,
    split_of,
    whole,
)


def _is_coco(content: Any) -> bool:
    return type(content) is dict and "annotations" in content and "images" in content


class _Index:
    """COCO records of one kind, by id."""

    def __init__(self, kind: str, key: str, records: list[Any], path: Path) -> None:
        self.kind, self.key, self.path = kind, key, path
        self.records: dict[int, Any] = {}
        self.conflicting: set[int] = set()
        for number, record in zip(_identifiers(records), records, strict=True):
            if number is not None and self.records.setdefault(number, record) != record:
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
    split = split_of(path)
    first: dict[int, Any] = {}

    def read(place: int, record: Any) -> Annotation | None:
        (number,) = _identifiers([record])
        where = f"entry {place} of 'annotations'" if number is None else f"annotation {number}"
        if type(record) is not dict:
            raise bad(path, f"{where} is not an object with named fields")
        if number is not None and first.setdefault(number, record) is not record and first[number] == record:
            return None  # an equal record came before
        image_id = images.id_of(record, where)
        image, of_image = images[image_id], f"image {image_id}"
        mask = polygon_mask(record.get("segmentation"))
        category = None
        if record.get("category_id") is not None and names.records:
            category_id = names.id_of(record, where)
            of_category = f"category {category_id}"
            category = field(names[category_id], "name", str, path, of_category)
            check_text(category, path, of_category, "name")
        phrases = own_phrases((record, record.get("attributes")), path, where)
        crowd = _is_crowd(record, path, where)
        return Annotation(
            path=path,
            where=where,
            source=f"entry {place}" if number is None else number,
            image=field(image, "file_name", str, path, of_image),
            size=recorded_size(image, "height", "width", path, of_image),
            masks=None if mask is None else (mask,),
            category=category,
            phrases=phrases,
            split=split,
            crowd=crowd and not phrases and "attributes" not in record,
        )

    yield from (name for record in categories if type(name := mapping(record).get("name")) is str)
    yield from each(read, records)


def _is_crowd(record: dict[str, Any], path: Path, where: str) -> bool:
    """Return whether `iscrowd` is set."""
    value = record.get("iscrowd")
    known = {"": False, "0": False, "false": False, "1": True, "true": True}
    plain = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if plain not in known:
        raise bad(path, f"{where} has an 'iscrowd' that is neither 0 nor 1: {value!r:.80}")
    return known[plain]


def _identifiers(records: Iterable[Any]) -> Iterator[int | None]:
    return (whole(mapping(record).get("id")) for record in records)


FORMAT = Format("COCO (CVAT, Roboflow, FiftyOne, Label Studio)", _read, is_content=_is_coco)
