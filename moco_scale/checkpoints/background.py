"""Saving of checkpoints in a thread while training continues."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moco_scale.distributed import collectives
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import log


class BackgroundSaver:
    """Copies tensors to its own memory and writes them from there, one checkpoint at a time.

    The training loop waits for the copy only. Its memory is reused: a copy into fresh pages takes
    several times as long. The thread has its own process group, so that its messages never mix
    with the loop's.

    Args:
        asynchronous: False: :meth:`start` returns after writing.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self.group = collectives.side_group() if asynchronous else None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(
        self, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor], Any], None]
    ) -> None:
        """Copy the tensors, then call ``write(copies, group)`` in the background.

        Waits for the previous save.

        Raises:
            UserError: The previous save failed, or this one if not asynchronous.
        """
        self.wait()
        if not self._asynchronous:
            write(tensors, None)
            return
        copies = self._copy(tensors)
        # A daemon: a process that dies otherwise does not wait for the disk.
        self._thread = threading.Thread(
            target=self._run, args=(copies, write), name="saver", daemon=True
        )
        self._thread.start()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        on_gpu = any(t.is_cuda for t in tensors.values())
        for name, tensor in tensors.items():
            kept = self._copies.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = kept
            kept.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in tensors}

    def _run(
        self, copies: dict[str, Tensor], write: Callable[[dict[str, Tensor], Any], None]
    ) -> None:
        if collectives.device().type == "cuda":
            torch.cuda.set_device(collectives.device())  # a thread begins with the first GPU
        try:
            started = time.monotonic()
            write(copies, self.group)
            seconds = time.monotonic() - started
            log.debug(f"rank {collectives.rank()}: saved in {seconds:.1f} s, beside training")
        except BaseException as error:
            self._failure = error
            # All ranks raise a UserError; rank 0 logs it.
            if collectives.is_main() or not isinstance(error, UserError):
                what = str(error) if isinstance(error, UserError) else repr(error)
                log.error(
                    f"rank {collectives.rank()}: saving has failed, so the run will stop: {what}"
                )

    @property
    def busy(self) -> bool:
        """A save is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """The save has failed: :meth:`wait` would raise."""
        return self._failure is not None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the save is complete, or so many seconds.

        Raises:
            UserError: The save failed; the same on every rank.
            RuntimeError: Another rank is gone.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
