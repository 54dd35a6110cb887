"""How adapters are put into the towers, and which weights train.

Everything that a method adds to a tower is in a slot (dcris.models.encoders.blocks), so the names
of its weights contain `_slot.`, and those of the tower's own weights do not.
"""

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

from dcris.models.encoders.blocks import Block, EmptySlot, Place, Slot, SlottedBlock


def attach(blocks: Iterable[Any], place: Place, make: Callable[[int], Slot]) -> None:
    """Put a new adapter from `make(width of the block)` into the slot of each of the blocks."""
    for block in blocks:
        assert isinstance(block, SlottedBlock)
        block.put(place, make(block.width))


def attach_everywhere(towers: Iterable[Any], place: Place, make: Callable[[int], Slot]) -> None:
    """Put a new adapter from `make(width of the block)` into that slot of every block of the towers
    that has it.
    """
    for tower in towers:
        attach((block for block in tower.blocks if block.has(place)), place, make)


def adapters(tower: nn.Module) -> list[Slot]:
    """Return the adapters of a tower in the order in which they run, without empty slots."""
    return [module for module in tower.modules() if isinstance(module, Slot) and not isinstance(module, EmptySlot)]


def is_layer_norm(name: str) -> bool:
    """Return whether a tower's own weight of this name belongs to a layer norm."""
    return re.search(r"norm[12]?\.(weight|bias)$", name) is not None


def freeze(tower: nn.Module, trains: Callable[[str], bool] = lambda name: False) -> None:
    """Exclude a tower from training, except its adapters and the own weights that `trains` selects
    by name.
    """
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(trains(name))
    for adapter in adapters(tower):
        adapter.requires_grad_(True)


def set_mode(tower: nn.Module, training: bool) -> None:
    """Put a tower into evaluation mode, and its adapters into training mode if `training`."""
    tower.eval()
    for adapter in adapters(tower):
        adapter.train(training)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the content of a checkpoint: trained weights, and the buffers (batch norm statistics)
    beside them.

    A buffer is included if the module that owns it has a trained weight.
    """
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    owners = {name.rpartition(".")[0] for name, trained in trains.items() if trained}
    return {
        name: value
        for name, value in model.state_dict().items()
        if trains.get(name, name.rpartition(".")[0] in owners)  # names that are not parameters are buffers
    }


def fold(tower: nn.Module) -> None:
    """Fold every adapter of a tower into the weights of its block and empty the slots.

    The output stays the same up to rounding. Only for methods that are `foldable`.
    """
    for block in [module for module in tower.modules() if isinstance(module, Block)]:
        for place in chain.from_iterable(block.places):
            slot = block.slot(place)
            if not isinstance(slot, EmptySlot):
                slot.fold(block)
                block.put(place, EmptySlot())
