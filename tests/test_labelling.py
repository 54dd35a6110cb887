"""The backend for Label Studio: what a request may name, and the masks that it answers with."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcris import Segmenter
from dcris.cli import main
from dcris.data.brush_rle import decode_brush
from dcris.data.importer import import_annotations
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.data.tools.label_studio import BrushTags
from dcris.errors import DcrisError
from dcris.inference.labelling import LabellingInterface, TaskImages
from dcris.inference.web.service import BusyError, InferenceService, Limits

REPOSITORY = Path(__file__).parents[1]
INTERFACE = re.findall(r"```html\n(.*?)```", (REPOSITORY / "docs/labelling.md").read_text("utf-8"), re.DOTALL)[0]
"""The documented labelling interface."""

UPLOAD = "/data/upload/1/0a1b2c3d-photo.png"
TOKEN = "Token 0123456789abcdef"


def results_of(text: list[str], name: str = "prompt") -> dict[str, Any]:
    """The context of an interaction, as Label Studio's editor sends it for a text area."""
    value = {"text": text}
    return {"result": [{"id": "x", "type": "textarea", "from_name": name, "to_name": "image", "value": value}]}


def test_the_documented_interface() -> None:
    interface = LabellingInterface.parse(INTERFACE)
    assert interface == LabellingInterface(
        BrushTags("image", "tag", "phrase"), "image", ("object",), frozenset({"prompt"})
    )
    assert interface.phrases_of({"image": "x.png"}) == []


def test_an_interface_whose_labels_are_phrases() -> None:
    """Such as dcris predict writes. The label of a mask is its phrase."""
    interface = LabellingInterface.parse(
        '<View><Image name="a" value="$photo"/><BrushLabels name="b" toName="a"><View><Label value="Left cup"/></View>'
        '<Label value="bowl"/></BrushLabels><TextArea name="other" toName="text"/></View>'
    )
    assert interface == LabellingInterface(BrushTags("a", "b", None), "photo", ("Left cup", "bowl"), frozenset())
    assert interface.phrases_of({"photo": "x.png"}) == ["Left cup", "bowl"]
    assert interface.phrases_of({"photo": "x.png", "Captions": ["a mug", "a mug"]}) == ["a mug"]
    assert interface.phrases_of({"photo": "x.png", "phrase": "the mug", "caption": "no"}) == ["the mug"]
    assert [interface.label_of(phrase) for phrase in ("left cup", "bowl", "mug")] == ["Left cup", "bowl", "Left cup"]


@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        ("<View></View>", "needs an <Image"),
        ('<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i"/></View>', "with a <Label>"),
        ('<View><Image name="i" value="$i"/><PolygonLabels name="b" toName="i"><Label value="x"/></PolygonLabels></View>',
         "needs an <Image"),
        ("<View>", "is not XML"),
        ("", "is not XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><View>&a;</View>', "it has a document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><View/>', "it has a document type"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_interface(xml: str, sentence: str) -> None:
    with pytest.raises(DcrisError, match=sentence):
        LabellingInterface.parse(xml)


@settings(max_examples=200)
@given(place=st.integers(0, len(INTERFACE)), length=st.integers(0, 40), text=st.text(max_size=12))
def test_a_damaged_interface_is_one_sentence(place: int, length: int, text: str) -> None:
    """It comes from the request."""
    try:
        LabellingInterface.parse(INTERFACE[:place] + text + INTERFACE[place + length :])
    except DcrisError as error:
        assert "\n" not in str(error)


def test_an_interaction_asks_for_the_newest_phrase() -> None:
    """A text area has all that was entered before; the text of a region asks for nothing."""
    interface = LabellingInterface.parse(INTERFACE)
    assert interface.asked([("prompt", ["a cup", "the bowl"])]) == ["the bowl"]
    assert interface.asked([("phrase", ["a cup"]), ("prompt", [])]) == []


# ---- images --------------------------------------------------------------------------------------


def test_local_files_are_read_below_the_folder_only(tmp_path: Path) -> None:
    """A request names the file, so anything outside is refused, whether it exists or not."""
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    (folder / "in/ä 1.png").write_bytes(b"12345")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    images = TaskImages(folder)
    assert images.read("/data/local-files/?d=in/%C3%A4%201.png", 10) == b"12345"
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(DcrisError, match="cannot read the image 'circle"):
        images.read("/data/local-files/?d=circle", 10)
    mine = TaskImages(folder, "http://mine:8080")
    assert mine.read("http://mine:8080/data/local-files/?d=in/%C3%A4%201.png", 10) == b"12345"
    with pytest.raises(DcrisError, match="is not one that Label Studio itself holds"):
        mine.read("http://evil.example/data/local-files/?d=in/%C3%A4%201.png", 10)
    with pytest.raises(DcrisError, match=r"server that was not given.*give its address with --url"):
        images.read("http://mine:8080/data/local-files/?d=in/%C3%A4%201.png", 10)
    for query in ("", "?d=in&d=in", "?e=in"):
        with pytest.raises(DcrisError, match="is not one that Label Studio itself holds"):
            mine.read(f"/data/local-files/{query}", 10)
    for name in ("../secret", str(tmp_path / "secret"), "link", "in/../../secret", "../nothing"):
        with pytest.raises(DcrisError, match="outside the folder"):
            images.read(f"/data/local-files/?d={name}", 10)
    for name, sentence in (
        ("no.png", "No such file"),
        ("a%00b", "null"),
        ("in", "it is a folder"),
        ("in/%C3%A4%201.png", "larger"),
    ):
        with pytest.raises(DcrisError, match=sentence):
            images.read(f"/data/local-files/?d={name}", 4)
    for address in ("in/ä 1.png", "/etc/passwd", "file:///etc/passwd", "s3://bucket/x.png", None, ["x"], "//["):
        with pytest.raises(DcrisError, match="is not one that Label Studio itself holds"):
            images.read(address, 10)
    with pytest.raises(DcrisError, match="give its address with --url"):
        images.read(UPLOAD, 10)
    with pytest.raises(DcrisError, match="no folder"):
        TaskImages(tmp_path / "nowhere")
    with pytest.raises(DcrisError, match="is not the address of a server"):
        TaskImages(None, "localhost:8080")
    with pytest.raises(DcrisError, match="is not the address of a server"):
        TaskImages(None, "http://[")


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("http://ann:secret@localhost:8080", None),
        ("ann:secret@localhost:8080", None),
        ("http://localhost:8080/?token=secret", None),
        ("http://localhost:8080/#secret", None),
        ("http://localhost:8080", "secret\r\nX-Other: 1"),
        ("http://localhost:8080", "secret\u00e9"),
    ],
)
def test_messages_quote_no_secret(url: str, token: str | None) -> None:
    """They are printed, and answered to whoever asks for a prediction."""
    with pytest.raises(DcrisError) as caught:
        TaskImages(None, url, token)
    assert "secret" not in str(caught.value)


def test_a_token_from_a_file_with_a_line_end() -> None:
    """As `LABEL_STUDIO_API_KEY="$(cat token.txt)"` of a Windows file leaves it."""
    with label_studio({UPLOAD: b"12345"}) as (url, _):
        assert TaskImages(None, url, "0123456789abcdef\r\n").read(UPLOAD, 10) == b"12345"


@contextmanager
def label_studio(
    content: dict[str, bytes], token: str = TOKEN, redirect: str = "", answer: bytes = b'{"access": "short"}'
) -> Iterator[tuple[str, list[str]]]:
    """A stand-in for Label Studio's files: its URL, and the requests with their token."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            seen.append(f"{self.path} {given}")
            found = content.get(self.path) if given == token else None
            self.send_response(302 if redirect else 401 if given != token else 200 if found is not None else 404)
            if redirect:
                self.send_header("Location", redirect)
            self.end_headers()
            self.wfile.write(found or b"")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(f"{self.path} {asked}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


def test_uploads_are_fetched_from_label_studio_only() -> None:
    """The token goes to the operator's server, for files, and nowhere else."""
    content = {UPLOAD: b"12345", "/sub/data/upload/2/b.png": b"sub", "/data/local-files/?d=a%20b.png": b"local"}
    with label_studio(content) as (url, seen):
        images = TaskImages(None, url + "/", "0123456789abcdef")
        assert images.read(UPLOAD, 10) == images.read(url + UPLOAD, 10) == b"12345"
        assert images.read("/data/local-files/?d=a%20b.png", 10) == b"local"
        assert TaskImages(None, url + "/sub", "0123456789abcdef").read("/sub/data/upload/2/b.png", 10) == b"sub"
        before = len(seen)
        for address in (
            "http://127.0.0.1:1/data/upload/1/a.png",
            url.replace("127.0.0.1", "localhost") + UPLOAD,
            url.replace("http://", "http://user@") + UPLOAD,
            "/api/users/",
            "/data/../api/users/",
            "/data/%2e%2e/api/users/",
            "//127.0.0.1:1/data/upload/1/a.png",
            "/data/upload/1/\ud800.png",  # half of a surrogate pair, which JSON can contain
            "/data/local-files/?d=\ud800",
        ):
            with pytest.raises(DcrisError, match="is not one that Label Studio itself holds"):
                images.read(address, 10)
        assert len(seen) == before
        with pytest.raises(DcrisError, match="more than 4 bytes"):
            images.read(UPLOAD, 4)
        with pytest.raises(DcrisError, match="HTTP 404"):
            images.read("/data/upload/1/no.png", 10)
        with pytest.raises(DcrisError, match=r"HTTP 401.*check --url and LABEL_STUDIO_API_KEY"):
            TaskImages(None, url, None).read(UPLOAD, 10)
    with label_studio({}, redirect="http://127.0.0.1:1/") as (url, seen), pytest.raises(DcrisError, match="HTTP 302"):
        TaskImages(None, url, "0123456789abcdef").read(UPLOAD, 10)
    with pytest.raises(DcrisError, match="from Label Studio: Connection refused"):
        images.read(UPLOAD, 10)


def test_a_personal_access_token_is_exchanged_once() -> None:
    with label_studio({UPLOAD: b"12345"}, token="Bearer short") as (url, seen):
        images = TaskImages(None, url, "a.b.c")
        assert images.read(UPLOAD, 10) == images.read(UPLOAD, 10) == b"12345"
        assert seen == ["/api/token/refresh/ {'refresh': 'a.b.c'}", *[f"{UPLOAD} Bearer short"] * 2]
    for answer in (b"[" * 90_000, b"\xff", b'{"access": 1}'):
        with label_studio({}, answer=answer) as (url, _), pytest.raises(DcrisError, match="from Label Studio: "):
            TaskImages(None, url, "a.b.c").read(UPLOAD, 10)


# ---- the server ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("tiny", device="cpu", precision="float32")


@pytest.fixture(scope="module")
def folder(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of scenes, 1.png and 2.png."""
    out = tmp_path_factory.mktemp("images")
    found = sorted(scenes_root.rglob("*.jpg"))[:2] or sorted(scenes_root.rglob("*.png"))[:2]
    for number, path in enumerate(found, 1):
        Image.open(path).save(out / f"{number}.png")
    return out


@pytest.fixture(scope="module")
def backend(segmenter: Segmenter, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """URL of a backend, and what it logs."""
    pytest.importorskip("uvicorn")
    from dcris.inference.web.label_studio import make_backend
    from dcris.inference.web.server import guard, make_server

    service, log = InferenceService(segmenter, Limits(upload=300_000)), list[str]()
    server = make_server(guard(make_backend(service, TaskImages(folder), log.append), service.limits), service.limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            Event().wait(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", log
        server.should_exit = True
        thread.join(20)
        service.close()


def post(url: str, body: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as response:
        return json.load(response)


def task(number: int, **data: Any) -> dict[str, Any]:
    """A task as Label Studio sends it, with fields that are not used."""
    image = f"/data/local-files/?d={number}.png"
    return {"id": number, "data": {"image": image, **data}, "annotations": [{"result": [{"value": 1}]}], "project": 1}


def request(tasks: list[Any], context: Any = None, config: str = INTERFACE) -> dict[str, Any]:
    params = {"login": None, "password": None, "context": context}
    return {"tasks": tasks, "project": "1.1764420000", "label_config": config, "params": params}


def test_a_phrase_becomes_the_brush_mask_of_the_segmenter(
    backend: tuple[str, list[str]], segmenter: Segmenter, folder: Path, tmp_path: Path
) -> None:
    """With the phrase as the text of its region, as the export of Label Studio is imported."""
    url, _ = backend
    context = results_of(["a thing", "leftmost star"])
    (prediction,) = post(f"{url}/predict", request([task(1)], context))["results"]
    assert prediction == post(f"{url}/predict", request([task(1)], context))["results"][0], "identifiers are stable"
    (expected,) = segmenter.predict(folder / "1.png", "leftmost star")
    brush, text = prediction["result"]
    assert brush["id"] == text["id"]
    assert (brush["type"], brush["from_name"], brush["to_name"]) == ("brushlabels", "tag", "image")
    assert (text["type"], text["from_name"], text["to_name"]) == ("textarea", "phrase", "image")
    assert brush["value"]["brushlabels"] == ["object"]
    assert text["value"]["text"] == ["leftmost star"]
    assert (brush["original_height"], brush["original_width"]) == expected.mask.shape
    np.testing.assert_array_equal(decode_brush(brush["value"]["rle"], expected.mask.shape), expected.mask)
    assert prediction["score"] == pytest.approx(expected.score, abs=1e-6)
    assert prediction["model_version"] == post(f"{url}/setup", {"schema": INTERFACE, "project": "1.1"})["model_version"]
    # What the annotator submits without a change is one reference.
    exported = [{**task(1), "annotations": [{"id": 1, "result": prediction["result"]}]}]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    Image.open(folder / "1.png").save(tmp_path / "1.png")
    import_annotations(tmp_path / "export.json", tmp_path / "my.jsonl", strict=True)
    (reference,) = load_references(tmp_path / "my.jsonl", None).references
    assert [each.text for each in reference.expressions] == ["leftmost star"]
    np.testing.assert_array_equal(union_mask(reference.segmentations, expected.mask.shape), expected.mask)


def test_tasks_without_an_interaction_have_phrases_of_their_own(
    backend: tuple[str, list[str]], segmenter: Segmenter, folder: Path
) -> None:
    """For "Retrieve predictions". A task whose image is missing does not spoil the others, and has
    no prediction: Label Studio keeps an empty one, and would not ask again."""
    url, log = backend
    tasks = [task(1, phrases=["leftmost star", "red circle"]), task(2), task(3, phrase="leftmost star")]
    answer = post(f"{url}/predict", request(tasks))
    phrases = [
        [each["value"]["text"][0] for each in found["result"] if each["type"] == "textarea"]
        for found in answer["results"][:2]
    ]
    assert answer["results"][2] == []
    expected = [
        each.phrase for each in segmenter.predict(folder / "1.png", ["leftmost star", "red circle"]) if each.mask.any()
    ]
    assert expected, "the model draws no mask, so this test compares nothing"
    assert phrases == [expected, []]
    assert [line for line in log if line.startswith("task 3: cannot read the image '3.png'")]
    post(f"{url}/predict", request([task(1)], {"result": []}))


def test_tasks_for_which_there_is_no_time(backend: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Label Studio gives up after 100 s. What is done by then is kept: a repetition goes on."""
    url, log = backend
    monkeypatch.setattr("dcris.inference.web.label_studio._SECONDS", 0.0)
    results = post(f"{url}/predict", request([task(1, phrase="leftmost star"), task(2), task(2)]))["results"]
    assert isinstance(results[0], dict)
    assert results[1:] == [[], []]
    assert log[-1] == "2 of 3 tasks are left; retrieve predictions again"


def test_a_busy_model_is_no_prediction(backend: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails as a whole, at once."""
    url, _ = backend
    tries: list[int] = []

    async def answer(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise BusyError("busy")

    monkeypatch.setattr(InferenceService, "answer", answer)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{url}/predict", request([task(1, phrase="leftmost star"), task(2), task(1, phrase="leftmost star")]))
    with caught.value as error:
        assert error.code == 503
    assert len(tries) == 1


def test_more_labels_than_phrases_of_a_request(
    backend: tuple[str, list[str]], segmenter: Segmenter, folder: Path
) -> None:
    """An interface with labels for phrases may have any number of them."""
    url, _ = backend
    words = [f"{colour} {shape}" for colour in ("red", "green", "blue", "big", "small") for shape in
             ("circle", "ring", "square", "star", "one")]  # fmt: skip
    labels = "".join(f'<Label value="{word}"/>' for word in words)
    config = f'<View><Image name="i" value="$image"/><BrushLabels name="b" toName="i">{labels}</BrushLabels></View>'
    (found,) = post(f"{url}/predict", request([task(1)], config=config))["results"]
    found = [each["value"]["brushlabels"][0] for each in found["result"]]
    expected = [each.phrase for each in segmenter.predict(folder / "1.png", words) if each.mask.any()]
    assert len(words) > Limits().phrases
    assert expected == found != []


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("predict", b"no json", "the request is not JSON: Expecting value"),
        ("predict", b"\xff", "the request is not JSON"),
        ("predict", b"[" * 100_000, "nested too deeply"),
        # Larger ones would take gigabytes and minutes.
        (
            "predict",
            request([task(1)], {"result": [{}] * 20_000}),
            "params.context.result: List should have at most 10000",
        ),
        ("predict", request([task(1)], None, "<a/>" * 20_000), "is not XML"),
        ("predict", request([task(1)], None, f"<a>{'<b/>' * 20_000}</a>"), "more than 10,000 tags"),
        ("predict", {"tasks": []}, "label_config"),
        ("predict", request([{"id": 1}]), "tasks.0.data"),
        ("predict", request([task(1)], results_of(["x" * 400])), "400 characters"),
        ("predict", request([task(9)], results_of(["cup"])), "cannot read the image '9.png'"),
        ("predict", request([task(1)], results_of(["cup"]), "<View/>"), "needs an <Image"),
        ("train", {"annotations": []}, "does not train"),
        ("webhook", {"action": "START_TRAINING", "project": {"id": 1}}, "does not train"),
        ("setup", {"schema": 7}, "schema"),
    ],
)
def test_what_is_wrong_in_a_request(backend: tuple[str, list[str]], path: str, body: Any, sentence: str) -> None:
    """Label Studio does not show the message to anybody, so the server prints it."""
    url, log = backend
    before = len(log)
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{url}/{path}", body)
    with caught.value as error:
        assert error.code == 400
        assert sentence in json.load(error)["error"]
    assert [sentence in line for line in log[before:]] == [True], "it is printed once"


def test_label_studio_connects_and_sends_events(backend: tuple[str, list[str]]) -> None:
    """A project without an interface yet can be connected, and events are ignored silently."""
    url, log = backend
    for path in ("health", ""):
        with urllib.request.urlopen(f"{url}/{path}", timeout=20) as response:
            assert json.load(response)["status"] == "UP"
    version = post(
        f"{url}/setup", {"schema": "<View></View>", "project": "7.1", "hostname": "http://x", "access_token": "t"}
    )
    assert "project '7.1': the labelling interface needs" in log[-1]
    with urllib.request.urlopen(f"{url}/versions", timeout=20) as response:
        assert json.load(response)["versions"] == [version["model_version"]]
    before = len(log)
    assert post(f"{url}/webhook", {"action": "ANNOTATION_CREATED", "annotation": {}}) == {"status": "ignored"}
    assert len(log) == before


def test_the_command_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABEL_STUDIO_URL", "")  # as Compose leaves a variable that is not set
    assert main(["label-studio", "tiny", "--images", str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["label-studio", "tiny", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "serves other machines too" in capsys.readouterr().err
