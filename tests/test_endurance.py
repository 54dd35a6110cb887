"""Runs survive kill -9 at any moment, and other failures end in one error message.

Runs are separate processes. Moments are drawn from a seed, by the clock or by the files of the run,
so that they fall on steps, on checkpoints being written or deleted, and on validation.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

from dcris.checkpoints.checkpoint import best_checkpoint, check_files, list_checkpoints, sound_checkpoints
from dcris.cli import main
from dcris.data.readers.load import load_references
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.evaluation.metrics import summarise
from dcris.training import trainer
from launcher import Launcher, torchrun_environment
from runs import assert_same_run, leftovers, quick_config, run_training, small_recipe
from test_distributed import half_mask_model

STEPS, EPOCH = 12, 4
SETTINGS = {
    "train.max_steps": STEPS,
    "train.epochs": 1000,
    "train.batch_size": 8,  # of 33 references
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.save_every": 2,
    "data.image_size": 56,
    "data.val_split": "val",
    "train.schedule": "step",  # does not depend on the number of steps
    "model.head.bias": 0.0,
    "train.lr": 2e-4,  # with the bias: otherwise all scores are 0 after so few steps
}


VALIDATED = ("data.val_split", "val")


class Run:
    """One run's directory, and how the run is started, killed and restarted."""

    def __init__(self, launcher: Launcher, data: Path, out: Path, processes: int = 1, **settings: object) -> None:
        self.launcher, self.data, self.out, self.processes = launcher, data, out, processes
        self.settings = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        self.output = out.with_name(f"{out.name}.txt")

    def command(self, *words: object) -> list[object]:
        settings = [word for key, value in self.settings.items() for word in (f"--{key}", value)]
        command = ["train", small_recipe(), "--data", self.data, "--out", self.out, "--device", "cpu", "--resume"]
        return [*command, *settings, *words]

    def start(self, *words: object, workers: int = 0) -> int:
        """Start with --resume, as job scripts do.

        Returns the id of the first process; `started` has all.
        """
        command = self.command("--data.workers", workers, *words)
        environments: list[dict[str, str]] = [{}]
        if self.processes > 1:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = [
                torchrun_environment(rank, self.processes, self.store.port) for rank in range(self.processes)
            ]
        self.started = [self.launcher.start(command, self.output, **environment) for environment in environments]
        return self.started[0]

    def finish(self, *words: object, workers: int = 0) -> None:
        """Run to the end."""
        self.start(*words, workers=workers)
        codes = [self.launcher.wait(process) for process in self.started]
        assert not any(codes), self.printed()

    def printed(self) -> str:
        """Return the output of all starts."""
        return self.output.read_text() if self.output.exists() else ""

    def steps(self) -> int:
        """Return the number of lines in the log."""
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def checkpoints(self, pattern: str) -> set[str]:
        return {path.name for path in (self.out / "checkpoints").glob(pattern)}

    def scores(self) -> list[tuple[int, float | None]]:
        return [(item.step, item.score) for item in list_checkpoints(self.out)]


@pytest.fixture(scope="module")
def uninterrupted(launcher: Launcher, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(launcher, scenes_root, tmp_path_factory.mktemp("unbroken") / "run")
    run.finish()
    return run


def assert_same_result(uninterrupted: Run, run: Run) -> None:
    """Two runs have the same weights, optimizer state, log, checkpoints and scores, and no other
    files."""
    assert_same_run(uninterrupted.out, run.out)
    assert run.scores() == uninterrupted.scores()
    assert not leftovers(run.out)
    for checkpoint in list_checkpoints(run.out):
        check_files(checkpoint.path)


# ---- kill -9 -----------------------------------------------------------------------------------

MOMENTS = ("clock", "step", "write", "delete", "validation", "start")


def wait_for_moment(run: Run, process: int, kind: str, draw: random.Random) -> bool:
    """Wait for a random moment of a kind. Returns False if the run ended before."""
    before, lines, begin = run.checkpoints("step-*"), run.steps(), time.monotonic()
    after = draw.uniform(0, {"clock": 4.0, "start": 1.0, "step": 0.2, "validation": 0.1}.get(kind, 0.01))
    more = draw.randint(1, 4)
    reached: dict[str, Callable[[], object]] = {
        "clock": lambda: True,
        "start": lambda: True,
        "step": lambda: run.steps() not in range(lines + more),
        "write": lambda: run.checkpoints(".step-*partial-*") - run.checkpoints("*-old"),
        "delete": lambda: run.checkpoints(".step-*-old"),
        "validation": lambda: any(int(name[-8:]) % EPOCH == 0 for name in run.checkpoints("step-*") - before),
    }
    while not reached[kind]():
        if run.launcher.poll(process) is not None:
            return False
        assert time.monotonic() < begin + 120, run.printed()
        time.sleep(0.0005)
    time.sleep(after)
    return True


def kill(run: Run, draw: random.Random) -> bool:
    """Kill all processes and workers, or just one of several ranks, after which the others must
    end. Returns False if all had ended."""
    victims = draw.choice([run.started, *([process] for process in run.started)])
    for process in victims:
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    codes = [run.launcher.wait(process, 60) for process in run.started]
    assert all(codes) or not any(codes), run.printed()
    return -signal.SIGKILL in codes


def kill_again_and_again(run: Run, kills: int, seed: int) -> list[str]:
    """Start, kill at a random moment, restart; then let it finish. Returns the moments."""
    draw, hit = random.Random(seed), []
    kinds = draw.sample(MOMENTS, len(MOMENTS))
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        process = run.start(workers=draw.choice((0, 0, 1, 2)))
        ended = not wait_for_moment(run, process, kind, draw)
        if ended or not kill(run, draw):
            break
        hit.append(f"{kind} after {run.steps()} lines")
        for checkpoint in list_checkpoints(run.out):
            check_files(checkpoint.path)  # intact at any moment
    run.finish(workers=draw.choice((0, 1, 2)))
    return hit


def test_few_kills(launcher: Launcher, uninterrupted: Run, scenes_root: Path, tmp_path: Path) -> None:
    """The short form of the test below."""
    run = Run(launcher, scenes_root, tmp_path / "run")
    assert kill_again_and_again(run, 1, seed=3)
    assert_same_result(uninterrupted, run)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills(
    launcher: Launcher, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    """A kill costs the steps since the last checkpoint, and does not change the final result."""
    uninterrupted = Run(launcher, scenes_root, tmp_path / "unbroken", processes)
    uninterrupted.finish()
    hit: list[str] = []
    for seed in range(100, 130):
        run = Run(launcher, scenes_root, tmp_path / f"run{seed}", processes)
        hit += kill_again_and_again(run, 4, seed)
        assert_same_result(uninterrupted, run)
        if len(hit) >= 24:
            break
    assert len(hit) >= 20
    assert {text.split()[0] for text in hit} == set(MOMENTS)
    with capsys.disabled():
        print(f"\n{len(hit)} kills, {processes} process(es): {', '.join(sorted(hit))}")


def descendants(process: int) -> list[int]:
    """Return a process and all its descendants."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(one for child in children for one in descendants(int(child)))]


@pytest.mark.slow
def test_kill_torchrun(launcher: Launcher, scenes_root: Path, tmp_path: Path) -> None:
    """torchrun with all its processes is killed, then one rank, then it gets SIGTERM; then the run
    finishes."""
    uninterrupted = Run(launcher, scenes_root, tmp_path / "unbroken", processes=2)
    uninterrupted.finish()
    run = Run(launcher, scenes_root, tmp_path / "run", processes=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dcris"]

    def start(workers: int) -> subprocess.Popen[str]:
        command = [*torchrun, *(str(word) for word in run.command("--data.workers", workers))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, text=True
        )

    with run.output.open("w") as output:
        process = start(workers=1)
        wait_for_lines(run, 3, process)
        for one in descendants(process.pid):
            os.kill(one, signal.SIGKILL)
        process.wait(60)
        process = start(workers=0)
        wait_for_lines(run, 6, process)
        os.kill(descendants(process.pid)[1], signal.SIGKILL)
        assert process.wait(120) not in {0, None}
        process = start(workers=2)
        wait_for_lines(run, 9, process)
        process.terminate()
        process.wait(120)
        assert "dcris: stopped at step " in run.printed()
        assert not leftovers(run.out)
        assert start(workers=0).wait(300) == 0, run.printed()
    assert_same_run(uninterrupted.out, run.out)


def wait_for_lines(run: Run, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while run.steps() < lines:
        assert process.poll() is None, run.printed()
        assert time.monotonic() < deadline, run.printed()
        time.sleep(0.01)


@pytest.mark.slow
def test_second_process_in_one_directory_is_refused(launcher: Launcher, scenes_root: Path, tmp_path: Path) -> None:
    """A second run in the same directory is refused."""
    run = Run(launcher, scenes_root, tmp_path / "run", train__max_steps=400)
    first = run.start()
    wait_for_moment(run, first, "step", random.Random(0))
    second = Run(launcher, scenes_root, run.out, train__max_steps=400)
    second.output = tmp_path / "second.txt"
    assert launcher.wait(second.start()) == 2
    assert f"another process (process {first} on " in second.printed()
    assert launcher.poll(first) is None
    kill(run, random.Random(0))


# ---- requests to end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", ["step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("set-up", "write", "validation"))]
)
def test_sigterm(launcher: Launcher, uninterrupted: Run, scenes_root: Path, tmp_path: Path, moment: str) -> None:
    """SIGTERM to the whole process group, twice: workers still serve the current step."""
    run = Run(launcher, scenes_root, tmp_path / "run")
    process = run.start(workers=2)
    if moment == "set-up":
        while "weights train" not in run.printed():  # printed before training starts
            time.sleep(0.001)
    else:
        assert wait_for_moment(run, process, moment, random.Random(1))
    os.killpg(process, signal.SIGTERM)
    time.sleep(0.02)
    os.killpg(process, signal.SIGTERM)
    assert launcher.wait(process, 60) == 143, run.printed()
    assert not leftovers(run.out)
    last = run.printed().splitlines()[-1]
    if moment == "set-up" and "steps in all" not in run.printed():
        return  # before training, no checkpoint is saved
    assert (
        last
        == f"dcris: stopped at step {run.scores()[-1][0]}; `--resume` continues from {list_checkpoints(run.out)[-1].path}"
    )
    run.finish(workers=1)
    assert_same_run(uninterrupted.out, run.out)  # it may keep the checkpoint it was stopped at instead of another


# ---- checkpoints that are not as they were written ---------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def half_run(launcher: Launcher, uninterrupted: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run stopped after step 8, at an epoch's end, with the checkpoints of steps 4 to 8."""
    run = Run(launcher, uninterrupted.data, tmp_path_factory.mktemp("halfway") / "run")
    run.settings |= {"train.max_steps": 8}
    run.finish()
    return run


@pytest.fixture
def damaged(half_run: Run, tmp_path: Path) -> Run:
    """A copy of `halfway` that the test may damage."""
    shutil.copytree(half_run.out, tmp_path / "run")
    run = Run(half_run.launcher, half_run.data, tmp_path / "run")
    assert [step for step, _ in run.scores()][-2:] == [6, 8]
    return run


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("optimizer.safetensors", flip),
        ("optimizer.safetensors", Path.unlink),
        ("config.json", flip),
        ("state.json", empty),
        ("state.json", flip),
        ("state.json", Path.unlink),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_checkpoint_is_moved(damaged: Run, name: str, damage: Callable[[Path], object]) -> None:
    """It is reported, and the previous checkpoint is used."""
    newest = list_checkpoints(damaged.out)[-1].path
    damage(newest / name)
    lines: list[str] = []
    assert [item.step for item in sound_checkpoints(damaged.out, lines.append)][-1] == 6
    (line,) = lines
    assert f"step 8 is damaged and was moved to {newest.with_name('damaged-step-00000008')}: " in line
    assert name in line
    assert damaged.checkpoints("damaged-*") == {"damaged-step-00000008"}


@pytest.mark.slow
def test_damaged_checkpoint_falls_back_to_the_previous(uninterrupted: Run, damaged: Run) -> None:
    """The run repeats a few steps. The damaged checkpoint is kept until its step is saved again."""
    flip(list_checkpoints(damaged.out)[-1].path / "optimizer.safetensors")
    damaged.finish()
    assert "step 8 is damaged" in damaged.printed()
    assert "resuming from step 6" in damaged.printed()
    assert not damaged.checkpoints("damaged-*")
    assert_same_result(uninterrupted, damaged)


def test_all_checkpoints_damaged(damaged: Run) -> None:
    """One error message; nothing is moved or deleted."""
    for checkpoint in list_checkpoints(damaged.out):
        flip(checkpoint.path / "model.safetensors")
    before = {path: path.read_bytes() for path in (damaged.out / "checkpoints").rglob("*") if path.is_file()}
    assert damaged.launcher.wait(damaged.start()) == 2
    (sentence,) = [line for line in damaged.printed().splitlines() if line.startswith("dcris: ")]
    assert "all checkpoints of" in sentence
    assert "step-00000008/model.safetensors" in sentence
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("words", [["evaluate"], ["predict"]])
def test_damaged_best_checkpoint_is_reported(
    damaged: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Evaluation and prediction report it."""
    best = best_checkpoint(list_checkpoints(damaged.out)).path
    flip(best / "model.safetensors")
    image = next(damaged.data.rglob("*.png"), None) or next(damaged.data.rglob("*.jpg"))
    more = {
        "evaluate": ["--data", str(damaged.data), "--split", "val"],
        "predict": [str(image), "-e", "red", "--out", str(tmp_path / "out")],
    }
    assert main([*words, str(damaged.out), *more[words[0]], "--device", "cpu"]) == 2
    error_text = capsys.readouterr().err
    assert error_text.count("\n") == 1
    assert f"{best / 'model.safetensors'} does not match its checksum" in error_text


def test_a_state_without_checksums_is_damaged(damaged: Run) -> None:
    """Without its checksums, a checkpoint that was cut short could not be detected."""
    newest = list_checkpoints(damaged.out)[-1]
    (newest.path / "state.json").write_text(json.dumps({"step": newest.step, "score": newest.score}))
    lines: list[str] = []
    assert newest.step not in [item.step for item in sound_checkpoints(damaged.out, lines.append)]
    assert "state.json is not a valid state of a checkpoint" in lines[0]


def test_files_of_a_killed_process_are_removed(damaged: Run) -> None:
    """Temporary files of a killed run are removed; other files stay."""
    before = [item.path for item in list_checkpoints(damaged.out)]
    (damaged.out / ".config.json.partial-abc.json").write_text("{")
    (before[-1] / ".state.json.partial-abc.json").write_text("{")
    for name in (".step-00000010.partial-abc", ".step-00000004.partial-old"):
        shutil.copytree(before[-1], before[-1].with_name(name))
        (before[-1].with_name(name) / "state.json").unlink()
    (damaged.out / ".gitignore").write_text("*")
    lines: list[str] = []
    assert [item.path for item in sound_checkpoints(damaged.out, lines.append)] == before
    assert not lines
    assert not leftovers(damaged.out)
    assert (damaged.out / ".gitignore").exists()


# ---- what else breaks --------------------------------------------------------------------------


def test_killed_worker(launcher: Launcher, uninterrupted: Run, scenes_root: Path, tmp_path: Path) -> None:
    """As the kernel does when memory runs out: one error message, no hang, and a run that can be
    resumed."""
    run = Run(launcher, scenes_root, tmp_path / "run", train__max_steps=4000)
    process = run.start(workers=2)
    assert wait_for_moment(run, process, "step", random.Random(0))
    workers = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    assert len(workers) >= 2
    os.kill(int(workers[1]), signal.SIGKILL)
    assert launcher.wait(process, 60) == 2, run.printed()
    printed = run.printed().splitlines()[-1]
    # torch reports the signal or not, depending on which thread notices first.
    worker = f"process {workers[1]}, a worker that reads images,"
    ways = (f"{worker} {how}; memory" for how in ("was killed (Killed)", "ended"))
    assert any(way in printed for way in ways), printed
    assert "Traceback" not in run.printed()
    assert not leftovers(run.out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of ten megabytes: one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only the superuser can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_full_disk(launcher: Launcher, uninterrupted: Run, scenes_root: Path, small_disk: Path) -> None:
    """A real full disk: the second checkpoint does not fit. With more space, the run resumes."""
    run = Run(launcher, scenes_root, small_disk / "run")
    run.output = small_disk.with_name("output.txt")
    assert launcher.wait(run.start()) == 2
    (sentence,) = [line for line in run.printed().splitlines() if line.startswith("dcris: ")]
    assert "cannot write" in sentence
    assert "No space left on device; free disk space" in sentence
    assert "Traceback" not in run.printed()
    assert [step for step, _ in run.scores()] == [2]
    assert not leftovers(run.out)
    # Also the log.
    (small_disk / "rest").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    assert launcher.wait(run.start()) == 2
    assert "No space left" in run.printed().splitlines()[-1]
    assert [step for step, _ in run.scores()] == [2]
    (small_disk / "rest").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run.finish()
    assert_same_result(uninterrupted, run)


def test_output_to_a_full_disk(launcher: Launcher, scenes_root: Path, small_disk: Path, tmp_path: Path) -> None:
    """`dcris train ... > RUN.txt 2>&1` on a full disk: nothing can be printed, but the exit code is
    right."""
    run = Run(launcher, scenes_root, tmp_path / "run")
    run.output = small_disk / "output.txt"
    (small_disk / "rest").write_bytes(b"\0" * shutil.disk_usage(small_disk).free)
    assert launcher.wait(run.start()) == 2
    assert run.printed() == ""


def test_out_of_memory_in_a_step(scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the step and what to do; the previous checkpoint is intact."""
    losses, calls = trainer.training_losses, iter(range(100))
    monkeypatch.setattr(
        trainer, "training_losses", lambda *args: losses(*args) if next(calls) < 4 else torch.empty(1 << 55)
    )
    with pytest.raises(DcrisError, match=r"not enough memory for step 5 \(.*smaller --train\.") as caught:
        run_training(quick_config(8, ("train.save_every", "2")), scenes_root, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path / "run")[-1].step == 4


# ---- photographs that cannot be read -----------------------------------------------------------


@pytest.fixture
def scenes_with_bad_image(tmp_path: Path) -> tuple[Path, Path]:
    """Scenes with about 110 training references and one unreadable image; and that image."""
    root = tmp_path / "scenes"
    write_scenes(root, train=40, val=2, test=1, seed=5)
    bad_image = load_references(root, "scenes").split("train")[0].image_path
    cut(bad_image)
    return root, bad_image


@pytest.mark.slow
def test_unreadable_image_stops_the_run(
    launcher: Launcher, scenes_with_bad_image: tuple[Path, Path], tmp_path: Path
) -> None:
    """By default, with a message that names the file; --on-bad-image skip continues."""
    run = Run(launcher, scenes_with_bad_image[0], tmp_path / "run")
    assert launcher.wait(run.start(workers=1)) == 2
    assert f"cannot read the image {scenes_with_bad_image[1]}" in run.printed().splitlines()[-1]
    run.finish("--on-bad-image", "skip")


@pytest.mark.slow
def test_unreadable_image_is_skipped(
    launcher: Launcher, scenes_with_bad_image: tuple[Path, Path], tmp_path: Path
) -> None:
    """Reported once and counted; the same samples replace it with any number of workers and after
    kills."""
    skip = {"data__on_bad_image": "skip"}
    whole = Run(launcher, scenes_with_bad_image[0], tmp_path / "whole", **skip)
    whole.finish(workers=2)
    assert whole.printed().count(f"skipped: cannot read the image {scenes_with_bad_image[1]}") == 1
    assert re.search(r"^[123] of \d+ references could not be read and were skipped$", whole.printed(), re.MULTILINE)
    killed = Run(launcher, scenes_with_bad_image[0], tmp_path / "killed", **skip)
    assert kill_again_and_again(killed, 1, seed=6)
    assert_same_result(whole, killed)


def test_many_unreadable_images_stop_the_run(
    launcher: Launcher, scenes_with_bad_image: tuple[Path, Path], tmp_path: Path
) -> None:
    """More than 5%, as with a disk that is not mounted."""
    for reference in load_references(scenes_with_bad_image[0], "scenes").split("train")[::4]:
        reference.image_path.write_bytes(b"")
    run = Run(launcher, scenes_with_bad_image[0], tmp_path / "run", data__on_bad_image="skip")
    assert launcher.wait(run.start()) == 2
    assert "cannot be read, more than 5%" in run.printed().splitlines()[-1]


@pytest.mark.slow
def test_validation_never_skips(launcher: Launcher, scenes_root: Path, tmp_path: Path) -> None:
    """Scores of different checkpoints must be of the same images."""
    root = Path(shutil.copytree(scenes_root, tmp_path / "scenes"))
    bad_image = load_references(root, "scenes").split("val")[0].image_path
    cut(bad_image)
    run = Run(launcher, root, tmp_path / "run", data__on_bad_image="skip")
    assert launcher.wait(run.start()) == 2
    assert f"cannot read the image {bad_image}" in run.printed().splitlines()[-1]
    assert run.scores()[-1] == (EPOCH, None)


# ---- the best ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_best_by_another_score(scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.best_by` selects the best checkpoint, and is recorded with its score."""
    scores = iter([{"miou": 1.0, "oiou": 9.0}, {"miou": 8.0, "oiou": 2.0}, {"miou": 3.0, "oiou": 3.0}])
    monkeypatch.setattr(trainer.Trainer, "compute_scores", lambda self: next(scores))
    config = quick_config(9, ("train.batch_size", "11"), ("train.best_by", "oiou"), ("train.keep_last", "1"), VALIDATED)
    result = run_training(config, scenes_root, tmp_path / "run")
    assert [(item.step, item.score) for item in list_checkpoints(tmp_path / "run")] == [(3, 9.0), (9, 3.0)]
    assert result.best.step == 3
    state = json.loads((result.best.path / "state.json").read_text())
    assert (state["score"], state["by"]) == (9.0, "oiou")
    with pytest.raises(DcrisError, match=r"train\.best_by"):
        run_training(
            quick_config(12, ("train.batch_size", "11"), VALIDATED), scenes_root, tmp_path / "run", resume=True
        )


@pytest.mark.parametrize("name", ["miou", "oiou", "prec@0.5", "prec@0.9"])
def test_best_by_any_score(name: str) -> None:
    """The values of `train.best_by` are names of validation scores."""
    assert name in summarise([])
    assert quick_config(1, ("train.best_by", name)).train.best_by == name


# ---- predict -----------------------------------------------------------------------------------


class Predict:
    """`dcris predict` with its results beside the images, killed and restarted."""

    def __init__(self, launcher: Launcher, model: Path, photos: Path) -> None:
        self.launcher, self.photos = launcher, photos
        self.output = photos.with_name(f"{photos.name}.txt")
        phrases = ("-e", "cup", "-e", "ring")
        self.command = ["predict", model, photos, *phrases, "--recursive", "--device", "cpu", "--out", photos]

    def run(self) -> None:
        assert self.launcher.wait(self.launcher.start(self.command, self.output)) == 0, self.output.read_text()

    def kill(self, draw: random.Random) -> str:
        """Start it, and kill it at a random moment of a random kind.

        Returns the kind, or "" if it had ended before.
        """
        kind = draw.choice(("lines", "unfinished", "any file", "clock"))
        initial, more = self.files(), draw.randint(1, 3)
        reached: dict[str, Callable[[], object]] = {
            "lines": lambda: len(self.lines()) >= len(initial[1]) + more,
            "unfinished": lambda: any(".partial-" in name for name in self.names()),
            "any file": lambda: len(self.names()) >= len(initial[0]) + more,
            "clock": lambda: True,
        }
        process = self.launcher.start(self.command, self.output)
        deadline = time.monotonic() + 120
        while not reached[kind]() and self.launcher.poll(process) is None:
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 1.0 if kind == "clock" else 0.02))
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        return kind if self.launcher.wait(process) == -signal.SIGKILL else ""

    def names(self) -> list[str]:
        return [path.name for path in self.photos.rglob("*")]

    def lines(self) -> list[bytes]:
        journal = self.photos / "dcris-journal.jsonl"
        return journal.read_bytes().splitlines() if journal.exists() else []

    def files(self) -> tuple[list[str], list[bytes]]:
        return self.names(), self.lines()

    def contents(self) -> dict[str, bytes]:
        """Return every file; of the journal and the state, the parts that do not name this folder,
        or depend on its name."""
        files = {path.relative_to(self.photos).as_posix(): path for path in self.photos.rglob("*") if path.is_file()}
        found = {name: path.read_bytes().replace(bytes(self.photos), b"") for name, path in files.items()}
        state = "dcris-journal.state.json"
        return found | {state: re.sub(rb'"records":"[0-9a-f]{64}"', b"", found[state])}


def many_images(folder: Path) -> Path:
    """Images in subfolders, two with the same name, and one with the longest possible name."""
    for number in range(10):
        name = (
            ("0.jpg", "0.png", f"{'n' * 250}.png", f"deep/{number}.png")[min(number, 3)]
            if number < 6
            else f"{number}.png"
        )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / name)
        os.utime(folder / name, (10**9, 10**9))
    return folder


@pytest.fixture(scope="module")
def daring_model(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_mask_model(trained_run, tmp_path_factory.mktemp("half_mask_model") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
def test_kill_predict(launcher: Launcher, daring_model: Path, tmp_path: Path, kills: int) -> None:
    """With --out beside the images: the same command again gives exactly the files of an
    uninterrupted call."""
    uninterrupted = Predict(launcher, daring_model, many_images(tmp_path / "unbroken"))
    uninterrupted.run()
    expected = uninterrupted.contents()
    draw, hit = random.Random(5), []
    for number in range(5 * kills):
        killed = Predict(launcher, daring_model, many_images(tmp_path / f"killed{number}"))
        hit += filter(None, (killed.kill(draw) for _ in range(draw.randint(1, 3))))
        killed.run()
        assert killed.contents() == expected
        if len(hit) >= kills:
            break
    assert len(hit) >= kills
