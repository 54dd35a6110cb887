"""A small HTTP server of images on the loopback address, which can simulate the failures of COCO's
server.
"""

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ImageServer:
    """Use as `with ImageServer() as server`; set `content`; read `requests`."""

    content: dict[str, bytes] = field(default_factory=dict)
    """By the requested path, such as /train2014/a.jpg."""
    faults: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """Status and headers for the next requests of a path; status 0 breaks the connection in the
    middle of the content."""
    requests: list[tuple[str, str, float]] = field(default_factory=list)
    """Path, User-Agent and time of each."""
    delay: float = 0.0
    open: int = 0
    most_open: int = 0

    def __enter__(self) -> "ImageServer":
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop: connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()

    def asked_for(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _, _ in self.requests]


def _handler(server: ImageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with server.lock:
                server.requests.append((self.path, self.headers["User-Agent"], time.monotonic()))
                server.open += 1
                server.most_open = max(server.most_open, server.open)
                faults = server.faults.get(self.path)
                status, headers = faults.pop(0) if faults else (200, {})
            threading.Event().wait(server.delay)
            content = server.content.get(self.path)
            if content is None and status == 200:
                status = 404
            if content is None or status not in (0, 200):
                content = b"<html>an error page</html>"
            self.send_response(status or 200)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with server.lock:
                server.open -= 1  # before the last bytes, upon which the client sends its next request
            self.wfile.write(content[: len(content) // 2] if status == 0 else content)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    return Handler
