"""`dcris train`."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dcris.cli.common import (
    adder,
    argument,
    data_root_argument,
    data_set_arguments,
    detail,
    device_arguments,
    exit_interrupted,
    log,
    own_name,
    parse_settings,
    positive,
    quote,
    refuse_given,
)
from dcris.errors import DcrisError
from dcris.utils.arguments import TrackerName, TrainingPrecision

if TYPE_CHECKING:
    from dcris.config import RunConfig


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = adder(commands, "dcris ")(
        "train",
        run,
        "train the adapters and the head of a recipe",
        "dcris_tiny --data data/scenes --out runs/tiny --train.lr 1e-3",
        "Other settings of the recipe are given as --SECTION.FIELD VALUE; `dcris recipes --show RECIPE` lists them.",
    )
    parser.set_defaults(takes_settings=True)
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="name of a recipe (`dcris recipes` lists them), or config.json of an earlier run",
    )
    data_root_argument(parser)
    data_set_arguments(parser, videos=True)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="CKPT",
        help="checkpoint of the same model to start from (default: new adapters and head; a resumed run keeps its own)",
    )
    parser.add_argument(
        "--schedule",
        choices=("paper", "detris"),
        help="paper: 50 epochs with a step at 35; detris: 65 epochs with steps at 35 and 55 (default: the recipe's)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="samples in a step, over all processes; auto: the recipe's, in the largest passes that fit the memory (default: "
        "the recipe's, in one pass)",
    )
    parser.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        help="action for an unreadable image or mask; stop: abort; skip: log it and use another sample (default: stop)",
    )
    parser.add_argument(
        "--tracker",
        action="append",
        choices=get_args(TrackerName),
        help="also log curves and predictions there, besides OUT/log.jsonl; can be repeated",
    )
    device_arguments(parser, TrainingPrecision)


def run(args: argparse.Namespace) -> None:
    """Run the command, on all processes that torchrun started."""
    from dcris.training.stopping import Interrupted
    from dcris.utils.distributed import exit_together, processes

    with processes(args.device) as group:
        try:
            _train(group, args)
        except Interrupted as stop:
            exit_together(group)
            exit_interrupted(stop, "`--resume`", quiet=not group.first)


def configuration(args: argparse.Namespace) -> "RunConfig":
    """Return the run's configuration: the recipe, with the options and `--SECTION.FIELD VALUE`
    settings applied. These settings take precedence over `--schedule`.

    Raises:
        DcrisError: a setting is unknown or has a wrong value, or an option gives it another.
    """
    from dcris.config import load_config, replace
    from dcris.data.registry import VIDEO_SETS, word_length_settings
    from dcris.recipes import SCHEDULES, get_recipe

    config = load_config(Path(args.recipe)) if args.recipe.endswith(".json") else get_recipe(args.recipe)
    settings = parse_settings(args.settings)
    for option, key, value in (
        ("--dataset", "data.dataset", args.dataset),
        ("--split-by", "data.split_by", args.split_by),
        ("--batch-size", "train.batch_size", None if args.batch_size == "auto" else args.batch_size),
        ("--precision", "train.precision", args.precision),
        ("--from", "train.start", args.start),
        ("--tracker", "train.trackers", args.tracker),
        ("--on-bad-image", "data.on_bad_image", args.on_bad_image),
        ("--mask-threshold", "data.mask_threshold", args.mask_threshold),
    ):
        if value is None:
            continue
        if settings.setdefault(key, value) != value:
            raise DcrisError(f"{option} and --{key} give different values; leave out one of them")
    if args.batch_size == "auto" and settings.get("train.micro_batch") is not None:
        raise DcrisError("--batch-size auto chooses train.micro_batch itself; leave out one of them")
    if (start := _start(args)) is not None:
        settings["train.start"] = start
    own = own_name(args.data, settings.get("data.dataset"), settings.get("data.split_by"))
    if own is not None:
        settings["data.dataset"] = own
    schedule = SCHEDULES.get(args.schedule, {})
    settings = {f"train.{key}": value for key, value in schedule.items()} | settings
    dataset = settings.get("data.dataset", config.data.dataset)
    videos = isinstance(dataset, str) and dataset in VIDEO_SETS
    if videos:
        refuse_given(args, ("split_by", "mask_threshold"), f"is for images, not for {dataset}")
    if own or videos:
        settings["data.split_by"] = None
    return replace(config, settings | word_length_settings(settings, config.data.dataset))


def _start(args: argparse.Namespace) -> str | None:
    """Return the checkpoint of `--from`.

    A run that is resumed keeps its own, which is not read again, so it may be elsewhere or gone. A
    run without a checkpoint starts anew, from the one that is named now.
    """
    from dcris.checkpoints.resolve import locate
    from dcris.config import load_config

    path = args.out / "config.json"
    keeps = args.start is None or any(args.out.glob("checkpoints/step-*"))
    if args.resume and keeps and path.is_file():
        with suppress(DcrisError):  # a damaged one is written again
            if before := load_config(path).train.start:
                return before
    return None if args.start is None else str(locate(args.start))


def _train(group: Any, args: argparse.Namespace) -> None:
    from dcris.data.frames import load_frames
    from dcris.data.readers.load import is_single_file, load_references
    from dcris.data.registry import VIDEO_SETS
    from dcris.training.train import refuse_unused, run_training, validated_on_own_data
    from dcris.utils.device import choose_device, choose_precision, device_name, precision_of

    device = choose_device(args.device)  # before the data, which can take long to read
    config = configuration(args)
    settings = parse_settings(args.settings)
    refuse_unused(config, settings)
    precision = precision_of(choose_precision(config.train.precision, device))
    if group.first:
        detail(f"training on {device} ({device_name(device)}) in {precision}")
    data = config.data
    videos = data.dataset in VIDEO_SETS
    if videos:
        splits = [split for split in (data.train_split, data.val_split) if split is not None]
        table = load_frames(args.data, data.dataset, data.frame_step, splits)
    else:
        table = load_references(args.data, data.dataset, data.split_by, mask_threshold=data.mask_threshold)
    print_line = log if group.first else lambda text: None
    if (videos or is_single_file(args.data)) and "data.val_split" not in settings:
        config = validated_on_own_data(config, table, print_line)
    result = run_training(
        config,
        table,
        args.out,
        resume=args.resume,
        device=args.device,
        log=log,
        group=group,
        fit_batch=args.batch_size == "auto",
    )
    if videos:
        following = f"predict {argument(args.out)} --data {argument(args.data)} --dataset {data.dataset} --split valid"
    else:
        split = "" if "val" in table.splits() else f" --split {quote([*table.splits()][-1])}"
        following = f"evaluate {argument(args.out)} --data {argument(args.data)}{split}"
    print_line(f"done in {result.seconds:.0f} s; next: dcris {following}")


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)
