"""Take over or refuse the modules of an encoder whose result depends on more than an image.

BatchNorm over what one process happens to hold, and draws from a generator that has a state, would
make a run another one on another number of GPUs. Only modules are seen, not what a ``forward``
calls by itself.
"""

from __future__ import annotations

import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from moco_scale.models.batchnorm import GroupedBatchNorm, GroupedBatchNorm1d, GroupedBatchNorm2d
from moco_scale.models.stochastic_depth import StochasticDepth
from moco_scale.utils.errors import UserError

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: GroupedBatchNorm1d,
    nn.BatchNorm2d: GroupedBatchNorm2d,
    torchvision.ops.StochasticDepth: StochasticDepth,
}

_ALWAYS_DRAW = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_MAY_DRAW = (
    *(nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase),
    torchvision.ops.StochasticDepth,
)


def adopt(model: nn.Module) -> None:
    """Change the class of what has a form of ours; parameters, buffers and names stay.

    Raises:
        UserError: the modules that normalise over a batch, or draw, and have none.
    """
    wrong = []
    for name, module in model.named_modules():
        if (problem := _problem(module)) is not None:
            kind = type(module)
            wrong.append(f"{name} ({kind.__module__}.{kind.__qualname__}) {problem}")
        elif type(module) in OURS and not _idle(module):
            module.__class__ = OURS[type(module)]
    if wrong:
        more = f"\n  and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        listed = "\n  ".join(wrong[:3])
        raise UserError(
            f"what this encoder computes would depend on the number of GPUs:\n  {listed}{more}"
        )


def _problem(module: nn.Module) -> str | None:
    """Describe what is wrong with a module, and what to do; None: nothing, or it becomes ours."""
    if isinstance(module, _BatchNorm):
        if type(module) not in OURS and not isinstance(module, GroupedBatchNorm):
            return (
                "normalises over the images that a process holds; use torch.nn.BatchNorm1d or "
                "BatchNorm2d, which become groups of --bn-group-size, or a LayerNorm or GroupNorm"
            )
        if not module.track_running_stats or module.momentum is None:
            return "must have running statistics with a momentum, which evaluation uses"
    elif isinstance(module, _NormBase) and module.track_running_stats:
        return "keeps statistics of the images that a process holds; set track_running_stats=False"
    elif isinstance(module, _ALWAYS_DRAW):
        return (
            "draws from the global generator; use a module that does not, such as LeakyReLU or "
            "MaxPool2d"
        )
    elif _may_draw(module) and not _idle(module):
        return (
            "draws from the global generator; set its probability to 0, or use "
            'torchvision.ops.StochasticDepth of mode "row", whose draws become a function of seed '
            "and image"
        )
    return None


def _may_draw(module: nn.Module) -> bool:
    if type(module) is torchvision.ops.StochasticDepth:
        return module.mode != "row"
    # DropPath, DropBlock and the like have many authors and no common class.
    return not isinstance(module, StochasticDepth) and (
        isinstance(module, _MAY_DRAW) or "Drop" in type(module).__name__
    )


def _idle(module: nn.Module) -> bool:
    """Tell whether a module has a probability of dropping something, and it is 0."""
    names = ("p", "dropout", "drop_prob", "prob")
    rates = [getattr(module, name) or 0 for name in names if hasattr(module, name)]
    return bool(rates) and not any(rates)
