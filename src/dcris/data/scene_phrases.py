"""The language of generated scenes: what their things are, and phrases that are true of one thing,
of several, or of none.

A phrase is made only where it is clearly true, with a margin that excludes doubtful cases. The
rules see places, sizes and attributes, never pixels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dcris.data.table import bad

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

_SYNONYMS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "big": ("big", "large")}
_KIND_WEIGHTS = {"attribute": 3.0, "place": 3.0, "ordinal": 1.0, "superlative": 2.0, "relation": 2.0}
_PHRASES_PER_OBJECT = 3
_NOUNS = ("one", "thing", "shape")
_PLURALS = {noun: noun + ("es" if noun == "cross" else "s") for noun in (*SHAPES, *_NOUNS)}
_TRIES = 20  # draws for a phrase that not every thing allows
_MARGIN = 0.08  # share of the side; below it, people disagree on which object is further left

T = TypeVar("T")


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

    def attributes(self) -> dict[str, Any]:
        """Return everything except the shape, as annotations have it."""
        return {key: getattr(self, key) for key in _ATTRIBUTES}


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
    """A phrase, and what identifies its target: one of KINDS; "plural" or "absent" and a kind for
    several things or none."""

    text: str
    kind: str


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

    def words(self, rng: np.random.Generator, plural: bool = False) -> str:
        """Return the description in words: size, texture, colour, noun."""
        size = pick(rng, _SYNONYMS[self.size]) if self.size else None
        noun = self.shape or pick(rng, _NOUNS)
        return " ".join(word for word in (size, self.texture, self.colour, _PLURALS[noun] if plural else noun) if word)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of the options."""
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


def _unique_name(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return the shortest description by shape and attributes that fits only `target`."""
    unique = (d for d in _descriptions(target, with_shape=True) if not _rivals(things, target, d))
    shortest = next(unique, None)
    return None if shortest is None else shortest.words(rng)


def _attribute(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase by colour, texture or size.

    If the noun is "one", no other thing of any shape may fit.
    """
    for with_shape in (True, False) if rng.random() < 0.8 else (False, True):
        unique = [d for d in _descriptions(target, with_shape) if not _rivals(things, target, d)]
        if unique:
            # People mostly use the shortest sufficient description.
            shortest = [d for d in unique if _length(d) == _length(unique[0])]
            chosen = pick(rng, shortest if rng.random() < 0.8 else unique)
            return pick(rng, ("{}", "{}", "the {}")).format(chosen.words(rng))
    return None


def _length(description: Description) -> int:
    return sum(
        value is not None for value in (description.shape, description.colour, description.texture, description.size)
    )


def _group(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> tuple[Description, list[Thing]]:
    """Return a description that fits other things, too, and these rivals of the target."""
    shared = [d for d in _descriptions(target, with_shape=True) if _length(d) <= 2 and _rivals(things, target, d)]
    # The noun alone is always among them, since each target has a distractor of its shape.
    chosen = shared[0] if rng.random() < 0.7 else pick(rng, shared)
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
            options.append(pick(rng, (f"{word} {{}}", f"{{}} on {word}", f"{{}} on the {word}", f"{most} {{}}")))
    for vertical, near_y in (("top", y < 0.42), ("bottom", y > 0.58)):
        for horizontal, near_x in (("left", x < 0.42), ("right", x > 0.58)):
            if near_x and near_y and not any(_in_corner(other, vertical, horizontal) for other in rivals):
                options.append(pick(rng, (f"{vertical} {horizontal} {{}}", f"{{}} at {vertical} {horizontal}")))
    if _in_the_middle(target, rivals):
        options.append(pick(rng, ("middle {}", "{} in the middle", "center {}")))
    return pick(rng, options).format(description.words(rng)) if options else None


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
            number = pick(rng, _ORDINALS[rank])
            options.append(f"{number} {{}} from {pick(rng, ('', 'the '))}{start}")
    return pick(rng, options).format(description.words(rng)) if options else None


def _superlative(things: Sequence[Thing], target: Thing, rng: np.random.Generator) -> str | None:
    """Return a phrase for the biggest or smallest of its kind, or None."""
    description, rivals = _group(things, target, rng)
    if description.size is not None:
        description = replace(description, size=None)
        rivals = _rivals(things, target, description)
    if all(target.radius > 1.25 * other.radius for other in rivals):
        return f"{pick(rng, ('biggest', 'largest'))} {description.words(rng)}"
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
        name = _unique_name(things, landmark, rng)
        if name is None:
            continue
        overlapped = any(_gap(other, landmark) < 0 for other in rivals)
        for words, holds, nearly in _RELATIONS:
            if holds(target, landmark) and not any(nearly(other, landmark) for other in rivals):
                # Of overlapping things, "over" and "under" may also mean in front of and behind.
                word = pick(rng, words[:1] if overlapped else words)
                options.append(f"{{}} {word} {pick(rng, ('', 'the '))}{name}")
        near, gap = _distance(target, landmark), max(0.0, _gap(target, landmark))
        # Compare centres and edges: the edge of a big thing may be near although its centre is far.
        if near < 0.4 and all(
            _distance(other, landmark) > 1.4 * near and _gap(other, landmark) > gap + _MARGIN for other in rivals
        ):
            options.append(f"{{}} {pick(rng, ('next to', 'near', 'closest to'))} {pick(rng, ('', 'the '))}{name}")
    return pick(rng, options).format(description.words(rng)) if options else None


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


# ---- phrases that are true of several things -----------------------------------------------------


def _quantified(count: int, rng: np.random.Generator) -> str:
    """Return the template of a phrase for `count` things."""
    numbers = {2: ("both {}", "the two {}", "two {}"), 3: ("all three {}", "the three {}", "three {}")}
    return pick(rng, ("all {}", "all the {}", "the {}", "{}", *numbers.get(count, ())))


def _several(things: Sequence[Thing], rng: np.random.Generator) -> tuple[Description, list[Thing]]:
    """Return a description of a thing by at least one attribute, and all things that it fits."""
    with_shape = bool(rng.random() < 0.75)
    options = [d for d in _descriptions(pick(rng, things), with_shape) if 1 <= _length(d) <= 2]
    description = pick(rng, options)
    return description, [thing for thing in things if description.fits(thing)]


def _plural_attribute(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, list[Thing]] | None:
    description, fitting = _several(things, rng)
    return _quantified(len(fitting), rng).format(description.words(rng, plural=True)), fitting


def _plural_place(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, list[Thing]] | None:
    """Return a phrase for those on one half of the image; others of them are on the other half."""
    description, fitting = _several(things, rng)
    side, key, sign = pick(rng, (("left", "x", 1), ("right", "x", -1), ("top", "y", 1), ("bottom", "y", -1)))
    from_middle = [sign * (getattr(thing, key) - 0.5) for thing in fitting]
    chosen = [thing for thing, offset in zip(fitting, from_middle, strict=True) if offset < 0]
    if len(chosen) == len(fitting) or any(abs(offset) < _MARGIN for offset in from_middle):
        return None
    name = _quantified(len(chosen), rng).format(description.words(rng, plural=True))
    return f"{name} {pick(rng, ('on the', 'on', 'at the'))} {side}", chosen


def _plural_relation(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, list[Thing]] | None:
    description, fitting = _several(things, rng)
    landmark = pick(rng, things)
    name = _unique_name(things, landmark, rng)
    if name is None or landmark in fitting:
        return None
    words, holds, nearly = pick(rng, _RELATIONS)
    chosen = [thing for thing in fitting if holds(thing, landmark)]
    if any(nearly(thing, landmark) for thing in fitting if thing not in chosen):
        return None
    # Of overlapping things, "over" and "under" may also mean in front of and behind.
    word = pick(rng, words[:1] if any(_gap(thing, landmark) < 0 for thing in fitting) else words)
    several = _quantified(len(chosen), rng).format(description.words(rng, plural=True))
    return f"{several} {word} {pick(rng, ('', 'the '))}{name}", chosen


def _plural_pair(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, list[Thing]] | None:
    """Return a phrase that names two things, each by its attributes."""
    pair = [things[number] for number in rng.permutation(len(things))[:2].tolist()]
    names = [_unique_name(things, thing, rng) for thing in pair]
    return None if None in names else (f"{names[0]} and {pick(rng, ('', 'the '))}{names[1]}", pair)


_PLURAL_MAKERS: dict[str, Callable[[Sequence[Thing], np.random.Generator], tuple[str, list[Thing]] | None]] = {
    "attribute": _plural_attribute,
    "place": _plural_place,
    "relation": _plural_relation,
    "pair": _plural_pair,
}
PLURAL_KINDS = tuple(_PLURAL_MAKERS)
"""What identifies the things of a phrase of `plural_phrase`."""


def plural_phrase(
    things: Sequence[Thing], kind: str, rng: np.random.Generator
) -> tuple[Phrase, tuple[Thing, ...]] | None:
    """Return a phrase for two or more of the things, and these things.

    Args:
        things: of the scene.
        kind: one of PLURAL_KINDS.
        rng: draws.

    Returns:
        None if none was found for the things that were drawn; another draw may find one.
    """
    found = _PLURAL_MAKERS[kind](things, rng)
    return None if found is None or len(found[1]) < 2 else (Phrase(found[0], f"plural {kind}"), tuple(found[1]))


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


def _absent_category(things: Sequence[Thing], rng: np.random.Generator, plural: bool) -> str | None:
    """Return a description with a shape that the scene lacks."""
    missing = [shape for shape in SHAPES if all(thing.shape != shape for thing in things)]
    options = [d for d in _descriptions(pick(rng, things), with_shape=True) if _length(d) <= 2]
    description = replace(pick(rng, options), shape=pick(rng, missing))
    return _absent_name(description, rng, plural)


def _absent_name(description: Description, rng: np.random.Generator, plural: bool) -> str:
    template = _quantified(0, rng) if plural else pick(rng, ("{}", "{}", "the {}"))
    return template.format(description.words(rng, plural))


def _absent_attribute(things: Sequence[Thing], rng: np.random.Generator, plural: bool) -> str | None:
    """Return a description that fits nothing, though each of its attributes occurs in the scene if
    possible.
    """
    base = pick(rng, things)
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
                return _absent_name(pick(rng, found), rng, plural)
    return None


def _absent_place(things: Sequence[Thing], rng: np.random.Generator, plural: bool) -> str | None:
    """Return a phrase that places things where none of their description is."""
    base = pick(rng, things)
    description = pick(rng, [d for d in _descriptions(base, with_shape=True) if _length(d) <= 2])
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
                options.append(pick(rng, (f"{word} {{}}", f"{{}} on {word}", f"{{}} on the {word}")))
    for vertical, horizontal in itertools.product(("top", "bottom"), ("left", "right")):
        if not any(_in_corner(thing, vertical, horizontal) for thing in fitting):
            options.append(pick(rng, (f"{vertical} {horizontal} {{}}", f"{{}} at {vertical} {horizontal}")))
    return pick(rng, options).format(description.words(rng, plural)) if options else None


def _absent_relation(things: Sequence[Thing], rng: np.random.Generator, plural: bool) -> str | None:
    """Return a phrase by a relation that nothing of its description has to the other thing."""
    base, landmark = pick(rng, things), pick(rng, things)
    description = pick(rng, [d for d in _descriptions(base, with_shape=True) if _length(d) <= 2])
    if description.fits(landmark) or (name := _unique_name(things, landmark, rng)) is None:
        return None
    fitting = [thing for thing in things if description.fits(thing)]
    overlapped = any(_gap(thing, landmark) < 0 for thing in fitting)
    options = [
        f"{{}} {pick(rng, words[:1] if overlapped else words)} {pick(rng, ('', 'the '))}{name}"
        for (words, _, _), opposite in zip(_RELATIONS, _OPPOSITES, strict=True)
        if all(opposite(thing, landmark) for thing in fitting)
    ]
    if all(_distance(thing, landmark) > _FAR and _gap(thing, landmark) > _CLEAR_GAP for thing in fitting):
        options.append(f"{{}} {pick(rng, ('next to', 'near'))} {pick(rng, ('', 'the '))}{name}")
    return pick(rng, options).format(description.words(rng, plural)) if options else None


_ABSENT_MAKERS: dict[str, Callable[[Sequence[Thing], np.random.Generator, bool], str | None]] = {
    "category": _absent_category,
    "attribute": _absent_attribute,
    "place": _absent_place,
    "relation": _absent_relation,
}
ABSENT_KINDS = tuple(_ABSENT_MAKERS)
"""What is wrong with a phrase of `absent_phrase`."""


def absent_phrase(
    things: Sequence[Thing], kind: str, rng: np.random.Generator, *, plural: bool = False
) -> Phrase | None:
    """Return a phrase that is clearly true of none of the things, by what is wrong with it.

    Args:
        things: of the scene, one or more.
        kind: one of ABSENT_KINDS. With a wrong category, the scene lacks the shape; with a wrong
            attribute, each word fits some thing of the scene where that is possible; with a wrong
            place or relation, the described thing is there.
        rng: draws.
        plural: whether the phrase is for several things, of which there is not even one.

    Returns:
        None if none was found for the things that were drawn; another draw may find one.
    """
    text = _ABSENT_MAKERS[kind](things, rng, plural)
    return None if text is None else Phrase(text, f"absent {kind}")


def singular(word: str) -> str | None:
    """Return the noun of a plural; None for any other word."""
    return next((noun for noun, plural in _PLURALS.items() if plural == word), None)


def sides(thing: Thing, others: Sequence[Thing]) -> list[list[Thing]]:
    """Return the others that a thing is clearly left of, right of, above and below."""
    return [[other for other in others if holds(thing, other)] for _, holds, _ in _RELATIONS]


def generalised_phrases(
    things: Sequence[Thing], rng: np.random.Generator
) -> list[tuple[tuple[Thing, ...], tuple[Phrase, ...]]]:
    """Return phrases for several of the things, and for none, each with its targets.

    There is one phrase for several things if one was found; then two groups of phrases of all
    ABSENT_KINDS, which have no target. One of four of them is a plural, so that plurals do not mean
    that the target is there.
    """
    groups: list[tuple[tuple[Thing, ...], tuple[Phrase, ...]]] = []
    for number in rng.permutation(len(PLURAL_KINDS)).tolist():
        found = _first(partial(plural_phrase, things, PLURAL_KINDS[number], rng))
        if found:
            groups.append((found[1], (found[0],)))
            break
    order = [ABSENT_KINDS[number] for number in rng.permutation(len(ABSENT_KINDS)).tolist()]
    for kinds in (order[::2], order[1::2]):
        absent = [_first(partial(absent_phrase, things, kind, rng, plural=rng.random() < 0.25)) for kind in kinds]
        if phrases := tuple(phrase for phrase in absent if phrase):
            groups.append(((), phrases))
    return groups


def _first(draw: Callable[[], T | None]) -> T | None:
    """Return what the first successful one of several draws gives."""
    return next((found for found in (draw() for _ in range(_TRIES)) if found is not None), None)


def vocabulary() -> list[str]:
    """Return all words of generated phrases, sorted."""
    words = {
        *SHAPES,
        *_NOUNS,
        *_PLURALS.values(),
        *COLOURS,
        *TEXTURES,
        *itertools.chain(*_SYNONYMS.values()),
        *itertools.chain(*_ORDINALS),
    }
    places = "left right top bottom leftmost rightmost highest lowest middle center"
    relations = "of above over below under next to near closest"
    return sorted(
        words.union(f"the all both two three and on at in from biggest largest smallest {places} {relations}".split())
    )
