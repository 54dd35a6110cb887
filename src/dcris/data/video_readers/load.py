"""Read a split of a data set of videos in its layout; see dcris.data.video_readers."""

from collections.abc import Sequence
from pathlib import Path

from dcris.data.registry import VIDEO_SETS
from dcris.data.table import ErrorCount, OnError
from dcris.data.video_readers import VIDEO_READERS
from dcris.data.videos import VideoSet
from dcris.errors import DcrisError
from dcris.utils.files import reading

MAX_MASKS = 5_000_000
"""Most masks of a split, one for each expression and frame. MeViS's train has about 1.8 million."""


def video_splits(root: Path, dataset: str) -> Sequence[str]:
    """Return the splits of a data set of videos that are below `root`.

    Raises:
        DcrisError: there is no such data set, or nothing of it below `root`.
    """
    reader = VIDEO_READERS.get(dataset)
    if reader is None:
        raise DcrisError(f"there is no data set of videos {dataset!r}; choose from {', '.join(VIDEO_READERS)}")
    with reading(root):
        found = reader.find(root)
    if not found:
        source = VIDEO_SETS[dataset].source.replace("ROOT", str(root))
        raise DcrisError(f"there is no data set {dataset} in {root}: found no {reader.files}; get it from {source}")
    return found


def load_videos(root: Path, dataset: str, split: str, on_error: OnError | None = None) -> VideoSet:
    """Read one split.

    Args:
        root: folder of the data sets.
        dataset: ref_youtube_vos, ref_davis17 or mevis.
        split: as the authors' files name it: train, valid, test or valid_u.
        on_error: receives the error of each video or expression that cannot be used, which is then
            skipped.

    Raises:
        DcrisError: anything is missing, malformed or contradictory, or there are more than
            MAX_MASKS masks. The message names the file, the video and the expression.
    """
    found = video_splits(root, dataset)
    if split not in found:
        raise DcrisError(f"{dataset} in {root} has no split {split!r}; choose from {', '.join(found)}")
    errors = ErrorCount(on_error)
    with reading(root):
        videos = VIDEO_READERS[dataset].load(root, split, errors)
    # What follows has a name for each mask: a small file with as many frames as expressions would
    # fill the memory.
    masks = sum(len(each.frames) for each in videos.expressions)
    if masks > MAX_MASKS:
        raise DcrisError(
            f"{dataset} ({split}) in {root} has {masks:,} masks, one for each expression and frame; the limit is "
            f"{MAX_MASKS:,}; leave some videos out"
        )
    if not videos.expressions and not errors.count:
        raise DcrisError(f"{dataset} ({split}) in {root} has no expressions; download it again")
    return videos
