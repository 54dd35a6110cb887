"""Models load by every kind of name with the same results, and others can load what is saved."""

import copy
import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file, save_file

import dcris.checkpoints.convert_detris
from dcris import Segmenter
from dcris.checkpoints.backbones import load_towers
from dcris.checkpoints.checkpoint import store_calibration
from dcris.checkpoints.convert_detris import published_name
from dcris.checkpoints.model_zoo import PUBLISHED, REPOSITORY
from dcris.checkpoints.resolve import locate
from dcris.cli import main
from dcris.config import ModelConfig, RunConfig, parse_value, replace
from dcris.errors import DcrisError
from dcris.models.adapters.attach import trained_state
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES, Recipe, get_recipe
from hub import Hub
from marks import slow_except
from models import randomise
from published import saved

PHRASES = ["red circle", "the small ring"]
PHOTO = np.random.default_rng(3).integers(0, 256, (40, 64, 3), np.uint8)
REPO = "somebody/tiny"


def tiny_run(*settings: tuple[str, str]) -> RunConfig:
    return replace(
        get_recipe("dcris_tiny"), {"data.image_size": 56} | {key: parse_value(text) for key, text in settings}
    )


def segmenter(seed: int = 0, dataset: str = "scenes", **changes: str) -> Segmenter:
    """Tiny towers with random adapters and head."""
    settings = [(key.replace("__", "."), value) for key, value in changes.items()]
    config = tiny_run(("data.dataset", json.dumps(dataset)), *settings)
    return Segmenter(copy.deepcopy(random_model(config.model.model_dump_json(), seed)), config, device="cpu")


@functools.cache
def random_model(network: str, seed: int) -> ReferringSegmenter:
    config = ModelConfig.model_validate_json(network)
    torch.manual_seed(seed)
    model = ReferringSegmenter(config)
    randomise(model, seed)
    load_towers(model)
    return model


def scores(answering: Segmenter, adapters: str | None = None) -> list[np.ndarray]:
    predictions = answering.predict(PHOTO, PHRASES, scores=True, adapters=adapters)
    return [prediction.probabilities for prediction in predictions if prediction.probabilities is not None]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float = 0.0) -> None:
    assert len(ours) == len(theirs) == len(PHRASES)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance)


def load(source: str | Path) -> Segmenter:
    return Segmenter.from_pretrained(source, device="cpu")


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "towers"),
    slow_except(product(["model", "model.safetensors"], [None, True]), ("model", None), ("model.safetensors", True)),
)
def test_a_saved_model_gives_the_same_results(name: str, towers: bool | None, tmp_path: Path) -> None:
    """A saved model gives the same results."""
    ours = segmenter()
    path = ours.save_pretrained(tmp_path / name, towers=towers)
    assert_same(scores(load(path)), scores(ours))
    if path.is_dir():
        expected = {"config.json", "model.safetensors", "README.md"} | ({"towers.safetensors"} if towers else set())
        assert {file.name for file in path.iterdir()} == expected
    else:
        assert load_file(path).keys() == ours.model.state_dict().keys()
    again = load(path).save_pretrained(tmp_path / f"again-{name}")
    assert_same(scores(load(again)), scores(ours))


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_half_precision_takes_half_the_space(name: str, tmp_path: Path) -> None:
    """--half must save space and keep the masks."""
    ours = segmenter()
    whole, half = (ours.save_pretrained(tmp_path / f"{half}-{name}", half=half) for half in (False, True))
    tensors = load_file(half / "model.safetensors" if half.is_dir() else half)
    weights = {key for key, value in ours.model.named_parameters() if value.requires_grad}
    assert {key for key, value in tensors.items() if value.dtype == torch.float16} == weights
    if half.is_dir():
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
        assert sizes[0] < 0.6 * sizes[1]
    loaded = load(half)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    assert_same(scores(loaded), scores(ours), tolerance=0.02)
    for prediction, other in zip(loaded.predict(PHOTO, PHRASES), ours.predict(PHOTO, PHRASES), strict=True):
        assert (prediction.mask == other.mask).mean() >= 0.99


def test_local_towers_are_saved(tmp_path: Path) -> None:
    """Towers from a local file are saved with the model."""
    ours = segmenter(model__vision__name='"random"')
    path = ours.save_pretrained(tmp_path / "model")
    assert (path / "towers.safetensors").is_file()
    assert_same(scores(load(path)), scores(ours))


def test_a_bundle_does_not_fit_other_towers(tmp_path: Path) -> None:
    """Damaged towers must be detected."""
    path = segmenter().save_pretrained(tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["vision.norm.bias"][0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(DcrisError, match="another vision encoder"):
        load(path)
    save_file({**tensors, "extra": torch.zeros(1)}, path, metadata)
    with pytest.raises(DcrisError, match=r"does not have|another vision encoder"):
        load(path)


def test_the_model_card(tmp_path: Path) -> None:
    """The card states model, scores and licence."""
    ours = segmenter()
    metrics = {"dataset": "scenes", "split": "test", "protocol": "cris", "miou": 71.234, "oiou": 70}
    card = (ours.save_pretrained(tmp_path / "a", metrics=metrics, licence="cc0-1.0") / "README.md").read_text()
    for words in (
        "license: cc0-1.0",
        "DCRIS (Xu",
        "`dcris_tiny`",
        "generated scenes",
        "| test | cris | 71.23 | 70.00 |",
    ):
        assert words in card
    bare = (ours.save_pretrained(tmp_path / "b") / "README.md").read_text()
    assert "license:" not in bare
    assert "Not measured" in bare
    assert "Not stated" in bare


# ---- what is given -------------------------------------------------------------------------------


def _pickle(folder: Path) -> str:
    (folder / "base_refcoco.pth").write_bytes(b"x")
    return str(folder / "base_refcoco.pth")


def _headless(folder: Path) -> str:
    return str(segmenter().save_pretrained(folder / "m") / "model.safetensors")


def _empty_bundle(folder: Path) -> str:
    (folder / "m.safetensors").write_bytes(b"")
    return str(folder / "m.safetensors")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (_pickle, "with `dcris convert` first"),
        (_headless, "is not a bundle: it has no configuration"),
        (_empty_bundle, "cannot be read"),
        (lambda folder: "nowhere", "there is no checkpoint nowhere; give the directory of a run.* detris-b-refcoco"),
        (
            lambda folder: "detris-b-refcok",
            "no published model 'detris-b-refcok'; the available ones are detris-b-refcoco, ",
        ),
        (lambda folder: "a/b/c", "there is no checkpoint a/b/c"),
        (lambda folder: "no/body", "no local file or folder no/body, and on the Hub: there is no repository no/body"),
        (lambda folder: "some/thing", "some/thing on the Hub is not a dcris model: .* no file config.json"),
    ],
)
def test_unknown_names_give_one_sentence(
    hub: Hub, source: Callable[[Path], str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing mistake gives one sentence."""
    hub.push("some/thing", {"weights.bin": b"1"})
    name = source(tmp_path)
    with pytest.raises(DcrisError, match=words) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert main(["evaluate", name, "--data", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistyped_path_is_not_searched_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, a typing mistake must be reported at once, not after half a minute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in (
        "mine/nope",
        "runs/nope",
        "any/model.safetensors",
        "a/b.pth",
        "./a/b",
        "x" * 5000,
        "a\0b",
    ):
        with pytest.raises(DcrisError, match="there is no checkpoint"):
            locate(name)
    assert not hub.requests
    with pytest.raises(DcrisError, match="there is no repository runs/nope"):
        locate("runs/nope@main")


@pytest.mark.parametrize(
    "mistyped", ["exprs/photos", "expers/photso", "expers/photos.safetensor", "phtos", "../here/phtos"]
)
def test_a_mistyped_model_is_guessed(hub: Hub, mistyped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People exchange and forget letters. The message names the model they meant, without asking
    the Hub."""
    (tmp_path / "here/expers/photos").mkdir(parents=True)
    (tmp_path / "here/phots").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in ("expers/photos", "phots"):
        (Path(place) / "model.safetensors").touch()
    (Path("expers") / "photos.safetensors").touch()
    (Path("expers") / "photo.txt").touch()
    expected = {
        "phtos": "phots",
        "../here/phtos": "../here/phots",
        "expers/photos.safetensor": "expers/photos.safetensors",
    }
    meant = expected.get(mistyped, "expers/photos")
    with pytest.raises(DcrisError, match=rf"there is no checkpoint {mistyped} \(did you mean {meant}\?\)"):
        locate(mistyped)
    assert not hub.requests
    with pytest.raises(DcrisError, match="there is no repository exprs/photos"):
        locate("exprs/photos@main")
    with pytest.raises(DcrisError, match="there is no repository other/thing"):
        locate("other/thing")


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    """An existing folder must not be replaced by mistake, nor a bundle, which may be the only copy
    of another model."""
    files = [tmp_path / "work", tmp_path / "best.safetensors"]
    for path in files:
        path.write_text("mine")
    for path in (tmp_path, *files):
        with pytest.raises(DcrisError, match="exists already"):
            segmenter().save_pretrained(path)
    with pytest.raises(DcrisError, match=r"ends in \.safetensors"):
        segmenter().save_pretrained(tmp_path / "new", bundle=True)
    assert all(path.read_text() == "mine" for path in files)


# ---- the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("towers", slow_except([None, True], None))
def test_upload_and_download(hub: Hub, towers: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others can load an uploaded model, also without a network."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    ours = segmenter()
    assert ours.push_to_hub(REPO, towers=towers) == f"{hub.url}/{REPO}"
    (files,) = hub.repositories[REPO].commits.values()
    assert set(files) >= {"README.md", "config.json", "model.safetensors"}
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    assert_same(scores(load(REPO)), scores(ours))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(scores(load(REPO)), scores(ours))
    with pytest.raises(DcrisError, match="HF_HUB_OFFLINE is set, so nothing is uploaded"):
        ours.push_to_hub(REPO)


@pytest.mark.parametrize("images", [frozenset(), frozenset({b"image1", b"image2"})])
def test_a_downloaded_model_knows_its_training_images(
    hub: Hub, images: frozenset[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an evaluation on some of them would look like one on new images."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    ours = segmenter()
    ours.images = images
    ours.push_to_hub(REPO)
    assert load(REPO).images == images


@pytest.mark.parametrize("several", [False, True])
def test_an_uploaded_checkpoint_keeps_its_calibration(hub: Hub, tmp_path: Path, several: bool) -> None:
    """`hf upload` of a directory that `dcris evaluate --calibrate-on` calibrated: whoever loaded it
    from the Hub got other probabilities of presence than its author, without a word."""
    path = segmenter(model__head__presence="true").save_pretrained(tmp_path / "model")
    store_calibration(path, 3.0, {})
    hub.push(REPO, {file.name: file.read_bytes() for file in path.iterdir()})
    source: Any = {"first": tmp_path / "model", "hub": REPO} if several else REPO
    found, expected = Segmenter.from_pretrained(source, device="cpu"), load(path)
    assert expected.predict(PHOTO, PHRASES)[0].present != 0.5
    for our, their in zip(
        found.predict(PHOTO, PHRASES, adapters=found.adapters[-1]), expected.predict(PHOTO, PHRASES), strict=True
    ):
        assert our.present == their.present


def test_a_cache_that_another_program_filled_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf download` on a machine with a network, and no network where the model is used."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    ours = segmenter()
    ours.push_to_hub(REPO)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(REPO, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(scores(load(REPO)), scores(ours))


@pytest.mark.parametrize("name", ["towers.safetensors", "training_images.bin"])
def test_a_full_disk_is_no_missing_file(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the repository has is not left out without a word: the reason would be unknown."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    ours = segmenter()
    ours.images = frozenset({b"image1"})
    ours.push_to_hub(REPO, towers=True)

    def download(repo: str, file: str, **options: Any) -> str:
        if file == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return hf_hub_download(repo, file, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DcrisError, match=r"the disk of the cache .* is full"):
        load(REPO)


def test_a_revision_can_be_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned revision still works after the repository has moved."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    one, two = segmenter(0), segmenter(1)
    one.push_to_hub(REPO)
    commit = hub.repositories[REPO].refs["main"]
    two.push_to_hub(REPO)
    assert_same(scores(load(REPO)), scores(two))
    assert_same(scores(load(f"{REPO}@{commit}")), scores(one))


def test_a_refused_upload_gives_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing token gives one sentence."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.read_only = True
    with pytest.raises(DcrisError, match=f"uploading to {REPO} on {hub.url} failed .*hf auth login") as caught:
        segmenter().push_to_hub(REPO)
    assert "\n" not in str(caught.value)


# ---- published models ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of converted models; models of the size of the tiny towers are accepted as
    DETRIS-B."""
    monkeypatch.setitem(RECIPES, "own", Recipe(tiny_run(), "Of the size of the tiny towers."))
    monkeypatch.setattr(dcris.checkpoints.convert_detris, "_RECIPES", {(128, 12): ("own",)})
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path / "converted"))
    return tmp_path / "converted"


def published_file(ours: Segmenter) -> bytes:
    state = {published_name(name): value for name, value in ours.model.state_dict().items()}
    state["neck.f5_proj.0.weight"] = state["neck.f5_proj.0.weight"].transpose(0, 1).contiguous()
    return saved({"state_dict": {f"module.{name}": value for name, value in state.items()}})


def test_a_published_model_by_its_short_name(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A published model loads by its short name, and is downloaded and converted once."""
    ours, name = segmenter(), "detris-b-refcocog-umd"
    content = published_file(ours)
    commit = hub.push(REPOSITORY, {"base/base_refcocog_u.pth": content})
    known = dataclasses.replace(PUBLISHED[name], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PUBLISHED, name, known)
    loaded = load(name)
    said = capsys.readouterr().err
    assert f"{name}: downloading base/base_refcocog_u.pth of {REPOSITORY}" in said
    assert f"converting it to {cache / name}" in said
    assert loaded.config.data.word_length == 22
    assert loaded.origin == {
        "name": name,
        "source": f"{REPOSITORY}/base/base_refcocog_u.pth",
        "revision": commit,
        "sha256": known.sha256,
    }
    hub.stop()
    assert_same(scores(load(name)), scores(loaded))
    assert capsys.readouterr().err == ""
    card = (loaded.save_pretrained(tmp_path / "given", half=True) / "README.md").read_text()
    for words in ("license: mit", "in their own README (not measured here)", "| test | 68.1 | 66.4 |", commit, "MIT"):
        assert words in card
    assert load(tmp_path / "given").origin == loaded.origin


def test_a_published_file_with_another_checksum(hub: Hub, cache: Path) -> None:
    """A file with another checksum is refused."""
    hub.push(REPOSITORY, {"base/base_refcoco.pth": b"other"})
    with pytest.raises(DcrisError, match=r"base_refcoco\.pth .*not the file that was published.*f52c5b00"):
        load("detris-b-refcoco")
    assert not (cache / "detris-b-refcoco").exists()


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_files_with_unknown_names_are_found(hub: Hub, cache: Path, few: bool) -> None:
    """The large and mixed models are found although their file names are not known."""
    content = published_file(segmenter())
    names = [f"large/large_{data}.pth" for data in ("refcoco", "refcoco+", "refcocog_u", "refcocog_g")]
    names.append("mix/large_mix_refcoco.pth")
    hub.push(REPOSITORY, dict.fromkeys(["README.md", "base/base_refcoco.pth", *names], content))
    shorts = ("refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "mixed")
    asked = [
        (short, name) for short, name in zip(shorts, names, strict=True) if not few or short in ("refcoco", "mixed")
    ]
    for short, name in asked:
        place = locate(f"detris-l-{short}", log=lambda line: None)
        assert name in {found for _, found, _ in hub.requests}
        assert place == cache / f"detris-l-{short}"
    record = json.loads((cache / "sha256.json").read_text())
    assert set(record) == {name for _, name in asked}

    # What was seen first is what is expected from then on.
    (cache / "sha256.json").write_text(json.dumps({names[0]: "0" * 64}))
    (cache / "detris-l-refcoco").rename(cache / "away")
    with pytest.raises(DcrisError, match=r"large_refcoco\.pth .*not the file .*0000"):
        load("detris-l-refcoco")


def test_converting_to_half_precision(cache: Path, tmp_path: Path) -> None:
    """--half must save space and keep the results."""
    ours = segmenter()
    (tmp_path / "base_refcoco.pth").write_bytes(published_file(ours))
    for out, flags in (("whole", []), ("half", ["--half"])):
        assert main(["convert", str(tmp_path / "base_refcoco.pth"), "--out", str(tmp_path / out), *flags]) == 0
    whole, half = (tmp_path / name / "base_refcoco" for name in ("whole", "half"))
    assert (half / "model.safetensors").stat().st_size < 0.6 * (whole / "model.safetensors").stat().st_size
    assert (half / "towers.safetensors").read_bytes() == (whole / "towers.safetensors").read_bytes()
    assert_same(scores(load(half)), scores(load(whole)), tolerance=0.02)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["base/base_refcoco.pth"], "no file matches detris-l-refcoco"),
        (["large/a_refcoco.pth", "large/b_refcoco.pth"], "several files match .*: large/a_refcoco.pth, large/b_ref"),
    ],
)
def test_a_repository_that_has_changed(hub: Hub, cache: Path, files: list[str], words: str) -> None:
    """An ambiguous or missing file is reported."""
    hub.push(REPOSITORY, dict.fromkeys(files, b"x"))
    with pytest.raises(DcrisError, match=f"{words}.*dcris convert"):
        load("detris-l-refcoco")


# ---- several adapters, one tower -----------------------------------------------------------------


def pointers(model: ReferringSegmenter) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in model.state_dict().items() if value.numel() > 1}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models on the same towers, of different sizes and file formats."""
    folder = tmp_path_factory.mktemp("several")
    return {
        "scenes": segmenter(0).save_pretrained(folder / "a", towers=True),
        "refcoco+": segmenter(1, "refcoco+", data__word_length="9").save_pretrained(folder / "b", half=True),
        "refcocog": segmenter(2, "refcocog", model__head__width="32").save_pretrained(folder / "c.safetensors"),
    }


def test_adapter_sets_share_their_towers(several: dict[str, Path]) -> None:
    """Three adapter sets share the towers in memory, and each gives its own results."""
    alone = {name: load(path) for name, path in several.items()}
    listed = Segmenter.from_pretrained(list(several.values()), device="cpu")
    mine = {f"my {name}": path for name, path in several.items()}
    named = Segmenter.from_pretrained(mine, device="cpu")
    assert listed.adapters == tuple(several)
    assert named.adapters == tuple(mine)
    first = pointers(listed.model)
    for name, (model, *_) in listed._sets.items():
        own = trained_state(model).keys()
        for tensor, place in pointers(model).items():
            if not tensor.startswith("head.") and "_slot." not in tensor:
                assert place == first[tensor], tensor
            elif name != "scenes" and tensor in own:
                assert place != first.get(tensor), tensor
        assert not any(value.is_meta for value in model.state_dict().values())
    for name, single in alone.items():
        assert_same(scores(listed, name), scores(single), tolerance=1e-6)
        assert_same(scores(named, f"my {name}"), scores(single), tolerance=1e-6)
    assert_same(scores(listed), scores(alone["scenes"]), tolerance=1e-6)


def test_threads_choose_adapters(several: dict[str, Path]) -> None:
    """Threads use their own adapter sets, also while another set is being added."""
    alone = {name: scores(load(path)) for name, path in several.items()}
    shared = Segmenter.from_pretrained([several["scenes"], several["refcoco+"]], device="cpu")
    names = ["scenes", "refcoco+"] * 6
    with ThreadPoolExecutor(6) as pool:
        predictions = [pool.submit(scores, shared, name) for name in names]
        pool.submit(shared.add_adapters, "refcocog", several["refcocog"]).result()
        names.append("refcocog")
        predictions.append(pool.submit(scores, shared, "refcocog"))
        for name, prediction in zip(names, predictions, strict=True):
            # Folded weights lie elsewhere in memory, and products may round otherwise for that;
            # another set is far off.
            assert_same(prediction.result(), alone[name], tolerance=1e-6)


def test_adapters_of_other_towers(several: dict[str, Path], tmp_path: Path) -> None:
    """Adapters must not run on other towers or under a name that is in use."""
    shared = Segmenter.from_pretrained([several["scenes"]], device="cpu")
    other = segmenter(model__text__name='"random"').save_pretrained(tmp_path / "other")
    with pytest.raises(DcrisError, match="trained on another text encoder than tiny-text"):
        shared.add_adapters("other", other)
    # With "was trained on another vision encoder", nobody would try the other order.
    tuned = segmenter(model__method='{"name": "bitfit"}').save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        DcrisError, match=f"weights of its encoders that the first .* has trained; load {several['scenes']} first"
    ):
        Segmenter.from_pretrained({"tuned": tuned, "scenes": several["scenes"]}, device="cpu")
    assert Segmenter.from_pretrained({"scenes": several["scenes"], "tuned": tuned}, device="cpu").adapters[1] == "tuned"
    with pytest.raises(DcrisError, match="'scenes' is already used by other adapters"):
        shared.add_adapters("scenes", several["refcoco+"])
    with pytest.raises(DcrisError, match="no adapters 'refcocog'; the available ones are scenes"):
        shared.predict(PHOTO, PHRASES, adapters="refcocog")
    with pytest.raises(DcrisError, match="two of the models were trained on scenes; give a dict"):
        Segmenter.from_pretrained([several["scenes"], several["scenes"]], device="cpu")
    with pytest.raises(DcrisError, match="no model was given"):
        Segmenter.from_pretrained([], device="cpu")
    assert shared.adapters == load(several["scenes"]).adapters == ("scenes",)
