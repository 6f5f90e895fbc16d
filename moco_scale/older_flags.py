"""Flags of the official MoCo that are called otherwise here: said when one of them is given."""

from __future__ import annotations

from typing import NoReturn

from moco_scale.cli import Parser

_STARTED = "torchrun, deepspeed or srun start the processes"
PRETRAINING = {
    "-a": "--model",
    "--arch": "--model",
    "-b": "--batch-size",
    "-j": "--num-workers",
    "--workers": "--num-workers",
    "--lr": "--base-lr, per 256 images of the batch",
    "--learning-rate": "--base-lr, per 256 images of the batch",
    "--schedule": "--lr-decay-epochs",
    "--cos": "--lr-scheduler cosine-epoch",
    "--wd": "--weight-decay",
    "--moco-dim": "--dim",
    "--moco-k": "--nce-k",
    "--moco-m": "--alpha",
    "--moco-t": "--nce-t",
    "--mlp": "--head mlp",
    "--aug-plus": "--aug v2",
    "--seed": "--rng-seed",
    "--start-epoch": "nothing: --resume knows the step",
    "--multiprocessing-distributed": _STARTED,
    "--world-size": _STARTED,
    "--rank": _STARTED,
    "--dist-url": _STARTED,
    "--dist-backend": _STARTED,
    "--gpu": _STARTED,
}
EVALUATION = {
    "-a": "nothing: --pretrained-model says it",
    "--arch": "nothing: --pretrained-model says it",
    "-b": "--batch-size",
    "-j": "--num-workers",
    "--workers": "--num-workers",
    "--wd": "--weight-decay",
    "--pretrained": "--pretrained-model",
    "--seed": "--rng-seed",
    "--start-epoch": "nothing: --resume knows the epoch",
    "--multiprocessing-distributed": _STARTED,
    "--world-size": _STARTED,
    "--rank": _STARTED,
    "--dist-url": _STARTED,
    "--dist-backend": _STARTED,
    "--gpu": _STARTED,
}


class HintingParser(Parser):
    """Says of flags that it does not know what they are called here.

    Attributes:
        older: the flag to use, or a word about it, by the name elsewhere.
    """

    older: dict[str, str] = {}  # noqa: RUF012

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            names = dict.fromkeys(word.partition("=")[0] for word in words.split())
            hints = [f"{name} is here: {self.older[name]}" for name in names if name in self.older]
            message = "\n  ".join([message, *hints])
        super().error(message)
