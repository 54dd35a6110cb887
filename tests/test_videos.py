"""Ref-YouTube-VOS, Ref-DAVIS17 and MeViS as their authors publish them.

Counts and masks of miniature sets are those computed by hand; malformed files give one sentence.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris.data import videos as videos_module
from dcris.data.cleaning import is_blank
from dcris.data.readers.load import list_data_sets, load_references
from dcris.data.registry import VIDEO_SETS
from dcris.data.video_readers import VIDEO_READERS
from dcris.data.video_readers.load import load_videos, video_splits
from dcris.errors import DcrisError
from video_layouts import (
    DAVIS_FRAMES,
    MEVIS_FRAMES,
    WRITERS,
    YOUTUBE_FRAMES,
    H,
    W,
    convert_davis,
    davis_text,
    labels,
    mevis_masks,
    mevis_records,
    rectangle,
    write_davis,
    write_labels,
    write_mevis,
    write_youtube,
    youtube_records,
)


def test_every_set_has_a_reader_and_facts() -> None:
    """A set with a reader but no facts would have neither official sizes nor a source."""
    assert [*VIDEO_READERS] == [*VIDEO_SETS] == [*WRITERS]


@pytest.mark.parametrize(
    ("dataset", "splits"),
    [
        ("ref_youtube_vos", {"train": (2, 4), "valid": (1, 2), "test": (1, 1)}),
        ("ref_davis17", {"train": (2, 12), "valid": (1, 8)}),
        ("mevis", {"valid_u": (2, 3), "valid": (1, 1)}),
    ],
)
def test_counts_are_those_by_hand(dataset: str, splits: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Whoever unpacks the authors' files finds every expression in its split, and every frame."""
    root = WRITERS[dataset](tmp_path)
    assert video_splits(root, dataset) == [*splits]
    for split, counts in splits.items():
        found = load_videos(root, dataset, split)
        assert (len(found.videos), len(found.expressions)) == counts
        assert all(found.frame_path(each.video, frame).is_file() for each in found.expressions for frame in each.frames)


def test_valid_leaves_the_videos_of_test_out(tmp_path: Path) -> None:
    """A submission with the 305 videos of test, whose frames are elsewhere, would be refused."""
    valid = load_videos(write_youtube(tmp_path), "ref_youtube_vos", "valid")
    assert [*valid.videos] == ["0062f687f1"]
    assert valid.notes == ("left out: 1 video of test, which the file of valid lists too",)
    assert valid.truth(valid.expressions[0]) is None
    assert valid.labels("0062f687f1") is None


def test_valid_with_test_videos_needs_the_file_of_test(tmp_path: Path) -> None:
    """Without it nobody can tell the 202 videos of valid from the 305 of test."""
    records = youtube_records()
    one = records["valid"]["0062f687f1"]
    records["valid"] = {f"{number:05d}": one for number in range(203)}
    home = tmp_path / "ref-youtube-vos/meta_expressions"
    for split in ("valid", "test"):
        (home / split).mkdir(parents=True)
    (home / "valid/meta_expressions.json").write_text(json.dumps({"videos": records["valid"]}))
    with pytest.raises(DcrisError, match=r"lists 203 videos, of which 202 are valid's .* put the file of test's"):
        load_videos(tmp_path, "ref_youtube_vos", "valid")
    (home / "test/meta_expressions.json").write_text(json.dumps({"videos": {"00007": one}}))
    assert len(load_videos(tmp_path, "ref_youtube_vos", "valid").videos) == 202


def test_truth_of_youtube_is_the_label_of_the_object(tmp_path: Path) -> None:
    """The truth of a hidden or absent object is what its label says; empty masks stay frames."""
    train = load_videos(write_youtube(tmp_path), "ref_youtube_vos", "train")
    first, other, again = train.videos["003234408d"]
    assert (first.text, again.text, first.expression_id) == ("a penguin", "a Penguin  moving", "0")
    assert first.frames == tuple(YOUTUBE_FRAMES)
    hidden = rectangle(1, 0) & ~rectangle(2, 0)
    expected = np.stack([hidden, rectangle(1, 1), rectangle(1, 2)])
    truth = train.truth(first)
    assert truth is not None and truth.dtype == np.bool_
    np.testing.assert_array_equal(truth, expected)
    np.testing.assert_array_equal(truth, train.truth(again))
    second = train.truth(other)
    assert second is not None
    assert [int(mask.sum()) for mask in second] == [int(rectangle(2, 0).sum()), 0, 0]
    found = train.labels("003234408d")
    np.testing.assert_array_equal(found, np.stack([labels((1, 2), 0), labels((1,), 1), labels((1,), 2)]))


def test_a_published_truth_of_valid_is_read_like_that_of_train(tmp_path: Path) -> None:
    """With obj_id and labels at hand, valid can be scored here."""
    records = youtube_records()
    for each in records["valid"]["0062f687f1"]["expressions"].values():
        each["obj_id"] = 1
    root = write_youtube(tmp_path, records)
    assert load_videos(root, "ref_youtube_vos", "valid").truths is None  # without labels
    for number, frame in enumerate(YOUTUBE_FRAMES):
        write_labels(root / f"ref-youtube-vos/valid/Annotations/0062f687f1/{frame}.png", labels((1,), number))
    valid = load_videos(root, "ref_youtube_vos", "valid")
    truth = valid.truth(valid.expressions[0])
    assert truth is not None
    np.testing.assert_array_equal(truth[2], rectangle(1, 2))


@pytest.mark.parametrize("prepare", [write_davis, lambda root: convert_davis(write_davis(root))])
def test_davis_has_four_texts_an_object(prepare: Callable[[Path], Path], tmp_path: Path) -> None:
    """Scores are means over four annotators, whose order decides the folder anno_K of a mask; the
    authors' files and ReferFormer's conversion give the same."""
    valid = load_videos(prepare(tmp_path), "ref_davis17", "valid")
    found = [(e.video, e.expression_id, e.text, e.objects, e.annotator) for e in valid.expressions]
    assert found == [
        ("motorbike", str(4 * (target - 1) + a), davis_text("motorbike", target, a), (str(target),), a)
        for target in (1, 2)
        for a in range(4)
    ]
    assert valid.expressions[0].frames == tuple(DAVIS_FRAMES)
    truth = valid.truth(valid.expressions[4])
    made = valid.labels("motorbike")
    assert truth is not None and made is not None
    np.testing.assert_array_equal(truth[3], rectangle(2, 3) & (np.arange(H) < H - 2)[:, None])
    assert (made[:, -2:] == videos_module.UNKNOWN).all()
    assert {*np.unique(made)} == {0, 1, 2, 255}


def test_mevis_truth_is_the_union_of_the_masks(tmp_path: Path) -> None:
    """An expression for two birds would otherwise be scored against one of them."""
    valid = load_videos(write_mevis(tmp_path), "mevis", "valid_u")
    one, two = valid.videos["1234abcd"]
    assert (one.objects, two.objects, one.text) == (("7",), ("7", "8"), "Bird flying away")
    np.testing.assert_array_equal(valid.truth(one), np.stack([rectangle(1, n) for n in range(3)]))
    union = [rectangle(1, n) | (rectangle(2, n) & (n != 1)) for n in range(3)]
    np.testing.assert_array_equal(valid.truth(two), np.stack(union))
    empty = valid.truth(valid.videos["ffff0000"][0])
    assert empty is not None and empty.shape == (3, H, W)
    assert not empty.any()
    assert valid.labels("1234abcd") is None
    official = load_videos(tmp_path, "mevis", "valid")
    assert official.truth(official.expressions[0]) is None


def _meta(dataset: str, split: str) -> str:
    return {
        "ref_youtube_vos": f"ref-youtube-vos/meta_expressions/{split}/meta_expressions.json",
        "mevis": f"mevis/{split}/meta_expressions.json",
    }[dataset]


@pytest.mark.parametrize(
    ("dataset", "split", "spoil", "message"),
    [
        ("ref_youtube_vos", "train", lambda v: v.update(frames=[]), "has no frames"),
        ("ref_youtube_vos", "train", lambda v: v.update(frames=["00000", "00000"]), "has a frame twice"),
        ("ref_youtube_vos", "train", lambda v: v.update(frames=["../../x"]), "not a plain path"),
        ("ref_youtube_vos", "train", lambda v: v.update(frames=["a/b"]), "not a plain name"),
        ("ref_youtube_vos", "train", lambda v: v.update(frames=[5]), "a frame whose name is not text"),
        ("ref_youtube_vos", "train", lambda v: v.pop("expressions"), "has no 'expressions'"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"]["0"].pop("exp"), "has no 'exp'"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"]["0"].update(exp=" "), "a blank 'exp'"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"]["0"].pop("obj_id"), "has no 'obj_id'"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"]["0"].update(obj_id="255"), "not one of 1 to 254"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"]["0"].update(obj_id="\u0663"), "not a number"),
        ("ref_youtube_vos", "train", lambda v: v["expressions"].update({"..": {"exp": "a"}}), "not a plain path"),
        ("mevis", "valid_u", lambda v: v["expressions"]["0"].update(anno_id=[]), "has 0 'anno_id'"),
        ("mevis", "valid_u", lambda v: v["expressions"]["0"].update(anno_id=7), "not a list"),
        ("mevis", "valid_u", lambda v: v["expressions"]["0"].update(anno_id=[1.5]), "not a number"),
    ],
)
def test_malformed_expressions_give_one_sentence(
    dataset: str, split: str, spoil: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    """A broken download is named with its file and video; the others can still be listed."""
    root = WRITERS[dataset](tmp_path)
    path = root / _meta(dataset, split)
    content = json.loads(path.read_text())
    spoil(next(iter(content["videos"].values())))
    path.write_text(json.dumps(content))
    with pytest.raises(DcrisError, match=message) as error:
        load_videos(root, dataset, split)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    errors: list[DcrisError] = []
    kept = load_videos(root, dataset, split, errors.append)
    assert len(errors) == 1 and len(kept.expressions) >= 1


_ANY_TEXT = st.text(st.characters(max_codepoint=255, exclude_characters="\n\r\x1a"), min_size=1, max_size=20)


def _as_read(text: str) -> str:
    """A text with its white space as one space. To `str.split`, Latin-1's 0x85 is white space,
    though cleaning sees the three dots of Windows-1252 in it."""
    return " ".join(f'"{text}"'.split())[1:-1]


@given(
    texts=st.lists(_ANY_TEXT.filter(lambda text: not is_blank(_as_read(text))), min_size=4, max_size=48),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_of_davis_are_read(texts: list[str], random: Random, tmp_path: Path) -> None:
    """Objects beyond 9, lines in any order and letters of Latin-1 must not exchange texts: 0x85
    looks like the end of a line, and "10" is sorted before "2" by some codes."""
    objects = len(texts) // 4
    files = ("annot1", "annot1_full_video", "annot2", "annot2_full_video")
    root = tmp_path / str(len([*tmp_path.iterdir()]))
    write_davis(root)
    for annotator, name in enumerate(files):
        lines = [f'motor-bike {target + 1} "{texts[4 * target + annotator]}"' for target in range(objects)]
        random.shuffle(lines)
        content = "\r\n".join(lines).encode("utf-8" if annotator < 2 else "latin-1")
        with suppress(UnicodeDecodeError):  # Latin-1 that is UTF-8 by chance
            assume(content.decode() == "\r\n".join(lines))
        (root / f"ref-davis/davis_text_annotations/Davis17_{name}.txt").write_bytes(content)
    found = load_videos(root, "ref_davis17", "valid").expressions
    assert [each.text for each in found] == [_as_read(text) for text in texts[: 4 * objects]]
    assert [int(each.objects[0]) for each in found] == [1 + number // 4 for number in range(4 * objects)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Davis17_annot2.txt", 'motor-bike 1 "a"\n', "it has texts for objects 1 of video 'motorbike'"),
        ("Davis17_annot1.txt", "motor-bike one\n", "not of the form VIDEO OBJECT"),
        ("Davis17_annot1.txt", 'motor-bike 1 "a"\nmotorbike 1 "b"\n', "a second text for object 1"),
        ("Davis17_annot1.txt", 'motor-bike 0 "a"\n', "not one of 1 to 254"),
        ("Davis17_annot2_full_video.txt", "", "texts for no object of video 'motorbike'"),
    ],
)
def test_malformed_texts_of_davis_give_one_sentence(file: str, text: str, message: str, tmp_path: Path) -> None:
    """An object with three texts would be left out by the conversion without a word."""
    with pytest.raises(DcrisError, match=message) as error:
        load_videos(write_davis(tmp_path, {file: text}), "ref_davis17", "valid")
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks.pop("7"), "has no '7'"),
        (lambda masks: masks.update({"7": masks["7"][:2]}), "are 2, but the video has 3 frames"),
        (lambda masks: masks["7"][0].update(size=[10**9, 10**9]), "the limits are 110,000,000 pixels"),
        (lambda masks: masks["7"][0].update(size=[-1, 5]), "not a height and a width"),
        (lambda masks: masks["7"][1].update(size=[H, W + 1]), "not for an image of 24 x 36"),
        (lambda masks: masks["7"][1].update(counts="zz"), "cannot be decoded"),
        (lambda masks: masks["7"].__setitem__(1, 3), "cannot be decoded"),
    ],
)
def test_unusable_masks_of_mevis_give_one_sentence(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    """Masks of strangers are bounded before memory is taken, and the error names their file."""
    masks = mevis_masks()
    change(masks)
    valid = load_videos(write_mevis(tmp_path, masks=masks), "mevis", "valid_u")
    with pytest.raises(DcrisError, match=message):
        valid.truth(valid.expressions[0])


def test_labels_that_differ_in_size_or_kind_give_one_sentence(tmp_path: Path) -> None:
    """A mask of another size would otherwise be compared with the wrong pixels."""
    root = write_youtube(tmp_path)
    train = load_videos(root, "ref_youtube_vos", "train")
    folder = root / "ref-youtube-vos/train/Annotations/0043f083b5"
    write_labels(folder / "00005.png", np.zeros((H, W + 1), np.uint8))
    with pytest.raises(DcrisError, match=r"00005\.png are 24 x 37 pixels .* first frame 24 x 36"):
        train.truth(train.videos["0043f083b5"][0])
    Image.new("RGB", (W, H)).save(folder / "00005.png")
    with pytest.raises(DcrisError, match="in colour"):
        train.truth(train.videos["0043f083b5"][0])
    (folder / "00005.png").unlink()
    with pytest.raises(DcrisError, match="there is no image file"):
        train.truth(train.videos["0043f083b5"][0])


def test_a_video_that_a_list_names_twice(tmp_path: Path) -> None:
    """Its objects would count twice in every mean."""
    path = write_davis(tmp_path) / "ref-davis/DAVIS/ImageSets/2017/val.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DcrisError, match="line 2 names the video 'motorbike' again"):
        load_videos(tmp_path, "ref_davis17", "valid")


def test_more_masks_than_can_be_listed_are_refused(tmp_path: Path) -> None:
    """A file of a megabyte can list 30,000 frames and 30,000 expressions: a name for each mask
    would take 100 GB."""
    record: dict[str, Any] = {
        "frames": [str(number) for number in range(3_000)],
        "expressions": {str(number): {"exp": "x"} for number in range(2_000)},
    }
    with pytest.raises(DcrisError, match="6,000,000 masks, one for each expression and frame; the limit is 5,000,000"):
        load_videos(write_mevis(tmp_path, {"valid": {"v": record}}), "mevis", "valid")
    record["expressions"]["2000"] = {"exp": "x"}
    with pytest.raises(DcrisError, match="video 'v' has 2,001 expressions; the limit is 2,000"):
        load_videos(write_mevis(tmp_path, {"valid": {"v": record}}), "mevis", "valid")


def test_a_long_video_is_refused_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few bytes can list a million frames."""
    monkeypatch.setattr(videos_module, "MAX_VIDEO_PIXELS", 3 * H * W - 1)
    valid = load_videos(write_mevis(tmp_path), "mevis", "valid_u")
    with pytest.raises(DcrisError, match="the 3 frames of video '1234abcd' have 36 x 24 pixels"):
        valid.truth(valid.expressions[0])


def test_readers_of_images_say_that_these_are_videos(tmp_path: Path) -> None:
    """`dcris evaluate --all` must not search a hundred thousand frames for files of other layouts,
    and a table of images does not exist."""
    for write in WRITERS.values():
        write(tmp_path)
    assert list_data_sets(tmp_path) == []
    with pytest.raises(DcrisError, match="mevis is a data set of videos"):
        load_references(tmp_path, "mevis")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """The sentence says where the set is published and which folders are expected."""
    with pytest.raises(DcrisError, match=r"no data set mevis in .*get it from https://github.com/henghuiding/MeViS"):
        load_videos(tmp_path, "mevis", "valid_u")
    with pytest.raises(DcrisError, match=r"no data set of videos 'refcoco'; choose from ref_youtube_vos, "):
        load_videos(tmp_path, "refcoco", "val")
    with pytest.raises(DcrisError, match="has no split 'train'; choose from valid_u, valid"):
        load_videos(write_mevis(tmp_path), "mevis", "train")
    records = mevis_records()
    records["valid_u"] = {}
    with pytest.raises(DcrisError, match="it has no videos"):
        load_videos(write_mevis(tmp_path / "b", records), "mevis", "valid_u")
    assert MEVIS_FRAMES == ["00000", "00001", "00002"]
