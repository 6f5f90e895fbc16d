"""Loggers of a run: the terminal, ``log.txt``, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import time
import warnings
from functools import partial
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from moco_scale.distributed import collectives
from moco_scale.observe import metrics_file
from moco_scale.observe.side_files import Folder, SideFile, json_line
from moco_scale.utils.log import log, worded
from moco_scale.utils.progress import Bar, bar
from moco_scale.utils.text import printable, printable_lines

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.utils.tensorboard import summary


class Loggers:
    """Writes a run's log, metrics and TensorBoard events; does nothing on ranks other than 0.

    None of them ends a run: a file that cannot be written is logged once, and training continues.

    Args:
        folder: the run's output folder; None only prints.
        total_steps: of the whole run.
        first_step: steps already done, when resuming.
    """

    def __init__(self, folder: Folder | None, total_steps: int, first_step: int) -> None:
        self._active, self._folder = collectives.is_main(), folder
        self._files: dict[str, SideFile] = {}
        self._bar: Bar | None = None
        if not self._active:
            return
        if folder is not None:
            now, host = f"{time.time():010.0f}", socket.gethostname()
            events = f"events.out.tfevents.{now}.{host}.{os.getpid()}"
            self._files = {
                _LOG: folder.side_file(_LOG, partial(self._show, logging.WARNING)),
                _METRICS: folder.side_file(_METRICS, self.warn),
                _BOARD: folder.side_file(f"{_BOARD}/{events}", self.warn, _first(first_step + 1)),
            }
        if sys.stderr.isatty():
            self._bar = bar(
                "", "step", total_steps, initial=first_step, dynamic_ncols=True, leave=False
            )

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Log a message, in ``log.txt`` too."""
        if not self._active:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable_lines(worded(level, text))}\n"
        self._add(_LOG, line.encode("utf-8"))
        self._show(level, text)

    def warn(self, text: str) -> None:
        """Log a warning, in ``log.txt`` too."""
        self.say(text, logging.WARNING)

    def side_file(self, name: str) -> SideFile:
        """Open one more file in the run's folder; its failures are logged here."""
        assert self._folder is not None
        self._files[name] = self._folder.side_file(name, self.warn)
        return self._files[name]

    def _show(self, level: int, text: str) -> None:
        if self._bar is None:
            log.log(level, text)
        elif log.isEnabledFor(level):
            with contextlib.suppress(OSError):  # the terminal has gone
                self._bar.write(printable_lines(worded(level, text)), file=sys.stderr)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def record(self, record: dict[str, Any], line: str) -> None:
        """Log a step: a line for people, a JSON object, scalars for TensorBoard.

        Args:
            record: plain values, with ``step``.
            line: the same for people.
        """
        if not self._active:
            return
        self._add(_METRICS, json_line(record))
        scalars = {name: value for name, value in record.items() if isinstance(value, float)}
        self._plot(record["step"], *(summary.scalar(*item) for item in scalars.items()))
        self.say(line)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.set_postfix_str(
                    f"loss {record['loss']:.3f} of {record['chance_loss']:.2f}, "
                    f"lr {record['lr']:.2g}, {record['images_per_second']:.0f} images/s, "
                    f"data {record['data_wait_fraction']:.0%}"
                )

    def hyper_parameters(self, values: dict[str, Any]) -> None:
        """Write the configuration as a table to TensorBoard."""
        rows = "\n".join(f"| {name} | {printable(value)} |" for name, value in values.items())
        table = f"| flag | value |\n| --- | --- |\n{rows}"
        self._plot(0, summary.text("hyper-parameters", table))

    def image(self, name: str, pixels: Tensor, step: int) -> None:
        """Write an image to TensorBoard: float [3, H, W] in [0, 1]."""
        if self._active:
            self._plot(step, summary.image(name, pixels.clamp(0, 1), dataformats="CHW"))

    def _plot(self, step: int, *summaries: Summary) -> None:
        values = [value for each in summaries for value in each.value]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._add(_BOARD, _event(event))

    def _add(self, name: str, entry: bytes) -> None:
        if name in self._files:
            self._files[name].add(entry)

    def close(self) -> None:
        """Write what could not be written before, and log what is lost."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None
        for name in sorted(self._files, key=lambda name: name == _LOG):  # the log is told of losses
            self._files[name].close()


_LOG, _METRICS, _BOARD = "log.txt", metrics_file.NAME, "tensorboard"


def _event(event: Event) -> bytes:
    """Encode an event as a record of TensorBoard's file."""
    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()


def _first(step: int) -> bytes:
    """Encode the start of a TensorBoard file, which drops earlier curves from `step` on."""
    now, version = time.time(), "brain.Event:2"
    start = SessionLog(status=SessionLog.START)
    return _event(Event(wall_time=now, file_version=version)) + _event(
        Event(wall_time=now, step=step, session_log=start)
    )


class Meters:
    """Means over the steps since they were last read, and over the epoch, without a device sync.

    The sums live on the device in fp64 and go into checkpoints: a resumed run reports the same
    means.
    """

    NAMES = ("loss", "positive_probability", "positive_similarity", "negative_similarity")

    def __init__(self, device: torch.device) -> None:
        # Rows: since the last report, since the start of the epoch. Last column: steps.
        self.sums = torch.zeros(2, len(self.NAMES) + 1, dtype=torch.float64, device=device)

    def add(self, weight: float, *values: Tensor) -> None:
        """Add this rank's values of a micro-batch, in the order of :data:`NAMES`."""
        row = torch.stack([v.detach().double() for v in values])
        finite = row.isfinite().all()  # others are reported elsewhere, and are in no mean
        self.sums[:, :-1] += torch.where(finite, weight * row, 0.0)
        self.sums[:, -1] += weight * finite

    def read(self) -> tuple[dict[str, float], float]:
        """Return means since the last call, and the epoch's mean loss, over all ranks."""
        sums = self.sums.clone()
        collectives.sum_(sums)
        sums = sums.cpu()
        self.sums[0] = 0
        means = sums[0, :-1] / sums[0, -1]
        return dict(zip(self.NAMES, means.tolist(), strict=True)), float(sums[1, 0] / sums[1, -1])

    def globalize(self) -> Tensor:
        """Make the sums equal on all ranks, in place; all ranks call it before a checkpoint."""
        collectives.sum_(self.sums).div_(collectives.world_size())
        return self.sums

    def start_epoch(self) -> None:
        """Reset the sums of the epoch."""
        self.sums[1] = 0
