"""What a run will need, before asking for it: memory, traffic, FLOPs, time, cores, storage.

Takes the flags of train.py and says on which machines. Memory and traffic are worked out from the
model itself; times are what the stated hardware allows, with the shares of its peaks that
`--hardware FILE.json` can replace.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from moco_scale.config import command_line
from moco_scale.config.flag_types import positive_int
from moco_scale.config.schema import Config
from moco_scale.planner.advice import advice
from moco_scale.planner.cluster import PRESETS, read_hardware
from moco_scale.planner.plan import GIB, Plan, make_plan
from moco_scale.utils.errors import UserError
from moco_scale.utils.log import tell

_IMAGES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``python -m moco_scale plan``: where it runs, and all of train.py's."""
    parser.add_argument("--nodes", type=positive_int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus", type=positive_int, default=8, help="GPUs of each (default: 8)")
    parser.add_argument(
        "--hardware",
        default="a100",
        metavar="NAME|FILE",
        help=f"{', '.join(PRESETS)}, or a JSON description (default: a100)",
    )
    parser.add_argument(
        "--images", type=positive_int, help="training images (default: the published data set's)"
    )
    parser.add_argument(
        "--scale",
        type=positive_int,
        nargs="+",
        metavar="NODES",
        help="a line for each of these numbers of nodes instead, with the same images on each GPU",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw memory and time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    command_line.add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns 1 where it does not fit, else 0.

    Raises:
        UserError: flags that contradict each other or cannot work.
    """
    if args.plot is not None:
        _check_plot(args.plot)
    hardware = read_hardware(args.hardware)
    config = command_line.config_of(vars(args))
    if args.scale:
        plans = [_scaled(args, config, nodes) for nodes in args.scale]
    else:
        plans = [make_plan(config, args.nodes, args.gpus, hardware, args.images)]
    if args.json:
        found = [p.as_json() for p in plans]
        tell(json.dumps(found if args.scale else found[0], indent=1))
    elif args.scale:
        tell(scaling_table(plans))
    else:
        tell(report(plans[0]))
    if args.plot is not None:
        from moco_scale.planner.plot import draw

        draw(plans, args.plot)
    return 0 if all(p.fits for p in plans) else 1


def _check_plot(path: Path) -> None:
    """Whether a figure can be written there. Raises UserError."""
    if path.exists():
        raise UserError(f"--plot {path} exists already; name another file")
    if path.suffix.lower() not in _IMAGES:
        raise UserError(f"--plot {path}: name a file that ends in {', '.join(_IMAGES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--plot {path}: the folder {path.parent} cannot be written")


def _scaled(args: argparse.Namespace, config: Config, nodes: int) -> Plan:
    """The plan for so many nodes, whose GPUs have as many images each."""
    if config.optim.batch_size * nodes % args.nodes:
        raise UserError(f"--scale {nodes}: not a number of nodes that --batch-size can grow to")
    batch = config.optim.batch_size * nodes // args.nodes
    config = command_line.config_of(vars(args) | {"batch_size": batch})
    return make_plan(config, nodes, args.gpus, read_hardware(args.hardware), args.images)


def report(plan: Plan) -> str:
    """The plan as text."""
    config, time = plan.config, plan.time
    batch, total = config.optim.batch_size, time.total
    lines = [
        f"{config.model.model}, {config.data.image_size} px, batch {batch}, queue "
        f"{config.contrast.nce_k}, {_engine(plan)}, {config.run.precision}, on {plan.nodes} x "
        f"{plan.gpus} {plan.hardware.name}",
        "",
        f"Memory of a GPU: {plan.memory_gib:.2f} of {plan.hardware.memory_gib:g} GiB"
        + ("" if plan.fits else "   DOES NOT FIT"),
    ]
    kinds = {**plan.memory, "CUDA, NCCL": int(plan.hardware.reserved_gib * GIB)}
    lines += [f"  {kind:24}{size / GIB:>9.3f} GiB" for kind, size in kinds.items()]
    lines += ["", "Sent by a GPU in a step (ring algorithms), MB"]
    lines.append(f"  {'':26}{'':15}{'payload':>10}{'sent':>10}{'across nodes':>14}  beside")
    for c in plan.collectives:
        lines.append(
            f"  {c.purpose:26}{c.kind:15}{c.payload / 1e6:>10.2f}{c.sent / 1e6:>10.2f}"
            f"{c.sent_across / 1e6:>14.2f}  {c.hidden_by or '(waited for)'}"
        )
    if not plan.collectives:
        lines.append("  nothing: one GPU")
    sent = sum(c.sent for c in plan.collectives)
    across = sum(c.sent_across for c in plan.collectives)
    lines.append(f"  {'in all':41}{'':10}{sent / 1e6:>10.2f}{across / 1e6:>14.2f}")
    lines += ["", f"A step: {1e3 * total:.1f} ms"]
    for name, seconds in (
        ("encoders", time.compute),
        ("InfoNCE", time.loss),
        ("augmentation", time.augment),
        ("update and average", time.update),
        (f"network not hidden, of {1e3 * time.network:.1f} ms", time.exposed),
    ):
        lines.append(f"  {name:32}{1e3 * seconds:>10.2f} ms {seconds / total:>6.0%}")
    lines += [
        "",
        f"{plan.images_per_second:,.0f} images/s, {plan.images_per_second / plan.world:,.0f} a "
        f"GPU; {plan.flops / 1e12:.1f} TFLOP a step, {plan.mfu:.1%} of the peak",
        f"{config.optim.epochs} epochs of {plan.images:,} images: {plan.steps:,} steps, "
        f"{plan.days:.2f} days, {plan.days * 24 * plan.world:,.0f} GPU-hours",
        f"Reading: {_short(plan.cores_per_node)} cores of each node, "
        f"{plan.storage_gbs:.2f} GB/s from storage in all",
    ]
    said = advice(plan)
    if said:
        lines += ["", *(f"- {line}" for line in said)]
    return "\n".join(lines)


def _engine(plan: Plan) -> str:
    run = plan.config.run
    return f"{run.engine} ({run.deepspeed})" if run.deepspeed else run.engine


def _short(number: float) -> str:
    """Two digits or more, so that little is not nothing."""
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def scaling_table(plans: list[Plan]) -> str:
    """A line for each number of nodes."""
    first = plans[0]
    lines = [
        f"{'GPUs':>6}{'batch':>8}{'GiB':>8}{'MB sent':>10}{'across':>10}{'step ms':>10}"
        f"{'waiting':>9}{'images/s':>12}{'efficiency':>12}{'days':>9}{'cores/node':>12}{'GB/s':>8}"
    ]
    for p in plans:
        sent = sum(c.sent for c in p.collectives)
        across = sum(c.sent_across for c in p.collectives)
        speed = p.images_per_second / p.world / (first.images_per_second / first.world)
        lines.append(
            f"{p.world:>6}{p.config.optim.batch_size:>8}{p.memory_gib:>8.1f}{sent / 1e6:>10.1f}"
            f"{across / 1e6:>10.1f}{1e3 * p.time.total:>10.1f}{p.time.exposed / p.time.total:>9.0%}"
            f"{p.images_per_second:>12,.0f}{speed:>12.0%}{p.days:>9.2f}{_short(p.cores_per_node):>12}"
            f"{p.storage_gbs:>8.2f}" + ("" if p.fits else "  DOES NOT FIT")
        )
    return "\n".join(lines)
