"""`dcris data check`: check that a data set is complete, usable and of the official size."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dcris.data.check_report import Report
from dcris.data.images import image_size, read_image
from dcris.data.masks import mask_area
from dcris.data.readers.load import load_references
from dcris.data.registry import PARTITIONS, official_splits
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Reference
from dcris.utils.streams import counted
from dcris.utils.workers import cores


@dataclass(kw_only=True)
class CheckReport(Report):
    """Result of a check of a data set of images."""

    split_by: str
    images: int = 0
    """Number of distinct images."""
    shared_images: int = 0
    """Images in more than one split."""
    leaked_images: int = 0
    """Images in train and in another split."""

    @property
    def title(self) -> str:
        """Name of the data set and of its partition."""
        return f"{self.dataset} ({self.split_by})"

    @property
    def total(self) -> str:
        """Number of images, in words."""
        return counted(self.images, "image")

    def details(self) -> dict[str, Any]:
        """Return the partition and the numbers of images."""
        return {
            "split_by": self.split_by,
            "images": self.images,
            "shared_images": self.shared_images,
            "leaked_images": self.leaked_images,
        }


def check_dataset(
    root: Path,
    dataset: str | None,
    split_by: str | None = None,
    deep: bool = False,
    mask_threshold: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Check a data set in any layout: references, sizes, leaks, and every image and mask.

    A training image that is in another split too is a problem, except in the google partition of
    RefCOCOg and in unfiltered mixtures, which share images by design; other sharing is a warning. A
    size other than the official one is a warning, since one may work with a part of a data set.

    Args:
        root: as of `load_references`, like `dataset`, `split_by` and `mask_threshold`.
        dataset: name of the data set.
        split_by: its partition.
        deep: decode every image instead of reading only its header.
        mask_threshold: for mask images of more than two values.
        progress: receives the number of images checked so far.

    Raises:
        DcrisError: an annotation file cannot be used at all, so nothing else can be checked.
    """
    report = CheckReport(dataset="", split_by="")
    table = load_references(root, dataset, split_by, report.add_error, mask_threshold=mask_threshold)
    report.dataset, report.split_by = table.dataset, table.split_by
    report.splits, report.official_splits = table.splits(), official_splits(table.dataset, table.split_by)
    report.images = len({reference.image_path for reference in table.references})
    report.notes = list(table.notes)
    report.compare_sizes()
    _check_leaks(table, report)
    _check_files(table, report, deep, progress)
    _check_leftovers(table, report)
    return report


def _check_leaks(table: ReferenceTable, report: CheckReport) -> None:
    splits_of: defaultdict[Path, dict[str, int]] = defaultdict(dict)
    for reference in table.references:
        splits_of[reference.image_path].setdefault(reference.split, reference.ref_id)
    shared = {path: splits for path, splits in splits_of.items() if len(splits) > 1}
    leaked = {path: splits for path, splits in shared.items() if "train" in splits}
    report.shared_images, report.leaked_images = len(shared), len(leaked)
    partition = PARTITIONS.get((report.dataset, report.split_by))
    by_design = report.dataset.startswith("mixed-unfiltered") or (partition is not None and partition.shares_images)
    for path, splits in leaked.items() if not by_design else ():
        places = " and ".join(f"{split} (reference {ref_id})" for split, ref_id in splits.items())
        report.add_problem(
            f"{path} is in {places}, so training sees a test image; put all references of an image into one split"
        )
    if shared and (by_design or len(shared) > len(leaked)):
        reason = " by design" if by_design else ""
        seen = f"{len(leaked):,}" if leaked else "none"
        report.warnings.append(
            f"{counted(len(shared), 'image')} in more than one split{reason}; training sees {seen} of them"
        )


def _check_files(
    table: ReferenceTable, report: CheckReport, deep: bool, progress: Callable[[int], None] | None
) -> None:
    """Check each image and the mask of each annotation once."""
    first_references: dict[Path, Reference] = {}
    for reference in table.references:
        first_references.setdefault(reference.image_path, reference)
    image_problems: list[str | tuple[int, int] | None] = []
    # Threads suffice: reading waits for the disk, and the decoders release the GIL.
    with ThreadPoolExecutor(cores()) as pool:
        for problem in pool.map(partial(_check_image, deep=deep), first_references.values()):
            image_problems.append(problem)
            if progress is not None:
                progress(len(image_problems))
    problem_of = dict(zip(first_references, image_problems, strict=True))
    checked: set[int] = set()
    stretched: list[str] = []
    for reference in table.references:
        where = f"reference {reference.ref_id}"
        problem = problem_of.pop(reference.image_path, None)
        if isinstance(problem, str):
            report.add_problem(f"{where}: {problem}")
        elif problem:
            stretched.append("{} ({} x {})".format(reference.image_path.name, *problem))
        if reference.ignored is not None:
            try:
                mask_area(reference.ignored, reference.image_size)
            except DcrisError as error:
                report.add_problem(f"{where}: the ignored pixels: {error}")
        for ann_id, segmentation in zip(reference.ann_ids, reference.segmentations, strict=True):
            if id(segmentation) in checked:  # several references of gRefCOCO have the same object
                continue
            checked.add(id(segmentation))
            try:
                if not mask_area(segmentation, reference.image_size):
                    report.add_problem(f"{where}: the mask of annotation {ann_id} is empty; remove the reference")
            except DcrisError as error:
                report.add_problem(f"{where}: annotation {ann_id}: {error}")

    if stretched:
        report.warnings.append(
            f"{counted(len(stretched), 'image')} of another size (height x width) than the masks, resized to theirs, as in "
            f"the authors' code: {', '.join(stretched[:3])}{', ...' if len(stretched) > 3 else ''}"
        )


def _check_leftovers(table: ReferenceTable, report: CheckReport) -> None:
    """Compare RRSIS-D's XML files, which nothing reads, with its images: where their numbers
    differ, the drive's zip files were not all unpacked."""
    folder = table.root / "images/rrsisd/ann_split"
    if table.dataset == "rrsisd" and folder.is_dir():
        files = sum(1 for _ in folder.glob("*.xml"))
        if files != report.images:
            report.warnings.append(
                f"{folder} has {files:,} XML files for {report.images:,} images; they are not read, but the download may be "
                "incomplete"
            )


def _check_image(reference: Reference, deep: bool) -> str | tuple[int, int] | None:
    """Return the problem of a reference's image, in words; the size (H, W) of an image that is
    stretched; or None."""
    path = reference.image_path
    try:
        found = read_image(path).shape[:2] if deep else image_size(path)
    except DcrisError as error:
        return str(error)
    if found == reference.image_size:
        return None
    if reference.stretched:
        return found[0], found[1]
    return (
        "{} is {} x {} pixels (height x width), but the annotations say {} x {}, so the mask does not fit; download the "
        "image again".format(path, *found, *reference.image_size)
    )
