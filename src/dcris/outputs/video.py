"""Videos: their frames as pixels, and a video with masks drawn on it.

PyAV reads them, since it raises where a file is broken; cv2 answers with one frame less and no word of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import refuse_shape
from dcris.drawing import COLOURS, overlay
from dcris.errors import DcrisError
from dcris.files import write_file
from dcris.types import MaskArray

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
    """Seconds from the start."""
    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB, turned as the camera was held."""


def read_frames(path: Path, every: int = 1, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Frame]:
    """Every `every`-th frame of a video, from the first on, where its index is wanted.

    Raises DcrisError where PyAV is not installed or the file is no video, and, after the frames that are whole, where it is
    damaged or cut short. Only a transport stream (.ts) may end early in silence, as it does not say how long it is.
    """
    for frame in _decoded(path):
        if frame.index % every == 0 and wanted(frame.index):
            yield Frame(frame.index, frame.time, _upright(frame.data))


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
        with av.open(str(path), "w", format="mp4") as output:
            stream: Any = None
            for frame in _decoded(source):
                if frame.index > last:
                    break
                drawn = masks(frame.index)
                if drawn is None:
                    continue
                pixels = _upright(frame.data)
                for number, mask in enumerate(drawn):
                    if mask.shape != pixels.shape[:2]:
                        raise DcrisError(f"the video {source} changes its size at frame {frame.index}")
                    pixels = overlay(pixels, mask, COLOURS[number % len(COLOURS)])
                # 4:2:0 halves both sides, so they have to be even.
                height, width = pixels.shape[:2]
                pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if stream is None:
                    stream = output.add_stream(encoder, rate=frame.rate / every, options=_ENCODERS[encoder])
                    stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                    stream.codec_context.time_base = frame.base
                elif (stream.height, stream.width) != pixels.shape[:2]:
                    raise DcrisError(f"the video {source} changes its size at frame {frame.index}")
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


def _decoded(path: Path) -> Iterator[_Decoded]:
    av = _av()
    with _opened(path) as container:
        if not container.streams.video:
            raise DcrisError(f"{path} holds no video")
        stream = container.streams.video[0]
        refuse_shape(stream.codec_context.height, stream.codec_context.width)
        # Not by frame: FFmpeg 8's threads then wait for each other for ever after an error, when the decoder is closed.
        stream.thread_type = "SLICE"
        stream.codec_context.options = {"err_detect": "explode"}  # else damage is painted over
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        index, before, end = 0, -1, 0.0
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
            known = frame.pts is not None and frame.pts > before
            # Files without times of their own (raw streams, some .avi) are played at their rate.
            ticks = frame.pts if known else max(before + 1, round(index / rate / stream.time_base))
            time = None if frame.time is None else round(float(frame.time), 6)
            yield _Decoded(index, time, ticks, stream.time_base, rate, frame)
            index, before, end = (
                index + 1,
                ticks,
                float((ticks - (stream.start_time or 0)) * stream.time_base + 1 / rate),
            )
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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    av = _av()
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DcrisError(f"cannot read the video {path} ({reason}); replace that file or leave it out") from error
    with container:
        yield container


def _upright(frame: Any) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # anticlockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DcrisError(
            f"videos are read by PyAV, which cannot be imported ({error}); pip install 'dcris[video]'"
        ) from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong is said once, by us
    return av
