"""Wrong arguments of the Python API raise a DcrisError that names them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcris import Prediction, Segmenter, to_detections
from dcris.checkpoints.checkpoint import load_checkpoint
from dcris.config import RunConfig, replace
from dcris.data.dataset import all_queries
from dcris.data.readers.load import load_references
from dcris.errors import DcrisError
from dcris.evaluation.evaluator import predict_queries
from dcris.evaluation.protocols import get_protocol
from dcris.recipes import get_recipe
from dcris.training.trainer import Trainer, build_model

IMAGE = np.zeros((20, 30, 3), np.uint8)


class Place:
    """A path class of another library (`os.PathLike`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu")


WRONG_IMAGES = [
    None,
    5,
    b"photo.jpg",
    "a\0b",
    "",
    "a" * 5000,
    (IMAGE,),
    torch.zeros(20, 30, 3, dtype=torch.uint8),
    IMAGE.astype(np.float32),
    IMAGE.astype(bool),
    np.zeros((3, 20, 30), np.uint8),
    np.zeros((20, 30, 5), np.uint8),
    np.zeros((0, 30, 3), np.uint8),
    np.zeros((1, 20, 30, 3), np.uint8),
    np.uint8(3),
]

Call = Callable[[Segmenter], Any]

CALLS: dict[str, Call] = {
    **{
        f"phrases {phrases!r}": lambda s, phrases=phrases: s.predict(IMAGE, phrases)
        for phrases in (None, 5, b"cup", [3], [None], ["a", None], [["a"]], "", [" "], [np.nan], [b"cup"])
    },
    **{
        f"phrases of images {phrases!r}": lambda s, phrases=phrases: s.predict([IMAGE, IMAGE], phrases)
        for phrases in (None, [3], [["a"]], [["a"], None], [["a"], [5]], [["a"], [""]])
    },
    **{f"image {number}": lambda s, image=image: s.predict(image, "a") for number, image in enumerate(WRONG_IMAGES)},
    **{f"images {n}": lambda s, image=image: s.predict([IMAGE, image], "a") for n, image in enumerate(WRONG_IMAGES)},
    **{f"encode {number}": lambda s, image=image: s.encode_image(image) for number, image in enumerate(WRONG_IMAGES)},
    "encode a list": lambda s: s.encode_image([IMAGE]),
    **{
        f"threshold {value!r}": lambda s, value=value: s.predict(IMAGE, "a", threshold=value)
        for value in (float("nan"), -1, 0, 1, 10**400, True, "0.5", [0.5], 1j, np.zeros(3))
    },
    **{
        f"refine {value!r}": lambda s, value=value: s.predict(IMAGE, "a", refine=value)
        for value in ("sharper", 5, ["guided"], "", np.zeros(3))
    },
    **{
        f"memory {value!r}": lambda s, value=value: s.predict(IMAGE, "a", memory=value)
        for value in (-1, float("nan"), "1 GB", [1])
    },
    **{
        f"adapters {value!r}": lambda s, value=value: s.predict(IMAGE, "a", adapters=value)
        for value in ("other", 5, ["scenes"], "")
    },
    "segment None": lambda s: s.segment(None, "a"),
    "segment an image": lambda s: s.segment(IMAGE, "a"),
    "segment no phrase": lambda s: s.segment(s.encode_image(IMAGE), None),
    "segment by a minimum of 400 digits": lambda s: s.segment(s.encode_image(IMAGE), "a", min_score=10**400),
    "segment by a minimum of text": lambda s: s.segment(s.encode_image(IMAGE), "a", min_score="0.5"),
    "segment by nan": lambda s: s.segment(s.encode_image(IMAGE), "a", threshold=float("nan")),
    **{
        f"from_pretrained {source!r}": lambda s, source=source: Segmenter.from_pretrained(source)
        for source in (None, 5, b"run", [], {}, [None], {"a": 5}, {5: "a"}, "a\0b", "", ["a\0b"])
    },
    **{
        f"device {device!r}": lambda s, device=device: Segmenter(s.model, s.config, device=device)
        for device in ("nonsense", None, "", "cuda:99", "cuda:-1", "mps", 5.0, [])
    },
    **{
        f"precision {value!r}": lambda s, value=value: Segmenter(s.model, s.config, device="cpu", precision=value)
        for value in ("nonsense", "half", torch.float32, 16, [])
    },
    "no model": lambda s: Segmenter(None, s.config),
    **{
        f"weights in {dtype}": lambda s, dtype=dtype: Segmenter(
            copy.deepcopy(s.model).to(dtype), s.config, device="cpu"
        )
        for dtype in (torch.float16, torch.float64)
    },
    "no configuration": lambda s: Segmenter(s.model, None),
    "adapters without a name": lambda s: s.add_adapters(None, "run"),
    "adapters of nothing": lambda s: s.add_adapters("b", None),
    "save nowhere": lambda s: s.save_pretrained(None),
    "save over a file": lambda s: s.save_pretrained(__file__),
    "save a bundle as .zip": lambda s: s.save_pretrained("x.zip", bundle=True),
    "metrics 5": lambda s: s.save_pretrained("not/written", metrics=5),
    "metrics of numbers only": lambda s: s.save_pretrained("not/written", metrics={"a": 1}),
    "no metrics in a dict": lambda s: s.save_pretrained("not/written", metrics=[{}]),
    "metrics of all splits": lambda s: s.push_to_hub("a/b", metrics={"name": "a", "results": []}),
    "metrics of text": lambda s: s.save_pretrained("not/written", metrics=["a"]),
    "licence 5": lambda s: s.save_pretrained("not/written", licence=5),
    "push nowhere": lambda s: s.push_to_hub(None),
    "detections None": lambda s: to_detections(None),
    "detections of masks": lambda s: to_detections([np.zeros((3, 3), bool)]),
    "probabilities None": lambda s: Prediction.decide("a", None, 0.5),
    "probabilities in a line": lambda s: Prediction.decide("a", np.zeros(3, np.float32), 0.5),
    "tolerance nan": lambda s: found().polygons(float("nan")),
    "tolerance text": lambda s: found().polygons("1"),
    "tolerance -1": lambda s: found().polygons(-1),
    "no probabilities": lambda s: found().with_threshold(0.5),
    "overlay on None": lambda s: found().overlay(None),
    "overlay on another": lambda s: found().overlay(IMAGE),
    **{
        f"colour {value!r}": lambda s, value=value: found().overlay(IMAGE[:3, :3], value)
        for value in ("red", None, 5, (1, 2), (1, 2, 300), (1, 2, "x"), (1, 2, float("nan")))
    },
    "cutout of None": lambda s: found().cutout(None),
    **{
        f"load_references {root!r}": lambda s, root=root: load_references(root, "scenes")
        for root in (None, 5, b"data", "a\0b", ["a"], "a" * 5000)
    },
    **{
        f"dataset {name!r}": lambda s, name=name: load_references("data", name)
        for name in (None, 5, b"scenes", "a\0b", ["scenes"], "a" * 5000)
    },
    "split_by 5": lambda s: load_references("data", "scenes", 5),
    **{f"recipe {name!r}": lambda s, name=name: get_recipe(name) for name in (None, 5, [], "nonsense")},
    **{f"protocol {name!r}": lambda s, name=name: get_protocol(name) for name in (None, 5, [], "nonsense")},
    **{
        f"settings {value!r}": lambda s, value=value: replace(s.config, value)
        for value in (None, 5, "ab", ["ab"], [("train.lr",)], [("train.lr", 5)], {5: "5"}, {"train.lr": "five"})
    },
    "replace None": lambda s: replace(None, {}),
    **{
        f"checkpoint {path!r}": lambda s, path=path: load_checkpoint(path) for path in (None, 5, b"x", "a\0b", "", "no")
    },
    "build None": lambda s: build_model(None),
    "train None": lambda s: Trainer(s.model, None, None, s.tokenizer, "out", device="cpu"),
    "train on None": lambda s: Trainer(s.model, s.config, None, s.tokenizer, "out", device="cpu"),
}


def found() -> Prediction:
    return Prediction("a", np.eye(3, dtype=bool), 0.5, (0, 0, 3, 3))


@pytest.mark.parametrize("call", CALLS.values(), ids=[key[:40].replace("\0", "NUL") for key in CALLS])
def test_wrong_arguments(segmenter: Segmenter, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service can show a DcrisError to its user; other exceptions would be failures of the
    service."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DcrisError) as caught:
        call(segmenter)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_path_types(segmenter: Segmenter, trained_run: Path, scenes_root: Path, tmp_path: Path) -> None:
    """str, Path and any other os.PathLike name the same file."""
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    expected = told(segmenter.predict(IMAGE, "a cup"))
    table = load_references(scenes_root, "scenes")
    for kind in (str, Path, Place):
        assert told(segmenter.predict(kind(tmp_path / "photo.png"), "a cup")) == expected
        (listed,) = segmenter.predict([kind(tmp_path / "photo.png")], ["a cup"])
        assert told(listed) == expected
        assert load_references(kind(scenes_root), "scenes") == table
        loaded = Segmenter.from_pretrained(kind(trained_run), device="cpu")
        assert told(loaded.predict(IMAGE, "a cup")) == expected
        saved = segmenter.save_pretrained(kind(tmp_path / f"saved-{kind.__name__}"))
        assert load_checkpoint(kind(saved))[1] == segmenter.config


def test_weights_that_are_whole_numbers_are_taken(segmenter: Segmenter) -> None:
    """An encoder of the user's own may have frozen ones, such as tables or 8-bit weights."""
    model = copy.deepcopy(segmenter.model)
    model.head.table = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    assert Segmenter(model, segmenter.config, device="cpu").predict(IMAGE, "red")


def told(predictions: list[Prediction]) -> list[dict[str, Any]]:
    return [prediction.to_dict() for prediction in predictions]


def test_phrase_sequences(segmenter: Segmenter) -> None:
    """Arrays, tuples and generators give the same results as lists."""
    expected = told(segmenter.predict(IMAGE, ["a cup", "red"]))
    for phrases in (("a cup", "red"), np.array(["a cup", "red"]), (text for text in ("a cup", "red"))):
        assert told(segmenter.predict(IMAGE, phrases)) == expected
    for each in (iter(("a cup", "red")), iter([["a cup", "red"], ("a cup", "red")])):
        first, second = segmenter.predict([IMAGE] * 2, each)
        assert told(first) == told(second) == expected
    for options in ({"threshold": np.float32(0.35)}, {"memory": float("inf")}):
        assert told(segmenter.predict(IMAGE, "red", **options)) == expected[1:]
    assert segmenter.predict(IMAGE, []) == segmenter.predict([], "a") == []


def test_results_are_compared_by_identity(segmenter: Segmenter) -> None:
    """`==` of arrays is an array, and `in` would raise; results can be keys of a dict."""
    (answer,), (other,) = (segmenter.predict(IMAGE, "a cup") for _ in range(2))
    assert answer == answer and answer != other and answer != copy.deepcopy(answer)
    assert answer in [other, answer] and other not in {answer: 1}
    encoded = segmenter.encode_image(IMAGE)
    assert encoded == encoded
    assert encoded != segmenter.encode_image(IMAGE)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None, "8"])
def test_batches_of_no_photograph(segmenter: Segmenter, scenes_root: Path, batch_size: Any) -> None:
    queries = all_queries(load_references(scenes_root, "scenes").split("test")[:1])
    model, config = segmenter.model, RunConfig.model_validate(segmenter.config)
    with pytest.raises(DcrisError, match="batch size"):
        list(predict_queries(model, queries, config, segmenter.protocol, device="cpu", batch_size=batch_size))
