"""`dcris data check` of videos: each layout's traps are named, with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcris.cli import main
from dcris.data.check_videos import VideoReport, check_videos
from dcris.data.video_readers.load import load_videos
from dcris.errors import DcrisError
from referee import picture
from video_layouts import (
    DAVIS_FRAMES,
    WRITERS,
    YOUTUBE_FRAMES,
    H,
    W,
    labels,
    mevis_masks,
    mevis_records,
    write_davis,
    write_labels,
    write_mevis,
    write_youtube,
    youtube_records,
)


def _check(root: Path, dataset: str) -> tuple[VideoReport, str]:
    report = check_videos(root, dataset)
    return report, "\n".join([*report.problems, *report.warnings, *report.notes])


def test_complete_sets_have_no_problem_but_those_that_they_are_made_with(tmp_path: Path) -> None:
    """A correct download passes; what differs from the official sizes is a warning."""
    report, text = _check(write_youtube(tmp_path), "ref_youtube_vos")
    assert (report.problem_count, report.frames, report.official) == (0, 12, False), text
    assert report.splits == {"train": (2, 4), "valid": (1, 2), "test": (1, 1)}
    assert report.notes == ["valid: left out: 1 video of test, which the file of valid lists too"]
    assert report.warnings == ["not the official size: train, valid, test; published results do not compare"]

    report, text = _check(write_davis(tmp_path), "ref_davis17")
    assert (report.problem_count, report.frames) == (0, 12), text
    assert "train: names of videos that the texts misspell are corrected: clasic-car (classic-car)" in text

    report, text = _check(write_mevis(tmp_path), "mevis")
    assert report.problems == [
        "valid_u: expression 0 of video 'ffff0000' describes nothing, as all its masks are empty; remove it"
    ]
    assert "official splits that are missing: train" in text


def _youtube(change: Callable[[Any], Any]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        records = youtube_records()
        change(records)
        return write_youtube(root, records)

    return write


def _spoilt(dataset: str, change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        WRITERS[dataset](root)
        change(root)
        return root

    return write


def _masks(change: Callable[[Any], Any]) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        records, masks = mevis_records(), mevis_masks()
        del records["valid_u"]["ffff0000"]
        change(masks)
        return write_mevis(root, records, masks)

    return write


TRAIN = "ref-youtube-vos/train"
ONE = f"{TRAIN}/JPEGImages/0043f083b5"


@pytest.mark.parametrize(
    ("dataset", "write", "count", "message"),
    [
        (
            "ref_youtube_vos",
            _spoilt("ref_youtube_vos", lambda root: (root / ONE / "00005.jpg").unlink()),
            1,
            "1 of 3 frames of video '0043f083b5' are missing, the first",
        ),
        (
            "ref_youtube_vos",
            _spoilt("ref_youtube_vos", lambda root: picture(root / ONE / "00005.jpg", H, W + 2)),
            1,
            "is 24 x 38 pixels (height x width), but the video's first frame 24 x 36",
        ),
        (
            "ref_youtube_vos",
            _spoilt("ref_youtube_vos", lambda root: (root / ONE / "00005.jpg").write_bytes(b"not a JPEG")),
            1,
            "cannot read the image",
        ),
        (
            "ref_youtube_vos",
            _spoilt("ref_youtube_vos", lambda r: (r / f"{TRAIN}/Annotations/0043f083b5/00010.png").unlink()),
            1,
            "there is no image file",
        ),
        (
            "ref_youtube_vos",
            _spoilt(
                "ref_youtube_vos",
                lambda r: write_labels(r / f"{TRAIN}/Annotations/0043f083b5/00010.png", np.zeros((H + 1, W), np.uint8)),
            ),
            1,
            "00010.png are 25 x 36 pixels (height x width), but those of the video's first frame 24 x 36",
        ),
        (
            "ref_youtube_vos",
            _youtube(lambda r: r["train"]["0043f083b5"]["expressions"]["0"].update(obj_id="3")),
            1,
            "object 3 of video '0043f083b5', which an expression describes, is in no frame",
        ),
        (
            "ref_youtube_vos",
            _youtube(lambda r: r["train"]["0043f083b5"].update(frames=YOUTUBE_FRAMES[::-1])),
            1,
            "the frames of video '0043f083b5' are not in order",
        ),
        (
            "ref_youtube_vos",
            _youtube(lambda r: r["test"].update({"0043f083b5": r["test"]["c0ffee"]})),
            1,
            "the video '0043f083b5' is in train and test, so training sees a test video",
        ),
        ("mevis", _masks(lambda m: m.pop("8")), 1, "has no '8'"),
        ("mevis", _masks(lambda m: m["8"].append(None)), 1, "has masks for 4 frames, but the video has 3"),
        ("mevis", _masks(lambda m: m["8"][2].update(size=[W, H])), 1, "not for an image of 24 x 36 pixels"),
        (
            "mevis",
            _spoilt("mevis", lambda root: (root / "mevis/valid_u/mask_dict.json").write_text("{")),
            1,
            "is not valid JSON",
        ),
    ],
)
def test_traps_are_named(dataset: str, write: Callable[[Path], Path], count: int, message: str, tmp_path: Path) -> None:
    """Each would otherwise stop a run of hours, or give scores that do not compare."""
    report, text = _check(write(tmp_path), dataset)
    assert message in text, text
    assert report.problem_count == count, text


def test_frames_and_objects_beside_the_lists_are_warnings(tmp_path: Path) -> None:
    """All frames of YouTube-VOS beside the annotated ones, and DAVIS's objects without a text, are
    there in correct downloads."""
    root = write_youtube(tmp_path)
    picture(root / ONE / "00001.jpg", H, W)
    _, text = _check(root, "ref_youtube_vos")
    assert "train: 1 video with frames that are not in its list of frames, and are not read; the first: '004" in text
    write_davis(root)
    write_labels(root / "ref-davis/DAVIS/Annotations_unsupervised/480p/motorbike/00002.png", labels((1, 2, 3), 2))
    report, text = _check(root, "ref_davis17")
    assert "valid: 1 video with objects without an expression; the official evaluation counts them" in text
    assert report.problem_count == 0


def test_a_frame_of_davis_without_an_image_is_missing(tmp_path: Path) -> None:
    """No file lists the frames of DAVIS: a video of which only a part was unpacked was checked, and
    scored, without the others. Files that macOS adds to a copy are no frames."""
    root = write_davis(tmp_path)
    frames, masks = (
        root / f"ref-davis/DAVIS/{kind}/480p/motorbike" for kind in ("JPEGImages", "Annotations_unsupervised")
    )
    (frames / "00002.jpg").unlink()
    (masks / "00003.png").unlink()
    for folder, name in ((frames, "._00001.jpg"), (masks, "._00001.png")):
        (folder / name).write_bytes(b"\0\5\x16\7")
    _, text = _check(root, "ref_davis17")
    assert f"1 of 4 frames of video 'motorbike' are missing, the first {frames / '00002.jpg'}" in text
    assert str(masks / "00003.png") in text
    assert load_videos(root, "ref_davis17", "valid").expressions[0].frames == tuple(DAVIS_FRAMES)


def test_deep_decodes_frames(tmp_path: Path) -> None:
    """A truncated frame has a correct header."""
    root = write_youtube(tmp_path)
    path = root / ONE / "00005.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert check_videos(root, "ref_youtube_vos").problem_count == 0
    assert check_videos(root, "ref_youtube_vos", deep=True).problem_count == 1


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read the JSON; problems give exit code 2."""
    root = write_youtube(tmp_path)
    assert main(["data", "check", str(root), "--dataset", "ref_youtube_vos", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "ref_youtube_vos",
        "split           videos  expressions  official",
        "train                2            4  3,471 / 12,913",
        "valid                1            2  202 / ?",
    ]
    assert "12 frames" in lines
    write_mevis(root)
    assert main(["data", "check", str(root), "--dataset", "mevis", "--json", "-q"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["valid_u"] == {"videos": 2, "expressions": 3}
    assert (found["problem_count"], found["frames"]) == (1, 9)
    assert main(["data", "check", str(root), "--dataset", "mevis", "--split-by", "unc"]) == 2
    assert "is for images, not for mevis; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", [*WRITERS])
def test_fetch_says_where_the_set_is(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of them is on the Hub; the sentence has the official place and the folders."""
    assert main(["data", "fetch", dataset, "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert f"{dataset} is not on the Hub; get it from https://" in line
    assert f"into {tmp_path}/" in line and line.count("\n") == 1


def test_an_unusable_file_of_expressions_is_one_sentence(tmp_path: Path) -> None:
    """Nothing can be checked without it."""
    write_youtube(tmp_path)
    (tmp_path / "ref-youtube-vos/meta_expressions/train/meta_expressions.json").write_text("[]")
    with pytest.raises(DcrisError, match="is not an object with named fields"):
        check_videos(tmp_path, "ref_youtube_vos")


def test_a_split_without_expressions_is_refused(tmp_path: Path) -> None:
    """As it is for training, and not a data set without problems."""
    path = tmp_path / "mevis/valid/meta_expressions.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"videos": {"v": {"frames": ["00000"], "expressions": {}}}}')
    with pytest.raises(DcrisError, match=r"mevis \(valid\) in .* has no expressions"):
        check_videos(tmp_path, "mevis")
