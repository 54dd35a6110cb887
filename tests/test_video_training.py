"""Frames of videos as images to train on."""

import json
from pathlib import Path

import numpy as np
import pytest

from dcris.cli import main
from dcris.data.frames import load_frames
from dcris.data.masks import true_mask
from dcris.errors import DcrisError
from video_layouts import (
    DAVIS_FRAMES,
    WRITERS,
    YOUTUBE_FRAMES,
    davis_text,
    rectangle,
    write_davis,
    write_mevis,
    write_youtube,
)


def test_a_reference_is_an_object_in_a_frame(tmp_path: Path) -> None:
    """Object 2 is in the first frame only: training on an empty mask elsewhere would unlearn it."""
    table = load_frames(write_youtube(tmp_path), "ref_youtube_vos", 1, ["train", "val"])
    assert table.splits() == {"train": (7, 10)}
    found = [
        (each.image_path.parent.name, each.image_path.stem, [said.text for said in each.expressions])
        for each in table.references
    ]
    penguin, bus = ["a penguin", "a Penguin  moving"], ["a bus"]
    assert found == [
        ("003234408d", "00000", penguin),
        ("003234408d", "00000", ["the other one"]),
        ("003234408d", "00005", penguin),
        ("003234408d", "00010", penguin),
        *(("0043f083b5", frame, bus) for frame in YOUTUBE_FRAMES),
    ]
    masks = [true_mask(each, each.expressions[0]).mask for each in table.references]
    np.testing.assert_array_equal(masks[0], rectangle(1, 0) & ~rectangle(2, 0))
    np.testing.assert_array_equal(masks[1], rectangle(2, 0))
    np.testing.assert_array_equal(masks[3], rectangle(1, 2))
    ids = [each.ref_id for each in table.references], [e.sent_id for r in table.references for e in r.expressions]
    assert all(len(set(some)) == len(some) for some in ids)
    assert [each.image_id for each in table.references][:3] == [1, 1, 3]


def test_a_step_leaves_frames_out(tmp_path: Path) -> None:
    """Neighbouring frames are alike, and the first is always there."""
    table = load_frames(write_davis(tmp_path), "ref_davis17", 3, ["train", "valid"])
    assert {each.image_path.stem for each in table.references} == {DAVIS_FRAMES[0], DAVIS_FRAMES[3]}
    assert table.splits() == {"train": (6, 24), "valid": (4, 16)}
    assert [each.text for each in table.references[0].expressions] == [
        davis_text("classic-car", 1, annotator) for annotator in range(4)
    ]
    assert "train: one of 3 frames of 2 videos, 4 images with a target" in table.notes[0]


def test_several_objects_are_one_target(tmp_path: Path) -> None:
    """MeViS's expressions may describe two birds, and may describe nothing in a frame."""
    table = load_frames(write_mevis(tmp_path), "mevis", 1, ["train", "valid_u", "valid"])
    assert table.splits() == {"valid_u": (6, 6)}
    union = [each for each in table.references if each.expressions[0].text == "Two birds moving"]
    np.testing.assert_array_equal(true_mask(union[0], union[0].expressions[0]).mask, rectangle(1, 0) | rectangle(2, 0))
    np.testing.assert_array_equal(true_mask(union[1], union[1].expressions[0]).mask, rectangle(1, 1))
    assert len({each.image_id for each in table.references}) == 3


def test_a_split_without_truth_is_named(tmp_path: Path) -> None:
    """The masks of valid are on a server."""
    with pytest.raises(
        DcrisError, match=r"has no split 'train' or 'val' with a public truth; its splits are valid_u, v"
    ):
        load_frames(WRITERS["mevis"](tmp_path), "mevis", 1, ["train", "val"])


def test_training_on_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model for photographs is fine-tuned on videos with the command that trained it."""
    root, out = write_youtube(tmp_path), tmp_path / "run"
    words = ["train", "dcris_tiny", "--data", root, "--dataset", "ref_youtube_vos", "--out", out, "--device", "cpu"]
    settings = ["--data.frame_step", 2, "--data.workers", 0, "--train.max_steps", 2, "--train.batch_size", 2]
    assert main([str(word) for word in (*words, *settings)]) == 0
    said = capsys.readouterr().out
    assert "ref_youtube_vos has no split 'val': training runs without validation" in said
    assert "--dataset ref_youtube_vos --split valid" in said
    data = json.loads((out / "data.json").read_text())
    assert data["splits"] == {"train": {"references": 5, "expressions": 7}}
    assert json.loads((out / "config.json").read_text())["data"]["frame_step"] == 2
    # The run predicts the split that the server scores.
    predict = [
        "predict",
        out,
        "--data",
        root,
        "--dataset",
        "ref_youtube_vos",
        "--split",
        "valid",
        "--out",
        tmp_path / "o",
    ]
    assert main([str(word) for word in (*predict, "--device", "cpu")]) == 0
    assert (tmp_path / "o/submission.zip").is_file()
