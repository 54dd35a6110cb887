"""Exact parameter counts: the paper's tables print them, and published weights are loaded
strictly.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from dcris.config import HeadConfig, ModelConfig, VisionConfig
from dcris.models.adapters.attach import adapters as adapters_of
from dcris.models.adapters.dcris import (
    DcrisConfig,
    DenseCrossAdapter,
    DenseCrossConfig,
    DenseTextAdapter,
    TextAdapter,
    TextAdapterConfig,
)
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe

TABLE_5 = [
    ("[8]", "0.45"),
    ("[6, 11]", "0.90"),
    ("[4, 8, 11]", "1.35"),
    ("[3, 6, 9, 11]", "1.80"),
    ("[3, 5, 7, 9, 11]", "2.25"),
    ("[1, 3, 5, 7, 9, 11]", "2.69"),
    ("[1, 3, 5, 7, 9, 10, 11]", "3.14"),
    ("[1, 3, 4, 5, 7, 9, 10, 11]", "3.59"),
    ("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]", "5.39"),
]


def count(modules: nn.Module | Iterable[nn.Module]) -> int:
    modules = [modules] if isinstance(modules, nn.Module) else modules
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def shapes_only(config: ModelConfig) -> ReferringSegmenter:
    """Return the network without memory for its weights."""
    with torch.device("meta"):
        return ReferringSegmenter(config)


def adapters(model: ReferringSegmenter) -> int:
    return count(adapters_of(model.vision)) + count(adapters_of(model.text))


@pytest.fixture(scope="module")
def base() -> ReferringSegmenter:
    return shapes_only(ModelConfig(method=DcrisConfig()))


@pytest.mark.parametrize(("width", "expected"), [(768, 382_896), (1024, 448_688)])
def test_one_dense_cross_adapter(width: int, expected: int) -> None:
    """The count is the paper's."""
    assert count(DenseCrossAdapter(width, 512, DenseCrossConfig())) == expected


def test_one_text_adapter() -> None:
    """The count is the paper's."""
    assert count(TextAdapter(512, TextAdapterConfig())) == 66_112


def test_frozen_towers(base: ReferringSegmenter) -> None:
    """The counts are those of the published towers."""
    assert count(base.vision) - count(adapters_of(base.vision)) == 86_583_552
    assert count(base.text) - count(adapters_of(base.text)) == 63_428_097


def test_head(base: ReferringSegmenter) -> None:
    """The counts are those of the published head."""
    assert count(base.head.neck) == 10_114_560
    assert count(base.head.decoder) == 7_899_136
    assert count(base.head.projector) == 4_788_737


def test_dcris_b(base: ReferringSegmenter) -> None:
    """DCRIS-B trains 2.69M adapter weights, 1.8% of the towers (table 2)."""
    assert adapters(base) == 2_694_048
    trainable = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    assert trainable == 2_694_048 + 10_114_560 + 7_899_136 + 4_788_737
    paper_frozen = count(base.vision) + count(base.text) - adapters(base) - 77 * 512
    assert f"{2_694_048 / paper_frozen:.1%}" == "1.8%"


def test_dcris_l() -> None:
    """DCRIS-L has the published widths and layers."""
    large = shapes_only(
        ModelConfig(
            vision=VisionConfig(name="dinov2-large", width=1024, depth=24, heads=16),
            method=DcrisConfig(visual=DenseCrossConfig(layers=(2, 6, 10, 14, 18, 22))),
            head=HeadConfig(feature_layers=(8, 16)),
        )
    )
    assert adapters(large) == 3_088_800


@pytest.mark.parametrize(("position", "millions"), TABLE_5)
def test_every_row_of_table_5(position: str, millions: str) -> None:
    """The count of each row of table 5 is the printed one."""
    layers = tuple(int(number) for number in position.strip("[]").split(","))
    model = shapes_only(
        ModelConfig(method=DcrisConfig(visual=DenseCrossConfig(layers=layers), text=TextAdapterConfig(layers=layers)))
    )
    assert adapters(model) == len(layers) * 449_008
    assert f"{adapters(model) / 1e6:.2f}" == millions


def test_one_dense_text_adapter() -> None:
    """The count is that of DETRIS's published class, 64 wide for CLIP's 512."""
    convolutions = sum(
        inputs * kernel * outputs + 3 * outputs  # weight and bias, and the batch norm's two
        for inputs, kernel, outputs in ((64, 1, 32), (96, 1, 4), (4, 3, 16), (112, 1, 4), (4, 5, 16))
    )
    linear = 2 * 512 * 64 + 512 + 64
    assert count(DenseTextAdapter(512, TextAdapterConfig(kind="dense"))) == convolutions + linear == 69_720


@pytest.mark.parametrize(
    ("recipe", "visual", "text"),
    [
        ("detris_b", 6 * 382_896, 6 * 69_720),
        ("detris_l", 6 * 448_688, 6 * 69_720),
        ("detris_l_mixed", 23 * 1_201_680, 11 * 517_520),
    ],
)
def test_detris(recipe: str, visual: int, text: int) -> None:
    """The counts of the DETRIS recipes are those of the published classes."""
    config = get_recipe(recipe).model
    model = shapes_only(config)
    assert count(adapters_of(model.vision)) == visual
    assert count(adapters_of(model.text)) == text
