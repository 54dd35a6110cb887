"""The quickstart with a few scenes and steps."""

import json
from pathlib import Path

import pytest

from dcris.data.photographs import example_photographs
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
    monkeypatch.setattr(module, "GENERALISED_SCENES", 5)
    monkeypatch.setattr(module, "cores", lambda: 1)


def test_it_writes_its_files(short: None, tmp_path: Path) -> None:
    """The documented files exist."""
    first = module.quickstart(tmp_path, device="cpu", log=lambda line: None)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == first
    wanted = {"miou", "oiou", "prec@0.5", "prec@0.9", "miou_shuffled", "miou_by_kind", "seconds", "references"}
    assert wanted <= stored.keys()
    assert stored["dataset"] == "scenes" and stored["split"] == "test"
    page = (tmp_path / "report.html").read_text()
    assert "<html" in page and "data:image" in page
    assert list((tmp_path / "predictions").rglob("*.annotated.png"))
    photographs = [(each["photograph"], each["phrase"]) for each in stored["photographs"]]
    assert photographs == [(path.name, phrase) for path, phrases in example_photographs() for phrase in phrases]
    assert [each["phrase"] for each in stored["photographs"] if each["score"] < 0.5 and not each["box"]] == ["bird"]
    assert "photos, not found (" in page
    # What a visitor sees first is the real world.
    assert page.index("<h2>Photographs</h2>") < page.index("<h2>mIoU</h2>")
    assert stored["generalised"]["presence_auroc"] > 70
    assert {"giou", "n_acc", "t_acc", "miou_several"} <= stored["generalised"].keys()
    assert page.index("<h2>Several objects</h2>") < page.index("<h2>Not there</h2>") < page.index("<h2>mIoU</h2>")
    assert "tiny, not found (" in page and "tiny: AUROC of presence" in page


@pytest.mark.slow
def test_it_can_be_repeated(short: None, tmp_path: Path) -> None:
    """A second call neither trains nor generates scenes again."""
    first = module.quickstart(tmp_path, device="cpu", log=lambda line: None)
    log = (tmp_path / "log.jsonl").read_text()
    again = module.quickstart(tmp_path, device="cpu", log=lambda line: None)
    assert again["weights_sha256"] == first["weights_sha256"]
    assert again["miou"] == first["miou"]
    assert (tmp_path / "log.jsonl").read_text() == log


@pytest.mark.slow
def test_without_the_photographs_packages_the_rest_runs(
    short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Installed without the extra, the quickstart is what it was, and says what is left out."""
    monkeypatch.setattr("dcris.utils.wheels.find_spec", lambda name: None)
    lines: list[str] = []
    metrics = module.quickstart(tmp_path, device="cpu", log=lines.append)
    assert metrics["photographs"] == [] and "Photographs" not in (tmp_path / "report.html").read_text()
    (line,) = [line for line in lines if "left out" in line]
    assert "pip install 'dcris[photos]'" in line


def test_an_invalid_seed_raises(short: None, tmp_path: Path) -> None:
    """The seed is checked before anything is generated or trained."""
    with pytest.raises(DcrisError, match=r"train\.seed"):
        module.quickstart(tmp_path / "a", seed=2**32, device="cpu", log=lambda line: None)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_another_seed_in_the_same_folder_raises(short: None, tmp_path: Path) -> None:
    """Scenes of another seed in the same folder must not be used."""
    module.quickstart(tmp_path / "a", seed=1, device="cpu", log=lambda line: None)
    with pytest.raises(DcrisError, match="seed"):
        module.quickstart(tmp_path / "a", seed=2, device="cpu", log=lambda line: None)
