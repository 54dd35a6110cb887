"""`dcris predict --data`: masks of data sets of videos, in the layouts that servers take."""

import json
import shutil
import signal
import threading
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import dcris.inference.video_sets as module
from dcris.checkpoints.resolve import locate
from dcris.cli import main
from dcris.data.submissions import Labels, palette
from dcris.data.video_readers.load import load_videos
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.inference.video_sets import FrameDone, VideoDone, VideoFailed, VideoOptions, VideoSetPredictor
from launcher import Launcher
from marks import slow_except
from test_distributed import torchrun
from video_layouts import DAVIS_FRAMES, MEVIS_FRAMES, WRITERS, YOUTUBE_FRAMES, H, W, write_davis, write_youtube

THRESHOLD = 0.05
"""Below what `tiny` says of noise; with a `min_score` of 0, masks are then not empty."""
OPTIONS = ("--device", "cpu", "--threshold", THRESHOLD, "--min-score", 0)


@pytest.fixture(scope="module")
def tiny() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu")


def _run(*words: object) -> int:
    return main([str(word) for word in ("predict", "tiny", *words, *OPTIONS)])


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _png(content: bytes | Path) -> Image.Image:
    return Image.open(BytesIO(content) if isinstance(content, bytes) else content)


@pytest.mark.parametrize(
    ("dataset", "split", "start", "frames"),
    [
        ("ref_youtube_vos", "valid", "Annotations/0062f687f1", YOUTUBE_FRAMES),
        ("mevis", "valid", "0ab4afe7fb46", MEVIS_FRAMES),
    ],
)
def test_a_submission_has_a_binary_mask_for_each_expression_and_frame(
    dataset: str, split: str, start: str, frames: list[str], tiny: Segmenter, tmp_path: Path
) -> None:
    """The server refuses a zip file with other names, and counts values other than 0 as object."""
    root, out = WRITERS[dataset](tmp_path), tmp_path / "out"
    assert _run("--data", root, "--dataset", dataset, "--split", split, "--out", out) == 0
    videos = load_videos(root, dataset, split)
    with zipfile.ZipFile(out / "submission.zip") as archive:
        names = archive.namelist()
        assert names == [f"{start}/{each.expression_id}/{name}.png" for each in videos.expressions for name in frames]
        assert all(member.external_attr >> 16 == 0o644 for member in archive.infolist())
        masks = {name: _png(archive.read(name)) for name in names}
        assert archive.testzip() is None
    for each in videos.expressions:
        for frame in frames:
            mask = masks[f"{start}/{each.expression_id}/{frame}.png"]
            (expected,) = tiny.predict(
                videos.frame_path(each.video, frame), each.text, threshold=THRESHOLD, min_score=0.0
            )
            assert (mask.mode, mask.size) == ("L", (W, H))
            np.testing.assert_array_equal(np.asarray(mask), expected.mask * np.uint8(255))
    assert any(np.asarray(mask).any() for mask in masks.values())
    assert _files(out) == {"submission.zip", "dcris-videos.json", *(f"masks/{name}" for name in names)}


def test_expressions_are_read_as_they_are(tmp_path: Path) -> None:
    """As in training; only what people type is stripped of quotes and a full stop."""
    records = {"valid": {"a": {"frames": YOUTUBE_FRAMES, "expressions": {"0": {"exp": '"The blue star."'}}}}}
    root, other = write_youtube(tmp_path, records), tmp_path / "never"
    shutil.copytree(locate("tiny"), other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["strip_phrases"] = "never"
    (other / "config.json").write_text(json.dumps(config))
    masks = []
    for model in ("tiny", other):
        words = ("predict", model, "--data", root, "--dataset", "ref_youtube_vos", "--split", "valid", *OPTIONS)
        out = tmp_path / f"{len(masks)}"
        assert main([str(word) for word in (*words, "--out", out)]) == 0
        masks.append({name: (out / "masks" / name).read_bytes() for name in _files(out / "masks")})
    assert masks[0] == masks[1]


def test_davis_gets_labels_of_all_objects_for_each_annotator(tiny: Segmenter, tmp_path: Path) -> None:
    """DAVIS's evaluation reads one folder of indexed PNG files for each of the four annotators."""
    root, out = write_davis(tmp_path), tmp_path / "out"
    assert _run("--data", root, "--dataset", "ref_davis17", "--split", "valid", "--out", out) == 0
    videos = load_videos(root, "ref_davis17", "valid")
    expected = {f"masks/anno_{a}/motorbike/{frame}.png" for a in range(4) for frame in DAVIS_FRAMES}
    assert _files(out) == {"dcris-videos.json", *expected}
    for annotator in range(4):
        for frame in DAVIS_FRAMES:
            image = _png(out / f"masks/anno_{annotator}/motorbike/{frame}.png")
            assert (image.mode, image.size, image.getpalette()) == ("P", (W, H), palette())
            texts = [each.text for each in videos.expressions if each.annotator == annotator]
            found = tiny.predict(
                videos.frame_path("motorbike", frame), texts, threshold=THRESHOLD, min_score=0.0, scores=True
            )
            scores = np.stack([each.probabilities for each in found if each.probabilities is not None])
            kept = np.where(scores > THRESHOLD, scores, 0)
            labels = np.where(kept.any(axis=0), kept.argmax(axis=0) + 1, 0)
            # Grouping into passes changes probabilities by rounding, which decides ties.
            assert (np.asarray(image) != labels).mean() < 0.01
    assert {value for path in out.rglob("*.png") for value in np.unique(np.asarray(_png(path)))} <= {0, 1, 2}


@given(arrays(np.float32, (3, 4, 5), elements=st.sampled_from([0, 0.09, 0.3, 0.5, 0.6, 0.75, 1.0])))
@settings(max_examples=80)
def test_overlaps_are_resolved_as_in_the_source(probabilities: np.ndarray) -> None:
    """inference_davis.py of ReferFormer: below 0.5 is 0, the background has 0.1, then argmax."""
    reference = np.zeros((4, 5), np.uint8)
    for row in range(4):
        for column in range(5):
            best = 0.1
            for target in range(3):
                value = probabilities[target, row, column]
                if value >= 0.5 and value > best:
                    best, reference[row, column] = value, target + 1
    labels = Labels((4, 5))
    for target in range(3):
        labels.add(target + 1, probabilities[target] >= 0.5, probabilities[target])
    np.testing.assert_array_equal(labels.values, reference)


def test_colours_are_those_of_davis() -> None:
    """Viewers of DAVIS show object 1 in dark red, 2 in green, 3 in olive."""
    assert palette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert palette()[-3:] == [224, 224, 192] and len(palette()) == 768


def _events(tiny: Segmenter, root: Path, out: Path, dataset: str = "mevis", split: str = "valid_u", **options: Any):
    videos = load_videos(root, dataset, split)
    return [*VideoSetPredictor(tiny, videos, out, VideoOptions(threshold=THRESHOLD, min_score=0.0, **options)).run()]


def _predicted(events: list[Any]) -> list[str]:
    return [each.video for each in events if isinstance(each, VideoDone)]


def test_finished_videos_are_not_predicted_again(tiny: Segmenter, tmp_path: Path) -> None:
    """A run of hours continues; what is missing is made again, and with it the zip file."""
    root, out = WRITERS["mevis"](tmp_path), tmp_path / "out"
    events = _events(tiny, root, out)
    assert _predicted(events) == ["1234abcd", "ffff0000"]
    assert sum(isinstance(each, FrameDone) for each in events) == 6
    packed = (out / "submission.zip").read_bytes()
    assert _events(tiny, root, out) == []
    (out / "submission.zip").unlink()
    assert _events(tiny, root, out) == []
    assert (out / "submission.zip").read_bytes() == packed
    (out / "masks/ffff0000/0/00001.png").unlink()
    assert _predicted(_events(tiny, root, out)) == ["ffff0000"]
    assert (out / "submission.zip").read_bytes() == packed


KILLED = """
import os, signal
import dcris.inference.video_sets as module
before, calls = module.write_file, []
def write(path, content):
    calls.append(path)
    if len(calls) == {calls}:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{{path.name}}.partial-0000{{path.suffix}}").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    before(path, content)
module.write_file = write
"""


@pytest.mark.parametrize("calls", slow_except([3, 14], 14))
def test_a_killed_call_is_repeated(launcher: Launcher, calls: int, tmp_path: Path) -> None:
    """After kill -9 between two files or in the zip file, the result equals that of one call."""
    root, out = write_youtube(tmp_path), tmp_path / "out"
    words = ["--data", root, "--dataset", "ref_youtube_vos", "--split", "train", "--out"]
    assert _run(*words, tmp_path / "whole") == 0
    command = ["predict", "tiny", *words, out, *OPTIONS]
    killed = launcher.start(command, tmp_path / "output.txt", first=KILLED.format(calls=calls))
    assert launcher.wait(killed) == -signal.SIGKILL
    assert not (out / "submission.zip").exists()
    assert _run(*words, out) == 0
    assert _files(out) == _files(tmp_path / "whole")
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in _files(out))


def test_a_full_disk_stops_at_once(tiny: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no broken video: the next hundred would fail, too. What is written stays."""
    before, written = module.write_file, list[Path]()

    def write(path: Path, content: Any) -> None:
        if len(written) == 3:
            raise DcrisError(f"cannot write {path}: no space left on device")
        written.append(path)
        before(path, content)

    monkeypatch.setattr(module, "write_file", write)
    root, out = WRITERS["mevis"](tmp_path), tmp_path / "out"
    with pytest.raises(DcrisError, match="no space left on device"):
        _events(tiny, root, out)
    assert _files(out) == {path.relative_to(out).as_posix() for path in written}
    monkeypatch.setattr(module, "write_file", before)
    assert _predicted(_events(tiny, root, out)) == ["1234abcd", "ffff0000"]


@pytest.mark.parametrize("most", [0, 10**9])
def test_large_masks_are_written_before_the_next_are_predicted(
    most: int, tiny: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of three frames would not fit into memory; the masks are the same."""
    threads, real = set[bool](), module.write_file

    def write(path: Path, content: Any) -> None:
        if path.suffix == ".png":
            threads.add(threading.current_thread() is threading.main_thread())
        real(path, content)

    monkeypatch.setattr(module, "write_file", write)
    monkeypatch.setattr(module, "_MOST_OVERLAPPED", most)
    root = WRITERS["mevis"](tmp_path / "root")
    _events(tiny, root, tmp_path / "out")
    assert threads == {most == 0}
    assert len([*(tmp_path / "out/masks").rglob("*.png")]) == 9


@pytest.mark.slow
def test_several_processes_share_the_videos(tmp_path: Path) -> None:
    """Each predicts its own videos, and one writes the zip file when all are done; a video that one
    of them cannot read leaves none."""
    root = write_youtube(tmp_path)
    data = ("--data", root, "--dataset", "ref_youtube_vos", "--split", "train", "--out")
    words = ("predict", "tiny", *OPTIONS, *data)
    alone, together, failed = (tmp_path / name for name in ("alone", "together", "failed"))
    assert _run(*data, alone) == 0
    done = torchrun(2, *words, together)
    assert done.returncode == 0, done.stderr
    names = _files(alone)
    assert len(names) == 14
    assert names == _files(together)
    assert all((alone / name).read_bytes() == (together / name).read_bytes() for name in names)
    (root / "ref-youtube-vos/train/JPEGImages/0043f083b5/00005.jpg").unlink()
    done = torchrun(2, *words, failed)
    assert done.returncode != 0
    assert "1 of 2 videos could not be predicted, all others are done" in done.stderr
    assert not (failed / "submission.zip").exists()
    assert len(list((failed / "masks").rglob("003234408d/*/*.png"))) == 9


def test_masks_of_other_settings_are_not_mixed(tiny: Segmenter, tmp_path: Path) -> None:
    """A submission of two thresholds or two models scores neither."""
    root, out = WRITERS["mevis"](tmp_path), tmp_path / "out"
    _events(tiny, root, out)
    with pytest.raises(DcrisError, match=r"holds masks made with smooth 1 \(now 3\); choose another --out"):
        _events(tiny, root, out, smooth=3)
    with pytest.raises(DcrisError, match=r"dataset mevis \(now ref_youtube_vos\)"):
        _events(tiny, write_youtube(tmp_path), out, "ref_youtube_vos", "valid")
    (out / "masks/mine.png").write_bytes(b"kept")
    assert _predicted(_events(tiny, root, out, smooth=3, overwrite=True)) == ["1234abcd", "ffff0000"]
    assert (out / "masks/mine.png").read_bytes() == b"kept"
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == 9
    (out / "dcris-videos.json").write_text("{}")
    with pytest.raises(DcrisError, match=r"unknown settings, as dcris-videos\.json is missing or damaged"):
        _events(tiny, root, out, smooth=3)


def test_smoothing_changes_only_what_it_is_asked_to(tiny: Segmenter, tmp_path: Path) -> None:
    """Off gives the masks of single frames; the number of frames per batch changes nothing."""
    root = WRITERS["mevis"](tmp_path)
    for name, options in {"a": {}, "b": {"smooth": 1, "batch": 2}, "c": {"smooth": 3}}.items():
        _events(tiny, root, tmp_path / name, **options)
    masks = {
        name: np.stack([np.asarray(_png(path)) for path in sorted((tmp_path / name / "masks").rglob("*.png"))])
        for name in "abc"
    }
    assert (masks["a"] != masks["b"]).mean() < 0.01
    assert (masks["a"] != masks["c"]).mean() > 0.01


def test_a_video_without_frames_is_one_sentence(
    tiny: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are done, but there is no zip file that the server would refuse."""
    root, out = WRITERS["mevis"](tmp_path), tmp_path / "out"
    missing = root / "mevis/valid_u/JPEGImages/1234abcd/00001.jpg"
    missing.unlink()
    words = ("--data", root, "--dataset", "mevis", "--split", "valid_u", "--out", out)
    assert _run(*words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 2 videos could not be predicted, all others are done: there is no image file" in last
    assert str(missing) in last
    assert not (out / "submission.zip").exists()
    assert len(list((out / "masks/ffff0000/0").iterdir())) == 3
    Image.new("RGB", (W, H)).save(missing)
    assert _run(*words) == 0
    assert (out / "submission.zip").is_file()
    Image.new("RGB", (W + 1, H)).save(missing)
    (failed,) = [each for each in _until_error(tiny, root, tmp_path / "b") if isinstance(each, VideoFailed)]
    assert "all frames must have one size" in failed.reason


def _until_error(tiny: Segmenter, root: Path, out: Path) -> list[Any]:
    events: list[Any] = []
    predictor = VideoSetPredictor(tiny, load_videos(root, "mevis", "valid_u"), out)
    with pytest.raises(DcrisError, match="1 of 2 videos could not be predicted"):
        events.extend(predictor.run())  # keeps what came before the error
    return events


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data", ".", "--split", "valid"],
            "--data needs --dataset, one of ref_youtube_vos, ref_davis17, mevis, and",
        ),
        (["--data", ".", "--dataset", "refcoco", "--split", "val"], "--data needs --dataset, one of"),
        (["--data", ".", "--dataset", "mevis"], "and --split"),
        (["--data", ".", "--dataset", "mevis", "--split", "valid", "-e", "a", "--json"], "leave out -e, --json"),
        (["--data", ".", "--dataset", "mevis", "--split", "valid", "--every", "2"], "leave out --every"),
        (["a.jpg", "--smooth", "3", "-e", "a"], "--smooth is for a data set of videos; add --data ROOT"),
        (["--data", ".", "--dataset", "mevis", "--split", "valid"], "there is no data set mevis in ."),
        (["--data", "DATA", "--dataset", "mevis", "--split", "valid", "--smooth", "2"], "an odd number of frames"),
        (["--data", "DATA", "--dataset", "mevis", "--split", "val"], "choose from valid_u, valid"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not belong together is named, with what to do."""
    WRITERS["mevis"](tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    assert _run(*words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out/masks").exists()


def test_settings_are_kept_with_the_masks(tiny: Segmenter, tmp_path: Path) -> None:
    """Whoever finds the folder a year later can say how it was made."""
    _events(tiny, WRITERS["mevis"](tmp_path), tmp_path / "out", smooth=3)
    kept = json.loads((tmp_path / "out/dcris-videos.json").read_text())
    found = [kept[key] for key in ("dataset", "split", "smooth", "threshold", "recipe")]
    assert found == ["mevis", "valid_u", 3, THRESHOLD, tiny.config.recipe]
