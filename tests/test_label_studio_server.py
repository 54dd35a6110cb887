"""The labelling loop with a real Label Studio: phrase, mask, correction, export, fine-tuning.

The server runs in an environment of its own (tests/tool_environments.py).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dcris.assets
from dcris import Segmenter
from dcris.cli import main
from dcris.data.brush_rle import decode_brush, encode_brush
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from test_labelling import INTERFACE
from test_web_browser import CHROMIUM, OPTIONS, PATIENCE
from tool_environments import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TOKEN = "0123456789abcdef0123456789abcdef01234567"
EMAIL, PASSWORD = "annotator@example.org", "correct horse battery"
PHRASE = "leftmost star"
CHANGED = (slice(40, 60), slice(30, 50))
"""What the annotator adds to the mask."""


@dataclass
class LabelStudio:
    """A running server."""

    url: str

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Token {TOKEN}", "Content-Type": kind}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read().decode()[:1000]}") from error

    def upload(self, project: int, image: Path) -> None:
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{image.name}"\r\nContent-Type: image/png\r\n\r\n'
        body = head.encode() + image.read_bytes() + b"\r\n--x--\r\n"
        self.call("POST", f"/api/projects/{project}/import", body, "multipart/form-data; boundary=x")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def running(words: list[Any], address: str, log: Path, **more: str) -> Iterator[None]:
    """Start a server, wait until it answers at an address, and stop it in the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **more}
        )
        try:
            for _ in range(2400):
                try:
                    with urllib.request.urlopen(address, timeout=20):
                        break
                except OSError:
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.5)
            else:
                pytest.fail(f"{words[0]} did not start: {log.read_text()[-3000:]}")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    programs, folder, port = environment("label-studio"), tmp_path_factory.mktemp("label_studio"), free_port()
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "USE_DEFAULT_BANNED_SUBNETS": "false",  # as the documentation says
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    words = [programs / "label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", port]
    words += ["--username", EMAIL, "--password", PASSWORD, "--user-token", TOKEN]
    url = f"http://127.0.0.1:{port}"
    with running(words, f"{url}/health", folder / "log", **settings):
        yield LabelStudio(url)


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `dcris label-studio`, as a user starts it, with a personal access token."""
    log, port = tmp_path_factory.mktemp("backend") / "log", free_port()
    words = [sys.executable, "-m", "dcris", "label-studio", "tiny", "--url", label_studio.url, "--port", port]
    words += ["--device", "cpu", "--precision", "float32"]
    personal = label_studio.call("POST", "/api/token/")["token"]
    assert personal.count(".") == 2
    url = f"http://127.0.0.1:{port}"
    with running(words, f"{url}/health", log, LABEL_STUDIO_API_KEY=personal):
        yield url


@pytest.fixture(scope="module")
def photo(scenes_root: Path) -> Path:
    return next(path for ending in ("png", "jpg") for path in sorted(scenes_root.rglob(f"*.{ending}")))


@pytest.fixture
def project(label_studio: LabelStudio, backend: str, photo: Path, tmp_path: Path) -> dict[str, Any]:
    """A project with one task, connected to the backend."""
    made = label_studio.call("POST", "/api/projects", {"title": "scenes", "label_config": INTERFACE})
    (tmp_path / "photos").mkdir()
    Image.open(photo).convert("RGB").save(tmp_path / "photos/scene 1.png")
    label_studio.upload(made["id"], tmp_path / "photos/scene 1.png")
    model = {"project": made["id"], "url": backend, "is_interactive": True, "title": "dcris"}
    found = label_studio.call("POST", "/api/ml", model)
    assert (found["readable_state"], found["model_version"].split()[0]) == ("Connected", "dcris")
    tasks = label_studio.call("GET", f"/api/tasks?project={made['id']}&fields=all")["tasks"]
    return {"id": made["id"], "model": found["id"], "task": tasks[0]["id"], "photos": tmp_path / "photos"}


def by_the_api(server: LabelStudio, project: dict[str, Any]) -> None:
    """Send what the editor sends."""
    prompt = {"id": "p", "type": "textarea", "from_name": "prompt", "to_name": "image", "value": {"text": [PHRASE]}}
    body = {"task": project["task"], "context": {"result": [prompt]}}
    answer = server.call("POST", f"/api/ml/{project['model']}/interactive-annotating", body)
    assert "errors" not in answer
    result = [prompt, *answer["data"]["result"]]
    server.call("POST", f"/api/tasks/{project['task']}/annotations", {"result": result, "lead_time": 1.0})


def by_the_editor(server: LabelStudio, project: dict[str, Any]) -> None:
    """Type the phrase into the real editor, accept the suggestion, and submit."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(f"{server.url}/user/login", wait_until="domcontentloaded")
        page.fill("input[name=email]", EMAIL)
        page.fill("input[name=password]", PASSWORD)
        with page.expect_navigation(wait_until="domcontentloaded"):
            page.click("button[type=submit]")
        address = f"{server.url}/projects/{project['id']}/data?task={project['task']}"
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector('[aria-label="TextArea Input"]')
        page.get_by_text("Auto-Annotation").first.click()
        with page.expect_response("**/interactive-annotating"):
            page.get_by_label("TextArea Input").first.fill(PHRASE)
            page.get_by_label("TextArea Input").first.press("Enter")
        suggestions = page.get_by_text("1 suggestions")
        suggestions.wait_for()
        suggestions.locator("xpath=..").locator("button").last.click()
        suggestions.wait_for(state="detached")
        with page.expect_response(f"**/api/tasks/{project['task']}/annotations*"):
            page.get_by_role("button", name="Submit").click()
        browser.close()


@pytest.mark.parametrize(
    "annotate",
    [by_the_api, pytest.param(by_the_editor, marks=pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"))],
)
def test_from_a_phrase_to_a_fine_tuned_model(
    annotate: Any, label_studio: LabelStudio, project: dict[str, Any], tmp_path: Path
) -> None:
    """The mask in the annotator's store is ours; its correction is what the model learns."""
    annotate(label_studio, project)
    ((annotation,),) = (task["annotations"] for task in export(label_studio, project, tmp_path / "first.json"))
    segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="float32")
    (expected,) = segmenter.predict(project["photos"] / "scene 1.png", PHRASE)
    assert expected.mask.any()
    brush = next(each for each in annotation["result"] if each["type"] == "brushlabels")
    text = next(each for each in annotation["result"] if each["from_name"] == "phrase")
    assert (text["id"], text["value"]["text"]) == (brush["id"], [PHRASE])
    stored = decode_brush(brush["value"]["rle"], expected.mask.shape)
    np.testing.assert_array_equal(stored, expected.mask)

    corrected = expected.mask.copy()
    corrected[CHANGED] = True
    for each in (brush, text):
        each["value"]["rle"] = encode_brush(corrected)
    label_studio.call("PATCH", f"/api/annotations/{annotation['id']}", {"result": annotation["result"]})
    export(label_studio, project, tmp_path / "project-1.json")
    data = tmp_path / "corrected.jsonl"
    source = [str(tmp_path / "project-1.json"), "--images", str(project["photos"])]
    assert main(["data", "import", *source, "--out", str(data), "--strict", "--split", "train"]) == 0
    assert main(["data", "check", str(data), "--deep"]) == 0
    (reference,) = load_references(data, None).references
    assert [each.text for each in reference.expressions] == [PHRASE]
    np.testing.assert_array_equal(union_mask(reference.segmentations, corrected.shape), corrected)

    run, recipe = tmp_path / "run", Path(dcris.assets.__file__).parent / "tiny/config.json"
    words = ["train", str(recipe), "--data", str(data), "--from", "tiny", "--out", str(run), "--device", "cpu"]
    assert main([*words, "--train.max_steps", "4", "--train.batch_size", "2", "--data.workers", "0"]) == 0
    tuned = Segmenter.from_pretrained(run, device="cpu").predict(project["photos"] / "scene 1.png", PHRASE, scores=True)
    before = segmenter.predict(project["photos"] / "scene 1.png", PHRASE, scores=True)
    (more, less) = (found[0].probabilities[CHANGED].mean() for found in (tuned, before))
    assert more > less, "the model has not learned what the annotator added"


def export(server: LabelStudio, project: dict[str, Any], out: Path) -> Any:
    content = server.call("GET", f"/api/projects/{project['id']}/export?exportType=JSON")
    out.write_text(json.dumps(content))
    return content


def test_predictions_for_many_tasks(label_studio: LabelStudio, project: dict[str, Any]) -> None:
    """ "Retrieve predictions": the phrases are in the data of the tasks, which is what annotators
    open."""
    (task,) = label_studio.call("GET", f"/api/tasks?project={project['id']}&fields=all")["tasks"]
    shutil.copy(project["photos"] / "scene 1.png", project["photos"] / "scene 2.png")
    data = {**task["data"], "phrase": PHRASE}
    for _ in range(2):
        label_studio.call("POST", "/api/tasks", {"project": project["id"], "data": data})
    tasks = label_studio.call("GET", f"/api/tasks?project={project['id']}&fields=all")["tasks"]
    ids = [each["id"] for each in tasks if "phrase" in each["data"]]
    body = {"selectedItems": {"all": False, "included": ids}, "ordering": []}
    label_studio.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project['id']}", body)
    for number in ids:
        (prediction,) = label_studio.call("GET", f"/api/tasks/{number}")["predictions"]
        assert [each["type"] for each in prediction["result"]] == ["brushlabels", "textarea"]
        assert prediction["model_version"].startswith("dcris ")
        assert 0 < prediction["score"] <= 1
