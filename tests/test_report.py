"""Reports: what they show, that they need nothing from outside, and that all text is escaped."""

import math
import shutil

import numpy as np
import pytest

from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation.analysis import analyse
from dcris.evaluation.metrics import Metric, summarise
from dcris.evaluation.report.charts import threshold_chart
from dcris.evaluation.report.evaluation_report import write_evaluation_report, write_report
from dcris.evaluation.report.panels import PREDICTION_COLOUR, TRUTH_COLOUR, NamedMask, Panel, make_panel, select_results
from dcris.utils.drawing import mask_cell
from made_results import drawn_result, made_result, rectangle
from pages import Page

RECORD = {
    "miou": 61.25,
    "oiou": 63.5,
    "prec@0.5": 71.0,
    "prec@0.9": 12.5,
    "miou_shuffled": 9.75,
    "references": 40,
    "expressions": 1234,
    "dataset": "scenes",
    "split": "test",
    "protocol": "cris",
}


@pytest.fixture
def report(tmp_path):
    def write(**given):
        arguments = {
            "title": "A run",
            "facts": {},
            "record": {},
            "log": [],
            "panels": {},
            "notes": [],
        }
        path = tmp_path / "deep" / "report.html"
        if isinstance(given.get("panels"), list):
            given["panels"] = {"Examples": given["panels"]}
        write_report(path, **(arguments | given))
        return Page(path.read_text(encoding="utf-8"))

    return write


def panel(side=112, expression="left star", truth=True, iou=0.5, shift=0):
    image = np.full((side, side * 3 // 2, 3), 128, np.uint8)
    mask = np.zeros(image.shape[:2], bool)
    mask[side // 4 : side // 2, side // 3 : side] = True
    return Panel(
        image, expression, mask if truth else None, (NamedMask("prediction", np.roll(mask, shift, axis=1), iou),)
    )


def group(name, miou, count, low=None, high=None):
    intervals = {} if low is None else {"miou": [low, high], "oiou": [low, high]}
    return {"name": name, "expressions": count, "miou": miou, "oiou": miou + 0.5, "intervals": intervals}


ANALYSIS = {
    "photographs": 90,
    "intervals": {"miou": [58.125, 64.5], "oiou": [60.0, 67.0], "prec@0.5": [-0.0, 100.0]},
    "by_kind": [group("place", 55.5, 200, 49.0, 61.75), group("ordinal", 33.25, 1500)],
    "by_length": [group("1-2 words", 44.125, 70, 40.0, 48.0)],
    "by_size": [],
    "curve": {"thresholds": [0.25, 0.5, 0.75], "miou": [50.0, 61.0, 40.0], "oiou": [51.0, 62.0, 41.0]},
}


def log(count):
    return [
        {"step": 20 * n, "loss": 1 / (n + 1), "lr": 1e-3, "iou": 3.0 * n, "val_first_miou": 2.0 * n}
        for n in range(count)
    ]


def full(report):
    return report(
        facts={"recipe": "scenes_tiny", "seconds": "93"},
        record={**RECORD, "analysis": ANALYSIS},
        log=log(50),
        panels=[panel(), panel(400, truth=False, iou=None)],
        notes=["A note."],
    )


def test_the_page_is_self_contained(report):
    page = full(report)
    assert page.links and page.is_self_contained()
    text = str(page.tags) + "".join(page.words)
    assert "http:" not in text and "https:" not in text


def test_the_page_states_what_was_measured(report):
    words = " ".join("".join(full(report).words).split())
    for part in (
        "Measured on 1,234 expressions for 40 references of scenes, test by protocol cris.",
        "61.2",
        "63.5",
        "71.0",
        "9.8",
        "exchanged for that of another object of its scene. Low is good",
        "Prec@0.9",
        "55.5",
        "1,500",
        "scenes_tiny",
        "93",
        "A note.",
        "95%: 58.1\u202f\u2013\u202f64.5".replace("\u202f", " "),
        "By length of the expression",
        "44.1",
        "bootstrap intervals over images, each drawn with all its expressions",
        "Score by threshold",
    ):
        assert part in words
    assert "By size of the object" not in words
    assert "bootstrap" not in " ".join(report(record=RECORD).words)


def test_a_report_without_content_is_a_page(report):
    page = report()
    assert "A run" in "".join(page.words)
    assert not page.named("img") and not page.named("svg") and not page.named("table") and not page.named("section")


def test_other_values_of_a_record_are_facts(report):
    rest = {"weights_sha256": "abcd", "version": "2", "seconds": 12345.6, "miou_by_kind": {"place": 77.7}}
    words = "".join(report(facts={"version": "1"}, record={**RECORD, **rest}).words)
    assert "weights sha256abcd" in words and words.count("version") == 1 and "seconds12,346" in words
    assert "77.7" not in words and "by kind" not in words


def iou(overlaps):
    return overlaps.iou


def test_hostile_text_is_escaped(report):
    evil = '<script>alert("1")</script>\'"&<img src=http://x.example/a onerror=alert(1)>'
    page = report(
        title=evil,
        facts={evil: evil},
        record={
            **RECORD,
            "dataset": evil,
            "split": evil,
            "protocol": evil,
            "prec@<b>": 1.0,
            evil: evil,
            "miou": evil,
            "analysis": {"by_kind": [group(evil, 1.0, 2)]},
        },
        panels={evil: [panel(expression=evil)]},
        notes=[evil],
        metrics=(
            Metric("miou", evil, iou, description=evil),
            Metric("oiou", "oIoU", iou),
            Metric("prec@<b>", evil, iou),
        ),
    )
    assert not page.named("script") and len(page.named("img")) == 3
    assert "".join(page.words).count(evil) >= 13
    assert page.named("img")[1]["alt"] == f"true mask for: {evil}"


def test_odd_characters(report):
    words = "".join(
        report(panels=[panel(expression="a\x00b\x1b\ud800c \N{HEBREW LETTER ALEF} \N{WHITE HEAVY CHECK MARK}")]).words
    )
    assert "\x00" not in words and "\x1b" not in words
    assert "\N{HEBREW LETTER ALEF} \N{WHITE HEAVY CHECK MARK}" in words


@pytest.mark.parametrize("side", [112, 300, 1000])
def test_masks_are_drawn_at_their_place(report, side):
    truth_and_prediction = panel(side, shift=side // 5)
    plain, truth, prediction = report(panels=[truth_and_prediction]).images()
    assert plain.shape == truth.shape == prediction.shape and max(plain.shape) <= 480
    for shown, mask, colour in (
        (truth, truth_and_prediction.truth, TRUTH_COLOUR),
        (prediction, truth_and_prediction.predictions[0].mask, PREDICTION_COLOUR),
    ):
        tint = 128 * 0.55 + np.array(colour) * 0.45
        found = np.abs(shown - tint).max(axis=2) < 12
        expected = mask_cell(mask, 480)
        assert (found & expected).sum() / (found | expected).sum() > 0.97
        moved = np.roll(expected, 4, axis=1)
        assert (found & moved).sum() / (found | moved).sum() < 0.97
    assert np.abs(plain.astype(int) - 128).max() < 3


def test_small_images_are_png_and_large_ones_jpeg(report):
    links = report(panels=[panel(100), panel(1000)]).links
    assert [link[11:15] for link in links] == ["png;"] * 3 + ["jpeg"] * 3


def test_without_truth(report):
    page = report(panels=[panel(truth=False, iou=None)])
    assert len(page.images()) == 2
    assert "truth" not in "".join(page.words) and "IoU" not in "".join(page.words)


@pytest.mark.parametrize(
    ("iou", "quality"), [(1.0, "good"), (0.7, "good"), (0.6, "fair"), (0.49, "poor"), (0.0, "poor")]
)
def test_badges(report, iou, quality):
    page = report(panels=[panel(iou=iou)])
    assert page.named("span")[-1]["class"] == f"badge {quality}"
    assert f"IoU {100 * iou:.1f}" in "".join(page.words)


def test_empty_full_and_extreme_panels(report):
    panels = [
        Panel(
            np.zeros((*shape, 3), np.uint8),
            "it",
            np.full(shape, value),
            (NamedMask("prediction", np.full(shape, not value), 0.0),),
        )
        for shape in [(1, 1), (1, 3000), (3000, 1), (112, 112)]
        for value in (True, False)
    ]
    page = report(panels=panels)
    assert len(page.images()) == 24
    assert "".join(page.words).count("prediction: empty") == 4


def test_a_mask_of_another_shape_raises():
    good = panel()
    with pytest.raises(ValueError, match="a panel's mask"):
        Panel(good.image, "x", None, (NamedMask("prediction", good.truth.T, None),))


@pytest.mark.parametrize("count", [1, 2, 7, 50, 20_000])
def test_curves_of_any_length(report, count):
    page = report(log=log(count))
    assert len(page.named("svg")) == 2
    coordinates = [float(attrs[key]) for attrs in page.named("circle") for key in ("cx", "cy")]
    for line in page.named("polyline"):
        coordinates += [float(number) for pair in line["points"].split() for number in pair.split(",")]
    assert coordinates and all(0 <= number <= 520 for number in coordinates)
    assert len(page.tags) < 2_000


def test_bars_show_their_intervals(report):
    page = report(record={**RECORD, "analysis": ANALYSIS})
    marks = [attrs["style"] for attrs in page.named("b") if "style" in attrs]
    assert marks == [
        "left:49.0%;width:12.8%",  # place
        "left:40.0%;width:8.0%",  # 1-2 words
        "left:0.0%;width:100.0%",  # over 0.5
    ]


@pytest.mark.parametrize("systems", [1, 2, 9])
def test_the_threshold_curve_shows_each_system(systems):
    curves = {f"<{number}>": ANALYSIS["curve"] for number in range(systems)}
    page = Page(threshold_chart(curves))
    words = " ".join(page.words)
    if systems == 1:
        assert "mIoU" in words and "oIoU" in words
    else:
        assert all(name in words for name in curves)
    assert len(page.named("polyline")) == max(2, systems)
    assert all(0 <= float(attrs["cx"]) <= 520 for attrs in page.named("circle"))


def test_examples_are_the_best_the_worst_and_random_ones():
    """Examples are the best, the worst and random ones, each heading on distinct images."""
    results = [made_result((share, 1000), image=share // 5) for share in range(100)]
    picked = select_results(results, 12)
    shown = {heading: [each.overlap.intersection for each in some] for heading, some in picked.items()}
    assert shown["The best"] == [99, 94, 89, 84]
    assert shown["The worst"] == [0, 5, 10, 15]
    between = shown["Drawn at random"]
    assert len(between) == 4 and between == sorted(between, reverse=True)
    for some in shown.values():
        assert len({share // 5 for share in some}) == 4
    everything = [share for some in shown.values() for share in some]
    assert len(set(everything)) == 12
    assert select_results(results, 12) == picked


def test_examples_of_few_or_equal_results():
    assert select_results([]) == {"Examples": []}
    some = [made_result((share, 3)) for share in (1, 3, 2)]
    assert select_results(some) == {"Examples": [some[1], some[2], some[0]]}
    equal = [made_result((0, 0), image=number) for number in range(40)]
    assert [len(shown) for shown in select_results(equal).values()] == [4, 4, 4]
    on_one = [made_result(image=1) for _ in range(40)]
    assert [len(shown) for shown in select_results(on_one).values()] == [1, 1, 1]


def test_a_panel_has_the_predicted_and_true_masks(tiny_refer):
    tiny_refer.write()
    reference = load_references(tiny_refer.root, "tiny").split("testA")[0]
    truth, other = rectangle((30, 40), 3, 2, 9, 12), rectangle((30, 40), 3, 2, 9, 7)
    shown = make_panel({"a": drawn_result(reference, 0, truth, truth), "b": drawn_result(reference, 0, other, truth)})
    assert shown.expression == "left one" and shown.image.shape == (30, 40, 3)
    assert [(guess.name, guess.iou) for guess in shown.predictions] == [("a", 1.0), ("b", 0.5)]
    for mask, expected in (
        (shown.truth, truth),
        (shown.predictions[0].mask, truth),
        (shown.predictions[1].mask, other),
    ):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_report_of_masks_without_a_model(tiny_refer, tmp_path, count):
    """Masks from files have no model and no run; there may be no or one result, and all may be
    empty."""
    tiny_refer.write()
    references = load_references(tiny_refer.root, "tiny").references
    results = [
        drawn_result(
            reference, number, rectangle(reference.image_size, 0, 0, 0, 0), rectangle(reference.image_size, 0, 0, 5, 5)
        )
        for reference in references
        for number in range(len(reference.expressions))
    ][:count]
    record = {**summarise(each.overlap for each in results), "analysis": analyse(results)}
    write_evaluation_report(tmp_path / "a.html", title="Theirs", results=results, record=record)
    page = Page((tmp_path / "a.html").read_text())
    assert page.is_self_contained()
    assert len(page.images()) == 3 * count
    assert page.text().count("prediction: empty") == count
    assert ("By length of the expression" in page.text()) == (count > 0)
    assert ("95%: 0.0" in page.text()) == (count == 5)  # on two images
    assert "recipe" not in page.text()


def test_several_predictions_are_shown_side_by_side(report):
    good = panel()
    predictions = (
        NamedMask("ours", good.truth, 1.0),
        NamedMask("<theirs>", ~good.truth, 0.25),
        NamedMask("empty one", good.truth & False, 0.0),
    )
    page = report(panels=[Panel(good.image, "left star", good.truth, predictions)])
    assert len(page.images()) == 5
    words = " ".join("".join(page.words).split())
    for part in ("ours IoU 100.0", "<theirs> IoU 25.0", "empty one: empty IoU 0.0"):
        assert part in words.replace("\u202f", " ")


def test_incomplete_logs(report):
    assert not report(log=[{"step": 1}, {"loss": 2.0}, {"step": 2, "loss": math.nan}]).named("svg")
    loss_only = report(log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": None}])
    assert len(loss_only.named("svg")) == 1 and len(loss_only.named("circle")) == 1


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-12, 1e9])
def test_a_constant_curve_has_an_axis(report, value):
    page = report(log=[{"step": step, "loss": value} for step in range(0, 100, 10)])
    labels = page.named("text")
    assert 4 < len(labels) < 25
    heights = {pair.split(",")[1] for pair in page.named("polyline")[0]["points"].split()}
    assert len(heights) == 1


def test_smoothing_does_not_lag(report):
    # Smoothing a straight line gives the same line, except near its ends.
    page = report(log=[{"step": step, "loss": 1000.0 - step} for step in range(1000)])
    points = np.array([pair.split(",") for pair in page.named("polyline")[0]["points"].split()], float)[30:-30]
    slope, offset = np.polyfit(points[:, 0], points[:, 1], 1)
    assert np.abs(slope * points[:, 0] + offset - points[:, 1]).max() < 0.2
    raw = np.array([[float(c["cx"]), float(c["cy"])] for c in page.named("circle")])
    assert np.abs(slope * raw[:, 0] + offset - raw[:, 1]).max() < 0.5


def test_values_that_are_not_finite(report):
    page = report(
        record={"miou": math.nan, "prec@0.5": math.inf, "analysis": {"by_kind": [group("place", math.nan, 0)]}}
    )
    words = "".join(page.words)
    assert "nan" not in words and "inf" not in words and "\N{EN DASH}" in words


def test_a_failed_write_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DcrisError, match="cannot write"):
        write_report(
            tmp_path / "file" / "report.html",
            title="x",
            facts={},
            record={},
            log=[],
            panels={},
            notes=[],
        )


def test_images_of_a_card_are_level(report, tmp_path):
    """A label of two lines would raise its image, and the object in it, above those beside it."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no Chromium")
    shown = panel()
    system = NamedMask("a system with a name of more than one line below an image", shown.truth, 1.0)
    report(panels=[Panel(shown.image, "star", shown.truth, (system,))])
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "deep/report.html").as_uri())
        tops = page.locator(".images img").evaluate_all(
            "images => images.map(each => each.getBoundingClientRect().top)"
        )
        browser.close()
    assert len(tops) == 3 and len(set(tops)) == 1
