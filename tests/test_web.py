"""Parts of the web page and its API: limits, order, and the same results as the Python API."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dcris
from dcris import Segmenter
from dcris.checkpoints.backbones import load_towers
from dcris.cli import main
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.errors import DcrisError
from dcris.inference.inputs import result_stem
from dcris.inference.web.service import BusyError, InferenceService, Limits, Session, Sessions, coco_results, masks_zip
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from marks import slow_except
from servers import event, file, listen, picture, post, resident, send, serving, upload

PHRASES = ["red circle", "the small striped ring", "leftmost"]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu", precision="float32")


def test_limits_of_a_request(segmenter: Segmenter) -> None:
    """Each limit has its own message."""
    service = InferenceService(segmenter, Limits(pixels=10_000, phrases=3, characters=10, masks=20_000))
    assert service.read_image(picture(60, 40)).shape == (40, 60, 3)
    for data, message in (
        (b"GIF89a but no more", "cannot read the image"),
        (b"", "empty"),
        (b"<svg></svg>" * 5, "not an image"),
        (picture(101, 100, "JPEG"), "101 x 100 pixels; the limits are 10,000 pixels"),
    ):
        with pytest.raises(DcrisError, match=message):
            service.read_image(data)
    assert service.parse_phrases([" left ", "", "right"]) == ["left", "right"]
    for lines, message in (
        (["", "  "], "there is no phrase"),
        (["a"] * 4, "at most 3 are allowed"),
        (["a" * 11], "11 characters"),
        (["\u200b\xad"[:0] + "&nbsp;"], "is empty"),
    ):
        with pytest.raises(DcrisError, match=message):
            service.parse_phrases(lines)
    with pytest.raises(DcrisError, match="at most 2 phrases"):
        asyncio.run(service.predict(np.zeros((100, 100, 3), np.uint8), ["a", "b", "c"], None))


def test_requests_are_answered_in_order_and_limited(segmenter: Segmenter) -> None:
    """Requests run one at a time, in order; too many are refused."""
    order: list[str] = []
    running = 0

    def predict(pixels: Any, phrases: list[str], **_: Any) -> list[Any]:
        nonlocal running
        running += 1
        assert running == 1
        time.sleep(0.01)
        running -= 1
        order.extend(phrases)
        return []

    service = InferenceService(SimpleNamespace(predict=predict), Limits(waiting=5))  # type: ignore[arg-type]
    pixels = np.zeros((4, 4, 3), np.uint8)

    async def crowd() -> list[Any]:
        return await asyncio.gather(
            *(service.predict(pixels, [str(number)], None) for number in range(7)), return_exceptions=True
        )

    answers = asyncio.run(crowd())
    assert order == ["0", "1", "2", "3", "4"]
    assert [isinstance(answer, BusyError) for answer in answers] == [False] * 5 + [True] * 2
    assert service.waiting == 0


def test_masks_that_wait_for_encoding_are_bounded() -> None:
    """The model is faster than the encoding of its masks, which would pile up; probabilities, which
    no answer has, take four times their memory."""
    alive = most = 0

    def predict(pixels: Any, phrases: list[str], *, scores: bool = False, **_: Any) -> list[Any]:
        nonlocal alive, most
        assert not scores
        alive += 1
        most = max(most, alive)
        return phrases

    def encode(found: list[Any]) -> Any:
        nonlocal alive
        time.sleep(0.05)
        alive -= 1
        return found[0]

    service = InferenceService(SimpleNamespace(predict=predict), Limits(waiting=8))  # type: ignore[arg-type]
    pixels = np.zeros((4, 4, 3), np.uint8)

    async def crowd() -> list[Any]:
        asked = (service.answer(pixels, [str(number)], encode) for number in range(10))
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(crowd())
    assert answers[:8] == [str(number) for number in range(8)]
    assert all(isinstance(answer, BusyError) for answer in answers[8:])
    assert (most, service.waiting) == (2, 0)


def test_requests_of_disconnected_clients_are_dropped() -> None:
    """Requests of clients that have disconnected must not use the model."""
    asked: list[str] = []
    begun, go_on = Event(), Event()

    def predict(pixels: Any, phrases: list[str], **_: Any) -> list[Any]:
        asked.extend(phrases)
        begun.set()
        go_on.wait(20)
        return []

    service = InferenceService(SimpleNamespace(predict=predict))  # type: ignore[arg-type]
    pixels = np.zeros((4, 4, 3), np.uint8)

    async def crowd() -> None:
        first, second = (asyncio.ensure_future(service.predict(pixels, [phrase], None)) for phrase in "ab")
        await asyncio.to_thread(begun.wait, 20)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await first

    asyncio.run(crowd())
    service._model.shutdown()
    assert (asked, service.waiting) == (["a"], 0)


def test_sessions_expire(segmenter: Segmenter) -> None:
    """Sessions are limited in total size and age."""
    now = 0.0
    sessions = Sessions(Limits(kept_bytes=2_500, kept_seconds=10), clock=lambda: now)
    pixels = np.zeros((20, 20, 3), np.uint8)
    names = [sessions.put(Session(pixels, "a.png")) for _ in range(2)]
    sessions.get(names[0])
    third = sessions.put(Session(pixels, "b.png"))
    assert len(sessions) == 2
    with pytest.raises(DcrisError, match="no longer stored"):
        sessions.get(names[1])
    now = 5.0
    sessions.get(third)
    now = 14.0
    sessions.delete_expired()
    assert len(sessions) == 1
    few = Sessions(Limits(kept=2))  # a session of a tiny image takes memory, too
    names = [few.put(Session(None, "a.png", data=b"a")) for _ in range(4)]
    assert len(few) == 2
    assert few.get(names[3]).data == b"a"
    # Decoded, images are up to a thousand times as large as their files.
    names = [sessions.put(Session(None, "a.png", data=b"a")) for _ in range(4)]
    for name in names[:3]:
        assert sessions.pixels(sessions.get(name), lambda data: pixels) is pixels
    assert len(sessions) == 2 and sessions.get(names[2]).data == b""


def test_another_threshold_is_another_prediction(segmenter: Segmenter) -> None:
    """The slider shows the result of Segmenter.predict at that threshold, including the score."""
    service = InferenceService(segmenter)
    pixels = service.read_image(picture())
    session = Session(pixels, "a.png", asyncio.run(service.predict(pixels, PHRASES, None)))
    for threshold in (0.05, 0.2, 0.5):
        expected = segmenter.predict(pixels, PHRASES, threshold=threshold)
        found = session.at_threshold(threshold)
        with zipfile.ZipFile(io.BytesIO(masks_zip(found, "a"))) as archive:
            for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                np.testing.assert_array_equal(ours.mask, theirs.mask)
                assert (ours.score, ours.box, ours.phrase) == (theirs.score, theirs.box, theirs.phrase)
                with archive.open(f"{result_stem('a', number, ours.phrase)}.mask.png") as file:
                    np.testing.assert_array_equal(np.asarray(Image.open(file)) > 0, theirs.mask)


def web(service: InferenceService, **access: Any) -> Any:
    """The page, behind the guard."""
    pytest.importorskip("gradio")
    from dcris.inference.web.app import make_app
    from dcris.inference.web.server import guard

    return guard(make_app(service), service.limits, **access)


@contextmanager
def served(segmenter: Segmenter, folder: Path) -> Iterator[str]:
    """URL of a page whose home folder is `folder`, which is empty at the end."""
    pytest.importorskip("gradio")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "TMPDIR", "GRADIO_TEMP_DIR"):
            patch.setenv(name, str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        service = InferenceService(segmenter, Limits(upload=100_000, fields=1_000))
        with serving(web(service, hosts=["demo.example"]), service.limits) as found:
            yield found
        service.close()
        assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def address(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(segmenter, tmp_path_factory.mktemp("home")) as found:
        yield found


def test_the_api_agrees_with_the_segmenter(address: str, segmenter: Segmenter) -> None:
    """The API returns the masks of the Python API, in the format of `dcris predict`."""
    data = picture()
    for threshold in (None, 0.1):
        query = {} if threshold is None else {"threshold": threshold}
        found = post(address, data, phrase=PHRASES, name="a.png", **query)
        expected = segmenter.predict(read_image(data), PHRASES, threshold=threshold)
        assert [record["phrase"] for record in found] == PHRASES
        for record, answer in zip(found, expected, strict=True):
            np.testing.assert_array_equal(decode_mask(record["segmentation"], answer.mask.shape), answer.mask)
            assert record["score"] == round(answer.score, 6)
            assert record["file_name"] == "a.png"


@pytest.mark.parametrize(
    ("data", "query", "status", "message"),
    [
        (b"no image at all" * 9, {"phrase": "left"}, 400, "not an image"),
        (b"", {"phrase": "left"}, 400, "no image"),
        (picture(), {}, 400, "no phrase"),
        (picture(), {"phrase": ["a"] * 21}, 400, "at most 20"),
        (picture(), {"phrase": "a", "threshold": "much"}, 400, "must be a number"),
        (picture(), {"phrase": "a", "threshold": "1.5"}, 400, "between 0 and 1"),
        (picture(), {"phrase": "a", "adapters": "none"}, 400, "there are no adapters"),
        (b"\xff" * 200_000, {"phrase": "left"}, 413, "larger than 0.1 MB"),
        (b"\xff" * 30_000_000, {"phrase": "left"}, 413, "larger than 0.1 MB"),
    ],
)
def test_errors_of_the_api(address: str, data: bytes, query: Any, status: int, message: str) -> None:
    """Errors have a status and a message."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, data, **query)
    with caught.value as error:
        assert error.code == status
        assert message in json.load(error)["error"]


@pytest.mark.usefixtures("short_streams")
def test_downloads_are_checked(address: str) -> None:
    """A modified link gives an error message, not an internal error."""
    (name,) = upload(address, picture(), "..\\\\up/../a.png")
    assert event(address, "segment_1", file(name), "left", 0.2, None, 0)["data"][0] == ""

    def get(path: str) -> tuple[int, bytes]:
        return send(address, f"GET /download/{path}")

    for wrong in ("2", "nan", "much", ""):
        for query in (f"threshold={wrong}", f"threshold=0.2&min_score={wrong}"):
            status, content = get(f"{name}/coco.json?{query}")
            assert status == 400
            assert re.search("between 0 and 1|from 0 to 1", json.loads(content)["error"])
    assert get(f"{name}/coco.json?threshold=0.2")[0] == 200
    for wrong in (f"{name}/other.zip", "other/masks.zip"):
        assert get(f"{wrong}?threshold=0.2")[0] == 404
    with zipfile.ZipFile(io.BytesIO(get(f"{name}/masks.zip?threshold=0.2")[1])) as archive:
        assert archive.namelist() == ["a.0-left.mask.png"]  # whoever unpacks it gets no file elsewhere


def test_gradio_client(address: str, tmp_path: Path) -> None:
    """Gradio's client gets what POST /api/segment returns, also for several jobs at once."""
    library = pytest.importorskip("gradio_client")
    path = tmp_path / "my photo.png"
    path.write_bytes(picture())
    client = library.Client(address, verbose=False, analytics_enabled=False)
    image = library.handle_file(str(path))
    found = client.predict(image, PHRASES, threshold=0.1, masks=True, api_name="/segment")
    assert found == post(address, picture(), phrase=PHRASES, threshold=0.1, masks="png", name=path.name)
    jobs = [client.submit(image, [phrase], api_name="/segment") for phrase in PHRASES * 3]
    assert [job.result(60)[0]["phrase"] for job in jobs] == PHRASES * 3
    for arguments, message in (
        ((image, []), "there is no phrase"),
        ((image, ["left"] * 21), "at most 20"),
        ((image, ["left"], 1.5), "between 0 and 1"),
        ((image, "left"), "the argument 2 does not fit"),
        ((library.handle_file(f"{address}/favicon.ico"), ["left"]), "paths and addresses are not opened"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name="/segment")
    client.close()


def test_the_page_explains_the_score_of_each_adapter_set(tmp_path: Path) -> None:
    """With `dcris web tiny runs/tiny`, the page said of both that no mask is drawn below 50%, and
    that the score is the probability that the object is there; the second has no presence head."""
    config = get_recipe("dcris_tiny")
    model = ReferringSegmenter(config.model)
    load_towers(model)
    plain = Segmenter(model, config, device="cpu").save_pretrained(tmp_path / "plain")
    both = Segmenter.from_pretrained({"tiny": "tiny", "plain": plain}, device="cpu")
    for segmenter, told in (
        (both, "With the adapters tiny, it is the probability .* With the adapters plain, it is the mean .* above 35%"),
        (Segmenter.from_pretrained(plain, device="cpu"), "is its score. It is the mean probability"),
    ):
        with served(segmenter, tmp_path / "home") as address:
            words = " ".join(send(address, "GET /config")[1].decode().replace("\\n", " ").split())
        assert re.search(told, words)


def test_the_documented_client(address: str, segmenter: Segmenter, tmp_path: Path) -> None:
    """The block of docs/web.md works as written, except for the URL."""
    pytest.importorskip("gradio_client")
    (tmp_path / "photo.jpg").write_bytes(picture(kind="JPEG"))
    section = (Path(__file__).parents[1] / "docs/web.md").read_text(encoding="utf-8").partition("## The API")[2]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    block = block.replace("http://127.0.0.1:7860", address)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    found = segmenter.predict(tmp_path / "photo.jpg", ["left dog", "bicycle"], threshold=0.35)
    lines = [f"{each['phrase']} {each['score']} {each['bbox']}" for each in coco_results(found, "")]
    assert done.stdout.splitlines()[-2:] == lines


def test_gradio_client_with_a_password(segmenter: Segmenter, tmp_path: Path) -> None:
    """The password of the server is given as documented."""
    library = pytest.importorskip("gradio_client")
    service = InferenceService(segmenter)
    (tmp_path / "a.png").write_bytes(picture())
    with serving(web(service, credentials=["ann:1"]), service.limits) as address:
        client = library.Client(address, httpx_kwargs={"auth": ("ann", "1")}, verbose=False, analytics_enabled=False)
        image = library.handle_file(str(tmp_path / "a.png"))
        assert client.predict(image, ["left"], api_name="/segment")[0]["phrase"] == "left"
        client.close()
    service.close()


@pytest.fixture
def short_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of results ends after the last event, without a second of waiting for others."""
    monkeypatch.setattr("dcris.inference.web.events._LINGER", 0.0)


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:9/x", "../x", "x" * 22, "", "a" * 150])
@pytest.mark.parametrize("name", ["segment", "open_image", "segment_1", "change_threshold"])
def test_events_take_uploads_only(address: str, recorded: list[Any], name: str, path: str) -> None:
    """W1 to W4 for events: a client's path or address is text that names no upload."""
    others: dict[str, list[Any]] = {
        "segment": [["left"], 0.5, None, 0, None, False],
        "segment_1": ["left", 0.5, None, 0.5],
    }
    output = event(address, name, file(path), *others.get(name, [0.5, 0.5] if name == "change_threshold" else []))
    text = json.dumps(output)
    assert "paths and addresses are not opened" in text or "no longer stored" in text.lower()
    assert "root:" not in text
    assert recorded == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "malformed"),
        (b"[" * 900, "malformed"),
        (b'{"fn_index": 0, "data": []}', "malformed"),
        (b'{"fn_index": 0, "data": [], "session_hash": "s"}', "so many arguments"),
        (b'{"fn_index": 99, "data": [], "session_hash": "s"}', "no such event"),
        (b'{"fn_index": 8, "data": [], "session_hash": "s"}', "no such event"),
        (b'{"fn_index": -1, "data": [], "session_hash": "s"}', "no such event"),
        (json.dumps({"fn_index": 0, "data": [0] * 101, "session_hash": "s"}).encode(), "malformed"),
        (json.dumps({"fn_index": 0, "data": [0], "session_hash": "s" * 101}).encode(), "malformed"),
    ],
)
def test_events_are_checked(address: str, body: bytes, message: str) -> None:
    status, content = send(address, "POST /gradio_api/queue/join", body)
    assert status == 400
    assert message in json.loads(content)["error"]


@pytest.mark.usefixtures("short_streams")
def test_arguments_of_events_are_checked(address: str) -> None:
    """Values of other types are one sentence, for whoever sends events by hand."""
    for data in ([1, 2, 3, 4, 5], [None] * 5, [[], {}, "x", 5, "y"], [{"path": 5}, "left", 0.5, None, 0.5]):
        assert "does not fit" in event(address, "segment_1", *data)["error"]
    (path,) = upload(address, picture())
    assert "between 0 and 1" in event(address, "segment_1", file(path), "a", 7, None, 0.5)["data"][0]


def test_a_page_that_opens_late_keeps_its_image(address: str) -> None:
    """Gradio sends an event without an image when the page opens; its answer may come after the
    user's image."""
    assert event(address, "open_image", None)["data"][1] == {"__type__": "update"}


@pytest.mark.usefixtures("short_streams")
def test_events_that_nobody_listens_to(segmenter: Segmenter) -> None:
    """Events run when their client listens; those of clients that never do are few, and never
    run."""
    service = InferenceService(segmenter, Limits(connections=5))
    with serving(web(service), service.limits) as address:
        for number in range(30):
            body = json.dumps({"fn_index": 0, "data": [0] * 7, "session_hash": str(number)}).encode()
            assert send(address, "POST /gradio_api/queue/join", body)[0] == 200
        assert service.waiting == 0
        assert [json.loads(line[6:])["msg"] for line in listen(address, "3")] == ["close_stream"]
        assert len(listen(address, "29")) == 3
    service.close()


@pytest.mark.usefixtures("short_streams")
def test_uploads_are_shown_as_images(address: str) -> None:
    """What an upload is shown as is made from its pixels: a file of another kind, which a browser
    would run, is not sent back."""
    for data, name in ((picture(), "a.html"), (picture(kind="JPEG"), "b.svg")):
        (path,) = upload(address, data, name)
        status, content = send(address, f"GET /gradio_api/file={path}")
        assert (status, content[:3]) == (200, b"\xff\xd8\xff")
    (path,) = upload(address, b"<script>alert(1)</script>" * 9, "a.png")
    status, content = send(address, f"GET /gradio_api/file={path}")
    assert status == 400
    assert "not an image" in json.loads(content)["error"]
    assert event(address, "open_image", file(path))["data"][1] is None
    assert upload(address, b"")[0] == 400
    assert upload(address, bytes(100_001))[0] == 413


def test_the_favicon(address: str) -> None:
    status, content = send(address, "GET /favicon.ico")
    assert status == 200
    assert content.startswith(b"<svg")


def test_the_page_uses_no_other_host(address: str) -> None:
    """The page refers to no other host, and forbids the browser to contact one."""
    with urllib.request.urlopen(address, timeout=60) as response:
        text = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'")
        assert policy.endswith("; frame-ancestors 'self'")
    for host in ("googleapis", "gstatic", "cloudflare", "huggingface.co"):
        assert host not in text


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """A port in use is reported before the model is loaded."""
    pytest.importorskip("gradio")
    from dcris.inference.web.server import open_port

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["web", "tiny", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    # By another server, too, that still loads its model.
    with (
        open_port("127.0.0.1", 0, protected=False) as (loading, _),
        pytest.raises(DcrisError, match="cannot listen"),
        open_port("127.0.0.1", loading.getsockname()[1], protected=False),
    ):
        pass
    assert main(["web", "tiny", "--port", "99999999"]) == 2


_DANGEROUS = (
    "open",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "shutil.rmtree",
    "socket.connect",
    "socket.getaddrinfo",
)
_PROGRAM = (sys.prefix, sys.base_prefix, str(Path(dcris.__file__).parent))


class Recorder:
    """Records and blocks what the server's threads do with files and connections while it is
    active."""

    def __init__(self) -> None:
        self.active = False
        self.found: list[tuple[str, str]] = []
        sys.addaudithook(self)  # for as long as the process lives

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in _DANGEROUS or threading.current_thread() is threading.main_thread():
            return
        what = next((str(each) for each in arguments if isinstance(each, str | bytes | tuple)), "")
        if not (event == "open" and what.startswith(_PROGRAM)):  # a module that is imported late
            self.found.append((event, what))
            raise PermissionError(f"the server was led to {event} {what}")


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recorded(recorder: Recorder) -> Iterator[list[tuple[str, str]]]:
    """What the server does with files and connections during the test."""
    recorder.found, recorder.active = [], True
    yield recorder.found
    recorder.active = False


@pytest.mark.parametrize("path", ["/nonexistent", "/etc/passwd", "/dev/zero", "http://127.0.0.1:9/x"])
@pytest.mark.parametrize(
    ("route", "status"),
    [
        *((f"/gradio_api/{name}", 404) for name in ("run/predict", "api/predict", "call/move", "call/v2/move")),
        *((f"/gradio_api/{name}", 404) for name in ("component_server", "process_recording", "stream/x", "cancel")),
        ("/gradio_api/queue/join", 400),
        ("/gradio_api/upload", 400),
        ("//gradio_api/run/predict", 404),
        ("/%67radio_api%2frun/predict", 404),
        ("/run/predict", 404),
        ("/", 404),
        ("/api/segment?phrase=left&name=/etc/passwd", 400),
    ],
)
def test_no_path_of_a_client_is_opened(address: str, recorded: list[Any], route: str, status: int, path: str) -> None:
    """W1 to W4: Gradio's routes delete folders, serve files, read devices and fetch URLs given by
    clients."""
    for question in (
        {"data": [file(path), None], "fn_index": 0, "session_hash": "x"},
        {"data": ["a", "left", 0.5, file(path)], "fn_index": 1, "session_hash": "x"},
        {"session": file(path), "text": path, "adapters": file(path)},
    ):
        found, content = send(address, f"POST {route}", json.dumps(question).encode())
        assert (found, recorded) == (status, [])
        assert b"root:" not in content


@pytest.mark.parametrize(
    "route",
    [
        *(f"/gradio_api/file={name}" for name in ("/etc/passwd", "/dev/zero", "http://127.0.0.1:9/x", "../x")),
        "/gradio_api/file%3D/etc/passwd",
        "//gradio_api/file=/etc/passwd",
        "/gradio_api/file//etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:9/x",
        "/gradio_api/heartbeat/x",
        "/gradio_api/upload_progress?upload_id=x",
        "/assets/../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/routes.py",
        "/assets//etc/passwd",
        "/static/..%5c..%5croutes.py",
        "/static/img",
        "/theme.css/../config",
        "/monitoring/summary",
        "/download/..%2f..%2fetc/passwd?threshold=0.5",
    ],
)
def test_only_the_pages_own_files_are_served(address: str, recorded: list[Any], route: str) -> None:
    """W2, W4: no path of a request opens a file or a connection."""
    assert send(address, f"GET {route}")[0] == 404
    assert recorded == []


def test_the_page_ignores_query_parameters_of_gradio(address: str, recorded: list[Any]) -> None:
    """A "deep link" of Gradio is a file name, and a forwarded host name would appear in every
    page."""
    found, content = send(
        address, "GET /?deep_link=abc&page=x&__theme=dark", headers="X-Forwarded-Host: evil.example\r\n"
    )
    assert (found, recorded) == (200, [])
    assert b"evil.example" not in content


def test_uploads_are_not_written_to_disk(address: str, recorded: list[Any]) -> None:
    """W6, W7: a form on another site could fill the disk."""
    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + picture() + b"\r\n--x--\r\n"
    )
    headers = "Content-Type: multipart/form-data; boundary=x\r\n"
    for route, status in (
        ("/gradio_api/upload", 200),
        ("/api/segment?phrase=a", 400),
    ):
        assert send(address, f"POST {route}", form, headers)[0] == status
        assert send(address, f"POST {route}", form, headers + "Origin: http://evil.example\r\n")[0] == 403
    assert recorded == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: {0}", 200),
        ("Host: LocalHost:1", 200),
        ("Host: localhost.", 200),
        ("Host: [::1]:7860", 200),
        ("Host: demo.example", 200),
        ("Host: evil.example", 403),
        ("Host: 127.0.0.1.evil.example:80", 403),
        ("Host: 10.1.2.3", 403),
        ("Host: localhost@evil.example", 400),
        ("Host: ", 400),
        ("Host: localhost\r\nHost: evil.example", 400),
        ("Host: {0}\r\nOrigin: http://{0}", 200),
        ("Host: localhost\r\nOrigin: https://demo.example", 200),  # a proxy replaced the host's name
        ("Host: {0}\r\nOrigin: http://localhost:1", 403),
        ("Host: {0}\r\nOrigin: http://evil.example", 403),
        ("Host: {0}\r\nOrigin: null", 403),
        ("Host: {0}\r\nOrigin: ", 403),
        ("Host: {0}\r\nTransfer-Encoding: chunked", 400),
    ],
)
def test_hosts_and_origins(address: str, headers: str, status: int) -> None:
    """W7: pages of other sites must not use the server through a form or DNS rebinding."""
    text = headers.format(address.removeprefix("http://"))
    assert send(address, "GET /theme.css", headers=f"{text}\r\n")[0] == status


def test_a_request_must_name_a_host(address: str) -> None:
    """Requests without a host (HTTP/1.0) and targets that are whole URLs are refused."""
    host, port = address.removeprefix("http://").split(":")
    for line in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(line)
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("path", "chunked"),
    slow_except(
        product(["/api/segment?phrase=left", "/gradio_api/queue/join", "/gradio_api/upload"], [False, True]),
        ("/api/segment?phrase=left", True),
        ("/gradio_api/queue/join", False),
        ("/gradio_api/upload", True),
    ),
)
def test_large_bodies_take_no_memory(address: str, path: str, chunked: bool) -> None:
    """W4, W6: a body of 900 MB took gigabytes.

    A client that reads after sending gets the response, too.
    """
    megabytes, piece = (100 if chunked else 900), b"0" * 1_000_000
    largest = before = resident()

    def pieces() -> Iterator[bytes]:
        nonlocal largest
        for _ in range(megabytes):
            largest = max(largest, resident())
            yield piece

    headers = {} if chunked else {"Content-Length": str(megabytes * len(piece))}
    request = urllib.request.Request(address + path, data=pieces(), headers=headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as error:
        assert error.code == 413
    assert largest - before < 50_000_000


@pytest.mark.parametrize(("count", "begun"), [(32, 3), (150, 3), (32, 90_000)])
def test_unfinished_uploads_do_not_block_others(address: str, count: int, begun: int) -> None:
    """W5: 32 unfinished uploads blocked all other clients."""
    host, port = address.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            with suppress(ConnectionError):  # it may have had to make room
                connection.sendall(
                    b"POST /api/segment?phrase=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"
                    + b"0" * begun
                )
        for _ in range(3):
            assert len(post(address, picture(), phrase=["left"])) == 1


def test_a_disconnected_client_is_not_an_error(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It printed a traceback."""
    host, port = address.removeprefix("http://").split(":")
    for text in (
        "POST /api/segment?phrase=a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\nabc",
        "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        "POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nxyz\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /",
    ):
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(text.encode())
    assert len(post(address, picture(), phrase=["left"])) == 1
    assert capfd.readouterr() == ("", "")


class Behind:
    """An application that responds with the body length, with much data, or never, depending on the
    path."""

    def __init__(self) -> None:
        self.left = Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/never":
            try:
                await asyncio.Event().wait()
            finally:
                self.left.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        content = b"0" * 20_000_000 if scope["path"] == "/large" else str(len(body)).encode()
        await send({"type": "http.response.body", "body": content})


LARGE = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def guarded(limits: Limits, app: Any = None, **options: Any) -> Iterator[str]:
    pytest.importorskip("gradio")
    from dcris.inference.web.guard import Guard

    with serving(Guard(app or Behind(), {"/": 1000, "/never": 1000}, limits, **options), limits) as address:
        yield address


def test_time_is_limited(capfd: pytest.CaptureFixture[str]) -> None:
    """Unfinished and unanswered requests must not hold a connection forever."""
    app = Behind()
    with guarded(Limits(head_seconds=0.3, body_seconds=0.3, answer_seconds=0.3, drain_seconds=0.1), app) as address:
        host, port = address.removeprefix("http://").split(":")
        for text, expected in (
            ("GET / HT", b""),
            (
                "GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
                b"HTTP/1.1 200",
            ),  # and the second request's head is late
            ("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nab", b"HTTP/1.1 408"),
            ("POST /never HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nab", b"HTTP/1.1 503"),
        ):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(text.encode())
                answer = b""
                with suppress(ConnectionResetError):
                    while piece := connection.recv(65536):
                        answer += piece
            assert answer[:12] == expected
        assert app.left.wait(5)
    assert capfd.readouterr().err == ""


async def _begins(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await asyncio.Event().wait()


@pytest.mark.parametrize(("app", "answer"), [(None, b"HTTP/1.1 503"), (_begins, b"HTTP/1.1 200")])
def test_requests_that_are_not_answered_when_the_server_stops(
    app: Any, answer: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """After Ctrl-C, each printed a traceback, and its client was told of an internal error."""
    with guarded(Limits(), app) as address:
        host, port = address.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=20)
        connection.sendall(b"POST /never HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nab")
        time.sleep(0.5)
    with connection, connection.makefile("rb") as stream:
        content = stream.read()
    assert content.startswith(answer) and (app or b"the server was stopped" in content)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("header", ["", pytest.param("Connection: close\r\n", marks=pytest.mark.slow)])
def test_slow_readers_get_their_response(header: str) -> None:
    """A slow download may take longer than the time limit of a head; one that is never read
    ends."""
    with guarded(Limits(head_seconds=0.2, answer_seconds=1.5)) as address:
        host, port = address.removeprefix("http://").split(":")
        for pause, whole in ((0.5, True), (2.5, False)):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(f"GET /large HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
                time.sleep(pause)
                size = 0
                with suppress(ConnectionResetError):
                    while piece := connection.recv(1_000_000):
                        size += len(piece)
            assert (size > 20_000_000) == whole


def test_requests_are_cancelled_when_their_client_disconnects() -> None:
    """Requests of disconnected clients are cancelled; otherwise they fill the queue."""
    app = Behind()
    with guarded(Limits(), app) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.2)
        assert app.left.wait(20)


@pytest.mark.parametrize("text", slow_except([b"", b"GET / HT", LARGE], b"GET / HT", LARGE))
@pytest.mark.parametrize("limits", [Limits(client_connections=3), Limits(connections=3)])
def test_connections_make_room_for_new_ones(limits: Limits, text: bytes) -> None:
    """Idle connections do not block new ones, not even of the same client."""
    with guarded(limits) as address, ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        # Another client, where all have one bound: any address of 127.0.0.0/8 is this machine's, on
        # Linux.
        source = ("127.0.0.2", 0) if limits.connections == 3 and sys.platform == "linux" else None
        held = []
        for _ in range(3):
            held.append(stack.enter_context(socket.create_connection((host, int(port)), 20, source)))
            held[-1].sendall(text)
            time.sleep(0.1)
        assert send(address, "GET /")[0] == 200
        with suppress(ConnectionResetError):  # which is what the oldest gets
            while held[0].recv(1_000_000):
                pass
        assert send(address, "GET /")[0] == 200


def test_bodies_make_room_for_each_other() -> None:
    """The total size of unfinished bodies is limited: the oldest of the largest client is
    dropped."""
    with guarded(Limits(uploading=2500)) as address, ExitStack() as stack:
        host, port = address.removeprefix("http://").split(":")
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        connections = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(4)]
        for connection in connections:
            connection.sendall(head + b"0" * 900)
            time.sleep(0.1)
        for number, connection in enumerate(connections):
            connection.sendall(b"0" * 100)
            status = connection.recv(65536).split()[1]
            assert status == (b"503" if number < 2 else b"200")


def test_wrong_passwords(tmp_path: Path) -> None:
    """Every request needs the password, and guessing is limited."""
    with guarded(Limits(attempts=3), credentials=["ann:öl:1", "bob:2"]) as address:

        def login(user: str) -> int:
            return send(
                address, "GET /", headers=f"Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
            )[0]

        assert send(address, "GET /")[0] == 401
        assert (login("ann:öl:1"), login("bob:2"), login("ann:2"), login("bob:2")) == (200, 200, 401, 200)
        for wrong in ("Basic !!!", "Bearer bob:2"):
            assert send(address, "GET /", headers=f"Authorization: {wrong}\r\n")[0] == 401
        assert (login("bob:2"), login("bob:3"), send(address, "GET /")[0]) == (429, 429, 401)


def test_the_health_check_needs_no_password(segmenter: Segmenter) -> None:
    """Docker and Kubernetes have no password. The answer tells nothing, the other checks stay, and
    wrong passwords for other paths are still counted."""
    service = InferenceService(segmenter, Limits(attempts=2))
    with serving(web(service, credentials=["ann:1"]), service.limits) as address:
        wrong = f"Authorization: Basic {base64.b64encode(b'ann:2').decode()}\r\n"
        for headers in ("", wrong, wrong, wrong):
            assert send(address, "GET /health", headers=headers) == (200, b'{"status":"ok"}')
        assert send(address, "HEAD /health") == (200, b"")
        assert send(address, "POST /health", b"0" * 100_000)[0] == 405
        assert send(address, "GET /health?x=/etc/passwd")[0] == 200
        assert send(address, "GET /health", headers="Host: evil.example\r\n")[0] == 403
        for path in ("/", "/health/", "//health", "/health/..", "/Health", "/%2fhealth", "/api/segment"):
            assert send(address, f"GET {path}")[0] == 401, path
        assert [send(address, "GET /", headers=wrong)[0] for _ in range(3)] == [401, 401, 429]
        assert send(address, "GET /health", headers=wrong)[0] == 200
    service.close()


def test_the_health_check_is_answered_while_the_model_works(segmenter: Segmenter) -> None:
    """A supervisor must not restart a server that only has much to do."""
    service, begun, go_on = InferenceService(segmenter, Limits(waiting=1)), Event(), Event()

    def busy() -> None:
        begun.set()
        go_on.wait(60)

    for executor in (service._model, service._images):
        executor.submit(busy)
    begun.wait(60)
    service.waiting = 1
    with serving(web(service), service.limits) as address:
        assert send(address, "GET /health")[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="503"):
            post(address, picture(), phrase="left")
    go_on.set()
    service.close()


def test_clients_of_a_container(segmenter: Segmenter) -> None:
    """A published port is reached as localhost, although the server's address is another one. Only
    the sites that are allowed may show the page in a frame."""
    service = InferenceService(segmenter)
    app = web(service, hosts=["0.0.0.0", "localhost", "127.0.0.1"], frames=["https://huggingface.co"])

    def get(host: str, path: str = "/") -> tuple[int, str]:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def keep(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"server": ("172.17.0.2", 7860), "client": ("172.17.0.1", 5), "scheme": "http", "http_version": "1.1"}
        asyncio.run(app({**scope, "headers": [(b"host", host.encode())], "root_path": ""}, receive, keep))
        headers = dict(sent[0]["headers"])
        return sent[0]["status"], headers[b"content-security-policy"].decode().partition("frame-ancestors ")[2]

    for host in ("localhost:7860", "127.0.0.1:8000", "172.17.0.2:7860", "LOCALHOST"):
        assert get(host) == (200, "'self' https://huggingface.co")
        assert get(host, "/health")[0] == 200
    for host in ("172.17.0.3:7860", "evil.example", "[::1]:7860"):
        assert get(host)[0] == 403
    service.close()


@pytest.mark.parametrize(
    "origin", ["huggingface.co", "https://a.b; script-src *", "https://a.b/c", "*", "ftp://a.b", ""]
)
def test_frames_of_other_sites_are_origins(capsys: pytest.CaptureFixture[str], origin: str) -> None:
    """Other text could change what the page may load."""
    pytest.importorskip("gradio")
    assert main(["web", "tiny", "--port", "0", "--allow-frame", origin]) == 2
    assert "is not the origin of a site" in capsys.readouterr().err


def test_passwords_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users of a machine can see the arguments of programs."""
    from dcris.inference.web.server import AUTH, read_credentials

    path = tmp_path / "users"
    path.write_text("\ufeffann:a:b\r\n\n # carl:3\n bob:2 \n", encoding="utf-8")
    assert read_credentials(None) == []
    assert read_credentials("ann:a:b") == ["ann:a:b"]
    assert read_credentials(str(path)) == ["ann:a:b", "bob:2"]
    monkeypatch.setenv(AUTH, str(path))
    assert read_credentials(None) == ["ann:a:b", "bob:2"]
    path.write_text("ann\n")
    for wrong in ("ann", "ann:", ":b", str(path), str(tmp_path), "x" * 5000):
        with pytest.raises(DcrisError, match="USER:PASSWORD"):
            read_credentials(wrong)
    for mistyped in (r"C:\users.txt", str(tmp_path / "x:y/users.txt"), r"data\x:users.txt"):
        with pytest.raises(DcrisError, match="looks like the path") as caught:
            read_credentials(mistyped)
        assert "users.txt" not in str(caught.value)
    assert read_credentials("ann:/\\") == ["ann:/\\"]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "0"])
def test_other_machines_need_a_password(capsys: pytest.CaptureFixture[str], host: str) -> None:
    """--host alone must not open the server to the network without a password."""
    pytest.importorskip("gradio")
    assert main(["web", "tiny", "--host", host, "--port", "0"]) == 2
    assert "--auth USER:PASSWORD, or give --no-auth" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    """Exit code 130, one line, no traceback, no files left."""
    pytest.importorskip("gradio")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dcris", "web", "tiny", "--port", "0"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.communicate()
        assert post(line.split()[0], picture(), phrase="red circle")[0]["phrase"] == "red circle"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "dcris: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_500_requests_of_10_clients(trained_run: Path) -> None:
    """10 clients at once get the right masks, and memory does not grow after the first 50
    requests."""
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("web_load", Path(__file__).parents[1] / "benchmarks/web_load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.load("tiny", requests=500, clients=10)
    assert found["answered"] == found["right"] == 500
    assert found["growth"] < 0.05
