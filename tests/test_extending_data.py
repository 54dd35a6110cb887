"""A new data set layout takes one file's worth of code and one entry in READERS;
docs/extending_data.md shows the same.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcris.cli import main
from dcris.data.images import image_size
from dcris.data.masks import validate_segmentation
from dcris.data.readers import READERS, Reader
from dcris.data.readers.load import has_references, load_references
from dcris.data.table import OnError, ReferenceTable, bad, check_text, plain_path, skip_errors
from dcris.errors import DcrisError
from dcris.types import Expression, Reference

# ---- the layout: ROOT/boxes/DATASET.csv with an image, a box and an expression in each row -------


def find(root: Path, dataset: str, split_by: str | None) -> Sequence[str]:
    """There is one partition, called "boxes"."""
    return ["boxes"] if split_by in (None, "boxes") and (root / "boxes" / f"{dataset}.csv").is_file() else []


def load(root: Path, dataset: str, split_by: str, on_error: OnError | None) -> ReferenceTable:
    """Make a rectangular mask of each box."""
    path, references = root / "boxes" / f"{dataset}.csv", []
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            with skip_errors(on_error):
                references.append(read_row(row, number, path))
    return ReferenceTable(dataset, split_by, root, tuple(references))


def read_row(row: dict[str, str], number: int, path: Path) -> Reference:
    """Convert one row. Everything in it is checked here."""
    where = f"row {number}"
    image = path.parent / plain_path(row["image"], path, where, "image")
    size = image_size(image)
    try:
        left, top, right, bottom = (float(row[key]) for key in ("left", "top", "right", "bottom"))
    except ValueError as error:
        raise bad(path, f"{where} has a box that is not four numbers") from error
    polygon = [[left, top, right, top, right, bottom, left, bottom]]
    return Reference(
        ref_id=number,
        ann_ids=(number,),
        image_id=number,
        image_path=image,
        image_size=size,
        category="object",
        split=row["split"],
        segmentations=(validate_segmentation(polygon, size),),
        expressions=(Expression(number, check_text(row["phrase"], path, where, "phrase")),),
    )


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four images in two splits, and the entry that makes the layout known."""
    monkeypatch.setitem(READERS, "boxes", Reader("boxes/{dataset}.csv", find, load))
    (tmp_path / "boxes").mkdir()
    lines = ["image,left,top,right,bottom,split,phrase"]
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"boxes/{number}.png")
        lines.append(f"{number}.png,2,3,{12 + number},13,{'val' if number == 3 else 'train'},box {number}")
    (tmp_path / "boxes/toy.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_new_layout_is_read(root: Path) -> None:
    """By name, as part of a mixture, and under its only partition."""
    table = load_references(root, "toy")
    assert (table.dataset, table.split_by, table.splits()) == ("toy", "boxes", {"train": (3, 3), "val": (1, 1)})
    assert has_references(root, "toy", "boxes")
    assert not has_references(root, "toy", "unc")
    assert len(load_references(root, "mixed:toy(boxes)").references) == 4
    with pytest.raises(DcrisError, match=r"toy in .* is split by boxes, not by unc"):
        load_references(root, "toy", "unc")
    with pytest.raises(DcrisError, match=r"no data set other in .*, nor boxes/other\.csv"):
        load_references(root, "other")


def test_a_new_layout_is_checked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dcris data check` finds the errors of single rows."""
    assert main(["data", "check", str(root), "--dataset", "toy", "--deep"]) == 0
    assert "no problems" in capsys.readouterr().out
    with (root / "boxes/toy.csv").open("a") as file:
        file.write("0.png,2,x,9,9,val,box\n../0.png,2,3,9,9,val,box\n")
    assert main(["data", "check", str(root), "--dataset", "toy", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["val"]["references"] == 1
    assert [problem.partition("toy.csv: ")[2].partition(";")[0] for problem in report["problems"]] == [
        "row 5 has a box that is not four numbers",
        "row 6 has a 'image' that is not a plain path inside its folder: '../0.png'",
    ]


def test_a_model_is_trained_and_evaluated_on_a_new_layout(root: Path, tmp_path: Path) -> None:
    """Training and evaluation take any layout."""
    run = tmp_path / "run"
    data = ["--data", str(root), "--device", "cpu"]
    settings = ["--train.max_steps", "1", "--train.batch_size", "2", "--data.image_size", "56", "--data.workers", "0"]
    settings += ["--train.warmup_steps", "0"]
    assert main(["train", "dcris_tiny", *data, "--dataset", "toy", "--out", str(run), *settings]) == 0
    assert json.loads((run / "data.json").read_text())["split_by"] == "boxes"
    assert main(["evaluate", str(run), *data, "--split", "val", "--out", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["dataset"] == "toy"


def test_a_layout_that_is_one_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `single_file`, the path of the file stands for the data set, which is named after it."""

    def find_file(path: Path, dataset: str, split_by: str | None) -> Sequence[str]:
        return ["boxes"] if path.suffix == ".csv" else []

    def load_file(path: Path, dataset: str, split_by: str, on_error: OnError | None) -> ReferenceTable:
        return load(path.parent.parent, dataset, split_by, on_error)

    monkeypatch.setitem(READERS, "boxes", Reader("*.csv", find_file, load_file, single_file=True))
    assert load_references(root / "boxes/toy.csv", None).splits() == {"train": (3, 3), "val": (1, 1)}
    assert main(["data", "check", str(root / "boxes/toy.csv")]) == 0
    assert main(["data", "check", str(root / "boxes/toy.csv"), "--dataset", "other"]) == 2
