"""Export a trained model to ONNX, for programs without torch.

Three graphs: letterbox (fit.onnx), text encoder (text.onnx), and image encoder with head
(image.onnx).

Shape letters: I images, B phrases, H W size of an image, S side of the network's input, L text
tokens, T and E widths of f_t and f_s, h w patch grid.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcris.config import DataConfig, RunConfig
from dcris.data.dataset import letterbox_colour, normalise, to_square
from dcris.data.tokenizer import TINY_BUCKETS, BertTokenizer, TinyTokenizer, Tokenizer, strips, tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.evaluation.resampling import resize_matrix
from dcris.inference.segmenter import Segmenter
from dcris.models.encoders.text import TextFeatures
from dcris.models.encoders.vit import interpolate_positions
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.files import write_directory, write_json
from dcris.version import __version__

OPSET = 20
"""The first opset with the exact GELU as one operator. ONNX Runtime supports it since 1.17."""

FIT, TEXT, IMAGE, SETTINGS, WORDS = "fit.onnx", "text.onnx", "image.onnx", "model.json", "tokenizer.json"
FEATURES = ("f_t", "f_s", "padding")

_CHECKED = ((1, 1), (2, 3))
"""Numbers of images and phrases for the comparison of the graphs with the model."""

_IMAGE_SIZES = ((60, 90), (700, 333))
"""Heights and widths of images for the comparison of the letterbox."""

_TOLERANCE = 1e-3
"""Largest accepted difference of a probability. Rounding alone gives about 1e-6."""

_INT8_TOLERANCE = 0.05
"""Largest accepted mean difference of the probabilities with 8-bit weights."""


class _FitGraph(nn.Module):
    """Image [H, W, 3] uint8 -> square [3, S, S]; rows [H, 4h] and columns [4w, W] map back.

    The same as dcris.data.transforms.Letterbox and dcris.evaluation.protocols.Cris, in operators
    that every runtime has, so that no program needs an implementation of its own. Both keep the
    centre of the image in the centre of the square, which is equivalent to their formulas by
    corners.
    """

    border: Tensor
    finer: Tensor

    def __init__(self, data: DataConfig, cells: int) -> None:
        super().__init__()
        self.side = data.image_size
        self.data = data
        self.register_buffer("border", torch.tensor(letterbox_colour(data)).round())
        finer = resize_matrix(cells, self.side, "bicubic", align_corners=True)
        self.register_buffer("finer", torch.from_numpy(finer).float())

    def forward(self, photograph: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # As tensors: the exporter does not support arithmetic with sizes.
        height, width = (torch.arange(1, size + 1, dtype=torch.float64)[-1] for size in photograph.shape[:2])
        step = torch.maximum(height, width) / self.side
        lines = self._sample(photograph, self._source_positions(height, step), height, self.border)
        pixels = (
            self._sample(lines.transpose(0, 1), self._source_positions(width, step), width, torch.zeros(3))
            + self.border
        )
        image = normalise(pixels.round().clamp(0, 255).permute(2, 1, 0), self.data)
        rows, columns = (
            self._back_weights((torch.arange(size, dtype=torch.float64) - length / 2) / step + self.side / 2)
            for size, length in zip(photograph.shape[:2], (height, width), strict=True)
        )
        return image, rows, columns.t()

    def _source_positions(self, length: Tensor, step: Tensor) -> Tensor:
        """Positions on the image of the square's rows or columns: [S] float32.

        Computed from corners in float32, as Letterbox and cv2 do, so that values between two grey
        levels round alike.
        """
        start = ((self.side - length / step) / 2).float().double()
        scale = ((length / step + start).float().double() - start) / length
        return torch.arange(self.side).float() * (1 / scale).float() - (start / scale).float()

    @staticmethod
    def _sample(image: Tensor, positions: Tensor, length: Tensor, border: Tensor) -> Tensor:
        """Interpolate `image - border` [length, n, 3] at positions [S] of axis 0: [S, n, 3]."""
        taps = positions.floor()[:, None] + torch.arange(-1, 3)
        weights = _bicubic((positions[:, None] - taps[:, :3]).abs())
        weights = torch.cat((weights, 1 - weights.sum(1, keepdim=True)), 1)  # cv2 defines the fourth weight as the rest
        weights = torch.where((taps >= 0) & (taps < length), weights, 0.0)
        found = image[torch.minimum(taps.clamp(min=0), length - 1).long()].float() - border
        return (weights[..., None, None] * found).sum(1)

    def _back_weights(self, positions: Tensor) -> Tensor:
        """Weights [n, 4h] that interpolate a map at positions [n] of the square; zero outside."""
        return _bicubic((positions[:, None] - torch.arange(self.side)).abs()).float() @ self.finer


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.75, as in dcris.evaluation.resampling."""
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


class _TextGraph(nn.Module):
    """Tokens [B, L] -> f_t [B, L, T], f_s [B, E], padding [B, L] bool."""

    def __init__(self, model: ReferringSegmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.encode_text(tokens)
        assert isinstance(features, TextFeatures)
        return features.tokens, features.sentence, features.padding


class _ImageGraph(nn.Module):
    """Images [I, 3, S, S], image of each phrase [B], text features -> logits [B, 1, 4h, 4w], and
    with a presence head the probabilities [B].
    """

    def __init__(self, model: ReferringSegmenter, side: int) -> None:
        super().__init__()
        # Interpolate the position table here, so that the graph need not do it. The tower is a
        # shallow copy: the caller's tower keeps its table, and no weight is in memory twice.
        vision = copy.copy(model.vision)
        grid = (side // vision.config.patch, side // vision.config.patch)
        table = vision._parameters.get("positions")  # DINOv3 has no table
        if table is not None:
            resized = interpolate_positions(table.reshape(1, *table.shape[-2:]), grid, vision.config.position_rule)
            resized = resized.detach().reshape(*table.shape[:-2], *resized.shape[-2:])
            vision._parameters = {**vision._parameters, "positions": nn.Parameter(resized, requires_grad=False)}
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "vision": vision}

    def forward(
        self, images: Tensor, image_index: Tensor, f_t: Tensor, f_s: Tensor, padding: Tensor
    ) -> tuple[Tensor, ...]:
        state = self.model.encode_images(images)
        output = self.model.segment(state.select(image_index), TextFeatures(f_t, f_s, padding))
        return (output.logits,) if output.presence is None else (output.logits, output.presence.sigmoid())


def export_onnx(
    segmenter: Segmenter, out: Path, *, int8: bool = False, progress: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Export to fit.onnx, text.onnx, image.onnx and model.json, and compare with PyTorch.

    - fit.onnx: `photograph` [H, W, 3] uint8 -> `image` [3, S, S] (letterboxed, normalised), `rows`
      [H, 4h] and `columns` [4w, W]; `rows @ probabilities @ columns` are the probabilities at the
      size of the image.
    - text.onnx: `tokens` [B, L] int64 -> `f_t` [B, L, T], `f_s` [B, E] and `padding` [B, L] bool.
    - image.onnx: `images` [I, 3, S, S], `image_index` [B] int64 (the image of each phrase) and the
      outputs of text.onnx -> `logits` [B, 1, 4h, 4w], and with a presence head `present` [B], the
      probability that the object is there. Layers before the first adapter that reads the text run
      once per image.
    - model.json: word length, threshold and tokenizer; mean, standard deviation and image size for
      programs with their own letterbox. The metadata of the graphs have the same except the words
      of the tokenizer.

    H, W, I and B are dynamic. L is fixed, because a text adapter may use later tokens.

    Args:
        segmenter: a model on the CPU; its first adapters are exported.
        out: a folder that is empty or does not exist.
        int8: store the weights of matrix products in 8 bits (dynamic quantisation of ONNX Runtime):
            about a quarter of the size, slightly different masks.
        progress: receives a line of text before each step.

    Returns:
        The "largest" and the "mean" difference of the probabilities from PyTorch's.

    Raises:
        DcrisError: the extra `export` is not installed, `out` is in use or cannot be written, or
            the graphs disagree with the model. Nothing is written then.
    """
    _require_packages()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DcrisError(f"{out} exists already; choose a new folder for the export")
    if segmenter.device.type != "cpu":
        raise DcrisError(
            f"the model is on {segmenter.device}, but only models on the CPU can be exported; load it with device='cpu'"
        )
    if segmenter.model.bridge is not None:
        raise DcrisError("ONNX export is not supported for interleaved methods (ETRIS, BarLeRIa)")
    found: dict[str, float] = {}

    def fill(folder: Path) -> None:
        settings = export_settings(segmenter.config, segmenter.protocol.threshold)
        settings |= {"int8": int8, "opset": OPSET}
        _write_graphs(segmenter, folder, {**settings, "tokenizer": settings["tokenizer"]["kind"]}, int8, progress)
        progress("comparing with PyTorch")
        found.update(_compare(segmenter, folder, int8))
        _compare_fit(segmenter.config, folder)
        if isinstance(tokenizer := tokenizer_of(segmenter.config.model.text), BertTokenizer):
            tokenizer.save(folder / WORDS)
        write_json(folder / SETTINGS, settings)

    write_directory(out, fill)
    return found


def export_settings(config: RunConfig, threshold: float) -> dict[str, Any]:
    """Return the content of model.json: everything that pre- and postprocessing need."""
    return {
        "image_size": config.data.image_size,
        "word_length": config.data.word_length,
        "strip_phrases": strips(config.data, predicting=True),
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "threshold": threshold,
        "refine": config.data.refine,
        "recipe": config.recipe,
        "dataset": config.data.dataset,
        "version": __version__,
        "tokenizer": _tokenizer_settings(tokenizer_of(config.model.text)),
    }


def _tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": tokenizer.name, "start": tokenizer.end_token - 1, "end": tokenizer.end_token}
    if isinstance(tokenizer, TinyTokenizer):
        words = {word: number for number, word in enumerate(tokenizer.words, start=1)}
        settings |= {"words": words, "bucket": len(words) + 1, "buckets": TINY_BUCKETS}
    if isinstance(tokenizer, BertTokenizer):
        settings["file"] = WORDS
    return settings


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DcrisError(f"the export needs the package {error.name}: pip install 'dcris[export]'") from error


@torch.no_grad()
def _write_graphs(
    segmenter: Segmenter, folder: Path, metadata: dict[str, Any], int8: bool, progress: Callable[[str], None]
) -> None:
    # Not one: the exporter would treat a dimension of 1 as fixed.
    images, index, tokens = _inputs(segmenter.config, 2, 3)
    text, image = _TextGraph(segmenter.model), _ImageGraph(segmenter.model, segmenter.config.data.image_size)
    phrases, images_dim = torch.export.Dim("phrases"), torch.export.Dim("images")
    progress("exporting the letterbox")
    data = segmenter.config.data
    fit = _FitGraph(data, 4 * (data.image_size // segmenter.config.model.vision.patch))
    free = {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}
    example = {"photograph": _test_image(*_IMAGE_SIZES[0])}
    _write(folder / FIT, fit, example, {"photograph": free}, ("image", "rows", "columns"), metadata, int8=False)
    progress("exporting the text encoder")
    _write(folder / TEXT, text, {"tokens": tokens}, {"tokens": {0: phrases}}, FEATURES, metadata, int8)
    progress("exporting the image encoder and the head")
    inputs = {"images": images, "image_index": index, **dict(zip(FEATURES, text(tokens), strict=True))}
    shapes = {name: {0: images_dim if name == "images" else phrases} for name in inputs}
    _write(folder / IMAGE, image, inputs, shapes, _outputs(segmenter.model), metadata, int8)


def _outputs(model: ReferringSegmenter) -> tuple[str, ...]:
    """Return the names of the outputs of image.onnx."""
    return ("logits",) if model.head.presence is None else ("logits", "present")


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
        program.save(str(path))  # weights beyond ONNX's limit of 2 GB go to a separate file
        if int8:
            _quantise(path)


def _quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weights = path.with_name(f"{path.name}.data")
    external = weights.exists()
    # In a folder of their own: onnx would append the new weights to a file of their name.
    with TemporaryDirectory(dir=path.parent) as folder:
        for file in (path, weights) if external else (path,):
            file.rename(Path(folder) / file.name)
        plain = Path(folder) / path.name
        quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=_products_with_vectors(plain),
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7 of the 8 bits: processors without VNNI add two products in 16 bits, which overflows
            # and ruins the masks.
            reduce_range=True,
            use_external_data_format=external,
        )


def _products_with_vectors(path: Path) -> list[str]:
    """Return the names of the matrix products of a graph whose weight is no matrix, such as that of
    the presence head: ONNX Runtime cannot run them with a scale for each column."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    others = {weight.name for weight in graph.initializer if len(weight.dims) != 2}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in others]


def _inputs(config: RunConfig, images: int, phrases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Create smooth images, the image of each phrase, and tokens of different lengths."""
    side, length = config.data.image_size, config.data.word_length
    source = torch.Generator().manual_seed(images)
    coarse = torch.randn(images, 3, 8, 8, generator=source)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    texts = ["left", "the small red one on the right", "second from the left"][:phrases]
    return smooth, torch.arange(phrases) % images, tokenizer_of(config.model.text)(texts, length)


@torch.no_grad()
def _compare(segmenter: Segmenter, folder: Path, int8: bool) -> dict[str, float]:
    largest, total, count = 0.0, 0.0, 0
    for images, phrases in _CHECKED:
        tensors, index, tokens = _inputs(segmenter.config, images, phrases)
        output = segmenter.model(tensors[index], tokens)
        logits, *present = _run(folder, _outputs(segmenter.model), tensors.numpy(), index.numpy(), tokens.numpy())
        pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
            (output.logits.sigmoid().numpy(), 1 / (1 + np.exp(-logits.astype(np.float64))))
        ]
        if output.presence is not None:
            pairs.append((output.presence.sigmoid().numpy(), present[0]))
        for expected, found in pairs:
            if found.shape != expected.shape:
                raise DcrisError(
                    f"the exported graphs give the shape {list(found.shape)}, but the model {list(expected.shape)}"
                )
            difference = np.abs(found - expected)
            largest, total, count = (
                max(largest, float(difference.max())),
                total + float(difference.sum()),
                count + found.size,
            )
    result = {"largest": largest, "mean": total / count}
    if not (result["mean"] <= _INT8_TOLERANCE if int8 else largest <= _TOLERANCE):  # NaN must fail, too
        raise DcrisError(
            f"the exported graphs do not agree with PyTorch: probabilities differ by up to {largest:.2g}, by "
            f"{result['mean']:.2g} on average; " + ("export without --int8" if int8 else "try another version of onnx")
        )
    return result


def _test_image(height: int, width: int) -> Tensor:
    """Waves with a different length per colour: [H, W, 3] uint8."""
    y, x, colour = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    return (127.5 + 127.5 * torch.sin(0.05 * x * (1 + colour) + 0.08 * y)).to(torch.uint8)


def _compare_fit(config: RunConfig, folder: Path) -> None:
    """Compare fit.onnx with PyTorch.

    Rounding may change a grey level by 1, float32 the weights by little.
    """
    cells = 4 * (config.data.image_size // config.model.vision.patch)
    for height, width in _IMAGE_SIZES:
        original = _test_image(height, width)
        square, fit = to_square(original.numpy(), config.data, Letterbox)
        expected = normalise(square, config.data).numpy()
        image, rows, columns = _session(folder / FIT).run(None, {"photograph": original.numpy()})
        grey = np.abs(image - expected) * 255 * np.array(config.data.std).reshape(3, 1, 1)
        ways = Cris.resampling(fit, (cells, cells))
        way = max(float(np.abs(ours - theirs).max()) for ours, theirs in ((rows, ways[0]), (columns.T, ways[1])))
        if not (grey.max() < 1.5 and grey.mean() < 0.02 and way < 1e-4):
            raise DcrisError(
                f"the exported letterbox does not agree with PyTorch: pixels differ by up to {grey.max():.2g} grey values, "
                f"by {grey.mean():.2g} on average, and the weights by {way:.2g}; try another version of onnx"
            )


def _run(
    folder: Path,
    outputs: Sequence[str],
    images: NDArray[np.float32],
    index: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> list[NDArray[np.float32]]:
    text = _session(folder / TEXT).run(list(FEATURES), {"tokens": tokens})
    inputs = {"images": images, "image_index": index, **dict(zip(FEATURES, text, strict=True))}
    found: list[NDArray[np.float32]] = _session(folder / IMAGE).run(list(outputs), inputs)
    return found


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress logs, warnings and output of the exporter and the quantiser."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
