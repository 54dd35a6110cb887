"""Checks of every request before the page or the API: host, origin, password, size, time.

`Guard` is an ASGI application in front of another one. It checks the host name, the origin, the
password, and the size and time of the body. `Connection` adds to uvicorn's connection a time limit
for the head of a request and a limit on the connections of one client. This module opens no files
and no outgoing connections.
"""

import asyncio
import base64
import hmac
import ipaddress
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dcris.errors import DcrisError
from dcris.inference.web.service import BUSY, BusyError, Limits

# The page needs no other server. This header makes browsers enforce that, also for future versions
# of Gradio.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'{}",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/?#@\\\s]+)(?::([0-9]{1,5}))?", re.ASCII)

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)

_PAUSE = 2.0
"""Seconds without a byte after which the server stops reading a refused body."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(DcrisError):
    """The request is refused before it reaches the application."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class _GoneError(Exception):
    """The client has closed the connection."""


def error_response(error: DcrisError) -> JSONResponse:
    """Convert an error to the response {"error": MESSAGE} with the error's status, or 400."""
    return JSONResponse({"error": str(error)}, getattr(error, "status", 400), getattr(error, "headers", None))


@dataclass(eq=False)
class _Body:
    """The body of a request, which stays in memory until the request is answered."""

    client: str
    size: int = 0
    data: bytearray = field(default_factory=bytearray)
    deadline: asyncio.Timeout | None = None
    """None when the body is complete."""
    displaced: bool = False
    """Whether it was dropped to make room for other bodies."""


class Guard:
    """Check requests, receive their bodies, and pass them to an application.

    Args:
        app: the application. It gets each body in one message, and is cancelled when the client
            disconnects.
        bodies: maximum size in bytes of each path that accepts a body (by POST).
        limits: limits on sizes and times.
        hosts: allowed host names, in addition to the address of the server.
        credentials: "user:password" of each user; if empty, no password is needed.
        frames: origins of other sites whose pages may show this page in a frame, from
            `require_origin`.
        public: paths that need no password.
    """

    def __init__(
        self,
        app: ASGIApp,
        bodies: Mapping[str, int],
        limits: Limits,
        hosts: Collection[str] = (),
        credentials: Collection[str] = (),
        frames: Collection[str] = (),
        public: Collection[str] = (),
    ) -> None:
        self._app, self._sizes, self._limits, self._public = app, bodies, limits, public
        others = "".join(f" {origin}" for origin in frames)
        self._headers = {name: value.format(others) for name, value in _HEADERS.items()}
        self._hosts = {_name(host) for host in hosts}
        self._credentials = [each.encode() for each in credentials]
        self._failures: OrderedDict[str, list[float]] = OrderedDict()
        self._bodies: dict[_Body, None] = {}
        """In order of arrival; a dict serves as an ordered set."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        started = False

        async def respond(message: Message) -> None:
            nonlocal started
            last = False
            if message["type"] == "http.response.start":
                started = True
                sent = MutableHeaders(scope=message)
                sent.update(self._headers)
                if unread:
                    sent["Connection"] = "close"
            elif unread and not message.get("more_body"):
                # uvicorn would close the connection now, and a client that is still sending would
                # see a reset instead of the response. So delay the end of the response until the
                # body has been read.
                message, last = {**message, "more_body": True}, True
            await send(message)
            if last:
                await self._drain(headers, receive)
                await send({"type": "http.response.body"})

        body = _Body(_client(scope))
        try:
            self._check(scope, headers)
            limit = self._sizes.get(scope["path"]) if scope["method"] == "POST" else None
            if limit is not None:
                self._bodies[body] = None
                await self._receive(body, headers, receive, limit)
                unread = False
            if not await self._pass(scope, body, receive, respond, watch=not unread) and not started:
                raise Refused(503, f"the request took longer than {self._limits.answer_seconds:.0f} s; try again later")
        except DcrisError as error:
            await error_response(error)(scope, receive, respond)
        except _GoneError:
            pass
        except asyncio.CancelledError:  # uvicorn stops; it would print a traceback for each request
            unread = False
            if not started:
                await error_response(Refused(503, "the server was stopped"))(scope, receive, respond)
        finally:
            self._bodies.pop(body, None)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise Refused if the request must be refused whatever its body is."""
        if not scope["path"].startswith("/"):
            raise Refused(400, "the path of the request must start with /")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise Refused(400, "the request has both Content-Length and Transfer-Encoding; send one of them")
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not (host := _HOST.fullmatch(hosts[0].lower())):
            raise Refused(400, "the request must have one Host header, with a name or an address")
        if not self._allowed(host[1], scope):
            raise Refused(403, f"requests for the host {host[1]!r} are refused; allow it with --allow-host")
        for origin in headers.getlist("origin"):
            # Behind a proxy that replaces the host name, the origin is a name given by
            # --allow-host.
            scheme, _, place = origin.lower().partition("://")
            found = _HOST.fullmatch(place)
            if scheme not in ("http", "https") or not found:
                raise Refused(403, "requests from pages without an origin are refused")
            if place != hosts[0].lower() and _name(found[1]) not in self._hosts:
                raise Refused(403, f"requests from pages of {place!r} are refused; allow it with --allow-host")
        if self._credentials and scope["path"] not in self._public:
            self._check_password(scope, headers)

    def _allowed(self, host: str, scope: Scope) -> bool:
        """Whether clients may use the name `host`.

        Other sites can let a name of theirs point to this server (DNS rebinding), so every name
        must be allowed explicitly.
        """
        here = _address(scope["server"][0]) if scope.get("server") else None
        local = here is not None and here.is_loopback
        address = _address(host.strip("[]"))
        if address is not None and (address == here or (local and address.is_loopback)):
            return True
        return _name(host) in self._hosts or (local and _name(host) == "localhost")

    def _check_password(self, scope: Scope, headers: Headers) -> None:
        challenge = {"WWW-Authenticate": 'Basic realm="dcris", charset="UTF-8"'}
        given = headers.get("authorization")
        if given is None:
            raise Refused(401, "this server needs a user name and a password", challenge)
        client, now = _client(scope), time.monotonic()
        failures = [each for each in self._failures.get(client, []) if now - each < 60]
        if len(failures) >= self._limits.attempts:
            raise Refused(429, "there were too many wrong passwords; try again in a minute", {"Retry-After": "60"})
        kind, _, encoded = given.partition(" ")
        with suppress(ValueError):
            decoded = base64.b64decode(encoded.strip(), validate=True)
            # Compare with all of them, each in constant time, so that the time reveals nothing
            # about a password.
            if kind.lower() == "basic" and sum(hmac.compare_digest(decoded, each) for each in self._credentials):
                return
        # A correct password does not reset the count: it may be another user at the same address.
        self._failures[client] = [*failures, now]
        self._failures.move_to_end(client)
        while len(self._failures) > 10_000:
            self._failures.popitem(last=False)
        raise Refused(401, "the user name or the password is wrong", challenge)

    async def _receive(self, body: _Body, headers: Headers, receive: Receive, limit: int) -> None:
        """Read a body into memory. Raises Refused if it is too large or takes too long."""
        too_large = Refused(413, f"the request is larger than {limit / 1e6:.2g} MB; send a smaller file")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > limit:
            raise too_large
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds) as body.deadline:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body.size += len(message["body"])
                    if body.size > limit:
                        raise too_large
                    body.data += message["body"]
                    self._make_room()
                    more = message.get("more_body", False)
        except TimeoutError:
            if not body.displaced:
                raise Refused(408, f"the request did not arrive within {seconds:.0f} s; send it again") from None
        finally:
            body.deadline = None
        if body.displaced:
            raise BusyError(BUSY)

    def _make_room(self) -> None:
        """Drop unfinished bodies until the rest fits, first the oldest of the largest client."""
        held = Counter[str]()
        for body in self._bodies:
            held[body.client] += body.size
        while held.total() > self._limits.uploading:
            unfinished = [
                (body, body.deadline) for body in self._bodies if body.deadline and not body.deadline.expired()
            ]
            unfinished = [(body, deadline) for body, deadline in unfinished if body.size]
            if not unfinished:
                return
            body, deadline = max(unfinished, key=lambda each: held[each[0].client])
            held[body.client] -= body.size
            body.size, body.data, body.displaced = 0, bytearray(), True
            deadline.reschedule(0)

    async def _pass(self, scope: Scope, body: _Body, receive: Receive, send: Send, *, watch: bool) -> bool:
        """Run the application; return False if it took too long.

        Raises _GoneError if the client disconnected.
        """

        messages: list[Message] = [{"type": "http.request", "body": bytes(body.data)}]
        body.data = bytearray()  # its size still counts

        async def replay() -> Message:
            if not messages:
                await asyncio.Event().wait()  # until the application has answered or is cancelled
            return messages.pop()

        async def disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answering = asyncio.ensure_future(self._app(scope, replay, send))
        tasks = {answering} | ({asyncio.ensure_future(disconnected())} if watch else set())
        try:
            await asyncio.wait(tasks, timeout=self._limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
            done, left = answering.done(), any(task.done() for task in tasks - {answering})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if done:
            answering.result()
        elif left:
            raise _GoneError
        return done

    async def _drain(self, headers: Headers, receive: Receive) -> None:
        """Read and discard the rest of a body, up to a limit."""
        if "expect" in headers:
            return  # the client waits for a response before it sends the body
        left = self._limits.drain
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_seconds):
                more = True
                while more and left > 0:
                    # A client that stops sending has read the response, or waits until the
                    # connection is closed.
                    message = await asyncio.wait_for(receive(), _PAUSE)
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)


class Connection(H11Protocol):  # type: ignore[misc]  # mypy does not read uvicorn
    """A connection of uvicorn with a time limit for the head of a request.

    The connections of one client, and of all clients together, are limited. A new connection beyond
    the limit replaces the one that has waited longest for its client (to send a request or to read
    a response).
    """

    def __init__(self, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._key = ""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Accept the connection; close another one if there are too many."""
        super().connection_made(transport)
        self._key = _client({"client": self.client})
        self._expect_head()
        others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
        clients = Counter(each._key for each in others)
        if clients[self._key] >= self._limits.client_connections:
            crowd = self._key
        elif len(others) >= self._limits.connections:
            crowd = clients.most_common(1)[0][0]
        else:
            return
        crowded = (each for each in others if each._key == crowd)
        min(crowded, key=lambda each: (not each._awaits_client(), each._since)).drop()

    def drop(self) -> None:
        """Close the connection immediately."""
        self.connections.discard(self)  # connection_lost is called later, perhaps after further connections
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Receive bytes of a request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_deadline()

    def on_response_complete(self) -> None:
        """Start the time limit of the next request."""
        super().on_response_complete()
        if self.cycle.response_complete:  # and no pipelined request has begun
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit."""
        self._stop_deadline()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Respond to data that is not HTTP. A response may have been started already."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.close()

    def _awaits_client(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self.flow.write_paused

    def _expect_head(self) -> None:
        self._stop_deadline()
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(self._limits.head_seconds, self._late)

    def _late(self) -> None:
        waited = self.loop.time() - self._since
        if self.transport.get_write_buffer_size() and waited < self._limits.answer_seconds:
            # The response has been written here, but has not reached a client with a slow network.
            self._deadline = self.loop.call_later(self._limits.head_seconds, self._late)
        else:
            self.drop()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _address(text: str) -> _Address | None:
    """Parse an IP address; None for other text.

    IPv4 addresses in IPv6 notation become IPv4 addresses.
    """
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(host: str) -> bool:
    """Whether an IP address is a loopback address."""
    address = _address(host)
    return address is not None and address.is_loopback


def require_origin(text: str) -> str:
    """Return an origin: scheme, host name and perhaps port.

    Raises DcrisError for other text, which could add to the header that it becomes part of.
    """
    if not _ORIGIN.fullmatch(text):
        raise DcrisError(
            f"{text!r} is not the origin of a site; give its scheme and name, such as https://huggingface.co"
        )
    return text


def _name(host: str) -> str:
    return host.lower().strip("[]").removesuffix(".")


def _client(scope: Mapping[str, Any]) -> str:
    """Key of a client: its IPv4 address, or the first 64 bits of its IPv6 address (its network)."""
    host = scope["client"][0] if scope.get("client") else ""
    address = _address(host)
    return str(ipaddress.ip_network((address, 64), strict=False)) if address and address.version == 6 else str(address)
