"""The paper's comparisons, run: every row of a table as separate runs, and the table written in the paper's layout.

A run is a folder OUT/runs/KEY, where KEY stands for all that decides its result: configuration, data set, seed, length. So
tables share what is equal between them, a second call skips what is done, and a call that was broken off goes on where it
stopped. Several processes may work on one OUT at the same time (torchrun, or the same command started again): each takes a run
that is neither done nor locked by another.

Two budgets make a comparison fair in two ways. With equal steps every row sees the same samples, however long a step takes.
With equal time every row trains as long as the default DCRIS did in its equal steps, by the seconds a step took: cheaper
methods then take more steps, each with a schedule of that length. On a CPU the seconds are those of the process on one
thread, which other work on the machine hardly changes; on a GPU they are the clock's.
"""

import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from dcris.checkpoints.checkpoint import list_checkpoints, load_checkpoint, sound_checkpoints
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.data.registry import word_length_settings
from dcris.data.scenes import cores, write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries, result_record
from dcris.evaluation.protocols import Cris
from dcris.experiments.ablation_report import Measured, write_ablation
from dcris.experiments.paper_tables import TABLES, Row
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.training.stopping import Interrupted
from dcris.training.trainer import Trainer, build_model, total_steps
from dcris.utils.device import choose_device, choose_precision
from dcris.utils.distributed import described_processes
from dcris.utils.files import make_directory, read_json, read_text, remove_directory, write_file, write_json
from dcris.version import __version__

Size = Literal["tiny", "b"]
TINY_STEPS = 100
TRAIN_SCENES, TEST_SCENES = 3000, 60
_TINY_STEP = 0.3
"""Seconds of a step of dcris_tiny on one thread of an AMD EPYC (Zen 3): for the estimate before anything was measured."""
_TINY_REST = 10.0
"""Seconds of a tiny run beside its steps: making the model, evaluating it."""
_BOOKKEEPING = ("workers", "log_every", "save_every", "keep_last", "trackers")
"""Settings that change no result."""
_POLL = 1.0  # seconds between looks at what other processes work on


def ablate(
    name: str,
    out: Path,
    *,
    root: Path | None = None,
    size: Size = "tiny",
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    epochs: int | None = None,
    budgets: Sequence[str] = ("steps", "time"),
    device: str = "auto",
    log: Callable[[str], None] = print,
) -> list[str]:
    """Run a table's rows, write OUT/NAME.md, .tex, .html and .json, and return what failed: a sentence for each row.

    Args:
        name: one of dcris.experiments.paper_tables.TABLES.
        out: the folder of all tables and of their runs.
        root: the data sets; for the tiny size None stands for scenes generated in OUT.
        size: of the towers: "tiny" or "b".
        seeds: of the runs; several give means and deviations.
        steps, epochs: length of the runs with equal steps; the recipe's where None, TINY_STEPS for the tiny size.
        budgets: "steps", "time" or both.
        device: as of `choose_device`; several processes on a machine with GPUs take one each.
        say: takes lines for a person.

    Raises DcrisError where there is no such table, or no data, or the tables cannot be written; Interrupted after Ctrl-C while
    training. A row that fails does not end the others.
    """
    if name not in TABLES:
        raise DcrisError(f"there is no table {name!r}; choose one of {', '.join(TABLES)}")
    if root is None and size != "tiny":
        raise DcrisError("a data set is needed: give its folder with --data, or generated scenes with --recipe tiny")
    chosen = choose_device(_own_gpu(device))
    threads = torch.get_num_threads()
    if chosen.type == "cpu":
        torch.set_num_threads(1)  # its time is what is measured, and the other cores are for other runs
    try:
        return _Study(name, out, root, size, steps, epochs, chosen, log).run(sorted(set(seeds)), budgets)
    finally:
        torch.set_num_threads(threads)


def configure(row: Row, size: Size) -> RunConfig:
    """Return the configuration of a row for towers of that size.

    Raises:
        DcrisError: there is no such recipe, or the row does not fit it.
    """
    config = get_recipe(f"{row.recipe}_{size}")
    return replace(config, scaled(row, config))


def scaled(row: Row, config: RunConfig) -> dict[str, Any]:
    """Return the row's changes with its widths scaled to a recipe of the row, of any size."""
    paper = get_recipe(f"{row.recipe}_b")
    return {
        key: value * _setting(config, key) // _setting(paper, key) if key.endswith(".width") else value
        for key, value in row.changes.items()
    }


def _setting(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


@dataclass(frozen=True, slots=True)
class _Job:
    """One run: a row with a seed and a length."""

    title: str
    config: RunConfig
    key: str
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """What came out, where it is whole and of this very run."""
        try:
            found = read_json(self.folder / "result.json", "a run's result")
        except DcrisError:  # missing, or spoilt: run it again
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def failure(self, since: float) -> str | None:
        """Why it failed, if it did after a time: what failed before is tried again."""
        path = self.folder / "failed.txt"
        try:
            return read_text(path).splitlines()[0] if path.stat().st_mtime >= since else None
        except (OSError, IndexError):
            return None


class _Study:
    def __init__(
        self,
        name: str,
        out: Path,
        root: Path | None,
        size: Size,
        steps: int | None,
        epochs: int | None,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        self.name, self.out, self.size, self.device, self.log = name, out, size, device, log
        self.begin = time.time()
        group = described_processes()
        self.processes, self.first = group.count, group.first
        self.default = get_recipe(f"dcris_{size}")
        self.table = load_references(root or self._scenes(), None if _is_file(root) else self.default.data.dataset)
        self.data = self.table.sha256()
        self.splits = [split for split in self.table.splits() if split != self.default.data.train_split]
        if not self.splits:
            raise DcrisError(
                f"{self.table.dataset} in {self.table.root} has nothing to score the rows on, only the split "
                f"'{self.default.data.train_split}'; give a part of it another one, such as val or test"
            )
        self.rows = [row for row in TABLES[name].rows if row.only in (None, size)]
        self.steps = steps or (TINY_STEPS if size == "tiny" and epochs is None else None)
        self.epochs = epochs
        self.walls: list[float] = []

    def run(self, seeds: Sequence[int], budgets: Sequence[str]) -> list[str]:
        configs: list[RunConfig | DcrisError] = []
        for row in self.rows:
            try:
                configs.append(configure(row, self.size))
            except DcrisError as error:
                configs.append(error)
        equal = [
            {seed: self._job(row, config, seed) for seed in seeds} if isinstance(config, RunConfig) else config
            for row, config in zip(self.rows, configs, strict=True)
        ]
        # The default's first: without its time there are no runs of equal time, and no estimate.
        yardstick = next(
            jobs
            for config, jobs in zip(configs, equal, strict=True)
            if isinstance(config, RunConfig) and isinstance(jobs, dict) and config.model == self.default.model
        )
        planned = [yardstick, *(jobs for jobs in equal if isinstance(jobs, dict))]
        jobs = [job for jobs in planned for job in jobs.values()]
        longer = len({job.key for job in jobs}) - len(seeds) if "time" in budgets else 0
        self._announce(jobs, longer)
        self._work(jobs, longer)
        measured = {}
        if "steps" in budgets:
            measured["steps"] = [self._measured(row, jobs) for row, jobs in zip(self.rows, equal, strict=True)]
        if "time" in budgets:
            timed = [
                self._stretched(row, jobs, yardstick) if isinstance(jobs, dict) else jobs
                for row, jobs in zip(self.rows, equal, strict=True)
            ]
            self._work(
                [job for jobs in timed if isinstance(jobs, dict) for job in jobs.values() if isinstance(job, _Job)]
            )
            measured["time"] = [self._measured(row, jobs) for row, jobs in zip(self.rows, timed, strict=True)]
        page = self._write(measured)
        if self.first:
            self.log(page)
        return [
            f"{item.name}: {item.failure}" for items in measured.values() for item in items if item.failure is not None
        ]

    # ---- what is to be run -----------------------------------------------------------------------

    def _job(self, row: Row, config: RunConfig, seed: int) -> _Job:
        """A row's run of equal steps: the recipe's length, or what was asked for."""
        changes: dict[str, Any] = {
            "train.seed": seed,
            "train.keep_last": 1,
            "data.dataset": self.table.dataset,
            "data.split_by": self.table.split_by,
        }
        changes |= word_length_settings(changes, config.data.dataset)
        if config.data.val_split not in {None, *self.splits}:
            changes["data.val_split"] = None
        if self.epochs is not None:
            changes["train.epochs"] = self.epochs
        if self.steps is not None:
            changes["train.max_steps"] = self.steps
        changed = replace(config, changes)
        # A shorter run has a shorter warm-up, so that it does not consist of the warm-up only.
        references = len(self.table.split(config.data.train_split))
        share = min(1.0, total_steps(changed.train, references) / total_steps(config.train, references))
        warmup = round(share * config.train.warmup_steps)
        return self._keyed(row, replace(changed, {"train.warmup_steps": warmup}))

    def _stretched(
        self, row: Row, jobs: dict[int, _Job], yardstick: dict[int, _Job]
    ) -> "dict[int, _Job | str] | DcrisError":
        """A row's runs of equal time: as many steps as fit the default's seconds, with a schedule as much longer or shorter."""
        stretched: dict[int, _Job | str] = {}
        for seed, job in jobs.items():
            own, whole = job.result(), yardstick[seed].result()
            if job.key == yardstick[seed].key:
                stretched[seed] = job
            elif own is None:
                stretched[seed] = job.failure(self.begin) or "its run of equal steps is not done"
            elif whole is None:
                stretched[seed] = "the default row, whose time counts, is not done"
            else:
                factor = whole["seconds"] / own["seconds_per_step"] / own["steps"]
                steps = max(1, round(own["steps"] * factor))
                settings = job.config.train
                changes = {
                    "train.max_steps": steps,
                    "train.warmup_steps": round(settings.warmup_steps * factor),
                    "train.milestones": tuple(milestone * factor for milestone in settings.milestones),
                }
                stretched[seed] = self._keyed(row, replace(job.config, changes))
        return stretched

    def _keyed(self, row: Row, config: RunConfig) -> _Job:
        plain = config.model_dump(mode="json", exclude={"recipe"})
        plain["data"] = {name: value for name, value in plain["data"].items() if name not in _BOOKKEEPING}
        plain["train"] = {name: value for name, value in plain["train"].items() if name not in _BOOKKEEPING}
        told = json.dumps([plain, self.data, self.splits, self.device.type, __version__], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        return _Job(f"{row.name or row.cells[0]}, seed {config.train.seed}", config, key, self.out / "runs" / key)

    def _scenes(self) -> Path:
        """The generated scenes in OUT, made where they are missing, by one process while the others wait."""
        data = self.out / "scenes"
        while not (data / "scenes" / "refs(generated).p").exists():
            with _claim(self.out / "scenes.lock") as mine:
                if mine and not (data / "scenes" / "refs(generated).p").exists():
                    self.log(f"generating {TRAIN_SCENES:,} scenes to train on and {TEST_SCENES} to test with")
                    write_scenes(data, train=TRAIN_SCENES, val=0, test=TEST_SCENES, seed=0, workers=cores())
            time.sleep(0 if mine else _POLL)
        return data

    # ---- running it ------------------------------------------------------------------------------

    def _announce(self, jobs: Sequence[_Job], longer: int) -> None:
        distinct = {job.key: job for job in jobs}
        left = sum(job.result() is None for job in distinct.values())
        self.log(
            f"{self.name}: {len(distinct)} runs with equal steps, {len(distinct) - left} of them done; "
            f"{longer} further runs with equal time"
        )
        if self.size == "tiny" and self.steps is not None:
            minutes = (left + longer) * (self.steps * _TINY_STEP + _TINY_REST) / 60 / self.processes
            self.log(
                f"about {max(1, round(minutes))} min on {self.processes} core(s), if none of the longer ones is done"
            )

    def _work(self, jobs: Sequence[_Job], later: int = 0) -> None:
        """Run what is neither done nor failed; come back when all are one or the other, whoever ran them.

        Args:
            jobs: in order; equal ones count once.
            later: runs that are still to come after these, for the time left.
        """
        waiting = {job.key: job for job in jobs}
        while waiting:
            busy = True
            for key, job in list(waiting.items()):
                if job.result() is None and job.failure(self.begin) is None:
                    with _claim(job.folder / ".lock") as mine:
                        if not mine:
                            continue
                        if job.result() is None and job.failure(self.begin) is None:
                            self._attempt(job, sum(other.result() is None for other in waiting.values()) + later)
                del waiting[key]
                busy = False
            if busy and waiting:
                time.sleep(_POLL)

    def _attempt(self, job: _Job, left: int) -> None:
        started = time.monotonic()
        (job.folder / "failed.txt").unlink(missing_ok=True)
        try:
            result = _run(job, self.table, self.splits, self.device)
        except Interrupted:
            raise
        except Exception as error:  # whatever a method, a library or the machine may raise: the other rows go on
            first, *_ = str(error).strip().splitlines() or [""]
            sentence = first if isinstance(error, DcrisError) else f"{type(error).__name__}: {first}"
            write_file(job.folder / "failed.txt", f"{sentence}\n\n{traceback.format_exc()}")
            self.log(f"{job.title}: failed: {sentence}")
            return
        self.walls.append(time.monotonic() - started)
        scores = ", ".join(f"{split} mIoU {found['miou']:.1f}" for split, found in result["scores"].items())
        minutes = (left - 1) * sum(self.walls) / len(self.walls) / 60 / self.processes
        self.log(
            f"{job.title}: {scores} after {result['steps']:,} steps in {self.walls[-1]:.0f} s; "
            f"{left - 1} runs left, about {minutes:.0f} min"
        )

    # ---- what came out ---------------------------------------------------------------------------

    def _measured(self, row: Row, jobs: "dict[int, _Job] | dict[int, _Job | str] | DcrisError") -> Measured:
        runs, failures = [], []
        for job in jobs.values() if isinstance(jobs, dict) else ():
            if isinstance(job, str):
                failures.append(job)
            elif (result := job.result()) is not None:
                runs.append({**result, "run": f"runs/{job.key}"})
            else:
                failures.append(job.failure(self.begin) or "not run")
        if isinstance(jobs, DcrisError):
            failures.append(str(jobs))
        cells = row.cells
        widths = {key: value for key, value in row.changes.items() if key.endswith(".width")}
        if widths:
            here = {key: value for key, value in scaled(row, self.default).items() if key in widths}
            if here != widths:
                cells = (f"{row.cells[0]} (here {', '.join(map(str, here.values()))})",)
        return Measured(
            row, row.name or row.cells[0], cells, tuple(runs), f"failed: {failures[0]}" if failures else None
        )

    def _write(self, measured: dict[str, list[Measured]]) -> str:
        with torch.device("meta"):  # shapes without memory
            backbone = ReferringSegmenter(self.default.model).count_weights()["frozen"]
        notes = [
            "Scores are percentages, by the CRIS family's protocol; several seeds give mean \N{PLUS-MINUS SIGN} deviation of "
            "a sample.",
            "Trainable weights are those beside the head, which is the same in every row; their share is of "
            f"{backbone:,}, both towers.",
            "Equal steps: every row trains on the same samples. Equal time: every row trains as many seconds as DCRIS did, "
            "with a schedule of that length. "
            + (
                "Seconds are the process's on one CPU thread, with reading and batching."
                if self.device.type == "cpu"
                else "Seconds are the clock's, on one GPU, with reading and validation."
            ),
        ]
        if self.size == "tiny":
            notes.append(
                "Tiny towers on generated scenes: the towers know the scenes' attributes by supervision, the runs are short, "
                "and none of this says who wins on photographs with the paper's model."
            )
        return write_ablation(
            self.out,
            self.name,
            TABLES[self.name],
            measured,
            splits=self.splits,
            data=(self.table.dataset, self.table.split_by),
            backbone=backbone,
            notes=notes,
        )


def _run(job: _Job, table: ReferenceTable, splits: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Train, evaluate, and leave result.json; a run that was broken off goes on."""
    config, tokenizer = job.config, tokenizer_of(job.config.model.text)
    model = build_model(config)
    counts = model.count_weights()
    steps = total_steps(config.train, len(table.split(config.data.train_split)))
    _warm_up(model.to(device), config)
    with _timed(job.folder, steps, device):
        trainer = Trainer(
            model, config, table, tokenizer, job.folder, device=device, resume=True, log=lambda line: None
        )
        trained = trainer.run()
    spent = read_json(job.folder / "time.json", "a run's time")
    model, _ = load_checkpoint(trained.best.path)
    model.to(device)
    dtype = choose_precision(config.train.precision, device)
    scores = {}
    for split in splits:
        queries = all_queries(table.split(split))
        answers = list(predict_queries(model, queries, config, Cris(), device=device, keep_masks=False))
        scores[split] = result_record(answers, table, split, Cris(), model=model, device=device, dtype=dtype)
    rate = spent["seconds"] / max(1, spent["steps"])
    result = {
        "key": job.key,
        "recipe": config.recipe,
        "seed": config.train.seed,
        "counts": counts,
        "steps": steps,
        "seconds": rate * steps,
        "seconds_per_step": rate,
        "scores": scores,
        "version": __version__,
    }
    write_json(job.folder / "result.json", result)
    return result


def _warm_up(model: ReferringSegmenter, config: RunConfig) -> None:
    """Go through the model once, in both directions, and make an optimiser: what libraries do on first use is nobody's time.

    In evaluation mode, which draws no random number and leaves statistics alone.
    """
    device, side = next(model.parameters()).device, config.data.image_size
    images = torch.zeros(2, 3, side, side, device=device)
    tokens = torch.ones(2, config.data.word_length, dtype=torch.long, device=device)
    model(images, tokens)[0].sum().backward()
    model.zero_grad(set_to_none=True)
    # torch imports its compiler with the first one, which takes over a second.
    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1, device=device))], fused=True)


@contextmanager
def _timed(folder: Path, total: int, device: torch.device) -> Iterator[None]:
    """Add what happens inside to the run's time.json: seconds, and steps of the `total` that a checkpoint has kept.

    A run that was killed behind its last step, before its time was noted, is begun anew: without one it has no result.
    """
    clock = time.process_time if device.type == "cpu" else time.monotonic
    whole = sound_checkpoints(folder, lambda line: None)  # what a kill damaged must not count
    before = whole[-1].step if whole else 0
    if before >= total and not (folder / "time.json").exists():
        remove_directory(folder / "checkpoints")
        before = 0
    begin = clock()
    try:
        yield
    finally:
        try:
            spent = read_json(folder / "time.json", "a run's time")
        except DcrisError:
            spent = {"seconds": 0.0, "steps": 0}
        if (steps := _done(folder) - before) > 0:
            write_json(
                folder / "time.json",
                {"seconds": spent["seconds"] + clock() - begin, "steps": spent["steps"] + steps},
            )


def _done(folder: Path) -> int:
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1].step if checkpoints else 0


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Hold a lock file, if nobody does: whether this process may go on. The system lets go of it however the process ends."""
    make_directory(path.parent)
    with path.open("a", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows: there one process at a time has to do
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # the file system has no locks: there, too, one process at a time has to do
            pass
        yield True


def _is_file(root: Path | None) -> bool:
    return root is not None and root.is_file()


def _own_gpu(device: str) -> str:
    """Several processes that torchrun started on a machine with GPUs take one each."""
    group = described_processes()
    if device in ("auto", "cuda") and group.count > 1 and torch.cuda.is_available():
        return f"cuda:{group.local_rank % torch.cuda.device_count()}"
    return device
