"""BitFit (Ben Zaken et al. 2021): of the towers' weights, only the biases are trained."""

from typing import ClassVar, Literal

from dcris.config import MethodConfig


class BitFitConfig(MethodConfig):
    """Every bias of both towers: projections, MLPs, norms and the patch embedding.

    As in the source, this includes the biases of the keys, although attention does not depend on
    them.
    """

    name: Literal["bitfit"] = "bitfit"
    foldable: ClassVar[bool] = True

    def trains(self, name: str) -> bool:
        """Return whether the weight is a bias."""
        return name.endswith(".bias")
