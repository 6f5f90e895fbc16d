"""The switches of a process that decide how its arithmetic is carried out on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_switches() -> None:
    """Results repeat bit for bit, and fp32 means fp32; pretraining and evaluation both call it.

    Without it cuDNN would choose among kernels by how fast they happen to be, and convolutions in
    fp32 would be rounded to TF32's 10 bits of mantissa. Who wants tensor cores asks for bf16.
    Process-wide; nothing on a CPU depends on it.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Without it torch refuses to multiply matrices within `repeatable`. Nearly its own default.
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    # `repeatable` would otherwise have all new memory filled, which hides mistakes and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def can_repeat() -> bool:
    """Whether cuBLAS's workspace allows :func:`repeatable`; a user may have set another."""
    return os.environ.get(_WORKSPACE) in (":4096:8", ":16:8")


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Forward and backward passes within add up in the same order each time, also attention.

    On a GPU the backward pass of attention adds up in any order unless torch is told that nothing
    else will do; asking for warnings alone (``warn_only``) leaves that so. Only for models all of
    whose operations have such a form, as a transformer's have. Of a ResNet convolutions alone need
    it, and :func:`set_switches` has seen to them.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
