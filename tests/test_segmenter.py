"""The Python interface: whatever people have as an image, however many phrases and threads, one answer."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dcris.engine.evaluate
from dcris import Segmenter
from dcris.data.references import load_references
from dcris.engine.evaluate import answer_questions
from dcris.errors import DcrisError
from dcris.metrics import overlap
from dcris.types import Prediction
from runs import CPU

PHRASES = ["red circle", "the small striped ring", "leftmost", "a phrase with words nobody taught it: größer, 猫"]


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is neither square nor of the network's size, with structure in each channel."""
    rows, columns = np.mgrid[:70, :110]
    pixels = np.stack([rows * 3, columns * 2, (rows * columns) % 256], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def assert_same(ours: list[Prediction], theirs: list[Prediction], tolerance: float = 0.0) -> None:
    assert [answer.phrase for answer in ours] == [answer.phrase for answer in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.probabilities is not None
        np.testing.assert_allclose(our.probabilities, their.probabilities, rtol=0, atol=tolerance)
        if not tolerance:
            np.testing.assert_array_equal(our.mask, their.mask)
            assert (our.score, our.box) == (their.score, their.box)


def test_path_picture_and_array_are_one_image(segmenter: Segmenter, photo: Path) -> None:
    """Else the same photograph gets another answer from a notebook than from the command line."""
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
    for answers in lists:
        assert_same(answers, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"])
def test_a_picture_of_any_mode(segmenter: Segmenter, photo: Path, mode: str) -> None:
    """Whatever Pillow hands out must be answered at the picture's size."""
    picture = Image.open(photo)
    picture = picture.convert("L").convert(mode) if mode in ("LA", "I", "I;16") else picture.convert(mode)
    answers = segmenter.predict(picture, ["ring"])
    assert answers[0].mask.shape == (70, 110)


def test_what_a_prediction_holds(segmenter: Segmenter, photo: Path) -> None:
    """The definitions: strict threshold, mean probability inside, smallest box, all at the photograph's size."""
    seen = set()
    first = segmenter.predict(photo, PHRASES, scores=True)[0].probabilities
    assert first is not None
    for threshold in (None, float(np.median(first)), float(np.quantile(first, 0.9)), 0.999):
        for answer in segmenter.predict(photo, PHRASES, threshold=threshold, scores=True):
            assert answer.probabilities is not None
            assert answer.probabilities.dtype == np.float32
            assert 0 <= answer.probabilities.min() <= answer.probabilities.max() <= 1
            assert answer.mask.dtype == bool
            assert answer.mask.shape == answer.probabilities.shape == (70, 110)
            np.testing.assert_array_equal(answer.mask, answer.probabilities > (threshold or 0.35))
            seen.add(bool(answer.mask.any()))
            if not answer.mask.any():
                assert (answer.score, answer.box) == (0.0, None)
                continue
            assert answer.score == pytest.approx(float(answer.probabilities[answer.mask].mean()), abs=1e-6)
            rows, columns = np.nonzero(answer.mask)
            left, top, width, height = answer.box or (0, 0, 0, 0)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
    assert seen == {True, False}
    assert segmenter.predict(photo, PHRASES)[0].probabilities is None


def test_a_string_is_one_phrase_and_none_are_none(segmenter: Segmenter, photo: Path) -> None:
    """Else "cup" is asked as three letters."""
    assert [answer.phrase for answer in segmenter.predict(photo, "Red  Circle ")] == ["Red  Circle "]
    assert [answer.phrase for answer in segmenter.predict(photo, ("a", "b", "a"))] == ["a", "b", "a"]
    assert segmenter.predict(photo, []) == []
    assert segmenter.predict([], PHRASES) == []
    assert segmenter.predict([photo], []) == [[]]


def test_grouping_does_not_matter(segmenter: Segmenter, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a phrase's answer depends on what else was asked, which no user can know."""
    phrases = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("ring", "circle", "star")]
    together = segmenter.predict(photo, phrases, scores=True)
    alone = [segmenter.predict(photo, phrase, scores=True)[0] for phrase in phrases]
    assert_same(together, alone, tolerance=1e-5)
    monkeypatch.setattr(dcris.engine.evaluate, "PHRASES_PER_PASS", 4)
    assert_same(together, segmenter.predict(photo, phrases, scores=True), tolerance=1e-5)
    assert_same(together[::-1], segmenter.predict(photo, phrases[::-1], scores=True), tolerance=1e-5)
    # The phrases are listened to at all.
    assert any(not np.array_equal(together[0].probabilities, other.probabilities) for other in together[1:])


def test_bfloat16_ends_with_the_network(segmenter: Segmenter, trained_run: Path, photo: Path) -> None:
    """Else what follows it runs in bfloat16 too: an error where NumPy takes over, and coarse probabilities elsewhere."""
    half = Segmenter.from_pretrained(trained_run, device="cpu", precision="bfloat16")
    answers = half.predict(photo, PHRASES, scores=True)
    assert_same(answers, segmenter.predict(photo, PHRASES, scores=True), tolerance=0.1)
    for answer in answers:
        assert answer.probabilities is not None
        assert len(np.unique(answer.probabilities)) > 1000  # bfloat16 has 128 steps between a half and one


def test_threads_share_a_segmenter(segmenter: Segmenter, scenes_root: Path) -> None:
    """Else a web server mixes up the pictures of two visitors."""
    images = sorted({reference.image_path for reference in load_references(scenes_root, "scenes").references})[:8]
    expected = [segmenter.predict(image, PHRASES[:2], scores=True) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: segmenter.predict(image, PHRASES[:2], scores=True), images))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_the_evaluator_and_the_segmenter_agree(segmenter: Segmenter, scenes_root: Path) -> None:
    """Else the reported scores are not those of what users get."""
    reference = load_references(scenes_root, "scenes").split("test")[0]
    questions = [(reference, expression) for expression in reference.expressions]
    scored = answer_questions(
        segmenter.model, questions, segmenter.config.data, segmenter.tokenizer, segmenter.protocol, device=CPU
    )
    from dcris.data.masks import decode_mask

    truth = decode_mask(reference.segmentation, reference.image_size).astype(bool)
    for answer in scored:
        mine = segmenter.predict(reference.image_path, answer.expression.text)[0]
        assert overlap(mine.mask, truth) == answer.overlap


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s, p: s.predict(p, ""), "phrase '' is empty"),
        (lambda s, p: s.predict(p, ["ring", " \n"]), "is empty"),
        (lambda s, p: s.predict(p, "ring", threshold=2), "between 0 and 1, and is 2"),
        (lambda s, p: s.predict(p, "ring", threshold=0), "between 0 and 1"),
        (lambda s, p: s.predict(p, "ring", threshold=float("nan")), "between 0 and 1"),
        (lambda s, p: s.predict(p.with_name("absent.jpg"), "ring"), r"no image file .*absent\.jpg"),
        (lambda s, p: s.predict(np.zeros((4, 4), np.uint8), "ring"), r"uint8 \[H, W, 3\]"),
        (lambda s, p: s.predict(np.zeros((4, 4, 3)), "ring"), "float64"),
        (lambda s, p: s.predict(np.zeros((4, 0, 3), np.uint8), "ring"), r"\[4, 0, 3\]"),
        (lambda s, p: s.predict([p, np.zeros((3, 4, 4), np.uint8)], "ring"), r"\[3, 4, 4\]"),
        (lambda s, p: s.predict(Image.new("F", (4, 4)), "ring"), "floating-point"),
    ],
)
def test_bad_questions_are_one_sentence(
    segmenter: Segmenter, photo: Path, ask: Callable[[Segmenter, Path], object], words: str
) -> None:
    """Else a person sees a shape error from inside torch."""
    with pytest.raises(DcrisError, match=words) as caught:
        ask(segmenter, photo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_the_smallest_pictures(segmenter: Segmenter, size: tuple[int, int]) -> None:
    """A thumbnail of one pixel must not divide by nothing."""
    answer = segmenter.predict(np.full((*size, 3), 200, np.uint8), "ring", scores=True)[0]
    assert answer.mask.shape == size


def test_a_device_that_is_not_here(trained_run: Path) -> None:
    """Else CUDA's own page of text."""
    for device in ("cuda:99", "gpu", "meta", "cuda:x"):
        with pytest.raises(DcrisError, match=device):
            Segmenter.from_pretrained(trained_run, device=device)
