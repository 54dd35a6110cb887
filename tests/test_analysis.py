"""Intervals, groups and threshold curves, against slow references and values computed by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris.data.wording import expression_kinds
from dcris.errors import DcrisError
from dcris.evaluation import analysis
from dcris.evaluation.analysis import analyse, best_threshold, difference, resample, scores, tally
from dcris.evaluation.compare import as_latex, as_text, compare
from dcris.evaluation.evaluator import EvalResult
from dcris.evaluation.metrics import (
    CURVE_THRESHOLDS,
    GIOU,
    INCLUSIVE_METRICS,
    N_ACC,
    STANDARD_METRICS,
    Metric,
    Overlap,
    known,
    summarise,
)
from dcris.evaluation.protocols import RefZom
from dcris.evaluation.report.comparison_report import write_comparison_report
from dcris.evaluation.report.evaluation_report import write_report
from dcris.evaluation.report.html import DASH
from made_results import made_result

KEYS = [metric.key for metric in STANDARD_METRICS]
SHARES = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(lambda pair: (min(pair), max(pair)))


def mixed(seed: int, count: int = 40, images: int = 7) -> list[EvalResult]:
    """Return results of varied quality, several for an image."""
    random = np.random.default_rng(seed)
    unions = random.integers(1, 1000, count)
    shares = [(int(random.integers(0, union + 1)), int(union)) for union in unions]
    return [made_result(share, image=int(random.integers(images))) for share in shares]


def in_order(results: Sequence[EvalResult]) -> list[list[EvalResult]]:
    """Return the results of each image, in the order of the images' paths."""
    names = sorted({str(each.reference.image_path) for each in results})
    return [[each for each in results if str(each.reference.image_path) == name] for name in names]


# ---- intervals -----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(SHARES | st.just((7, 10)), st.integers(0, 4)), max_size=12),
    st.sampled_from([STANDARD_METRICS, INCLUSIVE_METRICS]),
)
@settings(max_examples=60)
def test_counts_by_image_add_up_to_the_scores(
    pairs: list[tuple[tuple[int, int], int]], metrics: tuple[Metric, ...]
) -> None:
    """The counts by image add up to the scores that the intervals belong to."""
    results = [made_result(share, image=image) for share, image in pairs]
    expected = summarise((each.overlap for each in results), metrics)
    found = dict(zip(KEYS, map(known, scores(tally(results, metrics).sum(axis=0), metrics).tolist()), strict=True))
    assert found == pytest.approx(expected)
    assert len(tally(results)) == len({image for _, image in pairs})


def test_intervals_equal_those_of_a_plain_loop() -> None:
    """Compare with drawing images one by one, with the same indices, and averaging as an
    evaluation does."""
    results = mixed(0)
    images = in_order(results)
    chosen = np.random.default_rng(analysis.SEED).integers(len(images), size=(1000, len(images)))
    rows = []
    for row in chosen:
        drawn = [each for place in row for each in images[place]]
        rows.append(list(summarise(each.overlap for each in drawn).values()))
    low, high = np.percentile(rows, [2.5, 97.5], axis=0)
    found = analyse(results)["intervals"]
    assert list(found) == KEYS
    np.testing.assert_allclose(list(found.values()), np.stack([low, high], axis=1), rtol=1e-9)


def test_paired_intervals_equal_those_of_a_plain_loop() -> None:
    """Both systems are scored on the same drawn images, whatever the order of their results."""
    ours = mixed(1)
    random = np.random.default_rng(2)
    theirs = [
        replace(each, overlap=Overlap(int(random.integers(0, each.overlap.union + 1)), each.overlap.union))
        for each in ours
    ]
    chosen = np.random.default_rng(analysis.SEED).integers(7, size=(1000, 7))
    rows = []
    for row in chosen:
        one, other = (
            list(summarise(each.overlap for place in row for each in in_order(system)[place]).values())
            for system in (ours, theirs)
        )
        rows.append(np.subtract(one, other))
    found = difference(ours, theirs[::-1])
    np.testing.assert_allclose(list(found["intervals"].values()), np.percentile(rows, [2.5, 97.5], axis=0).T, atol=1e-9)
    gained = summarise(e.overlap for e in ours)["miou"] - summarise(e.overlap for e in theirs)["miou"]
    assert found["miou"] == pytest.approx(gained)


def test_expressions_of_one_image_are_drawn_together() -> None:
    """Drawing expressions one by one would claim too narrow an interval for 100 expressions on
    two images."""
    results = [made_result((image, 1), image=image) for image in (0, 1) for _ in range(50)]
    assert analyse(results)["intervals"]["miou"] == [0.0, 100.0]


def test_intervals_cover_the_mean_at_their_level() -> None:
    """An interval contains the true mean in nearly 95% of 300 splits.

    Expressions of one image are alike.
    """
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        quality = random.beta(2, 2, size=80).repeat(3)
        results = tally_of(quality, np.arange(80).repeat(3))
        low, high = np.percentile(scores(resample(results))[:, 0], [2.5, 97.5])
        covered += low <= 50 <= high
    assert 0.91 <= covered / 300 <= 0.98


def tally_of(ious: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return what `tally` returns for such IoUs, without making results."""
    columns = np.column_stack(
        [np.ones_like(ious), ious, ious, np.ones_like(ious), *(ious > t for t in np.r_[5:10] / 10)]
    )
    sums = np.zeros((images.max() + 1, columns.shape[1]))
    np.add.at(sums, images, columns)
    return sums


def test_a_large_split_is_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing all resamples of a training split at once would need gigabytes."""
    counts = tally(mixed(4))
    whole = resample(counts)
    monkeypatch.setattr(analysis, "_DRAWN_AT_ONCE", 50)
    parts = resample(counts)
    assert whole.shape == parts.shape == (1000, counts.shape[1])
    np.testing.assert_allclose(whole, parts)


def test_differences_of_equal_and_better_systems() -> None:
    """A system equals itself, and a constant improvement has an interval of width 0."""
    results = [made_result((share, 100), image=share) for share in range(0, 80, 4)]
    same = difference(results, results)
    assert same["miou"] == 0
    assert same["intervals"]["oiou"] == [0, 0]
    better = [replace(each, overlap=Overlap(each.overlap.intersection + 10, 100)) for each in results]
    found = difference(better, results)
    assert found["intervals"]["miou"] == pytest.approx([10, 10])
    assert found["by_length"][0]["miou"] == pytest.approx(10)
    low, high = analyse(results)["intervals"]["miou"]
    assert high - low > 10


def test_systems_of_different_expressions_raise() -> None:
    """Results of different splits cannot be compared."""
    results = mixed(5)
    for others in (results[1:], [*results[1:], made_result()], [*results[1:], results[1]]):
        with pytest.raises(ValueError, match="the same expressions"):
            difference(results, others)


def test_few_or_no_results() -> None:
    """One image gives no interval; empty masks and no results give valid JSON."""
    one = analyse([made_result((1, 4)), made_result((3, 4))])
    assert one["photographs"] == 1
    assert one["intervals"] == {}
    assert one["by_length"] == [{"name": "1-2 words", "expressions": 2, "miou": 50, "oiou": 50, "intervals": {}}]
    assert analyse([]) == {"photographs": 0, "intervals": {}, "by_length": [], "by_size": [], "by_kind": []}
    zero = analyse([made_result((0, 0), image=image) for image in range(3)])
    assert zero["intervals"]["miou"] == [0, 0]
    assert "oiou" not in zero["intervals"], "there is no union"
    assert difference([], [])["miou"] is None
    for found in (one, zero):
        json.dumps(found, allow_nan=False)


# ---- groups and curve ----------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    """Groups at the limits of length and size, overlapping kinds, and no empty groups."""
    results = [
        made_result((1, 2), image=1, expression="left one", area=32**2),
        made_result((1, 4), image=2, expression="second red cup from left", area=32**2 + 1),
        made_result((0, 2), image=3, expression="the very tall man over there", area=96**2),
        made_result((3, 4), image=4, expression="it", area=96**2 + 1),
    ]
    found = analyse(results)

    def short(way: str) -> dict[str, tuple[int, float, float]]:
        return {row["name"]: (row["expressions"], row["miou"], pytest.approx(row["oiou"])) for row in found[way]}

    assert short("by_length") == {
        "1-2 words": (2, 62.5, 100 * 4 / 6),
        "3-5 words": (1, 25, 25),
        "6-10 words": (1, 0, 0),
    }
    assert short("by_size") == {"small": (1, 50, 50), "medium": (2, 12.5, 100 / 6), "large": (1, 75, 75)}
    assert short("by_kind") == {
        "attribute": (2, 12.5, 100 / 6),
        "ordinal": (1, 25, 25),
        "place": (2, 37.5, 100 / 3),
        "other": (1, 75, 75),
    }
    assert list(short("by_kind"))[-1] == "other"
    low, high = found["by_length"][0]["intervals"]["miou"]
    assert (low, high) == (50, 75)  # of these two images alone
    assert found["by_length"][1]["intervals"] == {}


def test_a_generated_expression_keeps_its_kind() -> None:
    """The kind recorded with a generated expression counts, not its words."""
    results = [
        made_result(expression="star left of the ring", kind="relation"),
        made_result(expression="red <b>", kind="<b>"),
    ]
    assert [row["name"] for row in analyse(results)["by_kind"]] == ["<b>", "relation"]


@pytest.mark.parametrize(
    ("phrase", "kinds"),
    [
        ("left slice", "place"),
        ("Guy on the LEFT", "place"),
        ("3rd from the right", "place ordinal"),
        ("two from left", "place ordinal"),
        ("second to last giraffe", "ordinal"),
        ("12th man, 21st row", "ordinal"),
        ("two men", "other"),
        ("man in t-shirt", "attribute"),
        ("the girl's red umbrella", "attribute"),
        ("bottom-left big orange", "place attribute"),
        ("leftovers in a redder dish", "other"),
        ("giraffe", "other"),
        ("", "other"),
        ("\N{CJK UNIFIED IDEOGRAPH-5DE6}", "other"),
        ("9" * 50_000 + " from " * 9, "ordinal"),
    ],
)
def test_kinds_of_expressions(phrase: str, kinds: str) -> None:
    """Expressions of RefCOCO in any case and punctuation; parts of words do not count."""
    assert expression_kinds(phrase) == tuple(kinds.split())


def test_sizes_of_polygons_and_mask_files(tmp_path: Path) -> None:
    """Polygons and mask files have the size of their object on the image."""
    Image.new("L", (1000, 1000), 255).save(tmp_path / "mask.png")
    polygon = [[10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0]]
    results = [made_result(), made_result()]
    results[0] = replace(results[0], reference=replace(results[0].reference, segmentations=(polygon,)))
    results[1] = replace(results[1], reference=replace(results[1].reference, segmentations=(tmp_path / "mask.png",)))
    assert [row["name"] for row in analyse(results)["by_size"]] == ["small", "large"]


def test_intervals_and_differences_use_the_protocols_metrics() -> None:
    """Intervals and differences use the protocol's metrics: LAVT counts an IoU of exactly 0.5."""
    results = [made_result((1, 2), image=image) for image in range(3)]
    nothing = [replace(each, overlap=Overlap(0, 2)) for each in results]
    for metrics, share in ((STANDARD_METRICS, 0), (INCLUSIVE_METRICS, 100)):
        assert analyse(results, metrics)["intervals"]["prec@0.5"] == [share, share]
        assert difference(results, nothing, metrics)["prec@0.5"] == share
        assert compare({"a": nothing, "b": results}, metrics)["systems"][1]["prec@0.5"] == share


def test_resamples_without_an_absent_target_do_not_count_for_its_metric() -> None:
    """A model that recognised both absent targets of a split had an N-acc of 100 with the interval
    [0, 100]: in one of seven resamples there is no absent target, which counted as 0."""
    absent = Overlap(0, 0, target=False, none=True)
    results = [made_result((1, 2), image=image) for image in range(20)]
    results[3:5] = [replace(each, overlap=absent) for each in results[3:5]]
    found = analyse(results, (GIOU, N_ACC))["intervals"]
    assert found["n_acc"] == [100, 100]
    assert found["giou"][0] < found["giou"][1]
    wrong = [*results[:3], replace(results[3], overlap=replace(absent, none=False, union=9)), *results[4:]]
    assert difference(results, wrong, (GIOU, N_ACC))["intervals"]["n_acc"] == [0, 100]
    everywhere = [made_result((1, 2), image=image) for image in range(3)]
    assert [*analyse(everywhere, (GIOU, N_ACC))["intervals"]] == ["giou"], "nothing is known of absent targets"


def test_a_report_has_no_score_where_nothing_counts(tmp_path: Path) -> None:
    """By Ref-ZOM's protocol, the expressions without a target had 0% oIoU and mIoU in the report,
    as if the model failed on them, and a split without any had 0% of them recognised."""
    metrics, file = RefZom.metrics, tmp_path / "report.html"
    plain = [made_result((1, 2), image=image) for image in range(3)]
    absent = [
        replace(
            each, reference=replace(each.reference, segmentations=()), overlap=Overlap(0, 0, target=False, none=True)
        )
        for each in [made_result(image=image) for image in range(2)]
    ]
    for results, unknown, end in (([*plain, *absent], ">no target<", "</tr>"), (plain, ">Acc<", "</div>")):
        record = {**summarise((each.overlap for each in results), metrics), "analysis": analyse(results, metrics)}
        write_report(file, title="", facts={}, record=record, log=(), panels={}, notes=(), metrics=metrics)
        after = file.read_text(encoding="utf-8").partition(unknown)[2]
        assert f">{DASH}<" in after.partition(end)[0]
        compared = compare({"a": results, "b": results}, metrics)
        write_comparison_report(file, title="", comparison=compared, measured={}, panels={}, metrics=metrics)
        page = file.read_text(encoding="utf-8").partition("<body")[2]
        assert f">{DASH}" in page and ">nan" not in page
    assert analyse([*plain, *absent], metrics)["by_size"][-1]["miou"] is None


def test_a_score_that_nothing_counts_for_is_none_everywhere() -> None:
    """N-acc without absent targets was 0 in result files and comparisons, as if all were missed,
    and a threshold was chosen by scores that were all 0."""
    curve = tuple(Overlap(1, 2) for _ in CURVE_THRESHOLDS)
    results = [replace(made_result((1, 2), image=image), curve=curve) for image in range(3)]
    assert summarise((each.overlap for each in results), (GIOU, N_ACC)) == {"giou": 50, "n_acc": None}
    found = compare({"a": results, "b": results}, (N_ACC, GIOU))
    for described in (*found["systems"], *found["differences"]):
        assert described["n_acc"] is None
        assert {group["n_acc"] for group in described["by_kind"]} == {None}
    assert set(found["systems"][0]["curve"]["n_acc"]) == {None}
    json.dumps(found, allow_nan=False)
    assert as_text(found, (GIOU, N_ACC)).splitlines()[-1].split() == ["N-acc", "-", "-", "-"]
    assert r"a & 50.0 & - \\" in as_latex(found, (GIOU, N_ACC))
    with pytest.raises(DcrisError, match="no expression counts for N-acc"):
        best_threshold(results, (N_ACC, GIOU))


def test_the_threshold_curve() -> None:
    """Each threshold's scores are those of its masks; without all curves there is no curve."""
    count = len(CURVE_THRESHOLDS)
    results = [
        replace(made_result(), curve=tuple(Overlap(number, 20) for number in range(count))),
        replace(made_result(), curve=tuple(Overlap(number, 40) for number in range(count))),
    ]
    curve = analyse(results)["curve"]
    assert curve["thresholds"] == [pytest.approx(0.05 * number) for number in range(1, 20)]
    for number in range(count):
        expected = summarise(each.curve[number] for each in results)
        assert curve["miou"][number] == pytest.approx(expected["miou"])
        assert curve["oiou"][number] == pytest.approx(expected["oiou"])
    assert "curve" not in analyse([*results, made_result()])
