"""Advice for a plan that does not fit in memory or waits for the network."""

from __future__ import annotations

from moco_scale.methods.key_queue import crowded_queue
from moco_scale.planner.plan import GIB, Plan

_WAITING = 0.1  # share of a step from which waiting for the network is mentioned
_CORES = 8.0  # usual CPU cores per GPU of a node


def advice(plan: Plan) -> list[str]:
    """Return lines of advice, the most helpful first."""
    lines = _memory(plan) if not plan.fits else []
    config, time = plan.config, plan.time
    if time.exposed > _WAITING * time.total:
        slow = max((c for c in plan.collectives), key=lambda c: c.sent_across or c.sent)
        lines.append(
            f"{time.exposed / time.total:.0%} of a step waits for the network, most of it for "
            f"{slow.purpose} ({slow.kind}): more images on each GPU (a larger --batch-size) "
            "or fewer GPUs" + ("" if config.run.precision != "fp32" else ", or --precision bf16")
        )
    if time.loss > _WAITING * time.total:
        lines.append(
            f"InfoNCE over {config.contrast.nce_k} keys takes {time.loss / time.total:.0%} of a "
            "step, sharded or not: a shorter queue (--nce-k) takes less"
        )
    if plan.cores_per_node > _CORES * plan.gpus:
        lines.append(
            f"reading needs {plan.cores_per_node:.0f} cores of each node: shards of smaller "
            "images (shard --short-side) need fewer"
        )
    if not config.contrast.mask_same_image:
        lines += crowded_queue(config.contrast.nce_k, plan.images)
    return lines


def _memory(plan: Plan) -> list[str]:
    """Return ways to save memory, the largest saving first."""
    memory, config = plan.memory, plan.config
    over = plan.memory_gib - plan.hardware.memory_gib
    lines = [f"{over:.1f} GiB too much"]
    state = sum(memory[k] for k in ("weights", "key encoder", "optimizer", "gradients"))
    ways = []
    if config.run.queue == "replicated" and plan.world > 1:
        saved = memory["queue"] * (1 - 1 / plan.world)
        ways.append((saved, "--queue sharded"))
    if plan.world > 1 and config.run.engine != "fsdp" and not _stage3(plan):
        saved = state * (1 - 1 / plan.world)
        ways.append((saved, "--engine fsdp, or ds_configs/zero3.json"))
    activations = memory["activations"]
    if not config.run.activation_checkpointing:
        ways.append((0.6 * activations, "--activation-checkpointing"))
    if config.run.precision == "fp32":
        ways.append((0.45 * activations, f"--precision {plan.hardware.half[0]}"))
    rows = config.optim.batch_size // plan.world // config.run.accumulation_steps
    if rows > 1:
        ways.append((0.5 * activations, "twice the --accumulation-steps, or twice the GPUs"))
    for saved, what in sorted(ways, reverse=True):
        if saved > 0.02 * plan.hardware.memory_gib * GIB:
            lines.append(f"{what}: about {saved / GIB:.1f} GiB less")
    return lines


def _stage3(plan: Plan) -> bool:
    return any(c.purpose.startswith("query,") for c in plan.collectives)
