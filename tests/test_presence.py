"""The presence head, and that a model without it is what it was."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dcris.checkpoints.checkpoint import identify_towers, load_checkpoint, save_model
from dcris.config import RunConfig, TrainConfig
from dcris.models.head.presence import PresenceHead
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import Output, ReferringSegmenter
from dcris.recipes import RECIPES
from dcris.training.losses import presence_loss, training_losses
from models import TINY_HEAD, error, images, randomise, tiny_config, tokens_ending_at

WITH_PRESENCE = TINY_HEAD.model_copy(update={"presence": True})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return images(2, 3, 5), tokens_ending_at((3, 5), 7)


def test_a_model_without_it_has_the_weights_and_the_output_that_it_had() -> None:
    """The paper's runs stay bit for bit what they are: the head draws its weights after all
    others."""
    models = []
    for head in (TINY_HEAD, WITH_PRESENCE):
        torch.manual_seed(0)
        models.append(ReferringSegmenter(tiny_config(head=head)))
    plain, other = models
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert state.keys() - plain.state_dict().keys() == {
        f"head.presence.{name}"
        for name in (
            *("query.weight", "query.bias", "hidden.weight", "hidden.bias", "weight", "bias", "temperature"),
            *("attention.in_weight", "attention.in_bias", "attention.out.weight", "attention.out.bias"),
        )
    }
    assert plain(*inputs()).presence is None
    assert torch.equal(plain(*inputs()).logits, other(*inputs()).logits)


def test_only_the_generalised_recipes_have_it() -> None:
    """Every other recipe is a published method, or compared with one."""
    found = {name for name, recipe in RECIPES.items() if recipe.config.model.head.presence}
    assert found == {"dcris_b_grefcoco", "dcris_tiny_generalised"}


@torch.no_grad()
def test_the_logit_is_a_map_of_what_the_sentence_attends_to() -> None:
    """Computed here cell by cell."""
    head = PresenceHead(8, 6, heads=2).double()
    randomise(head)
    head.temperature.fill_(1.7)
    features, sentence = torch.randn(2, 8, 3, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    found = head(features, sentence)
    weights, biases = head.attention.in_weight.chunk(3), head.attention.in_bias.chunk(3)
    for one in range(2):
        query = F.linear(sentence[one], head.query.weight, head.query.bias)
        cells = [features[one, :, row, column] for row in range(3) for column in range(4)]
        (q,), keys, values = (
            [F.linear(x, weight, bias) for x in some]
            for some, weight, bias in zip(([query], cells, cells), weights, biases, strict=True)
        )
        mixed = []
        for part in (slice(0, 4), slice(4, 8)):
            shares = [math.exp(float(q[part] @ key[part]) / 2) for key in keys]
            mixed.append(sum(share / sum(shares) * value[part] for share, value in zip(shares, values, strict=True)))
        attended = F.linear(torch.cat(mixed), head.attention.out.weight, head.attention.out.bias)
        hidden = F.linear(torch.cat((attended, query)), head.hidden.weight, head.hidden.bias).clamp(min=0)
        logit = (hidden @ head.weight + head.bias) / 1.7
        assert float(found[one]) == pytest.approx(float(logit), rel=1e-5)  # the map is computed in float32


def test_a_new_head_finds_both_answers_equally_likely() -> None:
    """Its loss starts at log 2, whatever the decoder computes, and so cannot disturb the masks."""
    torch.manual_seed(0)
    model = ReferringSegmenter(tiny_config(head=WITH_PRESENCE))
    presence = model(*inputs()).presence
    assert presence is not None
    assert presence.shape == (2,)
    assert presence.dtype == torch.float32
    assert (presence == 0).all()


def test_an_object_of_one_pixel_is_present() -> None:
    """Its mask vanishes on the grid of the logits, where nearest neighbour takes one pixel of a
    cell."""
    masks = torch.zeros(3, 1, 56, 56)
    masks[0, 0, 3, 5] = masks[1, 0, 7:30, 7:30] = 1.0
    logits = torch.tensor([0.3, -1.2, 2.0])
    expected = (math.log(1 + math.exp(-0.3)) + math.log(1 + math.exp(1.2)) + math.log(1 + math.exp(2.0))) / 3
    assert float(presence_loss(logits, masks)) == pytest.approx(expected, rel=1e-6)
    output = Output(torch.zeros(3, 1, 8, 8), logits, {"other": torch.tensor(0.25)})
    terms = training_losses(output, masks, TrainConfig(presence=0.5))
    assert float(terms["presence"]) == pytest.approx(0.5 * expected, rel=1e-6)
    assert [*terms] == ["text_to_pixel", "presence", "other"]


def test_masks_of_absent_objects_are_not_learnt() -> None:
    """Where the network is in doubt, an empty mask as the truth would make its masks faint; and
    without a presence head, the truth of every sample counts."""
    logits = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, 0, :4, :4] = 1
    settings = TrainConfig(losses={"dice": 0.5})
    with_head = training_losses(Output(logits, torch.zeros(3), {}), masks, settings)
    alone = training_losses(Output(logits[:1], None, {}), masks[:1], settings)
    for name, value in alone.items():
        assert with_head[name].item() == pytest.approx(value.item() / 3, rel=1e-6), name
    (gradient,) = torch.autograd.grad(with_head["text_to_pixel"] + with_head["dice"], logits)
    assert [bool(each.any()) for each in gradient] == [True, False, False]
    plain = training_losses(Output(logits, None, {}), masks, settings)
    assert plain["text_to_pixel"] > with_head["text_to_pixel"]


def test_it_learns_what_only_one_cell_shows() -> None:
    """A mean over cells would hide a small object; the attention has to find it."""
    torch.manual_seed(0)
    head, directions = PresenceHead(16, 8, heads=2), torch.randn(4, 16)
    sentences, optimizer = torch.randn(4, 8), torch.optim.Adam(head.parameters(), 3e-3)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked, shown = torch.randint(4, (count,)), torch.randint(4, (count,))
        features = 0.1 * torch.randn(count, 16, 36)
        features[torch.arange(count), :, torch.randint(36, (count,))] += directions[shown]
        return features.view(count, 16, 6, 6), sentences[asked], (asked == shown).float()

    for _ in range(600):
        features, sentence, present = draw(64)
        loss = F.binary_cross_entropy_with_logits(head(features, sentence), present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, sentence, present = draw(500)
    assert ((head(features, sentence) > 0) == (present > 0)).float().mean() > 0.95


@pytest.mark.parametrize("bundle", [False, True])
def test_a_saved_model_gives_the_same_presence(tmp_path: Path, bundle: bool) -> None:
    """Prepared for prediction or not; the temperature is part of the file, at full precision."""
    model = ReferringSegmenter(tiny_config(head=WITH_PRESENCE))
    randomise(model)
    assert model.head.presence is not None
    model.head.presence.temperature.fill_(1.2345678)
    with torch.no_grad():
        expected = model(*inputs()).presence
    config = RunConfig(recipe="test", model=model.config, data={"image_size": 56, "word_length": 7})
    path = tmp_path / ("model.safetensors" if bundle else "model")
    save_model(path, model, identify_towers(model), config, with_towers=True, half=False)
    loaded, _ = load_checkpoint(path)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs()).presence, expected)
        assert error(prepare_for_prediction(loaded)(*inputs()).presence, expected) < 1e-4
