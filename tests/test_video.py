"""Reading videos, whatever a camera, a converter or an attacker wrote into them."""

import json
import os
import socket
import struct
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcris.cli import main
from dcris.errors import DcrisError
from dcris.inference.video import _DEMUXERS, VIDEO_ENDINGS, frame_count, read_frames, write_overlay

av = pytest.importorskip("av")
WIDTH, HEIGHT = 128, 96


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame that differs in each of the eight orientations."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, number * width // 10 : (number + 1) * width // 10] = (255, 40, 40)
    pixels[: height // 4, : width // 4] = (40, 40, 250)
    return pixels


def make_video(path: Path, codec: str = "libx264", frames: int = 5, **options: Any) -> Path:
    with av.open(str(path), "w", **options) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        output.mux(stream.encode(None))
    return path


def test_frames_are_counted_without_decoding(tmp_path: Path) -> None:
    """A display of progress needs the number; a file that is none has none."""
    assert frame_count(make_video(tmp_path / "a.mp4", frames=7)) == 7
    assert frame_count(make_video(tmp_path / "a.mkv", frames=7)) == 7  # from its duration
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert frame_count(tmp_path / "b.mp4") is None


@pytest.mark.parametrize("tag", [b"inf", b"nan", b"1e400", b"-1:00:00", b"9e307:9e307", b"0:" * 9, b"\xff"])
def test_a_stated_duration_may_be_anything(tag: bytes, tmp_path: Path) -> None:
    """Whoever made the file wrote it; the frames can still be read."""
    path = make_video(tmp_path / "a.mkv", frames=7)
    content = path.read_bytes()
    assert content.count(b"00:00:00.700000000") == 1
    path.write_bytes(content.replace(b"00:00:00.700000000", tag.ljust(18, b"\0")))
    assert frame_count(path) is None
    assert len([*read_frames(path)]) == 7


@pytest.mark.parametrize("start", ["0.6", "10"])
def test_an_intact_video_may_start_later_than_its_file(start: str, tmp_path: Path) -> None:
    """FFmpeg counts the duration that it writes into Matroska from the start of the file."""
    path = make_video(tmp_path / "a.mkv", frames=17, options={"output_ts_offset": start})
    assert [frame.time for frame in read_frames(path)] == pytest.approx([number / 10 for number in range(17)])
    assert frame_count(path) == 17
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DcrisError, match=r"cut short: it ends after .* of 1\.7 s"):
        [*read_frames(path)]


def test_a_damaged_video_has_an_overlay_up_to_the_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It had none, and was named and counted a second time for that."""
    cut, whole = make_video(tmp_path / "cut.mkv", frames=30), make_video(tmp_path / "whole.mkv")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 6 // 10])
    out = tmp_path / "out"
    words = ("predict", "tiny", cut, whole, "-e", "red", "--out", out, "--device", "cpu")
    assert main([str(word) for word in words]) == 2
    assert "dcris: 1 of 2 could not be read" in capsys.readouterr().err
    frames = len([*(out / "cut.frames").glob("*.mask.png")])
    assert 0 < frames < 25
    assert len([*read_frames(out / "cut.overlay.mp4")]) == frames


@pytest.mark.parametrize("every", [7, 10**9, 10**20])
def test_any_step_between_the_frames_of_an_overlay(every: int, tmp_path: Path) -> None:
    """`--every` may be greater than the video is long; encoders store rates in 32 bits."""
    path = make_video(tmp_path / "a.mp4")
    write_overlay(path, tmp_path / "o.mp4", lambda index: [np.ones((HEIGHT, WIDTH), bool)], 0, every)
    assert len([*read_frames(tmp_path / "o.mp4")]) == 1


def make_changing(path: Path, sizes: tuple[tuple[int, int], ...] = ((128, 96), (192, 144))) -> Path:
    """Write a WebM file with three frames of each size, as recordings of video calls have them."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        shown = 0
        for width, height in sizes:
            encoder = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.framerate, encoder.time_base = Fraction(10), Fraction(1, 10)
            packets = []
            for number in range(3):
                frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24").reformat(
                    format="yuv420p"
                )
                frame.pts, frame.time_base, shown = shown, Fraction(1, 10), shown + 1
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream = stream
                output.mux(packet)
    return path


def test_a_video_that_changes_its_size_is_skipped(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One such video stopped the overlays of all others."""
    clips = [make_changing(tmp_path / "a.webm"), make_video(tmp_path / "b.mp4")]
    out = tmp_path / "out"
    words = ["predict", trained_run, *clips, "-e", "red bar", "--out", out, "--format", "mask", "overlay", "coco"]
    assert main([str(word) for word in words]) == 2
    assert "a.webm changes its size or orientation, from 128 x 96 to 192 x 144" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.mp4")] == ["b.overlay.mp4"]
    assert not list(out.glob("a*"))
    assert len(list((out / "b.frames").iterdir())) == 5
    assert {entry["file_name"] for entry in json.loads((out / "predictions.json").read_text())} == {"b.mp4"}


def test_a_failed_overlay_does_not_stop_others(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4")]
    (tmp_path / "out/a.overlay.mp4").mkdir(parents=True)
    words = ["predict", trained_run, *clips, "-e", "red bar", "--out", tmp_path / "out", "--format", "overlay", "coco"]
    assert main([str(word) for word in words]) == 2
    assert "a.overlay.mp4" in capsys.readouterr().err
    assert (tmp_path / "out/b.overlay.mp4").is_file()


MATRICES = {
    "as stored": ((1, 0, 0, 1), lambda pixels: pixels),
    "mirrored": ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
    "upside down, mirrored": ((1, 0, 0, -1), lambda pixels: pixels[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda pixels: pixels[::-1, ::-1]),
    "a quarter clockwise": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
    "a quarter anticlockwise": ((0, -1, 1, 0), np.rot90),
    "rows and columns exchanged": ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
    "the other diagonal": ((0, -1, -1, 0), lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_shown_by_its_display_matrix(name: str, tmp_path: Path) -> None:
    """Front cameras store mirrored frames; "left" means the left side in a player."""
    (a, b, c, d), turned = MATRICES[name]
    plain = make_video(tmp_path / "plain.mp4")
    data = bytearray(plain.read_bytes())
    at = data.find(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    expected, found = (next(read_frames(tmp_path / file)).pixels for file in ("plain.mp4", "turned.mp4"))
    np.testing.assert_array_equal(found, turned(expected))


@pytest.mark.parametrize("start", [0, 7, 1000])
def test_times_are_counted_from_the_start_of_the_stream(start: int, tmp_path: Path) -> None:
    """Timestamps of a recorded broadcast do not start at 0."""
    clip = make_video(tmp_path / "a.ts", format="mpegts", options={"output_ts_offset": str(start)})
    times = [frame.time for frame in read_frames(clip)]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=1e-3)


CODECS = {
    **{"mp4": "libx264", "m4v": "libx264", "mov": "libx264", "3gp": "mpeg4", "mkv": "libx264", "webm": "libvpx"},
    **{"avi": "mpeg4", "ts": "libx264", "mts": "libx264", "m2ts": "libx264", "mpg": "mpeg2video", "vob": "mpeg2video"},
    **{"wmv": "wmv2", "asf": "wmv2", "flv": "flv", "ivf": "libvpx", "h264": "libx264"},
}


@pytest.mark.parametrize("ending", CODECS)
def test_containers_that_are_read(ending: str, tmp_path: Path) -> None:
    """Patterns find videos by these endings; a missing one would be skipped."""
    assert f".{ending}" in VIDEO_ENDINGS
    clip = make_video(tmp_path / f"a.{ending}", CODECS[ending])
    frames = list(read_frames(clip))
    assert len(frames) == 5
    assert np.abs(frames[0].pixels.astype(int) - picture(0)).mean() < 30


def test_ffmpeg_has_every_container() -> None:
    assert set(_DEMUXERS) <= av.formats_available | {"mov", "matroska"}


@pytest.mark.parametrize("name", ["2026-11-28T10:30:00.mp4", "http:a.mp4", "file:b.mp4", "concat:c|d.mp4", "%03d.mp4"])
def test_file_names_are_not_urls(name: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg treats text before a colon as a protocol, but recorders put the time into file
    names."""
    make_video(tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames(Path(name)))) == 5
    words = ["predict", str(trained_run), name, "-e", "red bar", "--out", "a:b", "--format", "overlay"]
    assert main(words) == 0
    assert len(list((tmp_path / "a:b").glob("*.overlay.mp4"))) == 1


@pytest.fixture
def listener():
    """A local port and the connections that were made to it."""
    made: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                made.append(connection)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], made


PLAYLISTS = {
    "HLS": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "ASX": "<asx version='3.0'><entry><ref href='{url}'/></entry></asx>",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ts"])
def test_playlists_are_refused(kind: str, ending: str, tmp_path: Path, listener: Any) -> None:
    """A hostile playlist must not cause requests or open other files."""
    port, made = listener
    other = make_video(tmp_path / "other.ts", format="mpegts")
    for url in (f"http://127.0.0.1:{port}/a.ts", f"tcp://127.0.0.1:{port}", str(other), "other.ts"):
        (tmp_path / f"list.{ending}").write_text(PLAYLISTS[kind].format(url=url))
        with pytest.raises(DcrisError, match="cannot read the video"):
            list(read_frames(tmp_path / f"list.{ending}"))
    assert not made


def test_file_names_like_urls_make_no_request(tmp_path: Path, listener: Any) -> None:
    port, made = listener
    for name in (f"http:127.0.0.1:{port}/y.mp4", f"http://127.0.0.1:{port}/y.mp4", f"tcp:127.0.0.1:{port}"):
        with pytest.raises(DcrisError, match=r"cannot read the video .*No such file"):
            list(read_frames(Path(name)))
    assert not made


def test_pipes_devices_and_folders_are_refused(tmp_path: Path) -> None:
    """A pipe would block forever."""
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    for path in (tmp_path / "a.mp4", Path("/dev/zero"), tmp_path / "b.mp4"):
        with pytest.raises(DcrisError, match=r"cannot read the video .*(regular file|folder)"):
            list(read_frames(path))
