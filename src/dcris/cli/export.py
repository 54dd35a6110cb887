"""The command `dcris export`."""

import argparse
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, log
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Add the command of this file to the parser."""
    export = adder(commands, "dcris ")(
        "export",
        _export,
        "export a trained model to ONNX",
        "runs/tiny --out onnx/tiny",
        "Writes fit.onnx, text.onnx, image.onnx and model.json to DIR after comparing the graphs with PyTorch.",
    )
    export.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, new or empty")
    export.add_argument(
        "--int8",
        action="store_true",
        help="store matrix weights in 8 bits: a quarter of the size, slightly different masks",
    )


def _export(args: argparse.Namespace) -> None:
    if args.out.suffix == ".onnx":
        raise DcrisError(
            f"an export consists of several files, but {args.out} is a file name; give a folder: --out "
            f"{args.out.with_suffix('')}"
        )
    from dcris.inference.export_onnx import export_onnx
    from dcris.inference.segmenter import Segmenter

    segmenter = Segmenter.from_pretrained(args.checkpoint, device="cpu", precision="float32")
    found = export_onnx(segmenter, args.out, int8=args.int8, progress=log)
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 1e6
    log(
        f"{args.out}: {size:.1f} MB; probabilities differ from PyTorch's by {found['largest']:.1g} at most, "
        f"{found['mean']:.1g} on average"
    )
