"""Refined predictions: the guided filter itself, and where it is used and where it must not be."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dcris import Segmenter
from dcris.checkpoints.model_card import model_card
from dcris.cli import main
from dcris.config import replace
from dcris.data.dataset import all_queries
from dcris.data.images import read_image
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation import refinement
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris, Lavt
from dcris.evaluation.refinement import EPSILON, RADIUS, refine_guided
from dcris.recipes import get_recipe
from runs import CPU


def random_case(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    draws = np.random.default_rng(height * 1000 + width)
    image = draws.integers(0, 256, (height, width, 3), np.uint8)
    return draws.random((height, width), np.float32), image


def plainly(probabilities: NDArray[Any], image: NDArray[Any], radius: int) -> NDArray[np.float64]:
    """Equations 19 to 21 of the paper, one window and one pixel at a time."""
    guide = image / 255
    height, width = probabilities.shape
    a, b, refined = np.zeros((height, width, 3)), np.zeros((height, width)), np.zeros((height, width))

    def window(y: int, x: int) -> tuple[slice, slice]:
        return slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)

    for y, x in np.ndindex(height, width):
        colours, p = guide[window(y, x)].reshape(-1, 3), probabilities[window(y, x)].astype(np.float64).ravel()
        variances = np.cov(colours.T, bias=True) + EPSILON * np.eye(3)
        a[y, x] = np.linalg.solve(variances, (colours * p[:, None]).mean(0) - colours.mean(0) * p.mean())
        b[y, x] = p.mean() - a[y, x] @ colours.mean(0)
    for y, x in np.ndindex(height, width):
        refined[y, x] = a[window(y, x)].mean((0, 1)) @ guide[y, x] + b[window(y, x)].mean()
    return refined.clip(0, 1)


@pytest.mark.parametrize(("height", "width", "cells"), [(12, 17, 8), (20, 9, 5), (3, 15, 15)])
def test_it_is_the_filter_of_the_paper(height: int, width: int, cells: int) -> None:
    """At the image's own resolution, which small images have; in colour and in grey."""
    probabilities, colour = random_case(height, width)
    for image in (colour, np.repeat(colour[..., :1], 3, axis=2)):
        expected = plainly(probabilities, image, round(RADIUS * max(height, width) / cells))
        np.testing.assert_allclose(refine_guided(probabilities.copy(), image, cells), expected, rtol=0, atol=1e-5)


def test_an_image_without_edges_averages_twice() -> None:
    """Without variance in the guide, only the two means over windows are left."""
    probabilities, image = random_case(20, 30)
    image[:] = 77
    side = 2 * round(RADIUS * 30 / 10) + 1

    def mean(values: NDArray[Any]) -> NDArray[Any]:
        summed = (
            cv2.boxFilter(each, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
            for each in (values, np.ones_like(values))
        )
        total, count = summed
        return np.asarray(total / count)

    np.testing.assert_allclose(refine_guided(probabilities.copy(), image, 10), mean(mean(probabilities)), atol=1e-5)


@pytest.mark.parametrize("scale", [1, 7])
def test_the_edge_of_the_mask_moves_to_the_edge_of_the_image(scale: int) -> None:
    """Also for an image of many pixels a cell, where coefficients have a lower resolution."""
    edge, image = 40 * scale, np.full((64 * scale, 80 * scale, 3), 60, np.uint8)
    image[:, edge:] = 180
    columns = np.arange(80 * scale)
    soft = 1 / (1 + np.exp(-(columns - 42.5 * scale) / (2 * scale)))
    probabilities = np.tile(soft.astype(np.float32), (64 * scale, 1))
    assert (probabilities > 0.5).argmax(axis=1).min() > edge + scale
    refined = refine_guided(probabilities, image, 20)
    assert set((refined > 0.5).argmax(axis=1)) == {edge}


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (2, 3), (5, 40_000), (40_000, 5), (601, 403), (1200, 1100)]
)
@pytest.mark.parametrize("cells", [1, 32])
def test_any_shape_gives_probabilities(shape: tuple[int, int], cells: int) -> None:
    """Thin, small and large images."""
    probabilities, image = random_case(*shape)
    probabilities[0, 0] = 1
    refined = refine_guided(probabilities, image, cells)
    assert refined is probabilities
    assert refined.dtype == np.float32
    assert refined.min() >= 0
    assert refined.max() <= 1


def test_the_working_resolution_hardly_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over windows of two cells are smooth, so four pixels a cell are enough for them."""
    rows, columns = np.mgrid[:540, :720]
    shape = (rows - 250) ** 2 + (columns - 350) ** 2 < 150**2
    image = np.repeat(np.where(shape, 170, 80).astype(np.uint8)[..., None], 3, axis=2)
    probabilities = cv2.GaussianBlur(np.roll(shape, 8, axis=1).astype(np.float32), (0, 0), 10)
    fast = refine_guided(probabilities.copy(), image, 60)
    monkeypatch.setattr(refinement, "_PIXELS_PER_CELL", 1000)
    exact = refine_guided(probabilities.copy(), image, 60)
    assert np.abs(fast - exact).mean() < 0.01
    assert ((fast > 0.5) != (exact > 0.5)).mean() < 0.002


def test_views_of_images_are_accepted() -> None:
    """A flipped or transposed array is an image as well."""
    probabilities, image = random_case(90, 120)
    expected = refine_guided(probabilities.copy(), image, 10)
    for view in (image[:, ::-1].copy()[:, ::-1], np.asfortranarray(image)):
        np.testing.assert_array_equal(refine_guided(probabilities.copy(), view, 10), expected)


def test_another_image_is_refused() -> None:
    """The sizes of both are named."""
    probabilities, image = random_case(9, 12)
    with pytest.raises(DcrisError, match="the image is 11 x 9 pixels and its probabilities are for 12 x 9"):
        refine_guided(probabilities, image[:, 1:], 4)


# ---- prediction ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for number, shape in enumerate([(60, 90), (80, 50)]):
        paths.append(tmp_path_factory.mktemp("photos") / f"{number}.png")
        Image.fromarray(random_case(*shape)[1]).save(paths[-1])
    return paths


def scores(predictions: list[Any]) -> list[NDArray[np.float32]]:
    return [prediction.probabilities for prediction in predictions]


def test_predictions_are_refined_by_their_own_image(segmenter: Segmenter, photos: list[Path]) -> None:
    """Several images in one call, and the two steps of interactive use."""
    plain = segmenter.predict(photos, ["ring", "star"], scores=True)
    refined = segmenter.predict(photos, ["ring", "star"], scores=True, refine="guided")
    cells = 4 * segmenter.config.data.image_size // segmenter.config.model.vision.patch
    for photo, before, after in zip(photos, plain, refined, strict=True):
        encoded = segmenter.encode_image(photo)
        apart = segmenter.segment(encoded, ["ring", "star"], scores=True, refine="guided")
        for one, other, third in zip(scores(before), scores(after), scores(apart), strict=True):
            assert np.abs(one - other).max() > 1e-4
            np.testing.assert_array_equal(refine_guided(one.copy(), read_image(photo), cells), other)
            np.testing.assert_allclose(other, third, atol=1e-5)


def test_a_model_has_a_default_of_its_own(segmenter: Segmenter, photos: list[Path]) -> None:
    """`data.refine` of the configuration; the argument overrides it."""
    ours = Segmenter(segmenter.model, replace(segmenter.config, {"data.refine": "guided"}), device="cpu")

    def probabilities(segmenter: Segmenter, **options: Any) -> Any:
        (found,) = segmenter.predict(photos[0], "ring", scores=True, **options)
        return found.probabilities

    plain, refined = (probabilities(segmenter, refine=each) for each in ("none", "guided"))
    assert not np.array_equal(plain, refined)
    assert np.array_equal(probabilities(segmenter), plain)
    assert np.array_equal(probabilities(ours), refined)
    assert np.array_equal(probabilities(ours, refine="none"), plain)


def test_an_image_that_changed_after_encoding_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    """The file is read again for its pixels."""
    path = tmp_path / "photo.png"
    Image.new("RGB", (50, 40)).save(path)
    encoded = segmenter.encode_image(path)
    Image.new("RGB", (60, 40)).save(path)
    assert segmenter.segment(encoded, "ring", refine="none")
    with pytest.raises(DcrisError, match="60 x 40 pixels and its probabilities are for 50 x 40"):
        segmenter.segment(encoded, "ring", refine="guided")


def test_predict_records_the_refinement(trained_run: Path, photos: list[Path], tmp_path: Path, capsys: Any) -> None:
    """Records without refinement are those of earlier versions; --overwrite replaces them."""
    out = tmp_path / "out"
    command = ["predict", str(trained_run), str(photos[0]), "-e", "ring", "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    assert '"refine"' not in (out / "dcris-journal.jsonl").read_text()
    plain = np.load(out / "0.0-ring.scores.npy")
    assert main([*command, "--refine", "guided"]) == 2
    assert "made with refine none (now guided)" in capsys.readouterr().err
    assert main([*command, "--refine", "guided", "--overwrite"]) == 0
    assert '"refine":"guided"' in (out / "dcris-journal.jsonl").read_text()
    assert not np.array_equal(np.load(out / "0.0-ring.scores.npy"), plain)
    assert main(command) == 2


# ---- evaluation ----------------------------------------------------------------------------------


def test_evaluation_refines_only_if_asked(segmenter: Segmenter, scenes_root: Path) -> None:
    """The model's own default is for predictions: published protocols do not refine."""
    queries = all_queries(load_references(scenes_root, "scenes").split("test"))

    def evaluate(**settings: Any) -> list[Any]:
        config = replace(segmenter.config, {"data.refine": settings.pop("default", "none")})
        return list(predict_queries(segmenter.model, queries, config, Cris(), device=CPU, **settings))

    plain = evaluate()
    assert evaluate(default="guided") == plain
    refined = evaluate(refine="guided")
    assert refined != plain
    for (reference, expression), result in zip(queries[:3], refined, strict=False):
        (expected,) = segmenter.predict(reference.image_path, expression.text, refine="guided")
        assert (result.mask() == expected.mask).mean() > 0.999
    with pytest.raises(DcrisError, match="lavt compares masks on a square"):
        list(predict_queries(segmenter.model, queries, segmenter.config, Lavt(), device=CPU, refine="guided"))


def test_results_name_the_refinement(trained_run: Path, scenes_root: Path, tmp_path: Path) -> None:
    """So that no table mixes refined with other rows."""
    command = ["evaluate", str(trained_run), "--data", str(scenes_root), "--split", "test", "--device", "cpu", "--out"]
    rows = []
    for name, more in (("plain", []), ("named", ["--refine", "none"]), ("refined", ["--refine", "guided"])):
        assert main([*command, str(tmp_path / name), *more]) == 0
        rows.append(json.loads((tmp_path / name).read_text()))
    plain, named, refined = rows
    assert named == plain
    assert "refine" not in plain
    assert refined["refine"] == "guided"
    assert refined["protocol"] == "cris"
    card = model_card(get_recipe("dcris_tiny"), {}, name="a", origin={}, metrics=[plain, refined])
    assert "| test | cris |" in card
    assert "| test | cris, refined (guided) |" in card
