"""The file meta_expressions.json of Ref-YouTube-VOS, which MeViS and the code for Ref-DAVIS17 have
taken over.

{"videos": {VIDEO: {"frames": ["00000", ...], "expressions": {"0": {"exp": TEXT, ...}, ...}}, ...}}
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcris.data.registry import VIDEO_SETS
from dcris.data.table import OnError, bad, field, plain_name, shown, skip_errors, text_field
from dcris.utils.files import read_json

META = "meta_expressions.json"

_MOST_EXPRESSIONS = 2_000
"""Most expressions of a video, all of which are predicted for a frame at a time. MeViS has 14 on
average; DAVIS's labels allow for four texts of each of 254 objects."""

Expressions = dict[str, dict[str, Any]]
"""The records of a video's expressions, by identifier."""


def home_of(root: Path, dataset: str, file: str) -> Path | None:
    """Return the first folder of a data set below `root` that has what matches a pattern."""
    homes = (root / name for name in VIDEO_SETS[dataset].folders)
    return next((home for home in homes if any(home.glob(file))), None)


def read_videos(path: Path) -> dict[str, Any]:
    """Return the records of the videos by name. Raises DcrisError if it is not such a file."""
    videos = field(read_json(path, "the file of expressions"), "videos", dict, path, "the file")
    if not videos:
        raise bad(path, "it has no videos")
    return videos


def each_video(
    path: Path, videos: dict[str, Any], on_error: OnError | None
) -> Iterator[tuple[str, tuple[str, ...], Expressions]]:
    """Yield name, frames and expressions of each video that can be used; see Reader.load.

    Names become parts of paths, so each must be one.
    """
    for name, record in videos.items():
        with skip_errors(on_error):
            yield name, *_read(path, name, record)


def _read(path: Path, name: str, record: Any) -> tuple[tuple[str, ...], Expressions]:
    where = f"video {shown(name)}"
    plain_name(name, path, where, "name")
    frames, expressions = field(record, "frames", list, path, where), field(record, "expressions", dict, path, where)
    if not frames:
        raise bad(path, f"{where} has no frames")
    for frame in frames:
        if type(frame) is not str:
            raise bad(path, f"{where} has a frame whose name is not text: {shown(frame)}")
        plain_name(frame, path, where, "frame")
    if len(set(frames)) < len(frames):
        raise bad(path, f"{where} has a frame twice")
    if len(expressions) > _MOST_EXPRESSIONS:
        raise bad(path, f"{where} has {len(expressions):,} expressions; the limit is {_MOST_EXPRESSIONS:,}")
    for key, each in expressions.items():
        plain_name(key, path, where, "expression")
        text_field(each, "exp", path, f"expression {key} of {where}")
    return tuple(frames), expressions


def identifier(value: Any, path: Path, where: str, key: str) -> str:
    """Return the identifier of an object, which files write as a number or as its digits."""
    text = str(value) if type(value) is int and 0 <= value < 1 << 63 else value
    if type(text) is not str or not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise bad(path, f"{where} has a '{key}' that is not a number: {shown(value)}")
    return text


def label(value: Any, path: Path, where: str) -> str:
    """Return an `obj_id` as the value of a label image. Raises DcrisError unless it is 1 to 254."""
    text = identifier(value, path, where, "obj_id")
    if not 1 <= int(text) <= 254:
        raise bad(path, f"{where} has an 'obj_id' that is not one of 1 to 254: {text}")
    return str(int(text))
