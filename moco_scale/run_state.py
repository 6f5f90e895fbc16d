"""The state of a run: what a checkpoint takes from it and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moco_scale import checkpoint, distributed, together
from moco_scale.agreement import sampled_hash
from moco_scale.health import WEIGHTS
from moco_scale.moco import MoCo
from moco_scale.queue import KeyQueue, share

if TYPE_CHECKING:
    from moco_scale.monitor import Unlogged
    from moco_scale.pretrain import Pretraining


# Of the queue's state, what has a row for each slot.
_BY_SLOT = ("keys", "samples")


def read_state(folder: Path, queue: KeyQueue) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain values and the tensors of a checkpoint; each rank reads by itself.

    Of the queue it reads the slots that ``queue`` holds, whoever wrote them.

    Raises:
        UserError: on any rank, it cannot be read.
    """
    mine = checkpoint.Rows(queue.first, len(queue.keys), len(queue))
    rows = {f"queue.{name}": mine for name in _BY_SLOT}
    return together.agree(lambda: (checkpoint.read_meta(folder), checkpoint.load(folder, rows)))


def load_model(run: Pretraining, moco: MoCo, saved: dict[str, Tensor]) -> None:
    """Give both encoders, the queue and the log's means what was saved; before an engine exists."""
    moco.load_state_dict(_part(saved, "model."))
    run.queue.load_state_dict(_part(saved, "queue."))
    run.meters.sums.copy_(saved["meters.sums"])


def load_optimizer(run: Pretraining, saved: dict[str, Tensor]) -> None:
    """Give the engine's optimizer and loss scale what was saved."""
    run.engine.load_optimizer_state(_part(saved, "optimizer."))
    if run.engine.loss_scale is not None and "loss_scale.state" in saved:
        run.engine.loss_scale.load(saved["loss_scale.state"])


def numbers_alike(run: Pretraining) -> dict[str, int | Tensor]:
    """Numbers of a run's state that must be the same on every rank; int64, see `agreement`."""
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


def save_state(run: Pretraining, epoch_done: bool, unlogged: Unlogged | None = None) -> None:
    """Write a checkpoint and ``current.pth``; all ranks call it.

    Args:
        run: what is saved.
        epoch_done: whether the step was an epoch's last.
        unlogged: what the step will be logged with, once it has been evaluated.

    Raises:
        UserError: something in it is not finite, or an earlier checkpoint could not be written.
    """
    moco, every = run.engine.moco, run.config.run.save_freq
    state_finite = {
        WEIGHTS: run.engine.weights_finite(),
        "BatchNorm's running statistics": _all_finite(list(moco.buffers()), run.device),
        "the queue": _all_finite([run.queue.keys], run.device),
    }
    bad = distributed.sum_(torch.stack([~finite for finite in state_finite.values()]).float())
    for what, count in zip(state_finite, bad.tolist(), strict=True):
        if count:
            raise run.folder.not_finite(run.step, f"not finite: {what}")
    # Running statistics are linear in what they average: their mean over ranks is what one
    # process would have. In place, so that a resumed run goes on from the same numbers.
    distributed.average_(list(moco.buffers()))
    epoch = run.step // run.plan.steps_per_epoch
    main = distributed.is_main()

    def mine(name: str) -> bool:
        return checkpoint.owner(name) == run.rank

    # Rank 0 takes the whole model, for current.pth.
    state = run.engine.model_state(lambda n: main or mine(f"model.{n}"))
    momenta = run.engine.optimizer_state(lambda n: mine(f"optimizer.{n}"))
    tensors = {f"model.{name}": t for name, t in state.items()}
    tensors |= {f"optimizer.{n}": t for n, t in momenta.items()}
    tensors |= {f"queue.{name}": t for name, t in run.queue.state_dict().items()}
    if run.engine.loss_scale is not None:
        tensors["loss_scale.state"] = run.engine.loss_scale.state()
    tensors["meters.sums"] = run.meters.globalize()
    rows = {}
    for name in [f"queue.{n}" for n in _BY_SLOT if f"queue.{n}" in tensors]:
        tensors[name], rows[name] = _share_of(run.queue, tensors[name], run.rank, run.world)
    # Only what this rank writes is copied.
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


def restore_current(run: Pretraining) -> None:
    """Write ``current.pth`` of the step that a run stands at, unless it is there.

    All ranks call it, for a run that was killed between its last checkpoint and this.

    Raises:
        UserError: it cannot be written.
    """
    if run.folder.is_current(run.step):
        return
    state = run.engine.model_state(lambda name: distributed.is_main())
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    meta = {"step": run.step, "epoch": run.step // run.plan.steps_per_epoch}
    run.folder.write_current(tensors, _in_current(state), meta)


def _in_current(state: dict[str, Tensor]) -> dict[str, str]:
    """Under which names ``current.pth`` holds the model, by its names in a checkpoint."""
    sections = {"query": "model", "key": "model_ema"}
    return {
        f"model.{name}": f"{sections[encoder]}.{rest}"
        for name in state
        for encoder, _, rest in [name.partition(".")]
    }


def _share_of(
    queue: KeyQueue, slots: Tensor, rank: int, world: int
) -> tuple[Tensor, checkpoint.Rows]:
    """What a rank writes of the queue: of one that all hold, an equal share each."""
    first, end = share(len(queue), rank, world)
    if not queue.sharded:
        slots = slots[first:end]
    return slots, checkpoint.Rows(first, end - first, len(queue))


def _all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Bool scalar; sums of magnitudes, so that nothing as large as a tensor is made."""
    zero = torch.zeros(1, device=device)
    norms = torch._foreach_norm([zero, *(t for t in tensors if t.is_floating_point())], 1)
    return torch.stack(norms).sum().isfinite()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
