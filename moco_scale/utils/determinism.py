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


def slow_precision(device: torch.device, precision: str) -> list[str]:
    """A warning where this processor has no arithmetic of a half precision, and emulates it.

    Args:
        device: where it computes; GPUs have both as far as they are offered.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    if device.type != "cpu" or precision == "fp32":
        return []
    # What oneDNN answers for this processor and ONEDNN_MAX_CPU_ISA. (bf16 it also emulates well,
    # from AVX-512 on.)
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    try:
        if asked is None or asked():
            return []
    except RuntimeError:  # a torch without oneDNN
        pass
    needs = "avx512_fp16, amx_fp16" if precision == "fp16" else "AVX-512"
    other = "bf16 or fp32" if precision == "fp16" and not slow_precision(device, "bf16") else "fp32"
    return [
        f"warning: this CPU does not compute in {precision} ({needs} is missing), which torch then "
        f"emulates: a step may take minutes instead of a second; use --precision {other}"
    ]


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
