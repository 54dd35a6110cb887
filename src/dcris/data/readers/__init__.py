"""Data set layouts: one file each, all read into the same table, registered in READERS.

To add a layout, write a file like the others here and add an entry to READERS; see
docs/extending_data.md. Use dcris.data.readers.load.load_references to read a data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcris.data.readers import cris_layout, gseval, jsonl, parquet, phrasecut, reasonseg, refer_layout, refsegrs
from dcris.data.table import OnError, ReferenceTable


@dataclass(frozen=True, slots=True)
class Reader:
    """How to detect and to read a data set layout."""

    files: str
    """Where the files are below the root, for error messages; may contain {dataset} and
    {split_by}."""
    find: Callable[[Path, str, str | None], Sequence[str]]
    """(root, dataset, split_by) -> the partitions of the data set that are there in this layout, as
    values of `split_by`. If `split_by` is given, that one or none."""
    load: Callable[[Path, str, str, OnError | None], ReferenceTable]
    """(root, dataset, split_by, on_error) -> the references of one partition that `find` returned.

    Raises DcrisError for anything missing, malformed or contradictory, naming file, reference and
    field. With `on_error`, the error of a single reference goes there instead, and it is
    skipped."""
    single_file: bool = False
    """Whether the root is itself the data set, one file that is named after its stem."""
    dataset: str | None = None
    """The only data set that has this layout; None if any may have it."""


READERS: dict[str, Reader] = {
    "jsonl": Reader("*.jsonl", jsonl.find, jsonl.load, single_file=True),
    "refer": Reader("{dataset}/refs({split_by}).p or .json", refer_layout.find, refer_layout.load),
    "cris": Reader("anns/{dataset}/*.json", cris_layout.find, cris_layout.load),
    "parquet": Reader("{dataset}/**/*.parquet", parquet.find, parquet.load),
    "refsegrs": Reader("RefSegRS/output_phrase_SPLIT.txt", refsegrs.find, refsegrs.load, dataset="refsegrs"),
    "reasonseg": Reader("reason_seg/ReasonSeg/SPLIT/*.json", reasonseg.find, reasonseg.load, dataset="reasonseg"),
    "phrasecut": Reader("VGPhraseCut_v0/refer_SPLIT.json", phrasecut.find, phrasecut.load, dataset="phrasecut"),
    "gseval": Reader("GSEval/GroundingSuite-Eval.jsonl", gseval.find, gseval.load, dataset="gseval"),
}
"""By name. If a data set is there in several layouts, the first one is read."""
