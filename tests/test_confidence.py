"""What the scores tell: against counts by hand, and calibration on the command line."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcris import Segmenter
from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.evaluation.confidence import (
    TEMPERATURES,
    assess,
    auroc,
    best_cut,
    calibration_error,
    fit_temperature,
    presence_temperature,
    reliability,
)
from dcris.evaluation.evaluator import EvalResult
from made_results import made_result
from marks import slow_except
from test_scores import PHRASES, picture, saved, segmenter  # noqa: F401

PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.31, 0.5, 0.99, 1.0]), st.booleans()), min_size=1, max_size=25
)


def arrays(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in pairs], np.float64), np.array([right for _, right in pairs], np.bool_)


@given(PAIRS)
@settings(max_examples=100)
def test_auroc_counts_pairs(pairs: list[tuple[float, bool]]) -> None:
    """A right and a wrong one, in the right order; half for equal scores."""
    right, wrong = ([score for score, truth in pairs if truth is wanted] for wanted in (True, False))
    found = auroc(*arrays(pairs))
    if not right or not wrong:
        assert found is None
        return
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(right, wrong)]
    assert found == pytest.approx(sum(wins) / len(wins))


@given(PAIRS)
@settings(max_examples=100)
def test_the_calibration_error_is_that_of_ten_bins(pairs: list[tuple[float, bool]]) -> None:
    """The last bin includes 1; empty bins count nothing."""
    expected = 0.0
    bins = reliability(*arrays(pairs))
    for number in range(10):
        inside = [
            (score, right) for score, right in pairs if math.floor(score * 10) == number or (number == 9 and score == 1)
        ]
        if inside:
            mean, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            expected += len(inside) / len(pairs) * abs(mean - share)
    assert calibration_error(bins) == pytest.approx(expected)
    assert sum(each["count"] for each in bins) == len(pairs)


@given(PAIRS)
@settings(max_examples=100)
def test_no_other_cut_separates_better(pairs: list[tuple[float, bool]]) -> None:
    """The recommended minimum is the one that a search of all cuts finds."""
    scores, right = arrays(pairs)
    if right.all() or not right.any():
        return

    def separation(cut: float) -> float:
        return float((scores[right] >= cut).mean() + (scores[~right] < cut).mean())

    cut = best_cut(scores, right)
    assert 0 <= cut <= 1
    assert separation(cut) == pytest.approx(max(separation(value) for value in (*scores, 2.0)) if cut else 1.0)
    assert separation(cut) >= 1 - 1e-9


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=2, max_size=30), st.floats(*TEMPERATURES))
@settings(max_examples=200)
def test_no_other_temperature_fits_better(pairs: list[tuple[float, bool]], other: float) -> None:
    """By the cross entropy, within the range of temperatures."""

    def entropy(temperature: float) -> float:
        return sum(math.log1p(math.exp((-1 if right else 1) * logit / temperature)) for logit, right in pairs)

    fitted = fit_temperature(*arrays(pairs))
    assert TEMPERATURES[0] * 0.999 <= fitted <= TEMPERATURES[1] * 1.001
    assert entropy(fitted) <= entropy(other) + 1e-6 * len(pairs)


def test_a_known_temperature_is_found() -> None:
    """Probabilities that are too sure by a factor of 3 are corrected by it."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 20_000)
    right = random.random(20_000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(3 * logits, right) == pytest.approx(3, rel=0.05)


def with_scores(score: float, iou: tuple[int, int], present: float | None, there: bool) -> EvalResult:
    result = made_result(iou)
    segmentations = result.reference.segmentations if there else ()
    return replace(
        result, reference=replace(result.reference, segmentations=segmentations), score=score, present=present
    )


def test_what_the_scores_of_results_tell() -> None:
    """By hand: a mask is right above an IoU of 0.5, and never where there is no object."""
    results = [
        with_scores(0.9, (9, 10), 0.9, True),
        with_scores(0.6, (1, 2), 0.6, True),
        with_scores(0.7, (1, 1), 0.7, False),
        with_scores(0.1, (0, 5), 0.1, False),
    ]
    found = assess(results)
    assert found is not None
    assert found["score"]["auroc"] == 1.0
    assert found["present"]["auroc"] == 0.75
    assert found["present"]["ece"] == pytest.approx((0.1 + 0.4 + 0.7 + 0.1) / 4)
    assert found["min_score"] == {"value": 0.35, "kept": 1.0, "dropped": 0.5}
    assert "by_kind" not in found["present"]
    kinds = ["place", "plural pair", "absent place", "absent relation"]
    with_kinds = assess(
        [
            replace(each, expression=replace(each.expression, kind=kind))
            for each, kind in zip(results, kinds, strict=True)
        ]
    )
    assert with_kinds is not None
    assert with_kinds["present"]["by_kind"] == {"absent place": 0.5, "absent relation": 1.0}
    # A model without the head: right is what the IoU says.
    plain = assess([replace(result, present=None) for result in results])
    assert plain is not None
    assert "present" not in plain
    assert plain["min_score"] == {"value": 0.8, "kept": 1.0, "dropped": 1.0}
    assert assess([]) is None
    assert assess([replace(results[0], score=None), results[1]]) is None
    alike = assess(results[:1])
    assert alike is not None
    assert alike["score"]["auroc"] is None
    assert "min_score" not in alike
    assert presence_temperature(results[:2], 1.0) is None
    assert presence_temperature([replace(result, present=None) for result in results], 1.0) is None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes where every second reference of val and test is to nothing."""
    root = write_scenes(tmp_path_factory.mktemp("scenes") / "data", train=1, val=6, test=6, seed=2, side=56)
    path = root / "own.jsonl"
    rows = [
        {
            "image": reference.image_path.relative_to(root).as_posix(),
            "split": reference.split,
            "expressions": [each.text for each in reference.expressions],
            "mask": None if number % 2 else reference.segmentations[0],
        }
        for number, reference in enumerate(load_references(root, "scenes").references)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(model: Path, root: Path, *more: str) -> int:
    return main(["evaluate", str(model), "--data", str(root), "--split", "test", "--device", "cpu", *more])


def test_calibration_is_stored_with_the_checkpoint(
    segmenter: Segmenter,  # noqa: F811
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every later use has it, also a copy and an export; a second calibration changes nothing."""
    model = segmenter.save_pretrained(tmp_path / "model")
    before = [each.score for each in segmenter.predict(picture(), PHRASES)]
    outputs = [
        "--out",
        str(tmp_path / "r.json"),
        "--report",
        str(tmp_path / "r.html"),
        "--answers",
        str(tmp_path / "a.jsonl"),
    ]
    assert evaluate(model, root, *outputs) == 0
    plain = json.loads((tmp_path / "r.json").read_text())
    assert "temperature" not in plain
    assert not (model / "calibration.json").exists()

    assert evaluate(model, root, "--calibrate-on", "val", *outputs) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    stored = json.loads((model / "calibration.json").read_text())
    assert stored["temperature"] == record["temperature"] != 1
    assert (stored["split"], stored["dataset"]) == ("val", "own")
    assert record["confidence"]["present"]["auroc"] == pytest.approx(plain["confidence"]["present"]["auroc"])
    page = (tmp_path / "r.html").read_text()
    assert "Reliability" in page
    cut = record["confidence"]["min_score"]
    assert f"--min-score {cut['value']:.3g}, which keeps {cut['kept']:.1%} of the right ones" in page
    assert "&lt;" not in page, "no markup is shown as text"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(0 <= line["present"] <= 1 for line in lines)

    calibrated = Segmenter.from_pretrained(model, device="cpu")
    after = [each.score for each in calibrated.predict(picture(), PHRASES)]
    logits = [math.log(score / (1 - score)) / record["temperature"] for score in before]
    assert after == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits], abs=1e-5)
    copy = Segmenter.from_pretrained(calibrated.save_pretrained(tmp_path / "copy.safetensors"), device="cpu")
    assert [each.score for each in copy.predict(picture(), PHRASES)] == pytest.approx(after, abs=1e-6)
    shared = Segmenter.from_pretrained([model], device="cpu")
    shared.add_adapters("again", model)
    again, first = shared.predict(picture(), PHRASES, adapters="again"), shared.predict(picture(), PHRASES)
    assert [each.to_dict() for each in again] == [each.to_dict() for each in first]

    assert evaluate(model, root, "--calibrate-on", "val") == 0
    again = json.loads((model / "calibration.json").read_text())
    assert again["temperature"] == stored["temperature"], "or the checksum of the weights would change each time"

    capsys.readouterr()
    assert evaluate(tmp_path / "copy.safetensors", root, "--calibrate-on", "val") == 0
    assert "save_pretrained" in capsys.readouterr().err


@pytest.mark.parametrize("limit", slow_except([0.4, 0.7], 0.7))
def test_the_threshold_is_that_of_calibrated_scores(
    limit: float,
    segmenter: Segmenter,  # noqa: F811
    root: Path,
    tmp_path: Path,
) -> None:
    """A rule for "none" by the score sees calibrated probabilities in the evaluation, so the
    threshold is chosen with them: a second calibration chooses the same."""
    model, thresholds = segmenter.save_pretrained(tmp_path / "model"), []
    for _ in range(2):
        words = ("--calibrate-on", "val", "--protocol", "grefcoco", "--none-rule", f"score:{limit}")
        assert evaluate(model, root, *words, "--out", str(tmp_path / "r.json")) == 0
        thresholds.append(json.loads((tmp_path / "r.json").read_text())["threshold"])
    assert thresholds[0] == thresholds[1]


def test_a_split_without_absent_objects_calibrates_the_threshold_only(
    segmenter: Segmenter,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It cannot say how often a probability is right."""
    root = write_scenes(tmp_path / "data", train=1, val=2, test=2, side=56)
    model = segmenter.save_pretrained(tmp_path / "model")
    assert evaluate(model, root, "--calibrate-on", "val") == 0
    printed = capsys.readouterr()
    assert "not calibrated" in printed.err
    assert "temperature" not in json.loads(printed.out)
    assert not (model / "calibration.json").exists()


@pytest.mark.parametrize(
    "content",
    ["{}", "[1]", '{"temperature": "1"}', '{"temperature": 0}', '{"temperature": -2.0}', '{"temperature": 1e99}', "{"],
)
def test_a_malformed_calibration_is_named(
    saved: Path,  # noqa: F811
    tmp_path: Path,
    content: str,
) -> None:
    """A temperature of zero would divide by it."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(DcrisError, match=r"calibration\.json"):
        load_checkpoint(tmp_path)


def test_results_of_a_file_have_their_presence(root: Path, tmp_path: Path, capsys: Any, segmenter: Segmenter) -> None:  # noqa: F811
    """A report from answers is that of the evaluation; a probability above 1 is refused."""
    from dcris.data.dataset import all_queries
    from dcris.evaluation.protocols import Cris
    from dcris.evaluation.results import read_results

    model = segmenter.save_pretrained(tmp_path / "model")
    path = tmp_path / "a.jsonl"
    assert evaluate(model, root, "--answers", str(path), "--out", str(tmp_path / "r.json")) == 0
    queries = all_queries(load_references(root, "own").split("test"))
    results, _ = read_results(path, queries, Cris())
    expected, found = json.loads((tmp_path / "r.json").read_text())["confidence"], assess(results)
    assert found is not None
    assert found["present"]["auroc"] == pytest.approx(expected["present"]["auroc"])
    assert found["present"]["ece"] == pytest.approx(expected["present"]["ece"], abs=1e-4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"present": 1.5}), *lines[1:]]))
    with pytest.raises(DcrisError, match="line 1"):
        read_results(path, queries, Cris())
