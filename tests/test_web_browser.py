"""The web page in a real browser: upload, phrases, masks, slider, downloads, and no requests
elsewhere."""

import base64
import io
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcris import Segmenter
from dcris.data.masks import decode_mask
from dcris.inference.inputs import result_stem
from dcris.models.segmentation import ReferringSegmenter

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine"),
]

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000
"""Milliseconds; long, because other tests may run on the machine."""


@dataclass
class Site:
    address: str
    segmenter: Segmenter
    uploads: Path
    passes: list[int] = field(default_factory=list)
    """Number of phrases of each forward pass."""


@pytest.fixture(scope="module")
def site(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio")
    from dcris.inference.web.app import make_app
    from dcris.inference.web.server import guard, make_server
    from dcris.inference.web.service import InferenceService

    segmenter = Segmenter.from_pretrained(trained_run, device="cpu", precision="float32")
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        site = Site(f"http://127.0.0.1:{listening.getsockname()[1]}", segmenter, uploads)
        segment = ReferringSegmenter.segment

        def counted(model: ReferringSegmenter, state: Any, text: Any) -> Any:
            site.passes.append(len(text.tokens))
            return segment(model, state, text)

        patch.setattr(ReferringSegmenter, "segment", counted)
        service = InferenceService(segmenter)
        server = make_server(guard(make_app(service), service.limits), service.limits)
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            Event().wait(0.05)
        yield site
        server.should_exit = True
        thread.join(20)
        service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((site.address, "data:", "blob:")) else elsewhere.append(request.url)
        ),
    )
    page.goto(site.address)
    page.wait_for_selector("#segment")
    yield page
    context.close()
    assert not elsewhere, "the page talks to others"


def shown(page: Any) -> np.ndarray[Any, Any]:
    """Pixels of the image on the page."""
    source = page.get_attribute("#picture img", "src")
    assert source.startswith("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")).astype(int)


def wait_for_another(page: Any, before: str) -> None:
    page.wait_for_function(
        "before => document.querySelector('#picture img')?.getAttribute('src') !== before", arg=before
    )


def source_of(page: Any) -> str:
    return page.get_attribute("#picture img", "src")


def move_slider(page: Any, value: float) -> None:
    number = page.locator("#threshold input[type=number]")
    number.fill(str(value))
    number.press("Enter")
    number.blur()


def photograph(folder: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (7, 11, 3), np.uint8)
    path = folder / "holiday.png"
    Image.fromarray(pixels).resize((220, 140), Image.Resampling.BICUBIC).save(path)
    return path


def test_from_upload_to_masks(page: Any, site: Site, tmp_path: Path) -> None:
    """The complete use of the page; downloads equal the results of the Python API."""
    path = photograph(tmp_path)
    page.set_input_files("#photo input[type=file]", path)
    page.wait_for_selector("#picture img")
    plain = shown(page)
    assert plain.shape[:2] == (560, 880)  # repeated a whole number of times
    assert not [file for file in site.uploads.rglob("*") if file.is_file()], "the upload stayed on the disk"

    phrases = ["red circle", "the <b>small</b> ring"]
    # A threshold at which something is found, whatever the little-trained model of the tests
    # believes.
    highest = min(answer.probabilities.max() for answer in site.segmenter.predict(path, phrases, scores=True))  # type: ignore[union-attr]
    low, high = round(0.05, 2), 0.95
    assert highest > low
    site.passes.clear()
    page.fill("#phrases textarea", "\n".join(phrases))
    move_slider(page, low)
    before = source_of(page)
    page.click("#segment button, button#segment")
    wait_for_another(page, before)
    page.wait_for_selector("#legend .row >> nth=1")
    assert site.passes == [2]
    assert np.abs(shown(page) - plain).max() > 40, "no mask is seen"
    assert page.locator("#legend .phrase").all_text_contents() == phrases  # and not as HTML
    expected = site.segmenter.predict(path, phrases, threshold=low)
    site.passes.clear()
    numbers = page.locator("#legend .number").all_text_contents()
    assert numbers == [f"{answer.score:.0%}" for answer in expected]

    with page.expect_download() as download:
        page.click("#downloads a >> nth=1")
    records = json.loads(Path(download.value.path()).read_text())
    with page.expect_download() as download:
        page.click("#downloads a >> nth=0")
    with zipfile.ZipFile(download.value.path()) as archive:
        for number, (record, answer) in enumerate(zip(records, expected, strict=True)):
            mask = decode_mask(record["segmentation"], answer.mask.shape)
            np.testing.assert_array_equal(mask, answer.mask)
            with archive.open(f"{result_stem('holiday', number, answer.phrase)}.mask.png") as file:
                np.testing.assert_array_equal(np.asarray(Image.open(file)) > 0, answer.mask)

    before = source_of(page)
    move_slider(page, high)
    wait_for_another(page, before)
    page.wait_for_function("() => !document.querySelector('#downloads a').href.endsWith('=0.05')")
    assert page.get_attribute("#downloads a >> nth=0", "href").endswith("threshold=0.95")
    assert site.passes == [], "the slider asked the model again"
    if os.environ.get("DCRIS_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["DCRIS_SCREENSHOTS"]) / "test.png")


def test_examples_and_messages(page: Any, site: Site, tmp_path: Path) -> None:
    """Examples work without an upload, and mistakes give a message."""
    page.click("button#segment, #segment button")
    page.get_by_text(re.compile("There is no image yet")).first.wait_for()
    page.click("#examples button >> nth=1")
    page.wait_for_selector("#picture img")
    assert len(page.input_value("#phrases textarea").splitlines()) >= 2
    page.fill("#phrases textarea", " \n ")
    page.click("button#segment, #segment button")
    page.get_by_text(re.compile("There is no phrase")).first.wait_for()
    (tmp_path / "text.png").write_text("this is not a picture")
    page.set_input_files("#photo input[type=file]", tmp_path / "text.png")
    page.get_by_text(re.compile("Cannot read the image")).first.wait_for()
    assert not [file for file in site.uploads.rglob("*") if file.is_file()]


def test_upload_by_drag_and_drop_and_by_keyboard(page: Any, site: Site, tmp_path: Path) -> None:
    """The upload field is dcris's own, so keyboard and drop must be tested."""
    page.wait_for_load_state("networkidle")
    field = page.locator("#photo input[type=file]")
    for _ in range(9):
        page.keyboard.press("Tab")
        if field.evaluate("element => element === document.activeElement"):
            break
    else:
        pytest.fail("the field is not reached by the keyboard")
    field.set_input_files(photograph(tmp_path))
    page.wait_for_selector("#picture img")
    before = source_of(page)
    data = base64.b64encode(photograph(tmp_path).read_bytes()[:-30]).decode()
    drop = """data => {
        const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
        transfer.items.add(new File([bytes], "cut <i>.png"));
        const zone = document.querySelector("#photo .drop");
        for (const name of ["dragenter", "dragover", "drop"])
            zone.dispatchEvent(new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(drop, data)
    page.get_by_text(re.compile("Cannot read the image")).first.wait_for()
    assert source_of(page) == before, "what cannot be read replaced the photograph"
    page.evaluate(drop, base64.b64encode((tmp_path / "holiday.png").read_bytes()).decode())
    page.wait_for_selector("#note .note", state="hidden")


def test_the_dark_mode(page: Any, site: Site) -> None:
    """Colours must follow the dark mode of the system."""
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("#picture .empty")
    page.wait_for_selector("body.dark")
    colour = page.locator("#picture .empty").evaluate("element => getComputedStyle(element).backgroundColor")
    assert max(int(each) for each in re.findall("[0-9]+", colour)[:3]) < 100
