"""Whatever holds references -> one table of references."""

from pathlib import Path

from dcris.data.refer import load_refer
from dcris.data.table import ReferenceTable


def load_references(root: Path, dataset: str, split_by: str | None = None) -> ReferenceTable:
    """Read a data set from whatever layout it is in. Without `split_by`, the only one that is there is taken.

    Raises DcrisError for anything missing, malformed or contradictory, naming the file, the entry and the field.
    """
    return load_refer(root, dataset, split_by)
