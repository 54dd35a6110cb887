"""Several processes give the results of one."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dcris import Segmenter
from dcris.checkpoints.checkpoint import list_checkpoints
from dcris.cli import main
from dcris.data.scenes import write_scenes
from dcris.errors import DcrisError
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.loggers import read_log
from dcris.training.losses import text_to_pixel_loss
from dcris.training.parallel import divide_batch, synchronise_batch_norm
from dcris.utils.distributed import processes
from launcher import Launcher, torchrun_environment
from models import randomise
from runs import PLAIN_WORDS, last_tensors, quick_config, timeless_log

DCRIS_ITSELF = ("-m", "dcris")
IN_DOUBLE_PRECISION = (str(Path(__file__).with_name("double_precision.py")),)


def torchrun(
    count: int, *words: object, program: Sequence[str] = DCRIS_ITSELF, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run `dcris` in `count` processes, by default with one thread each: rounding depends on the
    number of threads."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *program]
    return subprocess.run(
        [sys.executable, *command, *(str(word) for word in words)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def train_words(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    """A short run in batches of 8 at the paper's learning rate; at the recipe's, rounding soon
    dominates."""
    settings = {"max_steps": steps, "epochs": 1000, "batch_size": 8, "warmup_steps": 1, "log_every": 1, "lr": 1e-4}
    words = [
        "train",
        "dcris_tiny",
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--data.image_size",
        "56",
        *PLAIN_WORDS,
    ]
    return [*words, *(word for key, value in settings.items() for word in (f"--train.{key}", str(value))), *more]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run) if "loss" in line]


def messages_of(text: str) -> list[str]:
    """Return the lines of dcris on standard error, without those of torchrun."""
    return [line for line in text.splitlines() if line.startswith("dcris: ")]


def half_mask_model(run: Path, path: Path) -> Path:
    """A model whose bias is set so that it selects half of each image; a few steps of training
    select nothing."""
    segmenter = Segmenter.from_pretrained(run, device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    (answer,) = segmenter.predict(image, "man on the left", scores=True)
    with torch.no_grad():
        segmenter.model.head.projector.text.bias[-1] -= np.quantile(logit(answer.probabilities.astype(float)), 0.5)
    return segmenter.save_pretrained(path)


def logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability / (1 - probability))


@pytest.mark.slow
def test_scores_do_not_depend_on_batch_size_or_processes(trained_run: Path, refer_root: Path, tmp_path: Path) -> None:
    """Samplers that pad would count some expressions twice."""
    words = [
        "evaluate",
        half_mask_model(trained_run, tmp_path / "daring"),
        "--data",
        refer_root,
        "--dataset",
        "cocomini",
        "--split",
        "val",
    ]
    words += ["--device", "cpu"]
    results = {}
    for count, batch_size in ((1, 1), (1, 7), (1, 32), (2, 7), (3, 32)):
        out = tmp_path / f"{count}.{batch_size}.json"
        done = torchrun(count, *words, "--batch-size", batch_size, "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"miou"') == 1  # printed by one rank
        results[count, batch_size] = json.loads(out.read_text())
    assert results[1, 1]["expressions"] == 216
    assert 1 < results[1, 1]["miou"] < 99
    assert all(result == results[1, 1] for result in results.values())


def test_incomplete_environment_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With an incomplete environment, the program must not wait for other ranks."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(DcrisError, match="torchrun"), processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DcrisError, match="torchrun"), processes():
        pass
    assert main(["evaluate", "nothing", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=16, val=3, test=1, seed=5)
    return root


def compare_gradients(rank: int, port: int) -> None:
    """In one of three processes: gradients and statistics of a batch of 8 in double precision,
    compared with those of one process."""
    os.environ |= torchrun_environment(rank, 3, port)
    torch.set_num_threads(1)
    sys.modules.pop("torch.distributed.nn.functional", None)  # if the tests imported it
    models = [ReferringSegmenter(quick_config(1, recipe="dcris_tiny").model).double() for _ in range(2)]
    for model in models:
        randomise(model)
        model.train()
    source = torch.Generator().manual_seed(1)
    images, tokens = (
        torch.randn(8, 3, 56, 56, generator=source).double(),
        torch.randint(1, 99, (8, 14), generator=source),
    )
    masks = (torch.rand(8, 1, 56, 56, generator=source) > 0.8).float()
    with processes("cpu") as group:
        text_to_pixel_loss(models[0](images, tokens)[0], masks).backward()
        synchronise_batch_norm(models[1])
        assert models[0].state_dict().keys() == models[1].state_dict().keys()
        (places,) = divide_batch(8, None, group)
        own_part = slice(places.start, places.stop)
        logits = models[1](images[own_part], tokens[own_part]).logits
        (text_to_pixel_loss(logits, masks[own_part]) * (len(places) / 8)).backward()
        group.sum_gradients([*models[1].parameters()])
        assert group.all_gather(rank) == [0, 1, 2]
        assert group.agree(None) is None
        assert group.agree(7 if rank == 1 else None) == 7
        assert group.sum(1.0, rank) == [3.0, 3.0]
        assert group.from_first(lambda: f"of {rank}") == "of 0"
        for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                assert (one.grad - other.grad).abs().max() < 1e-6 * (1e-3 + one.grad.abs().max()), name
        for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12), name
        # The summed gradients are bit for bit the same on all ranks.
        total = sum(item.grad.sum().item() for item in models[1].parameters() if item.grad is not None)
        assert len(set(group.all_gather(total))) == 1
        importlib.import_module("torch.distributed.nn.functional")  # as torch does at the first prediction
    # A thread that outlives the group frees tensors at exit, and aborts one process in four.
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in name for name in threads), threads


def test_gradients_of_the_whole_batch(launcher: Launcher, tmp_path: Path) -> None:
    """Uneven shares (3, 3 and 2 samples): gradients of the mean, and batch norm, over the whole
    batch."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as module; "
    outputs = [tmp_path / f"{rank}.txt" for rank in range(3)]
    processes = [
        launcher.start((), output, first=f"{code}module.compare_gradients({rank}, {store.port}); sys.exit()")
        for rank, output in enumerate(outputs)
    ]
    codes = [launcher.wait(process) for process in processes]
    assert codes == [0] * 3, "".join(output.read_text() for output in outputs)


@pytest.mark.slow
def test_two_processes_equal_one(scenes: Path, tmp_path: Path) -> None:
    """The same curve and scores, one log, one checkpoint, one output."""
    more = ["--data.val_split", "val"]
    alone = torchrun(1, *train_words(scenes, tmp_path / "one", 6, *more), program=IN_DOUBLE_PRECISION)
    assert alone.returncode == 0, alone.stderr
    done = torchrun(2, *train_words(scenes, tmp_path / "two", 6, *more), program=IN_DOUBLE_PRECISION)
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=4e-7)
    assert [line.keys() for line in timeless_log(tmp_path / "two")] == [
        line.keys() for line in timeless_log(tmp_path / "one")
    ]
    assert done.stdout.count("references, ") == alone.stdout.count("references, ") == 1
    assert [item.path.name for item in list_checkpoints(tmp_path / "two")] == ["step-00000005", "step-00000006"]
    ours, theirs = last_tensors(tmp_path / "two"), last_tensors(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), rtol=1e-7, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "more"),
    [
        (1, ()),
        (2, ()),
        (3, ()),
        (4, ()),
        (2, ("--train.checkpoint_activations", "true")),
        (2, ("--train.shard_towers", "true", "--data.val_split", "val", "--tracker", "tensorboard")),
    ],
)
def test_twenty_steps_in_double_precision(scenes: Path, tmp_path: Path, count: int, more: Sequence[str]) -> None:
    """In double precision, to the last logged digits; towers may be sharded, and then each process
    has two threads: if both validated an image, ranks would wait for different layers."""
    threads = 2 if "--train.shard_towers" in more else 1
    for name, number, words in (("one", 1, ()), ("many", count, more)):
        command = train_words(scenes, tmp_path / name, 20, *words)
        done = torchrun(number, *command, program=IN_DOUBLE_PRECISION, threads=threads)
        assert done.returncode == 0, done.stderr
        assert not messages_of(done.stderr)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=4e-7)


@pytest.mark.slow
def test_twenty_steps_in_single_precision(scenes: Path, tmp_path: Path) -> None:
    """Relative 1e-5; the fingerprints of the towers are right, and so is the checkpoint of sharded
    ones.

    For one of three seeds: in about one run of three, an input of a ReLU is within rounding of zero
    (see double_precision.py), and even two numbers of threads then differ by up to 5e-4; otherwise
    all agree to 1e-6.
    """
    ways = {"two": (2, ()), "three": (3, ()), "shards": (2, ("--train.shard_towers", "true"))}
    differences: dict[str, list[float]] = {name: [] for name in ways}
    for seed in (1, 3, 4):
        words = ["--train.seed", str(seed)]
        one = tmp_path / f"one.{seed}"
        assert main(train_words(scenes, one, 20, *words)) == 0
        for name, (count, more) in ways.items():
            many = tmp_path / f"{name}.{seed}"
            done = torchrun(count, *train_words(scenes, many, 20, *words, *more))
            assert done.returncode == 0, done.stderr
            assert not messages_of(done.stderr)
            Segmenter.from_pretrained(many, device="cpu")  # checks the towers
            ours, theirs = np.array(losses(many)), np.array(losses(one))
            differences[name].append(float(np.max(np.abs(ours - theirs) / theirs)))
            assert np.allclose(ours, theirs, rtol=1e-2), name
    assert all(min(values) < 1e-5 for values in differences.values()), differences


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_trained_weights_inside_of_sharded_modules(scenes: Path, tmp_path: Path, method: str) -> None:
    """Methods that train a part of an attention or an MLP learn the same on sharded towers: these
    weights stay whole, and the checkpoint has them."""
    words = ["--model.method", json.dumps({"name": method}), "--train.seed", "3"]
    assert main(train_words(scenes, tmp_path / "one", 4, *words)) == 0
    done = torchrun(2, *train_words(scenes, tmp_path / "two", 4, *words, "--train.shard_towers", "true"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    ours, theirs = last_tensors(tmp_path / "two"), last_tensors(tmp_path / "one")
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    Segmenter.from_pretrained(tmp_path / "two", device="cpu")  # checks the towers


@pytest.mark.slow
def test_passes_of_two_processes_equal_those_of_one(scenes: Path, tmp_path: Path) -> None:
    """A pass of two processes with 2 samples each equals a pass of one with 4, also its batch
    norm."""
    assert main(train_words(scenes, tmp_path / "one", 3, "--train.micro_batch", "4")) == 0
    done = torchrun(2, *train_words(scenes, tmp_path / "two", 3, "--train.micro_batch", "2"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_resume_with_another_number_of_processes(scenes: Path, tmp_path: Path) -> None:
    """Started on two processes, continued on one and three: the same samples, so the same curve; on
    two again, bit for bit."""
    for name, counts in (("two", (2,)), ("split", (2, 2)), ("changing", (2, 1, 3))):
        for number, count in enumerate(counts, 1):
            steps = 9 * number // len(counts)
            done = torchrun(count, *train_words(scenes, tmp_path / name, steps, "--train.schedule", "step", "--resume"))
            assert done.returncode == 0, done.stderr
    # Other shares round differently, which Adam amplifies; other samples would differ by 0.1.
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)
    assert losses(tmp_path / "split") == losses(tmp_path / "two")
    ours, theirs = last_tensors(tmp_path / "split"), last_tensors(tmp_path / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- how several processes end -----------------------------------------------------------------


def start(scenes: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dcris"]
    process = subprocess.Popen(
        [*command, *train_words(scenes, out, 5000)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    patience = time.monotonic() + 300
    while not losses(out) if (out / "log.jsonl").exists() else True:
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    return process


def second_worker(agent: int) -> int:
    """Return the process that torchrun started as rank 1."""
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError("there is no second worker")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes as Linux lists them")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_one_process_ends_all(scenes: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM leaves a checkpoint and exit code 143 on all ranks; after a kill, no rank is left
    waiting."""
    process = start(scenes, tmp_path / "run")
    os.kill(second_worker(process.pid), number)
    _, error_text = process.communicate(timeout=120)
    codes = sorted(set(re.findall(r"exitcode  : (-?\d+)", error_text)))
    (message,) = messages_of(error_text)
    if number == signal.SIGTERM:
        assert codes == ["143"]
        assert re.match(r"dcris: stopped at step \d+; `--resume` continues from", message)
        assert list_checkpoints(tmp_path / "run")
    else:
        assert codes == ["-9", "2"]
        assert re.match(r"dcris: lost connection to another rank", message)
    assert "dcris/cli" not in error_text  # no traceback except torchrun's own


@pytest.mark.slow
def test_error_of_one_process_is_printed_once(tmp_path: Path) -> None:
    """An image that one rank cannot read, and a batch that cannot be divided: one message."""
    write_scenes(tmp_path / "data", train=6, val=1, test=1, seed=5)
    words = train_words(tmp_path / "data", tmp_path / "run", 50)
    done = torchrun(2, *words, "--train.batch_size", "1")
    (message,) = messages_of(done.stderr)
    assert message.startswith("dcris: a batch of 1 leaves some of 2 processes without a sample; start fewer")
    assert not (tmp_path / "run").exists()
    image_paths = sorted((tmp_path / "data/images/mscoco/images/train2014").iterdir())
    image_paths[0].write_bytes(b"no picture")
    done = torchrun(2, *words, "--data.train_split", "train")
    (message,) = messages_of(done.stderr)
    assert image_paths[0].name in message
    assert set(re.findall(r"exitcode  : (-?\d+)", done.stderr)) == {"2"}
    assert "dcris/cli" not in done.stderr
