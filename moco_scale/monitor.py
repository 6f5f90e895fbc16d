"""What a run reports while it trains and when it ends; measures, and changes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from moco_scale import __version__, distributed
from moco_scale.data.reader import ViewBatch
from moco_scale.errors import UserError
from moco_scale.recipes import RECIPES
from moco_scale.telemetry import Telemetry

if TYPE_CHECKING:
    from moco_scale.pretrain import Pretraining


class Monitor:
    """Times, logs, kNN evaluations and pictures of one run."""

    def __init__(self, run: Pretraining, telemetry: Telemetry) -> None:
        self.run, self.telemetry = run, telemetry
        self.chance = math.log(1 + run.config.contrast.nce_k) * (
            2 if run.config.contrast.symmetric else 1
        )
        self._waited = 0.0
        self._since, self._steps_then = time.perf_counter(), run.step
        self._rate = 0.0
        self._initial_knn: float | None = None

    def announce(self, dropped: int) -> None:
        """Say what is about to run."""
        run, config = self.run, self.run.config
        say = self.telemetry.say
        say(
            f"moco_scale {__version__}, recipe {config.recipe}: {config.model.model}, "
            f"{config.data.dataset} in {config.data.data_dir} ({len(run.shards)} pictures)"
        )
        recipe = RECIPES[config.recipe]
        say(f"source: {recipe.source}; published: {recipe.published}")
        say(
            f"{distributed.world_size()} process(es) on {run.device.type}, engine "
            f"{config.run.engine}, {config.run.precision}; batch {config.optim.batch_size}, "
            f"BatchNorm groups of {config.model.bn_group_size}; {config.optim.epochs} epochs of "
            f"{run.plan.steps_per_epoch} steps"
        )
        if run.resumed_from is not None:
            again = f" ({dropped} later log lines dropped)" if dropped else ""
            say(f"resumed from {run.resumed_from} at step {run.step}{again}")
        self.telemetry.hyper_parameters(config.flat())

    def before_training(self, batch: ViewBatch) -> None:
        """Once, at step 0: the sheet of augmented pairs and the kNN of the initial encoder."""
        run = self.run
        mine = batch.index[:16].numpy()
        rows = [
            run.augmented(batch.views[v, :16].to(run.device), batch.epoch, mine, v)
            for v in range(batch.views.shape[0])
        ]
        pairs = torch.stack(rows, 1).flatten(0, 1).float().cpu()
        preset = run.config.preset
        mean, std = torch.tensor(preset.mean), torch.tensor(preset.std)
        pairs = pairs * std[:, None, None] + mean[:, None, None]
        sheet = torchvision.utils.make_grid(pairs, nrow=8, padding=2)
        self.telemetry.image("augmented pairs", sheet, 0)
        if run.config.run.knn_freq:
            self._initial_knn = self._knn()
            self.telemetry.say(f"kNN top-1 before training {self._initial_knn:.2f} %")
        self._restart_clock()

    def timed(self, batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
        """The same batches, with the time spent waiting for them counted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def report(self, epoch_done: bool, last: bool) -> None:
        """Log the steps since the last report; evaluate by kNN where that is due.

        Raises:
            UserError: the loss is not finite.
        """
        run, config = self.run, self.run.config
        means, epoch_loss = run.meters.read()
        elapsed = time.perf_counter() - self._since
        steps = run.step - self._steps_then
        self._rate = steps * config.optim.batch_size / max(elapsed, 1e-9)
        epoch = (run.step - 1) // run.plan.steps_per_epoch
        lr = run.learning_rate(run.step - 1)
        record: dict[str, Any] = {
            "step": run.step,
            "epoch": epoch + (1 if epoch_done else 0),
            **means,
            "chance_loss": self.chance,
            "lr": lr,
            "momentum": config.contrast.alpha,
            "images_per_second": self._rate,
            "data_wait_fraction": min(self._waited / max(elapsed, 1e-9), 1.0),
            "queue_filled": run.queue.filled / len(run.queue),
        }
        line = (
            f"epoch {epoch + 1}/{config.optim.epochs} step {run.step}/{run.total_steps} "
            f"loss {means['loss']:.4f} (chance {self.chance:.2f}) lr {lr:.3g} "
            f"{self._rate:.0f} images/s, waiting for data {record['data_wait_fraction']:.0%}, "
            f"ETA {self._eta()}"
        )
        if epoch_done:
            record["epoch_loss"] = epoch_loss
            line += f"; epoch mean loss {epoch_loss:.4f}"
        if self._initial_knn is not None:
            record["knn_top1_initial"], self._initial_knn = self._initial_knn, None
        if not math.isfinite(means["loss"]):
            self.telemetry.say(line)
            saved = run.folder.checkpoints()
            raise UserError(
                f"the loss is not finite at step {run.step}; lower --base-lr or lengthen "
                f"--warmup-epoch; last good checkpoint: {saved[-1] if saved else 'none'}"
            )
        if self._knn_due(epoch_done, last):
            record["knn_top1"] = self._knn()
            line += f"; kNN top-1 {record['knn_top1']:.2f} %"
        self.telemetry.record(record, line)
        self._restart_clock()

    def _knn_due(self, epoch_done: bool, last: bool) -> bool:
        every = self.run.config.run.knn_freq
        done = self.run.step // self.run.plan.steps_per_epoch
        return bool(every) and (last or (epoch_done and done % every == 0))

    def _knn(self) -> float:
        # TODO plug in
        return 0.0

    def _restart_clock(self) -> None:
        self._since, self._steps_then, self._waited = time.perf_counter(), self.run.step, 0.0

    def _eta(self) -> str:
        left = (self.run.last_step - self.run.step) * self.run.config.optim.batch_size
        seconds = round(left / max(self._rate, 1e-9))
        days, rest = divmod(seconds, 86400)
        clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
        return f"{days} d {clock}" if days else clock

    def finish(self) -> None:
        """Pictures of the finished run."""
