"""Figure of plans: memory of a GPU and time of a step by kind."""

from __future__ import annotations

from pathlib import Path

from moco_scale.planner.plan import GIB, Plan
from moco_scale.utils.matplotlib_home import matplotlib_home


def draw(plans: list[Plan], path: Path) -> None:
    """Write a PNG with a bar for each plan."""
    with matplotlib_home():
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), constrained_layout=True)
    places = list(range(len(plans)))
    kinds = list(plans[0].memory)
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    bottom = [0.0] * len(plans)
    for colour, kind in zip(colours, [*kinds, "CUDA, NCCL"], strict=False):
        heights = [
            p.hardware.reserved_gib if kind == "CUDA, NCCL" else p.memory[kind] / GIB for p in plans
        ]
        left.bar(places, heights, bottom=bottom, label=kind, color=colour, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    left.axhline(plans[0].hardware.memory_gib, color="black", linestyle="--", linewidth=1)
    left.set(ylabel="GiB", title=f"Memory of a GPU ({plans[0].hardware.name}: dashed)")
    bottom = [0.0] * len(plans)
    for number, (label, attribute) in enumerate(
        (
            ("encoders", "compute"),
            ("InfoNCE", "loss"),
            ("augmentation", "augment"),
            ("update and average", "update"),
            ("waiting for the network", "exposed"),
        )
    ):
        heights = [1e3 * getattr(p.time, attribute) for p in plans]
        right.bar(places, heights, bottom=bottom, label=label, color=colours[number], width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(ylabel="ms", title="A step")
    for axes in (left, right):
        axes.set_xticks(places, [str(p.world) for p in plans])
        axes.set_xlabel("GPUs")
        axes.set_xlim(-1, len(plans))
        axes.margins(y=0.15)
        axes.legend(fontsize=8, frameon=False)
    first = plans[0].config
    figure.suptitle(
        f"{first.model.model}, {first.data.image_size} px, queue {first.contrast.nce_k}, "
        f"{first.run.engine}, {first.run.precision}"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
