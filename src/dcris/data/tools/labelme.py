"""labelme: one JSON file for each image, usually beside it.

Shapes are polygons, masks (a PNG of the box between two points, in Base64) and others that have no
mask. Shapes with a common `group_id` and label are one object. Source: labelme/_label_file.py and
labelme/utils/shape.py.
"""

from pathlib import Path
from typing import Any

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
    number,
    objects,
    own_phrases,
    phrases_of,
    polygon_masks,
    recorded_size,
    texts,
    whole,
)
from dcris.data.tools.pixels import paste, png_mask, png_text
from dcris.types import Segmentation
from dcris.utils.files import write_json

_FIELDS = frozenset(("shapes", "imagePath", "imageData", "imageHeight", "imageWidth"))


def _is_labelme(content: Any) -> bool:
    # Two suffice: a file without a field that is needed is an error, while one of another kind is
    # ignored.
    found = _FIELDS & content.keys() if type(content) is dict else ()
    return len(found) > 1 and ("shapes" in found or "imagePath" in found)


def _read(path: Path, content: Any) -> Found:
    image = field(content, "imagePath", str, path, "the file")
    size = recorded_size(content, "imageHeight", "imageWidth", path, "the file")
    split = filled(content.get("split"))

    def read(place: int, record: Any) -> Annotation:
        where = f"shape {place}"
        label = category_name(field(record, "label", str, path, where), path, where, "label")
        group = whole(record.get("group_id"))
        said = filled(record.get("description"))
        return Annotation(
            path=path,
            where=where,
            source=place,
            image=image,
            size=size,
            masks=_masks(record, path, where),
            category=label,
            phrases=texts([line for line in said.splitlines() if line.strip()], path, where, "description")
            if said
            else own_phrases((record, record.get("attributes")), path, where),
            split=split,
            group=None if group is None else f"{group} {label}",
        )

    return each(read, objects(content, "shapes", path))


def _masks(record: dict[str, Any], path: Path, where: str) -> tuple[Mask, ...] | None:
    kind = record.get("shape_type") or "polygon"  # old files have polygons only
    points = field(record, "points", list, path, where)
    if kind == "polygon":
        return polygon_masks([points])
    if kind != "mask":
        return None
    if not points or type(points[0]) is not list or len(points[0]) != 2:
        raise bad(path, f"{where} has 'points' without the corner of its mask: {shown(points)}")
    left, top = (round(number(value, path, where, "points")) for value in points[0])
    data = field(record, "mask", str, path, where)
    return (lambda size: encode_mask(paste(png_mask(data), (left, top), size)),)


def _write(exported: Exported, folder: Path) -> None:
    """Write a JSON file beside each image. A polygon stays one; other masks are masks."""
    for image, references in exported.by_image().items():
        target = folder / exported.images[image]
        height, width = references[0].image_size
        content: dict[str, Any] = {"version": "5.8.1", "flags": {}, "imagePath": target.name, "imageData": None}
        content |= {"imageHeight": height, "imageWidth": width, "shapes": [], "split": references[0].split}
        for group, reference in enumerate(references, 1):
            shapes = [shape for one in reference.segmentations for shape in _shapes(one, reference.image_size)]
            for shape in shapes:
                shape["label"] = reference.category or "object"
                # A line is a phrase.
                shape["description"] = "\n".join(" ".join(text.split()) for text in phrases_of(reference))
                shape["group_id"] = group if len(shapes) > 1 else None
            content["shapes"] += shapes
        write_json(target.with_suffix(".json"), content)


def _shapes(segmentation: Segmentation, size: Size) -> list[dict[str, Any]]:
    if isinstance(segmentation, list):
        rings = [[list(point) for point in zip(flat[::2], flat[1::2], strict=True)] for flat in segmentation]
        return [{"shape_type": "polygon", "points": ring, "flags": {}, "mask": None} for ring in rings]
    mask = decode_mask(segmentation, size)
    left, top, width, height = box = mask_box(mask) or (0, 0, 1, 1)
    corners = [[left, top], [left + width - 1, top + height - 1]]
    return [{"shape_type": "mask", "points": corners, "flags": {}, "mask": png_text(mask, box)}]


FORMAT = Format("labelme", _read, is_content=_is_labelme, write=_write, image_folder="{split}")
