"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.checkpoints.state import (
    load_model,
    load_optimizer,
    read_state,
    restore_current,
    save_state,
)
from moco_scale.config.deepspeed_file import refuse
from moco_scale.config.deepspeed_keys import unwritable_reports
from moco_scale.config.schema import Config
from moco_scale.data.images.device_decode import DeviceDecoder
from moco_scale.data.loading.bad_samples import how_to_check
from moco_scale.data.loading.loader import ViewBatch, pretraining_loader
from moco_scale.data.loading.pixel_cache import PixelCache
from moco_scale.data.loading.workers import BatchLoader
from moco_scale.data.open import open_shards
from moco_scale.data.sampling.mixture import in_whole_batches
from moco_scale.data.sampling.order import BatchPlan
from moco_scale.data.shards.protocols import Shards
from moco_scale.distributed import collectives, consensus, same_setup
from moco_scale.distributed.stop_signal import StopRequest, status_of
from moco_scale.engines import make_engine, read_deepspeed
from moco_scale.methods.infonce import Contrast
from moco_scale.methods.key_queue import DTYPES, KeyQueue
from moco_scale.methods.moco import MoCo
from moco_scale.methods.shuffle_bn import ShuffleBN
from moco_scale.models.batchnorm import set_groups, spans_ranks
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.observe.finite import FiniteWatch
from moco_scale.observe.loggers import Meters, Telemetry
from moco_scale.observe.phases import (
    AGREE,
    BACKWARD,
    EMA,
    FORWARD,
    LOG,
    QUEUE,
    SAVE,
    SHUFFLE,
    SUMMING,
    UPDATE,
    Phases,
)
from moco_scale.optim.schedules import learning_rate
from moco_scale.training.bad_images import FILE as BAD_IMAGES
from moco_scale.training.bad_images import BadImages
from moco_scale.training.inputs import Inputs, StepInputs
from moco_scale.training.monitor import Monitor
from moco_scale.utils import determinism
from moco_scale.utils.errors import StoppedEarly
from moco_scale.utils.log import say


def open_data(config: Config, alive: Callable[[], None] = lambda: None) -> tuple[Shards, BatchPlan]:
    """The images of a run and its batches, the same on all ranks, which all call it.

    alive: called now and then while some rank makes an index, which may take hours.

    Raises:
        UserError: the data cannot be read, or differs between ranks, or does not fill a batch that
            the ranks can share.
    """
    opened = partial(open_shards, config.source, "train")
    shards = consensus.rank0_first(opened, alive)
    same_setup.require_alike({"index of --data-dir": shards.fingerprint}, same_setup.SAME_DATA)
    order = shards.order(config.optim.rng_seed, config.data.shuffle_window)
    batch = config.optim.batch_size
    plan = BatchPlan(in_whole_batches(order, batch, config.data.samples_per_epoch), batch)
    plan.check_world(collectives.world_size())
    return shards, plan


class Pretraining:
    """One run: everything it holds, its step, and its loop.

    Args:
        config: complete configuration.
        phases: says where the run stands, for who watches it.

    Raises:
        UserError: data, output folder, engine or resume do not fit the configuration.
    """

    def __init__(self, config: Config, phases: Phases | None = None) -> None:
        self.config, seed = config, config.optim.rng_seed
        self.phases = phases or Phases()
        self._started = time.monotonic()
        determinism.set_switches()
        self.device = collectives.device()
        self.world, self.rank = collectives.world_size(), collectives.rank()
        same_setup.require_alike(same_setup.of_run(config))
        if config.run.deepspeed:  # all that is wrong with it, before anything takes time
            asked = read_deepspeed(config, self.world, 1).configuration
            consensus.broadcast_from_main(
                lambda: refuse(config.run.deepspeed, unwritable_reports(asked))
            )
        self.shards, self.plan = open_data(config, self.phases.alive)
        self.decoder = consensus.raise_on_all_ranks(self._decoder)
        self.cache = consensus.raise_on_all_ranks(self._cache)
        self.total_steps = config.optim.epochs * self.plan.steps_per_epoch
        self.last_step = min(config.run.max_steps or self.total_steps, self.total_steps)

        self.folder = RunFolder(config, self.shards.fingerprint)
        self.resumed_from = self.folder.prepare()
        self.config = config = self.folder.config
        self.bad = BadImages(
            self.folder.path,
            how_to_check(self.shards),
            config.optim.batch_size,
            len(self.shards),
            config.run.max_bad_share,
        )
        moco = MoCo(self.initial_encoder()).to(self.device)
        contrast = config.contrast
        self.queue = KeyQueue(
            contrast.nce_k,
            config.model.dim,
            seed,
            self.device,
            dtype=DTYPES[contrast.queue_dtype],
            shard=(self.rank, self.world) if config.run.queue == "sharded" else (0, 1),
            mask_unfilled=contrast.mask_unfilled,
            mask_same_image=contrast.mask_same_image,
        )
        self.negatives = self.queue.used
        self.meters = Meters(self.device)
        self.watch = FiniteWatch(config.run.max_nonfinite, self.rank, self.folder.last_good)
        self.step, self._unlogged = 0, None
        saved: dict[str, Tensor] = {}
        if self.resumed_from is not None:
            meta, saved = read_state(self, moco, self.resumed_from)
            self.step, self._unlogged = meta["step"], meta.get("unlogged")
            load_model(self, moco, saved)
        self.parts = config.run.accumulation_steps
        set_groups(moco, config.model.bn_group_size, config.optim.batch_size, self.parts)
        self.engine = make_engine(config, moco, self.device)
        if saved:
            load_optimizer(self, saved)
        self.engine.when_differentiated(lambda: self.phases.enter(SUMMING))
        self.shuffle = ShuffleBN(
            config.optim.batch_size, seed, contrast.shuffle_bn, contrast.shuffle_group
        )
        # Two communicators at work at once, the exchange's and another, can deadlock.
        spans, in_order = spans_ranks(moco), collectives.launches_in_order()
        alone = spans or (self.engine.own_groups and not in_order)
        if alone and not in_order:
            self.engine.notes.append(
                "NCCL_LAUNCH_ORDER_IMPLICIT is 0, or NCCL older than 2.26: no inputs are made "
                "ahead, and that processes wait for each other for ever cannot be excluded"
            )
        self.inputs = Inputs(config, self.plan, self.shuffle, self.device, alone=alone)

    def _decoder(self) -> DeviceDecoder | None:
        return DeviceDecoder.on_gpu(self.device) if self.config.run.decode == "gpu" else None

    def _cache(self) -> PixelCache | None:
        run = self.config.run
        return PixelCache.open(self.shards, run.cache, run.preflight) if run.cache else None

    def initial_encoder(self) -> Encoder:
        """The query encoder before training: a function of the configuration and its seed."""
        model = self.config.model
        return build_encoder(
            model.model,
            width=model.model_width,
            stem=model.stem,
            head=model.head,
            dim=model.dim,
            image_size=self.config.data.image_size,
            patch_size=model.patch_size,
            train_patch_embedding=model.train_patch_embedding,
            seed=self.config.optim.rng_seed,
        )

    def loader(
        self, end_step: int | None = None, lost: Callable[[str], None] | None = None
    ) -> BatchLoader[ViewBatch]:
        """This rank's share of each batch from where the run stands to `end_step`.

        end_step: the first step that is left out; by default the run's last step is the last.
        lost: as :class:`BatchLoader` has it.
        """
        run = self.config.run
        return pretraining_loader(
            self.shards,
            self.plan,
            self.inputs.augmentation,
            self.config.data.image_size,
            rank=self.rank,
            world=self.world,
            num_workers=run.num_workers,
            start_step=self.step,
            end_step=self.last_step if end_step is None else end_step,
            bad_samples=run.bad_samples,
            fetches_ahead=collectives.local_rank() == 0,
            cache=self.cache,
            decoder=self.decoder,
            lost=lost,
        )

    def train_step(self, batch: ViewBatch) -> None:
        """One step: keys from shuffled crops, queries, loss, update, enqueue."""
        config, queue, enter = self.config.contrast, self.queue, self.phases.enter
        enter(SHUFFLE)
        inputs = self.inputs.take(batch)  # augmented crops, the keys' sent to where they belong
        mine = self.plan.share(batch.step, self.rank, self.world)
        self.negatives = queue.used
        all_keys: list[Tensor] = []
        total = torch.zeros((), device=self.device)
        for part, rows in enumerate(np.split(np.arange(len(mine.index)), self.parts)):
            own = slice(rows[0], rows[-1] + 1)
            enter(FORWARD)
            queries = self.engine.query(*inputs.queries(own), part=part)
            if part == 0:  # the exchange has been under way during the first queries
                all_keys = [self._keys(inputs, term) for term in range(len(queries))]
            first = self.rank * len(mine.index)
            enter(QUEUE)
            positives = [keys[first + own.start : first + own.stop] for keys in all_keys]
            parts_terms = [
                queue.contrast(query, positive, config.nce_t, mine.index[own])
                for query, positive in zip(queries, positives, strict=True)
            ]
            loss = torch.stack([term.loss.mean() for term in parts_terms]).sum()
            enter(BACKWARD)
            self.engine.backward(loss / self.parts)
            self._measure(loss, parts_terms[0], queries[0], positives[0])
            total = total + loss.detach()
        enter(UPDATE)
        scale = self.engine.loss_scale
        lowest = scale is None or scale.value <= scale.settings.minimum
        applied = self.engine.step(self.learning_rate(batch.step))
        if applied:
            enter(EMA)
            self.engine.ema(config.alpha)
            enter(QUEUE)
            for keys in all_keys:  # of a step that was left out, some may not be finite
                queue.enqueue(keys, self.plan.batch(batch.step).index)
        enter(AGREE)
        finite = self.engine.weights_finite()
        self.watch.record(batch.step + 1, total, finite, skipped=lowest and not applied)

    def _keys(self, inputs: StepInputs, term: int) -> Tensor:
        """Keys of the whole global batch, of which this rank computes those it was sent."""
        enter = self.phases.enter
        enter(SHUFFLE)
        inputs.receive(term)
        enter(FORWARD)
        keys = self.engine.key(inputs.keys(term))
        enter(SHUFFLE)
        return inputs.gather_back(term, keys)

    def learning_rate(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step,
            base=self.config.learning_rate,
            scheduler=optim.lr_scheduler,
            steps_per_epoch=self.plan.steps_per_epoch,
            epochs=optim.epochs,
            warmup_epochs=optim.warmup_epoch,
            warmup_multiplier=optim.warmup_multiplier,
            minimum=optim.lr_min,
            decay_epochs=optim.lr_decay_epochs,
            decay_rate=optim.lr_decay_rate,
        )

    @torch.no_grad()
    def _measure(self, loss: Tensor, contrast: Contrast, query: Tensor, key: Tensor) -> None:
        positive = (query * key).sum(1).mean()
        negative = contrast.negative_similarity.mean()
        self.meters.add(
            1 / self.parts, loss, contrast.positive_probability.mean(), positive, negative
        )

    def run(self) -> None:
        """Train from where the run stands to its last step, or to ``--max-steps``.

        Raises:
            StoppedEarly: a signal or ``--max-time`` ended it; its state is saved.
        """
        dropped = self.folder.begin(self.step)
        telemetry = Telemetry(self.folder, self.total_steps, self.step)
        request = StopRequest(3600 * self.config.run.max_time, self._started)
        monitor = Monitor(self, telemetry, request)
        try:
            monitor.announce(dropped)
            self.bad.begin(self.step, telemetry.side_file(BAD_IMAGES))
            with request as stop:
                monitor.log_resumed(self._unlogged)
                if self.step < self.last_step:
                    self._loop(telemetry, monitor, stop)
                    self.phases.enter(SAVE)
                    self.folder.settle()
                    monitor.finish()
                else:
                    limit = " (--max-steps)" if self.last_step < self.total_steps else ""
                    done = f"step {self.step} of {self.last_step}{limit} is done"
                    telemetry.say(f"nothing left to do: {done}")
                    restore_current(self)  # which a kill may have prevented
                    if not monitor.is_finished():
                        monitor.finish()  # the figures, likewise
        except Exception:
            # What is being written can be completed, unless others are gone.
            with contextlib.suppress(Exception):
                self.folder.settle(timeout=60.0)
            raise
        finally:
            telemetry.close()
            if self.cache is not None:
                self.cache.close()
            self.folder.release()

    def _loop(self, telemetry: Telemetry, monitor: Monitor, stop: StopRequest) -> None:
        run = self.config.run

        def lost(how: str) -> None:
            say(f"rank {self.rank}: {how}. It reads what it needs by itself until all have saved")
            stop.reader_lost()

        loader = self.loader(lost=lost)
        self.engine.moco.train()
        try:
            for batch in self.inputs.ahead(monitor.timed(iter(loader))):
                self.bad.note(batch)
                if self.step == 0:
                    monitor.before_training(batch)
                self.train_step(batch)
                self.step += 1
                epoch_done = self.step % self.plan.steps_per_epoch == 0
                last = self.step == self.last_step
                failed = self.folder.save_failed()
                reason, (worst, unsaved) = stop.agree(self.watch.code(), failed)
                if unsaved:
                    consensus.raise_on_all_ranks(self.folder.settle)
                problem = self.watch.judge(worst)
                if problem:
                    raise self.folder.not_finite(self.step, problem)
                due = run.checkpoint_freq and self.step % run.checkpoint_freq == 0
                save = epoch_done or last or due or reason
                report = self.step == 1 or self.step % run.print_freq == 0 or epoch_done or last
                if report or save:
                    self.phases.enter(LOG)
                    for line in self.bad.collect(self.step):
                        telemetry.say(line)
                if report:
                    monitor.report(epoch_done, last)
                telemetry.advance(self.step)
                if epoch_done:
                    self.meters.start_epoch()
                monitor.require_agreement(bool(save))
                if save:
                    self.phases.enter(SAVE)
                    save_state(self, epoch_done, monitor.unlogged)
                    monitor.restart_clock()
                if reason:
                    self.folder.settle()
                    raise self.stopped(reason)
                monitor.log()
        finally:
            loader.close()

    def stopped(self, reason: str) -> StoppedEarly:
        """What ends a run that has been asked to stop, once its state is saved."""
        status = status_of(reason)
        if self.step == 0:
            return StoppedEarly(f"{reason}: stopped before the first step; start again", status)
        return StoppedEarly(
            f"{reason}: stopped after step {self.step} of {self.last_step}, saved in "
            f"{self.folder.path}; the same command goes on from there",
            status,
        )
