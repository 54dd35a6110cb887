"""`dcris quickstart` and `dcris train`."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcris.cli.common import (
    adder,
    argument,
    data_root_argument,
    data_set_arguments,
    device_arguments,
    exit_interrupted,
    log,
    natural,
    own_name,
    positive,
)
from dcris.errors import DcrisError


def add(commands: Any) -> None:
    """Describe the commands of this file."""
    add = adder(commands, "dcris ")
    quick = add("quickstart", _quickstart, "generate scenes, train, evaluate, segment, report", "--out runs/quickstart")
    quick.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything (%(default)s)")
    quick.add_argument("--seed", type=natural, default=0, help="of the scenes and the training (%(default)s)")
    device_arguments(quick, precision=False)

    train = add(
        "train",
        _train,
        "train a recipe's adapters and head",
        "dcris_tiny --data data/scenes --out runs/tiny --train.lr 1e-3",
        "Further settings of the recipe are given as --SECTION.FIELD VALUE; `dcris recipes --show RECIPE` lists them.",
    )
    train.set_defaults(takes_settings=True)
    train.add_argument("recipe", metavar="RECIPE", help="see `dcris recipes`, or a config.json of an earlier run")
    data_root_argument(train)
    data_set_arguments(train)
    train.add_argument("--out", type=Path, required=True, help="the run's directory")
    train.add_argument(
        "--from", dest="start", metavar="CKPT", help="start from its adapters and head; the model has to be the same"
    )
    train.add_argument(
        "--schedule",
        choices=("paper", "detris"),
        help="50 epochs with a step at 35 (paper) or 65 with steps at 35 and 55 (detris); the recipe's own by default",
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="samples in a step, over all processes; auto: the recipe's, in as large passes as this device's memory holds",
    )
    train.add_argument(
        "--on-bad-image",
        choices=("stop", "skip"),
        help="what a photograph or mask that cannot be read does: ends the run, or is said and replaced by another (stop)",
    )
    train.add_argument(
        "--tracker",
        action="append",
        choices=("tensorboard", "wandb"),
        help="show curves and predictions there, beside OUT/log.jsonl; may be given several times",
    )
    device_arguments(train)


def _quickstart(args: argparse.Namespace) -> None:
    from dcris.experiments.quickstart import quickstart
    from dcris.training.trainer import Interrupted

    try:
        metrics = quickstart(args.out, seed=args.seed, device=args.device, log=log)
    except Interrupted as stop:
        exit_interrupted(stop)
    log(
        f"mIoU {metrics['miou']:.1f}, with exchanged phrases {metrics['miou_shuffled']:.1f}, in {metrics['seconds']:.0f} s; "
        f"open {args.out / 'report.html'}"
    )


def _settings(rest: Sequence[str]) -> list[tuple[str, str]]:
    """`--section.field value` and `--section.field=value` pairs."""
    pairs, waiting = [], list(rest)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise DcrisError(f"`dcris train` does not take {word!r}; settings are given as --SECTION.FIELD VALUE")
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not waiting:
                raise DcrisError(f"the setting --{key} has no value; give one behind it")
            value = waiting.pop(0)
        pairs.append((key, value))
    return pairs


def _train(args: argparse.Namespace) -> None:
    from dcris.training.trainer import Interrupted
    from dcris.utils.distributed import exit_together, processes

    with processes(args.device) as group:
        try:
            _train_in(group, args)
        except Interrupted as stop:
            exit_together(group)
            exit_interrupted(stop, "`--resume`", quiet=not group.first)


def _train_in(group: Any, args: argparse.Namespace) -> None:
    from dcris.checkpoints.resolve import locate
    from dcris.config import load_config, override
    from dcris.data.readers.load import load_references
    from dcris.data.tokenizer import tokenizer_of
    from dcris.recipes import SCHEDULES, get_recipe
    from dcris.training.batch_size import choose_micro_batch
    from dcris.training.trainer import build_model, check_run, train
    from dcris.utils.device import choose_device

    tell = log if group.first else lambda text: None
    config = load_config(Path(args.recipe)) if args.recipe.endswith(".json") else get_recipe(args.recipe)
    own = own_name(args.data, args)
    settings = _settings(args.settings)
    choose_val = "data.val_split" not in dict(settings)
    for key, value in (
        ("data.dataset", own or args.dataset),
        ("data.split_by", args.split_by),
        ("train.batch_size", None if args.batch_size == "auto" else args.batch_size),
        ("train.precision", args.precision),
        ("train.start", None if args.start is None else str(locate(args.start))),
        ("train.trackers", args.tracker),
        ("data.on_bad_image", args.on_bad_image),
        ("data.mask_threshold", args.mask_threshold),
    ):
        if value is not None:
            settings.append((key, json.dumps(value)))
    if args.schedule is not None:
        settings += [(f"train.{key}", json.dumps(value)) for key, value in SCHEDULES[args.schedule].items()]
    if own:
        settings.append(("data.split_by", "null"))
    config = override(config, settings)
    table = load_references(
        args.data, config.data.dataset, config.data.split_by, mask_threshold=config.data.mask_threshold
    )
    if own and choose_val and config.data.val_split not in {None, *table.splits()}:
        tell(
            f"{own} has no split {config.data.val_split!r}, so nothing is scored while training, and the last checkpoint counts"
        )
        config = override(config, [("data.val_split", "null")])
    check_run(config, table, group)
    device = choose_device(args.device)
    model = build_model(config)
    counts = model.count_weights()
    tell(
        f"{config.recipe} on {table.dataset} ({table.split_by}): {counts['adapters']:,} adapter and {counts['head']:,} head "
        f"weights train, {counts['frozen']:,} are frozen"
    )
    tokenizer = tokenizer_of(config.model.text)
    if args.batch_size == "auto":
        references = len(table.split(config.data.train_split))
        micro_batch = choose_micro_batch(model, config, tokenizer, references, args.out, device, group, tell)
        config = override(config, [("train.micro_batch", str(micro_batch))])
    result = train(model, config, table, tokenizer, args.out, device=device, resume=args.resume, log=tell, group=group)
    split = "" if "val" in table.splits() else f" --split {shlex.quote([*table.splits()][-1])}"
    tell(
        f"done in {result.seconds:.0f} s; next: dcris evaluate {argument(args.out)} --data {argument(args.data)}{split}"
    )


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)
