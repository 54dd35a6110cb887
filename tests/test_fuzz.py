"""Every malformed variant of every input format ends in one sentence and exit code 2, and leaves
nothing that looks whole.

A format is an entry in FORMATS: which set of files it belongs to, which of them is spoilt and how,
and which command reads it. Each case runs in a process of its own, which may take 30 s and 1 GiB
more than it has at its start (fuzz.complaint).

One case of every second format is tried always, 50 of each by the slow test. For more, by hand:

    DCRIS_FUZZ_CASES=100 DCRIS_FUZZ_SEED=1 pytest -m slow tests/test_fuzz.py [-k FORMAT]

tries 100 other cases of each format. A failure names the format and the number of the case, which
together with the seed decide what is done to the file, and where a copy of it is kept;
DCRIS_FUZZ_FIRST=17 DCRIS_FUZZ_CASES=1 tries that case again. Both begin with the file as it was.
"""

import json
import os
import re
import shlex
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import detris_layout
import tool_exports
from bombs import (
    ADDRESS,
    npz_bomb,
    parquet_bomb,
    picture_bomb,
    playlist,
    refs_bomb,
    safetensors_bomb,
    torch_bomb,
    torchscript_bomb,
    video_bomb,
    zip_bomb,
)
from conftest import make_tiny_refer
from dcris import Segmenter
from dcris.checkpoints.backbones import tower_state
from dcris.config import RunConfig, parse_value
from dcris.config import replace as replace_settings
from dcris.data.dataset import all_queries
from dcris.data.masks import encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.data.video_readers.load import load_videos
from dcris.evaluation.external_masks import score_masks
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.results import write_results
from dcris.evaluation.video_protocols import get_video_protocol, score_videos
from dcris.evaluation.video_results import video_record
from dcris.models.encoders.clip_text import CLIP_TEXT, ClipTextTower
from dcris.models.encoders.dino import DINOV2, DinoTower
from dcris.models.encoders.families import KeyMapping
from dcris.models.segmentation import ReferringSegmenter
from dcris.recipes import TINY_TEXT, get_recipe
from dcris.utils.files import write_json
from fuzz import (
    ANY,
    WORDS,
    Snapshot,
    Spoil,
    complaint,
    complaint_here,
    csv_cells,
    files_in,
    json_lines,
    json_tree,
    npz_arrays,
    parquet_rows,
    pickle_tree,
    png_chunks,
    replace,
    safetensors_tree,
    save_old,
    torch_tree,
    zip_tree,
)
from generalised import LAYOUTS
from layouts import hub_files, write_prepared
from models import randomise
from referee import WRITERS, refcocom_rows, write_refcocom, write_refcocom_images
from runs import run_training, timeless_log, unseal
from video_layouts import mevis_records, write_davis, write_mevis, write_youtube
from video_submissions import submit, zipped

# ---- sets of files -------------------------------------------------------------------------------


def small_config(*settings: tuple[str, str]) -> RunConfig:
    """A whole network that is made in no time, on towers that nobody else has."""
    tower = {"name": "random", "width": 32, "depth": 2, "heads": 4}
    sections: dict[str, dict[str, Any]] = {
        "vision": {**tower, "grid": 4},
        "text": {**tower, "tokenizer": "tiny", "vocabulary": TINY_TEXT.vocabulary, "length": 14, "sentence_width": 24},
        "method": {
            "name": "dcris",
            "visual": {"layers": [1], "width": 16, "attention_width": 8, "heads": 2},
            "text": {"layers": [0], "width": 8},
        },
        "head": {"feature_layers": [0, 1], "width": 16, "heads": 4, "feedforward": 16, "layers": 1},
    }
    changes: dict[str, Any] = {f"model.{name}": section for name, section in sections.items()}
    changes |= {"data.image_size": 28, "data.dataset": "tiny", "data.workers": 0}
    changes |= {"train.max_steps": 2, "train.warmup_steps": 0}
    return replace_settings(get_recipe("dcris_tiny"), changes | {key: parse_value(text) for key, text in settings})


def refer(root: Path) -> None:
    make_tiny_refer(root).write()


_PHOTOGRAPHS = ("a.jpg", "a.png", "a.gif", "a.tiff", "a.webp", "a.bmp", "a.avif", "a.jp2", "a.mpo")
_PHOTOGRAPHS += ("progressive.jpg", "palette.png", "packed.tiff", "animated.gif")


def photographs(root: Path) -> None:
    root.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((30, 20), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in _PHOTOGRAPHS[:9]:
        picture.save(root / name, **({} if name in ("a.gif", "a.bmp", "a.jp2") else {"exif": exif}))
    picture.save(root / "progressive.jpg", progressive=True)
    picture.convert("P").save(root / "palette.png", transparency=3)
    picture.convert("CMYK").save(root / "packed.tiff", compression="tiff_lzw")
    picture.save(root / "animated.gif", save_all=True, append_images=[picture.rotate(90)])


def videos(root: Path) -> None:
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), np.uint8)
    for name, codec in _VIDEOS.items():
        with av.open(str(root / name), "w", options={"fflags": "+bitexact"}) as container:  # no random identifiers
            stream = container.add_stream(codec, rate=10, width=32, height=24)
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
    shutil.copy(root / "a.mp4", root / "other.mp4")


_VIDEOS = {
    "a.mp4": "mpeg4",
    "a.mov": "mpeg4",
    "a.mkv": "mpeg4",
    "a.avi": "mjpeg",
    "a.ts": "mpeg2video",
    "a.webm": "libvpx",
}


def listed(root: Path) -> None:
    """A folder of photographs and lists of what to ask of them."""
    photographs(root / "photos")
    (root / "photos/more").mkdir()
    shutil.copy(root / "photos/a.jpg", root / "photos/more/b.jpg")
    (root / "pairs.csv").write_text("image,phrase\nphotos/a.jpg,left one\nphotos/a.png,cup\n")
    (root / "pairs.tsv").write_text("photos/a.jpg\tleft one\nphotos/a.png\tcup\n")
    lines = ({"image": "photos/a.jpg", "phrases": ["left one", "cup"]}, {"image": "photos/a.png", "phrase": "cup"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "result.json").write_text(json.dumps({"miou": 50.0, "threshold": 0.4}))


def predicted(root: Path) -> None:
    """What a first `dcris predict` left."""
    model(root)
    complaint_here(shlex.split(_fill(_AGAIN, {"SET": root})))


def model(root: Path) -> None:
    """A model's directory and its bundle."""
    config = small_config()
    network = ReferringSegmenter(config.model)
    randomise(network)
    segmenter = Segmenter(network, config, device="cpu")
    segmenter.save_pretrained(root / "model")
    segmenter.save_pretrained(root / "bundle.safetensors")
    Image.new("RGB", (30, 20), "green").save(root / "photo.png")


def run(root: Path) -> None:
    """A finished run and the data that it was made with. Its towers are random, but follow from the
    seed."""
    make_tiny_refer(root / "data").write()
    table = load_references(root / "data", "tiny")
    run_training(small_config(("train.log_every", "1")), table, root / "run")
    for path in (root / "run/checkpoints").iterdir():
        unseal(path)  # what is behind the checksums is what strangers reach


def published(tower: DinoTower | ClipTextTower, layout: KeyMapping) -> dict[str, Tensor]:
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
    torch.manual_seed(0)  # the towers' weights are in the files
    vision, text = DinoTower(config.model.vision), ClipTextTower(config.model.text)
    hub, meta = (published(vision, layout) for layout in DINOV2.key_mappings)
    save_file(hub, root / "hub.safetensors")
    torch.save(meta, root / "meta.pth")
    save_old(meta, root / "old.pth")
    hub, openai = (published(text, layout) for layout in CLIP_TEXT.key_mappings)
    torch.save(hub, root / "hub.bin")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(archive(openai), root / "openai.pt")


def detris(root: Path) -> None:
    """A checkpoint like the published ones, whose tensors all have their shapes but take no room.
    One is missing at the end."""
    root.mkdir()
    shapes = detris_layout.layout(detris_layout.VARIANTS["base"])
    state = {f"module.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    state["module.proj.txt.bias"] = torch.zeros(3)
    torch.save({"epoch": 50, "state_dict": state}, root / _DETRIS)


def prepared(root: Path) -> None:
    """The layout of CRIS."""
    tiny = make_tiny_refer(root / "refer")
    write_prepared(load_references(tiny.write(), "tiny"), root, "refcoco")
    (root / "images").mkdir()
    tiny.image_folder.rename(root / "images/train2014")
    shutil.rmtree(root / "refer")


def hub(root: Path) -> None:
    """Parquet as on the Hub."""
    tiny = make_tiny_refer(root)
    tiny.write()
    for name, content in hub_files(tiny.references, tiny.instances).items():
        (root / "refcoco" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "refcoco" / name).write_bytes(content)
    shutil.rmtree(root / "tiny")
    (root / "refcoco/data/validation-00000-of-00001-0123456789abcdef.parquet").rename(root / "refcoco/data/val.parquet")


def generalised(root: Path) -> None:
    """Data sets with several targets and none, and a result file for one of them."""
    for layout in LAYOUTS.values():
        layout().write(root)
    queries = all_queries(load_references(root, "grefcoco").split("testA"))
    entries = [
        {"sent_id": expression.sent_id, "segmentation": None, "present": 0.2, "score": 0.75}
        for _, expression in queries
    ]
    entries[-1]["segmentation"] = encode_mask(union_mask(queries[-1][0].segmentations, queries[-1][0].image_size))
    (root / "results.json").write_text(json.dumps(entries))
    protocol = get_protocol("grefcoco")
    answers = list(score_masks(root / "results.json", queries, protocol, keep_masks=True))
    for name in ("answers.jsonl", "b.jsonl"):
        write_results(root / name, answers, protocol)


def referee(root: Path) -> None:
    """The sets of others, each in its own layout."""
    for dataset, write in WRITERS.items():
        if dataset != "refcoco-m":
            write(root)
    # Without the images, which no check reads: a million copies of them cannot be written.
    write_refcocom(root, [{key: row[key] for key in row if key != "image"} for row in refcocom_rows()])
    write_refcocom_images(root)


def video_sets(root: Path) -> None:
    """The sets of videos, without MeViS's expression that describes nothing."""
    records = mevis_records()
    del records["valid_u"]["ffff0000"]
    write_mevis(root, records)
    write_youtube(root)
    write_davis(root)


def own(root: Path) -> None:
    """Your own data in JSON Lines, with masks of each kind, several and none."""
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
    lines += [
        {"image": "1.jpg", "masks": list(masks), "expressions": ["all cups"]},
        {"image": "1.jpg", "mask": None, "expressions": ["a dog"]},
    ]
    (root / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def export(root: Path) -> None:
    """The export of an annotation tool, and phrase files."""
    tiny = make_tiny_refer(root / "tiny")
    tiny.write()
    tiny.image_folder.rename(root / "photos")
    (root / "coco.json").write_text(json.dumps(tiny.instances))
    (root / "phrases.json").write_text(json.dumps({"71": "left one", "72": ["tall"], "cup": ["mug", "cup"]}))
    (root / "phrases.csv").write_text("annotation,phrase\n71,left one\n72,tall\n73,mug\n73,cup\n")
    shutil.rmtree(root / "tiny")


def predictions(root: Path) -> None:
    """Masks for the two sentences of a split, in everything that they may come in."""
    queries = all_queries(load_references(make_tiny_refer(root / "data").write(), "tiny").split("val"))
    masks = {expression.sent_id: union_mask(reference.segmentations, (30, 40)) for reference, expression in queries}
    (root / "masks").mkdir()
    for sent_id, mask in masks.items():
        Image.fromarray(mask * np.uint8(255)).save(root / f"masks/{sent_id}.png")
    results = [{"sent_id": sent_id, "segmentation": encode_mask(mask)} for sent_id, mask in masks.items()]
    results[0]["segmentation"] = [[2, 3, 12, 3, 12, 9]]
    (root / "results.json").write_text(json.dumps(results))
    np.savez(root / "masks.npz", **{str(sent_id): mask for sent_id, mask in masks.items()})
    protocol = get_protocol("cris")
    answers = list(score_masks(root / "masks", queries, protocol, keep_masks=True))
    for name in ("answers.jsonl", "b.jsonl"):
        write_results(root / name, answers, protocol)


def video_masks(root: Path) -> None:
    """Masks of MeViS and Ref-DAVIS17 in the forms of their servers, and result files."""
    write_davis(write_mevis(root))
    for dataset, split in (("mevis", "valid_u"), ("ref_davis17", "valid")):
        submit(root / dataset, load_videos(root, dataset, split))
    zipped(root / "mevis", root / "masks.zip")
    videos = load_videos(root, "mevis", "valid_u")
    protocol = get_video_protocol("mevis")
    record = video_record(score_videos(root / "masks.zip", videos, protocol), videos, protocol)
    for name in ("a.json", "b.json"):
        write_json(root / name, record)


def rows(root: Path) -> None:
    """Result files of two systems on two splits."""
    root.mkdir()
    for name in ("ours", "theirs"):
        results = [
            {
                **dict.fromkeys(("miou", "oiou", "prec@0.5", "prec@0.6", "prec@0.7", "prec@0.8", "prec@0.9"), 50.0),
                **{"dataset": "refcoco", "split_by": "unc", "split": split, "protocol": "cris", "threshold": 0.35},
                "data_sha256": split,
                "analysis": {"by_category": [{"name": "cup", "expressions": 3, "miou": 50.0, "oiou": 40.0}]},
            }
            for split in ("val", "testA")
        ]
        cost = {"trained": 1e6, "adapters": 1e5, "flops": 1e9, "seconds": 0.1, "peak_memory": 0.5}
        (root / f"{name}.json").write_text(json.dumps({"name": name, "results": results, "cost": cost}))


# ---- formats -------------------------------------------------------------------------------------


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
    valid: bool = True
    """Whether the unspoilt file is accepted."""
    leaves: str = ""
    """A pattern of what may be found in SET or OUT after a refusal."""


_AGAIN = "predict SET/model SET/photo.png --expression cup --out SET/out --format mask coco label-studio --device cpu"
_CHECK = "data check SET --dataset refcoco --deep"
_CHECK_TINY = "data check SET --dataset tiny --deep"
_CHECK_ANY = "data check SET --deep --dataset"
_CHECK_OWN = "data check SET/mine.jsonl --deep"
_IMPORT = "--images SET/photos --out SET/my.jsonl"
_JOURNAL = r"dcris-journal\.(jsonl|lock|state\.json)"
_PREDICT = "--expression cup --out OUT --format mask scores --device cpu"
_SCORE = "--data SET/data --dataset tiny --split val --out OUT/result.json"
_ABSENT = "--data SET --dataset grefcoco --split testA --protocol grefcoco --out OUT/result"
_COMPARE = "--data SET/data --dataset tiny --split val --out OUT/page.html --images OUT/images"
_TRAIN = "train SET/config.json --data SET/data --out OUT --device cpu --train.max_steps 1"
_RESUME = "train SET/run/config.json --data SET/data --out SET/run --resume --device cpu"
_BEGUN = r"(config|data|provenance)\.json|training_images\.bin|log\.jsonl|lock"
"""Of a run that ended before its first checkpoint, as one with weights that are no numbers does."""
_STEP = "checkpoints/step-00000002"
_DETRIS = "base_refcoco.pth"

_OF_RUN = (
    ("log.jsonl", (json_lines,)),
    ("config.json", (json_tree,)),
    ("data.json", (json_tree,)),
    ("provenance.json", (json_tree,)),
    (f"{_STEP}/state.json", (json_tree,)),
    (f"{_STEP}/config.json", (json_tree,)),
    (f"{_STEP}/model.safetensors", (safetensors_tree, safetensors_bomb)),
    (f"{_STEP}/optimizer.safetensors", (safetensors_tree, safetensors_bomb)),
    (_STEP, ()),
    ("checkpoints", ()),
)
_OF_MODEL = (
    ("model/config.json", (json_tree,)),
    ("model/model.safetensors", (safetensors_tree, safetensors_bomb)),
    ("model/towers.safetensors", (safetensors_tree, safetensors_bomb)),
    ("model", ()),
    ("bundle.safetensors", (safetensors_tree, safetensors_bomb)),
)
_TOWERS = (
    ("vision", "hub.safetensors", (safetensors_tree, safetensors_bomb)),
    ("vision", "meta.pth", (torch_tree, torch_bomb, zip_tree, zip_bomb)),
    ("vision", "old.pth", (torch_tree, torch_bomb)),
    ("text", "hub.bin", (torch_tree, torch_bomb, zip_tree, zip_bomb)),
    ("text", "openai.pt", (zip_tree, zip_bomb, torchscript_bomb)),
)
_MASKS = (
    ("masks/200.png", (png_chunks, picture_bomb)),
    ("masks", ()),
    ("results.json", (json_tree,)),
    ("masks.npz", (npz_arrays, npz_bomb, zip_bomb)),
    ("answers.jsonl", (json_lines,)),
)
_IMPORTED = (
    ("coco.json", "phrases.json", (json_tree,)),
    ("phrases.json", "phrases.json", (json_tree,)),
    ("phrases.csv", "phrases.csv", (csv_cells,)),
    ("photos", "phrases.csv", ()),
)
_TOOLS = (
    (tool_exports.label_studio, "label_studio.json", (json_tree,), "keep"),
    (tool_exports.label_studio_min, "label_studio_min.json", (json_tree,), "merge"),
    (tool_exports.datumaro, "datumaro.json", (json_tree,), "keep"),
    (tool_exports.labelme, "2.json", (json_tree,), "place"),
    (tool_exports.via_2, "via.json", (json_tree,), "keep"),
    (tool_exports.via_1, "via.json", (json_tree,), "keep"),
    (tool_exports.yolo, "data.yaml", (), "keep"),
    (tool_exports.yolo, "labels/train/1.txt", (), "keep"),
    (tool_exports.supervisely, "ds/ann/2.png.json", (json_tree,), "keep"),
    (tool_exports.supervisely, "meta.json", (json_tree,), "keep"),
    (tool_exports.predictions, "predictions.json", (json_tree,), "keep"),
)
_SCORE_MEVIS = "--data SET --dataset mevis --split valid_u --out OUT/result.json"
_SCORE_DAVIS = "--data SET --dataset ref_davis17 --split valid --out OUT/result.json"
_VIDEO_MASKS = (
    ("masks.zip", (zip_tree, zip_bomb), f"score SET/masks.zip {_SCORE_MEVIS}"),
    ("mevis/1234abcd/0/00001.png", (png_chunks, picture_bomb), f"score SET/mevis {_SCORE_MEVIS}"),
    ("ref_davis17/anno_2/motorbike/00001.png", (png_chunks, picture_bomb), f"score SET/ref_davis17 {_SCORE_DAVIS}"),
    ("mevis/valid_u/mask_dict.json", (json_tree,), f"score SET/masks.zip {_SCORE_MEVIS}"),
    ("mevis/valid_u/meta_expressions.json", (json_tree,), f"score SET/masks.zip {_SCORE_MEVIS}"),
    ("b.json", (json_tree,), "compare SET/a.json SET/b.json"),
)
_REFEREE = (
    ("rrsisd", "rrsisd/instances.json", (json_tree,)),
    ("refsegrs", "RefSegRS/output_phrase_val.txt", ()),
    ("refsegrs", "RefSegRS/masks/9.tif", (picture_bomb,)),
    ("reasonseg", "reason_seg/ReasonSeg/train/1.json", (json_tree,)),
    ("reasonseg", "reason_seg/ReasonSeg/val", ()),
    ("phrasecut", "VGPhraseCut_v0/refer_val.json", (json_tree,)),
    ("phrasecut", "VGPhraseCut_v0/image_data_split.json", (json_tree,)),
    ("phrasecut", "VGPhraseCut_v0/name_att_rel_count.json", (json_tree,)),
    ("refcoco-m", "refcoco-m/data/validation-00000-of-00001.parquet", (parquet_rows, parquet_bomb)),
    ("gseval", "GSEval/GroundingSuite-Eval.jsonl", (json_lines,)),
)
_VIDEO_SETS = (
    ("ref_youtube_vos", "ref-youtube-vos/meta_expressions/train/meta_expressions.json", (json_tree,)),
    ("ref_youtube_vos", "ref-youtube-vos/meta_expressions/test/meta_expressions.json", (json_tree,)),
    ("ref_youtube_vos", "ref-youtube-vos/train/Annotations/0043f083b5/00005.png", (png_chunks, picture_bomb)),
    ("ref_youtube_vos", "ref-youtube-vos/train/JPEGImages/0043f083b5/00005.jpg", (picture_bomb,)),
    ("ref_davis17", "ref-davis/davis_text_annotations/Davis17_annot2.txt", ()),
    ("ref_davis17", "ref-davis/DAVIS/ImageSets/2017/val.txt", ()),
    ("mevis", "mevis/valid_u/meta_expressions.json", (json_tree,)),
    ("mevis", "mevis/valid_u/mask_dict.json", (json_tree,)),
)
_LISTED = (
    ("photos", (), "SET/photos --recursive -e cup"),
    ("photos/a.jpg", (picture_bomb,), "SET/photos --recursive -e cup"),
    ("photos/more", (), "SET/photos/**/*.jpg -e cup"),
    ("pairs.csv", (csv_cells,), "--pairs SET/pairs.csv"),
    ("pairs.tsv", (csv_cells,), "--pairs SET/pairs.tsv"),
    ("pairs.jsonl", (json_lines,), "--pairs SET/pairs.jsonl"),
    ("result.json", (json_tree,), "SET/photos/a.jpg -e cup --threshold SET/result.json"),
)
_LEFT_OUT = r".*"
"""What could be read of several files is answered."""

FORMATS = (
    # data sets
    Format("refs(*).p", refer, "tiny/refs(toy).p", (pickle_tree, refs_bomb), _CHECK_TINY, 12),
    Format("instances.json", refer, "tiny/instances.json", (json_tree,), _CHECK_TINY, 12),
    Format("picture", refer, "images/mscoco/images/train2014/1.png", (png_chunks, picture_bomb), _CHECK_TINY),
    Format("folder of a data set", refer, "tiny", (), _CHECK_TINY),
    Format("folder of photographs", refer, "images/mscoco/images/train2014", (), _CHECK_TINY),
    Format("prepared json", prepared, "anns/refcoco/val.json", (json_tree,), _CHECK, 8),
    Format("prepared folder", prepared, "anns/refcoco", (), _CHECK),
    Format("prepared mask", prepared, "masks/refcoco/11.png", (png_chunks, picture_bomb), _CHECK),
    Format("prepared masks", prepared, "masks/refcoco", (), _CHECK),
    Format("parquet", hub, "refcoco/data/val.parquet", (parquet_rows, parquet_bomb), _CHECK, 8),
    Format("parquet folder", hub, "refcoco/data", (), _CHECK),
    Format("grefcoco", generalised, "grefcoco/grefs(unc).json", (json_tree,), f"{_CHECK_ANY} grefcoco", 12),
    Format("refzom", generalised, "ref-zom/refs(final).p", (pickle_tree, refs_bomb), f"{_CHECK_ANY} ref-zom", 6),
    Format("rrefcoco", generalised, "rrefcoco/refs(unc).p", (pickle_tree, refs_bomb), f"{_CHECK_ANY} rrefcoco", 6),
    *(
        Format(f"{dataset} {Path(file).name}", referee, file, spoils, f"{_CHECK_ANY} {dataset}", 4)
        for dataset, file, spoils in _REFEREE
    ),
    *(
        Format(f"{dataset} {file}", video_sets, file, spoils, f"{_CHECK_ANY} {dataset}", 4)
        for dataset, file, spoils in _VIDEO_SETS
    ),
    Format("own data", own, "mine.jsonl", (json_lines,), _CHECK_OWN, 8),
    Format("own mask", own, "m/1.png", (png_chunks, picture_bomb), _CHECK_OWN),
    *(
        Format(
            *(f"imported {file}", export, file, spoils),
            f"data import SET/coco.json --phrases SET/{phrases} {_IMPORT}",
        )
        for file, phrases, spoils in _IMPORTED
    ),
    *(
        Format(f"export {file}", make, file, spoils, f"data import SET --ambiguous {ambiguous} --out SET/my.jsonl", 6)
        for make, file, spoils, ambiguous in _TOOLS
    ),
    # models
    *(
        Format(file, model, file, spoils, f"predict SET/{file.partition('/')[0]} SET/photo.png {_PREDICT}")
        for file, spoils in _OF_MODEL
    ),
    *(Format(f"run {file}", run, f"run/{file}", spoils, _RESUME, 2) for file, spoils in _OF_RUN),
    Format("config.json", towers, "config.json", (json_tree,), _TRAIN, leaves=_BEGUN),
    *(
        Format(f"{part} {file}", towers, file, spoils, f"{_TRAIN} --model.{part}.name SET/{file}", leaves=_BEGUN)
        for part, file, spoils in _TOWERS
    ),
    Format("DETRIS", detris, _DETRIS, (torch_tree, torch_bomb, zip_bomb), f"convert SET/{_DETRIS} --out OUT", 2, False),
    # photographs and videos
    *(
        Format(
            *(name, photographs, name, ((png_chunks,) * name.endswith("png")) + (picture_bomb,)),
            f"predict MODEL SET/{name} {_PREDICT}",
            2,
            leaves=_JOURNAL,
        )
        for name in _PHOTOGRAPHS
    ),
    *(
        Format(
            *(name, videos, name, (playlist, video_bomb), f"predict MODEL SET/{name} -e cup --out OUT --device cpu", 2),
            leaves=_LEFT_OUT,
        )
        for name in _VIDEOS
    ),
    *(
        Format(
            *(f"listed {file}", listed, file, spoils, f"predict MODEL {words} --out OUT --device cpu", 2),
            leaves=_LEFT_OUT,
        )
        for file, spoils, words in _LISTED
    ),
    *(
        Format(f"again {file}", predicted, f"out/{file}", spoils, _AGAIN, 2, leaves=_LEFT_OUT)
        for file, spoils in (
            ("dcris-journal.jsonl", (json_lines,)),
            ("dcris-journal.state.json", (json_tree,)),
            ("predictions.json", (json_tree,)),
            ("photo.0-cup.mask.png", (png_chunks,)),
            ("label_studio.json", (json_tree,)),
        )
    ),
    # answers
    *(
        Format(f"scored {file}", predictions, file, spoils, f"score SET/{file.partition('/')[0]} {_SCORE}")
        for file, spoils in _MASKS
    ),
    *(Format(f"videos {file}", video_masks, file, spoils, words) for file, spoils, words in _VIDEO_MASKS),
    Format("scored absent", generalised, "results.json", (json_tree,), f"score SET/results.json {_ABSENT}", 8),
    Format(
        "compared absent", generalised, "b.jsonl", (json_lines,), f"compare SET/answers.jsonl SET/b.jsonl {_ABSENT}", 4
    ),
    Format("compared", predictions, "b.jsonl", (json_lines,), f"compare SET/answers.jsonl SET/b.jsonl {_COMPARE}", 4),
    *(
        Format(
            f"table {words}",
            rows,
            "ours.json",
            (json_tree,),
            f"table SET/ours.json SET/theirs.json {words} --out OUT/t",
        )
        for words in ("--cost --format latex", "--paper", "--by-category")
    ),
)


def settle(root: Path) -> None:
    """Replace what differs each time that a set of files is made: the order of metadata, and how
    long things took."""
    for path in root.rglob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for path in root.rglob("provenance.json"):
        path.write_text(json.dumps({"data_sha256": "1", "hours": 0.5, "sessions": [{"started": "now", "hours": 0.5}]}))
    for path in root.rglob("log.jsonl"):
        path.write_text("".join(json.dumps(line) + "\n" for line in timeless_log(path.parent)))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], Path]:
    """Sets of files, each made once."""
    made: dict[Any, Path] = {}

    def get(maker: Callable[[Path], None]) -> Path:
        if maker not in made:
            made[maker] = tmp_path_factory.mktemp(maker.__name__) / "set"
            maker(made[maker])
            settle(made[maker])
        return made[maker]

    return get


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would slow thousands of cases down, or change with the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Whether a connection to the playlists' address was made since the last question."""
    with socket.create_server(ADDRESS, reuse_port=True) as server:
        server.setblocking(False)

        def asked() -> bool:
            with suppress(BlockingIOError):
                server.accept()[0].close()
                return True
            return False

        yield asked


def spoil(format: Format, root: Path, seed: int, number: int) -> str:
    """Damage the format's file, as the seed and the number say, and return how."""
    random = Random(f"{format.name} {seed} {number}")
    spoils = (replace,) if (root / format.file).is_dir() else ANY
    return random.choice([*spoils, *format.spoils * 3])(random, root / format.file)


def faults(
    format: Format,
    source: Path,
    model: Path,
    folder: Path,
    seed: int,
    numbers: Sequence[int],
    asked: Callable[[], bool],
) -> Iterator[str]:
    """What goes wrong, case by case; case -1 is the file as it was."""
    root, out = folder / "set", folder / "out"
    shutil.copytree(source, root)
    whole, path = Snapshot(root), root / format.file
    words = [_fill(word, {"SET": root, "OUT": out, "MODEL": model}) for word in shlex.split(format.words)]
    for number in numbers:
        done = "nothing" if number < 0 else spoil(format, root, seed, number)
        copy = folder / "found" / f"{re.sub('[^a-z0-9.]+', '-', format.name.lower())}-{seed}-{number}"
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 1e8:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        before = files_in(root)
        code, wrong = complaint_here(words) if number < 0 else complaint(words)
        left = {name for name in files_in(root) - before | files_in(out) if not re.fullmatch(format.leaves, name)}
        if files_in(Path.cwd()):
            wrong = f"there is {files_in(Path.cwd())} in the working directory"
        elif asked():
            wrong = "it connected to an address that the file names"
        elif wrong is None and number < 0 and format.valid and code != 0:
            wrong = "the valid file was refused"
        elif wrong is None and code == 2 and left:
            wrong = f"it left {sorted(left)}"
        if wrong is not None:
            yield f"{format.name}, seed {seed}, case {number} ({done}; a copy is {copy}): {wrong}"
        else:
            copy.unlink(missing_ok=True)
        whole.restore()
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(root)


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, place in places.items():
        word = word.replace(name, str(place))
    return word


def survives(
    format: Format, make: Callable[[Callable[[Path], None]], Path], folder: Path, numbers: Sequence[int]
) -> None:
    seed = int(os.environ.get("DCRIS_FUZZ_SEED", "0"))
    source, reader = make(format.make), make(model) / "model"
    with listening() as asked:
        found = list(faults(format, source, reader, folder, seed, numbers, asked))
    if found:
        pytest.fail(f"{len(found)} of {len(numbers)} cases:\n" + "\n".join(found), pytrace=False)


@pytest.mark.parametrize("format", FORMATS[::2], ids=lambda format: format.name)
def test_spoilt_files_are_refused_in_one_sentence(
    format: Format, make: Callable[[Callable[[Path], None]], Path], tmp_path: Path
) -> None:
    """A traceback tells the person at the keyboard nothing; half a result passes for a whole
    one."""
    survives(format, make, tmp_path, [0])


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_phrases_and_names_may_be_anything(
    every: int, make: Callable[[Callable[[Path], None]], Path], tmp_path: Path
) -> None:
    """People paste phrases from anywhere, and photographs come from cameras, archives and other
    alphabets."""
    found, names = make(model), [word for word in WORDS if 0 < len(os.fsencode(word.replace("\ud800", ""))) < 200]
    for number, word in enumerate(WORDS[::every]):
        out = tmp_path / f"out {number}"
        words = ["predict", found / "model", found / "photo.png", "-e", word, "--out", out, "--format", "coco"]
        code, wrong = complaint([*words, "--device", "cpu"])
        assert wrong is None, word
        assert (code == 0) == bool(files_in(out)), word
    for number, name in enumerate([name for name in names if not set(name) & set("/\0\ud800")][::every]):
        folder, out = tmp_path / f"in {number}", tmp_path / f"named {number}"
        folder.mkdir()
        shutil.copy(found / "photo.png", folder / f"{name}.png")
        words = ["predict", found / "model", folder, "-e", "cup", "--out", out, "--device", "cpu"]
        assert complaint(words) == (0, None), name
        assert len(files_in(out)) == 6


def _nan_in_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": float("nan")}))


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/full")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run data.json", _nan_in_json),
        ("run log.jsonl", _device),
        (f"run {_STEP}/state.json", _device),
        ("model/model.safetensors", _pipe),
    ],
)
def test_what_was_found_by_chance_is_refused(
    name: str, damage: Callable[[Path], None], make: Callable[[Callable[[Path], None]], Path], tmp_path: Path
) -> None:
    """Cases that once ended in a traceback, or took all memory or minutes."""
    format = next(format for format in FORMATS if format.name == name)
    root = tmp_path / "set"
    shutil.copytree(make(format.make), root)
    damage(root / format.file)
    words = [_fill(word, {"SET": root, "OUT": tmp_path / "out"}) for word in shlex.split(format.words)]
    assert complaint(words, seconds=5)[1] is None


def test_a_video_without_a_decoder_is_refused(make: Callable[[Callable[[Path], None]], Path], tmp_path: Path) -> None:
    """PyAV has no codec for such a stream, and an attribute of nothing ended in a traceback."""
    path = tmp_path / "a.avi"
    data = (make(videos) / "a.avi").read_bytes()
    path.write_bytes(data.replace(b"MJPG", b"\0QQ1"))
    code, wrong = complaint(["predict", make(model) / "model", path, "-e", "cup", "--out", tmp_path / "out"])
    assert (code, wrong) == (2, None)


def test_a_video_whose_pixels_cannot_be_converted_is_refused(
    make: Callable[[Callable[[Path], None]], Path], tmp_path: Path
) -> None:
    """FFmpeg decodes what the fuzzer's case writes (65,535 x 1 pixels of 64 bits), and then refuses
    to convert it."""
    root = tmp_path / "set"
    shutil.copytree(make(videos), root)
    format = next(format for format in FORMATS if format.name == "a.avi")
    spoil(format, root, 0, 1)
    path = root / "a.avi"
    code, wrong = complaint(["predict", make(model) / "model", path, "-e", "cup", "--out", tmp_path / "out"])
    assert (code, wrong) == (2, None)


def test_a_video_with_large_frames_is_refused_before_one_is_decoded(
    make: Callable[[Callable[[Path], None]], Path], tmp_path: Path
) -> None:
    """FFmpeg decodes a frame when it opens a file: 1 GB for 13,300 x 13,300 pixels of 48 bits."""
    root = tmp_path / "set"
    shutil.copytree(make(videos), root)
    format = next(format for format in FORMATS if format.name == "a.mp4")
    assert "13300" in spoil(format, root, 3, 27)
    words = ["predict", make(model) / "model", root / "a.mp4", "-e", "cup", "--out", tmp_path / "out"]
    assert complaint(words, memory=200 * 2**20) == (2, None)


@pytest.mark.slow
def test_a_seed_and_a_number_decide_what_is_in_a_file(tmp_path: Path) -> None:
    """Else a failure that somebody reports could not be looked at."""
    for maker in dict.fromkeys(format.make for format in FORMATS):
        roots = tmp_path / maker.__name__, tmp_path / f"again/in/a/longer/folder/{maker.__name__}"
        for root in roots:
            root.parent.mkdir(parents=True, exist_ok=True)
            maker(root)
            settle(root)
        for format in (format for format in FORMATS if format.make is maker):
            spoilt = roots[0] / format.file
            if spoilt.is_file() and str(roots[0]).encode() in spoilt.read_bytes():
                continue  # a file with its own path, such as a journal of predictions, differs between the folders
            for number in range(4):
                contents = []
                for root in roots:
                    whole = Snapshot(root)
                    done = spoil(format, root, 0, number)
                    file = root / format.file
                    whole_file = file.is_file() and not file.is_symlink() and file.stat().st_size < 1e8
                    contents.append((done, file.read_bytes() if whole_file else files_in(root)))
                    whole.restore()
                assert contents[0] == contents[1], f"{format.name} {number}"
        for root in roots:  # another maker may have the same name
            shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_many_more(format: Format, make: Callable[[Callable[[Path], None]], Path], tmp_path: Path) -> None:
    """What one case does not find, and whether the file as it was is read."""
    more = int(os.environ.get("DCRIS_FUZZ_CASES", "50"))
    first = int(os.environ.get("DCRIS_FUZZ_FIRST", "0"))
    survives(format, make, tmp_path, [-1, *range(first, first + more)])
