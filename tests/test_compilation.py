"""Training with a compiled network (`train.compile`)."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from dcris.config import RunConfig
from dcris.data.readers.load import load_references
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.training import compilation
from dcris.training.compilation import compiled
from dcris.training.loggers import read_log
from dcris.training.stopping import Interrupted
from dcris.training.trainer import build_model
from dcris.utils.distributed import Processes
from runs import CPU, EVERY_STEP, last_tensors, quick_config, run_training
from test_train import stop_at

COMPILE = ("train.compile", "true")

SMALL = (
    ("model.vision", json.dumps({"name": "random", "width": 16, "depth": 3, "heads": 2, "grid": 4, "registers": 1})),
    (
        "model.text",
        json.dumps(
            {
                "name": "random",
                "tokenizer": "tiny",
                "width": 16,
                "depth": 2,
                "heads": 2,
                "vocabulary": 144,
                "length": 24,
                "sentence_width": 16,
            }
        ),
    ),
    ("model.method", json.dumps({"name": "houlsby", "width": 4})),
    (
        "model.head",
        json.dumps({"feature_layers": [0, 1], "width": 16, "heads": 2, "layers": 1, "feedforward": 16, "dropout": 0.0}),
    ),
    ("data.image_size", "28"),
    ("train.lr", "1e-3"),
)
"""A network that is compiled quickly."""

HAS_COMPILER = shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.fixture(scope="module")
def table(scenes_root: Path) -> ReferenceTable:
    return load_references(scenes_root, "scenes")


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate the network as a compiled run does, but run the graphs in torch: the
    C++ compiler takes minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(compilation, "_BACKEND", "aot_eager")
    monkeypatch.setattr(compilation, "_require_compiler", lambda device: None)


def small_config(steps: int, *settings: tuple[str, str]) -> RunConfig:
    return quick_config(steps, EVERY_STEP, *SMALL, *settings)


def assert_close(one: Path, other: Path) -> None:
    """Two runs have the same losses and the same names of weights, up to rounding."""
    ours, theirs = read_log(one), read_log(other)
    assert len(ours) == len(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-3)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert last_tensors(one, file).keys() == last_tensors(other, file).keys()


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize(
    "settings",
    [
        (("train.ema", "0.9"), ("train.clip_norm", "1")),
        (("data.phrases_per_image", "3"), ("train.masking", "{}")),
        (("data.scales", "[1, 2]"), ("train.micro_batch", "3")),
        (("data.cache_features", "1"), ("model.method", "null")),
    ],
)
def test_losses_are_those_of_the_network(
    table: ReferenceTable, tmp_path: Path, settings: tuple[tuple[str, str], ...]
) -> None:
    """With other options, and with the names of an uncompiled run."""
    run_training(small_config(4, *settings), table, tmp_path / "plain")
    run_training(small_config(4, *settings, COMPILE), table, tmp_path / "compiled")
    assert_close(tmp_path / "compiled", tmp_path / "plain")
    assert not any("_orig_mod" in name for name in last_tensors(tmp_path / "compiled"))


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_a_run_resumes_from_and_to_a_compiled_one(table: ReferenceTable, tmp_path: Path) -> None:
    run_training(small_config(4), table, tmp_path / "plain")
    for name, first, second in (("to", (), (COMPILE,)), ("from", (COMPILE,), ())):
        with pytest.raises(Interrupted):
            run_training(small_config(4, *first), table, tmp_path / name, log=stop_at(2))
        run_training(small_config(4, *second), table, tmp_path / name, resume=True)
        assert_close(tmp_path / name, tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs g++ and Python.h")
@pytest.mark.timeout(1800)
def test_compiled_code_trains(table: ReferenceTable, tmp_path: Path) -> None:
    """With the code of torch's compiler; at a rate at which rounding does not grow."""
    torch.compiler.reset()
    for name, settings in (("plain", ()), ("compiled", (COMPILE,))):
        run_training(small_config(50, ("train.lr", "1e-4"), *settings), table, tmp_path / name)
    assert_close(tmp_path / "compiled", tmp_path / "plain")


def test_a_missing_compiler_is_named(table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    message = r"needs the compiler no-such-compiler and Python's header files \(Python\.h\), not found here; install"
    with pytest.raises(DcrisError, match=message):
        run_training(small_config(1, COMPILE), table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["train.checkpoint_activations", "train.shard_towers"])
def test_settings_that_do_not_work_together(key: str) -> None:
    config = small_config(1, COMPILE, (key, "true"))
    with pytest.raises(DcrisError, match=f"train.compile does not work with {key}; leave one of them off"):
        compiled(build_model(config), config.train, CPU, Processes())


def test_several_processes_are_refused() -> None:
    """The collective operations of batch norm cannot be compiled."""
    config = small_config(1, COMPILE)
    with pytest.raises(DcrisError, match=r"train\.compile works with one process only"):
        compiled(build_model(config), config.train, CPU, Processes(count=2))


def test_a_network_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence instead of the compiler's traceback."""
    from torch._dynamo.exc import Unsupported

    def fail(*arguments: object) -> None:
        raise Unsupported("no loops\nat all")

    monkeypatch.setattr(compilation, "_require_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, backend: fail)
    config = small_config(1, COMPILE)
    forward = compiled(build_model(config), config.train, CPU, Processes())
    with pytest.raises(DcrisError, match=r"cannot be compiled \(no loops\); leave train\.compile off"):
        forward()


def test_it_is_off_by_default() -> None:
    """The trainer then calls the model itself."""
    config = quick_config(1)
    model = build_model(config)
    assert compiled(model, config.train, CPU, Processes()) is model
