"""`dcris data check`: counts, problems and warnings."""

import json

import numpy as np
import pytest
from PIL import Image

from dcris.cli import main
from dcris.data.check import check_dataset
from dcris.data.masks import encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.data.registry import PARTITIONS, Partition
from dcris.errors import DcrisError


def test_a_sound_set_has_no_problems(tiny_refer):
    report = check_dataset(tiny_refer.write(), "tiny", "toy")
    assert (report.problem_count, report.problems) == (0, [])
    assert (report.images, report.official) == (2, None)
    assert report.splits == {"train": (1, 2), "val": (1, 2), "testA": (1, 1)}
    assert "no problems" in report.table()
    assert json.loads(json.dumps(report.to_json()))["splits"]["val"] == {"references": 1, "expressions": 2}


def test_a_training_image_in_another_split_is_a_leak(tiny_refer):
    """Training on a test image makes the test score too high."""
    tiny_refer.references[1]["split"] = "train"
    report = check_dataset(tiny_refer.write(), "tiny")
    assert (report.problem_count, report.shared_images, report.leaked_images, report.warnings) == (1, 1, 1, [])
    assert "1.png is in testA (reference 10) and train (reference 11), so training sees a test" in report.problems[0]
    tiny_refer.references[1]["split"] = "testA"
    report = check_dataset(tiny_refer.write(), "tiny")
    assert (report.problem_count, report.shared_images, report.warnings) == (0, 0, [])


def test_sharing_among_the_other_splits_is_worth_a_warning(tiny_refer):
    """No test score is affected, but a threshold chosen on val was chosen on test images."""
    report = check_dataset(tiny_refer.write(), "tiny")
    assert (report.problem_count, report.shared_images) == (0, 1)  # image 1 is in val and testA
    assert report.warnings == ["1 image in more than one split; training sees none of them"]


def test_refcocogs_google_partition_shares_images_by_design(tiny_refer):
    """The official file is not damaged."""
    tiny_refer.dataset, tiny_refer.split_by = "refcocog", "google"
    tiny_refer.references[1]["split"] = "train"
    report = check_dataset(tiny_refer.write(), "refcocog")
    assert (report.problem_count, report.shared_images) == (0, 1)
    assert "1 image in more than one split by design; training sees 1 of them" in report.warnings


def test_a_mask_saved_as_jpeg_is_a_problem_unless_there_is_a_threshold(tmp_path, capsys):
    """Compression noise around the object would silently count as the object."""
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:60] = 255
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=75)
    line = {"image": "a.png", "mask": "m.jpg", "expressions": ["box"]}
    (tmp_path / "my.jsonl").write_text(json.dumps(line))
    assert main(["data", "check", str(tmp_path / "my.jsonl")]) == 2
    assert "m.jpg has more values than 0 and one other" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "my.jsonl"), "--mask-threshold", "0.5"]) == 0
    plain, soft = (load_references(tmp_path / "my.jsonl", None, mask_threshold=value) for value in (None, 0.5))
    (reference,) = soft.references
    assert np.array_equal(union_mask(reference.segmentations, reference.image_size), mask > 0)
    assert plain.sha256() != soft.sha256()  # otherwise a run would be resumed with other masks


def test_missing_and_wrong_images_are_problems(tiny_refer):
    """Masks do not fit an image that was resized; both errors are found before training."""
    root = tiny_refer.write()
    (tiny_refer.image_folder / "1.png").unlink()
    Image.new("RGB", (12, 16)).save(tiny_refer.image_folder / "2.png")
    report = check_dataset(root, "tiny")
    assert report.problem_count == 2  # one for each image, although image 1 has two references
    assert "there is no image file" in report.problems[0]
    assert "reference 12: " in report.problems[1]
    assert "16 x 12 pixels (height x width), but the annotations say 32 x 24" in report.problems[1]
    assert "problem: reference 12" in report.table()


def test_only_a_deep_check_decodes_the_images(tiny_refer):
    root = tiny_refer.write()
    path = tiny_refer.image_folder / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert check_dataset(root, "tiny").problem_count == 0
    report = check_dataset(root, "tiny", deep=True)
    assert report.problem_count == 1
    assert "1.png" in report.problems[0]


def test_an_empty_mask_is_a_problem(tiny_refer):
    """Its IoU is always 0, and the loss trains the model to predict nothing."""
    tiny_refer.instances["annotations"][1]["segmentation"] = encode_mask(np.zeros((30, 40), bool))
    report = check_dataset(tiny_refer.write(), "tiny")
    assert report.problems == ["reference 11: the mask of annotation 72 is empty; remove the reference"]


def test_a_long_list_of_problems_is_cut_and_counted(tiny_refer):
    """Without its images, a real data set would print twenty thousand lines."""
    annotation, reference = tiny_refer.instances["annotations"][0], tiny_refer.references[0]
    for number in range(25):
        image_id, ann_id = 1000 + number, 2000 + number
        image = {"id": image_id, "file_name": f"none{number}.png", "height": 30, "width": 40}
        sentences = [{"sent_id": 5000 + number, "sent": "it"}]
        tiny_refer.instances["images"].append(image)
        tiny_refer.instances["annotations"].append({**annotation, "id": ann_id, "image_id": image_id})
        tiny_refer.references.append(
            {**reference, "ref_id": 900 + number, "ann_id": ann_id, "image_id": image_id, "sentences": sentences}
        )
    report = check_dataset(tiny_refer.write(), "tiny")
    assert (report.problem_count, len(report.problems)) == (25, 10)
    assert "... and 15 more" in report.table()
    assert report.to_json()["problem_count"] == 25


def test_each_malformed_reference_is_a_problem(tiny_refer):
    """All errors of a file are reported at once."""
    tiny_refer.references[0].pop("ann_id")
    tiny_refer.references[2]["sentences"] = []
    tiny_refer.references.append(7)
    report = check_dataset(tiny_refer.write(), "tiny")
    assert [problem.partition(": ")[2].partition(";")[0] for problem in report.problems] == [
        "reference 10 has no 'ann_id'",
        "reference 12 has an empty 'sentences'",
        "entry 4 is not an object with named fields",
    ]
    assert report.splits == {"val": (1, 2)}
    tiny_refer.references = [7]
    assert check_dataset(tiny_refer.write(), "tiny").table().count("problem: ") == 1


def test_a_file_that_cannot_be_read_at_all_is_an_error(tiny_refer):
    tiny_refer.references = []
    with pytest.raises(DcrisError, match="not a list of references"):
        check_dataset(tiny_refer.write(), "tiny")


def test_official_sets_are_compared_with_their_official_size(tiny_refer, monkeypatch):
    tiny_refer.dataset, tiny_refer.split_by = "refcoco", "unc"
    root = tiny_refer.write()
    report = check_dataset(root, "refcoco")
    assert report.official is False
    assert report.problem_count == 0  # a subset can be used, but its scores do not compare
    assert any("not the official size: train, val, testA" in warning for warning in report.warnings)
    assert any("official splits that are missing: testB" in warning for warning in report.warnings)
    assert "42,404 / 120,624" in report.table()
    tiny = Partition({"train": (1, 2), "val": (1, 2), "testA": (1, 1)}, cris_folder="refcoco")
    monkeypatch.setitem(PARTITIONS, ("refcoco", "unc"), tiny)
    report = check_dataset(root, "refcoco")
    assert report.official is True
    assert report.table().count("yes") == 3


def test_the_real_set_is_sound(refer_root):
    report = check_dataset(refer_root, "cocomini")
    assert (report.problem_count, report.images, report.official) == (0, 468, None)
    assert report.splits == {"train": (1039, 2154), "val": (104, 216), "testA": (131, 271)}
    report = check_dataset(refer_root, "refcoco", deep=True)
    assert (report.problem_count, report.official) == (0, False)
