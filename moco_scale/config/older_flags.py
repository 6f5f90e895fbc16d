"""Flags of the official MoCo, and our own older ones, with their names here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moco_scale.config import settings_file
from moco_scale.config.parser import Parser

_STARTED = "torchrun, deepspeed or srun start the processes"
_BOTH = {
    "-b": "--batch-size",
    "-j": "--num-workers",
    "--workers": "--num-workers",
    "--wd": "--weight-decay",
    "--seed": "--rng-seed",
    "--multiprocessing-distributed": _STARTED,
    "--world-size": _STARTED,
    "--rank": _STARTED,
    "--dist-url": _STARTED,
    "--dist-backend": _STARTED,
    "--gpu": _STARTED,
    "--allow-pipe": "nothing: no commands are run; --data-dir takes the address itself",
}
PRETRAINING = _BOTH | {
    "-a": "--model",
    "--arch": "--model",
    "--lr": "--base-lr, per 256 images of the batch",
    "--learning-rate": "--base-lr, per 256 images of the batch",
    "--schedule": "--lr-decay-epochs",
    "--cos": "--lr-scheduler cosine-epoch",
    "--moco-dim": "--dim",
    "--moco-k": "--nce-k",
    "--moco-m": "--alpha",
    "--moco-t": "--nce-t",
    "--mlp": "--head mlp",
    "--aug-plus": "--aug v2",
    "--start-epoch": "nothing: --resume knows the step",
}
EVALUATION = _BOTH | {
    "-a": "nothing: --pretrained-model says it",
    "--arch": "nothing: --pretrained-model says it",
    "--pretrained": "--pretrained-model",
    "--start-epoch": "nothing: --resume knows the epoch",
}


class HintingParser(Parser):
    """Parser that hints at the names of unknown flags here.

    Args:
        older: the flag to use, or a hint, by the name elsewhere.
        settings: as of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, *, older: Mapping[str, str], **settings: Any) -> None:
        super().__init__(**settings)
        self._older = older

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        settings_file.take(self, words, self._older)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            names = dict.fromkeys(word.partition("=")[0] for word in words.split())
            known = [name for name in names if name in self._older]
            hints = [f"{name} is here: {self._older[name]}" for name in known]
            message = "\n  ".join([message, *hints])
        super().error(message)
