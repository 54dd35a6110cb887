"""Published DETRIS checkpoints: results equal those of the authors' code; other files are refused.

The golden numbers are those of the published code on random weights in its layout
(tests/golden/make_detris.py).
"""

import json
import pickle
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.checkpoints.convert_detris import convert_detris, convert_file, published_name, rename_tensors
from dcris.cli import main
from dcris.config import HeadConfig, RunConfig
from dcris.data.dataset import normalise, to_square
from dcris.data.tokenizer import get_tokenizer
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.inference.segmenter import Segmenter
from dcris.models.adapters.attach import adapters
from dcris.models.adapters.dcris import DcrisConfig, TextAdapterConfig
from dcris.models.encoders.blocks import SlotContext
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.losses import text_to_pixel_loss
from dcris.training.optimizer import make_optimizer
from detris_layout import (
    PHRASES,
    RECIPES,
    STARTED,
    STEPS,
    VARIANTS,
    adapter_inputs,
    assert_norms,
    config_of,
    describe_start,
    gradients_of,
    layout,
    masks,
    norms,
    photograph,
    root_mean_squares,
    sampled,
    sums,
    weights,
)
from marks import slow_except
from models import network_of, without_dropout

GOLDEN = Path(__file__).parent / "golden" / "detris.safetensors"


def golden(name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in load_file(GOLDEN).items() if key.startswith(prefix)}


def inputs(config: RunConfig) -> tuple[Tensor, Tensor, list[Any]]:
    square, box = to_square(photograph(), config.data, Letterbox)
    images = normalise(torch.stack([square, square]), config.data)
    return images, get_tokenizer("clip")(PHRASES, config.data.word_length), [box, box]


@pytest.mark.parametrize(
    "name",
    ["small", pytest.param("base", marks=pytest.mark.slow), pytest.param("large", marks=pytest.mark.slow)],
)
def test_the_published_code_s_own_numbers(name: str) -> None:
    """Logits, masks, loss and gradients equal those of the published code."""
    pytest.importorskip(
        "instant_clip_tokenizer", reason="CLIP's vocabulary is neither in a package nor on the Hub here"
    )
    config, expected = config_of(name), golden(name)
    model = network_of(config.model, rename_tensors(weights(VARIANTS[name]), config.model, "here"))
    images, tokens, boxes = inputs(config)
    dtype = torch.float64 if VARIANTS[name].double else torch.float32
    model, images = model.to(dtype), images.to(dtype)
    assert torch.equal(tokens, expected["tokens"])

    with torch.no_grad():
        logits = model(images, tokens)[0]
    torch.testing.assert_close(logits[:, 0, ::2, ::2], expected["logits"], rtol=0, atol=2e-4)
    for ours, theirs in zip(Cris().probabilities(logits, boxes), expected["scores"], strict=True):
        assert (ours - theirs.clip(0, 1)).abs().mean() <= 1e-5
        mask, other = ours > 0.35, theirs > 0.35
        assert 0.02 < other.float().mean() < 0.98
        assert (mask & other).sum() / (mask | other).sum() >= 0.995

    without_dropout(model).train()
    logits = model(images, tokens)[0]
    truth = masks(config.data.image_size)
    loss = F.binary_cross_entropy_with_logits(logits, F.interpolate(truth, logits.shape[-2:]).to(dtype))
    loss.backward()
    torch.testing.assert_close(logits.detach()[:, 0, ::2, ::2], expected["train_logits"], rtol=0, atol=1e-3)
    for each in (loss, text_to_pixel_loss(logits, truth)):
        assert each.item() == pytest.approx(expected["loss"].item(), rel=1e-5)

    # Some are zero in theory (a bias before a batch norm) and others nearly cancel, so rounding is
    # judged by the whole. In float32 it depends on the processor: of L's tensors one is 1.2e-3 off
    # on an AMD EPYC, none by 1e-3 on an Intel Xeon.
    rel, floor = (1e-6, 1e-14) if VARIANTS[name].double else (2e-3, 1e-6)
    assert_norms(gradients_of(model, published_name), expected["gradients"], rel, floor)

    trained = {published_name(key): value for key, value in model.named_buffers() if "running" in key}
    found = torch.stack([sums(trained), norms(trained)])
    torch.testing.assert_close(found, expected["statistics"], rtol=1e-5, atol=1e-4)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("name", slow_except(STARTED, "small"))
def test_the_published_start(name: str) -> None:
    """Initial weights are distributed as in the published code; a Kaiming start adds 20 times as
    much to the towers.
    """
    expected = golden(name)
    torch.manual_seed(0)
    model = ReferringSegmenter(config_of(name).model)
    weights = trainable(model)
    for key, ours, theirs in zip(sorted(weights), describe_start(weights), expected["start"], strict=True):
        mean, deviation, largest = theirs.tolist()
        count = weights[key].numel()
        # Five standard errors of a sample of this size, and of the four that the golden numbers are
        # means of.
        error = 5 * deviation * (1.25 / count) ** 0.5
        assert abs(ours[0].item() - mean) <= error + 1e-12, f"{key}: mean {ours[0]}, not {mean}"
        assert abs(ours[1].item() - deviation) <= error, f"{key}: deviation {ours[1]}, not {deviation}"
        assert ours[2].item() <= 1.5 * largest, f"{key}: up to {ours[2]}, not {largest}"

    without_dropout(model).double().train()
    normed, text = adapter_inputs(VARIANTS[name])
    side = int((normed.shape[1] - 5) ** 0.5)
    added = [
        root_mean_squares(adapter(torch.zeros_like(normed), normed, normed, SlotContext((side, side), 5, text)))
        for adapter in adapters(model.vision)
    ]
    assert torch.stack(added).mean(0).tolist() == pytest.approx(expected["start_rms"].tolist(), rel=0.1)


@pytest.mark.slow
def test_five_published_steps() -> None:
    """Losses and weight updates of five training steps equal the published code's."""
    config, expected = config_of("small"), golden("small")
    model = network_of(config.model, rename_tensors(weights(VARIANTS["small"]), config.model, "here"))
    without_dropout(model).double().train()
    images, tokens, _ = inputs(config)
    images, truth = images.double(), masks(config.data.image_size).double()
    before = {name: value.clone() for name, value in trainable(model).items()}
    optimizer = make_optimizer(model, config.train)
    losses = []
    for _ in range(STEPS):
        loss = text_to_pixel_loss(model(images, tokens)[0], truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected["steps.losses"].tolist(), rel=1e-6)
    ours = sampled({name: value - before[name] for name, value in trainable(model).items()})
    theirs = expected["steps.updates"]
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def empty(name: str) -> dict[str, Tensor]:
    """Return a state dict of a variant's names and shapes whose values take no memory."""
    state = {}
    for key, shape in layout(VARIANTS[name]).items():
        state[key] = torch.zeros((), dtype=torch.int64 if key.endswith("tracked") else torch.float32).expand(shape)
    return state


def save(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "wrapper"),
    slow_except(product(("base", "large", "mixed"), ("", "module.")), ("base", ""), ("mixed", "module.")),
)
def test_variants_are_recognised_from_their_tensors(name: str, wrapper: str, tmp_path: Path) -> None:
    """The model is recognised from the tensors' names and shapes."""
    state = {wrapper + key: value for key, value in empty(name).items()}
    config, tensors = convert_detris(save(tmp_path / "x_refcoco.pth", {"state_dict": state, "epoch": 3}))
    assert config.model == RECIPES[name].model
    assert config.recipe == RECIPES[name].recipe
    assert config.train == RECIPES[name].train
    assert len(tensors) == len(state)
    if name == "base":
        assert len(state) == 994  # as in the published file


def test_a_small_file_does_not_fill_the_disk(tmp_path: Path) -> None:
    """Expanded tensors take 4 bytes in the file, but any number of bytes when written."""
    path = save(tmp_path / "refcoco.pth", empty("base"))
    with pytest.raises(DcrisError, match=r"the tensors of .* take 0\.\d GB, but the file has 0\.0 GB"):
        convert_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_layers_and_widths_are_recognised(tmp_path: Path) -> None:
    """Models with other layers and widths, as in an ablation, are recognised too."""
    state = empty("base")
    for key in [key for key in state if ".adapter." in key and key.startswith("dinov2") and ".blocks.3." in key]:
        del state[key]
    for key in [key for key in state if ".adapter." in key and key.startswith("txt")]:
        del state[key]
    config, _ = convert_detris(save(tmp_path / "refcoco.pth", state))
    method = config.model.method
    assert isinstance(method, DcrisConfig)
    assert method.text is None
    assert method.visual is not None
    assert method.visual.layers == (1, 5, 7, 9, 11)


@pytest.mark.parametrize(
    ("stem", "dataset", "split_by", "length"),
    [
        ("base_refcoco+", "refcoco+", "unc", 17),
        ("lagre_RefCOCOg_umd", "refcocog", "umd", 22),
        ("mix_refcocog_u", "mixed-unfiltered", None, 17),
        pytest.param("base_refcoco", "refcoco", "unc", 17, marks=pytest.mark.slow),
        pytest.param("base_refcocog_u", "refcocog", "umd", 22, marks=pytest.mark.slow),
        pytest.param("base_refcocog_g", "refcocog", "google", 17, marks=pytest.mark.slow),
    ],
)
def test_the_file_s_name_says_the_data_set(
    stem: str, dataset: str, split_by: str | None, length: int, tmp_path: Path
) -> None:
    """Data set and word length follow from the file's name."""
    config, _ = convert_detris(save(tmp_path / f"{stem}.pth", empty("base")))
    assert (config.data.dataset, config.data.split_by, config.data.word_length) == (dataset, split_by, length)


def test_a_name_that_says_nothing_needs_the_flag(tmp_path: Path) -> None:
    """Without a data set in the file's name, --word-length is required."""
    for stem in ("best_model", "refcocog"):
        path = save(tmp_path / f"{stem}.pth", empty("base"))
        with pytest.raises(DcrisError, match="--word-length"):
            convert_detris(path)
        assert convert_detris(path, 22)[0].data.word_length == 22
    with pytest.raises(DcrisError, match=r"word_length"):
        convert_detris(path, 78)
    # The mixed model's shapes are no other's.
    assert convert_detris(save(tmp_path / "best.pth", empty("mixed")), 17)[0].data.dataset == "mixed-unfiltered"


def test_training_state_beside_the_weights_is_left_out(tmp_path: Path) -> None:
    """The state of optimiser and scheduler in older files is ignored."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35, 55])
    content = {
        "epoch": 50,
        "best_iou": 0.76,
        "prec": {"Pr@50": 0.87},
        "state_dict": empty("base"),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
    }
    assert len(convert_detris(save(tmp_path / "refcoco.pth", content))[1]) == 994


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("malicious"),))


def _drop(state: dict[str, Any]) -> None:
    del state["neck.f5_proj.0.weight"]


def _reshape(state: dict[str, Any]) -> None:
    state["dinov2.blocks.0.ls1.gamma"] = torch.zeros(5)


def _add(state: dict[str, Any]) -> None:
    state["fusion.extra"] = torch.zeros(5)


def _add_lines(state: dict[str, Any]) -> None:
    state["two\nlines"] = torch.zeros(5)


def _sparse(state: dict[str, Any]) -> None:
    state["dinov2.norm.bias"] = torch.zeros(768).to_sparse()


def _integers(state: dict[str, Any]) -> None:
    state["dinov2.norm.bias"] = torch.zeros(768, dtype=torch.int64)


def _meta(state: dict[str, Any]) -> None:
    state["dinov2.norm.bias"] = torch.zeros(768, device="meta")


def _odd_width(state: dict[str, Any]) -> None:
    for layer in (1, 3, 5, 7, 9, 11):
        state[f"dinov2.blocks.{layer}.adapter.D_fc1.weight"] = torch.zeros(100, 768)


def _deep(state: dict[str, Any]) -> None:
    state["dinov2.blocks.12.norm1.weight"] = torch.zeros(768)


def _no_tower(state: dict[str, Any]) -> None:
    del state["dinov2.cls_token"]


def _not_tensor(state: dict[str, Any]) -> None:
    state["dinov2.norm.bias"] = [1.0]


def _scalar(state: dict[str, Any]) -> None:
    state["dinov2.cls_token"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_drop, "neck.f5_proj.0.weight"),
        (_reshape, "dinov2.blocks.0.ls1.gamma"),
        (_add, "fusion.extra"),
        (_add_lines, "lines"),
        (_sparse, "dinov2.norm.bias"),
        (_integers, "dinov2.norm.bias"),
        (_meta, "dinov2.norm.bias"),
        (_odd_width, "method.visual.width"),
        (_deep, "13 blocks"),
        (_no_tower, "dinov2.cls_token"),
        (_not_tensor, "entry 'dinov2.norm.bias' is a list"),
        (_scalar, "dinov2.cls_token"),
    ],
)
def test_a_foreign_state_dict_is_named(spoil: Any, says: str, tmp_path: Path, capsys: Any) -> None:
    """A state dict of another model is refused, naming the tensor."""
    state = empty("base")
    spoil(state)
    check_refusal(save(tmp_path / "refcoco.pth", state), says, capsys)


def check_refusal(path: Path, says: str, capsys: Any) -> None:
    out = path.parent / "out"
    before = set(path.parent.iterdir())
    assert main(["convert", str(path), "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert says in complaint
    assert str(path.parent) in complaint
    assert set(path.parent.iterdir()) == before


def _cut(path: Path) -> None:
    save(path, empty("base"))
    path.write_bytes(path.read_bytes()[:-2000])


def _cut_early(path: Path) -> None:
    save(path, empty("base"))
    path.write_bytes(path.read_bytes()[:2000])


def _malicious(path: Path) -> None:
    save(path, {"state_dict": empty("base"), "args": Malicious()})


def _old_malicious(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious()))


def _text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    "make",
    [
        _cut,
        _cut_early,
        _malicious,
        _old_malicious,
        _text,
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: save(path, [1, 2]),
        lambda path: save(path, {}),
        lambda path: save(path, {"state_dict": 3}),
        lambda path: save(path, Counter(a=1)),
        lambda path: save(path, torch.zeros(3)),
        lambda path: save(path, {1: torch.zeros(3)}),
    ],
)
def test_other_files_are_refused_in_one_sentence(
    make: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged files and files with code are refused in one sentence, and nothing in them is run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refcoco.pth"
    make(path)
    check_refusal(path, "refcoco.pth", capsys)
    assert not Path("malicious").exists()


def test_the_command_refuses_what_stands_in_its_way(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dcris convert` does not overwrite a folder or one of its own results."""
    path = save(tmp_path / "refcoco.pth", empty("base"))
    (tmp_path / "out" / "refcoco").mkdir(parents=True)
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "b" / "refcoco.pth"), "--out", str(tmp_path / "new")]) == 2
    assert "the same name" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere.pth"), "--out", str(tmp_path / "new")]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("dcris.checkpoints.convert_detris._MAX_REPEATED", 10**10)  # the tensors of `empty` are repeated
    assert main(["convert", str(path), "--out", str(path)]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_from_file_to_mask(tmp_path: Path, capsys: Any) -> None:
    """A published file can be converted and used for prediction by the commands."""
    path = save(tmp_path / "base_refcoco.pth", {"state_dict": weights(VARIANTS["base"])})
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "detris_b" in capsys.readouterr().out
    path.unlink()
    folder = tmp_path / "out" / "base_refcoco"
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "towers.safetensors"}
    assert (folder / "model.safetensors").stat().st_size < 103e6
    answers = Segmenter.from_pretrained(folder, device="cpu", precision="float32").predict(
        photograph(), PHRASES, scores=True
    )
    for answer, theirs in zip(answers, golden("base")["scores"].numpy(), strict=True):
        assert answer.probabilities is not None
        assert np.abs(answer.probabilities - theirs.clip(0, 1)).mean() <= 1e-5
        other = theirs > 0.35
        assert (answer.mask & other).sum() / (answer.mask | other).sum() >= 0.995

    # Other towers under the same adapters are refused, and so are cut ones.
    towers = folder / "towers.safetensors"
    content = towers.read_bytes()
    towers.write_bytes(content[:-4] + b"\0\0\0\x3f")
    with pytest.raises(DcrisError, match=r"another (vision|text) encoder"):
        load_checkpoint(folder)
    towers.write_bytes(content[:-4])
    with pytest.raises(DcrisError, match="cut short"):
        load_checkpoint(folder)


def test_the_default_text_adapter_is_the_papers() -> None:
    """The default text adapter and head are DCRIS's."""
    assert TextAdapterConfig.model_validate_json(json.dumps({"layers": [1], "width": 64})).kind == "plain"
    assert HeadConfig() == RECIPES["base"].model.head
