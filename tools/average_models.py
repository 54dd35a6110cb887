"""Average the adapters and heads of models that were trained from the same start (Wortsman et al.
2022, "Model soups"):

    python tools/average_models.py MODEL MODEL ... --out FOLDER

The average costs no more to run than one of them, and is often better than each of them. It has
the configuration of the last one. A model is a run, a checkpoint or a packaged model.
"""

import argparse
import sys
from pathlib import Path

import torch

from dcris.checkpoints.backbones import is_downloadable
from dcris.checkpoints.checkpoint import find_checkpoint, load_identified, read_training_images, save_model
from dcris.checkpoints.resolve import locate
from dcris.cli import exit_code
from dcris.models.adapters.attach import trained_state


def main() -> None:
    """Write the average as a model that can be loaded and trained further."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    paths = [find_checkpoint(locate(model)) for model in args.models]
    loaded = [load_identified(path) for path in paths]
    model, config, towers = loaded[-1]
    if any(other.model != config.model or found != towers for _, other, found in loaded):
        parser.error("only models of one architecture on the same towers can be averaged")
    states = [trained_state(each) for each, _, _ in loaded]
    with torch.no_grad():
        for name, value in states[-1].items():
            if value.is_floating_point():  # not batch norm's count of batches
                value.copy_(torch.stack([state[name].float() for state in states]).mean(0))
    images = frozenset().union(*map(read_training_images, paths))
    with_towers = not all(is_downloadable(tower) for tower in model.towers.values())
    save_model(args.out, model, towers, config, with_towers=with_towers, images=images)


if __name__ == "__main__":
    sys.exit(exit_code(main))
