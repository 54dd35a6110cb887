"""Shared fixtures: a small data set in the REFER layout that a test may spoil, and the real one
where it is present."""

import gc
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from hub import Hub
from launcher import Launcher

# Whoever runs the tests in the background of a shell runs them with Ctrl-C ignored, and so would
# every `dcris` that they start and interrupt; a signal that Python handles is at its default again
# in a new program.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread for each process: small tensors are slowed down by more, and a run that another process
# continues is the same bit for bit only with as many threads. torch reads it when it is imported.
assert "torch" not in sys.modules
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine fails no test: speed is measured in benchmarks/.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SLOW_TIMEOUT = 1800
"""Seconds a slow test may take; for the others see pyproject.toml."""


def pytest_sessionstart() -> None:
    gc.disable()  # until all is imported, of which nothing is garbage; or it takes a quarter of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@dataclass
class TinyRefer:
    """Two photographs, three references in three splits, one mask of each kind. Change it, then
    `write()` it."""

    root: Path
    dataset: str = "tiny"
    split_by: str = "toy"
    references: list[Any] = field(default_factory=list)
    instances: dict[str, Any] = field(default_factory=dict)

    @property
    def pickle_path(self) -> Path:
        return self.root / self.dataset / f"refs({self.split_by}).p"

    @property
    def json_path(self) -> Path:
        return self.root / self.dataset / "instances.json"

    @property
    def image_folder(self) -> Path:
        return self.root / "images/mscoco/images/train2014"

    def write(self) -> Path:
        """Write both files and the images; return the root."""
        self.pickle_path.parent.mkdir(parents=True, exist_ok=True)
        self.pickle_path.write_bytes(pickle.dumps(self.references, 2))
        self.json_path.write_text(json.dumps(self.instances))
        self.image_folder.mkdir(parents=True, exist_ok=True)
        for number, (width, height) in enumerate([(40, 30), (24, 32)], 1):
            pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(self.image_folder / f"{number}.png")
        return self.root


def _sentences(first: int, *texts: str) -> list[dict[str, Any]]:
    return [
        {"sent_id": first + number, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def tiny_refer(tmp_path: Path) -> TinyRefer:
    return make_tiny_refer(tmp_path / "data")


def make_tiny_refer(root: Path) -> TinyRefer:
    """The set that is to be below `root`; nothing is written yet."""
    rectangle = [2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0]
    annotations = [
        {"id": 71, "image_id": 1, "category_id": 5, "segmentation": [rectangle]},
        {
            "id": 72,
            "image_id": 1,
            "category_id": 5,
            "segmentation": {"size": [30, 40], "counts": [100, 20, 30 * 40 - 120]},
        },
        # rows 8 to 15 of columns 4 to 7 of 24 x 32 (width x height), as pycocotools compresses it
        {"id": 73, "image_id": 2, "category_id": 6, "segmentation": {"size": [32, 24], "counts": "X48h000000h?"}},
    ]
    references = [
        {"ref_id": 10, "ann_id": 71, "image_id": 1, "split": "testA", "sentences": _sentences(100, "left one")},
        {
            "ref_id": 11,
            "ann_id": 72,
            "image_id": 1,
            "split": "val",
            "sentences": _sentences(200, "tall thing", "right"),
        },
        {"ref_id": 12, "ann_id": 73, "image_id": 2, "split": "train", "sentences": _sentences(300, "the cup", "cup")},
    ]
    for reference, annotation in zip(references, annotations, strict=True):
        reference["category_id"] = annotation["category_id"]
        reference["sent_ids"] = [sentence["sent_id"] for sentence in reference["sentences"]]
    instances = {
        "images": [
            {"id": 1, "file_name": "1.png", "height": 30, "width": 40},
            {"id": 2, "file_name": "2.png", "height": 32, "width": 24},
        ],
        "annotations": annotations,
        "categories": [{"id": 5, "name": "person"}, {"id": 6, "name": "cup"}],
    }
    return TinyRefer(root, references=references, instances=instances)


@pytest.fixture(scope="session")
def refer_root() -> Path:
    """Real data in the REFER layout: $DCRIS_REFER_ROOT, or beside the checkout; tests that need it
    are skipped without."""
    root = Path(os.environ.get("DCRIS_REFER_ROOT", Path(__file__).parents[2] / "shared/data/refer"))
    if not root.is_dir():
        pytest.skip("the real data set is not on this machine")
    return root


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated scenes, 12 for training, 3 for validation and 4 for the test; nobody may change
    them."""
    from dcris.data.scenes import write_scenes

    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=12, val=3, test=4, seed=5)
    return root


@pytest.fixture(scope="session")
def trained_run(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the generated scenes, with two checkpoints; nobody may change it."""
    from runs import quick_config, run_training

    out = tmp_path_factory.mktemp("run") / "tiny"
    run_training(quick_config(12, ("train.log_every", "2")), scenes_root, out)
    return out


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """Leave it to the system when files reach the disk: the power stays on, and a short training
    would spend a fifth of its time on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep away from what the user's own commands remember, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCRIS_CACHE", str(tmp_path_factory.mktemp("dcris")))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_parser() -> Iterator[None]:
    """Make the parser of the command line once: for each of a thousand commands it takes 20 ms."""
    from dcris import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", cache(cli._parser))
        yield


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts `dcris` without the seconds that importing torch takes each time."""
    with Launcher() as launcher:
        yield launcher


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    with Hub() as server:
        # What HF_ENDPOINT and HF_HOME set, had they been there when the library was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
