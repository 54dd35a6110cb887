"""Less memory gives the same result: passes, recomputed activations, and the search for the largest
micro batch."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dcris.checkpoints.checkpoint import list_checkpoints
from dcris.cli import main
from dcris.config import RunConfig, replace
from dcris.data.readers.load import load_references
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.models.adapters.attach import adapters
from dcris.models.segmentation import ReferringSegmenter
from dcris.training import batch_size
from dcris.training.losses import text_to_pixel_loss
from dcris.training.parallel import divide_batch
from dcris.training.trainer import Trainer, build_model
from dcris.types import Batch
from dcris.utils import device
from dcris.utils.device import free_memory
from dcris.utils.distributed import Processes
from launcher import Launcher
from marks import slow_except
from models import randomise
from runs import CPU, quick_config, small_recipe


def samples(count: int, side: int = 56) -> Batch:
    source = torch.Generator().manual_seed(3)
    return Batch(
        torch.randint(0, 256, (count, 3, side, side), generator=source, dtype=torch.uint8),
        torch.randint(1, 100, (count, 14), generator=source),
        (torch.rand(count, 1, side, side, generator=source) > 0.7).float(),
    )


def model_of(config: RunConfig, seed: int = 0) -> ReferringSegmenter:
    model = ReferringSegmenter(config.model)
    randomise(model, seed)
    return model.train()


@contextmanager
def saved_bytes(counted: list[int]) -> Iterator[None]:
    """Append the bytes that autograd saves inside; parameters are not counted."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    counted.append(sum(seen.values()))


# ---- what needs no gradient keeps nothing ------------------------------------------------------


def test_no_activations_saved_before_the_first_adapter() -> None:
    """Blocks before the first adapter need no gradient, so autograd must not save their
    activations."""
    config, kept = quick_config(1, ("model.method.visual.layers", "[1, 5, 11]"), recipe="dcris_tiny"), []
    model, batch = model_of(config), samples(2)
    with saved_bytes(kept):
        state = model.encode_images(batch.images.float())
    assert state.step == 3  # the second half of block 1
    assert kept == [0]
    assert not state.tokens.requires_grad
    with saved_bytes(kept):
        model.segment(state, model.encode_text(batch.tokens))
    assert kept[1] > 0


def test_frozen_layer_saves_no_input() -> None:
    """A product with frozen weights saves no input; one with trained weights does."""
    mlp, kept = model_of(quick_config(1, recipe="dcris_tiny")).vision.blocks[0].mlp, []
    x = torch.randn(2, 21, 128, requires_grad=True)
    with saved_bytes(kept):
        mlp(x * 1)
    mlp.requires_grad_(True)
    with saved_bytes(kept):
        mlp(x * 1)
    hidden = 2 * 21 * 4 * 128 * 4
    assert kept[0] == hidden
    assert kept[1] > hidden


# ---- recomputed activations --------------------------------------------------------------------


def gradients(model: ReferringSegmenter, batch: Batch) -> tuple[float, dict[str, Tensor], int]:
    kept: list[int] = []
    torch.manual_seed(11)
    with saved_bytes(kept):
        loss = text_to_pixel_loss(model(batch.images.float() / 255, batch.tokens)[0], batch.masks)
    loss.backward()
    found = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    return loss.item(), found, kept[0]


@pytest.mark.parametrize("dropout", [pytest.param("0.0", marks=pytest.mark.slow), "0.3"])
def test_recomputing_only_changes_memory(dropout: str) -> None:
    """Loss, gradients and running statistics are equal bit for bit; dropout draws the same numbers,
    and batch norms count each step once."""
    side = ("data.image_size", "112")
    settings = side, ("model.head.dropout", dropout), ("model.method.visual.dropout", dropout)
    config = quick_config(1, *settings, recipe="dcris_tiny")
    plain, batch = model_of(config), samples(2, 112)
    frugal = copy.deepcopy(plain)
    frugal.checkpoint_activations()
    (loss, expected, much), (again, found, little) = gradients(plain, batch), gradients(frugal, batch)
    assert again == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours, theirs = dict(frugal.named_buffers()), dict(plain.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(name.endswith("num_batches_tracked") for name in theirs)
    assert little < 0.6 * much


# ---- several passes ----------------------------------------------------------------------------


def test_divide_batch() -> None:
    """Every sample of the batch is in one pass of one rank, and passes respect the micro batch.

    A batch is refused only if no division exists.
    """
    for batch in (1, 5, 8, 9, 32):
        for count in (1, 2, 3, 8):
            for micro in (None, 1, 2, 3, 64):
                most = (micro or batch) * count
                possible = any(count * passes <= batch <= most * passes for passes in range(1, batch + 1))
                try:
                    divided = [divide_batch(batch, micro, Processes(rank, count)) for rank in range(count)]
                except DcrisError:
                    assert not possible
                    continue
                assert possible
                assert len({len(ranges) for ranges in divided}) == 1
                passes = [*zip(*divided, strict=True)]
                assert [place for one in passes for part in one for place in part] == [*range(batch)]
                assert all(0 < len(part) <= (micro or batch) for one in passes for part in one)
    with pytest.raises(DcrisError, match="a batch of 3 leaves some of 4 processes without a sample; start fewer"):
        divide_batch(3, None, Processes(0, 4))
    with pytest.raises(DcrisError, match=r"in 3 passes leaves .* raise train\.micro_batch"):
        divide_batch(5, 1, Processes(0, 2))


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Replace batch norms, whose statistics are those of a pass, by norms within a sample."""
    for parent in [*module.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.GroupNorm(1, child.num_features))
    return module


@pytest.mark.parametrize(
    ("recipe", "micro_batch"),
    slow_except([(None, 1), (None, 2), ("barleria_tiny", 2)], (None, 2), ("barleria_tiny", 2)),
)
def test_passes_equal_one_step(recipe: str | None, micro_batch: int, scenes_root: Path, tmp_path: Path) -> None:
    """Passes of one batch, also uneven ones, give the gradient of the mean over the batch.

    BarLeRIa adds a loss of its own, which is such a mean, too.
    """
    batch, table = samples(5), load_references(scenes_root, "scenes")
    weights, losses, ious = [], [], []
    for micro in ("null", str(micro_batch)):
        config = quick_config(1, ("train.batch_size", "5"), ("train.micro_batch", micro), recipe=recipe)
        model = without_batch_norm(model_of(config)).double()
        start = {name: item.detach().clone() for name, item in model.named_parameters()}
        parameters = [item for item in model.parameters() if item.requires_grad]
        trainer = Trainer(
            InDoublePrecision(model), config, table, tokenizer_of(config.model.text), tmp_path, device=CPU
        )
        trainer.dtype = torch.float32
        trainer.optimizer = torch.optim.SGD(parameters, lr=1.0)
        found, iou = trainer.forward_backward(0, batch, want_iou=True)
        trainer.optimizer.step()
        weights.append({name: item.detach() - start[name] for name, item in model.named_parameters()})
        losses.append(found["loss"])
        ious.append(iou)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert ious[1] == pytest.approx(ious[0], rel=1e-6)
    scale = max(change.abs().max() for change in weights[0].values())
    assert scale > 0
    for name, change in weights[0].items():
        assert torch.allclose(weights[1][name], change, rtol=1e-4, atol=1e-6 * scale.item()), name


class InDoublePrecision(nn.Module):
    """A model in double precision with an interface in single precision, so that rounding does not
    hide a wrong weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, *others: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(images.double(), *others)


# ---- the largest that fits ---------------------------------------------------------------------


@pytest.mark.parametrize(("free", "expected"), [(1 << 40, 6), (None, 2), (1 << 20, 0)])
def test_largest_micro_batch(monkeypatch: pytest.MonkeyPatch, free: int | None, expected: int) -> None:
    """All samples if there is room, a power of two if there is room for three, an error if there is
    none."""
    config = quick_config(1)
    model, tokenizer = build_model(config), tokenizer_of(config.model.text)
    moments = 2 * sum(item.nbytes for item in model.parameters() if item.requires_grad)
    grown, ran = iter([1e8, 2e8, 4e8, 6e8]), []

    def grow(act: Callable[[], None]) -> float:
        act()
        ran.append(act.args[0])
        return next(grown)

    monkeypatch.setattr(batch_size, "memory_growth", grow)
    monkeypatch.setattr(batch_size, "free_memory", lambda _: (moments + 3e8) / 0.9 + 1 if free is None else free)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    search = partial(batch_size.largest_micro_batch, model, config, tokenizer, 6, CPU)
    if expected:
        assert search() == expected
        assert ran == ([1, 2, 4, 6] if expected == 6 else [1, 2])
    else:
        with pytest.raises(DcrisError, match="not even one sample fits"):
            search()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(item.grad is None for item in model.parameters())
    assert not model.training
    assert all(slot.training is False for slot in adapters(model.vision))


GROWTH = """
import gc, torch
from dcris.training.batch_size import memory_growth
circle = [torch.ones(100_000_000)]
circle.append(circle)
del circle
print(memory_growth(lambda: (gc.collect(), torch.ones(50_000_000).sum())))
"""


def test_measured_memory(launcher: Launcher, tmp_path: Path) -> None:
    """200 MB that are allocated for a moment are measured, even after more was allocated before.

    Also if unused memory with circular references, as a model has, is freed in between. In a
    process of its own, since other tests may have left 200 MB of free memory.
    """
    assert 1.9e8 < float(launcher.run_code(GROWTH, tmp_path / "output.txt")) < 4e8
    assert 1e8 < free_memory(CPU) < 1e14


def test_free_memory_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory respects the limit of a container."""
    for name, content in {
        "max": "max",
        "current": "700",
        "stat": "anon 100\nactive_file 50\ninactive_file 150",
    }.items():
        (tmp_path / f"memory.{name}").write_text(f"{content}\n")
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    assert free_memory(CPU) > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(CPU) == 500  # file caches do not count as used
    (tmp_path / "memory.max").write_text("400\n")
    assert free_memory(CPU) == 0


def test_auto_micro_batch_is_recorded(
    scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run uses the recorded micro batch, whatever memory is free."""
    found = iter([2])
    monkeypatch.setattr(batch_size, "largest_micro_batch", lambda *_: next(found))
    words = ["train", str(small_recipe()), "--data", str(scenes_root), "--out", str(tmp_path / "run")]
    words += ["--batch-size", "auto", "--device", "cpu", "--data.image_size", "56"]
    words += ["--train.warmup_steps", "0", "--train.batch_size", "4"]
    assert main([*words, "--train.max_steps", "1"]) == 0
    assert "micro batches of 2 (the largest that fits): a batch of 4 takes 2 passes" in capsys.readouterr().out
    assert main([*words, "--train.max_steps", "2", "--resume"]) == 0
    assert "micro batches of 2 (as when the run was started)" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "run")[-1].step == 2
    recorded = json.loads((tmp_path / "run/config.json").read_text())["train"]
    assert (recorded["micro_batch"], recorded["batch_size"]) == (2, 4)
    assert main([*words[:-2], "--batch-size", "none"]) == 2


def test_a_micro_batch_beside_auto_is_refused(
    scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be replaced unnoticed, by one that may not fit where the user knows that this one
    does."""
    words = ["train", "dcris_tiny", "--data", str(scenes_root), "--out", str(tmp_path / "run"), "--batch-size", "auto"]
    assert main([*words, "--train.micro_batch", "2", "--device", "cpu"]) == 2
    assert "--batch-size auto chooses train.micro_batch itself; leave out one of them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def one_cell_run(scenes_root: Path, tmp_path: Path, *settings: str) -> tuple[list[str], Path]:
    """The command of a run on images of one patch, on which batch norms get one value."""
    out = tmp_path / "run"
    words = ["train", str(small_recipe()), "--data", str(scenes_root), "--out", str(out), "--device", "cpu", "--quiet"]
    return [*words, "--data.val_split", "null", "--train.max_steps", "1", *settings], out


@pytest.mark.parametrize(
    "settings",
    [
        ["--data.image_size", "14", "--train.batch_size", "1"],
        ["--data.image_size", "14", "--train.batch_size", "3", "--train.micro_batch", "2"],
        # A size that is drawn in some later step, perhaps after hours.
        [
            "--data.image_size",
            "56",
            "--data.scales",
            "[0.25, 1]",
            "--train.batch_size",
            "2",
            "--train.micro_batch",
            "1",
        ],
    ],
)
def test_one_value_for_batch_norm_is_refused(
    settings: list[str], scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback of torch; a user has to learn which settings help, before a run is
    written."""
    words, out = one_cell_run(scenes_root, tmp_path, *settings)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "batch norm cannot train on one image of 14 x 14 pixels" in message
    assert "raise data.image_size, or train.batch_size and train.micro_batch to two samples a pass" in message
    assert not out.exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["--data.image_size", "14", "--train.batch_size", "4", "--train.micro_batch", "2"],
        ["--data.image_size", "28", "--train.batch_size", "1"],
        # Its search tries passes of one sample first.
        ["--data.image_size", "14", "--train.batch_size", "3", "--batch-size", "auto"],
    ],
)
def test_two_values_suffice_for_batch_norm(settings: list[str], scenes_root: Path, tmp_path: Path) -> None:
    """Settings beside those that are refused train; `--batch-size auto` was a traceback, too."""
    words, out = one_cell_run(scenes_root, tmp_path, *settings)
    assert main(words) == 0
    assert list_checkpoints(out)[-1].step == 1


def test_configurations_without_micro_batch_load() -> None:
    """config.json of a run without the fields for passes."""
    tree = quick_config(1).model_dump(mode="json")
    for name in ("micro_batch", "checkpoint_activations", "shard_towers"):
        del tree["train"][name]
    assert RunConfig.model_validate(tree) == quick_config(1)
    assert replace(quick_config(1), {"train.micro_batch": 2}).train.micro_batch == 2
