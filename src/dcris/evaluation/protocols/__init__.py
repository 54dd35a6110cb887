"""Evaluation protocols by name. A new one is a file in this folder and an entry in PROTOCOLS.

The choice of protocol changes scores by points, so results of different protocols do not compare.
"""

from dcris.errors import DcrisError
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.protocols.cgformer import CgFormer
from dcris.evaluation.protocols.cris import Cris
from dcris.evaluation.protocols.lavt import Lavt
from dcris.evaluation.protocols.refer import Refer

__all__ = ["PROTOCOLS", "CgFormer", "Cris", "Lavt", "Protocol", "Refer", "get_protocol"]

PROTOCOLS: dict[str, Protocol] = {
    "cris": Cris(),
    "lavt": Lavt(),
    "cgformer": CgFormer(),
    "refer": Refer(),
}


def get_protocol(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        DcrisError: if there is none; the message lists those there are.
    """
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise DcrisError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
