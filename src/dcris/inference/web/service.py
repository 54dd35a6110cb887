"""What the page and the API share: limits, one model for all clients, and the sessions of the page.

This module does not depend on a web framework. Images and predictions are kept in memory only, and
their number, size and age are limited.
"""

import asyncio
import base64
import io
import re
import secrets
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PureWindowsPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dcris.data.cleaning import require_phrase
from dcris.data.images import read_image
from dcris.errors import DcrisError
from dcris.inference.inputs import result_stem
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.utils.drawing import png_bytes

T = TypeVar("T")

BUSY = "too many requests are waiting; try again in a moment"


@dataclass(frozen=True)
class Limits:
    """Limits on single requests, on the requests of one client, and on all requests together."""

    upload: int = 20_000_000
    """Bytes of an image file."""
    pixels: int = 25_000_000
    """Pixels of an image."""
    phrases: int = 20
    """Phrases of a request."""
    characters: int = 300
    """Characters of a phrase."""
    masks: int = 100_000_000
    """Pixels times phrases: each phrase has a probability (4 bytes) per pixel."""
    waiting: int = 32
    """Requests that wait or run at one time."""
    kept_bytes: int = 1_000_000_000
    """Bytes of the images and probabilities of all sessions together."""
    kept: int = 10_000
    """Sessions."""
    kept_seconds: float = 1800.0
    """Time after the last use of a session until it is deleted."""
    fields: int = 200_000
    """Bytes of a request without its image."""
    uploading: int = 200_000_000
    """Bytes of all request bodies in memory."""
    drain: int = 1_000_000_000
    """Bytes of a refused body that are received and discarded, so that the client reads the error
    message."""
    connections: int = 200
    client_connections: int = 64
    head_seconds: float = 10.0
    """Time for the head of a request, from the start of the connection or the last response."""
    body_seconds: float = 60.0
    """Time for the body of a request."""
    answer_seconds: float = 300.0
    """Time for waiting, the model, and sending the response."""
    drain_seconds: float = 30.0
    attempts: int = 10
    """Wrong passwords of one client per minute."""


class BusyError(DcrisError):
    """Too many requests are waiting."""

    status = 503


class TooLargeError(DcrisError):
    """A file is too large."""

    status = 413


class NotFoundError(DcrisError):
    """A session or file does not exist (any more)."""

    status = 404


class InferenceService:
    """One model for many clients.

    Requests are answered one after the other, in the order of arrival.

    Work without the model (decoding images, drawing, compressing) has its own thread: it does not
    wait for the model, and only one such job at a time takes memory.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits | None = None) -> None:
        self.segmenter = segmenter
        self.limits = limits or Limits()
        self.waiting = 0
        """Number of requests that wait or run."""
        self._results = asyncio.Semaphore(2)
        """One answer is computed while another is encoded; masks of more would fill memory."""
        self._model = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._images = ThreadPoolExecutor(max_workers=1, thread_name_prefix="images")

    def read_image(self, data: bytes) -> NDArray[np.uint8]:
        """Decode an uploaded file to pixels [H, W, 3].

        Raises DcrisError if it is not an image or has too many pixels.
        """
        return read_image(data, self.limits.pixels)

    def require_file(self, data: bytes) -> None:
        """Raise DcrisError if an image file is empty or too large."""
        if not data:
            raise DcrisError(
                "there is no image; send the file as the body of the request, or as the part 'image' of a form"
            )
        if len(data) > self.limits.upload:
            raise TooLargeError(f"the image file is larger than {self.limits.upload / 1e6:.2g} MB; send a smaller file")

    def parse_phrases(self, lines: Sequence[str]) -> list[str]:
        """Return the phrases among lines of text.

        Raises DcrisError if there are none, too many, or one is too long.
        """
        phrases = [line.strip() for line in lines if line.strip()]
        if not phrases:
            raise DcrisError("there is no phrase; enter one, for example: left dog")
        if len(phrases) > self.limits.phrases:
            raise DcrisError(f"there are {len(phrases)} phrases; at most {self.limits.phrases} are allowed per request")
        for phrase in phrases:
            if len(phrase) > self.limits.characters:
                raise DcrisError(
                    f"the phrase that starts with {phrase[:30]!r} has {len(phrase)} characters; at most "
                    f"{self.limits.characters} are allowed"
                )
        return [require_phrase(phrase) for phrase in phrases]

    async def predict(
        self,
        image: NDArray[np.uint8] | bytes,
        phrases: list[str],
        adapters: str | None = None,
    ) -> list[Prediction]:
        """Predict masks with probabilities (Segmenter.predict) for pixels or an uploaded file.

        Raises:
            DcrisError: as Segmenter.predict does.
            BusyError: too many requests are waiting.
        """
        return await self._submit(self._model, lambda: self._predict(image, phrases, adapters=adapters, scores=True))

    async def answer(
        self,
        image: NDArray[np.uint8] | bytes,
        phrases: list[str],
        encode: Callable[[list[Prediction]], T],
        **options: Any,
    ) -> T:
        """Predict masks without probabilities, and encode them.

        At most two requests at a time have masks in memory.

        Args:
            image: pixels, or an uploaded file.
            phrases: of the masks.
            encode: makes the answer of the predictions; it runs as `render` runs work.
            options: of Segmenter.predict.

        Raises:
            DcrisError: as Segmenter.predict does.
            BusyError: too many requests are waiting.
        """
        with self._place():
            async with self._results:
                found = await _run(self._model, lambda: self._predict(image, phrases, **options))
                return await _run(self._images, lambda: encode(found))

    def _predict(self, image: NDArray[np.uint8] | bytes, phrases: list[str], **options: Any) -> list[Prediction]:
        # Decode the file only now: while the request waits, the file takes less memory than its
        # pixels.
        pixels = self.read_image(image) if isinstance(image, bytes) else image
        most = self.limits.masks // (pixels.shape[0] * pixels.shape[1])
        if len(phrases) > most:
            raise DcrisError(f"at most {most} phrases are allowed for an image of this size")
        return self.segmenter.predict(pixels, phrases, **options)

    async def render(self, work: Callable[[], T]) -> T:
        """Run work that does not need the model.

        Raises BusyError if too many requests are waiting.
        """
        return await self._submit(self._images, work)

    async def _submit(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        with self._place():
            return await _run(executor, work)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Context of a request that waits or runs. Raises BusyError if there are too many."""
        if self.waiting >= self.limits.waiting:
            raise BusyError(BUSY)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Cancel all waiting requests and accept no more."""
        for executor in (self._model, self._images):
            executor.shutdown(wait=False, cancel_futures=True)


async def _run(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


@dataclass
class Session:
    """The image of one page and the predictions for it."""

    pixels: NDArray[np.uint8] | None
    """None until the file is decoded."""
    name: str
    """File name as the client sent it. It is never used as a path."""
    predictions: list[Prediction] = field(default_factory=list)
    answer: int = 0
    """Number of the predictions: how often the model was asked."""
    used: float = 0.0
    """Time of the last use."""
    data: bytes = b""
    """The image file, until it is decoded."""

    @property
    def stem(self) -> str:
        """The file name without its ending and without folders of any operating system."""
        return PureWindowsPath(self.name).stem or "image"

    @property
    def size(self) -> int:
        """Approximate memory in bytes."""
        pixels = 0 if self.pixels is None else self.pixels.size
        return len(self.data) + pixels + sum(prediction.mask.size * 5 for prediction in self.predictions)

    def at_threshold(self, threshold: float, min_score: float | None = None) -> list[Prediction]:
        """Return the predictions at another threshold, without a forward pass.

        Args:
            threshold: as in `Segmenter.predict`.
            min_score: the same, for a model with a presence head; others have none here.
        """
        return [
            replace(
                each.with_threshold(threshold, min_score=None if each.present is None else min_score),
                probabilities=None,
            )
            for each in self.predictions
        ]


class Sessions:
    """Sessions by secret name, safe for several threads.

    The least recently used ones are deleted for new ones.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def put(self, session: Session, name: str | None = None) -> str:
        """Store a session and return its name. `name` replaces a stored session."""
        name = name or secrets.token_urlsafe(16)
        with self._lock:
            session.used = self._clock()
            self._sessions[name] = session
            self._sessions.move_to_end(name)
            self._make_room()
        return name

    def pixels(self, session: Session, read: Callable[[bytes], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return the image of a session, which `read` decodes on first use.

        Other sessions are deleted if that takes too much memory.
        """
        data = session.data  # before the pixels: another thread sets them and then clears this
        if (pixels := session.pixels) is None:
            pixels = read(data)
            with self._lock:
                session.pixels, session.data = pixels, b""
                self._make_room()
        return pixels

    def get(self, name: str | None) -> Session:
        """Return a session. Raises NotFoundError if it was deleted."""
        with self._lock:
            self._delete_expired()
            session = self._sessions.get(name or "")
            if session is None:
                raise NotFoundError("this image is no longer stored; upload it again")
            session.used = self._clock()
            self._sessions.move_to_end(name or "")
            return session

    def delete_expired(self) -> None:
        """Delete the sessions that were not used for `Limits.kept_seconds`."""
        with self._lock:
            self._delete_expired()

    def _make_room(self) -> None:
        """Delete the least recently used sessions, as far as the limits demand."""
        self._delete_expired()
        held = sum(each.size for each in self._sessions.values())
        while len(self._sessions) > 1 and (held > self._limits.kept_bytes or len(self._sessions) > self._limits.kept):
            held -= self._sessions.popitem(last=False)[1].size

    def _delete_expired(self) -> None:
        oldest = self._clock() - self._limits.kept_seconds
        for name in [name for name, session in self._sessions.items() if session.used < oldest]:
            del self._sessions[name]


def is_session_name(text: str) -> bool:
    """Whether a text can be the name of a session."""
    return re.fullmatch(r"[A-Za-z0-9_-]{22}", text) is not None


def coco_results(predictions: Sequence[Prediction], file_name: str, masks: bool = False) -> list[dict[str, Any]]:
    """Convert the predictions for one image to COCO results, as `dcris predict` writes them.

    With `masks`, each has its mask as a PNG file (0 and 255), too, in base64 as `mask_png`.
    """
    return [
        {
            **prediction.to_coco(image_id=1),
            "file_name": file_name,
            "phrase_number": number,
            **({"mask_png": base64.b64encode(png_bytes(prediction.mask)).decode()} if masks else {}),
        }
        for number, prediction in enumerate(predictions)
    ]


def masks_zip(predictions: Sequence[Prediction], stem: str) -> bytes:
    """Pack the masks (PNG, 0 and 255) into a zip file, with the file names of `dcris predict`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # stored: PNG is compressed already
        for number, prediction in enumerate(predictions):
            archive.writestr(f"{result_stem(stem, number, prediction.phrase)}.mask.png", png_bytes(prediction.mask))
    return stream.getvalue()
