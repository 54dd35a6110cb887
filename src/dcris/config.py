"""One typed, frozen configuration for a whole run. What a run did is what its config.json says.

Unknown keys, wrong types and values out of range are errors that name the key. Defaults are the paper's (DCRIS-B, RefCOCO).
"""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from dcris.errors import DcrisError
from dcris.utils.arguments import Precision, kind_of, require
from dcris.utils.files import read_json

PositionRule = Literal["exact", "offset", "plain"]

# The bounds are far beyond anything sensible; they keep a stranger's file from asking for any amount of work, and float32 from
# overflowing.
Count = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Width = Annotated[int, Field(gt=0, le=16_384, strict=True)]
Blocks = Annotated[int, Field(gt=0, le=256, strict=True)]
Layers = tuple[Annotated[int, Field(ge=0)], ...]
Factor = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Channels = tuple[Factor, Factor, Factor]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Revision = Annotated[str, Field(min_length=1)]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    # Not strict as a whole, which would refuse 1 for 1.0 and a list for a tuple; counts are, as True is no number of epochs.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class VisionConfig(Section):
    """The shape of a vision tower: DINOv2 with registers, DINOv3, or the image half of CLIP."""

    name: str = "dinov2-base"
    """Which weights fill it: a name that dcris.checkpoints.backbones knows, or the path of a file."""
    revision: Revision = "main"
    """Which state of the Hub's repository: a branch, a tag or a commit. Checkpoints record the commit it stood for."""
    family: Literal["dinov2", "dinov3", "clip"] = "dinov2"
    """dinov2 adds a table of positions to the patches; dinov3 turns queries and keys by them (dcris.models.layers.rope); clip has
    a table, no registers, and a projection behind its last norm."""
    width: Width = 768
    depth: Blocks = 12
    heads: Width = 12
    patch: Annotated[int, Field(gt=0, le=256, strict=True)] = 14
    registers: Annotated[int, Field(ge=0, le=1024)] = 4
    grid: Annotated[int, Field(gt=0, le=1024, strict=True)] = 37
    """Side of the position table; DINOv3 has none."""
    published_grid: Annotated[int, Field(gt=0, le=1024, strict=True)] | None = None
    """Side of the table in a published file of CLIP, where it is another: the table is resized once, when it is read."""
    position_rule: PositionRule = "offset"
    """How positions are brought to another grid; see dcris.models.encoders.vit.interpolate_positions."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """DINOv2's blocks' second half: "swiglu" in the giant alone; see dcris.models.encoders.blocks."""
    projected_width: Width | None = None
    """CLIP's projection of the finished tokens; None leaves their width."""

    @property
    def out_width(self) -> int:
        """Channels of the finished tokens."""
        return self.projected_width or self.width

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.family != "clip" and (self.projected_width or self.published_grid):
            raise ValueError("projected_width and published_grid are of CLIP, and other towers have neither")
        if self.family == "clip" and (self.registers or self.mlp != "gelu"):
            raise ValueError('a CLIP tower has no registers, and its mlp is "gelu" (in CLIP\'s quick form)')
        return self


class TextConfig(Section):
    """The shape of a CLIP text tower."""

    name: str = "clip-vit-base-patch16"
    """Which weights fill it: a name that dcris.checkpoints.backbones knows, or the path of a file."""
    revision: Revision = "main"
    """Which state of the Hub's repository: a branch, a tag or a commit. Checkpoints record the commit it stood for."""
    tokenizer: Literal["clip", "tiny"] = "clip"
    width: Width = 512
    depth: Blocks = 12
    heads: Width = 8
    vocabulary: Annotated[int, Field(gt=0, le=1_000_000, strict=True)] = 49408
    length: Width = 77
    """Rows of the position table."""
    sentence_width: Width = 512


class AdapterConfig(Section):
    """What the paper's two adapters share."""

    init: Literal["published", "zero"] = "published"
    """Initial weights. published: as the constructors of the published code leave them; zero: the up-projection is zero, so
    that the adapted tower starts as the plain one."""

    @model_validator(mode="before")
    @classmethod
    def _from_zero_init(cls, value: Any) -> Any:
        """Checkpoints from before `init` record `zero_init`, true or false."""
        if isinstance(value, Mapping) and "zero_init" in value and "init" not in value:
            others = {key: each for key, each in value.items() if key != "zero_init"}
            return {**others, "init": "zero" if value["zero_init"] is True else "published"}
        return value


class DenseCrossConfig(AdapterConfig):
    """The visual DenseCrossAdapter (equations 1 and 2)."""

    layers: Layers = (1, 3, 5, 7, 9, 11)
    width: Annotated[int, Field(gt=0, le=16_384, multiple_of=16)] = 128
    attention_width: Width = 128
    heads: Width = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scale: Factor = 0.2
    mask_padding: bool = False
    """Keep the attention from the phrase's padding tokens. The published code lets it look at them."""


class TextAdapterConfig(AdapterConfig):
    """The text adapter."""

    kind: Literal["plain", "dense"] = "plain"
    """plain is the paper's (equation 3); dense is the published DETRIS code's, with convolutions along the sentence."""
    layers: Layers = (1, 3, 5, 7, 9, 11)
    width: Width = 64
    scale: Factor = 0.2


class MethodConfig(Section):
    """A way of tuning the towers other than the paper's adapters: its settings, and how it gets into the towers.

    A method is one file in dcris.models.adapters, called by the method's name, with a subclass of this that fixes `name`.
    """

    name: str
    order: ClassVar[Literal["text first", "interleaved"]] = "text first"
    """Whether the text tower runs to its end before the first visual block, or the two run side by side, joined by a bridge."""

    _known: ClassVar[dict[str, type["MethodConfig"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        MethodConfig._known[cls.model_fields["name"].default] = cls

    @classmethod
    def find(cls, name: str) -> type["MethodConfig"]:
        """The settings of the method of that name. Raises ValueError listing the methods where there is none."""
        # Imported by name, on demand: a configuration knows no method, and knowing them all would need torch. Only modules of
        # this one package are looked for, as the name may be in a stranger's file.
        module = f"dcris.models.adapters.{name}"
        if name not in cls._known and re.fullmatch("[a-z][a-z0-9_]*", name) and util.find_spec(module):
            import_module(module)
        if name not in cls._known:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(cls.names())}")
        return cls._known[name]

    @classmethod
    def names(cls) -> list[str]:
        """Every method there is, by name."""
        from pkgutil import iter_modules

        for found in iter_modules(import_module("dcris.models.adapters").__path__):
            import_module(f"dcris.models.adapters.{found.name}")
        return sorted(cls._known)

    def check(self, model: "ModelConfig") -> None:
        """Raise ValueError, in a sentence, where the method does not fit these towers."""

    def attach(self, vision: Any, text: Any) -> None:
        """Put the method's modules into the slots of the VisionTower and the TextTower. One without modules leaves this out."""

    def starts_plain(self) -> bool:
        """Whether the towers answer as the plain ones do until training begins."""
        return False

    def bridge(self, model: "ModelConfig") -> Any:
        """The dcris.models.adapters.bridge.Bridge that joins the towers, of an interleaved method; else None."""
        return None

    def trains(self, name: str) -> bool:
        """Whether a tower's own weight is trained too; by its name in the whole model, such as `text.blocks.0.norm1.bias`."""
        return False


class HeadConfig(Section):
    """Neck, decoder and projector (section 3.4)."""

    taps: tuple[int, int] = (4, 8)
    """The two visual blocks (from 0) whose outputs the neck reads beside the last."""
    width: Annotated[int, Field(gt=0, le=16_384, multiple_of=4)] = 512
    heads: Width = 8
    layers: Blocks = 3
    feedforward: Width = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    neck_residual: bool = True
    """Whether the neck adds what enters its convolutions with coordinates to what leaves them; ETRIS does not."""
    bias: Factor | None = None
    """What the last bias starts at; None leaves it as PyTorch has it. Below zero says that most pixels are background."""


class ModelConfig(Section):
    """The whole network. An adapter that is None is left out."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    visual_adapter: DenseCrossConfig | None = DenseCrossConfig()
    text_adapter: TextAdapterConfig | None = TextAdapterConfig()
    method: SerializeAsAny[MethodConfig] | None = None
    """Another way of tuning, instead of the two adapters or beside them: its `name` and its settings."""
    head: HeadConfig = HeadConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _find_method(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError("a method has a name")
        return MethodConfig.find(value["name"]).model_validate(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (visual := self.visual_adapter) and visual.attention_width % visual.heads:
            raise ValueError(
                f"visual_adapter.attention_width {visual.attention_width} does not divide into {visual.heads} heads"
            )
        if (textual := self.text_adapter) and textual.kind == "dense" and textual.width % 16:
            raise ValueError(f"text_adapter.width {textual.width} must be a multiple of 16 for the dense kind")
        for section, width, heads in (
            ("vision", self.vision.width, self.vision.heads),
            ("text", self.text.width, self.text.heads),
            ("head", self.head.width, self.head.heads),
        ):
            if width % heads:
                raise ValueError(f"{section}.width {width} does not divide into {heads} heads")
        for key, layers, depth in (
            ("visual_adapter.layers", self.visual_adapter and self.visual_adapter.layers, self.vision.depth),
            ("text_adapter.layers", self.text_adapter and self.text_adapter.layers, self.text.depth),
            ("head.taps", self.head.taps, self.vision.depth),
        ):
            if layers and (max(layers) >= depth or len(set(layers)) < len(layers)):
                raise ValueError(f"{key} {list(layers)} must be different numbers below the tower's {depth} blocks")
        if self.method is not None:
            self.method.check(self)
            if self.method.order == "interleaved" and self.visual_adapter is not None:
                raise ValueError(
                    f"visual_adapter reads the finished text, which is not there while {self.method.name} runs the towers side "
                    "by side; set it to null"
                )
        if self.vision.family == "dinov3" and self.vision.width // self.vision.heads % 4:
            raise ValueError("vision.width must be four times a whole number for each head of a dinov3 tower")
        if not 0 <= self.head.taps[0] < self.head.taps[1]:
            raise ValueError("head.taps must be two block numbers in ascending order")
        return self


class DataConfig(Section):
    """Which references are read and how they become tensors."""

    dataset: str = "refcoco"
    split_by: str | None = None
    """Which partition (unc, umd, google, ...); None where the data set has only one."""
    train_split: str = "train"
    val_split: str | None = "val"
    """Evaluated after each epoch by the first sentence of each reference, as in CRIS; None for not at all."""
    image_size: Annotated[int, Field(gt=0, le=4096, strict=True)] = 448
    """Side of the network's square input."""
    word_length: Annotated[int, Field(ge=3, le=16_384)] = 17
    """Tokens per expression, start and end included; longer ones are cut. See dcris.data.registry for the usual ones."""
    mean: Channels = CLIP_MEAN
    """Normalisation, and the colour of the letterbox. CLIP's, as in the published code; DINOv2's own are ImageNet's."""
    std: tuple[Deviation, Deviation, Deviation] = CLIP_STD
    augmentations: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Augmentations of the training samples: name -> probability, applied in this order. The names are those of
    dcris.data.augmentations.AUGMENTATIONS."""
    mask_threshold: Annotated[float, Field(ge=0)] | None = None
    """Threshold for mask pictures of more than two values: pixels above it are the object. Below 1 it is a share of the full
    scale. None refuses such pictures."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a photograph or mask that cannot be read does to training: ends it, or lets another reference take its place (see
    dcris.data.dataset.TrainingSamples). Evaluation always stops."""


class TrainConfig(Section):
    """How the weights are found (sections 3.5 and 4.2)."""

    start: Annotated[str, Field(min_length=1)] | None = None
    """A run, checkpoint directory or bundle whose adapters and head the run starts from; None for fresh ones."""
    epochs: Count = 50
    """How long to train, where `max_steps` is None."""
    batch_size: Count = 32
    """Samples in a step, over all processes and passes."""
    micro_batch: Count | None = None
    """At most so many samples per process and pass through the network; None for a process's whole share of the batch."""
    checkpoint_activations: bool = False
    """Run vision blocks and decoder layers again in the backward pass instead of remembering what they made."""
    shard_towers: bool = False
    """Spread the frozen towers' weights over the processes (FSDP2), for towers that do not fit."""
    lr: Positive = 1e-4
    tower_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the learning rate for the towers' own weights, where a method trains them."""
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0, lt=2**31)], ...] = (35,)
    """Epochs at which a step schedule multiplies the learning rate by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's memory of the gradient and of its square; a run of few steps wants a shorter one of the square."""
    weight_decay: Weight = 0.0
    clip_norm: Positive | None = None
    """Gradients are scaled down to this norm; None leaves them."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    losses: dict[str, Positive] = {}
    """Losses that are added to equation 6: name -> weight. The names are those of dcris.training.losses.LOSSES."""
    precision: Precision = "auto"
    log_every: Count = 20
    """Steps between lines of the log."""
    save_every: Count | None = None
    """Steps between checkpoints, beside the one at each epoch's end."""
    keep_last: Count = 2
    """Checkpoints kept beside the best."""
    best_by: Literal["miou", "oiou", "prec@0.5", "prec@0.6", "prec@0.7", "prec@0.8", "prec@0.9"] = "miou"
    """The validation score by which a checkpoint is the best."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Who shows the curves and some predictions, beside the log; see dcris.training.loggers."""
    max_steps: Count | None = None
    """Train for exactly so many steps, over as many epochs as that takes, instead of for `epochs`. Milestones still count
    epochs, so a run that ends before the first keeps its learning rate."""


class RunConfig(Section):
    """Everything that decides what a run does, apart from where its files are."""

    recipe: str = "dcris_b"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.image_size % self.model.vision.patch:
            raise ValueError(f"data.image_size {self.data.image_size} must be a multiple of {self.model.vision.patch}")
        if self.data.word_length > self.model.text.length:
            raise ValueError(
                f"data.word_length {self.data.word_length} is more than the text tower's {self.model.text.length}"
            )
        return self


def parse_config(value: Any, where: str) -> RunConfig:
    """A configuration from plain data (a parsed JSON file). `where` names its source in the error.

    Raises DcrisError naming the first offending key.
    """
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        raise DcrisError(f"{where}: {_first_complaint(error)}") from error


def load_config(path: Path) -> RunConfig:
    """Read a run's config.json. Raises DcrisError where it is missing, not JSON or not a configuration."""
    return parse_config(read_json(path, "the run's configuration"), str(path))


def override(config: RunConfig, settings: Iterable[tuple[str, str]]) -> RunConfig:
    """The configuration with `SECTION.FIELD VALUE` pairs applied, as typed on the command line.

    A value is read as JSON where it is JSON (numbers, lists, null, true) and as text otherwise. The run's length may be given
    in epochs or in steps: train.epochs without train.max_steps clears the latter.

    Raises DcrisError naming the key where it is unknown or its value does not fit.
    """
    tree = require(config, RunConfig, "the configuration").model_dump()
    if not isinstance(settings, Iterable):
        raise DcrisError(f"settings are pairs of texts, and not {kind_of(settings)}")
    pairs = []
    for pair in settings:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise DcrisError(f"a setting is a pair of texts, as in ('train.lr', '0.001'), and not {pair!r}")
        pairs.append(pair)
    given = dict(pairs)
    if "train.epochs" in given and "train.max_steps" not in given:
        tree["train"]["max_steps"] = None
    for key, text in pairs:
        *parents, last = key.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise DcrisError(f"there is no setting {key}; `dcris recipes --show {config.recipe}` lists them all")
        try:
            node[last] = json.loads(text)
        except (ValueError, RecursionError):
            node[last] = text
    return parse_config(tree, "the settings given do not fit")


_MAY_CHANGE = {"recipe", "data.workers", "data.on_bad_image", "data.val_split", "train.epochs", "train.max_steps"}
# Where a run goes on there may be less memory, or more processes.
_MAY_CHANGE |= {"train.micro_batch", "train.checkpoint_activations", "train.shard_towers"}
_MAY_CHANGE |= {"train.log_every", "train.save_every", "train.keep_last", "train.trackers"}
# Naming the commit is how a run goes on after its branch has moved; that the towers are the same is checked by their hashes.
_MAY_CHANGE |= {"model.vision.revision", "model.text.revision"}


def refuse_other_run(before: RunConfig, now: RunConfig, where: Path) -> None:
    """Check that a run may go on under a configuration: only its length and its bookkeeping may differ from before.

    Raises DcrisError naming the first setting that differs.
    """
    old, new = _flatten(before.model_dump()), _flatten(now.model_dump())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE):
            raise DcrisError(
                f"the run in {where} was started with {key} = {json.dumps(old.get(key))}, not {json.dumps(new.get(key))}; "
                "resume it as it was, or choose another --out"
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _first_complaint(error: ValidationError) -> str:
    first: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"there is no setting {key}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message
