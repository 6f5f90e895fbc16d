"""Monitor of a run: times, logs, evaluations and figures; changes nothing in the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
import torchvision

from moco_scale.checkpoints.state import Unlogged, state_numbers
from moco_scale.data.loading.loader import ViewBatch
from moco_scale.data.sampling.order import Samples
from moco_scale.distributed import collectives, consensus
from moco_scale.distributed.same_state import require_same_state
from moco_scale.distributed.stop_signal import StopRequest
from moco_scale.engines.base import PRECISIONS
from moco_scale.evaluation import figures
from moco_scale.evaluation.features import SkippedImages, chosen_output
from moco_scale.evaluation.knn import (
    KnnMonitor,
    Splits,
    bank_and_queries,
    open_splits,
    unlabelled_split,
)
from moco_scale.models.encoder import Encoder
from moco_scale.observe.loggers import Loggers
from moco_scale.observe.phases import AGREE, DATA, EVALUATION, FINISH, LOG, SAVE, SHUFFLE
from moco_scale.observe.stragglers import StepTimes
from moco_scale.planner.utilisation import Utilisation, device_name
from moco_scale.training.banner import cautions, run_summary
from moco_scale.training.banner import title as figure_title
from moco_scale.training.run import Run
from moco_scale.utils.errors import RankError, UserError
from moco_scale.utils.progress import progressed

# All of ImageNet's 1.28 M would take too long beside an epoch's training; smaller sets such as
# CIFAR's 50,000 and 10,000 are used whole.
MAX_BANK, MAX_QUERIES = 128_000, 10_000


class Monitor:
    """Times, logs, kNN evaluations and figures of one run.

    Args:
        run: to monitor.
        loggers: of the run.
        stop: interrupts evaluations.

    Attributes:
        unlogged: log of the last step, where its evaluation is still to come.
    """

    def __init__(self, run: Run, loggers: Loggers, stop: StopRequest) -> None:
        self.run, self.loggers, self._stop = run, loggers, stop
        self._since, self._steps_then = time.perf_counter(), run.step
        self._rate = 0.0
        self._utilisation = Utilisation(run.config, run.world, device_name(run.device))
        self._initial_knn: float | None = None
        self._skipped = SkippedImages() if run.config.run.bad_samples == "skip" else None
        self._step_times = StepTimes()
        self._read = run.step
        self.unlogged: Unlogged | None = None
        self._output = f"on the {run.config.model.dim}-d output"
        self._evaluation = self._make_evaluation() if run.config.run.knn_freq else None

    @cached_property
    def _splits(self) -> Splits:
        """Both splits; all ranks ask for them together."""
        opened = partial(open_splits, self.run.config.source, self.run.shards)
        return consensus.rank0_first(opened)

    def _make_evaluation(self) -> KnnMonitor | None:
        config = self.run.config
        try:
            unlabelled = unlabelled_split(self._splits)
            if unlabelled is None:
                bank, queries = bank_and_queries(self._splits, MAX_BANK, MAX_QUERIES)
        except UserError as error:
            text = str(error).rstrip(".")
            raise UserError(f"{text}. Or train without kNN evaluations: --knn-freq 0") from None
        if unlabelled is not None:
            why = unlabelled.why_unlabelled
            self.loggers.say(
                f"no kNN evaluation, as the labels are not used: {why}"
                if why
                else f"no kNN evaluation, as not all {unlabelled.split} images have labels; "
                "shards made from folders CLASS/* have labels"
            )
            return None
        preset = config.preset
        evaluation = KnnMonitor(
            bank,
            queries,
            config.data.image_size,
            preset.resize_ratio,
            preset.mean,
            preset.std,
            num_workers=config.run.num_workers,
            autocast=PRECISIONS[config.run.precision],
            skipped=self._skipped,
        )
        if evaluation.hopeless:
            self.loggers.warn(evaluation.hopeless)
        return evaluation

    def log_summary(self, dropped: int) -> None:
        """Log the run summary."""
        for text in run_summary(self.run, dropped):
            self.loggers.say(text)
        for text in cautions(self.run):
            self.loggers.warn(text)
        self.loggers.hyper_parameters(self.run.config.flat())

    def before_training(self, batch: ViewBatch) -> None:
        """Log, at step 0, the sheet of augmented pairs and the kNN of the initial encoder."""
        run = self.run
        mine = Samples(batch.index[:16].numpy(), batch.passes[:16].numpy())
        rows = [
            run.inputs.augmented(batch.views[v, :16].to(run.device), mine, v)
            for v in range(batch.views.shape[0])
        ]
        pairs = torch.stack(rows, 1).flatten(0, 1).float().cpu()
        preset = run.config.preset
        mean, std = torch.tensor(preset.mean), torch.tensor(preset.std)
        pairs = pairs * std[:, None, None] + mean[:, None, None]
        sheet = torchvision.utils.make_grid(pairs, nrow=8, padding=2)
        self.loggers.image("augmented pairs", sheet, 0)
        if self._evaluation is not None:
            self._initial_knn = self._knn()
            self.loggers.say(f"kNN top-1 {self._output} before training {self._initial_knn:.2f} %")
        self.restart_clock()

    def timed(self, batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
        """Yield the batches; waiting for one is the first phase of its step."""
        while True:
            self.run.phases.enter(DATA, self.run.step + 1)
            try:
                batch = next(batches, None)
            except UserError as error:
                raise RankError(error, collectives.rank()) from error
            if batch is None:
                return
            self._read = batch.step + 1
            self.run.phases.enter(SHUFFLE)
            yield batch

    def require_same_state(self, saving: bool) -> None:
        """Check, every so many steps and before a checkpoint, that ranks are in the same state.

        Raises:
            PeerLost: They differ; the message names the ranks and the numbers.
        """
        every = self.run.config.run.sync_check_freq
        if every and (saving or self.run.step % every == 0):
            self.run.phases.enter(AGREE)
            numbers = {"batches read": self._read} | state_numbers(self.run)
            require_same_state(numbers, self.run.step)

    def report(self, epoch_done: bool, last: bool) -> None:
        """Log the steps since the last report; where kNN is due, :meth:`log` does it."""
        run, config = self.run, self.run.config
        means, epoch_loss = run.meters.read()
        terms = 2 if config.contrast.symmetric else 1
        chance = terms * math.log(1 + run.negatives)
        age_mean, age_max = run.queue.ages(terms * config.optim.batch_size)
        elapsed = time.perf_counter() - self._since
        steps = run.step - self._steps_then
        times, notes = self._step_times.gather(run.phases, steps)
        self._rate = steps * config.optim.batch_size / max(elapsed, 1e-9)
        epoch = (run.step - 1) // run.plan.steps_per_epoch
        lr = run.learning_rate(run.step - 1)
        record: dict[str, Any] = {
            "step": run.step,
            "epoch": epoch + (1 if epoch_done else 0),
            **means,
            "chance_loss": chance,
            "lr": lr,
            "momentum": config.contrast.alpha,
            "images_per_second": self._rate,
            "data_wait_fraction": min(run.phases.spent()[DATA] / max(elapsed, 1e-9), 1.0),
            **times,
            "queue_filled": run.queue.filled / len(run.queue),
            "queue_age_mean": age_mean,
            "queue_age_max": float(age_max),
        }
        line = (
            f"epoch {epoch + 1}/{config.optim.epochs} step {run.step}/{run.total_steps} "
            f"loss {means['loss']:.4f} (chance {chance:.2f}) lr {lr:.3g} "
            f"{self._rate:.0f} images/s, waiting for data {record['data_wait_fraction']:.0%}, "
            f"ETA {self._eta()}"
        )
        mfu = self._utilisation.of(self._rate)
        if mfu is not None:
            record["mfu"] = mfu
            line += f", {mfu:.0%} of the peak"
        for note in notes:
            self.loggers.say(note)
        if epoch_done:
            record["epoch_loss"] = epoch_loss
            line += f"; epoch mean loss {epoch_loss:.4f}"
        if self._initial_knn is not None:
            record["knn_top1_initial"], self._initial_knn = self._initial_knn, None
        if not math.isfinite(means["loss"]):
            self.loggers.say(line)
            self.restart_clock()
            return
        if self._knn_due(epoch_done, last):
            self.unlogged = {"record": record, "line": line}
        else:
            self.loggers.record(record, line)
        self.restart_clock()

    def log(self) -> None:
        """Evaluate and log a step whose checkpoint has been written.

        In this order nothing is lost when an evaluation is stopped or fails.

        Raises:
            StoppedEarly: On a signal or ``--max-time``; a resumed run evaluates again.
        """
        if self.unlogged is None:
            return
        record, line = self.unlogged["record"], self.unlogged["line"]
        if self._evaluation is not None:  # a resumed run may have none
            record["knn_top1"] = self._knn()
            line += f"; kNN top-1 {self._output} {record['knn_top1']:.2f} %"
        self.loggers.record(record, line)
        self.unlogged = None
        self.restart_clock()

    def log_resumed(self, unlogged: Unlogged | None) -> None:
        """Log the step that a run resumes after, if the run before did not evaluate it."""
        start, folder = self.run.resumed_from, self.run.folder
        # The steps of another run are in that run's log.
        if unlogged is None or start is None or not folder.is_own(start):
            return
        if not folder.is_logged(self.run.step):
            self.loggers.say(f"the evaluation after step {self.run.step} is still to be done")
            self.unlogged = unlogged
            self.log()

    def _knn_due(self, epoch_done: bool, last: bool) -> bool:
        every = self.run.config.run.knn_freq
        done = self.run.step // self.run.plan.steps_per_epoch
        return self._evaluation is not None and (last or (epoch_done and done % every == 0))

    def _knn(self) -> float:
        """Measure kNN top-1 of the query encoder's projection in percent; all ranks call it."""
        assert self._evaluation is not None
        self.run.phases.enter(SAVE)
        self.run.folder.finish_saving()  # threads do not survive the evaluation's forks
        self.run.phases.enter(EVALUATION)
        top1 = self._evaluation.measure(self._query(), between=self._go_on)["top1"]
        self.run.phases.enter(LOG)
        return top1

    def _go_on(self) -> None:
        progressed()
        reason = self._stop.look()
        if reason:
            raise self.run.stopped(reason)

    def _query(self) -> Encoder:
        return self.run.engine.query_encoder(self.run.initial_encoder)

    def restart_clock(self) -> None:
        """Restart the clock, so that only training counts."""
        self._since, self._steps_then = time.perf_counter(), self.run.step
        self.run.phases.restart()

    def _eta(self) -> str:
        left = (self.run.last_step - self.run.step) * self.run.config.optim.batch_size
        seconds = round(left / max(self._rate, 1e-9))
        days, rest = divmod(seconds, 86400)
        clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
        return f"{days} d {clock}" if days else clock

    def is_finished(self) -> bool:
        """Tell whether the figures of :meth:`finish` exist; the same on every rank."""
        out = self.run.folder.path
        return consensus.broadcast_from_main(
            lambda: all((out / name).exists() for name in ("report.png", "neighbours.png"))
        )

    def finish(self) -> None:
        """Draw the finished run's figures: its curves, and nearest neighbours.

        A failure is only logged: the model is saved, and the same command draws them again.

        Raises:
            StoppedEarly: As :meth:`log`; the same command draws them.
        """
        run, config, out = self.run, self.run.config, self.run.folder.path
        run.phases.enter(FINISH)
        title = figure_title(config, len(run.shards))
        preset = config.preset

        def report() -> None:
            run.folder.hold()
            figures.report(run.folder.metrics, out / "report.png", title=title)

        def neighbours() -> None:
            before = run.initial_encoder().to(run.device)
            figures.neighbours_sheet(
                chosen_output(before, "features"),
                chosen_output(self._query(), "features"),
                self._splits,
                out / "neighbours.png",
                image_size=config.data.image_size,
                resize_ratio=preset.resize_ratio,
                mean=preset.mean,
                std=preset.std,
                num_workers=config.run.num_workers,
                autocast=PRECISIONS[config.run.precision],
                title=title,
                skipped=self._skipped,
                between=self._go_on,
            )

        made = ["current.pth"]
        for name, draw in (
            ("report.png", lambda: consensus.broadcast_from_main(lambda: figures.drawn(report))),
            ("neighbours.png", neighbours),
        ):
            try:
                draw()
                made.append(name)
            except UserError as error:
                self.loggers.warn(f"no {name}, which the same command draws: {error}")
        ended = "done"
        if run.step < run.total_steps:
            ended = (
                f"stopped after step {run.step} of {run.total_steps} (--max-steps); the same "
                "command without it continues"
            )
        self.loggers.say(f"{ended}: {out}/{', '.join(made)}")
