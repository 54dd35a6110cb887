"""How adapters get into the towers, and what trains.

An adapter is a Slot (dcris.models.encoders.blocks). A method is one file of this folder: its slots, and its settings (a
dcris.config.MethodConfig), which put them in. Everything that a method adds to a tower sits in a slot, so its weights have
`_slot.` in their names, and a tower's own weights do not.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from dcris.models.encoders.blocks import Block, Slot

Place = Literal["token_slot", "qkv_slot", "attention_slot", "mlp_slot"]
PLACES: tuple[Place, ...] = ("token_slot", "qkv_slot", "attention_slot", "mlp_slot")


def attach(blocks: nn.ModuleList, layers: Iterable[int], place: Place, make: Callable[[], Slot]) -> None:
    """Put an adapter made by `make()` into the named slot of the blocks numbered `layers` (from 0)."""
    for layer in layers:
        put(blocks[layer], place, make())


def put(block: nn.Module, place: Place, adapter: Slot) -> None:
    """Put an adapter into the named slot of a block."""
    assert isinstance(block, Block)
    setattr(block.attention if place == "qkv_slot" else block, place, adapter)


def attach_everywhere(towers: Iterable[Any], place: Place, make: Callable[[int], Slot]) -> None:
    """Put an adapter made by `make(tower's width)` into the named slot of every block of the towers."""
    for tower in towers:
        attach(tower.blocks, range(len(tower.blocks)), place, partial(make, tower.config.width))


def adapters(tower: nn.Module) -> list[Slot]:
    """Every adapter of a tower, in the order in which they run; empty slots are not among them."""
    return [module for module in tower.modules() if isinstance(module, Slot) and type(module) is not Slot]


def freeze(tower: nn.Module, trains: Callable[[str], bool] = lambda name: False) -> None:
    """Exclude a tower from training, but not what sits in its slots, nor its own weights whose names `trains` picks."""
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(trains(name))
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
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    owners = {name.rpartition(".")[0] for name, trained in trains.items() if trained}
    return {
        name: value
        for name, value in model.state_dict().items()
        if trains.get(name, name.rpartition(".")[0] in owners)  # what is no parameter is a buffer
    }


def merge(tower: nn.Module) -> bool:
    """Fold every adapter of a tower into the weights of its block and empty the slots. False where one cannot be folded.

    The tower then gives the same up to rounding, with nothing in its slots; where this is False, some may be left.
    """
    for block in [module for module in tower.modules() if isinstance(module, Block)]:
        for place in PLACES:
            slot = getattr(block.attention if place == "qkv_slot" else block, place)
            if type(slot) is not Slot:
                if not slot.merge(block):
                    return False
                put(block, place, Slot())
    return True
