"""Generate scenes: cluttered images of overlapping shapes, with phrases that require understanding.

They are written in the REFER layout, so they are read like RefCOCO. In every scene the target of a
phrase shares its shape with a distractor, so the shape alone never identifies it. A phrase is kept
only if exactly one object fits it, with a margin that excludes doubtful cases. Generalised scenes
have phrases for several objects and for none besides, in the layout of gRefCOCO. A scene depends
only on its seed, split and number; its image and its phrases for one object do not depend on
whether it is generalised.
"""

import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.data.coco import IMAGE_FOLDER
from dcris.data.masks import encode_mask, mask_box
from dcris.data.readers.refer_layout import NO_TARGET
from dcris.data.scene_phrases import (
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Phrase,
    Thing,
    generalised_phrases,
    make_phrases,
    pick,
)
from dcris.errors import DcrisError
from dcris.utils.files import make_directory, sync_files, write_file, write_json
from dcris.utils.workers import CANNOT_START, ignore_interrupts, note_no_workers

DATASET, SPLIT_BY = "scenes", "generated"
SPLITS = ("train", "val", "test")

# Radius as a share of the image's side, by size. The gaps keep "small" and "medium" distinct.
_RADII = {"small": (0.075, 0.09), "medium": (0.115, 0.135), "big": (0.17, 0.195)}
_SIZE_SHARES = (0.25, 0.35, 0.4)
_OBJECTS_PER_SCENE = 3
_VISIBLE = 0.6  # share of an object's area that must be visible
_SAMPLES = 2  # the image is drawn at this multiple of its size and averaged

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
Place = tuple[str, int, int]
"""A scene: its split, its number in the split, and its image_id."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An image with its things and the phrases for some of them."""

    image: Pixels
    """[side, side, 3] uint8 RGB."""
    owners: NDArray[np.int8]
    """[side, side]: index of the visible thing at each pixel, -1 for the background."""
    things: tuple[Thing, ...]
    phrases: dict[int, tuple[Phrase, ...]]
    """By index of the thing; at least two things have phrases."""


# ---- what a scene looks like ---------------------------------------------------------------------


def _outline(shape: str) -> list[Points]:
    """Return the shape's contours, about the size of the unit circle; a second one is a hole."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack((np.cos(turn), np.sin(turn)), axis=1)
    if shape == "circle":
        return [circle * 0.95]
    if shape == "ring":
        return [circle, circle * 0.5]
    if shape == "square":
        return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85]
    if shape == "triangle":
        angles = np.pi * np.array([-0.5, 1 / 6, 5 / 6])
        return [np.stack((np.cos(angles), np.sin(angles) + 0.2), axis=1) * 1.1]
    if shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        lengths = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
        return [np.stack((np.cos(angles), np.sin(angles)), axis=1) * lengths[:, None]]
    if shape == "cross":
        a, b = 0.36, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return [np.array([*corners, *((-x, -y) for x, y in corners)])]
    assert shape == "heart"
    x = np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16
    return [np.stack((x, y), axis=1) * 1.05]


_OUTLINES = {shape: _outline(shape) for shape in SHAPES}


def _background(rng: np.random.Generator, side: int) -> Pixels:
    """Draw pale gradients with strokes and blobs, less saturated than any thing."""
    corners = rng.uniform(95, 190) + rng.normal(0, 18, size=(2, 2, 3)) + rng.normal(0, 12, size=3)
    smooth = cv2.resize(corners.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    canvas: Pixels = np.clip(smooth, 60, 215).astype(np.uint8)
    for _ in range(int(rng.integers(6, 14))):
        spot = canvas[tuple(rng.integers(0, side, size=2))].astype(np.float64)
        colour = np.clip(spot + rng.normal(0, 22) + rng.normal(0, 8, size=3), 50, 220).tolist()
        (x0, y0), (x1, y1) = rng.integers(0, side, size=(2, 2)).tolist()
        match int(rng.integers(3)):
            case 0:
                cv2.line(canvas, (x0, y0), (x1, y1), colour, int(rng.integers(2, max(3, side // 30))))
            case 1:
                axes = rng.integers(side // 40 + 1, side // 6 + 2, size=2).tolist()
                cv2.ellipse(canvas, (x0, y0), axes, float(rng.uniform(0, 180)), 0, 360, colour, -1)
            case _:
                width, height = rng.integers(side // 30 + 1, side // 5 + 2, size=2).tolist()
                cv2.rectangle(canvas, (x0, y0), (x0 + width, y0 + height), colour, -1)
    return canvas


def _draw(canvas: Pixels, owners: NDArray[np.int8], number: int, thing: Thing, rng: np.random.Generator) -> int:
    """Draw one thing over the canvas and return its area in pixels of the canvas."""
    side = canvas.shape[0]
    cosine, sine = np.cos(thing.angle), np.sin(thing.angle)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    centre = np.array([thing.x, thing.y])
    # Draw in a window around the thing: the whole image would take five times as long.
    low = np.maximum(np.floor((centre - 1.3 * thing.radius) * side).astype(int), 0)
    high = np.minimum(np.ceil((centre + 1.3 * thing.radius) * side).astype(int), side)
    window = np.s_[low[1] : high[1], low[0] : high[0]]
    view = canvas[window]
    shift = 4  # fractional bits of the fixed-point coordinates for cv2
    contours = [(centre + thing.radius * points @ turn) * side - low - 0.5 for points in _OUTLINES[thing.shape]]
    fixed = [np.round(points * 2**shift).astype(np.int32) for points in contours]
    mask = np.zeros(view.shape[:2], np.uint8)
    cv2.fillPoly(mask, fixed, 1, shift=shift)
    inside = mask.astype(bool)
    base = np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 9, size=3), 0, 255)
    # The second colour of a texture is a shade of the first, so that the name of the colour remains
    # correct.
    shade = base * 0.5 if base.mean() > 75 else base + 95
    view[inside] = base
    if thing.texture != "plain":
        y, x = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float32) / side
        along, across = x * cosine + y * sine, y * cosine - x * sine
        period = 0.062 if thing.texture == "striped" else 0.07
        if thing.texture == "striped":
            pattern = (along / period) % 1 < 0.42
        else:
            pattern = np.hypot((along / period) % 1 - 0.5, (across / period) % 1 - 0.5) < 0.31
        view[pattern & inside] = shade
    outline = np.ascontiguousarray(view)
    cv2.polylines(outline, fixed, True, (base * 0.45).tolist(), max(1, side // 112), shift=shift)
    canvas[window] = outline
    owners[window][inside] = number
    return int(mask.sum())


def arrange(rng: np.random.Generator) -> list[Thing]:
    """Place three to eight things of one to three shapes, which may overlap, but not much."""
    count = int(rng.integers(3, 9))
    shapes = [str(name) for name in rng.choice(SHAPES, size=int(rng.integers(1, 4)), replace=False)]
    things: list[Thing] = []
    for number in range(count):
        # The first two have the same shape, so that there is always a target with a distractor.
        shape = shapes[0] if number < 2 else pick(rng, shapes)
        size = str(rng.choice(SIZES, p=_SIZE_SHARES))
        for _ in range(30):
            radius = float(rng.uniform(*_RADII[size]))
            x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, size=2).tolist()
            if all(np.hypot(x - other.x, y - other.y) > 0.7 * (radius + other.radius) for other in things):
                angle = float(rng.uniform(-0.3, 0.3))
                colour, texture = pick(rng, tuple(COLOURS)), pick(rng, TEXTURES)
                things.append(Thing(shape, colour, texture, size, x, y, radius, angle))
                break
    return things


def make_scene(rng: np.random.Generator, side: int = 112) -> Scene:
    """Draw a scene of `side` x `side` pixels in which at least two things have phrases."""
    while True:
        things = arrange(rng)
        if len(things) < 3:
            continue
        canvas = _background(rng, _SAMPLES * side)
        owners = np.full(canvas.shape[:2], -1, np.int8)
        areas = [_draw(canvas, owners, number, thing, rng) for number, thing in enumerate(things)]
        shown = np.bincount(owners[owners >= 0], minlength=len(things))
        if any(seen < _VISIBLE * area for seen, area in zip(shown, areas, strict=True)):
            continue
        phrases = {}
        for number in rng.permutation(len(things)).tolist():
            made = make_phrases(things, things[number], rng)
            if made:
                phrases[number] = made
            if len(phrases) == _OBJECTS_PER_SCENE:
                break
        if len(phrases) < 2:
            continue
        image = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
        noisy = np.clip(image + rng.normal(0, 4, size=image.shape), 0, 255).astype(np.uint8)
        # One sample per pixel decides which thing it shows, so that masks never overlap.
        return Scene(noisy, np.ascontiguousarray(owners[1::_SAMPLES, 1::_SAMPLES]), tuple(things), phrases)


# ---- writing the data set ------------------------------------------------------------------------


def scene_rng(seed: int, split: str, number: int) -> np.random.Generator:
    """Return the generator of one scene.

    Splits and the pretraining scenes of the tiny towers share no streams.
    """
    streams = (*SPLITS, "pretraining")
    return np.random.default_rng([seed, streams.index(split), number])


def _write_scene(folder: Path, seed: int, side: int, generalised: bool, place: Place) -> dict[str, Any]:
    """Draw and write one scene; return its annotations. Runs in worker processes."""
    split, number, image_id = place
    rng = scene_rng(seed, split, number)
    scene = make_scene(rng, side)
    name = f"scene_{image_id:06d}.jpg"
    encoded = cv2.imencode(".jpg", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    write_file(folder / name, encoded.tobytes(), sync=False)  # else it takes longer than drawing
    masks = [scene.owners == index for index in range(len(scene.things))]
    objects = [
        {
            "shape": thing.shape,
            "attributes": thing.attributes(),
            "segmentation": encode_mask(mask),
            "bbox": mask_box(mask),
            "area": int(mask.sum()),
            "phrases": _texts(scene.phrases.get(index, ())),
        }
        for index, (thing, mask) in enumerate(zip(scene.things, masks, strict=True))
    ]
    groups = [
        {"objects": [scene.things.index(thing) for thing in targets], "phrases": _texts(phrases)}
        for targets, phrases in (generalised_phrases(scene.things, rng) if generalised else ())
    ]
    return {"id": image_id, "file_name": name, "split": split, "objects": objects, "groups": groups}


def _texts(phrases: Sequence[Phrase]) -> list[tuple[str, str]]:
    return [(phrase.text, phrase.kind) for phrase in phrases]


def write_scenes(
    out: Path,
    *,
    train: int = 5000,
    val: int = 200,
    test: int = 300,
    seed: int = 0,
    side: int = 112,
    generalised: bool = False,
    workers: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write the data set "scenes", partition "generated", in the REFER layout.

    Args:
        out: root for `scenes/refs(generated).p`, `scenes/instances.json` and the images.
        train: number of scenes in train. Each has two or three references of up to three
            expressions.
        val: number of scenes in val.
        test: number of scenes in test.
        seed: the same seed and numbers give the same files.
        side: side of the images in pixels, at least 56.
        generalised: whether to add expressions for several objects and for none. Images and other
            expressions stay the same.
        workers: number of processes that draw.
        progress: receives the number of scenes done.

    Returns:
        The root.

    Raises:
        DcrisError: `out` already contains generated scenes or cannot be written, or a number is out
            of range.
    """
    counts = {"train": train, "val": val, "test": test}
    if any(count < 0 for count in counts.values()) or not any(counts.values()):
        raise DcrisError(f"the numbers of scenes must not be negative or all zero, and are {counts}")
    if seed < 0:
        raise DcrisError(f"the seed of the scenes must be 0 or more, and is {seed}")
    if not 56 <= side <= 4096:
        raise DcrisError(
            f"the side of the scenes must be 56 to 4096 pixels, and is {side}; smaller images cannot show textures"
        )
    references_path = out / DATASET / f"refs({SPLIT_BY}).p"
    if references_path.exists():
        raise DcrisError(f"{out} already contains generated scenes; choose another folder or delete it")
    folder = make_directory(out / IMAGE_FOLDER)
    places = [(split, number) for split, count in counts.items() for number in range(count)]
    jobs = [(split, number, image_id) for image_id, (split, number) in enumerate(places, start=1)]
    draw = partial(_write_scene, folder, seed, side, generalised)
    records: list[dict[str, Any]] = []
    for record in _map(draw, jobs, workers):
        records.append(record)
        progress(len(records))
    sync_files(folder / record["file_name"] for record in records)
    references, instances = _annotations(records, side)
    write_json(out / DATASET / "instances.json", instances)
    # A pickle records which equal strings are one object, which depends on the processes. A round
    # trip through JSON makes that the same every time.
    references = json.loads(json.dumps(references))
    # Last: a data set is complete once its references are written.
    write_file(references_path, pickle.dumps(references, protocol=2))
    return out


def _map(draw: Callable[[Place], dict[str, Any]], jobs: Sequence[Place], workers: int) -> Iterator[dict[str, Any]]:
    """Yield `draw(job)` for all jobs in order, from worker processes if those can be started."""
    if workers > 1:
        try:
            pool = ProcessPoolExecutor(workers, initializer=ignore_interrupts)
        except CANNOT_START as error:
            note_no_workers(error)
        else:
            try:
                yield from pool.map(draw, jobs, chunksize=64)
            except BrokenProcessPool as error:
                raise DcrisError(
                    "a process that draws scenes was killed, perhaps for lack of memory; run the command again"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
            return
    yield from map(draw, jobs)


def _annotations(records: list[dict[str, Any]], side: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the content of `refs(...).p` and `instances.json`."""
    references: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    sentence_ids = itertools.count()

    def refer(record: dict[str, Any], ann_id: Any, category_id: Any, phrases: Sequence[tuple[str, str]]) -> None:
        sentences = [
            {"sent_id": next(sentence_ids), "sent": text, "raw": text, "tokens": text.split(), "kind": kind}
            for text, kind in phrases
        ]
        references.append(
            {
                "ref_id": len(references) + 1,
                "ann_id": ann_id,
                "image_id": record["id"],
                "category_id": category_id,
                "file_name": record["file_name"],
                "split": record["split"],
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )

    for record in records:
        first = len(annotations)
        for thing in record["objects"]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": record["id"],
                "category_id": SHAPES.index(thing["shape"]) + 1,
                "segmentation": thing["segmentation"],
                "bbox": thing["bbox"],
                "area": thing["area"],
                "iscrowd": 0,
                "attributes": thing["attributes"],
            }
            annotations.append(annotation)
            if thing["phrases"]:
                refer(record, annotation["id"], annotation["category_id"], thing["phrases"])
        for group in record["groups"]:
            targets = [annotations[first + number] for number in group["objects"]]
            ann_ids = [target["id"] for target in targets] or [NO_TARGET]
            refer(record, ann_ids, [target["category_id"] for target in targets], group["phrases"])
    images = [
        {"id": record["id"], "file_name": record["file_name"], "height": side, "width": side} for record in records
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
    return references, {"images": images, "annotations": annotations, "categories": categories}
