"""A trained model as ONNX, for programs without torch: the way into the square and back, the phrase's half, the photograph's.

Shape letters: I images, B phrases, H W pixels of a photograph, S side of the network's square, L text tokens, T and E widths of
f_t and f_s, h w grid.
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

from dcris.config import DataConfig, RunConfig
from dcris.data.dataset import letterbox_colour, normalise, to_square
from dcris.data.tokenizer import TINY_BUCKETS, TinyTokenizer, Tokenizer, tokenizer_of
from dcris.data.transforms import Letterbox
from dcris.errors import DcrisError
from dcris.evaluation.protocols import Cris
from dcris.evaluation.resampling import resize_matrix
from dcris.inference.segmenter import Segmenter
from dcris.models.encoders.clip_text import TextFeatures
from dcris.models.encoders.vit import interpolate_positions
from dcris.models.segmentation import ReferringSegmenter
from dcris.utils.files import write_directory, write_json
from dcris.version import __version__

OPSET = 20
"""The first that has the exact GELU as one operator. ONNX Runtime knows it since 1.17."""

FIT, TEXT, IMAGE, SETTINGS = "fit.onnx", "text.onnx", "image.onnx", "model.json"
FEATURES = ("f_t", "f_s", "padding")

_CHECKED = ((1, 1), (2, 3))
"""Numbers of images and of phrases at which the graphs are compared with the model."""

_PHOTOGRAPHS = ((60, 90), (700, 333))
"""Heights and widths at which the way into the square and back is compared."""

_TOLERANCE = 1e-3
"""How far a probability may be off. Rounding alone moves it by some millionths."""

_INT8_TOLERANCE = 0.05
"""How far it may be off on average with weights of 8 bits."""


class _FitGraph(nn.Module):
    """A photograph [H, W, 3] uint8 -> image [3, S, S], and rows [H, 4h] and columns [4w, W], which bring a map of it back.

    dcris.data.transforms.Letterbox and dcris.evaluation.protocols.Cris in operators that every runtime has, so that nobody has to write them
    again. Both keep the photograph's middle in the square's, which says the same as their corners do.
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
        # As tensors, since the exporter does not calculate with sizes.
        height, width = (torch.arange(1, size + 1, dtype=torch.float64)[-1] for size in photograph.shape[:2])
        step = torch.maximum(height, width) / self.side
        lines = self._sample(photograph, self._there(height, step), height, self.border)
        pixels = self._sample(lines.transpose(0, 1), self._there(width, step), width, torch.zeros(3)) + self.border
        image = normalise(pixels.round().clamp(0, 255).permute(2, 1, 0), self.data)
        rows, columns = (
            self._back((torch.arange(size, dtype=torch.float64) - length / 2) / step + self.side / 2)
            for size, length in zip(photograph.shape[:2], (height, width), strict=True)
        )
        return image, rows, columns.t()

    def _there(self, length: Tensor, step: Tensor) -> Tensor:
        """Where the square's lines lie on the photograph: [S] float32.

        By way of corners in float32, as Letterbox and cv2 have it: what lies between two grey values is rounded alike then.
        """
        start = ((self.side - length / step) / 2).float().double()
        scale = ((length / step + start).float().double() - start) / length
        return torch.arange(self.side).float() * (1 / scale).float() - (start / scale).float()

    @staticmethod
    def _sample(picture: Tensor, positions: Tensor, length: Tensor, border: Tensor) -> Tensor:
        """What a picture [length, n, 3] has more than the border at positions [S] of its first axis, bicubic: [S, n, 3]."""
        taps = positions.floor()[:, None] + torch.arange(-1, 3)
        weights = _bicubic((positions[:, None] - taps[:, :3]).abs())
        weights = torch.cat((weights, 1 - weights.sum(1, keepdim=True)), 1)  # cv2's fourth is what the others leave
        weights = torch.where((taps >= 0) & (taps < length), weights, 0.0)
        found = picture[torch.minimum(taps.clamp(min=0), length - 1).long()].float() - border
        return (weights[..., None, None] * found).sum(1)

    def _back(self, positions: Tensor) -> Tensor:
        """Positions [n] on the square -> [n, 4h], by way of the square's pixels, with zeros around."""
        return _bicubic((positions[:, None] - torch.arange(self.side)).abs()).float() @ self.finer


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.75, as dcris.evaluation.resampling has it."""
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
    """Images [I, 3, S, S], each phrase's image [B], and what the text graph says -> logits [B, 1, 4h, 4w]."""

    def __init__(self, model: ReferringSegmenter, side: int) -> None:
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
    """Write a folder with fit.onnx, text.onnx, image.onnx and model.json: the model in float32, checked against PyTorch.

    - fit.onnx takes a `photograph` [H, W, 3] uint8 to its `image` [3, S, S] (letterboxed, normalised) and to `rows` [H, 4h] and
      `columns` [4w, W]: `rows @ probabilities @ columns` are those of the photograph's own pixels.
    - text.onnx takes `tokens` [B, L] int64 to `f_t` [B, L, T], `f_s` [B, E] and `padding` [B, L] bool.
    - image.onnx takes `images` [I, 3, S, S], `image_index` [B] int64 (the image of each phrase) and those three to `logits`
      [B, 1, 4h, 4w]. What comes before the first adapter that reads the text is computed once an image.
    - model.json holds what a program has to know beside them: word length, threshold and tokenizer; mean, standard deviation
      and size for those with a letterbox of their own. The graphs' metadata hold the same, but for the tokenizer's words.

    H, W, I and B are free. L is fixed, since a text adapter may look ahead.
    All are run in ONNX Runtime, with one image and phrase and with two images and three phrases, and compared with PyTorch.

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
        _compare_fit(segmenter.config, folder)
        write_json(folder / SETTINGS, settings)

    write_directory(out, fill)
    return found


def export_settings(config: RunConfig, threshold: float) -> dict[str, Any]:
    """What model.json holds: all that stands between a photograph with a phrase and the graphs, and back."""
    return {
        "image_size": config.data.image_size,
        "word_length": config.data.word_length,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "threshold": threshold,
        "recipe": config.recipe,
        "dataset": config.data.dataset,
        "version": __version__,
        "tokenizer": _tokenizer_settings(tokenizer_of(config.model.text)),
    }


def _tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    told: dict[str, Any] = {"kind": tokenizer.name, "start": tokenizer.end_token - 1, "end": tokenizer.end_token}
    if isinstance(tokenizer, TinyTokenizer):
        words = {word: number for number, word in enumerate(tokenizer.words, start=1)}
        told |= {"words": words, "bucket": len(words) + 1, "buckets": TINY_BUCKETS}
    return told


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
    progress("exporting the way into the square and back")
    data = segmenter.config.data
    fit = _FitGraph(data, 4 * (data.image_size // segmenter.config.model.vision.patch))
    free = {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}
    photograph = {"photograph": _photograph(*_PHOTOGRAPHS[0])}
    _write(folder / FIT, fit, photograph, {"photograph": free}, ("image", "rows", "columns"), metadata, int8=False)
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
        # 7 of the 8 bits: processors without VNNI add two products in 16 bits, which would be cut off, and the masks be ruined.
        reduce_range=True,
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


def _photograph(height: int, width: int) -> Tensor:
    """Waves of another length for each colour: [H, W, 3] uint8."""
    y, x, colour = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    return (127.5 + 127.5 * torch.sin(0.05 * x * (1 + colour) + 0.08 * y)).to(torch.uint8)


def _compare_fit(config: RunConfig, folder: Path) -> None:
    """The square may differ by a grey value where rounding decides, and the way back by what is lost in float32."""
    cells = 4 * (config.data.image_size // config.model.vision.patch)
    for height, width in _PHOTOGRAPHS:
        photograph = _photograph(height, width)
        square, fit = to_square(photograph.numpy(), config.data, Letterbox)
        expected = normalise(square, config.data).numpy()
        image, rows, columns = _session(folder / FIT).run(None, {"photograph": photograph.numpy()})
        grey = np.abs(image - expected) * 255 * np.array(config.data.std).reshape(3, 1, 1)
        ways = Cris.resampling(fit, (cells, cells))
        way = max(float(np.abs(ours - theirs).max()) for ours, theirs in ((rows, ways[0]), (columns.T, ways[1])))
        if not (grey.max() < 1.5 and grey.mean() < 0.02 and way < 1e-4):
            raise DcrisError(
                f"the exported letterbox does not agree with PyTorch: pixels differ by up to {grey.max():.2g} grey values, "
                f"by {grey.mean():.2g} on average, and the way back by {way:.2g}; other versions of onnx may help"
            )


def _run(
    folder: Path, images: NDArray[np.float32], index: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    text = _session(folder / TEXT).run(list(FEATURES), {"tokens": tokens})
    inputs = {"images": images, "image_index": index, **dict(zip(FEATURES, text, strict=True))}
    logits: NDArray[np.float32] = _session(folder / IMAGE).run(["logits"], inputs)[0]
    return logits


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


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
