"""Read a data set in any layout (see dcris.data.readers), or a mixture of several."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dcris.data.mixing import Mixture, mix, parse_mixture
from dcris.data.readers import READERS, Reader
from dcris.data.registry import DATASETS, PARTITIONS, VIDEO_SETS
from dcris.data.table import ErrorCount, OnError, ReferenceTable
from dcris.errors import DcrisError
from dcris.types import Segmentation, SoftMask
from dcris.utils.arguments import PathLike, as_path, require, require_number
from dcris.utils.files import reading

_MOST_NAMES = 20
"""Data sets that an error names."""


def load_references(
    root: PathLike,
    dataset: str | None = None,
    split_by: str | None = None,
    on_error: OnError | None = None,
    *,
    mask_threshold: float | None = None,
) -> ReferenceTable:
    """Read a data set into a table of references.

    Args:
        root: folder of the data sets, or a data set that is one file (`.jsonl`).
        dataset: name of the data set, or of a mixture such as "mixed" or
            "mixed-unfiltered:refcoco,refcocog(google)"; see dcris.data.mixing. Ignored for one
            file.
        split_by: which partition; may be omitted if there is only one.
        on_error: receives the error of each reference that cannot be used, which is then skipped.
        mask_threshold: for mask images of more than two values; see dcris.types.SoftMask.

    Raises:
        DcrisError: anything is missing, malformed or contradictory. The message names the file, the
            reference and the field.
    """
    place = as_path(root, "the data set's place")
    for value, what in ((dataset, "the data set's name"), (split_by, "split_by")):
        if value is not None and "\0" in require(value, str, what):
            raise DcrisError(f"{what} must not contain NUL characters: {value!r}")
    errors = ErrorCount(on_error)
    with reading(place), _no_garbage_collection():  # errors that no reader handles, such as names that are too long
        table = _load(place, dataset, split_by, errors)
    if not table.references and not errors.count:
        raise DcrisError(f"{table.dataset} in {root} has no references; correct its files or download it again")
    if mask_threshold is None:
        return table
    threshold = require_number(mask_threshold, "the mask threshold")

    def soft(segmentation: Segmentation) -> Segmentation:
        return SoftMask(segmentation, threshold) if isinstance(segmentation, Path) else segmentation

    return replace(
        table,
        references=tuple(
            replace(
                reference,
                segmentations=tuple(map(soft, reference.segmentations)),
                ignored=None if reference.ignored is None else soft(reference.ignored),
            )
            for reference in table.references
        ),
    )


def is_single_file(root: Path) -> bool:
    """Return whether `root` is itself a data set, one file that is named after its stem."""
    return _single_file(root) is not None


def _single_file(root: Path) -> tuple[Reader, str] | None:
    """Return the layout of the data set that the file `root` is, and its partition; None if it is
    none."""
    readers = (reader for reader in READERS.values() if reader.single_file)
    return next(((reader, found[0]) for reader in readers if (found := reader.find(root, root.stem, None))), None)


def _refuse_file(root: Path) -> None:
    """Raise DcrisError if `root`, which is no data set, is a file, such as an export."""
    if root.is_file():
        raise DcrisError(
            f"{root} is no data set: of files, only .jsonl files are; convert the export of an annotation tool with "
            "`dcris data import`, and give the .jsonl file that it writes"
        )


def has_references(root: Path, dataset: str, split_by: str) -> bool:
    """Return whether a partition of a data set exists below `root`, in any layout."""
    return any(reader.find(root, dataset, split_by) for reader in _layouts(dataset))


def _layouts(dataset: str) -> list[Reader]:
    """Return the layouts that a data set may have, in the order in which they are searched."""
    readers = (reader for reader in READERS.values() if not reader.single_file)
    return [reader for reader in readers if reader.dataset in (None, dataset)]


def list_data_sets(root: Path, dataset: str | None = None) -> list[tuple[str, str]]:
    """Return the name and the partition of each data set below `root`, in any layout, or of the one
    that `root` is.

    Known ones come first, then folders by name. Nothing but `dataset` is looked for if it is given.

    Raises:
        DcrisError: `root` is another file; or the files of `dataset` or of a known data set have no
            split in their names. Any other such folder is not a data set.
    """
    if (single := _single_file(root)) is not None:
        return [(root.stem, single[1])]
    _refuse_file(root)
    entries = (entry for place in (root, root / "anns") if place.is_dir() for entry in sorted(place.iterdir()))
    folders = [entry.name for entry in entries if entry.is_dir()]
    # Folders in which known data sets are, under other names than theirs.
    theirs = {(partition.cris_folder or "").lower() for partition in PARTITIONS.values()}
    theirs |= {name.replace("+", "plus") for name in DATASETS} | {*DATASETS}
    theirs |= {folder.lower() for each in VIDEO_SETS.values() for folder in each.folders}
    names = dict.fromkeys([*DATASETS, *(name for name in folders if name.lower() not in theirs)])
    found_all = dict[tuple[str, str], None]()
    for name in names if dataset is None else [dataset]:
        for reader in _layouts(name):
            try:
                found_all |= {(name, split_by): None for split_by in reader.find(root, name, None)}
            except DcrisError:
                if name in DATASETS or dataset is not None:
                    raise
    return list(found_all)


def _load(root: Path, dataset: str | None, split_by: str | None, on_error: OnError | None) -> ReferenceTable:
    if (single := _single_file(root)) is not None:
        return single[0].load(root, root.stem, single[1], on_error)
    if not root.exists():
        raise DcrisError(f"there is no file or folder {root}; check the path of the data")
    _refuse_file(root)
    if dataset is None:
        raise DcrisError(f"{root} may contain several data sets; {_choose(root) or 'choose one with --dataset'}")
    if mixture := parse_mixture(dataset):
        if split_by is not None:
            raise DcrisError(f"a mixture takes no --split-by; name partitions as in mixed:refcoco({split_by})")
        return _load_mixture(root, dataset, mixture)
    if dataset in VIDEO_SETS:
        raise DcrisError(
            f"{dataset} is a data set of videos, not of images; `dcris data check`, `dcris train`, `dcris predict --data`, "
            "`dcris evaluate` and `dcris score` read it"
        )
    layouts = _layouts(dataset)
    for reader in layouts:
        found = reader.find(root, dataset, split_by)
        if len(found) > 1:
            raise DcrisError(
                f"{root} contains several partitions of {dataset}; choose one with --split-by: {', '.join(sorted(found))}"
            )
        if found:
            return reader.load(root, dataset, found[0], on_error)
    if others := sorted({name for reader in layouts for name in reader.find(root, dataset, None)}):
        raise DcrisError(f"{dataset} in {root} is split by {', '.join(others)}, not by {split_by}; change --split-by")
    places = [reader.files.format(dataset=dataset, split_by=split_by or "...") for reader in layouts]
    source = DATASETS[dataset].source if dataset in DATASETS else ""
    advice = f"get it from {source}" if source else "download one with `dcris data fetch`"
    raise DcrisError(
        f"there is no data set {dataset} in {root}: found neither {', nor '.join(places)}; {advice}, or "
        f"{_choose(root) or 'check the root folder and the name; your own data are a .jsonl file'}"
    )


def _load_mixture(root: Path, name: str, mixture: Mixture) -> ReferenceTable:
    """Read the data sets of a mixture and combine them.

    The val and test splits of all known partitions below `root` are held out, whether they are in
    the mixture or not.
    """
    tables = [load_references(root, *member) for member in mixture.members]
    ((twice, times),) = Counter(f"{table.dataset} {table.split_by}" for table in tables).most_common(1)
    if times > 1:
        raise DcrisError(f"{name!r} is not a list of different data sets: it names {twice} twice; leave one out")
    others = [
        load_references(root, *partition)
        for partition in (PARTITIONS if mixture.filtered else ())
        if partition not in mixture.members and has_references(root, *partition)
    ]
    return mix(name, tables, others, filtered=mixture.filtered)


def _choose(root: Path) -> str:
    """Name the data sets below `root`, or else a file of own data in it, as an advice; empty if
    none is found."""
    names, own = list[str](), list[Path]()
    with suppress(DcrisError, OSError):  # the caller raises an error already
        names = list(dict.fromkeys(name for name, _ in list_data_sets(root)))
        own = sorted(path for path in root.glob("*.jsonl") if is_single_file(path))
    if own and not names:
        return f"give the file of your own data, {own[0]}"
    return f"choose one of its data sets with --dataset: {', '.join(names[:_MOST_NAMES])}" if names else ""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector.

    It would repeatedly traverse millions of new objects and find nothing.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
