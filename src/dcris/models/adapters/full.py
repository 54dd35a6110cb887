"""Full tuning: every weight of both towers is trained ("full-tuning" of table 2)."""

from typing import ClassVar, Literal

from dcris.config import MethodConfig

_UNUSED = ("vision.mask_token", "text.logit_scale")
"""Published weights that segmentation does not use, so they have no gradient."""


class FullConfig(MethodConfig):
    """All weights that segmentation uses are trained, and are in the checkpoint.

    The towers stay in evaluation mode. That makes a difference for EfficientNet only, whose batch
    norms keep their statistics: the other towers have neither dropout nor batch norm.
    """

    name: Literal["full"] = "full"
    foldable: ClassVar[bool] = True

    def trains(self, name: str) -> bool:
        """Return True, except for the unused weights."""
        return name not in _UNUSED
