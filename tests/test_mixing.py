"""Mixtures of data sets: no test image is trained on, nothing else is lost, and identifiers are
unique.
"""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TinyRefer
from dcris.data.check import check_dataset
from dcris.data.mixing import Mixture, mix, parse_mixture
from dcris.data.readers.load import has_references, load_references
from dcris.data.registry import PARTITIONS
from dcris.data.table import ReferenceTable
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import exchange_expressions
from dcris.recipes import get_recipe
from dcris.types import Expression, Reference

ROOT = Path("data")
SPLITS = ("train", "train", "train", "val", "testA", "test")


def reference(number: int, image: int, split: str, ann_id: int | None = None, sentences: int = 1) -> Reference:
    return Reference(
        ref_id=number,
        ann_ids=(number if ann_id is None else ann_id,),
        image_id=image,
        image_path=ROOT / f"images/COCO_train2014_{image:012}.jpg",
        image_size=(4, 5),
        category="cup",
        split=split,
        segmentations=({"size": [4, 5], "counts": [number, 20 - number]},),
        expressions=tuple(Expression(100 * number + k, f"phrase {number} {k}") for k in range(sentences)),
    )


def table(name: str, *references: Reference) -> ReferenceTable:
    return ReferenceTable(name, "toy", ROOT, references)


@st.composite
def tables(draw: st.DrawFn) -> list[ReferenceTable]:
    """Up to three data sets on the same six images, with the same identifiers."""
    made = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        rows = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(SPLITS), st.integers(1, 3)), max_size=10))
        made.append(
            table(name, *(reference(n, image, split, sentences=k) for n, (image, split, k) in enumerate(rows, 1)))
        )
    return made


def content(item: Reference) -> tuple[Any, ...]:
    """The parts of a reference that renumbering does not change."""
    return item.image_path, item.split, str(item.segmentations), tuple(each.text for each in item.expressions)


@settings(max_examples=50)
@given(sets=tables(), others=tables())
def test_no_test_image_is_trained_on(sets: list[ReferenceTable], others: list[ReferenceTable]) -> None:
    """Exactly the training references of images in val and test splits are left out."""
    mixed = mix("mixed", sets, others)
    tested = {item.image_path for each in (*sets, *others) for item in each.references if item.split != "train"}
    expected = [
        content(item)
        for each in sets
        for item in each.references
        if item.split != "train" or item.image_path not in tested
    ]
    assert [content(item) for item in mixed.references] == expected
    assert not tested & {item.image_path for item in mixed.references if item.split == "train"}
    left_out = sum(len(each.references) for each in sets) - len(mixed.references)
    counts = [note.split(": ")[1].split() for note in mixed.notes if ": " in note]
    assert sum(int(words[words.index("left") - 1]) for words in counts) == left_out
    assert sum(int(words[0]) for words in counts) == mixed.splits().get("train", (0, 0))[0]


@settings(max_examples=60)
@given(sets=tables())
def test_the_unfiltered_mixture_is_a_concatenation(sets: list[ReferenceTable]) -> None:
    """`mixed-unfiltered` reproduces DETRIS's published mixture."""
    mixed = mix("mixed-unfiltered", sets, filtered=False)
    assert [content(item) for item in mixed.references] == [content(item) for each in sets for item in each.references]


@settings(max_examples=60)
@given(sets=tables(), filtered=st.booleans())
def test_identifiers_are_unique(sets: list[ReferenceTable], filtered: bool) -> None:
    """Otherwise masks would be scored for another data set's reference, and predictions would
    overwrite each other.
    """
    references = mix("mixed", sets, filtered=filtered).references
    for counts in (
        Counter(item.ref_id for item in references),
        Counter(item.ann_ids for item in references),
        Counter(each.sent_id for item in references for each in item.expressions),
    ):
        assert set(counts.values()) <= {1}
    assert len({(item.image_id, item.image_path) for item in references}) == len({item.image_id for item in references})
    assert all(item.image_id == int(item.image_path.stem[-12:]) for item in references)  # COCO's image_ids are kept


def test_references_of_one_annotation_stay_together() -> None:
    """`dcris data check` decodes each annotation once."""
    one = table("a", reference(1, 1, "train", ann_id=7), reference(2, 1, "train", ann_id=7), reference(3, 1, "train"))
    mixed = mix("mixed", [one, replace(one, dataset="b")])
    assert [item.ann_ids for item in mixed.references] == [(1,), (1,), (2,), (3,), (3,), (4,)]


def test_images_under_both_of_cocos_namings_are_the_same() -> None:
    """Otherwise a data set on train2017 would leak into the test splits of one on train2014."""
    short = replace(reference(1, 5, "train"), image_path=ROOT / "train2017/000000000005.jpg", image_id=1)
    mixed = mix("mixed", [table("a", short, reference(2, 6, "train")), table("b", reference(1, 5, "val"))])
    assert [(item.image_id, item.split) for item in mixed.references] == [(6, "train"), (5, "val")]


def test_different_images_under_one_number_stay_apart() -> None:
    """Generated data sets all begin at 1: exchanging expressions within an image must not cross
    data sets.
    """
    own = [replace(reference(n, n, "train"), image_path=ROOT / f"images/scene_{n}.jpg") for n in (1, 2)]
    coco = [reference(1, 1, "train"), reference(2, 1, "train")]
    mixed = mix("mixed", [table("a", *own), table("b", *coco)])
    assert [item.image_id for item in mixed.references] == [1, 2, 3, 3]
    assert {item.image_id for item, _ in exchange_expressions(mixed.references)} == {3}


@pytest.mark.parametrize(
    ("name", "members", "filtered"),
    [
        ("mixed", [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")], True),
        ("mixed-unfiltered", [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")], False),
        ("mixed:refcoco,refcocog(google)", [("refcoco", "unc"), ("refcocog", "google")], True),
        ("mixed-unfiltered: scenes , refcocog", [("scenes", None), ("refcocog", "umd")], False),
        ("mixed:refcocog(umd),refcocog(google)", [("refcocog", "umd"), ("refcocog", "google")], True),
    ],
)
def test_names_of_mixtures(name: str, members: list[tuple[str, str | None]], filtered: bool) -> None:
    assert parse_mixture(name) == Mixture(tuple(members), filtered)


@pytest.mark.parametrize("name", ["refcoco", "mixed2", "mixed-filtered", "my-mixed", "mixed refcoco", ""])
def test_other_names_are_single_sets(name: str) -> None:
    assert parse_mixture(name) is None


@pytest.mark.parametrize(
    "name",
    ["mixed:", "mixed:a,,b", "mixed:a,a", "mixed:refcoco,refcoco(unc)", "mixed:a(", "mixed:a()", "mixed:mixed,a"],
)
def test_malformed_names_are_refused(name: str) -> None:
    with pytest.raises(DcrisError, match="is not a list of different data sets"):
        parse_mixture(name)


def test_two_names_of_one_data_set_are_refused(tiny_refer: TinyRefer) -> None:
    """Each of its references would count twice. A partition may be omitted where there is one."""
    with pytest.raises(DcrisError, match="not a list of different data sets: it names tiny toy twice"):
        load_references(tiny_refer.write(), "mixed:tiny,tiny(toy)")


def test_the_published_mixture_has_its_published_size() -> None:
    """DETRIS counts 126,908 references; `mixed-unfiltered` names the same three partitions."""
    mixture = parse_mixture("mixed-unfiltered")
    assert mixture is not None
    sizes = [PARTITIONS[name, split_by or ""].splits["train"][0] for name, split_by in mixture.members]
    assert sum(sizes) == 126_908


@pytest.mark.parametrize(("recipe", "filtered"), [("dcris_l_mixed", True), ("detris_l_mixed", False)])
def test_recipes_name_their_mixture(recipe: str, filtered: bool) -> None:
    """A recipe with "mixed" in its name trains on the mixture."""
    mixture = parse_mixture(get_recipe(recipe).data.dataset)
    assert mixture is not None
    assert (len(mixture.members), mixture.filtered) == (3, filtered)


def write_refer(root: Path, dataset: str, split_by: str, rows: list[tuple[int, str]]) -> None:
    """A data set in the REFER layout, with an image number and a split for each reference."""
    references, annotations = [], []
    for number, (image, split) in enumerate(rows, 1):
        sentence = {"sent_id": number, "sent": f"{dataset} {number}"}
        annotations.append({"id": number, "image_id": image, "segmentation": [[0, 0, 4, 0, 4, 4]]})
        references.append(
            {"ref_id": number, "ann_id": number, "image_id": image, "category_id": 1, "split": split}
            | {"sentences": [sentence]}
        )
    images = [
        {"id": image, "file_name": f"COCO_train2014_{image:012}.jpg", "height": 4, "width": 5} for image in range(1, 9)
    ]
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
    (root / dataset).mkdir(parents=True, exist_ok=True)
    (root / dataset / f"refs({split_by}).p").write_bytes(pickle.dumps(references))
    (root / dataset / "instances.json").write_text(json.dumps(instances))


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A small RefCOCO family. Image 4 is held out only by the google partition of RefCOCOg."""
    tests = [(7, "testA"), (8, "testB")]
    write_refer(tmp_path, "refcoco", "unc", [(1, "train"), (2, "train"), (3, "val"), (4, "train"), *tests])
    write_refer(tmp_path, "refcoco+", "unc", [(1, "train"), (2, "testB"), (5, "train"), (7, "testA"), (8, "val")])
    write_refer(tmp_path, "refcocog", "google", [(1, "train"), (4, "val")])
    write_refer(tmp_path, "refcocog", "umd", [(1, "train"), (4, "train"), (5, "test"), (7, "val")])
    return tmp_path


def trained(table: ReferenceTable) -> list[tuple[str, int]]:
    return [(item.expressions[0].text.split()[0], item.image_id) for item in table.references if item.split == "train"]


def test_the_whole_family_holds_out(family: Path) -> None:
    """Data sets outside the mixture are held out, too, so that a model can be tested on them."""
    mixed = load_references(family, "mixed")
    assert trained(mixed) == [("refcoco", 1), ("refcoco+", 1), ("refcocog", 1)]
    assert mixed.splits() == {"train": (3, 3), "val": (3, 3), "testA": (2, 2), "testB": (2, 2), "test": (1, 1)}
    assert (mixed.dataset, mixed.split_by) == ("mixed", "refcoco unc, refcoco+ unc, refcocog umd")
    assert mixed.notes == (
        "training sees no image of the val and test splits of refcoco unc, refcoco+ unc, refcocog umd, refcocog google",
        "refcoco unc: 1 training references, and 2 left out, of images in val or test splits",
        "refcoco+ unc: 1 training references, and 1 left out, of images in val or test splits",
        "refcocog umd: 1 training references, and 1 left out, of images in val or test splits",
    )
    assert trained(load_references(family, "mixed:refcoco")) == [("refcoco", 1)]
    (family / "refcocog/refs(google).p").unlink()
    assert trained(load_references(family, "mixed:refcoco")) == [("refcoco", 1), ("refcoco", 4)]
    unfiltered = load_references(family, "mixed-unfiltered")
    assert len(trained(unfiltered)) == 7
    assert unfiltered.notes[1] == "refcoco unc: 2 training references, and 1 more, of images in val or test splits"


def test_a_partition_is_found_in_any_layout(tmp_path: Path) -> None:
    """The held-out images do not depend on the layout."""
    assert not has_references(tmp_path, "refcocog", "google")
    for name in ("anns/refcocog_g/val.json", "refcoco/train-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = [member for member in PARTITIONS if has_references(tmp_path, *member)]
    assert found == [("refcoco", "unc"), ("refcocog", "google")]


def test_missing_splits_are_noted(family: Path) -> None:
    """Splits that are not present cannot be held out, and a note names them."""
    write_refer(family, "refcoco+", "unc", [(1, "train"), (8, "val")])
    notes = load_references(family, "mixed:refcoco").notes
    assert notes[1] == "refcoco+ unc has no testA, testB here, so training may see images of these splits"
    assert len(notes) == 3


def test_a_set_that_is_missing_or_broken(family: Path) -> None:
    """A data set that cannot be read is an error; its test images would not be held out."""
    (family / "refcocog/refs(google).p").write_bytes(b"")
    with pytest.raises(DcrisError, match=r"refs\(google\)\.p is not a whole pickle"):
        load_references(family, "mixed")
    (family / "refcoco+/refs(unc).p").unlink()
    with pytest.raises(DcrisError, match=r"no data set refcoco\+ in"):
        load_references(family, "mixed-unfiltered")
    with pytest.raises(DcrisError, match=r"takes no --split-by"):
        load_references(family, "mixed", "unc")


def test_a_mixture_is_checked_as_a_whole(family: Path) -> None:
    """`dcris data check` reports what was left out, and no leak."""
    report = check_dataset(family, "mixed")
    assert report.leaked_images == 0
    assert "note: refcoco unc: 1 training references, and 2 left out" in report.table()
    assert check_dataset(family, "mixed-unfiltered").leaked_images == 2


def test_real_sets(refer_root: Path) -> None:
    """Real val references are on images that the templated data set trains on."""
    alone = load_references(refer_root, "cocomini")
    for name in ("mixed:cocomini", "mixed:cocomini,refcoco,refcoco+,refcocog"):
        mixed = load_references(refer_root, name)
        tested = {item.image_path.name for item in mixed.references if item.split != "train"}
        for other in ("refcoco", "refcoco+", "refcocog"):
            tested |= {item.image_path.name for item in load_references(refer_root, other).references}
        assert mixed.splits()["train"] == (1022, 2118)
        assert not tested & {item.image_path.name for item in mixed.split("train")}
        dropped = [item for item in alone.split("train") if item.image_path.name in tested]
        assert len(dropped) == 1039 - 1022
    whole = load_references(refer_root, "mixed-unfiltered:cocomini,refcoco,refcoco+,refcocog")
    assert whole.splits() == {"train": (1039, 2154), "val": (104 + 8 + 3 + 2, 242), "testA": (131, 271)}
