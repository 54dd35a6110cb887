"""References to absent objects: what they say must be true of nothing in their image."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import TinyRefer
from dcris.cli import main
from dcris.config import DataConfig, NegativesConfig, replace
from dcris.data.masks import union_mask
from dcris.data.negatives import add_negatives
from dcris.data.readers.load import load_references
from dcris.data.scene_phrases import SHAPES
from dcris.data.scenes import write_scenes
from dcris.data.table import ReferenceTable
from dcris.data.training_table import training_table
from dcris.data.wording import names_object
from dcris.errors import DcrisError
from dcris.types import Reference
from runs import EVERY_STEP, quick_config, run_training, timeless_log

ALL_KINDS = ("category", "attribute", "place", "relation")
SETTING = json.dumps({"share": 0.3, "kinds": ALL_KINDS})
"""`data.negatives`, as the command line has it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("negatives") / "data", train=60, val=4, test=0, seed=7, side=64)


@pytest.fixture(scope="module")
def scenes(root: Path) -> ReferenceTable:
    return load_references(root, "scenes")


def absent(table: ReferenceTable) -> list[Reference]:
    return [reference for reference in table.references if not reference.segmentations]


def test_the_training_split_gets_the_asked_share_with_empty_masks(scenes: ReferenceTable) -> None:
    """The share decides how much accuracy on present objects is traded."""
    extended = training_table(scenes, DataConfig(negatives=NegativesConfig(share=0.25, kinds=ALL_KINDS)))
    added = absent(extended)
    assert extended.references[: len(scenes.references)] == scenes.references
    assert len(added) / len(extended.split("train")) == pytest.approx(0.25, abs=0.01)
    assert {reference.split for reference in added} == {"train"}
    for reference in added:
        mask = union_mask(reference.segmentations, reference.image_size)
        assert mask.shape == reference.image_size
        assert not mask.any()
    assert f"{len(added):,} references" in extended.notes[-1]
    for values in (
        [reference.ref_id for reference in extended.references],
        [said.sent_id for reference in extended.references for said in reference.expressions],
    ):
        assert len(set(values)) == len(values)


def test_every_kind_has_its_part_and_images_are_drawn_evenly(scenes: ReferenceTable) -> None:
    """A rare kind is not learnt, and an image with absent objects only would give itself away."""
    added = absent(add_negatives(scenes, NegativesConfig(share=0.5, kinds=ALL_KINDS), "train"))
    kinds = Counter(reference.expressions[0].kind for reference in added)
    assert set(kinds) == {f"absent {kind}" for kind in ALL_KINDS}
    assert min(kinds.values()) > 0.5 * len(added) / len(ALL_KINDS)
    assert all(1 <= len({said.text for said in item.expressions}) == len(item.expressions) <= 3 for item in added)
    present = Counter(reference.image_id for reference in scenes.split("train"))
    counts = Counter(reference.image_id for reference in added)
    assert all(abs(counts[image] - number) <= 1 for image, number in present.items())


def test_the_same_data_get_the_same_expressions(scenes: ReferenceTable) -> None:
    """A resumed run refuses other references."""
    one, other = (add_negatives(scenes, NegativesConfig(kinds=ALL_KINDS), "train").sha256() for _ in range(2))
    assert one == other != scenes.sha256()


def test_an_absent_category_has_no_instance_in_the_image_described_or_not(root: Path, scenes: ReferenceTable) -> None:
    """Most instances of COCO have no reference, but are there all the same."""
    instances = json.loads((root / "scenes/instances.json").read_text())
    shapes: dict[int, set[str]] = {}
    for annotation in instances["annotations"]:
        shapes.setdefault(annotation["image_id"], set()).add(SHAPES[annotation["category_id"] - 1])
    added = absent(add_negatives(scenes, NegativesConfig(share=0.6), "train"))
    assert len(added) > 150
    for reference in added:
        for expression in reference.expressions:
            nouns = [word for word in expression.text.split() if word in SHAPES]
            assert nouns, f"{expression.text!r} may mean anything"
            assert nouns[0] not in shapes[reference.image_id]


@pytest.mark.parametrize(
    ("text", "category", "names"),
    [
        ("left dog", "dog", True),
        ("the man in the red shirt", "person", True),
        ("slice on the right", "pizza", True),
        ("left square", "square", True),
        ("the left one", "dog", False),
        ("second from right in red", "person", False),
        ("2nd one", "person", False),
        ("big blue thing in the back", "bus", False),
    ],
)
def test_an_expression_that_names_nothing_is_not_used(text: str, category: str, names: bool) -> None:
    """ "The left one" fits something in every image."""
    assert names_object(text, category) is names


def two_categories(tiny: TinyRefer, names: tuple[str, str], texts: tuple[str, str]) -> ReferenceTable:
    """Training references of two categories in turn, with one expression each."""
    tiny.instances["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    for number, (reference, annotation) in enumerate(zip(tiny.references, tiny.instances["annotations"], strict=False)):
        reference["category_id"] = annotation["category_id"] = number % 2
        reference["split"] = "train"
        reference["sentences"] = reference["sentences"][:1]
        reference["sentences"][0]["sent"] = texts[number % 2]
    return load_references(tiny.write(), tiny.dataset)


def test_an_expression_is_not_used_where_its_words_fit_another_category(tiny_refer: TinyRefer) -> None:
    """A "bear" may be the teddy bear that is there."""
    table = two_categories(tiny_refer, ("bear", "teddy bear"), ("brown bear", "teddy bear"))
    with pytest.raises(DcrisError, match="no expression was found"):
        add_negatives(table, NegativesConfig(), "train")


def test_own_words_for_a_category_count_as_its_names(tiny_refer: TinyRefer) -> None:
    """With "pet" as a word for cats, "pet" as an expression of a dog is not used where a cat is."""
    table = two_categories(tiny_refer, ("cat", "dog"), ("pet", "pet"))
    assert absent(add_negatives(table, NegativesConfig(), "train"))
    with pytest.raises(DcrisError, match="no expression was found"):
        add_negatives(table, NegativesConfig(), "train", {"cat": ("cat", "pet"), "dog": ("dog", "pet")})


def test_references_of_one_category_give_no_absent_one(tmp_path: Path) -> None:
    """Own data without categories: the user learns what to add."""
    write_scenes(tmp_path, train=3, val=0, test=0, side=64)
    path = tmp_path / "scenes/instances.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["name"] = "object"
    path.write_text(json.dumps(content))
    with pytest.raises(DcrisError, match="several categories"):
        add_negatives(load_references(tmp_path, "scenes"), NegativesConfig(), "train")


@pytest.mark.parametrize(
    "attributes",
    [
        None,
        [],
        {},
        {"x": 0.5},
        {"colour": "mauve"},
        {"colour": ["red"]},
        {"x": float("nan")},
        {"y": "0.5"},
        {"radius": True},
    ],
)
def test_scenes_without_sound_attributes_are_refused(tmp_path: Path, attributes: Any, capsys: Any) -> None:
    """Files of an older version, or of strangers."""
    write_scenes(tmp_path, train=3, val=0, test=0, side=64)
    path = tmp_path / "scenes/instances.json"
    content = json.loads(path.read_text())
    annotation = content["annotations"][1]
    if isinstance(attributes, dict) and attributes:
        attributes = annotation["attributes"] | attributes if attributes != {"x": 0.5} else attributes
    annotation["attributes"] = attributes
    path.write_text(json.dumps(content))
    command = [
        "train",
        "dcris_tiny",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "run"),
        "--data.negatives",
        SETTING,
    ]
    assert main([*command, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "annotation 2" in error
    assert "instances.json" in error
    assert len(error.splitlines()) == 1


def test_other_data_sets_have_no_wrong_attributes(tiny_refer: TinyRefer) -> None:
    """Only for generated scenes is everything known; others get no silent guesses."""
    table = load_references(tiny_refer.write(), tiny_refer.dataset)
    with pytest.raises(DcrisError, match="attributes"):
        add_negatives(table, NegativesConfig(kinds=("attribute",)), "train")
    rows = [
        {"image": f"images/mscoco/images/train2014/{n}.png", "expressions": ["dog"], "mask": [[1, 1, 9, 1, 9, 9]]}
        for n in (1, 2)
    ]
    path = tiny_refer.root / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DcrisError, match="choose the kind category"):
        add_negatives(load_references(path, "own"), NegativesConfig(kinds=("place",)), "train")


@pytest.mark.slow
def test_training_on_absent_objects_is_resumed_exactly(root: Path, tmp_path: Path) -> None:
    """Presence has a loss of its own in the log, and the references are the same after a stop."""
    settings = (EVERY_STEP, ("train.save_every", "2"), ("data.negatives", SETTING))
    config = quick_config(4, *settings, recipe="dcris_tiny_generalised")
    table = training_table(load_references(root, "scenes"), config.data)
    run_training(config, table, tmp_path / "whole")
    run_training(replace(config, {"train.max_steps": 2}), table, tmp_path / "parts")
    run_training(config, table, tmp_path / "parts", resume=True)
    whole, parts = (timeless_log(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss_presence"] for line in whole][2:] == [line["loss_presence"] for line in parts][2:]
    assert all(0 < line["loss_presence"] < line["loss"] for line in whole)
