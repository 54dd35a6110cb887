"""Compare speed and memory of DETRIS-B with the published code.

    python benchmarks/against_detris.py --reference CHECKOUT

CHECKOUT is a clone of github.com/jiaqihuang01/DETRIS (MIT). It runs unchanged; modules that it
imports but does not need here are replaced by empty ones (tests/golden/make_detris.py). Both
networks have the same random weights and take turns within one process. The reported ratio is the
median over the turns of the ratios of their seconds. Each row is a process of its own, because the
allocator's state after one row changes the page faults of the next. Peak memory is measured in one
process for each network. Prediction is timed from tensors of image and tokens to logits; training
is the published loop's forward pass with loss, backward pass and Adam.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[1] / "tests"), str(_HERE.parents[1] / "tests" / "golden")]

BATCH = 2
TARGETS = {
    "cpu": {
        "predict float32": (1.15, 1.3),
        "predict bfloat16": (1.3, 1.6),
        "predict by default": (2.8, 4),
        "predict int8": (4, 5),
        "train float32": (1.35, 1.7),
        "train bfloat16": (1.35, 1.7),
        "memory float32": (0.6, 0.5),
        "memory bfloat16": (0.6, 0.5),
    },
    "cuda": {"train by default": (3, 5)},
}
"""By device and row: the required ratio and the goal."""


def _networks(reference: Path, only: str | None = None) -> dict[str, Any]:
    """Return the two networks with the same weights as "theirs" and "ours"."""
    import make_detris

    from dcris.checkpoints.convert_detris import rename_tensors
    from dcris.models.segmentation import ReferringSegmenter
    from dcris.recipes import get_recipe
    from detris_layout import VARIANTS, weights

    networks: dict[str, Any] = {}
    if only != "ours":
        sys.path.insert(0, str(reference))
        make_detris.stub_imports()
        networks["theirs"] = make_detris.build(VARIANTS["base"], dropout=True)
    if only != "theirs":
        config = get_recipe("detris_b").model
        ours = ReferringSegmenter(config)
        ours.load_state_dict(rename_tensors(weights(VARIANTS["base"]), config, "the random weights"))
        networks["ours"] = ours
    return networks


def _inputs(batch: int, device: Any) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 448, 448, generator=generator)
    tokens = torch.zeros(batch, 17, dtype=torch.int64)
    tokens[:, :4] = torch.tensor([49406, 1823, 10274, 49407])
    masks = (torch.rand(batch, 1, 448, 448, generator=generator) > 0.5).float()
    return images.to(device), tokens.to(device), masks.to(device)


def _prediction(name: str, network: Any, device: Any, dtype: Any) -> Callable[[], Any]:
    import torch

    from dcris.evaluation.evaluator import segment_in_passes
    from dcris.evaluation.preparation import run_example
    from dcris.models.optimize import prepare_for_prediction
    from dcris.recipes import get_recipe
    from dcris.utils.device import autocast

    images, tokens, _ = _inputs(1, device)

    example = partial(run_example, config=get_recipe("detris_b"))
    prepared = prepare_for_prediction(network, dtype, example=example) if name == "ours" else None

    def theirs() -> Any:
        network.eval()
        with torch.no_grad(), autocast(device, dtype):
            return network(images, tokens)

    def ours() -> Any:
        with torch.no_grad():
            return next(segment_in_passes(prepared, images, tokens, device, dtype)).logits

    return theirs if name == "theirs" else ours


def _training(name: str, network: Any, device: Any, dtype: Any, batch: int = BATCH) -> Callable[[], Any]:
    import torch

    from dcris.models.optimize import cast_frozen
    from dcris.training.losses import text_to_pixel_loss
    from dcris.utils.device import autocast

    images, tokens, masks = _inputs(batch, device)
    if name == "ours":
        cast_frozen(network, dtype)  # permanent, so each precision has a network of its own
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=name == "ours" or None)

    def step() -> float:
        network.train()
        if name == "ours":  # where each one's own loop resets gradients
            optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            if name == "theirs":
                _, _, loss = network(images, tokens, masks)
            else:
                logits = network(images, tokens)[0]
        if name == "ours":
            loss = text_to_pixel_loss(logits, masks)
        if name == "theirs":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _in_a_process(args: argparse.Namespace, *task: str) -> Any:
    """Return what `_alone` measures in a process of its own."""
    command = [sys.executable, str(_HERE), "--reference", str(args.reference), "--device", args.device]
    command += ["--rounds", str(args.rounds), "--batch", str(args.batch), *["--cpu-time"] * args.cpu_time]
    done = subprocess.run([*command, "--alone", *task], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the process for {' '.join(task)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _alone(args: argparse.Namespace) -> None:
    """Print one row of the table ("time") or one network's peak memory in GiB of training."""
    import torch

    from dcris.experiments.bench import peak_memory
    from dcris.utils.device import choose_device

    who, what, precision = args.alone
    device = choose_device(args.device)
    if who == "time":
        found: Any = _time(args, device, what, precision)
    else:
        network = _networks(args.reference, who)[who].to(device)
        step = _training(who, network, device, getattr(torch, precision), args.batch)
        for _ in range(2):
            step()
        found = peak_memory(device)
    print(json.dumps(found))


def _time(args: argparse.Namespace, device: Any, what: str, precision: str) -> dict[str, Any]:
    import torch

    from dcris.experiments.bench import matrix_products, ratio, take_turns
    from dcris.utils.device import choose_precision, working_dtype

    by_default = precision == "default"
    theirs = ours = choose_precision("auto", device) if by_default else getattr(torch, precision)
    cudnn = True
    if by_default or precision == "int8":
        # The published code disables cuDNN and uses float16 on a GPU, float32 on a CPU.
        theirs, cudnn = (torch.float16, False) if device.type == "cuda" else (torch.float32, True)
    networks = {name: network.to(device) for name, network in _networks(args.reference).items()}
    make = partial(_training, batch=args.batch) if what == "train" else _prediction
    product, operations = matrix_products(device, working_dtype(ours, device))
    tasks = {
        "theirs": _under(cudnn, make("theirs", networks["theirs"], device, theirs)),
        "ours": make("ours", networks["ours"], device, ours),
        "product": product,
    }
    seconds = take_turns(tasks, args.rounds, device, time.process_time if args.cpu_time else time.perf_counter)
    ceiling = operations / median(seconds["product"])
    # Operations counted in the published network: 316 GFLOP an image, about 720 a training sample.
    work = 720e9 * args.batch if what == "train" else 316e9
    return {
        "row": f"{what} by default" if by_default else f"{what} {precision}",
        "theirs": median(seconds["theirs"]),
        "ours": median(seconds["ours"]),
        "unit": "s",
        "ratio": ratio(seconds["theirs"], seconds["ours"]),
        "turns": {name: seconds[name] for name in networks},
        "ceiling_gflops": ceiling / 1e9,
        "share_theirs": work / median(seconds["theirs"]) / ceiling,
        "share_ours": work / median(seconds["ours"]) / ceiling,
    }


def main() -> None:
    """Measure all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, metavar="CHECKOUT", help="clone of the published code")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each network (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=BATCH, help="batch size of the training step (default: %(default)s)"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("float32", "bfloat16", "int8"),
        help="precisions to measure; int8 is prediction, against float32 (default: float32, and on processors "
        "that support them bfloat16 and int8)",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time instead of wall-clock time, for a busy machine"
    )
    parser.add_argument(
        "--only", nargs="+", choices=("predict", "train", "memory"), help="parts to measure (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.reference / "model" / "segmenter.py").is_file():
        parser.error(f"{args.reference} is not a clone of DETRIS: model/segmenter.py is missing")
    if args.alone:
        _alone(args)
    else:
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    import torch

    from dcris.experiments.bench import machine
    from dcris.utils.device import choose_device, choose_precision, multiplies_int8
    from dcris.utils.files import write_json
    from dcris.utils.text_tables import markdown

    device = choose_device(args.device)
    default = choose_precision("auto", device)
    quick = device.type == "cpu" and multiplies_int8()
    precisions = args.precisions or ["float32"] + ["bfloat16"] * (default == torch.bfloat16) + ["int8"] * quick
    trained = [precision for precision in precisions if precision != "int8"]
    wanted = args.only or ["predict", "train", "memory"]
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    for what in ("predict", "train"):
        # On a CPU the published code trains in float32, which has a row already.
        defaults = device.type == "cuda" or (default != torch.float32 and what == "predict")
        some = precisions if what == "predict" else trained
        for precision in [*some, *["default"] * defaults] if what in wanted else []:
            note(_in_a_process(args, "time", what, precision))
    for precision in trained if "memory" in wanted else []:
        theirs, ours = (_in_a_process(args, name, "train", precision) for name in ("theirs", "ours"))
        note({"row": f"memory {precision}", "theirs": theirs, "ours": ours, "unit": "GiB", "ratio": ours / theirs})
    targets = TARGETS[device.type]
    header = ("what", "theirs", "ours", "ratio", "required", "goal", "share of products, theirs", "ours")
    cells = []
    for row in rows:
        required, goal = targets.get(row["row"], (None, None))
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("share_theirs", "share_ours")]
        figures = [f"{row[key]:.2f} {row['unit']}" for key in ("theirs", "ours")]
        cells.append([row["row"], *figures, f"{row['ratio']:.2f}", str(required or ""), str(goal or ""), *shares])
    about = machine(device)
    print(markdown(header, cells))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        clock = "process_time" if args.cpu_time else "perf_counter"
        write_json(args.json, {"machine": about, "batch": args.batch, "clock": clock, "rows": rows})


def _under(cudnn: bool, task: Callable[[], object]) -> Callable[[], object]:
    import torch

    def run() -> object:
        with nullcontext() if cudnn else torch.backends.cudnn.flags(enabled=False):
            return task()

    return run


if __name__ == "__main__":
    main()
