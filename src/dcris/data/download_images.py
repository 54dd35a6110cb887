"""Photographs from COCO's server, a folder or a zip, copied to where a data set expects them: each whole, or not there."""

import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from dcris.data.image_folders import NAMINGS, renamed
from dcris.data.images import image_size
from dcris.errors import DcrisError
from dcris.utils.files import expand_home, open_zip, read_bytes, write_file
from dcris.version import __version__

COCO = "http://images.cocodataset.org/train2014"
"""COCO's own server, which gives out single photographs. Its certificate is another host's, so https fails there."""

_MAX_BYTES = 50_000_000
"""The largest photograph of train2014 has less than 1 MB."""

_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt, unless the server asks for more."""

_LONGEST_PAUSE = 120.0
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOST_CONNECTIONS = 64
_PATIENCE = 10
"""Photographs in a row that a server may fail to give before it is left alone."""


class UnavailableError(DcrisError):
    """One photograph cannot be had; others may."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """A photograph that is wanted."""

    name: str
    path: Path
    """Where it is to go."""
    size: tuple[int, int]
    """Height and width in pixels, as the annotations record them."""


class Source(Protocol):
    """Where photographs come from."""

    @property
    def patience(self) -> int | None:
        """How many may fail in a row before there is no use in going on; None where trying costs nobody anything."""
        ...

    def read(self, name: str, stop: threading.Event) -> bytes:
        """The content of a photograph, from several threads at once. Raises UnavailableError, also soon after `stop`."""
        ...


def open_source(where: str) -> Source:
    """The server, folder or zip that an address or a path means. Raises DcrisError where it is none of them."""
    if where.startswith(("http://", "https://")):
        return _Server(where.rstrip("/"))
    path = expand_home(where)
    if path.is_dir():
        return _Folder(path)
    if path.exists():
        return _Zip(path)
    raise DcrisError(f"there is no folder or zip of photographs {where}, and it is no http address; check the name")


def download_images(
    photographs: Sequence[Photograph],
    source: Source,
    *,
    connections: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Copy photographs from a source, several at a time, and return what could not be had, in words.

    Each is compared with the size that the annotations record, and is written atomically. An interruption waits for those in
    progress to end. `progress` is told how many of how many are done.

    Raises DcrisError where a file cannot be written, or the source gives nothing any more; what has arrived stays.
    """
    stop, failures, in_a_row = threading.Event(), [], 0

    def copy(photograph: Photograph) -> None:
        content = source.read(photograph.name, stop)
        try:
            height, width = image_size(content)
        except DcrisError as error:
            raise UnavailableError(f"what came is no picture: {error}") from error
        if (height, width) != photograph.size:
            raise UnavailableError(
                f"what came is {width}x{height} pixels, and the annotations are for {photograph.size[1]}x{photograph.size[0]}"
            )
        write_file(photograph.path, content)

    with ThreadPoolExecutor(min(max(1, connections), _MOST_CONNECTIONS)) as pool:
        futures = {pool.submit(copy, photograph): photograph for photograph in photographs}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                try:
                    future.result()
                    in_a_row = 0
                except UnavailableError as error:
                    failures.append(f"{futures[future].name} ({error})")
                    in_a_row += 1
                    if in_a_row == source.patience:
                        raise DcrisError(
                            f"{in_a_row} photographs in a row could not be fetched, the last of them {failures[-1]}; check the "
                            "address and the network; what has arrived is kept, so the same command goes on from there"
                        ) from error
                progress(done, len(futures))
        except BaseException:  # Ctrl-C, too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failures


# ---- the sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    address: str
    patience: int | None = _PATIENCE

    def read(self, name: str, stop: threading.Event) -> bytes:
        naming = "2017" if self.address.endswith("2017") else "2014"
        address = f"{self.address}/{quote(renamed(name, naming))}"
        for pause in (*_PAUSES, None):
            try:
                return _get(address, stop)
            except HTTPError as error:
                error.close()
                reason, asked = f"HTTP {error.code} {error.reason}", error.headers.get("Retry-After")
                if error.code not in _BUSY:
                    raise UnavailableError(reason) from error
            except (OSError, HTTPException, ValueError) as error:  # each way in which a connection or an answer is bad
                cause = error.reason if isinstance(error, URLError) else error
                reason, asked = str(getattr(cause, "strerror", None) or cause) or type(cause).__name__, None
            if pause is None or stop.wait(max(pause, _seconds(asked))):
                break
        raise UnavailableError(reason)


def _get(address: str, stop: threading.Event) -> bytes:
    request = Request(address, headers={"User-Agent": f"dcris/{__version__} (referring image segmentation)"})
    with urlopen(request, timeout=30) as response:
        content = bytearray()
        while not stop.is_set() and (part := response.read(1 << 16)):
            content += part
            if len(content) > _MAX_BYTES:
                raise UnavailableError(f"what came has more than {_MAX_BYTES:,} bytes")
        short = response.length  # of what was announced; read(n) says nothing where a connection breaks off
    if stop.is_set():
        raise UnavailableError("it was interrupted")
    if short:
        raise ConnectionError(f"the connection broke {short:,} bytes before the end")
    return bytes(content)


def _seconds(asked: str | None) -> float:
    """What a server's Retry-After asks for, as a number or as a date; 0 where it says nothing that can be understood."""
    if asked is None:
        return 0.0
    try:
        seconds = int(asked) if asked.isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0), _LONGEST_PAUSE)


@dataclass(frozen=True)
class _Folder:
    path: Path
    patience: int | None = None

    def read(self, name: str, stop: threading.Event) -> bytes:
        for folder in (self.path, self.path / "train2014", self.path / "train2017"):
            for naming in NAMINGS:
                file = folder / renamed(name, naming)
                try:
                    return read_bytes(file, _MAX_BYTES)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    raise UnavailableError(f"cannot read {file}: {error.strerror or error}") from error
        raise UnavailableError(f"it is not in {self.path}")


@dataclass
class _Zip:
    """Members are known by the last part of their names alone, and nothing is ever extracted to where a name says."""

    path: Path
    patience: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            self.archive = open_zip(self.path)
        except OSError as error:
            raise DcrisError(f"cannot read {self.path}: {error.strerror}; fetch it again, or name a folder") from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            self.members.setdefault(PurePosixPath(member.filename).name, member)

    def read(self, name: str, stop: threading.Event) -> bytes:
        member = next((found for naming in NAMINGS if (found := self.members.get(renamed(name, naming)))), None)
        if member is None:
            raise UnavailableError(f"it is not in {self.path}")
        if member.file_size > _MAX_BYTES:
            raise UnavailableError(f"{member.filename} has more than {_MAX_BYTES:,} bytes")
        try:
            with self.lock:  # the archive counts its readers without one
                return self.archive.read(member)
        except Exception as error:  # damage, a password, a compression that is not known
            raise UnavailableError(f"cannot read {member.filename} in {self.path}: {error}") from error
