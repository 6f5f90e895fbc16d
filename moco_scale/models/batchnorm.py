"""BatchNorm whose statistics belong to groups of samples, not to whatever one GPU holds.

A group is ``group_size`` consecutive samples of the global batch. It may be part of one process's
batch (several groups there), all of it (then this *is* BatchNorm), or span several neighbouring
ranks (then it is SyncBatchNorm over them). Statistics and parameters are fp32 whatever the
activations are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_scale.distributed import collectives
from moco_scale.utils.errors import UserError


class GroupedBatchNorm(_BatchNorm):
    """BatchNorm over groups of consecutive samples; same parameters, buffers and names as torch's.

    Before :func:`set_groups` is called it is plain BatchNorm. Running statistics take the mean
    over this process's groups, so that their mean over ranks is what one process would have.
    :func:`set_part` does the same for a step that is computed in parts.
    """

    local_groups: int = 1
    span: collectives.Subgroup | None = None
    share: Tensor | None = None
    counts: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] in any floating dtype -> the same shape and dtype.

        Raises:
            ValueError: in training, N is not a multiple of the number of groups.
        """
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps
            )
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None and self.momentum is not None
        momentum: float | Tensor = self.momentum
        if _kept:
            mean, var = mean.clone(), var.clone()
        elif self.counts and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.share is not None:
            momentum = self.share
        if self.span is not None:
            return _SpanningBatchNorm.apply(
                x, weight, bias, mean, var, momentum, self.eps, self.span
            )
        if self.local_groups == 1 and isinstance(momentum, float):
            return F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)
        groups = self.local_groups
        if x.shape[0] % groups:
            raise ValueError(f"{x.shape[0]} samples do not make {groups} BatchNorm groups")
        # A share is a tensor, which batch_norm does not take: let it leave the statistics alone.
        rate = momentum if isinstance(momentum, float) else 1.0
        means, variances = mean.repeat(groups, 1), var.repeat(groups, 1)
        if rate == 1.0:
            means, variances = torch.zeros_like(means), torch.zeros_like(variances)
        out = torch.cat(
            [
                F.batch_norm(part, means[g], variances[g], weight, bias, True, rate, self.eps)
                for g, part in enumerate(x.chunk(groups))
            ]
        )
        if isinstance(momentum, float):
            mean.copy_(means.mean(0))
            var.copy_(variances.mean(0))
        else:
            mean.lerp_(means.mean(0), momentum)
            var.lerp_(variances.mean(0), momentum)
        return out


class GroupedBatchNorm1d(GroupedBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d of [N, C] or [N, C, L] over groups."""


class GroupedBatchNorm2d(GroupedBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d of [N, C, H, W] over groups."""


_kept = False


@contextlib.contextmanager
def statistics_kept() -> Iterator[None]:
    """Forward passes within leave running statistics as they are: they are repetitions."""
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


class StatisticsBefore:
    """Running statistics as they were before a step, which may be left out in the end.

    One copy of a model's statistics, written in a few kernels a step: 0.2 MB for an encoder with
    ResNet-50's 26,560 channels.

    Args:
        model: whose :class:`GroupedBatchNorm` modules count; with their buffers where they
            will stay from the first :meth:`note` on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._now: list[list[Tensor]] = []
        self._before: list[list[Tensor]] = []
        self._noted = False

    def note(self) -> None:
        """Take the copy, unless this step has taken it."""
        if self._noted:
            return
        self._noted = True
        if not self._now:
            norms = [m for m in self._model.modules() if isinstance(m, GroupedBatchNorm)]
            buffers = [b for m in norms for b in m.buffers(recurse=False)]
            # Each kind together: tensors of one dtype are copied by one kernel.
            kinds = [
                [b for b in buffers if b.is_floating_point() is kind] for kind in (True, False)
            ]
            self._now = [kind for kind in kinds if kind]
            self._before = [[torch.empty_like(b) for b in kind] for kind in self._now]
        self._copy(self._now, self._before)

    def settle(self, applied: bool) -> None:
        """The step is over: forget the copy, or put it back if the step was left out."""
        if self._noted and not applied:
            self._copy(self._before, self._now)
        self._noted = False

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[list[Tensor]], target: list[list[Tensor]]) -> None:
        for there, here in zip(target, source, strict=True):
            torch._foreach_copy_(there, here)


def set_part(model: nn.Module, part: int, parts: int, view: int = 0, views: int = 1) -> None:
    """Say which forward pass of a step comes next, so that running statistics end up the same.

    A step with V views makes V updates r <- (1 - m) r + m s, s being the mean over the parts'
    statistics. The passes come part by part and each moves r by its own share, chosen such that
    each statistic finally weighs what it would.

    Args:
        model: its :class:`GroupedBatchNorm` modules are set.
        part: of the step, from 0.
        parts: in a step; they are equally large.
        view: of the part, from 0.
        views: in a part.
    """
    for module in model.modules():
        if isinstance(module, GroupedBatchNorm):
            if module.share is None:
                # A tensor, because compiled code would be made again for each new number.
                module.share = torch.zeros((), device=module.running_mean.device)  # type: ignore[union-attr]
            assert module.momentum is not None
            module.share.fill_(_share(module.momentum, part, parts, view, views))
            module.counts = part == 0


def _share(momentum: float, part: int, parts: int, view: int, views: int) -> float:
    each = [momentum * (1 - momentum) ** (views - 1 - v) / parts for v in range(views)]
    after = sum(each[view + 1 :]) + (parts - 1 - part) * sum(each)
    return each[view] / (1 - after)


class _SpanningBatchNorm(torch.autograd.Function):
    """Training-mode BatchNorm of one group that spans the ranks of a block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float | Tensor,
        eps: float,
        span: collectives.Subgroup,
    ) -> Tensor:
        local_var, local_mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)
        # Chan et al.'s combination of equal-sized parts: no cancellation of large squares.
        parts = collectives.gather_stack(torch.stack([local_mean, local_var]), span)
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
        dy, dims = grads[0].float(), _all_but_channels(x)
        shape = (1, -1, *[1] * (x.ndim - 2))
        x_hat = (x.float() - mean.view(shape)) * rstd.view(shape)
        sums = torch.stack([dy.sum(dims), (dy * x_hat).sum(dims)])
        # The local sums are right for weight and bias: gradients are averaged over ranks anyway.
        grad_weight = sums[1].clone() if ctx.needs_input_grad[1] else None
        grad_bias = sums[0].clone() if ctx.needs_input_grad[2] else None
        collectives.sum_(sums, ctx.span.handle)
        sums /= ctx.count
        scale = rstd if weight is None else weight * rstd
        dx = (dy - sums[0].view(shape) - x_hat * sums[1].view(shape)) * scale.view(shape)
        return dx.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def set_groups(model: nn.Module, group_size: int, batch_size: int, parts: int = 1) -> None:
    """Lay BatchNorm groups over the ranks of this job.

    Every rank calls it, once, after the process group exists.

    Args:
        model: its :class:`GroupedBatchNorm` modules are set.
        group_size: samples of the global batch per group; ``batch_size`` is SyncBatchNorm.
        batch_size: samples of the global batch.
        parts: equal parts that a rank computes its share in, one after another.

    Raises:
        UserError: the groups tile neither the ranks nor the batch, or do not fit into a part.
    """
    layout = lay_groups(model, group_size, batch_size, collectives.world_size(), parts)
    span = collectives.neighbours(layout.ranks) if layout.ranks > 1 else None
    for module in model.modules():
        if isinstance(module, GroupedBatchNorm):
            module.local_groups, module.span = layout.local, span


class Layout(NamedTuple):
    """How BatchNorm groups lie.

    Attributes:
        local: whole groups of one process in one pass; 1 where a group spans processes.
        ranks: processes that share a group.
    """

    local: int
    ranks: int


def lay_groups(
    model: nn.Module, group_size: int, batch_size: int, world: int, parts: int = 1
) -> Layout:
    """Where the groups of a job of ``world`` processes lie; the other arguments as above.

    Raises:
        UserError: the groups tile neither the ranks nor the batch, or do not fit into a part.
    """
    per_rank = batch_size // world
    if parts > 1 and (per_rank % parts or per_rank // parts % group_size):
        _require_whole_parts(model, group_size, per_rank, parts, world)
    if not any(isinstance(m, GroupedBatchNorm) for m in model.modules()):
        return Layout(1, 1)
    if group_size <= per_rank and per_rank % group_size == 0:
        return Layout(max(per_rank // group_size // parts, 1), 1)
    if group_size % per_rank == 0 and batch_size % group_size == 0:
        return Layout(1, group_size // per_rank)
    fitting = [g for g in range(2, batch_size + 1) if _fits(g, per_rank, batch_size)]
    raise UserError(
        f"a BatchNorm group of {group_size} (--bn-group-size) does not fit {per_rank} images on "
        f"each of {world} processes (--batch-size {batch_size}): a group must be "
        f"a part of one process's images or span whole processes; "
        f"these fit: {', '.join(map(str, fitting))}"
    )


def _require_whole_parts(
    model: nn.Module, group_size: int, per_rank: int, parts: int, world: int
) -> None:
    place = f"{per_rank} images of each of {world} processes"
    if per_rank % parts:
        fitting = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise UserError(
            f"--accumulation-steps {parts} does not divide the {place}; "
            f"these do: {', '.join(map(str, fitting))}"
        )
    if any(isinstance(m, GroupedBatchNorm) for m in model.modules()):
        raise UserError(
            f"--accumulation-steps {parts}: a part has {per_rank // parts} of the {place}, which "
            f"BatchNorm groups of {group_size} (--bn-group-size) do not tile; use fewer parts"
        )


def spans_ranks(model: nn.Module) -> bool:
    """Whether some BatchNorm group of the model is shared by several ranks."""
    return any(isinstance(m, GroupedBatchNorm) and m.span is not None for m in model.modules())


def _fits(group_size: int, per_rank: int, batch_size: int) -> bool:
    if group_size <= per_rank:
        return per_rank % group_size == 0
    return group_size % per_rank == 0 and batch_size % group_size == 0
