"""Run: its configuration, data, modules, engine, output folder and step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from moco_scale.checkpoints.run_folder import RunFolder
from moco_scale.checkpoints.state import load_model, load_optimizer, read_state
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
from moco_scale.distributed.stop_signal import status_of
from moco_scale.engines import make_engine, read_deepspeed
from moco_scale.methods.key_queue import DTYPES, KeyQueue
from moco_scale.methods.moco import MoCo
from moco_scale.methods.shuffle_bn import ShuffleBN
from moco_scale.models.batchnorm import set_groups, spans_ranks
from moco_scale.models.encoder import Encoder, build_encoder
from moco_scale.observe.finite import FiniteWatch
from moco_scale.observe.loggers import Meters
from moco_scale.observe.phases import SUMMING, Phases
from moco_scale.optim.schedules import learning_rate
from moco_scale.training.bad_images import BadImages
from moco_scale.training.inputs import Inputs
from moco_scale.utils import determinism
from moco_scale.utils.errors import StoppedEarly


def open_data(config: Config) -> tuple[Shards, BatchPlan]:
    """Open the images of a run and plan its batches, the same on all ranks; all call it.

    Raises:
        UserError: The data cannot be read, differs between ranks, or does not fill a batch that
            the ranks can share.
    """
    shards = consensus.rank0_first(partial(open_shards, config.source, "train"))
    same_setup.require_same({"index of --data-dir": shards.fingerprint}, same_setup.SAME_DATA)
    order = shards.order(config.optim.rng_seed, config.data.shuffle_window)
    batch = config.optim.batch_size
    plan = BatchPlan(in_whole_batches(order, batch, config.data.samples_per_epoch), batch)
    plan.check_world(collectives.world_size())
    return shards, plan


class Run:
    """State of a run, without the loop that trains it.

    Args:
        config: complete configuration.
        phases: of this process.

    Raises:
        UserError: Data, output folder, engine or resume do not fit the configuration.
    """

    def __init__(self, config: Config, phases: Phases | None = None) -> None:
        self.config, seed = config, config.optim.rng_seed
        self.phases = phases or Phases()
        self.started = time.monotonic()
        determinism.set_switches()
        self.device = collectives.device()
        self.world, self.rank = collectives.world_size(), collectives.rank()
        same_setup.require_same(same_setup.of_run(config.flat()))
        if config.run.deepspeed:  # report all its problems before anything takes time
            asked = read_deepspeed(config, self.world, 1).configuration
            consensus.broadcast_from_main(
                lambda: refuse(config.run.deepspeed, unwritable_reports(asked))
            )
        self.shards, self.plan = open_data(config)
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
        self.step, self.unlogged = 0, None
        saved: dict[str, Tensor] = {}
        if self.resumed_from is not None:
            meta, saved = read_state(self, moco, self.resumed_from)
            self.step, self.unlogged = meta["step"], meta.get("unlogged")
            load_model(self, moco, saved)
        self.micro_batches = config.run.accumulation_steps
        set_groups(moco, config.model.bn_group_size, config.optim.batch_size, self.micro_batches)
        self.engine = make_engine(config, moco, self.device)
        if saved:
            load_optimizer(self, saved)
        self.engine.when_differentiated(lambda: self.phases.enter(SUMMING))
        self.shuffle = ShuffleBN(
            config.optim.batch_size, seed, contrast.shuffle_bn, contrast.shuffle_group
        )
        # Two communicators in use at once, the exchange's and another, can deadlock.
        spans, in_order = spans_ranks(moco), collectives.launches_in_order()
        overlap = not (spans or (self.engine.own_groups and not in_order))
        if not overlap and not in_order:
            self.engine.notes.append(
                "NCCL_LAUNCH_ORDER_IMPLICIT is 0, or NCCL older than 2.26: no inputs are made "
                "ahead, and a deadlock between processes cannot be excluded"
            )
        self.inputs = Inputs(config, self.plan, self.shuffle, self.device, overlap=overlap)

    def _decoder(self) -> DeviceDecoder | None:
        return DeviceDecoder.on_gpu(self.device) if self.config.run.decode == "gpu" else None

    def _cache(self) -> PixelCache | None:
        run = self.config.run
        return PixelCache.open(self.shards, run.cache, run.preflight) if run.cache else None

    def initial_encoder(self) -> Encoder:
        """Build the query encoder before training: a function of the configuration and its seed."""
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
        """Load this rank's share of each batch from the run's step on.

        Args:
            end_step: end of the range of steps; by default after the run's last step.
            lost: as of :class:`BatchLoader`.
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

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
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

    def stopped(self, reason: str) -> StoppedEarly:
        """Make the exception that ends a run on a stop request, once its state is saved."""
        status = status_of(reason)
        if self.step == 0:
            return StoppedEarly(f"{reason}: stopped before the first step; start again", status)
        return StoppedEarly(
            f"{reason}: stopped after step {self.step} of {self.last_step}, saved in "
            f"{self.folder.path}; start the same command again to continue",
            status,
        )
