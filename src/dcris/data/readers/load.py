"""Whatever holds references -> one table of references."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dcris.data.mixing import load_mixture, parse_mixture
from dcris.data.readers.cris_layout import find_prepared, load_prepared
from dcris.data.readers.jsonl import is_jsonl, load_jsonl
from dcris.data.readers.parquet import SPLIT_BY, find_parquet, load_parquet
from dcris.data.readers.refer import find_refer, load_refer
from dcris.data.table import OnError, ReferenceTable
from dcris.errors import DcrisError
from dcris.types import SoftMask
from dcris.utils.arguments import PathLike, as_path, require, require_number


def load_references(
    root: PathLike,
    dataset: str | None,
    split_by: str | None = None,
    on_error: OnError | None = None,
    *,
    mask_threshold: float | None = None,
) -> ReferenceTable:
    """Read a data set from whatever layout it is in. Without `split_by`, the only one that is there is taken.

    REFER's layout comes first, then the one that CRIS's tools prepare, then Parquet: what is nearest to the release counts.
    A `.jsonl` file is one data set and has its own name, so there the other two do not count. For names such as "mixed" or
    "mixed-unfiltered:refcoco,refcocog(google)" see dcris.data.mixing.

    Masks that are pictures have two values, 0 and another, unless a `mask_threshold` is given (see dcris.types.SoftMask).

    Raises DcrisError for anything missing, malformed or contradictory, naming the file, the entry and the field; what is wrong
    with a single reference goes to `on_error`, where that is given.
    """
    place = as_path(root, "the data set's place")
    for value, what in ((dataset, "the data set's name"), (split_by, "split_by")):
        if value is not None and "\0" in require(value, str, what):
            raise DcrisError(f"{what} has to be a name, and is {value!r}")
    try:
        with _no_collection():
            table = _load(place, dataset, split_by, on_error)
    except OSError as error:  # what no reader foresees, such as names that are too long
        raise DcrisError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
    if mask_threshold is None:
        return table
    threshold = require_number(mask_threshold, 0, "the mask threshold")
    references = (
        replace(reference, segmentation=SoftMask(reference.segmentation, threshold))
        if isinstance(reference.segmentation, Path)
        else reference
        for reference in table.references
    )
    return replace(table, references=tuple(references))


def _load(root: Path, dataset: str | None, split_by: str | None, on_error: OnError | None) -> ReferenceTable:
    if is_jsonl(root):
        return load_jsonl(root, on_error)
    if dataset is None:
        raise DcrisError(f"{root} may hold several data sets; name one with --dataset")
    if mixture := parse_mixture(dataset):
        if split_by is not None:
            raise DcrisError(f"a mixture takes no --split-by; name partitions as in mixed:refcoco({split_by})")
        return load_mixture(root, dataset, mixture, load_references, has_references)
    if find_refer(root, dataset, split_by):
        return load_refer(root, dataset, split_by, on_error)
    if find_prepared(root, dataset, split_by):
        return load_prepared(root, dataset, split_by, on_error)
    if find_parquet(root, dataset):
        return load_parquet(root, dataset, split_by, on_error)
    name = f"refs({split_by or '...'}).p"
    raise DcrisError(
        f"there is no data set {dataset} in {root}: neither {dataset}/{name}, nor anns/{dataset}/*.json, nor "
        f"{dataset}/**/*.parquet; `dcris data fetch` gets one, or name another root folder"
    )


def has_references(root: Path, dataset: str, split_by: str) -> bool:
    """Whether that partition of a data set is there, in any layout."""
    in_parquet = SPLIT_BY.get(dataset) == split_by and find_parquet(root, dataset)
    return bool(find_refer(root, dataset, split_by) or find_prepared(root, dataset, split_by) or in_parquet)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put off the search for unreachable cycles, which goes through millions of new objects again and again and finds none."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
