"""Trace of one rank's forward and backward passes: FLOPs, bytes moved, memory held.

The model runs on fake tensors, which have shapes and lifetimes but no contents, so that a step of
any size is traced in seconds on any machine. Each PyTorch operator of the query's forward and
backward pass and of the key's forward pass counts.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import conv_flop_count, flop_registry

from moco_scale.config.schema import Config
from moco_scale.data.sampling.order import Samples
from moco_scale.engines.base import PRECISIONS
from moco_scale.engines.blocks import transform_blocks
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import GroupedBatchNorm
from moco_scale.models.encoder import build_encoder
from moco_scale.models.stochastic_depth import Crops, encoding


@dataclass(frozen=True)
class Kernel:
    """Work of one operator.

    Attributes:
        flops: multiplications and additions of a matrix product; else 0.
        moved: bytes of its inputs and outputs.
        half: its result is in half precision.
        times: how often it runs.
    """

    flops: int
    moved: int
    half: bool
    times: float = 1.0


@dataclass(frozen=True)
class Trace:
    """Kernels and memory of one rank's step.

    Attributes:
        query: kernels of the query's forward passes.
        key: kernels of the key's.
        backward: kernels of the backward passes.
        held: bytes kept for the backward pass after the query's forward pass.
        peak: the most bytes at any time, without parameters, their gradients and the query's crops.
        peak_with_gradients: the same with the parameters' gradients.
    """

    query: list[Kernel]
    key: list[Kernel]
    backward: list[Kernel]
    held: int
    peak: int
    peak_with_gradients: int

    @property
    def flops(self) -> int:
        """Hardware FLOPs of a step on one rank."""
        return sum(k.flops for k in (*self.query, *self.key, *self.backward))


class _Recorder(TorchDispatchMode):
    """Records kernels and the bytes of all live storages.

    Args:
        ignored: storages that do not count.
        repeated: how many kernels, of smaller groups, each BatchNorm kernel stands for.
    """

    def __init__(self, ignored: set[int], repeated: float) -> None:
        super().__init__()
        self._repeated = repeated
        self.kernels: list[Kernel] = []
        self.live = self.peak = 0
        self._ignored = ignored
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        new = [t for t in results if self._is_new(t)]
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        computes = new and not func._schema.name.startswith("aten::empty")
        if computes or func._schema.is_mutable:  # a view moves nothing
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *results))
            flops = _flops(func, args, kwargs, out)
            half = bool(results) and results[0].element_size() == 2
            times = self._repeated if "batch_norm" in func._schema.name else 1.0
            self.kernels.append(Kernel(flops, round(moved / times), half, times))
            if times > 1 and "backward" in func._schema.name:
                # The groups that are not traced would add their weights' and biases' gradients.
                added = 3 * results[1].numel() * results[1].element_size()
                self.kernels.append(Kernel(0, added, False, 2 * (times - 1)))
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._known or place in self._ignored:
            return False

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[place]

        self._known[place] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        return True


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:
        # Each gradient takes what the forward pass took. torch counts that of a grouped
        # convolution's weights as if there were no groups.
        gradient, x, weight = (tensor.shape for tensor in args[:3])
        transposed, wanted = args[7], args[10]
        return sum(wanted[:2]) * int(conv_flop_count(x, weight, gradient, transposed))
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def build_model(config: Config) -> MoCo:
    """Build both encoders of a configuration on the meta device."""
    model = config.model
    with torch.device("meta"):
        return MoCo(
            build_encoder(
                model.model,
                width=model.model_width,
                stem=model.stem,
                head=model.head,
                dim=model.dim,
                image_size=config.data.image_size,
                patch_size=model.patch_size,
                train_patch_embedding=model.train_patch_embedding,
            )
        )


def trace_step(config: Config, world: int) -> Trace:
    """Trace the step of one of ``world`` ranks.

    A rank's BatchNorm groups are laid as in a run; a group that spans ranks counts as one of this
    rank's own images. All micro-batches of a step count, with the memory of one, as they follow
    one another. Instead of many groups a few larger ones are traced: their memory is the same, and
    each kernel counts as several.
    """
    micro_batches = config.run.accumulation_steps
    per_rank = config.optim.batch_size // world
    rows, size = per_rank // micro_batches, config.data.image_size
    moco = build_model(config)
    moco.compute_dtype = PRECISIONS[config.run.precision]
    groups = max(rows // config.model.bn_group_size, 1)
    traced = _stand_in(groups)
    for module in moco.modules():
        if isinstance(module, GroupedBatchNorm):
            module.local_groups = traced
    transform_blocks(moco, compiled=False, checkpointed=config.run.activation_checkpointing)
    views = 2 if config.contrast.symmetric else 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(moco)
        weights = {t.untyped_storage()._cdata for t in (*moco.parameters(), *moco.buffers())}
        # Augmented crops, in fp32. The query's exist before the step and after it.
        crops = [torch.empty(rows, 3, size, size) for _ in range(views)]
        ignored = weights | {t.untyped_storage()._cdata for t in crops}
        whole = Crops(0, Samples(np.arange(per_rank), np.zeros(per_rank, np.int64)), (0, 1))
        names = whole._replace(samples=whole.samples.part(0, rows))
        with _Recorder(ignored, groups / traced) as recorder:
            marks = [0]
            with encoding(names):
                queries = moco(*crops)
            held = recorder.live
            marks.append(len(recorder.kernels))
            with torch.no_grad(), encoding(whole):
                for _ in range(views):
                    moco.keys(torch.empty(per_rank, 3, size, size), micro_batches)
            marks.append(len(recorder.kernels))
            forward_peak = recorder.peak
            recorder.peak = recorder.live
            without, everything = _backward(moco, queries, recorder)
        kernels = recorder.kernels
    sections = [kernels[a:b] for a, b in zip(marks, [*marks[1:], len(kernels)], strict=True)]
    return Trace(
        query=sections[0] * micro_batches,
        key=sections[1],
        backward=sections[2] * micro_batches,
        held=held,
        peak=max(forward_peak, without),
        peak_with_gradients=max(forward_peak, everything),
    )


def _stand_in(groups: int) -> int:
    """Smallest number of equal groups, at least two, that can stand for `groups`."""
    return next((n for n in range(2, groups) if groups % n == 0), groups)


def _backward(moco: MoCo, queries: list[Tensor], recorder: _Recorder) -> tuple[int, int]:
    """Run the backward pass; return peak bytes without and with the parameters' gradients."""
    kept = without = everything = 0

    def account(parameter: Tensor | None = None) -> None:
        nonlocal kept, without, everything
        without = max(without, recorder.peak - kept)
        everything = max(everything, recorder.peak)
        recorder.peak = recorder.live
        if parameter is not None:  # its gradient is complete: the engine's from here on
            assert parameter.grad is not None
            kept += parameter.grad.untyped_storage().nbytes()

    trained = [p for p in moco.query.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(account) for p in trained]
    torch.stack([query.sum() for query in queries]).sum().backward()
    account()
    for hook in hooks:
        hook.remove()
    return without, everything


def _materialise(module: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones, in place."""
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                each._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in each._buffers.items():
            if b is not None:
                each._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
