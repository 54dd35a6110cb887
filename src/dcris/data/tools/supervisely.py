"""Supervisely: a project folder with meta.json, and in each data set `ann` with one JSON file for
each image in `img`.

A bitmap is a PNG in Base64, compressed once more, with the place of its corner; a polygon has an
exterior and holes, and covers the pixels of its outline, too, as the SDK draws it. Source:
supervisely/geometry (bitmap.py, polygon.py).
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dcris.data.images import MAX_PIXELS
from dcris.data.masks import encode_mask
from dcris.data.table import bad, field, shown
from dcris.data.tools.annotation import (
    Annotation,
    Format,
    Found,
    Mask,
    Size,
    category_name,
    each,
    mapping,
    number,
    objects,
    own_phrases,
    recorded_size,
    split_of,
    whole,
)
from dcris.data.tools.pixels import paste, png_mask
from dcris.errors import DcrisError
from dcris.utils.files import read_json


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
    image, split = (folder / "img" / file.stem).as_posix(), split_of(file.parent)

    def read(place: int, record: Any) -> Annotation:
        where = f"object {place}"
        tags = [mapping(tag) for tag in record.get("tags") or [] if type(tag) is dict] if type(record) is dict else []
        named = {tag["name"]: tag.get("value") for tag in tags if type(tag.get("name")) is str}
        return Annotation(
            path=file,
            where=where,
            source=f"{(folder / file.stem).as_posix()}#{whole(mapping(record).get('id')) or place}",
            image=image,
            size=size,
            masks=_masks(record, file, where),
            category=category_name(field(record, "classTitle", str, file, where), file, where, "classTitle"),
            phrases=own_phrases((named, record), file, where),
            split=split,
        )

    return each(read, records)


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
        if size[0] * size[1] > MAX_PIXELS:
            raise DcrisError(f"the image has more than {MAX_PIXELS:,} pixels")
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


FORMAT = Format("Supervisely", _read, is_place=_is_supervisely)
