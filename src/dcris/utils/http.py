"""Download a file of bounded size."""

import threading
import time
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from dcris.errors import DcrisError
from dcris.version import __version__

_SECONDS = 30
"""Without a byte, after which a connection is given up."""

_MOST_SECONDS = 600
"""For a whole file: a server may send one byte after the other."""

_PART = 1 << 16

HTTP_ERRORS = OSError, HTTPException, ValueError
"""All errors of an address, a connection or a malformed response."""


class TooLargeError(DcrisError):
    """The body has more bytes than wanted."""


def is_url(text: str) -> bool:
    """Return whether a text is an http or https address."""
    return text.startswith(("http://", "https://"))


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return None: the response that redirects becomes an HTTPError."""


def get(
    url: str,
    most: int,
    stop: threading.Event | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    redirects: bool = True,
) -> bytes:
    """Return the body of the response to a request.

    Args:
        url: http or https.
        most: limit on the bytes of the response's body.
        stop: ends the download when it is set; what has arrived is returned.
        headers: further headers.
        body: sent by POST; None sends GET.
        redirects: whether the server may redirect to other addresses. Headers with a secret would
            go there, too.

    Raises:
        TooLargeError: the body is larger.
        TimeoutError: nothing has arrived for 30 s, or the body takes more than ten minutes.
        HTTP_ERRORS: everything else; `reason_of` describes them.
    """
    agent = {"User-Agent": f"dcris/{__version__} (referring image segmentation)"}
    request = Request(url, data=body, headers={**agent, **(headers or {})})
    opener = build_opener() if redirects else build_opener(_NoRedirects)
    with opener.open(request, timeout=_SECONDS) as response:
        content, end = bytearray(), time.monotonic() + _MOST_SECONDS
        # read1 returns what has arrived; read would wait for the whole part.
        while not (stop and stop.is_set()) and (part := response.read1(_PART)):
            content += part
            if len(content) > most:
                raise TooLargeError(f"the received file has more than {most:,} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"the file takes more than {_MOST_SECONDS} s")
        missing = response.length  # of the announced length; read1 does not report a broken connection
    if missing and not (stop and stop.is_set()):
        raise ConnectionError(f"the connection broke {missing:,} bytes before the end")
    return bytes(content)


def reason_of(error: Exception) -> str:
    """Describe an error of `get` in a few words, on one line."""
    cause = error.reason if isinstance(error, URLError) else error
    text = str(getattr(cause, "strerror", None) or cause)
    if isinstance(error, HTTPError):
        text = f"HTTP {error.code} {text}"
    return " ".join(text.split()) or type(cause).__name__
