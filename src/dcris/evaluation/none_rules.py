"""Rules that decide whether a prediction says that nothing in the image is described ("none").

Papers differ in them, and the choice changes scores by points, so every result of a protocol that
has absent targets names its rule.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from dcris.errors import DcrisError

RULES = "head, any-pixel, pixels:N or score:T"
"""How rules are written."""


@dataclass(frozen=True)
class NoneRule(ABC):
    """A rule for "none"."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name on the command line and in result files."""

    @abstractmethod
    def says_none(self, pixels: int, present: float | None, score: float | None) -> bool:
        """Return whether a prediction says "none".

        Args:
            pixels: positive pixels of the predicted mask, on the pixels that are compared.
            present: probability that the target is present, in 0..1; None if it is unknown.
            score: confidence in 0..1; None if it is unknown.

        Raises:
            DcrisError: the rule needs what is unknown.
        """


@dataclass(frozen=True)
class Head(NoneRule):
    """The presence head decides: none if `present` is below 0.5.

    Source: ReLA, gres_model/evaluation/refer_evaluation.py (the greater of two classes), and
    robust-ref-seg, utils/validation.py.
    """

    name: ClassVar[str] = "head"

    def says_none(self, pixels: int, present: float | None, score: float | None) -> bool:  # noqa: D102
        if present is None:
            raise DcrisError(
                "the rule 'head' needs the presence probability ('present'), but the model has no presence head; choose "
                "another rule, such as --none-rule pixels:50"
            )
        return present < 0.5


@dataclass(frozen=True)
class Pixels(NoneRule):
    """None if the mask has fewer pixels than `least`.

    With 1, no positive pixel: the rule of Ref-ZOM (RIS-DMMI, test.py). With 50, that of the GRES
    paper for methods without a presence head.
    """

    least: int

    @property
    def name(self) -> str:  # noqa: D102
        return "any-pixel" if self.least == 1 else f"pixels:{self.least}"

    def says_none(self, pixels: int, present: float | None, score: float | None) -> bool:  # noqa: D102
        return pixels < self.least


@dataclass(frozen=True)
class LeastScore(NoneRule):
    """None if the score is below a threshold, as DeRIS has it (0.7 and 0.9)."""

    threshold: float

    @property
    def name(self) -> str:  # noqa: D102
        return f"score:{self.threshold:g}"

    def says_none(self, pixels: int, present: float | None, score: float | None) -> bool:  # noqa: D102
        if score is None:
            raise DcrisError(
                "the rule 'score' needs a 'score' for each mask, but there is none; choose another rule, such as --none-rule "
                "pixels:50"
            )
        return score < self.threshold


HEAD = Head()
ANY_PIXEL = Pixels(1)


def parse_none_rule(text: str) -> NoneRule:
    """Return the rule of a name such as "pixels:50".

    Raises DcrisError if there is none.
    """
    kind, _, value = text.partition(":")
    for rule in (HEAD, ANY_PIXEL):
        if text == rule.name:
            return rule
    if kind == "pixels" and value.isdecimal() and 0 < int(value[:20]) < 10**12:
        return Pixels(int(value))
    if kind == "score":
        try:
            threshold = float(value)
        except ValueError:
            threshold = math.nan
        if 0 < threshold <= 1:
            return LeastScore(threshold)
    raise DcrisError(
        f"there is no rule {text!r} for absent targets; choose {RULES}, with N of 1 or more and T above 0 and at most 1"
    )
