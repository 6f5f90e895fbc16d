"""Interface between the training loop and an engine."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moco_scale.distributed import collectives
from moco_scale.engines.blocks import transform_blocks
from moco_scale.methods.moco import MoCo, momentum_update
from moco_scale.models.batchnorm import StatisticsBefore
from moco_scale.models.encoder import Encoder
from moco_scale.models.registry import attends
from moco_scale.optim.loss_scale import LossScale, LossScaling
from moco_scale.utils import determinism

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


Keep = Callable[[str], bool]


def everything(name: str) -> bool:
    """Keep every name."""
    return True


@dataclass(frozen=True)
class EngineSettings:
    """Settings of training, the same for every engine.

    Attributes:
        momentum: of SGD.
        weight_decay: of SGD, on every trained parameter.
        precision: of the encoders' computation, a key of :data:`PRECISIONS`.
        clip_norm: upper bound of the norm of all gradients together; 0: none.
        micro_batches: of a step.
        compile: compile blocks.
        activation_checkpointing: of the query's blocks.
        shard_size: FSDP shards over so many neighbouring ranks; 0: over all.
        scaling: fp16's loss scale.
    """

    momentum: float
    weight_decay: float
    precision: str = "fp32"
    clip_norm: float = 0.0
    micro_batches: int = 1
    compile: bool = False
    activation_checkpointing: bool = False
    shard_size: int = 0
    scaling: LossScaling = field(default_factory=LossScaling)


class Engine(ABC):
    """Trains a :class:`MoCo` on all ranks in one particular way.

    The module has its initial or resumed weights when an engine is made. Gradients are averaged
    over the ranks. Weights and key encoder are stored in fp32; the precision is that of the
    encoders' computation, and with fp16 the loss is scaled.

    Attributes:
        moco: the module itself; where an engine shards, its parameters are shards.
        settings: as given.
        device: of the module.
        loss_scale: with fp16, else None.
        notes: lines for the log: settings that were changed, and why.
        own_groups: the engine has communicators besides that of all ranks.
    """

    own_groups: bool = False

    def __init__(self, moco: MoCo, settings: EngineSettings, device: torch.device) -> None:
        self.moco, self.settings, self.device = moco, settings, device
        self.notes: list[str] = []
        moco.compute_dtype = PRECISIONS[settings.precision]
        half = settings.precision == "fp16"
        self.loss_scale = LossScale(settings.scaling) if half else None
        self._statistics = StatisticsBefore(moco)
        attention_on_gpu = device.type == "cuda" and attends(moco)
        self._repeats_attention = attention_on_gpu and determinism.can_repeat()
        if attention_on_gpu and not self._repeats_attention:
            self.notes.append(
                "CUBLAS_WORKSPACE_CONFIG is neither :4096:8 nor :16:8: a transformer's gradients, "
                "and so a resumed run, are reproducible to rounding only"
            )
        transform_blocks(
            moco, compiled=settings.compile, checkpointed=settings.activation_checkpointing
        )

    def query(self, *views: Tensor, micro_batch: int = 0) -> list[Tensor]:
        """Encode the query of each view, differentiably: fp32 unit rows [B, dim].

        Each micro-batch is followed by its :meth:`backward`; after the last, the gradients are
        those of the step.
        """
        micro_batches = self.settings.micro_batches
        self._snapshot_statistics()
        self._start_micro_batch(last=micro_batch == micro_batches - 1)
        with self._pass():
            return self._forward(*views, micro_batch=micro_batch, micro_batches=micro_batches)

    def key(self, view: Tensor) -> Tensor:
        """Encode the keys of a view, without gradient: fp32 unit rows [B, dim]."""
        self._snapshot_statistics()
        with self._pass():
            return self.moco.keys(view, self.settings.micro_batches)

    def _pass(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a forward or backward pass."""
        return determinism.repeatable() if self._repeats_attention else contextlib.nullcontext()

    def _snapshot_statistics(self) -> None:
        """Take a snapshot before the step's first forward pass, where the step may be skipped."""
        if self._may_skip():
            self._statistics.note()

    def _may_skip(self) -> bool:
        """Tell whether :meth:`step` can return False."""
        return self.loss_scale is not None

    def _start_micro_batch(self, last: bool) -> None:  # noqa: B027
        """Start a micro-batch; gradients are synchronised in the last one."""

    @abstractmethod
    def _forward(self, *views: Tensor, micro_batch: int, micro_batches: int) -> list[Tensor]:
        """Call MoCo's forward through its wrapper."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss.

        Args:
            loss: mean over the micro-batch's samples on this rank, divided by the number of
                micro-batches.
        """
        with self._pass():
            self._backward(loss)

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Implement :meth:`backward` through the module's wrapper."""

    def step(self, learning_rate: float) -> bool:
        """Take an optimizer step and clear the gradients. False: the step was skipped.

        A skipped step changes no weights and rolls back running statistics to before its forward
        passes, whose activations may have overflowed.
        """
        applied = self._step(learning_rate)
        self._statistics.settle(applied)
        return applied

    @abstractmethod
    def _step(self, learning_rate: float) -> bool:
        """Implement :meth:`step` without running statistics; all ranks return the same."""

    def when_differentiated(self, action: Callable[[], None]) -> None:
        """Call something when this rank's own work of a backward pass is done.

        Only the sums over ranks are then left. (Engines that shard weights wait for each block
        before that, too.)
        """
        # Gradients arrive from the last layer to the first.
        first = next(iter(self.moco.trained_parameters().values()))
        first.register_post_accumulate_grad_hook(lambda _: action())

    def ema(self, momentum: float) -> None:
        """Move the key encoder towards the query: fp32, this rank's own storage, no messages."""
        query, key = self._local_pairs()
        momentum_update(key, query, momentum)

    def replicated(self) -> dict[str, list[Tensor]]:
        """Return weights that every rank holds whole: ``query`` and ``key``, or nothing."""
        return {}

    def weights_finite(self) -> Tensor:
        """Check that this rank's own storage of the query's weights is finite: bool scalar."""
        # A 2-norm is infinite or NaN when any element is, and on a CPU costs an eighth of other
        # norms. (Elements above 1e19, whose square overflows, are beyond saving too.)
        zero = torch.zeros(1, device=self.device)  # a rank may hold no element at all
        norms = torch._foreach_norm([zero, *(w for w in self._local_pairs()[0] if w.numel())])
        return torch.stack(norms).sum().isfinite()

    @abstractmethod
    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's storage of the query's parameters and, in that order, the key's."""

    @abstractmethod
    def model_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        """Return the full fp32 state of both encoders by name in MoCo; all ranks call it.

        Args:
            keep: names that this rank wants; the others it only helps to gather.
        """

    @abstractmethod
    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        """Return the whole query encoder for evaluation on each rank; all ranks call it.

        Args:
            fresh: makes an encoder of the same shape, filled where the engine's is sharded.
        """

    @abstractmethod
    def optimizer_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        """Return the full fp32 optimizer state as ``PARAMETER.STATE``; all ranks call it."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the state that :meth:`optimizer_state` of any engine returned."""

    @abstractmethod
    def storage(self) -> dict[str, list[Tensor]]:
        """Return this rank's own tensors: ``weights``, ``key``, ``gradients``, ``optimizer``.

        Between :meth:`backward` and :meth:`step`; for measuring, see :func:`storage_bytes`.
        """


def storage_bytes(storage: Mapping[str, list[Tensor]]) -> dict[str, int]:
    """Count bytes of storage by kind; storage that several kinds share counts for the first."""
    seen: set[int] = set()
    result = {}
    for kind, tensors in storage.items():
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        result[kind] = sum(n for place, n in pieces.items() if place not in seen)
        seen |= pieces.keys()
    return result


class Replicated:
    """Mixin of engines under which every rank holds both encoders whole."""

    moco: MoCo
    _pairs: tuple[list[Tensor], list[Tensor]] | None = None

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._pairs is None:  # once: the tensors stay the same objects for the whole run
            query, key = self.moco.parameter_pairs()
            self._pairs = [w.detach() for w in query], key
        return self._pairs

    def replicated(self) -> dict[str, list[Tensor]]:
        query, key = self._local_pairs()
        return {"query": query, "key": key}

    def model_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        return {name: t for name, t in self.moco.state_dict().items() if keep(name)}

    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        return self.moco.query


MOMENTUM = "momentum_buffer"


def make_sgd(parameters: list[nn.Parameter], settings: EngineSettings) -> torch.optim.SGD:
    """Make torch's SGD; its learning rate is set before every step."""
    return torch.optim.SGD(
        parameters, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a zero momentum buffer, so that a state exists to be saved or loaded.

    The first step makes the same buffer as without.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p][MOMENTUM] = torch.zeros_like(p)


@torch.no_grad()
def clip_(gradients: list[Tensor], norm: float, copies: int) -> None:
    """Clip gradients, in place, to a norm of all of them together, without a device sync.

    Args:
        gradients: this rank's own storage.
        norm: upper bound.
        copies: ranks that hold the same numbers as this one; the others hold other shards.
    """
    zero = torch.zeros(1, device=collectives.device())  # a rank may hold no element at all
    norms = torch._foreach_norm([zero, *(g for g in gradients if g.numel())])
    square = torch.stack(norms).square().sum()
    if copies < collectives.world_size():
        square = collectives.sum_(square) / copies
    torch._foreach_mul_(gradients, (norm / (square.sqrt() + 1e-6)).clamp(max=1.0))


def plain_step(
    engine: Engine,
    optimizer: torch.optim.Optimizer,
    gradients: list[Tensor],
    learning_rate: float,
    copies: int,
) -> bool:
    """Unscale, clip, step and clear; False: skipped, because scaled gradients were not finite.

    Args:
        engine: gives settings and loss scale.
        optimizer: torch's.
        gradients: this rank's own storage.
        learning_rate: of this step.
        copies: ranks that hold the same numbers as this one.
    """
    scale, clip_norm = engine.loss_scale, engine.settings.clip_norm
    applied = scale is None or scale.unscale(gradients)
    if applied:
        if clip_norm:
            clip_(gradients, clip_norm, copies)
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scale is not None:
        scale.update(applied)
    return applied
