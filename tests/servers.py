"""Servers in a thread of the tests' process, and clients that send them anything."""

import io
import json
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from dcris.inference.web.service import Limits


def picture(width: int = 110, height: int = 70, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@contextmanager
def serving(app: Any, limits: Limits) -> Iterator[str]:
    """URL of a server in a thread of this process."""
    from dcris.inference.web.server import make_server

    server = make_server(app, limits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            Event().wait(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def post(address: str, data: bytes, **query: Any) -> Any:
    request = urllib.request.Request(f"{address}/api/segment?{urlencode(query, doseq=True)}", data=data)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def upload(address: str, data: bytes, name: str = "a.png") -> Any:
    """Upload a file as the page does; return the answer, with a status of 400 and more as error."""
    body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data
    kind = "Content-Type: multipart/form-data; boundary=x\r\n"
    status, content = send(address, "POST /gradio_api/upload", body + b"\r\n--x--\r\n", kind)
    return json.loads(content) if status == 200 else (status, json.loads(content))


def file(path: str) -> dict[str, Any]:
    """A file as Gradio's clients name it."""
    return {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}


def event(address: str, name: str, *data: Any, session: str = "s") -> dict[str, Any]:
    """Send an event of the page by the name of its function; return its output."""
    with urllib.request.urlopen(f"{address}/config", timeout=60) as response:
        (number,) = [each["id"] for each in json.load(response)["dependencies"] if each["api_name"] == name]
    body = json.dumps({"fn_index": number, "data": data, "session_hash": session, "event_data": None}).encode()
    status, content = send(address, "POST /gradio_api/queue/join", body)
    assert status == 200, content
    found = [json.loads(line[6:]) for line in listen(address, session)]
    assert [each["msg"] for each in found] == ["process_starts", "process_completed", "close_stream"]
    assert found[1]["event_id"] == json.loads(content)["event_id"]
    return found[1]["output"]


def listen(address: str, session: str) -> list[str]:
    """The lines of a client's stream of results."""
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as response:
        return [line for line in response.read().decode().split("\n\n") if line]


def send(address: str, head: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
    """Send a request as it is; return status and content of the response."""
    host, port = address.removeprefix("http://").split(":")
    if not re.search("^Host:", headers, re.M):
        headers += f"Host: {host}:{port}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head += f" HTTP/1.1\r\n{headers}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode("latin-1") + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
