"""Full tuning: every weight of both towers is trained ("full-tuning" of table 2)."""

from typing import Literal

from dcris.config import MethodConfig

_NEVER_READ = ("vision.mask_token", "text.logit_scale")
"""Published weights without a part in segmenting, so without a gradient."""


class FullConfig(MethodConfig):
    """All that is read when segmenting trains, and is in the checkpoint.

    The towers stay in evaluation mode as ever. For them it is the same: they have neither dropout nor batch statistics.
    """

    name: Literal["full"] = "full"

    def starts_plain(self) -> bool:
        """It adds nothing."""
        return True

    def trains(self, name: str) -> bool:
        """All but what is never read."""
        return name not in _NEVER_READ
