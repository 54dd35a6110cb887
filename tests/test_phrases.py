"""Generated phrases: hand-made photographs, an independent interpreter, mirroring, real data."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import TinyRefer
from dcris.cli import main
from dcris.config import DataConfig
from dcris.data.colours import colour_shares, shows_colours
from dcris.data.flip import swap_sides
from dcris.data.phrases import LIMIT, NOUNS, RULES, Instance, draw, statements
from dcris.data.readers.load import load_references
from dcris.data.training_table import training_table
from dcris.errors import DcrisError
from dcris.types import Reference
from runs import small_recipe

Box = tuple[float, float, float, float]


def instance(ann_id: int, category: str, box: Box, **changes: Any) -> Instance:
    """An instance that fills its box."""
    left, top, right, bottom = box
    return Instance(
        **{"ann_id": ann_id, "category": category, "box": box, "area": (right - left) * (bottom - top)} | changes
    )


def said(instances: Sequence[Instance], number: int, kind: str | None = None) -> set[str]:
    """Everything that is said of one of the instances, of one kind or of all."""
    found = statements(instances, instances[number])
    return {text for statement in found if kind in (None, statement.kind) for text in statement.texts}


def test_the_only_one_of_its_category_is_called_by_it():
    pair = [instance(1, "dog", (0.1, 0.1, 0.4, 0.5)), instance(2, "cup", (0.6, 0.1, 0.7, 0.2))]
    assert said(pair, 0, "category") == {"dog", "the dog"}
    assert said([*pair, instance(3, "dog", (0.8, 0.8, 0.81, 0.81))], 0, "category") == set()


def test_crowds_leave_nothing_of_their_category_to_tell_apart():
    dogs = [instance(1, "dog", (0.1, 0.1, 0.4, 0.5)), instance(2, "dog", (0.6, 0.1, 0.9, 0.5), vague=True)]
    assert said(dogs, 0) == said(dogs, 1) == set()


def test_small_instances_get_no_phrase_but_count_as_others():
    dogs = [instance(1, "dog", (0.4, 0.4, 0.8, 0.8)), instance(2, "dog", (0.1, 0.5, 0.15, 0.55))]
    assert said(dogs, 1) == set()
    assert "left dog" not in said(dogs, 0)
    assert "right dog" in said(dogs, 0)


def test_two_side_by_side():
    dogs = [instance(1, "dog", (0.1, 0.4, 0.3, 0.7)), instance(2, "dog", (0.6, 0.4, 0.8, 0.7))]
    assert {"left dog", "dog on the left", "dog left"} <= said(dogs, 0, "place")
    assert {"right dog", "the dog on the right", "dog on right side"} <= said(dogs, 1, "place")
    assert said(dogs, 0, "size") == said(dogs, 0, "ordinal") == set()
    assert not any("top" in text or "bottom" in text for text in said(dogs, 0) | said(dogs, 1))


def test_two_in_one_half_are_told_apart_only_by_each_other():
    dogs = [instance(1, "dog", (0.02, 0.4, 0.15, 0.7)), instance(2, "dog", (0.2, 0.4, 0.33, 0.7))]
    assert "left dog" in said(dogs, 0)
    assert "dog on the left" not in said(dogs, 0)


def test_what_is_not_clearly_left_is_not_called_left():
    close = [instance(1, "dog", (0.30, 0.1, 0.60, 0.4)), instance(2, "dog", (0.35, 0.5, 0.65, 0.9))]
    assert not any("left" in text for text in said(close, 0))
    nested = [instance(1, "dog", (0.1, 0.1, 0.3, 0.4)), instance(2, "dog", (0.0, 0.3, 1.0, 0.9))]
    assert not any("left" in text for text in said(nested, 0, "place") if "top" not in text and "upper" not in text)


def test_a_row_of_four():
    row = [instance(n, "cup", (0.05 + 0.25 * n, 0.4, 0.2 + 0.25 * n, 0.6)) for n in range(4)]
    assert "leftmost cup" in said(row, 0)
    assert "left cup" not in said(row, 0)  # the second is in the left half, too
    assert "second cup from the left" in said(row, 1)
    assert "third cup from right" in said(row, 1)
    assert "second from right cup" in said(row, 2)
    assert not any("middle" in text for number in range(4) for text in said(row, number))


def test_the_middle_of_three():
    row = [instance(n, "cup", (0.1 + 0.3 * n, 0.4, 0.25 + 0.3 * n, 0.6)) for n in range(3)]
    assert "cup in the middle" in said(row, 1)
    assert not any("middle" in text for text in said(row, 0) | said(row, 2))


def test_corners():
    boxes = [(0.1, 0.1, 0.2, 0.2), (0.7, 0.1, 0.8, 0.2), (0.1, 0.7, 0.2, 0.8), (0.7, 0.7, 0.8, 0.8)]
    cups = [instance(number, "cup", box) for number, box in enumerate(boxes)]
    for number, corner in enumerate(("top left", "top right", "bottom left", "bottom right")):
        assert f"{corner} cup" in said(cups, number)
        assert sum(f"{corner} cup" in said(cups, other) for other in range(4)) == 1


def test_sizes_differ_by_a_factor():
    def pair(side: float, left: float = 0.5) -> list[Instance]:
        return [instance(1, "cup", (0.1, 0.1, 0.3, 0.3)), instance(2, "cup", (left, 0.1, left + side, 0.1 + side))]

    assert "bigger cup" in said(pair(0.16), 0)
    assert "small cup" in said(pair(0.16), 1)
    assert said(pair(0.16, 0.84), 1, "size") == set()  # it may go on outside the photograph
    assert said(pair(0.17), 0, "size") == said(pair(0.17), 1, "size") == set()


def test_colours():
    red, white = {"red": (0.9, 0.95), "white": (0.0, 0.02)}, {"red": (0.0, 0.05), "white": (0.8, 0.9)}
    reddish = {"red": (0.1, 0.4), "white": (0.0, 0.0)}
    cars = [instance(n, "car", (0.1 + 0.3 * n, 0.4, 0.3 + 0.3 * n, 0.6)) for n in range(2)]

    def coloured(*colours: Any) -> list[Instance]:
        return [instance(c.ann_id, c.category, c.box, colours=given) for c, given in zip(cars, colours, strict=True)]

    assert "red car" in said(coloured(red, white), 0)
    assert "the white car" in said(coloured(red, white), 1)
    assert said(coloured(red, reddish), 0, "colour") == set()
    assert said(coloured(red, {}), 0, "colour") == set()  # the other's colour is unknown
    person = [instance(1, "person", (0.1, 0.1, 0.5, 0.9), colours=red)]
    assert "person in red" in said(person, 0)
    assert "red person" not in said(person, 0)


@pytest.mark.parametrize(
    ("name", "rgb"),
    {
        "red": (200, 20, 20), "orange": (240, 120, 10), "brown": (110, 65, 30), "yellow": (250, 220, 40),
        "green": (30, 120, 40), "blue": (30, 60, 180), "purple": (110, 40, 150),
        "pink": (250, 140, 180), "white": (245, 245, 245), "gray": (120, 120, 120), "black": (20, 20, 20),
    }.items(),
)  # fmt: skip
def test_plain_pixels_have_one_colour(name: str, rgb: tuple[int, int, int]):
    pixels = np.tile(np.array(rgb, np.uint8), (5000, 1))
    assert {colour for colour, (share, _) in colour_shares(pixels).items() if share} == {name}
    assert colour_shares(pixels)[name] == (1.0, 1.0)
    assert colour_shares(pixels[:100]) == {}
    assert shows_colours(pixels[None]) == (name not in ("white", "gray", "black"))
    assert not shows_colours(pixels[None] // 5)


def test_relations():
    person, anchor = instance(1, "person", (0.1, 0.2, 0.3, 0.9)), instance(2, "dog", (0.32, 0.5, 0.5, 0.9))
    assert "person next to the dog" in said([person, anchor], 0)
    assert "person left of the dog" in said([person, anchor], 0)
    assert "the dog to the right of the person" in said([person, anchor], 1)
    near = instance(3, "person", (0.55, 0.2, 0.75, 0.9))
    assert not any("next" in text for text in said([person, anchor, near], 0))
    assert "person left of the dog" in said([person, anchor, near], 0)
    assert said([person, anchor, instance(4, "dog", (0.8, 0.1, 0.9, 0.2))], 0, "relation") == set()


def test_on_under_and_with():
    rider, horse = instance(1, "person", (0.4, 0.1, 0.6, 0.6)), instance(2, "horse", (0.2, 0.3, 0.8, 0.9))
    walker = instance(3, "person", (0.9, 0.3, 0.98, 0.9))
    assert "person on the horse" in said([rider, horse, walker], 0)
    assert not any(" on " in text for text in said([rider, horse, walker], 2, "relation"))
    rest = instance(6, "motorcycle", (0.3, 0.45, 0.8, 0.95))
    assert not any(" on " in text for text in said([instance(1, "person", (0.35, 0.37, 0.5, 0.92)), rest], 0))
    roof = instance(4, "umbrella", (0.3, 0.0, 0.7, 0.3))
    stander = instance(1, "person", (0.4, 0.1, 0.6, 0.9))
    assert "person under the umbrella" in said([walker, stander, roof], 1)
    racket = instance(5, "tennis racket", (0.38, 0.4, 0.5, 0.5))
    assert "person with the racket" in said([walker, stander, racket], 1)


def test_words_that_two_categories_share_are_not_used():
    bicycle, motorcycle = instance(1, "bicycle", (0.1, 0.1, 0.4, 0.4)), instance(2, "motorcycle", (0.5, 0.1, 0.9, 0.4))
    assert said([bicycle], 0, "category") == {"bicycle", "the bicycle", "bike", "the bike"}
    assert said([bicycle, motorcycle], 0, "category") == {"bicycle", "the bicycle"}
    bears = [instance(1, "bear", (0.1, 0.1, 0.4, 0.4)), instance(2, "teddy bear", (0.5, 0.1, 0.9, 0.4))]
    assert said(bears, 0) == set()
    assert said([instance(1, "left shoe", (0.1, 0.1, 0.4, 0.4))], 0) == set()
    assert said([instance(1, "{noun}", (0.1, 0.1, 0.4, 0.4))], 0, "category") == {"{noun}", "the {noun}"}


# ---- properties ----------------------------------------------------------------------------------

steps = st.integers(0, 64)


@st.composite
def photographs(draw_: st.DrawFn) -> list[Instance]:
    """Boxes with corners on a grid of 64, so that mirroring them is exact."""
    found = []
    for number in range(draw_(st.integers(1, 6))):
        (left, right), (top, bottom) = (
            sorted(draw_(st.lists(steps, min_size=2, max_size=2, unique=True))) for _ in range(2)
        )
        category = draw_(st.sampled_from(("dog", "dog", "dog", "zebra", "person", "umbrella", "bench")))
        found.append(instance(number, category, (left / 64, top / 64, right / 64, bottom / 64)))
    return found


@pytest.mark.parametrize("examples", [150, pytest.param(600, marks=pytest.mark.slow)])
def test_every_phrase_is_understood(examples: int):
    kinds: set[str] = set()

    @settings(max_examples=examples)
    @given(photographs())
    def check(instances: list[Instance]) -> None:
        for target in instances:
            for statement in statements(instances, target):
                if statement.kind not in ("category", "place", "size", "ordinal"):
                    continue
                kinds.add(statement.kind)
                for text in statement.texts:
                    assert interpret(text, instances) == target.ann_id, text

    check()
    assert kinds == {"category", "place", "size", "ordinal"}


def interpret(text: str, instances: Sequence[Instance]) -> int:
    """What a reader who knows nothing of the rules takes a phrase of place, size or number for."""
    (category,) = (
        category
        for category in {instance.category for instance in instances}
        if any(re.search(rf"\b{noun}\b", text) for noun in NOUNS.get(category, (category,)))
    )
    found = [instance for instance in instances if instance.category == category]
    words = set(re.findall("[a-z]+", text))

    def x(instance: Instance) -> float:
        return instance.box[0] + instance.box[2]

    def y(instance: Instance) -> float:
        return instance.box[1] + instance.box[3]

    up, down = words & {"top", "upper", "topmost", "highest"}, words & {"bottom", "lower", "bottommost", "lowest"}
    left, right = words & {"left", "leftmost"}, words & {"right", "rightmost"}
    order = [word for word in ("first", "second", "third", "fourth") if word in words]
    if order:
        place = ("first", "second", "third", "fourth").index(order[0])
        return sorted(found, key=x, reverse=bool(right))[place].ann_id
    if (up or down) and (left or right):
        (only,) = (one for one in found if (y(one) < 1 if up else y(one) > 1) and (x(one) < 1 if left else x(one) > 1))
        return only.ann_id
    if up or down:
        return min(found, key=lambda one: y(one) if up else -y(one)).ann_id
    if left or right:
        return min(found, key=lambda one: x(one) if left else -x(one)).ann_id
    if words & {"middle", "center"}:
        middle = sorted(found, key=x)[len(found) // 2]
        assert middle is min(found, key=lambda one: abs(x(one) - 1))
        return middle.ann_id
    if words & {"big", "bigger", "biggest", "large", "larger", "largest"}:
        return max(found, key=lambda one: one.area).ann_id
    if words & {"small", "smaller", "smallest", "little", "littlest"}:
        return min(found, key=lambda one: one.area).ann_id
    (only,) = found
    return only.ann_id


@settings(max_examples=100)
@given(photographs())
def test_a_mirrored_photograph_has_the_mirrored_phrases(instances: list[Instance]):
    mirrored = [
        instance(one.ann_id, one.category, (1 - one.box[2], one.box[1], 1 - one.box[0], one.box[3]))
        for one in instances
    ]
    for number in range(len(instances)):
        assert {swap_sides(text) for text in said(instances, number)} == said(mirrored, number)


@settings(max_examples=100)
@given(photographs(), st.integers(-(2**63), 2**63))
def test_no_phrase_is_drawn_for_two_instances(instances: list[Instance], shift: int):
    drawn: Counter[str] = Counter()
    for target in instances:
        found = statements(instances, target)
        phrases = draw(found, target.ann_id + shift)
        assert phrases == draw(found, target.ann_id + shift)
        assert len(phrases) <= LIMIT
        assert {kind for kind, _ in phrases} == {statement.kind for statement in found}
        drawn.update(text for _, text in phrases)
    assert not drawn or max(drawn.values()) == 1


# ---- the table that is trained on ----------------------------------------------------------------


def coco(tiny: TinyRefer) -> TinyRefer:
    """The tiny set with what COCO's instances.json has besides, and a third photograph that nothing
    refers to: a dog on the left and one on the right."""
    for annotation in tiny.instances["annotations"]:
        annotation |= {"bbox": [2, 3, 10, 6], "iscrowd": 0}
    for number, image in enumerate(tiny.instances["images"], 3):
        image["license"] = number
    tiny.instances["images"].append({"id": 3, "file_name": "3.png", "height": 40, "width": 100, "license": 5})
    tiny.instances["categories"].append({"id": 18, "name": "dog"})
    for ann_id, left in ((81, 5), (82, 60)):
        polygon = [left, 10, left + 30, 10, left + 30, 30, left, 30]
        tiny.instances["annotations"].append(
            {
                "id": ann_id,
                "image_id": 3,
                "category_id": 18,
                "iscrowd": 0,
                "segmentation": [polygon],
                "bbox": [left, 10, 30, 20],
            }
        )
    tiny.image_folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((40, 100, 3), (90, 160, 90), np.uint8)
    pixels[10:31, 60:91] = (250, 250, 250)
    Image.fromarray(pixels).save(tiny.image_folder / "3.png")
    return tiny


def train_on(tiny: TinyRefer, **data: Any) -> tuple[Reference, ...]:
    table = load_references(tiny.write(), tiny.dataset)
    return training_table(table, DataConfig(**data)).references


def test_generated_references_extend_the_training_split_only(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    before = train_on(tiny)
    after = train_on(tiny, generate_phrases=True)
    assert after[: len(before)] == before
    added = after[len(before) :]
    assert {reference.ann_ids for reference in added} == {(73,), (81,), (82,)}
    assert {reference.split for reference in added} == {"train"}
    # An invented split would get phrases on all photographs that no reference is on.
    with pytest.raises(DcrisError, match="no split 'trian'"):
        train_on(tiny, generate_phrases=True, train_split="trian")
    assert len({reference.ref_id for reference in after}) == len(after)
    said_of = {reference.ann_ids[0]: {said.text: said.kind for said in reference.expressions} for reference in added}
    assert any("left" in text for text in said_of[81])
    assert any("right" in text for text in said_of[82])
    assert "colour" in said_of[82].values()
    sent_ids = [said.sent_id for reference in after for said in reference.expressions]
    assert len(set(sent_ids)) == len(sent_ids)
    table = load_references(tiny.root, tiny.dataset)
    assert training_table(table, DataConfig()) is table
    extended = training_table(table, DataConfig(generate_phrases=True))
    assert extended.sha256() != table.sha256()
    assert extended.sha256() == training_table(table, DataConfig(generate_phrases=True)).sha256()
    assert "3 references" in extended.notes[-1]


def test_own_words_for_a_category_replace_those_of_the_package(tiny_refer: TinyRefer):
    """Data whose annotators say "puppy" is learned under that word."""
    tiny = coco(tiny_refer)
    found = train_on(tiny, generate_phrases=True, nouns={"dog": ["puppy"]})[3:]
    texts = [each.text for reference in found if reference.category == "dog" for each in reference.expressions]
    assert "left puppy" in texts
    assert not any("dog" in text.split() for text in texts)


def test_words_for_a_category_that_is_not_there_are_refused(tiny_refer: TinyRefer, tmp_path: Path, capsys: Any):
    tiny = coco(tiny_refer)
    arguments = ["train", "dcris_tiny", "--data", str(tiny.write()), "--dataset", tiny.dataset, "--out", str(tmp_path)]
    assert main([*arguments, "--data.generate_phrases", "true", "--data.nouns", '{"dogs": ["puppy"]}']) == 2
    assert "data.nouns has words for 'dogs' (did you mean dog?)" in capsys.readouterr().err
    assert main([*arguments, "--data.nouns", '{"dog": ["puppy"]}']) == 2
    assert "give data.generate_phrases true" in capsys.readouterr().err
    assert main([*arguments, "--data.generate_phrases", "true", "--data.nouns", '{"dog": [" "]}']) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_photograph_under_two_identifiers_is_held_out(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    tiny.instances["images"][2]["file_name"] = "1.png"
    assert {reference.image_id for reference in train_on(tiny, generate_phrases=True)[3:]} == {2}


def test_licences_limit_the_training_split_only(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    assert [reference.ref_id for reference in train_on(tiny, licences=(4,))] == [10, 11, 12]
    assert {reference.image_id for reference in train_on(tiny, licences=(4,), generate_phrases=True)[2:]} == {2}
    assert {reference.image_id for reference in train_on(tiny, licences=(5,), generate_phrases=True)[2:]} == {3}
    with pytest.raises(DcrisError, match="none of the licences 8"):
        train_on(tiny, licences=(8,))
    del tiny.instances["images"][1]["license"]
    with pytest.raises(DcrisError, match="image 2 has no 'license'"):
        train_on(tiny, licences=(5,))


def test_an_unreadable_photograph_stops_or_is_left_out(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    (tiny.image_folder / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(DcrisError, match=r"3\.png"):
        train_on(tiny, generate_phrases=True)
    found = train_on(tiny, generate_phrases=True, on_bad_image="skip")
    assert {reference.image_id for reference in found[3:]} == {2}
    Image.new("RGB", (7, 8)).save(tiny.image_folder / "3.png")
    with pytest.raises(DcrisError, match="its annotations are for 100x40"):
        train_on(tiny, generate_phrases=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": None}, "annotation 81 has a 'bbox' that is not a list"),
        ({"bbox": [1, 2, 3]}, "annotation 81 has a 'bbox' that is not four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 81 has a 'bbox' that is not four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "annotation 81 has a 'bbox' that is not four numbers"),
        ({"category_id": 9}, "annotation 81 names category 9"),
        ({"iscrowd": "no"}, "annotation 81 has a 'iscrowd' that is not an integer"),
        ({"image_id": "3"}, "annotation 81 has a 'image_id' that is not an integer"),
    ],
)
def test_malformed_annotations_are_named(tiny_refer: TinyRefer, change: dict[str, Any], message: str):
    tiny = coco(tiny_refer)
    tiny.instances["annotations"][-2] |= change
    with pytest.raises(DcrisError, match=re.escape(message)):
        train_on(tiny, generate_phrases=True)


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3]], {"size": [1, 1]}, "text", [[1e9] * 6]])
def test_unusable_masks_make_their_category_vague(tiny_refer: TinyRefer, segmentation: Any):
    tiny = coco(tiny_refer)
    tiny.instances["annotations"][-2]["segmentation"] = segmentation
    assert {reference.ann_ids for reference in train_on(tiny, generate_phrases=True)[3:]} == {(73,)}


def test_limits(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    tiny.instances["categories"][-1]["name"] = "x" * 101
    with pytest.raises(DcrisError, match="more than 100 characters"):
        train_on(tiny, generate_phrases=True)
    tiny.instances["annotations"] += [{**tiny.instances["annotations"][-1], "id": number} for number in range(100, 600)]
    with pytest.raises(DcrisError, match="image 3 has 502 annotations"):
        train_on(tiny, generate_phrases=True)


def test_a_file_with_only_what_is_referred_to_is_refused(tiny_refer: TinyRefer):
    tiny = coco(tiny_refer)
    del tiny.instances["annotations"][3:]
    with pytest.raises(DcrisError, match="only instances that have references"):
        train_on(tiny, generate_phrases=True)


@pytest.mark.parametrize("setting", ["data.generate_phrases=true", "data.licences=[4,5]"])
def test_other_layouts_are_refused(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    mask = [[2, 3, 20, 3, 20, 13, 2, 13]]
    line = {"image": "1.png", "split": "train", "mask": mask, "expressions": ["cup"]}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    arguments = [
        "train",
        "dcris_tiny",
        "--data",
        str(tmp_path / "own.jsonl"),
        "--out",
        str(tmp_path / "run"),
        f"--{setting}",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{setting.partition('=')[0]} needs a data set in the REFER layout" in error
    assert error.count("\n") == 1


def test_training_records_the_generated_references(
    tiny_refer: TinyRefer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny, out = coco(tiny_refer), tmp_path / "run"
    arguments = [
        "train",
        str(small_recipe()),
        "--data",
        str(tiny.write()),
        "--dataset",
        tiny.dataset,
        "--out",
        str(out),
    ]
    sizes = ["--train.max_steps", "1", "--train.warmup_steps", "0", "--data.image_size", "56", "--data.workers", "0"]
    assert main([*arguments, *sizes, "--data.val_split", "null", "--data.generate_phrases", "true"]) == 0
    data = json.loads((out / "data.json").read_text())
    assert data["splits"]["train"]["references"] == 4
    table = training_table(load_references(tiny.root, tiny.dataset), DataConfig(generate_phrases=True))
    assert data["sha256"] == table.sha256()
    assert "3 references" in capsys.readouterr().out


@pytest.mark.slow
def test_real_photographs(refer_root: Path):
    table = load_references(refer_root, "cocomini")
    extended = training_table(table, DataConfig(generate_phrases=True, licences=(4, 5, 7, 8)))
    train = extended.split("train")
    added = [reference for reference in train if reference.ref_id > max(item.ref_id for item in table.references)]
    kinds = Counter(said.kind for reference in added for said in reference.expressions)
    assert set(kinds) == set(RULES)
    assert min(kinds.values()) >= 100
    assert max(kinds.values()) <= sum(kinds.values()) / 2
    held_out = {reference.image_path for reference in table.references if reference.split != "train"}
    assert not held_out & {reference.image_path for reference in train}
    said_in = Counter((reference.image_id, said.text) for reference in added for said in reference.expressions)
    assert max(said_in.values()) == 1
    assert all(swap_sides(text) for _, text in said_in)
    assert max(len(text.split()) for _, text in said_in) <= 14
