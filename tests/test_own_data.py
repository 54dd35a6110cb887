"""The documentation and the worked example of your own data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dcris.assets
from dcris.data.check import check_dataset
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references

REPOSITORY = Path(__file__).parents[1]


def test_the_documented_lines_are_read(tmp_path: Path) -> None:
    """The lines in the documentation are valid: one object, several and none."""
    text = (REPOSITORY / "docs/own_data.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\{.*\}$", text, re.MULTILINE)
    for name in ("img/1.jpg", "masks/1.png", "masks/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 3), 255).save(tmp_path / name)
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    references = load_references(tmp_path / "my.jsonl", None).references
    assert [(len(each.expressions), len(each.segmentations)) for each in references] == [(2, 1), (1, 2), (1, 0)]


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".png"])
def test_the_documented_script_splits_object_images(tmp_path: Path, ending: str) -> None:
    """Images with a colour per object, as CVAT exports them beside images of any ending, become a
    mask and a line for each object.
    """
    code = (REPOSITORY / "docs/own_data.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    objects = np.zeros((6, 8, 3), np.uint8)
    objects[1:3, 1:4] = (128, 0, 0)
    objects[4:, 5:] = (0, 0, 128)
    objects[0, 7] = (0, 0, 128)
    for folder in ("SegmentationObject", "JPEGImages"):
        (tmp_path / folder).mkdir()
    Image.fromarray(objects).quantize(16).save(tmp_path / "SegmentationObject/a b.png")
    Image.new("RGB", (8, 6)).save(tmp_path / f"JPEGImages/a b{ending}")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert check_dataset(tmp_path / "my.jsonl", None, deep=True).problem_count == 0
    masks = [union_mask(item.segmentations, (6, 8)) for item in load_references(tmp_path / "my.jsonl", None).references]
    assert sorted(int(mask.sum()) for mask in masks) == [6, 7]
    np.testing.assert_array_equal(sum(masks), objects.any(axis=2))


@pytest.mark.slow
def test_the_worked_example(tmp_path: Path) -> None:
    """The script makes a fine-tuned model of a folder of images, and fine-tuning improves the
    score.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ["bash", str(REPOSITORY / "examples/own_data/run.sh"), str(tmp_path / "work")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = [json.loads((tmp_path / "work" / name).read_text()) for name in ("before.json", "after.json")]
    assert [score["dataset"] for score in scores] == ["things", "things"]
    assert scores[1]["miou"] > scores[0]["miou"] + 15
    start = json.loads((tmp_path / "work/tuned/data.json").read_text())["start"]
    assert Path(start["checkpoint"]) == Path(dcris.assets.__file__).parent / "photos"
    assert "<html" in (tmp_path / "work/report.html").read_text()
    assert len(list((tmp_path / "work/predictions").glob("*.mask.png"))) == 2
