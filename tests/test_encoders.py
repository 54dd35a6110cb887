"""The towers compute what the published networks compute, compared with transformers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from dcris.models.encoders.blocks import SlotContext
from dcris.models.encoders.clip_text import ClipTextTower
from dcris.models.encoders.clip_vision import HUB_CLIP_VISION, ClipVisionTower
from dcris.models.encoders.dino import DinoTower
from dcris.models.encoders.vit import as_map, interpolate_positions
from dcris.models.segmentation import ReferringSegmenter
from models import (
    END,
    START,
    TINY_CLIP_VISION,
    TINY_TEXT,
    TINY_VISION,
    error,
    images,
    randomise,
    tiny_config,
    tokens_ending_at,
)

TOLERANCE = 1e-12  # of float64 numbers about 1


@pytest.fixture
def vision() -> tuple[DinoTower, Dinov2WithRegistersModel]:
    """Return our vision tower and transformers' with the same weights."""
    tower = DinoTower(TINY_VISION).double().eval()
    randomise(tower)
    config = Dinov2WithRegistersConfig(
        hidden_size=tower.config.width,
        num_hidden_layers=tower.config.depth,
        num_attention_heads=tower.config.heads,
        image_size=14 * tower.config.grid,
        patch_size=14,
        num_register_tokens=tower.config.registers,
    )
    weights = {
        "embeddings.cls_token": tower.class_token,
        "embeddings.mask_token": tower.mask_token,
        "embeddings.register_tokens": tower.registers,
        "embeddings.position_embeddings": tower.positions,
        "embeddings.patch_embeddings.projection.weight": tower.patch_embed.weight,
        "embeddings.patch_embeddings.projection.bias": tower.patch_embed.bias,
        "layernorm.weight": tower.norm.weight,
        "layernorm.bias": tower.norm.bias,
    }
    for index, block in enumerate(tower.blocks):
        at = f"encoder.layer.{index}."
        weights[at + "layer_scale1.lambda1"] = block.scale1.gamma
        weights[at + "layer_scale2.lambda1"] = block.scale2.gamma
        for kind in ("weight", "bias"):
            query, key, value = getattr(block.attention.qkv, kind).chunk(3)
            weights[at + f"attention.q_proj.{kind}"] = query
            weights[at + f"attention.k_proj.{kind}"] = key
            weights[at + f"attention.v_proj.{kind}"] = value
            weights[at + f"attention.o_proj.{kind}"] = getattr(block.attention.proj, kind)
            weights[at + f"norm1.{kind}"] = getattr(block.norm1, kind)
            weights[at + f"norm2.{kind}"] = getattr(block.norm2, kind)
            weights[at + f"mlp.fc1.{kind}"] = getattr(block.mlp.fc1, kind)
            weights[at + f"mlp.fc2.{kind}"] = getattr(block.mlp.fc2, kind)
    return tower, filled(Dinov2WithRegistersModel(config), weights)


@pytest.fixture
def text() -> tuple[ClipTextTower, CLIPTextModelWithProjection]:
    """Return our text tower and transformers' with the same weights."""
    tower = ClipTextTower(TINY_TEXT).double().eval()
    randomise(tower)
    config = CLIPTextConfig(
        vocab_size=tower.config.vocabulary,
        hidden_size=tower.config.width,
        intermediate_size=4 * tower.config.width,
        projection_dim=tower.config.sentence_width,
        num_hidden_layers=tower.config.depth,
        num_attention_heads=tower.config.heads,
        max_position_embeddings=tower.config.length,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=0,
    )
    weights = {
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positions,
        "text_model.final_layer_norm.weight": tower.norm.weight,
        "text_model.final_layer_norm.bias": tower.norm.bias,
        "text_projection.weight": tower.projection.T,
    }
    for index, block in enumerate(tower.blocks):
        at = f"text_model.encoder.layers.{index}."
        for kind in ("weight", "bias"):
            query, key, value = getattr(block.attention.qkv, kind).chunk(3)
            weights[at + f"self_attn.q_proj.{kind}"] = query
            weights[at + f"self_attn.k_proj.{kind}"] = key
            weights[at + f"self_attn.v_proj.{kind}"] = value
            weights[at + f"self_attn.out_proj.{kind}"] = getattr(block.attention.proj, kind)
            weights[at + f"layer_norm1.{kind}"] = getattr(block.norm1, kind)
            weights[at + f"layer_norm2.{kind}"] = getattr(block.norm2, kind)
            weights[at + f"mlp.fc1.{kind}"] = getattr(block.mlp.fc1, kind)
            weights[at + f"mlp.fc2.{kind}"] = getattr(block.mlp.fc2, kind)
    return tower, filled(CLIPTextModelWithProjection(config), weights)


def filled(oracle: torch.nn.Module, weights: dict[str, Tensor]) -> torch.nn.Module:
    """Return transformers' model with exactly these weights."""
    oracle = oracle.double().eval()
    # Newer releases have buffers (position ids) that are not weights; they are kept.
    assert {name for name, _ in oracle.named_parameters()} == set(weights)
    oracle.load_state_dict({**oracle.state_dict(), **{name: weight.detach() for name, weight in weights.items()}})
    return oracle


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4, 4), (6, 6), (5, 7), (3, 2), (2, 8)],
    ids=["the table's own grid", "finer", "not square, 70x98", "coarser", "the table's count, another shape"],
)
@torch.no_grad()
def test_vision_tower_is_dinov2(vision: tuple[DinoTower, Dinov2WithRegistersModel], rows: int, columns: int) -> None:
    """Features at every block equal those of transformers."""
    tower, oracle = vision
    pixels = images(2, rows, columns).double()
    expected = oracle(pixels, output_hidden_states=True)
    start = tower.start(pixels)
    state = tower.advance(start, feature_layers=range(len(tower.blocks)))
    assert state.grid == (rows, columns)
    assert len(state.layer_outputs) == len(tower.blocks)
    for ours, theirs in zip((start.tokens, *state.layer_outputs), expected.hidden_states, strict=True):
        assert error(ours, theirs) < TOLERANCE
    assert error(tower.finish(state), expected.last_hidden_state) < TOLERANCE
    assert error(tower(pixels), expected.last_hidden_state) < TOLERANCE


@pytest.fixture
def clip_vision() -> tuple[ClipVisionTower, CLIPVisionModelWithProjection]:
    """Return our CLIP vision tower and transformers' with the same weights."""
    tower = ClipVisionTower(TINY_CLIP_VISION).double().eval()
    randomise(tower)
    config = CLIPVisionConfig(
        hidden_size=tower.config.width,
        intermediate_size=4 * tower.config.width,
        projection_dim=tower.config.out_width,
        num_hidden_layers=tower.config.depth,
        num_attention_heads=tower.config.heads,
        image_size=tower.config.patch * tower.config.grid,
        patch_size=tower.config.patch,
    )
    layout = HUB_CLIP_VISION
    weights = {}
    for name, value in tower.state_dict().items():
        parts = layout.parts(name)
        whole = value.T if name in layout.transposed else value
        weights |= dict(zip(parts, whole.chunk(len(parts)), strict=True)) if len(parts) > 1 else {parts[0]: whole}
    return tower, filled(CLIPVisionModelWithProjection(config), weights)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(3, 3), (6, 6), (5, 7), (2, 1)],
    ids=["the table's own grid", "finer", "not square", "coarser"],
)
@torch.no_grad()
def test_clip_vision_tower_is_clip(
    clip_vision: tuple[ClipVisionTower, CLIPVisionModelWithProjection], rows: int, columns: int
) -> None:
    """Features at every block equal those of transformers."""
    tower, oracle = clip_vision
    patch = tower.config.patch
    pixels = torch.randn(2, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(0)).double()
    expected = oracle(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    start = tower.start(pixels)
    state = tower.advance(start, feature_layers=range(len(tower.blocks)))
    assert state.grid == (rows, columns)
    for ours, theirs in zip((start.tokens, *state.layer_outputs), expected.hidden_states, strict=True):
        assert error(ours, theirs) < TOLERANCE
    finished = tower(pixels)
    assert error(finished[:, 0], expected.image_embeds) < TOLERANCE
    # CLIP projects the class token only; here the patches are projected too.
    normed = oracle.vision_model.post_layernorm(expected.last_hidden_state)
    assert error(finished, oracle.visual_projection(normed)) < TOLERANCE


@torch.no_grad()
def test_a_text_tower_can_be_stopped(text: tuple[ClipTextTower, CLIPTextModelWithProjection]) -> None:
    """Running the blocks in parts gives the same features as running them at once."""
    tower, _ = text
    tokens = tokens_ending_at((3, 5, 2), 7)
    state = tower.start(tokens)
    for stop in (1, 1, 3):
        state = tower.advance(state, stop)
        assert state.step == stop
    picked, whole = tower.finish(state.select(torch.tensor([2, 0]))), tower(tokens)
    for name in ("tokens", "sentence", "padding"):
        # Not to the last digit: products of other shapes may round otherwise.
        assert error(getattr(picked, name).double(), getattr(whole, name)[[2, 0]].double()) < TOLERANCE


@pytest.mark.parametrize(("ends", "length"), [((1, 4, 6), 7), ((2, 11, 5), 12), ((2, 1, 2), 3)])
@torch.no_grad()
def test_text_tower_is_clip(
    text: tuple[ClipTextTower, CLIPTextModelWithProjection], ends: tuple[int, ...], length: int
) -> None:
    """Token and sentence features equal those of transformers. A wrong activation alone would
    change them by per cents.
    """
    tower, oracle = text
    tokens = tokens_ending_at(ends, length)
    ours, theirs = tower(tokens), oracle(tokens)
    assert error(ours.tokens, theirs.last_hidden_state) < TOLERANCE
    assert error(ours.sentence, theirs.text_embeds) < TOLERANCE
    assert ours.padding.sum(1).tolist() == [length - 1 - end for end in ends]


@torch.no_grad()
def test_padding_does_not_change_what_a_phrase_means(text: tuple[ClipTextTower, CLIPTextModelWithProjection]) -> None:
    """Features of the words do not depend on the number of padding tokens."""
    tower, _ = text
    tokens = tokens_ending_at((3, 5), 12)
    short, long = tower(tokens[:, :6]), tower(tokens)
    # Not bit for bit: matrix products of other sizes add in another order.
    assert error(short.sentence, long.sentence) < TOLERANCE
    assert error(short.tokens, long.tokens[:, :6]) < TOLERANCE
    picked = long.select(torch.tensor([1, 0, 1]))
    assert torch.equal(picked.sentence, long.sentence[[1, 0, 1]])
    assert torch.equal(picked.tokens, long.tokens[[1, 0, 1]])
    assert torch.equal(picked.padding, long.padding[[1, 0, 1]])


def bicubic_offset(table: np.ndarray, size: int) -> np.ndarray:
    """Convolve cubically (a = -0.75) along the first axis at offset positions; borders are
    repeated.
    """
    side = len(table)

    def weight(distance: float) -> float:
        d = abs(distance)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    rows = []
    for target in range(size):
        place = (target + 0.5) * side / (size + 0.1) - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        rows.append(sum(weight(place - at) * table[min(max(at, 0), side - 1)] for at in near))
    return np.stack(rows)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (5, 7), (6, 4), (12, 2)])
def test_offset_rule_places_positions_as_the_published_code_does(rows: int, columns: int) -> None:
    """The published DETRIS weights were trained with these interpolated positions."""
    table = torch.randn(1, 1 + 4 * 4, 5, generator=torch.Generator().manual_seed(0))
    square = table[0, 1:].double().reshape(4, 4, 5).numpy()
    expected = bicubic_offset(bicubic_offset(square, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
    resized = interpolate_positions(table, (rows, columns), "offset")
    assert torch.equal(resized[:, :1], table[:, :1])
    assert error(resized[0, 1:].double(), torch.from_numpy(expected).reshape(rows * columns, 5)) < 1e-5


def test_the_position_rules_differ() -> None:
    """The three interpolation rules give different positions."""
    table = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    offset, exact = (interpolate_positions(table, (32, 32), rule) for rule in ("offset", "exact"))
    assert offset.shape == exact.shape == (1, 1 + 32 * 32, 3)
    assert error(offset, exact) > 0.01
    plain = interpolate_positions(table, (32, 32), "plain")
    assert error(offset, plain) > 0.001
    assert error(exact, plain) > 0.001
    for rule in ("offset", "exact", "plain"):
        assert interpolate_positions(table, (37, 37), rule) is table


@pytest.fixture
def model() -> ReferringSegmenter:
    network = ReferringSegmenter(tiny_config()).double()
    randomise(network)
    return network.eval()


@torch.no_grad()
def test_an_image_is_encoded_once_for_all_its_phrases(model: ReferringSegmenter) -> None:
    """Sharing an image's features between expressions does not change the results."""
    pixels = images(2, 4, 5).double()
    tokens = tokens_ending_at((3, 6, 2), 7)
    image_of_phrase = torch.tensor([1, 0, 1])
    state = model.encode_images(pixels)
    assert state.step == 3  # block 0 and block 1's attention precede the first adapter
    logits = model.segment(state.select(image_of_phrase), model.encode_text(tokens)).logits
    assert logits.shape == (3, 1, 16, 20)
    # Not to the last digit: products of other shapes may round otherwise, which depends on the
    # processor.
    assert error(logits, model(pixels[image_of_phrase], tokens)[0]) < TOLERANCE
    one_by_one = [
        model(pixels[i : i + 1], row[None])[0] for i, row in zip(image_of_phrase.tolist(), tokens, strict=True)
    ]
    assert error(logits, torch.cat(one_by_one)) < TOLERANCE


@torch.no_grad()
def test_the_mlp_beside_the_first_adapter_is_shared_too(model: ReferringSegmenter) -> None:
    """The MLP next to the first adapter does not read the text and is computed once per image."""
    tokens, rows = tokens_ending_at((3, 6, 2), 7), []
    model.vision.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    state = model.encode_images(images(1, 4, 5).double())
    assert rows == [1]
    shared = model.segment(state.select(torch.zeros(3, dtype=torch.long)), model.encode_text(tokens)).logits
    assert rows == [1]
    assert (
        error(
            shared,
            model.segment(
                replace(state, mlp_out=None).select(torch.tensor([0, 0, 0])), model.encode_text(tokens)
            ).logits,
        )
        < TOLERANCE
    )
    assert rows == [1, 3]


@torch.no_grad()
def test_without_visual_adapters_the_whole_tower_is_shared() -> None:
    """Without visual adapters, the vision tower runs to its end once per image."""
    model = ReferringSegmenter(tiny_config(visual_adapter=None)).eval()
    state = model.encode_images(images(1, 3, 3))
    assert state.step == 2 * len(model.vision.blocks)
    tokens = tokens_ending_at((2,), 4)
    assert torch.equal(model.segment(state, model.encode_text(tokens)).logits, model(images(1, 3, 3), tokens).logits)


@torch.no_grad()
def test_half_blocks_add_up_to_blocks(model: ReferringSegmenter) -> None:
    """Running half blocks one by one gives the same result as whole blocks."""
    tower, pixels = model.vision, images(2, 3, 5).double()
    text = model.encode_text(tokens_ending_at((3, 5), 6)).tokens
    start = tower.start(pixels)
    whole, outputs = start.tokens, []
    context = SlotContext(grid=start.grid, num_prefix_tokens=tower.num_prefix_tokens, text=text)
    for block in tower.blocks:
        whole = block(whole, context)
        outputs.append(whole)
    state = start
    for step in range(1, 2 * len(tower.blocks) + 1):
        state = tower.advance(state, step, text=text, feature_layers=(0, 2))
        assert state.step == step
    assert torch.equal(state.tokens, whole)
    assert len(state.layer_outputs) == 2
    assert all(torch.equal(output, outputs[index]) for output, index in zip(state.layer_outputs, (0, 2), strict=True))
    assert torch.equal(tower.finish(state), tower(pixels, text))


@pytest.mark.parametrize("size", [(56, 57), (55, 56), (13, 14)])
def test_sizes_that_do_not_divide_are_refused(model: ReferringSegmenter, size: tuple[int, int]) -> None:
    """Images whose sides are not multiples of the patch size are an error."""
    with pytest.raises(ValueError, match=f"{size[0]}, {size[1]}.*patches of 14"):
        model.encode_images(torch.zeros(1, 3, *size).double())


@pytest.mark.parametrize("batch", [1, 2])
def test_a_map_of_tokens_is_one_whose_channels_come_last(batch: int) -> None:
    """The map of a single image is channels_last, so that convolutions do not copy it."""
    tokens = torch.arange(batch * 7 * 4.0).view(batch, 7, 4)[:, 1:]
    features = as_map(tokens, (2, 3))
    assert torch.equal(features[-1, :, 1, 2], tokens[-1, 5])
    convolved = torch.nn.functional.conv2d(features, torch.ones(5, 4, 1, 1))
    assert convolved.stride(1) == 1
