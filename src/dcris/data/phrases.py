"""Generate referring expressions for the annotated instances of a photograph.

An instance gets a phrase only where the annotations make it unambiguous with a margin: the left dog
is left of every other dog by a clear distance. Each kind of phrase is one rule in RULES. A rule
gets boxes, areas and colours, never pixels, and treats left and right alike: a mirrored photograph
gets the same phrases with the two words exchanged.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from dcris.data.flip import swap_sides

# ---- wording ------------------------------------------------------------------------------------

Nouns = Mapping[str, tuple[str, ...]]
"""Words for categories."""

# fmt: off
NOUNS: Nouns = {
    "person": ("person", "person", "human"), "bicycle": ("bicycle", "bike"), "car": ("car", "car", "vehicle"),
    "motorcycle": ("motorcycle", "motorbike", "bike"), "airplane": ("airplane", "plane", "jet"),
    "truck": ("truck", "truck", "vehicle"), "boat": ("boat", "boat", "ship"),
    "traffic light": ("traffic light", "stoplight"), "fire hydrant": ("fire hydrant", "hydrant"),
    "stop sign": ("stop sign", "sign"), "parking meter": ("parking meter", "meter"), "bear": ("bear",),
    "teddy bear": ("teddy bear", "stuffed bear", "stuffed animal", "bear"), "backpack": ("backpack", "bag"),
    "handbag": ("handbag", "purse", "bag"), "suitcase": ("suitcase", "luggage", "bag"), "tie": ("tie", "necktie"),
    "sports ball": ("ball",), "baseball glove": ("baseball glove", "glove", "mitt"),
    "baseball bat": ("baseball bat", "bat"), "tennis racket": ("tennis racket", "racket"),
    "wine glass": ("wine glass", "glass"), "cup": ("cup", "cup", "mug"), "sandwich": ("sandwich", "sandwich", "burger"),
    "hot dog": ("hot dog", "hotdog"), "donut": ("donut", "doughnut"), "chair": ("chair", "chair", "seat"),
    "couch": ("couch", "sofa"), "potted plant": ("potted plant", "plant"), "dining table": ("table", "dining table"),
    "tv": ("tv", "television", "monitor", "screen"), "laptop": ("laptop", "computer", "screen"),
    "mouse": ("computer mouse", "mouse"), "remote": ("remote", "remote control"),
    "cell phone": ("cell phone", "phone", "mobile phone"), "oven": ("oven", "stove"),
    "refrigerator": ("refrigerator", "fridge"), "hair drier": ("hair dryer",),
}
"""Words for a category, unless `data.nouns` has others; further categories are called by their
names. A repeated word is drawn more often. A word that two categories of a photograph share is not
used there."""

CATEGORY = ("{noun}", "the {noun}")

SIDE_OF_PHOTOGRAPH = {
    side: (
        f"{side} {{noun}}", f"the {side} {{noun}}", f"{{noun}} on the {side}", f"the {{noun}} on the {side}",
        f"{{noun}} on {side}", f"{{noun}} {side}", f"{{noun}} on the {side} side", f"{{noun}} on {side} side",
        f"{side} side {{noun}}", f"the {{noun}} to the {side}",
    )
    for side in ("left", "right")
} | {
    "top": (
        "top {noun}", "the top {noun}", "upper {noun}", "the {noun} at the top", "{noun} at the top", "{noun} at top",
    ),
    "bottom": (
        "bottom {noun}", "the bottom {noun}", "lower {noun}", "the {noun} at the bottom", "{noun} at the bottom",
        "{noun} at bottom",
    ),
}
SIDE_OF_TWO = {
    "left": ("left {noun}", "the left {noun}", "the {noun} to the left"),
    "right": ("right {noun}", "the right {noun}", "the {noun} to the right"),
    "top": ("top {noun}", "the top {noun}", "upper {noun}", "the upper {noun}"),
    "bottom": ("bottom {noun}", "the bottom {noun}", "lower {noun}", "the lower {noun}"),
}
FARTHEST = {
    "left": ("leftmost {noun}", "the leftmost {noun}", "far left {noun}", "{noun} on the far left", "{noun} farthest left"),
    "right": (
        "rightmost {noun}", "the rightmost {noun}", "far right {noun}", "{noun} on the far right", "{noun} farthest right",
    ),
    "top": ("topmost {noun}", "the topmost {noun}", "highest {noun}"),
    "bottom": ("bottommost {noun}", "the bottommost {noun}", "lowest {noun}"),
}
CORNERS = {
    (upright, side): tuple(
        wording
        for word in words
        for wording in (
            f"{word} {side} {{noun}}", f"the {word} {side} {{noun}}", f"{{noun}} {word} {side}",
            f"{{noun}} in the {word} {side}", f"the {{noun}} in the {word} {side} corner",
        )
    )
    for upright, words in (("top", ("top", "upper")), ("bottom", ("bottom", "lower")))
    for side in ("left", "right")
}
MIDDLE = (
    "middle {noun}", "the middle {noun}", "{noun} in the middle", "the {noun} in the middle", "{noun} in middle",
    "center {noun}", "{noun} in the center",
)
BIGGER_OF_TWO = (
    "bigger {noun}", "the bigger {noun}", "larger {noun}", "the larger {noun}", "big {noun}", "the big {noun}",
    "large {noun}",
)
SMALLER_OF_TWO = ("smaller {noun}", "the smaller {noun}", "small {noun}", "the small {noun}", "little {noun}")
BIGGEST = ("biggest {noun}", "the biggest {noun}", "largest {noun}", "the largest {noun}")
SMALLEST = ("smallest {noun}", "the smallest {noun}", "littlest {noun}")
ORDINALS = tuple(
    {
        side: (
            f"{number} {{noun}} from the {side}", f"the {number} {{noun}} from the {side}", f"{number} {{noun}} from {side}",
            f"{number} from {side} {{noun}}",
        )
        for side in ("left", "right")
    }
    for number in ("first", "second", "third", "fourth")
)
COLOUR = ("{colour} {noun}", "the {colour} {noun}", "{noun} that is {colour}")
COLOUR_OF_CLOTHES = ("{noun} in {colour}", "the {noun} in {colour}", "{noun} wearing {colour}")
SPELLINGS: Mapping[str, tuple[str, ...]] = {"gray": ("gray", "grey")}

NEXT_TO = (
    "{noun} next to the {anchor}", "the {noun} next to the {anchor}", "{noun} by the {anchor}", "{noun} beside the {anchor}",
    "{noun} near {anchor}",
)
SIDE_OF_ANCHOR = {
    side: (
        f"{{noun}} {side} of the {{anchor}}", f"{{noun}} {side} of {{anchor}}", f"the {{noun}} {side} of the {{anchor}}",
        f"{{noun}} to the {side} of the {{anchor}}", f"the {{noun}} to the {side} of the {{anchor}}",
    )
    for side in ("left", "right")
}
ON = ("{noun} on the {anchor}", "the {noun} on the {anchor}", "{noun} on {anchor}")
UNDER = ("{noun} under the {anchor}", "the {noun} under the {anchor}", "{noun} below the {anchor}")
WITH = ("{noun} with the {anchor}", "the {noun} with the {anchor}", "{noun} with {anchor}")

SEATS = frozenset(
    ("bench", "chair", "couch", "bed", "horse", "elephant", "motorcycle", "bicycle", "skateboard", "surfboard", "snowboard",
     "skis")
)
"""What people are on."""
SURFACES = frozenset(("bench", "chair", "couch", "bed", "dining table"))
"""What small things are on."""
EXTENDED = frozenset(("dining table", "bed", "couch"))
"""What is not left or right of a thing, which may be on it."""
SMALL_THINGS = frozenset(
    ("bird", "cat", "dog", "backpack", "handbag", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana",
     "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "laptop", "mouse", "remote",
     "keyboard", "cell phone", "book", "vase", "scissors", "teddy bear")
)
ROOF = "umbrella"
"""What things are under."""
BELONGINGS = frozenset(
    ("umbrella", "backpack", "handbag", "suitcase", "frisbee", "baseball bat", "baseball glove", "tennis racket",
     "cell phone", "skateboard", "surfboard", "snowboard", "skis", "tie")
)
"""What people are with."""
# fmt: on

SHOWS_OTHER_THINGS = frozenset(("bowl", "sink", "potted plant", "dining table", "tv", "laptop", "bed"))
"""Categories without colour: most of the pixels may belong to what is in or on them."""
PERSON = "person"
NOT_OF_CLOTHES = frozenset(("brown", "orange"))
"""Colours of skin as much as of clothes."""

# ---- margins, as fractions of the photograph's side or area --------------------------------------

LIMIT = 12
"""Most phrases of an instance."""
TINY = 0.003
"""Area below which an instance gets no phrase; it still makes others ambiguous."""
_MOST_ANCHORS = 20
"""Others, the largest first, that relations are tried with."""
_GAP = 0.08
"""Least distance between the centres of what is left and what is not."""
_GAP_IN_ROW = 0.05
_ROW = 0.35
"""Greatest difference of the heights at which things in a row are centred."""
_FACTOR = 1.5
"""Least ratio of the areas of what is big and what is not."""
_EDGE = 0.005
"""Distance from the photograph's edge at which a thing may go on outside."""
_CLEAR_COLOUR = 0.6
"""Least share of an instance's pixels that have the colour it is called by."""
_NO_COLOUR = 0.15
"""Greatest share of pixels of nearly that colour of another instance of the category."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the photograph's width and height."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An annotated instance of a photograph."""

    ann_id: int
    category: str
    box: Box
    area: float
    """Of the mask, as a fraction of the photograph."""
    vague: bool = False
    """Whether it is a crowd or has no usable mask. Nothing of its category can then be told
    apart."""
    colours: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By name: the shares of its pixels that have the colour, and that have it nearly."""

    @property
    def is_clear(self) -> bool:
        """Whether it may be described, or others by it."""
        return not self.vague and self.area >= TINY


@dataclass(frozen=True, slots=True)
class Statement:
    """What holds for one instance of a photograph only, in all wordings."""

    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scene:
    """What a rule sees: the target, the others of its category, and things it may stand by."""

    target: Instance
    others: Sequence[Instance]
    anchors: Sequence[Instance]
    """The instances that are alone in their category, which is not the target's."""
    nouns: Sequence[str]
    """Words for the target's category."""

    @property
    def all(self) -> Sequence[Instance]:
        return [self.target, *self.others]


@dataclass(frozen=True, slots=True)
class _Wording:
    templates: Sequence[str]
    anchor: Instance | None = None
    colour: str = ""


Rule = Callable[[_Scene], Iterator[_Wording]]


def describable(instances: Iterable[Instance]) -> set[str]:
    """Return the categories of a photograph that have an instance to describe and no vague one."""
    instances = list(instances)
    return {one.category for one in instances if one.is_clear} - {one.category for one in instances if one.vague}


def words_for(category: str, nouns: Nouns) -> tuple[str, ...]:
    """Return the words for a category: those of `data.nouns`, those of NOUNS, or its name."""
    return nouns.get(category) or NOUNS.get(category, (category,))


def statements(instances: Sequence[Instance], target: Instance, nouns: Nouns = MappingProxyType({})) -> list[Statement]:
    """Return everything that can be said of one instance of a photograph and of no other.

    Args:
        instances: all annotated instances of the photograph.
        target: one of them.
        nouns: words for categories in place of those of NOUNS (`data.nouns`).
    """
    others = [other for other in instances if other.category == target.category and other is not target]
    if not target.is_clear or any(other.vague for other in others):
        return []
    counts = Counter(instance.category for instance in instances)
    words = {category: words_for(category, nouns) for category in counts}
    usable = _usable_nouns(words)
    anchors = [one for one in instances if counts[one.category] == 1 and one.is_clear and one is not target]
    largest = sorted(anchors, key=lambda one: -one.area)[:_MOST_ANCHORS]
    scene = _Scene(target, others, largest, words[target.category])
    found = []
    for kind, rule in RULES.items():
        for wording in rule(scene):
            texts = (
                template.format(noun=noun, anchor=anchor, colour=colour)
                for template in wording.templates
                for noun in usable[target.category]
                for anchor in (usable[wording.anchor.category] if wording.anchor else ("",))
                for colour in SPELLINGS.get(wording.colour, (wording.colour,))
            )
            # Flip augmentation has to exchange left and right in them.
            if kept := tuple(text for text in texts if swap_sides(text) is not None):
                found.append(Statement(kind, kept))
    return found


def draw(found: Iterable[Statement], ann_id: int, limit: int = LIMIT) -> list[tuple[str, str]]:
    """Choose up to `limit` different phrases, (kind, text), of all kinds in turn.

    The choice depends on the statements and the annotation's id only.
    """
    generator = np.random.default_rng(ann_id % 2**64)
    kinds: dict[str, list[list[tuple[str, str]]]] = {}
    for statement in found:
        texts = [(statement.kind, statement.texts[place]) for place in generator.permutation(len(statement.texts))]
        kinds.setdefault(statement.kind, []).append(texts)
    in_kind = [_in_turn([lists[place] for place in generator.permutation(len(lists))]) for lists in kinds.values()]
    chosen: dict[str, str] = {}
    for kind, text in _in_turn(in_kind):
        chosen.setdefault(text, kind)
    return [(kind, text) for text, kind in chosen.items()][:limit]


def _in_turn(lists: Sequence[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return the first element of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [items[place] for place in range(longest) for items in lists if place < len(items)]


def _usable_nouns(nouns: Nouns) -> dict[str, tuple[str, ...]]:
    """Return the words for each category that mean no other category of the photograph."""
    used = [noun for words in nouns.values() for noun in set(words)]
    return {
        # A name with a side in it ("left shoe") would be changed by flip augmentation.
        category: tuple(noun for noun in words if used.count(noun) == 1 and swap_sides(noun) == noun)
        for category, words in nouns.items()
    }


# ---- geometry -----------------------------------------------------------------------------------

Interval = tuple[float, float]


def _along(instance: Instance, side: str) -> Interval:
    """Return the interval that a box covers, measured from a side: 0 is there, 1 is opposite."""
    left, top, right, bottom = instance.box
    if side in ("left", "top"):
        return (left, right) if side == "left" else (top, bottom)
    return (1 - right, 1 - left) if side == "right" else (1 - bottom, 1 - top)


def _centre(interval: Interval) -> float:
    return (interval[0] + interval[1]) / 2


def _length(interval: Interval) -> float:
    return interval[1] - interval[0]


def _shared(one: Interval, other: Interval) -> float:
    """Return the length that two intervals share; negative: the gap between them."""
    return min(one[1], other[1]) - max(one[0], other[0])


def _precedes(one: Interval, other: Interval, gap: float = _GAP) -> bool:
    """Return whether `one` comes clearly first: the centre of each is outside the other."""
    first, second = _centre(one), _centre(other)
    return first + gap <= second and first < other[0] and one[1] < second


def _box_area(instance: Instance) -> float:
    return _length(_along(instance, "left")) * _length(_along(instance, "top"))


# ---- rules --------------------------------------------------------------------------------------


def _category(scene: _Scene) -> Iterator[_Wording]:
    if not scene.others:
        yield _Wording(CATEGORY)


def _place(scene: _Scene) -> Iterator[_Wording]:
    if not scene.others:
        return
    for side, wordings in SIDE_OF_TWO.items():
        mine, rest = _along(scene.target, side), [_along(other, side) for other in scene.others]
        if not all(_precedes(mine, other) for other in rest):
            continue
        if _centre(mine) <= 0.45 and all(_centre(other) >= 0.5 for other in rest):
            yield _Wording(SIDE_OF_PHOTOGRAPH[side])
        elif len(rest) == 1:
            yield _Wording(wordings)
        if len(rest) > 1:
            yield _Wording(FARTHEST[side])
    for (upright, side), wordings in CORNERS.items():
        if all(_nearer_corner(scene.target, other, upright, side) for other in scene.others):
            yield _Wording(wordings)
    if _in_middle(scene):
        yield _Wording(MIDDLE)


def _nearer_corner(target: Instance, other: Instance, upright: str, side: str) -> bool:
    """Return whether only the target is in a corner, and is clearly nearer to it."""
    mine, its = ([_along(instance, name) for name in (upright, side)] for instance in (target, other))
    return (
        max(map(_centre, mine)) <= 0.4
        and max(map(_centre, its)) >= 0.5
        and any(_precedes(one, two) for one, two in zip(mine, its, strict=True))
        and math.hypot(*map(_centre, mine)) + _GAP <= math.hypot(*map(_centre, its))
    )


def _in_middle(scene: _Scene) -> bool:
    """Return whether as many are left of the target as right of it, and it is nearest to the
    centre."""
    if len(scene.others) < 2 or any(instance.area < TINY for instance in scene.others):
        return False
    mine, rest = _along(scene.target, "left"), [_along(other, "left") for other in scene.others]
    before, after = (
        sum(found) for found in zip(*((_precedes(o, mine), _precedes(mine, o)) for o in rest), strict=True)
    )
    off = abs(_centre(mine) - 0.5)
    return before == after == len(rest) / 2 and all(off + _GAP <= abs(_centre(other) - 0.5) for other in rest)


def _size(scene: _Scene) -> Iterator[_Wording]:
    if not scene.others:
        return

    def exceeds(one: Instance, other: Instance) -> bool:
        # Both count: an instance that is half hidden has a small mask and a large box.
        return one.area >= _FACTOR * other.area and _box_area(one) >= _FACTOR * _box_area(other)

    if all(exceeds(scene.target, other) for other in scene.others):
        yield _Wording(BIGGER_OF_TWO if len(scene.others) == 1 else BIGGEST)
    cut = min(scene.target.box) <= _EDGE or max(scene.target.box) >= 1 - _EDGE
    if not cut and all(exceeds(other, scene.target) for other in scene.others):
        yield _Wording(SMALLER_OF_TWO if len(scene.others) == 1 else SMALLEST)


def _ordinal(scene: _Scene) -> Iterator[_Wording]:
    heights = [_centre(_along(instance, "top")) for instance in scene.all]
    tiny = any(instance.area < TINY for instance in scene.all)  # some would not count it
    if len(scene.others) < 2 or max(heights) - min(heights) > _ROW or tiny:
        return
    for side in ("left", "right"):
        mine = _along(scene.target, side)
        row = sorted((_along(instance, side) for instance in scene.all), key=_centre)
        rank = sum(_centre(interval) < _centre(mine) for interval in row)
        distinct = all(_precedes(*pair, _GAP_IN_ROW) for pair in pairwise(row[: rank + 1])) and all(
            _precedes(mine, later, _GAP_IN_ROW) for later in row[rank + 1 :]
        )
        if distinct and rank < min(len(row) - 1, len(ORDINALS)):
            yield _Wording(ORDINALS[rank][side])


def _colour(scene: _Scene) -> Iterator[_Wording]:
    if scene.target.category in SHOWS_OTHER_THINGS:
        return
    for name, (share, _) in scene.target.colours.items():
        alone = all(other.colours.get(name, (1.0, 1.0))[1] <= _NO_COLOUR for other in scene.others)
        if share >= _CLEAR_COLOUR and alone and name not in scene.nouns:
            if scene.target.category != PERSON:
                yield _Wording(COLOUR, colour=name)
            elif name not in NOT_OF_CLOTHES:
                yield _Wording(COLOUR_OF_CLOTHES, colour=name)


def _relation(scene: _Scene) -> Iterator[_Wording]:
    for anchor in scene.anchors:
        for templates, holds, may_hold in _RELATIONS:
            if holds(scene.target, anchor) and not any(may_hold(other, anchor) for other in scene.others):
                yield _Wording(templates, anchor)


Relation = Callable[[Instance, Instance], bool]
"""(target, anchor) -> whether a relation holds."""


def _beside(target: Instance, anchor: Instance) -> bool:
    """Both stand on the same ground, of similar height, without much between them."""
    mine, its = (_along(instance, "left") for instance in (target, anchor))
    upright, its_upright = (_along(instance, "top") for instance in (target, anchor))
    heights = sorted((_length(upright), _length(its_upright)))
    return (
        -0.05 <= _shared(mine, its) <= 0.2 * min(_length(mine), _length(its))
        and abs(upright[1] - its_upright[1]) <= 0.08
        and heights[0] >= 0.4 * heights[1]
    ) and (_precedes(mine, its, 0) or _precedes(its, mine, 0))


def _perhaps_beside(target: Instance, anchor: Instance) -> bool:
    return min(_shared(_along(target, side), _along(anchor, side)) for side in ("left", "top")) >= -0.15


def _side_of(side: str) -> Relation:
    def holds(target: Instance, anchor: Instance) -> bool:
        if not EXTENDED.isdisjoint((target.category, anchor.category)):
            return False
        level = _shared(_along(target, "top"), _along(anchor, "top"))
        lengths = [_length(_along(instance, "top")) for instance in (target, anchor)]
        near = _shared(_along(target, side), _along(anchor, side)) >= -0.3
        return _precedes(_along(target, side), _along(anchor, side)) and level >= 0.5 * min(lengths) and near

    return holds


def _perhaps_side_of(side: str) -> Relation:
    def may_hold(target: Instance, anchor: Instance) -> bool:
        return _centre(_along(target, side)) < _centre(_along(anchor, side)) + 0.03

    return may_hold


def _on(target: Instance, anchor: Instance) -> bool:
    mine, its = (_along(instance, "left") for instance in (target, anchor))
    upright, its_upright = (_along(instance, "top") for instance in (target, anchor))
    if target.category == PERSON and anchor.category in SEATS:
        rise = 0.25 * _length(its_upright)  # less where someone stands beside a motorcycle
    elif target.category in SMALL_THINGS and anchor.category in SURFACES:
        rise = 0.05
    else:
        return False
    return (
        _shared(mine, its) >= 0.8 * min(_length(mine), _length(its))
        and its_upright[0] < upright[1] <= its_upright[1] + 0.05
        and _centre(upright) + rise <= _centre(its_upright)
    )


def _under(target: Instance, anchor: Instance) -> bool:
    mine, its = (_along(instance, "left") for instance in (target, anchor))
    upright, its_upright = (_along(instance, "top") for instance in (target, anchor))
    return (
        anchor.category == ROOF
        and _shared(mine, its) >= 0.8 * min(_length(mine), _length(its))
        and its_upright[0] < upright[0] < its_upright[1]
        and _centre(its_upright) + 0.1 <= _centre(upright)
    )


def _with(target: Instance, anchor: Instance) -> bool:
    covered = [_shared(_along(target, side), _along(anchor, side)) for side in ("left", "top")]
    return (
        target.category == PERSON
        and anchor.category in BELONGINGS
        and min(covered) > 0
        and math.prod(covered) >= 0.5 * _box_area(anchor)
        and target.area >= anchor.area
    )


def _near(target: Instance, anchor: Instance) -> bool:
    """The boxes touch, or nearly so."""
    return min(_shared(_along(target, side), _along(anchor, side)) for side in ("left", "top")) >= -0.03


_RELATIONS: Sequence[tuple[Sequence[str], Relation, Relation]] = (
    (NEXT_TO, _beside, _perhaps_beside),
    (SIDE_OF_ANCHOR["left"], _side_of("left"), _perhaps_side_of("left")),
    (SIDE_OF_ANCHOR["right"], _side_of("right"), _perhaps_side_of("right")),
    (ON, _on, _near),
    (UNDER, _under, _near),
    (WITH, _with, _near),
)
"""Wordings, the relation, and whether it might hold: of another of the category it must not."""

RULES: Mapping[str, Rule] = {
    "category": _category,
    "place": _place,
    "size": _size,
    "ordinal": _ordinal,
    "colour": _colour,
    "relation": _relation,
}
"""The rule of each kind of phrase."""
