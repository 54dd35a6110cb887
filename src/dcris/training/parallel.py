"""Training on several processes: a batch divided among them, batch norm over all of them, sharded towers.

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
from dcris.models.encoders.clip_text import TextTower
from dcris.models.encoders.vit import VisionTower
from dcris.utils.distributed import Processes, connection_errors


def divide_batch(batch: int, micro_batch: int | None, group: Processes) -> list[range]:
    """Which places of a global batch this process takes, one range for each pass through the network.

    First the batch is divided into passes, then each pass among the processes, as evenly as whole samples allow. So what a
    pass holds depends on the product of `micro_batch` and the number of processes alone.

    Args:
        batch: samples in the global batch.
        micro_batch: at most so many samples per process and pass; None for one pass.
        group: the processes.

    Raises DcrisError where some process would have nothing to do in a pass.
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


# ---- batch norm over all processes ---------------------------------------------------------------------------------------


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the samples of all processes, with the parameters and buffers of the one it replaces.

    torch's own does this on CUDA alone. Statistics are combined from each process's mean and squared deviations, not from sums
    of squares, which lose digits; processes may hold different numbers of samples.
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
        """Any number of dimensions will do."""


class _Normalise(torch.autograd.Function):
    """Returns the normalised tensor, the mean [C], the biased variance [C] and the number of samples in all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(_wide(x), over, correction=0)
        mine = torch.cat((mean, variance, mean.new_tensor([x.numel() / x.shape[1]])))
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        with connection_errors():
            distributed.all_gather(everyone, mine)
        table = torch.stack(everyone)
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
        y = _wide(x) * factor.view(shape) + (bias - mean * factor).view(shape)
        return y.to(x.dtype), mean, variance, samples

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        over, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        upstream = _wide(gradient)
        normed = (_wide(x) - mean.view(shape)) * scale.view(shape)
        to_bias, to_weight = upstream.sum(over), (upstream * normed).sum(over)
        # The gradients of weight and bias are this process's own part, as those of all other weights; what comes through the
        # statistics is everyone's.
        sums = torch.stack((to_bias, to_weight))
        with connection_errors():
            distributed.all_reduce(sums)
        by_mean, by_scale = sums / ctx.samples
        to_x = (upstream - by_mean.view(shape) - normed * by_scale.view(shape)) * (weight * scale).view(shape)
        return to_x.to(x.dtype), to_weight, to_bias, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace every batch norm of a model; its parameters and buffers stay the same objects under the same names."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child))


# ---- towers that do not fit ----------------------------------------------------------------------------------------------


def shard_towers(towers: Sequence[VisionTower | TextTower], device: torch.device, group: Processes) -> None:
    """Spread the weights of the towers' attentions and MLPs over all processes (FSDP2); each is whole only while it works.

    The unit is half a block: what adapters are in stays outside, so their parameters, gradients and names are as before. The
    rest of a tower (embeddings, norms) is whole everywhere. From here on every process has to run the towers equally often.

    Raises DcrisError where there is one process alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if group.count == 1:
        raise DcrisError(
            "train.shard_towers needs several processes to shard over; start them with torchrun, or leave it off"
        )
    # Nothing here writes into what an attention or an MLP returned, which is what FSDP2 warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (group.count,))
    for tower in towers:
        for block in tower.blocks:
            for part in (block.attention, block.mlp):
                assert isinstance(part, nn.Module)
                # Said explicitly, as each part is a root of its own, and roots stay whole by default.
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
