"""The web page in a real browser: images by file, paste and camera, masks that are toggled, stale
results, slider, downloads, keyboard, phones, and no requests elsewhere."""

import base64
import io
import json
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
from dcris.data.scenes import make_scene
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
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
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
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio")
    from dcris.inference.web.app import make_app
    from dcris.inference.web.server import guard, make_server
    from dcris.inference.web.service import InferenceService

    segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="float32")
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
    page.on("pageerror", lambda error: elsewhere.append(str(error)))
    page.goto(site.address)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    yield page
    context.close()
    assert not elsewhere, "the page talks to others, or a script of it failed"


SEGMENT = "button#segment, #segment button"


def photograph(folder: Path, name: str = "holiday.png", seed: int = 3) -> Path:
    """A scene as the model knows them, cut to another shape."""
    path = folder / name
    Image.fromarray(make_scene(np.random.default_rng(seed), 112).image[:100]).save(path)
    return path


def found_in(site: Site, path: Path, count: int) -> list[str]:
    """Phrases that have a mask, and masks that differ."""
    said = ["circle", "square", "triangle", "star", "ring", "diamond", "leftmost", "rightmost", "top", "bottom"]
    found = site.segmenter.predict(path, said, threshold=0.05)
    chosen = {each.mask.tobytes(): each.phrase for each in found if each.box}
    assert len(chosen) >= count
    return list(chosen.values())[:count]


def upload(page: Any, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", path)
    page.wait_for_selector("#photo img")


def segment(page: Any, *phrases: str) -> None:
    page.fill("#phrases textarea", "\n".join(phrases))
    page.click(SEGMENT)


def answered(page: Any, site: Site, folder: Path, count: int = 1) -> list[str]:
    """Bring the page to an answer with so many masks; return the phrases."""
    path = photograph(folder)
    phrases = found_in(site, path, count)
    upload(page, path)
    move_slider(page, 0.05)
    segment(page, *phrases)
    page.wait_for_selector(f"#result .layer >> nth={count - 1}", state="attached")
    return phrases


def move_slider(page: Any, value: float, slider: str = "threshold") -> None:
    number = page.locator(f"#{slider} input[type=number]")
    number.fill(str(value))
    number.press("Enter")
    number.blur()


def decoded(source: str) -> np.ndarray[Any, Any]:
    """Pixels of a data: address."""
    kind, _, data = source.partition(";base64,")
    assert kind in ("data:image/jpeg", "data:image/png")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def visible(page: Any) -> list[bool]:
    """Which masks are drawn, by number."""
    layers = {
        int(layer.get_attribute("data-number")): layer.is_visible() for layer in page.locator("#result .layer").all()
    }
    return [layers[number] for number in sorted(layers)]


def test_what_was_not_found_can_be_shown(page: Any, site: Site, tmp_path: Path) -> None:
    """A word that the model does not know is "not found", although the object is there. The slider
    of the lowest score shows its mask and downloads it; the model is not asked again."""
    path = photograph(tmp_path)
    words = [
        f"{colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in ("ring", "star", "cross")
    ]
    absent = next(each.phrase for each in site.segmenter.predict(path, words) if each.rejected)
    (expected,) = site.segmenter.predict(path, absent, threshold=0.05, min_score=0)
    assert expected.mask.any()
    upload(page, path)
    move_slider(page, 0.05)
    segment(page, absent)
    page.wait_for_selector("#result .none")
    assert not visible(page)
    site.passes.clear()
    move_slider(page, 0, "min_score")
    page.wait_for_selector("#result .layer", state="attached")
    assert visible(page) == [True]
    assert page.locator("#result .number").all_text_contents() == [expected.verdict]
    with page.expect_download() as download:
        page.click(".downloads a >> nth=1")
    (record,) = json.loads(Path(download.value.path()).read_text())
    np.testing.assert_array_equal(decode_mask(record["segmentation"], expected.mask.shape), expected.mask)
    assert site.passes == []


def test_from_upload_to_masks(page: Any, site: Site, tmp_path: Path) -> None:
    """The complete use of the page by the keyboard; downloads equal the results of the Python
    API."""
    path = photograph(tmp_path)
    phrases = [*found_in(site, path, 2), "the <b>small</b> ring"]
    page.locator("#photo input[type=file]").focus()
    upload(page, path)
    low, high = 0.05, 0.95
    move_slider(page, low)
    site.passes.clear()
    page.locator("#phrases textarea").focus()
    page.keyboard.type("\n".join(phrases))
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("#result .row >> nth=2")
    assert site.passes == [3]
    assert not [file for file in site.uploads.rglob("*") if file.is_file()], "the upload stayed on the disk"

    expected = site.segmenter.predict(path, phrases, threshold=low)
    site.passes.clear()
    assert page.locator("#result .phrase").all_text_contents() == phrases  # and not as HTML
    assert page.locator("#result :is(.number, .none)").all_text_contents() == [answer.verdict for answer in expected]
    assert decoded(page.get_attribute("#result .photo", "src")).shape[:2] == (800, 896)  # a whole number of times
    colours = set()
    for number, answer in enumerate(expected[:2]):
        layer = decoded(page.get_attribute(f"#result .layer[data-number='{number}']", "src"))
        shown = answer.mask.repeat(8, 0).repeat(8, 1)
        assert (layer[..., 3] > 0)[shown].all()
        assert (layer[..., 3] == 0)[~shown].any() or shown.all()
        colours.add(tuple(layer[shown][0, :3]))
    assert len(colours) == 2

    with page.expect_download() as download:
        page.click(".downloads a >> nth=1")
    records = json.loads(Path(download.value.path()).read_text())
    with page.expect_download() as download:
        page.click(".downloads a >> nth=0")
    with zipfile.ZipFile(download.value.path()) as archive:
        for number, (record, answer) in enumerate(zip(records, expected, strict=True)):
            np.testing.assert_array_equal(decode_mask(record["segmentation"], answer.mask.shape), answer.mask)
            with archive.open(f"{result_stem('holiday', number, answer.phrase)}.mask.png") as file:
                np.testing.assert_array_equal(np.asarray(Image.open(file)) > 0, answer.mask)

    move_slider(page, high)
    page.wait_for_function("() => !document.querySelector('.downloads a').href.includes('=0.05')")
    assert page.get_attribute(".downloads a >> nth=0", "href").endswith("threshold=0.95&min_score=0.5")
    assert site.passes == [], "the slider asked the model again"


def test_masks_are_toggled_and_highlighted(page: Any, site: Site, tmp_path: Path) -> None:
    """A phrase's mask is hidden by its box, by mouse and keyboard, stays hidden when the threshold
    moves, and is highlighted under the pointer. A new answer shows all."""
    phrases = answered(page, site, tmp_path, 3)
    assert visible(page) == [True] * 3
    page.locator("#result label >> nth=1").click()
    assert visible(page) == [True, False, True]
    box = page.locator("#result input[type=checkbox] >> nth=2")
    box.focus()
    page.keyboard.press("Space")
    assert visible(page) == [True, False, False]
    page.keyboard.press("Space")

    source = page.get_attribute(".downloads a >> nth=0", "href")
    move_slider(page, 0.06)
    page.wait_for_function(
        "before => document.querySelector('.downloads a').getAttribute('href') !== before", arg=source
    )
    assert visible(page) == [True, False, True]
    assert [each.is_checked() for each in page.locator("#result input[type=checkbox]").all()] == [True, False, True]

    opacity = "layer => Number(getComputedStyle(layer).opacity)"
    page.hover("#result label >> nth=0")
    page.wait_for_timeout(500)
    found = [page.locator(f"#result .layer[data-number='{number}']").evaluate(opacity) for number in (0, 2)]
    assert found[0] == 1
    assert found[1] < 0.3
    page.hover("#result .layers")
    page.wait_for_timeout(500)
    assert page.locator("#result .layer[data-number='2']").evaluate(opacity) == 1

    segment(page, *phrases)
    page.wait_for_function("() => document.querySelectorAll('#result input:checked').length === 3")
    assert visible(page) == [True] * 3


def test_results_never_belong_to_another_question(page: Any, site: Site, tmp_path: Path) -> None:
    """After an error, another image or none, the earlier masks and downloads are gone; a result
    below a message would pass for its answer."""
    (tmp_path / "text.png").write_text("this is not a picture")
    other = photograph(tmp_path, "other.png", 5)

    def no_result() -> None:
        page.wait_for_selector("#result .empty")
        assert page.locator(".legend, .layers, .downloads a").count() == 0

    no_result()
    page.click(SEGMENT)
    page.get_by_text("There is no image yet").first.wait_for()
    answered(page, site, tmp_path)
    assert page.locator("#note .note").count() == 0
    segment(page, " ")
    page.get_by_text("There is no phrase").first.wait_for()
    no_result()
    answered(page, site, tmp_path)
    segment(page, *["left"] * 21)
    page.get_by_text("There are 21 phrases; at most 20 are allowed per request.").first.wait_for()
    no_result()
    answered(page, site, tmp_path)
    page.set_input_files("#photo input[type=file]", other)
    no_result()
    answered(page, site, tmp_path)
    page.set_input_files("#photo input[type=file]", tmp_path / "text.png")
    page.get_by_text("Cannot read the image").first.wait_for()
    no_result()
    page.wait_for_selector("#photo img", state="detached")
    answered(page, site, tmp_path)
    page.click("#photo button[aria-label*=emove], #photo button[aria-label*=lear]")
    no_result()
    answered(page, site, tmp_path)
    page.route("**/queue/join*", lambda route: route.abort())
    page.click(SEGMENT)
    no_result()
    assert not [file for file in site.uploads.rglob("*") if file.is_file()]


def test_limits_in_words(page: Any, site: Site, tmp_path: Path) -> None:
    """A file above the limit is not sent for minutes and then refused."""
    large = tmp_path / "large.png"
    large.write_bytes(photograph(tmp_path).read_bytes() + bytes(20_000_001))
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/upload?" in request.url else None)
    page.set_input_files("#photo input[type=file]", large)
    page.get_by_text("The image file is larger than 20 MB; send a smaller file.").first.wait_for()
    assert sent == []
    upload(page, photograph(tmp_path))
    assert page.locator("#note .note").count() == 0
    assert len(sent) == 1


def test_examples(page: Any, site: Site) -> None:
    """Examples work without an upload, and a reader of the screen hears what they are."""
    texts = [each.get_attribute("alt") for each in page.locator("#examples img").all()]
    assert len(texts) == 4
    assert all(re.fullmatch(r"example scene\d\.png: .+", text) for text in texts)
    page.click("#examples button >> nth=1")
    page.wait_for_selector("#photo img")
    assert len(page.input_value("#phrases textarea").splitlines()) >= 2
    page.wait_for_function("() => document.querySelector('#photo img').naturalWidth > 100")
    page.click(SEGMENT)
    page.wait_for_selector("#result .row >> nth=1")


def paste(page: Any, path: Path) -> None:
    """Ctrl+V with an image, wherever the focus is."""
    page.evaluate(
        """data => {
            const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
            transfer.items.add(new File([bytes], "image.png", {type: "image/png"}));
            const event = new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true});
            (document.activeElement ?? document.body).dispatchEvent(event);
        }""",
        base64.b64encode(path.read_bytes()).decode(),
    )


def test_paste(page: Any, site: Site, tmp_path: Path) -> None:
    """An image is pasted by Ctrl+V anywhere, and by the button; text is pasted as text."""
    page.wait_for_load_state("networkidle")
    page.locator("#phrases textarea").focus()
    paste(page, photograph(tmp_path))
    page.wait_for_selector("#photo img")
    segment(page, "left")
    page.wait_for_selector("#result .row")

    page.reload()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.address)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    page.wait_for_load_state("networkidle")
    page.evaluate(
        """async data => {
            const bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
            await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
        }""",
        base64.b64encode(photograph(tmp_path).read_bytes()).decode(),
    )
    page.click("#photo button[aria-label*=lipboard]")
    page.wait_for_selector("#photo img")

    page.evaluate("navigator.clipboard.writeText('red circle')")
    page.fill("#phrases textarea", "")
    page.locator("#phrases textarea").focus()
    page.keyboard.press("Control+V")
    page.wait_for_function("() => document.querySelector('#phrases textarea').value === 'red circle'")


def test_camera(page: Any, site: Site) -> None:
    """A picture of the camera is segmented like an upload."""
    page.context.grant_permissions(["camera"], origin=site.address)
    page.click("#photo button[aria-label*=ebcam], #photo button[aria-label*=amera]")
    page.locator("#photo .access-wrap, #photo [title*='webcam' i], #photo .wrap button").first.click()
    page.wait_for_selector("#photo video")
    page.wait_for_function("() => document.querySelector('#photo video').videoWidth > 0")
    page.click("#photo button[aria-label*=apture]")
    page.wait_for_selector("#photo img")
    segment(page, "left")
    page.wait_for_selector("#result .row")


def test_on_a_phone(page: Any, site: Site, tmp_path: Path) -> None:
    """The result comes right below the button, and nothing is wider than the screen."""
    page.set_viewport_size({"width": 390, "height": 844})
    answered(page, site, tmp_path, 2)
    boxes = [page.locator(each).first.bounding_box() for each in (SEGMENT, "#result .layers", ".legend", "#examples")]
    bottoms = [0, *(box["y"] + box["height"] for box in boxes)]
    assert all(box["y"] >= bottom for box, bottom in zip(boxes, bottoms, strict=False))
    assert boxes[1]["y"] - bottoms[1] < 60
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)


def test_drag_and_drop(page: Any, site: Site, tmp_path: Path) -> None:
    data = base64.b64encode(photograph(tmp_path).read_bytes()).decode()
    page.wait_for_load_state("networkidle")
    page.evaluate(
        """data => {
            const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), each => each.charCodeAt(0));
            transfer.items.add(new File([bytes], "cut <i>.png", {type: "image/png"}));
            const zone = document.querySelector("#photo input[type=file]").closest("button, label, div");
            for (const name of ["dragenter", "dragover", "drop"])
                zone.dispatchEvent(new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        data,
    )
    page.wait_for_selector("#photo img")


def test_behind_a_proxy(page: Any, site: Site, tmp_path: Path) -> None:
    """A proxy with TLS has another address than the server knows of; with the server's, a browser
    would refuse to send the image."""

    def replaced(route: Any) -> None:
        response = route.fetch()
        route.fulfill(
            response=response,
            body=response.text().replace(f'"root":"{site.address}"', '"root":"https://elsewhere.invalid"'),
        )

    page.route(f"{site.address}/", replaced)
    page.reload()
    page.wait_for_selector("#photo input[type=file]", state="attached")
    answered(page, site, tmp_path)
    page.wait_for_function("() => document.querySelector('#photo img').naturalWidth > 100")


def test_the_dark_mode(page: Any, site: Site) -> None:
    """Colours must follow the dark mode of the system."""
    page.emulate_media(color_scheme="dark")
    page.reload()
    page.wait_for_selector("#result .empty")
    page.wait_for_selector("body.dark")
    colour = page.locator("#result .empty").evaluate("element => getComputedStyle(element).backgroundColor")
    assert max(int(each) for each in re.findall("[0-9]+", colour)[:3]) < 100


LOW_CONTRAST = """() => {
    const numbers = colour => (([r, g, b, a = 1]) => [r, g, b, a])(colour.match(/[\\d.]+/g).map(Number));
    const over = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3]));
    const luminance = colour => colour.map(each => each / 255)
        .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => element
        ? over(numbers(getComputedStyle(element).backgroundColor), behind(element.parentElement)) : [255, 255, 255];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let text; text = texts.nextNode();) {
        const element = text.parentElement, back = behind(element);
        if (!text.textContent.trim() || !element.checkVisibility() || element.matches("script, style")) continue;
        const [low, high] = [over(numbers(getComputedStyle(element).color), back), back].map(luminance).sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) found.push(text.textContent.trim());
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_focus(page: Any, site: Site, tmp_path: Path, scheme: str) -> None:
    """Text has WCAG's contrast of 4.5, and each control shows that it has the keyboard's focus."""
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.reload()
    page.wait_for_selector("#result .empty")
    assert page.evaluate(LOW_CONTRAST) == []
    upload(page, photograph(tmp_path))
    segment(page, "circle", "the purple elephant at the top of the hill")
    page.wait_for_selector("#result .legend")
    page.mouse.move(1, 1)
    page.wait_for_timeout(500)  # of transitions
    assert page.evaluate(LOW_CONTRAST) == []
    page.locator("#phrases textarea").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
