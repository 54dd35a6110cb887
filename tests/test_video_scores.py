"""`dcris score` on masks of videos: papers compare its scores, and its files come from anybody."""

import json
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bombs import deflated_zeros, write_zip
from dcris.cli import main
from dcris.data.video_readers.load import load_videos
from dcris.data.videos import VideoSet
from dcris.evaluation import video_masks
from video_layouts import (
    DAVIS_FRAMES,
    MEVIS_FRAMES,
    WRITERS,
    YOUTUBE_FRAMES,
    H,
    W,
    labels,
    rectangle,
    write_davis,
    write_labels,
    write_mevis,
)
from video_reference import made_masks, slow_clip, slow_f, slow_j, slow_match
from video_submissions import submit, true_labels, zipped

SPLITS = {"ref_youtube_vos": "train", "ref_davis17": "valid", "mevis": "valid_u"}
"""Splits with a truth that have few videos."""
UNSUPERVISED, SEMI_SUPERVISED = "ref-davis/DAVIS/Annotations_unsupervised/480p", "ref-davis/DAVIS/Annotations/480p"
DAVIS_PROTOCOLS = "davis-unsupervised", "davis-by-label", "davis-semi-supervised"


@pytest.fixture(params=SPLITS)
def dataset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def score(root: Path, masks: Path, dataset: str, *words: object, split: str | None = None) -> int:
    given = ("--data", root, "--dataset", dataset, "--split", split or SPLITS[dataset])
    return main([str(word) for word in ("score", masks, *given, *words)])


def record(root: Path, masks: Path, dataset: str, *words: object) -> dict[str, Any]:
    """Return the result file of a submission that can be scored."""
    out = masks.parent / "result.json"
    assert score(root, masks, dataset, *words, "--out", out) == 0
    return dict(json.loads(out.read_text()))


def refused(capsys: pytest.CaptureFixture[str], *given: Any, split: str | None = None) -> str:
    """Return the one sentence of a submission that cannot be scored."""
    capsys.readouterr()
    assert score(*given, split=split) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@contextmanager
def at_most(size: float) -> Iterator[None]:
    """Fail if more bytes are in use at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@pytest.fixture
def made(dataset: str, tmp_path: Path) -> tuple[Path, VideoSet, Path]:
    """A root, a split of it, and its truth as a submission."""
    root = WRITERS[dataset](tmp_path / "root")
    videos = load_videos(root, dataset, SPLITS[dataset])
    return root, videos, submit(tmp_path / "masks", videos)


# ---- scores --------------------------------------------------------------------------------------


def test_the_truth_scores_100_in_every_form(made: tuple[Path, VideoSet, Path], dataset: str, tmp_path: Path) -> None:
    """As `dcris predict` and other programs write it, and as people pack it."""
    root, videos, masks = made
    outer = tmp_path / "outer/submission_v2"
    shutil.copytree(masks, outer)
    mac = zipped(tmp_path / "outer", tmp_path / "mac.zip")
    with zipfile.ZipFile(mac, "a") as archive:
        archive.writestr("__MACOSX/submission_v2/._x", b"junk")
        archive.writestr(".DS_Store", b"junk")
    forms = [masks, zipped(masks, tmp_path / "masks.zip"), tmp_path / "outer", mac]
    if dataset == "ref_youtube_vos":
        forms.append(masks / "Annotations")  # as ReferFormer writes it
    for form in forms:
        found = record(root, form, dataset)
        assert (found["jf"], found["j"], found["f"]) == (100, 100, 100), form
        assert found["videos"] == len(videos.videos)
        assert found["expressions"] == len(videos.expressions)


@pytest.mark.parametrize("dataset", ["ref_youtube_vos", "mevis"])
def test_scores_of_expressions_equal_the_slow_reference(
    made: tuple[Path, VideoSet, Path], dataset: str, tmp_path: Path
) -> None:
    root, videos, _ = made
    random, written = np.random.default_rng(1), dict[str, list[np.ndarray]]()

    def change(mask: np.ndarray, folder: str, number: int) -> np.ndarray:
        written.setdefault(folder, []).append(made_masks(random, (H, W), 1)[0] ^ (mask & (number > 0)))
        return written[folder][-1]

    found = record(root, submit(tmp_path / "noise", videos, change), dataset)
    slow = []
    for each, folder in zip(videos.expressions, written, strict=True):
        truth = videos.truth(each)
        assert truth is not None
        slow.append(slow_clip(np.stack(written[folder]), truth))
    j, f = 100 * np.mean(slow, axis=0)
    assert (found["j"], found["f"], found["jf"]) == pytest.approx((j, f, (j + f) / 2), abs=1e-9)
    rows = [(row["video"], row["expression"], row["phrase"]) for row in found["rows"]]
    assert rows == [(each.video, each.expression_id, each.text) for each in videos.expressions]
    assert [(row["j"], row["f"]) for row in found["rows"]] == [pytest.approx(pair) for pair in slow]
    low, high = found["analysis"]["intervals"]["jf"]
    assert low <= found["jf"] <= high


@pytest.mark.parametrize("protocol", DAVIS_PROTOCOLS)
def test_scores_of_objects_equal_the_slow_reference(protocol: str, tmp_path: Path) -> None:
    root = write_davis(tmp_path / "root")
    shutil.copytree(root / UNSUPERVISED, root / SEMI_SUPERVISED)
    videos = load_videos(root, "ref_davis17", "train")
    random, written = np.random.default_rng(2), dict[str, list[np.ndarray]]()

    def change(made: np.ndarray, folder: str, number: int) -> np.ndarray:
        if len(written.setdefault(folder, [])) == number:  # a folder is of all objects of its video
            noise = made_masks(random, (H, W), 2)
            changed = np.where(noise[0], 0, made)
            changed[noise[1]] = random.integers(1, made.max() + 1)
            written[folder].append(changed.astype(np.uint8))
        return written[folder][number]

    masks = submit(tmp_path / "noise", videos, change)
    assert score(root, masks, "ref_davis17", "--protocol", protocol, "--out", tmp_path / "a.json", split="train") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    older = protocol == "davis-semi-supervised"
    counted = range(1, len(DAVIS_FRAMES) - 1) if older else range(len(DAVIS_FRAMES))
    sums = []
    for folder, frames in written.items():
        truths = [true_labels(videos, Path(folder).name, number) for number in counted]
        known = [(truth != 255) | older for truth in truths]
        objects = range(1, int(np.where(truths[0] == 255, 0, truths[0]).max()) + 1)
        pairs = np.array(
            [
                [
                    [
                        (slow_j((frames[n] == p) & k, t == o), slow_f((frames[n] == p) & k, t == o))
                        for n, t, k in zip(counted, truths, known, strict=True)
                    ]
                    for o in objects
                ]
                for p in range(1, max(objects[-1], *(int(frames[n].max()) for n in counted)) + 1)
            ]
        )
        gains = pairs.mean(axis=(2, 3))
        sums.append(slow_match(gains) if protocol == "davis-unsupervised" else np.trace(gains))
    assert len(found["rows"]) == 4 * 3
    assert found["jf"] == pytest.approx(100 * sum(sums) / len(found["rows"]), abs=1e-9)
    assert found["jf"] == pytest.approx((found["j"] + found["f"]) / 2)
    by_annotator = [each["jf"] for each in found["analysis"]["by_annotator"]]
    assert np.mean(by_annotator) == pytest.approx(found["jf"])


def test_empty_masks_score_0_where_there_is_an_object_and_1_where_there_is_none(tmp_path: Path) -> None:
    videos = load_videos(write_mevis(tmp_path), "mevis", "valid_u")
    found = record(tmp_path, submit(tmp_path / "masks", videos, lambda mask, *_: mask & False), "mevis")
    assert [row["j"] for row in found["rows"]] == [row["f"] for row in found["rows"]] == [0, 0, 1]
    assert found["jf"] == pytest.approx(100 / 3)  # the mean over expressions, not over videos


def test_the_published_truth_of_youtube_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has masks by expression, and no `obj_id`; expressions of one object may differ."""
    root, given = WRITERS["ref_youtube_vos"](tmp_path / "root"), ("--dataset", "ref_youtube_vos")
    truth = root / "ref-youtube-vos/valid/Annotations/0062f687f1"
    for key in "01":
        for number, frame in enumerate(YOUTUBE_FRAMES):
            path = truth / key / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rectangle(1 + int(key), number) * np.uint8(255)).save(path)
    videos = load_videos(root, "ref_youtube_vos", "valid")
    masks = submit(tmp_path / "masks", videos)
    out = tmp_path / "result.json"
    assert score(root, masks, "ref_youtube_vos", "--out", out, split="valid") == 0
    assert json.loads(out.read_text())["jf"] == 100
    shutil.rmtree(masks / "Annotations/0062f687f1/0")
    shutil.copytree(masks / "Annotations/0062f687f1/1", masks / "Annotations/0062f687f1/0")
    assert score(root, masks, "ref_youtube_vos", "--out", out, split="valid") == 0
    assert json.loads(out.read_text())["jf"] < 60  # the masks of one expression are not the other's
    assert main(["data", "check", str(root), *given]) == 0
    Image.new("L", (W, H), 7).save(truth / f"0/{YOUTUBE_FRAMES[1]}.png")
    (truth / f"1/{YOUTUBE_FRAMES[2]}.png").unlink()
    capsys.readouterr()
    assert main(["data", "check", str(root), *given]) == 2
    printed = "".join(capsys.readouterr())
    assert f"{truth}/1/{YOUTUBE_FRAMES[2]}.png" in printed
    assert f"1/{YOUTUBE_FRAMES[2]}.png" in refused(capsys, root, masks, "ref_youtube_vos", split="valid")


def test_swapped_objects_are_forgiven_by_matching_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default, which published figures use, cannot tell "left dog" from "right dog"."""
    root = write_davis(tmp_path / "root")
    videos = load_videos(root, "ref_davis17", "valid")
    masks = submit(tmp_path / "masks", videos, lambda made, *_: np.array([0, 2, 1], np.uint8)[made])
    matched = record(root, masks, "ref_davis17")
    assert (matched["protocol"], matched["jf"], matched["relabelled"]) == ("davis-unsupervised", 100, 8)
    assert [(row["object"], row["label"]) for row in matched["rows"]][:2] == [(1, 2), (2, 1)]
    assert "8 of 8 objects were matched with a prediction of another label" in capsys.readouterr().err
    own = record(root, masks, "ref_davis17", "--protocol", "davis-by-label")
    assert own["relabelled"] == 0
    assert capsys.readouterr().err == ""
    assert own["j"] < 20


def test_matching_is_by_j_and_f_together(tmp_path: Path) -> None:
    """An outline has the better F, its inner part the better J; the outline has more of both."""
    root = write_davis(tmp_path / "root")
    truth, outline = np.zeros((H, W), np.uint8), np.zeros((H, W), np.uint8)
    truth[2:22, 2:18], truth[2:5, 30:33] = 1, 2
    outline[2:22, 2:18], outline[3:21, 3:17], outline[5:19, 5:15] = 1, 0, 2
    for frame in DAVIS_FRAMES:
        write_labels(root / UNSUPERVISED / f"motorbike/{frame}.png", truth)
    videos = load_videos(root, "ref_davis17", "valid")
    found = record(root, submit(tmp_path / "masks", videos, lambda *_: outline), "ref_davis17")
    assert found["relabelled"] == 0
    inner = outline == 2
    assert found["rows"][0]["j"] < slow_j(inner, truth == 1)
    assert found["rows"][0]["f"] > slow_f(inner, truth == 1)


def test_an_object_is_matched_with_predicted_ones_only(tmp_path: Path) -> None:
    """An empty mask would suit an object that has left the frame, but nothing predicted it."""
    root = write_davis(tmp_path / "root")
    for number, frame in enumerate(DAVIS_FRAMES):
        write_labels(root / UNSUPERVISED / f"motorbike/{frame}.png", labels((1, 2) if number == 0 else (1,), number))
    videos = load_videos(root, "ref_davis17", "valid")

    def change(made: np.ndarray, folder: str, number: int) -> np.ndarray:
        made[made == 2] = 0
        made[-4:, -4:] = 2
        return made

    found = record(root, submit(tmp_path / "masks", videos, change), "ref_davis17")
    assert [(row["object"], row["label"], row["j"]) for row in found["rows"]] == [(1, 1, 1), (2, 2, 0)] * 4


def test_davis_counts_what_its_program_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_davis(tmp_path / "root")
    videos = load_videos(root, "ref_davis17", "valid")

    def beside(made: np.ndarray, folder: str, number: int) -> np.ndarray:
        made[-2:] = 1  # where the truth is unknown
        return made if 0 < number < 3 else made * np.uint8(0)

    masks = submit(tmp_path / "masks", videos, beside)
    # Without matching, neither the first nor the last frame counts, so they may be missing.
    for frame in (DAVIS_FRAMES[0], DAVIS_FRAMES[-1]):
        for path in masks.glob(f"*/*/{frame}.png"):
            path.unlink()
    semi = root, masks, "ref_davis17", "--protocol", "davis-semi-supervised"
    assert "DAVIS/Annotations/480p" in refused(capsys, *semi)
    shutil.copytree(root / UNSUPERVISED, root / SEMI_SUPERVISED)
    found = record(*semi)
    assert found["j"] < 100  # unknown pixels are background
    for path in (root / SEMI_SUPERVISED).glob("*/*.png"):
        known = np.array(Image.open(path))
        known[-2:] = 1
        write_labels(path, known)
    found = record(*semi)
    assert (found["jf"], found["j_recall"], found["j_decay"]) == (100, 100, 0)
    every = record(root, masks, "ref_davis17", "--missing-is-empty")
    assert (every["j"], every["f"], every["j_recall"]) == (50, 50, 50)
    # Quarters of four frames share the frame at which they meet.
    assert every["j_decay"] == pytest.approx(100 * (np.mean([0, 1]) - np.mean([1, 0])))


def test_an_object_without_expression_counts(tmp_path: Path) -> None:
    """The unsupervised annotations have objects that no expression describes; published figures
    count them."""
    root = write_davis(tmp_path / "root")
    for number, frame in enumerate(DAVIS_FRAMES):
        path = root / f"ref-davis/DAVIS/Annotations_unsupervised/480p/motorbike/{frame}.png"
        write_labels(path, labels((1, 2, 3), number))
    videos = load_videos(root, "ref_davis17", "valid")
    masks = submit(tmp_path / "masks", videos, lambda made, *_: np.where(made == 3, 0, made).astype(np.uint8))
    found = record(root, masks, "ref_davis17")
    assert found["jf"] == pytest.approx(200 / 3)
    assert [(row["object"], row["expression"]) for row in found["rows"]][:3] == [(1, "0"), (2, "4"), (3, None)]


# ---- what is missing or wrong --------------------------------------------------------------------


def test_a_missing_video_of_mevis_scores_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = load_videos(write_mevis(tmp_path), "mevis", "valid_u")
    masks = submit(tmp_path / "masks", videos)
    shutil.rmtree(masks / "ffff0000")  # whose truth is empty: not an empty mask, which would score 1
    assert record(tmp_path, masks, "mevis")["jf"] == pytest.approx(200 / 3)
    assert "lacks 1 of 2 videos, the first of them ffff0000" in capsys.readouterr().err
    assert record(tmp_path, masks, "mevis", "--missing-is-empty")["jf"] == pytest.approx(200 / 3)


def test_other_missing_masks_are_named(
    made: tuple[Path, VideoSet, Path], dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, masks = made
    path = sorted(masks.rglob("*.png"))[-1]
    path.unlink()
    total = len([*masks.rglob("*.png")]) + 1
    name = path.relative_to(masks).as_posix()
    said = refused(capsys, root, masks, dataset)
    assert f"lacks 1 of {total} masks" in said
    assert name in said
    assert "--missing-is-empty" in said
    assert record(root, masks, dataset, "--missing-is-empty")["jf"] <= 100
    shutil.rmtree(sorted(masks.rglob("*.png"))[0].parent)  # an expression of which another is there
    assert "in 2 of " in refused(capsys, root, masks, dataset)
    for path in masks.rglob("*.png"):
        path.unlink()
    assert f"lacks {total} of {total} masks" in refused(capsys, root, masks, dataset, "--missing-is-empty")


def test_nothing_of_the_split_is_an_error(
    made: tuple[Path, VideoSet, Path], dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = made[0]
    (tmp_path / "other/bear/0").mkdir(parents=True)
    for place in (tmp_path / "other", tmp_path / "nowhere", root):
        said = refused(capsys, root, place, dataset, "--missing-is-empty")
        assert str(place) in said
        assert "FRAME.png" in said


def test_masks_that_cannot_be_used_are_named(
    made: tuple[Path, VideoSet, Path], dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, masks = made
    path = sorted(masks.rglob("*.png"))[0]
    good = path.read_bytes()

    def said(content: bytes | Image.Image) -> str:
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)
        text = refused(capsys, root, masks, dataset)
        assert path.relative_to(masks).as_posix() in text
        return text

    assert f"is {W} x {H} pixels" in said(Image.new("L", (H, W)))
    assert "cannot be used as a mask" in said(good[:-30])
    assert "cannot be used as a mask" in said(b"no image")
    many = Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W))
    text = said(many)
    if dataset == "ref_davis17":
        assert "leave out --mask-threshold" in refused(capsys, root, masks, dataset, "--mask-threshold", 127)
        assert "label 255, but objects are numbered from 1 to 20" in text
        assert "colour" in said(many.convert("RGB"))
    else:
        assert "the mask image has more values than 0 and one other" in text
        found = record(root, masks, dataset, "--mask-threshold", 127)
        assert found["jf"] < 100


def test_labels_of_more_objects_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A proposal more is possible with matching, up to the 20 of the authors' program."""
    root = write_davis(tmp_path / "root")
    videos = load_videos(root, "ref_davis17", "valid")
    corner = (slice(0, 3), slice(-3, None))

    def added(label: int) -> Path:
        def change(made: np.ndarray, *_: object) -> np.ndarray:
            made[corner] = label
            return made

        return submit(tmp_path / f"masks{label}", videos, change)

    assert record(root, added(20), "ref_davis17")["jf"] == 100
    assert "label 21" in refused(capsys, root, added(21), "ref_davis17")
    own = refused(capsys, root, added(3), "ref_davis17", "--protocol", "davis-by-label")
    assert "label 3, but objects are numbered from 1 to 2" in own


def test_options_and_truths_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = submit(tmp_path / "masks", load_videos(write_mevis(tmp_path), "mevis", "valid_u"))
    assert "truth of mevis valid is not public" in refused(capsys, tmp_path, masks, "mevis", split="valid")
    assert "choose from valid_u, valid" in refused(capsys, tmp_path, masks, "mevis", split="val")
    assert "choose from mevis" in refused(capsys, tmp_path, masks, "mevis", "--protocol", "cris")
    for words in (["--none-rule", "head"], ["--boundary"], ["--by-category"], ["--report", "x.html"]):
        assert f"{words[0]} is for images" in refused(capsys, tmp_path, masks, "mevis", *words)


# ---- zip files of strangers ----------------------------------------------------------------------


def test_zip_files_of_strangers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mevis(tmp_path / "root")
    name = f"1234abcd/0/{MEVIS_FRAMES[0]}.png"
    folders = "1234abcd/0", "1234abcd/1", "ffff0000/0"
    full = [f"{folder}/{frame}.png" for folder in folders for frame in MEVIS_FRAMES]

    def said(names: list[str]) -> str:
        path = tmp_path / "names.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for each in names:
                archive.writestr(zipfile.ZipInfo(each), b"x")
        return refused(capsys, root, path, "mevis")

    for bad in (f"../{name}", f"/{name}", f"1234abcd/../{name}", f"a//{name}", "a\\b.png", "/".join("abcdefghijk")):
        assert "is not a plain path" in said([*full, bad])
    with pytest.warns(UserWarning, match="Duplicate"):
        assert "two files of one name" in said([name, name])

    others = [(each, 0, 0, 0, b"") for each in full if each != name]
    claimed = _png_of(60_000, 60_000)
    for content, problem in (
        ((8, 0, 2_000_000_000, deflated_zeros(2_000_000_000)), "larger than the limit"),
        ((0, zlib.crc32(claimed), len(claimed), claimed), "cannot be used as a mask"),
        ((8, 0, 10, b"\xff\xff\xff"), "cannot be used as a mask"),
    ):
        path = tmp_path / "bomb.zip"
        write_zip(path, [(name, *content), *others])
        with at_most(250e6):
            text = refused(capsys, root, path, "mevis")
        assert problem in text
        assert name in text


def test_claimed_sizes_and_numbers_take_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set from a stranger can claim masks of any size, and label images of 255 objects."""
    masks = {key: [None, None, {"size": [100_000, 100_000], "counts": "0"}] for key in "789"}
    root = write_mevis(tmp_path / "mevis", masks=masks)
    made = submit(tmp_path / "masks", load_videos(write_mevis(tmp_path / "good"), "mevis", "valid_u"))
    with at_most(50e6):
        assert "the limits are 110,000,000 pixels" in refused(capsys, root, made, "mevis")
    root = write_davis(tmp_path / "davis")
    made = submit(tmp_path / "labels", load_videos(root, "ref_davis17", "valid"))
    large = np.full((2_000, 2_000), 254, np.uint8)
    for folder in (root / UNSUPERVISED / "motorbike", *(made.glob("anno_*/motorbike"))):
        for frame in DAVIS_FRAMES:
            write_labels(folder / f"{frame}.png", large)
    with at_most(250e6):
        assert "254 objects in frames of 2000 x 2000 pixels" in refused(capsys, root, made, "ref_davis17")


def _png_of(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_zip_files_of_too_many_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_mevis(tmp_path / "root")
    path = tmp_path / "many.zip"
    line = b"PK\1\2" + bytes(24) + struct.pack("<HHHHHII", 200, 0, 0, 0, 0, 0, 0) + b"a" * 200
    with path.open("wb") as file:
        for _ in range(140):
            file.write(line * 1000)
        size = file.tell()
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, size, 0, 0))
    assert size > 32 << 20
    with at_most(10e6):
        assert "lists too many files" in refused(capsys, root, path, "mevis")
    monkeypatch.setattr(video_masks, "_MAX_FOLDERS", 50)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(60):
            archive.writestr(f"{number}/a.png", b"")
    assert "more than 50 folders" in refused(capsys, root, path, "mevis")
    for content in (b"", b"PK", b"x" * 1000):
        path.write_bytes(content)
        assert "not a readable zip file" in refused(capsys, root, path, "mevis")


# ---- evaluate, tables and comparisons ------------------------------------------------------------


def test_no_place_for_temporary_files_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    words = ("--data", str(write_mevis(tmp_path)), "--dataset", "mevis", "--split", "valid_u", "--device", "cpu")
    assert main(["evaluate", "tiny", *words]) == 2
    assert "set TMPDIR to a folder that can be written" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--mask-threshold 0", "--boundary", "--calibrate-on train"])
def test_evaluate_refuses_options_for_images(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of them is silently left out, 0 neither."""
    words = ("--data", str(write_mevis(tmp_path)), "--dataset", "mevis", "--split", "valid_u")
    assert main(["evaluate", "tiny", *words, *option.split()]) == 2
    assert f"{option.split()[0]} is for images, not for mevis; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["mevis", "ref_davis17"])
def test_evaluate_predicts_and_scores(dataset: str, tmp_path: Path) -> None:
    """It gives the scores that `predict` and `score` give, and names the weights."""
    root, given = WRITERS[dataset](tmp_path / "root"), ("--dataset", dataset, "--split", SPLITS[dataset])
    paths = tmp_path / "evaluated.json", tmp_path / "scored.json"
    words = ("tiny", "--data", str(root), *given, "--device", "cpu")
    assert main(["evaluate", *words, "--out", str(paths[0])]) == 0
    assert main(["predict", *words, "--out", str(tmp_path / "out")]) == 0
    assert score(root, tmp_path / "out/masks", dataset, "--out", paths[1]) == 0
    evaluated, scored = (json.loads(path.read_text()) for path in paths)
    assert len(evaluated["weights_sha256"]) == 64
    del scored["predictions"]
    assert {key: evaluated[key] for key in scored} == scored


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Result files of the truth, and of masks that miss the last frame."""
    videos = load_videos(write_mevis(tmp_path), "mevis", "valid_u")
    last = len(MEVIS_FRAMES) - 1
    worse = submit(tmp_path / "masks/worse", videos, lambda mask, _, number: mask & (number < last))
    better = submit(tmp_path / "masks/better", videos)
    paths = tmp_path / "better.json", tmp_path / "worse.json"
    for masks, path in zip((better, worse), paths, strict=True):
        assert score(tmp_path, masks, "mevis", "--out", path) == 0
    return paths


def test_results_compare_with_paired_intervals(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    better, worse = two
    assert main(["compare", str(worse), str(better), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (difference,) = found["differences"]
    # Two of three expressions lose the last of three frames; all are of one of two videos.
    assert difference["jf"] == pytest.approx(100 * 2 / 9)
    assert difference["intervals"]["jf"] == pytest.approx([0, 100 / 3])
    assert main(["compare", str(worse), str(better), "--names", "old", "new"]) == 0
    assert "+22.2 [+0.0, +33.3]" in capsys.readouterr().out
    other = json.loads(worse.read_text())
    for key, value, problem in (
        ("protocol", "ref-youtube-vos", "by another protocol"),
        ("data_sha256", "0", "on other expressions"),
        ("refine", "guided", "with another 'refine'"),
        ("rows", other["rows"][:-1], "one row for each expression"),
        ("rows", [{**other["rows"][0], "j": "1"}], "no number from -1 to 1 as 'j'"),
        ("rows", [], "no rows"),
    ):
        (tmp_path / "c.json").write_text(json.dumps({**other, key: value}))
        assert main(["compare", str(better), str(tmp_path / "c.json")]) == 2
        assert problem in capsys.readouterr().err
    (tmp_path / "c.json").write_text(json.dumps({"protocol": "cris", "miou": 50.0}))
    assert main(["compare", str(better), str(tmp_path / "c.json")]) == 2
    assert "is not a result of videos" in capsys.readouterr().err
    assert main(["compare", str(better), "images.jsonl"]) == 2
    assert "better.json is a result file of videos (.json), and not all systems are" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--protocol ref-youtube-vos", "--split train", "--dataset mevis", "--boundary", "--none-rule head", "--images x"],
)
def test_result_files_are_not_measured_in_another_way(
    option: str, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asks for davis-by-label must not take the scores of another protocol for it."""
    capsys.readouterr()
    assert main(["compare", *map(str, two), *option.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{option.split()[0]} is for images, and result files" in captured.err


def test_a_long_name_in_a_result_takes_its_own_memory(two: tuple[Path, Path]) -> None:
    """Result files come from others; each row was once given the length of the longest name."""
    record = json.loads(two[0].read_text())
    first = record["rows"][0]
    record["rows"] += [{**first, "video": "x" * 100_000}, *({**first, "video": str(n)} for n in range(2_000))]
    for path in two:
        path.write_text(json.dumps(record))
    with at_most(100e6):
        assert main(["compare", *map(str, two)]) == 0


def test_a_row_has_the_whole_name_of_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of masks/at-0.35 and masks/at-0.5, both rows were called "at-0"."""
    root = write_mevis(tmp_path / "root")
    masks = submit(tmp_path / "at-0.35", load_videos(root, "mevis", "valid_u"))
    assert score(root, masks, "mevis") == score(root, zipped(masks, tmp_path / "b-1.5.zip"), "mevis") == 0
    shown = capsys.readouterr().out
    assert "| at-0.35 " in shown
    assert "| b-1.5 " in shown


def test_a_folder_of_masks_is_listed_a_few_times(
    made: tuple[Path, VideoSet, Path], dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was listed once for each of its masks: the time grew with the square of the frames."""
    root, _, masks = made
    listed: Counter[Path] = Counter()
    real = Path.iterdir

    def counted(folder: Path) -> Iterator[Path]:
        listed[folder] += 1
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", counted)
    record(root, masks, dataset)
    frames = max(len([*real(folder)]) for folder in listed if folder.is_relative_to(masks))
    assert max(listed.values()) <= 2 < frames


def test_results_are_columns_of_tables(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["table", *map(str, two), "--metrics", "jf", "j", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Method,mevis valid_u J&F,mevis valid_u J",
        "better,100.0,100.0",
        "worse,77.8,77.8",
    ]
    assert main(["table", *map(str, two), "--metrics", "jf", "j", "--format", "latex"]) == 0
    assert r"valid\_u J\&F" in capsys.readouterr().out
