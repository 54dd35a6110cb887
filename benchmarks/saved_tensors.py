"""List what the forward pass of a training step keeps for the backward pass, by line of code.

    python benchmarks/saved_tensors.py [--recipe dcris_b] [--batch-size 2] [--precision float32]

Weights are left out. A tensor that several operations keep is counted once, where it is kept first.
"""

import argparse
import re
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dcris
from dcris.experiments.bench import TrainingStep, random_towers
from dcris.recipes import RECIPES, get_recipe
from dcris.training.losses import text_to_pixel_loss
from dcris.utils.device import autocast
from dcris.utils.text_tables import markdown

_PACKAGE = Path(dcris.__file__).parent


class SavedTensors:
    """Counts the bytes that autograd keeps, by module (without numbers) and line of code."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._seen = {weight.data_ptr() for weight in model.parameters() if weight.layout == torch.strided}
        self._running: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor, unless it or another view of its numbers was counted."""
        if tensor.layout != torch.strided or {tensor.data_ptr(), tensor.untyped_storage().data_ptr()} & self._seen:
            return tensor
        storage = tensor.untyped_storage()
        self._seen.add(storage.data_ptr())
        module = re.sub(r"\.\d+", ".N", self._running[-1]) if self._running else "loss"
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_PACKAGE)]
        line = f"{Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].lineno}"
        self.bytes[module, line] += storage.nbytes()
        self.counts[module, line] += 1
        return tensor


def saved_tensors(recipe: str, batch_size: int, dtype: torch.dtype) -> SavedTensors:
    """Run the forward pass of one training step on the CPU, and count what it keeps."""
    device = torch.device("cpu")
    step = TrainingStep(random_towers(get_recipe(recipe)), batch_size, device, dtype)
    found = SavedTensors(step.model)
    kept: list[Any] = []  # so that no storage's address is used twice
    with torch.autograd.graph.saved_tensors_hooks(found.keep, lambda tensor: tensor):
        with autocast(device, dtype):
            output = step.model(step.images, step.tokens)
        kept.append(text_to_pixel_loss(output.logits, step.masks))
    return found


def main() -> None:
    """Print the table, largest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="dcris_b", choices=RECIPES)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=20)
    arguments = parser.parse_args()
    found = saved_tensors(arguments.recipe, arguments.batch_size, getattr(torch, arguments.precision))
    rows = [
        [module, line, str(found.counts[module, line]), f"{size / 2**20:.1f}"]
        for (module, line), size in found.bytes.most_common(arguments.rows)
    ]
    shown = sum(size for _, size in found.bytes.most_common(arguments.rows))
    total = found.bytes.total()
    rows += [["others", "", "", f"{(total - shown) / 2**20:.1f}"], ["all", "", "", f"{total / 2**20:.1f}"]]
    print(markdown(("module", "line", "tensors", "MiB"), rows))


if __name__ == "__main__":
    main()
