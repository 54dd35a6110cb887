"""Every method of tuning: what it promises, and that one more takes one file and one recipe."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dcris.adapters.base import attach, trained_state
from dcris.config import MethodConfig, RunConfig, override
from dcris.encoders.blocks import Slot, SlotContext
from dcris.engine.checkpoint import identify_towers, load_adapters, load_checkpoint, save_model
from dcris.errors import DcrisError
from dcris.model.dcris import DCRIS
from dcris.recipes import dcris_tiny
from dcris.segmenter import Segmenter
from runs import last_tensors, quick_config, run_training


class Gain(Slot):
    """A factor per channel on what the branch made: about the least that a method can add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, output: Tensor, normed: Tensor, residual: Tensor, context: SlotContext) -> Tensor:
        return output * self.gain


class ToyConfig(MethodConfig):
    """The whole of a new method: settings that put its slots in, and say which of the towers' own weights train."""

    name: Literal["toy"] = "toy"
    layers: tuple[int, ...] = (0, 2)

    def attach(self, vision: nn.Module, text: nn.Module) -> None:
        attach(vision.blocks, self.layers, "mlp_slot", lambda: Gain(vision.config.width))

    def trains(self, name: str) -> bool:
        return name.startswith("text.") and name.endswith("norm1.bias")


def toy_tiny() -> RunConfig:
    """And its recipe."""
    config = dcris_tiny()
    changes = {"visual_adapter": None, "text_adapter": None, "method": ToyConfig()}
    return config.model_copy(update={"recipe": "toy_tiny", "model": config.model.model_copy(update=changes)})


def toy_run(steps: int) -> RunConfig:
    quick = quick_config(steps).train
    return override(toy_tiny(), [("data.image_size", "56"), ("train.max_steps", str(steps))]).model_copy(
        update={"train": quick}
    )


@pytest.fixture(scope="module")
def toy(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "run"
    run_training(toy_run(4), scenes_root, out)
    return out


def test_exactly_its_weights_train(toy: Path) -> None:
    """Slots, and the towers' weights that it names; the checkpoint holds those, and they moved."""
    names = {name for name in last_tensors(toy) if not name.startswith("head.")}
    biases = {f"text.blocks.{layer}.norm1.bias" for layer in range(12)}
    assert names == biases | {f"vision.blocks.{layer}.mlp_slot.gain" for layer in (0, 2)}
    fresh = trained_state(DCRIS(toy_tiny().model))
    assert all(not torch.equal(last_tensors(toy)[name], fresh[name]) for name in names)


def test_what_was_trained_in_a_tower_comes_back(toy: Path, tmp_path: Path) -> None:
    """From the run, from a directory with towers, from a bundle: the same answers, and the towers are still recognised."""
    model, config = load_checkpoint(toy)
    segmenter = Segmenter(model, config)
    picture = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    (expected,) = segmenter.predict(picture, "left circle", scores=True)
    for path in (tmp_path / "folder", tmp_path / "bundle.safetensors"):
        segmenter.save_pretrained(path, towers=True)
        (answer,) = Segmenter.from_pretrained(path).predict(picture, "left circle", scores=True)
        assert (answer.probabilities == expected.probabilities).all()
    fresh = DCRIS(config.model)
    with pytest.raises(DcrisError, match="another"):
        save_model(tmp_path / "wrong", fresh, identify_towers(fresh), config, with_towers=False)
        load_checkpoint(tmp_path / "wrong")


def test_it_can_stand_on_a_tower_that_others_use(toy: Path, trained_run: Path) -> None:
    """It brings the weights that it trained, and shares the rest; what it trained cannot be shared by others."""
    base, _ = load_checkpoint(trained_run)
    towers = identify_towers(base)
    own, _ = load_checkpoint(toy)
    shared, _ = load_adapters(toy, base, towers)
    assert shared.vision.blocks[5].mlp.fc1.weight.data_ptr() == base.vision.blocks[5].mlp.fc1.weight.data_ptr()
    for name, value in own.state_dict().items():
        assert torch.equal(value, shared.state_dict()[name]), name
    with pytest.raises(DcrisError):
        load_adapters(trained_run, own, identify_towers(own))


def test_unknown_methods_and_settings_are_named() -> None:
    """A stranger's configuration imports nothing but methods, and a slip of the pen says which are there."""
    for name in ("tyo", "os", "../os", "base.attach", "__init__", ""):
        with pytest.raises(DcrisError, match=f"there is no method '{name}'; there are .*toy"):
            override(dcris_tiny(), [("model.method", f'{{"name": "{name}"}}')])
    with pytest.raises(DcrisError, match=r"model\.method\.width"):
        override(dcris_tiny(), [("model.method", '{"name": "toy", "width": 3}')])
    with pytest.raises(DcrisError, match="a method has a name"):
        override(dcris_tiny(), [("model.method", '{"layers": [1]}')])


def test_its_settings_survive_the_configuration_file() -> None:
    """A run's config.json says all of it, and a setting can be changed on the command line."""
    config = override(toy_tiny(), [("model.method.layers", "[1]")])
    assert isinstance(config.model.method, ToyConfig)
    assert config.model.method.layers == (1,)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
