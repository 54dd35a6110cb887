"""The API: one POST request with an image and phrases, answered with JSON.

The body is the image file, with the parameters in the URL, or a form (multipart/form-data) with the
file in the part `image`. Nothing that a client sends is used as a path or an address.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dcris.errors import DcrisError
from dcris.inference.web.server import HEALTH, Application, health
from dcris.inference.web.service import InferenceService, coco_results

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PATH = "/api/segment"

IMAGE = "image"
"""The part of a form that is the image file."""

PARAMETERS = ("phrase", "threshold", "min_score", "min_area", "adapters", "name", "masks")

_DIGITS = 18
"""Digits of a whole number; far more than an image has pixels."""

# It prints what clients send to standard error, for forms that are refused with a message anyway.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

_PARTS = 64
"""Parts of a form; more than any request needs."""


@dataclass(frozen=True)
class Query:
    """The parameters of a request. Fields: see `Segmenter.predict`, `coco_results`."""

    phrases: list[str]
    threshold: float | None = None
    min_score: float | None = None
    min_area: int = 0
    adapters: str | None = None
    name: str = ""
    masks: bool = False


def make_api(service: InferenceService) -> Application:
    """Return the application that `dcris serve` serves."""
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def segment(request: "Request") -> "Response":
        body, kind = await request.body(), request.headers.get("content-type", "")
        values = list(request.query_params.multi_items())
        if kind.partition(";")[0].strip().lower() == "multipart/form-data":
            image, name, fields = await service.render(lambda: read_form(body, kind))
            if name and not any(key == "name" for key, _ in values + fields):
                fields.append(("name", name))
            values += fields
        else:
            image = body
        query = parse_query(service, values)
        service.require_file(image)
        return JSONResponse(await answer(service, image, query))

    limits = service.limits
    routes = [Route(PATH, segment, methods=["POST"]), Route(HEALTH, health)]
    return Application(routes, {PATH: limits.upload + limits.fields}, close=service.close)


async def answer(service: InferenceService, image: bytes | NDArray[np.uint8], query: Query) -> list[dict[str, Any]]:
    """Return the results for an image (a file, or pixels), as in predictions.json.

    Raises DcrisError as `InferenceService.answer` does.
    """
    return await service.answer(
        image,
        query.phrases,
        lambda found: coco_results(found, query.name, masks=query.masks),
        adapters=query.adapters,
        threshold=query.threshold,
        min_score=query.min_score,
        min_area=query.min_area,
    )


def parse_query(service: InferenceService, values: Iterable[tuple[str, str]]) -> Query:
    """Check the parameters of a request.

    Raises DcrisError for an unknown parameter, one that is given twice, a value of another kind, or
    a phrase that is not UTF-8.
    """
    phrases: list[str] = []
    given: dict[str, str] = {}
    for name, value in values:
        if name not in PARAMETERS:
            raise DcrisError(f"there is no parameter {name[:60]!r}; the parameters are {', '.join(PARAMETERS)}")
        if name == "phrase":
            if "\ufffd" in value:  # in place of what is not UTF-8
                raise DcrisError(f"the phrase {value[:60]!r} was not sent as UTF-8; send it in UTF-8")
            phrases.append(value)
        elif name in given:
            raise DcrisError(f"the parameter {name!r} is given more than once")
        else:
            given[name] = value
    if given.get("masks", "png") != "png":
        raise DcrisError(f"the parameter 'masks' must be png, not {given['masks'][:60]!r}")
    return Query(
        phrases=service.parse_phrases(phrases),
        threshold=parse_number("threshold", given.get("threshold")),
        min_score=parse_number("min_score", given.get("min_score")),
        min_area=int(parse_number("min_area", given.get("min_area"), whole=True) or 0),
        adapters=given.get("adapters"),
        name=given.get("name", ""),
        masks="masks" in given,
    )


def parse_number(name: str, text: str | None, whole: bool = False) -> float | None:
    """Parse the value of a parameter; None if it is not given. Raises DcrisError for other text."""
    if text is None:
        return None
    if whole and len(text) > _DIGITS and text.strip().lstrip("+-").isdigit():
        raise DcrisError(f"the parameter {name!r} is too large: {text[:60]!r}... has too many digits")
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        kind = "a whole number of pixels" if whole else "a number between 0 and 1"
        raise DcrisError(f"the parameter {name!r} must be {kind}, not {text[:60]!r}") from error


def read_form(body: bytes, content_type: str, part: str = IMAGE) -> tuple[bytes, str, list[tuple[str, str]]]:
    """Read a form (multipart/form-data) in memory.

    Args:
        body: the body of the request.
        content_type: its type, with the boundary.
        part: name of the part that may be a file.

    Returns:
        the image file (empty if there is none), its name without folders, and the other fields.

    Raises:
        DcrisError: it is not such a form, is cut off, or has too many parts or another file.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import Field, File, FormParser, parse_options_header

    files: list[File] = []
    fields: list[tuple[str, str]] = []
    ended: list[bool] = []

    def on_file(file: File) -> None:
        files.append(file)
        if file.field_name != part.encode():
            name = _text(file.field_name)[:60]
            raise DcrisError(f"there is a file in the part {name!r}; send one file, in the part {part!r}")
        if len(files) > 1:
            raise DcrisError(f"there are several files in the part {part!r}; send one image a request")

    def on_field(field: Field) -> None:
        if field.field_name == part.encode():
            raise DcrisError(f"the part {part!r} is text and not a file; with curl, send -F {part}=@photo.jpg")
        fields.append((_text(field.field_name), _text(field.value)))
        if len(fields) > _PARTS:
            raise DcrisError(f"the form has more than {_PARTS} parts; send each parameter once")

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    try:
        # Files stay in memory: the body is in memory, and bounded, already.
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            lambda: ended.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": float("inf")},
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise DcrisError(f"the body is not a form, although its Content-Type says so ({error})") from error
    if not ended:
        raise DcrisError("the form is cut off; send it again, with the boundary at its end")
    if not files:
        return b"", "", fields
    content = files[0].file_object
    content.seek(0)
    return content.read(), PureWindowsPath(_text(files[0].file_name)).name, fields


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
