"""What all servers of dcris share: their port, their users, their errors, start and end.

A server is an `Application`. `serve` opens the port, loads the model, and answers requests behind
the guard until the process is interrupted. This module imports uvicorn and what depends on it late,
so that a missing package is one sentence.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcris.errors import DcrisError
from dcris.inference.web.service import Limits
from dcris.utils import files

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp

AUTH = "DCRIS_WEB_AUTH"
"""Environment variable with the value of `--auth`. Other users of the machine can see arguments,
but not the environment."""


_PATH = re.compile(r"\s*([A-Za-z]:\\|[^:]*[/\\][^:]*:)")
"""Starts what is rather a path than a user and a password: a drive, or a user with slashes."""

HEALTH = "/health"
"""Path for programs that supervise the server, such as Docker and Kubernetes."""


@dataclass(frozen=True)
class Access:
    """Where a server listens, and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7860
    """0 chooses a free port."""
    hosts: Sequence[str] = ()
    """Host names that clients may use, in addition to `host`."""
    frames: Sequence[str] = ()
    """Origins of other sites whose pages may show this server's pages in a frame."""
    auth: str | None = None
    """Users and passwords, as `read_credentials` takes them."""
    no_auth: bool = False
    """Serve other machines without a password."""


@dataclass(frozen=True)
class Application:
    """What a server answers."""

    routes: Sequence["BaseRoute"]
    """Routes of Starlette. They get each body whole, raise DcrisError for bad requests, and must
    not block: use `InferenceService.predict` and `InferenceService.render`."""
    bodies: Mapping[str, int]
    """Maximum size in bytes of each path that accepts a body (by POST)."""
    fallback: "ASGIApp | None" = None
    """Answers all other paths; by default, there is nothing."""
    public: Collection[str] = (HEALTH,)
    """Paths that need no password."""
    close: Callable[[], None] = lambda: None
    """Called at the end."""
    log: Callable[[str], None] = lambda line: None
    """Called with the path and message of each bad request."""


def serve(
    make: Callable[[], Application],
    access: Access,
    limits: Limits,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve an application until the process is interrupted.

    Args:
        make: loads the model and returns the application; called after the port was opened.
        access: address, host names and passwords.
        limits: limits on requests.
        ready: called with the URL of the server when it answers.

    Raises:
        DcrisError: the extra `serve` is not installed, the port is in use, the address serves other
            machines and there is neither a password nor `no_auth`, or one of `access.frames` is not
            an origin.
    """
    credentials = [] if access.no_auth else read_credentials(access.auth)
    try:
        import h11  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401

        from dcris.inference.web.guard import require_origin
    except ImportError as error:
        raise DcrisError(f"the server needs the package {error.name}: pip install 'dcris[serve]'") from error
    frames = [require_origin(origin) for origin in access.frames]
    protected = bool(credentials) or access.no_auth
    with open_port(access.host, access.port, protected=protected) as (listening, url):
        application = make()
        hosts = (access.host, *access.hosts)
        app = guard(application, limits, hosts=hosts, credentials=credentials, frames=frames)
        try:
            run_server(app, limits, listening, partial(ready, url))
        finally:
            application.close()


def guard(
    application: Application,
    limits: Limits,
    *,
    hosts: Sequence[str] = (),
    credentials: Sequence[str] = (),
    frames: Sequence[str] = (),
) -> "ASGIApp":
    """Return an application behind the guard, which see for the arguments.

    All its errors are {"error": MESSAGE}, also those of programming, whose traceback is printed on
    standard error only.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException

    from dcris.inference.web.guard import Guard, Refused, error_response

    def on_error(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, DcrisError)
        application.log(f"{request.url.path}: {error}")
        return error_response(error)

    def on_http_error(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            allowed = " or ".join(sorted((error.headers or {})["Allow"].split(", ")))
            sentence = f"{request.url.path} takes {allowed}, not {request.method}"
        else:
            sentence = f"there is nothing at this address; there is {', '.join(sorted(application.bodies))}"
        return on_error(request, Refused(error.status_code, sentence, error.headers))

    def on_fault(request: "Request", error: Exception) -> "Response":
        # Starlette raises the error again after this answer, so that uvicorn logs its traceback.
        return error_response(Refused(500, "the server failed to answer this request; its log has the reason"))

    app = Starlette(
        routes=application.routes,
        exception_handlers={DcrisError: on_error, HTTPException: on_http_error, Exception: on_fault},
    )
    app.router.redirect_slashes = False
    if application.fallback is not None:
        app.router.default = application.fallback
    return Guard(app, application.bodies, limits, hosts, credentials, frames, application.public)


async def health(request: "Request") -> "Response":
    """Report that the model is loaded, and nothing else, as it needs no password."""
    from starlette.responses import JSONResponse

    return JSONResponse({"status": "ok"})


def read_credentials(given: str | None) -> list[str]:
    """Return "user:password" of each user, from one such text, a file of such lines or, for None,
    the environment. Lines of the file that begin with # are comments.

    Raises DcrisError for other text, and for what looks like the path of a file that cannot be
    read: a mistyped path with a colon would become a password.
    """
    given = given or os.environ.get(AUTH, "")
    if not given:
        return []
    try:
        lines = files.read_text(Path(given), max_bytes=100_000).split("\n")
        found, where = [line for line in lines if not line.lstrip().startswith("#")], given
    except (OSError, ValueError) as error:
        if _PATH.match(given):
            raise DcrisError(
                f"--auth or {AUTH} looks like the path of a file, which cannot be read; it must be USER:PASSWORD, or a "
                "file with one such line per user"
            ) from error
        found, where = [given], "--auth"
    found = [line.strip() for line in found if line.strip()]
    if not found or not all(all(line.partition(":")[::2]) for line in found):
        raise DcrisError(f"{where} must be USER:PASSWORD, or a file with one such line per user")
    return found


@contextmanager
def open_port(host: str, port: int, *, protected: bool) -> Iterator[tuple[socket.socket, str]]:
    """Open a port; yields its socket and the URL of the server.

    Args:
        host: address to listen on.
        port: 0 chooses a free port.
        protected: whether other machines may be served, since there is a password or none is
            wanted.

    Raises:
        DcrisError: that is not possible, or `host` serves other machines and is not protected.
    """
    from dcris.inference.web.guard import is_loopback

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            address, port = listening.getsockname()[:2]
            allowed = protected or is_loopback(address)
            if allowed:
                # At once, and not after the model is loaded: until then, another process could bind
                # it, too.
                listening.listen()
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DcrisError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from error
        if not allowed:
            raise DcrisError(
                f"--host {host} serves other machines too; set a password with {AUTH} or --auth USER:PASSWORD, or give "
                "--no-auth"
            )
        yield listening, f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: "ASGIApp", limits: Limits) -> "uvicorn.Server":
    """Configure uvicorn for an application behind the guard."""
    import uvicorn

    from dcris.inference.web.guard import Connection

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(Connection, limits),
            h11_max_incomplete_event_size=65_536,  # size of a request head; 20 phrases in any script fit
            ws="none",
            lifespan="off",
            proxy_headers=False,  # any client can send them
            server_header=False,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
    )


def run_server(
    app: "ASGIApp", limits: Limits, listening: socket.socket, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until the process is interrupted; `ready` is called when the server answers."""
    server = make_server(app, limits)
    threading.Thread(target=_wait_until_ready, args=(server, ready), daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        server.should_exit = True


def _wait_until_ready(server: Any, ready: Callable[[], None]) -> None:
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    ready()
