"""The protocol of Ref-ZOM."""

from dataclasses import dataclass, replace

from dcris.evaluation.metrics import MIOU, N_ACC, OIOU, PRECISION_THRESHOLDS, of_targets, precision
from dcris.evaluation.none_rules import ANY_PIXEL, NoneRule
from dcris.evaluation.protocols.lavt import Lavt

_ACC = replace(N_ACC, key="acc", title="Acc")


@dataclass(frozen=True)
class RefZom(Lavt):
    """Protocol of Ref-ZOM (DMMI): that of LAVT, on whose code it is built, for the expressions that
    have a target, and the share of the others for which no pixel is predicted. Unlike in LAVT,
    polygons are united.

    Source: test.py and refer/refer.py of RIS-DMMI.
    """

    none_rule: NoneRule | None = ANY_PIXEL
    name = "refzom"
    sums_polygons = False
    metrics = (
        of_targets(OIOU),
        of_targets(MIOU),
        _ACC,
        *(of_targets(precision(limit, inclusive=True)) for limit in PRECISION_THRESHOLDS),
    )
