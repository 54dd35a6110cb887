"""Make example data for `run.sh`: images, a COCO export as an annotation tool writes it, and
expressions.

    python make_pictures.py FOLDER [ROOT]

writes FOLDER/pictures/*, FOLDER/instances.json (COCO annotations) and FOLDER/phrases.json
(expressions). The images are drawn. With ROOT, a folder with the data set `cocomini` in the REFER
layout, they are photographs of its val split.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGES, SIDE, OBJECTS = 40, 320, 4

Outline = NDArray[np.float64]
"""Polygon corners [corners, 2] as x and y. An object is about 2 wide and 2 high, centred at 0."""


def rectangle(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return the corners of a rectangle."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def disc(x: float, y: float, width: float, height: float) -> Outline:
    """Return an ellipse as a polygon of 24 corners, which looks round at this size."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + width / 2 * np.cos(angles), y + height / 2 * np.sin(angles)], axis=1)


def polygon(*numbers: float) -> Outline:
    """Return the polygon with the given corners, as x, y, x, y, ..."""
    return np.array(numbers).reshape(-1, 2)


KINDS: dict[str, tuple[tuple[int, int, int], list[Outline]]] = {
    "fish": ((240, 140, 40), [disc(-0.2, 0, 1.4, 0.9), polygon(0.4, 0, 1, -0.5, 1, 0.5)]),
    "house": ((190, 60, 50), [rectangle(-0.7, -0.1, 0.7, 0.9), polygon(-1, -0.1, 0, -1, 1, -0.1)]),
    "tree": ((60, 140, 60), [rectangle(-0.15, 0.3, 0.15, 1), polygon(-0.8, 0.4, 0, -1, 0.8, 0.4)]),
    "mug": ((80, 110, 200), [rectangle(-0.8, -0.7, 0.4, 0.8), rectangle(0.4, -0.3, 0.9, 0.3)]),
    "key": ((200, 190, 70), [disc(-0.5, 0, 1, 1), rectangle(-0.05, -0.15, 1, 0.15), rectangle(0.6, 0.1, 0.8, 0.5)]),
}


def draw(folder: Path) -> None:
    """Draw the images. The result is the same in every run."""
    rng = np.random.default_rng(0)
    categories = [{"id": number, "name": name} for number, name in enumerate(KINDS, 1)]
    images, annotations = [], []
    phrases: dict[str, str | list[str]] = {name: [name, f"the {name}"] for name in KINDS}
    for image_id in range(1, IMAGES + 1):
        noise = rng.normal(rng.uniform(60, 220, 3), 12, (SIDE, SIDE, 3))
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        corners = [(x, y) for x in (0.26, 0.74) for y in (0.26, 0.74)]
        drawn: dict[str, list[tuple[float, int]]] = {}
        for x, y in rng.permutation(corners)[:OBJECTS]:
            name = str(rng.choice(list(KINDS)))
            colour, outlines = KINDS[name]
            middle = SIDE * (np.array([x, y]) + rng.uniform(-0.05, 0.05, 2))
            size = SIDE * rng.uniform(0.12, 0.19)
            shade = tuple(int(value) for value in np.clip(np.array(colour) + rng.integers(-25, 26, 3), 0, 255))
            placed = [np.round(middle + size * outline, 1) for outline in outlines]
            for outline in placed:
                ImageDraw.Draw(image).polygon([(px, py) for px, py in outline.tolist()], fill=shade)
            drawn.setdefault(name, []).append((middle[0], len(annotations) + 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": list(KINDS).index(name) + 1,
                    "segmentation": [outline.ravel().tolist() for outline in placed],
                    "iscrowd": 0,
                }
            )
        for name, objects in drawn.items():
            if len(objects) > 1:  # the name alone would be ambiguous
                phrases[str(min(objects)[1])] = f"left {name}"
                phrases[str(max(objects)[1])] = f"right {name}"
        file_name = f"{image_id:03}.png"
        image.save(folder / "pictures" / file_name)
        images.append({"id": image_id, "file_name": file_name, "height": SIDE, "width": SIDE})
    write(folder, images, annotations, categories, phrases)


def copy_photographs(folder: Path, root: Path) -> None:
    """Copy photographs with the annotations of the objects that have expressions."""
    from dcris import load_dataset

    references = load_dataset(root, "cocomini").split("val")
    stored = json.loads((root / "cocomini/instances.json").read_text())
    images = {reference.image_id: reference.image_path for reference in references}
    chosen = dict(sorted(images.items())[:IMAGES])
    used = [reference for reference in references if reference.image_id in chosen]
    phrases: dict[str, str | list[str]] = {
        str(reference.ann_ids[0]): [expression.text for expression in reference.expressions] for reference in used
    }
    for path in chosen.values():
        shutil.copy(path, folder / "pictures")
    write(
        folder,
        [{**image, "file_name": chosen[image["id"]].name} for image in stored["images"] if image["id"] in chosen],
        [annotation for annotation in stored["annotations"] if str(annotation["id"]) in phrases],
        stored["categories"],
        phrases,
    )


def write(
    folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]],
    phrases: dict[str, str | list[str]],
) -> None:
    """Write the annotations and the expressions."""
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "phrases.json").write_text(json.dumps(phrases, indent=2))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python make_pictures.py FOLDER [ROOT]")
    target = Path(sys.argv[1])
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    draw(target) if len(sys.argv) == 2 else copy_photographs(target, Path(sys.argv[2]))
