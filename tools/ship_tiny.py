"""Write the packaged model `tiny` from a finished run.

    dcris data scenes SCENES --train 15000 --val 200 --test 300 --seed 7 --generalised
    dcris train dcris_tiny_generalised --data SCENES --out RUN \\
        --train.max_steps 6000 --train.lr 5e-3 --train.ema 0.999
    dcris evaluate RUN --data SCENES --split test --protocol grefcoco --calibrate-on val
    python tools/ship_tiny.py RUN --data SCENES --out src/dcris/assets/tiny

The model card gets the scores of what was written, on the scenes of `test`.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dcris import Segmenter
from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.cli import exit_code
from dcris.data.readers.load import load_references
from dcris.experiments.quickstart import evaluate_both_ways, evaluate_generalised
from dcris.utils.files import write_file
from ship_photos import measures, ship

SCENES = "dcris data scenes data/tiny --train 15000 --val 200 --test 300 --seed 7 --generalised"

GENERALISED = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "miou_single": "mIoU, one object",
    "miou_several": "mIoU, several objects",
    "presence_auroc": "presence: AUROC",
    "presence_ece": "presence: calibration error",
}


def main() -> None:
    """Write model.safetensors, config.json and README.md with the scores of what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    segmenter = Segmenter.from_pretrained(args.run, device="cpu")
    ship(segmenter, "tiny", args.out, "", {"data.refine": "guided"})
    model, config = load_checkpoint(args.out)  # as it is shipped: in half precision
    table, device = load_references(args.data, "scenes"), torch.device("cpu")
    _, generalised = evaluate_generalised(model, config, table.split("test"), device=device)
    one = replace(table, references=tuple(each for each in table.references if len(each.segmentations) == 1))
    _, scores = evaluate_both_ways(model, config, one, "test", device=device)
    path = args.out / "README.md"
    text = path.read_text(encoding="utf-8").replace("photo.jpg", "scene.jpg").replace("left dog", "left circle")
    write_file(path, text.replace("## Licence", card(scores, generalised, config.train.max_steps) + "## Licence"))
    print(json.dumps({name: scores[name] for name in ("miou", "oiou", "prec@0.7", "miou_shuffled", "miou_by_kind")}))
    print(json.dumps(generalised))


def card(scores: dict[str, Any], generalised: dict[str, Any], steps: int | None) -> str:
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
            f"It was trained for {steps} steps on the 15,000 scenes of `train`. `tools/ship_tiny.py` has the commands.",
            "",
            "## Scores",
            "",
            f"Protocol cris, in percent, {scores['expressions']} expressions for one object of the 300 scenes of `test`.",
            "Without `--generalised` the scenes have these only: `dcris evaluate tiny --data data/tiny --split test`.",
            "",
            *measures(scores),
            f"| Prec@0.7 | {scores['prec@0.7']:.1f} |",
            f"| mIoU with the phrase of another object of the scene | {scores['miou_shuffled']:.1f} |",
            *(f"| mIoU, kind {name} | {value:.1f} |" for name, value in kinds),
            "",
            "Protocol grefcoco, with the expressions for several objects and for none:",
            "`dcris evaluate tiny --data data/tiny --split test --protocol grefcoco`.",
            "",
            "| measure | value |",
            "|---|---|",
            *(f"| {title} | {generalised[key]:.1f} |" for key, title in GENERALISED.items()),
            *(
                f"| presence: AUROC, {name} | {value:.1f} |"
                for name, value in generalised["presence_auroc_by_kind"].items()
            ),
            "",
            "## What it cannot do",
            "",
            "It knows generated scenes and their words only. It **cannot segment photographs**; the model `photos` can.",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
