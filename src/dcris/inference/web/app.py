"""The page that people see (Gradio), the API beside it, and the server for both.

Gradio draws the page in the browser and does nothing else. Its routes for uploads, files and function calls take paths and
addresses from clients, and are not served; the page sends photographs and questions to the routes here. Photographs and answers
are in memory only, and no path of a client's reaches the file system.
"""

import base64
import html
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from dcris.data.images import read_image
from dcris.data.scenes import make_scene
from dcris.errors import DcrisError
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.inference.web.service import (
    ForgottenError,
    InferenceService,
    Limits,
    Session,
    Visits,
    coco_results,
    masks_zip,
)
from dcris.utils import files
from dcris.utils.drawing import COLOURS, cell, jpeg_bytes, mask_cell, overlay

if TYPE_CHECKING:
    import gradio
    import uvicorn
    from starlette.requests import Request
    from starlette.types import ASGIApp

_SHOWN = 960
"""Longer side of the picture on the page."""

_THUMBNAIL = 132

_SWEEP = 60.0
"""Seconds between two searches for photographs that were kept long enough."""

AUTH = "DCRIS_WEB_AUTH"
"""Environment variable with what `--auth` takes: an argument is seen by every user of the machine in the list of processes."""

# Colours are variables of Gradio's themes, so that they follow the dark mode.
_CSS = """
footer { display: none !important }
.shown img, .shown .empty { border-radius: 6px; background: var(--background-fill-secondary) }
.shown img { width: 100%; max-height: 66vh; object-fit: contain; display: block }
.shown .empty { height: 46vh; color: var(--neutral-500); display: grid; place-items: center }
.legend { display: grid; gap: 6px }
.legend .row { display: grid; grid-template-columns: 18px 1fr 110px 44px; gap: 10px; align-items: center; font-size: 15px }
.legend .swatch { width: 18px; height: 18px; border-radius: 4px }
.legend .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden }
.legend .bar div { height: 100% }
.legend .number { text-align: right; font-variant-numeric: tabular-nums }
.legend .none { grid-column: 3 / 5; color: var(--neutral-500); text-align: right }
.legend .phrase { overflow-wrap: anywhere }
.downloads { display: flex; gap: 10px; flex-wrap: wrap }
.downloads a { padding: 7px 14px; border: 1px solid var(--border-color-primary); border-radius: 6px; text-decoration: none }
.downloads a { color: inherit }
.downloads a:hover { background: var(--background-fill-secondary) }
#photo { padding: 10px 0 0 }
#photo .html-container { padding: 0 }
.drop { display: grid; place-content: center; justify-items: center; gap: 4px; height: 132px; padding: 0 14px; cursor: pointer;
  text-align: center; border: 2px dashed var(--border-color-primary); border-radius: 6px; color: var(--neutral-500) }
.drop b { color: var(--body-text-color) }
.drop:hover, .drop.over, .drop:focus-within { border-color: var(--color-accent) }
.drop:focus-within { outline: 2px solid var(--color-accent); outline-offset: 2px }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px }
.asking #picture { opacity: 0.55; transition: opacity 0.3s 0.2s }
.asking button#segment, .asking #segment button { cursor: progress }
#note:not(:has(.note)) { display: none }
.note { padding: 9px 14px; border-radius: 6px; background: #fef3c7; color: #78350f }
"""

_SCRIPT = """
window.dcris = {
  photo: null,  // the name under which the server keeps the photograph
  file: null,  // the photograph that was dropped or chosen
  same: {__type__: "update"},  // leaves a component of Gradio's as it is
  async ask(route, question) {
    const body = question instanceof File ? question : JSON.stringify({photo: this.photo, ...question});
    let answer;
    document.body.classList.add("asking");
    try {
      answer = await (await fetch(route, {method: "POST", body})).json();
    } catch {
      answer = {error: "the server does not answer; try again in a moment"};
    }
    document.body.classList.remove("asking");
    if (answer.error) {
      const note = answer.error[0].toUpperCase() + answer.error.slice(1);
      return [note, this.same, this.same, this.same, this.same];
    }
    this.photo = answer.photo;
    return ["", answer.picture, answer.legend, answer.downloads, answer.text ?? this.same];
  },
  upload() {
    return this.ask("page/photograph?" + new URLSearchParams({name: this.file.name, old: this.photo ?? ""}), this.file);
  },
};
"""

_DROP = """
<label class="drop">
  <input type="file" accept="image/*">
  <b>Drop a photograph</b><span>or choose one (up to ${size} MB)</span>
</label>
"""

_ON_DROP = """
const zone = element.querySelector(".drop"), input = zone.querySelector("input");
const give = (files) => {
  if (files.length) {
    dcris.file = files[0];
    trigger("upload");
  }
};
input.addEventListener("change", () => {
  give(input.files);
  input.value = "";  // so that the same file can be chosen again
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  zone.addEventListener(name, (event) => {
    event.preventDefault();
    zone.classList.toggle("over", name.startsWith("dragen") || name === "dragover");
  });
zone.addEventListener("drop", (event) => give(event.dataTransfer.files));
"""

Example = tuple[NDArray[np.uint8], str, tuple[str, ...]]
"""Pixels, a name, and phrases to try."""


class Question(BaseModel):
    """What the page asks about the photograph that the server keeps for it."""

    model_config = ConfigDict(extra="forbid")

    photo: str | None = None
    text: str = ""
    threshold: float = 0.5
    adapters: str | None = None
    number: int = 0


def serve(
    segmenter: Callable[[], Segmenter],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    examples: Sequence[Path] | None = None,
    limits: Limits | None = None,
    allow_hosts: Sequence[str] = (),
    auth: str | None = None,
    no_auth: bool = False,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        segmenter: loads the model; called once the port is known to be free.
        host, port: where to listen; 0 is any free port.
        examples: images to try; by default generated scenes, for a model that was trained on those.
        limits: bounds on requests.
        allow_hosts: further host names by which browsers may address the server.
        auth: USER:PASSWORD, or a file with one such line per user; by default the environment's DCRIS_WEB_AUTH.
        no_auth: serve without a password, on other addresses than this machine's own too.
        ready: called with the page's address once it answers.

    Raises DcrisError where the extra `web` is missing, the port is taken, `host` serves other machines and neither `auth` nor
    `no_auth` is given, or an example is no image.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    credentials = () if no_auth else _credentials(auth)
    try:
        import gradio  # noqa: F401

        from dcris.inference.web.guard import is_loopback
    except ImportError as error:
        raise DcrisError(
            f"the web page needs packages that are not here ({error.name}): pip install 'dcris[web]'"
        ) from error
    with _listen(host, port) as listening:
        address, port = listening.getsockname()[:2]
        if not (credentials or no_auth or is_loopback(address)):
            raise DcrisError(
                f"--host {host} serves other machines too; set a password by --auth USER:PASSWORD, or give --no-auth"
            )
        desk = InferenceService(segmenter(), limits)
        visits = Visits(desk.limits)
        app = make_app(desk, visits, examples, hosts=(host, *allow_hosts), credentials=credentials)
        server = make_server(app, desk.limits)
        threading.Thread(target=_sweep, args=(visits,), daemon=True).start()
        threading.Thread(target=_tell, args=(server, ready, f"http://{_shown_host(host)}:{port}"), daemon=True).start()
        try:
            server.run(sockets=[listening])
        finally:
            server.should_exit = True
            desk.close()


def make_server(app: "ASGIApp", limits: Limits) -> "uvicorn.Server":
    """uvicorn, for an application of `make_app`."""
    import uvicorn

    from dcris.inference.web.guard import Connection

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(Connection, limits),
            h11_max_incomplete_event_size=65_536,  # of a request's head: 20 phrases in any script
            ws="none",
            lifespan="off",
            proxy_headers=False,  # anyone can send them
            server_header=False,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )


def make_app(
    desk: InferenceService,
    visits: Visits,
    examples: Sequence[Path] | None = None,
    *,
    hosts: Sequence[str] = (),
    credentials: Sequence[str] = (),
) -> "ASGIApp":
    """The page at / and the API at /api/segment, behind the guard."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route

    from dcris.inference.web.guard import Guard, Refused, failure

    limits = desk.limits
    shown_examples = _examples(desk.segmenter, examples)

    async def api(request: "Request") -> Response:
        query = request.query_params
        threshold = _number(query["threshold"]) if "threshold" in query else None
        phrases = desk.phrases(query.getlist("phrase"))
        data = await request.body()
        if not data:
            raise DcrisError("there is no photograph; send the image file as the body of the request")
        answers = await desk.ask(data, phrases, query.get("adapters"), threshold)
        return JSONResponse(coco_results(answers, query.get("name", "")))

    async def view(name: str, threshold: float, **more: str) -> Response:
        def draw() -> dict[str, str]:
            visit = visits.get(name)
            answers = visit.at(threshold)
            return {
                "photo": name,
                "picture": _shown(visit, answers),
                "legend": _legend(answers),
                "downloads": _downloads(name, threshold) if answers else "",
            }

        return JSONResponse({**await desk.draw(draw), **more})

    async def photograph(request: "Request") -> Response:
        data, query = await request.body(), request.query_params
        pixels = await desk.draw(lambda: desk.photograph(data))
        visits.drop(query.get("old"))
        return await view(visits.put(Session(pixels, query.get("name", ""))), desk.segmenter.protocol.threshold)

    async def example(request: "Request") -> Response:
        question = await _question(request)
        if not 0 <= question.number < len(shown_examples):
            raise DcrisError(f"there is no example {question.number}")
        pixels, file_name, phrases = shown_examples[question.number]
        visits.drop(question.photo)
        more = {"text": "\n".join(phrases)} if phrases else {}
        return await view(visits.put(Session(pixels, file_name)), desk.segmenter.protocol.threshold, **more)

    async def segment(request: "Request") -> Response:
        question = await _question(request)
        if question.photo is None:
            raise DcrisError("there is no photograph yet; drop one, or choose an example")
        visit = visits.get(question.photo)
        phrases = desk.phrases(question.text.splitlines())
        visit.answers = await desk.ask(visit.pixels, phrases, question.adapters)
        visits.put(visit, question.photo)  # it is larger now
        return await view(question.photo, question.threshold)

    async def move(request: "Request") -> Response:
        question = await _question(request)
        return await view(question.photo or "", question.threshold)

    async def download(request: "Request") -> Response:
        visit, file = visits.get(request.path_params["name"]), request.path_params["file"]
        threshold = _number(request.query_params.get("threshold", ""))
        headers = {"Content-Disposition": f'attachment; filename="{quote(file)}"'}

        def pack() -> Response:
            answers = visit.at(threshold)
            if file == "masks.zip":
                return Response(masks_zip(answers, visit.stem), media_type="application/zip", headers=headers)
            return JSONResponse(coco_results(answers, visit.name), headers=headers)

        if file not in _DOWNLOADS:
            raise ForgottenError(f"there is no {file}; there are {' and '.join(_DOWNLOADS)}")
        return await desk.draw(pack)

    def failed(request: "Request", error: Exception) -> Response:
        assert isinstance(error, DcrisError)
        return failure(error)

    drawn, names = _gradio(make_page(limits, desk.segmenter, shown_examples))

    async def page(scope: Any, receive: Any, send: Any) -> None:
        """Gradio's page and its scripts, by their exact names: nothing of the request is used but those."""
        if scope["method"] not in ("GET", "HEAD") or scope["path"] not in names:
            raise Refused(404, "there is nothing at this address; the page is at / and the API at /api/segment")
        # Without Accept-Encoding: Gradio would compress megabytes anew for each request, while all others wait.
        headers = [each for each in scope["headers"] if each[0] in (b"host", b"if-none-match")]
        await drawn({**scope, "query_string": b"", "headers": headers}, receive, send)

    posts = {"/api/segment": api, "/page/photograph": photograph}
    questions = {"/page/example": example, "/page/segment": segment, "/page/move": move}
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in (posts | questions).items()),
            Route("/download/{name}/{file}", download),
            Mount("/", page),
        ],
        exception_handlers={DcrisError: failed},
    )
    sizes = dict.fromkeys(posts, limits.upload) | dict.fromkeys(questions, limits.question)
    return Guard(app, sizes, limits, hosts, credentials)


def make_page(limits: Limits, segmenter: Segmenter, examples: Sequence[Example]) -> "gradio.Blocks":
    """The page itself. Every event is a script that sends a request of our own: Gradio's server calls no function."""
    import gradio

    with gradio.Blocks(title="dcris", analytics_enabled=False, fill_width=False) as page:
        gradio.Markdown("## dcris: segment by phrase")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=300):
                photo = gradio.HTML(
                    html_template=_DROP, js_on_load=_ON_DROP, size=f"{limits.upload // 10**6}", elem_id="photo"
                )
                text = gradio.Textbox(
                    label=f"Phrases, one a line (up to {limits.phrases})",
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
                        samples=[[_thumbnail(pixels)] for pixels, *_ in examples],
                        label="Examples",
                        type="index",
                        layout="gallery",
                        elem_id="examples",
                    )
            with gradio.Column(scale=5, min_width=420):
                # Handlebars' braces escape what stands in them.
                note = gradio.HTML(
                    "",
                    html_template='{{#if value}}<div class="note" role="alert">{{value}}</div>{{/if}}',
                    elem_id="note",
                )
                picture = gradio.HTML(_shown(None, []), elem_classes="shown", elem_id="picture")
                slider = gradio.Slider(
                    0.05,
                    0.95,
                    value=segmenter.protocol.threshold,
                    step=0.01,
                    label="Threshold: how sure a pixel has to be",
                    elem_id="threshold",
                )
                legend = gradio.HTML("", elem_id="legend")
                downloads = gradio.HTML("", elem_id="downloads")
        views: dict[str, Any] = {"fn": None, "outputs": [note, picture, legend, downloads, text]}
        photo.upload(js="() => dcris.upload()", **views)
        button.click(
            js="(text, threshold, adapters) => dcris.ask('page/segment', {text, threshold, adapters})",
            inputs=[text, slider, adapters],
            **views,
        )
        slider.change(
            js="(threshold) => dcris.photo ? dcris.ask('page/move', {threshold}) : Array(5).fill(dcris.same)",
            inputs=[slider],
            trigger_mode="always_last",
            **views,
        )
        if examples:
            choice.click(js="(number) => dcris.ask('page/example', {number})", inputs=[choice], **views)
    return page


def _gradio(page: "gradio.Blocks") -> tuple["ASGIApp", frozenset[str]]:
    """Gradio's application, and the addresses of it that are served."""
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
        css=_CSS,
        head=f"<script>{_SCRIPT}</script>",
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


async def _question(request: "Request") -> Question:
    try:
        return Question.model_validate_json(await request.body())
    except ValidationError as error:
        raise DcrisError("the question is malformed; load the page again") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DcrisError(f"the threshold must be a number between 0 and 1, and is {text!r}") from error


def _credentials(given: str | None) -> list[str]:
    """ "user:password" of each user. Raises DcrisError for what is neither one, nor a file of such lines."""
    given = given or os.environ.get(AUTH, "")
    if not given:
        return []
    try:
        found = files.read_text(Path(given), most=100_000).split("\n")
        where = given
    except (OSError, ValueError):
        found, where = [given], "--auth"
    found = [line.strip() for line in found if line.strip()]
    if not found or not all(all(line.partition(":")[::2]) for line in found):
        raise DcrisError(f"{where} must give USER:PASSWORD, or name a file that has such lines only")
    return found


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


def _shown(visit: Session | None, answers: Sequence[Prediction]) -> str:
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


_DOWNLOADS = {"masks.zip": "Masks (zip of PNGs)", "coco.json": "COCO json"}


def _downloads(name: str, threshold: float) -> str:
    return '<div class="downloads">{}</div>'.format(
        "".join(
            f'<a download="{file}" href="download/{name}/{file}?threshold={threshold:g}">{text}</a>'
            for file, text in _DOWNLOADS.items()
        )
    )


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DcrisError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from error
        yield listening


def _sweep(visits: Visits) -> None:
    """Forget photographs that were kept long enough."""
    while True:
        time.sleep(_SWEEP)
        visits.forget()


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(server: Any, ready: Callable[[str], None], address: str) -> None:
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    ready(address)
