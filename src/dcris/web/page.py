"""The page that people see (Gradio) and the API beside it, and the server for both.

Pictures, legends and downloads come from memory: an upload is read and deleted at once, and nothing else is ever a file.
"""

import asyncio
import base64
import html
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.scenes import make_scene
from dcris.drawing import COLOURS, cell, jpeg_bytes, mask_cell, overlay
from dcris.errors import DcrisError
from dcris.prediction import Prediction
from dcris.segmenter import Segmenter
from dcris.web.desk import BusyError, Desk, Limits, TooLargeError, Visit, Visits, coco_results, masks_zip

if TYPE_CHECKING:
    import gradio
    from fastapi import FastAPI

_SHOWN = 960
"""Longer side of the picture on the page."""

_THUMBNAIL = 132

_SWEEP = 60.0
"""Seconds between looks for what can be forgotten."""

_CSS = """
footer { display: none !important }
.shown img { width: 100%; max-height: 66vh; object-fit: contain; border-radius: 6px; background: #f3f4f6; display: block }
.shown .empty { height: 46vh; border-radius: 6px; background: #f3f4f6; color: #6b7280; display: grid; place-items: center }
.legend { display: grid; gap: 6px }
.legend .row { display: grid; grid-template-columns: 18px 1fr 110px 44px; gap: 10px; align-items: center; font-size: 15px }
.legend .swatch { width: 18px; height: 18px; border-radius: 4px }
.legend .bar { height: 8px; border-radius: 4px; background: #e5e7eb; overflow: hidden }
.legend .bar div { height: 100% }
.legend .number { text-align: right; font-variant-numeric: tabular-nums }
.legend .none { grid-column: 3 / 5; color: #6b7280; text-align: right }
.legend .phrase { overflow-wrap: anywhere }
.downloads { display: flex; gap: 10px; flex-wrap: wrap }
.downloads a { padding: 7px 14px; border: 1px solid #d1d5db; border-radius: 6px; text-decoration: none; color: inherit }
.downloads a:hover { background: #f3f4f6 }
#note:not(:has(.note)) { display: none }
.note { padding: 9px 14px; border-radius: 6px; background: #fef3c7; color: #78350f }
.dark .shown img, .dark .shown .empty, .dark .downloads a:hover { background: #1f2937 }
"""

# The page is whole without any other server; this keeps every browser to that, whatever a later Gradio would like to fetch.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

Example = tuple[NDArray[np.uint8], str, tuple[str, ...]]
"""Pixels, a name, and phrases to try."""


def serve(
    segmenter: Callable[[], Segmenter],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    examples: Sequence[Path] | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        segmenter: loads the model; called once the port is known to be free.
        host, port: where to listen; 0 is any free port.
        examples: images to try; by default generated scenes, for a model that knows those.
        limits: what people may ask.
        ready: called with the page's address once it answers.

    Raises DcrisError where the extra `web` is missing, the port cannot be had, or an example is no image.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise DcrisError(
            f"the web page needs packages that are not here ({error.name}): pip install 'dcris[web]'"
        ) from error
    with _listen(host, port) as listening, _uploads() as folder:
        desk = Desk(segmenter(), limits)
        visits = Visits(desk.limits)
        app = make_app(desk, visits, examples)
        port = listening.getsockname()[1]
        # uvicorn ends by the signal that it got; the folder of uploads has to go first.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2, access_log=False)
        server = uvicorn.Server(config)
        threading.Thread(target=_sweep, args=(folder, visits), daemon=True).start()
        threading.Thread(target=_tell, args=(server, ready, f"http://{_shown_host(host)}:{port}"), daemon=True).start()
        try:
            server.run(sockets=[listening])
        finally:
            server.should_exit = True
            desk.close()


def make_app(desk: Desk, visits: Visits, examples: Sequence[Path] | None = None) -> "FastAPI":
    """The page at / and the API at /api/segment. Uploads go where GRADIO_TEMP_DIR says, and are deleted as they are read."""
    import gradio
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse

    app = FastAPI(title="dcris", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")  # type: ignore[untyped-decorator]
    async def policy(request: Request, proceed: Any) -> Any:
        response = await proceed(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.post("/api/segment")  # type: ignore[untyped-decorator]
    async def segment(request: Request) -> Response:
        try:
            answers = await _answer(desk, request)
        except DcrisError as error:
            status = 503 if isinstance(error, BusyError) else 413 if isinstance(error, TooLargeError) else 400
            return JSONResponse({"error": str(error)}, status)
        return JSONResponse(coco_results(answers, request.query_params.get("name", "")))

    @app.get("/download/{name}/{file}")  # type: ignore[untyped-decorator]
    def download(name: str, file: str, threshold: float) -> Response:
        try:
            visit = visits.get(name)
        except DcrisError as error:
            return JSONResponse({"error": str(error)}, 404)
        try:
            answers = visit.at(threshold)
        except DcrisError as error:
            return JSONResponse({"error": str(error)}, 400)
        if file == "masks.zip":
            content, kind = masks_zip(answers, Path(visit.name).stem), "application/zip"
        elif file == "coco.json":
            return JSONResponse(coco_results(answers, visit.name), headers=_attachment(file))
        else:
            return JSONResponse({"error": f"there is no {file}; there are masks.zip and coco.json"}, 404)
        return Response(content, media_type=kind, headers=_attachment(file))

    theme = gradio.themes.Default(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    page = make_page(desk, visits, _examples(desk.segmenter, examples))
    return gradio.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css=_CSS,
        max_file_size=desk.limits.upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        footer_links=[],
    )


def make_page(desk: Desk, visits: Visits, examples: Sequence[Example]) -> "gradio.Blocks":
    """The page itself. A browser's session holds the name of a visit, and the visit holds everything else."""
    import gradio

    limits, protocol = desk.limits, desk.segmenter.protocol
    nobody = _shown(None, [])

    def shown(name: str, threshold: float) -> tuple[str, str, str]:
        visit = visits.get(name)
        answers = visit.at(threshold)
        return _shown(visit, answers), _legend(answers), _downloads(name, threshold) if answers else ""

    def said(error: DcrisError) -> tuple[Any, ...]:
        text = str(error)
        return f'<div class="note">{html.escape(text[:1].upper() + text[1:])}</div>', *_skipped(3)

    # Messages are a part of the page: Gradio's own are lost where its queue is not used, and cover the picture.
    def upload(path: str | None, old: str | None) -> tuple[Any, ...]:
        if path is None:
            return gradio.skip(), old, *_skipped(4)
        try:
            name = visits.put(Visit(desk.photograph(_take(Path(path), desk)), Path(path).name))
        except DcrisError as error:
            return None, old, *said(error)
        visits.drop(old)
        return None, name, "", *shown(name, protocol.threshold)

    def example(number: int, old: str | None) -> tuple[Any, ...]:
        pixels, file_name, phrases = examples[number]
        visits.drop(old)
        name = visits.put(Visit(pixels, file_name))
        return name, "\n".join(phrases) or gradio.skip(), "", *shown(name, protocol.threshold)

    async def segment(
        name: str | None,
        text: str,
        threshold: float,
        adapters: str | None,
        progress: Any = gradio.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        try:
            if name is None:
                raise DcrisError("there is no photograph yet; drop one, or choose an example")
            visit = visits.get(name)
            phrases = desk.phrases(text.splitlines())
            progress(0.1, desc=f"Looking for {len(phrases)} {'phrase' if len(phrases) == 1 else 'phrases'}")
            visit.answers = await desk.ask(visit.pixels, phrases, adapters)
            visits.put(visit, name)  # it is larger now
            return "", *await asyncio.to_thread(shown, name, threshold)
        except DcrisError as error:
            return said(error)

    def move(name: str | None, threshold: float) -> tuple[Any, ...]:
        if name is None:
            return _skipped(4)
        try:
            return "", *shown(name, threshold)
        except DcrisError as error:
            return said(error)

    with gradio.Blocks(title="dcris", analytics_enabled=False, fill_width=False) as page:
        gradio.Markdown("## dcris: segment by phrase")
        visit = gradio.State(None, delete_callback=visits.drop, time_to_live=limits.kept_seconds)
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=300):
                file = gradio.File(label=f"Photograph (up to {limits.upload // 10**6} MB)", height=165, elem_id="photo")
                # Its own way of handing a path over leaves an empty file behind each time.
                file.preprocess = lambda payload: payload and payload.path
                text = gradio.Textbox(
                    label=f"Phrases, one a line (up to {limits.phrases})",
                    placeholder="left slice\nthe red cup",
                    lines=4,
                    max_lines=limits.phrases,
                    elem_id="phrases",
                )
                names = desk.segmenter.adapters
                adapters = gradio.Dropdown(
                    list(names), value=names[0], label="Adapters", visible=len(names) > 1, elem_id="adapters"
                )
                button = gradio.Button("Segment", variant="primary", elem_id="segment")
                if examples:
                    choice = gradio.Dataset(
                        components=[gradio.HTML(visible=False)],
                        samples=[[_thumbnail(pixels)] for pixels, *_ in examples],
                        label="Examples",
                        type="index",
                        layout="gallery",
                        elem_id="examples",
                    )
            with gradio.Column(scale=5, min_width=420):
                note = gradio.HTML("", elem_id="note")
                picture = gradio.HTML(nobody, elem_classes="shown", elem_id="picture")
                slider = gradio.Slider(
                    0.05,
                    0.95,
                    value=protocol.threshold,
                    step=0.01,
                    label="Threshold: how sure a pixel has to be",
                    elem_id="threshold",
                )
                legend = gradio.HTML("", elem_id="legend")
                downloads = gradio.HTML("", elem_id="downloads")
        views = [note, picture, legend, downloads]
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        file.upload(upload, [file, visit], [file, visit, *views], queue=False, api_visibility="private")
        if examples:
            choice.click(example, [choice, visit], [visit, text, *views], **quick)
        asked: dict[str, Any] = {
            "fn": segment,
            "inputs": [visit, text, slider, adapters],
            "outputs": views,
            "show_progress_on": picture,
            "concurrency_limit": None,  # the desk has the queue, and the API stands in it too
            "api_visibility": "private",
        }
        button.click(**asked)
        slider.change(move, [visit, slider], views, trigger_mode="always_last", **quick)
    page.queue(max_size=limits.waiting, api_open=False)
    return page


async def _answer(desk: Desk, request: Any) -> list[Prediction]:
    query: Mapping[str, str] = request.query_params
    threshold = query.get("threshold")
    try:
        wanted = None if threshold is None else float(threshold)
    except ValueError as error:
        raise DcrisError(f"the threshold must be a number between 0 and 1, and is {threshold!r}") from error
    phrases = desk.phrases(request.query_params.getlist("phrase"))
    with desk.receiving():
        data = bytearray()
        async for piece in request.stream():
            data += piece
            desk.check_upload(len(data))
        if not data:
            raise DcrisError("there is no photograph; send the image file as the body of the request")
        pixels = await asyncio.to_thread(desk.photograph, bytes(data))
    return await desk.ask(pixels, phrases, query.get("adapters"), wanted)


def _attachment(file: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{file}"'}


def _take(path: Path, desk: Desk) -> bytes:
    """The bytes of an uploaded file, which is then gone. Gradio gives each a folder of its own."""
    try:
        desk.check_upload(path.stat().st_size)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DcrisError("the upload was lost; drop the photograph once more") from error
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def _skipped(count: int) -> tuple[Any, ...]:
    import gradio

    return tuple(gradio.skip() for _ in range(count))


def _examples(segmenter: Segmenter, paths: Sequence[Path] | None) -> list[Example]:
    if paths is not None:
        return [(read_image(path), path.name, ()) for path in paths]
    if segmenter.config.data.dataset != "scenes":
        return []
    found: list[Example] = []
    for number in range(4):
        scene = make_scene(np.random.default_rng(number), segmenter.config.data.image_size)
        phrases = tuple(each[0].text for each in scene.phrases.values())[:3]
        found.append((scene.image, f"scene{number + 1}.png", phrases))
    return found


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg_bytes(pixels)).decode()}"


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    return f'<img alt="example" src="{_data_uri(cell(pixels, _THUMBNAIL))}" style="height: 84px; border-radius: 4px">'


def _shown(visit: Visit | None, answers: Sequence[Prediction]) -> str:
    if visit is None:
        return '<div class="empty">Drop a photograph, write phrases, press Segment.</div>'
    picture = cell(visit.pixels, _SHOWN)
    for number, answer in enumerate(answers):
        picture = overlay(picture, mask_cell(answer.mask, _SHOWN), COLOURS[number % len(COLOURS)])
    return f'<img alt="the photograph with its masks" src="{_data_uri(picture)}">'


def _legend(answers: Sequence[Prediction]) -> str:
    rows = []
    for number, answer in enumerate(answers):
        colour = "rgb({}, {}, {})".format(*COLOURS[number % len(COLOURS)])
        if answer.box is None:
            rest = '<span class="none">nothing found</span>'
        else:
            rest = (
                f'<div class="bar"><div style="width: {answer.score:.0%}; background: {colour}"></div></div>'
                f'<span class="number">{answer.score:.0%}</span>'
            )
        rows.append(
            f'<div class="row"><span class="swatch" style="background: {colour}"></span>'
            f'<span class="phrase">{html.escape(answer.phrase)}</span>{rest}</div>'
        )
    return f'<div class="legend">{"".join(rows)}</div>' if rows else ""


def _downloads(name: str, threshold: float) -> str:
    links = (("masks.zip", "Masks (zip of PNGs)"), ("coco.json", "COCO json"))
    return '<div class="downloads">{}</div>'.format(
        "".join(
            f'<a download="{file}" href="download/{name}/{file}?threshold={threshold:g}">{text}</a>'
            for file, text in links
        )
    )


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DcrisError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from error
        yield listening


@contextmanager
def _uploads() -> Iterator[Path]:
    """A folder of our own for what Gradio writes down, which is gone afterwards."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="dcris-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _sweep(folder: Path, visits: Visits) -> None:
    """Forget what nobody asks about any more, and delete uploads that broke off: whatever is complete is read at once."""
    while True:
        time.sleep(_SWEEP)
        visits.forget()
        for path in folder.rglob("*"):
            with suppress(OSError):  # gone meanwhile
                if path.is_file() and path.stat().st_mtime < time.time() - _SWEEP:
                    path.unlink()


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(server: Any, ready: Callable[[str], None], address: str) -> None:
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    ready(address)
