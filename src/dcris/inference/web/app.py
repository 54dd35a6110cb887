"""The web page (Gradio), with the API beside it.

Gradio describes the page and draws it in the browser. Its server's routes for uploads, files and
events accept paths and URLs from clients, so they are not served: `events.py` answers the same
requests in memory. Images and predictions stay in memory, and no path from a client reaches the
file system.
"""

import base64
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import validate_call

from dcris.data.images import read_image
from dcris.data.photographs import example_photographs
from dcris.data.scenes import make_scene
from dcris.errors import DcrisError
from dcris.inference.prediction import LEAST_PRESENCE, Prediction
from dcris.inference.segmenter import Segmenter
from dcris.inference.web.api import Query, answer, make_api, parse_number
from dcris.inference.web.events import File, event_routes
from dcris.inference.web.server import Application
from dcris.inference.web.service import (
    InferenceService,
    Limits,
    NotFoundError,
    Session,
    Sessions,
    coco_results,
    masks_zip,
)
from dcris.utils.annotate import colour_of
from dcris.utils.drawing import cell, jpeg_bytes, mask_cell, mask_layer, png_bytes

if TYPE_CHECKING:
    import gradio
    from starlette.requests import Request
    from starlette.types import ASGIApp

_IMAGE_SIDE = 960
"""Longer side in pixels of the image on the page."""

_THUMBNAIL_SIDE = 132

_CLEANUP_INTERVAL = 60.0
"""Seconds between two deletions of expired sessions."""

_DOWNLOADS = {"masks.zip": "Masks (zip of PNGs)", "coco.json": "COCO JSON"}

_LEGIBLE = {
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "body_text_color_subdued": "*neutral_500",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "color_accent": "*primary_600",
    "slider_color": "*primary_600",
}
"""Colours of Gradio's theme that had less than WCAG's contrast: 4.5 for text, 3 for controls."""

_templates = Environment(
    loader=PackageLoader("dcris.inference.web"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
)
_templates.filters["percent"] = lambda share: f"{share:.0%}"

Example = tuple[NDArray[np.uint8], str, tuple[str, ...]]
"""Pixels, file name, and phrases to try."""


_UNCHANGED = {"__type__": "update"}
"""What leaves a component of Gradio as it is."""


@contextmanager
def gradio_settings() -> Iterator[None]:
    """Context in which the page is made and served. Raises DcrisError if Gradio is not
    installed."""
    with TemporaryDirectory(prefix="dcris-web-") as scratch:
        # Gradio reads both when it is imported, makes a folder there and leaves it.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise DcrisError(f"the web page needs the package {error.name}: pip install 'dcris[web]'") from error
        yield


def make_app(service: InferenceService, examples: Sequence[Path] | None = None, title: str = "") -> Application:
    """Return the application that `dcris web` serves: the page, and the API of `dcris serve`.

    Args:
        service: the model.
        examples: example images; by default generated scenes for a model that was trained on those,
            else photographs.
        title: name of the model; by default that of its recipe.

    Raises:
        DcrisError: an example is not an image.
    """
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limits = service.limits
    sessions, closing = Sessions(limits), threading.Event()
    threading.Thread(target=_delete_expired_sessions, args=(sessions, closing), daemon=True).start()
    page = Page(service, sessions, _read_examples(service.segmenter, examples), title)
    blocks = page.blocks()
    # Gradio calls none of the functions: the routes here do, with the arguments as they arrive.
    functions = {number: (each.fn, len(each.inputs)) for number, each in blocks.fns.items() if each.fn is not None}
    events = event_routes(service, sessions, functions, lambda session: jpeg_bytes(page.shown(session)))

    async def download(request: "Request") -> Response:
        session, file = sessions.get(request.path_params["name"]), request.path_params["file"]
        threshold = parse_number("threshold", request.query_params.get("threshold", "")) or 0.0
        min_score = parse_number("min_score", request.query_params.get("min_score"))
        headers = {"Content-Disposition": f'attachment; filename="{quote(file)}"'}

        def pack() -> Response:
            predictions = session.at_threshold(threshold, min_score)
            if file == "masks.zip":
                return Response(masks_zip(predictions, session.stem), media_type="application/zip", headers=headers)
            return JSONResponse(coco_results(predictions, session.name), headers=headers)

        if file not in _DOWNLOADS:
            raise NotFoundError(f"there is no file {file}; there are {' and '.join(_DOWNLOADS)}")
        return await service.render(pack)

    async def favicon(request: "Request") -> Response:
        return Response(_file("favicon.svg"), media_type="image/svg+xml")

    gradio_app, names = _gradio_app(blocks, limits)
    script = f"<script>{_file('page.js')}dcris.limit = {limits.upload};</script>".encode()

    async def gradio_files(scope: Any, receive: Any, send: Any) -> None:
        """Serve Gradio's page, its settings and its files by their exact names.

        Gradio gets nothing else of the request.
        """
        if scope["method"] not in ("GET", "HEAD") or scope["path"] not in names:
            raise HTTPException(404)
        # Without Accept-Encoding: Gradio would compress megabytes for each request, which blocks
        # all other requests.
        headers = [each for each in scope["headers"] if each[0] in (b"host", b"if-none-match")]
        asked = {**scope, "query_string": b"", "headers": headers}
        if scope["path"] != "/":
            await gradio_app(asked, receive, send)
            return
        # The scripts of Gradio's option `head` run too late: they have to come before its own.
        parts: list[bytes] = []

        async def keep(message: Any) -> None:
            parts.append(message.get("body", b""))

        await gradio_app({**asked, "method": "GET"}, receive, keep)
        html = b"".join(parts).replace(b"</head>", script + b"</head>", 1)
        await Response(html, media_type="text/html")(scope, receive, send)

    def close() -> None:
        closing.set()
        service.close()

    api = make_api(service)
    return Application(
        [
            *api.routes,
            *events.routes,
            Route("/download/{name}/{file}", download),
            Route("/favicon.ico", favicon),
        ],
        {**api.bodies, **events.bodies},
        fallback=gradio_files,
        close=close,
    )


class Page:
    """The page in the browser: what it shows, and what its events do.

    The arguments of the events are those of the browser, and checked by pydantic.
    """

    def __init__(
        self, service: InferenceService, sessions: Sessions, examples: Sequence[Example], title: str = ""
    ) -> None:
        self._service, self._sessions, self._examples = service, sessions, examples
        self._title = title or service.segmenter.config.recipe

    def blocks(self) -> "gradio.Blocks":
        """Build the page with Gradio's components."""
        import gradio

        limits, segmenter = self._service.limits, self._service.segmenter
        kinds = self._kinds_of_score()
        with gradio.Blocks(title="dcris", analytics_enabled=False, fill_width=False) as blocks:
            gradio.api(self.api, api_name="segment")  # first: later events of this name get a number
            gradio.Markdown("## dcris: segment by phrase")
            gradio.HTML(_render("about", self._title, kinds), elem_classes="about")
            with gradio.Row(equal_height=False):
                with gradio.Column(scale=2, min_width=300):
                    image = gradio.Image(
                        label=f"Image (up to {limits.upload / 1e6:g} MB)",
                        sources=["upload", "clipboard", "webcam"],
                        type="filepath",
                        height=240,
                        buttons=["fullscreen"],
                        elem_id="photo",
                    )
                    text = gradio.Textbox(
                        label=f"Phrases, one per line (up to {limits.phrases})",
                        info="Shift+Enter segments",
                        placeholder="left dog\nbicycle",
                        lines=3,
                        max_lines=limits.phrases,
                        elem_id="phrases",
                    )
                    names = segmenter.adapters
                    adapters = gradio.Dropdown(
                        list(names), value=names[0], label="Adapters", visible=len(names) > 1, elem_id="adapters"
                    )
                    button = gradio.Button("Segment", variant="primary", elem_id="segment")
                with gradio.Column(scale=5, min_width=320):
                    # Handlebars escapes the value.
                    note = gradio.HTML(
                        "",
                        html_template='{{#if value}}<div class="note" role="alert">{{value}}</div>{{/if}}',
                        elem_id="note",
                    )
                    result = gradio.HTML(_render("empty"), js_on_load=_file("result.js"), elem_id="result")
                    slider = gradio.Slider(
                        0.05,
                        0.95,
                        value=segmenter.protocol.threshold,
                        step=0.01,
                        label="Threshold: probability above which a pixel belongs to the mask",
                        elem_id="threshold",
                    )
                    sliders = [slider]
                    if True in kinds:  # some set has a presence head
                        sliders.append(
                            gradio.Slider(
                                0,
                                0.95,
                                value=LEAST_PRESENCE,
                                step=0.01,
                                label="Lowest score: below it, the object counts as not found",
                                elem_id="min_score",
                            )
                        )
            done = [note, result]
            # What is shown answers another question: it goes before the server answers, or does
            # not. Gradio runs the events of a trigger one after the other, in this order.
            clear: dict[str, Any] = {"js": f"() => ['', {json.dumps(_render('empty'))}]", "outputs": done}

            def on(trigger: Any, function: Any, inputs: list[Any], outputs: list[Any]) -> None:
                trigger(None, **clear, api_visibility="private")
                trigger(function, inputs, outputs, api_visibility="private", show_progress_on=[result])

            on(image.input, self.open_image, [image], [note, image, result])
            for trigger in (button.click, text.submit):
                on(trigger, self.segment, [image, text, slider, adapters, *sliders[1:]], done)
            for moved in sliders:
                change = moved.change(
                    self.change_threshold,
                    [image, *sliders],
                    done,
                    api_visibility="private",
                    trigger_mode="always_last",
                    show_progress="hidden",
                )
                change.failure(None, **clear, api_visibility="private")
            if self._examples:
                choice = gradio.Dataset(
                    components=[gradio.HTML(visible=False)],
                    samples=[[self._thumbnail(*example)] for example in self._examples],
                    label="Examples",
                    type="index",
                    layout="gallery",
                    elem_id="examples",
                )
                on(choice.click, self.choose, [choice], [note, image, text, result])
        return blocks

    @validate_call
    async def open_image(self, image: File | None) -> tuple[Any, ...]:
        """Answer to an image that was added or removed: earlier results are gone."""
        if image is None:
            # Gradio sends this when the page opens, too; an image may have come since.
            return "", _UNCHANGED, _render("empty")
        try:
            session = self._sessions.get(image.path)
            await self._service.render(lambda: self._pixels(session))
        except DcrisError as error:
            return _sentence(error), None, _render("empty")
        return "", _UNCHANGED, _render("empty")

    @validate_call
    async def choose(self, number: int) -> tuple[Any, ...]:
        """Answer to the choice of an example."""
        pixels, file_name, phrases = self._examples[number % len(self._examples)]
        name = self._sessions.put(Session(pixels, file_name))
        image = {
            "path": name,
            "url": f"gradio_api/file={name}",
            "orig_name": file_name,
            "meta": {"_type": "gradio.FileData"},
        }
        return "", image, "\n".join(phrases) if phrases else _UNCHANGED, _render("empty")

    @validate_call
    async def segment(
        self, image: File | None, text: str, threshold: float, adapters: str | None, min_score: float | None = None
    ) -> tuple[str, str]:
        """Answer to the button."""
        try:
            if image is None:
                raise DcrisError("there is no image yet; add one, or choose an example")
            session = self._sessions.get(image.path)
            phrases = self._service.parse_phrases(text.splitlines())
            pixels = await self._service.render(lambda: self._pixels(session))
            session.predictions = await self._service.predict(pixels, phrases, adapters)
            session.answer += 1
            self._sessions.put(session, image.path)  # its size has grown
            return "", await self._result(image.path, threshold, min_score)
        except DcrisError as error:
            return _sentence(error), _render("empty")

    @validate_call
    async def change_threshold(
        self, image: File | None, threshold: float, min_score: float | None = None
    ) -> tuple[Any, ...]:
        """Answer to the sliders."""
        try:
            if image is None or not self._sessions.get(image.path).predictions:
                return _UNCHANGED, _UNCHANGED
            return "", await self._result(image.path, threshold, min_score)
        except DcrisError as error:
            return _sentence(error), _render("empty")

    @validate_call
    async def api(
        self,
        image: File,
        phrases: list[str],
        threshold: float | None = None,
        min_score: float | None = None,
        min_area: int = 0,
        adapters: str | None = None,
        masks: bool = False,
    ) -> list[dict[str, Any]]:
        """Segment an image by phrases, as POST /api/segment does."""
        session = self._sessions.get(image.path)
        pixels = await self._service.render(lambda: self._pixels(session))
        found = self._service.parse_phrases(phrases)
        query = Query(found, threshold, min_score, min_area, adapters, session.name, masks)
        return await answer(self._service, pixels, query)

    def _kinds_of_score(self) -> dict[bool, list[str]]:
        """Return the adapter sets by whether their score is a probability of presence."""
        kinds: dict[bool, list[str]] = {}
        for name in self._service.segmenter.adapters:
            kinds.setdefault(self._service.segmenter.has_presence(name), []).append(name)
        return kinds

    def shown(self, session: Session) -> NDArray[np.uint8]:
        """Return the image of a session in the size of the page."""
        return cell(self._pixels(session), _IMAGE_SIDE)

    def _pixels(self, session: Session) -> NDArray[np.uint8]:
        """Decode the image of a session on first use. Raises DcrisError if that is not possible."""
        return self._sessions.pixels(session, self._service.read_image)

    async def _result(self, name: str, threshold: float, min_score: float | None) -> str:
        """Render the predictions for a session."""
        session = self._sessions.get(name)
        query = f"threshold={threshold:g}" + ("" if min_score is None else f"&min_score={min_score:g}")

        def render() -> str:
            rows, photo = _rows(session.at_threshold(threshold, min_score)), _data_uri(self.shown(session))
            large_first = sorted(rows, key=lambda row: -row[1].area)  # small ones on top, or they would be covered
            return _render("result", f"{name}.{session.answer}", photo, rows, large_first, _DOWNLOADS, name, query)

        return await self._service.render(render)

    @staticmethod
    def _thumbnail(pixels: NDArray[np.uint8], file_name: str, phrases: tuple[str, ...]) -> str:
        alt = f"example {file_name}" + (f": {', '.join(phrases)}" if phrases else "")
        return _render("thumbnail", _data_uri(cell(pixels, _THUMBNAIL_SIDE)), alt)


def _gradio_app(page: "gradio.Blocks", limits: Limits) -> tuple["ASGIApp", frozenset[str]]:
    """Return Gradio's application and its served paths: the page, its scripts and styles, and the
    description of its API."""
    import gradio
    from fastapi import FastAPI
    from gradio.routes import BUILD_PATH_LIB, STATIC_PATH_LIB

    theme = gradio.themes.Default(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(**_LEGIBLE)
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=_file("page.css"),
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        max_file_size=limits.upload,
    )
    names = {"/", "/theme.css", "/config", "/gradio_api/info"}
    for prefix, folder in (("/assets", Path(BUILD_PATH_LIB)), ("/static", Path(STATIC_PATH_LIB))):
        names |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    return app, frozenset(names)


def _file(name: str) -> str:
    return resources.files("dcris.inference.web").joinpath("templates", name).read_text(encoding="utf-8")


def _read_examples(segmenter: Segmenter, paths: Sequence[Path] | None) -> list[Example]:
    if paths is not None:
        return [(read_image(path), path.name, ()) for path in paths]
    if segmenter.config.data.dataset != "scenes":
        return [(read_image(path), path.name, phrases) for path, phrases in example_photographs()]
    found: list[Example] = []
    for number in range(4):
        scene = make_scene(np.random.default_rng(number), segmenter.config.data.image_size)
        phrases = tuple(each[0].text for each in scene.phrases.values())[:3]
        found.append((scene.image, f"scene{number + 1}.png", phrases))
    return found


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(pixels)).decode()}"


def _render(part: str, *values: Any) -> str:
    """Render one macro of templates/results.html."""
    return str(getattr(_templates.get_template("results.html").module, part)(*values))


def _rows(predictions: Sequence[Prediction]) -> list[tuple[int, Prediction, str, str]]:
    """Return what the legend and the layers show: number, prediction, its colour, and its mask as
    an image, which is empty if the mask is."""
    rows = []
    for number, prediction in enumerate(predictions):
        colour, layer = colour_of(number), ""
        if prediction.box is not None:
            drawn = png_bytes(mask_layer(mask_cell(prediction.mask, _IMAGE_SIDE), colour))
            layer = f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
        rows.append((number, prediction, "rgb({}, {}, {})".format(*colour), layer))
    return rows


def _sentence(error: DcrisError) -> str:
    """Return the message of an error as a sentence of the page."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def _delete_expired_sessions(sessions: Sessions, closing: threading.Event) -> None:
    while not closing.wait(_CLEANUP_INTERVAL):
        sessions.delete_expired()
