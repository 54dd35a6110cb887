"""The commands `dcris predict`, `dcris convert` and `dcris recipes`."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dcris.cli.common import (
    CHECKPOINT,
    adder,
    argument,
    detail,
    device_arguments,
    given_options,
    log,
    natural,
    output,
    positive,
    progress,
    refuse_given,
    score,
)
from dcris.cli.predict_videos import predict_videos
from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement
from dcris.utils.streams import note, one_line

if TYPE_CHECKING:
    from dcris.inference.batch import BatchOptions
    from dcris.inference.inputs import Task
    from dcris.inference.records import Record
    from dcris.utils.distributed import Processes

_FORMATS = (
    "mask",
    "annotated",
    "overlay",
    "coco",
    "scores",
    "cutout",
    "label-studio",
    "coco-dataset",
    "yolo",
    "labelme",
)


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
        "--phrases", type=Path, metavar="FILE", help="text file with phrases for every image, one on each line"
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
        choices=_FORMATS,
        metavar="FORMAT",
        help=f"files to write: {', '.join(_FORMATS)} (default: mask annotated coco scores; for videos mask overlay coco)",
    )
    predict.add_argument(
        "--threshold",
        metavar="NUMBER_OR_RESULT",
        help="probability above which a pixel belongs to the mask, or a result file of `dcris evaluate` to take it from "
        "(default: 0.35)",
    )
    predict.add_argument(
        "--min-score",
        type=score,
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
    predict.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object for each result, also of images that are done already, and nothing else",
    )
    videos = predict.add_argument_group(
        "data sets of videos",
        "masks of a whole split, in the layout that its server takes, in place of images and phrases",
    )
    videos.add_argument("--data", type=Path, metavar="ROOT", help="folder of the data sets")
    videos.add_argument("--dataset", metavar="NAME", help="data set: ref_youtube_vos, ref_davis17 or mevis")
    videos.add_argument("--split", metavar="NAME", help="split: train, valid, test or valid_u")
    videos.add_argument(
        "--batch-size", type=positive, metavar="N", help="number of frames that are encoded at once (default: 8)"
    )
    videos.add_argument(
        "--smooth",
        type=positive,
        metavar="N",
        help="odd number of frames over which the probabilities of a mask are averaged (default: 1, not at all)",
    )
    device_arguments(predict)

    convert = add(
        "convert",
        _convert,
        "convert published DETRIS checkpoints",
        "base_refcoco.pth --out models",
        "Writes each FILE as a checkpoint directory in DIR, named like the file, with the frozen encoders.",
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
    if args.data is not None:
        predict_videos(args, _threshold(args.threshold))
        return
    if args.format is None or "label-studio" not in args.format:
        refuse_given(args, ("image_url",), "is for --format label-studio, which was not given")
    if for_data := given_options(args, ("dataset", "split", "batch_size", "smooth")):
        raise DcrisError(f"{', '.join(for_data)} is for a data set of videos; add --data ROOT")
    if args.pairs is not None and (args.images or args.expression or args.phrases):
        raise DcrisError(
            "--pairs already gives images and phrases; use either --pairs or IMAGE_OR_FOLDER with -e or --phrases"
        )
    if args.pairs is not None:
        refuse_given(args, ("recursive",), "is for folders, and --pairs names the images")
    if args.pairs is None and not args.images:
        raise DcrisError(
            f"no image was given: the first argument, {args.checkpoint}, is the model; add IMAGE_OR_FOLDER after it, or a list "
            "with --pairs"
        )
    if args.pairs is None and not args.expression and args.phrases is None:
        raise DcrisError("no phrase was given; add one with -e, several with --phrases, or a list with --pairs")

    from dcris.inference.inputs import find_tasks, read_pairs, read_phrases

    def say(text: str) -> None:
        """Print one line, also where the name of a file has several."""
        (note if args.json else log)(one_line(text))

    notes: list[str] = []
    if args.pairs is not None:
        tasks = read_pairs(args.pairs)
    else:
        phrases = [*(args.expression or ()), *(read_phrases(args.phrases) if args.phrases is not None else ())]
        tasks = find_tasks(args.images, phrases, out=args.out, recursive=args.recursive, on_skipped=notes.append)
    if args.every != 1 and not any(task.video for task in tasks):
        raise DcrisError(
            "--every is for videos, and none was given; leave it out, or give videos by name or by a pattern: those in a "
            "folder are skipped"
        )

    # These import torch, for which an error in the files above should not wait.
    from datetime import timedelta

    from dcris.checkpoints.checkpoint import find_checkpoint
    from dcris.checkpoints.resolve import locate
    from dcris.inference.batch import IMAGE_FORMATS, LOCAL_FILES, BatchOptions, finished_results
    from dcris.utils.distributed import processes

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
    of_images = [each for each in IMAGE_FORMATS if each in (args.format or ())]
    if of_images and any(task.video for task in tasks):
        if set(args.format) == set(of_images) and all(task.video for task in tasks):
            raise DcrisError(
                f"{' '.join(of_images)}: of images only, and there are only videos; add mask, annotated, overlay or coco to "
                "--format"
            )
        notes.append(f"{' '.join(of_images)}: of images only; use mask, annotated, overlay or coco for the videos")
    # A rank with a long video keeps the others waiting.
    with processes(args.device, timeout=timedelta(days=7)) as group:
        checkpoint = find_checkpoint(locate(args.checkpoint))
        finished = group.from_first(
            lambda: finished_results(checkpoint, tasks, args.out, options, args.device, args.precision)
        )
        for line in notes if group.first else ():
            say(line)
        if finished is None:
            _predict_rest(args, checkpoint, tasks, options, group, say)
        elif group.first:
            say(f"{len(tasks)} of {len(tasks)} are done already in {args.out}")
            _show_finished(args, tasks, finished)


def _predict_rest(
    args: argparse.Namespace,
    checkpoint: Path,
    tasks: Sequence["Task"],
    options: "BatchOptions",
    group: "Processes",
    say: Callable[[str], None],
) -> None:
    """Load the model and predict what is left of the tasks."""
    from tqdm import tqdm

    from dcris.inference.batch import BatchPredictor, Done, Failed
    from dcris.inference.segmenter import Segmenter
    from dcris.utils.device import device_name, precision_of

    begin = time.monotonic()
    segmenter = Segmenter.from_pretrained(checkpoint, device=args.device, precision=args.precision)
    precision = precision_of(segmenter.dtype)
    detail(
        f"{checkpoint}: {segmenter.config.recipe}, on {segmenter.device} ({device_name(segmenter.device)}) in {precision}, "
        f"loaded in {time.monotonic() - begin:.1f} s"
    )
    predictor = BatchPredictor(segmenter, tasks, args.out, options, group, checkpoint)
    if group.first:
        for line in predictor.notes:
            say(line)
        if predictor.already:
            say(f"{predictor.already} of {len(tasks)} are done already in {args.out}")
        _show_finished(args, predictor.folder.tasks, predictor.finished())
    unit = "frame" if predictor.videos else "image"
    done, latest = 0, time.monotonic()
    with progress(predictor.remaining(), unit, group.first) as show:
        for event in predictor.run():
            with tqdm.external_write_mode():
                if isinstance(event, Done):
                    if args.json:
                        _show_json(args.out, event.task.path, event.record)
                    else:
                        frame = "" if event.frame is None else f", frame {event.frame}"
                        for found in event.predictions:
                            say(f"{event.task.path}{frame}: {found.phrase!r} {found.describe()}")
                    detail(f"{one_line(str(event.task.path))}: {time.monotonic() - latest:.2f} s")
                    latest = time.monotonic()
                elif isinstance(event, Failed):
                    if len(tasks) > 1:  # of a single one, the error at the end says all
                        reason = event.reason.replace(f" {event.task.path}", "", 1)
                        say(f"{event.task.path}: skipped; {reason}")
                else:
                    say(f"{event.path}: {event.description}")
            if isinstance(event, Done | Failed):
                done += 1
                show(done)


def _show_finished(args: argparse.Namespace, tasks: Sequence["Task"], records: Sequence["Record"]) -> None:
    """Print the results of earlier calls, with --json."""
    given = {task.source: task.path for task in tasks}
    for record in records if args.json else ():
        if record.results is not None:
            _show_json(args.out, given[record.source], record)


def _show_json(out: Path, given: Path, record: "Record") -> None:
    """Print each result of an image or frame as one line of JSON."""
    from dcris.inference.batch import result_objects

    for result in result_objects(out, given, record):
        output(json.dumps(result))


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
            f'next: dcris predict {argument(target)} photo.jpg -e "left dog" --out out'
        )


def _recipes(args: argparse.Namespace) -> None:
    if args.show is not None:
        from dcris.recipes import get_recipe

        output(json.dumps(get_recipe(args.show).model_dump(mode="json"), indent=2))
        return
    from importlib import resources

    # Counting the weights means importing torch and building each network, which takes seconds.
    text = resources.files("dcris").joinpath("assets", "recipes.json").read_text(encoding="utf-8")
    if args.json:
        output(text.rstrip())
        return
    rows = json.loads(text)
    width = max(len(row["name"]) for row in rows)
    output(f"{'recipe':<{width}}{'adapters':>13}{'head':>14}{'frozen':>14}")
    for row in rows:
        output(f"{row['name']:<{width}}{row['adapters']:>13,}{row['head']:>14,}{row['frozen']:>14,}")
        output(f"    {row['summary']}")
    log("Train one with: dcris train RECIPE --data ROOT --out DIR. Adapters: all trained weights except the head.")
