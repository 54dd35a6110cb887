"""ONNX export: the graphs, and the example that uses them without torch, agree with the model."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dcris.inference.export_onnx
from dcris import Segmenter
from dcris.cli import main
from dcris.data.dataset import normalise, to_square
from dcris.data.images import read_image
from dcris.data.photographs import example_photographs
from dcris.data.readers.load import load_references
from dcris.data.tokenizer import get_tokenizer
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.inference.export_onnx import export_onnx
from dcris.models.head.presence import PresenceHead
from runs import leftovers, quick_config, run_training

onnx = pytest.importorskip("onnx")
REPOSITORY = Path(__file__).parents[1]
PHRASES = ["left person", "the red cup: größer, 猫", "second from the left", "ring"]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("onnx_segment", REPOSITORY / "examples/onnx_segment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained_run(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe: the layers of the tests' small network do not gain by int8."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    run_training(quick_config(12, recipe="dcris_tiny"), scenes_root, out)
    return out


@pytest.fixture(scope="module")
def segmenter(trained_run: Path) -> Segmenter:
    return Segmenter.from_pretrained(trained_run, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    assert main(["export", str(trained_run), "--out", str(out)]) == 0
    assert not leftovers(out.parent)
    return out


def balanced(segmenter: Segmenter, exported: Path, folder: Path, photograph: Any) -> tuple[Path, float]:
    """A copy of the export with a threshold that gives masks which are not empty."""
    predictions = segmenter.predict(photograph, PHRASES, scores=True)
    threshold = float(
        np.median([prediction.probabilities for prediction in predictions if prediction.probabilities is not None])
    )
    for file in exported.iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((exported / "model.json").read_text())
    (folder / "model.json").unlink()
    (folder / "model.json").write_text(json.dumps({**settings, "threshold": threshold}))
    return folder, threshold


def agreement(
    segmenter: Segmenter, folder: Path, photographs: list[Any], threshold: float, batch: int
) -> Iterator[tuple[float, bool]]:
    """Yield the IoU of the example's mask with Segmenter's, and whether the mask is neither empty
    nor full."""
    onnx_segment = example()
    model = onnx_segment.load(folder)
    for start in range(0, len(photographs), batch):
        group = photographs[start : start + batch]
        theirs = segmenter.predict(group, PHRASES, threshold=threshold)
        ours, present = onnx_segment.segment(model, group, PHRASES)
        assert present is None
        for masks, predictions in zip(ours, theirs, strict=True):
            for mask, prediction in zip(masks, predictions, strict=True):
                either = (mask | prediction.mask).sum()
                yield (mask & prediction.mask).sum() / either if either else 1.0, 0 < prediction.mask.mean() < 1


@pytest.mark.slow
def test_the_example_agrees_on_generated_scenes(
    segmenter: Segmenter, exported: Path, scenes_root: Path, tmp_path: Path
) -> None:
    """The example's letterbox, tokens and postprocessing must be correct, because people copy
    it."""
    paths = sorted({reference.image_path for reference in load_references(scenes_root, "scenes").references})[:4]
    scenes = [read_image(path)[: 112 - 9 * number] for number, path in enumerate(paths)]
    folder, threshold = balanced(segmenter, exported, tmp_path, scenes[0])
    for batch in (1, 3):
        found = list(agreement(segmenter, folder, scenes, threshold, batch))
        assert min(iou for iou, _ in found) >= 0.999
        assert sum(real for _, real in found) > len(found) / 2


@pytest.mark.slow
def test_masks_agree_on_real_photographs(
    segmenter: Segmenter, exported: Path, refer_root: Path, tmp_path: Path
) -> None:
    """20 images of any shape, two batch sizes: ONNX and PyTorch give the same masks."""
    paths = sorted(
        {
            reference.image_path
            for reference in load_references(refer_root, "refcoco", "unc").references
            if reference.image_path.exists()
        }
    )[:20]
    if len(paths) < 20:
        pytest.skip("there are not 20 photographs")
    photographs = [read_image(path) for path in paths]
    folder, threshold = balanced(segmenter, exported, tmp_path, photographs[0])
    for batch in (1, 4):
        found = list(agreement(segmenter, folder, photographs, threshold, batch))
        assert len(found) == 80
        assert min(iou for iou, _ in found) >= 0.999
        assert sum(real for _, real in found) > len(found) / 2


@pytest.mark.slow
def test_the_example_needs_no_torch(segmenter: Segmenter, exported: Path, tmp_path: Path) -> None:
    """The example is short and imports neither torch nor dcris."""
    assert len((REPOSITORY / "examples/onnx_segment.py").read_text().splitlines()) < 110
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['example', {str(exported)!r}, 'photo.png', 'left circle', 'ring']\n"
        f"runpy.run_path({str(REPOSITORY / 'examples/onnx_segment.py')!r}, run_name='__main__')\n"
        "assert not {'torch', 'dcris', 'cv2'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for number in range(2):
        mask = np.asarray(Image.open(tmp_path / f"photo.{number}.png"))
        assert mask.shape == (50, 90)


@pytest.mark.parametrize("orientation", [1, 2, 6])
@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        *((mode, "png") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "RGB transparent", "P transparent")),
        *((mode, "tif") for mode in ("I", "I;16", "CMYK", "RGBA")),
        *(("L", "jpg"), ("CMYK", "jpg"), ("RGB", "webp"), ("RGBA", "webp"), ("P", "gif")),
    ],
)
def test_the_example_reads_images_as_dcris_does(tmp_path: Path, mode: str, ending: str, orientation: int) -> None:
    """The example must read images as dcris does, for example transparent ones."""
    mode, _, transparent = mode.partition(" ")
    random = np.random.default_rng(0)
    for shape in ((20, 30), (20, 1), (1, 30)):
        if mode in ("I", "I;16"):
            values = random.integers(0, 70_000 if mode == "I" else 65_536, shape)
            picture = Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16))
        else:
            picture = Image.fromarray(random.integers(0, 256, (*shape, 4), np.uint8), "RGBA")
            picture = picture if mode == "RGBA" else picture.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"transparency": (9, 9, 9) if mode == "RGB" else 3} if transparent else {}
        picture.save(tmp_path / f"a.{ending}", **options, **({} if ending == "gif" else {"exif": exif}))
        np.testing.assert_array_equal(example().read(tmp_path / f"a.{ending}"), read_image(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize("name", ["tiny", "clip", "bert"])
def test_the_example_has_the_same_tokens(name: str, tmp_path: Path) -> None:
    """The example must give the same token ids."""
    if name == "clip":
        pytest.importorskip("instant_clip_tokenizer")
    tokenizer = get_tokenizer(name)
    told = json.loads(json.dumps(dcris.inference.export_onnx._tokenizer_settings(tokenizer)))
    if "file" in told:
        told["file"] = str(tmp_path / told["file"])
        tokenizer.save(Path(told["file"]))
    phrases = [*PHRASES, "The  small\tRED ring &amp; the cup", "[CLS] cup", "a b c d e f g h i j k l m n"]
    np.testing.assert_array_equal(example().tokenize(phrases, 9, False, **told), tokenizer(phrases, 9).numpy())


@pytest.mark.parametrize("name", ["tiny", "clip"])
@pytest.mark.parametrize(
    "phrase",
    ["&#" + "9" * 4400, "&amp;#" + "9" * 9000 + "; cup", "&#" + "0" * 5000 + "65;b", "&#x1F34E;&#8203; \u3000a\x1f b"],
)
def test_the_example_cleans_hostile_phrases_as_the_tokenizer_does(name: str, phrase: str) -> None:
    """Regression: html.unescape raises ValueError for a character reference with more than 4,300
    digits."""
    if name == "clip":
        pytest.importorskip("instant_clip_tokenizer")
    tokenizer = get_tokenizer(name)
    settings = json.loads(json.dumps(dcris.inference.export_onnx._tokenizer_settings(tokenizer)))
    np.testing.assert_array_equal(example().tokenize([phrase], 9, False, **settings), tokenizer([phrase], 9).numpy())


@pytest.mark.slow
def test_metadata_of_the_export(exported: Path, segmenter: Segmenter) -> None:
    """The metadata of a graph say how to use it."""
    settings = json.loads((exported / "model.json").read_text())
    config = segmenter.config
    assert settings["mean"] == list(config.data.mean)
    assert (settings["image_size"], settings["word_length"]) == (config.data.image_size, config.data.word_length)
    assert settings["threshold"] == segmenter.protocol.threshold
    for name in ("fit.onnx", "text.onnx", "image.onnx"):
        graph = onnx.load(exported / name, load_external_data=False)
        told = {entry.key: entry.value for entry in graph.metadata_props}
        assert json.loads(told["std"]) == list(config.data.std)
        assert json.loads(told["tokenizer"]) == "tiny"
        (opset,) = [entry.version for entry in graph.opset_import if not entry.domain]
        assert opset == dcris.inference.export_onnx.OPSET
        onnx.checker.check_model(graph)


@pytest.mark.slow
def test_int8_is_smaller_and_nearly_the_same(segmenter: Segmenter, exported: Path, tmp_path: Path) -> None:
    """The option must save space and keep the masks similar."""
    found = export_onnx(segmenter, tmp_path / "int8", int8=True)
    assert found["mean"] < 0.02  # on processors with and without VNNI

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.glob("*.onnx*"))

    assert size(tmp_path / "int8") < 0.6 * size(exported)
    assert {file.name for file in (tmp_path / "int8").iterdir()} == {
        "fit.onnx",
        "text.onnx",
        "image.onnx",
        "model.json",
    }
    graph = onnx.load(tmp_path / "int8/image.onnx")
    assert "MatMulInteger" in {node.op_type for node in graph.graph.node}
    assert {"mean", "int8"} <= {entry.key for entry in graph.metadata_props}


def test_a_presence_head_can_be_exported_with_int8(tmp_path: Path) -> None:
    """Its last product is with a vector, which cannot have a scale for each column: `dcris export
    tiny --int8` ended with a traceback of ONNX Runtime."""
    torch.manual_seed(0)
    head = PresenceHead(16, 8, 2)
    torch.nn.init.normal_(head.weight)
    inputs = {"features": torch.randn(2, 16, 3, 3), "sentence": torch.randn(2, 8)}
    path = tmp_path / "head.onnx"
    dcris.inference.export_onnx._write(path, head, inputs, dict.fromkeys(inputs), ("logit",), {}, int8=True)
    (found,) = dcris.inference.export_onnx._session(path).run(
        None, {name: tensor.numpy() for name, tensor in inputs.items()}
    )
    np.testing.assert_allclose(found, head(**inputs).detach().numpy(), atol=0.1)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(path).graph.node}


def test_int8_replaces_weights_beside_the_graph(tmp_path: Path) -> None:
    """onnx appends to the file of the weights of large models, which then had those in float32,
    too: the export with --int8 was larger than without it."""
    path, inputs = tmp_path / "large.onnx", {"input": torch.randn(2, 64)}
    dcris.inference.export_onnx._write(
        path, torch.nn.Linear(64, 64, bias=False), inputs, {"input": {}}, ("output",), {}, int8=False
    )
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="large.onnx.data", size_threshold=0)
    dcris.inference.export_onnx._quantise(path)
    assert {file.name for file in tmp_path.iterdir()} == {"large.onnx", "large.onnx.data"}
    assert (tmp_path / "large.onnx.data").stat().st_size < 8000  # 4096 and their scales; 16,384 in float32
    dcris.inference.export_onnx._session(path).run(None, {"input": inputs["input"].numpy()})


@pytest.mark.slow
def test_the_letterbox_graph(exported: Path, segmenter: Segmenter) -> None:
    """Images of any shape: the letterbox equals cv2's up to single grey levels, and the way back
    the protocol's."""
    fit, data = dcris.inference.export_onnx._session(exported / "fit.onnx"), segmenter.config.data
    for height, width in ((480, 640), (1, 1), (1, 50), (2000, 7), (333, 500)):
        coarse = np.random.default_rng(height).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        photograph = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
        image, rows, columns = fit.run(None, {"photograph": photograph})
        square, geometry = to_square(photograph, data, Letterbox)
        grey = np.abs(image - normalise(square, data).numpy()) * 255 * np.array(data.std).reshape(3, 1, 1)
        assert grey.max() < 1.01
        assert (grey > 0.5).mean() < 1e-3
        expected = Cris.resampling(geometry, (rows.shape[1], columns.shape[0]))
        np.testing.assert_allclose(rows, expected[0], atol=2e-6)
        np.testing.assert_allclose(columns.T, expected[1], atol=2e-6)


@pytest.mark.slow
def test_photos_can_be_exported(tmp_path: Path) -> None:
    """The example segments with the export of a model that has BERT's tokenizer, as `--refine none`
    does."""
    photos = Segmenter.from_pretrained("photos", device="cpu", precision="float32")
    export_onnx(photos, tmp_path / "photos")
    coffee = read_image(next(path for path, _ in example_photographs() if path.stem == "coffee"))
    (masks,), (present,) = example().segment(example().load(tmp_path / "photos"), [coffee], ["cup", "bird"])
    expected = photos.predict(coffee, ["cup", "bird"], refine="none")
    np.testing.assert_allclose(present, [each.present for each in expected], atol=1e-4)
    assert masks[0].any() and not masks[1].any()  # there is no bird
    for mask, each in zip(masks, expected, strict=True):
        assert (mask & each.mask).sum() >= 0.99 * (mask | each.mask).sum()


def test_the_current_folder_is_refused_as_output(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be replaced, and the shell would stay in the folder that it was."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained_run), "--out", "."]) == 2
    assert "current folder" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_file_name_is_refused_as_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tools write one model.onnx. The error comes before the model is loaded."""
    assert main(["export", str(tmp_path / "no run"), "--out", str(tmp_path / "model.onnx")]) == 2
    assert f"give a folder: --out {tmp_path / 'model'}\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_leaves_nothing(segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong export must fail and leave nothing."""
    monkeypatch.setattr(dcris.inference.export_onnx, "_write_graphs", lambda *_: None)

    def wrong(folder: Path, outputs: Any, images: Any, index: Any, tokens: Any) -> Any:
        side = 4 * images.shape[-1] // 14
        return [np.full((len(index), 1, side, side), 3.0, np.float32)]

    monkeypatch.setattr(dcris.inference.export_onnx, "_run", wrong)
    for int8 in (False, True):
        with pytest.raises(DcrisError, match="do not agree with PyTorch"):
            export_onnx(segmenter, tmp_path / "out", int8=int8)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(DcrisError, match="exists already"):
        export_onnx(segmenter, tmp_path / "mine")
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
