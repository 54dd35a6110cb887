"""Make more photographs to train `photos` on: objects of some are pasted into others (Ghiasi et al.
2021, "Simple Copy-Paste").

    python tools/compose_photos.py --data ROOT --out COMPOSED --licences 4 5 7 8

writes COMPOSED in the same layout: the photographs of ROOT, the composed ones, and all annotations.
What is covered is cut out of the masks, so phrases can be generated for all of them. Photographs of
other splits than train are neither used nor changed. `--scenes` adds generated scenes (`dcris data
scenes`), in which places, sizes, ordinals and colours can be learnt from more images than there are
photographs. Needs cocomini's layout (REFER's, with `instances.json` of all instances).
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from dcris.cli import exit_code
from dcris.data.images import read_image
from dcris.data.masks import decode_mask, encode_mask, mask_box
from dcris.data.readers import refer_layout
from dcris.data.readers.load import load_references
from dcris.data.readers.refer_layout import Instances
from dcris.data.scenes import DATASET as SCENES
from dcris.data.scenes import write_scenes
from dcris.data.table import ReferenceTable
from dcris.utils.files import read_json, remove_directory

MOST_PASTED = 4
AREAS = 0.008, 0.2
"""Least and greatest share of the photograph that a pasted object covers."""
SCALES = 0.35, 1.8
"""Least and greatest factor of an object's sides."""
LEAST_SOURCE = 0.006
"""Least share of its own photograph that a pasted object covers."""
LEAST_PIXELS = 30
"""Objects of which less is left are dropped."""
OUTSIDE = 1 / 6
"""Greatest part of an object's side that may be outside the photograph."""
SCENE_SIDE = 224
SCENE_CATEGORIES = 1000
"""Added to the numbers of the scenes' categories; COCO's end at 90."""

Pixels = NDArray[np.uint8]
Record = dict[str, Any]
"""An image or annotation of `instances.json`."""


@dataclass(frozen=True)
class Cutout:
    """An object that can be pasted: its box of pixels and mask."""

    image_id: int
    category_id: int
    pixels: Pixels
    mask: Pixels


@dataclass
class Item:
    """An object in a composed photograph, with a mask of the photograph's size."""

    category_id: int
    crowd: int
    mask: Pixels

    def record(self, image_id: int, number: int) -> Record:
        """Return the annotation of this number."""
        return {
            "id": number,
            "image_id": image_id,
            "category_id": self.category_id,
            "iscrowd": self.crowd,
            "bbox": list(mask_box(self.mask) or ()),
            "area": int(self.mask.sum()),
            "segmentation": encode_mask(self.mask),
        }


def main() -> None:
    """Write the composed data set."""
    parser = _parser()
    args = parser.parse_args()
    instances = refer_layout.read_instances(args.data, args.dataset)
    objects = objects_by_image(instances)
    pool = permitted(load_references(args.data, args.dataset), instances, objects, args.licences)
    if not pool:
        parser.error("no training photograph has one of these licences")
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    cutouts = cut_out(instances, {number: objects[number] for number in pool})
    folder = args.out / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    for number in instances.images:
        shutil.copy(instances.image_path(number), folder)
    generator = np.random.default_rng(args.seed)
    images: list[Record] = []
    annotations: list[Record] = []
    next_id, next_ann = 1 + max(instances.images), 1 + max(instances.annotations)
    for number in pool * args.per_photograph:
        pixels, items, used = compose(instances, number, objects[number], cutouts, args.same_category, generator)
        image = {
            "id": next_id + len(images),
            "file_name": f"composed_{len(images):06}.jpg",
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "license": instances.images[number]["license"],
            "composed_of": [number, *used],
        }
        Image.fromarray(pixels).save(folder / image["file_name"], quality=92)
        images.append(image)
        annotations += (
            item.record(image["id"], place) for place, item in enumerate(items, next_ann + len(annotations))
        )
    categories: list[Record] = []
    if args.scenes:
        ids = next_id + len(images), next_ann + len(annotations)
        licence = instances.images[pool[0]]["license"]  # one that is trained on
        more_images, more_annotations, categories = scenes(args.out, args.scenes, args.seed, licence, ids)
        images, annotations = images + more_images, annotations + more_annotations
    target = args.out / args.dataset
    write_annotations(args.data / args.dataset, target, instances, images, annotations, categories)
    print(f"{len(images)} images, composed of {len(pool)} photographs or generated, with {len(annotations)} objects")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="cocomini")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--licences", type=int, nargs="+", help="numbers of `instances.json`; by default all")
    parser.add_argument("--per-photograph", type=int, default=5)
    parser.add_argument(
        "--same-category",
        type=float,
        default=0.5,
        help="share of the pasted objects whose category the photograph has already, for phrases that distinguish them",
    )
    parser.add_argument("--scenes", type=int, default=0, help="number of generated scenes to add")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def objects_by_image(instances: Instances) -> dict[int, list[Record]]:
    """Return the annotations of each image that has some."""
    objects: dict[int, list[Record]] = {}
    for annotation in instances.annotations.values():
        objects.setdefault(annotation["image_id"], []).append(annotation)
    return objects


def permitted(
    table: ReferenceTable, instances: Instances, objects: dict[int, list[Record]], licences: list[int] | None
) -> list[int]:
    """Return the photographs with objects that are in no other split than train, and of these
    licences, or of any."""
    held_out = {reference.image_id for reference in table.references if reference.split != "train"}
    return [
        number
        for number, image in instances.images.items()
        if number in objects and number not in held_out and (not licences or image["license"] in licences)
    ]


def scenes(
    out: Path, count: int, seed: int, licence: int, ids: tuple[int, int]
) -> tuple[list[Record], list[Record], list[Record]]:
    """Write generated scenes beside the photographs, and return their images, annotations and
    categories.

    Args:
        out: the data set's root.
        count: how many.
        seed: of the scenes.
        licence: number that the images get.
        ids: the first numbers of images and annotations that are free.
    """
    write_scenes(out, train=count, val=0, test=0, seed=seed, side=SCENE_SIDE)
    found = read_json(out / SCENES / "instances.json", "the annotations of the scenes")
    remove_directory(out / SCENES)
    images = [image | {"id": image["id"] + ids[0], "license": licence, "composed_of": []} for image in found["images"]]
    annotations = [
        each
        | {
            "id": each["id"] + ids[1],
            "image_id": each["image_id"] + ids[0],
            "category_id": each["category_id"] + SCENE_CATEGORIES,
        }
        for each in found["annotations"]
    ]
    categories = [category | {"id": category["id"] + SCENE_CATEGORIES} for category in found["categories"]]
    return images, annotations, categories


def write_annotations(
    source: Path,
    target: Path,
    instances: Instances,
    images: list[Record],
    annotations: list[Record],
    categories: list[Record],
) -> None:
    """Write the annotations of a data set with further ones, and its references as they are."""
    target.mkdir()
    for path in source.glob("refs(*).p"):
        shutil.copy(path, target)
    content = json.loads(instances.path.read_text(encoding="utf-8"))
    content["images"] += images
    content["annotations"] += annotations
    content["categories"] += categories
    (target / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def cut_out(instances: Instances, objects: dict[int, list[Record]]) -> dict[int, list[Cutout]]:
    """Return the objects that can be pasted, by category."""
    found: dict[int, list[Cutout]] = {}
    for number, annotations in objects.items():
        pixels = read_image(instances.image_path(number))
        for annotation in annotations:
            mask = decode_mask(annotation["segmentation"], instances.image_size(number))
            if annotation["iscrowd"] or mask.sum() < LEAST_SOURCE * mask.size:
                continue
            left, top, width, height = mask_box(mask) or (0, 0, 0, 0)
            box = np.s_[top : top + height, left : left + width]
            cutout = Cutout(number, annotation["category_id"], pixels[box].copy(), mask[box].copy())
            found.setdefault(cutout.category_id, []).append(cutout)
    return found


def compose(
    instances: Instances,
    number: int,
    annotations: list[Record],
    cutouts: dict[int, list[Cutout]],
    same_category: float,
    generator: Generator,
) -> tuple[Pixels, list[Item], list[int]]:
    """Paste a few objects into a photograph, which is mirrored half of the time.

    Returns:
        The pixels [H, W, 3], its objects, and the photographs that the pasted ones are from.
    """
    pixels = read_image(instances.image_path(number))
    size = instances.image_size(number)
    items = [
        Item(each["category_id"], each["iscrowd"], decode_mask(each["segmentation"], size)) for each in annotations
    ]
    if generator.random() < 0.5:
        pixels = pixels[:, ::-1]
        items = [Item(item.category_id, item.crowd, item.mask[:, ::-1]) for item in items]
    present = [item.category_id for item in items if item.category_id in cutouts]
    used = []
    for _ in range(generator.integers(1, MOST_PASTED + 1)):
        same = bool(present) and generator.random() < same_category
        category = int(generator.choice(present if same else list(cutouts)))
        cutout = cutouts[category][generator.integers(len(cutouts[category]))]
        placed = place(cutout, size, generator)
        if placed is None:
            continue
        patch, mask = placed
        # Softer at the edge, or the sharp outline of what is pasted would be learned.
        share = np.clip(1.2 * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.0), 0, 1)[..., None] * mask[..., None]
        pixels = (pixels * (1 - share) + patch * share).astype(np.uint8)
        for item in items:
            item.mask = item.mask * (1 - mask)
        items.append(Item(category, 0, mask))
        used.append(cutout.image_id)
    return np.ascontiguousarray(pixels), [item for item in items if item.mask.sum() >= LEAST_PIXELS], used


def place(cutout: Cutout, size: tuple[int, int], generator: Generator) -> tuple[Pixels, Pixels] | None:
    """Scale an object, mirror it half of the time and put it at a random place.

    Returns:
        Pixels [H, W, 3] and mask [H, W] of the photograph's size; None if the object would be too
        small.
    """
    height, width = size
    area = np.exp(generator.uniform(*np.log(AREAS))) * height * width
    scale = float(np.clip(np.sqrt(area / cutout.mask.sum()), *SCALES))
    scale = min(scale, 0.9 * height / cutout.mask.shape[0], 0.9 * width / cutout.mask.shape[1])
    if cutout.mask.sum() * scale**2 < AREAS[0] / 2 * height * width:
        return None
    target = max(1, round(cutout.mask.shape[1] * scale)), max(1, round(cutout.mask.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels, mask = (cv2.resize(each, target, interpolation=how) for each in (cutout.pixels, cutout.mask))
    if generator.random() < 0.5:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    rows, columns = mask.shape
    top, left = (
        int(generator.integers(-int(OUTSIDE * side), whole - side + int(OUTSIDE * side) + 1))
        for side, whole in ((rows, height), (columns, width))
    )
    inside = np.s_[max(0, top) : min(height, top + rows), max(0, left) : min(width, left + columns)]
    part = np.s_[max(0, -top) : min(rows, height - top), max(0, -left) : min(columns, width - left)]
    patch, whole_mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    patch[inside], whole_mask[inside] = pixels[part], mask[part]
    return patch, whole_mask


if __name__ == "__main__":
    sys.exit(exit_code(main))
