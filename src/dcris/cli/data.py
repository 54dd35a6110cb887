"""`dcris data`: download, check, generate, import and export data sets."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcris.cli.common import (
    ROOT,
    adder,
    argument,
    data_set_arguments,
    log,
    natural,
    output,
    own_name,
    progress,
    refuse_given,
    share,
)
from dcris.errors import DcrisError
from dcris.utils.streams import counted, is_terminal, note

if TYPE_CHECKING:
    from dcris.data.check_report import Report


def add(commands: Any) -> None:
    """Add the parsers of the commands in this file."""
    data = commands.add_parser(
        "data",
        help="download, check, generate, import and export data sets",
        description="Download, check, generate, import and export data sets.",
        epilog="example: dcris data check my.jsonl",
        allow_abbrev=False,
    )
    add_data = adder(data.add_subparsers(title="commands", metavar="COMMAND", required=True), "dcris data ")
    fetch = add_data(
        "fetch",
        _data_fetch,
        "download a data set's annotations and only the images it needs",
        "refcoco --out data --splits val testA",
        "Existing files are kept, so the same command continues after an interruption. The annotations come from the Hugging "
        "Face Hub. The images have the licences that their photographers chose.",
    )
    fetch.add_argument(
        "dataset", metavar="DATASET", help="refcoco, refcoco+, refcocog (umd), grefcoco, refcoco-m, refsegrs or gseval"
    )
    fetch.add_argument("--out", type=Path, required=True, metavar="ROOT", help="folder of the data sets")
    fetch.add_argument("--splits", nargs="+", metavar="SPLIT", help="train, val, testA, testB or test (default: all)")
    fetch.add_argument(
        "--photographs",
        metavar="PATH_OR_URL",
        help="folder or zip file of the images to copy from, or URL of a mirror (default: COCO's server)",
    )
    fetch.add_argument(
        "--connections",
        type=natural,
        default=8,
        metavar="N",
        help="number of simultaneous downloads (default: %(default)s)",
    )
    check = add_data("check", _data_check, "check a data set", "ROOT --dataset refcoco --split-by unc")
    check.add_argument("root", type=Path, metavar="ROOT", help=ROOT)
    data_set_arguments(check, videos=True)
    check.add_argument("--deep", action="store_true", help="decode every image instead of reading only its header")
    check.add_argument("--json", action="store_true", help="print JSON")
    scenes = add_data(
        "scenes", _data_scenes, "generate a data set of scenes in the REFER layout", "data/scenes --train 5000 --seed 1"
    )
    scenes.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    for split, count in (("train", 5000), ("val", 200), ("test", 300)):
        scenes.add_argument(
            f"--{split}", type=natural, default=count, metavar="N", help=f"scenes in {split} (default: %(default)s)"
        )
    scenes.add_argument(
        "--seed", type=natural, default=0, help="random seed; the same seed gives the same files (default: %(default)s)"
    )
    scenes.add_argument("--side", type=natural, default=112, help="side of the images in pixels (default: %(default)s)")
    scenes.add_argument(
        "--generalised", action="store_true", help="add phrases for several objects and for absent ones"
    )
    load = add_data(
        "import",
        _data_import,
        "convert the export of an annotation tool to your own data set in JSON Lines",
        "export.json --images photos --out my.jsonl",
        "The phrases of an object are its own, or its category's name if no other object of the image has that category.",
    )
    load.add_argument("source", type=Path, metavar="FILE_OR_FOLDER", help="what the annotation tool exported")
    load.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images, found by their path or, below it, by their name (default: the folder of the export)",
    )
    load.add_argument("--out", type=Path, metavar="FILE.jsonl", help="file to write, beside or above the images")
    load.add_argument(
        "--format",
        metavar="NAME",
        help="format of the export (default: recognised); the page Annotation tools lists them",
    )
    load.add_argument(
        "--phrases", type=Path, metavar="FILE", help="JSON or CSV file of phrases by annotation or category name"
    )
    load.add_argument(
        "--write-phrases",
        type=Path,
        metavar="FILE.csv",
        help="in place of --out: list the objects that need a phrase, to fill in and give back with --phrases",
    )
    load.add_argument(
        "--ambiguous",
        choices=("ask", "drop", "keep", "merge", "place"),
        default="ask",
        help="phrases that fit several objects of an image: drop them; keep them; merge: one expression for all of these "
        "objects; place: replace them by generated phrases, such as 'left cup', where these are clear; ask in a terminal, and "
        "drop elsewhere (default: %(default)s)",
    )
    load.add_argument(
        "--val",
        type=share,
        metavar="SHARE",
        help="share of the images for val if the export has no splits of its own (default: 0.1)",
    )
    load.add_argument("--seed", type=natural, help="random seed for the choice of these images (default: 0)")
    load.add_argument("--split", metavar="NAME", help="put all references into this split")
    load.add_argument(
        "--crowds", choices=("skip", "keep"), default="skip", help="annotations with iscrowd (default: %(default)s)"
    )
    load.add_argument(
        "--strict", action="store_true", help="stop at the first annotation that has no mask or cannot be used"
    )
    save = add_data(
        "export",
        _data_export,
        "write references and their images in the format of an annotation tool",
        "my.jsonl --format labelme --out exported",
    )
    save.add_argument("root", type=Path, metavar="ROOT", help=ROOT)
    data_set_arguments(save)
    save.add_argument(
        "--format", required=True, metavar="NAME", help="coco, yolo, labelme, label-studio, supervisely or refer"
    )
    save.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to create")
    save.add_argument(
        "--image-url",
        metavar="PREFIX",
        help="prefix of the images' paths for Label Studio (default: /data/local-files/?d=)",
    )


def _data_fetch(args: argparse.Namespace) -> None:
    from dcris.data.download import fetch_dataset

    with ExitStack() as stack:
        show: Callable[[int], None] | None = None

        def show_done(done: int, total: int) -> None:
            nonlocal show
            if show is None:  # the number is known when the annotations are there
                show = stack.enter_context(progress(total, "image"))
            show(done)

        table = fetch_dataset(
            args.dataset,
            args.out,
            splits=args.splits,
            images=args.photographs,
            connections=args.connections,
            progress=show_done,
        )
    log(
        f"{args.out}: {table.dataset} ({table.split_by}) is complete; next: dcris data check {argument(args.out)} --dataset "
        f"{table.dataset}"
    )


def _data_check(args: argparse.Namespace) -> None:
    from dcris.data.check import check_dataset
    from dcris.data.check_videos import check_videos
    from dcris.data.registry import VIDEO_SETS

    own_name(args.root, args.dataset, args.split_by)
    report: Report
    if args.dataset in VIDEO_SETS:
        refuse_given(args, ("split_by", "mask_threshold"), f"is for images, not for {args.dataset}")
        with progress(None, "video") as show:
            report = check_videos(args.root, args.dataset, deep=args.deep, progress=show)
    else:
        with progress(None, "image") as show:
            report = check_dataset(
                args.root,
                args.dataset,
                args.split_by,
                deep=args.deep,
                mask_threshold=args.mask_threshold,
                progress=show,
            )
    output(json.dumps(report.to_json(), indent=2) if args.json else report.table())
    if report.problem_count:
        several = "problems, the first" if report.problem_count > 1 else "problem"
        raise DcrisError(f"{report.problem_count:,} {several}: {report.problems[0]}")


def _data_scenes(args: argparse.Namespace) -> None:
    from dcris.data.scenes import write_scenes
    from dcris.utils.workers import cores

    counts = {"train": args.train, "val": args.val, "test": args.test}
    with progress(sum(counts.values()), "scene") as show:
        write_scenes(
            args.out,
            **counts,
            seed=args.seed,
            side=args.side,
            generalised=args.generalised,
            workers=cores(),
            progress=show,
        )
    made = ", ".join(f"{count} {split}" for split, count in counts.items())
    log(f"{args.out}: {made} scenes; next: dcris data check {argument(args.out)} --dataset scenes")


def _data_import(args: argparse.Namespace) -> None:
    from dcris.data.importer import import_annotations, list_without_phrase

    if (args.out is None) == (args.write_phrases is None):
        raise DcrisError("give --out FILE.jsonl for the data set, or --write-phrases FILE.csv for a list of objects")
    if args.split is not None:
        refuse_given(
            args, ("val", "seed"), "is for the division into splits, but --split puts all images into one split"
        )
    common = {
        "images": args.images,
        "format": args.format,
        "phrases": args.phrases,
        "keep_crowds": args.crowds == "keep",
        "strict": args.strict,
    }
    if args.write_phrases is not None:
        done = list_without_phrase(args.source, args.write_phrases, **common)
        text = (
            f"{args.write_phrases}: {counted(done.listed, 'object')} without a phrase; fill in the last column, then repeat "
            f"the command with --phrases {argument(args.write_phrases)} and --out"
        )
    else:
        done = import_annotations(
            args.source,
            args.out,
            split=args.split,
            val=0.1 if args.val is None else args.val,
            seed=args.seed or 0,
            ambiguous=_ask if args.ambiguous == "ask" else args.ambiguous,
            **common,
        )
        text = f"{args.out}: {done}; next: dcris data check {argument(args.out)}"
    for problem in done.problems:
        log(f"skipped: {problem}")
    log(text)


def _data_export(args: argparse.Namespace) -> None:
    from dcris.data.exporter import IMAGE_URL, export_table
    from dcris.data.readers.load import load_references

    own_name(args.root, args.dataset, args.split_by)
    if args.format != "label-studio":
        refuse_given(args, ("image_url",), f"is for label-studio, not for {args.format}")
    table = load_references(args.root, args.dataset, args.split_by, mask_threshold=args.mask_threshold)
    image_url = IMAGE_URL if args.image_url is None else args.image_url
    done = export_table(table, args.format, args.out, image_url)
    left_out = f"; left out: {done.left_out:,} that describe nothing in their image" if done.left_out else ""
    ignored = f"; background now: the ignored pixels of {done.ignored:,}" if done.ignored else ""
    log(f"{args.out}: {counted(done.references, 'reference')} on {counted(done.images, 'image')}{left_out}{ignored}")


def _ask(count: int, example: str) -> str:
    """Ask in a terminal what to do with ambiguous phrases.

    They are dropped elsewhere, and at the end of the input (Ctrl-D).
    """
    from dcris.data.importer import AMBIGUOUS

    if not (is_terminal() and sys.stdin.isatty()):
        return "drop"
    note(f"{count:,} objects have only phrases that fit other objects of their image, too, such as {example}.")
    note("drop: leave them out; keep: use the phrases for each; merge: one expression for all; place: generate phrases")
    try:
        while (answer := input("drop, keep, merge or place? [drop] ").strip().lower() or "drop") not in AMBIGUOUS:
            note(f"{answer!r} is none of them")
    except EOFError:
        output("")  # the cursor is still behind the question
        return "drop"
    return answer
