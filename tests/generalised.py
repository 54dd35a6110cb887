"""Small data sets in the layouts of gRefCOCO, Ref-ZOM and R-RefCOCO. A test may change them, then
write them."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


def rectangle(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


@dataclass
class Layout:
    """Files of one data set."""

    dataset: str
    file: str
    """Name of the file of references: a pickle, or JSON."""
    references: list[Any]
    instances: dict[str, Any]
    images: str = "images/train2014"

    def contents(self) -> dict[str, bytes]:
        """Return the two files by name."""
        as_json = self.file.endswith(".json")
        references = json.dumps(self.references).encode() if as_json else pickle.dumps(self.references, 2)
        return {self.file: references, "instances.json": json.dumps(self.instances).encode()}

    def write(self, root: Path) -> Path:
        """Write files and images below `root`, and return it."""
        folder = root / self.dataset
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents().items():
            (folder / name).write_bytes(content)
        (root / self.images).mkdir(parents=True, exist_ok=True)
        for image in self.instances["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(root / self.images / image["file_name"])
        return root


def instances(prefix: str = "COCO_train2014_") -> dict[str, Any]:
    """Return three images: with two people and a cup, a crowd of cups and one cup, and one dog."""
    annotations = [
        (71, 1, 5, rectangle(2, 3, 12, 9)),
        (72, 1, 5, rectangle(8, 6, 20, 20)),
        (73, 1, 6, rectangle(30, 20, 36, 28)),
        (74, 2, 6, {"size": [HEIGHT, WIDTH], "counts": [0, 600, 600]}),
        (75, 2, 6, rectangle(25, 5, 35, 15)),
        (76, 3, 7, rectangle(1, 1, 30, 25)),
    ]
    return {
        "images": [
            {"id": number, "file_name": f"{prefix}{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for number in (1, 2, 3)
        ],
        "annotations": [
            {
                "id": ann_id,
                "image_id": image_id,
                "category_id": category,
                "segmentation": segmentation,
                "iscrowd": int(type(segmentation) is dict),
            }
            for ann_id, image_id, category, segmentation in annotations
        ],
        "categories": [{"id": 5, "name": "person"}, {"id": 6, "name": "cup"}, {"id": 7, "name": "dog"}],
    }


def _reference(ref_id: int, image_id: int, ann_id: Any, split: str, *texts: str, **more: Any) -> dict[str, Any]:
    sentences = [
        {"sent_id": 10 * ref_id + number, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for number, text in enumerate(texts)
    ]
    return {"ref_id": ref_id, "image_id": image_id, "ann_id": ann_id, "split": split, "sentences": sentences} | more


def grefcoco() -> Layout:
    """Two people, one of them, nothing, cups beside a crowd; `category_id` in its several forms."""
    references = [
        _reference(1, 1, [71, 72], "train", "both people", "the two", category_id=[5, 5]),
        _reference(2, 1, [71], "train", "left person", category_id=5),
        _reference(3, 1, [-1], "train", "the horse", category_id=[-1]),
        _reference(4, 1, [72, 73], "train", "person and cup", category_id=[5, 6]),
        _reference(5, 2, [74, 75], "val", "all cups", category_id=[6, 6]),
        _reference(6, 3, [-1], "testA", "two cats", "a cat", category_id=-1),
        _reference(7, 3, [76], "testA", "dog", category_id=[7]),
    ]
    return Layout("grefcoco", "grefs(unc).json", references, instances())


def refzom() -> Layout:
    """One, many and zero; scalar and list `ann_id`, no `category_id` where it is a list."""
    references = [
        _reference(1, 1, 71, "train", "left person", source="refcoco", category_id=5),
        _reference(2, 1, [71, 72], "train", "two people standing", source="many"),
        _reference(3, 1, [], "train", "a horse in a field", source="zero"),
        _reference(4, 3, [76], "test", "a dog", source="many"),
        _reference(5, 3, 76, "test", "a cake on a plate", source="zero", category_id=7),
    ]
    return Layout("ref-zom", "refs(final).p", references, instances("COCO_val2014_"), "images/trainval2014")


def rrefcoco() -> Layout:
    """References as in RefCOCO, with sentences that describe nothing in the image."""
    references = [
        _reference(1, 1, 71, "train", "left person", "the horse", "left horse", category_id=5),
        _reference(2, 2, 75, "val", "cup", "small cup", "large cup", category_id=6),
        _reference(3, 3, 76, "val", "cat", "dog", category_id=7),
    ]
    for reference, exists in zip(references, ((1, 0, 0), (True, True, False), (False, True)), strict=True):
        for sentence, value in zip(reference["sentences"], exists, strict=True):
            sentence["exist"] = value
    del references[1]["sentences"][0]["exist"]  # those of RefCOCO itself may lack it
    return Layout("rrefcoco", "refs(unc).p", references, instances(), "images/mscoco/train2014")


LAYOUTS = {"grefcoco": grefcoco, "ref-zom": refzom, "rrefcoco": rrefcoco}
