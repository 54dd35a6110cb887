"""The protocol of LAVT."""

from dataclasses import dataclass

from dcris.data.transforms import Resize, Transform
from dcris.evaluation.metrics import INCLUSIVE_METRICS
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix


@dataclass(frozen=True)
class Lavt(Protocol):
    """Protocol of LAVT: masks are compared on a square of 480 pixels.

    LAVT takes the greater of two class scores, which for one logit is a probability above 0.5. The
    true mask is resized to the square by nearest neighbour. Source: test.py and
    data/dataset_refer_bert.py of LAVT-RIS.
    """

    threshold: float = 0.5
    name = "lavt"
    transform = Resize
    metrics = INCLUSIVE_METRICS
    interpolate_logits = True
    canvas = 480
    sums_polygons = True

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (resize_matrix(cells, 480, "bilinear", align_corners=True) for cells in grid)
        return rows, columns
