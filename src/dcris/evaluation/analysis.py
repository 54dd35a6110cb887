"""What is said of an evaluation beside its averages: intervals, groups of phrases, and the threshold curve.

The intervals are 95 per cent percentile intervals of the bootstrap [1]: the split is drawn anew, with replacement, `RESAMPLES`
times, and the middle 95 per cent of the scores that come out are the interval. What is drawn are photographs with all their
phrases, not phrases: those for one photograph, often for one object, succeed or fail together, and drawing them one by one
would make intervals that are too narrow. The intervals say how far a score depends on the choice of photographs. They know
nothing of what another training seed would give.

[1] B. Efron, R. Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13.

Shape letters: P photographs, R resamples, C columns of counts, M metrics, T thresholds.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.masks import mask_area
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import CURVE_THRESHOLDS, PRECISION_THRESHOLDS

Floats = NDArray[np.float64]

RESAMPLES = 1000
SEED = 0
"""Of the resamples: the same split gives the same intervals, and two systems are drawn the same photographs."""

METRICS = ("miou", "oiou", *(f"prec@{threshold}" for threshold in PRECISION_THRESHOLDS))
_COLUMNS = 4 + len(PRECISION_THRESHOLDS)
_DRAWN_AT_ONCE = 4_000_000  # photographs; 32 MB of weights


def analyse(answers: Sequence[EvalResult], inclusive: bool = False) -> dict[str, Any]:
    """Intervals, scores by group of phrases and threshold curve of an evaluation, as plain JSON data.

    Args:
        answers: what was predicted for a split, each with its overlap.
        inclusive: of precision, as of `metrics.summarise`.

    Returns a dict of
        photographs: how many there are to draw from.
        intervals: for each of METRICS its 95% interval [low, high], in percent. Empty below two photographs, which say nothing
            about how photographs differ.
        by_length, by_size, by_kind: lists of groups, each with `name`, `expressions`, `miou`, `oiou` and `intervals` of these
            two. Intervals are drawn from the photographs that have such a phrase. A group without phrases is left out.
        curve: `thresholds` with `miou` and `oiou` at each; left out where any answer comes without its curve.

    Raises DcrisError where a true mask cannot be decoded.
    """
    described = _describe([answers], inclusive)
    curve = _curve(answers)
    return described | ({"curve": curve} if curve else {})


def difference(
    answers: Sequence[EvalResult], baseline: Sequence[EvalResult], inclusive: bool = False
) -> dict[str, Any]:
    """How much better than a baseline a system is on the same expressions: its scores, in percentage points, minus the other's.

    The intervals are paired: both systems are scored on the same drawn photographs, so what makes a photograph hard for both
    cancels, and the interval is far narrower than two separate ones suggest. One without 0 in it is a difference that the
    choice of photographs does not explain.

    Returns METRICS, each with the difference, and `photographs`, `intervals`, `by_length`, `by_size` and `by_kind` as of
    `analyse`. Raises ValueError where the two did not answer the same expressions.
    """
    ordered = align(baseline, answers)
    total = _figures(_counts([answers, ordered], inclusive).sum(axis=0))
    return dict(zip(METRICS, total.tolist(), strict=True)) | _describe([answers, ordered], inclusive)


def best_threshold(answers: Sequence[EvalResult]) -> float:
    """That of CURVE_THRESHOLDS at which the mIoU is greatest; the lowest where several are.

    Raises ValueError where there are no answers, or they come without their curves.
    """
    curve = _curve(answers)
    if curve is None:
        raise ValueError("a threshold is chosen by answers that have their curves")
    return float(curve["thresholds"][int(np.argmax(curve["miou"]))])


def align(answers: Sequence[EvalResult], like: Sequence[EvalResult]) -> list[EvalResult]:
    """The answers in the order of another system's. Raises ValueError where those are not to the same expressions."""
    placed = {answer.expression.sent_id: answer for answer in answers}
    order = [answer.expression.sent_id for answer in like]
    if not len(answers) == len(placed) == len(order) or placed.keys() != set(order):
        raise ValueError("two systems are compared on the same expressions, each answered once")
    return [placed[sent_id] for sent_id in order]


# ---- intervals -----------------------------------------------------------------------------------------------------------


def tally(answers: Sequence[EvalResult], inclusive: bool = False) -> Floats:
    """Additive counts [P, C] of each photograph, in the order of the photographs' paths.

    The columns: expressions, their IoUs added up, intersections, unions, and expressions whose IoU is over each threshold, or
    at least it where `inclusive`.
    """
    names = [str(answer.reference.image_path) for answer in answers]
    photographs, owners = np.unique(np.array(names, np.str_), return_inverse=True)
    ious = np.array([answer.overlap.iou for answer in answers], np.float64)
    pixels = np.array([(answer.overlap.intersection, answer.overlap.union) for answer in answers], np.float64)
    over = (np.greater_equal if inclusive else np.greater)(ious[:, None], PRECISION_THRESHOLDS)
    sums = np.zeros((len(photographs), _COLUMNS))
    np.add.at(sums, owners, np.column_stack([np.ones_like(ious), ious, pixels.reshape(-1, 2), over]))
    return sums


def scores(counts: Floats) -> Floats:
    """Added counts [..., C] -> METRICS [..., M] in percent; no expressions give zeros."""
    expressions, ious, intersections, unions = np.moveaxis(counts[..., :4], -1, 0)
    over = np.moveaxis(counts[..., 4:], -1, 0)
    some = np.maximum(expressions, 1)
    return 100 * np.stack([ious / some, intersections / np.maximum(unions, 1), *(over / some)], axis=-1)


def resample(counts: Floats) -> Floats:
    """Counts [P, C] of photographs -> [R, C]: those of P photographs drawn with replacement, added up, R times."""
    photographs = len(counts)
    random = np.random.default_rng(SEED)
    rows = max(1, _DRAWN_AT_ONCE // photographs)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        chosen = random.integers(photographs, size=(size, photographs))
        # How often each photograph was drawn: a product with that is far quicker than adding up what was drawn.
        places = chosen + photographs * np.arange(size)[:, None]
        often = np.bincount(places.ravel(), minlength=size * photographs).reshape(size, photographs)
        drawn.append(often.astype(np.float64) @ counts)
    return np.concatenate(drawn)


def _counts(systems: Sequence[Sequence[EvalResult]], inclusive: bool) -> Floats:
    """The tallies of one system [P, C], or of two side by side [P, 2 C], so that both are drawn the same photographs."""
    return np.concatenate([tally(answers, inclusive) for answers in systems], axis=1)


def _figures(counts: Floats) -> Floats:
    """Added counts of one system [..., C] -> its metrics [..., M]; of two [..., 2 C] -> the first's minus the second's."""
    found = scores(counts[..., :_COLUMNS])
    return found - scores(counts[..., _COLUMNS:]) if counts.shape[-1] > _COLUMNS else found


def _intervals(counts: Floats, metrics: Sequence[str]) -> dict[str, list[float]]:
    if len(counts) < 2:
        return {}
    low, high = np.percentile(_figures(resample(counts)), [2.5, 97.5], axis=0)
    bounds = {name: [float(a), float(b)] for name, a, b in zip(METRICS, low, high, strict=True)}
    return {name: bounds[name] for name in metrics}


def _describe(systems: Sequence[Sequence[EvalResult]], inclusive: bool) -> dict[str, Any]:
    """Intervals and groups of one system's answers, or of two systems' difference, whose answers are in one order."""
    counts = _counts(systems, inclusive)
    described: dict[str, Any] = {"photographs": len(counts), "intervals": _intervals(counts, METRICS)}
    for grouping, groups in _groups(systems[0]).items():
        described[grouping] = [
            _group(name, [[answers[place] for place in places] for answers in systems], inclusive)
            for name, places in groups.items()
        ]
    return described


def _group(name: str, systems: Sequence[Sequence[EvalResult]], inclusive: bool) -> dict[str, Any]:
    counts = _counts(systems, inclusive)
    miou, oiou, *_ = _figures(counts.sum(axis=0)).tolist()
    found = {"name": name, "expressions": len(systems[0]), "miou": miou, "oiou": oiou}
    return {**found, "intervals": _intervals(counts, ("miou", "oiou"))}


def _curve(answers: Sequence[EvalResult]) -> dict[str, list[float]] | None:
    if not answers or any(len(answer.curve) != len(CURVE_THRESHOLDS) for answer in answers):
        return None
    ious = np.array([[overlap.iou for overlap in answer.curve] for answer in answers])  # [N, T]
    shared = [sum(answer.curve[place].intersection for answer in answers) for place in range(len(CURVE_THRESHOLDS))]
    unions = [sum(answer.curve[place].union for answer in answers) for place in range(len(CURVE_THRESHOLDS))]
    return {
        "thresholds": list(CURVE_THRESHOLDS),
        "miou": (100 * ious.mean(axis=0)).tolist(),
        "oiou": [100 * a / b if b else 0.0 for a, b in zip(shared, unions, strict=True)],
    }


# ---- groups --------------------------------------------------------------------------------------------------------------


_LENGTHS = {"1-2 words": 2, "3-5 words": 5, "6-10 words": 10, "11 words and more": sys.maxsize}
_SIZES = {"small": 32**2, "medium": 96**2, "large": sys.maxsize}
"""COCO's: the true mask's pixels on the photograph as it is, up to 32 x 32, up to 96 x 96, and more. They suit photographs of
640 pixels, as COCO's; where they are much larger or smaller, they say more about those than about the objects."""

_WORDS = {
    "place": """
        left right lft rt leftmost rightmost top bottom topmost bottommost upper lower uppermost highest lowest middle mid
        center centre central front back behind foreground background above below under underneath beneath beside near
        nearest next closest closer close far farther further farthest furthest between inside outside corner side edge end
        against across""",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth last",
    "attribute": """
        red green blue yellow orange purple violet pink brown black white grey gray silver gold golden beige tan cream maroon
        teal turquoise navy blonde blond brunette dark darker darkest bright colored coloured colorful colourful
        big bigger biggest large larger largest small smaller smallest little tiny huge giant tall taller tallest short shorter
        shortest long longer longest thin thick wide narrow fat skinny chubby round square
        wood wooden metal metallic plastic leather brick stone steel denim
        striped stripes stripe plaid checkered checked spotted spots polka floral patterned plain
        shirt tshirt shirts jacket coat sweater hoodie dress skirt jeans pants shorts suit tie hat cap helmet uniform jersey
        vest scarf boots shoes sunglasses
        old older young younger bald bearded beard empty full""",
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_COUNTED = re.compile(r"\b(?:\d*(?:1st|2nd|3rd|\dth)|(?:one|two|three|four|five|six|\d+) (?:in )?from)\b")


def phrase_kinds(text: str) -> tuple[str, ...]:
    """What a phrase uses to tell its object apart: those of "place", "ordinal" and "attribute" that its words speak for.

    Place words say where it stands; ordinals count ("third", "2nd", "two from left"); attributes are colours, sizes, materials,
    patterns, clothing and age. Words that as often name the object itself ("glass", "light") are left out. A phrase with none
    of them is "other". This looks words up and does not parse: the "back of the chair" counts as a place.
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("'", ""))
    kinds = {_KIND_OF[word] for word in words if word in _KIND_OF}
    if _COUNTED.search(" ".join(words)):
        kinds.add("ordinal")
    return tuple(kind for kind in _WORDS if kind in kinds) or ("other",)


def _groups(answers: Sequence[EvalResult]) -> dict[str, dict[str, list[int]]]:
    """For each way to group, its groups in order, each with the places in `answers` of its expressions."""
    references = {answer.reference.ref_id: answer.reference for answer in answers}
    # Once for a reference, which has several expressions: decoding takes longer than all else here.
    areas = {key: mask_area(reference.segmentation, reference.image_size) for key, reference in references.items()}
    kinds: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {name: [] for name in _LENGTHS}
    sizes: dict[str, list[int]] = {name: [] for name in _SIZES}
    for place, answer in enumerate(answers):
        expression = answer.expression
        lengths[_bin(len(expression.text.split()), _LENGTHS)].append(place)
        sizes[_bin(areas[answer.reference.ref_id], _SIZES)].append(place)
        for kind in [expression.kind] if expression.kind is not None else phrase_kinds(expression.text):
            kinds.setdefault(kind, []).append(place)
    in_order = dict(sorted(kinds.items(), key=lambda item: (item[0] == "other", item[0])))
    found = {"by_length": lengths, "by_size": sizes, "by_kind": in_order}
    return {way: {name: places for name, places in groups.items() if places} for way, groups in found.items()}


def _bin(value: int, limits: Mapping[str, int]) -> str:
    return next(name for name, limit in limits.items() if value <= limit)
