"""Gradio's wire protocol, answered in memory: uploads, their images, events and their results.

Gradio's own routes write uploads to disk, and open paths and addresses that clients send. Here an
upload is a stored session with a secret name, which is what its "path" is for the browser and for
gradio_client; no other path means anything. An event is a number of a function of the page and its
arguments. It runs when its client listens for the result, so that one that never listens costs
nothing. Sources: client/python/gradio_client/client.py and gradio/routes.py of Gradio 6.31
(protocol "sse_v3").
"""

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from dcris.errors import DcrisError
from dcris.inference.web.api import read_form
from dcris.inference.web.server import Application
from dcris.inference.web.service import InferenceService, Session, Sessions, is_session_name

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

Function = Callable[..., Awaitable[Any]]
"""Gets the arguments of an event as they are in its JSON; returns one value, or a tuple of one for
each output. Raises DcrisError, which its client sees, and ValidationError for wrong types."""

_PREFIX = "/gradio_api"
_LINGER = 1.0
"""Seconds without an event after which a stream of results ends. A client that sends an event while
its stream ends may wait for an answer in vain, so the end is rare."""
_STREAM = 60.0
"""Seconds after which a stream ends at the first pause."""
_PAUSE = 0.02
"""Seconds between two looks for an event."""


class File(BaseModel):
    """An uploaded file, as Gradio's clients name it."""

    path: str
    """Name of the session, from the answer to the upload."""

    @field_validator("path")
    @classmethod
    def _require_upload(cls, path: str) -> str:
        if not is_session_name(path):
            raise DcrisError("only uploaded images can be used; paths and addresses are not opened")
        return path


class _Event(BaseModel):
    fn_index: int
    data: list[Any] = Field(max_length=100)
    session_hash: str = Field(min_length=1, max_length=100)


def event_routes(
    service: InferenceService,
    sessions: Sessions,
    functions: Mapping[int, tuple[Function, int]],
    show: Callable[[Session], bytes],
) -> Application:
    """Return the routes of the protocol.

    Args:
        service: for its limits and its thread for images.
        sessions: where uploads are stored.
        functions: function and number of arguments of each event of the page.
        show: returns the JPEG file that the browser shows for an upload.
    """
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    limits = service.limits
    waiting: OrderedDict[str, _Event] = OrderedDict()
    """Events whose client does not listen yet, oldest first."""

    async def upload(request: "Request") -> "Response":
        body, kind = await request.body(), request.headers.get("content-type", "")
        data, name, _ = await service.render(lambda: read_form(body, kind, "files"))
        service.require_file(data)
        return JSONResponse([sessions.put(Session(None, name, data=data))])

    async def image(request: "Request") -> "Response":
        session = sessions.get(request.path_params["name"])
        return Response(await service.render(lambda: show(session)), media_type="image/jpeg")

    async def join(request: "Request") -> "Response":
        try:
            event = _Event.model_validate_json(await request.body())
        except ValidationError as error:
            raise DcrisError("the event is malformed; reload the page") from error
        _, count = functions.get(event.fn_index, (None, -1))
        if len(event.data) != count:
            raise DcrisError("there is no such event with so many arguments; reload the page")
        name = secrets.token_hex(16)
        waiting[name] = event
        while len(waiting) > limits.connections:
            waiting.popitem(last=False)
        return JSONResponse({"event_id": name})

    async def results(request: "Request") -> "Response":
        name = request.query_params.get("session_hash", "")
        return StreamingResponse(listen(name), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def listen(name: str) -> AsyncIterator[str]:
        """Run the events of a client and yield their results, until none has come for a while."""
        start = last = time.monotonic()
        while True:
            number = next((number for number, event in waiting.items() if event.session_hash == name), None)
            if number is not None:
                event = waiting.pop(number)
                yield _message("process_starts", number)
                output = await run(event)
                yield _message("process_completed", number, output=output, success="error" not in output)
                last = time.monotonic()
            elif time.monotonic() - last > _LINGER or last - start > _STREAM:
                yield _message("close_stream")
                return
            else:
                await asyncio.sleep(_PAUSE)

    async def run(event: _Event) -> dict[str, Any]:
        function, _ = functions[event.fn_index]
        try:
            found = await function(*event.data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            return {"error": f"the argument {place} does not fit: {first['msg']}"}
        except DcrisError as error:
            return {"error": str(error)}
        return {"data": list(found) if isinstance(found, tuple) else [found]}

    return Application(
        [
            Route(f"{_PREFIX}/upload", upload, methods=["POST"]),
            Route(f"{_PREFIX}/file={{name}}", image),
            Route(f"{_PREFIX}/queue/join", join, methods=["POST"]),
            Route(f"{_PREFIX}/queue/data", results),
        ],
        {f"{_PREFIX}/upload": limits.upload + limits.fields, f"{_PREFIX}/queue/join": limits.fields},
    )


def _message(kind: str, event: str | None = None, **fields: Any) -> str:
    return f"data: {json.dumps({'msg': kind, 'event_id': event, **fields})}\n\n"
