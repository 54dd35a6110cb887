"""`dcris predict`, `dcris convert` and `dcris recipes`: trained models, and what can be trained."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dcris.cli.common import CHECKPOINT, adder, argument, device_arguments, log, natural, positive
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    add = adder(commands, "dcris ")
    predict = add(
        "predict",
        _predict,
        "segment what phrases refer to",
        'runs/tiny photo.jpg -e "left slice" --out out',
        "Takes photographs, folders of them, patterns and videos, or a list of pairs. Existing results are skipped, so the "
        "same command continues where it was stopped, and further images are added. A file that cannot be read is left out, "
        "and named at the end. Several processes share the work: torchrun --nproc-per-node N -m dcris predict ...",
    )
    predict.add_argument("checkpoint", metavar="CKPT", help=CHECKPOINT)
    predict.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE_OR_FOLDER",
        help="images, folders of images, quoted patterns such as 'photos/**/*.jpg', and videos",
    )
    predict.add_argument(
        "-e", "--expression", action="append", metavar="PHRASE", help="what to look for; may be given several times"
    )
    predict.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="images with phrases of their own instead: a .csv or .tsv with the columns image and phrase, or a .jsonl",
    )
    predict.add_argument("--recursive", action="store_true", help="take the images of subfolders, too")
    predict.add_argument(
        "--every", type=positive, default=1, metavar="N", help="of a video, every N-th frame (%(default)s)"
    )
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    predict.add_argument(
        "--format",
        nargs="+",
        choices=("mask", "overlay", "coco", "scores", "cutout", "label-studio"),
        help="what to write (mask overlay coco scores; of videos without scores)",
    )
    predict.add_argument(
        "--threshold",
        metavar="NUMBER_OR_RESULT",
        help="probability above which a pixel is the object's (0.35), or the result file of `dcris evaluate` that records one",
    )
    predict.add_argument(
        "--image-url",
        metavar="PREFIX",
        help="for label-studio: what to put before images' names (/data/local-files/?d=)",
    )
    predict.add_argument("--anew", action="store_true", help="replace existing answers about these images")
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
    if args.pairs is not None and (args.images or args.expression):
        raise DcrisError("--pairs brings images and phrases of its own; give either that, or IMAGE_OR_FOLDER and -e")
    if args.pairs is None and not args.images:
        raise DcrisError("no image was given; name some (IMAGE_OR_FOLDER), or a list of them with --pairs")
    if args.pairs is None and not args.expression:
        raise DcrisError("no phrase was given; say with -e what to look for, or give a list of pairs with --pairs")

    from datetime import timedelta

    from tqdm import tqdm

    from dcris.inference.batch import LOCAL_FILES, Done, Failed, Job
    from dcris.inference.inputs import find_tasks, read_pairs
    from dcris.inference.segmenter import Segmenter
    from dcris.utils.distributed import processes

    left_out: list[str] = []
    if args.pairs is not None:
        tasks = read_pairs(args.pairs)
    else:
        tasks = find_tasks(
            args.images, args.expression, out=args.out, recursive=args.recursive, left_out=left_out.append
        )
    with processes(args.device, patience=timedelta(days=7)) as group:  # one may have a long video, the others nothing
        segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
        job = Job(
            segmenter,
            tasks,
            args.out,
            formats=args.format,
            threshold=_threshold(args.threshold),
            every=args.every,
            anew=args.anew,
            image_url=LOCAL_FILES if args.image_url is None else args.image_url,
            group=group,
        )
        for line in [*left_out, *job.notes] if group.first else ():
            log(line)
        if job.already and group.first:
            log(f"{job.already} of {len(tasks)} are done already in {args.out}")
        if "label-studio" in job.formats and any(task.video for task in tasks) and group.first:
            log(
                "label_studio.json holds photographs alone, none of the videos; ask for mask, overlay or coco for those"
            )
        total = None if job.videos else len(job.images)
        quiet = not (group.first and sys.stderr.isatty())
        with tqdm(total=total, unit="frame" if job.videos else "image", disable=quiet) as bar:
            for event in job.run():
                with tqdm.external_write_mode():
                    if isinstance(event, Done):
                        frame = "" if event.frame is None else f", frame {event.frame}"
                        for answer in event.answers:
                            place = f"box {answer.box}" if answer.box else "nothing found"
                            log(f"{event.task.path}{frame}: {answer.phrase!r} {place}, score {answer.score:.2f}")
                    elif isinstance(event, Failed):
                        log(f"{event.task.path}: left out; {event.reason}")
                    else:
                        log(f"{event.path}: {event.what}")
                if isinstance(event, Done | Failed):
                    bar.update()


def _threshold(given: str | None) -> float | None:
    """A number as typed, or the one a result file records."""
    from dcris.utils.files import read_json

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
    from dcris.checkpoints.convert_detris import convert_file

    targets = {args.out / file.stem: file for file in args.files}
    if len(targets) < len(args.files):
        raise DcrisError("two of the files have one name, so their results would be in one place; convert them apart")
    for target, file in targets.items():
        config = convert_file(file, target, args.word_length, half=args.half)
        log(
            f"{target}: {config.recipe} on {config.data.dataset}, phrases of {config.data.word_length} tokens; "
            f'next: dcris predict {argument(target)} photo.jpg -e "left slice" --out out'
        )


def _recipes(args: argparse.Namespace) -> None:
    from dcris.recipes import RECIPES, get_recipe

    if args.show is not None:
        log(json.dumps(get_recipe(args.show).model_dump(mode="json"), indent=2))
        return
    import torch

    from dcris.models.segmentation import ReferringSegmenter

    rows = []
    for name, recipe in RECIPES.items():
        with torch.device("meta"):  # shapes without memory
            rows.append({"name": name, **ReferringSegmenter(recipe().model).count_weights()})
    if args.json:
        log(json.dumps(rows, indent=2))
        return
    log(f"{'recipe':<20}{'adapters':>13}{'head':>14}{'frozen':>14}")
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        log(f"{row['name']:<20}{row['adapters']:>13,}{row['head']:>14,}{row['frozen']:>14,}")
        log(f"    {' '.join((recipe.__doc__ or '').split())}")
    log("train one with: dcris train RECIPE --data ROOT --out DIR; adapters are all trained weights beside the head")
