"""Sets of the official sizes in the layouts of others: all arrives, and the check knows it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcris.data.check import check_dataset
from dcris.data.readers.load import load_references
from dcris.data.registry import DATASETS, PARTITIONS
from layouts import parquet
from referee import H, W, box, gseval_lines, refcocom_rows, rrsisd_records, runs, task, write_phrasecut

pytestmark = pytest.mark.slow


def rrsisd(root: Path) -> None:
    """17,402 references, each with its image; the images themselves are not needed to count."""
    (first, *_), instances = rrsisd_records()
    sizes = PARTITIONS["rrsisd", "unc"].splits
    splits = [split for split, (count, _) in sizes.items() for _ in range(count or 0)]
    numbers = range(1, len(splits) + 1)
    references = [
        first
        | {"ref_id": n, "ann_id": n, "image_id": n, "split": split}
        | {"sentences": [{"sent_id": n, "sent": f"a plane {n}", "raw": f"a plane {n}"}]}
        for n, split in zip(numbers, splits, strict=True)
    ]
    mask = [runs(box(2, 2, 20, 30, (H, H)))]
    content = {
        "images": [{"id": n, "file_name": f"{n:05d}.jpg", "height": H, "width": H} for n in numbers],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "segmentation": mask} for n in numbers],
        "categories": instances["categories"],
    }
    (root / "rrsisd").mkdir()
    (root / "rrsisd/refs(unc).p").write_bytes(pickle.dumps(references, 2))
    (root / "rrsisd/instances.json").write_text(json.dumps(content))


def refsegrs(root: Path) -> None:
    """4,420 lines; the masks are links to one file."""
    (root / "RefSegRS/masks").mkdir(parents=True)
    original = root / "mask.tif"
    Image.fromarray(box(3, 3, 30, 20) * np.uint8(255)).save(original)
    number = 0
    for split, (_, count) in PARTITIONS["refsegrs", "official"].splits.items():
        lines = []
        for _ in range(count or 0):
            number += 1
            lines.append(f"{number} road {number}")
            (root / f"RefSegRS/masks/{number}.tif").hardlink_to(original)
        (root / f"RefSegRS/output_phrase_{split}.txt").write_text("\n".join(lines))


def reasonseg(root: Path) -> None:
    """1,218 images, two of them without a polygon; links to one file."""
    original = root / "image.jpg"
    Image.new("RGB", (W, H)).save(original)
    shape = {"label": "target", "points": [[2, 2], [9, 2], [9, 9]]}
    for split, (count, _) in PARTITIONS["reasonseg", "official"].splits.items():
        folder = root / f"reason_seg/ReasonSeg/{split}"
        folder.mkdir(parents=True)
        for number in range(count or 0):
            shapes = [] if split == "test" and number < 2 else [shape]
            content = {"text": ["a thing", "another"], "is_sentence": False, "shapes": shapes}
            (folder / f"{number}.json").write_text(json.dumps(content))
            (folder / f"{number}.jpg").hardlink_to(original)


def phrasecut(root: Path) -> None:
    """345,486 tasks, of which 310,816 in one file."""
    write_phrasecut(root)
    home, images = root / "VGPhraseCut_v0", {"train": 101, "val": 102, "miniv": 103, "test": 104}
    info = json.loads((home / "image_data_split.json").read_text())
    info.append({"image_id": 104, "width": W, "height": H, "split": "test", "coco_id": None})
    (home / "image_data_split.json").write_text(json.dumps(info))
    for split, (count, _) in PARTITIONS["phrasecut", "official"].splits.items():
        one = json.dumps(task("NAME", images[split], [[[[2, 3], [9, 3], [9, 8], [2.5, 8]]]], "a cup"))
        with (home / f"refer_{split}.json").open("w") as file:
            file.write("[")
            file.write(", ".join(one.replace("NAME", f"{images[split]}__{number}") for number in range(count or 0)))
            file.write("]")


def refcocom(root: Path) -> None:
    """2,080 masks with 5,598 expressions in 1,190 images, which are not in this file."""
    (first, _) = refcocom_rows()
    sample = first["samples"][1]
    rows = []
    for number in range(2_080):
        image = number % 1_190
        if number < 1_190:
            row = {"image_id": image, "file_name": f"COCO_train2014_{image:012d}.jpg", "samples": []}
            rows.append(row)
        texts = [f"man {place}" for place in range(3 if number < 5_598 - 2 * 2_080 else 2)]
        rows[image]["samples"].append(sample | {"id": number, "image_id": image, "sentences": texts})
    path = root / "refcoco-m/data/validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet(rows))


def gseval(root: Path) -> None:
    """3,715 lines."""
    first = gseval_lines()[0]
    (root / "GSEval").mkdir()
    lines = (json.dumps(first | {"idx": n, "image_path": f"unlabeled2017/{n:012d}.jpg"}) for n in range(3_715))
    (root / "GSEval/GroundingSuite-Eval.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("write", [rrsisd, refsegrs, reasonseg, phrasecut, refcocom, gseval])
def test_official_sizes_are_counted_right(write: Callable[[Path], None], tmp_path: Path) -> None:
    """A reader that loses a line in ten thousand gives scores that nobody can compare."""
    write(tmp_path)
    dataset = {"refcocom": "refcoco-m"}.get(write.__name__, write.__name__)
    table = load_references(tmp_path, dataset)
    official = PARTITIONS[dataset, DATASETS[dataset].split_by].splits
    assert set(table.splits()) == set(official)
    for split, (references, expressions) in table.splits().items():
        known = official[split]
        assert known[0] in (None, references)
        assert known[1] in (None, expressions)
    sent_ids = {each.sent_id for item in table.references for each in item.expressions}
    assert len(sent_ids) == sum(expressions for _, expressions in table.splits().values())


def test_the_check_says_that_a_size_is_official(tmp_path: Path) -> None:
    reasonseg(tmp_path)
    report = check_dataset(tmp_path, "reasonseg")
    assert report.official
    assert report.problem_count == 0
    assert report.notes[0].startswith("2 images have no polygon of a target (test/0, test/1)")
    assert not report.warnings
