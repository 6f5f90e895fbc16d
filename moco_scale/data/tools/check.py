"""``python -m moco_scale shard --check DIR``: read every byte, decode every image."""

from __future__ import annotations

from pathlib import Path

from moco_scale.data.tools.examine import examine_all, list_folder
from moco_scale.utils.files import size_text
from moco_scale.utils.log import tell

_MOST_SHOWN = 100


def check(path: Path, workers: int) -> int:
    """Read every byte, decode every image, and print problems.

    Returns:
        0 when there are none, else 1.

    Raises:
        UserError: There are no shards.
    """
    folder = list_folder(path)
    if not folder.indexed:
        tell(f"{path} has no index of its own: only what the tars say can be checked")
    findings = [f"index: {problem}" for problem in folder.problems]
    images, read, shards, damaged = 0, 0, 0, 0
    for _, examined in examine_all(folder, workers, f"checking {path}"):
        shards += 1
        images += examined.images
        read += max(examined.bytes, 0)
        damaged += bool(examined.findings)
        findings += map(str, examined.findings)
    for line in findings[:_MOST_SHOWN]:
        tell(line)
    if len(findings) > _MOST_SHOWN:
        tell(f"and {len(findings) - _MOST_SHOWN} more")
    tell(
        f"{images} images in {shards} shard{'s' * (shards != 1)} read and decoded, "
        f"{size_text(read)}"
    )
    if not findings:
        tell(f"{path} is whole")
        return 0
    parts = ["its index"] * bool(folder.problems)
    parts += [f"{damaged} of its {shards} shards"] * bool(damaged)
    tell(
        f"{path} is DAMAGED: {' and '.join(parts)}. "
        "Copy what is damaged again from where it was made, or keep what can be kept with: "
        f"python -m moco_scale shard --repair {path}"
    )
    return 1
