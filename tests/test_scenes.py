"""Generated scenes: what their phrases mean, what their images show, and what is written.

The phrases are read here by an interpreter of their own, written from what a person would
understand and not from the code that makes them. It is generous: where people could disagree, it
returns everything that could be meant.
"""

import itertools
import json
import math
from collections import Counter
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest

from dcris.data import scenes
from dcris.data.images import read_image
from dcris.data.masks import mask_box, union_mask
from dcris.data.readers.load import load_references
from dcris.data.scene_phrases import (
    ABSENT_KINDS,
    COLOURS,
    KINDS,
    PLURAL_KINDS,
    SHAPES,
    SIZES,
    TEXTURES,
    Thing,
    absent_phrase,
    generalised_phrases,
    plural_phrase,
    vocabulary,
)
from dcris.data.scenes import make_scene, scene_rng, write_scenes
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import exchange_expressions
from dcris.utils import files

SIDE = 112
DOUBT = 0.05  # share of the side: the order of two things that are nearer than this is doubtful

SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "medium": "medium", "big": "big", "large": "big"}
NOUNS = (*SHAPES, "one", "thing", "shape")
NUMBERS = {"first": 1, "1st": 1, "second": 2, "2nd": 2, "third": 3, "3rd": 3, "fourth": 4, "4th": 4}
TOWARDS = {
    **dict.fromkeys(("left", "leftmost"), (-1, 0)),
    **dict.fromkeys(("right", "rightmost"), (1, 0)),
    **dict.fromkeys(("top", "highest", "above", "over"), (0, -1)),
    **dict.fromkeys(("bottom", "lowest", "below", "under"), (0, 1)),
}


# ---- an interpreter of phrases -------------------------------------------------------------------


def described(words, things):
    """Return the things that have all the attributes."""
    assert words, "there is nothing to say what is meant"
    assert words[-1] in NOUNS, f"no noun at the end of {words}"
    for word in words:
        if word in SIZE_WORDS:
            things = [thing for thing in things if thing.size == SIZE_WORDS[word]]
        elif word in COLOURS:
            things = [thing for thing in things if thing.colour == word]
        elif word in TEXTURES:
            things = [thing for thing in things if thing.texture == word]
        elif word in SHAPES:
            things = [thing for thing in things if thing.shape == word]
        else:
            assert word in NOUNS, f"{word!r} describes nothing"
    return list(things)


def along(thing, direction):
    return thing.x * direction[0] + thing.y * direction[1]


def nth(things, direction, number):
    """Return the things that may be the `number`-th, counted from the end `direction`."""
    chosen = []
    for thing in things:
        ahead = [along(other, direction) - along(thing, direction) for other in things if other is not thing]
        if sum(lead > DOUBT for lead in ahead) < number <= sum(lead > -DOUBT for lead in ahead) + 1:
            chosen.append(thing)
    return chosen


def distance(a, b):
    return math.hypot(a.x - b.x, a.y - b.y)


def off_centre(thing):
    return math.hypot(thing.x - 0.5, thing.y - 0.5)


def in_the_middle(things):
    """Return the thing nearest to the centre and the middle one of the row or column: people mean
    either.
    """
    nearest = min(off_centre(thing) for thing in things)
    wide = np.ptp([thing.x for thing in things]) >= np.ptp([thing.y for thing in things])
    row = nth(things, (-1, 0) if wide else (0, -1), (len(things) + 1) // 2)
    return row + [thing for thing in things if off_centre(thing) < nearest + DOUBT and thing not in row]


def gap(a, b):
    """Return the distance between the edges of two things taken as circles; 0 if they touch."""
    return max(0.0, distance(a, b) - a.radius - b.radius)


def in_relation(things, relation, landmark, doubt):
    """Return the things with that relation to the landmark; `doubt` below 0 admits only clear
    cases.
    """
    others = [thing for thing in things if thing is not landmark]
    if relation in ("next", "near", "closest"):
        nearest, least = min(distance(o, landmark) for o in others), min(gap(o, landmark) for o in others)
        close = [o for o in others if distance(o, landmark) < 1.25 * nearest or gap(o, landmark) < least + DOUBT]
        return [o for o in close if doubt > 0 or gap(o, landmark) < 0.25]
    chosen = []
    for other in others:
        (dx, dy), (ax, ay) = (other.x - landmark.x, other.y - landmark.y), TOWARDS[relation]
        ahead, aside = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)
        if ahead > 0 if doubt > 0 else ahead > max(aside, -doubt):
            chosen.append(other)
    return chosen


def meant(text, things, doubt=DOUBT):
    """Return the things that a phrase may mean; with `doubt` below 0, clear cases only."""
    match [word for word in text.split() if word != "the"]:
        case [number, *description, "from", start] if number in NUMBERS:
            return nth(described(description, things), TOWARDS[start], NUMBERS[number])
        case ["biggest" | "largest", *description]:
            fit = described(description, things)
            return [thing for thing in fit if thing.radius > max(other.radius for other in fit) / 1.2]
        case ["smallest", *description]:
            fit = described(description, things)
            return [thing for thing in fit if thing.radius < min(other.radius for other in fit) * 1.2]
        case ["middle" | "center", *description] | [*description, "in", "middle"]:
            return in_the_middle(described(description, things))
        case [("top" | "bottom") as y, ("left" | "right") as x, *description]:
            return corner(described(description, things), x, y, doubt)
        case [*description, "at", ("top" | "bottom") as y, ("left" | "right") as x]:
            return corner(described(description, things), x, y, doubt)
        case [edge, *description] if edge in TOWARDS:
            return nth(described(description, things), TOWARDS[edge], 1)
        case [*description, "on", edge]:
            # Of two on the right, the one "on the right" is the one further right.
            return nth(described(description, things), TOWARDS[edge], 1)
        case words:
            at = [number for number, word in enumerate(words) if word in TOWARDS or word in ("next", "near", "closest")]
            if not at:
                return described(words, things)
            (at,) = at
            landmark_words = words[at + 1 :]
            if words[at] in ("left", "right", "next", "closest"):
                assert landmark_words.pop(0) == ("of" if words[at] in TOWARDS else "to")
            landmarks = described(landmark_words, things)
            assert len(landmarks) == 1, f"the landmark of {text!r} could be any of {len(landmarks)}"
            candidates = [*described(words[:at], things), *landmarks]
            return in_relation(candidates, words[at], landmarks[0], doubt)


def corner(things, x, y, doubt):
    return [
        thing
        for thing in things
        if (thing.x < 0.5 + doubt if x == "left" else thing.x > 0.5 - doubt)
        and (thing.y < 0.5 + doubt if y == "top" else thing.y > 0.5 - doubt)
    ]


PLURALS = {**{f"{noun}s": noun for noun in NOUNS}, "crosses": "cross"}
QUANTITIES = {"all": None, "both": 2, "two": 2, "three": 3}


def one_of(text):
    """Return a phrase for several things as one for one of them, and their number if it is said."""
    words = [word for word in text.split() if word != "the"]
    numbers = [QUANTITIES[word] for word in words if word in QUANTITIES]
    singular = " ".join(PLURALS.get(word, word) for word in words if word not in QUANTITIES)
    return singular, next((number for number in numbers if number), None)


def all_meant(text, things, doubt):
    """Return all things that a phrase for several means; `doubt` as in `meant`."""
    if " and " in text:
        return [thing for part in text.split(" and ") for thing in meant(part, things, doubt)]
    singular, number = one_of(text)
    match singular.split():
        case [*description, "on" | "at", edge]:
            x, y = TOWARDS[edge]
            fit = [t for t in described(description, things) if (t.x - 0.5) * x + (t.y - 0.5) * y > -doubt]
        case _:
            fit = meant(singular, things, doubt)
    assert number in (None, len(fit)), text
    return fit


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[100, pytest.param(400, marks=pytest.mark.slow)])
def drawn(request):
    """Scenes, each with its background."""
    with pytest.MonkeyPatch.context() as patch:
        canvases = []
        original = scenes._background

        def keep(rng, side):
            canvas = original(rng, side)
            canvases[:] = [canvas.copy()]  # a scene may be drawn several times; the last time counts
            return canvas

        patch.setattr(scenes, "_background", keep)
        made = []
        for number in range(request.param):
            scene = make_scene(scene_rng(3, "train", number), SIDE)
            made.append((scene, cv2.resize(canvases[0], (SIDE, SIDE), interpolation=cv2.INTER_AREA)))
    return made


@pytest.fixture(scope="module")
def generated(drawn):
    return [scene for scene, _ in drawn]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("set") / "data", train=8, val=2, test=3, seed=5, side=64)


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- what the phrases mean -----------------------------------------------------------------------


def phrases_of(generated):
    for number, scene in enumerate(generated):
        for index, phrases in scene.phrases.items():
            for phrase in phrases:
                yield number, scene, scene.things[index], phrase


def test_every_phrase_means_its_target_and_nothing_else(generated):
    """Otherwise training data contradict each other, and correct predictions count as wrong."""
    wrong = []
    for number, scene, target, phrase in phrases_of(generated):
        could, plainly = meant(phrase.text, scene.things), meant(phrase.text, scene.things, -DOUBT)
        if could != [target] or plainly != [target]:
            wrong.append(f"scene {number}: {phrase.text!r} ({phrase.kind}): {len(could)} could be meant, {target}")
    assert not wrong, "\n".join(wrong[:10])


def test_the_noun_alone_is_never_enough(generated):
    """A model that uses only the shape must fail, or the scenes measure nothing."""
    for scene in generated:
        assert len(scene.phrases) >= 2
        for index, phrases in scene.phrases.items():
            assert sum(thing.shape == scene.things[index].shape for thing in scene.things) >= 2
            assert 1 <= len(phrases) <= 3
            assert len({phrase.kind for phrase in phrases}) == len(phrases)


def test_the_kind_of_a_phrase_is_what_identifies_its_target(generated):
    """Scores are reported by kind."""
    signs = {
        "ordinal": set(NUMBERS),
        "superlative": {"biggest", "largest", "smallest"},
        "relation": {"of", "above", "over", "below", "under", "next", "near", "closest"},
        "place": {*TOWARDS, "middle", "center"},
    }
    for _, _, _, phrase in phrases_of(generated):
        # In this order: "second star from left" and "star left of the ring" contain a word for a
        # place, too.
        kind = next((kind for kind, words in signs.items() if words & set(phrase.text.split())), "attribute")
        assert kind == phrase.kind, phrase


def test_all_five_kinds_of_phrase_are_common(generated):
    """A rare kind is neither learnt nor measured."""
    counts = Counter(phrase.kind for *_, phrase in phrases_of(generated))
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 0.05 * counts.total(), counts
    assert max(counts.values()) < 0.5 * counts.total(), counts


def test_the_interpreter_distinguishes_clear_and_doubtful_cases():
    """An interpreter that accepts everything would make the test above worthless."""

    def thing(x, y, colour="red", radius=0.1):
        return Thing("star", colour, "plain", "medium", x, y, radius, 0.0)

    left, middle, right = row = [thing(0.2, 0.5), thing(0.5, 0.5), thing(0.8, 0.5, "blue", 0.13)]
    assert meant("star on the left", row) == meant("3rd star from right", row) == [left]
    assert meant("star left of the blue star", row) == row[:2]
    assert meant("middle star", row) == meant("star closest to blue one", row) == [middle]
    assert meant("biggest star", row) == meant("blue thing", row) == [right]
    assert meant("red one", row) == [left, middle]
    assert meant("top star", row) == row
    assert meant("star at top left", row) == row[:2]
    assert meant("star at top left", row, -DOUBT) == []
    column = [thing(0.4, 0.1), thing(0.5, 0.9), thing(0.6, 0.5)]
    assert meant("middle star", column) == [column[2]]
    doubtful = [thing(0.1, 0.5), thing(0.2, 0.5), thing(0.6, 0.5)]  # the second in the row, the third in the image
    assert meant("star in the middle", doubtful) == doubtful[1:]


def may_be_meant(text, things):
    """Return the things that a phrase may mean, if it may also mean nothing.

    "The left star" of one star, or a star "next to" another thing, need not be there.
    """
    fits = meant(text, things)
    match [word for word in text.split() if word != "the"]:
        case [("top" | "bottom"), ("left" | "right"), *_] | [*_, "at", ("top" | "bottom"), ("left" | "right")]:
            return fits
        case [*description, "on", edge] if edge in TOWARDS:
            return on_edge(fits, description, edge, things)
        case [edge, *description] if edge in TOWARDS:
            return on_edge(fits, description, edge, things)
        case words if {"next", "near"} & {*words}:
            at = next(number for number, word in enumerate(words) if word in ("next", "near"))
            (landmark,) = described(words[at + 1 + (words[at] == "next") :], things)
            return [thing for thing in fits if gap(thing, landmark) < 0.25]
    return fits


def on_edge(fits, description, edge, things):
    if len(described(description, things)) > 1:
        return fits
    x, y = TOWARDS[edge]
    return [thing for thing in fits if (thing.x - 0.5) * x + (thing.y - 0.5) * y > -DOUBT]


@pytest.mark.parametrize("kind", PLURAL_KINDS)
def test_a_phrase_for_several_things_means_them_all_and_nothing_else(generated, kind):
    """Otherwise training data contradict each other, and correct predictions count as wrong."""
    phrases, wrong = [], []
    for number, scene in enumerate(generated):
        rng = np.random.default_rng([5, number])
        for _ in range(40):
            if found := plural_phrase(scene.things, kind, rng):
                phrase, targets = found
                assert phrase.kind == f"plural {kind}"
                phrases.append(phrase.text)
                for doubt in (DOUBT, -DOUBT):
                    means = all_meant(phrase.text, scene.things, doubt)
                    if {*map(id, means)} != {*map(id, targets)} or len(targets) < 2:
                        wrong.append(f"scene {number}: {phrase.text!r} at {doubt}: {means}, not {targets}")
    assert not wrong, "\n".join(wrong[:10])
    assert len({*phrases}) > len(generated) / 2, "few or no phrases would make the check above worthless"
    assert {word for text in phrases for word in text.split()} <= set(vocabulary())


@pytest.mark.parametrize("plural", [False, True])
@pytest.mark.parametrize("kind", ABSENT_KINDS)
def test_a_phrase_for_an_absent_thing_can_mean_nothing_in_the_scene(generated, kind, plural):
    """A model would otherwise learn that things are absent which are plainly there."""
    phrases, wrong = [], []
    for number, scene in enumerate(generated):
        rng = np.random.default_rng([3, number])
        for _ in range(10):
            phrase = absent_phrase(scene.things, kind, rng, plural=plural)
            if phrase is not None:
                assert phrase.kind == f"absent {kind}"
                phrases.append(phrase.text)
                if may_be_meant(one_of(phrase.text)[0] if plural else phrase.text, scene.things):
                    wrong.append(f"scene {number}: {phrase.text!r}")
    assert not wrong, "\n".join(wrong[:10])
    assert len({*phrases}) > len(generated), "few or no phrases would make the check above worthless"
    assert {word for text in phrases for word in text.split()} <= set(vocabulary())


def test_a_wrong_attribute_is_one_that_occurs_elsewhere_in_the_scene(generated):
    """Else a model tells absent things by words that fit nothing, without relating two words."""
    hard = total = 0
    for number, scene in enumerate(generated):
        phrase = absent_phrase(scene.things, "attribute", np.random.default_rng([4, number]))
        if phrase is not None:
            words = [word for word in phrase.text.split() if word != "the"]
            noun = words[-1] if words[-1] in SHAPES else "one"
            hard += all(
                described([word, "one"] if word != noun else [noun], scene.things) for word in [*words[:-1], noun]
            )
            total += 1
    assert hard > 0.9 * total > 0.5 * len(generated)


def test_the_vocabulary_is_complete_and_is_the_tiny_tokenizers(generated):
    """A word that is missing from the tiny tokenizer would be an unknown word."""
    words = vocabulary()
    assert words == sorted(set(words))
    assert words == resources.files("dcris.assets").joinpath("tiny_words.txt").read_text("utf-8").split()
    used = {word for *_, phrase in phrases_of(generated) for word in phrase.text.split()}
    for number, scene in enumerate(generated):
        for _, phrases in generalised_phrases(scene.things, np.random.default_rng([6, number])):
            used.update(word for phrase in phrases for word in phrase.text.split())
    assert used <= set(words)
    # "first" and "1st" are never used, since people say "leftmost". Another unused word would be a
    # dead branch; few scenes leave rare words out.
    if len(generated) >= 400:
        assert set(words) - used <= {"first", "1st", "fourth", "4th"}


# ---- what the images show ------------------------------------------------------------------------


def test_scenes_are_varied(generated):
    """A few repeated appearances would make the task trivial."""
    counts = Counter(len(scene.things) for scene in generated)
    assert set(counts) == set(range(3, 9))
    things = [thing for scene in generated for thing in scene.things]
    for name, values, least in (
        ("shape", SHAPES, 6),
        ("colour", COLOURS, 8),
        ("texture", TEXTURES, 3),
        ("size", SIZES, 3),
    ):
        shares = Counter(getattr(thing, name) for thing in things)
        assert set(shares) == set(values)
        assert len(values) >= least
        assert min(shares.values()) > 0.5 * len(things) / len(values), shares


def test_sizes_are_clearly_different(generated):
    """ "Big" is clearly bigger than "medium"."""
    radii = {
        size: [t.radius for scene in generated for t in scene.things if t.size == size]
        for size in ("small", "medium", "big")
    }
    assert max(radii["small"]) * 1.2 < min(radii["medium"])
    assert max(radii["medium"]) * 1.2 < min(radii["big"])


AREAS = {  # of a shape of radius 1, by the textbook formula
    "circle": math.pi * 0.95**2,
    "ring": math.pi * (1 - 0.5**2),
    "square": 1.7**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.1**2,
    "star": 5 * 1.15 * 0.5 * math.sin(math.pi / 5),
    "cross": 2 * 0.72 * 2 - 0.72**2,
    "heart": 180 * math.pi / 16**2 * 1.05**2,
}


def test_things_overlap_but_none_is_hidden(generated):
    """Without overlaps masks are too easy; a thing that is mostly hidden cannot be described."""
    whole = []
    for scene in generated:
        for index, thing in enumerate(scene.things):
            seen = np.count_nonzero(scene.owners == index) / SIDE**2
            whole.append(seen / (AREAS[thing.shape] * thing.radius**2))
    # At least 60% by the pixels it was drawn with; a corner may be outside the image, and small
    # things are coarse.
    assert min(whole) > 0.55
    assert max(whole) < 1.2  # OpenCV also fills the pixels that the outline touches
    assert np.mean(np.array(whole) < 0.9) > 0.04, "hardly anything is overlapped"
    assert np.median(whole) > 0.9

    def touches(owners):
        pairs = ((owners[1:], owners[:-1]), (owners[:, 1:], owners[:, :-1]))
        return any(((a != b) & (a >= 0) & (b >= 0)).any() for a, b in pairs)

    assert np.mean([touches(scene.owners) for scene in generated]) > 0.6


def test_masks_lie_where_their_things_are(generated):
    """Masks are neither shifted nor exchanged."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    pixel = 1.5 / SIDE
    for scene in generated[:150]:
        assert scene.image.shape == (SIDE, SIDE, 3)
        assert scene.image.dtype == np.uint8
        assert set(np.unique(scene.owners)) == {-1, *range(len(scene.things))}
        later = np.zeros((SIDE, SIDE), bool)
        for index, thing in reversed(list(enumerate(scene.things))):
            mask, away = scene.owners == index, np.hypot(x - thing.x, y - thing.y)
            assert (away[mask] < 1.3 * thing.radius + pixel).all()
            if thing.shape == "circle":  # exactly, except where later things cover it
                assert (away[mask] < 0.95 * thing.radius + pixel).all()
                assert (mask | later)[away < 0.95 * thing.radius - pixel].all()
            if thing.shape == "ring":
                assert (away[mask] > 0.5 * thing.radius - pixel).all()
                between = (away < thing.radius - pixel) & (away > 0.5 * thing.radius + pixel)
                assert (mask | later)[between].all()
            later |= mask


def test_masks_cover_what_was_drawn_and_the_rest_is_background(drawn):
    """Masks that disagree with the image would limit every score."""
    for scene, background in drawn[:150]:
        differs = (
            np.abs(scene.image.astype(int) - background).max(axis=2) > 25
        )  # the noise has a standard deviation of 4
        for index in range(len(scene.things)):
            # Not all pixels: the shade of a texture may equal the background.
            assert differs[scene.owners == index].mean() > 0.5
        # Each thing has a thin outline, half of which is outside the mask.
        empty = cv2.erode((scene.owners < 0).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
        assert differs[empty].mean() < 0.001


def test_colour_and_texture_match_the_words(generated):
    """ "Red" and "striped" are visible in the pixels."""
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    spreads = {texture: [] for texture in TEXTURES}
    for scene in generated[:150]:
        for index, thing in enumerate(scene.things):
            inner = cv2.erode((scene.owners == index).astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
            pixels = scene.image[inner].astype(float)
            order = np.argsort(pixels.mean(axis=1))
            # The shade of a texture is darker than the colour, except on black.
            at = 0.25 if thing.colour == "black" else 0.75
            colour = np.median(
                pixels[order[int(max(0, at - 0.15) * len(order)) : int((at + 0.15) * len(order)) + 1]], axis=0
            )
            assert names[int(np.abs(values - colour).sum(axis=1).argmin())] == thing.colour, (thing, colour)
            spreads[thing.texture].append(pixels.mean(axis=1).std())
    assert np.quantile(spreads["plain"], 0.95) < np.quantile(spreads["striped"], 0.05)
    assert np.quantile(spreads["plain"], 0.95) < np.quantile(spreads["dotted"], 0.05)


# ---- the same every time -------------------------------------------------------------------------


def test_a_scene_depends_on_seed_split_and_number_only(generated):
    """A data set of 10 scenes is the beginning of one of 1000."""
    again = make_scene(scene_rng(3, "train", 7), SIDE)
    assert np.array_equal(again.image, generated[7].image)
    assert np.array_equal(again.owners, generated[7].owners)
    assert (again.things, again.phrases) == (generated[7].things, generated[7].phrases)


def test_splits_seeds_and_the_pretraining_stream_share_nothing():
    """No test scene is used in training, neither of the adapters nor of the towers."""
    streams = (*itertools.product((0, 1), (*scenes.SPLITS, "pretraining")),)
    seen = Counter()
    for seed, split in streams:
        for number in range(8):
            seen.update(thing for thing in make_scene(scene_rng(seed, split, number), 56).things)
    assert max(seen.values()) == 1
    draws = {tuple(scene_rng(seed, split, n).integers(0, 2**32, 4)) for seed, split in streams for n in range(500)}
    assert len(draws) == len(streams) * 500


def test_the_same_seed_writes_the_same_bytes_whatever_the_number_of_processes(tmp_path):
    """The data do not depend on the number of cores."""
    # More than the 64 scenes that a process takes at a time.
    sizes = {"train": 60, "val": 2, "test": 6, "side": 56}
    done = []
    alone = content(write_scenes(tmp_path / "one", seed=2, **sizes, progress=done.append))
    assert done == list(range(1, 69))
    assert alone == content(write_scenes(tmp_path / "two", seed=2, **sizes, workers=2))
    other = content(write_scenes(tmp_path / "other", seed=3, **sizes))
    assert not {name for name in alone if alone[name] == other[name]}


def test_a_larger_set_begins_with_the_smaller(tmp_path, root):
    """More training scenes do not change the test split."""
    larger = write_scenes(tmp_path / "data", train=12, val=2, test=3, seed=5, side=64)
    for split, count in (("train", 20), ("val", 99), ("test", 99)):
        small, large = (load_references(where, "scenes").split(split)[:count] for where in (root, larger))
        for a, b in zip(small, large, strict=False):
            assert a.segmentations == b.segmentations
            assert [e.text for e in a.expressions] == [e.text for e in b.expressions]
            assert a.image_path.read_bytes() == b.image_path.read_bytes()


# ---- on disk -------------------------------------------------------------------------------------


def test_written_scenes_are_read_unchanged(root):
    """Masks, phrases and kinds are unchanged after writing and reading."""
    table = load_references(root, "scenes")
    assert (table.dataset, table.split_by) == ("scenes", "generated")
    assert list(table.splits()) == ["train", "val", "test"]
    instances = json.loads((root / "scenes/instances.json").read_bytes())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    image_ids, expressions = itertools.count(1), 0
    for split, count in (("train", 8), ("val", 2), ("test", 3)):
        for number in range(count):
            scene, image_id = make_scene(scene_rng(5, split, number), 64), next(image_ids)
            found = [reference for reference in table.references if reference.image_id == image_id]
            assert {reference.split for reference in found} == {split}
            stored = read_image(found[0].image_path).astype(float)
            assert np.abs(stored - scene.image).mean() < 8  # JPEG
            for (index, phrases), reference in zip(sorted(scene.phrases.items()), found, strict=True):
                mask = scene.owners == index
                assert reference.category == scene.things[index].shape
                assert reference.image_size == (64, 64)
                assert np.array_equal(union_mask(reference.segmentations, (64, 64)), mask)
                assert annotations[reference.ann_ids[0]]["area"] == mask.sum()
                assert tuple(annotations[reference.ann_ids[0]]["bbox"]) == mask_box(mask)
                assert [(e.text, e.kind) for e in reference.expressions] == [(p.text, p.kind) for p in phrases]
                expressions += len(phrases)
            of_image = [a for a in annotations.values() if a["image_id"] == image_id]
            assert len(of_image) == len(scene.things), "things without phrases are annotated, too"
    assert len(instances["images"]) == next(image_ids) - 1 == 13
    assert sum(count for _, count in table.splits().values()) == expressions


def test_generalised_scenes_have_phrases_for_several_objects_and_for_none_besides(tmp_path, root):
    """A model is compared on the same images and phrases with and without them; the true masks and
    what is absent must be what readers of gRefCOCO's layout understand.
    """
    out = write_scenes(tmp_path / "data", train=8, val=2, test=3, seed=5, side=64, generalised=True)
    plain, extended = (load_references(path, "scenes") for path in (root, out))
    assert {path: data for path, data in content(out).items() if path.endswith(".jpg")} == {
        path: data for path, data in content(root).items() if path.endswith(".jpg")
    }

    def told(table, count):
        return [
            (item.image_id, item.category, item.segmentations, [(each.text, each.kind) for each in item.expressions])
            for item in table.references
            if len(item.segmentations) == count
        ]

    assert told(extended, 1) == told(plain, 1)
    kinds = {
        count: Counter(
            each.kind for item in extended.references if len(item.segmentations) == count for each in item.expressions
        )
        for count in range(4)
    }
    assert set(kinds[0]) == {f"absent {kind}" for kind in ABSENT_KINDS}
    assert set(kinds[1]) == set(KINDS)
    assert set(kinds[2]) | set(kinds[3]) <= {f"plural {kind}" for kind in PLURAL_KINDS}
    made = {number: make_scene(scene_rng(5, "train", number), 64) for number in range(8)}
    several = [item for item in extended.split("train") if len(item.segmentations) > 1]
    assert len(several) == 8, "one for each scene"
    for item in several:
        (phrase,) = item.expressions
        scene = made[item.image_id - 1]
        mask = union_mask(item.segmentations, item.image_size)
        numbers = {scene.things.index(thing) for thing in all_meant(phrase.text, scene.things, DOUBT)}
        assert np.array_equal(mask.astype(bool), np.isin(scene.owners, [*numbers])), phrase


def test_a_split_may_be_empty(tmp_path):
    """The quickstart has no validation split."""
    write_scenes(tmp_path, train=1, val=0, test=1, side=56)
    assert list(load_references(tmp_path, "scenes").splits()) == ["train", "test"]


def test_a_complete_data_set_is_not_overwritten(tmp_path):
    """A second call with another seed would change data that results were measured on."""
    write_scenes(tmp_path, train=1, val=0, test=0, side=56)
    before = content(tmp_path)
    with pytest.raises(DcrisError, match="already contains generated scenes; choose another folder"):
        write_scenes(tmp_path, train=1, val=0, test=0, seed=1, side=56)
    assert content(tmp_path) == before


def test_an_interrupted_call_is_completed_by_the_next(tmp_path):
    """After Ctrl-C, the data set does not look complete, and the same call completes it."""
    sizes = {"train": 4, "val": 1, "test": 1, "seed": 9, "side": 56}

    def stop(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "cut", **sizes, progress=stop)
    assert len(content(tmp_path / "cut")) == 3
    with pytest.raises(DcrisError):
        load_references(tmp_path / "cut", "scenes")
    write_scenes(tmp_path / "cut", **sizes)
    assert content(tmp_path / "cut") == content(write_scenes(tmp_path / "whole", **sizes))


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"train": -1}, "must not be negative"),
        ({"train": 0, "val": 0, "test": 0}, "or all zero"),
        ({"side": 55}, "56 to 4096 pixels, and is 55"),
        ({"side": 4097}, "56 to 4096"),
        ({"seed": -1}, "seed of the scenes must be 0 or more, and is -1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, numbers, complaint):
    """The error names the number and its range, and no folder is created."""
    with pytest.raises(DcrisError, match=complaint):
        write_scenes(tmp_path / "data", **{"train": 1, "val": 0, "test": 0, "side": 56, **numbers})
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    """A file in place of the folder gives a sentence, not a traceback."""
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(DcrisError, match="data"):
        write_scenes(tmp_path / "data", train=1, val=0, test=0, side=56)


# ---- exchanged phrases ---------------------------------------------------------------------------


def test_exchanged_phrases_belong_to_another_object_of_the_same_scene(root):
    """The control for the use of the expression needs the expression of another object of the same
    image.
    """
    references = load_references(root, "scenes").references
    owner = {e.sent_id: reference for reference in references for e in reference.expressions}
    queries = exchange_expressions(references)
    for reference, expression in queries:
        assert owner[expression.sent_id].image_id == reference.image_id
        assert owner[expression.sent_id].ann_ids != reference.ann_ids
    # Every scene has at least two references, so none is left out, and every phrase occurs once.
    assert {reference.ref_id for reference, _ in queries} == {reference.ref_id for reference in references}
    assert sorted(expression.sent_id for _, expression in queries) == sorted(owner)


def test_a_reference_alone_in_its_image_has_no_phrase_to_exchange(root):
    """It would get its own phrase, which would falsify the control."""
    references = load_references(root, "scenes").references
    alone = references[0]
    others = [reference for reference in references if reference.image_id != alone.image_id]
    asked = exchange_expressions([alone, *others])
    assert alone.ref_id not in {reference.ref_id for reference, _ in asked}
    assert len(asked) == sum(len(reference.expressions) for reference in others)


def test_images_are_on_the_disk_before_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure, references without images would pass for a complete data set."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "_sync", synced.append)
    root = write_scenes(tmp_path, train=3, val=0, test=2, side=56)
    *before, last = synced
    assert {*root.rglob("*.jpg")} <= {*before}
    assert last.parent == root / "scenes"
    assert "refs(generated).p" in last.name
