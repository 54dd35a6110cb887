"""The command `dcris label-studio`."""

import argparse
import os
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, access_of, adder, device_arguments, on_error, server_arguments, serving_at


def add(commands: Any) -> None:
    """Add the command of this file to the parser."""
    parser = adder(commands, "dcris ")(
        "label-studio",
        _label_studio,
        "serve a model to Label Studio: an annotator enters a phrase and gets its mask",
        "photos --url http://localhost:8080 --images photos",
        "The backend of a Label Studio project. Images are read below --images, or fetched from --url with the token in the "
        "environment variable LABEL_STUDIO_API_KEY; requests cannot name other places. Label Studio has to allow backends on "
        "its own machine: start it with USE_DEFAULT_BANNED_SUBNETS=false.",
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", nargs="?", default="photos", help=f"{CHECKPOINT} (default: photos)"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images: the LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT of Label Studio",
    )
    parser.add_argument(
        "--url",
        default=os.environ.get("LABEL_STUDIO_URL") or None,
        help="address of Label Studio, for images that were uploaded there (default: environment variable LABEL_STUDIO_URL)",
    )
    server_arguments(parser, port=9090)
    device_arguments(parser)


def _label_studio(args: argparse.Namespace) -> None:
    from dcris.inference.labelling import TOKEN, TaskImages
    from dcris.inference.segmenter import Segmenter
    from dcris.inference.web.label_studio import make_backend
    from dcris.inference.web.server import Application, serve
    from dcris.inference.web.service import InferenceService, Limits

    images, limits = TaskImages(args.images, args.url, os.environ.get(TOKEN)), Limits()

    def make() -> Application:
        segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
        return make_backend(InferenceService(segmenter, limits), images, on_error)

    serve(make, access_of(args), limits, serving_at)
