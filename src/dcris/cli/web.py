"""The command `dcris web`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, device_arguments, log, natural


def add(commands: Any) -> None:
    """Add the command of this file to the parser."""
    web = adder(commands, "dcris ")(
        "web",
        _web,
        "serve a web page for trying a model",
        "runs/tiny --port 7860",
        "Listens on this machine only unless --host is given. Uploads are kept in memory only, until half an hour "
        "after their last use.",
    )
    web.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="*",
        help=f"{CHECKPOINT} (default: photos); several on the same towers can be selected on the page",
    )
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    web.add_argument(
        "--port", type=natural, default=7860, help="port to listen on; 0 for any free one (default: %(default)s)"
    )
    web.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="further host name that clients may use; repeatable",
    )
    web.add_argument(
        "--allow-frame",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="other site whose pages may show this page in a frame, such as https://huggingface.co; repeatable",
    )
    access = web.add_mutually_exclusive_group()
    access.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="required user name and password, or a file with one such line per user "
        "(default: the environment variable DCRIS_WEB_AUTH)",
    )
    access.add_argument("--no-auth", action="store_true", help="serve other machines without a password")
    web.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder of example images (default: photographs or generated scenes)",
    )
    device_arguments(web)


def _web(args: argparse.Namespace) -> None:
    from dcris.inference.inputs import find_tasks
    from dcris.inference.segmenter import Segmenter
    from dcris.inference.web.app import serve

    examples = None if args.examples is None else [task.path for task in find_tasks([args.examples], ["example"])]
    checkpoints = args.checkpoints or ["photos"]
    sources = checkpoints[0] if len(checkpoints) == 1 else _named(checkpoints)
    serve(
        lambda: Segmenter.from_pretrained(sources, device=args.device, precision=args.precision),
        host=args.host,
        port=args.port,
        examples=examples,
        allow_hosts=args.allow_host,
        allow_frames=args.allow_frame,
        auth=args.auth,
        no_auth=args.no_auth,
        ready=lambda address: log(f"{address} (stop with Ctrl-C)"),
    )


def _named(sources: list[str]) -> dict[str, str]:
    """Name each source by the last part of its path, or by the whole path if two share it."""
    short = [Path(source).name for source in sources]
    return {source if short.count(name) > 1 else name: source for name, source in zip(short, sources, strict=True)}
