"""What a labelling backend for Label Studio has to find out of a request: the tags of the labelling
interface, the phrases that are asked for, and the image of a task.

A request names the image, so the operator names where images may come from: a folder, or a Label
Studio server. Sources: the tags at https://labelstud.io/tags; label_studio/ml/models.py and
label_studio/tasks/serializers.py for what is sent.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree.ElementTree import ParseError, XMLParser

from dcris.data.table import is_utf8, shown
from dcris.data.tools.annotation import PHRASE_FIELDS
from dcris.data.tools.label_studio import BrushTags
from dcris.errors import DcrisError
from dcris.utils.files import parse_json, read_bytes
from dcris.utils.http import HTTP_ERRORS, get, is_url, reason_of

TOKEN = "LABEL_STUDIO_API_KEY"
"""Environment variable with the token of Label Studio; the SDK uses the same name. Other users of
the machine can see arguments, but not the environment."""

_LOCAL = "/data/local-files/"
"""Path of the addresses of files in Label Studio's document root, which `?d=` names."""

_MAX_TAGS = 10_000
"""Most tags of a labelling interface."""

_ACCESS_SECONDS = 200.0
"""Time for which an access token is used. Label Studio issues them for 5 minutes."""


@dataclass(frozen=True, slots=True)
class LabellingInterface:
    """The tags of a labelling interface (Label Studio's labelling configuration)."""

    tags: BrushTags
    field: str
    """Field of a task's data with the address of the image."""
    labels: tuple[str, ...]
    """Labels of the brush."""
    prompts: frozenset[str]
    """Names of the text areas that ask for masks: those of the image, not of a region."""

    @classmethod
    def parse(cls, xml: str) -> "LabellingInterface":
        """Read a labelling configuration.

        Raises DcrisError if it is not XML, or has no brush with labels on an image.
        """
        found = _Tags()
        try:
            parser = XMLParser(target=found)
            parser.feed(xml)
            parser.close()
        except (ParseError, ValueError) as error:
            raise DcrisError(f"the labelling interface is not XML ({error})") from error
        images = {tag["name"]: tag.get("value", "") for name, tag, _ in found.tags if name == "Image" and "name" in tag}
        brushes = [
            (tag, [label.get("value") or "" for label in labels])
            for name, tag, labels in found.tags
            if name == "BrushLabels" and tag.get("toName") in images and "name" in tag
        ]
        brush, labels = brushes[0] if brushes else ({}, [])
        image = brush.get("toName", "")
        if not any(labels) or not images[image].startswith("$"):
            raise DcrisError(
                'the labelling interface needs an <Image value="$image"> and a <BrushLabels> for it with a <Label>; the page '
                '"Labelling with a model" of the documentation has one'
            )
        areas = [
            tag for name, tag, _ in found.tags if name == "TextArea" and tag.get("toName") == image and "name" in tag
        ]
        of_regions = [tag["name"] for tag in areas if tag.get("perRegion") == "true"]
        prompts = frozenset(tag["name"] for tag in areas) - frozenset(of_regions)
        tags = BrushTags(image, brush["name"], of_regions[0] if of_regions else None)
        return cls(tags, images[image].removeprefix("$"), tuple(filter(None, labels)), prompts)

    def label_of(self, phrase: str) -> str:
        """Return the label for the mask of a phrase: the label that equals it, else the first."""
        same = (label for label in self.labels if label.lower() == phrase.lower())
        return next(same, self.labels[0])

    def asked(self, results: Iterable[tuple[str, list[str]]]) -> list[str]:
        """Return the phrase that an annotator has just entered, or nothing.

        Args:
            results: of the interaction: the name of the tag and the texts. A text area has all
                texts that were added to it, the newest last.
        """
        said = [texts[-1] for name, texts in results if name in self.prompts and texts]
        return said[-1:]

    def phrases_of(self, data: Mapping[str, Any]) -> list[str]:
        """Return the phrases for a task without an interaction: those in its data, in a field such
        as `phrase` or `captions`; else the labels, if no text area has the phrases."""
        fields = {name.lower(): value for name, value in data.items() if value}
        for name in PHRASE_FIELDS:
            values = fields.get(name)
            values = [values] if type(values) is str else values
            if type(values) is list and all(type(value) is str for value in values):
                return list(dict.fromkeys(values))
        return [] if self.prompts or self.tags.text else list(self.labels)


class _Tags:
    """Collects the tags of an XML document, each with the labels inside it."""

    def __init__(self) -> None:
        self.tags: list[tuple[str, dict[str, str], list[dict[str, str]]]] = []
        self._open: list[list[dict[str, str]]] = []
        self._count = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Add a tag."""
        self._count += 1
        if self._count > _MAX_TAGS:
            raise ValueError(f"it has more than {_MAX_TAGS:,} tags")
        labels: list[dict[str, str]] = []
        if tag == "Label" and self._open:
            self._open[-1].append(attributes)
        else:
            self.tags.append((tag, attributes, labels))
        # Labels may be in a <View> or <Style> inside the brush.
        self._open.append(self._open[-1] if tag in ("View", "Style", "Label") and self._open else labels)

    def end(self, tag: str) -> None:
        """Leave a tag."""
        self._open.pop()

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        """Refuse a document type: its entities could name files, or stand for gigabytes."""
        raise ValueError("it has a document type")

    def close(self) -> None:
        """Nothing to return."""


class TaskImages:
    """Reads the images of tasks, from nowhere but where the operator allows.

    Args:
        folder: what Label Studio's LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is: local files are read
            below it.
        url: of the Label Studio server, from which uploads and local files are fetched.
        token: of a user there: a personal access token or a legacy one. White space around it is
            dropped.

    Raises:
        DcrisError: the folder does not exist, the URL is none or has more than scheme, host and
            path, or the token cannot be one. The messages quote no secret.
    """

    def __init__(self, folder: Path | None = None, url: str | None = None, token: str | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise DcrisError(f"there is no folder {folder} with images; check the name")
        if url is not None and any(mark in url for mark in "@?#"):  # messages quote addresses: no password in them
            raise DcrisError(
                f"the address of Label Studio must have no user, password, '?' or '#'; give a token with {TOKEN} instead"
            )
        if url is not None and not _is_server(url):
            raise DcrisError(f"{url!r} is not the address of a server, such as http://localhost:8080")
        token = (token or "").strip()
        # http.client would quote a header that it refuses, and so the token.
        if not (token.isascii() and token.isprintable()):
            raise DcrisError(f"{TOKEN} has a character that no token has; copy the token again")
        self._folder = None if folder is None else folder.resolve()
        self._url, self._token = (url or "").rstrip("/"), token
        self._access: tuple[str, float] | None = None

    def read(self, address: Any, most: int) -> bytes:
        """Return the file of an image.

        Args:
            address: as in the data of a task: `/data/upload/...` or `/data/local-files/?d=...`, or
                the same with the operator's server before it.
            most: limit on its bytes.

        Raises:
            DcrisError: the address is of another kind or place, or the file cannot be had.
        """
        try:
            parts = urlsplit(address if type(address) is str and is_utf8(address) else "")
            path, names = unquote(parts.path), parse_qs(parts.query).get("d", [])
        except ValueError:
            parts, path, names = urlsplit(""), "", []
        base = urlsplit(self._url)
        path = path.removeprefix(base.path)
        local = path == _LOCAL
        held = path.startswith("/data/") and ".." not in path.split("/") and (not local or len(names) == 1)
        server = parts.scheme, parts.netloc
        elsewhere = any(server) and server != (base.scheme, base.netloc)
        if held and elsewhere and not self._url and is_url(address):
            raise DcrisError(
                f"the image {shown(address)} is on a server that was not given; if it is your Label Studio, give its address "
                "with --url"
            )
        if elsewhere or not held:
            raise DcrisError(
                f"the image {shown(address)} is not one that Label Studio itself holds; upload it, or use Label Studio's local "
                "files"
            )
        if local and self._folder is not None:
            return self._read_local(names[0], most)
        if not self._url:
            raise DcrisError(
                f"the image {shown(address)} is in Label Studio; give its address with --url, and a token with {TOKEN}"
            )
        return self._fetch(self._url + quote(path) + (f"?d={quote(names[0])}" if local else ""), most)

    def _read_local(self, name: str, most: int) -> bytes:
        assert self._folder is not None
        try:
            path = (self._folder / name).resolve()
            if not path.is_relative_to(self._folder):
                raise DcrisError(f"the image {shown(name)} is outside the folder of the images")
            return read_bytes(path, most)
        except OSError as error:
            raise DcrisError(f"cannot read the image {shown(name)}: {error.strerror or error}") from error
        except ValueError as error:  # a zero byte
            raise DcrisError(f"cannot read the image {shown(name)}: {error}") from error
        except RuntimeError as error:  # of Path.resolve, before Python 3.13
            raise DcrisError(f"cannot read the image {shown(name)}: its links lead in a circle") from error

    def _fetch(self, url: str, most: int) -> bytes:
        try:
            return get(url, most, headers=self._authorization(), redirects=False)
        except HTTP_ERRORS as error:
            raise DcrisError(
                f"cannot get {url} from Label Studio: {reason_of(error)}; check --url and {TOKEN}"
            ) from error

    def _authorization(self) -> dict[str, str]:
        """Return the header for the token.

        A personal access token has to be exchanged for one that is valid for minutes. Raises
        HTTP_ERRORS.
        """
        if not self._token:
            return {}
        if self._token.count(".") != 2:
            return {"Authorization": f"Token {self._token}"}
        if self._access is None or time.monotonic() - self._access[1] > _ACCESS_SECONDS:
            answer = get(
                f"{self._url}/api/token/refresh/",
                100_000,
                headers={"Content-Type": "application/json"},
                body=json.dumps({"refresh": self._token}).encode(),
                redirects=False,
            )
            found = parse_json(answer.decode())
            access = found.get("access") if type(found) is dict else None
            if type(access) is not str or not access.isascii() or not access.isprintable():
                raise ValueError("there is no access token in the answer")
            self._access = access, time.monotonic()
        return {"Authorization": f"Bearer {self._access[0]}"}


def _is_server(url: str) -> bool:
    """Return whether a text is an http or https address with a host and a possible port."""
    try:
        parts = urlsplit(url)
        return is_url(url) and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
