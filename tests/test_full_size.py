"""Data sets of the official sizes: everything that is in the files arrives, and `dcris data check`
recognises them.

How long it takes and how much memory is measured by benchmarks/data_loading.py.
"""

import json
from pathlib import Path

import pytest

from dcris.cli import main
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.registry import PARTITIONS
from full_size import PHOTOGRAPHS, write_official

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("key", PHOTOGRAPHS, ids="-".join)
def test_official_sizes_are_counted_right(key: tuple[str, str], tmp_path: Path) -> None:
    """A reader that loses a reference in ten thousand gives results that nobody can compare."""
    dataset, split_by = key
    table = load_references(write_official(tmp_path, dataset, split_by), dataset)
    assert table.splits() == PARTITIONS[key].splits
    assert len({reference.image_path for reference in table.references}) == PHOTOGRAPHS[key]
    assert len({expression.sent_id for reference in table.references for expression in reference.expressions}) == sum(
        expressions for _, expressions in PARTITIONS[key].splits.values()
    )
    kinds = {type(reference.segmentations[0]) for reference in table.references}
    assert kinds == {list, dict}  # crowds, too
    for reference in table.references[::500]:
        assert union_mask(reference.segmentations, reference.image_size).any()


@pytest.mark.parametrize(("split_by", "shared"), [("umd", False), ("google", True)])
def test_a_whole_official_set_passes_its_check(
    split_by: str, shared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has the right files must hear so: exit code 0, and every split official."""
    root = write_official(tmp_path, "refcocog", split_by, pictures=True)
    assert main(["data", "check", str(root), "--dataset", "refcocog", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["official"], report["problem_count"]) == (True, 0)
    assert (report["shared_images"] > 0) == shared
