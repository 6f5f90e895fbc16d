"""Compilation and activation checkpointing of an encoder's blocks, before an engine wraps it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from moco_scale.distributed import consensus
from moco_scale.methods.moco import MoCo
from moco_scale.models.batchnorm import statistics_kept
from moco_scale.models.registry import blocks_of
from moco_scale.models.stochastic_depth import StochasticDepth, repeating
from moco_scale.utils.errors import UserError
from moco_scale.utils.own_folders import make_own


def transform_blocks(moco: MoCo, *, compiled: bool, checkpointed: bool) -> None:
    """Replace the ``forward`` of each block, under its old name and with the same parameters.

    Args:
        moco: changed in place.
        compiled: compile each block of both encoders to one graph.
        checkpointed: activation checkpointing of the query's blocks (Chen et al. 2016, Training
            Deep Nets with Sublinear Memory Cost): they keep only their inputs and are computed
            again in the backward pass, which does not change BatchNorm's running statistics and
            skips the same branches by stochastic depth.
    """
    if compiled:
        consensus.raise_on_all_ranks(own_compile_cache)
        # All blocks of a class share one limit, and each shape, with gradients and without, in
        # each micro-batch and checkpointed, is a graph.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for encoder in (moco.query, moco.key):
        for block in blocks_of(encoder):
            forward: Callable[..., Any] = block.forward
            if compiled:
                forward = torch.compile(forward, dynamic=False)
            if checkpointed and encoder is moco.query:
                layers = [m for m in block.modules() if isinstance(m, StochasticDepth)]
                contexts = partial(_checkpoint_contexts, layers)
                forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
            if forward is not block.forward:
                block.forward = forward  # type: ignore[method-assign]


def own_compile_cache() -> None:
    """Keep compiled programs in a folder that only this user can write, unless the user names one.

    torch's default is ``torchinductor_NAME`` in the temporary folder, whose programs it runs even
    if somebody else has made it.

    Raises:
        UserError: The folder is somebody else's, or cannot be made.
    """
    if _COMPILE_CACHE in os.environ:
        return
    folder = Path(tempfile.gettempdir()) / f"moco_scale-compiled-{os.geteuid()}"
    try:
        make_own(folder, mode=0o700)
    except OSError as error:
        raise UserError(
            f"--compile keeps its programs in {folder}: {error.strerror or error}; name another "
            f"folder in the environment variable {_COMPILE_CACHE}"
        ) from None
    os.environ[_COMPILE_CACHE] = str(folder)


_COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def _checkpoint_contexts(layers: list[StochasticDepth]) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _again(repeating(layers))


@contextlib.contextmanager
def _again(decisions: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    with statistics_kept(), decisions:
        yield
