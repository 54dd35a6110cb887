"""Training on several processes: dividing a batch, batch norm over all ranks, sharded towers.

Shape letters: B batch, C channels, * any further dimensions.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dcris.errors import DcrisError
from dcris.models.encoders.blocks import Block
from dcris.models.encoders.text import TextTower
from dcris.models.encoders.vit import VisionTower
from dcris.utils.distributed import Processes, connection_errors


def divide_batch(batch: int, micro_batch: int | None, group: Processes) -> list[range]:
    """Return this process's places in a batch, one range for each pass through the network.

    The batch is divided into passes, then each pass among the ranks, as evenly as whole samples
    allow. So the samples of a pass depend only on `micro_batch` times the number of ranks.

    Args:
        batch: samples in the whole batch.
        micro_batch: most samples per rank and pass; None for one pass.
        group: the processes.

    Raises:
        DcrisError: some rank would have no sample in a pass.
    """
    passes = 1 if micro_batch is None else -(-batch // (micro_batch * group.count))
    if batch // passes < group.count:
        what = f"a batch of {batch}" + (f" in {passes} passes" if passes > 1 else "")
        advice = "raise train.micro_batch or start fewer" if passes > 1 else "start fewer, or raise train.batch_size"
        raise DcrisError(f"{what} leaves some of {group.count} processes without a sample; {advice}")
    ranges = []
    for number in range(passes):
        start, stop = batch * number // passes, batch * (number + 1) // passes
        size = stop - start
        ranges.append(range(start + size * group.rank // group.count, start + size * (group.rank + 1) // group.count))
    return ranges


# ---- batch norm over all ranks -----------------------------------------------------------------


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the samples of all ranks, with the parameters and buffers of the module it
    replaces.

    torch's SyncBatchNorm works on CUDA only. Statistics are combined from each rank's mean and
    squared deviations and not from sums of squares, which lose digits. Ranks may hold different
    numbers of samples.

    Args:
        replaced: the batch norm whose place it takes.
    """

    def __init__(self, replaced: nn.modules.batchnorm._BatchNorm) -> None:
        assert replaced.momentum is not None and replaced.track_running_stats and replaced.affine
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum)
        self.weight, self.bias = replaced.weight, replaced.bias
        self.running_mean, self.running_var = replaced.running_mean, replaced.running_var
        self.num_batches_tracked = replaced.num_batches_tracked
        self.train(replaced.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, *]."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y, mean, variance, samples = _Normalise.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (samples / (samples - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""


class _Normalise(torch.autograd.Function):
    """Returns the normalised tensor; over all ranks: mean [C], biased variance [C], number of
    values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(_in_float32(x), dims, correction=0)
        own = torch.cat((mean, variance, mean.new_tensor([x.numel() / x.shape[1]])))
        of_all = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        with connection_errors():
            distributed.all_gather(of_all, own)
        table = torch.stack(of_all)
        means, variances = table[:, :-1].chunk(2, dim=1)
        shares = table[:, -1:] / table[:, -1].sum()
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.samples = samples = table[:, -1].sum()
        ctx.mark_non_differentiable(mean, variance, samples)
        factor = weight * scale
        shape = [1, -1, *[1] * (x.dim() - 2)]
        y = _in_float32(x) * factor.view(shape) + (bias - mean * factor).view(shape)
        return y.to(x.dtype), mean, variance, samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        grad_y = _in_float32(gradient)
        normed = (_in_float32(x) - mean.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = grad_y.sum(dims), (grad_y * normed).sum(dims)
        # The gradients of weight and bias stay this rank's part, as those of all other weights; the
        # gradient through the statistics needs the sum over all ranks.
        sums = torch.stack((grad_bias, grad_weight))
        with connection_errors():
            distributed.all_reduce(sums)
        by_mean, by_scale = sums / ctx.samples
        grad_x = (grad_y - by_mean.view(shape) - normed * by_scale.view(shape)) * (weight * scale).view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _in_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace the batch norms of a model; parameters, buffers and names stay the same."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child))


# ---- sharded towers ----------------------------------------------------------------------------


def shard_towers(towers: Sequence[VisionTower | TextTower], device: torch.device, group: Processes) -> None:
    """Spread the weights of the towers' attentions and MLPs over all ranks (FSDP2); a module is
    whole only while it runs.

    The unit is half a block. What is trained stays whole, also inside of these modules, so its
    parameters, gradients and names do not change. So does the rest of a tower (embeddings, norms).
    From here on, all ranks have to run the towers equally often.

    Raises:
        DcrisError: there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if group.count == 1:
        raise DcrisError("train.shard_towers needs several processes; start them with torchrun, or leave it off")
    # FSDP2 warns of writing into what a sharded module returned; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (group.count,))
    for tower in towers:
        for block in [block for block in tower.blocks if isinstance(block, Block)]:
            for module in (block.attention, block.mlp):
                trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
                # Set explicitly: each module is a root of its own, and roots stay whole by default.
                fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
