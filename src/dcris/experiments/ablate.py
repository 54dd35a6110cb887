"""Training and evaluation of several configurations under equal conditions, written as a table.

The configurations are the rows of one of the paper's tables, or any recipes. Each row is trained
and evaluated once for each seed. A run is a folder OUT/runs/KEY, where KEY is a hash of everything
that determines its result: configuration, data set, seed and length. Tables in one OUT therefore
share equal runs, and a second call skips finished runs and continues interrupted ones. Several
processes can work on one OUT (torchrun, or the same command started again): each takes runs that
are neither finished nor locked by another.

There are two budgets. With equal steps, all rows train on the same samples. With equal time, each
row trains as long as the baseline does in its equal steps, by the measured seconds per step, with a
schedule of that length. On a CPU the time is CPU time on one thread, which other work on the
machine hardly changes; on a GPU it is wall-clock time. Validation does not count.
"""

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from dcris.checkpoints.checkpoint import list_checkpoints, load_checkpoint, sound_checkpoints
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.data.registry import word_length_settings
from dcris.data.scenes import write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.data.training_table import training_table
from dcris.errors import DcrisError, first_line
from dcris.evaluation.evaluator import predict_queries, result_record
from dcris.evaluation.protocols import Cris
from dcris.experiments.ablation_report import Measured, write_ablation
from dcris.experiments.paper_tables import TABLES, Row, Table
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.stopping import Interrupted
from dcris.training.trainer import Trainer, build_model, total_steps
from dcris.utils.device import choose_device, choose_precision, shapes_only
from dcris.utils.distributed import described_processes
from dcris.utils.files import (
    LockedError,
    lock_folder,
    read_json,
    read_text,
    remove_directory,
    write_file,
    write_json,
)
from dcris.utils.streams import counted
from dcris.utils.workers import cores
from dcris.version import __version__

Size = Literal["b", "tiny", "photos"]
TINY_STEPS = 100
TRAIN_SCENES, TEST_SCENES = 3000, 200
_TINY_STEP = 0.35
"""Seconds of a step of dcris_tiny on one thread of an Intel Xeon (AMX), for the first estimate."""
_TINY_REST = 10.0
"""Seconds of a tiny run besides its steps: building and evaluating the model."""
_NO_EFFECT = ("workers", "log_every", "save_every", "keep_last", "trackers")
"""Settings that do not change results."""
_DETERMINED = ("train.seed", "train.keep_last")
"""Settings that each run gets from the study."""
_POLL = 1.0  # seconds between checks of runs that other processes work on


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared: rows with their configurations."""

    name: str
    """Of the files: OUT/NAME.md, .tex, .html and .json."""
    table: Table
    configs: tuple[RunConfig | DcrisError, ...]
    """The configuration of each row of the table; an error if it could not be made."""
    baseline: int
    """The row whose time is the budget of all rows with equal time."""
    cells: tuple[tuple[str, ...], ...]
    """The names of each row in the table's columns."""
    steps: int | None = None
    """Length of a run with equal steps if none is given; None for the baseline's epochs."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those that `changed` gave to all rows."""

    @property
    def default(self) -> RunConfig:
        """The baseline's configuration."""
        config = self.configs[self.baseline]
        if isinstance(config, DcrisError):
            raise config
        return config

    @property
    def tiny(self) -> bool:
        """Whether all encoders are the tiny ones of the package."""
        return all(
            config.model.vision.name.startswith("tiny") for config in self.configs if isinstance(config, RunConfig)
        )

    def changed(self, settings: Mapping[str, Any]) -> "Study":
        """Return the study with settings that all rows get.

        Raises:
            DcrisError: a row has no such setting, the value does not fit, or the study determines
                it.
        """
        if determined := [f"--{key}" for key in _DETERMINED if key in settings]:
            raise DcrisError(
                f"leave out {' and '.join(determined)}, which cannot be set for all rows; give the runs' seeds as --seeds"
            )
        configs = tuple(
            replace(config, {**settings, **word_length_settings(settings, config.data.dataset)})
            if isinstance(config, RunConfig)
            else config
            for config in self.configs
        )
        changed = replace_fields(self, configs=configs, settings={**self.settings, **settings})
        if settings.keys().isdisjoint(("train.epochs", "train.max_steps")):
            return changed
        return replace_fields(changed, steps=changed.default.train.max_steps)


def table_study(name: str, size: Size) -> Study:
    """Return the study of one of the paper's tables.

    Args:
        name: one of TABLES.
        size: of the encoders.

    Raises:
        DcrisError: there is no such table, or none of that size.
    """
    if name not in TABLES:
        raise DcrisError(f"unknown table {name!r}; choose one of {', '.join(TABLES)}")
    rows = tuple(row for row in TABLES[name].rows if size in row.sizes)
    if not rows:
        raise DcrisError(f"{name} is of encoders with 12 transformer blocks; give --recipe b or tiny")
    default = _recipe("dcris", size)
    configs = tuple(_attempt_configure(row, size) for row in rows)
    baseline = next(
        index for index, each in enumerate(configs) if isinstance(each, RunConfig) and each.model == default.model
    )
    table = Table(TABLES[name].title, TABLES[name].columns, rows)
    steps = TINY_STEPS if size == "tiny" else default.train.max_steps
    return Study(name, table, configs, baseline, tuple(_cells(row, default) for row in rows), steps)


def recipe_study(recipes: Sequence[str]) -> Study:
    """Return the study of any recipes; the first is the baseline.

    Raises:
        DcrisError: there is no such recipe, one occurs twice, or there are fewer than two.
    """
    if len(set(recipes)) < max(2, len(recipes)):
        raise DcrisError(f"--recipes needs two or more different recipes, not {' '.join(recipes) or 'none'}")
    configs = tuple(get_recipe(recipe) for recipe in recipes)
    rows = tuple(Row((recipe,), recipe) for recipe in recipes)
    table = Table("Comparison of recipes", ("Recipe",), rows)
    return Study("recipes", table, configs, 0, tuple(row.cells for row in rows), configs[0].train.max_steps)


def ablate(
    study: Study,
    out: Path,
    *,
    root: Path | None = None,
    dataset: str | None = None,
    split_by: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    epochs: int | None = None,
    budgets: Sequence[str] = ("steps", "time"),
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> list[str]:
    """Run a study and write OUT/NAME.md, .tex, .html and .json.

    A failed row does not stop the others.

    Args:
        study: from `table_study` or `recipe_study`.
        out: folder of all tables and their runs.
        root: folder of the data sets, or a .jsonl file. If None, scenes are generated in OUT, which
            needs a study of the tiny encoders.
        dataset: name of the data set; the baseline's if None.
        split_by: its partition; needed if ROOT has several.
        seeds: of the runs; several give mean and deviation.
        steps, epochs: length of a run with equal steps; the study's if both are None.
        budgets: "steps", "time" or both.
        device: as in `choose_device`; several processes on a machine with GPUs use one each.
        log: receives lines of progress.

    Returns:
        A sentence for each row that failed.

    Raises:
        DcrisError: there is no data, or a table cannot be written.
        Interrupted: after Ctrl-C while training.
    """
    if root is None and not (study.tiny and dataset in (None, study.default.data.dataset)):
        raise DcrisError("a data set is needed: give --data ROOT; only tiny recipes can generate scenes instead")
    chosen = choose_device(_own_gpu(device))
    threads = torch.get_num_threads()
    if chosen.type == "cpu":
        torch.set_num_threads(1)  # CPU time is compared, and other cores are left to other runs
    try:
        work = _Work(study, out, root, dataset, split_by, steps, epochs, chosen, log)
        return work.run(sorted(set(seeds)), budgets)
    finally:
        torch.set_num_threads(threads)


def configure(row: Row, size: Size) -> RunConfig:
    """Return the configuration of a table's row for encoders of that size.

    Raises:
        DcrisError: there is no such recipe, or the row does not fit it.
    """
    config = _recipe(row.recipe, size)
    return replace(config, scaled(row, config))


def _recipe(name: str, size: Size) -> RunConfig:
    """Return the recipe that a row changes.

    `dcris_tiny` has adapters in its last blocks only, for quicker steps. Here they are in the
    paper's blocks.
    """
    config = get_recipe(f"{name}_{size}")
    if (name, size) != ("dcris", "tiny"):
        return config
    paper = get_recipe("dcris_b")
    keys = ("model.method.visual.layers", "model.method.text.layers")
    return replace(config, {key: _setting(paper, key) for key in keys})


def _attempt_configure(row: Row, size: Size) -> RunConfig | DcrisError:
    try:
        return configure(row, size)
    except DcrisError as error:
        return error


def scaled(row: Row, config: RunConfig) -> dict[str, Any]:
    """Return the row's changes with its widths scaled to a recipe of the row, of any size."""
    paper = get_recipe(f"{row.recipe}_b")
    return {
        key: value * _setting(config, key) // _setting(paper, key) if key.endswith(".width") else value
        for key, value in row.changes.items()
    }


def _cells(row: Row, default: RunConfig) -> tuple[str, ...]:
    """Return a row's cells, with the widths used here if they differ from the paper's."""
    widths = {key: value for key, value in row.changes.items() if key.endswith(".width")}
    here = {key: value for key, value in scaled(row, default).items() if key in widths} if widths else widths
    return row.cells if here == widths else (f"{row.cells[0]} (here {', '.join(map(str, here.values()))})",)


def _setting(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


@dataclass(frozen=True, slots=True)
class _Run:
    """One training run: a row with a seed and a length."""

    title: str
    config: RunConfig
    key: str
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """Return the result, if the run has a complete one."""
        try:
            result = read_json(self.folder / "result.json", "a run's result")
        except DcrisError:  # missing or damaged: run again
            return None
        return result if isinstance(result, dict) and result.get("key") == self.key else None

    def failure(self, since: float) -> str | None:
        """Return the error of a failure after that time; earlier failures are tried again."""
        path = self.folder / "failed.txt"
        try:
            return read_text(path).splitlines()[0] if path.stat().st_mtime >= since else None
        except (OSError, IndexError):
            return None


_Runs = dict[int, _Run] | DcrisError
"""A row's runs by seed, or why it has none."""
_Ended = Mapping[int, _Run | str] | DcrisError
"""The same after all runs; a text states why a run is missing."""


class _Work:
    """The runs of a study on a data set."""

    def __init__(
        self,
        study: Study,
        out: Path,
        root: Path | None,
        dataset: str | None,
        split_by: str | None,
        steps: int | None,
        epochs: int | None,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        self.study, self.out, self.device, self.log = study, out, device, log
        self.begin = time.time()
        group = described_processes()
        self.processes, self.first = group.count, group.first
        data = study.default.data
        if root is None:
            self.table = load_references(self._scenes(), data.dataset)
        else:
            if dataset in (None, data.dataset):
                dataset, split_by = data.dataset, split_by or data.split_by
            self.table = load_references(root, dataset, split_by, mask_threshold=data.mask_threshold)
        self.checksum = self.table.sha256()
        others = [split for split in self.table.splits() if split != data.train_split]
        self.splits = [split for split in others if all_queries(self.table.split(split), present_only=True)]
        if not self.splits:
            has = "expressions with a target in" if others else "split to evaluate on, only"
            raise DcrisError(
                f"{self.table.dataset} in {self.table.root} has no {has} '{', '.join(others or [data.train_split])}'; "
                "assign a part of it to another split, such as val or test"
            )
        if (wanted := study.settings.get("data.val_split")) is not None:
            self.table.split(wanted)  # raises, if there is none
        self.steps = steps or (study.steps if epochs is None else None)
        self.epochs = epochs or study.default.train.epochs
        self.durations: list[float] = []

    def run(self, seeds: Sequence[int], budgets: Sequence[str]) -> list[str]:
        """Train what is missing, write the table, and return a sentence for each failed row."""
        equal: list[_Runs] = [
            {seed: self._equal_steps(row, config, seed) for seed in seeds} if isinstance(config, RunConfig) else config
            for row, config in zip(self.study.table.rows, self.study.configs, strict=True)
        ]
        baseline = equal[self.study.baseline]
        assert isinstance(baseline, dict)
        # The baseline comes first, because the runs of equal time and the estimate need its time.
        ordered = [baseline, *(runs for runs in equal if isinstance(runs, dict))]
        planned = [run for runs in ordered for run in runs.values()]
        later = len({run.key for run in planned}) - len(seeds) if "time" in budgets else 0
        self._announce(planned, later)
        self._train(planned, later)
        measured = {}
        if "steps" in budgets:
            measured["steps"] = self._measure(equal)
        if "time" in budgets:
            timed = [self._equal_time(runs, baseline) if isinstance(runs, dict) else runs for runs in equal]
            self._train(
                [run for runs in timed if isinstance(runs, dict) for run in runs.values() if isinstance(run, _Run)]
            )
            measured["time"] = self._measure(timed)
        page = self._write(measured)
        if self.first:
            self.log(page)
        return [f"{row.name}: {row.failure}" for rows in measured.values() for row in rows if row.failure is not None]

    # ---- planning --------------------------------------------------------------------------------

    def _equal_steps(self, row: Row, config: RunConfig, seed: int) -> _Run:
        """Return a row's run of the budget "steps"."""
        changes: dict[str, Any] = {
            "train.seed": seed,
            "train.keep_last": 1,
            "train.epochs": self.epochs,
            "train.max_steps": self.steps,
            "data.dataset": self.table.dataset,
            "data.split_by": self.table.split_by,
        }
        changes |= word_length_settings({**self.study.settings, **changes}, config.data.dataset)
        if config.data.val_split not in {None, *self.splits} and "data.val_split" not in self.study.settings:
            changes["data.val_split"] = None  # the recipe's split, which this data set lacks
        changed = replace(config, changes)
        # The warm-up is shortened with the run, or a short run would consist of its warm-up only.
        references = len(self.table.split(config.data.train_split))
        share = min(1.0, total_steps(changed.train, references) / total_steps(config.train, references))
        warmup = round(share * config.train.warmup_steps)
        return self._identified(_name(row), replace(changed, {"train.warmup_steps": warmup}))

    def _equal_time(self, runs: dict[int, _Run], baseline: dict[int, _Run]) -> dict[int, _Run | str]:
        """Return a row's runs of the budget "time" by seed, or why there is none.

        They have as many steps as fit into the baseline's seconds, and a schedule of that length.
        """
        stretched: dict[int, _Run | str] = {}
        for seed, run in runs.items():
            own, budget = run.result(), baseline[seed].result()
            if run.key == baseline[seed].key:
                stretched[seed] = run
            elif own is None:
                stretched[seed] = run.failure(self.begin) or "its run of equal steps is missing"
            elif budget is None:
                stretched[seed] = "the baseline's run, whose time is the budget, is missing"
            else:
                factor = budget["seconds"] / own["seconds_per_step"] / own["steps"]
                settings = run.config.train
                changes = {
                    "train.max_steps": max(1, round(own["steps"] * factor)),
                    "train.warmup_steps": round(settings.warmup_steps * factor),
                    "train.milestones": tuple(milestone * factor for milestone in settings.milestones),
                }
                stretched[seed] = self._identified(run.title.rpartition(", seed ")[0], replace(run.config, changes))
        return stretched

    def _identified(self, name: str, config: RunConfig) -> _Run:
        """Return the run of a configuration, with its folder."""
        plain = config.model_dump(mode="json", exclude={"recipe"})
        for section in ("data", "train"):
            plain[section] = {key: value for key, value in plain[section].items() if key not in _NO_EFFECT}
        identity = json.dumps([plain, self.checksum, self.splits, self.device.type, __version__], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return _Run(f"{name}, seed {config.train.seed}", config, key, self.out / "runs" / key)

    def _scenes(self) -> Path:
        """Return the folder of generated scenes in OUT; one process makes them, others wait."""
        data = self.out / "scenes"
        while not (data / "scenes" / "refs(generated).p").exists():
            with _try_lock(self.out / "scenes.lock") as held:
                if held and not (data / "scenes" / "refs(generated).p").exists():
                    self.log(f"generating {TRAIN_SCENES:,} scenes for training and {TEST_SCENES} for testing")
                    write_scenes(data, train=TRAIN_SCENES, val=0, test=TEST_SCENES, seed=0, workers=cores())
            time.sleep(0 if held else _POLL)
        return data

    # ---- training --------------------------------------------------------------------------------

    def _announce(self, runs: Sequence[_Run], later: int) -> None:
        """Log the number of runs and, for tiny ones, an estimate of their time."""
        distinct = {run.key: run for run in runs}
        left = sum(run.result() is None for run in distinct.values())
        self.log(
            f"{self.study.name}: {counted(len(distinct), 'run')} with equal steps, {len(distinct) - left} of them finished; "
            f"{later} more with equal time"
        )
        if self.study.tiny and self.steps is not None:
            minutes = (left + later) * (self.steps * _TINY_STEP + _TINY_REST) / 60 / self.processes
            self.log(f"about {max(1, round(minutes))} min on {self.processes} core(s)")

    def _train(self, runs: Sequence[_Run], later: int = 0) -> None:
        """Train all runs that are neither finished nor failed; wait for those of other processes.

        Args:
            runs: in order; equal ones are trained once.
            later: number of runs that follow these, for the estimate of the time left.
        """
        waiting = {run.key: run for run in runs}
        while waiting:
            all_busy = True
            for key, run in list(waiting.items()):
                if run.result() is None and run.failure(self.begin) is None:
                    with _try_lock(run.folder / ".lock") as held:
                        if not held:
                            continue
                        # Another process may have finished it before the lock was taken.
                        if run.result() is None and run.failure(self.begin) is None:
                            self._attempt(run, sum(other.result() is None for other in waiting.values()) + later)
                del waiting[key]
                all_busy = False
            if all_busy and waiting:
                time.sleep(_POLL)

    def _attempt(self, run: _Run, left: int) -> None:
        """Train and score one run of the `left` remaining ones; record a failure."""
        started = time.monotonic()
        (run.folder / "failed.txt").unlink(missing_ok=True)
        try:
            result = train_and_score(run, self.table, self.splits, self.device)
        except Interrupted:
            raise
        except Exception as error:  # of any class: the other rows continue
            kind = "" if isinstance(error, DcrisError) or not str(error).strip() else f"{type(error).__name__}: "
            sentence = kind + first_line(error)
            write_file(run.folder / "failed.txt", f"{sentence}\n\n{traceback.format_exc()}")
            self.log(f"{run.title}: failed: {sentence}")
            return
        self.durations.append(time.monotonic() - started)
        scores = ", ".join(f"{split} mIoU {record['miou']:.1f}" for split, record in result["scores"].items())
        minutes = (left - 1) * sum(self.durations) / len(self.durations) / 60 / self.processes
        self.log(
            f"{run.title}: {scores} after {counted(result['steps'], 'step')} in {self.durations[-1]:.0f} s; "
            f"{counted(left - 1, 'run')} left, about {minutes:.0f} min"
        )

    # ---- results ---------------------------------------------------------------------------------

    def _measure(self, rows: Sequence[_Ended]) -> list[Measured]:
        """Collect the results of all rows under one budget."""
        return [
            self._measured(index, row, runs)
            for index, (row, runs) in enumerate(zip(self.study.table.rows, rows, strict=True))
        ]

    def _measured(self, index: int, row: Row, runs: _Ended) -> Measured:
        results, failures = [], []
        for run in runs.values() if isinstance(runs, Mapping) else ():
            if isinstance(run, str):
                failures.append(run)
            elif (result := run.result()) is not None:
                results.append({**result, "run": f"runs/{run.key}"})
            else:
                failures.append(run.failure(self.begin) or "not run")
        if isinstance(runs, DcrisError):
            failures.append(str(runs))
        config = self.study.configs[index]
        return Measured(
            row,
            _name(row),
            self.study.cells[index],
            tuple(results),
            _tower_weights(config if isinstance(config, RunConfig) else self.study.default),
            f"failed: {failures[0]}" if failures else None,
        )

    def _write(self, measured: dict[str, list[Measured]]) -> str:
        """Write the table's files and return the Markdown."""
        baseline = _name(self.study.table.rows[self.study.baseline])
        towers = sorted({row.towers for rows in measured.values() for row in rows})
        notes = [
            "Scores are percentages by the protocol `cris`. Several seeds give mean \N{PLUS-MINUS SIGN} sample standard "
            "deviation.",
            "Trainable weights exclude the head. Their percentage is of the weights of both encoders: "
            f"{', '.join(f'{count:,}' for count in towers)}.",
            "Equal steps: all rows train on the same samples. Equal time: each row trains as many seconds as "
            f"{baseline}, with a schedule of that length. "
            + (
                "Seconds are CPU time on one thread, including reading and batching, without validation."
                if self.device.type == "cpu"
                else "Seconds are wall-clock time on one GPU, including reading and batching, without validation."
            ),
        ]
        queries = [query for split in self.splits for query in all_queries(self.table.split(split))]
        if absent := sum(not reference.targets(expression) for reference, expression in queries):
            notes.append(
                f"{absent:,} expressions without a target are left out, which the protocol does not know; "
                "`dcris evaluate --protocol grefcoco` scores them, too."
            )
        if self.study.tiny:
            notes.append(
                "The tiny encoders were pretrained on the attributes of generated scenes, and the runs are short. The "
                "scores say nothing about the ranking on photographs with the paper's model."
            )
        return write_ablation(
            self.out,
            self.study.name,
            self.study.table,
            measured,
            splits=self.splits,
            data=(self.table.dataset, self.table.split_by),
            notes=notes,
        )


def _name(row: Row) -> str:
    return row.name or row.cells[0]


def _tower_weights(config: RunConfig) -> int:
    """Return the number of weights of both encoders."""
    with shapes_only():
        return ReferringSegmenter(replace(config, {"model.method": None}).model).count_weights()["frozen"]


def train_and_score(run: _Run, table: ReferenceTable, splits: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Train a run, or continue it, evaluate it on the splits, and write and return its result."""
    config, tokenizer = run.config, tokenizer_of(run.config.model.text)
    table = training_table(table, config.data)
    model = build_model(config)
    counts = model.count_weights()
    steps = total_steps(config.train, len(table.split(config.data.train_split)))
    _warm_up(model.to(device), config)
    with _timed(run.folder, steps, device) as watch:
        trainer = _TimedTrainer(
            model, config, table, tokenizer, run.folder, device=device, resume=True, log=lambda line: None
        )
        trainer.watch = watch
        trained = trainer.run()
    spent = read_json(run.folder / "time.json", "a run's time")
    model, _ = load_checkpoint(trained.best.path)
    model.to(device)
    dtype = choose_precision(config.train.precision, device)
    protocol, scores = Cris(), {}
    for split in splits:
        queries = all_queries(table.split(split), present_only=True)  # the protocol knows no absent targets
        results = list(predict_queries(model, queries, config, protocol, device=device, keep_masks=False))
        scores[split] = result_record(results, table, split, protocol, model=model, device=device, dtype=dtype)
    rate = spent["seconds"] / max(1, spent["steps"])
    result = {
        "key": run.key,
        "recipe": config.recipe,
        "seed": config.train.seed,
        "counts": counts,
        "steps": steps,
        "seconds": rate * steps,
        "seconds_per_step": rate,
        "scores": scores,
        "version": __version__,
    }
    write_json(run.folder / "result.json", result)
    return result


def _warm_up(model: ReferringSegmenter, config: RunConfig) -> None:
    """Run one forward and backward pass and make an optimiser.

    Lazy initialisation is then not charged to the first run. The model is in evaluation mode, which
    draws no random numbers and changes no statistics.
    """
    device, side = next(model.parameters()).device, config.data.image_size
    images = torch.zeros(2, 3, side, side, device=device)
    tokens = torch.ones(2, config.data.word_length, dtype=torch.long, device=device)
    model(images, tokens)[0].sum().backward()
    model.zero_grad(set_to_none=True)
    # The first optimiser imports torch's compiler, which takes more than a second.
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1, device=device))], fused=True)


class _Watch:
    """Measures time without pauses."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._begin = clock, clock()

    def seconds(self) -> float:
        """Return the seconds so far, without those of pauses."""
        return self._clock() - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        begin = self._clock()
        try:
            yield
        finally:
            self._begin += self._clock() - begin


class _TimedTrainer(Trainer):
    """Leaves validation out of the time: a row would train fewer steps for being validated."""

    watch: _Watch

    def validate(self) -> None:
        with self.watch.paused():
            super().validate()


@contextmanager
def _timed(folder: Path, total: int, device: torch.device) -> Iterator[_Watch]:
    """Add the time of the block to the run's time.json: seconds, and steps saved by checkpoints.

    A run that was killed after its last step and before its time was recorded starts again, because
    without a time it has no result.

    Args:
        folder: of the run.
        total: its steps.
        device: decides between CPU time and wall-clock time.
    """
    clock = time.process_time if device.type == "cpu" else time.monotonic
    whole = sound_checkpoints(folder, lambda line: None)  # without checkpoints that a kill damaged
    before = whole[-1].step if whole else 0
    if before >= total and not (folder / "time.json").exists():
        remove_directory(folder / "checkpoints")
        before = 0
    watch = _Watch(clock)
    try:
        yield watch
    finally:
        try:
            spent = read_json(folder / "time.json", "a run's time")
        except DcrisError:
            spent = {"seconds": 0.0, "steps": 0}
        if (steps := _done(folder) - before) > 0:
            write_json(
                folder / "time.json",
                {"seconds": spent["seconds"] + watch.seconds(), "steps": spent["steps"] + steps},
            )


def _done(folder: Path) -> int:
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1].step if checkpoints else 0


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Lock a file without waiting; the context value tells whether this process holds the lock."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(path.parent, path.name))
        except LockedError:
            yield False
            return
        yield True


def _own_gpu(device: str) -> str:
    """Return this process's device: one GPU for each process of torchrun, if there are GPUs."""
    group = described_processes()
    if device in ("auto", "cuda") and group.count > 1 and torch.cuda.is_available():
        return f"cuda:{group.local_rank % torch.cuda.device_count()}"
    return device
