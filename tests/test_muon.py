"""Muon: its steps for matrices, AdamW's for the rest."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcris.config import TrainConfig
from dcris.models.adapters.barleria import SideBlock
from dcris.models.adapters.compacter import HypercomplexLinear
from dcris.models.adapters.lora import LoraConfig, LowRank
from dcris.models.encoders.blocks import SelfAttention, SwiGLU
from dcris.models.layers.attention import MultiHeadAttention
from dcris.models.segmentation import ReferringSegmenter
from dcris.training.muon import Muon, orthogonalise, weight_matrices
from dcris.training.optimizer import make_optimizer, set_learning_rate
from models import tiny_config


def test_muon_takes_the_steps_of_torchs_muon() -> None:
    """torch.optim.Muon, which computes in bfloat16 and takes matrices alone, is the oracle: also
    for the matrix that a convolution is, and for those that are stored as one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 40),
        nn.Conv2d(8, 16, 3),
        nn.Conv1d(8, 12, 3),  # in DETRIS's text adapter, which AdamW trained
        SelfAttention(24, 2, causal=False),  # full tuning, whose packed projections took one step
        SwiGLU(12),
        SideBlock(24, 3),
        MultiHeadAttention(24, 2),
        LowRank(24, 6, LoraConfig()),
        HypercomplexLinear(32, 16, 4, 4),
    )
    names = dict(model.named_parameters())

    def split(name: str, whole: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices that a weight consists of."""
        if whole.ndim == 3 and name != "2.weight":
            return [*whole]
        packed = {"in_weight": 3, "qkv.weight": 3, "w12.weight": 2}
        return [*whole.flatten(1).chunk(next((n for end, n in packed.items() if name.endswith(end)), 1))]

    alone = {
        name: [nn.Parameter(part.clone()) for part in split(name, whole.detach())]
        for name, whole in names.items()
        if whole.ndim > 1
    }
    assert len(alone) == 17
    optimizer = Muon([{"params": [*model.parameters()]}], weight_matrices(model), 0.01, (0.9, 0.98), 0.1)
    oracle = torch.optim.Muon(
        [part for parts in alone.values() for part in parts],
        lr=0.01,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(3):
        for parameter in names.values():
            parameter.grad = torch.randn_like(parameter)
        for name, parts in alone.items():
            for part, gradient in zip(parts, split(name, names[name].grad), strict=True):
                part.grad = gradient.clone()
        optimizer.step()
        oracle.step()
    for name, parts in alone.items():
        for part, found in zip(parts, split(name, names[name].detach()), strict=True):
            # The root mean square of each of the three steps is 0.2 * 0.01.
            assert (found - part.detach()).square().mean().sqrt() < 0.02 * 3 * 0.2 * 0.01, name


def test_muon_leaves_all_that_is_no_matrix_to_adamw() -> None:
    """Biases, norms and tokens take AdamW's steps exactly, with the learning rate of their part."""
    model = ReferringSegmenter(tiny_config())
    settings = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1, lr_factors={"head": 3})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items() if p not in weight_matrices(model)}
    assert others and len(others) < len(trained)
    torch.manual_seed(0)
    for name, parameter in trained.items():
        parameter.grad = torch.randn_like(parameter)
        if name in others:
            others[name].grad = parameter.grad.clone()
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, settings.lr)
    optimizer.step()
    for head in True, False:
        part = [p for name, p in others.items() if name.startswith("head.") == head]
        torch.optim.AdamW(part, lr=0.03 if head else 0.01, betas=settings.betas, weight_decay=0.1, fused=True).step()
    for name, expected in others.items():
        assert torch.equal(trained[name], expected), name


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16))
def test_orthogonal_directions(count: int, rows: int, columns: int, seed: int) -> None:
    """Singular values come near 1 whatever the shape and scale: a step then moves all directions of
    a matrix alike. Zeros give zeros: a weight without influence must not move."""
    torch.manual_seed(seed)
    matrices = torch.randn(count, rows, columns) * 10.0 ** torch.randint(-3, 4, (count, 1, 1))
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    matrices = u @ torch.diag_embed(values.maximum(0.05 * values.amax(1, keepdim=True))) @ v  # all directions are there
    found = torch.linalg.svdvals(orthogonalise(matrices))
    assert found.min() > 0.5 and found.max() < 1.5
    assert torch.equal(orthogonalise(torch.zeros_like(matrices)), torch.zeros_like(matrices))
