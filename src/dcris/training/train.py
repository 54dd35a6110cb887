"""Training in one call, for the command line and for Python."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dcris.config import RunConfig, gives, replace, require_changes
from dcris.data.readers.load import is_single_file
from dcris.data.registry import VIDEO_SETS, word_length_settings
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.data.training_table import training_table
from dcris.errors import DcrisError
from dcris.recipes import get_recipe
from dcris.training.batch_size import choose_micro_batch
from dcris.training.trainer import Trainer, TrainResult, build_model, check_run
from dcris.utils.arguments import PathLike, as_path, require
from dcris.utils.device import choose_device
from dcris.utils.distributed import Processes, processes


def train(
    recipe: str | RunConfig,
    data: ReferenceTable,
    out: PathLike,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    resume: bool = False,
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> TrainResult:
    """Train a model and write checkpoints and a log to a folder, as `dcris train` does.

    Args:
        recipe: name of a recipe (`dcris recipes` lists them), or a configuration.
        data: from `dcris.load_dataset`.
        out: folder of the run.
        settings: changes of the recipe by name, such as {"train.max_steps": 500}.
        resume: continue the run in `out`.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        log: receives lines of progress.

    Returns:
        The last and the best checkpoint: `result.best.path` can be given to
        `Segmenter.from_pretrained`.

    Raises:
        DcrisError: a setting is unknown or has a wrong value, or as `Trainer.run` does.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    require(data, ReferenceTable, "the data")
    config = recipe if isinstance(recipe, RunConfig) else get_recipe(recipe)
    own = is_single_file(data.root)
    require_changes(settings)
    chosen = {"data.dataset": data.dataset, "data.split_by": None if own else data.split_by, **settings}
    if not gives(settings, "data.word_length"):
        chosen |= word_length_settings(chosen, config.data.dataset)
    config = replace(config, chosen)
    refuse_unused(config, settings)
    if own and not gives(settings, "data.val_split"):
        config = validated_on_own_data(config, data, log)
    with processes(device) as group:
        return run_training(config, data, out, resume=resume, device=device, log=log, group=group)


_ONLY_WITH: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "data.frame_step": ("a data set of videos", lambda config: config.data.dataset in VIDEO_SETS),
    "data.mask_threshold": ("a data set of images", lambda config: config.data.dataset not in VIDEO_SETS),
    "data.split_by": ("a data set of images", lambda config: config.data.dataset not in VIDEO_SETS),
    "train.gamma": ("the schedule step", lambda config: config.train.schedule == "step"),
    "train.milestones": ("the schedule step", lambda config: config.train.schedule == "step"),
    "train.presence": ("a presence head", lambda config: config.model.head.presence),
}
"""Settings without effect in some runs: what they are for, and whether a run has it. Those that
recipes leave empty are checked by the configuration, or where they are used."""


def refuse_unused(config: RunConfig, changes: Mapping[str, Any]) -> None:
    """Raise DcrisError where `changes`, which made the configuration, give a setting that has no
    effect in it. Whole sections, which give all of theirs, are not checked."""
    for key, (what, has) in _ONLY_WITH.items():
        if changes.get(key) is not None and not has(config):
            raise DcrisError(f"{key} is for {what}, which this run does not have; leave it out")


def validated_on_own_data(config: RunConfig, table: ReferenceTable, log: Callable[[str], None]) -> RunConfig:
    """Return the configuration with validation on the split `val` of own data, or on the recipe's
    split, if they have it. Without either, training does not validate, and prints a line."""
    wanted = config.data.val_split or "val"
    if wanted in table.splits():
        return replace(config, {"data.val_split": wanted})
    log(f"{table.dataset} has no split {wanted!r}: training runs without validation, and the last checkpoint is used")
    return replace(config, {"data.val_split": None})


def run_training(
    config: RunConfig,
    table: ReferenceTable,
    out: PathLike,
    *,
    resume: bool,
    device: str,
    log: Callable[[str], None],
    group: Processes,
    fit_batch: bool = False,
) -> TrainResult:
    """Train one configuration on the processes of a group.

    Args:
        config: of the run.
        table: all references, before `training_table`.
        out, resume, device, log: as in `train`.
        group: of `processes`; all of its processes call this.
        fit_batch: whether to choose the largest micro batch that fits into the memory.

    Raises: as `train`.
    """
    folder = as_path(out, "the folder of the run")
    log = log if group.first else lambda text: None
    table = training_table(table, config.data)
    check_run(config, table, group)
    chosen = choose_device(device)
    model = build_model(config)
    counts = model.count_weights()
    log(
        f"{config.recipe} on {table.dataset} ({table.split_by}): {counts['adapters']:,} adapter and {counts['head']:,} head "
        f"weights train, {counts['frozen']:,} are frozen"
    )
    tokenizer = tokenizer_of(config.model.text)
    if fit_batch:
        length = len(table.split(config.data.train_split))
        micro_batch = choose_micro_batch(model, config, tokenizer, length, folder, chosen, group, log)
        config = replace(config, {"train.micro_batch": micro_batch})
    return Trainer(model, config, table, tokenizer, folder, device=chosen, resume=resume, log=log, group=group).run()
