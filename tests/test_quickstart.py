"""The quickstart, cut down to seconds: the same way through the program, with numbers too small to mean anything."""

import json
from pathlib import Path

import pytest

from dcris.errors import DcrisError
from dcris.experiments import quickstart as module
from dcris.recipes import get_recipe


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    base = get_recipe("dcris_tiny")
    train = base.train.model_copy(update={"max_steps": 3, "warmup_steps": 1})
    monkeypatch.setattr(module, "get_recipe", lambda name: base.model_copy(update={"train": train}))
    monkeypatch.setattr(module, "TRAIN_SCENES", 16)
    monkeypatch.setattr(module, "TEST_SCENES", 5)
    monkeypatch.setattr(module, "cores", lambda: 1)


def test_it_leaves_what_it_promises_and_can_be_called_again(short: None, tmp_path: Path) -> None:
    """Whoever tries dcris looks for these files first; a second call must not train or generate anew."""
    first = module.quickstart(tmp_path, device="cpu", log=lambda line: None)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == first
    wanted = {"miou", "oiou", "prec@0.5", "prec@0.9", "miou_shuffled", "miou_by_kind", "seconds", "references"}
    assert wanted <= stored.keys()
    assert stored["dataset"] == "scenes" and stored["split"] == "test"
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and "data:image" in page
    assert list((tmp_path / "predictions").rglob("*.overlay.png"))
    log = (tmp_path / "log.jsonl").read_text()
    again = module.quickstart(tmp_path, device="cpu", log=lambda line: None)
    assert again["weights_sha256"] == first["weights_sha256"]
    assert again["miou"] == first["miou"]
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_seed_that_no_run_takes_is_a_sentence(short: None, tmp_path: Path) -> None:
    """Else the model is trained, and its checkpoint cannot be read."""
    with pytest.raises(DcrisError, match=r"train\.seed"):
        module.quickstart(tmp_path / "a", seed=2**32, device="cpu", log=lambda line: None)
    assert not (tmp_path / "a").exists()


def test_another_seed_does_not_train_on_the_first_ones_scenes(short: None, tmp_path: Path) -> None:
    """Means over seeds would be of one set of scenes if a folder's scenes were taken up whatever their seed."""
    module.quickstart(tmp_path / "a", seed=1, device="cpu", log=lambda line: None)
    with pytest.raises(DcrisError, match="seed"):
        module.quickstart(tmp_path / "a", seed=2, device="cpu", log=lambda line: None)
