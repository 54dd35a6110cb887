"""The web page (Gradio), with the API beside it.

Gradio only draws the page in the browser. Its routes for uploads, files, function calls and queues
accept paths and URLs from clients, so they are not served; scripts of the page send images and
requests to the routes of this module. Images and predictions stay in memory, and no path from a
client reaches the file system.
"""

import base64
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
from pydantic import BaseModel, ConfigDict, ValidationError

from dcris.data.images import read_image
from dcris.data.photographs import example_photographs
from dcris.data.scenes import make_scene
from dcris.errors import DcrisError
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.inference.web.api import make_api, parse_number
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
from dcris.utils.drawing import cell, jpeg_bytes, mask_cell, overlay

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

_templates = Environment(
    loader=PackageLoader("dcris.inference.web"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
)
_templates.filters["percent"] = lambda share: f"{share:.0%}"

Example = tuple[NDArray[np.uint8], str, tuple[str, ...]]
"""Pixels, file name, and phrases to try."""


class PageRequest(BaseModel):
    """A request of the page about the image of its session."""

    model_config = ConfigDict(extra="forbid")

    session: str | None = None
    text: str = ""
    """Phrases, one per line."""
    threshold: float = 0.5
    adapters: str | None = None
    number: int = 0
    """Number of an example."""


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


def make_app(service: InferenceService, examples: Sequence[Path] | None = None) -> Application:
    """Return the application that `dcris web` serves: the page, and the API of `dcris serve`.

    Args:
        service: the model.
        examples: example images; by default generated scenes for a model that was trained on those,
            else photographs.

    Raises:
        DcrisError: an example is not an image.
    """
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    limits, default_threshold = service.limits, service.segmenter.protocol.threshold
    example_images = _read_examples(service.segmenter, examples)
    sessions, closing = Sessions(limits), threading.Event()
    threading.Thread(target=_delete_expired_sessions, args=(sessions, closing), daemon=True).start()

    async def view(name: str, threshold: float, **fields: str) -> Response:
        """The parts of the page for a session: its image with masks, legend and downloads."""

        def render() -> dict[str, str]:
            session = sessions.get(name)
            predictions = session.at_threshold(threshold)
            return {
                "session": name,
                "image": _render_image(session, predictions),
                "legend": _render_legend(predictions),
                "downloads": _render("downloads", _DOWNLOADS, name, f"{threshold:g}") if predictions else "",
            }

        return JSONResponse({**await service.render(render), **fields})

    async def upload_image(request: "Request") -> Response:
        data, query = await request.body(), request.query_params
        pixels = await service.render(lambda: service.read_image(data))
        sessions.delete(query.get("old"))
        return await view(sessions.put(Session(pixels, query.get("name", ""))), default_threshold)

    async def choose_example(request: "Request") -> Response:
        body = await _parse_request(request)
        if not 0 <= body.number < len(example_images):
            raise DcrisError(f"there is no example {body.number}")
        pixels, file_name, phrases = example_images[body.number]
        sessions.delete(body.session)
        fields = {"text": "\n".join(phrases)} if phrases else {}
        return await view(sessions.put(Session(pixels, file_name)), default_threshold, **fields)

    async def segment_session(request: "Request") -> Response:
        body = await _parse_request(request)
        if body.session is None:
            raise DcrisError("there is no image yet; drop one, or choose an example")
        session = sessions.get(body.session)
        phrases = service.parse_phrases(body.text.splitlines())
        session.predictions = await service.predict(session.pixels, phrases, body.adapters)
        sessions.put(session, body.session)  # its size has grown
        return await view(body.session, body.threshold)

    async def change_threshold(request: "Request") -> Response:
        body = await _parse_request(request)
        return await view(body.session or "", body.threshold)

    async def download(request: "Request") -> Response:
        session, file = sessions.get(request.path_params["name"]), request.path_params["file"]
        threshold = parse_number("threshold", request.query_params.get("threshold", "")) or 0.0
        headers = {"Content-Disposition": f'attachment; filename="{quote(file)}"'}

        def pack() -> Response:
            predictions = session.at_threshold(threshold)
            if file == "masks.zip":
                return Response(masks_zip(predictions, session.stem), media_type="application/zip", headers=headers)
            return JSONResponse(coco_results(predictions, session.name), headers=headers)

        if file not in _DOWNLOADS:
            raise NotFoundError(f"there is no file {file}; there are {' and '.join(_DOWNLOADS)}")
        return await service.render(pack)

    gradio_app, names = _gradio_app(make_page(limits, service.segmenter, example_images))

    async def page(scope: Any, receive: Any, send: Any) -> None:
        """Serve Gradio's page and its files by their exact names.

        Gradio gets nothing else of the request.
        """
        if scope["method"] not in ("GET", "HEAD") or scope["path"] not in names:
            raise HTTPException(404)
        # Without Accept-Encoding: Gradio would compress megabytes for each request, which blocks
        # all other requests.
        headers = [each for each in scope["headers"] if each[0] in (b"host", b"if-none-match")]
        await gradio_app({**scope, "query_string": b"", "headers": headers}, receive, send)

    def close() -> None:
        closing.set()
        service.close()

    api = make_api(service)
    with_image = {"/page/image": upload_image}
    without = {
        "/page/example": choose_example,
        "/page/segment": segment_session,
        "/page/threshold": change_threshold,
    }
    return Application(
        [
            *api.routes,
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in (with_image | without).items()),
            Route("/download/{name}/{file}", download),
        ],
        {**api.bodies, **dict.fromkeys(with_image, limits.upload), **dict.fromkeys(without, limits.fields)},
        fallback=page,
        close=close,
    )


def make_page(limits: Limits, segmenter: Segmenter, examples: Sequence[Example]) -> "gradio.Blocks":
    """Build the page.

    Every event runs a script that posts to a route of this module; Gradio calls no function.
    """
    import gradio

    with gradio.Blocks(title="dcris", analytics_enabled=False, fill_width=False) as page:
        gradio.Markdown("## dcris: segment by phrase")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.HTML(
                    html_template=_file("drop.html"),
                    js_on_load=_file("drop.js"),
                    size=f"{limits.upload // 10**6}",
                    elem_id="photo",
                )
                text = gradio.Textbox(
                    label=f"Phrases, one per line (up to {limits.phrases})",
                    placeholder="left slice\nthe red cup",
                    lines=4,
                    max_lines=limits.phrases,
                    elem_id="phrases",
                )
                names = segmenter.adapters
                adapters = gradio.Dropdown(
                    list(names), value=names[0], label="Adapters", visible=len(names) > 1, elem_id="adapters"
                )
                button = gradio.Button("Segment", variant="primary", elem_id="segment")
                if examples:
                    choice = gradio.Dataset(
                        components=[gradio.HTML(visible=False)],
                        samples=[
                            [_render("thumbnail", _data_uri(cell(pixels, _THUMBNAIL_SIDE)))] for pixels, *_ in examples
                        ],
                        label="Examples",
                        type="index",
                        layout="gallery",
                        elem_id="examples",
                    )
            with gradio.Column(scale=5, min_width=420):
                # Handlebars escapes the value.
                note = gradio.HTML(
                    "",
                    html_template='{{#if value}}<div class="note" role="alert">{{value}}</div>{{/if}}',
                    elem_id="note",
                )
                image = gradio.HTML(_render("image", ""), elem_classes="shown", elem_id="picture")
                slider = gradio.Slider(
                    0.05,
                    0.95,
                    value=segmenter.protocol.threshold,
                    step=0.01,
                    label="Threshold: probability above which a pixel belongs to the mask",
                    elem_id="threshold",
                )
                legend = gradio.HTML("", elem_id="legend")
                downloads = gradio.HTML("", elem_id="downloads")
        views: dict[str, Any] = {"fn": None, "outputs": [note, image, legend, downloads, text]}
        upload.upload(js="() => dcris.upload()", **views)
        button.click(
            js="(text, threshold, adapters) => dcris.post('page/segment', {text, threshold, adapters})",
            inputs=[text, slider, adapters],
            **views,
        )
        slider.change(
            js="(threshold) => dcris.session ? dcris.post('page/threshold', {threshold}) : Array(5).fill(dcris.same)",
            inputs=[slider],
            trigger_mode="always_last",
            **views,
        )
        if examples:
            choice.click(js="(number) => dcris.post('page/example', {number})", inputs=[choice], **views)
    return page


def _gradio_app(page: "gradio.Blocks") -> tuple["ASGIApp", frozenset[str]]:
    """Return Gradio's application and its served paths: the page, its scripts and styles."""
    import gradio
    from fastapi import FastAPI
    from gradio.routes import BUILD_PATH_LIB, STATIC_PATH_LIB

    theme = gradio.themes.Default(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=_file("page.css"),
        head=f"<script>{_file('page.js')}</script>",
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
    )
    names = {"/", "/theme.css", "/favicon.ico"}
    for prefix, folder in (("/assets", Path(BUILD_PATH_LIB)), ("/static", Path(STATIC_PATH_LIB))):
        names |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    return app, frozenset(names)


def _file(name: str) -> str:
    return resources.files("dcris.inference.web").joinpath("templates", name).read_text(encoding="utf-8")


async def _parse_request(request: "Request") -> PageRequest:
    try:
        return PageRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise DcrisError("the request of the page is malformed; reload the page") from error


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


def _render_image(session: Session, predictions: Sequence[Prediction]) -> str:
    pixels = cell(session.pixels, _IMAGE_SIDE)
    for number, prediction in enumerate(predictions):
        pixels = overlay(pixels, mask_cell(prediction.mask, _IMAGE_SIDE), colour_of(number))
    return _render("image", _data_uri(pixels))


def _render_legend(predictions: Sequence[Prediction]) -> str:
    colours = ("rgb({}, {}, {})".format(*colour_of(number)) for number in range(len(predictions)))
    return _render("legend", list(zip(predictions, colours, strict=True)))


def _delete_expired_sessions(sessions: Sessions, closing: threading.Event) -> None:
    while not closing.wait(_CLEANUP_INTERVAL):
        sessions.delete_expired()
