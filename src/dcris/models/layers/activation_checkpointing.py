"""Activation checkpointing: what a layer would keep for its backward pass is made again there, by a second forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(owner: nn.Module, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """function(*arguments), of which nothing but the arguments is kept for the backward pass.

    Loss and gradients are those of a plain call: dropout draws the same numbers again, and the batch norms of `owner`, the
    module that the function is of, do not count the second pass into their running statistics.
    """
    result: Tensor = checkpoint(
        function, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(owner))
    )
    return result


@contextmanager
def statistics_kept(owner: nn.Module) -> Iterator[None]:
    """Batch norms inside `owner` work as before, but leave their running statistics alone.

    By a momentum of 0 and not by track_running_stats: without that, autograd keeps fewer tensors than in the first pass, which
    torch refuses.
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
