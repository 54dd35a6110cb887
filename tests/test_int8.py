"""Prediction in int8: the products, the choice of forms, and the whole way through the commands."""

import json
import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from dcris.cli import main
from dcris.config import replace
from dcris.data.dataset import all_queries
from dcris.data.photographs import example_photographs
from dcris.data.readers.load import load_references
from dcris.data.scenes import make_scene, scene_rng, write_scenes
from dcris.errors import DcrisError, DcrisWarning
from dcris.evaluation import preparation
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.inference.segmenter import Segmenter
from dcris.models import int8
from dcris.models.int8 import Int8Linear, choose_forms
from dcris.recipes import get_recipe
from dcris.utils import device as devices
from dcris.utils.device import choose_precision
from marks import slow_except

CPU = torch.device("cpu")
HAS_INT8 = torch.backends.mkldnn.is_available() and hasattr(torch, "quantize_per_tensor")
pytestmark = [
    pytest.mark.skipif(not HAS_INT8, reason="this build of PyTorch does not multiply int8 on this CPU"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias).requires_grad_(False)


def reference(layer: nn.Linear, x: Tensor, factors: Tensor | None = None) -> Tensor:
    """The int8 product of one image's tokens [P, K], in float64 and step by step."""
    x, weight = x.double(), layer.weight.double()
    if factors is not None:
        x, weight = x / factors, weight * factors
    step = weight.abs().amax(1, keepdim=True) / 127
    weight = (weight / step).round() * step
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / int8._LEVELS
    zero = round(-low / step)
    x = ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
    return x @ weight.T + (0 if layer.bias is None else layer.bias.double())


@given(
    tokens=st.integers(5, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(5, 50),
    shift=st.floats(-5, 5),
    smooth=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_the_definition(
    tokens: int, inputs: int, outputs: int, shift: float, smooth: bool, bias: bool, seed: int
) -> None:
    """Scales, zeros and factors are where they belong, for inputs of any sign and size."""
    layer = linear(inputs, outputs, seed, bias)
    x = 3 * torch.randn(2, tokens, inputs) + shift
    factors = torch.rand(inputs) + 0.5 if smooth else None
    found = Int8Linear(layer.weight, layer.bias, factors)(x)
    for image, output in zip(x, found, strict=True):
        expected = reference(layer, image, factors)
        # A value in the middle between two levels may be rounded to the other one, which changes a
        # token or an output by a level.
        errors = (output - expected).abs()
        assert errors.median() <= 1e-5 * float(expected.abs().max())
        level = float((image if factors is None else image / factors).abs().max()) / int8._LEVELS * 2
        assert errors.max() <= 3 * level * float(layer.weight.abs().max())


def test_an_image_does_not_depend_on_its_batch() -> None:
    """A scale over the whole batch would change an image's mask with the images beside it."""
    layer = Int8Linear(linear(48, 64).weight, None)
    x = torch.randn(3, 20, 48) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    together = layer(x)
    for image, output in zip(x, together, strict=True):
        assert torch.equal(layer(image[None])[0], output)


def test_numbers_at_the_edge() -> None:
    """Zeros give the bias, and a model that diverged gives no numbers, as in float32."""
    plain = linear(16, 8)
    layer = Int8Linear(plain.weight, plain.bias)
    assert torch.allclose(layer(torch.zeros(1, 4, 16)), plain.bias.expand(1, 4, 8))
    assert layer(torch.full((1, 4, 16), float("inf"))).isnan().all()
    dead = Int8Linear(torch.zeros(8, 16), None)
    assert torch.equal(dead(torch.randn(1, 4, 16)), torch.zeros(1, 4, 8))


def chosen(layer: nn.Linear, x: Tensor) -> nn.Module:
    """Return the form of a layer for the example x."""
    model = nn.Sequential(layer)
    choose_forms(model, ["0"], partial(model, x))
    return model[0]


def test_a_form_is_chosen_by_its_error() -> None:
    """Even inputs take plain int8, a few large channels the smoothed form, and what neither can
    represent stays as it is."""
    # Uniform: without VNNI, int8 has half the levels, too few for a normal distribution's tails.
    layer, x = linear(768, 512), torch.rand(1, 300, 768) * 2 - 1
    plain = chosen(layer, x)
    assert isinstance(plain, Int8Linear) and plain.factors is None
    large = torch.ones(768)
    large[[7, 200]] = 50
    with torch.no_grad():
        layer.weight /= large  # as training balances them
    smooth = chosen(layer, x * large)
    assert isinstance(smooth, Int8Linear) and smooth.factors is not None
    assert (smooth(x * large) - layer(x * large)).norm() < int8.LIMIT * layer(x * large).norm()
    x[:, ::50] *= 1e4  # a few tokens, in whose scale the others vanish
    assert chosen(layer, x) is layer


def test_small_products_stay() -> None:
    """Quantising their input takes longer than int8 saves."""
    for tokens, outputs in ((20, 512), (300, 64)):
        layer = linear(64, outputs)
        assert chosen(layer, torch.randn(1, tokens, 64)) is layer
    unreached = nn.Sequential(linear(64, 512))
    choose_forms(unreached, ["0"], lambda: None)
    assert type(unreached[0]) is nn.Linear


# The network


def with_large_channels(segmenter: Segmenter) -> Segmenter:
    """Return the same function with channels up to 50 times as large as the others: behind norms,
    and in values of attention.
    """
    factors = torch.tensor([50.0, 30.0, 20.0])
    with torch.no_grad():
        for block in segmenter.model.vision.blocks:
            attention, places = block.attention, [5, 60, 100]
            width = attention.proj.in_features
            for norm in (block.norm1, block.norm2):
                norm.weight[places] *= factors
                norm.bias[places] *= factors
            values = attention.qkv.weight[2 * width :], attention.qkv.bias[2 * width :]
            readers = [attention.qkv, block.mlp.fc1]
            if hasattr(block.mlp_slot, "down"):
                readers.append(block.mlp_slot.down)
            for reader in readers:
                reader.weight[:, places] /= factors
            values[0][places] *= factors[:, None]
            values[1][places] *= factors
            attention.proj.weight[:, places] /= factors
    return segmenter


def iou(one: Tensor | np.ndarray, other: Tensor | np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


@pytest.mark.parametrize("large", slow_except([False, True], True), ids=["as shipped", "large channels"])
def test_masks_are_those_of_float32(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 does not change what a trained model segments, also with outlier channels as in
    DINOv2."""
    monkeypatch.setattr(int8, "_LEAST_OUTPUTS", 1)
    monkeypatch.setattr(int8, "_LEAST_TOKENS", 1)
    exact = Segmenter.from_pretrained("tiny", device="cpu", precision="float32")
    if large:
        exact = with_large_channels(exact)
    quick = Segmenter(exact.model, exact.config, device="cpu", precision="int8")
    (prepared,) = quick._sets.values()
    forms = [module for module in prepared.ready.vision.modules() if isinstance(module, Int8Linear)]
    assert len(forms) > 40
    if large:
        assert any(form.factors is not None for form in forms)
    overlaps = []
    for number in range(6):
        scene = make_scene(scene_rng(7, "test", number))
        phrases = [phrase.text for each in scene.phrases.values() for phrase in each][:4]
        pairs = zip(exact.predict(scene.image, phrases), quick.predict(scene.image, phrases), strict=True)
        overlaps += [iou(one.mask, other.mask) for one, other in pairs if one.mask.any()]
    assert len(overlaps) > 10
    assert np.mean(overlaps) > 0.97


def test_it_moves_and_is_copied(tmp_path: Path) -> None:
    """A pickle predicts in int8 too, and a device without int8 is refused before anything moves."""
    segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="int8")
    same = pickle.loads(pickle.dumps(segmenter))
    photograph = example_photographs()[0][0]
    one, other = (each.predict(photograph, "square", scores=True)[0].probabilities for each in (segmenter, same))
    assert same.dtype == torch.int8 and np.array_equal(one, other)
    with pytest.raises(DcrisError, match="int8 is for CPUs, not for mps"):
        choose_precision("int8", torch.device("mps"))


def test_forms_are_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start does not try the layers again, unless weights differ or the file is damaged;
    the masks are the same."""
    monkeypatch.setenv("DCRIS_CACHE", str(tmp_path))
    tried: list[object] = []
    run = preparation.run_example
    monkeypatch.setattr(preparation, "run_example", lambda model, config: (tried.append(0), run(model, config)))

    def start() -> np.ndarray:
        segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="int8")
        (prediction,) = segmenter.predict(example_photographs()[0][0], "square", scores=True)
        assert prediction.probabilities is not None
        return prediction.probabilities

    first = start()
    assert np.array_equal(start(), first) and len(tried) == 1
    segmenter = Segmenter.from_pretrained("tiny", device="cpu")
    queries = all_queries(
        load_references(write_scenes(tmp_path / "scenes", train=0, val=0, test=1), "scenes").references
    )
    assert [*predict_queries(segmenter.model, queries, segmenter.config, Cris(), device="cpu", dtype=torch.int8)]
    assert len(tried) == 1  # nor does an evaluation
    (file,) = (tmp_path / "int8").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert np.array_equal(start(), first) and len(tried) == 2
    for damaged in ({"no.such": torch.ones(3)}, {"vision.blocks.0.mlp.fc1": torch.ones(3)}, {"vision": torch.empty(0)}):
        file.write_bytes(save(damaged))
        assert np.array_equal(start(), first)
    del tried[2:]
    file.chmod(0o666)  # another user can have written it
    assert np.array_equal(start(), first) and len(tried) == 3
    segmenter = Segmenter.from_pretrained("tiny", device="cpu", precision="float32")
    with torch.no_grad():
        segmenter.model.head.neck.text_proj.weight.mul_(2)
    Segmenter(segmenter.model, segmenter.config, device="cpu", precision="int8")
    assert len(tried) == 4
    monkeypatch.setenv("DCRIS_CACHE", "/proc/none")
    assert np.array_equal(start(), first)


def test_commands_take_it(scenes_root: Path, trained_run: Path, tmp_path: Path) -> None:
    """`dcris predict`, `evaluate` and `bench` work in int8 and record it."""
    photograph = example_photographs()[0][0]
    out = tmp_path / "masks"
    words = ["predict", trained_run, photograph, "-e", "square", "--out", out, "--precision", "int8"]
    assert main([str(word) for word in words]) == 0
    result = tmp_path / "result.json"
    words = ["evaluate", trained_run, "--data", scenes_root, "--split", "test", "--precision", "int8", "--out", result]
    assert main([str(word) for word in words]) == 0
    assert "int8" in json.dumps(json.loads(result.read_text()))


def test_it_says_that_nothing_is_gained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A model without a layer that is large enough works as before; a line says so."""
    photograph = str(example_photographs()[0][0])
    assert main(["predict", "tiny", photograph, "-e", "square", "--out", str(tmp_path), "--precision", "int8"]) == 0
    errors = capsys.readouterr().err
    assert "no layer of this model gains by int8" in errors and "Warning" not in errors


def test_training_does_not_take_it() -> None:
    """Nothing is trained in int8: there are no gradients."""
    with pytest.raises(DcrisError, match=r"train\.precision: input should be"):
        replace(get_recipe("dcris_tiny"), {"train.precision": "int8"})


def test_it_says_where_it_cannot_or_should_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the instructions int8 is slow, and without the operators there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(devices, "multiplies_int8", lambda: True)
        assert choose_precision("int8", CPU) == torch.int8
    monkeypatch.setattr(devices, "multiplies_int8", lambda: False)
    devices._warn_of_slow_int8.cache_clear()
    with pytest.warns(DcrisWarning, match="slower here than float32") as warned:
        assert [choose_precision("int8", CPU) for _ in range(2)] == [torch.int8] * 2
    assert len(warned) == 1
    monkeypatch.delattr(torch, "quantize_per_tensor")
    with pytest.raises(DcrisError, match="multiplies no int8"):
        choose_precision("int8", CPU)
