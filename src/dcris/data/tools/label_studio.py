"""Label Studio: JSON and JSON-MIN, and the pre-annotations that `dcris predict` writes.

A task has annotations, one for each annotator, of results; results with one `id` are parts of one
region: its outline, its label and its text. JSON-MIN has the values of the results by the name of
their tag, without the `id`. Coordinates are percentages of the image's sides. Sources:
https://labelstud.io/guide/task_format and label_studio_sdk/converter/converter.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import quoteattr

from dcris.data.brush_rle import decode_brush, encode_brush
from dcris.data.images import image_endings
from dcris.data.masks import encode_mask, union_mask
from dcris.data.table import bad, field, shown
from dcris.data.tools.annotation import (
    Annotation,
    Exported,
    Format,
    Found,
    Mask,
    Size,
    Texts,
    category_name,
    each,
    mapping,
    number,
    own_phrases,
    phrases_of,
    recorded_size,
    texts,
    whole,
)
from dcris.errors import DcrisError
from dcris.types import MaskArray
from dcris.utils.files import write_file, write_json

_LABELS = ("brushlabels", "polygonlabels", "labels", "rectanglelabels", "ellipselabels")
"""Fields of a value with the label of its region."""

_OUTLINES = ("rle", "points", "x")
"""Fields that show that a value has an outline: a brush mask, a polygon or a box."""

_OF_TASK = frozenset(
    ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "split")
)
"""Fields of JSON-MIN that are not tags."""


@dataclass(frozen=True, slots=True)
class BrushTags:
    """Names of the tags of a labelling interface with brush masks."""

    image: str = "image"
    brush: str = "tag"
    text: str | None = "phrase"
    """The TextArea of each region; None if there is none."""


def _is_label_studio(content: Any) -> bool:
    task = content[0] if type(content) is list and content else None
    if type(task) is not dict:
        return False
    full = type(task.get("data")) is dict and ("annotations" in task or "predictions" in task or "completions" in task)
    return full or ("annotation_id" in task and ("annotator" in task or "lead_time" in task))


def _read(path: Path, content: Any) -> Found:
    if type(content) is not list:
        raise bad(path, "it is not a list of tasks")
    tasks = [mapping(task) for task in content]
    # In a project's export, predictions that were not corrected are not annotations.
    annotated = any(task.get("annotations") or task.get("completions") for task in tasks)
    for place, task in enumerate(tasks, 1):
        where = f"task {task['id']}" if whole(task.get("id")) is not None else f"task {place} in the file"
        try:
            full = type(task.get("data")) is dict
            data = task["data"] if full else task
            image = _image(data, path, where)
            regions = _regions(task, annotated) if full else _regions_of_min(task, path, where)
            yield from each(_annotation, regions, path, where, task.get("id", place), image, data.get("split"))
        except DcrisError as error:
            yield error


def _regions(task: Mapping[str, Any], annotated: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the id of each region of a task and its results."""
    results = _results(task, annotated)
    regions: dict[str, list[dict[str, Any]]] = {}
    for place, result in enumerate(map(mapping, results), 1):
        key = result.get("id")
        value = {**mapping(result.get("value")), "meta": result.get("meta")}
        value |= {key: result.get(key) for key in ("original_width", "original_height")}
        regions.setdefault(key if type(key) is str else f"result {place}", []).append(value)
    yield from regions.items()


def _results(task: Mapping[str, Any], annotated: bool) -> list[Any]:
    """Return the results of the annotation that counts: the ground truth, else the last changed."""
    if not annotated:
        found = [mapping(one) for one in _list(task.get("predictions"))]
    else:
        found = [mapping(one) for one in _list(task.get("annotations")) or _list(task.get("completions"))]
        found = [one for one in found if not one.get("was_cancelled")]
        found.sort(key=lambda one: (bool(one.get("ground_truth")), str(one.get("updated_at") or "")))
    return _list(found[-1].get("result")) if found else []


def _list(value: Any) -> list[Any]:
    return value if type(value) is list else []


def _regions_of_min(task: Mapping[str, Any], path: Path, where: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the number of each region of JSON-MIN and its values.

    Texts have no id. They belong to the regions in turn if there are as many and all regions are of
    one tag; DcrisError is raised after the regions otherwise.
    """
    regions, spoken, tags = list[dict[str, Any]](), list[list[Any]](), set[str]()
    for name, value in task.items():
        values = value if type(value) is list else [value]
        if name in _OF_TASK or name.startswith("_"):
            continue
        outlines = [one for one in values if type(one) is dict and any(key in one for key in _OUTLINES)]
        if outlines and not all("text" in one for one in outlines):
            known = {_place(one): one for one in regions}
            for one in outlines:
                if _place(one) in known:  # label and outline of one region may be two values
                    known[_place(one)].update(one)
                else:
                    regions.append(dict(one))
                    tags.add(name)
        elif values and all(type(one) is str or "text" in mapping(one) for one in values):
            said = [one if type(one) is str else one["text"] for one in values]
            if not any(type(text) is str and _has_ending(text) for text in said):  # not the address of the image
                spoken.append(said)
    paired = [said for said in spoken if len(said) == len(regions) and len(tags) == 1]
    for place, region in enumerate(regions):
        yield str(place + 1), [region, *({"text": said[place]} for said in paired)]
    if regions and len(paired) < len(spoken):
        (said, *_) = [said for said in spoken if said not in paired]
        raise bad(
            path,
            f"{where} has {len(said)} texts for {len(regions)} regions of {len(tags)} tags, and JSON-MIN does not say which "
            f"belong together: {shown(said)}; export JSON",
        )


def _place(value: Mapping[str, Any]) -> str:
    return repr([value.get(key) for key in ("rle", "points", "x", "y", "width", "height")])


def _has_ending(text: str) -> bool:
    """Whether a text is the address of an image."""
    return any(_path_of(text).lower().endswith(ending) for ending in image_endings())


def _image(data: Any, path: Path, where: str) -> str:
    """Return the path of a task's image: the field `image`, or the only one with such an ending."""
    values = {key: value for key, value in mapping(data).items() if type(value) is str}
    usual: tuple[str, ...] = ("image", "img", "photo", "picture")
    names = [key for key in usual if key in values] or [key for key, value in values.items() if _has_ending(value)]
    if not names:
        raise bad(path, f"{where} has no address of an image in its 'data': {shown(data)}")
    return _path_of(values[names[0]])


def _path_of(address: str) -> str:
    """Return the path in an address: of an upload, of local files (`?d=`), or of the web."""
    try:
        parts = urlsplit(address)
        (local,) = parse_qs(parts.query).get("d", [""])
    except ValueError:  # no address, or one with several paths
        return address
    if local:
        return local
    return unquote(parts.path) if parts.scheme or address.startswith("/data/") else address


def _annotation(
    _: int, region: tuple[str, list[dict[str, Any]]], path: Path, task_where: str, task: Any, image: str, split: Any
) -> Annotation | None:
    """Return the annotation of a region, which is an id and results; None for results without an
    outline, such as a choice for the whole image."""
    key, values = region
    where = f"region {key} of {task_where}"
    outline = next((value for value in values if any(key in value for key in _OUTLINES)), None)
    if outline is None:
        return None
    said: Texts = ()
    for value in values:
        if value.get("text"):
            said += texts(value["text"], path, where, "text")
    label: Any = next((value[key] for value in values for key in _LABELS if value.get(key)), [])
    if type(label) is not list or not label:
        label = [None]
    return Annotation(
        path=path,
        where=where,
        source=f"{task}#{key}",
        image=image,
        size=recorded_size(outline, "original_height", "original_width", path, where),
        masks=_masks(outline, path, where),
        category=category_name(label[0], path, where, "label"),
        phrases=tuple(dict.fromkeys(said)) or own_phrases((_note(outline),), path, where),
        split=field({"split": split}, "split", str, path, where) if split else None,
    )


def _note(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the note that an annotator added to a region, under the name of a phrase."""
    return {"description": mapping(value.get("meta")).get("text")}


def _masks(value: Mapping[str, Any], path: Path, where: str) -> tuple[Mask, ...] | None:
    if "rle" in value:
        return (lambda size: encode_mask(decode_brush(value["rle"], size)),)
    if "points" not in value:
        return None  # a rectangle or an ellipse
    points = field(value, "points", list, path, where)

    def polygon(size: Size) -> list[list[float]]:
        height, width = size
        flat = []
        for point in points:
            if type(point) is not list or len(point) != 2:
                raise DcrisError(f"a point is not x and y: {shown(point)}")
            # Rounded, since the percentage of a whole pixel may not be a whole pixel again.
            x, y = (number(each, path, where, "points") for each in point)
            flat += [round(x * width / 100, 6), round(y * height / 100, 6)]
        return [flat]

    return (polygon,)


def brush_results(
    key: str, mask: MaskArray, label: str, phrases: Sequence[str] = (), *, tags: BrushTags | None = None, **more: Any
) -> list[dict[str, Any]]:
    """Return the results of one region: its brush mask with a label, and the text of the region.

    Args:
        key: identifier of the region in its task.
        mask: [H, W] bool, at the size of the image; not empty.
        label: one of the labels of the brush.
        phrases: texts of the region; without any, there is no result for them.
        tags: the tags of the labelling interface; by default those of what this program writes.
        more: further fields of each result.
    """
    tags = tags or BrushTags()
    height, width = mask.shape
    value = {"format": "rle", "rle": encode_brush(mask)}
    kinds = [("brushlabels", tags.brush, {"brushlabels": [label]})]
    if phrases and tags.text:
        kinds.append(("textarea", tags.text, {"text": list(phrases)}))
    return [
        {
            "id": key,
            "type": kind,
            "from_name": tag,
            "to_name": tags.image,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            **more,
            "value": {**value, **own},
        }
        for kind, tag, own in kinds
    ]


def _write(exported: Exported, folder: Path) -> None:
    """Write tasks.json, one brush mask with its text for each reference, and config.xml."""
    tasks = []
    for image, references in exported.by_image().items():
        results = []
        for place, reference in enumerate((one for one in references if one.segmentations), 1):
            mask = union_mask(reference.segmentations, reference.image_size).astype(bool)
            label = reference.category or "object"
            results += brush_results(f"r{place}", mask, label, phrases_of(reference), origin="manual")
        data = {"image": exported.image_url + quote(exported.images[image]), "split": references[0].split}
        tasks.append({"data": data, "annotations": [{"result": results}]})
    write_json(folder / "tasks.json", tasks)
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in exported.categories())
    write_file(
        folder / "config.xml",
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="tag" toName="image">\n{labels}  </BrushLabels>\n'
        '  <TextArea name="phrase" toName="image" perRegion="true" editable="true" placeholder="expression"/>\n</View>\n',
    )


FORMAT = Format(
    "Label Studio (JSON, JSON-MIN, pre-annotations of dcris predict)", _read, is_content=_is_label_studio, write=_write
)
