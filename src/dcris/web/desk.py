"""What the page and the API have in common: bounds on what people may ask, one model for all of them, answers kept for a while.

Nothing here knows of the web. Photographs and answers are in memory alone, and bounded in number, bytes and time.
"""

import asyncio
import io
import secrets
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcris.data.images import read_image
from dcris.data.tokenizer import require_phrase
from dcris.drawing import png_bytes
from dcris.errors import DcrisError
from dcris.prediction import Prediction
from dcris.segmenter import Segmenter

_BUSY = "too many people are asking just now; try again in a moment"


@dataclass(frozen=True)
class Limits:
    """What one person may ask, and how many may wait."""

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
    """Questions that wait or are answered at one time, and uploads to the API that are being read."""
    kept_bytes: int = 1_000_000_000
    """Of photographs and probabilities that pages hold, all together."""
    kept_seconds: float = 1800.0
    """After which a page's photograph and answers are forgotten, counted from its last use."""


class BusyError(DcrisError):
    """Too many are waiting."""


class TooLargeError(DcrisError):
    """The upload has too many bytes."""


class Desk:
    """One model that many people ask; they are served one after the other, in the order in which they came."""

    def __init__(self, segmenter: Segmenter, limits: Limits | None = None) -> None:
        self.segmenter = segmenter
        self.limits = limits or Limits()
        self.waiting = self.reading = 0
        self._server = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def photograph(self, data: bytes) -> NDArray[np.uint8]:
        """The pixels [H, W, 3] of an uploaded file. Raises DcrisError where it is no image or too large."""
        self.check_upload(len(data))
        return read_image(data, self.limits.pixels)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """While an upload is read into memory. Raises BusyError where too many are, or too many wait already."""
        if max(self.waiting, self.reading) >= self.limits.waiting:
            raise BusyError(_BUSY)
        self.reading += 1
        try:
            yield
        finally:
            self.reading -= 1

    def check_upload(self, size: int) -> None:
        """Raise TooLargeError for a file of more bytes than are taken."""
        if size > self.limits.upload:
            raise TooLargeError(f"the file is larger than {self.limits.upload / 1e6:.0f} MB; make it smaller")

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
        self, pixels: NDArray[np.uint8], phrases: list[str], adapters: str | None, threshold: float | None = None
    ) -> list[Prediction]:
        """Predictions with probabilities, as of Segmenter.predict.

        Raises DcrisError as that does, and BusyError where too many are waiting.
        """
        if pixels.shape[0] * pixels.shape[1] * len(phrases) > self.limits.answer:
            most = self.limits.answer // (pixels.shape[0] * pixels.shape[1])
            raise DcrisError(f"of a photograph of this size up to {most} phrases are taken at a time")
        if self.waiting >= self.limits.waiting:
            raise BusyError(_BUSY)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._server,
                lambda: self.segmenter.predict(pixels, phrases, threshold=threshold, scores=True, adapters=adapters),
            )
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown(wait=False, cancel_futures=True)


@dataclass
class Visit:
    """What a page holds: its photograph, and what was answered about it."""

    pixels: NDArray[np.uint8]
    name: str
    answers: list[Prediction] = field(default_factory=list)
    used: float = 0.0

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
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def put(self, visit: Visit, name: str | None = None) -> str:
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

    def get(self, name: str | None) -> Visit:
        """The visit of that name. Raises DcrisError where it was forgotten."""
        with self._lock:
            self._forget()
            visit = self._visits.get(name or "")
            if visit is None:
                raise DcrisError("this photograph is no longer kept; drop it once more")
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
