"""Peak memory of a training step: recipes, batch sizes, with and without checkpointed activations, as a Markdown table.

    python benchmarks/memory.py [--recipes dcris_b dcris_l] [--batches 1 2 32] [--precision float32]

Each cell is a process of its own that takes two steps on random towers and a made-up batch on the CPU, and reads its highest
resident memory, in 10^9 bytes; the process without a model is in it. A batch for which this machine has not the memory is not
run but continued on the straight line through the two largest that were, with a "~".
"""

import argparse

import torch

from dcris.experiments.bench import in_own_process, peak_of_training, random_towers
from dcris.recipes import get_recipe
from dcris.utils.device import free_memory


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["dcris_b", "dcris_l"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 32])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    batches = sorted(set(args.batches))
    print(f"| recipe | checkpointed activations | {' | '.join(f'batch {batch}' for batch in batches)} |")
    print("|---" * (len(batches) + 2) + "|")
    for recipe in args.recipes:
        config = random_towers(get_recipe(recipe))
        for checkpointed in (False, True):
            train = config.train.model_copy(update={"checkpoint_activations": checkpointed})
            run = config.model_copy(update={"train": train}).model_dump_json()
            peaks: dict[int, float] = {}
            cells = []
            for batch in batches:
                free = 0.9 * free_memory(torch.device("cpu")) / 1e9
                if len(peaks) > 1 and (expected := _continued(peaks, batch)) > free:
                    cells.append(f"~{expected:.0f} GB")
                    continue
                peaks[batch] = in_own_process(peak_of_training, run, batch, "cpu", args.precision) * 2**30 / 1e9
                cells.append(f"{peaks[batch]:.2f} GB")
            print(f"| `{recipe}` | {'yes' if checkpointed else 'no'} | {' | '.join(cells)} |", flush=True)


def _continued(peaks: dict[int, float], batch: int) -> float:
    """On the line through the two largest batches."""
    (first, low), (second, high) = sorted(peaks.items())[-2:]
    return high + (high - low) / (second - first) * (batch - second)


if __name__ == "__main__":
    main()
