"""Read the frames of videos, and write videos with masks drawn on them.

PyAV is used because it raises an error for broken files; cv2 silently returns fewer frames. FFmpeg
never gets a file name: it would take a name such as "http:host/a.mp4" as a URL, and open the files
that a playlist lists.
"""

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import refuse_shape
from dcris.errors import DcrisError
from dcris.types import MaskArray
from dcris.utils.annotate import colour_of
from dcris.utils.drawing import overlay
from dcris.utils.files import open_regular, write_file

_DEMUXERS = {
    "mov": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
    "matroska": (".mkv", ".webm"),
    "avi": (".avi", ".divx"),
    "mpegts": (".ts", ".mts", ".m2ts", ".m2t"),
    "mpeg": (".mpg", ".mpeg", ".mpe", ".vob"),
    "mpegvideo": (".m1v", ".m2v"),
    "asf": (".wmv", ".asf"),
    "flv": (".flv",),
    "ogg": (".ogv",),
    "mxf": (".mxf",),
    "ivf": (".ivf",),
    "dv": (".dv",),
    "h264": (".h264", ".264"),
    "hevc": (".hevc", ".h265", ".265"),
}
"""Accepted containers (FFmpeg's names) and their file endings. FFmpeg's other formats include
playlists (hls, concat, sdp), which open further files and hosts."""

_MAX_PIXELS = 36_000_000
"""Limit on the pixels of a frame (8K cinema). A decoder keeps up to 16 frames, which takes 0.9
GB."""

VIDEO_ENDINGS = frozenset(ending for endings in _DEMUXERS.values() for ending in endings)

_ENCODERS = {
    "libx264": {"crf": "18", "preset": "veryfast"},
    "libopenh264": {"b": "8000000"},
    "mpeg4": {"qscale": "3"},
}
"""Encoders in order of preference: H.264, which every browser plays, if FFmpeg was built with
it."""

_MISSING_SECONDS = 0.5
"""The last frame may end this much before the duration in the file; otherwise the file is
truncated."""

_DURATION = re.compile("([0-9]{1,6}):([0-9]{2}):([0-9]{2}(?:[.][0-9]{1,9})?)")
"""Matroska's tag of this name, as FFmpeg and mkvmerge write it. A hostile file may have any text
there."""

_SLOWEST = Fraction(1, 1000)
_MOST_TICKS = 1_000_000
"""Least frame rate of an overlay and greatest denominator of one, which encoders store in 32 bits.
Each frame has its own time, so the rate need not be exact."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video."""

    index: int
    """Number in the video, from 0."""
    time: float | None
    """Seconds from the start of the stream."""
    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB, rotated and mirrored as the file specifies."""


def read_frames(path: Path, every: int = 1, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Frame]:
    """Yield every `every`-th frame of a video, from the first, whose index is `wanted`.

    Raises:
        DcrisError: PyAV is not installed, or the file is not a video or changes its size; after the
            intact frames, if the file is damaged or truncated. A truncated transport stream (.ts)
            is not detected, because it has no duration.
    """
    _require_one_size(path)
    for frame in _decoded(path):
        if frame.index % every == 0 and wanted(frame.index):
            yield Frame(frame.index, frame.time, _upright(path, frame.data))


def frame_count(path: Path) -> int | None:
    """Return the number of frames that a video states or its duration suggests, for a display of
    progress; None if it cannot be read or states neither."""
    with suppress(DcrisError), _opened(path) as (_, stream):
        if stream.frames:
            return int(stream.frames)
        seconds, rate = _seconds(stream), stream.average_rate or stream.guessed_rate
        return None if not seconds or not rate else round(seconds * float(rate))
    return None


def write_overlay(
    source: Path, target: Path, masks: Callable[[int], Sequence[MaskArray] | None], last: int, every: int = 1
) -> str:
    """Draw masks on the frames that have some, and write these as an .mp4 file.

    It plays at the speed of the source.

    Args:
        source: the video.
        target: the .mp4 file; it is written completely or not at all.
        masks: returns the masks [H, W] bool of a frame by its index, one per phrase; None omits the
            frame. Phrase k has the colour k of `drawing.COLOURS`.
        last: index of the last frame with masks; reading stops there.
        every: step between frames with masks, which divides the frame rate.

    Returns:
        Name of the codec.

    Raises:
        DcrisError: the source cannot be read, or the target cannot be written.
    """
    av = _av()
    encoder = next((name for name in _ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise DcrisError("this build of PyAV cannot write H.264 or MPEG-4; leave out the format overlay")

    def fill(path: Path) -> None:
        with path.open("wb") as file, av.open(file, "w", format="mp4") as output:
            stream: Any = None
            # No further: what follows may be damaged.
            for frame in islice(_decoded(source), last + 1):
                drawn = masks(frame.index)
                if drawn is None:
                    continue
                pixels = _upright(source, frame.data)
                for number, mask in enumerate(drawn):
                    pixels = overlay(pixels, mask, colour_of(number))
                # 4:2:0 chroma subsampling needs even sides.
                height, width = pixels.shape[:2]
                pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if stream is None:
                    rate = max(frame.rate / every, _SLOWEST).limit_denominator(_MOST_TICKS)
                    stream = output.add_stream(encoder, rate=rate, options=_ENCODERS[encoder])
                    stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                    stream.codec_context.time_base = frame.base
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                image.pts, image.time_base = frame.ticks, frame.base
                output.mux(stream.encode(image))
            if stream is not None:
                output.mux(stream.encode(None))

    try:
        write_file(target, fill)
    except av.FFmpegError as error:
        raise DcrisError(f"cannot write {target}: {error.strerror or error}; leave out the format overlay") from error
    return "H.264" if "264" in encoder else "MPEG-4"


@dataclass(frozen=True, slots=True)
class _Decoded:
    index: int
    time: float | None
    ticks: int
    """Presentation time in units of `base`."""
    base: Fraction
    rate: Fraction
    """Approximate frames per second."""
    data: Any
    """PyAV's frame."""


def _require_one_size(path: Path) -> None:
    """Raise DcrisError if key frames differ in size, before any frame is predicted."""
    with _opened(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        size = None
        with suppress(_av().FFmpegError):  # reported later, when all frames are decoded
            for frame in container.decode(stream):
                size = _same_size(path, frame, size)


def _same_size(path: Path, frame: Any, size: tuple[int, ...] | None) -> tuple[int, ...]:
    found = frame.width, frame.height, *_matrix(frame)
    if size is None or found == size:
        return found
    raise DcrisError(
        f"the video {path} changes its size or orientation, from {size[0]} x {size[1]} to {found[0]} x {found[1]} pixels; "
        "export it with one size"
    )


def _decoded(path: Path) -> Iterator[_Decoded]:
    av = _av()
    with _opened(path) as (container, stream):
        # No frame threads: after an error, closing the decoder of FFmpeg 8 deadlocks with them.
        stream.thread_type = "SLICE"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        start = stream.start_time  # not 0 in recorded broadcasts
        index, before, end = 0, -1, 0.0
        size = None
        frames = container.decode(stream)
        while True:
            try:
                frame = next(frames)
            except StopIteration:
                break
            except av.FFmpegError as error:
                raise DcrisError(
                    f"the video {path} is damaged or cut short at frame {index} ({error.strerror or error}); "
                    "download or export it again"
                ) from error
            if frame.is_corrupt:
                raise DcrisError(f"the video {path} is damaged at frame {index}; download or export it again")
            size = _same_size(path, frame, size)
            ticks, time = -1, None
            if frame.pts is not None:
                start = frame.pts if start is None else start
                ticks = frame.pts - start
                time = round(float(ticks * stream.time_base), 6)
            # Frames without usable times (raw streams, some .avi) are shown at the frame rate.
            if ticks <= before:
                ticks = max(before + 1, round(index / rate / stream.time_base))
            yield _Decoded(index, time, ticks, stream.time_base, rate, frame)
            index, before, end = index + 1, ticks, float(ticks * stream.time_base + 1 / rate)
        length = _seconds(stream)
        if length is not None and end < length - _MISSING_SECONDS:
            raise DcrisError(
                f"the video {path} is cut short: it ends after {end:.1f} of {length:.1f} s; download or export it again"
            )
        if index == 0:
            raise DcrisError(f"the video {path} has no frames; replace or remove it")


def _seconds(stream: Any) -> float | None:
    """Return the duration that the file states, from the first frame on.

    Matroska has it in a tag, which FFmpeg counts from the start of the file: where a video starts
    later than its sound, the duration is less.
    """
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    found = _DURATION.fullmatch(str(stream.metadata.get("DURATION", "")))
    if found is None:
        return None
    hours, minutes, seconds = map(float, found.groups())
    length = 3600 * hours + 60 * minutes + seconds - float((stream.start_time or 0) * stream.time_base)
    return length if length > 0 else None


class _Nameless:
    """The methods of an open file that FFmpeg needs, without its name."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _open_nothing(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError(f"the video refers to another file ({url}), which is not allowed")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video; yield its container and its first video stream."""
    av = _av()
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            container = stack.enter_context(
                av.open(
                    _Nameless(file),
                    container_options={"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "none"},
                    # Of each stream: opening a file already decodes a frame.
                    options={"max_pixels": str(_MAX_PIXELS)},
                    metadata_errors="replace",  # old cameras and converters write titles in Latin-1
                    io_open=_open_nothing,
                )
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DcrisError(f"cannot read the video {path} ({reason}); replace or remove it") from error
        if not container.streams.video:
            raise DcrisError(f"{path} has no video stream; remove it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DcrisError(f"cannot read the video {path} (FFmpeg has no decoder for it); convert it to H.264")
        # By default damage is concealed, and a frame may be larger than its container states.
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(_MAX_PIXELS)}
        height, width = stream.codec_context.height, stream.codec_context.width
        try:
            if not height * width:  # also of a stream whose first frame was over the limit
                raise DcrisError(f"its frames have no size, or more than {_MAX_PIXELS:,} pixels")
            refuse_shape(height, width, _MAX_PIXELS)
        except DcrisError as error:
            raise DcrisError(f"cannot read the video {path} ({error}); export it with a smaller size") from error
        yield container, stream


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return the display matrix (a, b, c, d): pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = (1, 0, 0, 0, 1) if data is None else struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _upright(path: Path, frame: Any) -> NDArray[np.uint8]:
    """Convert a frame to RGB pixels and apply its display matrix."""
    try:
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    except (_av().FFmpegError, ValueError) as error:
        raise DcrisError(
            f"the frames of the video {path} cannot be converted to RGB ({getattr(error, 'strerror', None) or error}); "
            "convert it to H.264"
        ) from error
    a, b, c, d = _matrix(frame)
    if abs(b) > abs(a):  # x and y are swapped
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DcrisError(f"videos need PyAV, which cannot be imported ({error}); pip install 'dcris[video]'") from error
    av.logging.set_level(av.logging.PANIC)  # errors are raised as exceptions
    return av
