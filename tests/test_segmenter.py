"""The Python API: any kind of image, any number of phrases and threads, the same results."""

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcris import Segmenter
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.metrics import overlap
from dcris.inference.prediction import Prediction
from dcris.utils.device import choose_device, choose_precision
from runs import CPU

PHRASES = ["red circle", "the small striped ring", "leftmost", "a phrase with words nobody taught it: größer, 猫"]


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that is not square and has structure in each channel."""
    rows, columns = np.mgrid[:70, :110]
    pixels = np.stack([rows * 3, columns * 2, (rows * columns) % 256], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def assert_same(ours: list[Prediction], theirs: list[Prediction], tolerance: float = 0.0) -> None:
    assert [prediction.phrase for prediction in ours] == [prediction.phrase for prediction in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.probabilities is not None
        np.testing.assert_allclose(our.probabilities, their.probabilities, rtol=0, atol=tolerance)
        if not tolerance:
            np.testing.assert_array_equal(our.mask, their.mask)
            assert (our.score, our.box) == (their.score, their.box)


def test_path_pil_image_and_array_give_the_same_result(segmenter: Segmenter, photo: Path) -> None:
    """All kinds of input give the same result for one image."""
    expected = segmenter.predict(photo, PHRASES, scores=True)
    pixels = np.array(Image.open(photo))
    views: list[Any] = [
        str(photo),
        Image.open(photo),
        Image.open(photo).convert("RGBA"),
        pixels,
        np.asfortranarray(pixels),
        pixels[:, ::-1].copy()[:, ::-1],  # a view with steps backwards, as a flip leaves it
    ]
    for view in views:
        assert_same(segmenter.predict(view, PHRASES, scores=True), expected)
    lists = segmenter.predict([photo, pixels], PHRASES, scores=True)
    for predictions in lists:
        # Two images are one pass, whose products round differently on some processors.
        assert_same(predictions, expected, tolerance=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"])
def test_images_of_any_mode(segmenter: Segmenter, photo: Path, mode: str) -> None:
    """Images of any Pillow mode give a mask of their size."""
    picture = Image.open(photo)
    picture = picture.convert("L").convert(mode) if mode in ("LA", "I", "I;16") else picture.convert(mode)
    predictions = segmenter.predict(picture, ["ring"])
    assert predictions[0].mask.shape == (70, 110)


def test_fields_of_a_prediction(segmenter: Segmenter, photo: Path) -> None:
    """Strict threshold, a score that does not depend on it, smallest box; of the image's size."""
    seen = set()
    first = segmenter.predict(photo, PHRASES, scores=True)[0].probabilities
    assert first is not None
    for threshold in (None, float(np.median(first)), float(np.quantile(first, 0.9)), 0.999):
        for prediction in segmenter.predict(photo, PHRASES, threshold=threshold, scores=True):
            assert prediction.probabilities is not None
            assert prediction.probabilities.dtype == np.float32
            assert 0 <= prediction.probabilities.min() <= prediction.probabilities.max() <= 1
            assert prediction.mask.dtype == bool
            assert prediction.mask.shape == prediction.probabilities.shape == (70, 110)
            np.testing.assert_array_equal(prediction.mask, prediction.probabilities > (threshold or 0.35))
            seen.add(bool(prediction.mask.any()))
            inside = prediction.probabilities[prediction.probabilities > 0.35]
            assert prediction.score == pytest.approx(float(inside.mean()) if inside.size else 0.0, abs=1e-6)
            if not prediction.mask.any():
                assert prediction.box is None
                continue
            rows, columns = np.nonzero(prediction.mask)
            left, top, width, height = prediction.box or (0, 0, 0, 0)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
    assert seen == {True, False}
    assert segmenter.predict(photo, PHRASES)[0].probabilities is None


def test_a_string_is_one_phrase(segmenter: Segmenter, photo: Path) -> None:
    """A string must not be treated as a list of letters."""
    assert [prediction.phrase for prediction in segmenter.predict(photo, "Red  Circle ")] == ["Red  Circle "]
    assert [prediction.phrase for prediction in segmenter.predict(photo, ("a", "b", "a"))] == ["a", "b", "a"]
    assert segmenter.predict(photo, []) == []
    assert segmenter.predict([], PHRASES) == []
    assert segmenter.predict([photo], []) == [[]]


def test_grouping_does_not_matter(segmenter: Segmenter, photo: Path) -> None:
    """The result for a phrase does not depend on the other phrases."""
    phrases = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("ring", "circle", "star")]
    together = segmenter.predict(photo, phrases, scores=True)
    alone = [segmenter.predict(photo, phrase, scores=True)[0] for phrase in phrases]
    assert_same(together, alone, tolerance=1e-5)
    assert_same(together, segmenter.predict(photo, phrases, scores=True, memory=1), tolerance=1e-5)
    assert_same(together[::-1], segmenter.predict(photo, phrases[::-1], scores=True), tolerance=1e-5)
    # The phrases are listened to at all.
    assert any(not np.array_equal(together[0].probabilities, other.probabilities) for other in together[1:])


@pytest.fixture
def passes(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Number of images or phrases in each step of the network, per call."""
    seen: dict[str, list[int]] = {"encode_images": [], "encode_text": [], "segment": []}

    (adapters,) = segmenter._sets.values()

    def watch(name: str) -> None:
        original = getattr(adapters.ready, name)

        def call(*arguments: Any) -> Any:
            first = arguments[0]
            seen[name].append(len(first.tokens if name == "segment" else first))
            return original(*arguments)

        monkeypatch.setattr(adapters.ready, name, call)

    for name in seen:
        watch(name)
    return seen


def test_images_share_forward_passes(
    segmenter: Segmenter, scenes_root: Path, photo: Path, passes: dict[str, list[int]]
) -> None:
    """Images share a pass and a phrase is encoded once; less memory means smaller passes with the
    same result."""
    images: list[Any] = [
        photo,
        *sorted({each.image_path for each in load_references(scenes_root, "scenes").references})[:4],
    ]
    together = segmenter.predict(images, PHRASES, scores=True)
    assert passes == {"encode_images": [5], "encode_text": [len(PHRASES)], "segment": [20]}
    small = segmenter.predict(images, PHRASES, scores=True, memory=1)
    assert passes["segment"][1:] == [1] * 20
    alone = [segmenter.predict(image, PHRASES, scores=True) for image in images]
    for ours, theirs, fewer in zip(together, alone, small, strict=True):
        assert_same(ours, theirs, tolerance=1e-5)
        assert_same(ours, fewer, tolerance=1e-5)


def test_each_image_may_have_its_own_phrases(segmenter: Segmenter, photo: Path, passes: dict[str, list[int]]) -> None:
    """A list of phrases per image works; an image without phrases has no predictions."""
    other = np.zeros((30, 20, 3), np.uint8)
    predictions = segmenter.predict([photo, other, other], [["ring", "star"], [], ["star"]])
    assert [[prediction.phrase for prediction in each] for each in predictions] == [["ring", "star"], [], ["star"]]
    assert [prediction.mask.shape for each in predictions for prediction in each] == [(70, 110), (70, 110), (30, 20)]
    assert passes["encode_text"] == [2]
    assert segmenter.predict([other], [[]]) == [[]]


def test_an_image_is_encoded_once_for_interactive_use(
    segmenter: Segmenter, photo: Path, passes: dict[str, list[int]]
) -> None:
    """Each further phrase costs only its own part, another threshold no forward pass."""
    encoded = segmenter.encode_image(photo)
    assert encoded.size == (70, 110)
    predictions = [segmenter.segment(encoded, phrase, scores=True)[0] for phrase in PHRASES]
    assert passes["encode_images"] == [1]
    assert passes["segment"] == [1] * len(PHRASES)
    moved = [prediction.with_threshold(0.2) for prediction in predictions]
    assert passes["segment"] == [1] * len(PHRASES)
    assert_same(predictions, segmenter.predict(photo, PHRASES, scores=True), tolerance=1e-5)
    for ours, theirs in zip(moved, segmenter.predict(photo, PHRASES, threshold=0.2), strict=True):
        assert (ours.mask == theirs.mask).mean() > 0.999
        assert ours.score == pytest.approx(theirs.score, abs=1e-3)


def test_phrases_are_encoded_once_for_many_images(
    segmenter: Segmenter, photo: Path, passes: dict[str, list[int]]
) -> None:
    """A folder is asked for the same phrases; the results are those of `predict`."""
    phrases = segmenter.encode_phrases(PHRASES)
    pictures = [np.array(Image.open(photo)), np.array(Image.open(photo))[:, ::-1].copy()]
    found = [segmenter.segment(segmenter.encode_image(each), phrases, scores=True) for each in pictures]
    assert passes["encode_text"] == [len(PHRASES)]
    for each, ours in zip(pictures, found, strict=True):
        assert_same(ours, segmenter.predict(each, PHRASES, scores=True), tolerance=1e-5)
    assert segmenter.segment(segmenter.encode_image(photo), segmenter.encode_phrases([])) == []
    segmenter.add_adapters("other", segmenter.save_pretrained(photo.parent / "other"))
    with pytest.raises(DcrisError, match="use the same for both"):
        segmenter.segment(segmenter.encode_image(photo, adapters="other"), phrases)


def test_grey_and_transparent_arrays(segmenter: Segmenter, photo: Path) -> None:
    """Unusual modes of cameras and cut-outs equal the plain image."""
    colour = np.array(Image.open(photo))
    clear = np.dstack((colour, np.full((70, 110), 255, np.uint8)))
    assert_same(segmenter.predict(clear, "ring", scores=True), segmenter.predict(colour, "ring", scores=True))
    grey = colour[..., 0]
    expected = segmenter.predict(np.repeat(grey[..., None], 3, axis=2), "ring", scores=True)
    for array in (grey, grey[..., None], np.asfortranarray(grey)):
        assert_same(segmenter.predict(array, "ring", scores=True), expected)


def test_exif_orientation_is_applied(segmenter: Segmenter, tmp_path: Path, photo: Path) -> None:
    """EXIF orientation is applied to files and PIL images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    predictions = [
        segmenter.predict(each, "ring", scores=True)
        for each in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png"))
    ]
    assert predictions[0][0].mask.shape == (110, 70)
    assert_same(*predictions)


def test_results_are_float32_with_bfloat16(segmenter: Segmenter, trained_run: Path, photo: Path) -> None:
    """The results are float32 outside of the network, also in bfloat16."""
    half = Segmenter.from_pretrained(trained_run, device="cpu", precision="bfloat16")
    predictions = half.predict(photo, PHRASES, scores=True)
    assert_same(predictions, segmenter.predict(photo, PHRASES, scores=True), tolerance=0.1)
    for prediction in predictions:
        assert prediction.probabilities is not None
        assert len(np.unique(prediction.probabilities)) > 1000  # bfloat16 has 128 steps between a half and one


def test_threads_share_a_segmenter(segmenter: Segmenter, scenes_root: Path) -> None:
    """Threads must not mix up their images."""
    images = sorted({reference.image_path for reference in load_references(scenes_root, "scenes").references})[:8]
    expected = [segmenter.predict(image, PHRASES[:2], scores=True) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: segmenter.predict(image, PHRASES[:2], scores=True), images))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_the_evaluator_and_the_segmenter_agree(segmenter: Segmenter, scenes_root: Path) -> None:
    """Evaluation measures exactly what users get."""
    reference = load_references(scenes_root, "scenes").split("test")[0]
    queries = [(reference, expression) for expression in reference.expressions]
    scored = predict_queries(
        segmenter.model, queries, segmenter.config, segmenter.protocol, device=CPU, dtype=segmenter.dtype
    )
    from dcris.data.masks import union_mask

    truth = union_mask(reference.segmentations, reference.image_size).astype(bool)
    for prediction in scored:
        mine = segmenter.predict(reference.image_path, prediction.expression.text)[0]
        assert overlap(mine.mask, truth) == prediction.overlap


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s, p: s.predict(p, ""), "phrase '' is empty"),
        (lambda s, p: s.predict(p, ["ring", " \n"]), "is empty"),
        (lambda s, p: s.predict(p, "ring", threshold=2), "between 0 and 1, not 2"),
        (lambda s, p: s.predict(p, "ring", threshold=0), "between 0 and 1"),
        (lambda s, p: s.predict(p, "ring", threshold=float("nan")), "between 0 and 1"),
        (lambda s, p: s.predict(p.with_name("absent.jpg"), "ring"), r"no image file .*absent\.jpg"),
        (lambda s, p: s.predict((p, p), "ring"), "give several images as a list"),
        (lambda s, p: s.predict(np.zeros((4, 4, 2), np.uint8), "ring"), r"uint8 \[H, W, 3\]"),
        (lambda s, p: s.predict(np.zeros((2, 4, 4, 3), np.uint8), "ring"), r"uint8 \[H, W, 3\]"),
        (lambda s, p: s.predict([p], [["a"], ["b"]]), "1 image given, but phrases for 2"),
        (lambda s, p: s.predict(p, "ring", adapters="others"), "no adapters 'others'"),
        (lambda s, p: s.segment(s.encode_image(p), "ring", threshold=1), "between 0 and 1"),
        (lambda s, p: s.predict(p, "ring")[0].with_threshold(0.5), "scores=True"),
        (lambda s, p: s.predict(np.zeros((4, 4, 3)), "ring"), "float64"),
        (lambda s, p: s.predict(np.zeros((4, 0, 3), np.uint8), "ring"), r"\[4, 0, 3\]"),
        (lambda s, p: s.predict([p, np.zeros((3, 4, 5), np.uint8)], "ring"), r"\[3, 4, 5\]"),
        (lambda s, p: s.predict(Image.new("F", (4, 4)), "ring"), "floating-point"),
    ],
)
def test_bad_arguments_give_one_sentence(
    segmenter: Segmenter, photo: Path, ask: Callable[[Segmenter, Path], object], words: str
) -> None:
    """Wrong arguments give one sentence, not a shape error from torch."""
    with pytest.raises(DcrisError, match=words) as caught:
        ask(segmenter, photo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_the_smallest_images(segmenter: Segmenter, size: tuple[int, int]) -> None:
    """Images of one pixel work."""
    prediction = segmenter.predict(np.full((*size, 3), 200, np.uint8), "ring", scores=True)[0]
    assert prediction.mask.shape == size


def test_an_unknown_device(trained_run: Path) -> None:
    """An unknown device gives one sentence."""
    for device in ("cuda:99", "gpu", "meta", "cuda:x"):
        with pytest.raises(DcrisError, match=device):
            Segmenter.from_pretrained(trained_run, device=device)


def test_apples_gpus_are_a_device(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, it is used if it is named; elsewhere a sentence says that there is
    none."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DcrisError, match="no device mps: this machine has no Apple GPU"):
        Segmenter.from_pretrained(trained_run, device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps").type == "mps"
    assert choose_precision("auto", choose_device("mps")) == torch.float32
    assert choose_device("auto").type != "mps"  # untested, so nobody gets it without asking


def test_a_prediction_shows_itself(segmenter: Segmenter, photo: Path, tmp_path: Path) -> None:
    """In a notebook, on a terminal and as files, without giving the image again."""
    (some,) = segmenter.predict(photo, "red star", scores=True)
    assert some.probabilities is not None
    threshold = float(np.median(some.probabilities))  # the model was hardly trained
    (found,) = segmenter.predict(photo, "red star", threshold=threshold)
    height, width = found.mask.shape
    assert found.box is not None
    left, top, across, down = found.box
    assert found.box_xywh == found.box
    assert found.box_xyxy == (left, top, left + across, top + down)
    assert found.area == found.mask.sum() > 0
    assert json.loads(json.dumps(found.to_dict()))["mask"] == found.to_rle()
    assert repr(found) == f"<Prediction 'red star': {found.describe()}, {width} x {height} pixels>"
    picture = found.plot()
    assert picture.size[0] >= width and picture.size[1] > height
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(found._repr_png_()))))
    # As drawn on the same image in another form, but not as on none.
    pixels = np.asarray(Image.open(photo))
    assert np.array_equal(np.asarray(found.plot(pixels)), np.asarray(picture))
    alone = Prediction("red star", found.mask, found.score, found.box)
    assert not np.array_equal(np.asarray(alone.plot()), np.asarray(picture))
    found.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")) > 0, found.mask)
    with pytest.raises(DcrisError, match=r"call it mask\.png"):
        found.save(tmp_path / "mask.jpg")
    with pytest.raises(DcrisError, match="pixels and the mask"):
        found.plot(np.zeros((5, 5, 3), np.uint8))
    empty = some.with_threshold(0.9999)
    assert (empty.box_xyxy, empty.area) == (None, 0)
    assert empty._repr_png_().startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(some.with_threshold(threshold).plot()), np.asarray(picture))


def test_a_prediction_is_shown_by_the_systems_viewer(
    segmenter: Segmenter, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`show` opens the picture of `plot`."""
    seen: list[Image.Image] = []
    monkeypatch.setattr(Image.Image, "show", lambda image, title=None: seen.append(image))
    (found,) = segmenter.predict(photo, "red star")
    found.show()
    assert np.array_equal(np.asarray(seen[0]), np.asarray(found.plot()))


def test_a_model_that_computes_no_numbers_is_one_sentence(
    photo: Path, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of a run that diverged, or of a stranger: its masks would be empty and its scores 0,
    or none of JSON."""
    segmenter = Segmenter.from_pretrained("tiny", device="cpu")
    with torch.no_grad():
        for parameter in segmenter.model.head.parameters():
            parameter.fill_(float("nan"))
    model = tmp_path / "nan.safetensors"
    segmenter.save_pretrained(model)
    out = tmp_path / "out"
    for words in (
        ("predict", model, photo, "-e", "a circle", "--out", out),
        ("evaluate", model, "--data", scenes_root, "--split", "test", "--out", out / "e.json"),
    ):
        assert main([str(word) for word in (*words, "--device", "cpu")]) == 2
        assert "the model computes values that are not finite" in capsys.readouterr().err
    assert not [*out.rglob("*.png"), *out.rglob("e.json")]
