"""BatchNorm whose statistics belong to groups of samples, not to whatever one GPU holds.

A group is ``group_size`` consecutive samples of the global batch. It may be part of one process's
batch (several groups there), all of it (then this *is* BatchNorm), or span several neighbouring
ranks (then it is SyncBatchNorm over them). Statistics and parameters are fp32 whatever the
activations are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_scale import distributed
from moco_scale.errors import UserError


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over groups of consecutive samples; same parameters, buffers and names.

    Before :func:`set_groups` is called it is plain BatchNorm. Running statistics take the mean
    over this process's groups, so that their mean over ranks is what one process would have.
    """

    local_groups: int = 1
    span: distributed.Subgroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] in any floating dtype -> the same shape and dtype.

        Raises:
            ValueError: in training, N is not a multiple of the number of groups.
        """
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps
            )
        assert self.running_mean is not None and self.running_var is not None
        momentum = self.momentum if self.momentum is not None else 0.1
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.span is not None:
            return _SpanningBatchNorm.apply(
                x, weight, bias, self.running_mean, self.running_var, momentum, self.eps, self.span
            )
        if self.local_groups == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, True, momentum, self.eps
            )
        groups = self.local_groups
        if x.shape[0] % groups:
            raise ValueError(f"{x.shape[0]} samples do not make {groups} BatchNorm groups")
        means = self.running_mean.repeat(groups, 1)
        variances = self.running_var.repeat(groups, 1)
        out = torch.cat(
            [
                F.batch_norm(part, means[g], variances[g], weight, bias, True, momentum, self.eps)
                for g, part in enumerate(x.chunk(groups))
            ]
        )
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return out


class _SpanningBatchNorm(torch.autograd.Function):
    """Training-mode BatchNorm of one group that spans the ranks of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        span: distributed.Subgroup,
    ) -> Tensor:
        local_var, local_mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        # Chan et al.'s combination of equal-sized parts: no cancellation of large squares.
        parts = distributed.gather_stack(torch.stack([local_mean, local_var]), span)
        mean = parts[:, 0].mean(0)
        var = parts[:, 1].mean(0) + (parts[:, 0] - mean).square().mean(0)
        count = x.numel() // x.shape[1] * span.size
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / max(count - 1, 1)), momentum)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.span, ctx.count = span, count
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = grads[0].float()
        shape = (1, -1, 1, 1)
        x_hat = (x.float() - mean.view(shape)) * rstd.view(shape)
        sums = torch.stack([dy.sum((0, 2, 3)), (dy * x_hat).sum((0, 2, 3))])
        grad_bias, grad_weight = sums[0].clone(), sums[1].clone()
        distributed.sum_(sums, ctx.span.handle)
        sums /= ctx.count
        dx = (dy - sums[0].view(shape) - x_hat * sums[1].view(shape)) * (weight * rstd).view(shape)
        # The local sums are right for weight and bias: gradients are averaged over ranks anyway.
        return dx.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


def set_groups(model: nn.Module, group_size: int, batch_size: int) -> None:
    """Lay BatchNorm groups over the ranks of this job.

    Every rank calls it, once, after the process group exists.

    Args:
        model: its :class:`GroupedBatchNorm2d` modules are set.
        group_size: samples of the global batch per group; ``batch_size`` is SyncBatchNorm.
        batch_size: samples of the global batch.

    Raises:
        UserError: the groups tile neither the ranks nor the batch.
    """
    per_rank = batch_size // distributed.world_size()
    groups, span = 1, None
    if group_size <= per_rank and per_rank % group_size == 0:
        groups = per_rank // group_size
    elif group_size % per_rank == 0 and batch_size % group_size == 0:
        span = distributed.neighbours(group_size // per_rank)
    else:
        fitting = [g for g in range(2, batch_size + 1) if _fits(g, per_rank, batch_size)]
        raise UserError(
            f"--bn-group-size {group_size} does not fit {per_rank} images on each of "
            f"{distributed.world_size()} processes (--batch-size {batch_size}): a group must be "
            f"a part of one process's images or span whole processes; "
            f"these fit: {', '.join(map(str, fitting))}"
        )
    for module in model.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.local_groups, module.span = groups, span


def spans_ranks(model: nn.Module) -> bool:
    """Whether some BatchNorm group of the model is shared by several ranks."""
    return any(isinstance(m, GroupedBatchNorm2d) and m.span is not None for m in model.modules())


def _fits(group_size: int, per_rank: int, batch_size: int) -> bool:
    if group_size <= per_rank:
        return per_rank % group_size == 0
    return group_size % per_rank == 0 and batch_size % group_size == 0
