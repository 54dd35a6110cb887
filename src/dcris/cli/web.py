"""The commands `dcris web` and `dcris serve`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcris.cli.common import CHECKPOINT, access_of, adder, device_arguments, server_arguments, serving_at

if TYPE_CHECKING:
    from dcris.inference.segmenter import Segmenter


def add(commands: Any) -> None:
    """Add the commands of this file to the parser."""
    add = adder(commands, "dcris ")
    web = add(
        "web",
        _web,
        "serve a web page for trying a model",
        "runs/tiny --port 7860",
        "Listens on this machine only unless --host is given. Uploads are kept in memory only, until half an hour "
        "after their last use.",
    )
    _model_arguments(web, "selected on the page")
    server_arguments(web, port=7860)
    web.add_argument(
        "--allow-frame",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="other site whose pages may show this page in a frame, such as https://huggingface.co; repeatable",
    )
    web.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder of example images (default: photographs or generated scenes)",
    )
    device_arguments(web)
    serve = add(
        "serve",
        _serve,
        "serve the HTTP API of the web page without the page",
        "photos --port 7860",
        "One POST with an image and phrases is answered with masks and scores. Listens on this machine only unless "
        "--host is given. Images are kept in memory only, until they are answered.",
    )
    _model_arguments(serve, "selected by the parameter `adapters`")
    server_arguments(serve, port=7860)
    device_arguments(serve)


def _model_arguments(parser: argparse.ArgumentParser, selected: str) -> None:
    parser.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="*",
        help=f"{CHECKPOINT} (default: photos); several on the same encoders can be {selected}",
    )


def _web(args: argparse.Namespace) -> None:
    from dcris.inference.inputs import find_tasks
    from dcris.inference.web.app import gradio_settings, make_app
    from dcris.inference.web.server import serve
    from dcris.inference.web.service import InferenceService, Limits

    examples = None if args.examples is None else [task.path for task in find_tasks([args.examples], ["example"])]
    load, limits = _loader(args), Limits()
    title = ", ".join(_named(args.checkpoints or ["photos"]))
    with gradio_settings():
        serve(
            lambda: make_app(InferenceService(load(), limits), examples, title),
            access_of(args, args.allow_frame),
            limits,
            serving_at,
        )


def _serve(args: argparse.Namespace) -> None:
    from dcris.inference.web.api import make_api
    from dcris.inference.web.server import serve
    from dcris.inference.web.service import InferenceService, Limits

    load, limits = _loader(args), Limits()
    serve(lambda: make_api(InferenceService(load(), limits)), access_of(args), limits, serving_at)


def _loader(args: argparse.Namespace) -> "Callable[[], Segmenter]":
    """Return a function that loads the models of the command line."""
    from dcris.inference.segmenter import Segmenter

    sources = _named(args.checkpoints or ["photos"])
    return lambda: Segmenter.from_pretrained(sources, device=args.device, precision=args.precision)


def _named(sources: list[str]) -> dict[str, str]:
    """Name each source by the last part of its path, or by the whole path if two share it."""
    paths = [Path(source) for source in sources]
    short = [path.resolve().name if path.name in ("", "..") else path.name for path in paths]
    return {source if short.count(name) > 1 else name: source for name, source in zip(short, sources, strict=True)}
