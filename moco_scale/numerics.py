"""The switches of a process that decide how its arithmetic is carried out on a GPU."""

from __future__ import annotations

import torch


def set_switches() -> None:
    """Results repeat bit for bit, and fp32 means fp32; pretraining and evaluation both call it.

    Without it cuDNN would choose among kernels by how fast they happen to be, and convolutions in
    fp32 would be rounded to TF32's 10 bits of mantissa. Who wants tensor cores asks for bf16.
    Process-wide; nothing on a CPU depends on it.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
