"""`dcris data check`: is everything there that training and evaluation will ask for, and is it what the papers used?"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcris.data.images import image_size, read_image
from dcris.data.jsonl import is_jsonl, load_jsonl
from dcris.data.masks import decode_mask
from dcris.data.references import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError

OFFICIAL_SIZES: Mapping[tuple[str, str], Mapping[str, tuple[int, int]]] = {
    ("refcoco", "unc"): {
        "train": (42_404, 120_624),
        "val": (3_811, 10_834),
        "testA": (1_975, 5_657),
        "testB": (1_810, 5_095),
    },
    ("refcoco+", "unc"): {
        "train": (42_278, 120_191),
        "val": (3_805, 10_758),
        "testA": (1_975, 5_726),
        "testB": (1_798, 4_889),
    },
    ("refcocog", "umd"): {"train": (42_226, 80_512), "val": (2_573, 4_896), "test": (5_023, 9_602)},
    ("refcocog", "google"): {"train": (44_822, 85_474), "val": (5_000, 9_536)},
}
"""References and expressions of each split, by data set and `split_by`, as the REFER release gives them."""

_SHOWN = 10


@dataclass
class CheckReport:
    """What was found. Problems stop a run sooner or later; warnings are things to know before comparing numbers."""

    dataset: str
    split_by: str
    splits: dict[str, tuple[int, int]]
    """References and expressions of each split."""
    images: int
    """Distinct photographs."""
    shared_images: int
    """Photographs that occur in more than one split."""
    leaked_images: int
    """Those of them of which one split is train."""
    official: bool | None
    """Whether every split has its official size; None where the data set has no official size."""
    notes: list[str] = field(default_factory=list)
    """What the reader of the data set has to say of it."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """The first ten, in words."""
    problem_count: int = 0

    def add_problem(self, problem: str) -> None:
        """Count a problem, and keep it where it is among the first ten."""
        self.problem_count += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)

    def table(self) -> str:
        """The report as text for a terminal."""
        sizes = OFFICIAL_SIZES.get((self.dataset, self.split_by), {})
        lines = [f"{self.dataset} ({self.split_by})", f"{'split':<10}{'references':>12}{'expressions':>13}  official"]
        for name, counts in self.splits.items():
            expected = (
                "" if name not in sizes else "yes" if sizes[name] == counts else "{:,} / {:,}".format(*sizes[name])
            )
            lines.append(f"{name:<10}{counts[0]:>12,}{counts[1]:>13,}  {expected}".rstrip())
        lines.append(f"{self.images:,} images")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"problem: {problem}" for problem in self.problems]
        if self.problem_count > len(self.problems):
            lines.append(f"problem: ... and {self.problem_count - len(self.problems):,} more")
        lines.append(f"{self.problem_count:,} problems" if self.problem_count else "no problems")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data for a JSON file."""
        return {
            "dataset": self.dataset,
            "split_by": self.split_by,
            "splits": {
                name: {"references": references, "expressions": expressions}
                for name, (references, expressions) in self.splits.items()
            },
            "images": self.images,
            "shared_images": self.shared_images,
            "leaked_images": self.leaked_images,
            "official": self.official,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "problems": list(self.problems),
            "problem_count": self.problem_count,
        }


def check_dataset(root: Path, dataset: str | None, split_by: str | None = None, deep: bool = False) -> CheckReport:
    """Check a data set in any layout: counts, leaks, and that each image and each mask can be used.

    Of an image only the header is read, unless `deep`, which decodes it. Each image and each mask is looked at once. Raises
    DcrisError where the files of references themselves are unusable: nothing behind them can be checked then. Of JSON Lines,
    each line that is wrong is a problem.
    """
    wrong: list[DcrisError] = []
    table = load_jsonl(root, wrong.append) if is_jsonl(root) else load_references(root, dataset, split_by)
    splits_of_image: defaultdict[Path, set[str]] = defaultdict(set)
    for reference in table.references:
        splits_of_image[reference.image_path].add(reference.split)
    report = CheckReport(
        dataset=table.dataset,
        split_by=table.split_by,
        splits=table.splits(),
        images=len(splits_of_image),
        shared_images=sum(len(splits) > 1 for splits in splits_of_image.values()),
        leaked_images=sum(len(splits) > 1 and "train" in splits for splits in splits_of_image.values()),
        official=None,
        notes=list(table.notes),
    )
    for error in wrong:
        report.add_problem(str(error))
    _compare(report)
    _look(table, report, deep)
    return report


def _compare(report: CheckReport) -> None:
    sizes = OFFICIAL_SIZES.get((report.dataset, report.split_by))
    if sizes is not None:
        missing = [name for name in sizes if name not in report.splits]
        odd = [name for name, counts in report.splits.items() if sizes.get(name) != counts]
        report.official = not missing and not odd
        if odd:
            report.warnings.append(f"not the official size: {', '.join(odd)}; published results do not compare")
        if missing:
            report.warnings.append(f"official splits that are not here: {', '.join(missing)}")
    if report.shared_images:
        seen = (
            f"training sees {report.leaked_images:,} of them" if report.leaked_images else "training sees none of them"
        )
        report.warnings.append(f"{report.shared_images:,} images are in more than one split; {seen}")


def _look(table: ReferenceTable, report: CheckReport, deep: bool) -> None:
    images: set[Path] = set()
    annotations: set[int] = set()
    for reference in table.references:
        where = f"reference {reference.ref_id}"
        if reference.image_path not in images:
            images.add(reference.image_path)
            try:
                height, width = read_image(reference.image_path).shape[:2] if deep else image_size(reference.image_path)
                if (height, width) != reference.image_size:
                    recorded = "{} x {}".format(*reference.image_size)
                    report.add_problem(
                        f"{where}: {reference.image_path} is {height} x {width} pixels (height x width), but "
                        f"the annotations say {recorded}, so the mask does not fit; fetch the image again"
                    )
            except DcrisError as error:
                report.add_problem(f"{where}: {error}")
        if reference.ann_id not in annotations:
            annotations.add(reference.ann_id)
            try:
                if not decode_mask(reference.segmentation, reference.image_size).any():
                    report.add_problem(
                        f"{where}: the mask of annotation {reference.ann_id} is empty; leave the reference out"
                    )
            except DcrisError as error:
                report.add_problem(f"{where}: annotation {reference.ann_id}: {error}")
