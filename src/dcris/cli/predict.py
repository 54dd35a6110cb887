"""The commands `dcris predict`, `dcris convert` and `dcris recipes`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from dcris.cli.common import CHECKPOINT, adder, argument, device_arguments, log, natural, positive
from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement


def add(commands: Any) -> None:
    """Add the commands of this file to the parser."""
    add = adder(commands, "dcris ")
    predict = add(
        "predict",
        _predict,
        "segment the objects that phrases refer to",
        'photos photo.jpg -e "left dog"',
        "Existing results are skipped, so the same command resumes an interrupted run, and further images can be added to the "
        "folder. Results of images whose phrases have changed are replaced. Files that cannot be read are skipped and listed "
        "at the end. Use several GPUs with: torchrun --nproc-per-node N -m dcris predict ...",
    )
    predict.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    predict.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE_OR_FOLDER",
        help="images, folders of images, videos, and quoted patterns such as 'photos/**/*.jpg'",
    )
    predict.add_argument(
        "-e", "--expression", action="append", metavar="PHRASE", help="phrase to segment; repeat for several phrases"
    )
    predict.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="list of images and phrases: a .csv or .tsv with the columns image and phrase, or a .jsonl",
    )
    predict.add_argument("--recursive", action="store_true", help="search subfolders")
    predict.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help="predict every N-th frame of a video (default: %(default)s)",
    )
    predict.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    predict.add_argument(
        "--format",
        nargs="+",
        choices=("mask", "annotated", "overlay", "coco", "scores", "cutout", "label-studio"),
        help="files to write (default: mask annotated coco scores; for videos mask overlay coco)",
    )
    predict.add_argument(
        "--threshold",
        metavar="NUMBER_OR_RESULT",
        help="probability above which a pixel belongs to the mask, or a result file of `dcris evaluate` to take it from "
        "(default: 0.35)",
    )
    predict.add_argument(
        "--min-score",
        type=float,
        metavar="SCORE",
        help="score from 0 to 1 below which the mask is empty (default: 0.5 for a model with a presence head, else 0)",
    )
    predict.add_argument(
        "--min-area",
        type=natural,
        default=0,
        metavar="PIXELS",
        help="size below which the mask is empty (default: %(default)s)",
    )
    predict.add_argument(
        "--refine",
        choices=get_args(Refinement),
        help="guided: move the edges of masks to edges of the image (default: the model's setting, data.refine)",
    )
    predict.add_argument(
        "--image-url",
        metavar="PREFIX",
        help="URL prefix of the image names for label-studio (default: /data/local-files/?d=)",
    )
    predict.add_argument(
        "--overwrite", action="store_true", help="predict again and replace existing results for these images"
    )
    device_arguments(predict)

    convert = add(
        "convert",
        _convert,
        "convert published DETRIS checkpoints",
        "base_refcoco.pth --out models",
        "Writes each FILE as a checkpoint directory in DIR, named like the file, with the frozen towers.",
    )
    convert.add_argument("files", type=Path, nargs="+", metavar="FILE", help=".pth file of thuteam/DETRIS on the Hub")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint directories")
    convert.add_argument(
        "--word-length", type=natural, metavar="N", help="tokens per phrase (default: from the file name)"
    )
    convert.add_argument(
        "--half", action="store_true", help="store adapters and head in float16, which halves their size"
    )

    recipes = add("recipes", _recipes, "list the recipes with their weight counts", "--show dcris_b")
    recipes.add_argument("--show", metavar="RECIPE", help="print the whole configuration of a recipe")
    recipes.add_argument("--json", action="store_true", help="print JSON")


def _predict(args: argparse.Namespace) -> None:
    if args.pairs is not None and (args.images or args.expression):
        raise DcrisError("--pairs already gives images and phrases; use either --pairs or IMAGE_OR_FOLDER with -e")
    if args.pairs is None and not args.images:
        raise DcrisError("no image was given; add IMAGE_OR_FOLDER, or a list with --pairs")
    if args.pairs is None and not args.expression:
        raise DcrisError("no phrase was given; add one with -e, or a list with --pairs")

    from datetime import timedelta

    from tqdm import tqdm

    from dcris.inference.batch import LOCAL_FILES, BatchOptions, BatchPredictor, Done, Failed
    from dcris.inference.inputs import find_tasks, read_pairs
    from dcris.inference.segmenter import Segmenter
    from dcris.utils.distributed import processes

    notes: list[str] = []
    if args.pairs is not None:
        tasks = read_pairs(args.pairs)
    else:
        tasks = find_tasks(
            args.images, args.expression, out=args.out, recursive=args.recursive, on_skipped=notes.append
        )
    options = BatchOptions(
        formats=args.format,
        threshold=_threshold(args.threshold),
        min_score=args.min_score,
        min_area=args.min_area,
        refine=args.refine,
        every=args.every,
        overwrite=args.overwrite,
        image_url=LOCAL_FILES if args.image_url is None else args.image_url,
    )
    # A rank with a long video keeps the others waiting.
    with processes(args.device, timeout=timedelta(days=7)) as group:
        segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
        predictor = BatchPredictor(segmenter, tasks, args.out, options, group)
        notes += predictor.notes
        if predictor.already:
            notes.append(f"{predictor.already} of {len(tasks)} are done already in {args.out}")
        if "label-studio" in predictor.formats and any(task.video for task in tasks):
            notes.append("label_studio.json has images only; use mask, overlay or coco for the videos")
        if args.format and "annotated" in args.format and any(task.video for task in tasks):
            notes.append("annotated pictures are of images only; use overlay for the videos")
        for line in notes if group.first else ():
            log(line)
        total = None if predictor.videos else len(predictor.images)
        quiet = not (group.first and sys.stderr.isatty())
        with tqdm(total=total, unit="frame" if predictor.videos else "image", disable=quiet) as bar:
            for event in predictor.run():
                with tqdm.external_write_mode():
                    if isinstance(event, Done):
                        frame = "" if event.frame is None else f", frame {event.frame}"
                        for found in event.predictions:
                            log(f"{event.task.path}{frame}: {found.phrase!r} {found.describe()}")
                    elif isinstance(event, Failed):
                        log(f"{event.task.path}: skipped; {event.reason}")
                    else:
                        log(f"{event.path}: {event.description}")
                if isinstance(event, Done | Failed):
                    bar.update()


def _threshold(given: str | None) -> float | None:
    """Parse a threshold, or read it from a result file.

    Raises DcrisError if it is not between 0 and 1.
    """
    from dcris.inference.prediction import require_threshold
    from dcris.utils.files import read_json

    if given is None:
        return None
    try:
        return require_threshold(float(given))
    except ValueError:
        result = read_json(Path(given), "the threshold (neither a number nor a result file)")
    threshold = result.get("threshold") if isinstance(result, dict) else None
    if not isinstance(threshold, int | float) or isinstance(threshold, bool):
        raise DcrisError(f"{given} has no threshold; give a number or a result file of `dcris evaluate`")
    return require_threshold(threshold)


def _convert(args: argparse.Namespace) -> None:
    from dcris.checkpoints.convert_detris import convert_file

    targets = {args.out / file.stem: file for file in args.files}
    if len(targets) < len(args.files):
        raise DcrisError(
            "two of the files have the same name and would be written to the same place; convert them into different folders"
        )
    for target, file in targets.items():
        config = convert_file(file, target, args.word_length, half=args.half)
        log(
            f"{target}: {config.recipe} on {config.data.dataset}, {config.data.word_length} tokens per phrase; "
            f'next: dcris predict {argument(target)} photo.jpg -e "left slice" --out out'
        )


def _recipes(args: argparse.Namespace) -> None:
    from dcris.recipes import RECIPES, get_recipe

    if args.show is not None:
        log(json.dumps(get_recipe(args.show).model_dump(mode="json"), indent=2))
        return
    from dcris.models.segmentation import ReferringSegmenter
    from dcris.utils.device import shapes_only

    rows = []
    for name, recipe in RECIPES.items():
        with shapes_only():
            rows.append({"name": name, **ReferringSegmenter(recipe.config.model).count_weights()})
    if args.json:
        log(json.dumps(rows, indent=2))
        return
    log(f"{'recipe':<20}{'adapters':>13}{'head':>14}{'frozen':>14}")
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        log(f"{row['name']:<20}{row['adapters']:>13,}{row['head']:>14,}{row['frozen']:>14,}")
        log(f"    {recipe.summary}")
    log("Train one with: dcris train RECIPE --data ROOT --out DIR. Adapters: all trained weights except the head.")
