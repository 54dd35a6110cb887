"""A protocol with its own metrics: one class and one entry, as in docs/extending_evaluation.md."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dcris.cli import main
from dcris.data.dataset import all_queries
from dcris.data.masks import decode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.data.transforms import Resize, Transform
from dcris.evaluation.metrics import MIOU, Metric
from dcris.evaluation.protocols import PROTOCOLS, RESULT_FIELDS, Protocol
from dcris.evaluation.resampling import Floats, resize_matrix
from pages import Page

# ---- what a user writes --------------------------------------------------------------------------


def _dice(overlaps):
    return 2 * overlaps.intersection / np.maximum(overlaps.intersection + overlaps.union, 1)


@dataclass(frozen=True)
class Bilinear(Protocol):
    """Images resized to the square, probabilities resized bilinearly, scored by Dice."""

    threshold: float = 0.4
    name = "bilinear"
    transform = Resize
    metrics = (
        Metric("mdice", "mDice", _dice, description="Dice coefficient, averaged over the expressions."),
        Metric(
            "odice",
            "oDice",
            lambda overlaps: 2 * overlaps.intersection,
            lambda overlaps: overlaps.intersection + overlaps.union,
        ),
        MIOU,
    )

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:
        """Interpolate to the image's own size."""
        rows, columns = (
            resize_matrix(cells, length, "bilinear", align_corners=False)
            for cells, length in zip(grid, transform.size, strict=True)
        )
        return rows, columns


# ---- what it gets --------------------------------------------------------------------------------

Run = Callable[..., int]
KEYS = ["mdice", "odice", "miou"]


@pytest.fixture
def dcris(monkeypatch: pytest.MonkeyPatch, scenes_root: Path) -> Run:
    """Return a function that runs a command with the protocol on the scenes' test split."""
    monkeypatch.setitem(PROTOCOLS, "bilinear", Bilinear())

    def run(*words: object) -> int:
        data = ("--data", scenes_root, "--dataset", "scenes", "--split", "test", "--protocol", "bilinear")
        return main([str(word) for word in (*words, *data)])

    return run


def test_a_model_is_evaluated_by_its_metrics(
    dcris: Run, trained_run: Path, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Result file, printed scores, intervals, groups, curve, report and threshold use them."""
    out, report, answers = tmp_path / "result.json", tmp_path / "report.html", tmp_path / "answers.jsonl"
    files = ("--out", out, "--report", report, "--answers", answers)
    assert dcris("evaluate", trained_run, *files, "--device", "cpu", "--calibrate-on", "val") == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert list(printed)[:4] == [*KEYS, "references"]
    assert printed["protocol"] == "bilinear"
    assert written.keys() - KEYS <= RESULT_FIELDS
    assert list(written["analysis"]["intervals"]) == KEYS
    assert set(written["analysis"]["by_length"][0]) == {"name", "expressions", "mdice", "odice", "intervals"}
    curve = written["analysis"]["curve"]
    assert list(curve) == ["thresholds", "mdice", "odice"]
    at = curve["thresholds"].index(printed["threshold"])
    assert printed["mdice"] == pytest.approx(curve["mdice"][at], abs=1e-6)

    # From the masks it predicted, by the definition of Dice.
    lines = {line["sent_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    values = []
    for reference, expression in all_queries(load_references(scenes_root, "scenes").split("test")):
        truth = union_mask(reference.segmentations, reference.image_size).astype(bool)
        mask = decode_mask(lines[expression.sent_id]["segmentation"], reference.image_size).astype(bool)
        values.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    assert printed["mdice"] == pytest.approx(100 * np.mean(values))

    words = Page(report.read_text()).text()
    for part in ("mDice", "Dice coefficient, averaged over the expressions.", "oDice", "mIoU", "by protocol bilinear"):
        assert part in words
    assert "Prec@" not in words


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("bilinear", (MIOU,), "has fewer than two metrics"),
        ("bilinear", (MIOU, Metric("miou", "Other", _dice)), "has a metric 'miou', which is the key of another"),
        ("bilinear", (MIOU, Metric("precision", "Precision", _dice)), "has a metric 'precision', which is a field"),
        ("other", Bilinear.metrics, "has the name 'other'"),
        *(
            ("bilinear", (MIOU, metric), "must compute a number for each expression")
            for metric in (
                Metric("mean", "Mean", lambda overlaps: overlaps.iou.mean()),
                Metric("found", "Found", lambda overlaps: overlaps.iou[overlaps.target]),
                Metric("odice", "oDice", lambda overlaps: overlaps.iou, lambda overlaps: overlaps.union.sum(axis=0)),
            )
        ),
    ],
)
def test_a_protocol_that_would_lose_scores_is_refused(
    name: str,
    metrics: tuple[Metric, ...],
    words: str,
    dcris: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is predicted: one of two equal keys would be lost; a mean has no interval."""
    monkeypatch.setattr(Bilinear, "name", name)
    monkeypatch.setattr(Bilinear, "metrics", metrics)
    assert dcris("evaluate", "tiny") == 2
    assert f"the protocol bilinear {words}" in capsys.readouterr().err


def test_masks_and_comparisons_are_scored_by_its_metrics(
    dcris: Run, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables of `dcris score` and `dcris compare` have each of its metrics."""
    answers, page = tmp_path / "answers.jsonl", tmp_path / "page.html"
    assert dcris("evaluate", trained_run, "--answers", answers, "--device", "cpu") == 0
    record = json.loads(capsys.readouterr().out)
    assert dcris("score", answers) == 0
    header, _, row = (line.strip("|").split("|") for line in capsys.readouterr().out.splitlines())
    assert [cell.strip() for cell in header[1:]] == ["mDice", "oDice", "mIoU"]
    assert [cell.strip() for cell in row[1:]] == [f"{record[key]:.2f}" for key in KEYS]

    assert dcris("compare", answers, answers, "--names", "a", "b", "--out", page) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["mDice", "oDice", "mIoU"]
    words = Page(page.read_text()).text()
    assert "By length of the expression: mDice" in words
    assert "mDice in percent" in words
