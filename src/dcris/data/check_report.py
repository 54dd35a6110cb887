"""What a check of a data set of images or of videos reports, as text and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcris.data.registry import agrees
from dcris.errors import DcrisError
from dcris.utils.streams import one_line

_MAX_SHOWN = 10

_MAX_ERRORS = 100_000
"""Reading stops after this many unusable references or expressions: 30 MB of another kind of file
may have 15 million lines."""


@dataclass(kw_only=True)
class Report:
    """Findings that all kinds of data sets share.

    Problems stop a run sooner or later; warnings matter when scores are compared.
    """

    dataset: str
    splits: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Number of `units` and of expressions in each split."""
    official_splits: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """The official numbers; empty if none is known."""
    official: bool | None = None
    """Whether every split has its official size, as far as that is known; None if none is known."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what was left out or combined."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """The first ten problems, in words."""
    problem_count: int = 0

    units = "references"
    """What `splits` counts beside expressions."""

    @property
    def title(self) -> str:
        """First line of the text."""
        return self.dataset

    @property
    def total(self) -> str:
        """Line below the splits."""
        raise NotImplementedError

    def add_problem(self, problem: str) -> None:
        """Count a problem and keep its text if it is among the first ten."""
        self.problem_count += 1
        if len(self.problems) < _MAX_SHOWN:
            self.problems.append(problem)

    def add_error(self, error: DcrisError) -> None:
        """Count the error of a reference or an expression that is left out.

        Raises DcrisError if there are so many that reading should stop.
        """
        self.add_problem(str(error))
        if self.problem_count == _MAX_ERRORS:
            raise DcrisError(f"reading stopped after {_MAX_ERRORS:,} errors; the first: {self.problems[0]}")

    def compare_sizes(self) -> None:
        """Set `official`, and warn of splits that are missing or have another than their official
        size: one may work with a part of a data set."""
        expected = self.official_splits
        if not expected:
            return
        missing = [name for name in expected if name not in self.splits]
        verdicts = {name: agrees(counts, expected.get(name, (0, 0))) for name, counts in self.splits.items()}
        different = [name for name, same in verdicts.items() if same is False]
        if missing or different:
            self.official = False
        elif True in verdicts.values():
            self.official = True
        if different:
            self.warnings.append(f"not the official size: {', '.join(different)}; published results do not compare")
        if missing:
            self.warnings.append(f"official splits that are missing: {', '.join(missing)}")

    def table(self) -> str:
        """Return the report as text for a terminal."""
        lines = [self.title, f"{'split':<10}{self.units:>12}{'expressions':>13}  official"]
        for name, counts in self.splits.items():
            verdict = ""
            if expected := self.official_splits.get(name):
                same = agrees(counts, expected)
                sizes = " / ".join("?" if size is None else f"{size:,}" for size in expected)
                verdict = "unknown" if same is None else "yes" if same else sizes
            lines.append(f"{one_line(name):<10}{counts[0]:>12,}{counts[1]:>13,}  {verdict}".rstrip())
        lines.append(self.total)
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"problem: {problem}" for problem in self.problems]
        if self.problem_count > len(self.problems):
            lines.append(f"problem: ... and {self.problem_count - len(self.problems):,} more")
        count = self.problem_count
        lines.append("no problems" if not count else f"{count:,} problem{'s' if count > 1 else ''}")
        return "\n".join(map(one_line, lines))  # names and sentences contain what strangers wrote

    def details(self) -> dict[str, Any]:
        """Return what only this kind of report has, for JSON."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data for a JSON file."""
        return {
            "dataset": self.dataset,
            **self.details(),
            "splits": {
                name: {self.units: count, "expressions": expressions}
                for name, (count, expressions) in self.splits.items()
            },
            "official": self.official,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "problems": list(self.problems),
            "problem_count": self.problem_count,
        }
