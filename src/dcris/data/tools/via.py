"""VGG Image Annotator 1 and 2: a project, or its annotations exported as JSON.

Regions have a shape and attributes that each project names as it likes. Source:
https://gitlab.com/vgg/via, via-2.x.y/CodeDoc.md.
"""

from pathlib import Path
from typing import Any

from dcris.data.table import bad, field, shown, text_field
from dcris.data.tools.annotation import (
    PHRASE_FIELDS,
    Annotation,
    Format,
    Found,
    Mask,
    each,
    mapping,
    own_phrases,
    polygon_masks,
)

_PROJECT = "_via_img_metadata"

_CATEGORY_FIELDS = ("category", "class", "label", "type", "name", "object", "object_name", "object_category")
"""Names of attributes that hold the category."""


def _images(content: Any) -> dict[str, Any]:
    """Return the images of a project or of exported annotations."""
    return mapping(mapping(content).get(_PROJECT, content))


def _is_via(content: Any) -> bool:
    if type(content) is dict and _PROJECT in content:
        return True
    first = next(iter(_images(content).values()), None)
    return type(first) is dict and "filename" in first and "regions" in first


def _read(path: Path, content: Any) -> Found:
    for key, record in _images(content).items():
        if type(record) is not dict:
            yield bad(path, f"the image {key!r:.80} is not an object with named fields")
            continue
        regions = record.get("regions") or []
        if type(regions) not in (list, dict):
            yield bad(
                path, f"the image {key!r:.80} has 'regions' that are neither a list nor an object: {shown(regions)}"
            )
            continue
        yield from each(_region, regions.values() if type(regions) is dict else regions, record, key, path)


def _region(place: int, region: Any, image: dict[str, Any], key: str, path: Path) -> Annotation:
    where = f"region {place} of {key!r:.80}"
    name = field(image, "filename", str, path, f"the image {key!r:.80}")
    attributes = field(region, "region_attributes", dict, path, where)
    return Annotation(
        path=path,
        where=where,
        source=f"{name}#{place}",
        image=name,
        size=None,
        masks=_masks(field(region, "shape_attributes", dict, path, where), path, where),
        category=_category(attributes, path, where),
        phrases=own_phrases((attributes,), path, where),
    )


def _masks(shape: dict[str, Any], path: Path, where: str) -> tuple[Mask, ...] | None:
    if field(shape, "name", str, path, where) != "polygon":
        return None
    xs, ys = (field(shape, key, list, path, where) for key in ("all_points_x", "all_points_y"))
    if len(xs) != len(ys):
        raise bad(path, f"{where} has {len(xs)} 'all_points_x' but {len(ys)} 'all_points_y'")
    return polygon_masks([[value for point in zip(xs, ys, strict=True) for value in point]])


def _category(attributes: dict[str, Any], path: Path, where: str) -> str | None:
    """Return the attribute with a usual name for it, or the only one that is not the phrase.

    A choice of several options is an object with true for the chosen ones.
    """
    fields = {key.lower(): (key, value) for key, value in attributes.items() if value}
    names = [name for name in _CATEGORY_FIELDS if name in fields]
    others = [name for name in fields if name not in PHRASE_FIELDS]
    if not names and len(others) == 1:
        names = others
    if not names:
        return None
    key, value = fields[names[0]]
    if type(value) is dict:
        value = ", ".join(option for option, chosen in value.items() if chosen is True)
        if not value:
            return None
    return text_field({key: value}, key, path, where)


FORMAT = Format("VGG Image Annotator (VIA 1 and 2)", _read, is_content=_is_via)
