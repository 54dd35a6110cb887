"""Every malformed variant of every input format ends in one sentence and exit code 2, and leaves nothing that looks whole.

A format is an entry in FORMATS: which set of files it belongs to, which of them is spoilt and how, and which command reads it.
A few variants of each are tried always; `DCRIS_FUZZ_CASES=5000 pytest -m slow tests/test_fuzz.py` tries as many more, and with
DCRIS_FUZZ_SEED=1 others. A failure names the format and the case, which alone decide what was done to the file.
"""

import io
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import detris_layout
from conftest import make_tiny_refer
from dcris import Segmenter
from dcris.answers import write_answers
from dcris.cli import _parser
from dcris.config import RunConfig, override
from dcris.data.dataset import all_questions
from dcris.data.masks import decode_mask, encode_mask
from dcris.data.references import load_references
from dcris.encoders.clip_text import TextTower
from dcris.encoders.dinov2 import DinoV2Tower
from dcris.encoders.formats import TEXT_LAYOUTS, VISION_LAYOUTS, Layout
from dcris.encoders.weights import tower_state
from dcris.model.dcris import DCRIS
from dcris.protocols import get_protocol
from dcris.recipes import dcris_tiny
from dcris.scoring import score_predictions
from fuzz import (
    ANY,
    WORDS,
    Snapshot,
    Spoil,
    complaint,
    csv_cells,
    files_in,
    json_lines,
    json_tree,
    npz_arrays,
    parquet_rows,
    pickle_tree,
    png_chunks,
    safetensors_tree,
    torch_tree,
)
from layouts import PICTURES, hub_files, parquet, write_prepared
from models import randomise
from runs import run_training, unseal

# ---- sets of files -------------------------------------------------------------------------------------------------------


def small_config(*settings: tuple[str, str]) -> RunConfig:
    """A whole network that is made in no time, on towers that nobody else has."""
    tower = {"name": "random", "width": 32, "depth": 2, "heads": 4}
    sections: dict[str, dict[str, Any]] = {
        "vision": {**tower, "grid": 4},
        "text": {**tower, "tokenizer": "tiny", "vocabulary": 129, "length": 14, "sentence_width": 24},
        "visual_adapter": {"layers": [1], "width": 16, "attention_width": 8, "heads": 2},
        "text_adapter": {"layers": [0], "width": 8},
        "head": {"taps": [0, 1], "width": 16, "heads": 4, "feedforward": 16, "layers": 1},
    }
    changes = [(f"model.{name}", json.dumps(section)) for name, section in sections.items()]
    changes += [("data.image_size", "28"), ("data.dataset", "tiny"), ("train.max_steps", "2")]
    changes += [("train.warmup_steps", "0")]
    return override(dcris_tiny(), [*changes, *settings])


def refer(root: Path) -> None:
    make_tiny_refer(root).write()


_PHOTOGRAPHS = ("a.jpg", "a.png", "a.gif", "a.tiff", "a.webp", "a.bmp", "progressive.jpg", "palette.png", "packed.tiff")


def photographs(root: Path) -> None:
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in _PHOTOGRAPHS[:6]:
        picture.save(root / name, **({} if name in ("a.gif", "a.bmp") else {"exif": exif}))
    picture.save(root / "progressive.jpg", progressive=True)
    picture.convert("P").save(root / "palette.png", transparency=3)
    picture.convert("CMYK").save(root / "packed.tiff", compression="tiff_lzw")
    picture.save(root / "animated.gif", save_all=True, append_images=[picture.rotate(90)])


def model(root: Path) -> None:
    """A model's directory and its bundle."""
    config = small_config()
    network = DCRIS(config.model)
    randomise(network)
    segmenter = Segmenter(network, config, device="cpu")
    segmenter.save_pretrained(root / "model")
    segmenter.save_pretrained(root / "bundle.safetensors")
    Image.new("RGB", (30, 20), "green").save(root / "photo.png")


def run(root: Path) -> None:
    """A finished run and the data that it was made with. Its towers are random, but follow from the seed."""
    make_tiny_refer(root / "data").write()
    table = load_references(root / "data", "tiny")
    run_training(small_config(("train.log_every", "1")), table, root / "run")
    for path in (root / "run/checkpoints").iterdir():
        unseal(path)  # what is behind the checksums is what strangers reach


def published(tower: DinoV2Tower | TextTower, layout: Layout) -> dict[str, Tensor]:
    """A small tower's weights under the names that published files give them."""
    tensors: dict[str, Tensor] = {}
    for name, value in tower_state(tower).items():
        parts, whole = layout.parts(name), value.T if name in layout.transposed else value
        chunks = whole.chunk(len(parts)) if len(parts) > 1 else [whole]
        tensors |= {part: chunk.contiguous().clone() for part, chunk in zip(parts, chunks, strict=True)}
    return tensors


def archive(tensors: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """TorchScript modules that hold tensors of those names."""
    root = nn.Module()
    for name, value in tensors.items():
        owner = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(last, value)
    with warnings.catch_warnings(action="ignore"):  # torch would rather have other files
        return torch.jit.script(root)


def towers(root: Path) -> None:
    """Weights files of every kind, a configuration that they fit, and data to train on."""
    make_tiny_refer(root / "data").write()
    config = small_config(("train.max_steps", "1"))
    (root / "config.json").write_text(config.model_dump_json())
    vision, text = DinoV2Tower(config.model.vision), TextTower(config.model.text)
    hub, meta = (published(vision, layout) for layout in VISION_LAYOUTS["dinov2"])
    save_file(hub, root / "hub.safetensors")
    torch.save(meta, root / "meta.pth")
    torch.save(meta, root / "old.pth", _use_new_zipfile_serialization=False)
    hub, openai = (published(text, layout) for layout in TEXT_LAYOUTS)
    torch.save(hub, root / "hub.bin")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(archive(openai), root / "openai.pt")


def detris(root: Path) -> None:
    """A checkpoint like the published ones, whose tensors all have their shapes but take no room. One is missing at the end."""
    root.mkdir()
    shapes = detris_layout.layout(detris_layout.VARIANTS["base"])
    state = {f"module.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    state["module.proj.txt.bias"] = torch.zeros(3)
    torch.save({"epoch": 50, "state_dict": state}, root / _DETRIS)


def prepared(root: Path) -> None:
    """What CRIS's tools leave."""
    tiny = make_tiny_refer(root / "refer")
    write_prepared(load_references(tiny.write(), "tiny"), root, "refcoco")
    (root / "images").mkdir()
    tiny.image_folder.rename(root / "images/train2014")
    shutil.rmtree(root / "refer")


def hub(root: Path) -> None:
    """Parquet without pictures."""
    tiny = make_tiny_refer(root)
    tiny.write()
    for name, content in hub_files(tiny.references, tiny.instances).items():
        (root / "refcoco" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "refcoco" / name).write_bytes(content)
    shutil.rmtree(root / "tiny")
    (root / "refcoco/data/validation-00000-of-00001-0123456789abcdef.parquet").rename(root / "refcoco/data/val.parquet")


def pictured(root: Path) -> None:
    """Parquet with pictures within."""
    stream = io.BytesIO()
    Image.new("RGB", (30, 20), "green").save(stream, "JPEG")
    rows = [
        {
            "question_id": str(number),
            "image": {"bytes": stream.getvalue(), "path": None},
            "question": "what is it?",
            "answer": ["the cup", "cup"],
            "segmentation": [2.0, 3.0, 12.0, 3.0, 12.0, 9.0],
            "bbox": [2.0, 3.0, 10.0, 6.0],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{number:012}_7.jpg",
        }
        for number in range(2)
    ]
    (root / "refcoco").mkdir(parents=True)
    (root / "refcoco/val.parquet").write_bytes(parquet(rows, PICTURES))


def own(root: Path) -> None:
    """A data set of one's own, with masks of each kind."""
    (root / "m").mkdir(parents=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:25] = 1
    Image.new("RGB", (30, 20), "green").save(root / "1.jpg")
    Image.fromarray(mask * np.uint8(255)).save(root / "m/1.png")
    masks = ("m/1.png", [[2, 3, 12, 3, 12, 9]], encode_mask(mask))
    lines = [
        {"image": "1.jpg", "mask": each, "expressions": ["the cup", "cup"], "id": 7 + number}
        for number, each in enumerate(masks)
    ]
    (root / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def export(root: Path) -> None:
    """What annotation tools leave, with phrases beside it."""
    tiny = make_tiny_refer(root / "tiny")
    tiny.write()
    tiny.image_folder.rename(root / "photos")
    (root / "coco.json").write_text(json.dumps(tiny.instances))
    (root / "phrases.json").write_text(json.dumps({"71": "left one", "72": ["tall"], "cup": ["mug", "cup"]}))
    (root / "phrases.csv").write_text("annotation,phrase\n71,left one\n72,tall\n73,mug\n73,cup\n")
    shutil.rmtree(root / "tiny")


def predictions(root: Path) -> None:
    """Masks for the two sentences of a split, in everything that they may come in."""
    questions = all_questions(load_references(make_tiny_refer(root / "data").write(), "tiny").split("val"))
    masks = {expression.sent_id: decode_mask(reference.segmentation, (30, 40)) for reference, expression in questions}
    (root / "masks").mkdir()
    for sent_id, mask in masks.items():
        Image.fromarray(mask * np.uint8(255)).save(root / f"masks/{sent_id}.png")
    results = [{"sent_id": sent_id, "segmentation": encode_mask(mask)} for sent_id, mask in masks.items()]
    results[0]["segmentation"] = [[2, 3, 12, 3, 12, 9]]
    (root / "results.json").write_text(json.dumps(results))
    np.savez(root / "masks.npz", **{str(sent_id): mask for sent_id, mask in masks.items()})
    protocol = get_protocol("cris")
    answers = list(score_predictions(root / "masks", questions, protocol, keep_masks=True))
    for name in ("answers.jsonl", "b.jsonl"):
        write_answers(root / name, answers, protocol)


# ---- formats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A file that a command reads."""

    name: str
    make: Callable[[Path], None]
    """Writes a whole and valid set of files."""
    file: str
    """Which of them is spoilt."""
    spoils: tuple[Spoil, ...]
    """What knows the format; what spoils any file comes on top."""
    words: str
    """The command. SET is the folder of the files, OUT a place for results."""
    cases: int = 40
    """Variants that are always tried."""
    valid: bool = True
    """Whether the unspoilt file is accepted."""
    leaves: str = ""
    """A pattern of what may be found in SET or OUT after a refusal."""


_CHECK = "data check SET --dataset refcoco --deep"
_CHECK_TINY = "data check SET --dataset tiny --deep"
_CHECK_OWN = "data check SET/mine.jsonl --deep"
_IMPORT = "--images SET/photos --out SET/my.jsonl"
_PREDICT = "--expression cup --out OUT --format mask scores --device cpu"
_SCORE = "--data SET/data --dataset tiny --split val --out OUT/result.json"
_COMPARE = "--data SET/data --dataset tiny --split val --out OUT/page.html --images OUT/images"
_TRAIN = "train SET/config.json --data SET/data --out OUT --device cpu --train.max_steps 1"
_RESUME = "train SET/run/config.json --data SET/data --out SET/run --resume --device cpu"
_BEGUN = r"(config|data)\.json|log\.jsonl|lock"
"""Of a run that ended before its first checkpoint, as one with weights that are no numbers does."""
_UNPACKED = r"refcoco/unpacked/.*"
_STEP = "checkpoints/step-00000002"
_DETRIS = "base_refcoco.pth"

_OF_RUN = (
    ("log.jsonl", (json_lines,)),
    (f"{_STEP}/state.json", (json_tree,)),
    (f"{_STEP}/config.json", (json_tree,)),
    (f"{_STEP}/model.safetensors", (safetensors_tree,)),
    (f"{_STEP}/optimizer.safetensors", (safetensors_tree,)),
)
_OF_MODEL = (
    ("model/config.json", (json_tree,)),
    ("model/model.safetensors", (safetensors_tree,)),
    ("model/towers.safetensors", (safetensors_tree,)),
    ("bundle.safetensors", (safetensors_tree,)),
)
_TOWERS = (
    ("vision", "hub.safetensors", (safetensors_tree,)),
    ("vision", "meta.pth", (torch_tree,)),
    ("vision", "old.pth", (torch_tree,)),
    ("text", "hub.bin", (torch_tree,)),
    ("text", "openai.pt", ()),
)
_MASKS = (
    ("masks/200.png", (png_chunks,)),
    ("results.json", (json_tree,)),
    ("masks.npz", (npz_arrays,)),
    ("answers.jsonl", (json_lines,)),
)
_IMPORTED = (
    ("coco.json", "phrases.json", (json_tree,)),
    ("phrases.json", "phrases.json", (json_tree,)),
    ("phrases.csv", "phrases.csv", (csv_cells,)),
)

FORMATS = (
    # data sets
    Format("refs(*).p", refer, "tiny/refs(toy).p", (pickle_tree,), _CHECK_TINY, 120),
    Format("instances.json", refer, "tiny/instances.json", (json_tree,), _CHECK_TINY, 120),
    Format("picture", refer, "images/mscoco/images/train2014/1.png", (png_chunks,), _CHECK_TINY),
    Format("prepared json", prepared, "anns/refcoco/val.json", (json_tree,), _CHECK, 60),
    Format("prepared mask", prepared, "masks/refcoco/11.png", (png_chunks,), _CHECK, 20),
    Format("parquet", hub, "refcoco/data/val.parquet", (parquet_rows,), _CHECK, 60),
    Format("parquet with pictures", pictured, "refcoco/val.parquet", (parquet_rows,), _CHECK, leaves=_UNPACKED),
    Format("own data", own, "mine.jsonl", (json_lines,), _CHECK_OWN, 100),
    Format("own mask", own, "m/1.png", (png_chunks,), _CHECK_OWN, 20),
    *(
        Format(
            f"imported {file}",
            export,
            file,
            spoils,
            f"data import-coco SET/coco.json --phrases SET/{phrases} {_IMPORT}",
        )
        for file, phrases, spoils in _IMPORTED
    ),
    # models
    *(
        Format(file, model, file, spoils, f"predict SET/{file.partition('/')[0]} SET/photo.png {_PREDICT}", 25)
        for file, spoils in _OF_MODEL
    ),
    *(Format(f"run {file}", run, f"run/{file}", spoils, _RESUME, 20) for file, spoils in _OF_RUN),
    Format("config.json", towers, "config.json", (json_tree,), _TRAIN, 25, leaves=_BEGUN),
    *(
        Format(f"{part} {file}", towers, file, spoils, f"{_TRAIN} --model.{part}.name SET/{file}", 15, leaves=_BEGUN)
        for part, file, spoils in _TOWERS
    ),
    Format("DETRIS", detris, _DETRIS, (torch_tree,), f"convert SET/{_DETRIS} --out OUT", 8, valid=False),
    # photographs
    *(
        Format(
            name, photographs, name, (png_chunks,) * name.endswith("png"), f"predict MODEL SET/{name} {_PREDICT}", 12
        )
        for name in _PHOTOGRAPHS
    ),
    # answers
    *(
        Format(f"scored {file}", predictions, file, spoils, f"score SET/{file.partition('/')[0]} {_SCORE}")
        for file, spoils in _MASKS
    ),
    Format("compared", predictions, "b.jsonl", (json_lines,), f"compare SET/answers.jsonl SET/b.jsonl {_COMPARE}"),
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], Path]:
    """Sets of files, each made once."""
    made: dict[Any, Path] = {}

    def get(maker: Callable[[Path], None]) -> Path:
        if maker not in made:
            made[maker] = tmp_path_factory.mktemp(maker.__name__) / "set"
            maker(made[maker])
        return made[maker]

    return get


_PARSER = cache(_parser)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would slow thousands of cases down, or change with the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("dcris.cli._parser", _PARSER)
    monkeypatch.setattr("dcris.data.images.MAX_PIXELS", 200_000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def faults(format: Format, source: Path, model: Path, folder: Path, seed: int, numbers: range) -> Iterator[str]:
    """What goes wrong, case by case; case -1 is the file as it was."""
    root, out = folder / "set", folder / "out"
    shutil.copytree(source, root)
    whole = Snapshot(root)
    words = [_fill(word, {"SET": root, "OUT": out, "MODEL": model}) for word in shlex.split(format.words)]
    for number in numbers:
        random = Random(f"{format.name} {seed} {number}")
        done = "nothing" if number < 0 else random.choice([*ANY, *format.spoils * 4])(random, root / format.file)
        before = files_in(root)
        code, wrong = complaint(words)
        left = {name for name in files_in(root) - before | files_in(out) if not re.fullmatch(format.leaves, name)}
        if wrong is None and number < 0 and format.valid and code != 0:
            wrong = "the valid file was refused"
        elif wrong is None and code == 2 and left:
            wrong = f"it left {sorted(left)}"
        elif files_in(Path.cwd()):
            wrong = f"there is {files_in(Path.cwd())} in the working directory"
        if wrong is not None:
            yield f"{format.name}, case {number} ({done}): {wrong}"
        whole.restore()
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(root)


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, place in places.items():
        word = word.replace(name, str(place))
    return word


def survives(format: Format, make: Callable[[Callable[[Path], None]], Path], folder: Path, numbers: range) -> None:
    seed = int(os.environ.get("DCRIS_FUZZ_SEED", "0"))
    found = list(faults(format, make(format.make), make(model) / "model", folder, seed, numbers))
    assert not found, f"{len(found)} of {len(numbers)} cases:\n" + "\n".join(found[:5])


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_spoilt_files_are_refused_in_one_sentence(
    format: Format, make: Callable[[Callable[[Path], None]], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A traceback tells the person at the keyboard nothing; half a result passes for a whole one."""
    survives(format, make, tmp_path, range(-1, format.cases))
    # libtiff says on its own what it thinks of a file, and Python cannot keep it from that.
    assert capfd.readouterr().err == "" or format.file.endswith("tiff")


def test_phrases_and_names_may_be_anything(make: Callable[[Callable[[Path], None]], Path], tmp_path: Path) -> None:
    """People paste phrases from anywhere, and photographs come from cameras, archives and other alphabets."""
    found, names = make(model), [word for word in WORDS if 0 < len(os.fsencode(word.replace("\ud800", ""))) < 200]
    for number, word in enumerate(WORDS):
        out = tmp_path / f"out {number}"
        words = ["predict", found / "model", found / "photo.png", "-e", word, "--out", out, "--format", "coco"]
        code, wrong = complaint([*words, "--device", "cpu"])
        assert wrong is None, word
        assert (code == 0) == bool(files_in(out)), word
    for number, name in enumerate(name for name in names if not set(name) & set("/\0\ud800")):
        folder, out = tmp_path / f"in {number}", tmp_path / f"named {number}"
        folder.mkdir()
        shutil.copy(found / "photo.png", folder / f"{name}.png")
        words = ["predict", found / "model", folder, "-e", "cup", "--out", out, "--device", "cpu"]
        assert complaint(words) == (0, None), name
        assert len(files_in(out)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_many_more(format: Format, make: Callable[[Callable[[Path], None]], Path], tmp_path: Path) -> None:
    """What a few cases do not find."""
    more = int(os.environ.get("DCRIS_FUZZ_CASES", "50"))
    survives(format, make, tmp_path, range(format.cases, format.cases + more))
