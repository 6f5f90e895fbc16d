"""What people see of a run: the terminal, ``log.txt``, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from moco_scale import distributed
from moco_scale.errors import RankError, UserError
from moco_scale.messages import say
from moco_scale.untrusted.text import printable_lines


class Telemetry:
    """Reports of one run; does nothing on ranks other than 0.

    Args:
        folder: the run's output folder; None only prints.
        total_steps: of the whole run.
        first_step: steps already done, when resuming.
    """

    def __init__(self, folder: Path | None, total_steps: int, first_step: int) -> None:
        self._active = distributed.is_main()
        self._log: TextIO | None = None
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._bar: tqdm[Any] | None = None
        if not self._active:
            return
        if folder is not None:
            # Line-buffered: what was logged survives a kill.
            self._log, self._metrics = (
                open(folder / name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
                for name in ("log.txt", "metrics.jsonl")
            )
            self._board = _summary_writer(folder / "tensorboard", first_step)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False
            )

    def say(self, text: str) -> None:
        """One line for people."""
        if not self._active:
            return
        text = printable_lines(text)
        self._write(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            say(text)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def record(self, record: dict[str, Any], line: str) -> None:
        """One logged step: a line for people, an object for machines, scalars for TensorBoard.

        Args:
            record: plain values, with ``step``.
            line: the same for people; a progress bar shows it beside itself.
        """
        if not self._active:
            return
        self._write(self._metrics, json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])
        self.say(line)
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.3f} of {record['chance_loss']:.2f}, lr {record['lr']:.2g}, "
                f"{record['images_per_second']:.0f} images/s, "
                f"data {record['data_wait_fraction']:.0%}"
            )

    def _write(self, file: TextIO | None, text: str) -> None:
        if file is None:
            return
        try:
            file.write(text)
        except OSError as error:
            problem = UserError(
                f"cannot write {file.name}: {error.strerror}; the checkpoints are untouched: "
                "make room, then start again"
            )
            raise RankError(problem, distributed.rank()) from error

    def hyper_parameters(self, values: dict[str, Any]) -> None:
        """The configuration, as a table in TensorBoard."""
        if self._board is not None:
            rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
            self._board.add_text("hyper-parameters", f"| flag | value |\n| --- | --- |\n{rows}", 0)

    def image(self, name: str, picture: Tensor, step: int) -> None:
        """A picture for TensorBoard: float [3, H, W] in [0, 1]."""
        if self._board is not None:
            self._board.add_image(name, picture.clamp(0, 1), step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for sink in (self._log, self._metrics, self._board):
            if sink is not None:
                with contextlib.suppress(OSError):  # a full disk has been reported already
                    sink.close()


def _summary_writer(folder: Path, first_step: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils.tensorboard import SummaryWriter
    # Curves of steps that will be run again disappear.
    return SummaryWriter(str(folder), purge_step=first_step + 1)


class Meters:
    """Means over the steps since they were last read, and over the epoch, without a device sync.

    The sums live on the device in fp64 and are part of a checkpoint, so that a resumed run
    reports the same means.
    """

    NAMES = ("loss", "positive_probability", "positive_similarity", "negative_similarity")

    def __init__(self, device: torch.device) -> None:
        # Rows: since the last report, since the start of the epoch. Last column: steps.
        self.sums = torch.zeros(2, len(self.NAMES) + 1, dtype=torch.float64, device=device)

    def add(self, weight: float, *values: Tensor) -> None:
        """Values of this part of a step on this rank, in the order of :data:`NAMES`."""
        row = torch.stack([v.detach().double() for v in values])
        finite = row.isfinite().all()  # others are reported elsewhere, and are in no mean
        self.sums[:, :-1] += torch.where(finite, weight * row, 0.0)
        self.sums[:, -1] += weight * finite

    def read(self) -> tuple[dict[str, float], float]:
        """Means since the last call, and the epoch's mean loss, over all ranks together."""
        sums = self.sums.clone()
        distributed.sum_(sums)
        sums = sums.cpu()
        self.sums[0] = 0
        means = sums[0, :-1] / sums[0, -1]
        return dict(zip(self.NAMES, means.tolist(), strict=True)), float(sums[1, 0] / sums[1, -1])

    def globalize(self) -> Tensor:
        """The sums, made equal on all ranks in place; all ranks call it before a checkpoint."""
        distributed.sum_(self.sums).div_(distributed.world_size())
        return self.sums

    def start_epoch(self) -> None:
        self.sums[1] = 0
