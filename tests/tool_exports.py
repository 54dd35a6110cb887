"""Exports of annotation tools with the objects of tests/annotated.py.

The files in tests/exports are made by the tools' own programs (make.py there). The others are
written here as the tools document them.
"""

import base64
import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from annotated import HEIGHT, OBJECTS, WIDTH, Object, write_images
from dcris.data.masks import encode_mask

EXPORTS = Path(__file__).parent / "exports"

Maker = Callable[[Path], Path]
"""Writes an export and its images into a folder, and returns what a user gives to the command."""


def of_image(number: int) -> list[Object]:
    return [item for item in OBJECTS if item.image == f"{number}.png"]


def _copied(folder: Path, name: str) -> Path:
    write_images(folder / "images")
    shutil.copy(EXPORTS / name, folder / name)
    return folder / name


def label_studio(folder: Path) -> Path:
    return _copied(folder, "label_studio.json")


def label_studio_min(folder: Path) -> Path:
    return _copied(folder, "label_studio_min.json")


def label_studio_coco(folder: Path) -> Path:
    return _copied(folder, "label_studio_coco.json")


def datumaro(folder: Path) -> Path:
    return _copied(folder, "datumaro.json")


def cvat_coco(folder: Path) -> Path:
    """As CVAT writes it, by Datumaro."""
    return _copied(folder, "datumaro_coco.json")


def fiftyone(folder: Path) -> Path:
    """COCO, with an attribute of FiftyOne as a field of the annotation."""
    return _copied(folder, "fiftyone_coco.json")


def roboflow(folder: Path) -> Path:
    """COCO by Roboflow's library, which draws outlines through the centres of pixels."""
    return _copied(folder, "roboflow_coco.json")


def roboflow_yolo(folder: Path) -> Path:
    shutil.copytree(EXPORTS / "roboflow_yolo", folder, dirs_exist_ok=True)
    write_images(folder / "train/images")
    return folder


def labelme_itself(folder: Path) -> Path:
    shutil.copytree(EXPORTS / "labelme", folder, dirs_exist_ok=True)
    write_images(folder)
    return folder


def supervisely_itself(folder: Path) -> Path:
    shutil.copytree(EXPORTS / "supervisely", folder, dirs_exist_ok=True)
    write_images(folder / "ds/img")
    return folder


def png(mask: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(stream, "PNG")
    return stream.getvalue()


def crop(mask: Any) -> tuple[tuple[int, int], Any]:
    """Left and top corner of what is not 0, and that part."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0])), mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def labelme(folder: Path) -> Path:
    """Polygons, and a mask of the box between two points."""
    write_images(folder)
    for number in (1, 2):
        shapes: list[dict[str, Any]] = []
        for item in of_image(number):
            shape: dict[str, Any] = {"label": item.category, "description": item.phrase, "group_id": None, "flags": {}}
            if item.polygon:
                shape |= {
                    "shape_type": "polygon",
                    "points": [[float(x), float(y)] for x, y in item.polygon],
                    "mask": None,
                }
            else:
                (left, top), part = crop(item.mask)
                corners = [[left, top], [left + part.shape[1] - 1, top + part.shape[0] - 1]]
                data = base64.b64encode(png(part)).decode()
                shape |= {"shape_type": "mask", "points": corners, "mask": data}
            shapes.append(shape)
        shapes.append({"label": "cup", "points": [[1, 1], [5, 5]], "shape_type": "rectangle", "group_id": None})
        content = {"version": "5.8.1", "flags": {}, "shapes": shapes, "imagePath": f"{number}.png", "imageData": None}
        content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def _via(folder: Path, version: int) -> Path:
    """Regions are a list in version 2 and an object in version 1; only polygons are masks."""
    write_images(folder)
    images = {}
    for number in (1, 2):
        regions: list[Any] = [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": [x for x, _ in item.polygon],
                    "all_points_y": [y for _, y in item.polygon],
                },
                "region_attributes": {"object": item.category, "Caption": item.phrase},
            }
            for item in of_image(number)
            if item.polygon
        ]
        shape = {"name": "rect", "x": 1, "y": 1, "width": 4, "height": 4}
        regions.append({"shape_attributes": shape, "region_attributes": {"object": {"cup": True, "ring": False}}})
        record: dict[str, Any] = {"filename": f"{number}.png", "size": 99, "file_attributes": {}}
        record["regions"] = regions if version == 2 else {str(place): one for place, one in enumerate(regions)}
        images[f"{number}.png99"] = record
    content = {"_via_settings": {}, "_via_img_metadata": images, "_via_attributes": {}} if version == 2 else images
    (folder / "via.json").write_text(json.dumps(content))
    return folder / "via.json"


def via_1(folder: Path) -> Path:
    return _via(folder, 1)


def via_2(folder: Path) -> Path:
    return _via(folder, 2)


def yolo(folder: Path) -> Path:
    """One line an object, in fractions; a line with four numbers is a box."""
    for split, number in (("train", 1), ("val", 2)):
        write_images(folder / "all")
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        shutil.move(folder / f"all/{number}.png", folder / "images" / split / f"{number}.png")
        lines = [
            " ".join(
                [str(["cup", "ring"].index(item.category)), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in item.polygon)]
            )
            for item in of_image(number)
            if item.polygon
        ]
        (folder / "labels" / split / f"{number}.txt").write_text("\n".join([*lines, "0 0.5 0.5 0.1 0.1", ""]))
    shutil.rmtree(folder / "all")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cup\n  1: ring\n")
    return folder


def supervisely(folder: Path) -> Path:
    """Bitmaps are PNG in zlib in Base64; polygons cover the pixels of their outline, too."""
    (folder / "ds/ann").mkdir(parents=True)
    write_images(folder / "ds/img")
    (folder / "meta.json").write_text(json.dumps({"classes": [{"title": "cup"}, {"title": "ring"}], "tags": []}))
    for number in (1, 2):
        objects: list[dict[str, Any]] = []
        for place, item in enumerate(of_image(number)):
            one: dict[str, Any] = {
                "id": 10 * number + place,
                "classTitle": item.category,
                "description": "",
                "tags": [],
            }
            if place == 0:
                one["tags"] = [{"name": "caption", "value": item.phrase}]
            else:
                one["description"] = item.phrase
            if item.category == "cup" and number == 1 and place == 1:
                (left, top), part = crop(item.mask)
                corners = [left, top], [left + part.shape[1] - 1, top + part.shape[0] - 1]
                exterior = [corners[0], [corners[1][0], corners[0][1]], corners[1], [corners[0][0], corners[1][1]]]
                one |= {"geometryType": "polygon", "points": {"exterior": exterior, "interior": []}}
            else:
                corner, part = crop(item.mask)
                data = base64.b64encode(zlib.compress(png(part))).decode()
                one |= {"geometryType": "bitmap", "bitmap": {"data": data, "origin": list(corner)}}
            objects.append(one)
        objects.append({"classTitle": "cup", "geometryType": "rectangle", "points": {"exterior": [[0, 0], [5, 5]]}})
        content = {"description": "", "tags": [], "size": {"height": HEIGHT, "width": WIDTH}, "objects": objects}
        (folder / f"ds/ann/{number}.png.json").write_text(json.dumps(content))
    return folder


def predictions(folder: Path) -> Path:
    write_images(folder)
    results = [
        {
            "image_id": int(item.image[0]),
            "category_id": 1,
            "phrase": item.phrase,
            "score": 0.9,
            "bbox": [0, 0, 1, 1],
            "segmentation": encode_mask(item.mask),
            "file_name": item.image,
            "phrase_number": place,
        }
        for place, item in enumerate(OBJECTS)
    ]
    (folder / "predictions.json").write_text(json.dumps(results))
    return folder / "predictions.json"
