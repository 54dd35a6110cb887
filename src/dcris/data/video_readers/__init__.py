"""Layouts of data sets of videos: one file each, registered in VIDEO_READERS by data set.

Use dcris.data.video_readers.load.load_videos to read one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcris.data.table import OnError
from dcris.data.video_readers import mevis, ref_davis17, ref_youtube_vos
from dcris.data.videos import VideoSet


@dataclass(frozen=True, slots=True)
class VideoReader:
    """How to detect and to read a layout of videos."""

    files: str
    """Where the files are below the root, for error messages."""
    find: Callable[[Path], Sequence[str]]
    """(root) -> the splits that are there."""
    load: Callable[[Path, str, OnError | None], VideoSet]
    """(root, split, on_error) -> one of the splits that `find` returned.

    Raises DcrisError for anything missing, malformed or contradictory, naming file, video and
    expression. With `on_error`, the error of a single video or expression goes there instead, and
    it is skipped. Frames and masks are not opened."""


VIDEO_READERS: dict[str, VideoReader] = {
    "ref_youtube_vos": VideoReader(
        "ref-youtube-vos/meta_expressions/SPLIT/meta_expressions.json", ref_youtube_vos.find, ref_youtube_vos.load
    ),
    "ref_davis17": VideoReader(
        "ref-davis/DAVIS with ref-davis/davis_text_annotations/Davis17_annot1.txt", ref_davis17.find, ref_davis17.load
    ),
    "mevis": VideoReader("mevis/SPLIT/meta_expressions.json", mevis.find, mevis.load),
}
"""By data set."""
