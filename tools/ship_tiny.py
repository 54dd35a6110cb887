"""Write the packaged model `tiny` from a finished run.

    dcris data scenes SCENES --train 10000 --val 0 --test 300 --seed 7
    dcris train dcris_tiny --data SCENES --out RUN \\
        --train.max_steps 5000 --train.ema 0.999 --data.cache_features 1
    python tools/ship_tiny.py RUN --data SCENES --out src/dcris/assets/tiny

The model card gets the scores of what was written, on the scenes of `test`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dcris import Segmenter
from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.data.readers.load import load_references
from dcris.experiments.quickstart import evaluate_both_ways
from dcris.utils.files import write_file
from ship_photos import measures, ship

SCENES = "dcris data scenes data/tiny --train 10000 --val 0 --test 300 --seed 7"


def main() -> None:
    """Write model.safetensors, config.json and README.md with the scores of what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    segmenter = Segmenter.from_pretrained(args.run, device="cpu")
    changes = {"data.cache_features": None}
    ship(segmenter, "tiny", args.out, "", changes)
    model, config = load_checkpoint(args.out)  # as it is shipped: in half precision
    _, scores = evaluate_both_ways(
        model, config, load_references(args.data, "scenes"), "test", device=torch.device("cpu")
    )
    path = args.out / "README.md"
    text = path.read_text(encoding="utf-8").replace("photo.jpg", "scene.jpg").replace("left slice", "left circle")
    write_file(path, text.replace("## Licence", card(scores, config.train.max_steps) + "## Licence"))
    print(json.dumps({name: scores[name] for name in ("miou", "oiou", "prec@0.7", "miou_shuffled", "miou_by_kind")}))


def card(scores: dict[str, Any], steps: int | None) -> str:
    """Return the sections of the model card between the description and the licence."""
    kinds = sorted(scores["miou_by_kind"].items())
    return "\n".join(
        [
            "## Data",
            "",
            "Generated scenes:",
            "",
            "```sh",
            SCENES,
            "```",
            "",
            f"It was trained for {steps} steps on the 10,000 scenes of `train`. `tools/ship_tiny.py` has the commands.",
            "",
            "## Scores",
            "",
            f"Protocol cris, {scores['expressions']} expressions of the 300 scenes of `test`, in percent:",
            "`dcris evaluate tiny --data data/tiny --split test`.",
            "",
            *measures(scores),
            f"| Prec@0.7 | {scores['prec@0.7']:.1f} |",
            f"| mIoU with the phrase of another object of the scene | {scores['miou_shuffled']:.1f} |",
            *(f"| mIoU, kind {name} | {value:.1f} |" for name, value in kinds),
            "",
            "## What it cannot do",
            "",
            "It knows generated scenes and their words only. It **cannot segment photographs**; the model `photos` can.",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    main()
