"""BitFit (Ben Zaken et al. 2021): of the towers, the biases alone are trained."""

from typing import Literal

from dcris.config import MethodConfig


class BitFitConfig(MethodConfig):
    """Every bias of both towers: of projections, MLPs, norms and the patch embedding.

    The biases of the keys are among them, as in the source, although attention does not depend on them.
    """

    name: Literal["bitfit"] = "bitfit"

    def starts_plain(self) -> bool:
        """It adds nothing."""
        return True

    def trains(self, name: str) -> bool:
        """Whether it is a bias."""
        return name.endswith(".bias")
