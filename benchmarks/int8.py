"""Compare the masks of int8 and bfloat16 with those of float32, on a CPU.

    python benchmarks/int8.py masks --images FOLDER [--count 20]
    python benchmarks/int8.py scores MODEL --data ROOT [--splits test] [--small-layers]

`masks` is for DCRIS-B in the published layout, with random weights in which four channels of the
vision tower are 20 to 50 times as large as the others, as DINOv2's are. A mask is what lies above
the median probability in float32. `scores` evaluates a trained model, with `--small-layers` also
those layers in int8 that are too small to gain by it.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from dcris import Segmenter
from dcris.data.readers.load import load_references
from dcris.evaluation.evaluate import evaluate
from dcris.experiments.bench import random_towers
from dcris.models import int8
from dcris.models.int8 import Int8Linear
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.utils.arguments import Precision

PHRASE = "left person"
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
LARGE = {3: 20.0, 100: 30.0, 401: 40.0, 650: 50.0}
"""Channels of the residual stream, and by what they are multiplied."""
CONTENT = 50.0
"""By what the embedding of patches is multiplied. Initial weights make maps in which positions
outweigh the photograph."""


def enlarge(model: ReferringSegmenter) -> None:
    """Multiply the photograph's share of the residual stream, and the large channels."""
    places, factors = list(LARGE), torch.tensor(list(LARGE.values()))
    tower = model.vision
    with torch.no_grad():
        tower.patch_embed.weight *= CONTENT
        tower.patch_embed.weight[places] *= factors[:, None, None, None]
        for tensor in (tower.patch_embed.bias, tower.positions, tower.class_token, tower.registers):
            tensor[..., places] *= factors
        for block in tower.blocks:
            for scale in (block.scale1, block.scale2):
                scale.gamma[places] *= factors


def forms(segmenter: Segmenter) -> dict[str, int]:
    """Count the vision tower's linear layers by what they became."""
    (prepared,) = segmenter._sets.values()
    names = {True: "int8", False: "int8, smoothed"}
    found = Counter(
        names[module.factors is None] for module in prepared.ready.vision.modules() if isinstance(module, Int8Linear)
    )
    return {**found, "working precision": 4 * len(prepared.ready.vision.blocks) - found.total()}


def masks(folder: Path, count: int) -> dict[str, object]:
    """Return each precision's mask IoU with float32."""
    torch.manual_seed(0)
    config = random_towers(get_recipe("dcris_b"))
    model = ReferringSegmenter(config.model)
    enlarge(model)
    segmenters = {name: Segmenter(model, config, device="cpu", precision=name) for name in PRECISIONS}
    found: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for path in sorted(folder.rglob("*.jpg"))[:count]:
        exact = None
        for name, segmenter in segmenters.items():
            (prediction,) = segmenter.predict(path, PHRASE, scores=True)
            assert prediction.probabilities is not None
            if exact is None:
                threshold = np.median(prediction.probabilities)
                exact = prediction.probabilities > threshold
            mask = prediction.probabilities > threshold
            found[name].append(float((mask & exact).sum() / (mask | exact).sum()))
    rows = {name: {"mean": np.mean(values), "min": min(values)} for name, values in found.items()}
    return {"photographs": len(found["int8"]), "iou": rows, "forms": forms(segmenters["int8"])}


def scores(model: str, root: Path, splits: list[str]) -> dict[str, object]:
    """Return each precision's mIoU in percent, over all splits together."""
    rows = {}
    for name in PRECISIONS:
        overlaps = []
        for split in splits:
            done = evaluate(
                model,
                lambda config: load_references(root, config.data.dataset),
                split,
                device="cpu",
                precision=name,
                keep_masks=False,
            )
            overlaps += [result.overlap.iou for result in done.results]
        rows[name] = {"miou": 100 * np.mean(overlaps), "expressions": len(overlaps)}
    return rows


def main() -> None:
    """Print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("masks")
    part.add_argument("--images", type=Path, required=True)
    part.add_argument("--count", type=int, default=20)
    part = parts.add_parser("scores")
    part.add_argument("model")
    part.add_argument("--data", type=Path, required=True)
    part.add_argument("--splits", nargs="+", default=["test"])
    part.add_argument("--small-layers", action="store_true")
    args = parser.parse_args()
    if args.part == "scores" and args.small_layers:
        int8._LEAST_TOKENS = int8._LEAST_OUTPUTS = 1
    found = masks(args.images, args.count) if args.part == "masks" else scores(args.model, args.data, args.splits)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
