"""The command line. Each command is a function here that reads its arguments and calls the library.

Libraries that take long to import are imported inside the commands, so that `dcris --help` answers at once. Standard argparse
is used rather than a library that derives options from types: settings are `--SECTION.FIELD VALUE` pairs checked by the
configuration itself, and every error has to be one plain sentence.
"""

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dcris.errors import DcrisError
from dcris.version import __version__

if TYPE_CHECKING:
    from dcris.config import RunConfig

BAD_INPUT, INTERRUPTED = 2, 130
_LONGEST_LINE = 1000
Command = Callable[[argparse.Namespace], None]
_CHECKPOINT = (
    "a run's or checkpoint's directory, a .safetensors bundle, owner/name on the Hub, or a published model: "
    "detris-{b,l}-{refcoco,refcoco+,refcocog-umd,refcocog-google}, detris-l-mixed"
)
_ROOT = "the folder of the data sets, or a data set of one's own: a .jsonl file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for bad arguments or input, 130 after Ctrl-C."""
    try:
        args, rest = _parser().parse_known_args(arguments)
        if rest and not getattr(args, "takes_settings", False):
            raise DcrisError(f"`dcris {args.name}` does not take {rest[0]!r}; see `dcris {args.name} --help`")
        args.settings = rest
        with warnings.catch_warnings():
            # Pillow's, about metadata that nobody here reads; what makes a picture unreadable is an error.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            args.run(args)
    except DcrisError as error:
        print(f"dcris: {_one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
        advice = "ask for less at once, such as a smaller batch, picture or model"
        print(f"dcris: {_one_line(f'there is not enough memory ({reason}); {advice}')}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("dcris: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `dcris recipes | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        # What no reader foresees: names that are too long, folders of others, links in a circle, disks that fail.
        print(f"dcris: {_one_line(f'cannot use {error.filename}: {error.strerror}; check that path')}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or a GPU had no memory left. torch has a class of its own for GPUs alone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _printable(text: str) -> str:
    """Text with names in it that files of strangers chose: what a terminal would obey, or cannot write, is spelt out."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _say(text: str) -> None:
    print(_printable(text))


def _one_line(text: str) -> str:
    text = _printable(text).replace("\n", "\\n")
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE // 2]} ... {text[-_LONGEST_LINE // 2 :]}"


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence."""

    def error(self, message: str) -> NoReturn:
        raise DcrisError(f"{message}; see `{self.prog} --help`")


def _parser() -> _Parser:
    parser = _Parser(
        prog="dcris",
        description="Referring image segmentation: a photograph and a phrase in, the mask of that object out.",
        epilog="example: dcris quickstart --out runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dcris {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    add = _adder(commands, "dcris ")
    quick = add("quickstart", _quickstart, "generate scenes, train, evaluate, segment, report", "--out runs/quickstart")
    quick.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything (%(default)s)")
    quick.add_argument("--seed", type=_natural, default=0, help="of the scenes and the training (%(default)s)")
    _device(quick, precision=False)

    data = commands.add_parser("data", help="get and check data sets, make generated ones", allow_abbrev=False)
    add_data = _adder(data.add_subparsers(title="commands", metavar="COMMAND", required=True), "dcris data ")
    fetch = add_data(
        "fetch",
        _data_fetch,
        "get a data set's annotations and just the photographs it needs",
        "refcoco --out data --splits val testA",
        "What is there already is kept, so the same command goes on after an interruption. The annotations come from the "
        "Hugging Face Hub; the photographs keep the licences of those who took them.",
    )
    fetch.add_argument("dataset", metavar="DATASET", help="refcoco, refcoco+ or refcocog (umd)")
    fetch.add_argument("--out", type=Path, required=True, metavar="ROOT", help="the folder of the data sets")
    fetch.add_argument("--splits", nargs="+", metavar="SPLIT", help="train, val, testA, testB or test (all of them)")
    fetch.add_argument(
        "--photographs",
        metavar="PATH_OR_URL",
        help="a train2014 folder or zip to copy from, or the address of a mirror (COCO's own server)",
    )
    fetch.add_argument("--connections", type=_natural, default=8, metavar="N", help="at a time (%(default)s)")
    check = add_data("check", _data_check, "validate a data set", "ROOT --dataset refcoco --split-by unc")
    check.add_argument("root", type=Path, metavar="ROOT", help=_ROOT)
    _data_set(check)
    check.add_argument("--deep", action="store_true", help="decode every photograph, not its header alone")
    check.add_argument("--json", action="store_true", help="print JSON")
    scenes = add_data(
        "scenes", _data_scenes, "generate scenes in the REFER layout", "data/scenes --train 5000 --seed 1"
    )
    scenes.add_argument("out", type=Path, metavar="OUT", help="the root to make")
    for split, count in (("train", 5000), ("val", 200), ("test", 300)):
        scenes.add_argument(f"--{split}", type=_natural, default=count, metavar="N", help="scenes (%(default)s)")
    scenes.add_argument("--seed", type=_natural, default=0, help="same seed, same files (%(default)s)")
    scenes.add_argument("--side", type=_natural, default=112, help="pixels of a picture's side (%(default)s)")
    coco = add_data(
        "import-coco",
        _data_import_coco,
        "make a data set of one's own from COCO annotations",
        "instances.json --images photos --out my.jsonl",
        "Each object's phrase is its own, or its category's name where no other object of the photograph has that.",
    )
    coco.add_argument("annotations", type=Path, metavar="INSTANCES.json", help="as annotation tools export it")
    coco.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="where its file names begin")
    coco.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="beside the photographs or above")
    coco.add_argument(
        "--phrases", type=Path, metavar="FILE", help="JSON or CSV: phrases by annotation id or category name"
    )
    coco.add_argument("--val", type=_share, default=0.1, metavar="SHARE", help="of the photographs (%(default)s)")
    coco.add_argument("--seed", type=_natural, default=0, help="which photographs those are (%(default)s)")
    coco.add_argument("--split", metavar="NAME", help="put everything into this split")
    coco.add_argument("--ambiguous", choices=("skip", "keep"), default="skip", help="phrases that fit several objects")
    coco.add_argument("--crowds", choices=("skip", "keep"), default="skip", help="annotations with iscrowd")

    train = add(
        "train",
        _train,
        "train a recipe's adapters and head",
        "dcris_tiny --data data/scenes --out runs/tiny --train.lr 1e-3",
        "Further settings of the recipe are given as --SECTION.FIELD VALUE; `dcris recipes --show RECIPE` lists them.",
    )
    train.set_defaults(takes_settings=True)
    train.add_argument("recipe", metavar="RECIPE", help="see `dcris recipes`, or a config.json of an earlier run")
    _data_root(train)
    _data_set(train)
    train.add_argument("--out", type=Path, required=True, help="the run's directory")
    train.add_argument(
        "--from", dest="start", metavar="CKPT", help="start from its adapters and head; the model has to be the same"
    )
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    train.add_argument(
        "--tracker",
        action="append",
        choices=("tensorboard", "wandb"),
        help="show curves and predictions there, beside OUT/log.jsonl; may be given several times",
    )
    _device(train)

    evaluate = add("evaluate", _evaluate, "score a checkpoint", "runs/tiny --data data/scenes --split test")
    evaluate.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT)
    _data_root(evaluate)
    _data_set(evaluate)
    evaluate.add_argument("--split", default="val", help="(%(default)s)")
    _protocol(evaluate)
    evaluate.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="photographs read at a time; changes no result (8)"
    )
    evaluate.add_argument("--out", type=Path, help="result file (JSON), with intervals and scores by group of phrases")
    evaluate.add_argument("--report", type=Path, help="HTML file with pictures of good and bad predictions")
    evaluate.add_argument("--answers", type=Path, help="JSON Lines file with every mask, for `dcris compare`")
    _device(evaluate)

    score = add(
        "score",
        _score,
        "score anybody's masks",
        "masks --data ROOT --dataset refcoco --split testA --protocol lavt",
        "PREDICTIONS is a folder of <sent_id>.png, a COCO result .json with sent_id, an .npz of arrays named by sent_id, or "
        "what `dcris evaluate --answers` wrote.",
    )
    score.add_argument("predictions", type=Path, nargs="+", metavar="PREDICTIONS", help="several give a table's rows")
    _data_root(score)
    _data_set(score)
    score.add_argument("--split", default="val", help="(%(default)s)")
    _protocol(score)
    score.add_argument(
        "--missing-is-empty", action="store_true", help="an expression without a mask counts as found nothing"
    )
    score.add_argument("--format", choices=("markdown", "latex", "json"), default="markdown", help="(%(default)s)")
    score.add_argument("--out", type=Path, help="result file (JSON)")
    score.add_argument("--report", type=Path, help="HTML file with pictures of good and bad predictions")

    compare = add(
        "compare",
        _compare,
        "show systems side by side, with intervals of their differences",
        "runs/a runs/b --data data/scenes --split test --out compare.html",
        "The first is what the others are compared with.",
    )
    compare.add_argument(
        "systems",
        nargs="+",
        metavar="SYSTEM",
        help=f"{_CHECKPOINT}; or a .jsonl file of answers that `dcris evaluate --answers` wrote",
    )
    _data_root(compare)
    _data_set(compare)
    compare.add_argument("--split", default="val", help="(%(default)s)")
    _protocol(compare)
    compare.add_argument("--names", nargs="+", metavar="NAME", help="of the systems, in their order")
    compare.add_argument("--count", type=_natural, default=8, metavar="N", help="phrases to show (%(default)s)")
    compare.add_argument("--out", type=Path, help="HTML file with tables, curves and pictures")
    compare.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures for a paper: each row, figure.png and figure.pdf"
    )
    compare.add_argument("--json", action="store_true", help="print JSON, with the scores by group of phrases")
    _device(compare)

    predict = add("predict", _predict, "segment what phrases refer to", 'runs/tiny photo.jpg -e "left slice" --out out')
    predict.add_argument("checkpoint", metavar="CKPT", help=_CHECKPOINT)
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    predict.add_argument(
        "-e", "--expression", action="append", required=True, metavar="PHRASE", help="may be given several times"
    )
    predict.add_argument("--out", type=Path, required=True, help="folder for the results")
    predict.add_argument(
        "--format", nargs="+", choices=("mask", "overlay", "coco", "scores"), help="what to write (all of it)"
    )
    predict.add_argument("--threshold", type=float, help="probability above which a pixel is the object's (0.35)")
    _device(predict)

    convert = add(
        "convert",
        _convert,
        "turn published DETRIS checkpoints into this format",
        "base_refcoco.pth --out models",
        "Each FILE becomes a checkpoint directory of its name in DIR, with the frozen towers in it.",
    )
    convert.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .pth of thuteam/DETRIS on the Hub")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the directories go")
    convert.add_argument(
        "--word-length", type=_natural, metavar="N", help="tokens per phrase, where the file's name does not say it"
    )
    convert.add_argument("--half", action="store_true", help="store adapters and head in float16, in half the space")

    recipes = add("recipes", _recipes, "list the recipes with their trainable counts", "--show dcris_b")
    recipes.add_argument("--show", metavar="RECIPE", help="print a recipe's whole configuration")
    recipes.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _adder(commands: Any, prefix: str) -> Callable[..., argparse.ArgumentParser]:
    def add(name: str, run: Command, summary: str, example: str, more: str = "") -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog=f"example: {prefix}{name} {example}",
            allow_abbrev=False,
        )
        parser.set_defaults(run=run, name=f"{prefix}{name}".removeprefix("dcris "))
        return parser

    return add


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to below 1")
    return share


def _data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help=_ROOT)


def _data_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        help="refcoco, refcoco+, refcocog, scenes, or a folder of ROOT; mixed, mixed-unfiltered or mixed:NAME,NAME(SPLIT_BY) "
        "for several as one",
    )
    parser.add_argument("--split-by", help="unc, umd, google, ...; asked for only where ROOT has several")


def _protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        default="cris",
        metavar="NAME",
        help="cris, lavt, cgformer or refer: how masks are compared (cris)",
    )


def _device(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    if precision:
        parser.add_argument(
            "--precision", choices=("auto", "float32", "bfloat16"), help="auto is bfloat16 where the device has it"
        )


# ---- the commands --------------------------------------------------------------------------------------------------------


def _quickstart(args: argparse.Namespace) -> None:
    from dcris.engine.train import Interrupted
    from dcris.quickstart import quickstart

    try:
        metrics = quickstart(args.out, seed=args.seed, device=args.device, say=_say)
    except Interrupted as stop:
        _leave(stop)
    _say(
        f"mIoU {metrics['miou']:.1f}, with exchanged phrases {metrics['miou_shuffled']:.1f}, in {metrics['seconds']:.0f} s; "
        f"open {args.out / 'report.html'}"
    )


def _leave(stop: Any) -> NoReturn:
    print(f"dcris: {stop}", file=sys.stderr)
    sys.exit(stop.exit_code)


def _data_fetch(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.fetch import fetch_dataset
    from dcris.data.gather import COCO

    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="photograph", disable=not sys.stderr.isatty())
        bar.update(1)
        if bar.disable and (done % max(1, total // 20) == 0 or done == total):
            print(f"dcris: {done:,} of {total:,} photographs", file=sys.stderr, flush=True)

    try:
        table = fetch_dataset(
            args.dataset,
            args.out,
            splits=args.splits,
            photographs=args.photographs or COCO,
            connections=args.connections,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.close()
    _say(
        f"{args.out}: {table.dataset} ({table.split_by}) is there; next: dcris data check {args.out} --dataset {table.dataset}"
    )


def _data_check(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.check import check_dataset

    _own_name(args.root, args)
    with tqdm(unit="image", disable=not sys.stderr.isatty()) as bar:
        report = check_dataset(
            args.root, args.dataset, args.split_by, deep=args.deep, progress=lambda done: bar.update(done - bar.n)
        )
    _say(json.dumps(report.to_json(), indent=2) if args.json else report.table())
    if report.problem_count:
        several = "problems, the first" if report.problem_count > 1 else "problem"
        raise DcrisError(f"{report.problem_count:,} {several}: {report.problems[0]}")


def _data_scenes(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.data.scenes import cores, write_scenes

    counts = {"train": args.train, "val": args.val, "test": args.test}
    with tqdm(total=sum(counts.values()), unit="scene", disable=not sys.stderr.isatty()) as bar:
        write_scenes(
            args.out,
            **counts,
            seed=args.seed,
            side=args.side,
            workers=cores(),
            progress=lambda done: bar.update(done - bar.n),
        )
    made = ", ".join(f"{count} {split}" for split, count in counts.items())
    _say(f"{args.out}: {made} scenes; next: dcris data check {args.out} --dataset scenes")


def _data_import_coco(args: argparse.Namespace) -> None:
    from dcris.data.import_coco import import_coco

    done = import_coco(
        args.annotations,
        args.images,
        args.out,
        phrases=args.phrases,
        split=args.split,
        val=args.val,
        seed=args.seed,
        keep_ambiguous=args.ambiguous == "keep",
        keep_crowds=args.crowds == "keep",
    )
    _say(f"{args.out}: {done}; next: dcris data check {args.out}")


def _settings(rest: Sequence[str]) -> list[tuple[str, str]]:
    """`--section.field value` and `--section.field=value` pairs."""
    pairs, waiting = [], list(rest)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise DcrisError(f"`dcris train` does not take {word!r}; settings are given as --SECTION.FIELD VALUE")
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not waiting:
                raise DcrisError(f"the setting --{key} has no value; give one behind it")
            value = waiting.pop(0)
        pairs.append((key, value))
    return pairs


def _own_name(root: Path, args: argparse.Namespace) -> str | None:
    """The name of a data set that is one file; None where ROOT holds data sets by name."""
    from dcris.data.jsonl import is_jsonl

    if not is_jsonl(root):
        return None
    if args.split_by is not None or args.dataset not in {None, root.stem}:
        raise DcrisError(f"{root} is one data set, called {root.stem}; leave out --dataset and --split-by")
    return root.stem


def _train(args: argparse.Namespace) -> None:
    from dcris.config import load_config, override
    from dcris.data.references import load_references
    from dcris.data.tokenizer import tokenizer_of
    from dcris.engine.device import choose_device
    from dcris.engine.train import Interrupted, build_model, train
    from dcris.pretrained import locate
    from dcris.recipes import get_recipe

    config = load_config(Path(args.recipe)) if args.recipe.endswith(".json") else get_recipe(args.recipe)
    own = _own_name(args.data, args)
    settings = _settings(args.settings)
    choose_val = "data.val_split" not in dict(settings)
    for key, value in (
        ("data.dataset", own or args.dataset),
        ("data.split_by", args.split_by),
        ("train.precision", args.precision),
        ("train.start", None if args.start is None else str(locate(args.start))),
        ("train.trackers", args.tracker),
    ):
        if value is not None:
            settings.append((key, json.dumps(value)))
    if own:
        settings.append(("data.split_by", "null"))
    config = override(config, settings)
    table = load_references(args.data, config.data.dataset, config.data.split_by)
    if own and choose_val and config.data.val_split not in {None, *table.splits()}:
        _say(
            f"{own} has no split {config.data.val_split!r}, so nothing is scored while training, and the last checkpoint counts"
        )
        config = override(config, [("data.val_split", "null")])
    device = choose_device(args.device)
    model = build_model(config)
    counts = model.count_weights()
    _say(
        f"{config.recipe} on {table.dataset} ({table.split_by}): {counts['adapters']:,} adapter and {counts['head']:,} head "
        f"weights train, {counts['frozen']:,} are frozen"
    )
    tokenizer = tokenizer_of(config.model.text)
    try:
        result = train(model, config, table, tokenizer, args.out, device=device, resume=args.resume, say=_say)
    except Interrupted as stop:
        _leave(stop)
    split = "" if "val" in table.splits() else f" --split {shlex.quote([*table.splits()][-1])}"
    _say(f"done in {result.seconds:.0f} s; next: dcris evaluate {args.out} --data {args.data}{split}")


def _data_of(args: argparse.Namespace, config: "RunConfig") -> Any:
    """The data set named on the command line, or else the run's own."""
    from dcris.data.references import load_references

    _own_name(args.data, args)
    if args.dataset is None or args.dataset == config.data.dataset:
        return load_references(args.data, config.data.dataset, args.split_by or config.data.split_by)
    return load_references(args.data, args.dataset, args.split_by)


def _evaluate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.analysis import analyse
    from dcris.answers import write_answers
    from dcris.data.dataset import all_questions
    from dcris.data.tokenizer import tokenizer_of
    from dcris.engine.checkpoint import load_checkpoint
    from dcris.engine.device import choose_device, choose_precision
    from dcris.engine.distributed import processes
    from dcris.engine.evaluate import Answer, answer_questions, answer_together, result_record
    from dcris.files import write_json
    from dcris.pretrained import locate
    from dcris.protocols import get_protocol

    protocol = get_protocol(args.protocol)
    with processes(args.device) as group:
        device = choose_device(args.device)
        model, config = load_checkpoint(locate(args.checkpoint))
        model.to(device)
        table = _data_of(args, config)
        questions = all_questions(table.split(args.split))
        quiet = not (group.first and sys.stderr.isatty())

        def answer(share: tuple[int, int]) -> list[Answer]:
            with tqdm(total=len(questions) // share[1], unit="phrase", disable=quiet) as bar:
                found = answer_questions(
                    model,
                    questions,
                    config.data,
                    tokenizer_of(config.model.text),
                    protocol,
                    device=device,
                    dtype=choose_precision(args.precision or config.train.precision, device),
                    batch_size=args.batch_size,
                    workers=config.data.workers,
                    share=share,
                    keep_masks=args.report is not None or args.answers is not None,
                    progress=lambda done: bar.update(done - bar.n),
                )
                return list(found)

        answers = answer_together(group, questions, answer)
        if not group.first:
            return
    result = result_record(answers, model, dataset=table.dataset, split=args.split, protocol=protocol)
    print(json.dumps(result, indent=2))  # first: should a file not be writable, the figures are still seen
    metrics = {**result, "analysis": analyse(answers, protocol.precision_includes_threshold)}
    if args.answers is not None:
        write_answers(args.answers, answers, protocol)
    if args.out is not None:
        write_json(args.out, metrics)
    if args.report is not None:
        from dcris.report.evaluation import write_evaluation_report

        title = f"{config.recipe} on {table.dataset} {args.split}"
        write_evaluation_report(args.report, title=title, config=config, model=model, answers=answers, metrics=metrics)


def _score(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.analysis import analyse
    from dcris.data.dataset import all_questions
    from dcris.data.references import load_references
    from dcris.engine.evaluate import result_record
    from dcris.files import write_json
    from dcris.metrics import PRECISION_THRESHOLDS
    from dcris.protocols import get_protocol
    from dcris.scoring import score_predictions
    from dcris.tables import latex, markdown

    if len(args.predictions) > 1 and (args.out or args.report):
        raise DcrisError("--out and --report are of one system's masks; give them one at a time")
    protocol = get_protocol(args.protocol)
    _own_name(args.data, args)
    table = load_references(args.data, args.dataset, args.split_by)
    questions = all_questions(table.split(args.split))
    results, rows = [], []
    for path in args.predictions:
        with tqdm(total=len(questions), unit="phrase", disable=not sys.stderr.isatty()) as bar:
            answers = []
            for answer in score_predictions(
                path, questions, protocol, missing_is_empty=args.missing_is_empty, keep_masks=args.report is not None
            ):
                answers.append(answer)
                bar.update(1)
        result = result_record(answers, None, dataset=table.dataset, split=args.split, protocol=protocol)
        results.append({"predictions": path.name, **result})
        rows.append([path.stem, *(f"{value:.2f}" for value in result.values() if isinstance(value, float))])
    if args.format == "json":
        print(json.dumps(results[0] if len(results) == 1 else results, indent=2))
    else:
        precisions = (f"P@{threshold}" for threshold in PRECISION_THRESHOLDS)
        header = [f"{table.dataset} {args.split} ({protocol.name})", "mIoU", "oIoU", *precisions]
        _say((latex if args.format == "latex" else markdown)(header, rows))
    metrics = {**results[0], "analysis": analyse(answers, protocol.precision_includes_threshold)}
    if args.out is not None:
        write_json(args.out, metrics)
    if args.report is not None:
        from dcris.report.evaluation import write_evaluation_report

        title = f"{args.predictions[0].name} on {table.dataset} {args.split}"
        write_evaluation_report(args.report, title=title, answers=answers, metrics=metrics)


def _compare(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dcris.compare import as_text, compare, gather, is_answers, name_systems, telling
    from dcris.data.dataset import all_questions
    from dcris.data.references import load_references
    from dcris.engine.checkpoint import find_checkpoint, read_config
    from dcris.engine.device import choose_device
    from dcris.pretrained import locate
    from dcris.protocols import get_protocol
    from dcris.report.comparison import write_comparison_report
    from dcris.report.figure import write_figures
    from dcris.report.panels import as_panel

    names = name_systems(args.systems, args.names or ())
    protocol, device = get_protocol(args.protocol), choose_device(args.device)
    paths = [Path(each) if is_answers(Path(each)) else find_checkpoint(locate(each)) for each in args.systems]
    models = [path for path in paths if not is_answers(path)]
    if models:
        table = _data_of(args, read_config(models[0]))
    elif _own_name(args.data, args) is None and args.dataset is None:
        raise DcrisError("files of answers do not say which data set they are of; give --dataset")
    else:
        table = load_references(args.data, args.dataset, args.split_by)
    questions = all_questions(table.split(args.split))
    with tqdm(total=len(questions) * len(models), unit="phrase", disable=not sys.stderr.isatty()) as bar:
        done = dict.fromkeys(names, 0)

        def progress(name: str, count: int) -> None:
            bar.update(count - done[name])
            done[name] = count

        systems = gather(
            dict(zip(names, paths, strict=True)),
            questions,
            protocol,
            device=device,
            precision=args.precision,
            progress=progress,
        )
    comparison = compare(systems, protocol.precision_includes_threshold)
    _say(json.dumps(comparison, indent=2) if args.json else as_text(comparison))
    shown = telling(systems, args.count)
    if args.out is not None:
        write_comparison_report(
            args.out,
            title=f"{', '.join(names[:-1])} and {names[-1]}",
            comparison=comparison,
            measured={"dataset": table.dataset, "split": args.split, "protocol": protocol.name},
            panels={heading: map(as_panel, some) for heading, some in shown.items()},
        )
    if args.images is not None and shown:
        rows = enumerate((answers for some in shown.values() for answers in some), 1)
        write_figures(
            args.images,
            (
                (f"{number:02}-sentence-{answers[names[0]].expression.sent_id}", as_panel(answers))
                for number, answers in rows
            ),
        )


def _predict(args: argparse.Namespace) -> None:
    from dcris.outputs import FORMATS, find_images, predict_to_files
    from dcris.segmenter import Segmenter

    images = find_images(args.images)
    segmenter = Segmenter.from_pretrained(args.checkpoint, device=args.device, precision=args.precision)
    for image, answer in predict_to_files(
        segmenter, images, args.expression, args.out, args.format or FORMATS, args.threshold
    ):
        place = f"box {answer.box}" if answer.box else "nothing found"
        _say(f"{image}: {answer.phrase!r} {place}, score {answer.score:.2f}")


def _convert(args: argparse.Namespace) -> None:
    from dcris.convert import convert_file

    targets = {args.out / file.stem: file for file in args.files}
    if len(targets) < len(args.files):
        raise DcrisError("two of the files have one name, so their results would be in one place; convert them apart")
    for target, file in targets.items():
        config = convert_file(file, target, args.word_length, half=args.half)
        _say(
            f"{target}: {config.recipe} on {config.data.dataset}, phrases of {config.data.word_length} tokens; "
            f'next: dcris predict {target} photo.jpg -e "left slice" --out out'
        )


def _recipes(args: argparse.Namespace) -> None:
    from dcris.recipes import RECIPES, get_recipe

    if args.show is not None:
        print(json.dumps(get_recipe(args.show).model_dump(mode="json"), indent=2))
        return
    import torch

    from dcris.model.dcris import DCRIS

    rows = []
    for name, recipe in RECIPES.items():
        with torch.device("meta"):  # shapes without memory
            rows.append({"name": name, **DCRIS(recipe().model).count_weights()})
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'recipe':<16}{'adapters':>12}{'head':>14}{'frozen':>14}")
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        print(f"{row['name']:<16}{row['adapters']:>12,}{row['head']:>14,}{row['frozen']:>14,}")
        print(f"    {' '.join((recipe.__doc__ or '').split())}")
