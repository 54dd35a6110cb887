"""A trained model as ONNX, for programs without torch: the phrase's half and the photograph's half as two graphs.

Shape letters: I images, B phrases, S side of the network's square, L text tokens, T and E widths of f_t and f_s, h w grid.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcris.config import RunConfig
from dcris.data.tokenizer import TINY_BUCKETS, TinyTokenizer, tokenizer_of
from dcris.encoders.clip_text import TextFeatures
from dcris.encoders.vision import interpolate_positions
from dcris.errors import DcrisError
from dcris.files import write_directory, write_json
from dcris.model.dcris import DCRIS
from dcris.segmenter import Segmenter
from dcris.version import __version__

OPSET = 20
"""The first that has the exact GELU as one operator. ONNX Runtime knows it since 1.17."""

TEXT, IMAGE, SETTINGS = "text.onnx", "image.onnx", "model.json"
FEATURES = ("f_t", "f_s", "padding")

_CHECKED = ((1, 1), (2, 3))
"""Numbers of images and of phrases at which the graphs are compared with the model."""

_TOLERANCE = 1e-3
"""How far a probability may be off. Rounding alone moves it by some millionths."""

_INT8_TOLERANCE = 0.1
"""How far it may be off on average with weights of 8 bits."""


class _TextGraph(nn.Module):
    """Tokens [B, L] -> f_t [B, L, T], f_s [B, E], padding [B, L] bool."""

    def __init__(self, model: DCRIS) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.encode_text(tokens)
        assert isinstance(features, TextFeatures)
        return features.tokens, features.sentence, features.padding


class _ImageGraph(nn.Module):
    """Images [I, 3, S, S], each phrase's image [B], and what the text graph says -> logits [B, 1, 4h, 4w]."""

    def __init__(self, model: DCRIS, side: int) -> None:
        super().__init__()
        # The table of positions is brought to the grid here, once: resizing it is no business of the graph's. The tower is
        # a shallow copy, so that the caller's keeps its own table and no weight is in memory twice.
        vision = copy.copy(model.vision)
        grid = (side // vision.config.patch, side // vision.config.patch)
        table = vision._parameters.get("positions")  # DINOv3 has none
        if table is not None:
            resized = interpolate_positions(table.reshape(1, *table.shape[-2:]), grid, vision.config.position_rule)
            resized = resized.detach().reshape(*table.shape[:-2], *resized.shape[-2:])
            vision._parameters = {**vision._parameters, "positions": nn.Parameter(resized, requires_grad=False)}
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "vision": vision}

    def forward(self, images: Tensor, image_index: Tensor, f_t: Tensor, f_s: Tensor, padding: Tensor) -> Tensor:
        state = self.model.encode_images(images)
        return self.model.segment(state.select(image_index), TextFeatures(f_t, f_s, padding))


def export_onnx(
    segmenter: Segmenter, out: Path, *, int8: bool = False, progress: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Write a folder with text.onnx, image.onnx and model.json: the model in float32, checked against PyTorch.

    text.onnx takes `tokens` [B, L] int64 to `f_t` [B, L, T], `f_s` [B, E] and `padding` [B, L] bool. image.onnx takes `images`
    [I, 3, S, S] (normalised, letterboxed), `image_index` [B] int64 (the image of each phrase) and those three to `logits`
    [B, 1, 4h, 4w]. I and B are free; what comes before the first adapter that reads the text is computed once an image. L is
    fixed, since a text adapter may look ahead. model.json holds what a program has to know beside them: mean, standard
    deviation, size, word length, threshold, tokenizer. The graphs' metadata hold the same, but for the tokenizer's words.

    Both are run in ONNX Runtime with one image and phrase and with two images and three phrases, and compared with PyTorch.

    Args:
        segmenter: on the CPU; its first adapters are exported.
        out: a folder, which must not exist or be empty.
        int8: keep the weights of matrix products in 8 bits, as ONNX Runtime's dynamic quantisation does: about a quarter
            of the size, and slightly other masks.
        progress: called with a line for a person before each part.

    Returns the "largest" and the "mean" difference of a probability from PyTorch's. Raises DcrisError where the extra
    `export` is missing, `out` is in use or cannot be written, or the graphs disagree with the model; then nothing is left.
    """
    _require()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DcrisError(f"{out} is there already; choose a new folder for the export")
    if segmenter.device.type != "cpu":
        raise DcrisError(f"the model is exported from the CPU, and is on {segmenter.device}; load it with device='cpu'")
    if segmenter.model.bridge is not None:
        raise DcrisError(
            "the towers of this method talk to each other on the way, so there is no phrase's half to export by itself"
        )
    found: dict[str, float] = {}

    def fill(folder: Path) -> None:
        settings = export_settings(segmenter.config, segmenter.protocol.threshold)
        settings |= {"int8": int8, "opset": OPSET}
        _write_graphs(segmenter, folder, {**settings, "tokenizer": settings["tokenizer"]["kind"]}, int8, progress)
        progress("comparing with PyTorch")
        found.update(_compare(segmenter, folder, int8))
        write_json(folder / SETTINGS, settings)

    write_directory(out, fill)
    return found


def export_settings(config: RunConfig, threshold: float) -> dict[str, Any]:
    """What model.json holds: all that stands between a photograph with a phrase and the graphs, and back."""
    tokenizer = tokenizer_of(config.model.text)
    words: dict[str, Any] = {"kind": config.model.text.tokenizer}
    if isinstance(tokenizer, TinyTokenizer):
        words |= {"words": list(tokenizer.words), "buckets": TINY_BUCKETS}
    return {
        "image_size": config.data.image_size,
        "word_length": config.data.word_length,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "threshold": threshold,
        "recipe": config.recipe,
        "dataset": config.data.dataset,
        "version": __version__,
        "tokenizer": words,
    }


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DcrisError(
            f"exporting needs packages that are not here ({error.name}): pip install 'dcris[export]'"
        ) from error


@torch.no_grad()
def _write_graphs(
    segmenter: Segmenter, folder: Path, metadata: dict[str, Any], int8: bool, progress: Callable[[str], None]
) -> None:
    # Not ones: the exporter would take a dimension of 1 for a fixed one.
    images, index, tokens = _inputs(segmenter.config, 2, 3)
    text, image = _TextGraph(segmenter.model), _ImageGraph(segmenter.model, segmenter.config.data.image_size)
    phrases, pictures = torch.export.Dim("phrases"), torch.export.Dim("images")
    progress("exporting the text half")
    _write(folder / TEXT, text, {"tokens": tokens}, {"tokens": {0: phrases}}, FEATURES, metadata, int8)
    progress("exporting the image half")
    inputs = {"images": images, "image_index": index, **dict(zip(FEATURES, text(tokens), strict=True))}
    shapes = {name: {0: pictures if name == "images" else phrases} for name in inputs}
    _write(folder / IMAGE, image, inputs, shapes, ("logits",), metadata, int8)


def _write(
    path: Path,
    graph: nn.Module,
    inputs: dict[str, Tensor],
    shapes: dict[str, Any],
    outputs: tuple[str, ...],
    metadata: dict[str, Any],
    int8: bool,
) -> None:
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
        program.save(str(path))  # weights of more than ONNX's 2 GB go into a file beside it
        if int8:
            _quantise(path)


def _quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain = path.with_name(f"plain.{path.name}")
    path.rename(plain)
    weights = path.with_name(f"{path.name}.data")
    quantize_dynamic(
        plain,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=weights.exists(),
    )
    plain.unlink()


def _inputs(config: RunConfig, images: int, phrases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth pictures, the phrases' images, and tokens of phrases of different lengths."""
    side, length = config.data.image_size, config.data.word_length
    source = torch.Generator().manual_seed(images)
    coarse = torch.randn(images, 3, 8, 8, generator=source)
    pictures = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    texts = ["left", "the small red one on the right", "second from the left"][:phrases]
    return pictures, torch.arange(phrases) % images, tokenizer_of(config.model.text)(texts, length)


@torch.no_grad()
def _compare(segmenter: Segmenter, folder: Path, int8: bool) -> dict[str, float]:
    largest, total, count = 0.0, 0.0, 0
    for images, phrases in _CHECKED:
        pictures, index, tokens = _inputs(segmenter.config, images, phrases)
        expected = torch.sigmoid(segmenter.model(pictures[index], tokens)).numpy()
        found = _run(folder, pictures.numpy(), index.numpy(), tokens.numpy())
        if found.shape != expected.shape:
            raise DcrisError(f"the exported graphs give {list(found.shape)}, and the model {list(expected.shape)}")
        difference = np.abs(1 / (1 + np.exp(-found.astype(np.float64))) - expected)
        largest, total, count = (
            max(largest, float(difference.max())),
            total + float(difference.sum()),
            count + found.size,
        )
    result = {"largest": largest, "mean": total / count}
    if not (result["mean"] <= _INT8_TOLERANCE if int8 else largest <= _TOLERANCE):  # a NaN is no agreement either
        raise DcrisError(
            f"the exported graphs do not agree with PyTorch: probabilities differ by up to {largest:.2g}, by "
            f"{result['mean']:.2g} on average; "
            + ("export without --int8" if int8 else "other versions of onnx may help")
        )
    return result


def _run(
    folder: Path, images: NDArray[np.float32], index: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    text = onnxruntime.InferenceSession(folder / TEXT, options).run(list(FEATURES), {"tokens": tokens})
    inputs = {"images": images, "image_index": index, **dict(zip(FEATURES, text, strict=True))}
    logits: NDArray[np.float32] = onnxruntime.InferenceSession(folder / IMAGE, options).run(["logits"], inputs)[0]
    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantiser talk to those who write them, on all ways there are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
