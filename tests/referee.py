"""Miniature sets in the official layouts of RRSIS-D, RefSegRS, ReasonSeg, PhraseCut, RefCOCO-M and
GSEval, made by hand from the documented keys, with the traps that the official files have.

Functions write below a root and return it.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from layouts import parquet

H, W = 40, 60


def picture(path: Path, height: int = H, width: int = W, seed: int = 0) -> None:
    """Write an image of noise; the ending of its name decides on the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = (H, W)) -> np.ndarray:
    """Return a mask [H, W] bool of a rectangle whose right and bottom are excluded."""
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask as compressed run lengths by pycocotools, ready for JSON."""
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


# ---- RRSIS-D -------------------------------------------------------------------------------------


def rrsisd_records() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return 4 references, one an image: run lengths are in a list of one."""
    splits = ("train", "train", "val", "test")
    names = [f"{number:05d}.jpg" for number in range(1, 5)]
    references = [
        {
            "ref_id": number,
            "ann_id": number,
            "image_id": number,
            "category_id": 1,
            "split": split,
            "sentences": [{"sent_id": number, "sent": f"a plane {number}", "raw": f"A plane {number}", "tokens": []}],
            "file_name": name,
        }
        for number, (split, name) in enumerate(zip(splits, names, strict=True), 1)
    ]
    instances = {
        "images": [{"id": n, "file_name": name, "height": H, "width": H} for n, name in enumerate(names, 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "segmentation": [runs(box(n, 2, 20, 30, (H, H)))]}
            for n in range(1, 5)
        ],
        "categories": [{"id": 1, "name": "airplane"}],
    }
    return references, instances


def write_rrsisd(root: Path, references: Any = None, instances: Any = None) -> Path:
    """Write RRSIS-D. Image 2 has one pixel more than its mask in height, image 4 fewer in width; an
    XML file is missing."""
    made = rrsisd_records()
    (root / "rrsisd").mkdir(parents=True)
    (root / "rrsisd/refs(unc).p").write_bytes(pickle.dumps(references or made[0], 2))
    (root / "rrsisd/instances.json").write_text(json.dumps(instances or made[1]))
    images = root / "images/rrsisd"
    for number, size in enumerate([(H, H), (H + 1, H), (H, H), (H, H - 3)], 1):
        picture(images / f"JPEGImages/{number:05d}.jpg", *size, seed=number)
    (images / "ann_split").mkdir()
    for number in (1, 2, 3):
        (images / f"ann_split/{number:05d}.xml").write_text("<annotation/>")
    return root


# ---- RefSegRS ------------------------------------------------------------------------------------

REFSEGRS = {"train": "7 road in the middle\n8 vehicle on the road \n\n", "val": "9 van", "test": "10 a building\r\n"}


def write_refsegrs(root: Path, phrases: dict[str, str] | None = None, folder: str = "RefSegRS") -> Path:
    """Write RefSegRS. The mask of 8 has the values 0, 20 and 255, all above 0 the object."""
    home = root / folder
    for number in (7, 8, 9, 10):
        picture(home / f"images/{number}.tif", seed=number)
        mask = box(number, 3, 30, 20) * np.uint8(255)
        if number == 8:
            mask[30:33, :10] = 20
        (home / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(home / f"masks/{number}.tif")
    for split, text in (phrases or REFSEGRS).items():
        (home / f"output_phrase_{split}.txt").write_bytes(text.encode())
    return root


# ---- ReasonSeg -----------------------------------------------------------------------------------


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    """Return the corners of a rectangle, which are pixels of it."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def shape(label: str, *corners: float) -> dict[str, Any]:
    return {"label": label, "shape_type": "polygon", "points": rectangle(*corners), "group_id": None}


def reasonseg_files() -> dict[str, tuple[dict[str, Any], str]]:
    """Return the content and the encoding of the JSON files by name."""
    return {
        # A large ignored region, a smaller target over it, a smaller ignored one in the target.
        "train/1": (
            {
                "text": ["the thing that tells the time", "a clock"],
                "is_sentence": True,
                "shapes": [
                    shape("target", 10, 10, 29, 24),
                    shape("ignore", 15.9, 12.2, 19.4, 15.7),
                    shape("Ignore", 0, 0, 39, 34),
                    shape("flag", 0, 0, 59, 39),
                ],
            },
            "utf-8",
        ),
        "val/2": (
            {
                "text": ["caf\u00e9 sign", "not read"],
                "is_sentence": False,
                "shapes": [shape("target", 5, 5, 9, 9), shape("target", 8, 8, 12, 12)],
            },
            "cp1252",
        ),
        "test/3 copy": ({"text": ["something"], "is_sentence": False, "shapes": []}, "utf-8"),
    }


def write_reasonseg(root: Path, change: Any = None) -> Path:
    """Write ReasonSeg; `change` may alter the content of train/1."""
    for name, (content, encoding) in reasonseg_files().items():
        if name == "train/1" and change is not None:
            change(content)
        path = root / f"reason_seg/ReasonSeg/{name}"
        picture(path.with_name(f"{path.name}.jpg"), seed=len(name))
        path.with_name(f"{path.name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return root


# ---- PhraseCut -----------------------------------------------------------------------------------


def task(name: str, image: int, polygons: list[Any], phrase: str, **structure: Any) -> dict[str, Any]:
    """Return a task; `polygons` are those of each object."""
    plain = {
        "name": phrase.split()[-1],
        "attributes": [],
        "relation_descriptions": [],
        "relation_ids": [],
        "type": "name",
    }
    return {
        "task_id": name,
        "image_id": image,
        "ann_ids": [1],
        "instance_boxes": [[0, 0, 5, 5] for _ in polygons],
        "Polygons": polygons,
        "phrase": phrase,
        "phrase_structure": plain | structure,
    }


def phrasecut_tasks() -> dict[str, list[dict[str, Any]]]:
    """Return the tasks by split: with overlapping objects, corners between pixels and outside, and
    a polygon of one corner, which is not drawn."""
    inside = rectangle(20.7, 2.2, 30.9, 12.5)
    return {
        "train": [task("101__1", 101, [[rectangle(2, 3, 9, 8)]], "a cup")],
        "val": [
            task(
                "102__1_2",
                102,
                [[rectangle(-4, 30, 10, 45)], [inside, [[1, 1]]]],
                "red wooden table",
                attributes=["red", "wooden"],
                type="attribute",
            ),
            task(
                "102__3", 102, [[inside]] * 6, "cup on table", relation_descriptions=[["on", "table"]], type="relation"
            ),
        ],
        "test": [],
        "miniv": [task("103__1", 103, [[[[5, 5], [9, 5]]]], "dragon", type="verbose")],
    }


def write_phrasecut(root: Path, change: Any = None) -> Path:
    """Write PhraseCut; `change` may alter the tasks."""
    home = root / "VGPhraseCut_v0"
    tasks = phrasecut_tasks()
    if change is not None:
        change(tasks)
    splits = {101: "train", 102: "val", 103: "miniv"}
    for image in splits:
        picture(home / f"images/{image}.jpg", seed=image)
    images = [
        {"image_id": image, "width": W, "height": H, "split": split, "coco_id": 9 if image == 102 else None, "url": ""}
        for image, split in splits.items()
    ]
    (home / "image_data_split.json").write_text(json.dumps(images))
    counts = {
        "cat": [["cup", 90], *([f"word {n}", 80] for n in range(30)), ["table", 2]],
        "att": [["red", 9], *([f"word {n}", 8] for n in range(150)), ["wooden", 2]],
        "rel": [],
    }
    (home / "name_att_rel_count.json").write_text(json.dumps(counts))
    for split, content in tasks.items():
        (home / f"refer_{split}.json").write_text(json.dumps(content))
        (home / f"refer_input_{split}.json").write_text("[]")  # published beside; without truth
    return root


# ---- RefCOCO-M -----------------------------------------------------------------------------------


def refcocom_rows() -> list[dict[str, Any]]:
    """Return two rows: images with two objects and with one."""

    def row(image: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
        stream = io.BytesIO()
        pixels = np.random.default_rng(image).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "JPEG")
        name = f"COCO_train2014_{image:012d}.jpg"
        return {
            "image": {"bytes": stream.getvalue(), "path": name},
            "image_id": image,
            "file_name": name,
            "samples": [{"image_id": image, "supercategory": "x", "label": "x"} | sample for sample in samples],
        }

    def sample(number: int, category: str, mask: np.ndarray, *sentences: str) -> dict[str, Any]:
        return {
            "id": number,
            "category": category,
            "sentences": list(sentences),
            "bbox": [0.0, 0.0, 1.0, 1.0],
            "mask": runs(mask),
        }

    return [
        row(
            25,
            [
                sample(501, "giraffe", box(3, 4, 20, 30), "tall one", "the giraffe"),
                sample(502, "person", box(30, 4, 40, 30), "man"),
            ],
        ),
        row(36, [sample(503, "spaceship", box(0, 0, 9, 9), "ufo")]),
    ]


def write_refcocom(root: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    path = root / "refcoco-m/data/validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet(rows or refcocom_rows()))
    return root


# ---- GSEval --------------------------------------------------------------------------------------


def gseval_lines() -> list[dict[str, Any]]:
    """Return two lines: a path with and one without its folder, a mask and a list of one mask."""
    return [
        {
            "idx": 1,
            "image_path": "unlabeled2017/000000000008.jpg",
            "class_id": 0,
            "label": "sky",
            "caption": "the sky above",
            "box": [0, 0, 10, 10],
            "segmentation": runs(box(0, 0, 10, 10)),
        },
        {
            "idx": 7,
            "image_path": "000000000014.jpg",
            "class_id": 3,
            "label": "dog",
            "caption": "the dog on the left",
            "box": [5, 5, 10, 10],
            "segmentation": [runs(box(5, 5, 10, 10))],
        },
    ]


def write_gseval(root: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    (root / "GSEval").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines or gseval_lines())
    (root / "GSEval/GroundingSuite-Eval.jsonl").write_text(text)
    for number in (8, 14):
        picture(root / f"images/unlabeled2017/{number:012d}.jpg", seed=number)
    return root


def write_refcocom_images(root: Path) -> None:
    """Write the images of RefCOCO-M where COCO's are."""
    folder = root / "images/train2014"
    folder.mkdir(parents=True, exist_ok=True)
    for row in refcocom_rows():
        (folder / row["file_name"]).write_bytes(row["image"]["bytes"])


WRITERS = {
    "rrsisd": write_rrsisd,
    "refsegrs": write_refsegrs,
    "reasonseg": write_reasonseg,
    "phrasecut": write_phrasecut,
    "refcoco-m": write_refcocom,
    "gseval": write_gseval,
}
