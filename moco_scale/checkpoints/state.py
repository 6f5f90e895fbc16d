"""State of a run, saved to and restored from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.config.schema import Config
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.distributed import collectives, consensus
from moco_scale.distributed.same_state import sampled_hash
from moco_scale.engines.base import MOMENTUM, Engine
from moco_scale.methods.key_queue import KeyQueue, share
from moco_scale.methods.moco import MoCo
from moco_scale.observe.finite import WEIGHTS
from moco_scale.observe.loggers import Meters


class Unlogged(TypedDict):
    """Log of a step whose evaluation is still to come; kept in the checkpoint."""

    record: dict[str, Any]
    line: str


class TrainedRun(Protocol):
    """Run, as far as checkpoints need it."""

    config: Config
    folder: RunFolder
    plan: BatchPlan
    device: torch.device
    rank: int
    world: int
    engine: Engine
    queue: KeyQueue
    meters: Meters
    step: int
    total_steps: int


# Tensors of the queue with a row for each slot.
_BY_SLOT = ("keys", "samples")
_SCALE = "loss_scale.state"


def read_state(
    run: TrainedRun, moco: MoCo, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the plain values and tensors of a checkpoint; each rank reads by itself.

    Each rank reads its own slots of the queue, whichever rank wrote them.

    Args:
        run: with a queue and meters, which the checkpoint must fit.
        moco: both encoders, before an engine exists.
        folder: of the checkpoint.

    Raises:
        UserError: On some rank the checkpoint cannot be read or does not fit the run.
    """
    queue = run.queue
    mine = checkpoint.Rows(queue.first, len(queue.keys), len(queue))
    rows = {f"queue.{name}": mine for name in _BY_SLOT}

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        meta = checkpoint.read_meta(folder)
        saved = checkpoint.load(folder, rows, _expected(run, moco))
        checkpoint.refuse(folder, [*_wrong_numbers(run, meta, saved), *_not_finite(saved)])
        return meta, saved

    return consensus.raise_on_all_ranks(read)


def _expected(run: TrainedRun, moco: MoCo) -> dict[str, checkpoint.Expected]:
    """List the tensors of this run's checkpoints."""
    tensors = {f"model.{name}": t for name, t in moco.state_dict().items()}
    tensors |= {
        f"optimizer.{name}.{MOMENTUM}": p.detach() for name, p in moco.trained_parameters().items()
    }
    tensors |= {f"queue.{name}": t for name, t in run.queue.state_dict().items()}
    tensors["meters.sums"] = run.meters.sums
    expected = {name: checkpoint.Expected(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    for name in [f"queue.{n}" for n in _BY_SLOT if f"queue.{n}" in tensors]:
        dtype, shape, _ = expected[name]
        expected[name] = checkpoint.Expected(dtype, (len(run.queue), *shape[1:]))
    # The precision may change whenever a run is resumed.
    expected[_SCALE] = checkpoint.Expected(torch.float64, (2,), optional=True)
    return expected


def _wrong_numbers(run: TrainedRun, meta: dict[str, Any], saved: dict[str, Tensor]) -> list[str]:
    """List values that no run can have reached."""
    step, batch = meta["step"], run.config.optim.batch_size
    pointer, enqueued = int(saved["queue.pointer"]), int(saved["queue.enqueued"])
    most = step * batch * (2 if run.config.contrast.symmetric else 1)
    wrong = []
    if step > run.total_steps:
        wrong.append(f"step {step} is beyond the run's {run.total_steps} steps")
    for name, value in (("samples", step * batch), ("epoch", step // run.plan.steps_per_epoch)):
        if meta.get(name, value) != value:
            wrong.append(f"{name} is {meta[name]}, {value} at step {step}")
    if not 0 <= enqueued <= most:
        wrong.append(f"queue.enqueued is {enqueued}, at most {most} at step {step}")
    elif pointer != enqueued % len(run.queue):
        wrong.append(
            f"queue.pointer is {pointer}, {enqueued % len(run.queue)} after {enqueued} keys"
        )
    if _SCALE in saved:
        value, steps = saved[_SCALE].tolist()
        if not (0 < value < float("inf") and 0 <= steps <= step):
            wrong.append(f"the loss scale is {value:g} after {steps:g} steps")
    return wrong


def _not_finite(saved: dict[str, Tensor]) -> list[str]:
    """List weights, momenta and keys that are not finite; a run saves none."""
    return [
        f"{name} is not finite"
        for name, tensor in saved.items()
        if name != _SCALE and not _all_finite([tensor], tensor.device)
    ]


def load_model(run: TrainedRun, moco: MoCo, saved: dict[str, Tensor]) -> None:
    """Load encoders, queue and meters, before an engine exists."""
    moco.load_state_dict(_section(saved, "model."))
    run.queue.load_state_dict(_section(saved, "queue."))
    run.meters.sums.copy_(saved["meters.sums"])


def load_optimizer(run: TrainedRun, saved: dict[str, Tensor]) -> None:
    """Load the engine's optimizer and loss scale."""
    run.engine.load_optimizer_state(_section(saved, "optimizer."))
    if run.engine.loss_scale is not None and _SCALE in saved:
        run.engine.loss_scale.load(saved[_SCALE])


def state_numbers(run: TrainedRun) -> dict[str, int | Tensor]:
    """Return numbers of a run's state that must be the same on every rank; int64."""
    numbers: dict[str, int | Tensor] = {
        "step": run.step,
        "queue pointer": run.queue.pointer,
        "keys enqueued": run.queue.enqueued,
    }
    for name, tensors in run.engine.replicated().items():
        numbers[f"weights of the {name} encoder"] = sampled_hash(tensors, run.step)
    if not run.queue.sharded:
        numbers["keys in the queue"] = sampled_hash([run.queue.keys], run.step)
    return numbers


def save_state(run: TrainedRun, epoch_done: bool, unlogged: Unlogged | None = None) -> None:
    """Write a checkpoint and ``current.pth``; all ranks call it.

    Args:
        run: to save.
        epoch_done: the step was an epoch's last.
        unlogged: log of the step, once it has been evaluated.

    Raises:
        UserError: The state is not finite, or an earlier checkpoint could not be written.
    """
    moco, every = run.engine.moco, run.config.run.save_freq
    state_finite = {
        WEIGHTS: run.engine.weights_finite(),
        "BatchNorm's running statistics": _all_finite(list(moco.buffers()), run.device),
        "the queue": _all_finite([run.queue.keys], run.device),
    }
    bad = collectives.sum_(torch.stack([~finite for finite in state_finite.values()]).float())
    for what, count in zip(state_finite, bad.tolist(), strict=True):
        if count:
            raise run.folder.not_finite(run.step, f"not finite: {what}")
    # Running statistics are linear in the samples: their mean over ranks is that of one process.
    # In place, so that this run and a resumed one continue from the same numbers.
    collectives.average_(list(moco.buffers()))
    epoch = run.step // run.plan.steps_per_epoch
    main = collectives.is_main()

    def mine(name: str) -> bool:
        return checkpoint.owner(name) == run.rank

    # Rank 0 takes the whole model, for current.pth.
    state = run.engine.model_state(lambda n: main or mine(f"model.{n}"))
    momenta = run.engine.optimizer_state(lambda n: mine(f"optimizer.{n}"))
    tensors = {f"model.{name}": t for name, t in state.items()}
    tensors |= {f"optimizer.{n}": t for n, t in momenta.items()}
    tensors |= {f"queue.{name}": t for name, t in run.queue.state_dict().items()}
    if run.engine.loss_scale is not None:
        tensors[_SCALE] = run.engine.loss_scale.state()
    tensors["meters.sums"] = run.meters.globalize()
    rows = {}
    for name in [f"queue.{n}" for n in _BY_SLOT if f"queue.{n}" in tensors]:
        tensors[name], rows[name] = _share_of(run.queue, tensors[name], run.rank, run.world)
    # Copy only what this rank writes.
    tensors = {n: t for n, t in tensors.items() if mine(n) or n in rows or n.startswith("model.")}
    meta = {
        "step": run.step,
        "epoch": epoch,
        "samples": run.step * run.config.optim.batch_size,
        "processes": run.world,
        "engine": run.config.run.engine,
        "unlogged": unlogged,
    }
    model = _in_current(state) if main else {}
    keep = bool(every) and epoch_done and epoch % every == 0
    run.folder.save(run.step, tensors, model, meta, keep, rows)


def restore_current(run: TrainedRun) -> None:
    """Write ``current.pth`` of the run's step, unless it is there; all ranks call it.

    It is missing where a run was killed between its last checkpoint and this file.

    Raises:
        UserError: The file cannot be written.
    """
    if run.folder.is_current(run.step):
        return
    state = run.engine.model_state(lambda name: collectives.is_main())
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    meta = {"step": run.step, "epoch": run.step // run.plan.steps_per_epoch}
    run.folder.write_current(tensors, _in_current(state), meta)


def _in_current(state: dict[str, Tensor]) -> dict[str, str]:
    """Map the model's names in a checkpoint to those in ``current.pth``."""
    sections = {"query": "model", "key": "model_ema"}
    return {
        f"model.{name}": f"{sections[encoder]}.{rest}"
        for name in state
        for encoder, _, rest in [name.partition(".")]
    }


def _share_of(
    queue: KeyQueue, slots: Tensor, rank: int, world: int
) -> tuple[Tensor, checkpoint.Rows]:
    """Return the slots of the queue that a rank writes; of a replicated queue an equal share."""
    first, end = share(len(queue), rank, world)
    if not queue.sharded:
        slots = slots[first:end]
    return slots, checkpoint.Rows(first, end - first, len(queue))


def _all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Check by sums of magnitudes, which needs no memory as large as a tensor: bool scalar."""
    zero = torch.zeros(1, device=device)
    norms = torch._foreach_norm([zero, *(t for t in tensors if t.is_floating_point())], 1)
    return torch.stack(norms).sum().isfinite()


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
