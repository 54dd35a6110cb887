"""Videos: their frames as pixels, and a video with masks drawn on it.

PyAV reads them, since it raises where a file is broken; cv2 returns one frame less without an error. FFmpeg never gets a name:
it would take one such as "http:host/a.mp4" for an address, and the entries of a playlist for further files.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import refuse_shape
from dcris.errors import DcrisError
from dcris.types import MaskArray
from dcris.utils.drawing import COLOURS, overlay
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
"""FFmpeg's names of the containers that are read, and how their files end. Among its hundreds of others are playlists (hls,
concat, sdp), which would read further files and hosts."""

_MAX_PIXELS = 36_000_000
"""Of a frame: cinema's 8K. A decoder keeps up to 16 frames, which is 0.9 GB then."""

VIDEO_ENDINGS = frozenset(ending for endings in _DEMUXERS.values() for ending in endings)

_ENCODERS = {
    "libx264": {"crf": "18", "preset": "veryfast"},
    "libopenh264": {"b": "8000000"},
    "mpeg4": {"qscale": "3"},
}
"""H.264, which every browser plays, where FFmpeg was built with a library for it."""

_MISSING_SECONDS = 0.5
"""By so much the last frame may end before what the file says, without the file counting as cut short."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video."""

    index: int
    """Its number in the video, from 0."""
    time: float | None
    """Seconds from the start of the stream."""
    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB, turned and mirrored as the file says."""


def read_frames(path: Path, every: int = 1, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Frame]:
    """Every `every`-th frame of a video, from the first on, where its index is wanted.

    Raises DcrisError where PyAV is not installed, the file is no video or changes its size, and, after the frames that are
    whole, where it is damaged or cut short. Only a transport stream (.ts) may end early without an error, as it does not say
    how long it is.
    """
    _require_one_size(path)
    for frame in _decoded(path):
        if frame.index % every == 0 and wanted(frame.index):
            yield Frame(frame.index, frame.time, _upright(path, frame.data))


def write_overlay(
    source: Path, target: Path, masks: Callable[[int], Sequence[MaskArray] | None], last: int, every: int = 1
) -> str:
    """Write the frames that have masks, drawn on them in the colours of `drawing.COLOURS`, as an .mp4 of the source's pace.

    Args:
        source: the video.
        target: the .mp4 file; it is whole or not there.
        masks: of a frame's index: those of its phrases, [H, W] bool each; None where the frame is to be left out.
        last: the last index that has any; the source is not read any further.
        every: the step between frames that have any: the pace is slower by that.

    Returns the name of the codec. Raises DcrisError where the source cannot be read or the target not be written.
    """
    av = _av()
    encoder = next((name for name in _ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise DcrisError("this build of PyAV can write neither H.264 nor MPEG-4; choose other formats than overlay")

    def fill(path: Path) -> None:
        with path.open("wb") as file, av.open(file, "w", format="mp4") as output:
            stream: Any = None
            for frame in _decoded(source):
                if frame.index > last:
                    break
                drawn = masks(frame.index)
                if drawn is None:
                    continue
                pixels = _upright(source, frame.data)
                for number, mask in enumerate(drawn):
                    pixels = overlay(pixels, mask, COLOURS[number % len(COLOURS)])
                # 4:2:0 halves both sides, so they have to be even.
                height, width = pixels.shape[:2]
                pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if stream is None:
                    stream = output.add_stream(encoder, rate=frame.rate / every, options=_ENCODERS[encoder])
                    stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                    stream.codec_context.time_base = frame.base
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                picture.pts, picture.time_base = frame.ticks, frame.base
                output.mux(stream.encode(picture))
            if stream is not None:
                output.mux(stream.encode(None))

    try:
        write_file(target, fill)
    except av.FFmpegError as error:
        raise DcrisError(
            f"cannot write {target}: {error.strerror or error}; choose other formats than overlay"
        ) from error
    return "H.264" if "264" in encoder else "MPEG-4"


@dataclass(frozen=True, slots=True)
class _Decoded:
    index: int
    time: float | None
    ticks: int
    """When it is shown, in units of `base`."""
    base: Fraction
    rate: Fraction
    """Frames a second, about."""
    data: Any
    """PyAV's frame."""


def _require_one_size(path: Path) -> None:
    """Raise DcrisError where the key frames of a video have several sizes, before anything is made of its first frames."""
    with _opened(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        size = None
        with suppress(_av().FFmpegError):  # reported by the pass that decodes all frames
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
        # Not by frame: FFmpeg 8's threads then wait for each other for ever after an error, when the decoder is closed.
        stream.thread_type = "SLICE"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        start = stream.start_time  # of a recorded broadcast, the hour of the day
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
                    "fetch or export it again"
                ) from error
            if frame.is_corrupt:
                raise DcrisError(f"the video {path} is damaged at frame {index}; fetch or export it again")
            size = _same_size(path, frame, size)
            ticks, time = -1, None
            if frame.pts is not None:
                start = frame.pts if start is None else start
                ticks = frame.pts - start
                time = round(float(ticks * stream.time_base), 6)
            # Files without times of their own (raw streams, some .avi) are played at their rate.
            if ticks <= before:
                ticks = max(before + 1, round(index / rate / stream.time_base))
            yield _Decoded(index, time, ticks, stream.time_base, rate, frame)
            index, before, end = index + 1, ticks, float(ticks * stream.time_base + 1 / rate)
        length = _seconds(stream)
        if length is not None and end < length - _MISSING_SECONDS:
            raise DcrisError(
                f"the video {path} is cut short: it ends after {end:.1f} of {length:.1f} s; fetch or export it again"
            )
        if index == 0:
            raise DcrisError(f"the video {path} has no frames")


def _seconds(stream: Any) -> float | None:
    """How long the file says that its video is; Matroska has that in a tag."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    tag = str(stream.metadata.get("DURATION", "")).split(":")
    try:
        return sum(float(part) * 60**power for power, part in enumerate(reversed(tag)))
    except ValueError:
        return None


class _Nameless:
    """What FFmpeg needs of an open file."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _open_nothing(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError(f"a video must not open another file ({url})")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video's container and its first video stream."""
    av = _av()
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            container = stack.enter_context(
                av.open(
                    _Nameless(file),
                    container_options={"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "none"},
                    io_open=_open_nothing,
                )
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DcrisError(f"cannot read the video {path} ({reason}); replace that file or leave it out") from error
        if not container.streams.video:
            raise DcrisError(f"{path} holds no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DcrisError(f"cannot read the video {path} (FFmpeg has no decoder for it); convert it to H.264")
        # Else damage is painted over, and a frame may be larger than its container says.
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(_MAX_PIXELS)}
        try:
            refuse_shape(stream.codec_context.height, stream.codec_context.width, _MAX_PIXELS)
        except DcrisError as error:
            raise DcrisError(f"cannot read the video {path} ({error}); export it with a smaller size") from error
        yield container, stream


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """A frame's display matrix [[a, b], [c, d]]: pixel (x, y) is shown at (a x + c y, b x + d y), but for a shift."""
    data = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = (1, 0, 0, 0, 1) if data is None else struct.unpack_from("=5i", bytes(data))
    return a, b, c, d


def _upright(path: Path, frame: Any) -> NDArray[np.uint8]:
    try:
        pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    except (_av().FFmpegError, ValueError) as error:
        raise DcrisError(
            f"the frames of the video {path} cannot be turned into RGB ({getattr(error, 'strerror', None) or error}); "
            "convert it to H.264"
        ) from error
    a, b, c, d = _matrix(frame)
    if abs(b) > abs(a):  # x and y change places
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DcrisError(
            f"videos are read by PyAV, which cannot be imported ({error}); pip install 'dcris[video]'"
        ) from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong is raised as well
    return av
