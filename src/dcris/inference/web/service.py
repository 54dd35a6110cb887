"""What the page and the API share: the bounds on requests, one model for all visitors, and the answers that are kept.

Nothing here depends on the web. Photographs and answers are in memory only, and bounded in number, bytes and time.
"""

import asyncio
import io
import secrets
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.tokenizer import require_phrase
from dcris.errors import DcrisError
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.utils.drawing import png_bytes

_Result = TypeVar("_Result")

BUSY = "too many requests are waiting; try again in a moment"


@dataclass(frozen=True)
class Limits:
    """Bounds on requests: on one, on those of one client, and on all together."""

    upload: int = 20_000_000
    """Bytes of an image file."""
    pixels: int = 25_000_000
    """Of a photograph."""
    phrases: int = 20
    letters: int = 300
    """Of a phrase."""
    answer: int = 100_000_000
    """Pixels times phrases: each phrase has a probability for every pixel, in 4 bytes."""
    waiting: int = 32
    """Questions that wait or are answered at one time."""
    kept_bytes: int = 1_000_000_000
    """Of photographs and probabilities that pages hold, all together."""
    kept_seconds: float = 1800.0
    """After which a page's photograph and answers are forgotten, counted from its last use."""
    question: int = 200_000
    """Bytes of what the page sends besides photographs."""
    uploading: int = 200_000_000
    """Bytes of requests that are received or wait, all together."""
    drain: int = 1_000_000_000
    """Bytes of a refused body that are received and discarded, so that the client reads why it was refused."""
    connections: int = 200
    client_connections: int = 64
    head_seconds: float = 10.0
    """For the head of a request, counted from the connection's start or the last answer."""
    body_seconds: float = 60.0
    """For the body of a request."""
    answer_seconds: float = 300.0
    """For waiting, the model, and sending the answer."""
    drain_seconds: float = 30.0
    attempts: int = 10
    """Wrong passwords of one client within a minute."""


class BusyError(DcrisError):
    """Too many are waiting."""

    status = 503


class ForgottenError(DcrisError):
    """A photograph is no longer kept."""

    status = 404


class InferenceService:
    """One model for many visitors; they are served one after the other, in the order in which they came.

    What is costly without the model (decoding a photograph, drawing, compressing) has a thread of its own, so that it neither
    waits for the model nor fills the memory many times over.
    """

    def __init__(self, segmenter: Segmenter, limits: Limits | None = None) -> None:
        self.segmenter = segmenter
        self.limits = limits or Limits()
        self.waiting = 0
        self._model = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._artist = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")

    def photograph(self, data: bytes) -> NDArray[np.uint8]:
        """The pixels [H, W, 3] of an uploaded file. Raises DcrisError where it is no image or has too many pixels."""
        return read_image(data, self.limits.pixels)

    def phrases(self, lines: Sequence[str]) -> list[str]:
        """The phrases among lines of text. Raises DcrisError where there is none, there are too many, or one is too long."""
        phrases = [line.strip() for line in lines if line.strip()]
        if not phrases:
            raise DcrisError("there is no phrase; write what to look for, such as: left slice")
        if len(phrases) > self.limits.phrases:
            raise DcrisError(f"there are {len(phrases)} phrases, and up to {self.limits.phrases} are taken at a time")
        for phrase in phrases:
            if len(phrase) > self.limits.letters:
                raise DcrisError(
                    f"the phrase that starts with {phrase[:30]!r} has {len(phrase)} letters, and up to {self.limits.letters} "
                    "are taken"
                )
        return [require_phrase(phrase) for phrase in phrases]

    async def ask(
        self,
        photograph: NDArray[np.uint8] | bytes,
        phrases: list[str],
        adapters: str | None,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Predictions with probabilities, as of Segmenter.predict, for pixels or an uploaded file.

        Raises DcrisError as that does, and BusyError where too many are waiting.
        """

        def predict() -> list[Prediction]:
            # A file is decoded here: one that waits is smaller than its pixels.
            pixels = self.photograph(photograph) if isinstance(photograph, bytes) else photograph
            most = self.limits.answer // (pixels.shape[0] * pixels.shape[1])
            if len(phrases) > most:
                raise DcrisError(f"of a photograph of this size up to {most} phrases are taken at a time")
            return self.segmenter.predict(pixels, phrases, threshold=threshold, scores=True, adapters=adapters)

        return await self._run(self._model, predict)

    async def draw(self, work: Callable[[], _Result]) -> _Result:
        """Do what needs no model. Raises BusyError where too many are waiting."""
        return await self._run(self._artist, work)

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], _Result]) -> _Result:
        if self.waiting >= self.limits.waiting:
            raise BusyError(BUSY)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Cancel the requests that wait, and accept no more."""
        for executor in (self._model, self._artist):
            executor.shutdown(wait=False, cancel_futures=True)


@dataclass
class Session:
    """What a page holds: its photograph, and what was answered about it."""

    pixels: NDArray[np.uint8]
    name: str
    """Of its file. It is a client's text, and no file of the server's."""
    answers: list[Prediction] = field(default_factory=list)
    used: float = 0.0

    @property
    def stem(self) -> str:
        """Its file's name without a folder, in any system's notation, and without the ending."""
        return PureWindowsPath(self.name).stem or "photograph"

    @property
    def size(self) -> int:
        """Bytes in memory, about."""
        return self.pixels.size + sum(answer.mask.size * 5 for answer in self.answers)

    def at(self, threshold: float) -> list[Prediction]:
        """The answers at another threshold, without asking the model again."""
        found = []
        for answer in self.answers:
            assert answer.probabilities is not None
            found.append(Prediction.decide(answer.phrase, answer.probabilities, threshold, keep=False))
        return found


class Visits:
    """Visits by secret name. The ones that were not used for longest make room for others. Threads may share it."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._visits: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def put(self, visit: Session, name: str | None = None) -> str:
        """Keep a visit, under its old name if that is given, and return its name."""
        name = name or secrets.token_urlsafe(16)
        with self._lock:
            visit.used = self._clock()
            self._visits[name] = visit
            self._visits.move_to_end(name)
            self._forget()
            while len(self._visits) > 1 and sum(each.size for each in self._visits.values()) > self._limits.kept_bytes:
                self._visits.popitem(last=False)
        return name

    def get(self, name: str | None) -> Session:
        """The visit of that name. Raises DcrisError where it was forgotten."""
        with self._lock:
            self._forget()
            visit = self._visits.get(name or "")
            if visit is None:
                raise ForgottenError("this photograph is no longer kept; drop it once more")
            visit.used = self._clock()
            self._visits.move_to_end(name or "")
            return visit

    def drop(self, name: str | None) -> None:
        """Forget a visit, if it is there."""
        with self._lock:
            self._visits.pop(name or "", None)

    def forget(self) -> None:
        """Forget what was not used for too long."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        oldest = self._clock() - self._limits.kept_seconds
        for name in [name for name, visit in self._visits.items() if visit.used < oldest]:
            del self._visits[name]


def coco_results(answers: Sequence[Prediction], file_name: str) -> list[dict[str, Any]]:
    """The answers about one photograph in COCO's result form, as `dcris predict` writes them."""
    return [
        {**answer.to_coco(image_id=1), "file_name": file_name, "phrase_number": number}
        for number, answer in enumerate(answers)
    ]


def masks_zip(answers: Sequence[Prediction], stem: str) -> bytes:
    """A zip file of one PNG per phrase, 0 and 255, called as `dcris predict` calls them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:  # PNGs are compressed already
        for number, answer in enumerate(answers):
            archive.writestr(f"{stem}.{number}.mask.png", png_bytes(answer.mask))
    return stream.getvalue()
