"""The typed, frozen configuration of a run. `config.json` of a run holds all of it.

Unknown keys, wrong types and values out of range are errors that name the key. The defaults are
those of the paper's DCRIS-B on RefCOCO, except that `model.method` has none.
"""

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from dcris.errors import DcrisError
from dcris.utils.arguments import Refinement, TrackerName, TrainingPrecision, did_you_mean, kind_of, require
from dcris.utils.files import read_json

PositionRule = Literal["exact", "offset", "plain"]
Part = Literal["adapters", "head", "towers"]
MaskTarget = Literal["nearest", "area", "aligned"]
NegativeKind = Literal["category", "attribute", "place", "relation"]

# The bounds are far beyond sensible values. They keep an untrusted file from causing any amount of
# work, and float32 from overflowing.
Count = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Width = Annotated[int, Field(gt=0, le=16_384, strict=True)]
Blocks = Annotated[int, Field(gt=0, le=256, strict=True)]
Layers = tuple[Annotated[int, Field(ge=0)], ...]
Factor = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Channels = tuple[Factor, Factor, Factor]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Noun = Annotated[str, Field(max_length=100, pattern=r"\S")]
Revision = Annotated[str, Field(min_length=1)]

_LARGEST_IMAGE = 4096
"""Largest side of the network's input, in pixels."""

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)

METHODS: dict[str, type["MethodConfig"]] = {}
"""The settings class of each method by its name. Filled by dcris.models.adapters."""

VISION_FAMILIES: dict[str, Any] = {}
TEXT_FAMILIES: dict[str, Any] = {}
"""The architectures of encoders by name, as dcris.models.encoders.families.TowerFamily. Filled by
dcris.models.encoders."""


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    # Not strict as a whole, which would refuse 1 for 1.0 and a list for a tuple. Counts are strict:
    # True is not a number of epochs.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class VisionConfig(Section):
    """The shape of a vision encoder."""

    name: str = "dinov2-base"
    """Which weights fill it: a published tower's name (VISION_TOWERS of dcris.models.encoders), the
    path of a file, or "random"."""
    revision: Revision = "main"
    """Revision of the Hub repository: a branch, a tag or a commit. Checkpoints record its commit.
    """
    family: str = "dinov2"
    """The architecture, a key of VISION_FAMILIES: dinov2 adds a position table to the patches;
    dinov3 rotates queries and keys instead; clip has a table, no registers, and a projection behind
    its last norm; efficientnet is convolutional, with `patch` the stride of its grid."""
    width: Width = 768
    depth: Blocks = 12
    heads: Width = 12
    patch: Annotated[int, Field(gt=0, le=256, strict=True)] = 14
    registers: Annotated[int, Field(ge=0, le=1024)] = 4
    grid: Annotated[int, Field(gt=0, le=1024, strict=True)] = 37
    """Side of the position table; ignored by dinov3, which has none."""
    published_grid: Annotated[int, Field(gt=0, le=1024, strict=True)] | None = None
    """Side of the position table in the published file (clip), if it differs from `grid`: the table
    is then resized once, when it is loaded."""
    position_rule: PositionRule = "offset"
    """How positions are resized to another grid; see
    dcris.models.encoders.vit.interpolate_positions."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """The MLP of DINOv2's blocks: "swiglu" for the giant model only; see
    dcris.models.encoders.blocks."""
    projected_width: Width | None = None
    """Width of CLIP's projection of the final tokens; None for encoders without a projection."""

    @property
    def out_width(self) -> int:
        """Channels of the final tokens."""
        return self.projected_width or self.width


class TextConfig(Section):
    """The shape of a text encoder."""

    name: str = "clip-vit-base-patch16"
    """Which weights fill it: a published tower's name (TEXT_TOWERS of dcris.models.encoders), the
    path of a file, or "random"."""
    revision: Revision = "main"
    """Revision of the Hub repository: a branch, a tag or a commit. Checkpoints record its commit.
    """
    family: str = "clip"
    """The architecture, a key of TEXT_FAMILIES."""
    tokenizer: Literal["clip", "tiny", "bert"] = "clip"
    width: Width = 512
    depth: Blocks = 12
    heads: Width = 8
    vocabulary: Annotated[int, Field(gt=0, le=1_000_000, strict=True)] = 49408
    length: Width = 77
    """Rows of the position table."""
    sentence_width: Width = 512
    """Width of the sentence feature f_s."""


class MethodConfig(Section):
    """Base class of a method's settings: how the encoders are tuned.

    A method is one file in dcris.models.adapters with a subclass of this, and an entry in METHODS.
    """

    name: str
    """Fixed by the subclass, as in `name: Literal["lora"] = "lora"`."""
    foldable: ClassVar[bool] = False
    """Whether the trained method can be folded into the encoders' own weights, so that nothing
    remains of it in the network. Its slots then implement `fold`."""

    def check(self, model: "ModelConfig") -> None:
        """Raise ValueError, in one sentence, where the method does not fit the encoders."""

    def attach(self, vision: Any, text: Any) -> None:
        """Put the method's modules, if any, into the slots of the VisionTower and the TextTower."""

    def bridge(self, model: "ModelConfig") -> Any:
        """Return the Bridge (dcris.models.adapters.bridge) of an interleaved method; else None."""
        return None

    def trains(self, name: str) -> bool:
        """Return whether one of the encoders' own weights is trained too.

        `name` is its name in the whole model, such as `text.blocks.0.norm1.bias`.
        """
        return False

    def describe(self) -> str:
        """Return the description of the method for model cards."""
        return f"{self.name}, with the head of DCRIS (see the documentation's page on methods)"


class HeadConfig(Section):
    """Neck, decoder and projector (section 3.4)."""

    feature_layers: tuple[int, int] = (4, 8)
    """The two visual blocks (0-based) whose outputs the neck reads, besides the last."""
    width: Annotated[int, Field(gt=0, le=16_384, multiple_of=4)] = 512
    heads: Width = 8
    layers: Blocks = 3
    feedforward: Width = 512
    dropout: Probability = 0.1
    neck_residual: bool = True
    """Whether the neck has a residual connection around its coordinate convolutions. ETRIS has
    none."""
    bias: Factor | None = None
    """Initial value of the last bias; None keeps PyTorch's. A negative value starts the masks as
    mostly background."""
    presence: bool = False
    """Whether a presence head predicts the probability that the object is in the image at all
    (dcris.models.head.presence). Its training needs expressions whose object is absent: see
    `data.negatives`."""


class ModelConfig(Section):
    """The whole network."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    method: SerializeAsAny[MethodConfig] | None = None
    """How the encoders are tuned: a method's `name` and its settings. None trains the head only."""
    head: HeadConfig = HeadConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _find_method(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        name = value.get("name")
        if not isinstance(name, str):
            raise ValueError('give the method\'s "name"')
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; {_choices(METHODS)}")
        return METHODS[name].model_validate(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for section, width, heads in (
            ("vision", self.vision.width, self.vision.heads),
            ("text", self.text.width, self.text.heads),
            ("head", self.head.width, self.head.heads),
        ):
            check_heads(f"{section}.width", width, heads)
        check_layers("head.feature_layers", self.head.feature_layers, self.vision.depth, ascending=True)
        for section, config, families in (
            ("vision", self.vision, VISION_FAMILIES),
            ("text", self.text, TEXT_FAMILIES),
        ):
            if config.family not in families:
                raise ValueError(f"{section}.family: unknown family {config.family!r}; {_choices(families)}")
            families[config.family].tower.check(config)
        if self.method is not None:
            self.method.check(self)
        return self


def _choices(registry: Mapping[str, Any]) -> str:
    # Only dcris.config was imported: the registries are filled by importing dcris.models.
    return f"known: {', '.join(sorted(registry))}" if registry else "import dcris.models first"


def check_heads(key: str, width: int, heads: int) -> None:
    """Raise ValueError, naming `key`, where a width cannot be divided among attention heads."""
    if width % heads:
        raise ValueError(f"{key} {width} cannot be divided among {heads} heads")


def check_layers(key: str, layers: Iterable[int], depth: int, *, ascending: bool = False) -> None:
    """Raise ValueError, naming `key`, where block numbers are repeated, not below `depth` or, if
    they have to be, not `ascending`."""
    layers = list(layers)
    in_order = layers == sorted(layers) or not ascending
    if not in_order or len(set(layers)) < len(layers) or any(not 0 <= layer < depth for layer in layers):
        kind = "ascending" if ascending else "different"
        raise ValueError(f"{key} {layers} must be {kind} block numbers, from 0 to {depth - 1}")


def require_slots(method: str, layers: Iterable[int], place: str, vision: VisionConfig) -> None:
    """Raise ValueError where a block of the vision encoder has no slot that a method needs."""
    tower = VISION_FAMILIES[vision.family].tower
    if lacking := [layer for layer in layers if not tower.has(vision, layer, place)]:
        having = [layer for layer in range(vision.depth) if tower.has(vision, layer, place)]
        raise ValueError(
            f"the method {method} needs a {place} in the blocks {lacking} of the vision encoder, but {vision.name} has "
            + (f"one in {having} only" if having else "none")
        )


class NegativesConfig(Section):
    """Training references whose object is absent, made from those there are; see
    dcris.data.negatives."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the made references in the training references. Too many cost accuracy on objects
    that are there."""
    kinds: Annotated[tuple[NegativeKind, ...], Field(min_length=1)] = ("category",)
    """What is wrong with their expressions; each kind has an equal share of the images. category:
    an expression of another image, whose category this image lacks. attribute, place, relation: an
    expression that is true of no object; for generated scenes only, where everything is known."""


class DataConfig(Section):
    """Which references are read and how they become tensors."""

    dataset: str = "refcoco"
    split_by: str | None = None
    """The partition (unc, umd, google, ...); None where the data set has only one."""
    train_split: str = "train"
    val_split: str | None = "val"
    """Evaluated after each epoch on the first sentence of each reference, as in CRIS; None: no
    validation."""
    licences: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] | None = None
    """Train only on photographs whose `license` in COCO's `instances.json` is one of these numbers;
    4, 5, 7 and 8 permit weights that are shared. None: all. REFER layout only."""
    generate_phrases: bool = False
    """Add training references that are generated from all annotated instances; see
    dcris.data.phrases. REFER layout only."""
    nouns: dict[str, Annotated[tuple[Noun, ...], Field(min_length=1)]] = {}
    """Words for categories in generated phrases, in place of those of dcris.data.phrases: category
    -> words. A repeated word is drawn more often."""
    negatives: NegativesConfig | None = None
    """Add training references whose object is absent: their masks are empty. None: none are added.
    """
    image_size: Annotated[int, Field(gt=0, le=_LARGEST_IMAGE, strict=True)] = 448
    """Side of the network's square input, in pixels."""
    word_length: Annotated[int, Field(ge=3, le=16_384)] = 17
    """Tokens per expression, start and end token included. Longer expressions are cut. See
    dcris.data.registry for the usual lengths."""
    strip_phrases: Literal["predict", "always", "never"] = "predict"
    """Where quotes around an expression and a full stop at its end are left out (see
    dcris.data.cleaning.clean_text): predict: in predictions only, since people type them, but the
    published models were trained and are evaluated on expressions as they are; always: in training
    and evaluation, too; never."""
    mean: Channels = CLIP_MEAN
    """Normalisation, and the colour of the letterbox. CLIP's, as in the published code; DINOv2 was
    trained with ImageNet's."""
    std: tuple[Deviation, Deviation, Deviation] = CLIP_STD
    augmentations: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Augmentations of the training samples: name -> probability, applied in this order. The names
    are those of dcris.data.augmentations.AUGMENTATIONS."""
    phrases_per_image: Count = 1
    """References of an image that training puts next to each other, so that a batch has up to so
    many of each image. The part of the network before the text is then computed once for them. They
    get the same draws of augmentations."""
    cache_features: Count | None = None
    """Number of augmented variants of each training image that are encoded once, up to the first
    trained weight or the text, and kept on disk (see dcris.training.features). Epoch e uses variant
    e modulo this number. None: images are read and encoded at every step."""
    frame_step: Count = 1
    """Step between the frames of a data set of videos that training reads, from the first of each
    video; 1 reads all."""
    scales: Annotated[tuple[Annotated[float, Field(ge=0.1, le=10)], ...], Field(min_length=1)] | None = None
    """Sizes of the input in training, as multiples of `image_size`, rounded to multiples of the
    patch. Each batch is resized to one of them (see dcris.training.sizes); validation and
    prediction use `image_size`. None: `image_size` only."""
    weights: Annotated[tuple[Positive, ...], Field(min_length=2)] | None = None
    """Relative numbers of training samples of the data sets of a mixture, in the order of its name.
    An epoch keeps its length. None: each reference once an epoch."""
    mask_threshold: Annotated[float, Field(ge=0)] | None = None
    """Threshold for mask images with more than two values: pixels above it belong to the object.
    Below 1 it is a fraction of the full scale. None: such images are an error."""
    refine: Refinement = "none"
    """How predictions of the trained model refine the edges of masks by default; see
    dcris.evaluation.refinement. Training and evaluation ignore it."""
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Processes that load training samples."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An unreadable image or mask during training: stop aborts; skip logs it and uses another
    sample (see dcris.data.dataset.TrainingSamples). Evaluation always aborts."""


class MaskingConfig(Section):
    """Masking with distillation (MaskRIS, Lee et al. 2024); see dcris.data.masking.

    The defaults are those of the published code, whose 14 x 14 patches are of 32 pixels.
    """

    image: Probability = 0.75
    """Share of the image's patches that are hidden."""
    words: Probability = 0.15
    """Probability that a token of the expression is masked."""
    grid: Annotated[int, Field(gt=0, le=1024, strict=True)] = 14
    """Patches along a side of the network's square."""
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the loss of the masked sample; that of the sample itself has the rest."""


class TrainConfig(Section):
    """Optimisation and bookkeeping (sections 3.5 and 4.2)."""

    start: Annotated[str, Field(min_length=1)] | None = None
    """Run, checkpoint directory or bundle whose adapters and head initialise the run; None: new
    ones."""
    epochs: Count = 50
    """Length of the run, unless `max_steps` is given."""
    batch_size: Count = 32
    """Samples per step, over all ranks and passes."""
    micro_batch: Count | None = None
    """Maximum samples per rank and pass through the network; None: the rank's whole share of the
    batch."""
    checkpoint_activations: bool = False
    """Recompute vision blocks and decoder layers in the backward pass instead of storing
    activations."""
    shard_towers: bool = False
    """Shard the frozen encoders' weights over the ranks (FSDP2), for encoders that do not fit on
    one device."""
    lr: Positive = 1e-4
    lr_factors: dict[Part, Positive] = {}
    """Learning rates of the network's parts, as multiples of `lr`: the method's adapters, the head,
    and the encoders' own weights (towers), where a method trains them. Parts that are not given
    have `lr`."""
    optimizer: Literal["adam", "adamw", "muon"] = "adam"
    """adamw applies `weight_decay` to the weights, adam adds it to the gradient. muon is adamw with
    other steps for weight matrices, see dcris.training.muon."""
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0, lt=2**31)], ...] = (35,)
    """Epochs at which the step schedule multiplies the learning rate by `gamma`."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Steps in which the learning rate rises to `lr`; if they are more than half of the run, a
    tenth of it instead."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Adam's decay rates; the first is Muon's, too. A run of few steps needs a smaller second one.
    """
    weight_decay: Weight = 0.0
    clip_norm: Positive | None = None
    """Maximum norm of the gradient; None: no clipping."""
    ema: Probability | None = None
    """Decay of an exponential moving average of the trained weights, such as 0.999; None: off.
    Validation and prediction use the averages, see dcris.training.averaging."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    losses: dict[str, Positive] = {}
    """Losses that are added to equation 6: name -> weight. The names are those of
    dcris.training.losses.LOSSES."""
    presence: Positive = 1.0
    """Weight of the cross entropy of presence, beside equation 6; used with `model.head.presence`.
    """
    masking: MaskingConfig | None = None
    """Train on each sample a second time, with parts of its image and its words masked, to predict
    what the network predicts for the sample itself. None: off."""
    target: MaskTarget = "nearest"
    """How masks are resized to the grid of the logits, for the losses and the training IoU:
    nearest, as published, takes one pixel for each cell; area takes the mean of the cell; aligned
    takes the mean of a cell that lies where the protocol cris expects it, so that its threshold
    (0.35) is at half a cell."""
    precision: TrainingPrecision = "auto"
    compile: bool = False
    """Compile the network's training pass with torch.compile; see dcris.training.compilation."""
    log_every: Count = 20
    """Steps between lines of the log."""
    save_every: Count | None = None
    """Steps between checkpoints, besides the one at the end of each epoch."""
    keep_last: Count = 2
    """How many checkpoints are kept besides the best."""
    best_by: Literal["miou", "oiou", "prec@0.5", "prec@0.6", "prec@0.7", "prec@0.8", "prec@0.9"] = "miou"
    """The validation score that determines the best checkpoint."""
    trackers: tuple[TrackerName, ...] = ()
    """Where curves and example predictions are shown, besides the log; see dcris.training.loggers.
    """
    max_steps: Count | None = None
    """Length of the run in steps, over as many epochs as needed, instead of `epochs`. Milestones
    still count epochs, so a run that ends before the first keeps its learning rate."""

    @model_validator(mode="before")
    @classmethod
    def _read_tower_lr(cls, value: Any) -> Any:
        # Files of older runs, and of the models that are part of the package, have `tower_lr`.
        if not isinstance(value, Mapping) or "tower_lr" not in value:
            return value
        others = {key: each for key, each in value.items() if key != "tower_lr"}
        return others if value["tower_lr"] == 1 else others | {"lr_factors": {"towers": value["tower_lr"]}}


class RunConfig(Section):
    """Everything that determines a run, apart from the location of its files."""

    recipe: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.nouns and not self.data.generate_phrases:
            raise ValueError("data.nouns is of generated phrases; give data.generate_phrases true, too")
        if self.data.image_size % self.model.vision.patch:
            raise ValueError(f"data.image_size {self.data.image_size} must be a multiple of {self.model.vision.patch}")
        if self.data.word_length > self.model.text.length:
            raise ValueError(
                f"data.word_length {self.data.word_length} is more than the text encoder's {self.model.text.length}"
            )
        for key, chosen in (("train.masking", self.train.masking), ("data.scales", self.data.scales)):
            if chosen and self.data.cache_features:
                raise ValueError(
                    f"{key} changes the images at every step, which data.cache_features encodes once; leave one of them off"
                )
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"data.scales {list(self.data.scales or ())} gives the sizes {list(self.sizes)}, in whole patches of "
                f"{self.model.vision.patch} pixels; give scales of different sizes"
            )
        if max(self.sizes) > _LARGEST_IMAGE:
            raise ValueError(f"data.scales gives a size of {max(self.sizes)} pixels; the largest is {_LARGEST_IMAGE}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides of the network's square input in training, in pixels (`data.scales`)."""
        patch, size = self.model.vision.patch, self.data.image_size
        return tuple(patch * max(1, round(scale * size / patch)) for scale in self.data.scales or (1.0,))


def parse_config(value: Any, where: str) -> RunConfig:
    """Return the configuration of plain data (a parsed JSON file).

    Args:
        value: nested dictionaries.
        where: the source, for error messages.

    Raises:
        DcrisError: names the first key that does not fit.
    """
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        raise DcrisError(f"{where}: {_first_error(error)}") from error


def load_config(path: Path) -> RunConfig:
    """Read a run's config.json.

    Raises:
        DcrisError: the file is missing, not JSON, or not a configuration.
    """
    return parse_config(read_json(path, "the run's configuration"), str(path))


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with some values replaced: `replace(config, {"train.seed": 1})`.

    train.epochs clears train.max_steps, unless that is given too.

    Args:
        config: the configuration to start from; it is not changed.
        changes: values by key (SECTION.FIELD), in any order. A value may be a whole section, beside
            which fields of it may be given, too.

    Raises:
        DcrisError: names the key that is unknown or whose value does not fit.
    """
    tree = require(config, RunConfig, "the configuration").model_dump()
    require_changes(changes)
    if "train.epochs" in changes:
        changes = {"train.max_steps": None, **changes}
    for key in sorted(changes, key=lambda key: key.count(".")):  # a section before its fields
        value = changes[key]
        *parents, last = key.split(".")
        # A section that is given may lack fields that have defaults; its parser checks the names.
        is_given = any(".".join(parents[:length]) in changes for length in range(1, len(parents) + 1))
        node: Any = tree
        for parent in parents:
            node = (node.setdefault(parent, {}) if is_given else node.get(parent)) if isinstance(node, dict) else None
        if not isinstance(node, dict) or (last not in node and not is_given):
            raise DcrisError(
                f"unknown setting {key}{did_you_mean(key, _flatten(tree))}; `dcris recipes --show {config.recipe}` lists all "
                "settings"
            )
        node[last] = value.model_dump() if isinstance(value, Section) else deepcopy(value)
    return parse_config(tree, "invalid setting")


def require_changes(changes: Any) -> None:
    """Raise DcrisError if something is not a mapping of keys to values, as `replace` takes it."""
    if not isinstance(changes, Mapping) or not all(isinstance(key, str) for key in changes):
        raise DcrisError(f'changes must map keys to values, as in {{"train.lr": 0.001}}, not be {kind_of(changes)}')


def gives(changes: Mapping[str, Any], key: str) -> bool:
    """Return whether changes for `replace` give a field, alone or in a whole section."""
    section, _, name = key.partition(".")
    whole = changes.get(section)
    return key in changes or isinstance(whole, Section) or (isinstance(whole, Mapping) and name in whole)


def parse_value(text: str) -> Any:
    """Return the value of a setting on the command line.

    JSON (numbers, lists, null, true) is parsed; any other text is the value itself.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_MAY_CHANGE = {"recipe", "data.workers", "data.on_bad_image", "data.val_split", "data.refine"}
_MAY_CHANGE |= {"train.epochs", "train.max_steps"}
# A run may be resumed on a machine with less memory, or on more ranks.
_MAY_CHANGE |= {"train.micro_batch", "train.checkpoint_activations", "train.shard_towers", "train.compile"}
_MAY_CHANGE |= {"train.log_every", "train.save_every", "train.keep_last", "train.trackers"}
# Naming the commit allows resuming after the branch has moved. The towers' hashes are compared in
# any case.
_MAY_CHANGE |= {"model.vision.revision", "model.text.revision"}


def refuse_other_run(before: RunConfig, now: RunConfig, where: Path) -> None:
    """Check that a run can be resumed with a configuration.

    Only the length of the run and its bookkeeping may differ.

    Args:
        before: the configuration in the run's folder.
        now: the configuration it is to be resumed with.
        where: the run's folder, for error messages.

    Raises:
        DcrisError: names the first setting that differs.
    """
    old, new = _flatten(before.model_dump()), _flatten(now.model_dump())
    keys = sorted(old.keys() | new.keys())
    # Augmentations are applied in their order, which dictionaries do not compare.
    order = "data.augmentations"
    old[order], new[order] = [*before.data.augmentations], [*now.data.augmentations]
    for key in (*keys, order):
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE):
            raise DcrisError(
                f"the run in {where} was started with {key} = {json.dumps(old.get(key))}, not "
                f"{json.dumps(new.get(key))}; resume it with the same settings, or choose another --out"
            )


_SAME_WEIGHTS = ("model.", "data.mean", "data.std")
"""Settings that decide what a network computes with its weights."""
_ELSEWHERE = {f"model.{tower}.{key}" for tower in ("vision", "text") for key in ("name", "revision")}
_ELSEWHERE |= {"model.head.presence"}


def other_network(before: RunConfig, now: RunConfig) -> list[str]:
    """Return how a network differs from the one that weights were trained in, such as
    "model.method.scale = 1.0, not 2.0".

    Presence heads, and the files of encoders, are left out: they are compared by their weights.

    Args:
        before: the configuration that the weights were trained with.
        now: that of the network that they are loaded into.
    """
    old, new = _flatten(before.model_dump()), _flatten(now.model_dump())
    return [
        f"{key} = {json.dumps(old.get(key))}, not {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if key.startswith(_SAME_WEIGHTS) and key not in _ELSEWHERE and old.get(key) != new.get(key)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _first_error(error: ValidationError) -> str:
    first: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")  # pydantic's mark of a dictionary's key
    if first["type"] == "extra_forbidden":
        return f"unknown setting {key}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" if key else message
