"""Activation checkpointing: a second forward pass in the backward pass instead of stored
activations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(owner: nn.Module, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return function(*arguments), storing only the arguments for the backward pass.

    Loss and gradients equal those of a plain call: dropout draws the same numbers again, and the
    batch norms of `owner`, the module that the function belongs to, do not update their running
    statistics in the second pass.
    """
    result: Tensor = checkpoint(
        function, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(owner))
    )
    return result


@contextmanager
def frozen_statistics(owner: nn.Module) -> Iterator[None]:
    """Keep the batch norms inside `owner` from updating their running statistics.

    Uses a momentum of 0, not track_running_stats = False: that would make autograd save fewer
    tensors than in the first pass, which torch refuses.
    """
    norms = [module for module in owner.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
