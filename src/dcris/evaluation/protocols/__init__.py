"""Evaluation protocols by name. A new one is a file in this folder and an entry in PROTOCOLS.

The choice of protocol changes scores by points, so results of different protocols do not compare.
"""

from dataclasses import replace

import numpy as np

from dcris.errors import DcrisError
from dcris.evaluation.metrics import Overlap, Overlaps
from dcris.evaluation.none_rules import parse_none_rule
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.protocols.cgformer import CgFormer
from dcris.evaluation.protocols.cris import Cris
from dcris.evaluation.protocols.grefcoco import Grefcoco
from dcris.evaluation.protocols.gseval import GsEval
from dcris.evaluation.protocols.lavt import Lavt
from dcris.evaluation.protocols.lisa import Lisa
from dcris.evaluation.protocols.phrasecut import PhraseCut
from dcris.evaluation.protocols.refer import Refer
from dcris.evaluation.protocols.refzom import RefZom
from dcris.evaluation.protocols.rrefcoco import RRefcoco

__all__ = [
    "PROTOCOLS",
    "CgFormer",
    "Cris",
    "Grefcoco",
    "GsEval",
    "Lavt",
    "Lisa",
    "PhraseCut",
    "Protocol",
    "RRefcoco",
    "RefZom",
    "Refer",
    "get_protocol",
]

PROTOCOLS: dict[str, Protocol] = {
    "cris": Cris(),
    "lavt": Lavt(),
    "cgformer": CgFormer(),
    "refer": Refer(),
    "grefcoco": Grefcoco(),
    "refzom": RefZom(),
    "rrefcoco": RRefcoco(),
    "lisa": Lisa(),
    "phrasecut": PhraseCut(),
    "gseval": GsEval(),
}

_FIELDS = """
references expressions dataset split_by split data_sha256 protocol threshold none_rule refine strip_phrases
weights_sha256 precision device threads version torch numpy calibrated_on temperature trained_on analysis confidence
name minus intervals photographs
"""
RESULT_FIELDS = frozenset(_FIELDS.split())
"""What results, and the parts of their analysis, have beside scores."""


_EXAMPLE = Overlaps.of(
    [Overlap(1, 2, True, False, group, 1, 2), Overlap(1, 2, False, True, group, 1, 2)] for group in range(3)
)
"""Overlaps [3, 2], on which metrics are tried before hours of computation would be lost."""


def get_protocol(name: str, none_rule: str | None = None, boundary: bool = False) -> Protocol:
    """Return the protocol of that name.

    Args:
        name: key in PROTOCOLS.
        none_rule: rule for absent targets, as in `parse_none_rule`; None for the protocol's own.
        boundary: whether to add Boundary IoU to its metrics.

    Raises:
        DcrisError: if there is no such protocol, which the message lists, or no such rule, or the
            protocol has no absent targets, or its definition would lose scores.
    """
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise DcrisError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    protocol = replace(PROTOCOLS[name], boundary=True) if boundary else PROTOCOLS[name]
    _check(name, protocol)
    if none_rule is None:
        return protocol
    rule = parse_none_rule(none_rule)
    if protocol.none_rule is None:
        generalised = ", ".join(key for key, each in PROTOCOLS.items() if each.none_rule is not None)
        raise DcrisError(
            f"the protocol {name} has no rule for absent targets; leave out --none-rule, or use {generalised}"
        )
    return replace(protocol, none_rule=rule)


def _check(name: str, protocol: Protocol) -> None:
    """Raise DcrisError where results could not hold the scores of a protocol, and name it."""
    keys = [metric.key for metric in protocol.metrics]
    if protocol.name != name:
        raise DcrisError(f"the protocol {name} has the name {protocol.name!r}; give its class and its entry one name")
    if len(keys) < 2:
        raise DcrisError(f"the protocol {name} has fewer than two metrics; give it two or more")
    for key in keys:
        if keys.count(key) > 1 or key in RESULT_FIELDS:
            what = "a field of results" if key in RESULT_FIELDS else "the key of another of its metrics"
            raise DcrisError(f"the protocol {name} has a metric {key!r}, which is {what}; give it another key")
    for metric in protocol.metrics:
        for function in filter(None, (metric.value, metric.weight)):
            if np.shape(function(_EXAMPLE)) != np.shape(_EXAMPLE.iou):
                raise DcrisError(
                    f"the metric {metric.key} of the protocol {name} must compute a number for each expression, from arrays "
                    "[N] an array [N] and from [N, T] an array [N, T], such as `overlaps.iou`; dcris takes the mean or the sum"
                )
