"""Measure the speed of each optimisation against a plain implementation.

    python benchmarks/tricks.py [--rounds 5] [--device cuda] [--json FILE]

Each row is one optimisation at the shapes of DCRIS-B. Both implementations take turns within one
process; the ratio is the median over the turns of the plain one's seconds divided by the optimised
one's. The test named in the row checks that both compute the same.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.experiments.bench import machine, ratio, take_turns
from dcris.models.encoders.blocks import MLP
from dcris.models.encoders.vit import as_map
from dcris.models.head.decoder import DecoderLayer
from dcris.models.head.neck import ConvNormReLU
from dcris.models.head.projector import KERNEL, apply_kernels, finer_convolution
from dcris.models.layers import attention_cpu as cpu_attention
from dcris.models.layers.attention import MultiHeadAttention, attend
from dcris.models.layers.dropout import Dropout
from dcris.models.optimize import cast_frozen, prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.utils.device import autocast, choose_device, choose_precision, precision_of
from dcris.utils.files import write_json
from dcris.utils.text_tables import markdown

Task = Callable[[], object]
GRID = 32


@dataclass(frozen=True, slots=True)
class Optimisation:
    """An optimisation and the plain implementation."""

    what: str
    plain: Task
    optimised: Task
    test: str
    part: str
    """The computation that is timed."""


def _trained(task: Callable[..., Tensor], *inputs: Tensor) -> Task:
    """Return a task that computes the function and its gradients."""
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> None:
        result = task(*leaves)
        torch.autograd.grad(result, leaves, torch.ones_like(result))

    return run


def _predicted(task: Callable[..., object], *inputs: Tensor) -> Task:
    def run() -> None:
        with torch.no_grad():
            task(*inputs)

    return run


def _maps_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1) @ value


def _interpolate_first(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="bilinear"), weight, padding=1)


def _convolve_in_groups(x: Tensor, kernels: Tensor, bias: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    x = F.conv2d(x, weight[:, :, None, None], before)
    grouped = kernels.view(batch, -1, KERNEL, KERNEL)
    return F.conv2d(x.reshape(1, -1, height, width), grouped, bias, padding=1, groups=batch).transpose(0, 1)


def optimisations(device: torch.device, dtype: torch.dtype) -> Iterator[Optimisation]:
    """Yield the optimisations, one at a time."""

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind)

    blocks = [random(1, 12, GRID**2 + 5, 64) for _ in range(3)]
    yield Optimisation(
        "attention without whole maps",
        _predicted(_maps_by_hand, *blocks),
        _predicted(attend, *blocks),
        "test_encoders.py",
        "a vision block's attention",
    )
    with torch.no_grad():
        own = cpu_attention.pays(*blocks, 0.0)
    if own:
        yield Optimisation(
            "own attention on CPUs that have bfloat16 and no AMX",
            _predicted(F.scaled_dot_product_attention, *blocks),
            _predicted(attend, *blocks),
            "test_attention_cpu.py",
            "a vision block's attention",
        )

    branch, gamma = random(1, GRID**2 + 5, 768), random(768, kind=torch.float32)
    residual = random(1, GRID**2 + 5, 768, kind=torch.float32)
    yield Optimisation(
        "LayerScale and sum in one pass",
        _predicted(lambda: residual + branch * gamma),
        _predicted(lambda: torch.addcmul(residual, branch, gamma)),
        "test_encoders.py",
        "a vision block's branch",
    )

    if device.type == "cpu":
        pixels = random(2, GRID**2, 512)
        yield Optimisation(
            "dropout from 16-bit random numbers",
            _trained(nn.Dropout(0.1), pixels),
            _trained(Dropout(0.1), pixels.detach().clone()),
            "test_the_quick_dropout_is_dropout",
            "one of a decoder layer's four, trained at batch 2",
        )
        heads = [random(2, 8, GRID**2, 64) for _ in range(3)]
        yield Optimisation(
            "own attention on CPUs, dropout drawn again in the backward pass",
            _trained(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), *heads),
            _trained(lambda q, k, v: cpu_attention.attend(q, k, v, 0.1), *heads),
            "test_attention_cpu.py",
            "a decoder layer's self-attention, trained at batch 2",
        )
        words = [random(2, 8, 17, 64) for _ in range(2)]
        mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
        yield Optimisation(
            "attention to words with dropout, not in float32",
            _trained(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1),
                heads[0].detach().clone(),
                *words,
            ),
            _trained(
                lambda q, k, v: attend(q, k, v, mask=mask, dropout=0.1),
                heads[0].detach().clone(),
                *(word.detach().clone() for word in words),
            ),
            "test_pixels_attend_to_words_and_not_to_padding",
            "a decoder layer's cross attention, trained at batch 2",
        )

    layer = DecoderLayer(512, 8, 512, 0.0).to(device, dtype)
    pixels, places, words = random(1, 512, GRID**2).transpose(1, 2), random(GRID**2, 512), random(1, 17, 512)
    padding = torch.zeros(1, 17, dtype=torch.bool, device=device)
    yield Optimisation(
        "tokens contiguous in memory",
        _predicted(lambda: layer(pixels, places, words, words, padding)),
        _predicted(lambda: layer(pixels.contiguous(), places, words, words, padding)),
        "test_decoder_is_section_3_4",
        "a decoder layer",
    )

    x = random(1, 512, GRID, GRID).to(memory_format=torch.channels_last)
    weight = random(512, 512, KERNEL, KERNEL)
    for part, wrap in (("predicted", _predicted), ("trained", _trained)):
        yield Optimisation(
            f"convolution taps before interpolation, {part}",
            wrap(_interpolate_first, x.detach().clone(), weight.detach().clone()),
            wrap(finer_convolution, x.detach().clone(), weight.detach().clone()),
            "test_finer_convolution_is_interpolation_then_convolution",
            "the projector's first convolution",
        )

    side, half = 4 * GRID, 256
    fine = random(2, half, side, side).to(memory_format=torch.channels_last)
    kernels, bias = random(2, half * KERNEL**2), random(2)
    weight, before = random(half, half), random(half)
    yield Optimisation(
        "1x1 convolution folded into the dynamic kernel, no groups",
        _predicted(_convolve_in_groups, fine, kernels, bias, weight, before),
        _predicted(lambda *x: apply_kernels(x[0], x[1], x[2], (x[3], x[4])), fine, kernels, bias, weight, before),
        "test_projector_is_equation_5",
        "the projector's end, batch 2",
    )

    gate = MultiHeadAttention(512, 8).to(device, dtype)
    pixels, sentence = random(1, GRID**2, 512), random(1, 512)
    yield Optimisation(
        "attention to one key is its value",
        _predicted(lambda pixels, sentence: gate(pixels, sentence[:, None], sentence[:, None]), pixels, sentence),
        _predicted(lambda pixels, sentence: gate.single_key(sentence), pixels, sentence),
        "test_one_key_needs_no_queries",
        "one of the neck's three",
    )

    unit = ConvNormReLU(768, 512, 1).to(device, dtype).eval()
    tokens = random(1, GRID**2 + 5, 768)[:, 5:]
    yield Optimisation(
        "channels-last token maps",
        _predicted(lambda: unit(tokens.transpose(1, 2).unflatten(-1, (GRID, GRID)))),
        _predicted(lambda: unit(as_map(tokens, (GRID, GRID)))),
        "test_a_map_of_tokens_is_one_whose_channels_come_last",
        "the neck's first convolution",
    )

    config = get_recipe("dcris_b")
    torch.manual_seed(0)
    model = ReferringSegmenter(config.model).to(device)
    images, tokens = random(1, 3, 448, 448, kind=torch.float32), torch.ones(1, 17, dtype=torch.int64, device=device)
    tokens[0, 3] = config.model.text.vocabulary - 1
    with torch.no_grad():
        text = model.encode_text(tokens)
        levels = [random(1, config.model.vision.width, GRID, GRID, kind=torch.float32) for _ in range(3)]
    prepared = prepare_for_prediction(model)
    yield Optimisation(
        "batch norms folded",
        _predicted(lambda: model.head(levels, text)),
        _predicted(lambda: prepared.head(levels, text)),
        "test_it_answers_as_the_model_does",
        "the head",
    )
    yield Optimisation(
        "cached position embeddings",
        _predicted(lambda: model.vision.positions_on((GRID, GRID))),
        _predicted(lambda: prepared.vision.positions_on((GRID, GRID))),
        "test_it_answers_as_the_model_does",
        "the positions' interpolation",
    )

    if dtype != torch.float32:
        held = prepare_for_prediction(model, dtype)

        def predict(network: nn.Module) -> Task:
            def run() -> None:
                with torch.no_grad(), autocast(device, dtype):
                    network(images, tokens)

            return run

        yield Optimisation(
            "weights stored in the working precision",
            predict(prepared),
            predict(held),
            "test_it_answers_as_the_model_does",
            "a prediction",
        )
        if device.type == "cpu":
            x = random(1, GRID**2 + 5, 768)
            plain = MLP(768, nn.GELU()).to(device, dtype)
            yield Optimisation(
                "weights packed for oneDNN, GELU fused",
                _predicted(plain, x),
                _predicted(held.vision.blocks[0].mlp, x),
                "test_a_block_is_packed_and_answers_the_same",
                "a vision block's MLP",
            )
            yield Optimisation(
                "the same in the decoder",
                _predicted(layer, pixels, places, words, words, padding),
                _predicted(held.head.decoder.layers[0], pixels, places, words, words, padding),
                "test_the_head_is_packed_and_answers_the_same",
                "a decoder layer",
            )
            x = random(1, 512, GRID, GRID).to(memory_format=torch.channels_last)
            convolution = prepared.head.neck.coordinate_conv[1].to(dtype)
            yield Optimisation(
                "the same for convolutions, ReLU fused",
                _predicted(convolution, x),
                _predicted(held.head.neck.coordinate_conv[1], x),
                "test_the_head_is_packed_and_answers_the_same",
                "one of the neck's 3x3 convolutions",
            )
            weight = random(512, 512, KERNEL, KERNEL)
            yield Optimisation(
                "the same in the projector",
                _predicted(finer_convolution, x, weight, random(512)),
                _predicted(held.head.projector.refine1[0], x),
                "test_the_head_is_packed_and_answers_the_same",
                "the projector's first convolution",
            )
            x = random(2, GRID**2 + 5, 768)
            frozen = ReferringSegmenter(config.model)
            cast_frozen(frozen, dtype)
            yield Optimisation(
                "the same without GELU, trained",
                _trained(plain.requires_grad_(False), x),
                _trained(frozen.vision.blocks[0].mlp, x.detach().clone()),
                "test_gradients_go_through_packed_layers",
                "a vision block's MLP, trained at batch 2",
            )

    model.train()

    def step(wanted: bool) -> Task:
        seen = images.clone().requires_grad_(wanted)  # if wanted, gradients reach the whole tower

        def run() -> None:
            with autocast(device, dtype):
                result = model(seen, tokens)[0].float().sum()
            result.backward()
            seen.grad = None

        return run

    yield Optimisation(
        "no gradients before the first adapter",
        step(True),
        step(False),
        "test_nothing_is_kept_before_the_first_adapter",
        "a training step, batch 1",
    )

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    loop, fused = (torch.optim.Adam(trained, lr=0.0, foreach=False, fused=fused) for fused in (False, True))
    yield Optimisation("Adam in one kernel", loop.step, fused.step, "torch's own", "the update")


def main() -> None:
    """Measure all optimisations and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    rows = []
    for each in optimisations(device, dtype):
        seconds = take_turns({"plain": each.plain, "optimised": each.optimised}, args.rounds, device)
        rows.append(
            {
                "what": each.what,
                "of": each.part,
                "plain_s": median(seconds["plain"]),
                "optimised_s": median(seconds["optimised"]),
                "ratio": ratio(seconds["plain"], seconds["optimised"]),
                "test": each.test,
            }
        )
    cells = [
        [
            row["what"],
            row["of"],
            *(f"{1e3 * row[key]:.3g} ms" for key in ("plain_s", "optimised_s")),
            f"{row['ratio']:.2f}",
            row["test"],
        ]
        for row in rows
    ]
    about = machine(device) | {"precision": precision_of(dtype)}
    print(markdown(("optimisation", "of", "plain", "optimised", "ratio", "test"), cells))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
