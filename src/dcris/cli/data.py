"""`dcris data`: get, check and make data sets."""

import argparse
import json
from pathlib import Path
from typing import Any

from dcris.cli.common import ROOT, adder, argument, data_set_arguments, log, natural, own_name, share
from dcris.errors import DcrisError
from dcris.utils.streams import is_terminal, note


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    data = commands.add_parser("data", help="get and check data sets, make generated ones", allow_abbrev=False)
    add_data = adder(data.add_subparsers(title="commands", metavar="COMMAND", required=True), "dcris data ")
    fetch = add_data(
        "fetch",
        _data_fetch,
        "get a data set's annotations and just the photographs it needs",
        "refcoco --out data --splits val testA",
        "What is there already is kept, so the same command goes on after an interruption. The annotations come from the "
        "Hugging Face Hub; the photographs keep the licences of those who took them.",
    )
    fetch.add_argument("dataset", metavar="DATASET", help="refcoco, refcoco+ or refcocog (umd)")
    fetch.add_argument("--out", type=Path, required=True, metavar="ROOT", help="the folder of the data sets")
    fetch.add_argument("--splits", nargs="+", metavar="SPLIT", help="train, val, testA, testB or test (all of them)")
    fetch.add_argument(
        "--photographs",
        metavar="PATH_OR_URL",
        help="a train2014 folder or zip to copy from, or the address of a mirror (COCO's own server)",
    )
    fetch.add_argument("--connections", type=natural, default=8, metavar="N", help="at a time (%(default)s)")
    check = add_data("check", _data_check, "validate a data set", "ROOT --dataset refcoco --split-by unc")
    check.add_argument("root", type=Path, metavar="ROOT", help=ROOT)
    data_set_arguments(check)
    check.add_argument("--deep", action="store_true", help="decode every photograph, not its header alone")
    check.add_argument("--json", action="store_true", help="print JSON")
    scenes = add_data(
        "scenes", _data_scenes, "generate scenes in the REFER layout", "data/scenes --train 5000 --seed 1"
    )
    scenes.add_argument("out", type=Path, metavar="OUT", help="the root to make")
    for split, count in (("train", 5000), ("val", 200), ("test", 300)):
        scenes.add_argument(f"--{split}", type=natural, default=count, metavar="N", help="scenes (%(default)s)")
    scenes.add_argument("--seed", type=natural, default=0, help="same seed, same files (%(default)s)")
    scenes.add_argument("--side", type=natural, default=112, help="pixels of a picture's side (%(default)s)")
    coco = add_data(
        "import-coco",
        _data_import_coco,
        "make a data set of one's own from COCO annotations",
        "instances.json --images photos --out my.jsonl",
        "Each object's phrase is its own, or its category's name where no other object of the photograph has that.",
    )
    coco.add_argument("annotations", type=Path, metavar="INSTANCES.json", help="as annotation tools export it")
    coco.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where its file names begin")
    coco.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="beside the photographs or above")
    coco.add_argument(
        "--phrases", type=Path, metavar="FILE", help="JSON or CSV: phrases by annotation id or category name"
    )
    coco.add_argument("--val", type=share, default=0.1, metavar="SHARE", help="of the photographs (%(default)s)")
    coco.add_argument("--seed", type=natural, default=0, help="which photographs those are (%(default)s)")
    coco.add_argument("--split", metavar="NAME", help="put everything into this split")
    coco.add_argument("--ambiguous", choices=("skip", "keep"), default="skip", help="phrases that fit several objects")
    coco.add_argument("--crowds", choices=("skip", "keep"), default="skip", help="annotations with iscrowd")
    coco.add_argument(
        "--strict", action="store_true", help="stop at the first annotation without a mask or that cannot be used"
    )


def _data_fetch(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.download import fetch_dataset
    from dcris.data.download_images import COCO

    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="photograph", disable=not is_terminal())
        bar.update(1)
        if bar.disable and (done % max(1, total // 20) == 0 or done == total):
            note(f"{done:,} of {total:,} photographs")

    try:
        table = fetch_dataset(
            args.dataset,
            args.out,
            splits=args.splits,
            photographs=args.photographs or COCO,
            connections=args.connections,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.close()
    log(
        f"{args.out}: {table.dataset} ({table.split_by}) is there; next: dcris data check {argument(args.out)} --dataset "
        f"{table.dataset}"
    )


def _data_check(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.check import check_dataset

    own_name(args.root, args)
    with tqdm(unit="image", disable=not is_terminal()) as bar:
        report = check_dataset(
            args.root,
            args.dataset,
            args.split_by,
            deep=args.deep,
            mask_threshold=args.mask_threshold,
            progress=lambda done: bar.update(done - bar.n),
        )
    log(json.dumps(report.to_json(), indent=2) if args.json else report.table())
    if report.problem_count:
        several = "problems, the first" if report.problem_count > 1 else "problem"
        raise DcrisError(f"{report.problem_count:,} {several}: {report.problems[0]}")


def _data_scenes(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.scenes import cores, write_scenes

    counts = {"train": args.train, "val": args.val, "test": args.test}
    with tqdm(total=sum(counts.values()), unit="scene", disable=not is_terminal()) as bar:
        write_scenes(
            args.out,
            **counts,
            seed=args.seed,
            side=args.side,
            workers=cores(),
            progress=lambda done: bar.update(done - bar.n),
        )
    made = ", ".join(f"{count} {split}" for split, count in counts.items())
    log(f"{args.out}: {made} scenes; next: dcris data check {argument(args.out)} --dataset scenes")


def _data_import_coco(args: argparse.Namespace) -> None:
    from dcris.data.import_coco import import_coco

    done = import_coco(
        args.annotations,
        args.images,
        args.out,
        phrases=args.phrases,
        split=args.split,
        val=args.val,
        seed=args.seed,
        keep_ambiguous=args.ambiguous == "keep",
        keep_crowds=args.crowds == "keep",
        strict=args.strict,
    )
    for problem in done.problems:
        log(f"left out: {problem}")
    log(f"{args.out}: {done}; next: dcris data check {argument(args.out)}")
