"""The web page's parts and its API: bounded, in order, and the same answers as the Python interface gives."""

import asyncio
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from dcris import Segmenter
from dcris.cli import main
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.errors import DcrisError
from dcris.web.desk import BusyError, Desk, Limits, Visit, Visits, coco_results, masks_zip
from dcris.web.page import make_app

PHRASES = ["red circle", "the small striped ring", "leftmost"]


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu", precision="float32")


def picture(width: int = 110, height: int = 70, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def test_what_may_be_asked(segmenter: Segmenter) -> None:
    """Each bound has its sentence: people must learn what to do, and nobody may fill the memory."""
    desk = Desk(segmenter, Limits(upload=20_000, pixels=10_000, phrases=3, letters=10, answer=20_000))
    assert desk.photograph(picture(60, 40)).shape == (40, 60, 3)
    for data, message in (
        (b"GIF89a but no more", "cannot read the image"),
        (b"", "empty"),
        (b"<svg></svg>" * 5, "not a JPEG"),
        (picture(101, 100, "JPEG"), "101 x 100 pixels, and 1 to 10,000"),
        (picture(90, 90), "larger than 0 MB"),
    ):
        with pytest.raises(DcrisError, match=message):
            desk.photograph(data)
    assert desk.phrases([" left ", "", "right"]) == ["left", "right"]
    for lines, message in (
        (["", "  "], "there is no phrase"),
        (["a"] * 4, "up to 3 are taken"),
        (["a" * 11], "11 letters"),
        (["\u200b\xad"[:0] + "&nbsp;"], "is empty"),
    ):
        with pytest.raises(DcrisError, match=message):
            desk.phrases(lines)
    with pytest.raises(DcrisError, match="up to 2 phrases"):
        asyncio.run(desk.ask(np.zeros((100, 100, 3), np.uint8), ["a", "b", "c"], None))


def test_people_are_served_in_order_and_not_too_many(segmenter: Segmenter) -> None:
    """Else two passes fight for one processor, and a crowd fills the memory with waiting photographs."""
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

    desk = Desk(SimpleNamespace(predict=predict), Limits(waiting=5))  # type: ignore[arg-type]
    pixels = np.zeros((4, 4, 3), np.uint8)

    async def crowd() -> list[Any]:
        return await asyncio.gather(
            *(desk.ask(pixels, [str(number)], None) for number in range(7)), return_exceptions=True
        )

    answers = asyncio.run(crowd())
    assert order == ["0", "1", "2", "3", "4"]
    assert [isinstance(answer, BusyError) for answer in answers] == [False] * 5 + [True] * 2
    assert desk.waiting == 0


def test_visits_are_forgotten(segmenter: Segmenter) -> None:
    """Photographs of strangers must not pile up: neither for long, nor many."""
    now = 0.0
    visits = Visits(Limits(kept_bytes=2_500, kept_seconds=10), clock=lambda: now)
    pixels = np.zeros((20, 20, 3), np.uint8)
    names = [visits.put(Visit(pixels, "a.png")) for _ in range(2)]
    visits.get(names[0])
    third = visits.put(Visit(pixels, "b.png"))
    assert len(visits) == 2
    with pytest.raises(DcrisError, match="no longer kept"):
        visits.get(names[1])
    now = 5.0
    visits.get(third)
    now = 14.0
    visits.forget()
    assert len(visits) == 1
    visits.drop(third)
    visits.drop(None)
    assert len(visits) == 0


def test_another_threshold_is_another_prediction(segmenter: Segmenter) -> None:
    """The slider must show what Segmenter.predict would say at that threshold, confidence and all."""
    desk = Desk(segmenter)
    pixels = desk.photograph(picture())
    visit = Visit(pixels, "a.png", asyncio.run(desk.ask(pixels, PHRASES, None)))
    for threshold in (0.05, 0.2, 0.5):
        expected = segmenter.predict(pixels, PHRASES, threshold=threshold)
        found = visit.at(threshold)
        with zipfile.ZipFile(io.BytesIO(masks_zip(found, "a"))) as archive:
            for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
                np.testing.assert_array_equal(ours.mask, theirs.mask)
                assert (ours.score, ours.box, ours.phrase) == (theirs.score, theirs.box, theirs.phrase)
                with archive.open(f"a.{number}.mask.png") as file:
                    np.testing.assert_array_equal(np.asarray(Image.open(file)) > 0, theirs.mask)


@pytest.fixture(scope="module")
def address(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a thread of this process."""
    pytest.importorskip("gradio")
    import uvicorn

    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        desk = Desk(segmenter, Limits(upload=100_000))
        server = uvicorn.Server(uvicorn.Config(make_app(desk, Visits(desk.limits)), log_level="error"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = Thread(target=server.run, args=([listening],), daemon=True)
            thread.start()
            while not server.started:
                Event().wait(0.05)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.should_exit = True
            thread.join(20)
            desk.close()
        assert not [path for path in folder.rglob("*") if path.is_file()]


def post(address: str, data: bytes, **query: Any) -> Any:
    request = urllib.request.Request(f"{address}/api/segment?{urlencode(query, doseq=True)}", data=data)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_the_api_answers_as_the_segmenter(address: str, segmenter: Segmenter) -> None:
    """Whoever calls the API gets the same masks as from Python, in the form that `dcris predict` writes."""
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


def test_the_documented_requests(address: str, segmenter: Segmenter, tmp_path: Path) -> None:
    """What docs/web.md tells programs to send, word for word but for the address, is answered."""
    (tmp_path / "photo.jpg").write_bytes(picture(kind="JPEG"))
    expected = segmenter.predict(tmp_path / "photo.jpg", ["left circle", "small red star"])
    page = (Path(__file__).parents[1] / "docs/web.md").read_text(encoding="utf-8")
    api = page.partition("## The API")[2].replace("http://127.0.0.1:7860", address)
    (shell, python) = (re.findall(rf"^```{language}\n(.*?)^```$", api, re.M | re.S)[0] for language in ("sh", "python"))

    def printed(*words: str) -> str:
        return subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout

    records = coco_results(expected, "")
    lines = [f"{record['phrase']} {record['score']} {record['bbox']}" for record in records]
    assert printed(sys.executable, "-c", python).splitlines() == lines
    if shutil.which("curl"):
        found = json.loads(printed("bash", "-c", shell))
        assert [record["segmentation"] for record in found] == [record["segmentation"] for record in records]


@pytest.mark.parametrize(
    ("data", "query", "status", "message"),
    [
        (b"no image at all" * 9, {"phrase": "left"}, 400, "not a JPEG"),
        (b"", {"phrase": "left"}, 400, "no photograph"),
        (picture(), {}, 400, "no phrase"),
        (picture(), {"phrase": ["a"] * 21}, 400, "up to 20"),
        (picture(), {"phrase": "a", "threshold": "much"}, 400, "must be a number"),
        (picture(), {"phrase": "a", "threshold": "1.5"}, 400, "between 0 and 1"),
        (picture(), {"phrase": "a", "adapters": "none"}, 400, "there are no adapters"),
        (b"\xff" * 200_000, {"phrase": "left"}, 413, "larger than 0 MB"),
    ],
)
def test_the_api_says_what_is_wrong(address: str, data: bytes, query: Any, status: int, message: str) -> None:
    """A program needs the status, its author the sentence."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, data, **query)
    with caught.value as error:
        assert error.code == status
        assert message in json.load(error)["error"]


def test_uploads_are_counted_and_downloads_checked(segmenter: Segmenter) -> None:
    """Else many slow uploads at once fill the memory, and a changed link ends in a server's error."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    desk = Desk(segmenter, Limits(waiting=2))
    visits = Visits(desk.limits)
    name = visits.put(Visit(np.zeros((4, 4, 3), np.uint8), "a.png"))
    client = TestClient(make_app(desk, visits))
    with desk.receiving(), desk.receiving():
        busy = client.post("/api/segment?phrase=left", content=picture())
    assert (busy.status_code, desk.reading) == (503, 0)
    assert client.post("/api/segment?phrase=left", content=picture()).status_code == 200
    visits.get(name).answers = segmenter.predict(read_image(picture()), ["left"], scores=True)
    for threshold in ("2", "nan"):
        answer = client.get(f"/download/{name}/coco.json?threshold={threshold}")
        assert answer.status_code == 400
        assert "between 0 and 1" in answer.json()["error"]
    assert client.get(f"/download/{name}/coco.json?threshold=0.2").status_code == 200


def test_nothing_from_elsewhere(address: str) -> None:
    """The page names no other host, and forbids the browser to ask one."""
    with urllib.request.urlopen(address, timeout=60) as response:
        text = response.read().decode()
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    for host in ("googleapis", "gstatic", "cloudflare", "huggingface.co"):
        assert host not in text


def test_a_port_that_is_taken(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most common mistake of all, and it must be told before the model is loaded."""
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["web", str(trained_run), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["web", str(trained_run), "--port", "99999999"]) == 2


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(trained_run: Path, tmp_path: Path) -> None:
    """130, one line, no traceback, and nothing left of its folder for uploads."""
    pytest.importorskip("gradio")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dcris", "web", str(trained_run), "--port", "0"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.communicate()
        assert post(line.split()[0], picture(), phrase="red circle")[0]["phrase"] == "red circle"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "dcris: interrupted\n")
    assert not list(tmp_path.glob("dcris-web-*"))


@pytest.mark.slow
def test_a_crowd_of_200_requests(trained_run: Path) -> None:
    """8 clients at once: everybody is answered, with the right masks, and the memory stays where it was after the first 50."""
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("web_load", Path(__file__).parents[1] / "benchmarks/web_load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.load(str(trained_run), requests=200, clients=8)
    assert found["answered"] == found["right"] == 200
    assert found["growth"] < 0.05
