"""Plan of a run: memory, traffic and time before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moco_scale.config.resolve import check_shard_size, check_shuffle_group
from moco_scale.config.schema import DATASETS, Config
from moco_scale.models.batchnorm import lay_groups
from moco_scale.planner.cluster import GB, Hardware
from moco_scale.planner.estimate import MEAN_IMAGE_BYTES, StepTime, step_time
from moco_scale.planner.memory import memory, sharding
from moco_scale.planner.trace import build_model, trace_step
from moco_scale.planner.traffic import Collective, traffic
from moco_scale.utils.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Plan of one configuration on machines of one kind.

    Attributes:
        config: of the run.
        nodes: machines.
        gpus: of each machine.
        hardware: kind of machine.
        images: training images of an epoch.
        memory: bytes of the fullest GPU by kind.
        collectives: of a step.
        flops: hardware FLOPs of a step, all ranks together.
        time: of a step.
    """

    config: Config
    nodes: int
    gpus: int
    hardware: Hardware
    images: int
    memory: dict[str, int]
    collectives: list[Collective]
    flops: int
    time: StepTime

    @property
    def world(self) -> int:
        """GPUs of the run."""
        return self.nodes * self.gpus

    @property
    def memory_gib(self) -> float:
        """Memory of the fullest GPU, including what CUDA and NCCL reserve."""
        return sum(self.memory.values()) / GIB + self.hardware.reserved_gib

    @property
    def fits(self) -> bool:
        """The memory suffices."""
        return self.memory_gib <= self.hardware.memory_gib

    @property
    def images_per_second(self) -> float:
        """Training speed of all GPUs together."""
        return self.config.optim.batch_size / self.time.total

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.optim.epochs * (self.images // self.config.optim.batch_size)

    @property
    def days(self) -> float:
        """Duration of the whole run."""
        return self.steps * self.time.total / 86400

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: share of the peak at this precision."""
        half = self.config.run.precision != "fp32"
        peak = (self.hardware.tflops_half if half else self.hardware.tflops_fp32) * 1e12
        return self.flops / self.time.total / (peak * self.world)

    @property
    def cores_per_node(self) -> float:
        """CPU cores that reading and cropping need on each node."""
        return self.images_per_second / self.nodes / self.hardware.images_per_core

    @property
    def storage_gbs(self) -> float:
        """GB/s read by all nodes together."""
        return self.images_per_second * MEAN_IMAGE_BYTES / GB

    def as_json(self) -> dict[str, Any]:
        """Return plain values under the report's keys."""
        sent = sum(c.sent for c in self.collectives)
        across = sum(c.sent_across for c in self.collectives)
        return {
            "nodes": self.nodes,
            "gpus_per_node": self.gpus,
            "hardware": self.hardware.name,
            "batch_size": self.config.optim.batch_size,
            "memory_gib_by_kind": {k: round(v / GIB, 4) for k, v in self.memory.items()},
            "memory_per_gpu_gib": round(self.memory_gib, 3),
            "fits": self.fits,
            "bytes_per_step": round(sent),
            "bytes_per_step_across_nodes": round(across),
            "collectives": [
                {
                    "purpose": c.purpose,
                    "kind": c.kind,
                    "payload": c.payload,
                    "ranks": c.ranks,
                    "sent": round(c.sent),
                    "sent_across_nodes": round(c.sent_across),
                }
                for c in self.collectives
            ],
            "flops_per_step": self.flops,
            "step_seconds": {
                "compute": self.time.compute,
                "loss": self.time.loss,
                "update": self.time.update,
                "augment": self.time.augment,
                "network": self.time.network,
                "network_exposed": self.time.exposed,
                "total": self.time.total,
            },
            "images_per_second": round(self.images_per_second, 1),
            "mfu": round(self.mfu, 4),
            "steps": self.steps,
            "days": round(self.days, 4),
            "gpu_hours": round(self.days * 24 * self.world, 1),
            "cores_per_node": round(self.cores_per_node, 1),
            "storage_gb_per_second": round(self.storage_gbs, 3),
        }


def make_plan(
    config: Config,
    nodes: int,
    gpus: int,
    hardware: Hardware,
    images: int | None = None,
    *,
    on_gpu: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        config: of the run; its data are not read.
        nodes: machines.
        gpus: of each.
        hardware: kind of machine.
        images: training images; by default those of the data set's published version.
        on_gpu: False: plan the run as a CPU executes it, to compare with measurements.

    Raises:
        UserError: The batch does not divide, groups do not fit, the hardware lacks the precision,
            or the number of images is unknown.
    """
    world, batch = nodes * gpus, config.optim.batch_size
    if batch % world:
        raise UserError(
            f"--batch-size {batch} cannot be shared equally among {nodes} x {gpus} = {world} GPUs; "
            f"choose a multiple of {world}"
        )
    # The same rules and messages as a run's.
    moco = build_model(config)
    layout = lay_groups(
        moco, config.model.bn_group_size, batch, world, config.run.accumulation_steps
    )
    check_shard_size(config.run.fsdp_shard_size, world)
    if config.contrast.shuffle_bn == "node" and not config.contrast.shuffle_group:
        contrast = replace(config.contrast, shuffle_group=batch // world * gpus)
        config = replace(config, contrast=contrast)
        check_shuffle_group(config)
    if config.run.precision not in ("fp32", *hardware.half):
        raise UserError(f"{hardware.name} does not compute in {config.run.precision}")
    images = images or DATASETS[config.data.dataset].images
    if images is None:
        raise UserError(f"--dataset {config.data.dataset} may have any size: give --images N")
    if images < batch:
        raise UserError(
            f"{images} training images (--images) do not fill one batch of "
            f"{config.flag('batch_size')}"
        )
    how = sharding(config, moco, world)
    trace = trace_step(config, world)
    # On a GPU inputs are made a step ahead, except beside groups that send messages of their own.
    held = memory(config, moco, how, trace, ahead=on_gpu and layout.ranks == 1)
    collectives = traffic(config, moco, how, gpus)
    time = step_time(config, how, trace, collectives, held["weights"], hardware)
    return Plan(
        config=config,
        nodes=nodes,
        gpus=gpus,
        hardware=hardware,
        images=images,
        memory=held,
        collectives=collectives,
        flops=trace.flops * world,
        time=time,
    )
