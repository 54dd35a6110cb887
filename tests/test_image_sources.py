"""Images in every form that Python code holds them in give the same pixels."""

import copy
import io
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dcris import Prediction, Segmenter
from dcris.data import images
from dcris.data.images import as_pixels, as_rereadable
from dcris.errors import DcrisError
from dcris.utils import http
from image_server import ImageServer

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)


def png(pixels: Any = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_all_forms_give_the_same_pixels(tmp_path: Path) -> None:
    """Files, their bytes, open files, arrays, tensors and addresses."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms: list[Any] = [path, str(path), png(), bytearray(png()), memoryview(png()), io.BytesIO(png())]
    forms += [Image.fromarray(PIXELS), PIXELS, tensor, tensor / 255, (tensor / 255).half(), tensor.double() / 255]
    forms += [np.ma.masked_array(PIXELS, PIXELS > 100)]  # as of rasterio; its arithmetic gave wrong edges
    for form in forms:
        pixels = as_pixels(form)
        assert type(pixels) is np.ndarray
        assert np.array_equal(pixels, PIXELS), form
    with path.open("rb") as file:
        assert np.array_equal(as_pixels(file), PIXELS)
    with ImageServer(content={"/a%20b.png": png()}) as server:
        assert np.array_equal(as_pixels(f"{server.url}/a%20b.png"), PIXELS)


def test_grey_forms(tmp_path: Path) -> None:
    """One channel becomes three equal ones."""
    grey = PIXELS[..., 0]
    wanted = np.repeat(grey[..., None], 3, axis=2)
    for form in (png(grey), grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(as_pixels(form), wanted)


def test_opencvs_order_of_channels(tmp_path: Path) -> None:
    """An array of cv2 is BGR, which nobody can see in the array; files know their order."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    read = cv2.imread(str(path))
    assert np.array_equal(as_pixels(read, "bgr"), PIXELS)
    assert np.array_equal(as_pixels(torch.from_numpy(read).permute(2, 0, 1), "bgr"), PIXELS)
    with_alpha = np.dstack((read, np.full(read.shape[:2], 255, np.uint8)))
    assert np.array_equal(as_pixels(with_alpha, "bgr"), PIXELS)
    assert np.array_equal(as_pixels(path, "bgr"), PIXELS)
    with pytest.raises(DcrisError, match=r"channels must be one of rgb, bgr, not 'hsv'"):
        as_pixels(read, "hsv")  # type: ignore[arg-type]


def closed() -> io.BytesIO:
    file = io.BytesIO(png())
    file.close()
    return file


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (torch.zeros(9, 14, 3), r"\[3, H, W\] or \[1, H, W\], and is \[9, 14, 3\]"),
        (torch.zeros(1, 3, 9, 14), r"and is \[1, 3, 9, 14\]"),
        (torch.full((3, 9, 14), 2.0), "0..1, and has 2 to 2; do not normalise"),
        (torch.full((3, 9, 14), torch.nan), "0..1"),
        (torch.zeros(3, 9, 14, dtype=torch.int64), r"uint8 or floating point, and is torch\.int64"),
        (torch.zeros(3, 9, 14, device="meta"), "dense and have values"),
        (torch.zeros(3, 9, 14).to_sparse(), r"dense and have values, and is torch\.sparse_coo"),
        (torch.full((3, 9, 14), 2.0).to(torch.float8_e4m3fn), "0..1, and has 2 to 2"),
        (PIXELS.astype(np.float32), "uint8"),
        (b"", "empty"),
        (b"no image", "not an image"),
        (io.StringIO("text"), "mode 'rb'"),
        (closed(), "closed"),
        ([PIXELS], "several images as a list"),
        (None, "NoneType"),
        ("http://127.0.0.1:1/a.png", "cannot download http://127.0.0.1:1/a.png"),
        ("http://", "cannot download"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_anything_else_is_one_sentence(form: Any, complaint: str) -> None:
    """What was given, and what may be given."""
    with pytest.raises(DcrisError, match=complaint) as caught:
        as_pixels(form)
    assert "\n" not in str(caught.value)


def test_a_download_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may send without end; an error page is no image."""
    monkeypatch.setattr(images, "_MAX_FILE", 1000)
    with ImageServer(content={"/large.png": bytes(2000), "/page.png": b"<html>"}) as server:
        with pytest.raises(DcrisError, match="more than 1,000 bytes"):
            as_pixels(f"{server.url}/large.png")
        with pytest.raises(DcrisError, match=r"missing\.png \(HTTP 404"):
            as_pixels(f"{server.url}/missing.png")
        with pytest.raises(DcrisError, match="not an image"):
            as_pixels(f"{server.url}/page.png")
    with pytest.raises(DcrisError, match="more than 1,000 bytes"):
        as_pixels(io.BytesIO(bytes(2000)))


def test_a_server_that_redirects_in_circles_is_one_sentence() -> None:
    """Python's description has several lines."""
    with ImageServer(faults={"/a.png": [(302, {"Location": "/a.png"})] * 30}) as server:
        with pytest.raises(DcrisError, match=r"a\.png \(HTTP 302 .*; check the address") as caught:
            as_pixels(f"{server.url}/a.png")
        assert "\n" not in str(caught.value)


def test_a_server_that_sends_byte_by_byte_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, but the image would not be there before tomorrow."""
    monkeypatch.setattr(http, "_MOST_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    connection.sendall(b"a")
                    time.sleep(0.02)

        threading.Thread(target=serve, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(DcrisError, match=r"takes more than 0\.3 s"):
            as_pixels(f"http://127.0.0.1:{server.getsockname()[1]}/a.png")
        assert time.monotonic() - begin < 10


def test_what_can_be_read_once_is_kept() -> None:
    """An image is read several times for one prediction: first for the network, then for refined
    edges.
    """
    kept = as_rereadable(io.BytesIO(png()))
    assert np.array_equal(as_pixels(kept), PIXELS)
    assert np.array_equal(as_pixels(kept), PIXELS)


# ---- through a segmenter -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu")


def same(ours: list[Prediction], theirs: list[Prediction]) -> bool:
    return all(
        one.score == other.score and np.array_equal(one.mask, other.mask)
        for one, other in zip(ours, theirs, strict=True)
    )


def test_a_segmenter_reads_each_form_once(segmenter: Segmenter) -> None:
    """A second read of an open file gives nothing, and a second download costs time."""
    expected = segmenter.predict(PIXELS, ["red star"], refine="guided")
    assert same(segmenter(PIXELS, ["red star"], refine="guided"), expected)
    assert same(segmenter.predict(io.BytesIO(png()), ["red star"], refine="guided"), expected)
    assert same(segmenter.predict(PIXELS[..., ::-1], ["red star"], refine="guided", channels="bgr"), expected)
    with ImageServer(content={"/a.png": png()}) as server:
        assert same(segmenter.predict(f"{server.url}/a.png", ["red star"], refine="guided"), expected)
        assert server.asked_for() == ["a.png"]
        encoded = segmenter.encode_image(f"{server.url}/a.png")
    assert same(segmenter.segment(encoded, ["red star"], refine="guided"), expected)


def test_a_stream_predicts_when_it_is_asked(segmenter: Segmenter, tmp_path: Path) -> None:
    """A generator of a million images is not read ahead; a folder and a pattern give theirs."""
    drawn: list[int] = []

    def generate() -> Iterator[Any]:
        for number in range(3):
            drawn.append(number)
            yield np.roll(PIXELS, number, axis=1)

    results = segmenter.stream(generate(), "red star")
    assert drawn == []
    image, found = next(results)
    assert drawn == [0] and np.array_equal(image, PIXELS)
    assert same(found, segmenter.predict(PIXELS, "red star"))
    assert len(list(results)) == 2
    for name in ("b.png", "a.png", "c.jpg"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    assert [image for image, _ in segmenter.stream(tmp_path, "star")] == [
        tmp_path / name for name in ("a.png", "b.png", "c.jpg")
    ]
    assert [image for image, _ in segmenter.stream(str(tmp_path / "*.png"), "star")] == [
        tmp_path / "a.png",
        tmp_path / "b.png",
    ]


def test_a_stream_can_leave_out_what_it_cannot_read(segmenter: Segmenter, tmp_path: Path) -> None:
    """One broken file of thousands; by default it stops, so that it is seen."""
    (tmp_path / "broken.png").write_bytes(png()[:50])
    some = [PIXELS, tmp_path / "broken.png", PIXELS]
    with pytest.raises(DcrisError, match=r"broken\.png"):
        list(segmenter.stream(some, "star"))
    with pytest.warns(UserWarning, match=r"left out: .*broken\.png"):
        assert len(list(segmenter.stream(some, "star", on_error="skip"))) == 2
    for wrong, complaint in ((PIXELS, "for one, use predict"), (7, "int"), (tmp_path / "none", "none")):
        with pytest.raises(DcrisError, match=complaint):
            segmenter.stream(wrong, "star")  # type: ignore[arg-type]
    (tmp_path / "clip.mp4").touch()
    for place in (tmp_path / "clip.mp4", tmp_path / "*.mp4"):
        with pytest.raises(DcrisError, match=r"mp4 holds only videos; give the frames"):
            segmenter.stream(place, "star")
    # One image can be gone through, too: a file as its lines, a tensor as its channels.
    for one in (io.BytesIO(png()), bytearray(png()), memoryview(png()), torch.zeros(3, 20, 20)):
        for several in (segmenter.stream, segmenter.predict_frames):
            with pytest.raises(DcrisError, match=f"several images, not .*{type(one).__name__}; for one"):
                several(one, "star")  # type: ignore[arg-type]
    assert len([*segmenter.stream(torch.zeros(2, 3, 20, 20), "star")]) == 2
    with pytest.raises(DcrisError, match="on_error must be raise or skip"):
        segmenter.stream(some, "star", on_error="ignore")  # type: ignore[arg-type]
    # A wrong option is no unreadable image: all would be left out.
    for option in ({"threshold": 2}, {"adapters": "none"}, {"memory": "x"}, {"channels": "grb"}):
        with pytest.raises(DcrisError):
            segmenter.stream(some, "star", on_error="skip", **option)


def test_other_processes_get_a_segmenter_by_pickle(segmenter: Segmenter, trained_run: Path) -> None:
    """As multiprocessing sends it; also with several sets of adapters, and a copy."""
    several = Segmenter.from_pretrained({"a": trained_run, "b": trained_run}, device="cpu", precision="float32")
    for each in (segmenter, several):
        for other in (pickle.loads(pickle.dumps(each)), copy.deepcopy(each)):
            assert (other.adapters, other.dtype, other.device) == (each.adapters, each.dtype, each.device)
            for name in each.adapters:
                options: dict[str, Any] = {"adapters": name}
                assert same(other.predict(PIXELS, "star", **options), each.predict(PIXELS, "star", **options))


def test_a_segmenter_is_moved_itself(trained_run: Path) -> None:
    """As a torch module; no GPU is needed to see that predictions stay."""
    segmenter = Segmenter.from_pretrained(trained_run, device="cpu")
    expected = segmenter.predict(PIXELS, "star")
    assert segmenter.to("cpu") is segmenter
    assert same(segmenter.predict(PIXELS, "star"), expected)
    with pytest.raises(DcrisError, match="device"):
        segmenter.to("tpu")
    assert same(segmenter.predict(PIXELS, "star"), expected)


@pytest.mark.parametrize("precision", ["half", 16, "float64"])
def test_a_wrong_precision_is_named(trained_run: Path, precision: Any) -> None:
    """Not an attribute error of torch."""
    with pytest.raises(DcrisError, match="precision"):
        Segmenter.from_pretrained(trained_run, device="cpu", precision=precision)
