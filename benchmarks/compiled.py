"""Measure prediction with `torch.compile` and freezing against the products placed by hand.

    python benchmarks/compiled.py [--precision bfloat16] [--rounds 9] [--json FILE]

All networks are DCRIS-B with the same random weights on one image and one expression; they take
turns within one process, after they were compiled. "by hand" is how dcris predicts
(dcris.models.optimize). "compiled" is the plain network with torch's freezing: weights become
constants that are folded, cast and packed by the compiler. Compiling takes minutes and needs a C++
compiler.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dcris.experiments.bench import machine, ratio, take_turns
from dcris.models.optimize import prepare_for_prediction
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import get_recipe
from dcris.utils.device import autocast, choose_device, choose_precision
from dcris.utils.files import write_json
from dcris.utils.text_tables import markdown


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each network (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    device = choose_device("cpu")
    dtype = choose_precision(args.precision, device)
    config = get_recipe("dcris_b")
    torch.manual_seed(0)
    model = ReferringSegmenter(config.model).eval()
    images, tokens = torch.randn(1, 3, 448, 448), torch.ones(1, 17, dtype=torch.int64)
    tokens[0, 3] = config.model.text.vocabulary - 1

    def predict(network: Callable[..., object]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad(), autocast(device, dtype):
                return network(images, tokens)[0].float()  # type: ignore[index]

        return run

    torch._inductor.config.freezing = True
    networks: dict[str, Callable[[], torch.Tensor]] = {
        "plain": predict(model),
        "by hand": predict(prepare_for_prediction(model, dtype)),
        "compiled": predict(torch.compile(model)),
        "folded, then compiled": predict(torch.compile(prepare_for_prediction(model))),
    }
    reference, compiling = networks["plain"](), {}
    for name, run in networks.items():
        begin = time.perf_counter()
        worst = float((run() - reference).abs().max() / reference.abs().max())
        compiling[name] = time.perf_counter() - begin
        print(f"{name}: first call {compiling[name]:.0f} s, logits differ by {worst:.1e} of the largest", flush=True)
    seconds = take_turns(networks, args.rounds, device)
    rows = [
        {"network": name, "first_s": compiling[name], "s": median(taken), "by_hand": ratio(taken, seconds["by hand"])}
        for name, taken in seconds.items()
    ]
    cells = [[row["network"], f"{row['first_s']:.0f} s", f"{row['s']:.3f} s", f"{row['by_hand']:.2f}"] for row in rows]
    print(markdown(("network", "first call", "prediction", "of the time by hand"), cells))
    about = machine(device) | {"precision": args.precision}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
