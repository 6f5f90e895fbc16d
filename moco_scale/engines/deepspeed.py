"""DeepSpeed, ZeRO stages 0 to 3."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moco_scale.config.deepspeed_keys import reports_by_log
from moco_scale.distributed import collectives
from moco_scale.engines.base import (
    MOMENTUM,
    Engine,
    EngineSettings,
    Keep,
    Replicated,
    everything,
    make_sgd,
    plain_step,
    set_learning_rate,
    zero_momentum,
)
from moco_scale.methods.moco import MoCo
from moco_scale.models.encoder import Encoder
from moco_scale.untrusted.deepspeed_file import shown
from moco_scale.utils.errors import UserError, first_line
from moco_scale.utils.log import log
from moco_scale.utils.text import printable

GATHERS = "_DeepSpeedZeRoOffload__allgather_stream"
"""Attribute with the stream on which DeepSpeed's stage 3 gathers."""


def ask_deepspeed(configuration: dict[str, Any]) -> list[str]:
    """Let DeepSpeed check a complete configuration, without starting anything.

    Returns:
        Its error messages, a line for each refused value.
    """
    _load_deepspeed()
    # DeepSpeed derives this from the rest: the plan of a run has other processes.
    content = _without(configuration, "train_micro_batch_size_per_gpu")
    batch = {"train_batch_size": content["train_batch_size"]}
    if _problem_of(batch, ""):  # it does not divide by the processes: others report it better
        return []
    found = [
        line
        for key, value in content.items()
        if key not in batch
        for line in _problem_of(batch | {key: value}, key)
    ]
    return found or _problem_of(content, "")


def _problem_of(content: dict[str, Any], key: str) -> list[str]:
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy(content))
    except ValidationError as error:
        lines = []
        for each in error.errors(include_url=False, include_context=False):
            loc = [str(name) for name in each["loc"]]
            place = ".".join(loc if loc[:1] == [key] or not key else [key, *loc])
            lines.append(f"{printable(place)} {shown(each['input'])}: {printable(each['msg'])}")
        return lines
    except Exception as error:  # whatever it is, the file's content caused it
        place = f"{key} {shown(content[key])}: " if key else ""
        return [f"{place}{printable(str(error)) or type(error).__name__}"]
    return []


def _without(configuration: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in configuration.items() if name not in keys}


class DeepSpeedEngine(Replicated, Engine):
    """ZeRO stages 0 to 2: weights replicated; optimizer state (1) and gradients (2) sharded.

    DeepSpeed itself computes in fp32: casts are MoCo's own, and the loss scale is ours, set in its
    optimizer before each step (its own for torch_autocast never falls after an overflow).
    """

    own_groups = True  # a copy of the group of all ranks

    def __init__(
        self,
        moco: MoCo,
        settings: EngineSettings,
        device: torch.device,
        configuration: dict[str, Any],
    ) -> None:
        super().__init__(moco, settings, device)
        deepspeed = _import_deepspeed()
        from deepspeed.utils.logging import set_log_level_from_string

        self._trained = moco.trained_parameters()
        zero = configuration["zero_optimization"]
        self._stage = zero["stage"]
        # DeepSpeed can skip a step whenever it computes the gradients' norm.
        computes = self._stage == 3 or (self._stage > 0 and zero.get("compute_grad_norm", True))
        self._computes_norm: bool = computes
        sgd = make_sgd(list(self._trained.values()), settings)
        if self._stage == 0:
            zero_momentum(sgd)
        with _local_rank_of(device), _users_errors():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=moco, optimizer=sgd, config=configuration, dist_init_required=False
            )
        if reports_by_log(configuration) and "log_level" not in configuration:
            set_log_level_from_string("info")  # of its handlers too
        _report_if_possible(self._engine)
        if self._stage == 3:
            for module in moco.modules():
                if isinstance(module, nn.MultiheadAttention):
                    # It uses its last layer's weights without calling it: gather them with it.
                    for p in module.out_proj.parameters():
                        deepspeed.zero.register_external_parameter(module, p)
        if self._stage > 0:
            self._create_momentum()

    def _create_momentum(self) -> None:
        # The optimizer holds one flat fp32 partition per group; a parameter's fragment of the
        # state can be looked up only once the state exists.
        zero_momentum(self._optimizer.optimizer)
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _may_skip(self) -> bool:
        return self._computes_norm or super()._may_skip()

    def _start_micro_batch(self, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)

    def _forward(self, *views: Tensor, micro_batch: int, micro_batches: int) -> list[Tensor]:
        return self._engine(*views, micro_batch=micro_batch, micro_batches=micro_batches)

    def _backward(self, loss: Tensor) -> None:
        if self.loss_scale is not None:
            if self._stage == 0:
                loss = loss * self.loss_scale.value
            else:
                self._optimizer.loss_scale = self.loss_scale.value  # multiplies and divides
        self._engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained.values() if p.grad is not None]

    def _step(self, learning_rate: float) -> bool:
        if self._stage == 0:  # DeepSpeed has only summed the gradients
            world = collectives.world_size()
            return plain_step(self, self._optimizer, self._gradients(), learning_rate, world)
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if self.loss_scale is not None:
            self.loss_scale.update(applied)
        return applied

    def optimizer_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, p in self._trained.items():
            if self._stage == 0:
                value = self._optimizer.state[p][MOMENTUM]
            else:
                value = safe_get_full_optimizer_state(p, MOMENTUM)
            if keep(f"{name}.{MOMENTUM}"):
                state[f"{name}.{MOMENTUM}"] = value if self._stage == 0 else value.cpu()
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, p in self._trained.items():
            value = state[f"{name}.{MOMENTUM}"].to(p.device)
            if self._stage == 0:
                self._optimizer.state[p][MOMENTUM].copy_(value)
            else:
                safe_set_full_optimizer_state(p, value, MOMENTUM)

    def storage(self) -> dict[str, list[Tensor]]:
        query, key = self.moco.parameter_pairs()
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        momenta = [state[MOMENTUM] for state in inner.state.values()]
        if self._stage == 0:
            masters, gradients = [], self._gradients()
        else:
            masters = self._masters()
            summed = [g for g in self._optimizer.averaged_gradients.values() if g is not None]
            gradients = [
                *self._gradients(),  # stage 1 keeps them all
                *(t for g in summed for t in ([g] if isinstance(g, Tensor) else g)),
                *(p.grad for p in masters if p.grad is not None),  # where they are offloaded
            ]
        return {
            "weights": self._own(query),
            "key": self._own(key),
            "gradients": gradients,
            "optimizer": [*momenta, *masters],
        }

    def _own(self, parameters: list[Tensor]) -> list[Tensor]:
        return parameters

    def _masters(self) -> list[Tensor]:
        """Return the optimizer's own copies of this rank's partition of the weights."""
        return [p for group in self._optimizer.optimizer.param_groups for p in group["params"]]


class ShardedDeepSpeedEngine(DeepSpeedEngine):
    """ZeRO stage 3: weights, gradients, optimizer state and key encoder sharded over the ranks."""

    def _create_momentum(self) -> None:
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            self._optimizer.optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat)

    def _step(self, learning_rate: float) -> bool:
        applied = super()._step(learning_rate)
        self._show_to_gathers()
        return applied

    def ema(self, momentum: float) -> None:
        super().ema(momentum)
        self._show_to_gathers()

    def _show_to_gathers(self) -> None:
        """Let DeepSpeed's gathers wait for our writes to the shards.

        With ``overlap_comm`` DeepSpeed gathers on a stream of its own.
        """
        if self.device.type != "cuda":
            return
        here = torch.cuda.current_stream(self.device)
        stream = getattr(self._optimizer.parameter_offload, GATHERS, None)
        if stream is None:
            here.synchronize()
        else:
            stream.wait_stream(here)

    def _local_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        query, key = self.moco.parameter_pairs()
        # Looked up each time: a step gives the shards other storage.
        return [p.ds_tensor.detach() for p in query], [p.ds_tensor for p in key]  # type: ignore[attr-defined]

    def replicated(self) -> dict[str, list[Tensor]]:
        return {}

    def _own(self, parameters: list[Tensor]) -> list[Tensor]:
        return [p.ds_tensor for p in parameters]  # type: ignore[attr-defined]

    def _masters(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def model_state(self, keep: Keep = everything) -> dict[str, Tensor]:
        state = {}
        for name, p in self.moco.named_parameters():
            whole = _gathered(p)
            if keep(name):
                state[name] = whole.cpu()
        return state | {name: t for name, t in self.moco.named_buffers() if keep(name)}

    def query_encoder(self, fresh: Callable[[], Encoder]) -> Encoder:
        query, encoder = self.moco.query, fresh().to(self.device)
        weights = {name: _gathered(p) for name, p in query.named_parameters()}
        encoder.load_state_dict(weights | dict(query.named_buffers()))
        return encoder


def _gathered(parameter: Tensor) -> Tensor:
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@contextlib.contextmanager
def _local_rank_of(device: torch.device) -> Iterator[None]:
    """Set the local rank to the GPU's index, for which DeepSpeed takes it.

    They differ where a scheduler shows each process its own GPU only, with index 0.
    """
    names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"]  # if both are set, they must be equal
    before = {name: os.environ[name] for name in names if name in os.environ}
    if device.type == "cuda":
        os.environ.update(dict.fromkeys({*before, "LOCAL_RANK"}, str(device.index or 0)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _report_if_possible(engine: Any) -> None:
    """Log failures of DeepSpeed's reports, to a file or a server, instead of ending the run."""
    reports = [(engine.monitor, "write_events"), (engine, "_write_monitor")]
    if engine.flops_profiler_enabled():
        reports.append((engine.flops_profiler, "print_model_profile"))
    for holder, name in reports:
        setattr(holder, name, _without_failure(getattr(holder, name), name))


def _without_failure(action: Callable[..., Any], name: str) -> Callable[..., None]:
    failed = False

    def attempt(*values: Any, **named: Any) -> None:
        nonlocal failed
        output = sys.stdout
        try:
            action(*values, **named)
        except Exception as error:  # whatever it is, training does not need the report
            if not failed:
                log.warning(
                    f"DeepSpeed cannot report ({name}): {type(error).__name__}: "
                    f"{printable(first_line(error))}; training continues"
                )
            failed = True
        finally:
            sys.stdout = output  # which the profiler replaces while it writes to a file

    return attempt


@contextlib.contextmanager
def _users_errors() -> Iterator[None]:
    """Turn DeepSpeed's refusals of the file, such as an unreachable monitor, into UserErrors."""
    try:
        yield
    except Exception as error:
        # Memory and network fail as RuntimeError; DeepSpeed's own refusals are of any other kind.
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            raise
        raise UserError(
            f"DeepSpeed cannot start with this --deepspeed file: {type(error).__name__}: "
            f"{printable(first_line(error))}"
        ) from error


def _import_deepspeed() -> Any:
    deepspeed = _load_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _load_deepspeed() -> Any:
    if not torch.cuda.is_available():  # else it looks for an accelerator and warns of none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops

    # DeepSpeed 0.19 calls two collectives by the names they had before torch 2.14.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}`", FutureWarning)
    # Its warning about SGD being untested under ZeRO is what our tests are for.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Only its inference kernels use this extension; building it takes a minute at the first start.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
