"""How adapters get into the towers, and what trains.

An adapter is a Slot (dcris.encoders.blocks). A method is one file with its slots, and the
lines of dcris.model.dcris that attach them.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn

from dcris.encoders.blocks import Block, Slot

Place = Literal["attention_slot", "mlp_slot"]


def attach(blocks: nn.ModuleList, layers: Iterable[int], place: Place, make: Callable[[], Slot]) -> None:
    """Put an adapter made by `make()` into the named slot of the blocks numbered `layers` (from 0)."""
    for layer in layers:
        block = blocks[layer]
        assert isinstance(block, Block)
        setattr(block, place, make())


def adapters(tower: nn.Module) -> list[Slot]:
    """Every adapter of a tower, in the order in which they run; empty slots are not among them."""
    return [module for module in tower.modules() if isinstance(module, Slot) and type(module) is not Slot]


def freeze(tower: nn.Module) -> None:
    """Exclude a tower from training, but not what sits in its slots."""
    tower.requires_grad_(False)
    for adapter in adapters(tower):
        adapter.requires_grad_(True)


def set_mode(tower: nn.Module, training: bool) -> None:
    """A frozen tower stays in evaluation mode; what sits in its slots follows `training`."""
    tower.eval()
    for adapter in adapters(tower):
        adapter.train(training)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: every trainable weight, and the buffers (batch norm statistics) beside them.

    A buffer belongs to the trained part if the module that owns it has a weight that is.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained}
    return {
        name: value
        for name, value in model.state_dict().items()
        if name in trained or name.rpartition(".")[0] in owners
    }
