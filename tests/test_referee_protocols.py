"""The protocols of LISA, PhraseCut and GSEval and Boundary IoU, against slow implementations that
follow the authors' code, on small drawn masks and on real annotations."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from dcris.cli import main
from dcris.data.masks import encode_mask
from dcris.data.readers.load import load_references
from dcris.evaluation.analysis import analyse
from dcris.evaluation.external_masks import score_masks
from dcris.evaluation.metrics import boundary, summarise
from dcris.evaluation.protocols import get_protocol
from dcris.evaluation.results import read_results, write_results
from dcris.types import Expression, Reference
from referee import (
    H,
    W,
    box,
    phrasecut_tasks,
    reasonseg_files,
    runs,
    write_gseval,
    write_phrasecut,
    write_reasonseg,
    write_refsegrs,
    write_rrsisd,
)
from test_distributed import half_mask_model

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Pair(NamedTuple):
    """Masks [H, W] bool of one expression."""

    prediction: np.ndarray
    truth: np.ndarray
    ignored: np.ndarray | None = None


# ---- slow implementations ------------------------------------------------------------------------


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    """As mask_to_boundary of boundary-iou-api: erode by a square of 3 x 3 as often as the distance,
    in an image with a border of background."""
    height, width = mask.shape
    times = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    inner = np.zeros((height + 2, width + 2), bool)
    inner[1:-1, 1:-1] = mask
    for _ in range(times):
        padded = np.pad(inner, 1)
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        inner = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return mask & ~inner[1:-1, 1:-1]


def slow_boundary_iou(pairs: Sequence[Pair]) -> float:
    """In percent. Pixels without a truth are left out of both boundaries."""
    ious = []
    for prediction, truth, ignored in pairs:
        compared = np.ones(truth.shape, bool) if ignored is None else ~ignored
        ours, theirs = slow_boundary(prediction) & compared, slow_boundary(truth) & compared
        either = (ours | theirs).sum()
        ious.append((ours & theirs).sum() / either if either else 0.0)
    return 100 * float(np.mean(ious))


def slow_lisa(pairs: Sequence[Pair]) -> dict[str, float]:
    """As validate and intersectionAndUnionGPU of LISA: three values in one array, histograms of the
    classes 0 and 1, and 1 for an empty union."""
    intersections, unions, ious = [], [], []
    for prediction, truth, ignored in pairs:
        target = truth.astype(int).ravel()
        if ignored is not None:
            target[ignored.ravel()] = 255
        output = prediction.astype(int).ravel()
        output[target == 255] = 255
        equal = output[output == target]
        areas = [np.histogram(values, bins=2, range=(0, 1))[0] for values in (equal, output, target)]
        union = areas[1] + areas[2] - areas[0]
        iou = areas[0] / (union + 1e-5)
        iou[union == 0] += 1.0
        intersections.append(areas[0][1])
        unions.append(union[1])
        ious.append(iou[1])
    return {"giou": 100 * np.mean(ious), "ciou": 100 * sum(intersections) / (sum(unions) + 1e-10)}


def counts_of(pair: Pair) -> tuple[int, int, float]:
    """As iou_polygons_masks of PhraseCutDataset: an IoU without intersection is 0."""
    shared = np.sum(np.logical_and(pair.prediction, pair.truth))
    both = np.sum((pair.prediction.astype(int) + pair.truth.astype(int)) > 0)
    return shared, both, 0 if shared == 0 else shared / both


def slow_phrasecut(pairs: Sequence[Pair]) -> dict[str, float]:
    """As analyze_stats of PhraseCutDataset, for one subset."""
    counts = [counts_of(pair) for pair in pairs]
    ious = np.array([iou for _, _, iou in counts])
    total = sum(both for _, both, _ in counts)
    return {
        "miou": 100 * ious.mean(),
        "ciou": 100 * sum(shared for shared, _, _ in counts) / total if total else 0.0,
        **{f"prec@{limit}": 100 * np.sum(ious > limit) / len(ious) for limit in LIMITS},
    }


def slow_gseval(pairs: Sequence[Pair]) -> dict[str, float]:
    """As calculate_mask_iou of GroundingSuite."""
    ious = []
    for prediction, truth, _ in pairs:
        union = np.logical_or(prediction, truth).sum()
        ious.append(np.logical_and(prediction, truth).sum() / union if union > 0 else 0.0)
    return {"giou": 100 * np.mean(ious)}


def slow_own_pixels(pairs: Sequence[Pair]) -> dict[str, float]:
    """The rule of cris, cgformer and refer: sums over expressions, precision above the limit."""
    found = slow_phrasecut(pairs)
    return {"oiou": found.pop("ciou"), **found}


RULES: Mapping[str, Callable[[Sequence[Pair]], dict[str, float]]] = {
    "cris": slow_own_pixels,
    "cgformer": slow_own_pixels,
    "refer": slow_own_pixels,
    "lisa": slow_lisa,
    "phrasecut": slow_phrasecut,
    "gseval": slow_gseval,
}


# ---- boundaries ----------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_a_boundary_is_what_lies_near_the_background(data: st.DataObject) -> None:
    """Pixel by pixel: some pixel within the distance is not in the mask or not in the image."""
    size = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    mask = data.draw(arrays(bool, size))
    mask |= data.draw(arrays(bool, size))  # denser
    height, width = size
    distance = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    expected = np.zeros(size, bool)
    for y in range(height):
        for x in range(width):
            around = [
                (v, u) for v in range(y - distance, y + distance + 1) for u in range(x - distance, x + distance + 1)
            ]
            inside = all(0 <= v < height and 0 <= u < width and mask[v, u] for v, u in around)
            expected[y, x] = mask[y, x] and not inside
    np.testing.assert_array_equal(boundary(mask), expected)
    np.testing.assert_array_equal(slow_boundary(mask), expected)


@pytest.mark.parametrize(
    ("size", "width"),
    [((30, 40), 1), ((75, 100), 2), ((225, 300), 8), ((480, 640), 16)],
)
def test_the_width_of_a_boundary(size: tuple[int, int], width: int) -> None:
    """2% of diagonals of 50, 125 (2.5, rounded to the even number), 375 (7.5) and 800 pixels."""
    found = boundary(np.ones(size, bool))
    assert found[:width].all()
    assert not found[width:-width, width:-width].any()
    assert found.sum() == size[0] * size[1] - (size[0] - 2 * width) * (size[1] - 2 * width)


def test_edges_count_where_the_area_does_not() -> None:
    """A large square whose edge is off by the boundary's width keeps an IoU of 0.85 and loses its
    Boundary IoU."""
    (reference,) = references_of([np.pad(np.ones((300, 300), bool), 50)])
    wider = np.pad(np.ones((324, 324), bool), 38)  # 0.02 x 566 = 11 pixels
    (result,) = scored([reference], [wider], get_protocol("cris", boundary=True))
    assert result.overlap.iou == pytest.approx(300**2 / 324**2)
    assert result.overlap.boundary_intersection == 0
    assert result.overlap.boundary_union == (324**2 - 302**2) + (300**2 - 278**2)


# ---- drawn masks ---------------------------------------------------------------------------------


def references_of(
    truths: Sequence[np.ndarray], ignored: Sequence[np.ndarray | None] | None = None, **more: Any
) -> list[Reference]:
    """A reference for each mask, which is stored as run lengths; its images do not exist."""
    found = []
    for number, mask in enumerate(truths, 1):
        unknown = None if ignored is None or ignored[number - 1] is None else encode_mask(ignored[number - 1])
        found.append(
            Reference(
                number,
                (number,),
                number,
                Path(f"{number}.jpg"),
                mask.shape,
                "thing",
                "val",
                (encode_mask(mask),),
                (Expression(number, f"thing {number}", **more),),
                unknown,
            )
        )
    return found


def scored(references: Sequence[Reference], masks: Sequence[np.ndarray], protocol: Any) -> list[Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "masks.npz"
        np.savez(path, **{str(number): mask for number, mask in enumerate(masks, 1)})
        queries = [(reference, reference.expressions[0]) for reference in references]
        return list(score_masks(path, queries, protocol, keep_masks=True))


small_masks = arrays(bool, (6, 7))


@given(st.lists(st.tuples(small_masks, small_masks, st.none() | small_masks), min_size=1, max_size=6))
@settings(max_examples=60)
def test_lisa_with_ignored_regions(drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> None:
    """Every combination of empty and full masks and regions, with Boundary IoU."""
    pairs = [
        Pair(prediction, truth if ignored is None else truth & ~ignored, ignored)
        for prediction, truth, ignored in drawn
    ]
    references = references_of([pair.truth for pair in pairs], [pair.ignored for pair in pairs])
    protocol = get_protocol("lisa", boundary=True)
    results = scored(references, [pair.prediction for pair in pairs], protocol)
    found = summarise((result.overlap for result in results), protocol.metrics)
    expected = slow_lisa(pairs)
    assert {key: found[key] or 0.0 for key in expected} == pytest.approx(expected, abs=1e-7)
    assert found["biou"] == pytest.approx(slow_boundary_iou(pairs), abs=1e-9)


@pytest.mark.parametrize("pixels", [0, 1])
def test_boundary_iou_of_lisa_is_over_the_same_expressions_for_all_systems(pixels: int) -> None:
    """An expression without a target has no boundary, whether or not a pixel is predicted there."""
    some, prediction = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    some[1:4] = True
    prediction[0, :pixels] = True
    present, absent = references_of([some, some])
    protocol = get_protocol("lisa", boundary=True)
    results = scored([present, replace(absent, segmentations=(), ann_ids=())], [some, prediction], protocol)
    found = summarise((result.overlap for result in results), protocol.metrics)
    assert (found["biou"], found["giou"]) == (100, pytest.approx(50 if pixels else 100, abs=1e-4))


@given(st.lists(st.tuples(small_masks, small_masks), min_size=1, max_size=6))
@settings(max_examples=40)
def test_phrasecut_and_gseval_on_drawn_masks(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    pairs = [Pair(*each) for each in drawn]
    references = references_of([pair.truth for pair in pairs])
    for name in ("phrasecut", "gseval"):
        protocol = get_protocol(name)
        results = scored(references, [pair.prediction for pair in pairs], protocol)
        found = summarise((result.overlap for result in results), protocol.metrics)
        expected = RULES[name](pairs)
        assert {key: found[key] or 0.0 for key in expected} == pytest.approx(expected, abs=1e-9)


def test_precision_of_phrasecut_leaves_out_equality() -> None:
    """An IoU of exactly 0.5 is above no limit; LAVT would count it."""
    truth = np.zeros((4, 4), bool)
    truth[:2] = True
    prediction = np.zeros((4, 4), bool)
    prediction[0] = True
    results = scored(references_of([truth]), [prediction], get_protocol("phrasecut"))
    assert summarise((result.overlap for result in results), get_protocol("phrasecut").metrics)["prec@0.5"] == 0


def test_two_empty_masks() -> None:
    """Right in LISA, since two photographs of ReasonSeg have no polygons; wrong in the others."""
    nothing = np.zeros((5, 5), bool)
    for name, iou in (("lisa", 1.0), ("phrasecut", 0.0), ("gseval", 0.0), ("cris", 0.0)):
        protocol = get_protocol(name)
        reference = replace(*references_of([nothing]), segmentations=(), ann_ids=())
        (result,) = scored([reference], [nothing], protocol)
        assert result.overlap.iou == iou
        assert summarise([result.overlap], protocol.metrics)[protocol.metrics[0].key] == 100 * iou


@given(
    st.lists(st.lists(st.tuples(st.floats(-3, 23), st.floats(-3, 18)), min_size=3, max_size=6), min_size=1, max_size=4)
)
@settings(max_examples=60)
def test_a_pixel_in_two_polygons_of_an_object(polygons: list[list[tuple[float, float]]]) -> None:
    """LAVT, RefSegformer and LISA add the polygons' masks and compare with 1, CGFormer cuts the 254
    that CRIS stores for 2 to 0: their published scores count it as background. CRIS, ReLA and DMMI
    take any value above 0."""
    flat = [[value for corner in polygon for value in corner] for polygon in polygons]
    layers = np.sum(coco.decode(coco.frPyObjects(flat, 16, 20)), axis=2).astype(np.uint8)
    stored = layers * np.uint8(255)
    drawn = {"lisa": layers == 1, "lavt": layers == 1, "rrefcoco": layers == 1}
    drawn |= {"cgformer": np.uint8(stored / 255.0) > 0, "cris": stored > 0, "refzom": layers != 0}
    for name, mask in drawn.items():
        protocol = get_protocol(name)
        np.testing.assert_array_equal(protocol.rasterise((flat,), (16, 20)), protocol.to_canvas(mask), name)


@pytest.mark.parametrize("name", ["cgformer", "lavt", "lisa", "rrefcoco", "cris", "refzom"])
def test_a_pixel_in_two_polygons_of_a_mask_as_cris_stores_it(name: str, tmp_path: Path) -> None:
    """The same annotations have the same truth, and so the same scores, whether they are read as
    polygons or in the layout of CRIS, from which CGFormer's code reads them."""
    square, beside = ([x, 2, x + 9, 2, x + 9, 11, x, 11] for x in (2, 7))
    layers = np.sum(coco.decode(coco.frPyObjects([square, beside], 16, 20)), axis=2).astype(np.uint8)
    assert {*np.unique(layers).tolist()} == {0, 1, 2}
    path = tmp_path / "mask.png"
    Image.fromarray(layers * np.uint8(255)).save(path)
    protocol = get_protocol(name)
    expected = protocol.rasterise(([square, beside],), (16, 20))
    np.testing.assert_array_equal(protocol.rasterise((path,), (16, 20)), expected)
    Image.fromarray((layers > 0).astype(np.uint8)).save(path)  # as others store it: nothing is known of polygons
    np.testing.assert_array_equal(protocol.rasterise((path,), (16, 20)), protocol.to_canvas(layers > 0))


def test_scores_by_subset() -> None:
    """PhraseCut's authors print all metrics for every subset; a phrase is in several."""
    random = np.random.default_rng(0)
    truths, predictions = (list(random.random((8, 9, 9)) > 0.5) for _ in range(2))
    names = [("all", "c20", "i_single"), ("all", "c20", "i_many"), ("all", "c500+", "i_single"), ("all",)] * 2
    references = [
        reference
        for truth, subsets in zip(truths, names, strict=True)
        for reference in references_of([truth], subsets=subsets)
    ]
    protocol = get_protocol("phrasecut")
    results = [
        result
        for reference, prediction in zip(references, predictions, strict=True)
        for result in scored([reference], [prediction], protocol)
    ]
    groups = {group["name"]: group for group in analyse(results, protocol.metrics)["by_subset"]}
    assert list(groups) == ["all", "c20", "c500+", "i_many", "i_single"]
    for name, group in groups.items():
        chosen = [
            Pair(prediction, truth)
            for prediction, truth, subsets in zip(predictions, truths, names, strict=True)
            if name in subsets
        ]
        expected = slow_phrasecut(chosen)
        assert {key: group[key] for key in expected} == pytest.approx(expected)
        assert group["expressions"] == len(chosen)
    assert "by_subset" not in analyse(scored(references_of(truths), predictions, protocol), protocol.metrics)


# ---- files of masks ------------------------------------------------------------------------------


def test_masks_may_have_the_names_of_the_data_set(tmp_path: Path) -> None:
    """PhraseCut's predictions are <task_id>.png; a name must not lead out of the folder."""
    mask = np.zeros((6, 7), bool)
    mask[2:4, 1:5] = True
    (reference,) = references_of([mask], name="2324__7")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(tmp_path / "masks/2324__7.png")
    query = (reference, reference.expressions[0])
    (result,) = score_masks(tmp_path / "masks", [query], get_protocol("phrasecut"))
    assert result.overlap.iou == 1
    Image.fromarray(mask).save(tmp_path / "outside.png")
    (elsewhere,) = references_of([mask], name="../outside")
    with pytest.raises(Exception, match="no mask for 1 of 1"):
        list(score_masks(tmp_path / "masks", [(elsewhere, elsewhere.expressions[0])], get_protocol("phrasecut")))


@pytest.mark.parametrize("key", ["segmentation", "predicted_segmentation"])
def test_predictions_as_gseval_has_them(key: str, tmp_path: Path) -> None:
    mask = np.zeros((6, 7), bool)
    mask[2:4, 1:5] = True
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"idx": 1, key: encode_mask(mask)}) + "\n")
    (reference,) = references_of([mask])
    (result,) = score_masks(path, [(reference, reference.expressions[0])], get_protocol("gseval"))
    assert result.overlap.iou == 1


def test_results_files_keep_boundaries(tmp_path: Path) -> None:
    """Comparisons read results instead of computing them again, empty unions included."""
    nothing, some = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    some[2:6, 2:7] = True
    references, protocol = references_of([some, nothing]), get_protocol("lisa", boundary=True)
    results = scored(references, [np.roll(some, 1), nothing], protocol)
    queries = [(reference, reference.expressions[0]) for reference in references]
    write_results(tmp_path / "a.jsonl", results, protocol)
    read, _ = read_results(tmp_path / "a.jsonl", queries, protocol)
    assert [each.overlap for each in read] == [each.overlap for each in results]
    write_results(tmp_path / "b.jsonl", results, get_protocol("lisa"))
    with pytest.raises(Exception, match="without Boundary IoU; leave out --boundary"):
        read_results(tmp_path / "b.jsonl", queries, protocol)


def test_a_model_and_its_masks_have_the_same_scores(
    trained_run: Path, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dcris evaluate` counts on the device, `dcris score` from files."""
    where = ["--data", str(scenes_root), "--dataset", "scenes", "--split", "test", "--protocol", "lisa", "--boundary"]
    model, answers = half_mask_model(trained_run, tmp_path / "model"), str(tmp_path / "answers.jsonl")
    assert main(["evaluate", str(model), *where, "--device", "cpu", "--answers", answers]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert main(["score", answers, *where, "--format", "json"]) == 0
    theirs = json.loads(capsys.readouterr().out)
    assert ours["biou"] > 0
    for key in ("giou", "ciou", "biou"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-9)
    assert main(["compare", answers, answers, *where, "--names", "a", "b", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["systems"][0]["biou"] == pytest.approx(ours["biou"], abs=1e-9)


# ---- official layouts ----------------------------------------------------------------------------


def scored_files(capsys: pytest.CaptureFixture[str], root: Path, *words: object) -> dict[str, Any]:
    assert main(["score", *map(str, words), "--data", str(root), "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def slow_reasonseg(shapes: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """As get_mask_from_json of LISA: 1 for the target and 255 for ignored pixels."""
    drawn = []
    for shape in shapes:
        if shape["label"].lower() != "flag":
            alone = np.zeros(size, np.uint8)
            points = np.array([shape["points"]], np.int32)
            cv2.polylines(alone, points, True, 1, 1)
            cv2.fillPoly(alone, points, 1)
            drawn.append((int(alone.sum()), "ignore" in shape["label"].lower(), alone))
    mask = np.zeros(size, np.uint8)
    for _, ignored, alone in sorted(drawn, key=lambda each: -each[0]):
        mask[alone == 1] = 255 if ignored else 1
    return mask


def test_reasonseg_and_the_masks_of_its_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pixels of the ignored regions do not count; of two empty masks, one pixel makes 0 of 100."""
    root, masks = write_reasonseg(tmp_path / "data"), tmp_path / "masks"
    masks.mkdir()
    (content, _) = reasonseg_files()["train/1"]
    labels = slow_reasonseg(content["shapes"], (H, W))
    prediction = box(5, 12, 26, 33)
    assert (prediction & (labels == 255)).any()
    entries = [{"sent_id": number, "segmentation": encode_mask(prediction)} for number in (1, 2)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    found = scored_files(
        capsys, root, tmp_path / "train.json", "--dataset", "reasonseg", "--split", "train", "--protocol", "lisa"
    )
    expected = slow_lisa([Pair(prediction, labels == 1, labels == 255)] * 2)
    assert {key: found[key] or 0.0 for key in expected} == pytest.approx(expected, abs=1e-6)
    for pixels, giou in ((0, 100), (1, 0)):
        empty = np.zeros((H, W), np.uint8)
        empty[:pixels, 0] = 255
        Image.fromarray(empty).save(masks / "3 copy.png")
        found = scored_files(
            capsys, root, masks, "--dataset", "reasonseg", "--split", "test", "--protocol", "lisa", "--boundary"
        )
        assert found["giou"] == giou


def test_refsegrs_masks_are_of_their_own_expressions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An id is a number, as a sent_id is: masks by one must not pair with the expressions of the
    other."""
    home, masks = tmp_path / "data/RefSegRS", tmp_path / "masks"
    for folder in (home / "images", home / "masks", masks):
        folder.mkdir(parents=True)
    for number in range(6):
        truth = Image.fromarray(box(4 * number, 0, 4 * number + 4, H) * np.uint8(255))
        truth.save(home / f"masks/{number}.tif")
        truth.convert("RGB").save(home / f"images/{number}.tif")
    lines = home / "output_phrase_test.txt"
    lines.write_text("".join(f"{number} thing {number}\n" for number in range(6)))
    where = ("--dataset", "refsegrs", "--split", "test", "--protocol", "lavt")

    def save(by: str) -> None:
        for reference in load_references(home.parent, "refsegrs").references:
            for each in reference.expressions:
                name = each.sent_id if by == "sent_id" else each.name
                Image.open(reference.segmentations[0].path).save(masks / f"{name}.png")

    for by in ("sent_id", "name"):
        save(by)
        assert scored_files(capsys, home.parent, masks, *where)["miou"] == 100
    # Two phrases with one id: sent_ids are not the ids.
    (home / "output_phrase_train.txt").write_text("0 a\n0 b\n1 c\n2 d\n")
    for path in masks.iterdir():
        path.unlink()
    save("sent_id")
    words = ("score", masks, "--data", home.parent, "--dataset", "refsegrs", "--split", "train", "--protocol", "lavt")
    assert main([*map(str, words)]) == 2
    assert "the masks 1 and 3 differ" in capsys.readouterr().err


def test_phrasecut_with_its_own_names_and_subsets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions are <task_id>.png, and all scores are given for every subset, by size as well."""
    root, masks = write_phrasecut(tmp_path / "data"), tmp_path / "masks"
    masks.mkdir()
    pairs = {}
    for task in phrasecut_tasks()["val"]:
        truth = np.zeros((H, W), bool)
        for polygon in (polygon for instance in task["Polygons"] for polygon in instance if len(polygon) > 1):
            image = Image.new("L", (W, H), 0)
            ImageDraw.Draw(image).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
            truth |= np.array(image) > 0
        pairs[task["task_id"]] = Pair(np.roll(truth, 2, 1), truth)
        Image.fromarray(pairs[task["task_id"]].prediction).save(masks / f"{task['task_id']}.png")
    where = ("--dataset", "phrasecut", "--split", "val", "--protocol", "phrasecut", "--out", tmp_path / "out.json")
    found = scored_files(capsys, root, masks, *where)
    expected = slow_phrasecut([*pairs.values()])
    assert {key: found[key] or 0.0 for key in expected} == pytest.approx(expected)
    groups = {
        group["name"]: group for group in json.loads((tmp_path / "out.json").read_text())["analysis"]["by_subset"]
    }
    first, second = pairs["102__1_2"], pairs["102__3"]
    assert 0.02 < second.truth.mean() < first.truth.mean() < 0.2
    for name, some in {"i_multi": [first], "i_many": [second], "p_rel": [second], "s_mid": [first, second]}.items():
        expected = slow_phrasecut(some)
        assert {key: groups[name][key] for key in expected} == pytest.approx(expected), name
    page = tmp_path / "page.html"
    assert main(["score", str(masks), "--data", str(root), *map(str, where[:6]), "--report", str(page)]) == 0
    assert "By subset of the data set" in page.read_text()
    assert f"| i_many | {100 * counts_of(second)[2]:.2f} |" in " ".join(capsys.readouterr().out.split())


def test_gseval_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_gseval(tmp_path / "data")
    truths = {1: box(0, 0, 10, 10), 7: box(5, 5, 10, 10)}
    pairs = {idx: Pair(np.roll(mask, 3, 0), mask) for idx, mask in truths.items()}
    lines = [{"idx": idx, "predicted_segmentation": runs(pair.prediction)} for idx, pair in pairs.items()]
    (tmp_path / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--dataset", "gseval", "--split", "test", "--protocol", "gseval", "--out", tmp_path / "out.json")
    found = scored_files(capsys, root, tmp_path / "masks.jsonl", *words)
    assert found["giou"] == pytest.approx(slow_gseval([*pairs.values()])["giou"])
    groups = json.loads((tmp_path / "out.json").read_text())["analysis"]["by_subset"]
    assert [(group["name"], group["giou"]) for group in groups] == [
        (f"class {kind}", pytest.approx(slow_gseval([pairs[idx]])["giou"])) for kind, idx in ((0, 1), (3, 7))
    ]


@pytest.mark.slow
def test_every_set_has_the_protocol_of_its_authors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dcris evaluate --all` on a folder with all of them."""
    root = tmp_path / "data"
    for write in (write_rrsisd, write_refsegrs, write_reasonseg, write_phrasecut, write_gseval):
        write(root)
    out = tmp_path / "row.json"
    assert main(["evaluate", "tiny", "--data", str(root), "--all", "--out", str(out), "--device", "cpu"]) == 0
    row = json.loads(out.read_text())
    found = {(each["dataset"], each["split"]): each["protocol"] for each in row["results"]}
    assert found == {
        ("rrsisd", "val"): "lavt",
        ("rrsisd", "test"): "lavt",
        ("refsegrs", "val"): "lavt",
        ("refsegrs", "test"): "lavt",
        ("reasonseg", "val"): "lisa",
        ("reasonseg", "test"): "lisa",
        ("phrasecut", "val"): "phrasecut",
        ("phrasecut", "miniv"): "phrasecut",
        ("gseval", "test"): "gseval",
    }
    assert all("by_category" in each["analysis"] for each in row["results"])
    assert row["averages"] == {}  # they have no metric in common
    capsys.readouterr()
    assert main(["table", str(out), "--format", "csv"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "reasonseg test gIoU,phrasecut val mIoU" in header


# ---- real annotations ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotated(refer_root: Path) -> dict[int, tuple[Any, tuple[int, int]]]:
    """The first expression of each val reference of cocomini: its segmentation and the image's
    size, read without this package."""
    folder = refer_root / "cocomini"
    content = json.loads((folder / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    masks = {each["id"]: each["segmentation"] for each in content["annotations"]}
    references = pickle.loads((folder / "refs(templated).p").read_bytes())
    return {
        sentence["sent_id"]: (masks[reference["ann_id"]], sizes[reference["image_id"]])
        for reference in references
        if reference["split"] == "val"
        for sentence in reference["sentences"]
    }


def drawn_truth(segmentation: Any, size: tuple[int, int], rule: str) -> np.ndarray:
    """Draw a COCO segmentation as the authors of a rule do."""
    height, width = size
    if isinstance(segmentation, dict):
        return coco.decode(coco.frPyObjects(segmentation, height, width)).astype(bool)
    layers = coco.decode(coco.frPyObjects(segmentation, height, width)).sum(axis=2)
    return layers == 1 if rule == "added" else layers > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawing", "rules"),
    [("united", ("cris", "refer", "gseval", "phrasecut")), ("added", ("lisa", "cgformer"))],
)
def test_masks_of_real_objects(
    drawing: str,
    rules: Sequence[str],
    annotated: Mapping[int, tuple[Any, tuple[int, int]]],
    refer_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`dcris score` gives the slow value for shifted masks, and the rule's limits for perfect and
    empty ones."""
    random, pairs = np.random.default_rng(1), dict[int, Pair]()  # by the identity of the segmentation
    for segmentation, size in annotated.values():
        if id(segmentation) not in pairs:
            truth = drawn_truth(segmentation, size, drawing)
            pairs[id(segmentation)] = Pair(np.roll(truth, random.integers(-40, 41, 2), (0, 1)), truth)
    edges = {key: slow_boundary_iou([pair]) for key, pair in pairs.items()}
    every = {sent_id: pairs[id(segmentation)] for sent_id, (segmentation, _) in annotated.items()}
    submissions = {
        "shifted": {key: pair.prediction for key, pair in every.items()},
        "perfect": {key: pair.truth for key, pair in every.items()},
        "empty": {key: np.zeros_like(pair.truth) for key, pair in every.items()},
    }
    for name, masks in submissions.items():
        entries = [{"sent_id": key, "segmentation": encode_mask(mask)} for key, mask in masks.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    for rule in rules:
        where = [
            "--data",
            str(refer_root),
            "--dataset",
            "cocomini",
            "--protocol",
            rule,
            "--boundary",
            "--format",
            "json",
        ]
        assert main(["score", *(str(tmp_path / f"{name}.json") for name in submissions), *where]) == 0
        shifted, perfect, empty = json.loads(capsys.readouterr().out)
        expected = RULES[rule]([*every.values()])
        expected["biou"] = float(np.mean([edges[id(segmentation)] for segmentation, _ in annotated.values()]))
        assert shifted["expressions"] == len(every) > 200
        assert {key: shifted[key] for key in expected} == pytest.approx(expected, abs=1e-7)
        assert 5 < expected["biou"] < 95
        for key in expected:
            assert perfect[key] == pytest.approx(100, abs=1e-5), (rule, key)
            assert empty[key] == 0, (rule, key)
