"""Start a server: its port, its users and its time limits.

This module imports uvicorn and what depends on it late, so that a missing package is one sentence.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcris.errors import DcrisError
from dcris.inference.web.service import Limits
from dcris.utils import files

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

AUTH = "DCRIS_WEB_AUTH"
"""Environment variable with the value of `--auth`. Other users of the machine can see arguments,
but not the environment."""


def read_credentials(given: str | None) -> list[str]:
    """Return "user:password" of each user, from one such text, a file of such lines or, for None,
    the environment.

    Raises DcrisError for other text.
    """
    given = given or os.environ.get(AUTH, "")
    if not given:
        return []
    try:
        found = files.read_text(Path(given), max_bytes=100_000).split("\n")
        where = given
    except (OSError, ValueError):
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
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DcrisError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port or --host"
            ) from error
        address, port = listening.getsockname()[:2]
        if not (protected or is_loopback(address)):
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
