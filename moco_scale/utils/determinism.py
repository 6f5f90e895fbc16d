"""Determinism switches of a process's arithmetic on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def set_switches() -> None:
    """Make results repeat bit for bit, and fp32 be fp32; pretraining and evaluation call it.

    Otherwise cuDNN would choose the kernel that happens to be fastest, and convolutions in fp32
    would be rounded to TF32's 10 bits of mantissa. For tensor cores use bf16. Process-wide; nothing
    on a CPU depends on it.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Without it torch refuses to multiply matrices within `repeatable`. Nearly its own default.
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    # `repeatable` would otherwise have all new memory filled, which hides mistakes and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def slow_precision(device: torch.device, precision: str) -> list[str]:
    """Warn where this processor emulates a half precision.

    Args:
        device: of the computation; GPUs support both.
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
        f"this CPU does not compute in {precision} ({needs} is missing), which torch then "
        f"emulates: a step may take minutes instead of a second; use --precision {other}"
    ]


def can_repeat() -> bool:
    """Tell whether cuBLAS's workspace, which a user may have set, allows :func:`repeatable`."""
    return os.environ.get(_WORKSPACE) in (":4096:8", ":16:8")


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Make forward and backward passes in the block add up in a fixed order, also attention.

    On a GPU the backward pass of attention adds up in any order unless torch must be deterministic;
    warnings only (``warn_only``) do not change that. Only for models all of whose operations have a
    deterministic form, such as transformers. Of a ResNet only convolutions need it, which
    :func:`set_switches` handles.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
