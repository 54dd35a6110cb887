"""What `score`, `present` and the minima mean, in the Python API, on the command line and on the
page.
"""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from dcris import Prediction, Segmenter
from dcris.cli import main
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries, normalise, to_square
from dcris.data.masks import decode_mask
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.data.tokenizer import tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.inference.export_onnx import export_onnx
from dcris.inference.web.app import _render, _rows
from dcris.inference.web.service import Session
from dcris.training.trainer import build_model
from models import randomise
from runs import CPU, quick_config, small_network
from servers import post
from test_export import REPOSITORY, example
from test_web import served

PHRASES = ["red circle", "the small striped ring", "leftmost", "big star on the right"]
MAPS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.floats(0, 1, width=32, allow_subnormal=False),
)


def config_with_presence() -> RunConfig:
    # A positive bias of the masks, so that none is empty.
    settings = ("train.precision", '"float32"'), ("model.head.bias", "1.5")
    return replace(quick_config(1, *settings, recipe="dcris_tiny_generalised"), small_network())


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """An untrained model whose probabilities of presence of PHRASES are around one half."""
    config = config_with_presence()
    model = build_model(config)
    head = model.head.presence
    assert head is not None
    randomise(head)
    tokens = tokenizer_of(config.model.text)(PHRASES, config.data.word_length)
    square, _ = to_square(picture(), config.data, Letterbox)
    with torch.no_grad():
        head.bias.zero_()
        logits = model(
            normalise(square[None], config.data), tokens, torch.zeros(len(PHRASES), dtype=torch.int64)
        ).presence
        head.weight.mul_(1.5 / logits.std())
        head.bias.copy_(-1.5 * logits.mean() / logits.std())
    return Segmenter(model, config, device="cpu")


@pytest.fixture(scope="module")
def saved(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


def picture(seed: int = 0, size: tuple[int, int] = (50, 70)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def present(predictions: list[Prediction]) -> list[float]:
    return [each.present for each in predictions if each.present is not None]


@given(MAPS, st.floats(0.01, 0.99), st.none() | st.floats(0, 1), st.floats(0, 1), st.integers(0, 12))
@settings(max_examples=100)
def test_a_mask_is_the_thresholds_or_empty_with_a_reason(
    probabilities: np.ndarray, threshold: float, presence: float | None, min_score: float, min_area: int
) -> None:
    """No threshold changes the score, and nothing is hidden without a word."""
    found = Prediction.decide("cup", probabilities, threshold, present=presence, min_score=min_score, min_area=min_area)
    plain = probabilities > threshold
    above = [float(value) for value in probabilities.ravel() if value > np.float32(0.35)]
    score = presence if presence is not None else sum(above) / len(above) if above else 0.0
    assert found.score == pytest.approx(score, abs=1e-6)
    assert (found.present, found.phrase) == (presence, "cup")
    low, small = found.score < min_score, 0 < plain.sum() < min_area
    assert (found.rejected is not None) == (low or small)
    if found.rejected is None:
        np.testing.assert_array_equal(found.mask, plain)
    else:
        assert ("score" if low else "pixels") in found.rejected
        assert found.rejected in found.describe()
        assert not found.mask.any()
        assert found.box is None
    again = found.with_threshold(threshold, min_score=min_score, min_area=min_area)
    assert again.to_dict() == found.to_dict()


def test_presence_is_the_score_and_the_same_everywhere(segmenter: Segmenter, tmp_path: Path) -> None:
    """predict, segment, a list of images and evaluation give the probability of the network."""
    root = write_scenes(tmp_path, train=0, val=0, test=3, side=56)
    table = load_references(root, "scenes")
    queries = all_queries(table.split("test"))
    results = list(predict_queries(segmenter.model, queries, segmenter.config, Cris(), device=CPU))
    by_image: dict[Path, list[tuple[str, float | None]]] = {}
    for result in results:
        by_image.setdefault(result.reference.image_path, []).append((result.expression.text, result.present))
    seen = []
    for path, pairs in by_image.items():
        phrases = [text for text, _ in pairs]
        predictions = segmenter.predict(path, phrases)
        assert [each.score for each in predictions] == [each.present for each in predictions]
        np.testing.assert_allclose(present(predictions), [value for _, value in pairs], atol=1e-5)
        (single,) = segmenter.segment(segmenter.encode_image(path), phrases[0], threshold=0.9)
        assert single.score == pytest.approx(predictions[0].score, abs=1e-5)
        seen += present(predictions)
    assert len({round(value, 4) for value in seen}) > len(by_image)
    (together,) = segmenter.predict([picture()], PHRASES)
    assert 0 < min(present(together)) < 0.4 < 0.6 < max(present(together)) < 1


def test_a_model_without_the_head_has_no_presence(trained_run: Path) -> None:
    """Its entries in predictions.json have the fields that they had."""
    (found,) = Segmenter.from_pretrained(trained_run, device="cpu").predict(picture(), "red circle")
    assert found.present is None
    fields = ["image_id", "category_id", "phrase", "score", "bbox", "segmentation"]
    assert [*found.to_coco()] == fields


@pytest.mark.parametrize(
    ("minima", "message"),
    [
        *(({"min_score": value}, "minimum score") for value in (-0.1, 1.1, float("nan"), "0.5", True)),
        *(({"min_area": value}, "minimum area") for value in (-1, 0.5, "5", None, True, 1 << 53)),
    ],
)
def test_minima_out_of_range_are_errors(segmenter: Segmenter, minima: dict[str, Any], message: str) -> None:
    """A wrong number must not silently keep or drop all masks."""
    with pytest.raises(DcrisError, match=message):
        segmenter.predict(picture(), "red circle", **minima)


def test_the_command_says_what_it_left_out(
    saved: Path, segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who finds an empty mask can tell why, and at which probability."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    plain = segmenter.predict(picture(), PHRASES, min_score=0)
    low, high = min(plain, key=lambda each: each.score), max(plain, key=lambda each: each.score)
    between = round((low.score + high.score) / 2, 3)
    command = ["predict", str(saved), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--format", "mask", "overlay", "coco"]
    for phrase in PHRASES:
        command += ["-e", phrase]
    assert main([*command, "--min-score", str(between)]) == 0
    printed = capsys.readouterr().out
    assert f"'{low.phrase}' nothing found (score below {between:g}), score {low.score:.2f}" in printed
    assert f"'{high.phrase}' {high.describe()}" in printed
    entries = {entry["phrase"]: entry for entry in json.loads((tmp_path / "out/predictions.json").read_text())}
    assert [*entries] == PHRASES
    for each in plain:
        entry = entries[each.phrase]
        assert entry["present"] == entry["score"] == pytest.approx(each.score, abs=1e-4)
        mask = decode_mask(entry["segmentation"], (50, 70)).astype(bool)
        if each.score < between:
            assert (entry["rejected"], entry["bbox"]) == (f"score below {between:g}", [0, 0, 0, 0])
            assert not mask.any()
        else:
            assert "rejected" not in entry
            np.testing.assert_array_equal(mask, each.mask)
    overlay = np.array(Image.open(tmp_path / f"out/{entries[low.phrase]['stem']}.overlay.png"))
    np.testing.assert_array_equal(overlay, picture())
    assert main(command) == 2
    assert f"min_score {between:g} (now 0.5)" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--min-area", "3501"]) == 0
    assert "fewer than 3,501 pixels" in capsys.readouterr().out
    assert main([*command, "--overwrite", "--min-score", "0"]) == 0
    assert '"min_' not in (tmp_path / "out/dcris-journal.jsonl").read_text()


def test_what_is_probably_not_there_gets_no_mask_by_default(saved: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    """In Python and on the command line as on the page; --min-score 0 keeps every mask."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    found = segmenter.predict(picture(), PHRASES, scores=True)
    assert {each.score < 0.5 for each in found} == {True, False}
    assert [each.rejected for each in found] == ["score below 0.5" if each.score < 0.5 else None for each in found]
    assert [each.box is None for each in found] == [each.score < 0.5 for each in found]
    assert [each.with_threshold(0.01).rejected for each in found] == [each.rejected for each in found]
    command = ["predict", str(saved), str(tmp_path / "a.png"), "--device", "cpu", "--format", "coco"]
    for phrase in PHRASES:
        command += ["-e", phrase]
    for name, minimum in (("default", ()), ("all", ("--min-score", "0"))):
        assert main([*command, "--out", str(tmp_path / name), *minimum]) == 0
        entries = json.loads((tmp_path / name / "predictions.json").read_text())
        assert [entry["present"] for entry in entries] == pytest.approx(present(found), abs=1e-4)
        empty = [not decode_mask(entry["segmentation"], (50, 70)).any() for entry in entries]
        assert empty == [name == "default" and each.score < 0.5 for each in found]


@pytest.fixture
def address(segmenter: Segmenter, tmp_path: Path) -> Iterator[str]:
    with served(segmenter, tmp_path) as running:
        yield running


def test_the_api_has_presence_and_the_minima(address: str, segmenter: Segmenter) -> None:
    """The API answers as the Python API does."""
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "PNG")
    expected = segmenter.predict(picture(), PHRASES, min_score=0.5, min_area=30)
    found = post(address, stream.getvalue(), phrase=PHRASES, min_score=0.5, min_area=30)
    assert [(each["present"], each.get("rejected")) for each in found] == [
        (round(each.score, 6), each.rejected) for each in expected
    ]
    assert {each.get("rejected") is None for each in found} == {True, False}
    for minima in ({"min_score": "much"}, {"min_score": "2"}, {"min_area": "0.5"}, {"min_area": "-1"}):
        with pytest.raises(HTTPError) as refused:
            post(address, stream.getvalue(), phrase=PHRASES, **minima)
        assert refused.value.code == 400
        assert "min" in json.load(refused.value)["error"]


def test_the_page_greys_what_is_probably_not_there(segmenter: Segmenter) -> None:
    """No mask is drawn for it, at any threshold; the number says how sure the model is."""
    predictions = segmenter.predict(picture(), PHRASES, scores=True)
    session = Session(picture(), "a.png", predictions)
    for threshold in (0.01, 0.35, 0.9):
        shown = session.at_threshold(threshold)
        for each, before in zip(shown, predictions, strict=True):
            absent = before.score < 0.5
            assert (each.rejected is not None) == absent
            assert not (absent and each.mask.any())
            legend = _render("legend", _rows([each]))
            assert ('class="row absent"' in legend) == absent
            assert (f"not found ({before.score:.0%})" in legend) == absent
    assert {each.score < 0.5 for each in predictions} == {True, False}
    # The page's second slider: what it would have drawn.
    for each in session.at_threshold(0.01, min_score=0):
        assert each.rejected is None and each.mask.any()


@pytest.mark.slow
def test_an_export_carries_presence(segmenter: Segmenter, tmp_path: Path) -> None:
    """Calibrated, for every image and phrase, and printed by the example."""
    model = segmenter.save_pretrained(tmp_path / "model")
    (model / "calibration.json").write_text('{"temperature": 1.7}')
    calibrated = Segmenter.from_pretrained(model, device="cpu")
    export_onnx(calibrated, tmp_path / "onnx")
    images: list[Any] = [picture(), picture(1, (60, 40))]
    masks, present = example().segment(example().load(tmp_path / "onnx"), images, PHRASES)
    expected = calibrated.predict(images, PHRASES)
    np.testing.assert_allclose(present, [[each.present for each in predictions] for predictions in expected], atol=1e-3)
    found = [[bool(mask.any()) for mask in some] for some in masks]
    assert found == [[each.box is not None for each in predictions] for predictions in expected]
    assert {each for some in found for each in some} == {True, False}
    Image.fromarray(images[1]).save(tmp_path / "photo.png")
    too_long = "small red circle " * 9
    command = [sys.executable, str(REPOSITORY / "examples/onnx_segment.py"), "onnx", "photo.png", *PHRASES, too_long]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for phrase, share in zip(PHRASES, present[1], strict=True):
        assert f"{phrase} is present with probability {share:.2f}" in done.stdout
    assert done.stderr.strip() == f"{too_long!r} is longer than the model reads; its end is ignored"
