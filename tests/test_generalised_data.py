"""gRefCOCO, Ref-ZOM and R-RefCOCO in their published layouts: every target is the one that their
authors' code gives, and malformed files give one sentence."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from dcris.cli import main
from dcris.data.check import check_dataset
from dcris.data.dataset import TrainingSamples
from dcris.data.masks import union_mask
from dcris.data.mixing import parse_mixture
from dcris.data.readers.load import load_references
from dcris.data.registry import DATASETS, PARTITIONS, Partition
from dcris.data.tokenizer import tokenizer_of
from dcris.errors import DcrisError
from dcris.recipes import get_recipe
from dcris.types import Sample
from generalised import HEIGHT, LAYOUTS, WIDTH, Layout, grefcoco, refzom, rrefcoco
from hub import Hub

every_layout = pytest.mark.parametrize("name", LAYOUTS)


def slow_targets(layout: Layout) -> dict[int, tuple[str, str, np.ndarray]]:
    """Read a layout as its authors' code does: by sent_id the split, the text and the mask."""
    annotations = {each["id"]: each for each in layout.instances["annotations"]}
    images = {each["id"]: each for each in layout.instances["images"]}

    def decode(ann_id: int) -> np.ndarray:
        found = annotations[ann_id]
        image = images[found["image_id"]]
        runs = coco.frPyObjects(found["segmentation"], image["height"], image["width"])
        mask = coco.decode(runs)
        return (mask.sum(axis=2) if mask.ndim == 3 else mask) > 0

    found = {}
    for reference in layout.references:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        named = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
        if reference.get("source") != "zero" and named != [-1]:
            for ann_id in named:
                if not (layout.dataset == "grefcoco" and annotations[ann_id]["iscrowd"]):
                    mask |= decode(ann_id)
        for sentence in reference["sentences"]:
            exists = sentence.get("exist", True)
            found[sentence["sent_id"]] = reference["split"], sentence["sent"], mask & bool(exists)
    return found


@every_layout
def test_every_target_is_that_of_the_authors_code(name: str, tmp_path: Path) -> None:
    """A crowd too many, or a missing second person, and no score compares."""
    layout = LAYOUTS[name]()
    table = load_references(layout.write(tmp_path), layout.dataset)
    assert table.split_by == DATASETS[layout.dataset].split_by
    slow = slow_targets(layout)
    for reference in table.references:
        assert len(reference.ann_ids) == len(reference.segmentations)
        assert reference.image_path.is_file()
        for expression in reference.expressions:
            split, text, mask = slow.pop(expression.sent_id)
            assert (reference.split, expression.text) == (split, text)
            ours = union_mask(reference.targets(expression), reference.image_size).astype(bool)
            np.testing.assert_array_equal(ours, mask)
            assert bool(reference.targets(expression)) == mask.any()
    assert not slow
    report = check_dataset(tmp_path, layout.dataset, deep=True)
    assert (report.problem_count, report.images) == (0, len({each.image_path for each in table.references}))


def test_the_parts_of_a_target_are_kept_apart(tmp_path: Path) -> None:
    """Whoever counts the objects of "both people" needs two, not their union."""
    references = load_references(grefcoco().write(tmp_path), "grefcoco").references
    assert [each.ann_ids for each in references] == [(71, 72), (71,), (), (72, 73), (75,), (), (76,)]
    assert [each.category for each in references] == ["person", "person", "", "person, cup", "cup", "", "dog"]


@given(st.lists(st.sampled_from([71, 72, 73, 71]), max_size=4), st.booleans(), st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_of_annotations(tmp_path: Path, ann_ids: list[int], zero: bool, exists: bool) -> None:
    """An annotation that is named twice is one object, in any order of the list."""
    layout = refzom()
    layout.references = layout.references[:1]
    layout.references[0] |= {"ann_id": ann_ids, "source": "zero" if zero else "many"}
    layout.references[0]["sentences"][0]["exist"] = exists
    (reference,) = load_references(layout.write(tmp_path), "ref-zom").references
    ((_, _, mask),) = slow_targets(layout).values()
    np.testing.assert_array_equal(union_mask(reference.targets(reference.expressions[0]), (HEIGHT, WIDTH)), mask)
    assert reference.ann_ids == (() if zero else tuple(dict.fromkeys(ann_ids)))


@pytest.mark.parametrize(
    ("layout", "file", "split_by"),
    [
        (grefcoco, "grefs(unc).json", "unc"),
        (grefcoco, "grefs(unc).p", "unc"),
        (refzom, "refs(final).p", "final"),
        (refzom, "Ref-ZOM(final).p", "final"),
        (refzom, "Ref_ZOM.p", "final"),
        (rrefcoco, "refs(unc).json", "unc"),
    ],
)
def test_files_have_the_names_that_people_have(
    layout: Callable[[], Layout], file: str, split_by: str, tmp_path: Path
) -> None:
    """The download of Ref-ZOM is to be renamed, and gRefCOCO exists as JSON and as a pickle."""
    written = layout()
    written.file = file
    table = load_references(written.write(tmp_path), written.dataset)
    assert (table.split_by, len(table.references)) == (split_by, len(written.references))


def test_a_pickle_comes_before_a_json_file(tmp_path: Path) -> None:
    """As in the authors' code, so that both evaluate the same references."""
    layout = grefcoco()
    root = layout.write(tmp_path)
    (root / "grefcoco/grefs(unc).p").write_bytes(pickle.dumps(layout.references[:2], 2))
    assert len(load_references(root, "grefcoco").references) == 2


def test_absent_targets_are_trained_with_empty_masks(tmp_path: Path) -> None:
    """A mask of the reference's own object would teach the model to find what is not there."""
    references = load_references(rrefcoco().write(tmp_path), "rrefcoco").references
    config = get_recipe("dcris_tiny").data
    samples = TrainingSamples(references, config, tokenizer_of(get_recipe("dcris_tiny").model.text), seed=0)
    seen = set()
    for index in range(20 * len(references)):
        drawn, sample = samples.draw(index), samples[index]
        assert isinstance(sample, Sample)
        assert bool(sample.mask.any()) == drawn.exists
        seen.add(drawn.exists)
    assert seen == {True, False}


def test_the_checksum_covers_what_is_new(tmp_path: Path) -> None:
    """A run must not be resumed on data whose targets have changed."""

    def checksum(number: int, change: Callable[[Layout], None] = lambda layout: None) -> str:
        layout = rrefcoco()
        change(layout)
        return load_references(layout.write(tmp_path / str(number)), "rrefcoco").sha256()

    def without_target(layout: Layout) -> None:
        layout.references[1]["sentences"][0]["exist"] = False

    def with_two(layout: Layout) -> None:
        layout.references[0]["ann_id"] = [71, 72]

    def with_one(layout: Layout) -> None:
        layout.references[0]["ann_id"] = [71]

    assert checksum(0) == checksum(1, with_one)
    assert len({checksum(0), checksum(2, without_target), checksum(3, with_two)}) == 3


def test_mixtures_with_generalised_data_sets(tmp_path: Path) -> None:
    """`mixed` remains the published mixture; others may name them, and keep the objects apart."""
    assert parse_mixture("mixed").members == (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
    grefcoco().write(tmp_path)
    rrefcoco().write(tmp_path)
    table = load_references(tmp_path, "mixed-unfiltered:grefcoco,rrefcoco")
    counts = [len(each.ann_ids) for each in table.references]
    assert counts == [2, 1, 0, 2, 1, 0, 1, 1, 1, 1]
    identifiers = {each for reference in table.references for each in reference.ann_ids}
    assert identifiers == set(range(1, 9))  # 5 of gRefCOCO, 3 of R-RefCOCO


def test_known_sizes_are_compared_and_unknown_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody states the number of references of gRefCOCO, but that of expressions is known."""
    root = grefcoco().write(tmp_path)
    report = check_dataset(root, "grefcoco")
    assert report.official is False
    assert "? / 14,229" in report.table()
    known = Partition({"train": (None, None), "val": (None, 1), "testA": (2, 3)})
    monkeypatch.setitem(PARTITIONS, ("grefcoco", "unc"), known)
    report = check_dataset(root, "grefcoco")
    assert report.official is True
    assert re.findall("(yes|unknown)$", report.table(), re.MULTILINE) == ["unknown", "yes", "yes"]


# ---- malformed files -----------------------------------------------------------------------------


def _set(reference: int, key: str, value: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.references[reference][key] = value

    return change


def _sentence(value: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.references[0]["sentences"][0]["exist"] = value

    return change


def _annotation(key: str, value: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.instances["annotations"][0][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(0, "ann_id", [71, "72"]), "reference 1 has a 'ann_id' that is not an integer but str"),
        (_set(0, "ann_id", [71, True]), "reference 1 has a 'ann_id' that is not an integer but bool"),
        (_set(0, "ann_id", [[71]]), "reference 1 has a 'ann_id' that is not an integer but list"),
        (_set(0, "ann_id", [71, -1]), "reference 1 names annotation -1, which instances.json does not have"),
        (_set(0, "ann_id", -1), "reference 1 names annotation -1, which instances.json does not have"),
        (_set(0, "ann_id", [71, 76]), "names image 1, but its annotation 76 belongs to image 3"),
        (_set(0, "ann_id", [71] * 1001), "an 'ann_id' of 1,001 annotations; the limit is 1,000"),
        (_set(4, "ann_id", [74]), "reference 5 has only crowds in its 'ann_id'"),
        (_set(0, "ann_id", {"71": 72}), "reference 1 has a 'ann_id' that is not an integer but dict"),
        (_set(0, "image_id", [1]), "reference 1 has a 'image_id' that is not an integer but list"),
        (_set(2, "image_id", 9), "reference 3 names image 9, which instances.json does not have"),
        (_sentence("false"), "sentence 10 of reference 1 has an 'exist' that is neither true nor false"),
        (_sentence(2), "sentence 10 of reference 1 has an 'exist' that is neither true nor false"),
        (_sentence(None), "sentence 10 of reference 1 has an 'exist' that is neither true nor false"),
        (_annotation("iscrowd", "no"), "annotation 71 has a 'iscrowd' that is not an integer but str"),
        (_annotation("category_id", 99), "reference 1 names category 99, which instances.json does not have"),
        (_annotation("category_id", None), "annotation 71 has a 'category_id' that is not an integer but NoneType"),
        (_annotation("segmentation", []), "annotation 71 of reference 1 has no 'segmentation'"),
        (_annotation("segmentation", [[1, 2, 3, 4]]), "annotation 71 of reference 1 cannot be decoded"),
    ],
)
@pytest.mark.parametrize("file", ["grefs(unc).json", "grefs(unc).p"])
def test_malformed_files_give_one_sentence(
    change: Callable[[Layout], None], sentence: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files come from strangers; the sentence names the file, the reference and the field."""
    layout = grefcoco()
    layout.file = file
    change(layout)
    root = layout.write(tmp_path)
    with pytest.raises(DcrisError, match=sentence) as caught:
        load_references(root, "grefcoco")
    assert "\n" not in str(caught.value)
    assert str(root / "grefcoco") in str(caught.value)
    assert main(["data", "check", str(root), "--dataset", "grefcoco"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_damaged_json_file_gives_one_sentence(tmp_path: Path) -> None:
    root = grefcoco().write(tmp_path)
    path = root / "grefcoco/grefs(unc).json"
    for content, sentence in (
        (path.read_bytes()[:-9], "the references of grefcoco, .*is not valid JSON"),
        (b"{}", "it is not a list of references"),
        (b'[{"ref_id": 1}]', "reference 1 has no 'ann_id'"),
        (b"[" * 100_000, "is not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(DcrisError, match=sentence):
            load_references(root, "grefcoco")


# ---- download ------------------------------------------------------------------------------------


def test_grefcoco_is_downloaded_from_its_authors_repository(hub: Hub, tmp_path: Path) -> None:
    """One command gives the authors' own files, byte for byte, and the images of the split."""
    layout = grefcoco()
    photographs = layout.write(tmp_path / "source") / layout.images
    hub.push("datasets/FudanCVL/gRefCOCO", layout.contents() | {"README.md": b"gRefCOCO"})
    root = tmp_path / "data"
    command = ["data", "fetch", "grefcoco", "--out", str(root), "--photographs", str(photographs)]
    assert main([*command, "--splits", "val"]) == 0
    for name, content in layout.contents().items():
        assert (root / "grefcoco" / name).read_bytes() == content
    assert hub.bodies() == ["grefs(unc).json", "instances.json"]
    images = root / "images/mscoco/images/train2014"
    assert [path.name for path in images.iterdir()] == ["COCO_train2014_000000000002.jpg"]
    assert main(command) == 0  # the annotations are there, the other images are added
    assert len(hub.bodies()) == 2
    assert main(["data", "check", str(root), "--dataset", "grefcoco", "--deep"]) == 0


def test_annotations_that_cannot_be_used_are_not_written(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = grefcoco()
    layout.references[0]["ann_id"] = [999]
    for files, sentence in (
        (layout.contents(), "names annotation 999"),
        ({"instances.json": b"{}"}, "has no file grefs(unc).json"),
        (layout.contents() | {"grefs(unc).json": b"[]"}, "not a list of references"),
    ):
        hub.push("datasets/FudanCVL/gRefCOCO", files)
        assert main(["data", "fetch", "grefcoco", "--out", str(tmp_path / "data")]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "data").exists()


# ---- official sizes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_set_of_the_official_size(tmp_path: Path) -> None:
    """What is read must not depend on the size: 60 MB of references, 14,229 expressions in val."""
    sizes = {"train": 209_000, "val": 14_229, "testA": 19_200, "testB": 16_063}
    source = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for image_id in range(1, 19_995):
        content["images"].append(
            {"id": image_id, "file_name": f"COCO_train2014_{image_id:012d}.jpg", "height": 480, "width": 640}
        )
        for number, (x, y) in enumerate(source.uniform(0, 300, (10, 2)).round(2).tolist()):
            content["annotations"].append(
                {
                    "id": 10 * image_id + number,
                    "image_id": image_id,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + 90.5, y, x + 90.5, y + 60.25, x, y + 60.25] * 4],
                }
            )
    references: list[dict[str, Any]] = []
    expected = {}
    for split, expressions in sizes.items():
        counts = source.choice(11, expressions, p=[0.12, 0.5, 0.2, *[0.18 / 8] * 8])
        for count in counts.tolist():
            number, image_id = len(references), len(references) % 19_994 + 1
            ann_ids = [10 * image_id + each for each in range(count)] or [-1]
            text = f"the {count} things in place {number}"
            references.append(
                {
                    "ref_id": number,
                    "ann_id": ann_ids,
                    "image_id": image_id,
                    "category_id": [1] * count or [-1],
                    "split": split,
                    "file_name": f"COCO_train2014_{image_id:012d}.jpg",
                    "sentences": [{"sent_id": number, "sent": text, "raw": text.upper(), "tokens": text.split()}],
                }
            )
            expected[number] = count
    layout = Layout("grefcoco", "grefs(unc).json", references, content)
    (tmp_path / "grefcoco").mkdir()
    for name, data in layout.contents().items():
        (tmp_path / "grefcoco" / name).write_bytes(data)
    table = load_references(tmp_path, "grefcoco")
    assert {name: counts[1] for name, counts in table.splits().items()} == sizes
    assert {each.ref_id: len(each.segmentations) for each in table.references} == expected
    assert json.dumps(table.record())
