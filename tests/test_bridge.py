"""Interleaved methods (ETRIS, BarLeRIa): tests beyond those of every method."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import Cris
from dcris.models.adapters.attach import adapters
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from models import error, randomise
from runs import CPU, quick_config, run_training

METHODS = ("etris", "barleria")
TOKENS = torch.tensor([[1, 5, 9, 128, 0, 0], [1, 7, 128, 0, 0, 0], [1, 6, 4, 8, 10, 128]])


def quick(method: str, steps: int = 4) -> RunConfig:
    config = replace(get_recipe(f"{method}_tiny"), {"data.image_size": 56})
    return config.model_copy(update={"train": quick_config(steps).train})


def images(count: int) -> Tensor:
    """Return images of 3 by 4 patches."""
    return torch.randn(count, 3, 42, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bridge") / request.param
    run_training(quick(request.param), scenes_root, out)
    return out


@pytest.mark.parametrize(
    ("recipe", "adapters_", "bridge"),
    [
        ("etris_vit_b", 598_592 + 677 * 768 + 77 * 512, 598_592),
        ("etris_tiny", 69_952, 69_952),
        # Flows: shift, scale and four planes, in 24 halves of either tower.
        ("barleria_b", 24 * (10 * 768 + 4 + 10 * 512 + 4) + 3_192_800, 3_192_800),
        ("barleria_tiny", 24 * (10 * 128 + 4 + 10 * 96 + 4) + 194_544, 194_544),
    ],
)
def test_trained_weights(recipe: str, adapters_: int, bridge: int) -> None:
    """The numbers of trained weights are as published; the published bridger has 598,592."""
    with torch.device("meta"):
        model = ReferringSegmenter(get_recipe(recipe).model)
    assert model.count_weights()["adapters"] == adapters_
    assert model.bridge is not None
    assert sum(parameter.numel() for parameter in model.bridge.parameters()) == bridge


@pytest.mark.parametrize("method", METHODS)
def test_the_steps_may_be_called_apart(method: str) -> None:
    """Encoding an image once for several expressions, and an expression for several images, does
    not change results.
    """
    model = ReferringSegmenter(get_recipe(f"{method}_tiny").model).double()
    randomise(model)
    pictures = images(2).double()
    image_of_phrase, phrases = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        state, text = model.encode_images(pictures), model.encode_text(TOKENS)
        apart = model.segment(state.select(image_of_phrase), text.select(phrases)).logits
        whole = model(pictures[image_of_phrase], TOKENS[phrases])[0]
    assert apart.shape == (4, 1, 12, 16)
    assert error(apart, whole) < 1e-9 * whole.abs().max()
    assert error(apart[:1], apart[3:]) < 1e-9 * whole.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_both_towers_see_each_other(method: str) -> None:
    """The vision features depend on the text. ETRIS's text features depend on the image, BarLeRIa's
    do not.
    """
    model = ReferringSegmenter(get_recipe(f"{method}_tiny").model).double()
    randomise(model)
    pictures = images(2).double()
    assert model.bridge is not None
    joined = []
    with torch.no_grad():
        for picture, tokens in ((0, TOKENS[:1]), (1, TOKENS[:1]), (0, TOKENS[1:2])):
            state, words = model.encode_images(pictures[picture : picture + 1]), model.encode_text(tokens)
            joined.append(model.bridge.fuse(model.vision, model.text, state, words, (4, 8)))
    first, other_image, other_phrase = joined
    ours, theirs = first.state.layer_outputs[0], other_phrase.state.layer_outputs[0]
    assert not torch.equal(ours[:, 5:], theirs[:, 5:])
    assert torch.equal(first.text.tokens, other_image.text.tokens) == (method == "barleria")


def test_the_evaluator_takes_it_as_any_other(run: Path, scenes_root: Path) -> None:
    """The evaluator needs no special case for interleaved methods."""
    model, config = load_checkpoint(run)
    table = load_references(scenes_root, "scenes")
    queries = all_queries(table.split("test"))
    answers = list(predict_queries(model, queries, config, Cris(), device=CPU))
    assert len(answers) == len(queries)


def test_a_bridge_is_no_part_of_the_towers() -> None:
    """A bridge is not counted as frozen and is not part of a tower's fingerprint."""
    model = ReferringSegmenter(get_recipe("etris_tiny").model)
    assert not adapters(model.vision)
    assert not adapters(model.text)
    assert (
        model.count_weights()["frozen"] == ReferringSegmenter(get_recipe("fixed_tiny").model).count_weights()["frozen"]
    )
