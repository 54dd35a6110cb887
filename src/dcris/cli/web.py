"""`dcris web`: a page on which anybody can try a model."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, device_arguments, log, natural


def add(commands: Any) -> None:
    """Describe the command of this file."""
    web = adder(commands, "dcris ")(
        "web",
        _web,
        "serve a web page on which a model is tried",
        "runs/tiny --port 7860",
        "Only this machine is served unless --host is given. Uploads are kept in memory only, for half an hour.",
    )
    web.add_argument(
        "checkpoints", metavar="CKPT", nargs="+", help=f"{CHECKPOINT}; several on the same towers are chosen from"
    )
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them (%(default)s)")
    web.add_argument("--port", type=natural, default=7860, help="0 is any free one (%(default)s)")
    web.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further host name by which browsers may address the server; may be given several times",
    )
    access = web.add_mutually_exclusive_group()
    access.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for this user name and password; or a file with one such line per user "
        "(default: the environment variable DCRIS_WEB_AUTH)",
    )
    access.add_argument("--no-auth", action="store_true", help="serve other machines without a password")
    web.add_argument("--examples", type=Path, metavar="DIR", help="images to try, in place of generated scenes")
    device_arguments(web)


def _web(args: argparse.Namespace) -> None:
    from dcris.inference.inputs import find_tasks
    from dcris.inference.segmenter import Segmenter
    from dcris.inference.web.app import serve

    examples = None if args.examples is None else [task.path for task in find_tasks([args.examples], ["example"])]
    sources = args.checkpoints[0] if len(args.checkpoints) == 1 else _named(args.checkpoints)
    serve(
        lambda: Segmenter.from_pretrained(sources, device=args.device, precision=args.precision),
        host=args.host,
        port=args.port,
        examples=examples,
        allow_hosts=args.allow_host,
        auth=args.auth,
        no_auth=args.no_auth,
        ready=lambda address: log(f"{address} (Ctrl-C ends it)"),
    )


def _named(sources: list[str]) -> dict[str, str]:
    """Each by the last part of its path, or by all of it where two end alike."""
    short = [Path(source).name for source in sources]
    return {source if short.count(name) > 1 else name: source for name, source in zip(short, sources, strict=True)}
