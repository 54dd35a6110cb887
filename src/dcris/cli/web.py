"""`dcris web`: a page on which anybody can try a model."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, device_arguments, natural, say


def add(commands: Any) -> None:
    """Describe the command of this file."""
    web = adder(commands, "dcris ")(
        "web",
        _web,
        "serve a web page on which a model is tried",
        "runs/tiny --port 7860",
        "It is seen on this machine alone unless --host says otherwise, and keeps nothing that is uploaded.",
    )
    web.add_argument(
        "checkpoints", metavar="CKPT", nargs="+", help=f"{CHECKPOINT}; several on the same towers are chosen from"
    )
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of them (%(default)s)")
    web.add_argument("--port", type=natural, default=7860, help="0 is any free one (%(default)s)")
    web.add_argument("--examples", type=Path, metavar="DIR", help="images to try, in place of generated scenes")
    device_arguments(web)


def _web(args: argparse.Namespace) -> None:
    from dcris.outputs.tasks import find_tasks
    from dcris.segmenter import Segmenter
    from dcris.web.page import serve

    examples = None if args.examples is None else [task.path for task in find_tasks([args.examples], ["example"])]
    sources = args.checkpoints[0] if len(args.checkpoints) == 1 else _named(args.checkpoints)
    serve(
        lambda: Segmenter.from_pretrained(sources, device=args.device, precision=args.precision),
        host=args.host,
        port=args.port,
        examples=examples,
        ready=lambda address: say(f"{address} (Ctrl-C ends it)"),
    )


def _named(sources: list[str]) -> dict[str, str]:
    """Each by the last part of its path, or by all of it where two end alike."""
    short = [Path(source).name for source in sources]
    return {source if short.count(name) > 1 else name: source for name, source in zip(short, sources, strict=True)}
