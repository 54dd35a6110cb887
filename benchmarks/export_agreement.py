"""Compare the masks of an exported model with PyTorch's: IoU and seconds by batch size.

    python benchmarks/export_agreement.py MODEL --images FOLDER [--count 20] [--batches 1 4]
    [--phrases 4] python benchmarks/export_agreement.py dcris_b --images FOLDER
    python benchmarks/export_agreement.py runs/quickstart --data runs/quickstart/scenes
        [--split test] [--int8] [--export DIR]

MODEL is a model as for `dcris predict`, or the name of a recipe, which gets random weights and the
median probability of the first image as threshold. The model is exported to DIR, unless DIR has an
export. With --data the export is scored on a data set, for comparison with `dcris evaluate`. ONNX
Runtime is run by examples/onnx_segment.py, which does not use dcris.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcris import Segmenter
from dcris.data.images import read_image
from dcris.data.masks import union_mask
from dcris.data.readers.load import load_references
from dcris.evaluation.metrics import Overlap, summarise
from dcris.inference.export_onnx import export_onnx
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import RECIPES, get_recipe

PHRASES = ("left person", "the red one", "second from the right", "the thing in front")


def random_segmenter(recipe: str) -> Segmenter:
    """Return a recipe's model with random weights; initial weights contain many zeros."""
    config = get_recipe(recipe)
    model = ReferringSegmenter(config.model)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=source)
            if weight.dim() >= 2:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.copy_(1 + 0.2 * noise if name.endswith(("weight", "gamma")) else 0.1 * noise)
    return Segmenter(model, config, device="cpu", precision="float32")


def example() -> Any:
    """Import examples/onnx_segment.py."""
    spec = importlib.util.spec_from_file_location(
        "onnx_segment", Path(__file__).parents[1] / "examples/onnx_segment.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(
    segmenter: Segmenter, export: Path, paths: list[Path], phrases: Sequence[str], batch: int, threshold: float
) -> dict[str, Any]:
    """Return the masks' IoU and area as a share of the image, and seconds per image."""
    onnx_segment = example()
    settings, *graphs = onnx_segment.load(export)
    model = ({**settings, "threshold": threshold}, *graphs)
    ious, covered, seconds = [], [], {"pytorch": 0.0, "onnx": 0.0}
    for start in range(0, len(paths), batch):
        images: list[Any] = [read_image(path) for path in paths[start : start + batch]]
        begin = time.perf_counter()
        theirs = segmenter.predict(images, phrases, threshold=threshold)
        between = time.perf_counter()
        ours, _ = onnx_segment.segment(model, images, phrases)
        seconds["onnx"] += time.perf_counter() - between
        seconds["pytorch"] += between - begin
        for masks, predictions in zip(ours, theirs, strict=True):
            for mask, prediction in zip(masks, predictions, strict=True):
                union = (mask | prediction.mask).sum()
                ious.append(float((mask & prediction.mask).sum() / union) if union else 1.0)
                covered.append(float(prediction.mask.mean()))
    return {
        "batch": batch,
        "masks": len(ious),
        "neither_empty_nor_full": sum(0 < share < 1 for share in covered),
        "covered": [round(min(covered), 3), round(float(np.median(covered)), 3), round(max(covered), 3)],
        "min_iou": round(min(ious), 6),
        "mean_iou": round(float(np.mean(ious)), 6),
        **{f"{name}_seconds": round(value / len(paths), 2) for name, value in seconds.items()},
    }


def score(segmenter: Segmenter, export: Path, root: Path, split: str) -> dict[str, Any]:
    """Return the export's scores on a split, as `dcris evaluate --protocol cris` computes them."""
    onnx_segment = example()
    model = onnx_segment.load(export)
    overlaps = []
    for reference in load_references(root, segmenter.config.data.dataset).split(split):
        truth = union_mask(reference.segmentations, reference.image_size).astype(bool)
        phrases = [expression.text for expression in reference.expressions]
        (masks,), _ = onnx_segment.segment(model, [read_image(reference.image_path)], phrases)
        overlaps += [Overlap(int((mask & truth).sum()), int((mask | truth).sum())) for mask in masks]
    return {"split": split, "expressions": len(overlaps), **summarise(overlaps)}


def main() -> None:
    """Export if needed, then print a line of JSON for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model or recipe")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of images to compare on")
    source.add_argument("--data", type=Path, help="folder of a data set to score on")
    parser.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    parser.add_argument("--count", type=int, default=20, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--phrases",
        type=int,
        choices=range(1, len(PHRASES) + 1),
        default=len(PHRASES),
        help="per image (default: %(default)s)",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images at a time (default: 1 4)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="folder of the export (default: temporary)")
    parser.add_argument("--int8", action="store_true", help="export with int8 weights")
    args = parser.parse_args()
    found = args.images.rglob("*") if args.images else ()
    paths = sorted(path for path in found if path.suffix in {".jpg", ".png"})[: args.count]
    random = args.model in RECIPES
    if random:
        segmenter = random_segmenter(args.model)
    else:
        segmenter = Segmenter.from_pretrained(args.model, device="cpu", precision="float32")
    phrases, threshold = PHRASES[: args.phrases], segmenter.protocol.threshold
    if random:
        predictions = segmenter.predict(paths[0], phrases, scores=True)
        threshold = float(np.median([each.probabilities for each in predictions if each.probabilities is not None]))
    with tempfile.TemporaryDirectory() as folder:
        export = args.export or Path(folder) / "export"
        if not (export / "model.json").exists():
            begin = time.perf_counter()
            differences = export_onnx(segmenter, export, int8=args.int8)
            print(json.dumps({"export_seconds": round(time.perf_counter() - begin), **differences}), flush=True)
        print(json.dumps({"mb": round(sum(file.stat().st_size for file in export.iterdir()) / 1e6, 1)}), flush=True)
        if args.data:
            print(json.dumps(score(segmenter, export, args.data, args.split)), flush=True)
        for batch in args.batches if args.images else ():
            print(json.dumps(compare(segmenter, export, paths, phrases, batch, threshold)), flush=True)


if __name__ == "__main__":
    main()
