"""The cris protocol against a slow and obvious one: published scores were made so, pixel by pixel."""

import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcris.data.letterbox import Letterbox
from dcris.data.masks import decode_mask
from dcris.data.references import load_references
from dcris.errors import DcrisError
from dcris.metrics import overlap, summarise
from dcris.protocols import Protocol, get_protocol

CRIS = get_protocol("cris")
SIDE = 112


def slow_mask(logits: torch.Tensor, size: tuple[int, int], side: int) -> np.ndarray:
    """One map of logits [h, w] to the mask of one photograph, as the CRIS family's evaluation does it."""
    height, width = size
    square = F.interpolate(torch.sigmoid(logits)[None, None], (side, side), mode="bicubic", align_corners=True)[0, 0]
    scale = min(side / height, side / width)
    left, top = (side - width * scale) / 2, (side - height * scale) / 2
    photograph = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    fitted = np.array([[left, top], [left + width * scale, top], [left, top + height * scale]], np.float32)
    back = cv2.getAffineTransform(fitted, photograph)
    picture = cv2.warpAffine(square.numpy(), back, (width, height), flags=cv2.INTER_CUBIC, borderValue=0.0)
    return picture > 0.35


def slow_scores(masks: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> dict[str, float]:
    """Every average from its definition."""
    ious, shared_sum, covered_sum = [], 0, 0
    for mask, truth in zip(masks, truths, strict=True):
        shared, covered = int(np.logical_and(mask, truth).sum()), int(np.logical_or(mask, truth).sum())
        ious.append(shared / (covered + 1e-6))
        shared_sum, covered_sum = shared_sum + shared, covered_sum + covered
    scores = {"miou": 100 * sum(ious) / len(ious), "oiou": 100 * shared_sum / covered_sum}
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        scores[f"prec@{threshold}"] = 100 * sum(iou > threshold for iou in ious) / len(ious)
    return scores


def logits_like(mask: np.ndarray, seed: int, grid: int = 32) -> torch.Tensor:
    """[grid, grid] what a middling network would say of a mask: blurred, noisy, in places unsure."""
    box = Letterbox((mask.shape[0], mask.shape[1]), SIDE)
    square = torch.from_numpy(box.mask(mask.astype(np.uint8)))[None, None]
    coarse = F.interpolate(square, (grid, grid), mode="area")[0, 0]
    noise = torch.randn(grid, grid, generator=torch.Generator().manual_seed(seed))
    return 8 * coarse - 4 + 2 * noise


@functools.cache
def spotted(height: int, width: int, seed: int) -> np.ndarray:
    """[H, W] bool: a few ellipses, which may touch the edges."""
    picture, source = np.zeros((height, width), np.uint8), np.random.default_rng(seed)
    for _ in range(3):
        centre = (int(source.integers(width)), int(source.integers(height)))
        axes = (int(source.integers(1, width // 3 + 2)), int(source.integers(1, height // 3 + 2)))
        cv2.ellipse(picture, centre, axes, float(source.integers(180)), 0, 360, 1, -1)
    return picture.astype(bool)


def check(truths: Sequence[np.ndarray], logits: torch.Tensor, side: int = SIDE) -> dict[str, float]:
    """Masks agree in every pixel, and scores to what the published code adds to a denominator."""
    boxes = [Letterbox((truth.shape[0], truth.shape[1]), side) for truth in truths]
    ours = [CRIS.mask(picture) for picture in CRIS.probabilities(logits[:, None], boxes)]
    slow = [slow_mask(one, box.size, side) for one, box in zip(logits, boxes, strict=True)]
    for our, their, truth in zip(ours, slow, truths, strict=True):
        assert our.dtype == bool
        assert our.shape == truth.shape
        np.testing.assert_array_equal(our, their)
    scores = summarise(overlap(our, truth) for our, truth in zip(ours, truths, strict=True))
    assert scores == pytest.approx(slow_scores(slow, truths), abs=1e-4)
    return scores


def test_photographs_of_many_shapes() -> None:
    """Wide, tall, square, the square's own size, tiny, and a strip: a mixed-up axis or a half pixel shows at once."""
    sizes = [(427, 640), (640, 427), (300, 300), (112, 112), (113, 111), (7, 9), (3, 200), (1, 1), (480, 640)]
    truths = [spotted(*size, seed) for seed, size in enumerate(sizes)]
    logits = torch.stack([logits_like(truth, seed) for seed, truth in enumerate(truths)])
    scores = check(truths, logits)
    assert 5 < scores["miou"] < 95  # else the comparison says nothing
    assert scores["miou"] != pytest.approx(scores["oiou"], abs=0.1)


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("nothing", torch.full((32, 32), -30.0)),
        ("everything", torch.full((32, 32), 30.0)),
        ("at the threshold", torch.full((32, 32), float(np.log(0.35 / 0.65)))),
        ("a chessboard", 20.0 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2) - 10),
        ("one pixel", torch.full((32, 32), -9.0).index_put((torch.tensor(3), torch.tensor(17)), torch.tensor(9.0))),
        ("the rim", 18 * F.pad(torch.zeros(30, 30), (1, 1, 1, 1), value=1.0) - 9),
        ("beyond float16", torch.linspace(-1e5, 1e5, 1024).view(32, 32)),
        ("infinite", torch.tensor([-np.inf, np.inf]).float().repeat(512).view(32, 32)),
    ],
)
def test_adversarial_logits(name: str, logits: torch.Tensor) -> None:
    """Where bicubic overshoots most, at the border of the letterbox, and where a sigmoid saturates."""
    truths = [np.zeros((90, 140), bool), np.ones((90, 140), bool), spotted(140, 90, 1)]
    truths[0][45, 70] = True
    check(truths, logits.expand(3, 32, 32))


def test_bicubic_with_corners_aligned_by_hand() -> None:
    """The interpolation from its formula (a = -0.75), not from the library that both sides above call."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    def weights(source: int, target: int) -> np.ndarray:
        table = np.zeros((target, source))
        for row in range(target):
            place = row * (source - 1) / (target - 1)
            for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                x, a = abs(place - tap), -0.75
                near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
                table[row, min(max(tap, 0), source - 1)] += near if x <= 1 else far if x < 2 else 0
        return table

    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    expected = weights(5, 28) @ probabilities @ weights(7, 28).T
    # A photograph of the square's own size makes the warp the identity.
    found = next(CRIS.probabilities(logits[None, None], [Letterbox((28, 28), 28)]))
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-5)


def test_half_precision_logits_are_worked_on_in_float32() -> None:
    """Else evaluation on a GPU in bfloat16 rounds probabilities to steps of 1/256 around the threshold."""
    logits = logits_like(spotted(60, 80, 2), 2)[None, None].bfloat16()
    found = next(CRIS.probabilities(logits, [Letterbox((60, 80), SIDE)]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, next(CRIS.probabilities(logits.float(), [Letterbox((60, 80), SIDE)])))


def test_the_threshold_is_not_reached_by_equality() -> None:
    """Strict, as published."""
    edge = np.float32(0.35)
    assert CRIS.threshold == 0.35
    above = np.nextafter(edge, np.float32(1))
    found = Protocol(threshold=float(edge)).mask(np.array([[edge, above]]))
    np.testing.assert_array_equal(found, [[False, True]])


def test_an_unknown_protocol_lists_those_there_are() -> None:
    """Else `--protocol lavt` would score by another rule than it says."""
    with pytest.raises(DcrisError, match=r"'lavt'.*cris"):
        get_protocol("lavt")


@pytest.mark.parametrize(("dataset", "split"), [("cocomini", "val"), ("refcoco", "val"), ("refcocog", "val")])
def test_real_masks(refer_root: Path, dataset: str, split: str) -> None:
    """Instances as people drew them: holes, several parts, crowds, a few pixels."""
    references = load_references(refer_root, dataset).split(split)[:24]
    truths = [decode_mask(reference.segmentation, reference.image_size).astype(bool) for reference in references]
    logits = torch.stack([logits_like(truth, seed, 28) for seed, truth in enumerate(truths)])
    scores = check(truths, logits)
    assert 1 < scores["miou"] < 99
