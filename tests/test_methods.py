"""Every method of tuning: what it promises. For a new one see test_extending.py."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.checkpoints.checkpoint import identify_towers, load_checkpoint, save_model
from dcris.config import METHODS as REGISTRY
from dcris.config import RunConfig, replace
from dcris.errors import DcrisError
from dcris.inference.segmenter import Segmenter
from dcris.models.adapters.adaptformer import AdaptFormerConfig, ParallelAdapter
from dcris.models.adapters.attach import trained_state
from dcris.models.adapters.compacter import CompacterAdapter, CompacterConfig
from dcris.models.adapters.houlsby import HoulsbyAdapter, HoulsbyConfig
from dcris.models.adapters.lora import LoraConfig, LowRank
from dcris.models.encoders.blocks import Block, EmptySlot, Slot, SlotContext
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES, get_recipe
from dcris.training.losses import text_to_pixel_loss
from dcris.training.optimizer import parameter_groups
from dcris.training.trainer import build_model
from dcris.utils.device import choose_precision, precision_of
from marks import slow_except
from models import TINY_CLIP_VISION, TINY_TEXT, error, images, randomise, tiny_config
from runs import CPU, last_tensors, quick_config, run_training

METHODS = sorted(name for name, settings in REGISTRY.items() if settings.__module__.startswith("dcris."))
MERGING = {"full", "bitfit", "lora"}
STARTS_PLAIN = {*METHODS} - {"barleria", "etris", "prompts"}
"""The methods whose tiny recipes start as the plain towers."""

COUNTS = {
    "full": (150_010_880, 149.97e6),
    "fixed": (0, 0.0),
    "houlsby": (1_998_336, 1.98e6),
    "adaptformer": (1_982_976, None),
    "compacter": (1_622_144, 1.62e6),
    "lora": (1_572_864, 1.57e6),
    "bitfit": (171_008, None),
    "prompts": (46_592, None),
    "etris": (1_387_648, 1.38e6),
    "barleria": (3_500_192, None),
}
"""Trained weights beside the head of the recipe NAME_b, and what table 2 prints."""

every_method = pytest.mark.parametrize("method", METHODS)
# One that can be folded, one with a bridge, and the paper's.
some_methods = pytest.mark.parametrize("method", slow_except(METHODS, "dcris", "lora", "etris"))


def test_the_list_of_methods_is_whole() -> None:
    """Every method is registered and has both recipes, so that the tests below try all of them."""
    assert {
        "dcris",
        "full",
        "houlsby",
        "adaptformer",
        "compacter",
        "lora",
        "bitfit",
        "prompts",
        "etris",
        "barleria",
    } <= set(METHODS)
    for method in METHODS:
        assert {f"{method}_b", f"{method}_tiny"} <= set(RECIPES), method


@pytest.mark.parametrize("method", COUNTS)
def test_counts(method: str) -> None:
    """Trained weights are as documented, and within 3% of the paper's count where the paper has the
    method.
    """
    with torch.device("meta"):
        count = ReferringSegmenter(get_recipe(f"{method}_b").model).count_weights()["adapters"]
    expected, paper = COUNTS[method]
    assert count == expected
    if paper:
        assert abs(count / paper - 1) < 0.03
    if method == "full":
        # The paper's number leaves out the text tower's positions; ours two tensors that are never
        # read.
        assert count + 768 + 1 - 77 * 512 == 149_972_225


@cache
def _built(recipe: str) -> ReferringSegmenter:
    """Return a model on the tiny towers. The head is randomised, so that zeros do not hide
    differences.
    """
    model = build_model(get_recipe(recipe))
    randomise(model.head, seed=3)
    return model


def built(recipe: str) -> ReferringSegmenter:
    return copy.deepcopy(_built(recipe))


def tokens(*rows: tuple[int, ...], length: int = 9) -> Tensor:
    """Return tokens of the tiny vocabulary: start 127, end 128."""
    whole = torch.zeros(len(rows), length, dtype=torch.long)
    for row, words in zip(whole, rows, strict=True):
        row[: len(words) + 2] = torch.tensor([127, *words, 128])
    return whole


PIXELS, PHRASES = images(2, 4, 4), tokens((5, 6, 7), (8, 9))


def loss_of(model: ReferringSegmenter, seed: int = 0) -> Tensor:
    masks = (torch.randn(2, 1, 56, 56, generator=torch.Generator().manual_seed(seed)) > 0).float()
    logits, _, auxiliary = model(PIXELS, PHRASES)
    return sum(auxiliary.values(), start=text_to_pixel_loss(logits, masks))


@torch.enable_grad()
def train_steps(model: ReferringSegmenter, steps: int, lr: float = 1e-2) -> None:
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    model.eval()


@cache
def _tuned(method: str) -> ReferringSegmenter:
    model = built(f"{method}_tiny")
    train_steps(model, 3)
    return model


def tuned(method: str) -> ReferringSegmenter:
    """Return a model of the method after three steps. Tests must not change it."""
    return _tuned(method)


def added(name: str) -> bool:
    """Return whether the method added the tensor."""
    return "_slot." in name or name.startswith("bridge.")


@some_methods
@torch.no_grad()
def test_it_starts_as_the_plain_towers_where_it_should(method: str) -> None:
    """Adapters that start as the identity leave the towers' initial output unchanged."""
    model = built(f"{method}_tiny")
    plain = ReferringSegmenter(model.config.model_copy(update={"method": None})).eval()
    # Before anything is trained what is not in a slot or a bridge is the plain network.
    state = {name: value for name, value in model.state_dict().items() if not added(name)}
    plain.load_state_dict(state)
    same = torch.equal(model(PIXELS, PHRASES)[0], plain(PIXELS, PHRASES)[0])
    assert same == (method in STARTS_PLAIN)


@every_method
def test_exactly_its_weights_train(method: str) -> None:
    """All trained weights have finite gradients and move; nothing else moves, statistics
    included.
    """
    model = tuned(method)
    config = model.config.method
    assert config is not None
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name, _ in model.named_parameters() if not name.startswith("head.") and not added(name)}
    assert own & trains == {name for name in own if config.trains(name)}
    assert trains >= {name for name, _ in model.named_parameters() if name not in own}
    before = _built(f"{method}_tiny").state_dict()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    state = trained_state(model)
    assert moved <= state.keys()
    assert not moved & (own - trains)
    # All of the method's weights move. Some of the head's cannot (a bias before batch norm has no
    # gradient but rounding).
    assert {name for name in trains - moved if not name.startswith("head.")} == set()
    for tower in (model.vision, model.text):
        assert not any(module.training for module in tower.modules())


@some_methods
@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(method: str, tmp_path: Path) -> None:
    """A checkpoint holds everything that was trained, and is refused on other towers."""
    model, config = tuned(method), get_recipe(f"{method}_tiny")
    expected = model(PIXELS, PHRASES)[0]
    towers = identify_towers(model)
    for path in (tmp_path / "alone", tmp_path / "bundle.safetensors"):
        save_model(path, model, towers, config, with_towers=False)
        loaded, found = load_checkpoint(path)
        assert found == config
        assert torch.equal(loaded(PIXELS, PHRASES)[0], expected)
    other = copy.deepcopy(model)
    frozen = [p for p in other.vision.parameters() if not p.requires_grad]
    frozen[-1].add_(1.0)
    save_model(tmp_path / "other", other, identify_towers(other), config, with_towers=False)
    with pytest.raises(DcrisError, match="trained on another vision encoder"):
        load_checkpoint(tmp_path / "other")


@pytest.mark.parametrize("method", slow_except(METHODS, "etris"))
def test_a_resumed_run_is_the_same_run(method: str, scenes_root: Path, tmp_path: Path) -> None:
    """An interrupted and resumed run ends with the same weights. A Segmenter can load the run."""

    def config(steps: int) -> RunConfig:
        quick, recipe = quick_config(steps), get_recipe(f"{method}_tiny")
        train = quick.train.model_copy(update={"lr_factors": recipe.train.lr_factors})
        return recipe.model_copy(update={"train": train, "data": quick.data})

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_training(config(2), scenes_root, whole)
    run_training(config(1), scenes_root, halves)
    run_training(config(2), scenes_root, halves, resume=True)
    ours, theirs = last_tensors(whole), last_tensors(halves)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (answer,) = Segmenter.from_pretrained(halves, device="cpu").predict(picture, "left circle")
    assert answer.mask.shape == (40, 50)


@some_methods
def test_bfloat16(method: str) -> None:
    """Training works in bfloat16, the default precision of a GPU."""
    model = built(f"{method}_tiny").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name


@every_method
@torch.no_grad()
def test_many_phrases_on_one_image_are_as_single_calls(method: str) -> None:
    """Evaluation shares an image's features between its expressions; results equal single calls."""
    model = tuned(method)
    phrases = tokens((5, 6, 7), (8, 9), (10,))
    state = model.encode_images(PIXELS[:1])
    together = model.segment(state.select(torch.zeros(3, dtype=torch.long)), model.encode_text(phrases)).logits
    single = torch.cat([model(PIXELS[:1], row[None])[0] for row in phrases])
    assert error(together, single) < 1e-4 * single.abs().max().item()


@some_methods
@torch.no_grad()
def test_folded_into_the_towers_it_answers_the_same(method: str, tmp_path: Path) -> None:
    """Folding keeps the results; methods that cannot be folded raise an error and are unchanged."""
    config = get_recipe(f"{method}_tiny")
    other = torch.bfloat16 if choose_precision("auto", CPU) == torch.float32 else torch.float32
    precision = precision_of(other)
    segmenter = Segmenter(copy.deepcopy(tuned(method)), config, device="cpu", precision=precision)
    expected = segmenter.model(PIXELS, PHRASES)[0]
    if method not in MERGING:
        with pytest.raises(DcrisError, match=rf"the method {method} cannot be folded.*bitfit, full, lora"):
            segmenter.merged()
        assert torch.equal(segmenter.model(PIXELS, PHRASES)[0], expected)
        return
    merged = segmenter.merged()
    assert merged.dtype == segmenter.dtype == other  # the requested one, not the device's default
    assert all(isinstance(module, EmptySlot) for module in merged.model.modules() if isinstance(module, Slot))
    assert error(merged.model(PIXELS, PHRASES)[0], expected) < 1e-5 * expected.abs().max().item()
    assert torch.equal(segmenter.model(PIXELS, PHRASES)[0], expected)
    merged.save_pretrained(tmp_path / "merged")
    again = Segmenter.from_pretrained(tmp_path / "merged", device="cpu")
    assert torch.equal(again.model(PIXELS, PHRASES)[0], merged.model(PIXELS, PHRASES)[0])
    assert again.config.model.method is None
    with pytest.raises(DcrisError, match="to train further, start from the checkpoint that was merged"):
        build_model(again.config)


@every_method
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(method: str, backend: str) -> None:
    """`torch.compile` gives the same result, in one graph."""
    model = tuned(method)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = model(PIXELS, PHRASES)[0]
    assert error(compiled(PIXELS, PHRASES)[0], expected) < 1e-5 * expected.abs().max()


def test_a_rate_of_its_own_for_the_towers_weights() -> None:
    """Full tuning has a factor for the towers' own weights only."""
    model, config = built("full_tiny"), get_recipe("full_tiny").train
    head, own = parameter_groups(model, config)
    assert (head["lr_factor"], own["lr_factor"]) == (1.0, 0.1)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert len(own["params"]) + len(head["params"]) == sum(p.requires_grad for p in model.parameters())
    (whole,) = parameter_groups(model, config.model_copy(update={"lr_factors": {}}))
    assert len(whole["params"]) == len(own["params"]) + len(head["params"])
    assert len(parameter_groups(built("dcris_tiny"), get_recipe("dcris_tiny").train)) == 1


# Each method's arithmetic, against a plain reading of its source or another library.


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_houlsby_is_a_bottleneck_in_series() -> None:
    """It reads the branch's output, not its input."""
    adapter = HoulsbyAdapter(12, HoulsbyConfig(width=5)).double()
    randomise(adapter)
    w = dict(adapter.named_parameters())
    x, other = noise(2, 7, 12), noise(2, 7, 12, seed=1)
    hidden = F.gelu(x @ w["down.weight"].T + w["down.bias"])
    assert error(adapter(x, other, other, SlotContext()), x + hidden @ w["up.weight"].T + w["up.bias"]) < 1e-12


def test_houlsby_starts_nearly_as_the_identity() -> None:
    """It starts within two hundredths of the identity; `norms` trains the layer norms."""
    adapter, x = HoulsbyAdapter(128, HoulsbyConfig()), torch.randn(2, 7, 128)
    assert 0 < error(adapter(x, x, x, SlotContext()), x) < 0.02
    config = get_recipe("dcris_tiny").model.model_copy(update={"method": HoulsbyConfig(norms=True)})
    with torch.device("meta"):
        trained = {n for n, p in ReferringSegmenter(config).named_parameters() if p.requires_grad and "_slot." not in n}
    norms = {name for name in trained if not name.startswith("head.")}
    assert len(norms) == 2 * (12 * 2 * 2 + 2)
    assert all("norm" in name for name in norms)


def test_houlsby_trains_all_layer_norms() -> None:
    """Those before the first block, too, of CLIP's vision tower and of BERT, as the source does:
    they stayed frozen."""
    text = TINY_TEXT.model_copy(update={"family": "bert", "tokenizer": "bert", "sentence_width": TINY_TEXT.width})
    model = ReferringSegmenter(tiny_config(vision=TINY_CLIP_VISION, text=text, method=HoulsbyConfig(norms=True)))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "_slot." not in name}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {name for name in norms if "head." not in name} == {
        name.rpartition(".")[0] for name in trained if not name.startswith("head.")
    }
    assert {"vision.pre_norm", "text.embedding_norm"} < norms


def test_adaptformer_is_a_scaled_bottleneck_in_parallel() -> None:
    """It reads the MLP's input."""
    adapter = ParallelAdapter(12, AdaptFormerConfig(width=5, scale=0.3)).double().eval()
    randomise(adapter)
    w = dict(adapter.named_parameters())
    output, normed, residual = (noise(2, 7, 12, seed=seed) for seed in range(3))
    hidden = (normed @ w["down.weight"].T + w["down.bias"]).clamp(min=0)
    expected = output + 0.3 * (hidden @ w["up.weight"].T + w["up.bias"])
    assert error(adapter(output, normed, residual, SlotContext()), expected) < 1e-12


def test_compacter_is_sums_of_kronecker_products() -> None:
    """H = sum of A_i (x) S_i T_i. The tower's first adapter holds the rule A, also after a deep
    copy.
    """
    config = CompacterConfig(width=8, rank=2, terms=4)
    first = CompacterAdapter(12, config, None).double()
    second = CompacterAdapter(12, config, first).double()
    randomise(first)
    randomise(second, seed=1)
    assert "rule" not in dict(second.named_parameters())

    def matrix(name: str) -> Tensor:
        layer = getattr(second, name)
        return sum(torch.kron(first.rule[i], layer.left[i] @ layer.right[i]) for i in range(4))

    x = noise(2, 7, 12)
    hidden = F.gelu(x @ matrix("down") + second.down.bias, approximate="tanh")
    expected = x + hidden @ matrix("up") + second.up.bias
    assert error(second(x, x, x, SlotContext()), expected) < 1e-12
    model = built("compacter_tiny")
    rules = [p for name, p in model.named_parameters() if name.endswith(".rule")]
    assert len(rules) == 2, "one a tower"
    deep = copy.deepcopy(model)
    with torch.no_grad():
        deep.vision.blocks[0].attention_slot.rule.mul_(50)
        later, before = deep.vision.blocks[5].mlp_slot, model.vision.blocks[5].mlp_slot
        later.up.left.normal_()
        before.up.left.copy_(later.up.left)
        y = torch.randn(1, 3, 128)
        assert not torch.equal(later(y, y, y, SlotContext()), before(y, y, y, SlotContext()))


def test_compacter_starts_as_published() -> None:
    """Factors are uniform with gain sqrt(2), as in the authors' hypercomplex/inits.py, the rule has
    the deviation of their configuration; `norms` trains the layer norms."""
    torch.manual_seed(0)
    adapter = CompacterAdapter(768, CompacterConfig(), None)
    assert adapter.rule.std().item() == pytest.approx(1e-4, rel=0.3)
    for layer in (adapter.down, adapter.up):
        for factors in (layer.left, layer.right):
            limit = (2 * 6 / sum(factors.shape[1:])) ** 0.5
            assert factors.abs().max().item() == pytest.approx(limit, rel=0.02)
            assert factors.std().item() == pytest.approx(limit / 3**0.5, rel=0.03)
        assert not layer.bias.any()
    method = CompacterConfig(norms=True)
    assert method.trains("vision.blocks.0.norm1.weight")
    assert not method.trains("vision.blocks.0.mlp.fc1.weight")
    assert not CompacterConfig().trains("vision.blocks.0.norm1.weight")


def test_compacter_says_what_does_not_divide() -> None:
    """A width that cannot be divided is an error of the configuration."""
    with pytest.raises(DcrisError, match=r"method\.width 50 must be a multiple of method\.terms 4"):
        replace(get_recipe("compacter_tiny"), {"model.method.width": 50})
    # EfficientNet's blocks have several widths; 320, that of the last one, is a multiple of 16.
    with pytest.raises(
        DcrisError, match=r"block 2 of the vision encoder: width 24 must be a multiple of method\.terms 16"
    ):
        replace(get_recipe("compacter_photos"), {"model.method.terms": 16})


def test_lora_is_what_peft_makes_of_it() -> None:
    """Outputs and gradients equal those of peft's LoRA on separate query and value layers, also
    when folded.
    """
    peft = pytest.importorskip("peft")

    class Separate(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.heads = block.attention.heads
            for place, name in enumerate(("query", "key", "value")):
                linear = nn.Linear(32, 32).double()
                linear.weight.data.copy_(block.attention.qkv.weight.chunk(3)[place])
                linear.bias.data.copy_(block.attention.qkv.bias.chunk(3)[place])
                setattr(self, name, linear)
            self.proj = copy.deepcopy(block.attention.proj)

        def forward(self, x: Tensor) -> Tensor:
            parts = [
                layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
            ]
            return self.proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    block = Block(32, 4).double()
    randomise(block)
    theirs = Separate(block)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=True)
    peft.inject_adapter_in_model(settings, theirs)
    theirs = theirs.double()
    ours = LowRank(32, 3, LoraConfig(scale=2.0)).double()
    block.attention.qkv_slot = ours
    x = noise(2, 5, 32)
    assert error(block.attention(x), theirs(x)) < 1e-12, "both start as the plain attention"
    randomise(ours)
    for place, name in enumerate(("query", "value")):
        layer = getattr(theirs, name)
        layer.lora_A["default"].weight.data.copy_(ours.down[place])
        layer.lora_B["default"].weight.data.copy_(ours.up[place])
    made, expected = block.attention(x), theirs(x)
    assert error(made, expected) < 1e-12
    goal = noise(2, 5, 32, seed=1)
    mine = torch.autograd.grad((made * goal).sum(), [ours.down, ours.up])
    pairs = [
        (getattr(theirs, name).lora_A["default"].weight, getattr(theirs, name).lora_B["default"].weight)
        for name in ("query", "value")
    ]
    other = torch.autograd.grad((expected * goal).sum(), [weight for pair in pairs for weight in pair])
    assert error(mine[0], torch.stack(other[0::2])) < 1e-10
    assert error(mine[1], torch.stack(other[1::2])) < 1e-10
    ours.fold(block)
    block.attention.qkv_slot = EmptySlot()
    for name in ("query", "value"):
        getattr(theirs, name).merge()
    assert error(block.attention(x), theirs(x)) < 1e-12
    assert error(block.attention(x), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_prompts_are_tokens_that_come_and_go(deep: bool) -> None:
    """Prompts are inserted behind the prefix, have no positions, are replaced in each block if
    deep, and are removed from the output.
    """
    config = replace(get_recipe("prompts_tiny"), {"model.method.deep": deep, "model.method.text_tokens": 3})
    model = ReferringSegmenter(config.model).eval()
    randomise(model)
    vision, text = model.vision, model.text
    assert vision.num_prefix_tokens == 1 + 4 + 8
    # Read plainly, block by block.
    x = vision.start(PIXELS).tokens
    context = SlotContext(grid=(4, 4), num_prefix_tokens=13)
    bare = [copy.deepcopy(block) for block in vision.blocks]
    for index, block in enumerate(bare):
        block.token_slot = EmptySlot()
        if index == 0 or deep:
            prompts = vision.blocks[index].token_slot.tokens.expand(2, -1, -1)
            x = torch.cat((x[:, :5], prompts, x[:, 5 if index == 0 else 13 :]), 1)
        x = block(x, context)
    assert error(vision(PIXELS), vision.norm(x)) < 1e-5
    y = text.token_embedding(PHRASES) + text.positions[:9]
    for index, block in enumerate(copy.deepcopy(block) for block in text.blocks):
        block.token_slot = EmptySlot()
        if index == 0 or deep:
            prompts = text.blocks[index].token_slot.tokens.expand(2, -1, -1)
            y = torch.cat((y[:, :1], prompts, y[:, 1 if index == 0 else 4 :]), 1)
        y = block(y, SlotContext())
    y = text.norm(torch.cat((y[:, :1], y[:, 4:]), 1))
    made = text(PHRASES)
    assert error(made.tokens, y) < 1e-5
    assert error(made.sentence, torch.stack([y[0, 4], y[1, 3]]) @ text.projection) < 1e-5
    assert torch.equal(made.padding, PHRASES == 0)
    # The sentence does not depend on how much padding follows it.
    assert error(text(PHRASES[:, :6]).sentence, made.sentence) < 1e-5


def test_the_page_on_methods_has_the_counts() -> None:
    """docs/methods.md states the trained weights of each method, and its recipe."""
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
    for method, (count, _) in COUNTS.items():
        assert f"{count:,}" in page and f"`{method}_b`" in page, method
