"""How exact the formats of annotation tools are: export, import again, and the tools' own readers.

    python benchmarks/annotation_tools.py trip my.jsonl WORK
    python benchmarks/annotation_tools.py readers WORK

`trip` prints the IoU of each reference with itself after both ways, and leaves the exports and the
masks in WORK for `readers`. `readers` needs label_studio_sdk, datumaro, supervision or labelme, and
skips what is not installed; it does not import dcris, so it may run in another environment.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("coco", "yolo", "labelme", "label-studio", "refer")


def iou(one: Any, other: Any) -> float:
    """Intersection over union of two masks."""
    one, other = np.asarray(one) > 0, np.asarray(other) > 0
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 1.0


def trip(source: Path, work: Path) -> None:
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
    for form in FORMATS:
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


def labelme(work: Path) -> Iterator[tuple[str, Any]]:
    """labelme's own reader and rasteriser. Its packages for the window are replaced by nothing."""
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


def readers(work: Path) -> None:
    """Print how much of each mask the tools' own readers see."""
    masks, phrases = np.load(work / "masks.npz"), json.loads((work / "phrases.json").read_text())
    places = {phrase: str(place) for place, phrase in enumerate(phrases)}
    for name, read in {
        "pycocotools, COCO": coco,
        "pycocotools, REFER": refer,
        "label_studio_sdk": label_studio,
        "supervision, YOLO": supervision,
        "labelme": labelme,
    }.items():
        try:
            scores = [iou(mask, masks[places[phrase]]) for phrase, mask in read(work)]
        except ImportError as error:
            print(f"{name:<20}is not installed ({error})")
            continue
        print(f"{name:<20}{len(scores):>6} references, IoU least {min(scores):.4f}, mean {np.mean(scores):.4f}")
    try:
        from datumaro.components.dataset import Dataset
    except ImportError as error:
        print(f"datumaro            is not installed ({error})")
        return
    data = Dataset.import_from(str(work / "coco"), "coco")
    print(f"datumaro, COCO: {sum(len(item.annotations) for item in data)} annotations on {len(data)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("trip")
    one.add_argument("source", type=Path)
    one.add_argument("work", type=Path)
    commands.add_parser("readers").add_argument("work", type=Path)
    args = parser.parse_args()
    if args.command == "trip":
        trip(args.source, args.work)
    else:
        readers(args.work)
