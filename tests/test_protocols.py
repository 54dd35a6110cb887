"""Each protocol against a slow second implementation that follows the published code pixel by
pixel."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.transforms import Letterbox, Resize, ResizePad
from dcris.errors import DcrisError
from dcris.evaluation.metrics import (
    CURVE_THRESHOLDS,
    INCLUSIVE_METRICS,
    STANDARD_METRICS,
    Metric,
    overlap,
    overlap_curve,
    summarise,
)
from dcris.evaluation.protocols import PROTOCOLS, Cris, get_protocol

CRIS = Cris()
SIDE = 112
Size = tuple[int, int]


# ---- slow implementations ------------------------------------------------------------------------
# Each maps logits [h, w] in float64 and a truth [H, W] to values that are above 0 on the object,
# and
# the truth they are compared with.


def resized(values: torch.Tensor, size: Size, mode: str, corners: bool) -> torch.Tensor:
    return F.interpolate(values[None, None], size, mode=mode, align_corners=corners)[0, 0]


def cubic(x: np.ndarray) -> np.ndarray:
    x = abs(x)
    near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def slow_cris_probabilities(logits: torch.Tensor, size: Size, side: int) -> np.ndarray:
    square = np.pad(resized(torch.sigmoid(logits), (side, side), "bicubic", True).numpy(), 3)
    scale = min(side / size[0], side / size[1])
    top, left = np.float32((side - size[0] * scale) / 2), np.float32((side - size[1] * scale) / 2)
    rows, columns = np.arange(size[0]) * scale + top, np.arange(size[1]) * scale + left
    canvas = np.zeros(size)
    for dy in range(-1, 3):
        for dx in range(-1, 3):
            y, x = np.floor(rows).astype(int) + dy, np.floor(columns).astype(int) + dx
            taps = square[np.ix_((y + 3).clip(0, side + 5), (x + 3).clip(0, side + 5))]
            canvas += cubic(rows - y)[:, None] * cubic(columns - x) * taps
    return canvas


def slow_cris(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    return slow_cris_probabilities(logits, truth.shape, side) - np.float32(0.35), truth


def slow_lavt(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    classes = torch.stack([resized(torch.zeros_like(logits), (480, 480), "bilinear", True)] * 2)
    classes[1] = resized(logits, (480, 480), "bilinear", True)
    target = np.asarray(Image.fromarray(truth.astype(np.uint8), mode="P").resize((480, 480), Image.Resampling.NEAREST))
    return (classes[1] - classes[0]).numpy(), target == 1


def slow_cgformer(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    square = resized(logits, (side, side), "bilinear", True)
    return resized(torch.sigmoid(square), truth.shape, "bicubic", True).numpy() - 0.5, truth


def slow_refer(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    scale = side / max(truth.shape)
    height, width = int(truth.shape[0] * scale + 0.5), int(truth.shape[1] * scale + 0.5)
    square = resized(logits, (side, side), "bilinear", False)[: max(1, height), : max(1, width)]
    return resized(square, truth.shape, "bilinear", False).numpy(), truth


def slow_grefcoco(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    return resized(logits, (480, 480), "bilinear", False).numpy(), slow_lavt(logits, truth, side)[1]


def slow_rrefcoco(logits: torch.Tensor, truth: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    square = resized(logits, (480, 480), "bilinear", True)
    return resized(square, truth.shape, "bilinear", True).numpy(), truth


SLOW: dict[str, Callable[[torch.Tensor, np.ndarray, int], tuple[np.ndarray, np.ndarray]]]
SLOW = {"cris": slow_cris, "lavt": slow_lavt, "cgformer": slow_cgformer, "refer": slow_refer}
SLOW |= {"grefcoco": slow_grefcoco, "refzom": slow_lavt, "rrefcoco": slow_rrefcoco}
SLOW |= {"lisa": slow_refer, "phrasecut": slow_cris, "gseval": slow_cris}
every_protocol = pytest.mark.parametrize("name", PROTOCOLS)


def slow_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]], inclusive: bool) -> dict[str, float]:
    """Compute every metric from its definition."""
    ious, shared_sum, covered_sum = [], 0, 0
    for mask, truth in pairs:
        shared, covered = int(np.logical_and(mask, truth).sum()), int(np.logical_or(mask, truth).sum())
        ious.append(shared / covered if covered else 0)
        shared_sum, covered_sum = shared_sum + shared, covered_sum + covered
    scores = {"miou": 100 * sum(ious) / len(ious), "oiou": 100 * shared_sum / covered_sum}
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        counted = sum(iou >= threshold if inclusive else iou > threshold for iou in ious)
        scores[f"prec@{threshold}"] = 100 * counted / len(ious)
    return scores


# ---- logits and masks ----------------------------------------------------------------------------


def logits_like(mask: np.ndarray, seed: int, grid: int = 32) -> torch.Tensor:
    """Return [grid, grid] logits such as a mediocre network gives:

    blurred, noisy, partly uncertain.
    """
    coarse = resized(
        torch.from_numpy(Letterbox(mask.shape, SIDE).mask(mask.astype(np.uint8))), (grid, grid), "area", None
    )
    noise = torch.randn(grid, grid, generator=torch.Generator().manual_seed(seed))
    return 8 * coarse - 4 + 2 * noise


@cache
def spotted(height: int, width: int, seed: int) -> np.ndarray:
    """Return an [H, W] bool mask of a few ellipses, which may touch the edges."""
    canvas, source = np.zeros((height, width), np.uint8), np.random.default_rng(seed)
    for _ in range(3):
        centre = (int(source.integers(width)), int(source.integers(height)))
        axes = (int(source.integers(1, width // 3 + 2)), int(source.integers(1, height // 3 + 2)))
        cv2.ellipse(canvas, centre, axes, float(source.integers(180)), 0, 360, 1, -1)
    return canvas.astype(bool)


ADVERSARIAL = {
    "empty": torch.full((32, 32), -30.0),
    "full": torch.full((32, 32), 30.0),
    # Not symmetric, because whole lines would lie exactly on the threshold, where rounding
    # decides.
    "a chessboard": 3.0 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2) - 1.2137,
    "one pixel": torch.full((32, 32), -9.0).index_put((torch.tensor(3), torch.tensor(17)), torch.tensor(8.0)),
    "the border": 17 * F.pad(torch.zeros(30, 30), (1, 1, 1, 1), value=1.0) - 9,
    "beyond float16": torch.linspace(-1e5, 1.1e5, 1024).view(32, 32),
}


def check(name: str, truths: Sequence[np.ndarray], logits: torch.Tensor, side: int = SIDE) -> dict[str, float]:
    """Check that masks agree in every pixel and scores to 1e-4 percent."""
    protocol = get_protocol(name)
    fits = [protocol.transform(truth.shape, side) for truth in truths]
    ours, slow, ties = [], [], 0
    for canvas, truth, one in zip(protocol.probabilities(logits[:, None], fits), truths, logits, strict=True):
        mask, compared = canvas.numpy() > protocol.threshold, protocol.to_canvas(truth)
        margin, target = SLOW[name](one.double(), truth, side)
        np.testing.assert_array_equal(compared, target)
        assert mask.shape == margin.shape
        # Rounding decides pixels that are exactly on the threshold.
        unsure = abs(margin) < 1e-6
        ties += int(unsure.sum())
        expected = np.where(unsure, mask, margin > 0)
        np.testing.assert_array_equal(mask, expected)
        counted, *curve = overlap_curve(canvas, torch.from_numpy(compared), protocol.threshold)
        assert counted == overlap(mask, compared)
        assert len(curve) == len(CURVE_THRESHOLDS)
        ours.append(counted)
        slow.append((expected, target))
    assert ties <= 1e-4 * sum(mask.size for mask, _ in slow)
    # Other metrics are tested in test_generalised_protocols and test_referee_protocols.
    metrics = protocol.metrics if protocol.metrics == STANDARD_METRICS else INCLUSIVE_METRICS
    scores = summarise(ours, metrics)
    assert scores == pytest.approx(slow_scores(slow, metrics == INCLUSIVE_METRICS), abs=1e-4)  # in percent
    return scores


@every_protocol
def test_images_of_many_shapes(name: str) -> None:
    """Wide, tall, square, tiny and thin images reveal swapped axes and half-pixel offsets."""
    sizes = [(427, 640), (640, 427), (300, 300), (112, 112), (113, 111), (7, 9), (3, 200), (1, 1), (480, 640)]
    truths = [spotted(*size, seed) for seed, size in enumerate(sizes)]
    scores = check(name, truths, torch.stack([logits_like(truth, seed) for seed, truth in enumerate(truths)]))
    assert 5 < scores["miou"] < 95  # scores near 0 or 100 would hide errors
    assert scores["miou"] != pytest.approx(scores["oiou"], abs=0.1)


@every_protocol
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_logits(name: str, kind: str) -> None:
    """Logits where bicubic overshoots most, at the square's border, and where the sigmoid
    saturates."""
    truths = [np.zeros((90, 140), bool), np.ones((90, 140), bool), spotted(140, 90, 1)]
    truths[0][45, 70] = True
    check(name, truths, ADVERSARIAL[kind].expand(3, 32, 32))


@every_protocol
@pytest.mark.slow
def test_two_hundred_real_images(name: str, refer_root: Path) -> None:
    """Annotated instances with holes, several parts and crowds, against mediocre and extreme
    logits."""
    references = load_references(refer_root, "cocomini").references
    references = list({reference.image_id: reference for reference in references}.values())[:200]
    assert len(references) == 200
    truths = [union_mask(reference.segmentations, reference.image_size).astype(bool) for reference in references]
    extremes = list(ADVERSARIAL.values())
    logits = [
        logits_like(truth, seed) if seed % 2 else extremes[seed // 2 % len(extremes)]
        for seed, truth in enumerate(truths)
    ]
    scores = check(name, truths, torch.stack(logits), 448)
    assert 1 < scores["miou"] < 99


def test_bicubic_with_corners_aligned_by_hand() -> None:
    """Compare with the formula of bicubic interpolation (a = -0.75) instead of a library."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))

    def weights(source: int, target: int) -> np.ndarray:
        table = np.zeros((target, source))
        for row in range(target):
            place = row * (source - 1) / (target - 1)
            for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                table[row, min(max(tap, 0), source - 1)] += cubic(np.float64(place - tap))
        return table

    expected = weights(5, 28) @ torch.sigmoid(logits.double()).numpy() @ weights(7, 28).T
    # An image of the square's own size makes the warp the identity.
    found = next(CRIS.probabilities(logits[None, None], [Letterbox((28, 28), 28)]))
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-5)


def test_opencv_undoes_the_letterbox_in_the_same_way() -> None:
    """The published code calls cv2.

    Version 5 samples the same positions, version 4 rounds them to 1/32 pixel.
    """
    truths = [spotted(427, 640, 1), spotted(640, 480, 2), spotted(333, 500, 3)]
    for seed, truth in enumerate(truths):
        logits, box = logits_like(truth, seed), Letterbox(truth.shape, 448)
        square = resized(torch.sigmoid(logits), (448, 448), "bicubic", True).numpy()
        theirs = cv2.warpAffine(square, box.inverse(), truth.shape[::-1], flags=cv2.INTER_CUBIC, borderValue=0.0)
        ours = next(CRIS.probabilities(logits[None, None], [box])).numpy()
        assert abs(ours - theirs.clip(0, 1)).max() < (1e-4 if cv2.__version__ >= "5" else 5e-2)
        assert overlap(ours > 0.35, theirs > 0.35).iou > 0.9999 if cv2.__version__ >= "5" else 0.995


def test_half_precision_logits_are_resampled_in_float32() -> None:
    """In bfloat16, probabilities would be rounded to steps of 1/256 around the threshold."""
    logits = logits_like(spotted(60, 80, 2), 2)[None, None].bfloat16()
    found = next(CRIS.probabilities(logits, [Letterbox((60, 80), SIDE)]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, next(CRIS.probabilities(logits.float(), [Letterbox((60, 80), SIDE)])), rtol=0, atol=0
    )


def test_thresholds_exclude_equality() -> None:
    """Thresholds are strict, also on the curve."""
    edge = np.float32(0.35)
    values = torch.tensor([[edge, np.nextafter(edge, np.float32(1))]])
    assert get_protocol("cris").threshold == 0.35
    own, *curve = overlap_curve(values, torch.ones(1, 2, dtype=torch.bool), 0.35)
    assert own.intersection == 1
    assert [item.intersection for item in curve[5:8]] == [2, 1, 0]  # 0.30, 0.35, 0.40


def test_the_curve_is_the_overlap_at_each_threshold() -> None:
    """The curve has the overlap of the mask at each threshold."""
    probabilities = torch.rand(40, 50, generator=torch.Generator().manual_seed(1))
    probabilities[0, :2] = torch.tensor([0.0, 1.0])
    truth = torch.from_numpy(spotted(40, 50, 5))
    _, *curve = overlap_curve(probabilities, truth, 0.5)
    assert curve == [overlap((probabilities > t).numpy(), truth.numpy()) for t in CURVE_THRESHOLDS]


@pytest.mark.parametrize(("metrics", "inclusive"), [(STANDARD_METRICS, False), (INCLUSIVE_METRICS, True)])
def test_precision_at_exactly_one_half(metrics: tuple[Metric, ...], inclusive: bool) -> None:
    """LAVT counts an IoU of exactly 0.5 for precision at 0.5; CRIS does not."""
    half = overlap(np.array([[True, False]]), np.array([[True, True]]))
    assert summarise([half], metrics)["prec@0.5"] == (100.0 if inclusive else 0.0)
    assert get_protocol("lavt").metrics == INCLUSIVE_METRICS
    assert get_protocol("cris").metrics == STANDARD_METRICS


def test_masks_on_the_canvas_are_resized_to_the_image() -> None:
    """Reports show LAVT's masks at the image's own size."""
    lavt, truth = get_protocol("lavt"), spotted(90, 140, 1)
    assert lavt.to_canvas(truth).shape == (480, 480)
    np.testing.assert_array_equal(lavt.from_canvas(lavt.to_canvas(truth), (90, 140)), truth)


def test_an_unknown_protocol_raises() -> None:
    """The error lists the known protocols."""
    with pytest.raises(DcrisError, match=r"'lvat'.*cris, lavt, cgformer, refer"):
        get_protocol("lvat")


def test_transforms_fill_or_pad_the_square() -> None:
    """Resize fills the square, ResizePad pads right and below, and images of another size raise."""
    image = np.full((50, 100, 3), 200, np.uint8)
    assert (Resize((50, 100), 56).image(image, (1, 2, 3)) == 200).all()
    padded = ResizePad((50, 100), 56).image(image, (1.4, 2, 3))
    assert (padded[:28] == 200).all()
    assert (padded[28:] == (1, 2, 3)).all()
    for fit in (Resize, ResizePad, Letterbox):
        with pytest.raises(ValueError, match="but the transform"):
            fit((100, 50), 56).image(image, (0, 0, 0))
