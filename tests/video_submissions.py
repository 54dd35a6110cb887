"""Masks of videos in the forms that servers take, made from the truth."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dcris.data.submissions import SUBMISSIONS
from dcris.data.videos import LabelImages, VideoSet
from video_layouts import H, W, write_labels


def true_labels(videos: VideoSet, name: str, number: int) -> np.ndarray:
    assert isinstance(videos.truths, LabelImages)
    return videos.truths.labels(videos.videos[name][0], number, (H, W))


def submit(
    folder: Path, videos: VideoSet, change: Callable[[np.ndarray, str, int], np.ndarray] = lambda made, *_: made
) -> Path:
    """Write the truth of a split as its submission; `change` gets a mask or labels, the file's
    folder and the frame's number, and returns what is written."""
    for each in videos.expressions:
        truth = videos.truth(each)
        assert truth is not None
        for number, frame in enumerate(each.frames):
            path = folder / SUBMISSIONS[videos.dataset].file(each, frame)
            if videos.dataset == "ref_davis17":
                made = true_labels(videos, each.video, number)
                made = change(np.where(made == 255, 0, made).astype(np.uint8), path.parent.as_posix(), number)
                write_labels(path, made)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(change(truth[number], path.parent.as_posix(), number) * np.uint8(255)).save(path)
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path
