"""Ref-YouTube-VOS: meta_expressions/SPLIT/meta_expressions.json, SPLIT/JPEGImages/VIDEO/FRAME.jpg
and, in train, train/Annotations/VIDEO/FRAME.png.

The file of valid lists the 305 videos of test, too: they are left out, as everywhere. Its `obj_id`
is in train only. The authors published a truth of valid in March 2026 (issue 7 of
skynbe/Refer-Youtube-VOS), without a description of its files. It is read from valid/Annotations in
two forms: labels as in train, if the expressions have `obj_id`; or a mask of two values for each
expression, VIDEO/EXPRESSION/FRAME.png, as a program of its users has it.
Source: inference_ytvos.py and datasets/ytvos.py of ReferFormer; refer_youtube_vos_dataset.py of
MTTR.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcris.data.registry import VIDEO_SETS
from dcris.data.table import OnError, bad, shown, skip_errors
from dcris.data.video_readers.meta import META, each_video, home_of, label, read_videos
from dcris.data.videos import ExpressionImages, LabelImages, Truths, VideoExpression, VideoSet
from dcris.errors import DcrisError
from dcris.utils.streams import counted

_DATASET = "ref_youtube_vos"
_SPLITS = ("train", "valid", "test")


def find(root: Path) -> Sequence[str]:
    """Return the splits that have a file of expressions."""
    home = home_of(root, _DATASET, f"meta_expressions/*/{META}")
    return [] if home is None else [split for split in _SPLITS if _meta(home, split).is_file()]


def _meta(home: Path, split: str) -> Path:
    return home / "meta_expressions" / split / META


def load(root: Path, split: str, on_error: OnError | None = None) -> VideoSet:
    """Read a split; see VideoReader.load."""
    home = home_of(root, _DATASET, f"meta_expressions/*/{META}")
    assert home is not None
    path = _meta(home, split)
    videos = read_videos(path)
    notes = _leave_out_test(videos, path, _meta(home, "test")) if split == "valid" else ()
    folder = home / split / "Annotations"
    expressions: list[VideoExpression] = []
    has_masks = False
    for name, frames, records in each_video(path, videos, on_error):
        for key, record in records.items():
            where = f"expression {key} of video {shown(name)}"
            with skip_errors(on_error):
                objects = (label(record["obj_id"], path, where),) if "obj_id" in record else ()
                if split == "valid" and (folder / name / key).is_dir():
                    has_masks, objects = True, (key,)  # no two expressions share a mask
                if split == "train" and not objects:
                    raise bad(path, f"{where} has no 'obj_id'")
                expressions.append(VideoExpression(name, key, record["exp"], frames, objects))
    truths: Truths | None = None
    if has_masks:
        truths = ExpressionImages(folder)
    elif split == "train" or (folder.is_dir() and all(each.objects for each in expressions)):
        truths = LabelImages(folder)
    return VideoSet(_DATASET, split, home / split / "JPEGImages", tuple(expressions), truths, notes)


def _leave_out_test(videos: dict[str, Any], path: Path, test: Path) -> tuple[str, ...]:
    """Remove the videos of test, and return a note about them."""
    official, _ = VIDEO_SETS[_DATASET].splits["valid"]
    before = len(videos)
    if test.is_file():
        for name in read_videos(test):
            videos.pop(name, None)
    elif official is not None and before > official:
        raise DcrisError(
            f"{path} lists {before:,} videos, of which {official} are valid's and the others test's; put the file of test's "
            f"expressions at {test}, so that they can be left out"
        )
    left_out = before - len(videos)
    return (f"left out: {counted(left_out, 'video')} of test, which the file of valid lists too",) if left_out else ()
