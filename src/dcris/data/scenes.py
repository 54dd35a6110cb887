"""Generate scenes: cluttered images of overlapping shapes, with phrases that require understanding.

They are written in the REFER layout, so they are read like RefCOCO. In every scene the target of a
phrase shares its shape with a distractor, so the shape alone never identifies it. A phrase is kept
only if exactly one object fits it, with a margin that excludes doubtful cases. A scene depends only
on its seed, split and number.
"""

import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.data.coco import IMAGE_FOLDER
from dcris.data.masks import encode_mask, mask_box
from dcris.data.table import bad
from dcris.errors import DcrisError
from dcris.utils.files import make_directory, write_file, write_json
from dcris.utils.workers import CANNOT_START, ignore_interrupts, note_no_workers

DATASET, SPLIT_BY = "scenes", "generated"
SPLITS = ("train", "val", "test")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 60),
    "green": (50, 160, 70),
    "blue": (45, 95, 205),
    "purple": (140, 60, 170),
    "white": (240, 240, 240),
    "black": (35, 35, 35),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "medium", "big")
KINDS = ("attribute", "place", "ordinal", "superlative", "relation")

# Radius as a share of the image's side, by size. The gaps keep "small" and "medium" distinct.
_RADII = {"small": (0.075, 0.09), "medium": (0.115, 0.135), "big": (0.17, 0.195)}
_SYNONYMS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "big": ("big", "large")}
_SIZE_SHARES = (0.25, 0.35, 0.4)
_KIND_WEIGHTS = {"attribute": 3.0, "place": 3.0, "ordinal": 1.0, "superlative": 2.0, "relation": 2.0}
_PHRASES_PER_OBJECT = 3
_OBJECTS_PER_SCENE = 3
_MARGIN = 0.08  # share of the side; below it, people disagree on which object is further left
_VISIBLE = 0.6  # share of an object's area that must be visible
_SAMPLES = 2  # the image is drawn at this multiple of its size and averaged

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]
T = TypeVar("T")
Place = tuple[str, int, int]
"""A scene: its split, its number in the split, and its image_id."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object.

    Lengths are shares of the image's side, so that phrases do not depend on the resolution.
    """

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    """Radians."""


_ATTRIBUTES = ("colour", "texture", "size", "x", "y", "radius", "angle")


def read_thing(shape: str, attributes: Any, path: Path, where: str) -> Thing:
    """Return the thing of an annotation of a generated scene.

    Args:
        shape: name of its category.
        attributes: its field `attributes`, as it was parsed.
        path, where: the file and the annotation, for errors.

    Raises:
        DcrisError: the field is missing, as in scenes of older versions, or malformed.
    """
    if type(attributes) is not dict:
        raise bad(path, f"{where} has no 'attributes', which only scenes of `dcris data scenes` have")
    words = {"colour": COLOURS, "texture": TEXTURES, "size": SIZES}
    values: list[Any] = [attributes.get(key) for key in _ATTRIBUTES]
    fits = [
        isinstance(value, str) and value in words[key] if key in words else type(value) in (int, float)
        for key, value in zip(_ATTRIBUTES, values, strict=True)
    ]
    # NaN fails the comparison, too.
    if not all(fits) or shape not in SHAPES or not all(abs(value) <= 10 for value in values[len(words) :]):
        raise bad(path, f"{where} is not a thing of a generated scene")
    return Thing(shape, *values)


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase for one thing, and what identifies the thing (one of KINDS)."""

    text: str
    kind: str


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


# ---- what a phrase means -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Description:
    """Attributes that a thing must have; None for any."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Return whether the thing has all the attributes."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.texture in (None, thing.texture)
            and self.size in (None, thing.size)
        )

    def words(self, rng: np.random.Generator) -> str:
        """Return the description in words: size, texture, colour, noun."""
        size = _pick(rng, _SYNONYMS[self.size]) if self.size else None
        noun = self.shape or _pick(rng, ("one", "thing", "shape"))
        return " ".join(word for word in (size, self.texture, self.colour, noun) if word)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _descriptions(thing: Thing, with_shape: bool) -> Iterator[Description]:
    """Yield all true descriptions of a thing, the shortest first."""
    attributes = ("colour", "texture", "size")
    for count in range(len(attributes) + 1):
        for chosen in itertools.combinations(attributes, count):
            values = {name: getattr(thing, name) for name in chosen}
            yield Description(shape=thing.shape if with_shape else None, **values)


def _rivals(things: Sequence[Thing], target: Thing, description: Description) -> list[Thing]:
    """Return the other things that fit a description of the target."""
    return [thing for thing in things if thing is not target and description.fits(thing)]


def _attribute(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase by colour, texture or size.

    If the noun is "one", no other thing of any shape may fit.
    """
    for with_shape in (True, False) if rng.random() < 0.8 else (False, True):
        unique = [d for d in _descriptions(target, with_shape) if not _rivals(things, target, d)]
        if unique:
            # People mostly use the shortest sufficient description.
            shortest = [d for d in unique if _length(d) == _length(unique[0])]
            chosen = _pick(rng, shortest if rng.random() < 0.8 else unique)
            return _pick(rng, ("{}", "{}", "the {}")).format(chosen.words(rng))
    return None


def _length(description: Description) -> int:
    return sum(
        value is not None for value in (description.shape, description.colour, description.texture, description.size)
    )


def _group(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> tuple[Description, list[Thing]]:
    """Return a description that fits other things, too, and these rivals of the target."""
    shared = [d for d in _descriptions(target, with_shape=True) if _length(d) <= 2 and _rivals(things, target, d)]
    # The noun alone is always among them, since each target has a distractor of its shape.
    chosen = shared[0] if rng.random() < 0.7 else _pick(rng, shared)
    return chosen, _rivals(things, target, chosen)


def _place(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase by the place in the image."""
    description, rivals = _group(things, target, rng)
    options: list[str] = []
    x, y = target.x, target.y
    for word, first in (
        ("left", all(x + _MARGIN < other.x for other in rivals)),
        ("right", all(x - _MARGIN > other.x for other in rivals)),
        ("top", all(y + _MARGIN < other.y for other in rivals)),
        ("bottom", all(y - _MARGIN > other.y for other in rivals)),
    ):
        if first:
            most = {"left": "leftmost", "right": "rightmost", "top": "highest", "bottom": "lowest"}[word]
            options.append(_pick(rng, (f"{word} {{}}", f"{{}} on {word}", f"{{}} on the {word}", f"{most} {{}}")))
    for vertical, near_y in (("top", y < 0.42), ("bottom", y > 0.58)):
        for horizontal, near_x in (("left", x < 0.42), ("right", x > 0.58)):
            if near_x and near_y and not any(_in_corner(other, vertical, horizontal) for other in rivals):
                options.append(_pick(rng, (f"{vertical} {horizontal} {{}}", f"{{}} at {vertical} {horizontal}")))
    if _in_the_middle(target, rivals):
        options.append(_pick(rng, ("middle {}", "{} in the middle", "center {}")))
    return _pick(rng, options).format(description.words(rng)) if options else None


def _in_corner(thing: Thing, vertical: str, horizontal: str) -> bool:
    """Return whether a rival is near the corner, doubtful cases included."""
    near_y = thing.y < 0.55 if vertical == "top" else thing.y > 0.45
    near_x = thing.x < 0.55 if horizontal == "left" else thing.x > 0.45
    return near_x and near_y


def _in_the_middle(thing: Thing, rivals: Sequence[Thing]) -> bool:
    """Return whether a thing is between two rivals in a row and also nearest to the centre.

    "Middle" may mean either.
    """
    if len(rivals) != 2:
        return False
    low, high = sorted(rival.x for rival in rivals)
    rows = [rival.y for rival in (thing, *rivals)]
    offset = np.hypot(thing.x - 0.5, thing.y - 0.5)
    return (
        low + _MARGIN < thing.x < high - _MARGIN
        and high - low > max(rows) - min(rows)
        and all(np.hypot(rival.x - 0.5, rival.y - 0.5) > offset + _MARGIN for rival in rivals)
    )


_ORDINALS = (("first", "1st"), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"))


def _ordinal(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase by the number in a row of at least three."""
    description, rivals = _group(things, target, rng)
    if len(rivals) < 2:
        return None
    options: list[str] = []
    for start, key, sign in (("left", "x", 1), ("right", "x", -1), ("top", "y", 1), ("bottom", "y", -1)):
        row = sorted((*rivals, target), key=lambda thing: sign * getattr(thing, key))
        places = [sign * getattr(thing, key) for thing in row]
        rank = row.index(target)
        apart = all(b - a > _MARGIN for a, b in itertools.pairwise(places))
        if apart and 1 <= rank < len(_ORDINALS):
            number = _pick(rng, _ORDINALS[rank])
            options.append(f"{number} {{}} from {_pick(rng, ('', 'the '))}{start}")
    return _pick(rng, options).format(description.words(rng)) if options else None


def _superlative(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase for the biggest or smallest of its kind, or None."""
    description, rivals = _group(things, target, rng)
    if description.size is not None:
        description = replace(description, size=None)
        rivals = _rivals(things, target, description)
    if all(target.radius > 1.25 * other.radius for other in rivals):
        return f"{_pick(rng, ('biggest', 'largest'))} {description.words(rng)}"
    if all(1.25 * target.radius < other.radius for other in rivals):
        return f"smallest {description.words(rng)}"
    return None


def _relation(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase by the relation to another thing with a unique description."""
    description, rivals = _group(things, target, rng)
    options: list[str] = []
    for landmark in things:
        if landmark is target or description.fits(landmark):
            continue
        unique = [d for d in _descriptions(landmark, with_shape=True) if not _rivals(things, landmark, d)]
        if not unique:
            continue
        name = unique[0].words(rng)
        overlapped = any(_gap(other, landmark) < 0 for other in rivals)
        for words, holds, nearly in _RELATIONS:
            if holds(target, landmark) and not any(nearly(other, landmark) for other in rivals):
                # Of overlapping things, "over" and "under" may also mean in front of and behind.
                word = _pick(rng, words[:1] if overlapped else words)
                options.append(f"{{}} {word} {_pick(rng, ('', 'the '))}{name}")
        near, gap = _distance(target, landmark), max(0.0, _gap(target, landmark))
        # Compare centres and edges: the edge of a big thing may be near although its centre is far.
        if near < 0.4 and all(
            _distance(other, landmark) > 1.4 * near and _gap(other, landmark) > gap + _MARGIN for other in rivals
        ):
            options.append(f"{{}} {_pick(rng, ('next to', 'near', 'closest to'))} {_pick(rng, ('', 'the '))}{name}")
    return _pick(rng, options).format(description.words(rng)) if options else None


def _distance(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.x - b.x, a.y - b.y))


def _gap(a: Thing, b: Thing) -> float:
    """Return the distance between two things taken as circles; negative if they overlap."""
    return _distance(a, b) - a.radius - b.radius


# Words, condition for the target (clear cases only), and condition by which a rival excludes the
# relation (doubtful cases included).
_RELATIONS: tuple[tuple[tuple[str, ...], Callable[[Thing, Thing], bool], Callable[[Thing, Thing], bool]], ...] = (
    (("left of",), lambda a, b: b.x - a.x > max(_MARGIN, abs(a.y - b.y)), lambda a, b: a.x < b.x),
    (("right of",), lambda a, b: a.x - b.x > max(_MARGIN, abs(a.y - b.y)), lambda a, b: a.x > b.x),
    (("above", "over"), lambda a, b: b.y - a.y > max(_MARGIN, abs(a.x - b.x)), lambda a, b: a.y < b.y),
    (("below", "under"), lambda a, b: a.y - b.y > max(_MARGIN, abs(a.x - b.x)), lambda a, b: a.y > b.y),
)

_MAKERS: dict[str, Callable[[Sequence[Thing], Thing, np.random.Generator], str | None]] = {
    "attribute": _attribute,
    "place": _place,
    "ordinal": _ordinal,
    "superlative": _superlative,
    "relation": _relation,
}


def make_phrases(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> tuple[Phrase, ...]:
    """Return up to three phrases of different kinds that fit only `target`.

    Without a distractor of its shape there are none.
    """
    if not _rivals(things, target, Description(shape=target.shape)):
        return ()
    weights = np.array([_KIND_WEIGHTS[kind] for kind in KINDS])
    order = rng.choice(len(KINDS), size=len(KINDS), replace=False, p=weights / weights.sum())
    found: list[Phrase] = []
    for kind in (KINDS[index] for index in order):
        text = _MAKERS[kind](things, target, rng)
        if text is not None:
            found.append(Phrase(text, kind))
        if len(found) == _PHRASES_PER_OBJECT:
            break
    return tuple(found)


# ---- phrases that are true of nothing ------------------------------------------------------------

# By relation of _RELATIONS: whether a thing is clearly on the other side of the landmark.
_OPPOSITES: tuple[Callable[[Thing, Thing], bool], ...] = (
    lambda a, b: a.x - b.x > _MARGIN,
    lambda a, b: b.x - a.x > _MARGIN,
    lambda a, b: a.y - b.y > _MARGIN,
    lambda a, b: b.y - a.y > _MARGIN,
)
_FAR = 0.55  # share of the side between things that are clearly not next to each other
_CLEAR_GAP = 0.3  # the same between their edges
_CLEAR_SIDE = 0.62  # a thing beyond it is clearly not on the other half


def _absent_attribute(things: Sequence[Thing], rng: np.random.Generator) -> str | None:
    """Return a description that fits nothing, though each of its attributes occurs in the scene if
    possible.
    """
    base = _pick(rng, things)
    described = [d for d in _descriptions(base, with_shape=rng.random() < 0.8) if _length(d) >= 2]
    every = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "size": SIZES}
    for elsewhere in (True, False):
        for number in rng.permutation(len(described)).tolist():
            found = [
                changed
                for name, values in every.items()
                if getattr(described[number], name) is not None
                for value in values
                if any(getattr(thing, name) == value for thing in things) == elsewhere
                and not any((changed := replace(described[number], **{name: value})).fits(thing) for thing in things)
            ]
            if found:
                return _pick(rng, ("{}", "{}", "the {}")).format(_pick(rng, found).words(rng))
    return None


def _absent_place(things: Sequence[Thing], rng: np.random.Generator) -> str | None:
    """Return a phrase that places things where none of their description is."""
    base = _pick(rng, things)
    description = _pick(rng, [d for d in _descriptions(base, with_shape=True) if _length(d) <= 2])
    fitting = [thing for thing in things if description.fits(thing)]
    options: list[str] = []
    # Of several things, "left" may mean the leftmost one, wherever it is.
    if len(fitting) == 1:
        x, y = base.x, base.y
        for word, wrong in (
            ("left", x > _CLEAR_SIDE),
            ("right", x < 1 - _CLEAR_SIDE),
            ("top", y > _CLEAR_SIDE),
            ("bottom", y < 1 - _CLEAR_SIDE),
        ):
            if wrong:
                options.append(_pick(rng, (f"{word} {{}}", f"{{}} on {word}", f"{{}} on the {word}")))
    for vertical, horizontal in itertools.product(("top", "bottom"), ("left", "right")):
        if not any(_in_corner(thing, vertical, horizontal) for thing in fitting):
            options.append(_pick(rng, (f"{vertical} {horizontal} {{}}", f"{{}} at {vertical} {horizontal}")))
    return _pick(rng, options).format(description.words(rng)) if options else None


def _absent_relation(things: Sequence[Thing], rng: np.random.Generator) -> str | None:
    """Return a phrase by a relation that nothing of its description has to the other thing."""
    base, landmark = _pick(rng, things), _pick(rng, things)
    description = _pick(rng, [d for d in _descriptions(base, with_shape=True) if _length(d) <= 2])
    unique = [d for d in _descriptions(landmark, with_shape=True) if not _rivals(things, landmark, d)]
    if description.fits(landmark) or not unique:
        return None
    fitting = [thing for thing in things if description.fits(thing)]
    name = unique[0].words(rng)
    overlapped = any(_gap(thing, landmark) < 0 for thing in fitting)
    options = [
        f"{{}} {_pick(rng, words[:1] if overlapped else words)} {_pick(rng, ('', 'the '))}{name}"
        for (words, _, _), opposite in zip(_RELATIONS, _OPPOSITES, strict=True)
        if all(opposite(thing, landmark) for thing in fitting)
    ]
    if all(_distance(thing, landmark) > _FAR and _gap(thing, landmark) > _CLEAR_GAP for thing in fitting):
        options.append(f"{{}} {_pick(rng, ('next to', 'near'))} {_pick(rng, ('', 'the '))}{name}")
    return _pick(rng, options).format(description.words(rng)) if options else None


_ABSENT_MAKERS: dict[str, Callable[[Sequence[Thing], np.random.Generator], str | None]] = {
    "attribute": _absent_attribute,
    "place": _absent_place,
    "relation": _absent_relation,
}
ABSENT_KINDS = tuple(_ABSENT_MAKERS)
"""What is wrong with a phrase of `absent_phrase`."""


def absent_phrase(things: Sequence[Thing], kind: str, rng: np.random.Generator) -> Phrase | None:
    """Return a phrase that is clearly true of none of the things, by what is wrong with it.

    Args:
        things: of the scene, one or more.
        kind: one of ABSENT_KINDS. With a wrong attribute, each word fits some thing of the scene
            where that is possible; with a wrong place or relation, the described thing is there.
        rng: draws.

    Returns:
        None if none was found for the things that were drawn; another draw may find one.
    """
    text = _ABSENT_MAKERS[kind](things, rng)
    return None if text is None else Phrase(text, f"absent {kind}")


def vocabulary() -> list[str]:
    """Return all words of generated phrases, sorted."""
    words = {*SHAPES, *COLOURS, *TEXTURES, *itertools.chain(*_SYNONYMS.values()), *itertools.chain(*_ORDINALS)}
    places = "left right top bottom leftmost rightmost highest lowest middle center"
    relations = "of above over below under next to near closest"
    return sorted(
        words.union(f"the one thing shape on at in from biggest largest smallest {places} {relations}".split())
    )


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
        corners = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
        return [np.array(corners)]
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
        shape = shapes[0] if number < 2 else _pick(rng, shapes)
        size = str(rng.choice(SIZES, p=_SIZE_SHARES))
        for _ in range(30):
            radius = float(rng.uniform(*_RADII[size]))
            x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, size=2).tolist()
            if all(np.hypot(x - other.x, y - other.y) > 0.7 * (radius + other.radius) for other in things):
                angle = float(rng.uniform(-0.3, 0.3))
                colour, texture = _pick(rng, tuple(COLOURS)), _pick(rng, TEXTURES)
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


def cores() -> int:
    """Return the number of CPUs that this process may use.

    In a container or a job these may be fewer than the machine's.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_scene(folder: Path, seed: int, side: int, place: Place) -> dict[str, Any]:
    """Draw and write one scene; return its annotations. Runs in worker processes."""
    split, number, image_id = place
    scene = make_scene(scene_rng(seed, split, number), side)
    name = f"scene_{image_id:06d}.jpg"
    encoded = cv2.imencode(".jpg", cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    write_file(folder / name, encoded.tobytes())
    masks = [scene.owners == index for index in range(len(scene.things))]
    objects = [
        {
            "shape": thing.shape,
            "attributes": {key: getattr(thing, key) for key in _ATTRIBUTES},
            "segmentation": encode_mask(mask),
            "bbox": mask_box(mask),
            "area": int(mask.sum()),
            "phrases": [(phrase.text, phrase.kind) for phrase in scene.phrases.get(index, ())],
        }
        for index, (thing, mask) in enumerate(zip(scene.things, masks, strict=True))
    ]
    return {"id": image_id, "file_name": name, "split": split, "objects": objects}


def write_scenes(
    out: Path,
    *,
    train: int = 5000,
    val: int = 200,
    test: int = 300,
    seed: int = 0,
    side: int = 112,
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
    draw = partial(_write_scene, folder, seed, side)
    records: list[dict[str, Any]] = []
    for record in _map(draw, jobs, workers):
        records.append(record)
        progress(len(records))
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
    for record in records:
        for thing in record["objects"]:
            annotation_id = len(annotations) + 1
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": record["id"],
                    "category_id": SHAPES.index(thing["shape"]) + 1,
                    "segmentation": thing["segmentation"],
                    "bbox": thing["bbox"],
                    "area": thing["area"],
                    "iscrowd": 0,
                    "attributes": thing["attributes"],
                }
            )
            if not thing["phrases"]:
                continue
            sentences = [
                {"sent_id": next(sentence_ids), "sent": text, "raw": text, "tokens": text.split(), "kind": kind}
                for text, kind in thing["phrases"]
            ]
            references.append(
                {
                    "ref_id": len(references) + 1,
                    "ann_id": annotation_id,
                    "image_id": record["id"],
                    "category_id": SHAPES.index(thing["shape"]) + 1,
                    "file_name": record["file_name"],
                    "split": record["split"],
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    images = [
        {"id": record["id"], "file_name": record["file_name"], "height": side, "width": side} for record in records
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
    return references, {"images": images, "annotations": annotations, "categories": categories}
