"""A backend for Label Studio: an annotator enters a phrase and gets its mask.

It speaks the ML backend protocol. Label Studio sends a task with the labelling interface, and for
an interaction what the annotator entered; the answer has brush masks with the phrase as the text of
their region. What a request says of paths, addresses and tokens is not used, except to find the
image where the operator allows it (`TaskImages`). Sources: label_studio/ml/api_connector.py and
ml/models.py of Label Studio 1.23.2, label_studio_ml/api.py of label-studio-ml-backend.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from dcris.data.table import shown
from dcris.data.tools.label_studio import brush_results
from dcris.errors import DcrisError
from dcris.inference.label_studio import label_studio_prediction, region_id
from dcris.inference.labelling import LabellingInterface, TaskImages
from dcris.inference.prediction import Prediction
from dcris.inference.segmenter import Segmenter
from dcris.inference.web.server import HEALTH, Application
from dcris.inference.web.service import BusyError, InferenceService
from dcris.utils.files import parse_json
from dcris.version import __version__

if TYPE_CHECKING:
    from starlette.requests import Request

_HEALTH = ("/", HEALTH)
"""Paths by which Label Studio sees whether the backend answers. They need no password."""

_MAX_TASKS = 10_000
"""Most tasks of a request."""

_MAX_RESULTS = 10_000
"""Most regions of an interaction, and most texts of one."""

_SECONDS = 80.0
"""Time after which no further task of a request is begun: Label Studio waits for an answer for
100 s (ML_TIMEOUT_PREDICT)."""


class _Value(BaseModel):
    text: Annotated[list[str], Field(max_length=_MAX_RESULTS)] | str = []


class _Result(BaseModel):
    from_name: str = ""
    value: _Value = Field(default_factory=_Value)


class _Context(BaseModel):
    result: list[_Result] = Field([], max_length=_MAX_RESULTS)


class _Parameters(BaseModel):
    context: _Context | None = None


class _Task(BaseModel):
    id: int | None = None
    data: dict[str, Any]


class PredictRequest(BaseModel):
    """The fields of a request for predictions that are used; Label Studio sends more."""

    tasks: list[_Task] = Field(max_length=_MAX_TASKS)
    label_config: str
    params: _Parameters | None = None


class WebhookRequest(BaseModel):
    """The field of an event that is used."""

    action: str = ""


class SetupRequest(BaseModel):
    """The field of a request to set up a project that is used."""

    project: str = ""
    schema_: str = Field(default="", alias="schema")


_Request = TypeVar("_Request", bound=BaseModel)


def make_backend(
    service: InferenceService, images: TaskImages, log: Callable[[str], None] = lambda line: None
) -> Application:
    """Return the application that `dcris label-studio` serves.

    Args:
        service: the model.
        images: where the images of tasks come from.
        log: called with each error: Label Studio does not show the messages of its backends.
    """
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    version = model_version(service.segmenter)

    async def read(kind: type[_Request], request: "Request") -> _Request:
        body = await request.body()
        return await service.render(lambda: _parse(kind, body))  # a large one takes a second

    async def health(request: "Request") -> Response:
        return JSONResponse({"status": "UP", "model_class": "dcris"})

    async def versions(request: "Request") -> Response:
        return JSONResponse({"versions": [version]})

    async def setup(request: "Request") -> Response:
        """Answer with the version of the model.

        An interface without the tags is not an error here: a project may get its interface later.
        """
        asked = await read(SetupRequest, request)
        try:
            await service.render(lambda: LabellingInterface.parse(asked.schema_))
        except BusyError:
            raise
        except DcrisError as error:
            log(f"project {shown(asked.project)}: {error}")
        return JSONResponse({"model_version": version})

    async def predict(request: "Request") -> Response:
        asked = await read(PredictRequest, request)
        interface = await service.render(lambda: LabellingInterface.parse(asked.label_config))
        context = asked.params.context if asked.params else None
        # No prediction, and not an empty one: Label Studio would keep that, and not ask again.
        results: list[dict[str, Any] | list[Any]] = [[] for _ in asked.tasks]
        problems: list[tuple[_Task, DcrisError]] = []
        end = time.monotonic() + _SECONDS
        for number, task in enumerate(asked.tasks):
            if number and time.monotonic() > end:
                log(f"{len(asked.tasks) - number} of {len(asked.tasks)} tasks are left; retrieve predictions again")
                break
            try:
                results[number] = await _answer(service, images, interface, task, context, version)
            except BusyError:
                raise
            except DcrisError as error:
                problems.append((task, error))
        # If no task has a prediction, the first problem is the answer, and is logged with it.
        answer = problems.pop(0)[1] if problems and len(problems) == len(asked.tasks) else None
        for task, problem in problems:
            log(f"task {task.id}: {problem}")
        if answer is not None:
            raise answer
        return JSONResponse({"results": results, "model_version": version})

    async def webhook(request: "Request") -> Response:
        """Ignore the events of the project, to which Label Studio subscribes every backend."""
        if (await read(WebhookRequest, request)).action == "START_TRAINING":
            return await train(request)
        return JSONResponse({"status": "ignored"})

    async def train(request: "Request") -> Response:
        raise DcrisError(
            "this server does not train; export the annotations, then `dcris data import` and `dcris train`"
        )

    routes = [
        *(Route(path, health) for path in _HEALTH),
        Route("/versions", versions),
        Route("/setup", setup, methods=["POST"]),
        Route("/predict", predict, methods=["POST"]),
        Route("/webhook", webhook, methods=["POST"]),
        Route("/train", train, methods=["POST"]),
    ]
    bodies = dict.fromkeys(("/setup", "/predict", "/webhook", "/train"), service.limits.upload)
    return Application(routes, bodies, public=_HEALTH, close=service.close, log=log)


def model_version(segmenter: Segmenter) -> str:
    """Return the name under which Label Studio stores predictions of this model.

    It differs between models, since Label Studio keeps the predictions of a version that it has.
    """
    return f"dcris {__version__} {segmenter.config.recipe} {segmenter.fingerprint[:8]}"


async def _answer(
    service: InferenceService,
    images: TaskImages,
    interface: LabellingInterface,
    task: _Task,
    context: _Context | None,
    version: str,
) -> dict[str, Any]:
    """Return the prediction for a task: a region for each phrase with a mask.

    Raises DcrisError, and BusyError if too many requests are waiting.
    """
    if context and context.result:
        said = ((each.from_name, _lines(each.value.text)) for each in context.result)
        phrases = interface.asked(said)
    else:
        phrases = interface.phrases_of(task.data)
    if not phrases:
        return label_studio_prediction([], version)
    most = service.limits.phrases
    groups = [service.parse_phrases(phrases[start : start + most]) for start in range(0, len(phrases), most)]
    address = task.data.get(interface.field)
    data = await service.render(lambda: images.read(address, service.limits.upload))

    def encode(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        regions = []
        for found in predictions:
            if found.mask.any():
                regions += brush_results(
                    region_id(f"{address}\0{found.phrase}"),
                    found.mask,
                    interface.label_of(found.phrase),
                    [found.phrase],
                    tags=interface.tags,
                    score=found.score,
                )
        return regions

    regions = [region for group in groups for region in await service.answer(data, group, encode)]
    return label_studio_prediction(regions, version)


def _lines(text: list[str] | str) -> list[str]:
    return [text] if isinstance(text, str) else text


def _parse(kind: type[_Request], body: bytes) -> _Request:
    """Read a request. Raises DcrisError if it is not of this kind."""
    try:
        return kind.model_validate(parse_json(body.decode()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DcrisError(f"the request is not one of Label Studio: {place}: {first['msg']}") from error
    except ValueError as error:
        raise DcrisError(f"the request is not JSON: {error}") from error
