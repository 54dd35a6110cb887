"""`dcris data check`: is everything there that training and evaluation will ask for, and is it what the papers used?"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dcris.data.images import image_size, read_image
from dcris.data.masks import mask_area
from dcris.data.readers.load import load_references
from dcris.data.scenes import cores
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Reference

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

_SHARING_BY_DESIGN = {("refcocog", "google")}
"""Partitions that were made by object and not by photograph."""

_SHOWN = 10

_MOST_WRONG = 100_000
"""Wrong references after which reading stops: 30 MB of another kind of file may have 15 million lines."""


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
        count = self.problem_count
        lines.append("no problems" if not count else f"{count:,} problem{'s' if count > 1 else ''}")
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


def check_dataset(
    root: Path,
    dataset: str | None,
    split_by: str | None = None,
    deep: bool = False,
    mask_threshold: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check a data set in any layout: its references, their counts, leaks, and that each image and each mask can be used.

    Of an image only the header is read, unless `deep`, which decodes it. Each image and each mask is looked at once.
    `mask_threshold` is that of `load_references`.
    `progress` is told how many images have been.

    A training photograph that is in another split too is a problem, except in RefCOCOg's google partition and in mixtures that
    are not filtered, which share by design; other sharing is a warning. So is another size than the official one: a part is
    fine to work with.

    Raises DcrisError where a file of annotations is unusable as a whole: nothing behind it can be checked then.
    """
    wrong: list[str] = []

    def note(error: DcrisError) -> None:
        wrong.append(str(error))
        if len(wrong) == _MOST_WRONG:
            raise DcrisError(f"{len(wrong):,} references are wrong, so reading stopped; the first: {wrong[0]}")

    table = load_references(root, dataset, split_by, note, mask_threshold=mask_threshold)
    report = CheckReport(
        dataset=table.dataset,
        split_by=table.split_by,
        splits=table.splits(),
        images=len({reference.image_path for reference in table.references}),
        shared_images=0,
        leaked_images=0,
        official=None,
        notes=list(table.notes),
    )
    for problem in wrong:
        report.add_problem(problem)
    _compare(report)
    _find_leaks(table, report)
    _look(table, report, deep, progress)
    return report


def _compare(report: CheckReport) -> None:
    sizes = OFFICIAL_SIZES.get((report.dataset, report.split_by))
    if sizes is None:
        return
    missing = [name for name in sizes if name not in report.splits]
    odd = [name for name, counts in report.splits.items() if sizes.get(name) != counts]
    report.official = not missing and not odd
    if odd:
        report.warnings.append(f"not the official size: {', '.join(odd)}; published results do not compare")
    if missing:
        report.warnings.append(f"official splits that are not here: {', '.join(missing)}")


def _find_leaks(table: ReferenceTable, report: CheckReport) -> None:
    splits_of: defaultdict[Path, dict[str, int]] = defaultdict(dict)
    for reference in table.references:
        splits_of[reference.image_path].setdefault(reference.split, reference.ref_id)
    shared = {path: splits for path, splits in splits_of.items() if len(splits) > 1}
    leaked = {path: splits for path, splits in shared.items() if "train" in splits}
    report.shared_images, report.leaked_images = len(shared), len(leaked)
    by_design = (report.dataset, report.split_by) in _SHARING_BY_DESIGN or report.dataset.startswith("mixed-unfiltered")
    for path, splits in leaked.items() if not by_design else ():
        places = " and ".join(f"{split} (reference {ref_id})" for split, ref_id in splits.items())
        report.add_problem(
            f"{path} is in {places}, so training sees a test image; keep all references of an image in one split"
        )
    if shared and (by_design or len(shared) > len(leaked)):
        why = ", as this set was made" if by_design else ""
        seen = f"{len(leaked):,}" if leaked else "none"
        report.warnings.append(f"{len(shared):,} images are in more than one split{why}; training sees {seen} of them")


def _look(table: ReferenceTable, report: CheckReport, deep: bool, progress: Callable[[int], None] | None) -> None:
    firsts: dict[Path, Reference] = {}
    for reference in table.references:
        firsts.setdefault(reference.image_path, reference)
    complaints: list[str | None] = []
    # Threads are enough: reading waits for the disk, and decoders let others run meanwhile.
    with ThreadPoolExecutor(cores()) as pool:
        for complaint in pool.map(partial(_look_at_image, deep=deep), firsts.values()):
            complaints.append(complaint)
            if progress is not None:
                progress(len(complaints))
    of_image = dict(zip(firsts, complaints, strict=True))
    annotations: set[int] = set()
    for reference in table.references:
        where = f"reference {reference.ref_id}"
        if complaint := of_image.pop(reference.image_path, None):
            report.add_problem(f"{where}: {complaint}")
        if reference.ann_id not in annotations:
            annotations.add(reference.ann_id)
            try:
                if not mask_area(reference.segmentation, reference.image_size):
                    report.add_problem(
                        f"{where}: the mask of annotation {reference.ann_id} is empty; leave the reference out"
                    )
            except DcrisError as error:
                report.add_problem(f"{where}: annotation {reference.ann_id}: {error}")


def _look_at_image(reference: Reference, deep: bool) -> str | None:
    """What is wrong with a reference's photograph."""
    path = reference.image_path
    try:
        found = read_image(path).shape[:2] if deep else image_size(path)
    except DcrisError as error:
        return str(error)
    if found == reference.image_size:
        return None
    return (
        "{} is {} x {} pixels (height x width), but the annotations say {} x {}, so the mask does not fit; fetch the image "
        "again".format(path, *found, *reference.image_size)
    )
