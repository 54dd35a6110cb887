"""Frames of a video in batches, and masks that are smoothed over time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcris.data.images import read_image
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError, LongPhraseWarning
from dcris.inference.segmenter import Segmenter
from dcris.inference.smoothing import Maps, require_window, smoothed


@pytest.fixture(scope="module")
def tiny() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[str]]:
    """A picture with two phrases that `tiny` finds something for."""
    from dcris.data.readers.load import load_references

    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=1, val=1, test=1, seed=3)
    (reference,) = load_references(root, "scenes").split("val")[:1]
    return read_image(reference.image_path), [reference.expressions[0].text, "the left one"]


def test_frames_are_predicted_as_single_images_are(tiny: Segmenter, scene: tuple[np.ndarray, list[str]]) -> None:
    """Batches of frames must not change what a mask is."""
    pixels, phrases = scene
    frames = [np.roll(pixels, 3 * shift, axis=1) for shift in range(5)]
    alone = [tiny.predict(frame, phrases, scores=True) for frame in frames]
    for batch in (1, 2, 8):
        found = [*tiny.predict_frames(iter(frames), phrases, batch=batch, scores=True)]
        assert len(found) == 5
        for one, other in zip(alone, found, strict=True):
            assert [each.phrase for each in other] == phrases
            for single, framed in zip(one, other, strict=True):
                assert single.probabilities is not None and framed.probabilities is not None
                np.testing.assert_allclose(single.probabilities, framed.probabilities, atol=2e-5)


def test_a_phrase_longer_than_the_model_reads_is_warned_of_once(
    tiny: Segmenter, scene: tuple[np.ndarray, list[str]]
) -> None:
    """Else nobody sees that the end of a phrase was ignored for a whole video."""
    with pytest.warns(LongPhraseWarning) as warned:
        found = list(tiny.predict_frames([scene[0]] * 2, ["red " * 50, "star"]))
    assert len(warned) == 1 and all(frame[0].unread and not frame[1].unread for frame in found)


def test_towers_run_once_for_what_they_encode(
    tiny: Segmenter, scene: tuple[np.ndarray, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video of 100 frames with 8 phrases would cost 8 times as much, and its text 100 times."""
    pixels, phrases = scene
    model = tiny._sets[tiny.adapters[0]].ready
    images, texts = [], []
    encode_images, encode_text = model.encode_images, model.encode_text
    monkeypatch.setattr(model, "encode_images", lambda batch: images.append(len(batch)) or encode_images(batch))
    monkeypatch.setattr(model, "encode_text", lambda tokens: texts.append(len(tokens)) or encode_text(tokens))
    assert sum(1 for _ in tiny.predict_frames([pixels] * 5, phrases, batch=2)) == 5
    assert (images, texts) == ([2, 2, 1], [2])


def test_smoothing_mends_a_frame_that_flickers(tiny: Segmenter, scene: tuple[np.ndarray, list[str]]) -> None:
    """Where the object is lost for one frame, the mask comes from its neighbours."""
    pixels, phrases = scene
    frames = [pixels, pixels, np.full_like(pixels, 128), pixels, pixels]

    def masks(**options: Any) -> list[np.ndarray]:
        found = tiny.predict_frames(frames, phrases[:1], refine="none", **options)  # a grey frame has no edges
        return [predictions[0].mask for predictions in found]

    plain, same, mended = masks(), masks(smooth=1), masks(smooth=3)
    assert all(np.array_equal(one, other) for one, other in zip(plain, same, strict=True))
    overlap = [float((m & plain[0]).sum() / max(1, (m | plain[0]).sum())) for m in (plain[2], mended[2])]
    assert plain[0].sum() > 50 and overlap[0] < 0.2 < 0.8 < overlap[1]
    np.testing.assert_array_equal(mended[0], plain[0])  # its neighbours are alike


def test_smoothing_on_the_grid_is_smoothing_of_pixels(tiny: Segmenter, scene: tuple[np.ndarray, list[str]]) -> None:
    """Maps are averaged before they are resampled, to save memory: masks must be the same but for
    pixels where resampling overshoots and is clipped."""
    pixels, phrases = scene
    frames = [np.roll(pixels, 4 * shift, axis=1)[:, :90] for shift in range(4)]

    def probabilities(smooth: int) -> np.ndarray:
        found = tiny.predict_frames(frames, phrases, smooth=smooth, scores=True, refine="none")
        return np.stack([[each.probabilities for each in predictions] for predictions in found])

    plain, smooth = probabilities(1), probabilities(3)
    for number in range(4):
        expected = plain[max(0, number - 1) : number + 2].mean(axis=0)
        assert np.abs(smooth[number] - expected).mean() < 2e-3
        assert ((smooth[number] > 0.35) != (expected > 0.35)).mean() < 2e-3
        assert (expected > 0.35).mean() > 0.01


def _maps(values: list[float]) -> Iterator[tuple[int, Maps]]:
    for number, value in enumerate(values):
        yield number, Maps(torch.full((1, 1, 1, 2), value).logit(), [value])


@given(st.lists(st.floats(0.01, 0.99), max_size=12), st.sampled_from([1, 3, 5, 7, 9]))
@settings(max_examples=60)
def test_smoothing_is_a_centred_mean(values: list[float], width: int) -> None:
    """Equal to the definition for any length, also at the ends and in videos shorter than it."""
    half = width // 2
    found = [*smoothed(_maps(values), width)]
    assert [number for number, _ in found] == [*range(len(values))]
    for number, maps in found:
        expected = float(np.mean(values[max(0, number - half) : number + half + 1]))
        assert torch.allclose(maps.logits.sigmoid(), torch.full((1, 1, 1, 2), expected), atol=1e-5)
        assert maps.present == [pytest.approx(expected)]


def test_smoothing_waits_for_no_more_frames_than_it_needs() -> None:
    """Memory is bounded by the window, not by the video."""
    read: list[int] = []

    def frames() -> Iterator[tuple[int, Maps]]:
        for number, maps in _maps([0.5] * 9):
            read.append(number)
            yield number, maps

    found = smoothed(frames(), 5)
    assert next(found)[0] == 0 and read == [0, 1, 2]
    assert next(found)[0] == 1 and read == [0, 1, 2, 3]


def test_wrong_numbers_and_sizes_are_named(tiny: Segmenter, scene: tuple[np.ndarray, list[str]]) -> None:
    """An even window has no centre; masks of frames of several sizes fit no evaluation."""
    pixels, phrases = scene
    assert require_window(99) == 99
    for width in (0, 2, -1, True, 3.0, 101, 10**30 + 1):
        with pytest.raises(DcrisError, match="an odd number of frames"):
            require_window(width)  # type: ignore[arg-type]
    with pytest.raises(DcrisError, match="encoded at once must be 1 or more"):
        tiny.predict_frames([pixels], phrases, batch=0)
    with pytest.raises(DcrisError, match="no phrase was given"):
        tiny.predict_frames([pixels], [])
    with pytest.raises(DcrisError, match="all frames must have one size"):
        list(tiny.predict_frames([pixels, pixels[:-2]], phrases))
    assert list(tiny.predict_frames([], phrases)) == []
    for frames in (pixels, "a.mp4", 5):  # rows of one image, characters of a path
        with pytest.raises(DcrisError, match="frames must be several images"):
            tiny.predict_frames(frames, phrases)  # type: ignore[arg-type]
    for option in ({"memory": "x"}, {"memory": float("nan")}, {"channels": "grb"}):
        with pytest.raises(DcrisError):
            tiny.predict_frames([pixels], phrases, **option)  # type: ignore[arg-type]
