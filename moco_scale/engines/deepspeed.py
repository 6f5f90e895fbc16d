"""DeepSpeed, ZeRO stages 0 and 1."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moco_scale.engines.base import (
    MOMENTUM,
    Engine,
    SGDSettings,
    make_sgd,
    set_learning_rate,
    zero_momentum,
)
from moco_scale.moco import MoCo


class DeepSpeedEngine(Engine):
    """Weights replicated, optimizer state replicated (stage 0) or sharded over ranks (stage 1)."""

    def __init__(
        self,
        moco: MoCo,
        optimizer: SGDSettings,
        precision: str,
        device: torch.device,
        configuration: dict[str, Any],
    ) -> None:
        super().__init__(moco, precision, device)
        deepspeed = _import_deepspeed()
        self._trained = moco.trained_parameters()
        self._stage = configuration["zero_optimization"]["stage"]
        sgd = make_sgd(list(self._trained.values()), optimizer)
        if self._stage == 0:
            zero_momentum(sgd)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=moco, optimizer=sgd, config=configuration, dist_init_required=False
        )
        if self._stage > 0:
            # The optimizer now holds one flat fp32 partition per group; without a state there
            # is nothing that a parameter's fragment could be looked up in.
            zero_momentum(self._optimizer.optimizer)
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def query(self, *views: Tensor) -> list[Tensor]:
        return self._engine(*views)  # applies torch_autocast itself

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> bool:
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, p in self._trained.items():
            if self._stage == 0:
                value = self._optimizer.state[p][MOMENTUM]
            else:
                value = safe_get_full_optimizer_state(p, MOMENTUM)
            state[f"{name}.{MOMENTUM}"] = value
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, p in self._trained.items():
            value = state[f"{name}.{MOMENTUM}"].to(p.device)
            if self._stage == 0:
                self._optimizer.state[p][MOMENTUM].copy_(value)
            else:
                safe_set_full_optimizer_state(p, value, MOMENTUM)


def _import_deepspeed() -> Any:
    import deepspeed
    from deepspeed import ops

    # DeepSpeed 0.19 calls a collective by the name it had before torch 2.14.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    # Its warning about SGD being untested under ZeRO is what our tests are for.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Only its inference kernels use this extension; building it takes a minute at the first start.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
