"""The API of `dcris serve` and `dcris web`: the same answers as Python's, and hostile requests."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcris import Segmenter
from dcris.cli.web import _loader
from dcris.data.images import read_image
from dcris.data.masks import decode_mask
from dcris.errors import DcrisError
from dcris.inference.web.api import read_form
from dcris.inference.web.service import InferenceService, Limits, coco_results
from launcher import Launcher
from servers import picture, post, resident, send, serving

PHRASES = ["red circle", "the small striped ring", "leftmost"]
BOUNDARY = "----dcris7MA4YWxk"


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu", precision="float32")


@pytest.fixture(scope="module", params=["serve", "web"])
def address(request: Any, segmenter: Segmenter) -> Iterator[str]:
    """Each of the two servers that have the API."""
    pytest.importorskip("gradio" if request.param == "web" else "uvicorn")
    from dcris.inference.web.server import guard

    service = InferenceService(segmenter, Limits(upload=2_000_000, fields=20_000, pixels=1_000_000, waiting=4))
    if request.param == "web":
        from dcris.inference.web.app import make_app as make
    else:
        from dcris.inference.web.api import make_api as make
    application = make(service)
    with serving(guard(application, service.limits), service.limits) as found:
        yield found
    application.close()


def form(*parts: tuple[str, bytes | str], boundary: str = BOUNDARY) -> bytes:
    """A body of multipart/form-data; a part's name may have further parameters."""
    body = b""
    for name, content in parts:
        data = content if isinstance(content, bytes) else content.encode()
        body += f"--{boundary}\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def post_form(address: str, body: bytes, query: str = "", kind: str = "") -> tuple[int, Any]:
    kind = kind or f"multipart/form-data; boundary={BOUNDARY}"
    status, content = send(address, f"POST /api/segment{query}", body, f"Content-Type: {kind}\r\n")
    return status, json.loads(content)


def refused(address: str, data: bytes, **query: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, data, **query)
    with caught.value as error:
        return error.code, json.load(error)["error"]


def test_a_form_and_a_raw_body_give_the_same(address: str, segmenter: Segmenter) -> None:
    """curl -F and curl --data-binary get what Python gets, with the parameters in the form, in the
    URL, or in both."""
    data = picture()
    expected = segmenter.predict(read_image(data), PHRASES, threshold=0.1)
    raw = post(address, data, phrase=PHRASES, threshold=0.1, name="a.png")
    for record, answer in zip(raw, expected, strict=True):
        np.testing.assert_array_equal(decode_mask(record["segmentation"], answer.mask.shape), answer.mask)
        assert (record["phrase"], record["score"]) == (answer.phrase, round(answer.score, 6))
    image = ('"image"; filename="a.png"', data)
    phrases = [('"phrase"', phrase) for phrase in PHRASES]
    for body, query in (
        (form(image, *phrases, ('"threshold"', "0.1")), ""),
        (form(*phrases, image), "?threshold=0.1"),
        (form(image), "?" + urlencode({"phrase": PHRASES, "threshold": 0.1}, doseq=True)),
        (form(('"image"; filename="other"', data), *phrases, ('"threshold"', "0.1"), ('"name"', "a.png")), ""),
    ):
        assert post_form(address, body, query) == (200, raw)


def test_a_fault_of_the_server_is_json_too(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was a plain "Internal Server Error", which clients that read JSON cannot parse."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(InferenceService, "parse_phrases", fail)
    status, content = send(address, "POST /api/segment?phrase=a", picture())
    assert (status, [*json.loads(content)]) == (500, ["error"])
    assert b"secret" not in content and b"Traceback" not in content
    monkeypatch.undo()
    assert post(address, picture(), phrase="red circle"), "the server goes on"
    assert "ZeroDivisionError: a secret" in caplog.text


def test_the_documented_requests(address: str, segmenter: Segmenter, tmp_path: Path) -> None:
    """The requests in docs/serve.md work as written, except for the URL."""
    (tmp_path / "photo.jpg").write_bytes(picture(kind="JPEG"))
    page = (Path(__file__).parents[1] / "docs/serve.md").read_text(encoding="utf-8")
    section = page.partition("## Requests")[2].replace("http://127.0.0.1:7860", address)
    shell, python = (
        re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)[0] for language in ("sh", "python")
    )

    def printed(*words: str) -> str:
        return subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout

    records = coco_results(segmenter.predict(tmp_path / "photo.jpg", ["left dog", "bicycle"]), "")
    lines = [f"{record['phrase']} {record['score']} {record['bbox']}" for record in records]
    assert printed(sys.executable, "-c", python).splitlines() == lines
    if shutil.which("curl"):
        for command in shell.strip().splitlines():
            found = json.loads(printed("bash", "-c", command))
            assert [record["segmentation"] for record in found] == [record["segmentation"] for record in records]


def test_masks_on_request(address: str, segmenter: Segmenter) -> None:
    """A client without a reader of run lengths gets PNG files of the image's size."""
    data = picture()
    records = post(address, data, phrase=PHRASES, threshold=0.1, masks="png")
    for record, answer in zip(records, segmenter.predict(read_image(data), PHRASES, threshold=0.1), strict=True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(record["mask_png"]))))
        np.testing.assert_array_equal(mask, answer.mask * np.uint8(255))
    assert "mask_png" not in post(address, data, phrase="left")[0]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"treshold": 0.1}, "no parameter 'treshold'; the parameters are phrase, threshold,"),
        ({"url": "http://127.0.0.1:9/a.png"}, "no parameter 'url'"),
        ({"photo": "/etc/passwd"}, "no parameter 'photo'"),
        ({"threshold": ["0.1", "0.2"]}, "'threshold' is given more than once"),
        ({"threshold": ["0.1", "0.1"]}, "'threshold' is given more than once"),
        ({"masks": "jpeg"}, "'masks' must be png"),
        ({"threshold": "nan"}, "between 0 and 1"),
        ({"min_score": "high"}, "'min_score' must be a number"),
        ({"min_area": "1.5"}, "'min_area' must be a whole number"),
        ({"min_area": "-1"}, "from 0 to"),
        ({"min_area": "9" * 4000}, "'min_area' is too large: '9999999999"),
        ({"min_area": "-" + "9" * 5000}, "too many digits"),
        ({"min_area": "1." + "9" * 30}, "must be a whole number"),
        ({"adapters": "../tiny"}, "there are no adapters"),
    ],
)
def test_parameters_are_checked_by_name(address: str, query: Any, message: str) -> None:
    """A mistyped parameter must not be ignored, or the answer is one to another question."""
    status, found = refused(address, picture(), phrase="left", **query)
    assert status == 400
    assert message in found
    assert len(found) < 400
    body = form(
        ('"image"; filename="a"', picture()),
        ('"phrase"', "left"),
        *((f'"{name}"', text) for name, text in _pairs(query)),
    )
    assert post_form(address, body) == (400, {"error": found})


def test_a_phrase_in_another_encoding_is_refused(address: str) -> None:
    """It would be answered for a phrase with a replacement character."""
    status, content = send(address, "POST /api/segment?phrase=Fu%DFg%E4nger", picture())
    assert (status, json.loads(content)["error"]) == (
        400,
        "the phrase 'Fu\ufffdg\ufffdnger' was not sent as UTF-8; send it in UTF-8",
    )
    body = form(('"image"; filename="a"', picture()), ('"phrase"', "Fussg")).replace(b"Fussg", "Fußg".encode("latin-1"))
    assert post_form(address, body)[0] == 400
    assert send(address, "POST /api/segment?phrase=Fu%C3%9Fg%C3%A4nger", picture())[0] == 200


def _pairs(query: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, str(v)) for k, values in query.items() for v in (values if isinstance(values, list) else [values])]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/api/segment?phrase=a", 405, "/api/segment takes POST, not GET"),
        ("PUT", "/api/segment?phrase=a", 405, "takes POST"),
        ("POST", "/health", 405, "takes GET or HEAD"),
        ("GET", "/nowhere", 404, "there is /api/segment"),
        ("POST", "/api/segment/", 404, "there is /api/segment"),
        ("POST", "/api/../api/segment", 404, "there is /api/segment"),
    ],
)
def test_other_requests_say_what_there_is(address: str, method: str, path: str, status: int, message: str) -> None:
    found, content = send(address, f"{method} {path}")
    assert found == status
    assert message in json.loads(content)["error"]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (picture(), "multipart/form-data", "is not a form"),
        (picture(), f"multipart/form-data; boundary={BOUNDARY}", "is not a form"),
        (b"", f"multipart/form-data; boundary={BOUNDARY}", "the form is cut off"),
        (form(('"phrase"', "left"))[:-9], f"multipart/form-data; boundary={BOUNDARY}", "the form is cut off"),
        (form(('"phrase"', "left"), boundary="x" * 300), f"multipart/form-data; boundary={'x' * 300}", "is not a form"),
        (b"--a\r\n" + b"x" * 10_000, "multipart/form-data; boundary=a", "is not a form"),
        (form(('"phrase"', "left")), f"Multipart/Form-Data;boundary={BOUNDARY}", "there is no image"),
        (form(('"image"', picture())), "", "the part 'image' is text and not a file"),
        (form(('"image"; filename="a"', b"")), "", "there is no image"),
        (form(('"image"; filename="a"', b"GIF89a")), "", "cannot read the image"),
        (form(('"file"; filename="a"', picture())), "", "in the part 'file'; send one file, in the part 'image'"),
        (
            form(*[('"image"; filename="a"', picture())] * 2),
            "",
            "several files in the part 'image'; send one image a request",
        ),
        (form(*[('"phrase"', "left")] * 65), "", "more than 64 parts"),
        (form(*[('"phrase"', "")] * 5000), "", "more than 64 parts"),
        (form(*[('"image"; filename="a"', b"")] * 5000), "", "send one image a request"),
        (form(('"phrase"\r\n' + "X-A: b\r\n" * 500, "")), "", "is not a form"),
        (form(('"phrase"' + " " * 9_000, "")), "", "is not a form"),
        (b"--" + BOUNDARY.encode() + b"\r\n\r\nleft\r\n--" + BOUNDARY.encode() + b"--\r\n", "", "is not a form"),
    ],
)
def test_forms_that_are_wrong(
    address: str, body: bytes, kind: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Content types that lie, and forms of too many parts, are one sentence. The operator's
    terminal shows nothing of a client's text."""
    status, found = post_form(address, body, "?phrase=left", kind)
    assert not [record for record in caplog.records if record.name.startswith("python_multipart")]
    assert (status, list(found)) == (400, ["error"])
    assert message in found["error"]


@pytest.mark.parametrize(
    "kind", ["", "image/png", "application/json", "text/html", "application/x-www-form-urlencoded"]
)
def test_the_content_decides_and_not_its_type(address: str, kind: str) -> None:
    """The type of a raw body is whatever a client sends: curl names a form of another kind."""
    headers = f"Content-Type: {kind}\r\n" if kind else ""
    status, content = send(address, "POST /api/segment?phrase=left", picture(), headers)
    assert (status, json.loads(content)[0]["phrase"]) == (200, "left")
    assert send(address, "POST /api/segment?phrase=left", b'{"image": "/etc/passwd"}', headers)[0] == 400


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The files that threads of the server open."""
    paths: list[str] = []

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and threading.current_thread() is not main:
            paths.append(arguments[0])

    main = threading.current_thread()
    sys.addaudithook(record)  # for as long as the process lives
    return paths


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..\\\\..\\\\passwd", "/dev/zero", "C:\\\\boot.ini", "a\0b.png", "", ".", "ü.png", "x" * 3000],
)
def test_file_names_are_text_only(address: str, opened: list[str], name: str) -> None:
    """A name of a part or of the parameter `name` comes back as text, and opens nothing."""
    body = form((f'"image"; filename="{name}"', picture()), ('"phrase"', "left"))
    opened.clear()
    status, found = post_form(address, body)
    assert status == 200
    assert "/" not in found[0]["file_name"]
    assert "\\" not in found[0]["file_name"]
    # The free memory is read, and modules on first use.
    assert [path for path in opened if not path.startswith((sys.prefix, sys.base_prefix, "/proc/mem", "/sys/"))] == []


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few kilobytes with very many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(width + 1)) for _ in range(min(height, 2000))) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("size", [(60_000, 60_000), (1_000_001, 1), (1, 2_000_000_000), (0, 0)])
def test_pixel_bombs(address: str, size: tuple[int, int]) -> None:
    """A small file with billions of pixels is refused by its header."""
    data = bomb(*size)
    before = resident()
    for status, found in (
        refused(address, data, phrase="left"),
        post_form(address, form(('"image"; filename="a.png"', data), ('"phrase"', "left"))),
    ):
        assert status == 400
        assert "pixels" in str(found) or "cannot read" in str(found)
    assert resident() - before < 50_000_000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_huge_form_takes_no_memory(address: str) -> None:
    """A form of 300 MB is refused by its length; a file above the limit by its part."""
    before = largest = resident()

    def pieces() -> Iterator[bytes]:
        nonlocal largest
        yield form(('"image"; filename="a.png"', b"0"))[:-25]
        for _ in range(300):
            largest = max(largest, resident())
            yield b"0" * 1_000_000

    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    request = urllib.request.Request(f"{address}/api/segment?phrase=a", data=pieces(), headers=kind)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as error:
        assert (error.code, json.load(error)["error"]) == (413, "the request is larger than 2 MB; send a smaller file")
    assert largest - before < 50_000_000
    body = form(('"image"; filename="a.png"', bytes(2_000_001)), ('"phrase"', "left"))
    assert post_form(address, body) == (413, {"error": "the image file is larger than 2 MB; send a smaller file"})


@pytest.mark.parametrize("filler", [b"\r", b"\r\n--", b"\r\n--" + BOUNDARY[:-1].encode(), b"--" + BOUNDARY.encode()])
def test_forms_that_look_like_boundaries(address: str, filler: bytes) -> None:
    """Reading a form must not take longer than its length suggests, nor stop other requests."""
    body = form(('"image"; filename="a.png"', filler * (1_900_000 // len(filler))), ('"phrase"', "left"))
    start = time.monotonic()
    assert post_form(address, body)[0] == 400
    assert time.monotonic() - start < 20


def test_slow_bodies_do_not_hold_others_up(address: str) -> None:
    """Clients that send a byte now and then keep only their own connection."""
    host, port = address.removeprefix("http://").split(":")
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    head = f"POST /api/segment HTTP/1.1\r\nHost: {host}\r\n{kind}\r\nContent-Length: 900\r\n\r\n"
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for connection in slow:
        connection.sendall(head.encode() + b"--" + BOUNDARY.encode())
    assert post(address, picture(), phrase="left")[0]["phrase"] == "left"
    for connection in slow:
        with suppress(ConnectionError):
            connection.sendall(b"\r\n")
    assert send(address, "GET /health")[0] == 200
    for connection in slow:
        connection.close()


def test_a_flood_is_refused_and_then_over(address: str) -> None:
    """Of many requests at once some are answered, the others are told to come again, and none is
    lost."""
    answers: list[int] = []
    large = picture(700, 700)

    def one() -> None:
        answers.append(send(address, "POST /api/segment?phrase=left", large)[0])

    crowd = [threading.Thread(target=one) for _ in range(30)]
    for each in crowd:
        each.start()
    assert send(address, "GET /health")[0] == 200
    for each in crowd:
        each.join(120)
    assert set(answers) <= {200, 503}
    assert len(answers) == 30
    assert answers.count(200) >= 4
    assert post(address, picture(), phrase="left")[0]["phrase"] == "left"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: evil.example\r\n", 403),
        ("Origin: http://evil.example\r\n", 403),
        ("Origin: null\r\n", 403),
        ("Host: localhost\r\nOrigin: http://localhost\r\n", 200),
    ],
)
def test_pages_of_other_sites_cannot_use_it(address: str, headers: str, status: int) -> None:
    """A form on another site could send a request to the server of whoever reads it."""
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    body = form(('"image"; filename="a"', picture()), ('"phrase"', "left"))
    assert send(address, "POST /api/segment", body, kind + headers)[0] == status


def _free_of_boundary(content: bytes) -> bool:
    return b"--" + BOUNDARY.encode() not in content


_CONTENTS = st.binary(max_size=300).filter(_free_of_boundary)


_NAMES = st.text(
    st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters='"\\'), min_size=1, max_size=20
)
_TEXTS = st.text(max_size=40).filter(lambda text: _free_of_boundary(text.encode()))


@given(image=_CONTENTS, fields=st.lists(st.tuples(_NAMES, _TEXTS), max_size=8))
def test_forms_are_read_byte_by_byte(image: bytes, fields: list[tuple[str, str]]) -> None:
    """Whatever the parts contain, they come back unchanged."""
    body = form(('"image"; filename="a.png"', image), *((f'"{name}"', text) for name, text in fields))
    assert read_form(body, f"multipart/form-data; boundary={BOUNDARY}") == (image, "a.png", fields)


@given(body=st.binary(max_size=400), cut=st.integers(0, 400))
def test_broken_forms_are_one_sentence(body: bytes, cut: int) -> None:
    """Any bytes, and any beginning of a form, give parts or a DcrisError, and no other error."""
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    whole = form(('"image"; filename="a.png"', body), ('"phrase"', "left"))
    for broken in (body, b"--" + BOUNDARY.encode() + body, whole[:cut], whole[cut:], whole + body):
        with suppress(DcrisError):
            read_form(broken, kind)


def test_adapter_sets_are_named_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that names the model was refused while there was only one ("the available ones are
    scenes"), and "." was a set without a name."""
    saved = Segmenter.from_pretrained("tiny", device="cpu").save_pretrained(tmp_path / "runs" / "mine")
    monkeypatch.chdir(saved)
    for checkpoints, names in ((["tiny"], ("tiny",)), ([".", "tiny"], ("mine", "tiny")), ([saved], ("mine",))):
        args = SimpleNamespace(checkpoints=[str(each) for each in checkpoints], device="cpu", precision=None)
        assert _loader(args)().adapters == names  # type: ignore[arg-type]


def test_serve_needs_no_gradio(launcher: Launcher, tmp_path: Path) -> None:
    """`dcris serve` is for machines without Gradio and its hundred packages."""
    pytest.importorskip("uvicorn")
    block = "import sys, tempfile; sys.modules['gradio'] = sys.modules['fastapi'] = tempfile.tempdir = None"
    output, home = tmp_path / "output.txt", tmp_path / "home"
    home.mkdir()
    words = ("serve", "tiny", "--port", 0, "--device", "cpu")
    server = launcher.start(words, output, first=block, TMPDIR=home)
    while not output.exists() or "\n" not in output.read_text():
        assert launcher.poll(server) is None, output.read_text()
        time.sleep(0.02)
    line = output.read_text()
    assert line.startswith("http://127.0.0.1:")
    assert post(line.split()[0], picture(), phrase="red circle")[0]["phrase"] == "red circle"
    os.kill(server, signal.SIGTERM)
    launcher.wait(server, 60)
    assert not list(home.iterdir())


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "h11", "python_multipart"])
def test_a_missing_library_is_named(launcher: Launcher, missing: str, tmp_path: Path) -> None:
    """Without the extra, the command says what to install, before it loads the model."""
    block, output = f"import sys; sys.modules['{missing}'] = None", tmp_path / "output.txt"
    assert launcher.wait(launcher.start(("serve", "no-such-model", "--port", 0), output, first=block)) == 2
    assert f"needs the package {missing}: pip install 'dcris[serve]'" in output.read_text()
