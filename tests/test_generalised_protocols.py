"""The protocols of gRefCOCO, Ref-ZOM and R-RefCOCO against slow second implementations that follow
their authors' loops, and by hand where those decide between 0 and 1."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from torch.nn import functional as F

from dcris.cli import main
from dcris.data.dataset import all_queries
from dcris.data.masks import encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.data.transforms import Resize
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse, scores, tally
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.external_masks import score_masks
from dcris.evaluation.metrics import CURVE_THRESHOLDS, Overlap, Overlaps, known, overlap, summarise
from dcris.evaluation.none_rules import parse_none_rule
from dcris.evaluation.protocols import get_protocol
from dcris.types import Expression, Reference
from generalised import HEIGHT, LAYOUTS, WIDTH, grefcoco, refzom

RULES = ("head", "any-pixel", "pixels:50", "score:0.5")
every_rule = pytest.mark.parametrize("rule", RULES)
PROTOCOL_OF = {"grefcoco": "grefcoco", "ref-zom": "refzom", "rrefcoco": "rrefcoco"}


class Sample(NamedTuple):
    """One expression: masks on the compared pixels, and what the prediction says of presence."""

    prediction: np.ndarray
    truth: np.ndarray
    target: bool
    present: float
    score: float
    reference: int


def none_by(rule: str, sample: Sample) -> bool:
    pixels = int(sample.prediction.sum())
    decisions = {
        "head": sample.present < 0.5,
        "any-pixel": pixels == 0,
        "pixels:50": pixels < 50,
        "score:0.5": sample.score < 0.5,
    }
    return decisions[rule]


# ---- slow implementations ------------------------------------------------------------------------


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0


def slow_grefcoco(samples: Sequence[Sample], rule: str) -> dict[str, float]:
    """As gres_model/evaluation/refer_evaluation.py of ReLA: the rule takes the head's place."""
    sums, ious, counts = [0, 0], [], {"TP": 0, "FN": 0, "TN": 0, "FP": 0}
    at = {0.7: [], 0.8: [], 0.9: []}
    for each in samples:
        shared = int(np.logical_and(each.prediction, each.truth).sum())
        covered = int(np.logical_or(each.prediction, each.truth).sum())
        none = none_by(rule, each)
        if not each.target:
            counts["TP" if none else "FN"] += 1
            ious.append(1.0 if none else 0.0)
            sums[1] += 0 if none else covered
            continue
        counts["FP" if none else "TN"] += 1
        shared = 0 if none else shared
        iou = shared / covered if covered else 0.0
        ious.append(iou)
        sums = [sums[0] + shared, sums[1] + covered]
        for limit, found in at.items():
            found.append(iou >= limit)
    return {
        "giou": percent(ious),
        "ciou": 100 * sums[0] / sums[1] if sums[1] else 0.0,
        "n_acc": 100 * counts["TP"] / max(1, counts["TP"] + counts["FN"]),
        "t_acc": 100 * counts["TN"] / max(1, counts["TN"] + counts["FP"]),
        **{f"prec@{limit}": percent(found) for limit, found in at.items()},
    }


def blanked(sample: Sample, rule: str) -> np.ndarray:
    return np.zeros_like(sample.prediction) if none_by(rule, sample) else sample.prediction


def slow_refzom(samples: Sequence[Sample], rule: str) -> dict[str, float]:
    """As test.py of RIS-DMMI, with the masks that say none emptied before."""
    ious, accuracies, shared_sum, covered_sum = [], [], 0, 0
    for each in samples:
        prediction = blanked(each, rule)
        if not each.target:
            accuracies.append(1 if prediction.sum() == 0 else 0)
            continue
        shared, covered = (prediction & each.truth).sum(), (prediction | each.truth).sum()
        ious.append(shared / covered if covered else 0.0)
        shared_sum, covered_sum = shared_sum + shared, covered_sum + covered
    limits = (0.5, 0.6, 0.7, 0.8, 0.9)
    return {
        "oiou": 100 * shared_sum / covered_sum if covered_sum else 0.0,
        "miou": percent(ious),
        "acc": percent(accuracies),
        **{f"prec@{limit}": percent([iou >= limit for iou in ious]) for limit in limits},
    }


def slow_rrefcoco(samples: Sequence[Sample], rule: str) -> dict[str, float]:
    """As utils/validation.py of robust-ref-seg, reference by reference. Means leave out references
    without what they are about, of which that code makes NaN; precision is ours."""
    ious, robust, rates, every, total = [], [], [], [], [0, 0]
    for number in dict.fromkeys(each.reference for each in samples):
        mine = [each for each in samples if each.reference == number]
        positive, negative = ([each for each in mine if each.target == wanted] for wanted in (True, False))
        shared = covered = 0
        found = []
        for each in positive:
            prediction = blanked(each, rule)
            one, both = int((prediction & each.truth).sum()), int((prediction | each.truth).sum())
            found.append(one / both)
            shared, covered = shared + one, covered + both
        total = [total[0] + shared, total[1] + covered]
        right = 0
        for each in negative:
            pixels = int(blanked(each, rule).sum())
            right += pixels == 0
            covered += pixels
        if positive:
            ious.append(sum(found) / len(found))
            robust.append(shared / covered)
        if negative:
            rates.append(right / len(negative))
        every += found
    limits = (0.5, 0.6, 0.7, 0.8, 0.9)
    return {
        "riou": percent(robust),
        "mrr": percent(rates),
        "miou": percent(ious),
        "oiou": 100 * total[0] / total[1] if total[1] else 0.0,
        **{f"prec@{limit}": percent([iou >= limit for iou in every]) for limit in limits},
    }


SLOW: dict[str, Callable[[Sequence[Sample], str], dict[str, float]]]
SLOW = {"grefcoco": slow_grefcoco, "refzom": slow_refzom, "rrefcoco": slow_rrefcoco}


def judged(sample: Sample, protocol: str, rule: str, number: int = 1) -> EvalResult:
    """Return the result of a sample as our code measures it."""
    expression = Expression(number, f"thing {number}", exists=sample.target)
    name = Path(f"{sample.reference // 2}.jpg")  # two references in each image
    reference = Reference(
        sample.reference, (1,), 1, name, (480, 480), "thing", "val", ([[0, 0, 9, 0, 9, 9]],), (expression,)
    )
    counted = overlap(sample.prediction, sample.truth)
    chosen, query = get_protocol(protocol, rule), (reference, expression)
    pixels = int(sample.truth.sum())
    found = chosen.judge(counted, pixels, query, sample.present, sample.score)
    return EvalResult(reference, expression, found, None)


# ---- random samples ------------------------------------------------------------------------------


@st.composite
def many_samples(draw: st.DrawFn) -> list[Sample]:
    """Expressions of a few references on 10 x 12 pixels: masks of every overlap, some of them
    empty."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        left, top, width, height, shift = (draw(st.integers(0, 6)) for _ in range(5))
        target = draw(st.booleans())
        truth, prediction = np.zeros((10, 12), bool), np.zeros((10, 12), bool)
        if target:
            truth[top : top + 1 + height // 2, left : left + 1 + width] = True
        prediction[top : top + height, left + shift // 3 : left + width + shift] = True
        present, score = draw(st.sampled_from([0.0, 0.49, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.4, 0.5, 1.0]))
        found.append(Sample(prediction, truth, target, present, score, draw(st.integers(0, 4))))
    return found


@pytest.mark.parametrize("protocol", SLOW)
@every_rule
@given(samples=many_samples())
@settings(max_examples=20)
def test_scores_are_those_of_the_authors_loops(protocol: str, rule: str, samples: list[Sample]) -> None:
    """A wrong sign in one branch gives scores that no paper's compare with."""
    results = [judged(each, protocol, rule, number) for number, each in enumerate(samples)]
    metrics = get_protocol(protocol).metrics
    found = summarise((result.overlap for result in results), metrics)
    in_theirs = {key: value or 0.0 for key, value in found.items()}  # 0 where nothing counts
    assert in_theirs == pytest.approx(SLOW[protocol](samples, rule), abs=1e-9)
    assert list(found) == [metric.key for metric in metrics]


@pytest.mark.parametrize("protocol", SLOW)
@given(samples=many_samples())
@settings(max_examples=20)
def test_intervals_are_of_the_same_scores(protocol: str, samples: list[Sample]) -> None:
    """Sums by image must add up to the score, also where a mean is over references."""
    results = [judged(each, protocol, "any-pixel", number) for number, each in enumerate(samples)]
    metrics = get_protocol(protocol).metrics
    found = summarise((result.overlap for result in results), metrics)
    summed = scores(tally(results, metrics).sum(axis=0), metrics)
    assert dict(zip(found, map(known, summed.tolist()), strict=True)) == pytest.approx(found, abs=1e-9)
    curves = Overlaps.of([result.overlap] * 3 for result in results)
    for metric in metrics:
        assert [*map(known, metric.score(curves).tolist())] == pytest.approx([found[metric.key]] * 3, abs=1e-9)
    names = {group["name"]: group["expressions"] for group in analyse(results, metrics)["by_size"]}
    assert names.get("no target", 0) == sum(not each.target for each in samples)


# ---- by hand -------------------------------------------------------------------------------------


def square(side: int, pixels: int = 0) -> np.ndarray:
    """Return 480 x 480 with a square at the left top, and single pixels far from it."""
    mask = np.zeros((480, 480), bool)
    mask[:side, :side] = True
    mask[400, :pixels] = True
    return mask


EMPTY = square(0)


@pytest.mark.parametrize(
    ("sample", "rule", "none", "iou", "counts"),
    [
        # No target. Said none by the head, with and without pixels: IoU 1, nothing in the sums.
        (Sample(square(0, 30), EMPTY, False, 0.2, 1, 1), "head", True, 1.0, (0, 0)),
        (Sample(EMPTY, EMPTY, False, 0.2, 0, 1), "head", True, 1.0, (0, 0)),
        # Not said none by the head, with an empty mask: IoU 0, though both masks are empty.
        (Sample(EMPTY, EMPTY, False, 0.8, 0, 1), "head", False, 0.0, (0, 0)),
        (Sample(square(0, 30), EMPTY, False, 0.5, 1, 1), "head", False, 0.0, (0, 30)),
        # No target, with 1, 49, 50 and 51 pixels.
        (Sample(square(0, 1), EMPTY, False, 1, 1, 1), "pixels:50", True, 1.0, (0, 0)),
        (Sample(square(0, 49), EMPTY, False, 1, 1, 1), "pixels:50", True, 1.0, (0, 0)),
        (Sample(square(0, 50), EMPTY, False, 1, 1, 1), "pixels:50", False, 0.0, (0, 50)),
        (Sample(square(0, 51), EMPTY, False, 1, 1, 1), "pixels:50", False, 0.0, (0, 51)),
        (Sample(square(0, 1), EMPTY, False, 1, 1, 1), "any-pixel", False, 0.0, (0, 1)),
        (Sample(EMPTY, EMPTY, False, 1, 1, 1), "any-pixel", True, 1.0, (0, 0)),
        (Sample(square(0, 51), EMPTY, False, 1, 0.49, 1), "score:0.5", True, 1.0, (0, 0)),
        (Sample(square(0, 51), EMPTY, False, 1, 0.5, 1), "score:0.5", False, 0.0, (0, 51)),
        # A target of 100 pixels, of which 64 are found; said none, the union is that with the mask.
        (Sample(square(8), square(10), True, 0.8, 1, 1), "head", False, 0.64, (64, 100)),
        (Sample(square(8, 20), square(10), True, 0.4, 1, 1), "head", True, 0.0, (0, 120)),
        (Sample(EMPTY, square(10), True, 0.4, 1, 1), "head", True, 0.0, (0, 100)),
        (Sample(square(7), square(10), True, 1, 1, 1), "pixels:50", True, 0.0, (0, 100)),
    ],
)
def test_cases_of_grefcoco_by_hand(sample: Sample, rule: str, none: bool, iou: float, counts: tuple[int, int]) -> None:
    found = judged(sample, "grefcoco", rule).overlap
    assert (found.none, found.iou, (found.intersection, found.union)) == (none, iou, counts)


@pytest.mark.parametrize("protocol", SLOW)
@pytest.mark.parametrize(
    ("pixels", "rules"),
    [(0, ("any-pixel", "pixels:50")), (1, ("pixels:50",)), (49, ("pixels:50",)), (50, ()), (51, ())],
)
def test_pixels_of_an_absent_target_by_hand(protocol: str, pixels: int, rules: Sequence[str]) -> None:
    """By the rules named here the mask says none, which is right; otherwise its pixels count as
    union, and the expression as wrong."""
    metric = {"grefcoco": "n_acc", "refzom": "acc", "rrefcoco": "mrr"}[protocol]
    for rule in ("any-pixel", "pixels:50"):
        none = rule in rules
        found = judged(Sample(square(0, pixels), EMPTY, False, 1, 1, 1), protocol, rule).overlap
        assert (found.none, found.iou) == (none, float(none))
        assert (found.intersection, found.union) == (0, 0 if none else pixels)
        assert summarise([found], get_protocol(protocol).metrics)[metric] == 100 * none


@pytest.mark.parametrize("protocol", ["refzom", "rrefcoco"])
def test_where_none_empties_the_mask(protocol: str) -> None:
    """Elsewhere than in gRefCOCO, the union of a target said none is the target's own area, and an
    empty mask is right for an absent target whatever the head says."""
    wrong = judged(Sample(square(8, 20), square(10), True, 0.4, 1, 1), protocol, "head").overlap
    assert (wrong.intersection, wrong.union, wrong.none) == (0, 100, True)
    empty = judged(Sample(EMPTY, EMPTY, False, 0.9, 1, 1), protocol, "head").overlap
    assert (empty.none, empty.iou) == (True, 1.0)


def test_two_references_of_rrefcoco_by_hand() -> None:
    """One reference with IoUs of 0.64 and 1 and false positives of 36 pixels, one with a miss.

    rIoU: (64 + 100) / (100 + 100 + 36) and 0; mRR: 1 of 2, and no absent target in the second.
    """
    samples = [
        Sample(square(8), square(10), True, 1, 1, 1),
        Sample(square(10), square(10), True, 1, 1, 1),
        Sample(square(6), EMPTY, False, 1, 1, 1),
        Sample(EMPTY, EMPTY, False, 1, 1, 1),
        Sample(EMPTY, square(10), True, 1, 1, 2),
    ]
    results = [judged(each, "rrefcoco", "any-pixel", number) for number, each in enumerate(samples)]
    found = summarise((each.overlap for each in results), get_protocol("rrefcoco").metrics)
    assert found["riou"] == pytest.approx(100 * (164 / 236 + 0) / 2)
    assert found["mrr"] == pytest.approx(50)
    assert found["miou"] == pytest.approx(100 * (0.82 + 0) / 2)
    assert found["oiou"] == pytest.approx(100 * 164 / 300)
    assert found["prec@0.5"] == pytest.approx(100 * 2 / 3)


# ---- the truth, and masks of others --------------------------------------------------------------


def test_the_truth_of_grefcoco_is_drawn_on_the_square(tmp_path: Path) -> None:
    """Polygons become pixels after they are scaled; resizing the mask instead moves every edge."""
    layout = grefcoco()
    layout.instances["annotations"][0]["segmentation"] = [[2.31, 3.72, 12.64, 3.1, 11.8, 9.27, 2.9, 8.83]]
    references = load_references(layout.write(tmp_path), "grefcoco").references
    protocol, differences = get_protocol("grefcoco"), 0
    for reference in references:
        expected = np.zeros((480, 480), bool)
        for (polygon,) in reference.segmentations:
            height, width = reference.image_size
            scaled = [value * 480 / (width, height)[place % 2] for place, value in enumerate(polygon)]
            expected |= coco.decode(coco.merge(coco.frPyObjects([scaled], 480, 480))) > 0
        found = protocol.truth(reference, reference.expressions[0]).mask
        np.testing.assert_array_equal(found, expected)
        resized = protocol.to_canvas(union_mask(reference.segmentations, reference.image_size) > 0)
        differences += int((found != resized).sum())
    assert differences > 0


def test_a_very_long_image_takes_no_memory() -> None:
    """Scaled without a limit, a corner outside a strip of 1 x 1,000,000 pixels would be 10^9 pixels
    away, and pycocotools would allocate 80 GB."""
    polygon = [[0.0, -900_000.0, 900_000.0, 1.0, 0.0, 900_000.0]]
    found = get_protocol("grefcoco").rasterise((polygon,), (1, 1_000_000))
    assert found.shape == (480, 480)


def predictions(queries: Sequence[tuple[Reference, Expression]], seed: int) -> dict[int, dict[str, Any]]:
    """Return random entries of a result file by sentence: empty, wrong and nearly right masks."""
    source = np.random.default_rng(seed)
    entries = {}
    for reference, expression in queries:
        mask = union_mask(reference.targets(expression), reference.image_size) > 0
        kind = int(source.integers(5))
        if kind == 0:
            mask[:] = False
        elif kind == 1:
            mask = np.roll(mask, 3, 1)
        elif kind == 2:
            mask[:2, : int(source.integers(1, WIDTH))] = True
        entries[expression.sent_id] = {
            "sent_id": expression.sent_id,
            "segmentation": encode_mask(mask) if mask.any() or kind % 2 else None,
            "present": round(float(source.random()), 3),
            "score": round(float(source.random()), 3),
            "mask": mask,
        }
    return entries


def write_entries(entries: Mapping[int, Mapping[str, Any]], path: Path) -> Path:
    plain = [{key: value for key, value in entry.items() if key != "mask"} for entry in entries.values()]
    path.write_text(json.dumps(plain))
    return path


def on_square(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8), mode="P").resize((480, 480), Image.Resampling.NEAREST)
    return np.asarray(image) == 1


def score(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    assert main([str(word) for word in ("score", *words, "--format", "json")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dataset", LAYOUTS)
@every_rule
def test_masks_of_others_are_scored_by_every_rule(
    dataset: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dcris score` gives what the authors' loops give for the same files."""
    root = LAYOUTS[dataset]().write(tmp_path)
    table = load_references(root, dataset)
    for split in table.splits():
        queries = all_queries(table.split(split))
        for seed in range(4):
            entries = predictions(queries, seed)
            samples = []
            for reference, expression in queries:
                entry = entries[expression.sent_id]
                target = bool(reference.targets(expression))
                truth = union_mask(reference.targets(expression), reference.image_size) > 0
                prediction = entry["mask"]
                if dataset == "grefcoco":
                    truth = get_protocol("grefcoco").truth(reference, expression).mask
                elif dataset == "ref-zom" or not target:
                    truth = on_square(truth)
                if dataset != "rrefcoco" or not target:
                    prediction = on_square(prediction)
                samples.append(Sample(prediction, truth, target, entry["present"], entry["score"], reference.ref_id))
            name = PROTOCOL_OF[dataset]
            path = write_entries(entries, tmp_path / "theirs.json")
            given = ("--data", root, "--dataset", dataset, "--split", split, "--protocol", name, "--none-rule", rule)
            found = score(capsys, path, *given)
            expected = SLOW[name](samples, rule)
            assert {key: found[key] or 0.0 for key in expected} == pytest.approx(expected, abs=1e-9)
            assert (found["protocol"], found["none_rule"]) == (name, rule)


@pytest.mark.parametrize(
    ("dataset", "split", "empty"),
    [
        # Expressions without and with a target: 2 and 1. Empty masks are right for the two.
        ("grefcoco", "testA", {"giou": 200 / 3, "ciou": 0, "n_acc": 100, "t_acc": 0, "prec@0.9": 0}),
        # 1 and 1.
        ("ref-zom", "test", {"oiou": 0, "miou": 0, "acc": 100, "prec@0.5": 0}),
        # 2 and 3, in two references with some of each.
        ("rrefcoco", "val", {"riou": 0, "mrr": 100, "miou": 0, "oiou": 0, "prec@0.5": 0}),
    ],
)
@every_rule
def test_all_empty_and_perfect_submissions(
    dataset: str,
    split: str,
    rule: str,
    empty: dict[str, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Empty masks are right for every absent target and wrong for all others, by every rule; true
    masks are right for all."""
    root = LAYOUTS[dataset]().write(tmp_path / "data")
    queries = all_queries(load_references(root, dataset).split(split))
    given = ("--data", root, "--dataset", dataset, "--split", split, "--none-rule", rule)
    for expected in (empty, dict.fromkeys(empty, 100)):
        entries = {}
        for reference, expression in queries:
            mask = union_mask(reference.targets(expression), reference.image_size) > 0
            mask &= expected is not empty
            sure = float(mask.any())
            found = {"segmentation": encode_mask(mask), "present": sure, "score": sure}
            entries[expression.sent_id] = {"sent_id": expression.sent_id, **found}
        path = write_entries(entries, tmp_path / "theirs.json")
        found = score(capsys, path, *given, "--protocol", PROTOCOL_OF[dataset])
        assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_several_targets_and_crowds_by_hand(tmp_path: Path) -> None:
    """On the square of gRefCOCO, both people cover 11,520 + 32,256 - 2,304 pixels; the cup beside
    the crowd, which is no part of the target, 19,200, and the crowd itself 115,200."""
    references = {each.ref_id: each for each in load_references(grefcoco().write(tmp_path), "grefcoco").references}
    people, cups = references[1], references[5]
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[:, :20] = True
    cup = union_mask(cups.segmentations, cups.image_size) > 0
    right_person = union_mask(people.segmentations[1:], people.image_size) > 0
    entries = [
        {"sent_id": 10, "segmentation": encode_mask(right_person), "present": 0.9},
        {"sent_id": 11, "segmentation": encode_mask(right_person), "present": 0.1},
        {"sent_id": 50, "segmentation": encode_mask(cup | crowd), "present": 0.9},
    ]
    (tmp_path / "theirs.json").write_text(json.dumps(entries))
    queries = [(reference, expression) for reference in (people, cups) for expression in reference.expressions]
    assert [expression.sent_id for _, expression in queries] == [10, 11, 50]
    protocol = get_protocol("grefcoco")
    found = [each.overlap for each in score_masks(tmp_path / "theirs.json", queries, protocol)]
    assert [(each.intersection, each.union, each.none) for each in found] == [
        (32_256, 41_472, False),
        (0, 41_472, True),
        (19_200, 19_200 + 115_200, False),
    ]
    scores = summarise(found, protocol.metrics)
    assert scores["giou"] == pytest.approx(100 * (32_256 / 41_472 + 19_200 / 134_400) / 3)
    assert scores["ciou"] == pytest.approx(100 * (32_256 + 19_200) / (41_472 + 41_472 + 134_400))
    assert (scores["n_acc"], scores["t_acc"]) == (None, pytest.approx(200 / 3))
    assert (scores["prec@0.7"], scores["prec@0.8"]) == (pytest.approx(100 / 3), 0)


def test_a_rule_that_needs_more_than_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks without a presence probability cannot be judged by the head; the sentence says so."""
    root = grefcoco().write(tmp_path)
    entries = predictions(all_queries(load_references(root, "grefcoco").split("testA")), 0)
    path = write_entries(entries, tmp_path / "theirs.json")
    given = ["score", str(path), "--data", str(root), "--dataset", "grefcoco", "--split", "testA"]

    def refused(*words: str) -> str:
        assert main([*given, *words]) == 2
        return capsys.readouterr().err.strip()

    for entry in entries.values():
        del entry["present"]
    write_entries(entries, path)
    assert "no presence head; choose another rule, such as --none-rule pixels:50" in refused("--protocol", "grefcoco")
    for entry in entries.values():
        del entry["score"]
    write_entries(entries, path)
    assert "needs a 'score' for each mask" in refused("--protocol", "grefcoco", "--none-rule", "score:0.7")
    for value in (1.5, -1, "0.5", True, [0.5]):
        next(iter(entries.values()))["present"] = value
        write_entries(entries, path)
        assert "entry 1 has a 'present' that is not a number from 0 to 1" in refused("--protocol", "grefcoco")
    assert "the protocol lavt has no rule for absent targets" in refused("--protocol", "lavt", "--none-rule", "head")
    for rule in ("heads", "pixels:", "pixels:0", "pixels:-1", "pixels:1.5", "score:0", "score:nan", "score:2", ""):
        assert "there is no rule" in refused("--protocol", "grefcoco", "--none-rule", rule)


def test_classic_protocols_score_absent_targets_as_before(tmp_path: Path) -> None:
    """mIoU of LAVT gives no point for two empty masks, as in its own code."""
    root = grefcoco().write(tmp_path)
    queries = all_queries(load_references(root, "grefcoco").split("testA"))
    entries = [{"sent_id": expression.sent_id, "segmentation": None} for _, expression in queries]
    (tmp_path / "none.json").write_text(json.dumps(entries))
    results = list(score_masks(tmp_path / "none.json", queries, get_protocol("lavt")))
    assert [result.overlap for result in results[:2]] == [Overlap(0, 0)] * 2
    assert summarise((each.overlap for each in results), get_protocol("lavt").metrics)["miou"] == 0


def test_names_of_rules() -> None:
    for rule in (*RULES, "pixels:49", "score:0.75"):
        assert parse_none_rule(rule).name == rule
    assert parse_none_rule("pixels:1") == parse_none_rule("any-pixel")
    with pytest.raises(DcrisError, match="unknown protocol"):
        get_protocol("grefcocos", "head")


# ---- models --------------------------------------------------------------------------------------


def test_absent_targets_of_rrefcoco_are_measured_on_the_square() -> None:
    """RefSegformer counts false positives on its 480 x 480 output, not on the image."""
    logits = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    protocol = get_protocol("rrefcoco", "pixels:50").for_target(False)
    assert protocol.none_rule == parse_none_rule("pixels:50")
    (found,) = protocol.probabilities(logits[None, None], [Resize((60, 90), 112)])
    expected = F.interpolate(logits.double()[None, None], (480, 480), mode="bilinear", align_corners=True)[0, 0]
    np.testing.assert_array_equal(found > 0.5, expected > 0)
    assert protocol.rasterise((), (60, 90)).shape == (480, 480)
    assert protocol.for_target(True).rasterise(([[0, 0, 9, 0, 9, 9]],), (60, 90)).shape == (60, 90)


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_a_model_without_a_head_is_evaluated(
    dataset: str, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results, intervals, the curve, the report, the answers and their comparison agree."""
    root, name = LAYOUTS[dataset]().write(tmp_path), PROTOCOL_OF[dataset]
    split = "train"
    answers, out, report = tmp_path / "answers.jsonl", tmp_path / "out.json", tmp_path / "report.html"
    where = ["--data", str(root), "--dataset", dataset, "--split", split, "--protocol", name]
    rule = ["--none-rule", "pixels:50"]
    command = ["evaluate", str(trained_run), *where, "--device", "cpu"]
    written = ["--answers", str(answers), "--out", str(out), "--report", str(report)]
    assert main([*command, *rule, *written]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["none_rule"], found["protocol"]) == ("pixels:50", name)
    analysis = json.loads(out.read_text())["analysis"]
    assert len(analysis["curve"]["thresholds"]) == len(CURVE_THRESHOLDS)
    assert "pixels:50" in report.read_text()
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["none_rule"] for line in lines} == {"pixels:50"}
    assert all(len(entry) == 3 for line in lines for entry in line["curve"])
    other = tmp_path / "same.jsonl"
    other.write_bytes(answers.read_bytes())
    assert main(["compare", str(answers), str(other), *where, *rule, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    for metric in get_protocol(name).metrics:
        assert compared["systems"][0][metric.key] == pytest.approx(found[metric.key])
        assert compared["differences"][0][metric.key] == 0
    assert main(["compare", str(answers), str(other), *where, "--none-rule", "any-pixel"]) == 2
    assert "measured with the rule 'pixels:50' for absent targets, not 'any-pixel'" in capsys.readouterr().err
    if dataset == "grefcoco":
        assert main(command) == 2
        assert "the model has no presence head; choose another rule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"none": "yes"}, "has a 'none' that is not true or false"),
        ({"none_rule": 5}, "has a 'none_rule' that is not text"),
        ({"present": 2}, "has a 'present' that is not a number from 0 to 1"),
        ({"curve": [[0, 0]] * 19}, "intersection and union that are not numbers of pixels"),
        ({"curve": [[0, 0, 2]] * 19}, "'curve' whose third numbers are not 0 or 1"),
    ],
)
def test_malformed_answers_give_one_sentence(
    change: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = refzom().write(tmp_path)
    lines = []
    for reference, expression in all_queries(load_references(root, "ref-zom").split("test")):
        record = {"sent_id": expression.sent_id, "ref_id": reference.ref_id, "phrase": expression.text}
        record |= {"protocol": "refzom", "none_rule": "any-pixel", "none": True, "intersection": 0, "union": 0}
        record |= {"segmentation": encode_mask(np.zeros(reference.image_size)), "curve": [[0, 0, 1]] * 19}
        lines.append(record)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(map(json.dumps, lines)))
    bad.write_text("\n".join(map(json.dumps, [lines[0], lines[1] | change])))
    where = ["--data", str(root), "--dataset", "ref-zom", "--split", "test", "--protocol", "refzom"]
    assert main(["compare", str(good), str(bad), *where]) == 2
    complaint = capsys.readouterr().err.strip()
    assert sentence in complaint
    assert "line 2" in complaint
    assert len(complaint.splitlines()) == 1
