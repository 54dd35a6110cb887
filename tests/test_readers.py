"""Reading REFER files: plain data are read, malformed files give one sentence, and no code is
executed.
"""

import gc
import json
import os
import pickle
import pickletools
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dcris.data.coco import IMAGE_FOLDER, find_images
from dcris.data.readers.load import load_references
from dcris.data.readers.refer_layout import _PLAIN, safe_unpickle
from dcris.errors import DcrisError
from dcris.utils.pickles import end_of_pickle


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class _Outside(pickle.Pickler):
    def persistent_id(self, obj):
        return "key" if obj == "outside" else None


def _write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "refs(toy).p"
    path.write_bytes(data)
    return path


# Pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol_is_read(tmp_path, protocol):
    """Files may be written by any version of Python."""
    content = [{"a": 1, "b": [1.5, None, True, -(2**40)], "c": "näh", "d": (1, 2, 3, 4), "e": {"x": {}}}]
    assert safe_unpickle(_write(tmp_path, pickle.dumps(content, protocol))) == content


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x80\x02U\x03caf.", "caf"),
        (b"\x80\x02U\x05caf\xc3\xa9.", "café"),
        (b"\x80\x02U\x04caf\xe9.", "café"),
        (b"S'caf'\n.", "caf"),
    ],
)
def test_byte_strings_of_python_2_are_text(tmp_path, data, text):
    """The released files were written by Python 2, whose strings are bytes; expressions must be
    text.
    """
    assert safe_unpickle(_write(tmp_path, data)) == text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_never_runs(tmp_path, protocol):
    """A file from a mirror could otherwise take over the user's account."""
    proof = tmp_path / "proof"
    path = _write(tmp_path, pickle.dumps([{"ref_id": 1}, _Runs(f"touch {proof}")], protocol))
    with pytest.raises(DcrisError, match=r"run code \((posix|nt)\.system\): do not trust it"):
        safe_unpickle(path)
    assert not proof.exists()


def test_an_old_style_instance_never_runs(tmp_path):
    """Protocol 0 has its own instruction for calling a class."""
    with pytest.raises(DcrisError, match=r"run code \(os\.system\)"):
        safe_unpickle(_write(tmp_path, b"(S'true'\nios\nsystem\n."))


def test_objects_other_than_plain_data_are_refused(tmp_path):
    """Even harmless objects, such as NumPy arrays, are created by calling named code."""
    with pytest.raises(DcrisError, match=r"run code .*numpy"):
        safe_unpickle(_write(tmp_path, pickle.dumps([np.float64(1)], 2)))
    outside = tmp_path / "outside.p"
    with outside.open("wb") as file:
        _Outside(file, 2).dump(["outside"])
    with pytest.raises(DcrisError, match="outside the file"):
        safe_unpickle(outside)
    with pytest.raises(DcrisError, match="EXT1"):
        safe_unpickle(_write(tmp_path, b"\x80\x02\x82\x01."))


_MILLION = 1_000_000


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".",
        b"Np2000000000\n.",
        *(
            b"\x80\x04(" + code * 3 * _MILLION + b"l."
            for code in (b"\x8f", b"]", b"}", b"(l", b"(\x91", b"N", b")\x85")
        ),
        b"N" + b"\x85" * 3 * _MILLION + b".",
        b"]" * 3 * _MILLION + b"a" * (3 * _MILLION - 1) + b".",
        # Many different numbers with the same hash, which make a dictionary slow.
        b"}("
        + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(2**5, 60_000))
        + b"u.",
        b"}(" + b"".join(b"L%dL\nN" % (n * (2**61 - 1)) for n in range(2**5, 60_000)) + b"u.",
    ],
    ids=str.split(
        "memo memo-as-text sets lists dicts marked-lists frozensets nothings tuples nested deep hashes hashes-as-text"
    ),
)
def test_a_small_pickle_cannot_take_gigabytes_or_minutes(tmp_path, data):
    """30 MB of instructions that each create an empty set took 7 GB; twelve bytes requested a table
    of 32 GB.
    """
    with pytest.raises(DcrisError, match=r"is not a whole pickle .*far more memory than its size explains"):
        safe_unpickle(_write(tmp_path, data))


def test_a_string_with_a_huge_claimed_length_takes_no_memory(tmp_path):
    """Nine bytes can claim that a terabyte follows."""
    for code in (b"\x8e", b"\x8d"):
        with pytest.raises(DcrisError, match="ends before its last instruction"):
            safe_unpickle(_write(tmp_path, b"\x80\x04" + code + struct.pack("<Q", 2**40) + b"."))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_valid_data_is_far_from_the_memory_limit(tmp_path, protocol, monkeypatch):
    """The memory limit must admit every valid data set in this layout, also with expressions of one
    letter.
    """
    monkeypatch.setattr("dcris.utils.pickles._MEMORY_OF_ANY", 10_000)
    records = [
        {
            "ref_id": number,
            "ann_id": number + 70_000,
            "image_id": number + 7,
            "category_id": 1,
            "split": "".join("val"),
            "sent_ids": [number],
            "sentences": [{"sent_id": number, "sent": chr(97 + number % 26), "raw": "", "tokens": [str(number)]}],
        }
        for number in range(3000)
    ]
    assert safe_unpickle(_write(tmp_path, pickle.dumps(records, protocol))) == records


@pytest.mark.parametrize("kept", [0, 1, 40, -2])
def test_a_truncated_pickle_is_reported(tmp_path, tiny_refer, kept):
    """A truncated download gives a sentence, not a traceback."""
    data = pickle.dumps(tiny_refer.references, 2)
    with pytest.raises(DcrisError, match="cut short"):
        safe_unpickle(_write(tmp_path, data[:kept]))


@pytest.mark.parametrize(
    "data", [b"no pickle", b"\x80\x02(((.", b"\x80\x02]q\x00h\x07.", b"<html></html>", b"\x80\x02}(K\x01u."]
)
def test_other_files_are_reported_as_not_a_pickle(tmp_path, data):
    """A mirror's error page saved as refs(unc).p is not a pickle."""
    with pytest.raises(DcrisError, match="is not a whole pickle"):
        safe_unpickle(_write(tmp_path, data))


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(DcrisError, match=r"there is no file .*refs\(unc\)\.p"):
        safe_unpickle(tmp_path / "refs(unc).p")
    with pytest.raises(DcrisError, match="cannot read"):
        safe_unpickle(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_instruction_passes_that_is_not_admitted(protocol):
    """pickletools finds no other instruction in an admitted pickle, however it was damaged."""
    source = np.random.default_rng(protocol)
    content = [{"id": 2**40, "b": (0.5, None, True, 7), "c": "näh" * 90, 7: {"x": []}}] * 3 + ["text"] * 2
    if protocol >= 4:
        content += [{1, 2}, frozenset("ab"), b"raw"]
    for sound in (content, [*content, _Runs("true")], [np.float64(1), "text"]):
        data = pickle.dumps(sound, protocol)
        assert _passes(data) == (sound is content)
        for _ in range(200):
            spoilt = bytearray(data)
            for place in source.integers(len(data), size=source.integers(1, 4)):
                spoilt[place] = source.choice(spoilt) if place % 2 else source.integers(256)
            if _passes(bytes(spoilt)):
                with suppress(ValueError):  # a malformed number, where the unpickler stops, too
                    assert {instruction.name for instruction, *_ in pickletools.genops(bytes(spoilt))} <= _PLAIN


def _passes(data):
    try:
        return end_of_pickle(data, admitted=_PLAIN) <= len(data)
    except pickle.UnpicklingError:
        return False


# Partitions


def test_the_only_split_by_is_found_and_several_are_listed(tiny_refer):
    """--split-by may be omitted if there is one partition, and is required if there are several."""
    root = tiny_refer.write()
    assert load_references(root, "tiny").split_by == "toy"
    (root / "tiny/refs(google).p").write_bytes(b"")
    with pytest.raises(DcrisError, match="--split-by: google, toy"):
        load_references(root, "tiny")
    with pytest.raises(DcrisError, match=r"no data set nothing in .*nothing/refs\(\.\.\.\)\.p.*dcris data fetch"):
        load_references(root, "nothing")


# Data sets


def test_every_field_is_read(tiny_refer):
    """A field in the wrong place would silently train on the wrong object."""
    tiny_refer.references[1]["sentences"][1]["kind"] = "place"
    root = tiny_refer.write()
    table = load_references(root, "tiny")
    assert (table.dataset, table.split_by, table.root) == ("tiny", "toy", root)
    assert list(table.splits().items()) == [("train", (1, 2)), ("val", (1, 2)), ("testA", (1, 1))]
    (reference,) = table.split("val")
    assert (reference.ref_id, reference.ann_ids, reference.image_id) == (11, (72,), 1)
    assert reference.image_path == root / "images/mscoco/images/train2014/1.png"
    assert (reference.image_size, reference.category, reference.split) == ((30, 40), "person", "val")
    assert reference.segmentations == ({"size": [30, 40], "counts": [100, 20, 1080]},)
    assert [(e.sent_id, e.text, e.kind) for e in reference.expressions] == [
        (200, "tall thing", None),
        (201, "right", "place"),
    ]


def test_an_unknown_split_lists_the_existing_ones(tiny_refer):
    table = load_references(tiny_refer.write(), "tiny")
    with pytest.raises(DcrisError, match="no split 'testC'; choose from train, val, testA"):
        table.split("testC")


def test_images_may_lie_in_a_folder_of_their_own(tiny_refer):
    """Other data sets may keep their images outside COCO's folder."""
    for image in tiny_refer.instances["images"]:
        image["file_name"] = "scenes/" + image["file_name"]
    root = tiny_refer.write()
    tiny_refer.image_folder.rename(root / "images/scenes")
    for reference in load_references(root, "tiny").references:
        assert reference.image_path.is_file()
        assert reference.image_path.parent == root / "images/scenes"


def _set(path, value):
    """Return a change of (references, instances): set the item at `path` to `value`, or delete it
    if `value` is `_set`.
    """

    def change(data):
        *outer, last = path
        for key in outer:
            data = data[key]
        if value is _set:
            del data[last]
        else:
            data[last] = value

    return change


_REF, _SENT = ("references", 1), ("references", 1, "sentences", 0)
_ANN, _IMG = ("instances", "annotations", 1), ("instances", "images", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *(
            (_set((*_REF, key), _set), f"reference 11 has no '{key}'")
            for key in ("ann_id", "image_id", "category_id", "split")
        ),
        (_set((*_REF, "ref_id"), _set), "entry 2 has no 'ref_id'"),
        (_set((*_REF, "sentences"), _set), "reference 11 has no 'sentences'"),
        (_set((*_REF, "sentences"), []), "reference 11 has an empty 'sentences'"),
        (_set(_REF, "text"), "entry 2 is not an object"),
        (_set(_SENT, 5), "sentence 1 of reference 11 is not an object"),
        (_set((*_SENT, "sent"), _set), "sentence 200 of reference 11 has no 'sent'"),
        (_set((*_SENT, "sent"), ["a"]), "'sent' that is not text but list"),
        (_set((*_SENT, "sent"), " \t"), "sentence 200 of reference 11 has a blank 'sent'"),
        (_set((*_SENT, "sent"), "&nbsp;"), "sentence 200 of reference 11 has a blank 'sent'"),
        (_set((*_SENT, "sent_id"), True), "'sent_id' that is not an integer but bool"),
        (_set((*_SENT, "sent_id"), 300), "sentence 300 of reference 12 occurs twice"),
        (_set((*_SENT, "kind"), 3), "'kind' that is not text"),
        (_set((*_REF, "ref_id"), True), "'ref_id' that is not an integer but bool"),
        (_set((*_REF, "ref_id"), 10), "reference 10 occurs twice"),
        (_set((*_REF, "ann_id"), float("nan")), "reference 11 has a 'ann_id' that is not an integer but NaN"),
        (_set((*_REF, "ann_id"), 99), "reference 11 names annotation 99, which instances.json does not have"),
        (_set((*_REF, "image_id"), 99), "reference 11 names image 99, which instances.json does not have"),
        (_set((*_REF, "category_id"), 99), "reference 11 names category 99, which instances.json does not have"),
        (_set((*_REF, "image_id"), 2), "reference 11 names image 2, but its annotation 72 belongs to image 1"),
        (_set((*_REF, "split"), " "), "reference 11 has a blank 'split'"),
        (_set((*_REF, "split"), "half \ud83d"), "reference 11 has a 'split' that is not valid Unicode text"),
        (_set(("references",), []), "not a list of references"),
        (_set(("references",), {}), "not a list of references"),
        (_set((*_ANN, "segmentation"), _set), "annotation 72 of reference 11 has no 'segmentation'"),
        (_set((*_ANN, "segmentation"), []), "annotation 72 of reference 11 has no 'segmentation'"),
        (_set((*_ANN, "segmentation"), [[1, 2, 3, 4]]), "annotation 72.*polygon 1 is not a list"),
        (_set((*_ANN, "segmentation"), [[1, 2, 3, 4, 5, float("nan")]]), "annotation 72.*polygon 1 has a corner"),
        (_set((*_ANN, "segmentation", "counts"), [1200, 1]), "annotation 72.*do not add up"),
        (_set((*_ANN, "id"), 71), "two different entries of 'annotations' have the id 71"),
        (_set((*_ANN, "image_id"), _set), "annotation 72 has no 'image_id'"),
        (_set((*_IMG, "height"), 0), "image 1 cannot be 0 x 40"),
        (_set((*_IMG, "width"), 10**9), "image 1 cannot be 30 x 1000000000"),
        (_set((*_IMG, "width"), 10**4000), "'width' of more than 64 bits"),
        (_set((*_IMG, "width"), 40.0), "'width' that is not an integer but float"),
        (_set((*_IMG, "width"), _set), "image 1 has no 'width'"),
        *(
            (_set((*_IMG, "file_name"), name), "image 1 has a 'file_name' that is not a plain path")
            for name in (
                "/etc/passwd",
                "../1.png",
                "a/../../1.png",
                "..\\1.png",
                "C:1.png",
                "",
                "./C:/b.png",
                "\\\\host\\b.png",
                "./",
                "a\0b",
                "猫" * 99,
                "a/" * 999 + "b",
            )
        ),
        (_set(("instances", "annotations"), _set), "the file has no 'annotations'"),
        (_set(("instances", "categories"), {}), "'categories' that is not a list but dict"),
        (_set(("instances", "categories", 0, "name"), None), "category 5 has a 'name' that is not text"),
        (_set((*_IMG, "file_name"), "half \ud83d.png"), "image 1 has a 'file_name' that is not valid Unicode text"),
        (_set(("instances", "categories", 0, "name"), "half \ud83d"), "category 5 has a 'name' that is not valid"),
        (_set(("instances", "images", 0), None), "entry 1 of 'images' is not an object"),
        (_set(("instances",), []), "the file is not an object"),
    ],
)
def test_each_malformed_entry_is_named_with_its_file(tiny_refer, change, sentence):
    """The error names the file, the reference and the field in one sentence."""
    data = {"references": tiny_refer.references, "instances": tiny_refer.instances}
    change(data)
    tiny_refer.references, tiny_refer.instances = data["references"], data["instances"]
    root = tiny_refer.write()
    with pytest.raises(DcrisError, match=f"(instances.json|p): .*{sentence}") as caught:
        load_references(root, "tiny")
    assert "\n" not in str(caught.value)


def test_the_annotation_file_may_be_missing_or_cut_short(tiny_refer):
    root = tiny_refer.write()
    text = tiny_refer.json_path.read_text()
    tiny_refer.json_path.write_text(text[: len(text) // 2])
    with pytest.raises(DcrisError, match=r"instances\.json, is not valid JSON"):
        load_references(root, "tiny")
    tiny_refer.json_path.unlink()
    with pytest.raises(DcrisError, match=r"annotation file of tiny is missing: there is no file .*instances\.json"):
        load_references(root, "tiny")


def test_the_garbage_collector_is_restored(tiny_refer):
    """A disabled collector would fill the memory during training."""
    root = tiny_refer.write()
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            load_references(root, "tiny")
            with pytest.raises(DcrisError):
                load_references(root, "nothing")
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_unknown_fields_are_ignored(tiny_refer):
    """The released files have many fields that are not used, and other people add their own."""
    plain = load_references(tiny_refer.write(), "tiny").references
    for record in (*tiny_refer.references, *tiny_refer.instances["images"], *tiny_refer.instances["annotations"]):
        record["extra"] = {"anything": [1, None]}
    assert load_references(tiny_refer.write(), "tiny").references == plain


# Real files


def test_the_real_files_have_the_counts_that_came_with_them(refer_root):
    table = load_references(refer_root, "cocomini")
    assert {name: counts[0] for name, counts in table.splits().items()} == {"train": 1039, "val": 104, "testA": 131}
    assert sum(counts[1] for counts in table.splits().values()) == 2641
    assert len({reference.image_id for reference in table.references}) == 468
    for dataset, split_by, count in (("refcoco", "unc", 8), ("refcoco+", "unc", 3), ("refcocog", "umd", 2)):
        table = load_references(refer_root, dataset)
        assert (table.split_by, len(table.references)) == (split_by, count)


def test_real_references_agree_with_a_plain_reading_of_the_same_files(refer_root):
    """The strict reader loses and exchanges nothing."""
    with (refer_root / "cocomini/refs(templated).p").open("rb") as file:
        records = pickle.load(file)
    content = json.loads((refer_root / "cocomini/instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
    images = {image["id"]: image for image in content["images"]}
    references = load_references(refer_root, "cocomini", "templated").references
    assert [reference.ref_id for reference in references] == [record["ref_id"] for record in records]
    for reference, record in zip(references, records, strict=True):
        image = images[record["image_id"]]
        assert reference.image_path.name == image["file_name"]
        assert reference.image_size == (image["height"], image["width"])
        assert reference.segmentations == (annotations[record["ann_id"]]["segmentation"],)
        assert [expression.text for expression in reference.expressions] == [s["sent"] for s in record["sentences"]]


@pytest.mark.parametrize(
    ("recorded", "folder", "stored"),
    [
        ("COCO_train2014_000000000036.jpg", "images/mscoco/images/train2014", "COCO_train2014_000000000036.jpg"),
        ("COCO_train2014_000000000036.jpg", "images/train2017", "000000000036.jpg"),
        ("000000000036.jpg", "images/train2014", "COCO_train2014_000000000036.jpg"),
        ("scene 1.png", "images", "scene 1.png"),
        ("COCO_train2014_000000000036.jpg", "images/mscoco/train2014", "COCO_train2014_000000000036.jpg"),
        ("COCO_val2014_000000000042.jpg", "images/trainval2014", "COCO_val2014_000000000042.jpg"),
        ("COCO_val2014_000000000042.jpg", "train2017", "000000000042.jpg"),
    ],
)
def test_images_are_found_under_either_of_cocos_namings(tmp_path, recorded, folder, stored):
    """train2017 contains the images of train2014 under shorter names; many people have only
    train2017.
    """
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / stored).touch()
    assert find_images(tmp_path, [recorded]).path(recorded) == tmp_path / folder / stored


def test_images_of_val2014_need_not_be_merged_with_those_of_train2014(tmp_path):
    """Ref-ZOM needs both; its authors ask for a merged folder of 19 GB."""
    train, val = "COCO_train2014_000000000036.jpg", "COCO_val2014_000000000042.jpg"
    for name in (train, val):
        path = tmp_path / "images" / name.split("_")[1] / name
        path.parent.mkdir(parents=True)
        path.touch()
    images = find_images(tmp_path, [val, train])
    assert [images.path(train).exists(), images.path(val).exists()] == [True, True]


def test_missing_images_are_expected_in_the_official_folder(tmp_path):
    """The later error names the usual place of the images."""
    assert find_images(tmp_path, ["a.jpg"]).path("a.jpg") == tmp_path / IMAGE_FOLDER / "a.jpg"
