"""Summary of a set of shards, from its index and a sample of images."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from moco_scale.data.images.decode import DecodeError, image_size
from moco_scale.data.images.formats import image_kind
from moco_scale.data.kinds import DataSet
from moco_scale.data.shards.protocols import Shards
from moco_scale.utils.files import size_text
from moco_scale.utils.log import tell
from moco_scale.utils.text import printable

SAMPLE = 1000
_NAMED = 5  # classes with most and with fewest images


def summarise(data: DataSet) -> dict[str, Any]:
    """Counts, sizes, classes and formats of each split, as plain values.

    Args:
        data: a data set on this machine.

    Returns:
        ``path``, ``made`` (what the index says about how), and under ``splits`` for each:
        ``images``, ``shards``, ``bytes`` (of the tars); ``classes`` (names), ``per_class``
        (images of each, in their order), ``unlabelled``, ``why_unlabelled``; and of ``sampled``
        images, spread over the split: ``image_bytes``, ``width``, ``height``, ``short_side``
        as [smallest, 5 %, median, 95 %, largest], ``formats`` (counts), ``unreadable`` (whose
        header is none).

    Raises:
        UserError: there are no shards, or some are missing or damaged.
    """
    splits, made = {}, dict[str, Any]()
    for split in sorted(data.splits, key=lambda split: (split != "train", split)):
        shards = data.open(split)
        made = {k: printable(v, 4096) if isinstance(v, str) else v for k, v in shards.made.items()}
        labels = shards.labels
        counts = np.bincount(labels[labels >= 0], minlength=len(shards.classes))
        splits[split] = {
            "images": len(shards),
            "shards": len(shards.sizes),
            "bytes": sum(shards.sizes),
            "classes": shards.classes,
            "per_class": counts.tolist(),
            "unlabelled": int((labels < 0).sum()),
            "why_unlabelled": shards.why_unlabelled,
            **_sampled(shards),
        }
    return {"path": data.source.spec, "made": made, "splits": splits}


def _sampled(shards: Shards) -> dict[str, Any]:
    places = np.unique(np.linspace(0, len(shards) - 1, SAMPLE).astype(np.int64))
    formats: Counter[str] = Counter()
    sizes, sides, unreadable = [], [], 0
    for place in places.tolist():
        data = shards.read(place)
        sizes.append(len(data))
        formats[(image_kind(data) or "?").lower()] += 1
        try:
            sides.append(image_size(data))
        except DecodeError:
            unreadable += 1
    heights, widths = np.array(sides or [(0, 0)]).T
    return {
        "sampled": len(places),
        "image_bytes": _spread(np.array(sizes)),
        "width": _spread(widths),
        "height": _spread(heights),
        "short_side": _spread(np.minimum(heights, widths)),
        "formats": dict(formats.most_common()),
        "unreadable": unreadable,
    }


def _spread(values: np.ndarray) -> list[int]:
    """Compute [smallest, 5 %, median, 95 %, largest]."""
    quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1], method="nearest")
    return [int(value) for value in quantiles]


def print_summary(found: dict[str, Any]) -> None:
    """Print a summary."""
    tell(found["path"])
    made = found["made"]
    if made.get("by"):
        tell(f"  made by {printable(made['by'])} from {printable(made.get('source'))}")
    for split, part in found["splits"].items():
        count = part["shards"]
        tell(
            f"  {split}: {part['images']:,} images in {count:,} shard{'s' * (count != 1)}, "
            f"{size_text(part['bytes'])}"
        )
        for name, text in _lines(part):
            tell(f"    {name:14}{text}")


def _lines(part: dict[str, Any]) -> list[tuple[str, str]]:
    sampled, lines = part["sampled"], []
    least, low, median, high, most = part["image_bytes"]
    of = "" if sampled == part["images"] else f" (of {sampled} images spread over all)"
    lines.append(
        (
            "file size",
            f"median {size_text(median)}, 90 % within {size_text(low)} to {size_text(high)}, all "
            f"within {size_text(least)} to {size_text(most)}{of}",
        )
    )
    width, height, short = (part[side] for side in ("width", "height", "short_side"))
    lines.append(("pixels", f"median {width[2]} x {height[2]}, largest {width[4]} x {height[4]}"))
    lines.append(
        (
            "shorter side",
            f"median {short[2]}, 90 % within {short[1]} to {short[3]}, least {short[0]}",
        )
    )
    formats = (f"{name} {100 * n / sampled:.3g} %" for name, n in part["formats"].items())
    lines.append(("formats", ", ".join(formats)))
    if part["unreadable"]:
        lines.append(("UNREADABLE", f"{part['unreadable']} of {sampled}: see shard --check"))
    counts = part["per_class"]
    if not part["classes"]:
        why = printable(part["why_unlabelled"], 400)
        reason = f"the labels are not used: {why}" if why else "the images have no labels"
        return [*lines, ("classes", f"none: {reason}")]
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    same = min(counts) == max(counts)
    each = f"{min(counts)}" if same else f"{min(counts)} to {max(counts)}"
    lines.append(("classes", f"{len(counts)}, of {each} images each"))

    def named(some: list[int]) -> str:
        return ", ".join(f"{printable(part['classes'][c], 60)} {counts[c]}" for c in some)

    if len(counts) <= 2 * _NAMED:
        lines.append(("", named(order)))
    elif not same:
        lines.append(("  most", named(order[:_NAMED])))
        lines.append(("  fewest", named(order[: -_NAMED - 1 : -1])))
    if part["unlabelled"]:
        lines.append(("unlabelled", f"{part['unlabelled']} images"))
    return lines
