"""Datumaro: a JSON file for each subset, as CVAT exports it, too.

Annotations of an item with the same group, if it is not 0, are one object. Source:
datumaro/plugins/data_formats/datumaro/exporter.py.
"""

from pathlib import Path
from typing import Any

from dcris.data.table import bad, field, shown
from dcris.data.tools.annotation import (
    Annotation,
    Format,
    Found,
    category_name,
    each,
    mapping,
    objects,
    own_phrases,
    polygon_masks,
    split_of,
    whole,
)


def _is_datumaro(content: Any) -> bool:
    return type(content) is dict and "items" in content and type(content.get("categories")) is dict


def _read(path: Path, content: Any) -> Found:
    categories = field(content, "categories", dict, path, "the file")
    labels = objects(categories["label"], "labels", path, "'label'") if "label" in categories else []
    names = [mapping(record).get("name") for record in labels]
    yield from (name for name in names if type(name) is str)
    split = split_of(path.stem)
    for place, item in enumerate(objects(content, "items", path), 1):
        where = f"item {place}"
        if type(item) is not dict:
            yield bad(path, f"{where} is not an object with named fields")
            continue
        records = item.get("annotations")
        yield from each(_annotation, records if type(records) is list else [], item, path, where, names, split)


def _annotation(
    place: int, record: Any, item: dict[str, Any], path: Path, item_where: str, names: list[Any], split: str | None
) -> Annotation | None:
    where = f"annotation {place} of {item_where}"
    kind = field(record, "type", str, path, where)
    if kind in ("label", "caption"):
        return None  # of the whole image
    name = field(item, "id", str, path, item_where)
    image = mapping(item.get("image"))
    size = image.get("size")
    if size is not None and (type(size) is not list or len(size) != 2 or None in map(whole, size)):
        raise bad(path, f"{item_where} has a 'size' that is not height and width: {shown(size)}")
    masks = None
    if kind == "mask":
        masks = polygon_masks(field(record, "rle", dict, path, where))
    elif kind == "polygon":
        masks = polygon_masks([field(record, "points", list, path, where)])
    label = whole(record.get("label_id"))
    if label is not None and not 0 <= label < len(names):
        raise bad(path, f"{where} has a 'label_id' that is not in the list of labels: {label}")
    group = whole(record.get("group"))
    return Annotation(
        path=path,
        where=where,
        source=f"{name}#{place}",
        image=field(image, "path", str, path, item_where) if image.get("path") else name,
        size=None if size is None else (whole(size[0]) or 0, whole(size[1]) or 0),
        masks=masks,
        category=None if label is None else category_name(names[label], path, where, "label"),
        phrases=own_phrases((record.get("attributes"),), path, where),
        split=split,
        group=group or None,
    )


FORMAT = Format("Datumaro (CVAT)", _read, is_content=_is_datumaro)
