"""`dcris predict`, `dcris convert` and `dcris recipes`: trained models, and what can be trained."""

import argparse
import json
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, device_arguments, natural, say
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    add = adder(commands, "dcris ")
    predict = add("predict", _predict, "segment what phrases refer to", 'runs/tiny photo.jpg -e "left slice" --out out')
    predict.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    predict.add_argument(
        "-e", "--expression", action="append", required=True, metavar="PHRASE", help="may be given several times"
    )
    predict.add_argument("--out", type=Path, required=True, help="folder for the results")
    predict.add_argument(
        "--format", nargs="+", choices=("mask", "overlay", "coco", "scores"), help="what to write (all of it)"
    )
    predict.add_argument(
        "--threshold",
        metavar="NUMBER_OR_RESULT",
        help="probability above which a pixel is the object's (0.35), or the result file of `dcris evaluate` that records one",
    )
    device_arguments(predict)

    convert = add(
        "convert",
        _convert,
        "turn published DETRIS checkpoints into this format",
        "base_refcoco.pth --out models",
        "Each FILE becomes a checkpoint directory of its name in DIR, with the frozen towers in it.",
    )
    convert.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .pth of thuteam/DETRIS on the Hub")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the directories go")
    convert.add_argument(
        "--word-length", type=natural, metavar="N", help="tokens per phrase, where the file's name does not say it"
    )
    convert.add_argument("--half", action="store_true", help="store adapters and head in float16, in half the space")

    recipes = add("recipes", _recipes, "list the recipes with their trainable counts", "--show dcris_b")
    recipes.add_argument("--show", metavar="RECIPE", help="print a recipe's whole configuration")
    recipes.add_argument("--json", action="store_true", help="print JSON")


def _predict(args: argparse.Namespace) -> None:
    from dcris.outputs import FORMATS, find_images, predict_to_files
    from dcris.segmenter import Segmenter

    images, threshold = find_images(args.images), _threshold(args.threshold)
    segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
    for image, answer in predict_to_files(
        segmenter, images, args.expression, args.out, args.format or FORMATS, threshold
    ):
        place = f"box {answer.box}" if answer.box else "nothing found"
        say(f"{image}: {answer.phrase!r} {place}, score {answer.score:.2f}")


def _threshold(given: str | None) -> float | None:
    """A number as typed, or the one a result file records."""
    from dcris.files import read_json

    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        result = read_json(Path(given), "the threshold, neither a number nor a result file")
    threshold = result.get("threshold") if isinstance(result, dict) else None
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise DcrisError(f"{given} records no threshold; it is no result of `dcris evaluate`")
    return float(threshold)


def _convert(args: argparse.Namespace) -> None:
    from dcris.convert import convert_file

    targets = {args.out / file.stem: file for file in args.files}
    if len(targets) < len(args.files):
        raise DcrisError("two of the files have one name, so their results would be in one place; convert them apart")
    for target, file in targets.items():
        config = convert_file(file, target, args.word_length, half=args.half)
        say(
            f"{target}: {config.recipe} on {config.data.dataset}, phrases of {config.data.word_length} tokens; "
            f'next: dcris predict {target} photo.jpg -e "left slice" --out out'
        )


def _recipes(args: argparse.Namespace) -> None:
    from dcris.recipes import RECIPES, get_recipe

    if args.show is not None:
        print(json.dumps(get_recipe(args.show).model_dump(mode="json"), indent=2))
        return
    import torch

    from dcris.model.dcris import DCRIS

    rows = []
    for name, recipe in RECIPES.items():
        with torch.device("meta"):  # shapes without memory
            rows.append({"name": name, **DCRIS(recipe().model).count_weights()})
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'recipe':<20}{'adapters':>13}{'head':>14}{'frozen':>14}")
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        print(f"{row['name']:<20}{row['adapters']:>13,}{row['head']:>14,}{row['frozen']:>14,}")
        print(f"    {' '.join((recipe.__doc__ or '').split())}")
    print("train one with: dcris train RECIPE --data ROOT --out DIR; adapters are all trained weights beside the head")
