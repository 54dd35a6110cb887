"""Predicted masks from files, in every format."""

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcris.cli import main
from dcris.data.dataset import all_queries
from dcris.data.masks import decode_mask, encode_mask, union_mask
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation.external_masks import score_masks
from dcris.evaluation.protocols import get_protocol
from dcris.utils.text_tables import latex, markdown
from marks import slow_except

Masks = Mapping[int, np.ndarray]
CRIS = get_protocol("cris")


@pytest.fixture(scope="module")
def queries(scenes_root: Path) -> list:
    return all_queries(load_references(scenes_root, "scenes").split("test"))


@pytest.fixture(scope="module")
def truths(queries: list) -> Masks:
    return {
        expression.sent_id: union_mask(reference.segmentations, reference.image_size).astype(bool)
        for reference, expression in queries
    }


# ---- the kinds of files --------------------------------------------------------------------------


def as_pngs(masks: Masks, folder: Path) -> Path:
    folder /= "masks"
    folder.mkdir()
    for sent_id, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(folder / f"{sent_id}.png")
    return folder


def as_coco(masks: Masks, folder: Path) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps([{"sent_id": key, "segmentation": encode_mask(mask)} for key, mask in masks.items()]))
    return path


def as_arrays(masks: Masks, folder: Path) -> Path:
    np.savez_compressed(folder / "masks.npz", **{str(key): mask for key, mask in masks.items()})
    return folder / "masks.npz"


KINDS = {"pngs": as_pngs, "coco": as_coco, "arrays": as_arrays}
every_kind = pytest.mark.parametrize("write", KINDS.values(), ids=KINDS)
Writer = Callable[[Masks, Path], Path]


def score_line(capsys: pytest.CaptureFixture[str], root: Path, *words: object) -> dict:
    arguments = ["score", *words, "--data", root, "--dataset", "scenes", "--split", "test", "--format", "json"]
    assert main([str(word) for word in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@every_kind
@pytest.mark.parametrize("protocol", ["cris", "lavt", "cgformer", "refer"])
def test_perfect_and_empty_masks(
    write: Writer, protocol: str, truths: Masks, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perfect masks score 100 and empty ones 0; flipped or exchanged masks would not."""
    (tmp_path / "none").mkdir()
    empty = {key: np.zeros_like(mask) for key, mask in truths.items()}
    perfect = score_line(capsys, scenes_root, write(truths, tmp_path), "--protocol", protocol)
    nothing = score_line(capsys, scenes_root, write(empty, tmp_path / "none"), "--protocol", protocol)
    keys = ["miou", "oiou", *(f"prec@0.{digit}" for digit in "56789")]
    assert [perfect[key] for key in keys] == [100.0] * 7
    assert [nothing[key] for key in keys] == [0.0] * 7
    assert perfect["expressions"] == len(truths)
    assert perfect["weights_sha256"] is None


@every_kind
def test_a_shifted_square_by_hand(write: Writer, tmp_path: Path, tiny_refer) -> None:
    """A square of side 10, shifted by 5 in both directions: intersection 25, union 175."""
    reference, expression = _square(tiny_refer)
    mask = np.zeros(reference.image_size, bool)
    mask[10:20, 15:25] = True
    shifted = np.roll(mask, (5, 5), (0, 1))
    (result,) = score_masks(write({expression.sent_id: shifted}, tmp_path), [(reference, expression)], CRIS)
    assert (result.overlap.intersection, result.overlap.union) == (25, 175)


@pytest.mark.parametrize("kind", ["pngs", "arrays", "arrays of shares"])
def test_probability_maps_need_a_threshold(
    kind: str, truths: Masks, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a threshold, every pixel above 0 would count as the object."""
    maps = {key: np.where(mask, 230, 12).astype(np.uint8) for key, mask in truths.items()}
    if kind == "arrays of shares":
        maps = {key: values.astype(np.float32) / 255 for key, values in maps.items()}
    predictions = as_arrays(maps, tmp_path)
    if kind == "pngs":
        predictions = tmp_path
        for key, values in maps.items():
            Image.fromarray(values).save(predictions / f"{key}.png")
    words = ["score", predictions, "--data", scenes_root, "--dataset", "scenes", "--split", "test"]
    assert main([str(word) for word in words]) == 2
    assert "--mask-threshold" in capsys.readouterr().err
    for threshold in (0.5, 0.3) if kind == "arrays of shares" else (0.5, 128):
        assert score_line(capsys, scenes_root, predictions, "--mask-threshold", threshold)["miou"] == 100.0


def _square(tiny_refer):
    from dataclasses import replace

    reference = load_references(tiny_refer.write(), tiny_refer.dataset).references[0]
    reference = replace(reference, segmentations=([[15, 10, 25, 10, 25, 20, 15, 20]],), image_size=(40, 60))
    assert union_mask(reference.segmentations, reference.image_size).sum() == 100
    return reference, reference.expressions[0]


@pytest.mark.parametrize("protocol", slow_except(["cris", "lavt", "grefcoco", "refzom"], "lavt", "grefcoco"))
def test_results_of_a_model_keep_their_scores(
    protocol: str, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dcris score` gives the same scores as `dcris evaluate` for the same masks, also where these
    are compared on a square: at the size of the image, they would have others."""
    out = tmp_path / "answers.jsonl"
    rule = ["--protocol", protocol, *(["--none-rule", "pixels:50"] if protocol in ("grefcoco", "refzom") else [])]
    words = ["evaluate", "tiny", "--data", scenes_root, "--split", "test", "--answers", out, "--device", "cpu"]
    assert main([str(word) for word in [*words, *rule, "--boundary"]]) == 0
    theirs = json.loads(capsys.readouterr().out)
    ours = score_line(capsys, scenes_root, out, *rule, "--boundary")
    unknown = {"weights_sha256", "precision", "device", "threads"}
    nothing = {"grefcoco": {"n_acc"}, "refzom": {"acc"}}.get(protocol, set())  # all scenes have targets
    assert {key for key in theirs if ours[key] is None} == unknown | nothing
    assert {key: ours[key] for key in theirs.keys() - unknown} == {key: theirs[key] for key in theirs.keys() - unknown}
    if protocol == "lavt":  # masks of another protocol's square are not those of this
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert decode_mask(lines[0]["compared"], (480, 480)).shape == (480, 480)
        others = [{key: value for key, value in line.items() if key != "compared"} for line in lines]
        plain = tmp_path / "plain.jsonl"
        plain.write_text("\n".join(map(json.dumps, others)))
        same = (score_line(capsys, scenes_root, path, "--protocol", "refzom") for path in (out, plain))
        assert len({json.dumps({**each, "predictions": ""}) for each in same}) == 1
        plain.write_text("\n".join(map(json.dumps, [{**lines[0], "compared": lines[0]["segmentation"]}, *lines[1:]])))
        words = ["score", plain, "--data", scenes_root, "--dataset", "scenes", "--split", "test", "--protocol", "lavt"]
        assert main([str(word) for word in words]) == 2
        assert "line 1 has a 'compared' that cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "protocol"),
    slow_except(product(["score", "present"], ["lavt", "grefcoco"]), ("score", "lavt"), ("present", "grefcoco")),
)
def test_scores_of_other_programs_are_assessed(
    key: str, protocol: str, queries: list, truths: Masks, scenes_root: Path, tmp_path: Path
) -> None:
    """Right masks with high scores, wrong ones with low scores: the report says that they tell the
    two apart, as it does for our own models."""
    entries = [
        {
            "sent_id": sent_id,
            "segmentation": encode_mask(np.roll(mask, 0 if number % 3 else 60)),
            key: 0.8 if number % 3 else 0.3,
        }
        for number, (sent_id, mask) in enumerate(truths.items())
    ]
    theirs, out, report = tmp_path / "theirs.json", tmp_path / "out.json", tmp_path / "report.html"
    theirs.write_text(json.dumps(entries))
    words = ["score", theirs, "--data", scenes_root, "--dataset", "scenes", "--split", "test", "--protocol", protocol]
    words += ["--none-rule", "any-pixel"] if protocol == "grefcoco" else []
    assert main([str(word) for word in [*words, "--out", out, "--report", report]]) == 0
    confidence = json.loads(out.read_text())["confidence"]
    right = sum(bool(number % 3) for number in range(len(entries)))
    assert confidence["score"]["auroc"] == 1
    assert [each["count"] for each in confidence["score"]["bins"]] == [len(entries) - right, right]
    assert 0.3 < confidence["min_score"]["value"] <= 0.8
    assert ("present" in confidence) == (key == "present")
    assert "--min-score" in report.read_text()
    results = list(
        score_masks(theirs, queries, get_protocol(protocol, "any-pixel" if protocol == "grefcoco" else None))
    )
    assert [result.score for result in results] == [entry[key] for entry in entries]


def test_classic_protocols_take_any_number_as_score(
    truths: Masks, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A COCO result may have a logit or NaN as its score, which has no influence on an IoU."""
    entries = json.loads(as_coco(truths, tmp_path).read_text())
    for entry in entries:
        entry["score"] = 7.5
    (tmp_path / "results.json").write_text(json.dumps(entries))
    out = tmp_path / "out.json"
    found = score_line(capsys, scenes_root, tmp_path / "results.json", "--protocol", "lavt", "--out", out)
    assert found["miou"] == 100
    assert "confidence" not in json.loads(out.read_text())


def test_tables_in_markdown_and_latex(
    truths: Masks, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several systems make a table; numbers are right-aligned, and names are escaped."""
    files = [as_coco(truths, tmp_path), as_arrays(truths, tmp_path)]
    words = ["score", *files, "--data", scenes_root, "--dataset", "scenes", "--split", "test"]
    assert main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[1:3] == [" results            ", " 100.00 "]
    assert main([str(word) for word in [*words, "--format", "latex"]]) == 0
    assert r"masks & 100.00 & 100.00" in capsys.readouterr().out
    assert r"a\_b \& 50\% \textbackslash{}x" in latex(["name"], [["a_b & 50% \\x"]])
    assert r"a\|b" in markdown(["name", "n"], [["a|b", "1"]])


def test_a_report_of_masks_without_a_model(
    truths: Masks, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Result file and report are written as for a model."""
    out, report = tmp_path / "result.json", tmp_path / "report.html"
    result = score_line(capsys, scenes_root, as_coco(truths, tmp_path), "--out", out, "--report", report)
    written = json.loads(out.read_text())
    assert result.items() <= written.items()
    assert written["analysis"]["intervals"]["miou"] == [100.0, 100.0]
    assert "data:image/png" in report.read_text()


# ---- what does not fit ---------------------------------------------------------------------------


@every_kind
def test_missing_masks_raise_or_count_as_empty(write: Writer, queries: list, truths: Masks, tmp_path: Path) -> None:
    """A missing mask is an error, or counts as empty if wanted."""
    left_out = queries[3][1].sent_id
    path = write({key: mask for key, mask in truths.items() if key != left_out}, tmp_path)
    with pytest.raises(DcrisError, match=f"no mask for 1 of .* sentence {left_out}"):
        next(score_masks(path, queries, CRIS))
    results = score_masks(path, queries, CRIS, missing_is_empty=True)
    assert [result.expression.sent_id for result in results if result.overlap.iou < 1] == [left_out]


@every_kind
def test_masks_of_another_size_raise(write: Writer, queries: list, truths: Masks, tmp_path: Path) -> None:
    """Masks of the network's size would be compared with the wrong pixels."""
    path = write({**truths, queries[0][1].sent_id: np.ones((448, 448), bool)}, tmp_path)
    with pytest.raises(DcrisError, match=r"448|not for an image of 112 x 112"):
        list(score_masks(path, queries, CRIS))


def _npz(folder: Path, **arrays: bytes) -> Path:
    with zipfile.ZipFile(folder / "masks.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays.items():
            archive.writestr(f"{name}.npy", content)
    return folder / "masks.npz"


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _bomb(folder: Path, key: str) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|b1", "fortran_order": False, "shape": (10**9, 10**9)})
    return _npz(folder, **{key: header.getvalue()})


def _long_header(folder: Path, key: str) -> Path:
    """Write an array header that claims 4 GB, with 60 MB behind it, in 60 kB."""
    path = folder / "masks.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{key}.npy", "w") as file:
        file.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
        for _ in range(60):
            file.write(bytes(1_000_000))
    return path


def _lzma(folder: Path, key: str) -> Path:
    with zipfile.ZipFile(folder / "masks.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(f"{key}.npy", _npy(np.ones((112, 112), bool)))
    return folder / "masks.npz"


def _pipe(name: str) -> Callable[[Path, str], Path]:
    """Make a named pipe instead of a file or of one image of a folder; reading it would block."""

    def make(folder: Path, key: str) -> Path:
        path = folder / name.replace("KEY", key)
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        return path.parent if path.suffix == ".png" else path

    return make


def _text(name: str, content: str) -> Callable[[Path, str], Path]:
    def write(folder: Path, key: str) -> Path:
        (folder / name).write_text(content.replace("KEY", key))
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, key: folder / "absent", "there are no masks"),
        (lambda folder, key: folder, "has no masks; name each"),
        (_text("a.txt", "x"), "neither a folder"),
        (_text("a.json", "{}"), "not a list"),
        (_text("a.json", "[1]"), "entry 1 is not an object"),
        (_text("a.json", '[{"sent_id": "KEY"}]'), "not an integer"),
        (_text("a.json", '[{"sent_id": KEY}, {"sent_id": KEY}]'), "repeats sentence"),
        (_text("a.json", '[{"sent_id": KEY, "segmentation": 5}]'), "no 'segmentation'"),
        (_text("a.json", '[{"sent_id": KEY, "segmentation": {"size": [1, 1], "counts": [1]}}]'), "cannot be decoded"),
        (_text("a.jsonl", "{"), "line 1 is not JSON"),
        (_text("a.npz", "PK"), "cannot read the masks"),
        (_bomb, "1000000000"),
        (_lzma, "compression"),
        (_pipe("masks/KEY.png"), "it is a pipe"),
        (_pipe("a.npz"), "it is a pipe"),
        (_pipe("a.json"), "it is a pipe"),
        (_pipe("a.jsonl"), "it is a pipe"),
        (lambda folder, key: _npz(folder, **{key: b"nothing"}), "cannot read the masks"),
        (lambda folder, key: _npz(folder, **{key: _npy(np.array([{}], object))}), "object"),
        (lambda folder, key: _npz(folder, **{key: _npy(np.ones((112, 112)))}), "float64"),
        (lambda folder, key: _npz(folder, **{key: _npy(np.ones((112, 112), bool))[:600]}), "cannot read the masks"),
    ],
)
def test_unreadable_files_raise(make: Callable, words: str, queries: list, tmp_path: Path) -> None:
    """Foreign files must not run code, fill the memory or pass as a score."""
    with pytest.raises(DcrisError, match=words):
        list(score_masks(make(tmp_path, str(queries[0][1].sent_id)), queries[:1], CRIS))


def test_reading_a_header_is_bounded(queries: list, tmp_path: Path) -> None:
    """A file of a few kilobytes must not fill the memory."""
    path = _long_header(tmp_path, str(queries[0][1].sent_id))
    tracemalloc.start()
    with pytest.raises(DcrisError, match="cannot read the masks"):
        list(score_masks(path, queries[:1], CRIS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize("empty", [[], [[]], {"size": [112, 112], "counts": []}])
def test_an_empty_mask_in_any_notation(empty: object, queries: list, tmp_path: Path) -> None:
    """Prediction.polygons() returns [] for an empty mask, which is not an error."""
    (tmp_path / "a.json").write_text(json.dumps([{"sent_id": queries[0][1].sent_id, "segmentation": empty}]))
    (result,) = score_masks(tmp_path / "a.json", queries[:1], CRIS, keep_masks=True)
    assert result.overlap.intersection == 0
    assert not decode_mask(result.prediction, (112, 112)).any()
