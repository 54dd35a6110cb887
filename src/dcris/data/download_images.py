"""Copy images from COCO's server, a folder or a zip file to where a data set expects them,
atomically.
"""

import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.error import HTTPError
from urllib.parse import quote

from dcris.data.coco import NAMINGS, rename_image
from dcris.data.images import image_size, read_image
from dcris.errors import DcrisError
from dcris.utils.files import expand_home, open_zip, read_bytes, write_file
from dcris.utils.http import HTTP_ERRORS, TooLargeError, get, is_url, reason_of

_MAX_BYTES = 50_000_000
"""The largest image of train2014 has less than 1 MB."""

_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, unless the server asks for more."""

_MAX_PAUSE = 120.0
_RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_CONNECTIONS = 64
_MAX_FAILURES_IN_A_ROW = 10
"""Images in a row that a server may fail to deliver before the download stops."""


class UnavailableError(DcrisError):
    """One image cannot be obtained; others may be."""


@dataclass(frozen=True, slots=True)
class WantedImage:
    """An image to be copied."""

    name: str
    path: Path
    """Where to write it."""
    size: tuple[int, int]
    """Height and width in pixels, as annotated."""


class Source(Protocol):
    """Where images are copied from."""

    @property
    def max_failures_in_a_row(self) -> int | None:
        """Images in a row that may fail before the download stops; None for no limit."""
        ...

    def read(self, name: str, stop: threading.Event) -> bytes:
        """Return the content of an image file. Thread-safe.

        Raises UnavailableError if it cannot be obtained, and soon after `stop` is set.
        """
        ...


def open_source(where: str) -> Source:
    """Return the server, folder or zip file for a URL or path.

    Raises DcrisError if it is none of them.
    """
    if is_url(where):
        return _Server(where.rstrip("/"))
    path = expand_home(where)
    if path.is_dir():
        return _Folder(path)
    if path.exists():
        return _Zip(path)
    raise DcrisError(f"{where} is neither a folder nor a zip file of images, nor an http URL; check the name")


def download_images(
    images: Sequence[WantedImage],
    source: Source,
    *,
    connections: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Copy images from a source, several at a time.

    Each image is decoded, its size is compared with the annotated one, and its file is written
    atomically. On an interruption, images in progress are finished first.

    Args:
        images: what to copy.
        source: where from.
        connections: number of images at a time.
        progress: receives the number of images done and to do.

    Returns:
        A description of each image that could not be obtained.

    Raises:
        DcrisError: a file cannot be written, or the source delivers nothing any more. Files that
            are already written are kept.
    """
    stop, failures, in_a_row = threading.Event(), [], 0

    def copy(image: WantedImage) -> None:
        content = source.read(image.name, stop)
        try:
            height, width = image_size(content)
            if (height, width) == image.size:
                read_image(content)  # of a response without a length, the end may be missing
        except DcrisError as error:
            raise UnavailableError(f"the received file is not a whole image: {error}") from error
        if (height, width) != image.size:
            raise UnavailableError(
                f"the received image is {width}x{height} pixels, but the annotations are for {image.size[1]}x{image.size[0]}"
            )
        write_file(image.path, content)

    with ThreadPoolExecutor(min(max(1, connections), _MAX_CONNECTIONS)) as pool:
        futures = {pool.submit(copy, image): image for image in images}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                    in_a_row = 0
                except UnavailableError as error:
                    failures.append(f"{futures[future].name} ({error})")
                    in_a_row += 1
                    if in_a_row == source.max_failures_in_a_row:
                        raise DcrisError(
                            f"{in_a_row} images in a row could not be downloaded, the last one {failures[-1]}; check the "
                            "address and the network, then run the same command again to continue"
                        ) from error
                progress(done, len(futures))
        except BaseException:  # KeyboardInterrupt, too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


# ---- the sources ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    address: str
    max_failures_in_a_row: int | None = _MAX_FAILURES_IN_A_ROW

    def read(self, name: str, stop: threading.Event) -> bytes:
        naming = "2017" if self.address.endswith("2017") else "2014"
        url = f"{self.address}/{quote(rename_image(name, naming))}"
        # Not urllib3.Retry: it is a further dependency, and its pauses cannot be interrupted by
        # `stop`.
        for pause in (*_PAUSES, None):
            retry_after = None
            try:
                content = get(url, _MAX_BYTES, stop)
                if stop.is_set():
                    raise UnavailableError("the download was interrupted")
                return content
            except TooLargeError as error:
                raise UnavailableError(str(error)) from error
            except HTTP_ERRORS as error:
                reason = reason_of(error)
                if isinstance(error, HTTPError):
                    error.close()
                    retry_after = error.headers.get("Retry-After")
                    if error.code not in _RETRIED_STATUSES:
                        raise UnavailableError(reason) from error
            if pause is None or stop.wait(max(pause, _seconds(retry_after))):
                break
        raise UnavailableError(reason)


def _seconds(retry_after: str | None) -> float:
    """Parse a Retry-After header, a number or a date; return 0 if it is absent or malformed."""
    if retry_after is None:
        return 0.0
    try:
        if retry_after.isdecimal():
            seconds: float = int(retry_after)
        else:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0), _MAX_PAUSE)


@dataclass(frozen=True)
class _Folder:
    path: Path
    max_failures_in_a_row: int | None = None

    def read(self, name: str, stop: threading.Event) -> bytes:
        for folder in (self.path, self.path / "train2014", self.path / "train2017"):
            for naming in NAMINGS:
                file = folder / rename_image(name, naming)
                try:
                    return read_bytes(file, _MAX_BYTES)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    raise UnavailableError(f"cannot read {file}: {error.strerror or error}") from error
        raise UnavailableError(f"it is not in {self.path}")


@dataclass
class _Zip:
    """A zip file.

    Members are identified by the last part of their names, and nothing is extracted to a path
    from the zip file.
    """

    path: Path
    max_failures_in_a_row: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self.archive = open_zip(self.path)
        except OSError as error:
            raise DcrisError(
                f"cannot read {self.path}: {error.strerror}; download it again, or name a folder"
            ) from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            self.members.setdefault(PurePosixPath(member.filename).name, member)

    def read(self, name: str, stop: threading.Event) -> bytes:
        member = next((found for naming in NAMINGS if (found := self.members.get(rename_image(name, naming)))), None)
        if member is None:
            raise UnavailableError(f"it is not in {self.path}")
        if member.file_size > _MAX_BYTES:
            raise UnavailableError(f"{member.filename} has more than {_MAX_BYTES:,} bytes")
        try:
            with self.lock:  # ZipFile counts its open readers without a lock
                return self.archive.read(member)
        except Exception as error:  # damage, a password, an unknown compression
            raise UnavailableError(f"cannot read {member.filename} in {self.path}: {error}") from error
