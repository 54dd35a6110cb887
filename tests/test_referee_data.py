"""RRSIS-D, RefSegRS, ReasonSeg, PhraseCut, RefCOCO-M and GSEval as their authors publish them.

Counts and masks of miniature sets are those computed by hand; malformed files give one sentence.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dcris.cli import main
from dcris.data.check import check_dataset
from dcris.data.dataset import ImageTasks, all_queries
from dcris.data.masks import decode_mask, mask_area, true_mask, union_mask, validate_segmentation
from dcris.data.mixing import mix
from dcris.data.readers.load import load_references
from dcris.data.readers.phrasecut import _compact, size_subset
from dcris.data.readers.reasonseg import _draw
from dcris.data.registry import DATASETS
from dcris.data.table import ReferenceTable
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.recipes import get_recipe
from dcris.types import Reference
from hub import Hub
from layouts import parquet
from referee import (
    REFSEGRS,
    WRITERS,
    H,
    W,
    box,
    gseval_lines,
    refcocom_rows,
    rrsisd_records,
    task,
    write_gseval,
    write_phrasecut,
    write_reasonseg,
    write_refcocom,
    write_refcocom_images,
    write_refsegrs,
    write_rrsisd,
)


def truth(reference: Reference) -> np.ndarray:
    return true_mask(reference, reference.expressions[0]).mask


def subsets(table: ReferenceTable) -> dict[str | None, set[str]]:
    return {each.name: set(each.subsets) for item in table.references for each in item.expressions}


@pytest.mark.parametrize(
    ("dataset", "splits", "images"),
    [
        ("rrsisd", {"train": (2, 2), "val": (1, 1), "test": (1, 1)}, 4),
        ("refsegrs", {"train": (2, 2), "val": (1, 1), "test": (1, 1)}, 4),
        ("reasonseg", {"train": (1, 2), "val": (1, 1), "test": (1, 1)}, 3),
        ("phrasecut", {"train": (1, 1), "val": (2, 2), "miniv": (1, 1)}, 3),
        ("refcoco-m", {"val": (3, 4)}, 2),
        ("gseval", {"test": (2, 2)}, 2),
    ],
)
def test_counts_are_those_by_hand(
    dataset: str, splits: dict[str, tuple[int, int]], images: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever unpacks the authors' files finds every expression in its split; the checks pass."""
    root = WRITERS[dataset](tmp_path)
    if dataset == "refcoco-m":  # whose images are in the Parquet file, or among COCO's
        write_refcocom_images(root)
    table = load_references(root, dataset)
    assert table.split_by == DATASETS[dataset].split_by
    assert table.splits() == splits
    assert len({item.image_path for item in table.references}) == images
    for key in ("ref_id", "sent_id"):
        values = [
            value
            for item in table.references
            for value in ([item.ref_id] if key == "ref_id" else [each.sent_id for each in item.expressions])
        ]
        assert len(set(values)) == len(values)
    assert table.sha256() == load_references(root, dataset).sha256()
    assert main(["data", "check", str(root), "--dataset", dataset, "--deep"]) == 0
    out = capsys.readouterr().out
    assert "no problems" in out
    assert "not the official size" in out


# ---- RRSIS-D -------------------------------------------------------------------------------------


def test_images_of_801_pixels_are_resized_to_their_mask(tmp_path: Path) -> None:
    """The official download has them, and published scores are of all images."""
    root = write_rrsisd(tmp_path)
    table = load_references(root, "rrsisd")
    for reference in table.references:
        assert reference.image_size == (H, H)
        np.testing.assert_array_equal(truth(reference), box(reference.ref_id, 2, 20, 30, (H, H)))
    config = get_recipe("dcris_tiny")
    tasks = ImageTasks(all_queries(table.references), config.data, tokenizer_of(config.model.text))
    sizes = [tasks[place].transform.size for place in range(4)]
    assert sizes == [(H, H)] * 4
    report = check_dataset(root, "rrsisd")
    assert report.problem_count == 0
    assert any("2 images of another size (height x width)" in each for each in report.warnings)
    assert any("00002.jpg (41 x 40), 00004.jpg (40 x 37)" in each for each in report.warnings)
    assert any("3 XML files for 4 images" in each for each in report.warnings)
    (root / "images/rrsisd/JPEGImages/00003.jpg").unlink()
    assert check_dataset(root, "rrsisd").problem_count == 1
    other = tmp_path / "other"
    write_rrsisd(other)
    (other / "rrsisd").rename(other / "planes")
    (other / "images/rrsisd/JPEGImages").rename(other / "images/train2014")
    assert check_dataset(other, "planes").problem_count == 2  # of any other data set, that is an error


def test_exports_have_images_of_the_size_of_their_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tool that loads the export would refuse a mask of another size, or shift it."""

    def export(root: Path, dataset: str, format: str) -> Path:
        out = tmp_path / f"{dataset} exported"
        assert main(["data", "export", str(root), "--dataset", dataset, "--format", format, "--out", str(out)]) == 0
        return out

    root = write_rrsisd(tmp_path / "data")
    out = export(root, "rrsisd", "refer")
    tables = load_references(out, "rrsisd"), load_references(root, "rrsisd")
    ours, theirs = ([truth(each).tolist() for each in table.references] for table in tables)
    assert ours == theirs
    (out / "rrsisd").rename(out / "planes")
    assert check_dataset(out, "planes").problem_count == 0
    capsys.readouterr()
    export(write_reasonseg(tmp_path / "reason"), "reasonseg", "coco")
    assert "background now: the ignored pixels of 1" in capsys.readouterr().out


def test_several_masks_in_the_list_are_refused(tmp_path: Path) -> None:
    references, instances = rrsisd_records()
    instances["annotations"][0]["segmentation"] *= 2
    with pytest.raises(DcrisError, match="annotation 1 of reference 1 cannot be decoded"):
        load_references(write_rrsisd(tmp_path, references, instances), "rrsisd")


def test_other_words_in_raw_are_counted(tmp_path: Path) -> None:
    """LAVT's family reads `raw`: where its words differ, its scores are of other sentences."""
    assert load_references(write_rrsisd(tmp_path / "same"), "rrsisd").notes == ()
    references, _ = rrsisd_records()
    references[1]["sentences"][0]["raw"] = "A plane, 2"
    (note,) = load_references(write_rrsisd(tmp_path / "other", references), "rrsisd").notes
    assert note.startswith("1 sentences have a 'raw' that differs from 'sent', such as 'A plane, 2' and 'a plane 2'")


@pytest.mark.parametrize(
    ("dataset", "others"),
    [
        ("refsegrs", ("RefSegRS/output_phrase_train.txt",)),
        ("reasonseg", ("reason_seg/ReasonSeg/train/1.jpg", "reason_seg/ReasonSeg/train/1.json")),
        ("phrasecut", ("VGPhraseCut_v0/refer_train.json",)),
    ],
)
def test_a_split_is_the_same_without_the_others(dataset: str, others: tuple[str, ...], tmp_path: Path) -> None:
    """Masks are named by sent_id, and results compare by data_sha256, on any machine."""
    root = WRITERS[dataset](tmp_path)
    if dataset == "refsegrs":  # an id that is no number
        write_refsegrs(root, {**REFSEGRS, "val": "009 van"})
        (root / "RefSegRS/masks/9.tif").rename(root / "RefSegRS/masks/009.tif")
    whole = load_references(root, dataset)
    for other in others:
        (root / other).unlink()
    part = load_references(root, dataset)
    assert part.splits().keys() == whole.splits().keys() - {"train"}
    for split in part.splits():
        assert part.sha256(split) == whole.sha256(split)


# ---- RefSegRS ------------------------------------------------------------------------------------


def test_refsegrs_is_named_by_id(tmp_path: Path) -> None:
    table = load_references(write_refsegrs(tmp_path), "refsegrs")
    named = {each.name: (each.text, item) for item in table.references for each in item.expressions}
    texts = {name: text for name, (text, _) in named.items()}
    assert texts == {"7": "road in the middle", "8": "vehicle on the road", "9": "van", "10": "a building"}
    assert [each.sent_id for item in table.references for each in item.expressions] == [7, 8, 9, 10]
    expected = box(8, 3, 30, 20) | box(0, 30, 10, 33)
    np.testing.assert_array_equal(truth(named["8"][1]), expected)
    np.testing.assert_array_equal(truth(named["10"][1]), box(10, 3, 30, 20))


def test_an_id_with_two_phrases_is_one_reference(tmp_path: Path) -> None:
    phrases = {**REFSEGRS, "val": "9 van\n9 the white van\n"}
    table = load_references(write_refsegrs(tmp_path, phrases, folder="refsegrs"), "refsegrs")
    assert table.splits()["val"] == (1, 2)
    (reference,) = table.split("val")
    assert [each.name for each in reference.expressions] == [None, None]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("9", "line 1 is not an id and a phrase: '9'"),
        ("../9 van", "line 1 has a 'id' that is not a plain path inside its folder"),
        ("a/9 van", "line 1 has a 'id' that is not a plain name"),
        ("11 van", "11.tif"),
        ("9 \ud800", "UTF-8"),
    ],
)
def test_malformed_lines_of_refsegrs(line: str, sentence: str, tmp_path: Path) -> None:
    write_refsegrs(tmp_path)
    path = tmp_path / "RefSegRS/output_phrase_val.txt"
    path.write_bytes(line.encode(errors="surrogatepass"))
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(tmp_path, "refsegrs")
    assert "\n" not in str(caught.value)


# ---- ReasonSeg -----------------------------------------------------------------------------------


def test_polygons_are_drawn_largest_first(tmp_path: Path) -> None:
    """Drawn in the file's order, the large ignored region would cover the target."""
    table = load_references(write_reasonseg(tmp_path), "reasonseg")
    train, val, test = table.references
    ignored_inside = box(15, 12, 20, 16)
    target = box(10, 10, 30, 25) & ~ignored_inside
    ignored = (box(0, 0, 40, 35) & ~box(10, 10, 30, 25)) | ignored_inside
    found = true_mask(train, train.expressions[0])
    np.testing.assert_array_equal(found.mask, target)
    np.testing.assert_array_equal(found.ignored, ignored)
    np.testing.assert_array_equal(union_mask(train.segmentations, (H, W)) > 0, target)
    np.testing.assert_array_equal(truth(val), box(5, 5, 10, 10) | box(8, 8, 13, 13))
    assert (val.ignored, test.ignored, test.segmentations) == (None, None, ())
    assert [each.text for each in train.expressions] == ["the thing that tells the time", "a clock"]
    assert [each.text for each in val.expressions] == ["caf\u00e9 sign"]  # cp1252, and only the first text
    assert [item.expressions[0].name for item in table.references] == [None, "2", "3 copy"]
    assert [item.expressions[0].subsets for item in table.references] == [("long query",), *[("short query",)] * 2]
    (note,) = table.notes
    assert note.startswith("1 image without a polygon of a target (test/3 copy)")


def test_equal_labels_need_no_order(tmp_path: Path) -> None:
    """An official JSON has any number of targets; none hides another."""

    def change(content: dict[str, Any]) -> None:
        content["shapes"] = [each for each in content["shapes"] if each["label"] == "target"]

    reference = load_references(write_reasonseg(tmp_path, change), "reasonseg").references[0]
    np.testing.assert_array_equal(truth(reference), box(10, 10, 30, 25))


_CORNER = st.tuples(st.floats(-10, W + 10, width=32), st.floats(-10, H + 10, width=32)).map(list)
_SHAPE = st.fixed_dictionaries(
    {
        "label": st.sampled_from(["target", "Target 2", "ignore", "IGNORED", "flag", "Flag"]),
        "points": st.lists(_CORNER, min_size=1, max_size=6),
    }
)


@settings(max_examples=40)
@given(st.lists(_SHAPE, max_size=5))
def test_any_polygons_are_drawn_as_by_lisa(shapes: list[dict[str, Any]]) -> None:
    """An independent rendering: each polygon alone; a pixel is the smallest one's that has it."""
    layers = []
    for number, each in enumerate(shapes):
        if each["label"].lower() == "flag":
            continue
        layer = np.zeros((H, W), np.uint8)
        corners = np.array([[int(x), int(y)] for x, y in each["points"]], np.int32)
        cv2.polylines(layer, [corners], True, 1, 1)
        cv2.fillPoly(layer, [corners], 1)
        layers.append((int(layer.sum()), number, layer > 0, "ignore" in each["label"].lower()))
    areas = [area for area, *_ in layers]
    assume(len(set(areas)) == len(areas))  # the order of equal ones is that of an unstable sort
    expected = np.zeros((H, W), int)
    for _, _, inside, ignored in sorted(layers, key=lambda layer: layer[:2], reverse=True):
        expected[inside] = 255 if ignored else 1
    np.testing.assert_array_equal(_draw(shapes, (H, W), Path("1.json")), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("text"), "the file has no 'text'"),
        (lambda c: c.update(text=[]), "the file has an empty 'text'"),
        (lambda c: c.update(text=[3]), "the file has an entry of 'text' that is not text"),
        (lambda c: c.update(text=[" "]), "the file has a blank 'text'"),
        (lambda c: c.update(is_sentence="yes"), "'is_sentence' that is not true or false"),
        (lambda c: c.update(shapes=None), "'shapes' that is not a list"),
        (lambda c: c["shapes"][0].pop("label"), "shape 1 has no 'label'"),
        (lambda c: c["shapes"][0].update(points=[1, 2]), r"shape 1 has 'points' that are not a list of \[x, y\]"),
        (lambda c: c["shapes"][0].update(points=[[1, 2, 3]]), r"shape 1 has 'points' that are not a list of \[x, y\]"),
        (lambda c: c["shapes"][0].update(points=[]), "shape 1 has unusable 'points'"),
        (lambda c: c["shapes"][0].update(points=[["1", "2"]]), "shape 1 has unusable 'points'"),
        (lambda c: c["shapes"][0].update(points=[[1e9, 2]] * 3), "shape 1 has unusable 'points'"),
        (lambda c: c.update(shapes=c["shapes"] * 300), "1,200 'shapes'; the limit is 1,000"),
    ],
)
def test_malformed_files_of_reasonseg(
    change: Callable[[Any], Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_reasonseg(tmp_path, change)
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(root, "reasonseg")
    assert "train/1.json" in str(caught.value)
    assert main(["data", "check", str(root), "--dataset", "reasonseg"]) == 2
    assert capsys.readouterr().out.count("problem: ") == 1


@pytest.mark.parametrize("ending", ["jpg", "json"])
def test_an_image_without_its_json_is_named(ending: str, tmp_path: Path) -> None:
    root = write_reasonseg(tmp_path)
    path = root / f"reason_seg/ReasonSeg/val/2.{ending}"
    path.unlink()
    with pytest.raises(DcrisError, match=f"2.{ending}"):
        load_references(root, "reasonseg")


def test_neither_encoding(tmp_path: Path) -> None:
    root = write_reasonseg(tmp_path)
    (root / "reason_seg/ReasonSeg/val/2.json").write_bytes(b'{"text": ["\x81"]}')
    with pytest.raises(DcrisError, match="it is not UTF-8 text"):
        load_references(root, "reasonseg")


# ---- PhraseCut -----------------------------------------------------------------------------------


def drawn(*polygons: list[list[float]]) -> np.ndarray:
    """Draw polygons one at a time, as utils/data_transfer.py of PhraseCutDataset does."""
    mask = np.zeros((H, W), bool)
    for polygon in polygons:
        image = Image.new("L", (W, H), 0)
        ImageDraw.Draw(image).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
        mask |= np.array(image) > 0
    return mask


@settings(max_examples=40)
@given(st.lists(st.lists(_CORNER, min_size=2, max_size=6), min_size=1, max_size=4))
def test_any_polygons_are_drawn_as_by_phrasecut(polygons: list[list[list[float]]]) -> None:
    (pixels,) = _compact({"Polygons": [polygons]})["Polygons"]
    np.testing.assert_array_equal(decode_mask(validate_segmentation(pixels, (H, W)), (H, W)) > 0, drawn(*polygons))
    assert mask_area(pixels, (H, W)) == drawn(*polygons).sum()


def test_objects_of_phrasecut_are_united(tmp_path: Path) -> None:
    table = load_references(write_phrasecut(tmp_path), "phrasecut")
    cup, both, _, line = table.references
    np.testing.assert_array_equal(truth(cup), box(2, 3, 10, 9))
    corner, inside = [[-4, 30], [10, 30], [10, 45], [-4, 45]], [[20.7, 2.2], [30.9, 2.2], [30.9, 12.5], [20.7, 12.5]]
    np.testing.assert_array_equal(truth(both), drawn(corner, inside))
    np.testing.assert_array_equal(truth(both), box(0, 30, 11, 40) | box(20, 2, 31, 13))
    assert [len(each.segmentations) for each in table.references] == [1, 2, 6, 1]
    np.testing.assert_array_equal(truth(line), box(5, 5, 10, 6))
    assert [each.coco_id for each in table.references] == [None, 9, 9, None]
    assert [each.category for each in table.references] == ["cup", "table", "table", "dragon"]


def test_subsets_of_phrasecut(tmp_path: Path) -> None:
    """Scores by subset are compared with published ones, so tasks are in the authors' subsets."""
    assert subsets(load_references(write_phrasecut(tmp_path), "phrasecut")) == {
        "101__1": {"c_coco", "i_single", "d_notcocotv", "p_name", "c20", "c100", "c500", "a200+"},
        "102__1_2": {
            *("i_multi", "d_cocotv", "p_att", "p_attm", "p_att+", "c21-100", "c100", "c500", "a20", "a100", "a200"),
        },
        "102__3": {"i_many", "d_cocotv", "p_rel", "p_rel+", "c21-100", "c100", "c500", "a200+"},
        "103__1": {"i_single", "d_notcocotv", "p_verbose", "c500+", "a200+"},
    }
    assert [size_subset(pixels, (10, 100)) for pixels in (19, 20, 200, 201)] == ["s_small", "s_mid", "s_mid", "s_large"]


def test_an_image_of_visual_genome_is_known_by_its_coco_id(tmp_path: Path) -> None:
    """Training on RefCOCO must not see PhraseCut's val image 102, which is COCO's image 9."""
    phrasecut = load_references(write_phrasecut(tmp_path), "phrasecut")
    records, instances = rrsisd_records()
    for record, image in zip(records, instances["images"], strict=True):
        record["split"] = "train"
        image["file_name"] = f"COCO_train2014_{image['id'] + 8:012d}.jpg"
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco/refs(unc).p").write_bytes(pickle.dumps(records, 2))
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(instances))
    mixture = mix("mixed", [load_references(tmp_path, "refcoco")], [phrasecut])
    assert [each.image_path.name[-6:-4] for each in mixture.references] == ["10", "11", "12"]


def _task(key: str, value: Any) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    def change(tasks: dict[str, list[dict[str, Any]]]) -> None:
        tasks["val"][0][key] = value

    return change


def _structure(key: str, value: Any) -> Callable[[dict[str, list[dict[str, Any]]]], None]:
    def change(tasks: dict[str, list[dict[str, Any]]]) -> None:
        tasks["val"][0]["phrase_structure"][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_task("task_id", 3), "entry 1 has a 'task_id' that is not text"),
        (_task("task_id", "101__1"), "task 101__1 occurs twice"),
        (_task("task_id", "../1"), "'task_id' that cannot be the name of a file"),
        (_task("image_id", 7), "names image 7, which image_data_split.json does not have"),
        (_task("image_id", 101), "is of val, but its image 101 is of train"),
        (_task("phrase", ""), "has a blank 'phrase'"),
        (_task("phrase_structure", None), "'phrase_structure' that is not an object"),
        (_task("instance_boxes", []), "has 0 'instance_boxes' but 2 'Polygons'"),
        (lambda tasks: tasks["val"][0].update(Polygons=[], instance_boxes=[]), "it must have 1 to 1,000"),
        (_task("Polygons", [[[[1, 2], [3]]], []]), "'Polygons' that are not lists of polygons"),
        (_task("Polygons", [[[["1", "2"]] * 3], []]), "'Polygons' that are not lists of polygons"),
        (_task("Polygons", [[[[1e300, 2]] * 3], []]), "'Polygons' that are not lists of polygons"),
        (_task("Polygons", [[[[999, 2]] * 3], []]), "unusable object 1 in its 'Polygons' .*lies far outside"),
        (_task("Polygons", 5), "'Polygons' that is not a list"),
        (_task("Polygons", "ab"), "'Polygons' that is not a list"),
        (_task("Polygons", {"a": 1, "b": 2}), "'Polygons' that is not a list"),
        (_task("Polygons", ["a", []]), "'Polygons' that are not lists of polygons"),
        (_task("Polygons", [["a"], []]), "'Polygons' that are not lists of polygons"),
        (_structure("name", None), "'name' that is not text"),
        (_structure("attributes", [1]), "'attributes' that are not texts"),
        (_structure("type", 1), "'type' that is not text"),
    ],
)
def test_malformed_tasks_of_phrasecut(change: Callable[[Any], None], sentence: str, tmp_path: Path) -> None:
    root = write_phrasecut(tmp_path, change)
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(root, "phrasecut")
    assert "refer_val.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert check_dataset(root, "phrasecut").problem_count == 1  # the other tasks are read


def test_files_that_phrasecut_lacks_are_named(tmp_path: Path) -> None:
    root = write_phrasecut(tmp_path)
    for name in ("name_att_rel_count.json", "image_data_split.json"):
        (root / "VGPhraseCut_v0" / name).unlink()
        with pytest.raises(DcrisError, match=name):
            load_references(root, "phrasecut")


def test_an_object_without_a_polygon_counts_but_has_no_pixels(tmp_path: Path) -> None:
    """The authors' code skips polygons of one corner; the task stays in the split."""
    change = lambda tasks: tasks["miniv"].append(task("103__9", 103, [[[[1, 1]]]], "a dot"))  # noqa: E731
    table = load_references(write_phrasecut(tmp_path, change), "phrasecut")
    assert table.splits()["miniv"] == (2, 2)
    assert not truth(table.references[-1]).any()


# ---- RefCOCO-M -----------------------------------------------------------------------------------


def test_refcocom_in_parquet(tmp_path: Path) -> None:
    table = load_references(write_refcocom(tmp_path), "refcoco-m")
    tall, man, ufo = table.references
    np.testing.assert_array_equal(truth(tall), box(3, 4, 20, 30))
    assert [(each.ref_id, each.category) for each in table.references] == [
        (501, "giraffe"),
        (502, "person"),
        (503, "spaceship"),
    ]
    assert [each.text for each in tall.expressions] == ["tall one", "the giraffe"]
    assert [each.sent_id for item in (tall, man, ufo) for each in item.expressions] == [1, 2, 3, 4]
    assert ufo.image_path.name == "COCO_train2014_000000000036.jpg"


def _sample(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: change(rows[0]["samples"][0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_sample(lambda s: s.update(sentences=[])), "reference 501 has an empty 'sentences'"),
        (_sample(lambda s: s.update(sentences=None)), "'sentences' that is not a list"),
        (_sample(lambda s: s.update(mask=None)), "'mask' that is not an object"),
        (_sample(lambda s: s["mask"].update(size=[H, W + 1])), "whose size is not that of its image's other masks"),
        (_sample(lambda s: s["mask"].update(counts="0")), "annotation 501 of reference 501 cannot be decoded"),
        (_sample(lambda s: s.update(id=502)), "two different entries of 'annotations' have the id 502"),
        (lambda rows: rows[0].update(file_name="../a.jpg"), "not a plain path"),
        (lambda rows: rows[0].update(samples=None), "'samples' that is not a list"),
    ],
)
def test_malformed_rows_of_refcocom(change: Callable[[Any], None], sentence: str, tmp_path: Path) -> None:
    rows = refcocom_rows()
    change(rows)
    with pytest.raises(DcrisError, match=sentence):
        load_references(write_refcocom(tmp_path, rows), "refcoco-m")


# ---- GSEval --------------------------------------------------------------------------------------


def test_gseval_is_named_by_idx_and_grouped_by_class(tmp_path: Path) -> None:
    table = load_references(write_gseval(tmp_path), "gseval")
    sky, dog = table.references
    assert subsets(table) == {"1": {"class 0"}, "7": {"class 3"}}
    assert [(each.ref_id, each.category, each.image_id) for each in (sky, dog)] == [(1, "sky", 8), (7, "dog", 14)]
    assert [each.image_path.parent.name for each in (sky, dog)] == ["unlabeled2017"] * 2
    np.testing.assert_array_equal(truth(dog), box(5, 5, 10, 10))
    (tmp_path / "images/unlabeled2017").rename(tmp_path / "unlabeled2017")
    assert check_dataset(tmp_path, "gseval").problem_count == 0


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("idx", "1", "line 1 has a 'idx' that is not an integer"),
        ("idx", 7, "line 2 has the idx 7, which another line has too"),
        ("image_path", "../a.jpg", "'image_path' that is not a plain path"),
        ("class_id", None, "'class_id' that is not text"),
        ("caption", " ", "blank 'caption'"),
        ("segmentation", None, "no 'segmentation' in run lengths"),
        ("segmentation", [[1, 2, 3, 4, 5, 6]], "no 'segmentation' in run lengths"),
        ("segmentation", {"size": [4, "5"], "counts": ""}, "no 'segmentation' in run lengths"),
        ("segmentation", {"size": [4, 5], "counts": "abc"}, "cannot be decoded"),
        ("segmentation", {"size": [10**9, 10**9], "counts": "0"}, "cannot be decoded"),
    ],
)
def test_malformed_lines_of_gseval(key: str, value: Any, sentence: str, tmp_path: Path) -> None:
    lines = gseval_lines()
    lines[0][key] = value
    with pytest.raises(DcrisError, match=sentence):
        load_references(write_gseval(tmp_path, lines), "gseval")


# ---- missing data, and download ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "place"),
    [
        ("rrsisd", "get it from https://github.com/Lsan2401/RMSIN; put refs"),
        ("reasonseg", "get it from https://github.com/dvlab-research/LISA#dataset; put"),
        ("phrasecut", "get it from https://github.com/ChenyunWu/PhraseCutDataset; put"),
        ("refsegrs", "RefSegRS/output_phrase_SPLIT.txt; download one with `dcris data fetch`"),
        ("gseval", "GSEval/GroundingSuite-Eval.jsonl; download one with `dcris data fetch`"),
    ],
)
def test_a_missing_set_names_its_place(
    dataset: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DcrisError, match=place) as caught:
        load_references(tmp_path, dataset)
    other = "reason_seg" if dataset != "reasonseg" else "VGPhraseCut"
    assert other not in str(caught.value)
    if DATASETS[dataset].source:
        assert main(["data", "fetch", dataset, "--out", str(tmp_path / "data")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{dataset} is not on the Hub; get it from https://github.com/" in line
        assert str(tmp_path / "data") in line


def test_refsegrs_is_unpacked_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """One command replaces a download of 3 GB by hand; what is there is kept."""
    source = write_refsegrs(tmp_path / "source") / "RefSegRS"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in source.rglob("*.*"):
            archive.write(path, f"RefSegRS/{path.relative_to(source)}")
        archive.writestr("__MACOSX/RefSegRS/images/._7.tif", b"of a Mac")
        archive.writestr("RefSegRS/../../evil.txt", b"")
        archive.writestr("RefSegRS/notes.txt", b"")
    hub.push("datasets/JessicaYuan/RefSegRS", {"RefSegRS.zip": stream.getvalue(), "README.md": b""})
    root = tmp_path / "data"
    command = ["data", "fetch", "refsegrs", "--out", str(root)]
    assert main(command) == 0
    found = {str(path.relative_to(root)) for path in root.rglob("*.*")}
    assert found == {f"RefSegRS/{path.relative_to(source)}" for path in source.rglob("*.*")}
    for path in source.rglob("*.tif"):
        assert (root / "RefSegRS" / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert main(command) == 0
    assert hub.bodies() == ["RefSegRS.zip"]
    assert load_references(root, "refsegrs").sha256() == load_references(source.parent, "refsegrs").sha256()


@pytest.mark.parametrize("content", [b"no zip", None, b""])
def test_another_zip_is_refused(
    content: bytes | None, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("images/1.tif", b"")
        content = stream.getvalue()
    hub.push("datasets/JessicaYuan/RefSegRS", {"RefSegRS.zip": content})
    assert main(["data", "fetch", "refsegrs", "--out", str(tmp_path / "data")]) == 2
    assert "RefSegRS.zip" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data").exists()


def test_refcocom_is_downloaded_with_its_images(hub: Hub, tmp_path: Path) -> None:
    """The images are in the Parquet file, so COCO's server is not asked."""
    rows = refcocom_rows()
    hub.push("datasets/moondream/refcoco-m", {"data/validation-00000-of-00001.parquet": parquet(rows)})
    root = tmp_path / "data"
    assert main(["data", "fetch", "refcoco-m", "--out", str(root), "--photographs", str(tmp_path)]) == 0
    table = load_references(root, "refcoco-m")
    assert table.splits() == {"val": (3, 4)}
    for row in rows:
        assert (root / "images/mscoco/images/train2014" / row["file_name"]).read_bytes() == row["image"]["bytes"]
    parquet_root = write_refcocom(tmp_path / "parquet")
    assert table.sha256() == load_references(parquet_root, "refcoco-m").sha256()
    assert check_dataset(root, "refcoco-m").problem_count == 0


def test_an_interrupted_download_of_refcocom_is_continued(hub: Hub, tmp_path: Path) -> None:
    """Once its references were written, the rest of the images was requested from COCO's server."""
    name, rows = "data/validation-00000-of-00001.parquet", refcocom_rows()
    image = rows[1]["image"]
    rows[1]["image"] = image | {"bytes": b"not an image"}
    hub.push("datasets/moondream/refcoco-m", {name: parquet(rows)})
    fetch = ["data", "fetch", "refcoco-m", "--out", str(tmp_path / "data"), "--photographs", str(tmp_path)]
    assert main(fetch) == 2
    rows[1]["image"] = image
    hub.push("datasets/moondream/refcoco-m", {name: parquet(rows)})
    assert main(fetch) == 0
    assert check_dataset(tmp_path / "data", "refcoco-m").problem_count == 0


def test_gseval_is_downloaded_with_coco_images(hub: Hub, tmp_path: Path) -> None:
    source = write_gseval(tmp_path / "source")
    name = "GroundingSuite-Eval.jsonl"
    hub.push("datasets/hustvl/GSEval", {name: (source / "GSEval" / name).read_bytes()})
    root = tmp_path / "data"
    photographs = str(source / "images/unlabeled2017")
    assert main(["data", "fetch", "gseval", "--out", str(root), "--photographs", photographs]) == 0
    assert check_dataset(root, "gseval").problem_count == 0
    assert {path.name for path in (root / "images/unlabeled2017").iterdir()} == {
        "000000000008.jpg",
        "000000000014.jpg",
    }


@pytest.mark.parametrize("dataset", ["rrsisd", "refsegrs"])
def test_recipes_read_the_whole_phrase(dataset: str) -> None:
    config = get_recipe(f"dcris_b_{dataset}").data
    assert (config.dataset, config.split_by) == (dataset, DATASETS[dataset].split_by)
    assert config.word_length == 20


@pytest.mark.parametrize(
    ("dataset", "file", "content"),
    [
        ("refsegrs", "RefSegRS/output_phrase_train.txt", "\n"),
        ("gseval", "GSEval/GroundingSuite-Eval.jsonl", "\n"),
        ("phrasecut", "VGPhraseCut_v0/refer_train.json", "[]"),
        ("reasonseg", "ReasonSeg/train/notes.txt", ""),
    ],
)
def test_files_without_references_are_no_data_set(tmp_path: Path, dataset: str, file: str, content: str) -> None:
    """An empty download is an error, not a data set without problems."""
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content)
    (tmp_path / "VGPhraseCut_v0").mkdir(exist_ok=True)
    (tmp_path / "VGPhraseCut_v0/image_data_split.json").write_text("[]")
    (tmp_path / "VGPhraseCut_v0/name_att_rel_count.json").write_text('{"cat": [], "att": []}')
    for read in (load_references, check_dataset):
        with pytest.raises(DcrisError, match=f"{dataset} in .* has no references"):
            read(tmp_path, dataset)
