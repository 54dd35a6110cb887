"""Peak memory of a training step: recipes, batch sizes, with and without checkpointed activations, as a Markdown table.

    python benchmarks/memory.py [--recipes dcris_b dcris_l] [--batches 1 2 32]

Each cell is a process of its own that takes a step, Adam's moments in place, on random towers and blank
samples in float32 on the CPU, and reads its highest resident memory; the process without a model is in it. A batch for which
this machine has not the memory is not run but continued on the straight line through the two largest that were, with a "~".
"""

import argparse
import json
import subprocess
import sys


def measure(recipe: str, batch: int, checkpointed: bool) -> float:
    """Gigabytes (10^9) at the height of a step, in this process."""
    import torch

    from dcris.engine.device import resident_memory
    from dcris.losses import text_to_pixel_loss
    from dcris.model.dcris import DCRIS
    from dcris.recipes import get_recipe

    config = get_recipe(recipe)
    torch.manual_seed(0)
    model = DCRIS(config.model).train()
    model.checkpoint_activations(checkpointed)
    parameters = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    # A step without gradients leaves the moments that a real run has from its second step on.
    for item in parameters:
        item.grad = torch.zeros_like(item)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    side = config.data.image_size
    tokens = torch.zeros(batch, config.data.word_length, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, 1823, 49407
    logits = model(torch.zeros(batch, 3, side, side), tokens)
    text_to_pixel_loss(logits, torch.zeros(batch, 1, side, side)).backward()
    optimizer.step()
    return resident_memory("VmHWM") / 1e9


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["dcris_b", "dcris_l"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 32])
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        recipe, batch, checkpointed = args.cell
        print(json.dumps(measure(recipe, int(batch), checkpointed == "True")))
        return
    import torch

    from dcris.engine.device import free_memory

    batches = sorted(set(args.batches))
    print(f"| recipe | checkpointed activations | {' | '.join(f'batch {batch}' for batch in batches)} |")
    print("|---" * (len(batches) + 2) + "|")
    for recipe in args.recipes:
        for checkpointed in (False, True):
            peaks: dict[int, float] = {}
            cells = []
            for batch in batches:
                if (
                    len(peaks) > 1
                    and (expected := _continued(peaks, batch)) > 0.9 * free_memory(torch.device("cpu")) / 1e9
                ):
                    cells.append(f"~{expected:.0f} GB")
                    continue
                command = [sys.executable, __file__, "--cell", recipe, str(batch), str(checkpointed)]
                peaks[batch] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                cells.append(f"{peaks[batch]:.2f} GB")
            print(f"| `{recipe}` | {'yes' if checkpointed else 'no'} | {' | '.join(cells)} |", flush=True)


def _continued(peaks: dict[int, float], batch: int) -> float:
    """On the line through the two largest batches."""
    (first, low), (second, high) = sorted(peaks.items())[-2:]
    return high + (high - low) / (second - first) * (batch - second)


if __name__ == "__main__":
    main()
