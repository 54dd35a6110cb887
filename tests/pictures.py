"""A small server of photographs on the loopback address, and the ways in which COCO's fails."""

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Pictures:
    """Start with `with Pictures() as server`; fill `content`; look at `requests`."""

    content: dict[str, bytes] = field(default_factory=dict)
    """By the path asked for, such as /train2014/a.jpg."""
    faults: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """For the next requests of a path: status and headers; status 0 breaks off in the middle of the content."""
    requests: list[tuple[str, str, float]] = field(default_factory=list)
    """Path, User-Agent and time of each."""
    delay: float = 0.0
    open: int = 0
    most_open: int = 0

    def __enter__(self) -> "Pictures":
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def asked_for(self) -> list[str]:
        return [path.rpartition("/")[2] for path, _, _ in self.requests]


def _handler(pictures: Pictures) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with pictures.lock:
                pictures.requests.append((self.path, self.headers["User-Agent"], time.monotonic()))
                pictures.open += 1
                pictures.most_open = max(pictures.most_open, pictures.open)
                faults = pictures.faults.get(self.path)
                status, headers = faults.pop(0) if faults else (200, {})
            threading.Event().wait(pictures.delay)
            content = pictures.content.get(self.path)
            if content is None and status == 200:
                status = 404
            if content is None or status not in (0, 200):
                content = b"<html>an error page</html>"
            self.send_response(status or 200)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if status == 0 else content)
            with pictures.lock:
                pictures.open -= 1

        def log_message(self, *_: object) -> None:
            """Keep the tests' output clean."""

    return Handler
