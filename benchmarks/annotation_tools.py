"""How exact the formats of annotation tools are: export, import again, and the tools' own readers.

    python benchmarks/annotation_tools.py trip my.jsonl WORK
    python benchmarks/annotation_tools.py readers WORK [NAME ...]

`trip` prints the IoU of each reference with itself after both ways, and leaves the exports and the
masks in WORK for `readers`. `readers` does not import dcris, so it may run in the environment of a
tool; what is not installed there is skipped, unless it is named.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("coco", "yolo", "labelme", "label-studio", "supervisely", "refer")


def iou(one: Any, other: Any) -> float:
    """Intersection over union of two masks."""
    one, other = np.asarray(one) > 0, np.asarray(other) > 0
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 1.0


def trip(source: Path, work: Path, formats: Sequence[str]) -> None:
    """Export in each format, import again, and print how much of each mask came back."""
    from dcris.data.exporter import export_table
    from dcris.data.importer import import_annotations
    from dcris.data.masks import union_mask
    from dcris.data.readers.load import load_references

    table = load_references(source, None)
    work.mkdir(parents=True)
    found: dict[str, Any] = {}
    for item in table.references:
        found[item.expressions[0].text] = union_mask(item.segmentations, item.image_size)
    np.savez_compressed(work / "masks.npz", **{str(place): mask for place, mask in enumerate(found.values())})
    (work / "phrases.json").write_text(json.dumps(list(found)))
    if len(found) < len(table.references):
        sys.exit("the first expressions of the references must differ, since masks are compared by them")
    for form in formats:
        start = time.perf_counter()
        export_table(table, form, work / form)
        exported = time.perf_counter() - start
        back = work / form / "back.jsonl"
        phrases = work / form / "phrases.csv" if form == "yolo" else None
        place = work / form / table.dataset if form == "refer" else work / form
        start = time.perf_counter()
        import_annotations(place, back, phrases=phrases, ambiguous="keep", strict=True)
        took = time.perf_counter() - start
        again = load_references(back, None).references
        scores = [iou(union_mask(one.segmentations, one.image_size), found[one.expressions[0].text]) for one in again]
        print(
            f"{form:<14}{len(scores):>6} of {len(found)} references, IoU least {min(scores):.6f}, mean {np.mean(scores):.6f}; "
            f"export {exported:.1f} s, import {took:.1f} s"
        )


def without_window() -> None:
    """Replace labelme's packages for its window by nothing, so that its files can be read without
    them."""
    for name in (
        "onnxruntime",
        "PyQt5",
        "PyQt5.QtCore",
        "PyQt5.QtGui",
        "PyQt5.QtWidgets",
        "imgviz",
        "imgviz.io",
        "tifffile",
    ):
        module = types.ModuleType(name)
        module.__getattr__ = lambda key: type(key, (), {})  # type: ignore[method-assign]
        parent, _, child = name.rpartition(".")
        sys.modules[name] = module
        if parent:
            setattr(sys.modules[parent], child, module)


def labelme(work: Path) -> Iterator[tuple[str, Any]]:
    """labelme's own reader and rasteriser."""
    without_window()
    from labelme._label_file import read_label_file
    from labelme.utils.shape import shape_to_mask

    for file in sorted((work / "labelme").rglob("*.json")):
        record, masks = json.loads(file.read_text()), dict[str, Any]()
        size = record["imageHeight"], record["imageWidth"]
        for shape in read_label_file(str(file)).shapes:
            if shape["shape_type"] == "mask":
                mask = np.zeros(size, bool)
                ((left, top), (right, bottom)) = shape["points"]
                mask[top : bottom + 1, left : right + 1] = shape["mask"]
            else:
                mask = shape_to_mask(size, shape["points"], shape["shape_type"])
            phrase = shape["description"].splitlines()[0]
            masks[phrase] = masks.get(phrase, False) | mask
        yield from masks.items()


def label_studio(work: Path) -> Iterator[tuple[str, Any]]:
    """Brush masks by the SDK's decoder."""
    from label_studio_sdk.converter.brush import decode_rle

    for task in json.loads((work / "label-studio/tasks.json").read_text()):
        for result in task["annotations"][0]["result"]:
            if result["type"] == "textarea":
                shape = result["original_height"], result["original_width"], 4
                yield result["value"]["text"][0], decode_rle(result["value"]["rle"]).reshape(shape)[:, :, 3]


def supervision(work: Path) -> Iterator[tuple[str, Any]]:
    """YOLO by supervision, which fills polygons with their border."""
    import csv

    import supervision

    rows = list(csv.reader((work / "yolo/phrases.csv").open()))[1:]
    phrases = dict(reversed(rows))
    for folder in sorted((work / "yolo/images").iterdir()):
        labels = work / "yolo/labels" / folder.name
        yaml = str(work / "yolo/data.yaml")
        data = supervision.DetectionDataset.from_yolo(str(folder), str(labels), yaml, force_masks=True)
        for path, _, found in data:
            for place, mask in enumerate(found.mask, 1):
                yield phrases[f"labels/{folder.name}/{Path(path).stem}.txt#{place}"], mask


def coco(work: Path) -> Iterator[tuple[str, Any]]:
    """COCO by pycocotools."""
    yield from _coco(sorted((work / "coco/annotations").glob("*.json")), lambda each: each["expressions"][0])


def refer(work: Path) -> Iterator[tuple[str, Any]]:
    """As refer.py of the REFER release reads it: a pickle, and polygons by pycocotools."""
    import pickle

    ((references,), (instances,)) = (
        sorted((work / "refer").glob(f"*/{name}")) for name in ("refs*.p", "instances.json")
    )
    phrases = {each["ann_id"]: each["sentences"][0]["sent"] for each in pickle.loads(references.read_bytes())}  # noqa: S301 - our own
    yield from _coco([instances], lambda each: phrases[each["id"]])


def _coco(files: list[Path], phrase: Callable[[Any], str]) -> Iterator[tuple[str, Any]]:
    from pycocotools.coco import COCO

    for file in files:
        data = COCO(str(file))
        for annotation in data.loadAnns(data.getAnnIds()):
            yield phrase(annotation), data.annToMask(annotation)


def roboflow(work: Path) -> Iterator[tuple[str, Any]]:
    """COCO by supervision, the library of Roboflow."""
    import supervision

    for file in sorted((work / "coco/annotations").glob("*.json")):
        content = json.loads(file.read_text())
        names = {image["file_name"]: image["id"] for image in content["images"]}
        data = supervision.DetectionDataset.from_coco(str(work / "coco/images"), str(file), force_masks=True)
        for path, _, found in data:
            ours = [each for each in content["annotations"] if each["image_id"] == names[Path(path).name]]
            yield from zip((each["expressions"][0] for each in ours), found.mask, strict=True)


def datumaro(work: Path) -> Iterator[tuple[str, Any]]:
    """COCO by Datumaro, with CVAT's attributes."""
    from datumaro.components.annotation import Mask, Polygon
    from datumaro.components.dataset import Dataset
    from pycocotools import mask as coder

    for item in Dataset.import_from(str(work / "coco"), "coco_instances"):
        masks = dict[str, Any]()  # each polygon of an object is an annotation, and so is its box
        for annotation in item.annotations:
            if isinstance(annotation, Polygon):
                mask = coder.decode(coder.merge(coder.frPyObjects([annotation.points], *item.media.size)))
            elif isinstance(annotation, Mask):
                mask = annotation.image
            else:
                continue
            phrase = annotation.attributes["phrase"]
            masks[phrase] = mask | masks.get(phrase, np.zeros_like(mask))
        yield from masks.items()


def fiftyone(work: Path) -> Iterator[tuple[str, Any]]:
    """COCO by FiftyOne's reader of single objects: its data sets need MongoDB."""
    from fiftyone.utils.coco import load_coco_detection_annotations

    for file in sorted((work / "coco/annotations").glob("*.json")):
        _, classes, _, images, annotations = load_coco_detection_annotations(str(file))
        for number, objects in annotations.items():
            width, height = images[number]["width"], images[number]["height"]
            for each in objects:
                found = each.to_detection((width, height), classes_map=classes, load_segmentation=True)
                left, top = round(found.bounding_box[0] * width), round(found.bounding_box[1] * height)
                mask = np.zeros((height, width), bool)
                mask[top : top + found.mask.shape[0], left : left + found.mask.shape[1]] = found.mask
                yield found["expressions"][0], mask


def supervisely(work: Path) -> Iterator[tuple[str, Any]]:
    """A project by Supervisely's SDK."""
    import supervisely as sly

    project = sly.Project(str(work / "supervisely"), sly.OpenMode.READ)
    for data in project.datasets:
        for name in data:
            found, masks = data.get_ann(name, project.meta), dict[str, Any]()
            for label in found.labels:
                phrase = next(tag.value for tag in label.tags if tag.name == "phrase")
                masks.setdefault(phrase, np.zeros(found.img_size, np.uint8))
                label.geometry.draw(masks[phrase], 1)
            yield from masks.items()


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "pycocotools": coco,
    "refer": refer,
    "label_studio": label_studio,
    "supervision": supervision,
    "labelme": labelme,
    "supervisely": supervisely,
    "datumaro": datumaro,
    "fiftyone": fiftyone,
    "roboflow": roboflow,
}


def readers(work: Path, names: Sequence[str]) -> None:
    """Print how much of each mask the tools' own readers see."""
    masks, phrases = np.load(work / "masks.npz"), json.loads((work / "phrases.json").read_text())
    places = {phrase: str(place) for place, phrase in enumerate(phrases)}
    for name in names or READERS:
        try:
            scores = [iou(mask, masks[places[phrase]]) for phrase, mask in READERS[name](work)]
        except ImportError as error:
            if names:
                raise
            print(f"{name:<14}is not installed ({error})")
            continue
        print(f"{name:<14}{len(scores):>6} references, IoU least {min(scores):.6f}, mean {np.mean(scores):.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("trip")
    one.add_argument("source", type=Path)
    one.add_argument("work", type=Path)
    one.add_argument("--format", action="append", choices=FORMATS, help="default: all")
    two = commands.add_parser("readers")
    two.add_argument("work", type=Path)
    two.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(READERS)} (default: what is installed)")
    args = parser.parse_args()
    if args.command == "trip":
        trip(args.source, args.work, args.format or FORMATS)
    else:
        readers(args.work, args.names)
