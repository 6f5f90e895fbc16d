"""Training loop and step of pretraining."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from moco_scale.checkpoints.state import restore_current, save_state
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.distributed import consensus
from moco_scale.distributed.stop_signal import StopRequest
from moco_scale.methods.infonce import Contrast
from moco_scale.models.stochastic_depth import encoding
from moco_scale.observe.loggers import Loggers
from moco_scale.observe.phases import (
    AGREE,
    BACKWARD,
    EMA,
    FORWARD,
    LOG,
    QUEUE,
    SAVE,
    SHUFFLE,
    UPDATE,
)
from moco_scale.training.bad_images import FILE as BAD_IMAGES
from moco_scale.training.inputs import StepInputs
from moco_scale.training.monitor import Monitor
from moco_scale.training.run import Run
from moco_scale.utils.log import log


def train(run: Run) -> None:
    """Train from the run's step to its last one, or to ``--max-steps``.

    Raises:
        StoppedEarly: A signal or ``--max-time`` ended it; its state is saved.
    """
    dropped = run.folder.begin(run.step)
    loggers = Loggers(run.folder, run.total_steps, run.step)
    request = StopRequest(3600 * run.config.run.max_time, run.started)
    monitor = Monitor(run, loggers, request)
    try:
        monitor.log_summary(dropped)
        run.bad.begin(run.step, loggers.side_file(BAD_IMAGES))
        with request as stop:
            monitor.log_resumed(run.unlogged)
            if run.step < run.last_step:
                _loop(run, loggers, monitor, stop)
                run.phases.enter(SAVE)
                run.folder.finish_saving()
                monitor.finish()
            else:
                limit = " (--max-steps)" if run.last_step < run.total_steps else ""
                done = f"step {run.step} of {run.last_step}{limit} is done"
                loggers.say(f"nothing left to do: {done}")
                restore_current(run)  # which a kill may have prevented
                if not monitor.is_finished():
                    monitor.finish()  # the figures, likewise
    except Exception:
        # A save under way can be completed, unless other ranks are gone.
        with contextlib.suppress(Exception):
            run.folder.finish_saving(timeout=60.0)
        raise
    finally:
        loggers.close()
        if run.cache is not None:
            run.cache.close()
        run.folder.release()


def _loop(run: Run, loggers: Loggers, monitor: Monitor, stop: StopRequest) -> None:
    settings = run.config.run

    def lost(how: str) -> None:
        log.warning(f"rank {run.rank}: {how}. It reads by itself until all ranks have saved")
        stop.reader_lost()

    loader = run.loader(lost=lost)
    run.engine.moco.train()
    try:
        for batch in run.inputs.ahead(monitor.timed(iter(loader))):
            run.bad.add(batch)
            if run.step == 0:
                monitor.before_training(batch)
            train_step(run, batch)
            run.step += 1
            epoch_done = run.step % run.plan.steps_per_epoch == 0
            last = run.step == run.last_step
            failed = run.folder.save_failed()
            reason, (worst, unsaved) = stop.agree(run.watch.code(), failed)
            if unsaved:
                consensus.raise_on_all_ranks(run.folder.finish_saving)
            problem = run.watch.judge(worst)
            if problem:
                raise run.folder.not_finite(run.step, problem)
            due = settings.checkpoint_freq and run.step % settings.checkpoint_freq == 0
            save = epoch_done or last or due or reason
            report = run.step == 1 or run.step % settings.print_freq == 0 or epoch_done or last
            if report or save:
                run.phases.enter(LOG)
                for line in run.bad.collect(run.step):
                    loggers.warn(line)
            if report:
                monitor.report(epoch_done, last)
            loggers.advance(run.step)
            if epoch_done:
                run.meters.start_epoch()
            monitor.require_same_state(bool(save))
            if save:
                run.phases.enter(SAVE)
                save_state(run, epoch_done, monitor.unlogged)
                monitor.restart_clock()
            if reason:
                run.folder.finish_saving()
                raise run.stopped(reason)
            monitor.log()
    finally:
        loader.close()


def train_step(run: Run, batch: ViewBatch) -> None:
    """Train one step: keys from shuffled crops, queries, loss, update, enqueue."""
    config, queue, enter = run.config.contrast, run.queue, run.phases.enter
    enter(SHUFFLE)
    inputs = run.inputs.take(batch)  # augmented crops; the keys' are being exchanged
    mine = run.plan.share(batch.step, run.rank, run.world)
    run.negatives = queue.used
    all_keys: list[Tensor] = []
    total = torch.zeros((), device=run.device)
    for micro_batch, rows in enumerate(np.split(np.arange(len(mine.index)), run.micro_batches)):
        own = slice(rows[0], rows[-1] + 1)
        enter(FORWARD)
        with encoding(inputs.query_crops()):
            queries = run.engine.query(*inputs.queries(own), micro_batch=micro_batch)
        if micro_batch == 0:  # the exchange overlaps with the first queries
            all_keys = [_keys(run, inputs, term) for term in range(len(queries))]
        first = run.rank * len(mine.index)
        enter(QUEUE)
        positives = [keys[first + own.start : first + own.stop] for keys in all_keys]
        terms = [
            queue.contrast(query, positive, config.nce_t, mine.index[own])
            for query, positive in zip(queries, positives, strict=True)
        ]
        loss = torch.stack([term.loss.mean() for term in terms]).sum()
        enter(BACKWARD)
        run.engine.backward(loss / run.micro_batches)
        _measure(run, loss, terms[0], queries[0], positives[0])
        total = total + loss.detach()
    enter(UPDATE)
    scale = run.engine.loss_scale
    lowest = scale is None or scale.value <= scale.settings.minimum
    applied = run.engine.step(run.learning_rate(batch.step))
    if applied:
        enter(EMA)
        run.engine.ema(config.alpha)
        enter(QUEUE)
        for keys in all_keys:  # those of a skipped step may not be finite
            queue.enqueue(keys, run.plan.batch(batch.step).index)
    enter(AGREE)
    finite = run.engine.weights_finite()
    run.watch.record(batch.step + 1, total, finite, skipped=lowest and not applied)


def _keys(run: Run, inputs: StepInputs, term: int) -> Tensor:
    """Compute the keys of the crops that this rank was sent, and gather the global batch's."""
    enter = run.phases.enter
    enter(SHUFFLE)
    inputs.receive(term)
    enter(FORWARD)
    with encoding(inputs.key_crops(term)):
        keys = run.engine.key(inputs.keys(term))
    enter(SHUFFLE)
    return inputs.gather_back(term, keys)


@torch.no_grad()
def _measure(run: Run, loss: Tensor, contrast: Contrast, query: Tensor, key: Tensor) -> None:
    positive = (query * key).sum(1).mean()
    negative = contrast.negative_similarity.mean()
    run.meters.add(
        1 / run.micro_batches, loss, contrast.positive_probability.mean(), positive, negative
    )
