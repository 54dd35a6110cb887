"""Supervisely: a project folder with meta.json, and in each data set `ann` with one JSON file for
each image in `img`.

A bitmap is a PNG in Base64, compressed once more, with the place of its corner; a polygon has an
exterior and holes, and covers the pixels of its outline, too, as the SDK draws it. Source:
supervisely/geometry (bitmap.py, polygon.py).
"""

from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from dcris.data.masks import decode_mask, encode_mask, mask_box
from dcris.data.table import bad, field, shown
from dcris.data.tools.annotation import (
    Annotation,
    Exported,
    Format,
    Found,
    Mask,
    Size,
    category_name,
    each,
    filled,
    mapping,
    number,
    objects,
    own_phrases,
    phrases_of,
    recorded_size,
    split_of,
    whole,
)
from dcris.data.tools.pixels import paste, png_mask, png_text
from dcris.errors import DcrisError
from dcris.types import Segmentation
from dcris.utils.files import read_json, write_json


def _is_supervisely(path: Path) -> bool:
    return path.is_dir() and (path / "meta.json").is_file() and next(path.glob("**/ann/*.json"), None) is not None


def _read(path: Path, content: Any) -> Found:
    if not path.is_dir():
        raise DcrisError(f"{path} is one file of a Supervisely project; give the folder with meta.json")
    meta = read_json(path / "meta.json", "the project's meta.json")
    for record in objects(meta, "classes", path / "meta.json"):
        if type(name := mapping(record).get("title")) is str:
            yield name
    for file in sorted(path.glob("**/ann/*.json")):
        try:
            yield from _read_image(file, path)
        except DcrisError as error:
            yield error


def _read_image(file: Path, root: Path) -> Found:
    content = read_json(file, "the annotation file")
    records = objects(content, "objects", file)
    size = recorded_size(field(content, "size", dict, file, "the file"), "height", "width", file, "the size")
    folder = file.parent.parent.relative_to(root)
    image = (folder / "img" / file.stem).as_posix()
    (named, *_) = _tags(content).get("split", [None])
    split = filled(named) or split_of(*reversed(folder.parts))

    def read(place: int, record: Any) -> Annotation:
        where = f"object {place}"
        return Annotation(
            path=file,
            where=where,
            source=f"{(folder / file.stem).as_posix()}#{whole(mapping(record).get('id')) or place}",
            image=image,
            size=size,
            masks=_masks(record, file, where),
            category=category_name(field(record, "classTitle", str, file, where), file, where, "classTitle"),
            phrases=own_phrases((_tags(record), record), file, where),
            split=split,
            group=filled(record.get("instance")),
        )

    return each(read, records)


def _tags(record: Any) -> dict[str, list[Any]]:
    """Return the values of the tags of an image or an object by their names."""
    tags, found = mapping(record).get("tags"), dict[str, list[Any]]()
    for tag in tags if type(tags) is list else []:
        name, value = mapping(tag).get("name"), mapping(tag).get("value")
        if type(name) is str and value:
            found.setdefault(name, []).append(value)
    return found


def _masks(record: dict[str, Any], path: Path, where: str) -> tuple[Mask, ...] | None:
    kind = field(record, "geometryType", str, path, where)
    if kind == "bitmap":
        bitmap = field(record, "bitmap", dict, path, where)
        data = field(bitmap, "data", str, path, where)
        (left, top) = _point(bitmap.get("origin"), path, where, "origin")
        return (lambda size: encode_mask(paste(png_mask(data, deflated=True), (left, top), size)),)
    if kind != "polygon":
        return None
    points = field(record, "points", dict, path, where)
    exterior = _ring(points.get("exterior"), path, where)
    holes = [_ring(ring, path, where) for ring in field(points, "interior", list, path, where)]

    def draw(size: Size) -> dict[str, Any]:
        mask = np.zeros(size, np.uint8)
        cv2.fillPoly(mask, [exterior], 1)
        cv2.fillPoly(mask, holes, 0)
        return encode_mask(mask)

    return (draw,)


def _ring(value: Any, path: Path, where: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    if type(value) is not list or len(value) < 3:
        raise bad(path, f"{where} has a ring of 'points' without three corners: {shown(value)}")
    return np.array([_point(point, path, where, "points") for point in value], np.int32)


def _point(value: Any, path: Path, where: str, key: str) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise bad(path, f"{where} has '{key}' with an entry that is not x and y: {shown(value)}")
    x, y = (round(number(each, path, where, key)) for each in value)
    if max(abs(x), abs(y)) > 1 << 20:
        raise bad(path, f"{where} has '{key}' far outside the image: {shown(value)}")
    return x, y


def _write(exported: Exported, folder: Path) -> None:
    """Write meta.json, and SPLIT/ann with a JSON file for each image.

    Each object is a bitmap; those of a reference are one instance. The phrases are tags.
    """
    titles = exported.categories()
    for image, references in exported.by_image().items():
        path = PurePosixPath(exported.images[image])
        height, width = references[0].image_size
        found = []
        for place, reference in enumerate(references, 1):
            shapes = [shape for one in reference.segmentations if (shape := _bitmap(one, (height, width)))]
            tags = [{"name": "phrase", "value": text} for text in phrases_of(reference)]
            group = {"instance": str(place)} if len(shapes) > 1 else {}
            title = reference.category or "object"
            found += [{"classTitle": title, "description": "", "tags": tags, **group, **shape} for shape in shapes]
        size, split = {"height": height, "width": width}, [{"name": "split", "value": references[0].split}]
        content = {"description": "", "tags": split, "size": size, "objects": found}
        write_json(folder / path.parent.parent / "ann" / f"{path.name}.json", content)
    classes = [{"title": title, "shape": "any", "color": _colour(place)} for title, place in titles.items()]
    tags = [{"name": name, "value_type": "any_string", "color": _colour(0)} for name in ("phrase", "split")]
    write_json(folder / "meta.json", {"classes": classes, "tags": tags})


def _bitmap(segmentation: Segmentation, size: Size) -> dict[str, Any] | None:
    mask = decode_mask(segmentation, size)
    if (box := mask_box(mask)) is None:
        return None
    return {"geometryType": "bitmap", "bitmap": {"data": png_text(mask, box, deflated=True), "origin": [*box[:2]]}}


def _colour(place: int) -> str:
    return f"#{place * 0x9E3779 % 0x1000000:06X}"


FORMAT = Format("Supervisely", _read, is_place=_is_supervisely, write=_write, image_folder="{split}/img")
