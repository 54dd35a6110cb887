"""The protocol of GSEval."""

from dataclasses import dataclass, replace

from dcris.evaluation.metrics import CIOU, MIOU
from dcris.evaluation.protocols.cris import Cris

_GIOU = replace(MIOU, key="giou", title="gIoU")


@dataclass(frozen=True)
class GsEval(Cris):
    """Protocol of GroundingSuite's GSEval: the mean IoU of masks, which its authors call gIoU, also
    by class (stuff, part, multi, single).

    Two empty masks have IoU 0. The authors' code scores masks; those of models are made as in
    `cris`. It averages over the expressions that have a prediction; here, a missing one is an error
    or counts as empty. cIoU is not in it. Source: evaluate_grounding.py of GroundingSuite.
    """

    name = "gseval"
    metrics = (_GIOU, CIOU)
