"""A new method, vision tower and text tower: each one file and one registry entry, as
docs/extending_models.md shows.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dcris.checkpoints.backbones import fill_tower, tower_state
from dcris.checkpoints.checkpoint import identify_towers, load_adapters, load_checkpoint, save_model
from dcris.config import METHODS, TEXT_FAMILIES, VISION_FAMILIES, RunConfig, replace
from dcris.data.readers.load import load_references
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.experiments.bench import in_own_process, peak_of_training
from dcris.models.adapters.attach import adapters, trained_state
from dcris.models.encoders.text import TextFeatures
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import TINY_TEXT, get_recipe, with_method
from dcris.training.losses import LOSSES
from dcris.training.trainer import Trainer, build_model
from models import randomise
from published import saved
from runs import CPU, last_tensors, quick_config, run_training

PAGE = Path(__file__).parents[1] / "docs/extending_models.md"
EVERY = range(12)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """The page's files, imported, by name; the registries are restored afterwards."""
    registries = METHODS, VISION_FAMILIES, TEXT_FAMILIES
    before = [dict(registry) for registry in registries]
    folder = tmp_path_factory.mktemp("page")
    files = re.findall(r'```python\n(""".*?)```', PAGE.read_text(encoding="utf-8"), re.S)
    modules = {}
    for name, code in zip(("gain", "plain_vit", "plain_text"), files, strict=True):
        path = folder / f"{name}.py"
        path.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in modules:
        del sys.modules[name]


def quick(config: RunConfig, steps: int = 2) -> RunConfig:
    short = quick_config(steps)
    return replace(short, {"recipe": config.recipe, "model": config.model})


@pytest.fixture(scope="module")
def gain_run(page: dict[str, ModuleType], scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gain") / "run"
    config = with_method(get_recipe("dcris_tiny"), "gain_tiny", page["gain"].GainConfig())
    run_training(quick(config, 3), scenes_root, out)
    return out


def gain_config(page: dict[str, ModuleType]) -> RunConfig:
    return with_method(get_recipe("dcris_tiny"), "gain_tiny", page["gain"].GainConfig())


# ---- a method ----


def test_a_method_trains_its_slots_and_the_weights_it_names(page: dict[str, ModuleType], gain_run: Path) -> None:
    """A new method needs no other change, and its checkpoint holds exactly what it trains."""
    names = {name for name in last_tensors(gain_run) if not name.startswith("head.")}
    assert names == {f"text.blocks.{i}.norm1.bias" for i in EVERY} | {f"vision.blocks.{i}.mlp_slot.gain" for i in EVERY}
    fresh = trained_state(build_model(gain_config(page)))
    assert all(not torch.equal(last_tensors(gain_run)[name], fresh[name]) for name in names)


def test_a_method_can_use_a_tower_that_others_use(gain_run: Path, scenes_root: Path, tmp_path: Path) -> None:
    """It has its own copy of the weights that it trained and shares the others; another model
    cannot share the former.
    """
    other_run = tmp_path / "run"
    run_training(quick_config(1, recipe="dcris_tiny"), scenes_root, other_run)
    base, _ = load_checkpoint(other_run)
    own, _ = load_checkpoint(gain_run)
    shared, _ = load_adapters(gain_run, base, identify_towers(base))
    assert shared.vision.blocks[5].mlp.fc1.weight.data_ptr() == base.vision.blocks[5].mlp.fc1.weight.data_ptr()
    for name, value in own.state_dict().items():
        assert torch.equal(value, shared.state_dict()[name]), name
    with pytest.raises(DcrisError):
        load_adapters(other_run, own, identify_towers(own))


@torch.no_grad()
def test_a_method_can_be_folded(gain_run: Path) -> None:
    """`foldable` and `fold` suffice."""
    model, _ = load_checkpoint(gain_run)
    merged = model.merged()
    batch = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)), torch.tensor([[127, 5, 128, 0]])
    assert not adapters(merged.vision)
    expected = model(*batch)[0]
    assert (merged(*batch)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_a_program_of_ones_own_is_the_command_line(
    page: dict[str, ModuleType], gain_run: Path, scenes_root: Path
) -> None:
    """The program of the page evaluates a model whose method `dcris` does not know."""
    (code,) = re.findall(r"```python\n(import sys.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    program = Path(str(page["gain"].__file__)).parent / "my_dcris.py"
    program.write_text(code, encoding="utf-8")
    rest = ["evaluate", str(gain_run), "--data", str(scenes_root), "--split", "test"]
    done = subprocess.run([sys.executable, str(program), *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "miou" in json.loads(done.stdout)
    done = subprocess.run([sys.executable, "-m", "dcris", *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown method 'gain'" in done.stderr


def test_unknown_methods_and_settings_are_named(page: dict[str, ModuleType]) -> None:
    """An untrusted configuration cannot import anything, and a typing error lists the methods."""
    base = get_recipe("dcris_tiny")
    for name in ("gian", "os", "../os", "base.attach", "__init__", ""):
        with pytest.raises(DcrisError, match=rf"unknown method '{name}'; known: .*gain.*lora"):
            replace(base, {"model.method": {"name": name}})
    with pytest.raises(DcrisError, match=r"model\.method\.width"):
        replace(base, {"model.method": {"name": "gain", "width": 3}})
    with pytest.raises(DcrisError, match='give the method\'s "name"'):
        replace(base, {"model.method": {"start": 2.0}})


def test_a_methods_settings_survive_the_configuration_file(page: dict[str, ModuleType]) -> None:
    """config.json holds all settings, and each can be replaced by its key."""
    config = replace(gain_config(page), {"model.method.start": 0.5})
    assert isinstance(config.model.method, page["gain"].GainConfig)
    assert config.model.method.start == 0.5
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# ---- towers ----

PLAIN_VIT = {
    "name": "random",
    "family": "plain-vit",
    "width": 48,
    "depth": 12,
    "heads": 4,
    "patch": 8,
    "registers": 0,
    "grid": 6,
    "position_rule": "plain",
}
PLAIN_TEXT = {
    "name": "random",
    "family": "plain-text",
    "tokenizer": "tiny",
    "width": 32,
    "depth": 12,
    "heads": 4,
    "vocabulary": TINY_TEXT.vocabulary,
    "length": 20,
    "sentence_width": 24,
}


@pytest.mark.parametrize("recipe", ["dcris_tiny", "etris_tiny", "barleria_tiny"])
def test_towers_train_save_and_load(
    page: dict[str, ModuleType], recipe: str, scenes_root: Path, tmp_path: Path
) -> None:
    """Neither the adapters, nor a bridge, nor the head, nor checkpoints depend on a class token or
    on CLIP's text.
    """
    config = replace(get_recipe(recipe), {"model.vision": PLAIN_VIT, "model.text": PLAIN_TEXT})
    config = quick(config)
    trained = build_model(config)
    table, tokenizer = load_references(scenes_root, config.data.dataset), tokenizer_of(config.model.text)
    Trainer(trained, config, table, tokenizer, tmp_path / "run", device=CPU, log=len).run()
    save_model(tmp_path / "model", trained, identify_towers(trained), config, with_towers=True)
    model, loaded = load_checkpoint(tmp_path / "model")
    assert loaded.model == config.model
    assert isinstance(model.vision, page["plain_vit"].PlainVit)
    assert isinstance(model.text, page["plain_text"].PlainText)
    images = torch.randn(2, 3, 56, 64, generator=torch.Generator().manual_seed(0))
    state = model.encode_images(images)
    assert (state.grid, state.num_prefix_tokens) == ((7, 8), 0)
    tokens = torch.tensor([[127, 5, 6, 128, 0], [127, 7, 128, 0, 0]])
    logits = model(images, tokens).logits
    assert logits.shape == (2, 1, 28, 32)
    assert torch.equal(logits, trained.eval()(images, tokens)[0])


@torch.no_grad()
def test_a_vision_tower_is_a_plain_transformer(page: dict[str, ModuleType]) -> None:
    """The patches are in the order of the image and have their own positions."""
    config = replace(get_recipe("fixed_tiny"), {"model.vision": PLAIN_VIT}).model
    tower = ReferringSegmenter(config).vision.eval()
    randomise(tower)
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    x = tower.patch_embed(images).flatten(2).transpose(1, 2) + tower.positions
    for block in tower.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    assert torch.allclose(tower(images), tower.norm(x), atol=1e-5)


def test_a_vision_tower_is_filled_from_a_published_file(page: dict[str, ModuleType], tmp_path: Path) -> None:
    """The key mapping of the entry is used, and unused tensors of the file may only be those that
    it names.
    """
    config = replace(get_recipe("fixed_tiny"), {"model.vision": PLAIN_VIT}).model
    source, target = (ReferringSegmenter(config).vision for _ in range(2))
    randomise(source)
    state: dict[str, Tensor] = {}
    for name, value in tower_state(source).items():
        (part,) = page["plain_vit"].TIMM.parts(name)
        state[part] = value
    file = tmp_path / "vit.pth"
    file.write_bytes(saved({**state, "head.weight": torch.zeros(3, 3)}))
    fill_tower(target, str(file))
    for name, value in tower_state(source).items():
        assert torch.equal(tower_state(target)[name], value), name
    file.write_bytes(saved({**state, "cls_token": torch.zeros(3)}))
    with pytest.raises(DcrisError, match="cls_token"):
        fill_tower(target, str(file))
    with pytest.raises(DcrisError, match="my-vit"):
        fill_tower(target, "your-vit")


def test_towers_check_their_configuration(page: dict[str, ModuleType]) -> None:
    """An unsuitable setting is an error of the configuration, not of a shape inside the network."""
    with pytest.raises(DcrisError, match=r"needs vision\.registers 0"):
        replace(get_recipe("dcris_tiny"), {"model.vision": {**PLAIN_VIT, "registers": 4}})


@torch.no_grad()
def test_a_text_tower_reads_both_directions(page: dict[str, ModuleType]) -> None:
    """Unlike in CLIP, the first word's feature depends on the last."""
    config = replace(get_recipe("fixed_tiny"), {"model.text": PLAIN_TEXT}).model
    tower = ReferringSegmenter(config).text.eval()
    one, other = (tower(torch.tensor([[127, 5, word, 128]])) for word in (6, 7))
    assert isinstance(one, TextFeatures)
    assert one.sentence.shape == (1, 24)
    assert not torch.allclose(one.tokens[:, 1], other.tokens[:, 1])


# ---- all of them in a new process ----


def test_their_memory_is_measured(page: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """The new process of `dcris bench` and `dcris evaluate --all` has the entries that the program
    added, wherever it added them."""
    monkeypatch.syspath_prepend(Path(str(page["gain"].__file__)).parent)
    monkeypatch.setitem(LOSSES, "absolute", partial(torch.nn.functional.l1_loss, reduction="sum"))
    monkeypatch.setitem(LOSSES, "square", torch.nn.MSELoss())
    losses = {"absolute": 1.0, "square": 1.0}
    towers = {"model.vision": PLAIN_VIT, "model.text": PLAIN_TEXT, "train.losses": losses}
    config = replace(gain_config(page), towers)
    assert in_own_process(peak_of_training, config, 2, "cpu", "float32") > 0.1
    words = r"cannot import '{}': define its class or function at the top level of a file that your program imports"
    monkeypatch.setitem(LOSSES, "absolute", lambda logits, masks: logits.sum())
    with pytest.raises(DcrisError, match=words.format("absolute")):
        in_own_process(peak_of_training, config, 2, "cpu", "float32")
    monkeypatch.setattr(page["gain"].GainConfig, "__module__", "__main__")
    with pytest.raises(DcrisError, match=words.format("gain")):
        in_own_process(peak_of_training, config, 2, "cpu", "float32")
